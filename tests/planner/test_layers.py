"""Layers and stages: they sum to the whole, and no cut into stages is better."""

from __future__ import annotations

import itertools

import pytest

from deepseek_exp.planner import flops_per_token, parameters
from deepseek_exp.planner.layers import balance, largest_gathered, layers_of, stage_bounds, stages_of
from tests.config.test_config import SOME_SIZES, composed
from tests.planner.test_cost import MLA, MODELS, MOE, hand, model

CLUSTER = composed("cluster=h100_8").cluster
EVERY = list(itertools.product(MODELS, SOME_SIZES))


def test_layers_sum_to_the_model():
    for name, size in EVERY:
        cfg = model(name, size)
        layers, counted = layers_of(cfg, 64), parameters(cfg)
        assert len(layers) == cfg.n_layers + 1, (name, size)
        assert sum(x.parameters for x in layers) == counted.total + counted.mtp, (name, size)
        assert sum(x.n_dense + x.n_moe for x in layers) == cfg.n_layers + cfg.n_mtp_layers, (name, size)


def test_flops_sum_to_the_rule():
    """Multi-token prediction comes on top: it is left out of MFU and not of the time."""
    for name, size in EVERY:
        cfg = model(name, size)
        layers = layers_of(cfg, 64)
        everything = sum(x.flops + x.expert_flops for x in layers)
        if cfg.n_mtp_layers:
            end = layers[-1].flops + layers[-1].expert_flops
            everything -= end - 6 * (cfg.vocab_size * cfg.d_model + cfg.d_model)
        assert everything == pytest.approx(flops_per_token(cfg, 64)), (name, size)


@pytest.mark.parametrize("pp", [1, 2, 3, 16])
@pytest.mark.parametrize("name", ["v1_dense", "v3_moe"])
def test_stages_sum_to_the_model(name, pp):
    cfg = model(name)
    if pp > cfg.n_layers:
        return
    stages, counted = stages_of(layers_of(cfg, 64), pp, CLUSTER), parameters(cfg)
    assert len(stages) == pp
    assert sum(s.parameters for s in stages) == counted.total + counted.mtp
    assert all(s.n_dense + s.n_moe for s in stages[:-1])


def test_what_a_rank_holds_by_hand():
    """A block of 2720: wq, wo and the feed-forward network 2176 are cut by tp, wk and wv 512 by heads, norms 32 not."""
    block = layers_of(hand(), 10)[1]
    assert (block.split, block.kv, block.whole, block.experts) == (2176, 512, 32, 0)
    assert block.dense_on_rank(tp=2, n_kv_heads=2) == 1088 + 256 + 32
    assert block.dense_on_rank(tp=4, n_kv_heads=2) == 544 + 256 + 32
    latent = layers_of(hand(**MLA), 10)[1]  # wq_a 96, q_norm 6, wkv_a 224, kv_norm 10
    assert (latent.kv, latent.whole) == (0, 32 + 336)
    moe = layers_of(hand(MOE), 10)[1]
    assert (moe.experts, moe.whole) == (6 * 384, 32 + 96)
    assert moe.experts_on_rank(tp=2, ep=3) == 384


def test_a_table_that_two_stages_need_is_copied():
    assert layers_of(hand(tie_embeddings=True), 10)[-1].copies == 4800
    assert layers_of(hand(n_mtp_layers=1), 10)[-1].copies == 4800
    assert layers_of(hand(), 10)[-1].copies == 0


class TestBalance:
    @pytest.mark.parametrize(
        ("costs", "n", "ends"),
        [
            ((1, 1, 1, 1), 2, [2, 4]),
            ((1, 1, 1, 3), 2, [3, 4]),  # by cost, not by count
            ((5, 1, 1, 1), 3, [1, 2, 4]),
            ((0, 0, 0, 9), 4, [1, 2, 3, 4]),
            ((2, 2), 1, [2]),
        ],
    )
    def test_by_hand(self, costs, n, ends):
        assert balance(costs, n) == ends

    @pytest.mark.parametrize("costs", [(3, 1, 4, 1, 5, 9, 2, 6), (1,) * 7 + (4,), (7, 1, 1, 1, 1, 1), (2.5, 0.5) * 4])
    def test_no_other_cut_is_better(self, costs):
        for n in range(1, len(costs) + 1):
            cuts = itertools.combinations(range(1, len(costs)), n - 1)
            best = min(slowest(costs, [*cut, len(costs)]) for cut in cuts)
            assert slowest(costs, balance(costs, n)) == pytest.approx(best)

    def test_more_stages_than_layers(self):
        with pytest.raises(ValueError, match="2 layers cannot make 3 stages"):
            balance((1, 1), 3)


def slowest(costs, ends) -> float:
    return max(sum(costs[a:b]) for a, b in zip([0, *ends], ends, strict=False))


class TestStageBounds:
    @pytest.mark.parametrize("pp", [1, 2, 3])
    @pytest.mark.parametrize("name", ["v1_dense", "v3_moe"])
    def test_they_cut_the_model_as_the_plan_does(self, name, pp):
        exp = composed(f"model={name}", "size=small", "do=plan")
        ends, layers = stage_bounds(exp, pp), layers_of(exp.model, exp.data.seq_len)
        assert len(ends) == pp
        assert ends[-1] == exp.model.n_layers + 1
        parts = [layers[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        assert all(parts)
        stages = stages_of(layers, pp, exp.cluster)
        assert [sum(x.flops for x in part) for part in parts] == pytest.approx([s.flops for s in stages])

    def test_a_heavy_end_stands_alone(self):
        """The output table of 128 x 32768 is worth more than four blocks of the tiny size."""
        exp = composed("size=tiny", "model.vocab_size=32768", "model.n_layers=4", "do=plan")
        assert stage_bounds(exp, 2) == [4, 5]


def test_what_every_tensor_rank_has_whole_each_computes():
    block = layers_of(hand(), 10)[1]
    assert block.flops_on_rank(1) == block.flops
    assert block.flops_on_rank(2) == (block.flops - 6 * 32) / 2 + 6 * 32


def test_the_projection_of_multi_token_prediction_is_whole():
    with_mtp, without = (layers_of(hand(n_mtp_layers=n), 10)[-1] for n in (1, 0))
    assert with_mtp.whole - without.whole == 2 * 16**2 + 3 * 16 + 32  # projection, its norms, and those of its block


@pytest.mark.parametrize(
    ("moe", "vocab_size", "expected"),
    [(None, 300, 4800), (None, 10, 2720), (MOE, 10, 1536 + 32 + 96 + 8 * 384)],
    ids=["table", "block", "experts"],
)
def test_the_largest_that_zero_3_gathers(moe, vocab_size, expected):
    assert largest_gathered(hand(moe, vocab_size=vocab_size), 10) == expected
