"""Rotary position tables, and their scaling to contexts longer than in training."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_exp.config import ModelConfig, RopeScalingConfig, RopeScalingKind
from deepseek_exp.kernels import Ops
from deepseek_exp.kernels.masks import positions_in_documents

SCALING = tuple(f.name for f in dataclasses.fields(RopeScalingConfig))


def rope_table(cfg: ModelConfig, dim: int, n_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position * frequency, each (n_positions, dim / 2), fp32.

    frequency_i = theta^(-2i / d) for d = dim, modified by rope_scaling. With rotary_dim, d is that, only the first
    d / 2 pairs turn, and the cosine of the others is 1. Kept outside the modules in fp32, so that casting a model to
    bf16 cannot round the angles.
    """
    scaling = tuple(getattr(cfg.rope_scaling, name) for name in SCALING)  # torch 2.11 cannot compile astuple
    return _table(cfg.rotary_dim or dim, dim, cfg.rope_theta, scaling, n_positions, device)


def softmax_scale(cfg: ModelConfig, dim: int) -> float:
    """Return the factor of attention scores: 1 / sqrt(dim), and for MLA under YaRN times its mscale squared.

    Source: modeling_deepseek.py of deepseek-ai/DeepSeek-V3, `DeepseekV3Attention`.
    """
    s = cfg.rope_scaling
    stretched = s.kind is not RopeScalingKind.none and s.mscale_all_dim
    return dim**-0.5 * (_mscale(s.factor, s.mscale_all_dim) ** 2 if stretched else 1.0)


def rotate_documents(
    ops: Ops, x: Tensor, cos: Tensor, sin: Tensor, document: Tensor, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """Rotate heads by their positions within their documents, by `reference.rope` of all rows in one.

    Args:
        ops: provides the rotation.
        x: (batch, heads, seq, head_dim), a transposed (batch, seq, heads, head_dim).
        cos: (seq, R / 2).
        sin: (seq, R / 2).
        document: (batch, seq), the document of each token.
        norm_weight: as for `reference.rope`, as is the next.
        eps: of that norm.

    Returns:
        (batch, heads, seq, head_dim).
    """
    position = positions_in_documents(document).flatten()  # (batch * seq,)
    rows = x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]  # (1, heads, batch * seq, head_dim)
    rotated = ops.rope(rows, cos[position], sin[position], norm_weight, eps)
    return rotated.unflatten(2, document.shape)[0].transpose(0, 1)  # (batch, heads, seq, head_dim)


@functools.lru_cache(maxsize=64)
def _table(
    dim: int, whole: int, theta: float, scaling: tuple, n_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    s = RopeScalingConfig(*scaling)
    with torch.inference_mode(False):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        scale = 1.0
        if s.kind is RopeScalingKind.linear:
            frequency = frequency / s.factor
        elif s.kind is RopeScalingKind.llama3:
            frequency = _llama3(frequency, s)
        elif s.kind is RopeScalingKind.yarn:
            frequency, scale = _yarn(frequency, s, dim, theta), _yarn_table_scale(s)
        position = torch.arange(n_positions, device=device, dtype=torch.float64)
        angle = position[:, None] * frequency.to(device)
        cos, sin = (angle.cos() * scale).float(), (angle.sin() * scale).float()  # (n_positions, dim / 2)
        if dim < whole:
            still = (0, (whole - dim) // 2)
            cos, sin = F.pad(cos, still, value=1.0), F.pad(sin, still)  # (n_positions, whole / 2)
        return cos, sin


def _llama3(frequency: Tensor, s: RopeScalingConfig) -> Tensor:
    """Scale long wavelengths fully and short ones not at all; interpolate linearly in the number of turns between.

    Source: meta-llama/llama-models, `models/llama3/model.py`, `apply_scaling`.
    """
    turns = s.original_max_seq_len * frequency / (2 * math.pi)  # of the wave within the original length
    keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return frequency * keep + frequency / s.factor * (1 - keep)


def _yarn(frequency: Tensor, s: RopeScalingConfig, dim: int, theta: float) -> Tensor:
    """Keep waves with more than beta_fast turns, scale those with fewer than beta_slow, and blend in between.

    Source: Peng et al. 2023, "YaRN", section 3.2; the borders are rounded to whole pairs as in DeepSeek's code.
    """

    def pair_that_turns(times: float) -> float:
        return dim * math.log(s.original_max_seq_len / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(s.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(s.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency / s.factor * ramp + frequency * (1 - ramp)


def _yarn_table_scale(s: RopeScalingConfig) -> float:
    if s.mscale and s.mscale_all_dim:
        return _mscale(s.factor, s.mscale) / _mscale(s.factor, s.mscale_all_dim)
    return _mscale(s.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    """Return YaRN's attention scale factor: 0.1 weight ln(factor) + 1 (section 3.4; the weight is DeepSeek's)."""
    return 0.1 * weight * math.log(factor) + 1.0
