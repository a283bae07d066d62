"""The loss of each part of a mixture against a plain computation."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch

from deepseek_exp.data import Batch
from deepseek_exp.models import MicroBatch
from deepseek_exp.tracking.metrics import check_names
from deepseek_exp.train import build
from tests.config.test_config import composed
from tests.models.looking import logits_ahead

KINDS = {"sums": "{0} + {0} is", "words": "the {0}th word,", "code": "def f{0}(x):"}


@pytest.fixture
def parts(tmp_path) -> build.Parts:
    """Parts of an experiment on a mixture of three texts, of which the last is a short one."""
    overrides = []
    for k, (name, text) in enumerate(KINDS.items()):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"text": text.format(i) * 20} for i in range(400 - 150 * k)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides += [f"+data.mixture.{name}.path={path}", f"+data.mixture.{name}.weight={k + 1}"]
    sizes = ("trainer.micro_batch_seqs=4", "trainer.eval_seqs=36", "device=cpu")
    cfg = composed("size=tiny", "data=mixture", *overrides, *sizes, f"output_dir={tmp_path}")
    return build.build_parts(cfg)


def test_validation_loss_of_each_part(parts, monkeypatch):
    logged = {}
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    monkeypatch.setattr(trainer.__class__, "logger", type("L", (), {"log_metrics": lambda _, v, s: logged.update(v)})())
    model = parts.lit.model
    trainer.validate(parts.lit, datamodule=parts.datamodule, verbose=False)
    with torch.no_grad():  # the second validation, of other weights, starts from zero
        for p in model.parameters():
            p.mul_(1.5)
    trainer.validate(parts.lit, datamodule=parts.datamodule, verbose=False)
    nll = {k: [] for k in range(3)}
    with torch.no_grad():
        for batch in parts.datamodule.val_dataloader():
            for tokens, part in zip(batch.tokens, batch.part.tolist(), strict=True):
                logits = model(tokens[None, :-1])[0]
                nll[part].append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").double())
    expected = {f"val/loss/{name}": torch.cat(nll[k]).mean().item() for k, name in enumerate(KINDS)}
    check_names(logged)
    assert {name: v for name, v in logged.items() if name.startswith("val/loss/")} == pytest.approx(expected, rel=1e-6)
    assert len({round(v, 6) for v in expected.values()}) == 3
    counts = [sum(map(len, nll[k])) for k in range(3)]
    assert counts[2] < counts[0]  # the overall loss weighs the parts by tokens
    overall = sum(v * n for v, n in zip(expected.values(), counts, strict=True)) / sum(counts)
    assert logged["val/loss"] == pytest.approx(overall, rel=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=v3_moe",),
        ("model=v1_dense", "data.order=contiguous", "model.memory_len=15", "trainer.eval_seqs=40"),
    ],
    ids=["v3_moe", "memory"],
)
def test_validation_does_not_depend_on_the_micro_batch(tmp_path, monkeypatch, overrides):
    logged = []
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    monkeypatch.setattr(trainer.__class__, "logger", type("L", (), {"log_metrics": lambda _, v, s: logged.append(v)})())
    for micro in (8, 1, 2):
        sizes = ("trainer.global_batch_seqs=8", f"trainer.micro_batch_seqs={micro}", "trainer.eval_seqs=37")
        fixed = ("size=tiny", "data=synthetic", "device=cpu", f"output_dir={tmp_path}", "trainer.n_threads=1")
        parts = build.build_parts(composed(*fixed, *sizes, *overrides))
        trainer.validate(parts.lit, datamodule=parts.datamodule, verbose=False)
    assert len(logged[0]) >= 3
    for values in logged[1:]:
        assert values == pytest.approx(logged[0], rel=1e-6)
        assert values["val/unigram_bits_per_byte"] == pytest.approx(logged[0]["val/unigram_bits_per_byte"], rel=1e-12)


def test_the_label_of_a_sequence_is_the_domain_of_its_part(tmp_path):
    overrides = []
    for name in ("law", "general"):  # not the order of model.moe.domains
        (tmp_path / f"{name}.txt").write_text(f"the {name} of things\n" * 3000)
        overrides += [f"+data.mixture.{name}.path={tmp_path / name}.txt"]
    model = ("model=v5_domain_moe", "size=tiny", "device=cpu")
    lit = build.build_parts(composed(*model, "data=mixture", *overrides, f"output_dir={tmp_path}")).lit
    seen = []
    lit.model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    lit.objective.from_tokens(
        lit.model, lit.micro_batch(Batch(torch.zeros(3, 9, dtype=torch.int64), torch.tensor([0, 1, -1]), 3))
    )
    assert seen[0].tolist() == [3, 0, -1]  # law, general, and text that is no part of a mixture


def test_the_training_loss_adds_the_mtp_loss(tmp_path):
    model = ("model=v3_moe", "size=tiny", "model.n_mtp_layers=2", "model.mtp_loss_weight=0.25")
    lit = build.build_parts(composed(*model, "data=synthetic", "device=cpu", f"output_dir={tmp_path}")).lit
    tokens = torch.randint(0, 512, (3, 17), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens, None)
    loss, nll, mtp_loss, *_ = lit.objective.from_tokens(lit.model, batch)
    logits, ahead = logits_ahead(lit.model, tokens)

    def mean_nll(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    depths = [mean_nll(ahead[0], tokens[:, 2:]), mean_nll(ahead[1], tokens[:, 3:])]
    assert mtp_loss.item() == pytest.approx((sum(depths) / 2).item())
    assert nll.mean().item() == pytest.approx(mean_nll(logits, tokens[:, 1:]).item())
    assert loss.item() == pytest.approx((nll.mean() + 0.25 * mtp_loss).item())
    lit.eval()  # no look ahead outside of training
    assert lit.objective.from_tokens(lit.model, batch).mtp_loss.item() == 0


def test_the_loss_without_labels_lets_the_routers_infer_and_counts_nothing(tmp_path):
    overrides = []
    for name in ("general", "law"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} of things\n" * 3000)
        overrides += [f"+data.mixture.{name}.path={tmp_path / name}.txt"]
    model = ("model=v5_domain_moe", "size=tiny", "device=cpu")
    lit = build.build_parts(composed(*model, "data=mixture", *overrides, f"output_dir={tmp_path}")).lit.eval()
    tokens = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in lit.moe_layers:
            layer.experts.w_down.mul_(50)  # so that the experts decide
        lit.evaluate_unlabelled(Batch(tokens, torch.tensor([0, 1]), 2))
        nats = float(lit.val_unlabelled_nats)
        expected, labelled = (
            torch.nn.functional.cross_entropy(x.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
            for x in (lit.model(tokens[:, :-1]), lit.model(tokens[:, :-1], domain=torch.tensor([0, 3])))
        )
    assert nats == pytest.approx(expected)
    assert nats != pytest.approx(labelled, rel=1e-4)
    lit.reset_counts()
    with torch.no_grad():
        lit.evaluate_unlabelled(Batch(tokens, torch.tensor([0, 1]), 2))
    assert all(layer.counts.sum() == 0 for layer in lit.moe_layers)
