"""The preference losses against those of TRL's trainers, on the same batch and the same weights."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from deepseek_exp.config import DPOConfig, PreferenceLoss
from deepseek_exp.finetune.dpo import PreferenceObjective
from deepseek_exp.inference import from_pretrained
from deepseek_exp.models import MicroBatch
from tests.huggingface.releases import some_tokenizer, their_model

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.long

BETA = 0.3
N_PROMPT = [3, 3, 5, 5, 1, 1]  # tokens of the prompt of each row; chosen and rejected in turn
N_TOKENS = [9, 12, 7, 11, 10, 6]
SEQ = 12
ALONE = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return one model as ours and as transformers', in float64."""
    folder, theirs = tmp_path_factory.mktemp("trl"), their_model("llama")
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(some_tokenizer().json)
    return from_pretrained(folder).model.double(), theirs.double()


def batch(rows):
    """Return tokens, the mask of the completions among them, and which of them are no padding, of some rows."""
    tokens = torch.randint(1, 300, (len(N_TOKENS), SEQ), generator=torch.Generator().manual_seed(3))
    place = torch.arange(SEQ)
    there = place < torch.tensor(N_TOKENS)[:, None]
    completion = there & (place >= torch.tensor(N_PROMPT)[:, None])
    return tuple(t[rows] for t in (tokens * there, completion, there))


def ours(model, loss, rows, reference=None):
    tokens, completion, _ = batch(rows)
    cfg = DPOConfig(loss=PreferenceLoss(loss), beta=BETA, label_smoothing=0.0, reference=None)
    micro_batch = MicroBatch(tokens, None, completion[:, 1:], reference=reference)
    return PreferenceObjective(cfg).from_tokens(model, micro_batch).loss.item()


def log_probs(model, tokens, completion):
    logits = model(tokens).logits[:, :-1]
    found = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return found * completion[:, 1:]  # (sequences, seq - 1)


@pytest.mark.parametrize(("loss", "of_trl"), [("dpo", "sigmoid"), ("ipo", "ipo")])
@torch.no_grad()
def test_losses_against_a_reference_are_those_of_trl(models, loss, of_trl):
    from trl import DPOTrainer

    model, theirs = models
    rows = list(range(len(N_TOKENS)))
    reference = -torch.rand(len(rows), generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 30
    tokens, completion, there = batch([*rows[::2], *rows[1::2]])  # TRL has all chosen first
    found = log_probs(theirs, tokens, completion)
    outputs = SimpleNamespace(log_probs=found, entropy=found, mean_logits=found, is_top1=found > 0)
    trainer = object.__new__(DPOTrainer)
    trainer.__dict__ |= {
        **{"model": SimpleNamespace(training=True), "accelerator": ALONE, "aux_loss_enabled": False, "ld_alpha": None},
        **{"precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "loss_types": [of_trl], "beta": BETA},
        **{"loss_weights": [1.0], "label_smoothing": 0.0, "use_weighting": False, "_metrics": defaultdict(dict)},
        **{"_total_train_tokens": 0, "_tp_size": 1},
    }
    trainer._metrics["train"] = defaultdict(list)
    inputs = {"input_ids": tokens, "attention_mask": there, "completion_mask": completion.long()}
    inputs |= {"ref_chosen_logps": reference[::2], "ref_rejected_logps": reference[1::2]}
    wanted = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False).item()
    assert ours(model, loss, rows, reference) == pytest.approx(wanted, rel=1e-6)


def orpo_of_trl(theirs, rows):
    """Return the loss of TRL, and its odds-ratio part alone."""
    from trl.experimental.orpo import ORPOTrainer

    tokens, completion, there = batch(rows)
    labels = tokens.masked_fill(~completion, -100)
    given = {}
    for first, side in enumerate(("chosen", "rejected")):
        part = slice(first, None, 2)
        given |= {f"{side}_input_ids": tokens[part], f"{side}_attention_mask": there[part].long()}
        given |= {f"{side}_labels": labels[part]}
    trainer = object.__new__(ORPOTrainer)
    trainer.__dict__ |= {"is_encoder_decoder": False, "padding_value": 0, "aux_loss_enabled": False}
    trainer.__dict__ |= {"accelerator": ALONE, "beta": BETA}
    loss, metrics = trainer.get_batch_loss_metrics(theirs, given)
    return loss.item(), -BETA * metrics["log_odds_ratio"]


@torch.no_grad()
def test_orpo_is_that_of_trl(models):
    """TRL adds the loss of the chosen prompt too, so that only a pair whose prompt is one token has the same sum."""
    model, theirs = models
    assert ours(model, "orpo", [4, 5]) == pytest.approx(orpo_of_trl(theirs, [4, 5])[0], rel=1e-6)
    tokens, completion, _ = batch([0, 1, 2, 3])
    chosen = log_probs(theirs, tokens, completion)[::2].sum(1) / completion[::2].sum(1)  # (pairs,)
    wanted = orpo_of_trl(theirs, [0, 1, 2, 3])[1] - chosen.mean().item()
    assert ours(model, "orpo", [0, 1, 2, 3]) == pytest.approx(wanted, rel=1e-6)
