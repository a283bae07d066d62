"""The output head's product and the cross-entropy of its logits, without ever holding the logits of all tokens.

    l_nv = h_n . w_v,  nll_n = log(sum over v of exp(l_nv)) - l_n,target(n)
    g_nv = a_n (softmax(l_n)_v - [v = target(n)]),  dh = g w,  dw = sum over n of g_n h_n^T

with a_n = 1 / N, or the given weight of the token. Only the (weighted) mean of the nll is differentiable, so each
token's gradient is known before the backward pass up to one factor, and both dh and dw are computed in the forward
pass: per chunk, in which a kernel overwrites the logits with g (Hsu et al. 2024, "Liger Kernel", section 3.2, fused
linear cross-entropy). The backward pass multiplies by that factor, in place. The largest logit and the sum of
exponentials come from one read (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3),
the gradient from a second one that finds most of its row in the L2 cache. If the vocabulary is sharded over ranks, each
token's largest logit, sum and target logit are exchanged (Shoeybi et al. 2019, "Megatron-LM", section 3), all three at
once.

Rounding: logits and g are rounded to the inputs' type where plain PyTorch rounds them; everything between is fp32.
a_n is in g, not applied at the end: a factor before the rounding of g costs nothing, since bf16 has the exponent
range of fp32, and dh and dw are then final unless the loss is scaled. dw is accumulated in the weight's type, so in
bf16 it is rounded once per chunk. Error (norm of the difference from float64, 16384 tokens, H200): 16 chunks 0.45%, 6
chunks 0.34%, one rounding 0.17%; without bias. So there are at most 4 chunks. An fp32 sum would be as exact as one
rounding, but take 0.25 GiB in the example below, and its traffic 0.06 ms per chunk.

Memory beyond the arguments: dh and dw, which any implementation needs, and one chunk's logits. For 16384 tokens of
width 2048, 32768 entries and bf16: 64 + 128 + 256 MiB = 0.44 GiB; all logits would take 1 GiB. There are no float
atomics and chunks run in a fixed order, so results are bit-reproducible.

Work (the floor): 6 N D V FLOP, 6.6e12 there or 8.3 ms at 790 TFLOP/s. In addition, a chunk's logits are read and
written once, 2 N V e bytes in all or 0.6 ms at 3.35 TB/s, and the backward pass reads and writes dh and dw, 0.1 ms. dw
is read and written by each chunk's product, 2 V D e bytes: 0.08 of its 0.17 ms. Measured on an H200: 10.4 ms for a
floor of 9.3 (6 chunks take as long); PyTorch 14.8 and 6 GiB, compiled 10.6 and 1.2.

Suffixes: N tokens, T tokens per chunk, V vocabulary entries, D width, R ranks, F the three figures per token: its
largest logit, the sum of exp(logit - largest), and the target's logit, or 0 if the target is on another rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_exp.config.limits import tokens_of_chunk
from deepseek_exp.kernels.triton.tiles import TILE

# Columns of a row that a program processes at once, and its warps: 16 elements for each of 512 threads. sm_90 needs 40
# registers per thread, so that 396 rows are in flight, 25 MiB: still in the L2 cache when they are read again.
WIDTH, WARPS = 8192, 16


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    share: Callable[[Tensor], Tensor] | None = None,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.linear_cross_entropy`; same results, in fp32 and bf16; h and weight have the same type.

    A second backward pass through one result raises an error: the first one has consumed its gradients.

    Args:
        h: (..., d_model).
        weight: (vocab, d_model), the output head, or with `share` this rank's rows of it, as many as on every other
            rank.
        targets: (...), int64, counted from the first row of weight; with `share` some are below 0 or above the last.
        share: an all-gather: maps this rank's figures of some tokens, (tokens, 3) fp32, to those of all ranks, (ranks,
            tokens, 3), in the same order on all ranks. dh is then this rank's term of a sum over ranks.
        token_weights: (...), factor of each token's nll; None: 1 / number of tokens.

    Returns:
        The mean nll or the weighted sum, (), and the nll of each token, (...), without gradient; fp32.
    """
    wanted = torch.is_grad_enabled()
    with_dh, with_dw = wanted and h.requires_grad, wanted and weight.requires_grad
    apply = _LinearCrossEntropy.apply
    if share is not None and torch.compiler.is_compiling():
        apply = torch.compiler.disable(apply)  # a compiled graph cannot contain the exchange
    return apply(h, weight, targets, share, with_dh, with_dw, token_weights)


