"""Expert parallelism: rows travel to the rank that has their expert, and back.

Suffixes of tensors: T tokens, K experts per token, E routed experts of all ranks, L experts of one rank, P ranks,
S rows sent by this rank, R rows that this rank's experts process, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_exp.kernels import Ops
from deepseek_exp.models.moe.dispatch import Dispatched, LocalDispatcher, reorder


class Exchanged(NamedTuple):
    """Rows of all ranks for the experts of this one; the first four are those of `Dispatched`.

    Attributes:
        x_RD: rows sorted by this rank's experts.
        offsets_E: (experts of this rank,) int32, where each one's rows end.
        tokens_per_expert: (routed experts,) int64, rows of this rank's tokens that chose each expert.
        kept_R: which of this rank's own sorted rows an expert takes; None means all.
        here: how this rank's tokens were sorted.
        order_R: received row -> its place among the sorted rows.
        inverse_R: the inverse permutation.
        sent: number of rows sent to each rank.
        received: number of rows received from each rank.
    """

    x_RD: Tensor
    offsets_E: Tensor
    tokens_per_expert: Tensor
    kept_R: Tensor | None
    here: Dispatched
    order_R: Tensor
    inverse_R: Tensor
    sent: list[int]
    received: list[int]


class _Numbers(NamedTuple):
    """Row counts that ranks send each other, on the way to the host.

    Attributes:
        rows_PL: (ranks, experts of this rank) int32, rows that come from each rank for each.
        on_host: (2, ranks) int64, rows that go to each rank and come from it; valid after `copied`.
        copied: event of the copy; None if it has finished.
    """

    rows_PL: Tensor
    on_host: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> tuple[Tensor, list[int], list[int]]:
        """Return the local expert of each row to be received, and the row counts to and from each rank.

        The device meanwhile runs the work that has been queued since.
        """
        if self.copied is not None:
            self.copied.synchronize()
        sent, received = self.on_host.tolist()
        n_ranks, n_experts = self.rows_PL.shape
        expert_E = torch.arange(n_experts, device=self.rows_PL.device).repeat(n_ranks)
        return expert_E.repeat_interleave(self.rows_PL.flatten(), output_size=sum(received)), sent, received


class AllToAllDispatcher:
    """Dispatcher for experts that are sharded evenly over the ranks of a group, in order; each rank has its own tokens.

    Nothing is padded: ranks exchange the number of rows for each expert, then send exactly these. The host waits for
    the counts.
    """

    def __init__(self, group: Any, ops: Ops) -> None:
        self.group, self.n_ranks, self.ops = group, dist.get_world_size(group), ops
        self.local = LocalDispatcher()

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, n_experts: int, capacity: int | None = None) -> Exchanged:
        """Send rows to their experts.

        Args:
            x_TD: tokens of this rank.
            ids_TK: experts of each token, among all ranks' experts.
            n_experts: number of experts on one rank.
            capacity: as in `LocalDispatcher`, for this rank's rows.
        """
        here = self.local.dispatch(x_TD, ids_TK, n_experts * self.n_ranks, capacity)
        numbers = self._announce(here.offsets_E)
        expert_R, sent, received = numbers.wait()
        x_RD = _AllToAll.apply(here.x_RD, sent, received, sum(received), self.group)
        order_R = expert_R.argsort(stable=True)
        inverse_R = order_R.argsort()
        x_RD, ends_L = reorder(x_RD, order_R, inverse_R), numbers.rows_PL.sum(0).cumsum(0).int()
        return Exchanged(x_RD, ends_L, here.tokens_per_expert, here.kept_R, here, order_R, inverse_R, sent, received)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Exchanged) -> Tensor:
        """Send rows back and sum each token's with its weights: (tokens, d_model)."""
        y_RD = reorder(y_RD, sent.inverse_R, sent.order_R)
        y_SD = _AllToAll.apply(y_RD, sent.received, sent.sent, weights_TK.numel(), self.group)
        return self.local.combine(y_SD, weights_TK, sent.here)

    def through(self, experts: Callable[..., Tensor], x_TD: Tensor, weights_TK: Tensor, *by_expert: Tensor) -> Tensor:
        """Send rows with their weights, so that experts return weighted rows, and sum what comes back."""
        order_S, inverse_S, offsets_E = by_expert
        n_rows, inverse_TK, numbers = len(order_S), inverse_S.view(weights_TK.shape), self._announce(offsets_E)
        weights_S1 = reorder(weights_TK.flatten()[:, None], order_S, inverse_S)
        x_SD = self.ops.permute(x_TD, inverse_TK, offsets_E)
        expert_R, sent, received = numbers.wait()
        weights_R1 = _AllToAll.apply(weights_S1, sent, received, sum(received), self.group)
        x_RD = _AllToAll.apply(x_SD, sent, received, sum(received), self.group)
        here = self.ops.sort_by_expert(expert_R[:, None], numbers.rows_PL.shape[1])
        y_SD = _AllToAll.apply(experts(x_RD, weights_R1, *here), received, sent, n_rows, self.group)
        return self.ops.unpermute(y_SD, inverse_TK, offsets_E)

    def _announce(self, offsets_E: Tensor) -> _Numbers:
        """Send each rank the number of rows for each of its experts.

        `offsets_E`: where the rows for each of all experts end.
        """
        out_PL = offsets_E.diff(prepend=offsets_E.new_zeros(1)).view(self.n_ranks, -1)
        in_PL = torch.empty_like(out_PL)
        dist.all_to_all_single(in_PL, out_PL, group=self.group)
        on_host = torch.stack([out_PL.sum(1), in_PL.sum(1)]).to("cpu", non_blocking=in_PL.is_cuda)
        copied = torch.cuda.Event() if in_PL.is_cuda else None
        if copied is not None:
            copied.record()
        return _Numbers(in_PL, on_host, copied)


class _AllToAll(torch.autograd.Function):
    """Send runs of rows to each rank; backward sends the gradients back.

    Rows after the sent ones were dropped and stay here. The received rows are padded with rows of 0 up to `n_rows`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], n_rows: int, group: Any) -> Tensor:
        ctx.back = received, sent, len(x), group
        return _exchange(x, sent, received, n_rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _exchange(grad, *ctx.back), None, None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], n_rows: int, group: Any) -> Tensor:
    out, n_sent, n_received = x.new_empty(n_rows, x.shape[1]), sum(sent), sum(received)
    dist.all_to_all_single(out[:n_received], x[:n_sent].contiguous(), received, sent, group=group)
    out[n_received:].zero_()
    return out
