"""Rotary tables and their stretching against transformers' own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from deepseek_exp.config import RopeScalingConfig, RopeScalingKind
from deepseek_exp.models.rope import rope_table, softmax_scale
from tests.config.test_config import composed

CPU = torch.device("cpu")
BASE = composed("size=tiny").model
OFF = BASE.rope_scaling
# kind, changes, what transformers calls them
SCALINGS = {
    "linear": ("linear", {"factor": 4.0}),
    "llama3": ("llama3", {"factor": 8.0, "original_max_seq_len": 8192}),
    "llama3, other borders": (
        "llama3",
        {"factor": 32.0, "original_max_seq_len": 1024, "low_freq_factor": 1.5, "high_freq_factor": 3.0},
    ),
    "yarn": ("yarn", {"factor": 4.0, "original_max_seq_len": 2048}),
    "yarn as DeepSeek-V3": (
        "yarn",
        {"factor": 40.0, "original_max_seq_len": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "yarn as DeepSeek-V2-Lite": (
        "yarn",
        {"factor": 40.0, "original_max_seq_len": 4096, "mscale": 0.707, "mscale_all_dim": 0.5},
    ),
    "yarn, other borders": (
        "yarn",
        {"factor": 2.0, "original_max_seq_len": 512, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "yarn, factor 1": ("yarn", {"factor": 1.0, "original_max_seq_len": 512}),
}


def scaled(kind: str, changes: dict, theta: float = 10000.0):
    scaling = dataclasses.replace(OFF, kind=RopeScalingKind(kind), **changes)
    return dataclasses.replace(BASE, rope_theta=theta, rope_scaling=scaling)


def their_parameters(kind: str, s: RopeScalingConfig, theta: float) -> dict:
    p = {"rope_type": kind, "rope_theta": theta, "factor": s.factor}
    if kind != "linear":
        p["original_max_position_embeddings"] = s.original_max_seq_len
    if kind == "llama3":
        p |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if kind == "yarn":
        p |= {name: getattr(s, name) for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
    return p


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(("kind", "changes"), SCALINGS.values(), ids=SCALINGS)
def test_equals_transformers(kind, changes, theta, dim):
    """Their frequencies are rounded to fp32 on the way: an angle of p turns is off by p times a few 2^-24."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    cfg = scaled(kind, changes, theta)
    theirs = transformers.LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        head_dim=dim,
        max_position_embeddings=int(cfg.rope_scaling.original_max_seq_len * cfg.rope_scaling.factor),
        rope_parameters=their_parameters(kind, cfg.rope_scaling, theta),
    )
    frequency, scale = ROPE_INIT_FUNCTIONS[kind](theirs, CPU)
    n = 100
    angle = torch.arange(n)[:, None].double() * frequency.double()
    for ours, want in zip(rope_table(cfg, dim, n, CPU), (angle.cos() * scale, angle.sin() * scale), strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), want, rtol=0, atol=n * 2**-21 * scale)
    first_angle = torch.atan2(*(t[1].double() for t in reversed(rope_table(cfg, dim, n, CPU))))
    torch.testing.assert_close(first_angle, frequency.double(), rtol=1e-5, atol=0)


def test_without_scaling_the_other_values_do_nothing():
    changed = scaled("none", {"factor": 7.0, "mscale": 1.0, "mscale_all_dim": 1.0})
    plain = rope_table(BASE, 32, 50, CPU)
    assert all(torch.equal(a, b) for a, b in zip(rope_table(changed, 32, 50, CPU), plain, strict=True))
    assert softmax_scale(changed, 64) == 1 / 8


def test_long_waves_are_stretched_whole_and_short_ones_kept():
    for kind in ("llama3", "yarn"):
        cfg = scaled(kind, {"factor": 4.0, "original_max_seq_len": 2048, "mscale": 1.0, "mscale_all_dim": 1.0})
        frequency = torch.atan2(*(t[1].double() for t in reversed(rope_table(cfg, 64, 2, CPU))))
        plain = 10000.0 ** -(torch.arange(0, 64, 2).double() / 64)
        assert frequency[0] == pytest.approx(plain[0]) and frequency[-1].item() == pytest.approx(plain[-1].item() / 4)
        assert torch.all(frequency.diff() < 0)


def test_mla_scores_grow_with_yarns_mscale_squared():
    """DeepSeek-V3: 192 ** -0.5 * (0.1 ln 40 + 1) ** 2."""
    v3 = scaled(*SCALINGS["yarn as DeepSeek-V3"])
    assert softmax_scale(v3, 192) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert softmax_scale(scaled("yarn", {"factor": 40.0}), 192) == 192**-0.5


def test_the_scale_of_mla_equals_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    for name in ("yarn as DeepSeek-V3", "yarn"):
        cfg = scaled(*SCALINGS[name])
        theirs = transformers.DeepseekV3Config(
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters=their_parameters("yarn", cfg.rope_scaling, 10000.0),
        )
        with torch.device("meta"):
            scaling = DeepseekV3Attention(theirs, 0).scaling
        assert softmax_scale(cfg, theirs.qk_nope_head_dim + theirs.qk_rope_head_dim) == pytest.approx(scaling)


def test_a_table_made_in_inference_can_be_trained_with():
    with torch.inference_mode():
        cos, _ = rope_table(BASE, 34, 5, CPU)
    assert not cos.is_inference()


def test_a_part_of_a_head_turns():
    part = rope_table(dataclasses.replace(BASE, rotary_dim=8), 16, 50, CPU)
    for table, whole, still in zip(part, rope_table(BASE, 8, 50, CPU), (1.0, 0.0), strict=True):
        assert torch.equal(table[:, :4], whole) and torch.equal(table[:, 4:], torch.full((50, 4), still))