@triton.jit
def _cross_entropy(
    logits, targets, figures, weights, n_cols, scale, MEASURE: tl.constexpr, WRITE: tl.constexpr,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if WEIGHTED:
        scale = tl.load(weights + row)
    logits += row * n_cols
    figures += row * 3
    target = tl.load(targets + row)
    cols = tl.arange(0, WIDTH)
    if MEASURE:
        chosen = tl.load(logits + target, (target >= 0) & (target < n_cols), 0.0).to(tl.float32)
        largest = float("-inf")
        total = 0.0
        for first in range(0, n_cols, WIDTH):
            at = first + cols
            l_V = tl.load(logits + at, at < n_cols, float("-inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(l_V, 0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(l_V - larger), 0)
            largest = larger
        tl.store(figures, largest)
        tl.store(figures + 1, total)
        tl.store(figures + 2, chosen)
    else:
        largest = tl.load(figures)
        total = tl.load(figures + 1)
    if WRITE:
        factor = scale / total
        for first in range(0, n_cols, WIDTH):
            at = first + cols
            l_V = tl.load(logits + at, at < n_cols, 0.0).to(tl.float32)
            g_V = tl.exp(l_V - largest) * factor
            g_V = tl.where(at == target, g_V - scale, g_V)
            tl.store(logits + at, g_V.to(logits.dtype.element_ty), at < n_cols)


@triton.jit
def _multiply(x, by, n, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    product = tl.load(x + at, at < n, 0.0).to(tl.float32) * tl.load(by).to(tl.float32)
    tl.store(x + at, product.to(x.dtype.element_ty), at < n)


def _through_chunks(
    h_ND: Tensor,
    weight_VD: Tensor,
    dh_ND: Tensor | None,
    dw_VD: Tensor | None,
    turn: Callable[[Tensor, slice], None],
) -> None:
    """Compute the logits chunk by chunk, and the gradients from what `turn` makes of them.

    Args:
        h_ND: all tokens.
        weight_VD: the output head.
        dh_ND: filled with the gradient of h; None if not needed.
        dw_VD: filled with the gradient of weight; None if not needed.
        turn: called with a chunk's logits (T, V) and the slice of its tokens; if a gradient is needed it overwrites the
            logits with theirs.
    """
    n_tokens, n_entries = len(h_ND), len(weight_VD)
    chunk = tokens_of_chunk(n_tokens, n_entries)
    space_TV = h_ND.new_empty(chunk, n_entries)
    for first in range(0, n_tokens, chunk):
        here = slice(first, first + chunk)
        h_TD = h_ND[here]
        logits_TV = torch.mm(h_TD, weight_VD.T, out=space_TV[: len(h_TD)])
        turn(logits_TV, here)
        if dh_ND is not None:
            torch.mm(logits_TV, weight_VD, out=dh_ND[here])
        if dw_VD is not None:
            torch.addmm(dw_VD, logits_TV.T, h_TD, beta=1 if first else 0, out=dw_VD)


def _compute(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    share: Callable[[Tensor], Tensor] | None,
    with_dh: bool,
    with_dw: bool,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean nll or the weighted sum, each token's nll and the gradients, empty if not needed."""
    h_ND, targets_N = h.reshape(-1, h.shape[-1]), targets.reshape(-1).contiguous()
    weights_N = None if token_weights is None else token_weights.detach().reshape(-1).float().contiguous()
    figures_NF = h.new_empty(len(targets_N), 3, dtype=torch.float32)
    with_grad = with_dh or with_dw

    def turn(logits_TV: Tensor, here: slice) -> None:
        figures_TF = figures_NF[here]

        def launch(*, measure: bool, write: bool) -> None:
            _cross_entropy[(len(logits_TV),)](
                logits_TV, targets_N[here], figures_TF, figures_TF if weights_N is None else weights_N[here],
                logits_TV.shape[1], 1 / len(targets_N), MEASURE=measure, WRITE=write, WEIGHTED=weights_N is not None,
                WIDTH=min(WIDTH, triton.next_power_of_2(logits_TV.shape[1])), num_warps=WARPS,
            )  # fmt: skip

        launch(measure=True, write=with_grad and share is None)
        if share is not None:
            figures_TF.copy_(_together(share(figures_TF)))
            if with_grad:
                launch(measure=False, write=True)

    dh, dw = _empty_gradients(h, weight, with_dh, with_dw)
    _through_chunks(h_ND, weight, dh.view(h_ND.shape) if with_dh else None, dw if with_dw else None, turn)
    largest_N, total_N, chosen_N = figures_NF.unbind(1)
    nll_N = total_N.log() - (chosen_N - largest_N)
    loss = nll_N.mean() if weights_N is None else (nll_N * weights_N).sum()
    return loss, nll_N.view(targets.shape), dh, dw


def _together(figures_RTF: Tensor) -> Tensor:
    """Combine the figures (T, F) over the entries of all ranks."""
    largest_RT, total_RT, chosen_RT = figures_RTF.unbind(-1)
    largest_T = largest_RT.amax(0)
    total_T = (total_RT * (largest_RT - largest_T).exp()).sum(0)
    return torch.stack([largest_T, total_T, chosen_RT.sum(0)], -1)


def _empty_gradients(h: Tensor, weight: Tensor, with_dh: bool, with_dw: bool) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape if with_dh else (0,)), weight.new_empty(weight.shape if with_dw else (0,))


@torch.library.custom_op("deepseek_exp::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, with_dh: bool, with_dw: bool, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `_compute` on one rank."""
    return _compute(h, weight, targets, None, with_dh, with_dw, token_weights)


@_linear_cross_entropy.register_fake
def _(
    h: Tensor, weight: Tensor, targets: Tensor, with_dh: bool, with_dw: bool, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nll = h.new_empty(targets.shape, dtype=torch.float32)
    return nll.new_empty(()), nll, *_empty_gradients(h, weight, with_dh, with_dw)


@torch.library.custom_op("deepseek_exp::multiply_gradient", mutates_args=("x",))
def _multiply_gradient(x: Tensor, by: Tensor) -> None:
    """Multiply by a scalar tensor in fp32; PyTorch would first round the scalar to bf16."""
    _multiply[(triton.cdiv(x.numel(), TILE),)](x, by, x.numel(), SIZE=TILE, num_warps=8)


class _LinearCrossEntropy(torch.autograd.Function):
    """Attach the gradients to the loss; `register_autograd` does not allow backward to modify results in place."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        share: Callable[[Tensor], Tensor] | None,
        with_dh: bool,
        with_dw: bool,
        token_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if share is None:
            loss, nll, dh, dw = _linear_cross_entropy(h, weight, targets, with_dh, with_dw, token_weights)
        else:
            loss, nll, dh, dw = _compute(h, weight, targets, share, with_dh, with_dw, token_weights)
        ctx.save_for_backward(dh, dw)
        ctx.with_dh, ctx.with_dw = with_dh, with_dw
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        dh, dw = ctx.saved_tensors
        dh = _multiplied(dh, grad) if ctx.with_dh else None
        dw = _multiplied(dw, grad) if ctx.with_dw else None
        return dh, dw, None, None, None, None, None


def _multiplied(gradient: Tensor, by: Tensor) -> Tensor:
    """Multiply in place; in a compiled graph, the compiler reuses the memory for the result itself."""
    if torch.compiler.is_compiling():
        return (gradient.float() * by).to(gradient.dtype)
    _multiply_gradient(gradient, by)
    return gradient
