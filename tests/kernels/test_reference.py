"""The operations against their formulas written out in float64, and the fast attention against its definition."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from deepseek_exp.kernels import TORCH, attention, reference
from deepseek_exp.kernels.masks import attention_mask
from deepseek_exp.models.rope import rope_table
from tests.config.test_config import composed

CPU = torch.device("cpu")
TINY = composed("size=tiny").model


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def test_rms_norm_is_its_formula():
    x, w = rand(3, 5), rand(5, seed=1)
    y = reference.rms_norm(x, w, 1e-5)
    for row, out in zip(x, y, strict=True):
        rms = math.sqrt(sum(v * v for v in row.tolist()) / 5 + 1e-5)
        assert out.tolist() == pytest.approx([v / rms * s for v, s in zip(row.tolist(), w.tolist(), strict=True)])


def test_rms_norm_of_bf16_is_computed_in_fp32():
    x = rand(64, 256, dtype=torch.float32).bfloat16()
    wide = reference.rms_norm(x.double(), torch.ones(256, dtype=torch.float64), 1e-5)
    assert torch.equal(reference.rms_norm(x, torch.ones(256).bfloat16(), 1e-5), wide.float().bfloat16())


def test_rope_turns_pairs_by_position_times_frequency():
    x, theta = rand(1, 1, 4, 6).detach(), 100.0
    cos, sin = rope_table(dataclasses.replace(TINY, rope_theta=theta), 6, 4, CPU)
    y = reference.rope(x, cos.double(), sin.double())
    for pos in range(4):
        for i in range(3):
            turn = complex(x[0, 0, pos, i], x[0, 0, pos, i + 3]) * complex(
                math.cos(pos * theta ** (-2 * i / 6)), math.sin(pos * theta ** (-2 * i / 6))
            )
            assert y[0, 0, pos, i].item() == pytest.approx(turn.real, abs=1e-6)
            assert y[0, 0, pos, i + 3].item() == pytest.approx(turn.imag, abs=1e-6)


def test_rope_turns_the_last_columns_alone():
    x = rand(2, 3, 4, 10).detach()
    tables = [t.double() for t in rope_table(TINY, 6, 4, CPU)]
    y = reference.rope(x, *tables)
    assert torch.equal(y[..., :4], x[..., :4]) and torch.equal(y[..., 4:], reference.rope(x[..., 4:], *tables))


def test_rope_norms_each_head_before_it_turns():
    x, w = rand(2, 3, 4, 10).detach() * 5, rand(10, seed=1).detach()
    tables = [t.double() for t in rope_table(TINY, 6, 4, CPU)]
    normed = reference.rms_norm(x, w, 0.1)
    assert torch.equal(reference.rope(x, *tables, w, 0.1), reference.rope(normed, *tables))


def test_rope_scores_depend_on_distance_alone():
    q, k = rand(1, 1, 1, 8).expand(1, 1, 32, 8), rand(1, 1, 1, 8, seed=1).expand(1, 1, 32, 8)
    cos, sin = rope_table(TINY, 8, 32, CPU)
    scores = reference.rope(q, cos.double(), sin.double()) @ reference.rope(k, cos.double(), sin.double()).mT
    for distance in range(8):
        assert torch.diagonal(scores[0, 0], -distance).std() < 1e-6


def test_rope_angles_survive_bf16():
    cos, sin = rope_table(TINY, 32, 4096, CPU)
    assert cos.dtype == sin.dtype == torch.float32


def test_swiglu_is_its_formula():
    gate, up = rand(7), rand(7, seed=1)
    want = [g / (1 + math.exp(-g)) * u for g, u in zip(gate.tolist(), up.tolist(), strict=True)]
    assert reference.swiglu(gate, up).tolist() == pytest.approx(want)


def test_cross_entropy_is_its_formula():
    logits, targets = rand(2, 3, 11), torch.tensor([[1, 0, 10], [4, 4, 2]])
    nll = reference.cross_entropy(logits, targets)
    for b in range(2):
        for s in range(3):
            row = logits[b, s].tolist()
            want = math.log(sum(map(math.exp, row))) - row[targets[b, s]]
            assert nll[b, s].item() == pytest.approx(want)
    assert reference.cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def loop_attention(q, k, v, window, n_global, n_memory, gate, scale):
    """Attention key by key, from the definition in words."""
    n_rep, n_keys, n_queries = q.shape[1] // k.shape[1], k.shape[2], q.shape[2]
    out = v.new_zeros(*q.shape[:3], v.shape[-1])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = 1 / (1 + math.exp(-gate[h])) if gate is not None else 0.5
            for i in range(n_queries):
                position, weights, values = n_keys - n_queries + i, [], []
                for j in range(position + 1):
                    is_global = n_memory <= j < n_memory + n_global
                    if window and position - j >= window and not is_global:
                        continue
                    share = (1 - g if is_global else g) if gate is not None else 1.0
                    score = float(q[b, h, i] @ k[b, h // n_rep, j]) * scale
                    weights.append(share * math.exp(score))
                    values.append(v[b, h // n_rep, j])
                total = sum(weights)
                out[b, h, i] = sum(w / total * x for w, x in zip(weights, values, strict=True))
    return out


CASES = [  # queries, keys, heads, kv heads, window, global tokens, memory, gated, head width, value width, scale
    (9, 9, 4, 2, 3, 2, 0, True, 8, 8, 8**-0.5),
    (9, 9, 4, 1, 3, 0, 0, False, 8, 8, 8**-0.5),
    (7, 7, 2, 2, 0, 0, 0, False, 8, 8, 8**-0.5),
    (6, 11, 4, 4, 4, 1, 5, True, 8, 8, 8**-0.5),
    (1, 13, 4, 2, 5, 3, 0, True, 8, 8, 8**-0.5),
    (9, 9, 4, 2, 3, 2, 0, True, 8, 8, 0.9),
    (9, 9, 4, 4, 0, 0, 0, False, 24, 16, 0.3),
    (3, 11, 4, 1, 4, 2, 0, True, 12, 8, 0.7),
    (5, 9, 2, 1, 4, 2, 2, True, 8, 20, 0.2),
]


def case_tensors(case):
    n_queries, n_keys, heads, kv_heads, _, _, _, gated, width, v_width, _ = case
    shapes = [(2, heads, n_queries, width), (2, kv_heads, n_keys, width), (2, kv_heads, n_keys, v_width)]
    return [rand(*shape, seed=i) for i, shape in enumerate(shapes)], rand(heads, seed=3) if gated else None


def case_numbers(case):
    """Give what follows the gate: the scale, memory, window and global tokens."""
    _, _, _, _, window, n_global, n_memory, *_, scale = case
    return scale, n_memory, window, n_global


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_its_definition(case):
    (q, k, v), gate = case_tensors(case)
    _, _, _, _, window, n_global, n_memory, gated, _, _, scale = case
    out = reference.local_global_attention(q, k, v, gate, *case_numbers(case))
    plain = [t.detach() for t in (q, k, v)]
    want = loop_attention(*plain, window, n_global, n_memory, gate.tolist() if gated else None, scale)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_attention_equals_the_definition_with_every_gradient(case):
    results = []
    for attend in (reference.local_global_attention, TORCH.local_global_attention):
        inputs, gate = case_tensors(case)
        out = attend(*inputs, gate, *case_numbers(case))
        (out * rand(*out.shape, seed=4).detach()).sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs), *([] if gate is None else [gate.grad])])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_causal_attention_passes_no_mask_and_may_keep_heads_grouped(monkeypatch, heads, grouped):
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(attention, "takes_grouped_heads", lambda q: grouped)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: calls.append((a, kw)) or sdpa(*a, **kw))
    test_fast_attention_equals_the_definition_with_every_gradient((9, 9, *heads, 0, 0, 0, False, 24, 16, 0.3))
    ((_, k, _), options), *others = calls
    assert not others and options["attn_mask"] is None and options["is_causal"]
    assert options["enable_gqa"] is grouped and k.shape[1] == heads[grouped]


def test_only_a_causal_call_without_a_gate_keeps_heads_grouped(monkeypatch):
    monkeypatch.setattr(attention, "takes_grouped_heads", lambda q: True)
    for case in CASES:
        test_fast_attention_equals_the_definition_with_every_gradient(case)
    test_fast_attention_equals_the_definition_with_every_gradient((9, 9, 4, 2, 0, 2, 0, True, 8, 8, 0.3))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_attention_in_bf16_is_as_exact_as_the_definition_in_bf16(case):
    """Gates and scales whose parts bf16 rounds; errors are those of the output and of each gradient."""
    (q, k, v), gate = case_tensors(case)
    narrow = [None if t is None else t.detach().bfloat16() for t in (q, k, v, gate)]
    errors = []
    for attend in (reference.local_global_attention, TORCH.local_global_attention):
        parts = []
        for dtype in (torch.float64, torch.bfloat16):
            *inputs, gate = (None if t is None else t.to(dtype, copy=True).requires_grad_() for t in narrow)
            out = (attend if dtype is torch.bfloat16 else reference.local_global_attention)(
                *inputs, gate, *case_numbers(case)
            )
            (out * rand(*out.shape, seed=4).detach().bfloat16().to(dtype)).sum().backward()
            parts.append([t.double() for t in (out.detach(), *(t.grad for t in inputs))])
        errors.append([(got - want).norm().item() for want, got in zip(*parts, strict=True)])
    assert all(fast <= 2 * plain + 1e-3 for plain, fast in zip(*errors, strict=True)), errors


def test_a_gate_of_zero_is_plain_masked_attention():
    q, k, v = rand(1, 2, 12, 8), rand(1, 2, 12, 8, seed=1), rand(1, 2, 12, 8, seed=2)
    visible, _ = attention_mask(12, 12, 0, 4, 2, CPU)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.8)
    gated = TORCH.local_global_attention(q, k, v, torch.zeros(2).double(), 0.8, 0, 4, 2)
    torch.testing.assert_close(gated, plain)


def test_the_gate_moves_weight_between_window_and_global_tokens():
    q, k = torch.zeros(1, 1, 12, 8), torch.zeros(1, 1, 12, 8)
    v = torch.zeros(1, 1, 12, 8)
    v[:, :, :2] = 1  # only the global tokens carry anything
    last = [
        TORCH.local_global_attention(q, k, v, torch.tensor([g]), 8**-0.5, 0, 4, 2)[0, 0, -1, 0]
        for g in (-9.0, 0.0, 9.0)
    ]
    assert last[0] > 0.999 and last[1] == pytest.approx(2 / 6) and last[2] < 0.001


def test_the_sources_mask_is_local_only():
    """Their where(pos_diff > 5, 0, 1) is a window of six tokens and nothing global."""
    position = torch.arange(20)
    theirs = torch.where(position[:, None] - position > 5, 0, 1).bool() & (position[:, None] >= position)
    visible, is_global = attention_mask(20, 20, 0, 6, 0, CPU)
    assert torch.equal(visible, theirs) and not is_global.any()
