"""Several frozen linear layers of one input with low-rank adapters, as one operation.

    y_i = x w_i^T + s n_i b_i^T,  n_i = x a_i^T
    dn_i = s g_i b_i,  dx = sum over i of g_i w_i + dn_i a_i,  da_i = dn_i^T x,  db_i = s g_i^T n_i

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. Every term is added inside
of the product that computes it (cuBLAS, beta = 1), without a copy or a separate addition. The matrices a_i are stacked,
so that x is read once for all n_i and once for all da_i. There is no gradient of w_i.

Suffixes: T tokens, D d_in, N d_out, R rank, S sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_exp.kernels.operation import operation


def low_rank_linears(
    x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """Compute linear layers with adapters.

    Args:
        x: (..., d_in).
        weights: of each layer, (d_out, d_in); they get no gradient.
        a: of each adapter, (rank, d_in).
        b: of each adapter, (d_out, rank).
        scale: alpha / rank.

    Returns:
        (..., d_out) of each layer.
    """
    products = _low_rank_linears(x.flatten(0, -2), list(weights), list(a), list(b), scale)
    return [y.unflatten(0, x.shape[:-1]) for y in products[:-1]]


@operation("low_rank_linears")
def _low_rank_linears(
    x_TD: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor], scale: float
) -> list[Tensor]:
    """Return y_i of each layer, and all n_i, (tokens, sum of the ranks)."""
    n_TS = x_TD @ _stacked(a).T
    products = [x_TD @ w_ND.T for w_ND in weights]
    for y_TN, n_TR, b_NR in zip(products, _split(n_TS, a), b, strict=True):
        torch.addmm(y_TN, n_TR, b_NR.T, alpha=scale, out=y_TN)
    return [*products, n_TS]


@operation("low_rank_linears_backward")
def _low_rank_linears_backward(
    grads: list[Tensor],
    x_TD: Tensor,
    n_TS: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the gradient of x, which is empty unless it is needed, of the stacked a, and of each b."""
    dn_TS, a_SD = torch.empty_like(n_TS), _stacked(a)
    for g_TN, dn_TR, b_NR in zip(grads, _split(dn_TS, a), b, strict=True):
        torch.addmm(dn_TR, g_TN, b_NR, beta=0, alpha=scale, out=dn_TR)
    dx_TD = x_TD.new_empty(0)
    if needs_dx:
        dx_TD = dn_TS @ a_SD
        for g_TN, w_ND in zip(grads, weights, strict=True):
            torch.addmm(dx_TD, g_TN, w_ND, out=dx_TD)
    db = [torch.empty_like(b_NR) for b_NR in b]
    for g_TN, n_TR, db_NR in zip(grads, _split(n_TS, a), db, strict=True):
        torch.addmm(db_NR, g_TN.T, n_TR, beta=0, alpha=scale, out=db_NR)
    return dx_TD, dn_TS.T @ x_TD, db


@_low_rank_linears.register_fake
def _(x_TD: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor], scale: float) -> list[Tensor]:
    return [x_TD.new_empty(len(x_TD), n) for n in (*map(len, weights), sum(map(len, a)))]


@_low_rank_linears_backward.register_fake
def _(
    grads: list[Tensor],
    x_TD: Tensor,
    n_TS: Tensor,
    weights: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: float,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dx_TD = x_TD.new_empty(x_TD.shape if needs_dx else 0)
    return dx_TD, x_TD.new_empty(n_TS.shape[1], x_TD.shape[1]), [torch.empty_like(b_NR) for b_NR in b]


def _stacked(a: list[Tensor]) -> Tensor:
    return a[0] if len(a) == 1 else torch.cat(a)


def _split(all_TS: Tensor, a: list[Tensor]) -> Sequence[Tensor]:
    """Return the columns of each adapter."""
    return all_TS.split([len(a_RD) for a_RD in a], 1)


def _save(ctx: Any, inputs: tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], float], output: Any) -> None:
    x_TD, weights, a, b, ctx.scale = inputs
    ctx.n, ctx.needs_dx = len(weights), x_TD.requires_grad
    ctx.save_for_backward(x_TD, output[-1], *weights, *a, *b)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, list[None], list[Tensor], list[Tensor], None]:
    x_TD, n_TS, *rest = ctx.saved_tensors
    weights, a, b = rest[: ctx.n], rest[ctx.n : 2 * ctx.n], rest[2 * ctx.n :]
    given = (x_TD, n_TS, weights, a, b, ctx.scale, ctx.needs_dx)
    dx_TD, da_SD, db = _low_rank_linears_backward([g.contiguous() for g in grads[:-1]], *given)
    da = list(da_SD.split([len(a_RD) for a_RD in a]))
    return dx_TD if ctx.needs_dx else None, [None] * ctx.n, da, db, None


_low_rank_linears.register_autograd(_differentiate, setup_context=_save)
