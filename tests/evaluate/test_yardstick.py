"""The loss of each token on the same tokens, and differences with their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deepseek_exp.data.shards import Shard
from deepseek_exp.evaluate import Scores, agreement, change, score, token_set
from deepseek_exp.inference import from_pretrained
from tests.golden.test_old_checkpoint import CHECKPOINT


def shard(folder, name, ids):
    np.asarray(ids, dtype=np.uint16).tofile(folder / name)
    return Shard(folder / name, "uint16", len(ids), 1, 0, "", "")


def scores(nll, top1=None):
    top1 = torch.zeros(nll.shape, dtype=torch.int32) if top1 is None else top1
    return Scores(nll, top1, 0, 0)


def test_sequences_are_spread_over_each_text(tmp_path):
    texts = {"a": shard(tmp_path, "a", range(101)), "b": shard(tmp_path, "b", range(200, 221))}
    found = token_set(texts, torch.full((300,), 2), 10, 40)
    assert found.names == ("a", "b") and found.text.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.tokens[:, 0].tolist() == [0, 20, 50, 70, 200, 210]  # of 10 and of 2 sequences
    assert found.tokens[1].tolist() == list(range(20, 31))
    assert found.n_bytes == 6 * 10 * 2
    fewer = token_set(texts, torch.full((300,), 2), 10, 20)
    assert len(fewer.tokens) == 4 and fewer.digest != found.digest


def test_a_change_is_paired_and_its_error_is_over_sequences():
    torch.manual_seed(0)
    other = torch.rand(50, 8) + 1
    shift = torch.randn(50, 1) * 0.1  # the tokens of a sequence move together
    found = change(scores(other + shift), scores(other))
    assert found.percent == pytest.approx(100 * float(shift.mean()) / float(other.mean()), rel=1e-4)
    assert found.standard_error == pytest.approx(
        100 * float(shift.std()) / math.sqrt(50) / float(other.mean()), rel=1e-4
    )
    assert change(scores(other), scores(other)).percent == 0
    assert math.isnan(change(scores(other[:1]), scores(other[:1])).standard_error)


def test_agreement_is_of_the_most_likely_tokens():
    nll = torch.ones(2, 2)
    one, other = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]])
    assert agreement(scores(nll, one), scores(nll, other)) == 0.75


def test_scores_are_those_of_the_model_and_are_kept(tmp_path):
    tokens = token_set({"a": shard(tmp_path, "a", np.arange(300) % 256)}, torch.ones(270, dtype=torch.int64), 16, 300)
    found = score(CHECKPOINT, tokens, torch.device("cpu"), torch.float32)
    model = from_pretrained(CHECKPOINT).model
    with torch.no_grad():
        (_, nll), _ = model.losses(tokens.tokens)
        top1 = model(tokens.tokens[:, :-1]).argmax(-1)
    torch.testing.assert_close(found.nll, nll)
    assert torch.equal(found.top1, top1.int())
    assert found.n_parameters == sum(p.numel() for p in model.parameters())
    assert found.by_text(tokens) == {"a": pytest.approx(found.loss)}
    found.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert torch.equal(again.nll, found.nll) and again.n_bytes == found.n_bytes > 4 * found.n_parameters
