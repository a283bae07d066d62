"""The arithmetic against published sizes, counts by hand and the parameters of the built modules."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from deepseek_exp.config import AttentionKind, ModelConfig
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer
from deepseek_exp.planner.cost import Parameters, cache_bytes_per_token, flops_per_token, parameters
from tests.config.test_config import MODELS, SOME_SIZES, composed
from tests.runs import ROOT


@functools.cache
def model(name: str, size: str = "published") -> ModelConfig:
    return composed(f"model={name}", f"size={size}").model


class TestPublishedSizes:
    @pytest.mark.parametrize(
        ("name", "size", "total"),
        [
            ("v1_dense", "published", 120e6),
            ("v2_moe", "published", 10e9),
            ("v2_5_sparse", "published", 13e9),
            ("v3_moe", "published", 1.75e12),
            ("v4_distill", "published", 7e9),
            ("v4_distill", "70b", 70e9),
            ("v4_distill", "175b", 175e9),
            ("v5_domain_moe", "published", 3e9),
            ("deepseek_v3", "published", 671e9),
        ],
    )
    def test_the_total_is_the_published_one(self, name, size, total):
        assert parameters(model(name, size)).total == pytest.approx(total, rel=0.01)

    def test_deepseek_v3_has_the_released_active_parameters(self):
        """The report says 37B, README_WEIGHTS.md of the release 36.6B without the look-up."""
        active = parameters(model("deepseek_v3")).active
        assert round(active / 1e9, 1) == 36.6
        assert round(active / 1e9) == 37

    def test_deepseek_v3_file_holds_685b(self):
        """The release stores the MTP module with copies of both tables: 671B + 14B."""
        p = parameters(model("deepseek_v3"))
        assert p.total + p.mtp + 2 * p.embedding == pytest.approx(685e9, rel=0.01)

    def test_sparse_activation_saves_the_stated_share(self):
        cfg = model("v2_5_sparse")
        saved = 1 - parameters(cfg).active / parameters(replace(cfg, d_ff_active=0)).active
        assert saved == pytest.approx(0.30, abs=0.02)
        assert f"{saved:.0%} fewer active parameters" in header("v2_5_sparse")


def header(name: str) -> str:
    lines = (ROOT / "conf" / "model" / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


@pytest.mark.parametrize(("name", "size"), list(itertools.product(MODELS, SOME_SIZES)))
def test_the_counts_are_those_of_the_built_modules(name, size):
    cfg = model(name, size)
    with torch.device("meta"):
        built = Transformer(cfg, TORCH)
    counted = parameters(cfg)
    assert sum(p.numel() for p in built.parameters()) == counted.total + counted.mtp
    assert built.embedding.weight.numel() == counted.embedding


def hand(moe: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    """A model small enough to count by hand: a block of plain gqa has 1536 + 1152 + 32 = 2720 parameters."""
    cfg = model("v4_distill", "tiny")
    widths = {"vocab_size": 300, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 24}
    return replace(cfg, moe=replace(cfg.moe, **(moe or {})), **(widths | values))


MLA = {
    "attention": AttentionKind.mla,
    "q_lora_rank": 6,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
MOE = {"n_routed_experts": 6, "n_shared_experts": 2, "d_expert": 8, "n_dense_layers": 1, "top_k": 2}
DOMAINS = ["general", "law", "medical"]


class TestParametersByHand:
    @pytest.mark.parametrize(
        ("cfg", "expected"),
        [
            # gqa: wq, wo 512, wk, wv 256; feed-forward 3 * 384; norms 32; table 4800; last norm 16
            (hand(), Parameters(total=15056, active=10256, mtp=0, embedding=4800)),
            (hand(tie_embeddings=True), Parameters(10256, 10256, 0, 4800)),
            (hand(qkv_bias=True, qk_norm=True), Parameters(15056 + 2 * (64 + 16), 10256 + 2 * (64 + 16), 0, 4800)),
            (hand(sandwich_norm=True), Parameters(15056 + 2 * 32, 10256 + 2 * 32, 0, 4800)),
            (hand(window=4, n_global_tokens=1), Parameters(15056 + 2 * 4, 10256 + 2 * 4, 0, 4800)),
            (hand(window=4), Parameters(15056, 10256, 0, 4800)),
            (hand(n_global_tokens=1), Parameters(15056, 10256, 0, 4800)),
            # w_up and w_down with 8 of 24 hidden units: 2 * 256 fewer in each block
            (hand(d_ff_active=8), Parameters(15056, 10256 - 2 * 512, 0, 4800)),
            # mla: wq_a 96, q_norm 6, wq_b 288, wkv_a 224, kv_norm 10, wkv_b 560, wo 384 = 1568
            (hand(**MLA), Parameters(15056 + 2 * 32, 10256 + 2 * 32, 0, 4800)),
            # wq 768 instead of 390
            (hand(**MLA | {"q_lora_rank": 0}), Parameters(15056 + 2 * 410, 10256 + 2 * 410, 0, 4800)),
            (hand(**MLA, window=4, n_global_tokens=1), Parameters(15056 + 2 * 36, 10256 + 2 * 36, 0, 4800)),
            # an expert 384, router 96: 8 experts and the router in place of one block's 1152; active 2 + 2 of them
            (hand(MOE), Parameters(15056 - 1152 + 3168, 10256 - 1152 + 1632, 0, 4800)),
            (hand(MOE | {"n_shared_experts": 0}), Parameters(15056 - 1152 + 2400, 10256 - 1152 + 864, 0, 4800)),
            (hand(MOE | {"n_dense_layers": 0}), Parameters(15056 + 2 * 2016, 10256 + 2 * 480, 0, 4800)),
            (hand(MOE | {"domains": DOMAINS}), Parameters(17072 + 48, 10736 + 48, 0, 4800)),
            # an MTP module: norms 48, projection 512, block 2720; or with 1536 + 32 + 3168
            (hand(n_mtp_layers=1), Parameters(15056, 10256, 3280, 4800)),
            (hand(MOE, n_mtp_layers=2), Parameters(17072, 10736, 2 * 5296, 4800)),
        ],
    )
    def test_counts(self, cfg, expected):
        assert parameters(cfg) == expected

    def test_dense_layers_are_ignored_without_experts(self):
        assert parameters(hand({"n_dense_layers": 1})) == parameters(hand())


def reach(cfg: ModelConfig, seq_len: int) -> float:
    """The mean reach that the FLOPs contain."""
    attention = flops_per_token(cfg, seq_len) - 6 * parameters(cfg).active
    return attention / (12 * cfg.n_layers * cfg.n_heads * cfg.head_dim)


def keys_seen(cfg: ModelConfig, seq_len: int) -> float:
    """The same by counting each query's keys: those of its window, the memory's among them, and the global ones."""
    pairs = itertools.product(range(seq_len), range(-cfg.memory_len, seq_len))
    return sum(j <= i and (i - j < cfg.window or 0 <= j < cfg.n_global_tokens) for i, j in pairs) / seq_len


class TestFlopsPerToken:
    def test_is_the_rule_under_a_causal_mask(self):
        assert flops_per_token(hand(), 10) == 6 * 10256 + 6 * 2 * (4 * 8) * 10

    def test_deepseek_v3_takes_the_published_250_gflop(self):
        """Zhao et al. 2025, "Insights into DeepSeek-V3", arXiv 2505.09343, table 2: at 4096 tokens."""
        assert flops_per_token(model("deepseek_v3"), 4096) == pytest.approx(250e9, rel=0.01)

    def test_the_look_up_is_free_and_the_output_table_is_not(self):
        assert flops_per_token(hand(tie_embeddings=True), 10) == flops_per_token(hand(), 10)
        assert flops_per_token(hand(vocab_size=301), 10) - flops_per_token(hand(), 10) == 6 * 16

    def test_mla_takes_the_mean_width_of_queries_and_values(self):
        assert flops_per_token(hand(**MLA), 10) == 6 * 10320 + 6 * 2 * (4 * (12 + 6) / 2) * 10

    def test_a_window_limits_the_reach(self):
        # 4 keys, but on the way there 8 keys too few over 10 queries
        assert flops_per_token(hand(window=4), 10) == pytest.approx(6 * 10256 + 12 * 2 * (4 * 8) * 3.2)

    @pytest.mark.parametrize("window", [10, 11, 100])
    def test_a_window_as_long_as_the_sequence_limits_nothing(self, window):
        assert reach(hand(window=window), 10) == reach(hand(), 10) == 5

    @pytest.mark.parametrize(
        ("window", "n_global_tokens", "memory_len", "seq_len"),
        list(itertools.product([1, 5, 16, 40], [0, 1, 9, 60], [0, 3, 15], [1, 12, 50])),
    )
    def test_the_reach_is_that_of_the_mask(self, window, n_global_tokens, memory_len, seq_len):
        cfg = hand(window=window, n_global_tokens=n_global_tokens, memory_len=memory_len)
        assert 0 <= keys_seen(cfg, seq_len) - reach(cfg, seq_len) <= 0.5 + 1e-9

    def test_mtp_modules_are_left_out(self):
        assert flops_per_token(hand(n_mtp_layers=2), 10) == flops_per_token(hand(), 10)


class TestCacheBytes:
    def test_gqa_keeps_keys_and_values(self):
        assert cache_bytes_per_token(hand(), 2) == 2 * (2 * 2 * 8) * 2

    def test_mla_keeps_the_latent_and_the_rotary_key(self):
        assert cache_bytes_per_token(hand(**MLA), 4) == 2 * (10 + 4) * 4

    def test_deepseek_v3_keeps_the_published_70_kb(self):
        """Zhao et al. 2025, "Insights into DeepSeek-V3", arXiv 2505.09343, table 1: in bf16."""
        assert cache_bytes_per_token(model("deepseek_v3"), 2) == 70272
