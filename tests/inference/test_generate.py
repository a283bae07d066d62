"""Cached generation equals uncached; sampling follows temperature, top_p and seed."""

from __future__ import annotations

import collections

import pytest
import torch

from deepseek_exp.errors import UserError
from deepseek_exp.inference import generate
from deepseek_exp.inference.generate import pick
from tests.models.test_transformer import build, some_tokens, with_strong_gates


@pytest.mark.parametrize(
    "changes", [{}, {"window": 0, "n_global_tokens": 0}, {"window": 3, "n_global_tokens": 1}], ids=str
)
def test_cached_logits_equal_uncached(changes):
    model = build(torch.float64, init_std=0.2, **changes)
    if changes.get("window", 1):
        with_strong_gates(model)
    tokens = some_tokens(2, 40)
    caches = model.new_caches(2, 40)
    parts = [model(part, caches) for part in tokens.split([17, 1, 1, 5, 16], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_text_equals_uncached(temperature):
    model = with_strong_gates(build(init_std=0.3))
    texts = [
        generate(
            model, [5, 6, 7], max_new_tokens=50, temperature=temperature, top_p=0.9, seed=3, end_id=0, use_cache=cache
        )
        for cache in (True, False)
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 10


def test_seed_decides_the_text():
    model = build(init_std=0.3)
    args = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0, "end_id": 0}
    assert generate(model, [5], seed=1, **args) == generate(model, [5], seed=1, **args)
    assert generate(model, [5], seed=1, **args) != generate(model, [5], seed=2, **args)


def test_ends_at_the_end_token():
    model = build()
    logits_of = model.forward
    model.forward = lambda tokens, caches, domain: logits_of(tokens, caches).index_fill(-1, torch.tensor([9]), 1e9)
    assert generate(model, [5], max_new_tokens=20, temperature=0, top_p=1.0, seed=0, end_id=9) == []


def test_too_long_is_refused():
    with pytest.raises(ValueError, match="3 prompt tokens leave room for 61 of 62 new ones"):
        generate(build(), [1, 2, 3], max_new_tokens=62, temperature=0, top_p=1.0, seed=0, end_id=0)


def test_weights_that_are_not_finite_are_told():
    model = build()
    with torch.no_grad():
        model.embedding.weight[7, 0] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match=r"model='.*' computes logits that are not finite after 2 tokens"):
            generate(model, [5, 7], max_new_tokens=2, temperature=temperature, top_p=0.9, seed=0, end_id=0)


class TestPick:
    LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()

    def counts(self, temperature, top_p, n=4000):
        draws = torch.Generator().manual_seed(0)
        drawn = collections.Counter(pick(self.LOGITS, temperature, top_p, draws) for _ in range(n))
        return [drawn[i] / n for i in range(4)]

    def test_draws_by_probability(self):
        assert self.counts(1.0, 1.0) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.03)

    def test_top_p_keeps_the_smallest_set(self):
        assert self.counts(1.0, 0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)
        assert self.counts(1.0, 0.01) == [1, 0, 0, 0]

    def test_temperature_sharpens(self):
        squares = torch.tensor([0.25, 0.0625, 0.0225, 0.01])
        assert self.counts(0.5, 1.0) == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)
        assert self.counts(0.0, 1.0, n=5) == [1, 0, 0, 0]

    @pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e300])
    def test_any_temperature_draws(self, temperature):
        drawn = self.counts(temperature, 1.0)
        assert drawn == ([1, 0, 0, 0] if temperature < 1 else pytest.approx([0.25] * 4, abs=0.03))


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_values_without_a_meaning_are_refused(temperature, top_p):
    with pytest.raises(ValueError, match="must be at least 0"):
        generate(build(), [5], max_new_tokens=2, temperature=temperature, top_p=top_p, seed=0, end_id=0)
