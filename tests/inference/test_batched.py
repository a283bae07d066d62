"""Batched sampling: each completion as if sampled alone, its log-probabilities those of the model."""

from __future__ import annotations

import collections

import pytest
import torch

from deepseek_exp.errors import UserError
from deepseek_exp.inference import generate, sample_completions
from deepseek_exp.inference.batched import _pick
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed
from tests.models.test_transformer import build, with_strong_gates

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [], [16, 17, 18]]
ARGS = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "end_id": 0}
VERSIONS = ["v1_dense", "v2_moe", "v3_moe", "v2_5_sparse"]


def model_of(version, dtype=torch.float32) -> Transformer:
    cfg = composed(f"model={version}", "size=tiny").model
    model = Transformer(cfg, TORCH).to(dtype)
    init_weights(model, cfg, 0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)  # far from a uniform distribution
    return model.eval()


@pytest.mark.parametrize("version", VERSIONS)
def test_completions_equal_those_sampled_alone(version):
    model = model_of(version)
    together = sample_completions(model, PROMPTS, seeds=range(5), **ARGS)
    for i, (prompt, found) in enumerate(zip(PROMPTS, together, strict=True)):
        (alone,) = sample_completions(model, [prompt], seeds=[i], **ARGS)
        assert found.tokens == alone.tokens and found.ended == alone.ended
        assert found.log_probs == pytest.approx(alone.log_probs, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_log_probs_equal_a_full_forward_pass(temperature):
    model = model_of("v3_moe")
    for prompt, found in zip(
        PROMPTS, sample_completions(model, PROMPTS, seeds=range(5), **{**ARGS, "temperature": temperature}), strict=True
    ):
        prompt = prompt or [0]
        logits = model(torch.tensor([prompt + found.tokens]))[0, len(prompt) - 1 : -1]
        wanted = (logits / (temperature or 1.0)).log_softmax(-1).gather(-1, torch.tensor(found.tokens)[:, None])
        torch.testing.assert_close(torch.tensor(found.log_probs), wanted[:, 0].float(), rtol=1e-4, atol=1e-4)


def test_most_likely_tokens_are_those_of_generate():
    model = with_strong_gates(build(init_std=0.3))
    greedy = {**ARGS, "temperature": 0.0}
    for prompt, found in zip(PROMPTS, sample_completions(model, PROMPTS, seeds=range(5), **greedy), strict=True):
        wanted = generate(model, prompt, seed=0, **greedy)
        assert [t for t in found.tokens if t != 0] == wanted


def test_ends_at_the_end_token_each_on_its_own():
    model = build(init_std=0.3)
    free = sample_completions(model, PROMPTS, seeds=range(5), **ARGS)
    end = free[2].tokens[3]
    stopped = sample_completions(model, PROMPTS, seeds=range(5), **{**ARGS, "end_id": end})
    assert stopped[2].tokens[-1] == end and stopped[2].ended and len(stopped[2].tokens) <= 4
    lengths = []
    for a, b in zip(free[:3], stopped[:3], strict=True):  # the empty prompt starts with the end token
        cut = a.tokens.index(end) + 1 if end in a.tokens else len(a.tokens)
        assert b.tokens == a.tokens[:cut] and b.log_probs == a.log_probs[:cut] and len(b.log_probs) == cut
        assert b.ended == (end in a.tokens)
        lengths.append(cut)
    assert len(set(lengths)) > 1


def test_seed_decides_the_completion():
    model = build(init_std=0.3)
    first, again, other = (
        sample_completions(model, PROMPTS[:1] * 2, seeds=s, **ARGS) for s in ([1, 2], [1, 2], [3, 1])
    )
    assert first == again and first[0].tokens == other[1].tokens and first[0].tokens != first[1].tokens


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_frequencies(temperature, top_p):
    probs = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    n = 20_000
    draw = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token, log_prob = _pick(probs.log().expand(n, -1), temperature, top_p, draw)
    wanted = probs ** (1 / temperature)
    wanted /= wanted.sum()
    torch.testing.assert_close(log_prob, wanted.log()[token])
    if top_p < 1:
        wanted = torch.tensor([0.5, 0.0, 0.3, 0.0, 0.0], dtype=torch.float64) / 0.8
    counts = collections.Counter(token.tolist())
    found = torch.tensor([counts[i] / n for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 / n)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_the_tokenizer_does_not_have_are_not_selected(temperature):
    logits = torch.tensor([[0.0, 1.0, 5.0, 9.0]]).expand(5, -1)
    draw = torch.linspace(0, 0.999, 5, dtype=torch.float64)
    for top_p in (1.0, 0.9):
        token, log_prob = _pick(logits, temperature, top_p, draw, 2)
        assert token.max() == 1 and (temperature == 0.0) == (token.min() == 1)
        wanted = logits[0].log_softmax(-1)[token]
        torch.testing.assert_close(log_prob, wanted)


def test_the_largest_number_selects_the_last_possible_token():
    draw = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    logits = torch.tensor([[0.0, 1.0, 0.5, -torch.inf, -torch.inf]])
    assert _pick(logits, 1.0, 1.0, draw)[0].item() == 2


def test_wrong_arguments():
    model = build()
    with pytest.raises(ValueError, match="leave room for"):
        sample_completions(model, [[1] * 120, [2]], seeds=[0, 0], **{**ARGS, "max_new_tokens": 10_000})
    with pytest.raises(ValueError, match="top_p=0"):
        sample_completions(model, [[1]], seeds=[0], **{**ARGS, "top_p": 0.0})
    model.embedding.weight.data[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        sample_completions(model, [[1]], seeds=[0], **ARGS)
