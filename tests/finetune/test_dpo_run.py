"""Preference training as a run: one process, layouts, micro-batches, resume, and the cached reference."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_exp.errors import DataError
from tests.finetune import row_files
from tests.parallel.layouts import Watch, difference, layout, n_ranks

STEPS = (
    "do=dpo",
    "dpo.beta=0.5",
    "trainer.max_steps=4",
    "trainer.eval_every_steps=2",
    "trainer.eval_seqs=8",
    "trainer.checkpoint_every_steps=2",
    "trainer.micro_batch_seqs=2",
    "optim.warmup_steps=1",
    "data.seq_len=24",
    "model.n_layers=2",
    "model.init_std=0.1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return row_files.pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def whole(layouts, data):
    return layouts.run(1, *STEPS, *data)


def test_the_loss_starts_at_log_2_and_falls(whole):
    losses = whole.trace("train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert whole.metrics[1]["train/preference_accuracy"] == pytest.approx(0.5, abs=0.26)
    assert whole.trace("val/loss")[-1] < math.log(2)
    last = whole.metrics[4]
    assert last["train/reward_margin"] == pytest.approx(last["train/chosen_reward"] - last["train/rejected_reward"])
    assert last["val/preference_accuracy"] > 0.5 and last["val/reward_margin"] > 0


def same(a, b):
    """Initial weights moved by a unit in the last place alone lead to weights 1.2e-5 apart (four seeds)."""
    found = difference(a, b)
    assert found.loss <= 5e-6 and found.grad_norm <= 1e-5 and found.weight <= 3e-5, found
    for name in ("val/reward_margin", "train/preference_accuracy", "val/preference_accuracy"):
        # At the first step policy and reference are equal, so rounding alone decides which completion is preferred.
        first = 1 if name.startswith("train/") else 0
        assert a.trace(name)[first:] == pytest.approx(b.trace(name)[first:], abs=1e-5)


def test_micro_batches_of_one_and_of_four_pairs_train_the_same(layouts, data, whole):
    same(whole, layouts.run(1, *STEPS, *data, "trainer.micro_batch_seqs=8"))


@pytest.mark.parametrize(
    "degrees",
    [
        {"dp": 2},
        pytest.param({"dp": 2, "zero_stage": 2}, marks=pytest.mark.long),
        pytest.param({"tp": 2, "pp": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_layout_trains_the_same(layouts, data, whole, degrees):
    same(whole, layouts.run(n_ranks(degrees), *STEPS, *data, *layout(**degrees)))


@pytest.mark.long
def test_fused_kernels_compute_the_same_step(layouts, data, whole):
    one = ("trainer.max_steps=1", "optim.warmup_steps=0", "kernels=fused")
    fused = layouts.run(1, *STEPS, *data, *one).metrics[1]
    for name in ("train/loss", "train/reward_margin", "optim/grad_norm"):
        assert fused[name] == pytest.approx(whole.metrics[1][name], rel=1e-4, abs=1e-5)


@pytest.mark.long
def test_experts_on_two_ranks_train_the_same(layouts, data):
    moe = (*STEPS, *data, "model=v2_moe")
    same(layouts.run(1, *moe), layouts.run(2, *moe, *layout(dp=2, ep=2)))


@pytest.mark.long
@pytest.mark.parametrize("loss", ["ipo", "orpo"])
def test_other_losses_fall(layouts, data, loss):
    losses = layouts.run(1, *STEPS, *data, f"dpo.loss={loss}", "trainer.eval_every_steps=1").trace("val/loss")
    assert losses[-1] < losses[0]


class NoReference(Watch):
    """Fails if the reference is run."""

    def before_build(self, cfg):
        from deepseek_exp.train import reference

        def run(*args):
            raise AssertionError("the reference ran again")

        reference._log_probs = run
        return cfg


def test_the_reference_is_read_from_the_cache_and_a_resume_continues_bit_for_bit(layouts, data, whole):
    half = layouts.run(1, *STEPS, *data, watch=row_files.Stopped, watch_args=(2,))
    resumed = layouts.run(1, *STEPS, *data, watch=NoReference, resume=half)
    wanted = whole.weights()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.weights().items())
    one = ("trainer.max_steps=1", "optim.warmup_steps=0")
    with pytest.raises(AssertionError, match="the reference ran again"):
        layouts.run(1, *STEPS, *data, "seed=7", *one, watch=NoReference)  # other weights


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ('{"prompt": "a", "chosen": "b"}', "has no key 'rejected'"),
        ('{"prompt": "a", "chosen": 7, "rejected": "c"}', "holds a number under 'chosen'"),
        ('{"prompt": "a", "chosen": "b", "rejected": " "}', "holds no text under 'rejected'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "has equal texts"),
        ('["a"]', "holds a list, not an object"),
        ('{"prompt": "a"', "is not valid JSON"),
    ],
)
def test_malformed_rows(tmp_path, row, rule):
    from deepseek_exp.data import prepare
    from tests.config.test_config import composed

    overrides = row_files.pairs(tmp_path)
    path = tmp_path / "preference.jsonl"
    path.write_text(path.read_text() + row + "\n")
    cfg = composed("size=tiny", "do=dpo", *overrides, f"output_dir={tmp_path}").data
    with pytest.raises(DataError, match=rule) as caught:
        prepare(cfg)
    assert f"{path}:25" in str(caught.value)
    skipping = composed("size=tiny", "do=dpo", *overrides, "data.on_bad_line=skip", f"output_dir={tmp_path}").data
    assert sum(prepare(skipping).skipped.values()) == 1
