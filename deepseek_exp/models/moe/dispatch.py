"""Permute tokens to their experts and results back: sort by expert, gather, and gather back.

Both directions are gathers, in the backward pass too: the order of every sum is the same from run to run.

Suffixes of tensors: T tokens, K experts per token, R rows = T * K, E experts, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Dispatched(NamedTuple):
    """Rows sorted by expert.

    Attributes:
        x_RD: one row per token and expert.
        offsets_E: int32, where each expert's rows end.
        tokens_per_expert: int64, rows that chose each expert, including dropped ones.
        order_R: sorted row -> token * K + index of its expert.
        inverse_R: the inverse permutation.
        kept_R: which sorted rows an expert takes; None means all. Dropped rows come last.
    """

    x_RD: Tensor
    offsets_E: Tensor
    tokens_per_expert: Tensor
    order_R: Tensor
    inverse_R: Tensor
    kept_R: Tensor | None


class Dispatcher(Protocol):
    """How rows get to the experts: what a layer needs, whether or not all experts are on this rank.

    Attributes:
        n_ranks: number of devices that the experts are sharded over.
    """

    n_ranks: int

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, capacity: int | None) -> Dispatched:
        """Send each expert its rows."""
        ...

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Sum each token's rows with its weights: (tokens, d_model)."""
        ...

    def through(self, experts: Callable[..., Tensor], x_TD: Tensor, weights_TK: Tensor, *by_expert: Tensor) -> Tensor:
        """Dispatch, run one operation (`Experts.weighted`) and combine; its arguments and result."""
        ...


class LocalDispatcher:
    """Dispatcher for experts that are all on this device."""

    n_ranks = 1

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, capacity: int | None = None) -> Dispatched:
        """Sort rows by expert.

        Args:
            x_TD: tokens.
            ids_TK: experts of each token.
            n_experts: number of experts.
            capacity: maximum rows per expert, the first tokens' first; None means no limit. Later tokens cannot
                displace earlier ones, so a token's result does not depend on what follows it.
        """
        expert_R, order_R = ids_TK.flatten().sort(stable=True)
        offsets_E = offsets_of(expert_R, n_experts)
        tokens_per_expert = offsets_E.diff(prepend=offsets_E.new_zeros(1))
        kept_R = None
        if capacity is not None:
            place_R = torch.arange(len(expert_R), device=expert_R.device) - (offsets_E - tokens_per_expert)[expert_R]
            expert_R, resort_R = expert_R.masked_fill(place_R >= capacity, n_experts).sort(stable=True)
            order_R, kept_R, offsets_E = order_R[resort_R], expert_R < n_experts, offsets_of(expert_R, n_experts)
        inverse_R = order_R.argsort()
        x_RD = _Permute.apply(x_TD, order_R, inverse_R, ids_TK.shape[1])
        if kept_R is not None:
            x_RD = torch.where(kept_R[:, None], x_RD, 0)  # and no gradient from rows that no expert processed
        return Dispatched(x_RD, offsets_E.int(), tokens_per_expert, order_R, inverse_R, kept_R)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Sum each token's rows with its weights: (tokens, d_model)."""
        if sent.kept_R is not None:
            y_RD = torch.where(sent.kept_R[:, None], y_RD, 0)  # rows that no expert processed are undefined
        y_TKD = reorder(y_RD, sent.inverse_R, sent.order_R).unflatten(0, weights_TK.shape)
        return (weights_TK[:, None].to(y_TKD.dtype) @ y_TKD).squeeze(1)  # (tokens, d_model)

    def through(self, experts: Callable[..., Tensor], x_TD: Tensor, weights_TK: Tensor, *by_expert: Tensor) -> Tensor:
        """Call the experts with the tokens as they are."""
        return experts(x_TD, weights_TK, *by_expert)


def offsets_of(sorted_ids: Tensor, n: int) -> Tensor:
    """Return, for each id in 0..n-1, how many of the (..., ids) sorted ids are not greater: (..., n), int64."""
    wanted = torch.arange(n, device=sorted_ids.device).expand(*sorted_ids.shape[:-1], n).contiguous()
    return torch.searchsorted(sorted_ids, wanted, right=True)


def reorder(y_RD: Tensor, to_R: Tensor, back_R: Tensor) -> Tensor:
    """Permute rows by to_R, of which back_R is the inverse; the gradient is gathered by back_R, not scattered."""
    return _Reorder.apply(y_RD, to_R, back_R)


class _Permute(torch.autograd.Function):
    """Rows of tokens in sorted order; backward gathers each token's K rows and sums them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.k = k
        return x_TD[order_R // k]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Any:
        (inverse_R,) = ctx.saved_tensors
        return grad_RD[inverse_R].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Reorder(torch.autograd.Function):
    """Permuted rows; backward gathers by the inverse."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, to_R: Tensor, back_R: Tensor) -> Tensor:
        ctx.save_for_backward(back_R)
        return y_RD[to_R]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Any:
        (back_R,) = ctx.saved_tensors
        return grad_RD[back_R], None, None
