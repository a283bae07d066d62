"""A small mixture-of-experts layer, and the same written as loops over tokens, experts and groups."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from deepseek_exp.config import GroupScore, Score
from deepseek_exp.kernels import TORCH, Ops, reference
from deepseek_exp.models.moe import MoE
from deepseek_exp.models.moe.layer import COUNTS
from tests.config.test_config import composed

TINY = composed("model=v2_moe", "size=tiny").model
# eight experts, two of them a token's, nothing else
PLAIN = {
    "n_routed_experts": 8,
    "d_expert": 16,
    "top_k": 2,
    "n_groups": 1,
    "top_k_groups": 1,
    "capacity_factor": 0.0,
    "balance": "none",
}
D_MODEL = 24
DEFINITION = dataclasses.replace(TORCH, grouped_mm=reference.grouped_mm)


def config(**moe):
    values = PLAIN | moe
    kinds = {"score": Score, "group_score": GroupScore, "balance": type(TINY.moe.balance)}
    values |= {name: kind(values[name]) for name, kind in kinds.items() if name in values}
    return dataclasses.replace(TINY, d_model=D_MODEL, moe=dataclasses.replace(TINY.moe, **values))


def build(dtype=torch.float64, ops: Ops = DEFINITION, seed=0, std=0.5, **moe) -> MoE:
    layer = MoE(config(**moe), ops)
    for p in layer.parameters():
        p.data = p.data.to(dtype)
        torch.nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(seed + p.numel()))
    return layer


def tokens(batch=2, seq=12, dtype=torch.float64, seed=1):
    return torch.randn(batch, seq, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def chosen_experts(choice: list[float], moe) -> list[int]:
    """The experts of one token from its scores (with bias), by lists and sorting alone."""
    size = len(choice) // moe.n_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(moe.n_groups)]
    rank = {
        GroupScore.max: max,
        GroupScore.top2_sum: lambda scores: sum(sorted(scores)[-2:]),
        GroupScore.sum: sum,
    }[moe.group_score]
    groups = sorted(groups, key=lambda group: -rank([choice[e] for e in group]))[: moe.top_k_groups]
    return sorted((e for group in groups for e in group), key=lambda e: -choice[e])[: moe.top_k]


def swiglu_network(x, w_gate, w_up, w_down):
    return w_down @ (F.silu(w_gate @ x) * (w_up @ x))


def by_loop(layer: MoE, x, capacity: int | None = None):
    """The layer's output and each token's experts, one token and one expert after the other."""
    moe, experts, rows, ids = layer.cfg, layer.experts, [], []
    taken = [0] * moe.n_routed_experts
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        scores = logits.softmax(0) if moe.score is Score.softmax else logits.sigmoid()
        bias = 0 if layer.router.bias is None else layer.router.bias
        ids.append(chosen_experts((scores + bias).tolist(), moe))
        weights = {e: scores[e] * moe.route_scale for e in ids[-1]}
        if moe.norm_top_k:
            weights = {e: w / sum(scores[e] for e in ids[-1]) for e, w in weights.items()}
        row = torch.zeros_like(token)
        for e, weight in weights.items():
            taken[e] += 1
            if capacity is None or taken[e] <= capacity:
                row = row + weight * swiglu_network(token, experts.w_gate[e], experts.w_up[e], experts.w_down[e])
        for i in range(moe.n_shared_experts):
            part = slice(i * moe.d_expert, (i + 1) * moe.d_expert)
            shared = layer.shared
            row = row + swiglu_network(
                token, shared.w_gate.weight[part], shared.w_up.weight[part], shared.w_down.weight[:, part]
            )
        rows.append(row)
    return torch.stack(rows).view_as(x), ids


def gradients(layer: MoE, x, forward):
    """The output of `forward` and the gradients of x and every parameter, for one fixed random gradient of it."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = forward(x)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out * g.to(out.dtype)).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}
    return {"y": out.detach(), "x": x.grad} | grads


def counted(counts, *names: str) -> list[float]:
    """What a pass counted beside the loads of its eight experts."""
    return [counts[8 + COUNTS.index(name)].item() for name in names]


def distance(a, b) -> float:
    """|a - b| / |b|, or |a| where b is 0."""
    return ((a.double() - b.double()).norm() / (b.double().norm() or 1)).item()
