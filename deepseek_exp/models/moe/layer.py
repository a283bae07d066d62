"""The mixture-of-experts layer: router, dispatch, experts, and shared experts in parallel.

Suffixes of tensors: B sequences, S tokens per sequence, T = B * S, E routed experts, K experts per token, R = T * K
rows, D d_model, F d_expert, N domains.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_exp.config import Balance, ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.feed_forward import FeedForward
from deepseek_exp.models.moe.dispatch import Dispatcher, LocalDispatcher, offsets_of
from deepseek_exp.models.moe.router import Router, Routing

# What a layer counts in addition to the load of each expert.
COUNTS = ("passes", "dropped", "balance_loss", "domain_loss", "domain_hits", "domain_labels")


class Experts(nn.Module):
    """The routed experts, each a SwiGLU network of width d_expert, as three stacks of matrices."""

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        n, d, f = cfg.moe.n_routed_experts, cfg.d_model, cfg.moe.d_expert
        self.ops = ops
        self.w_gate = nn.Parameter(torch.empty(n, f, d))
        self.w_up = nn.Parameter(torch.empty(n, f, d))
        self.w_down = nn.Parameter(torch.empty(n, d, f))

    def forward(self, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """Map rows sorted by expert, of which expert e has those before offsets_E[e], to the same shape."""
        gate_RF = self.ops.grouped_mm(x_RD, self.w_gate, offsets_E)
        up_RF = self.ops.grouped_mm(x_RD, self.w_up, offsets_E)
        return self.ops.grouped_mm(self.ops.swiglu(gate_RF, up_RF), self.w_down, offsets_E)  # (rows, d_model)

    def weighted(self, x_TD: Tensor, weights_TK: Tensor, *by_expert: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts in one operation: `reference.routed_experts`."""
        assert self.ops.routed_experts is not None
        return self.ops.routed_experts(x_TD, weights_TK, *by_expert, self.w_gate, self.w_up, self.w_down)


class MoE(nn.Module):
    """Mixture of experts: y = shared(x) + sum over a token's experts of weight * expert(x).

    Source: Dai et al. 2024, "DeepSeekMoE", section 3 (fine-grained and shared experts). In training, if capacity_factor
    is set, an expert takes at most capacity_factor x the mean load, rounded down, but at least one row: this bounds its
    load factor, load / mean load. Otherwise, and always outside training, nothing is dropped.

    The losses that balance the load and train the domain classifier are attached to the output: the backward pass adds
    their gradient, times `loss_scale`, and no loss has to be passed to the end of the model.

    Attributes:
        loss_scale: 1 / micro-batches per step.
        updates_bias: whether `update_bias` changes the router's bias.
        counts: float64, loads of the experts, then COUNTS, accumulated since `reset_counts`.
    """

    def __init__(self, cfg: ModelConfig, ops: Ops, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        self.cfg, self.ops, self.dispatcher, self.loss_scale = cfg.moe, ops, dispatcher or LocalDispatcher(), 1.0
        self.updates_bias = cfg.moe.balance is Balance.bias
        self.router = Router(cfg, ops)
        self.experts = Experts(cfg, ops)
        n_shared = cfg.moe.n_shared_experts
        self.shared = FeedForward(cfg.d_model, n_shared * cfg.moe.d_expert, ops) if n_shared else None
        counts = torch.zeros(cfg.moe.n_routed_experts + len(COUNTS), dtype=torch.float64)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("slot_of_E", None, persistent=False)  # position of each expert when some are unloaded

    def forward(self, x: Tensor, domain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map tokens through their experts.

        Args:
            x: (batch, seq, d_model).
            domain: (batch,) int64, each sequence's domain, -1 if unknown; None if all are unknown.

        Returns:
            (batch, seq, d_model), and the argument of `record`: (experts + len(COUNTS),) float64.
        """
        x_TD = x.flatten(0, 1)
        domain_T = None if domain is None else domain.repeat_interleave(x.shape[1])
        routing = self.router(x_TD, domain_T)
        slots_TK = routing.ids_TK if self.slot_of_E is None else self.slot_of_E[routing.ids_TK]
        through = self._through_experts if self.ops.routed_experts is None else self._through_fused_experts
        y_TD, tokens_per_expert, dropped = through(x_TD, slots_TK, routing.weights_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        tokens_per_expert = (
            tokens_per_expert if self.slot_of_E is None else tokens_per_expert.new_zeros(self.cfg.n_routed_experts)
        )
        losses = self._losses(routing, tokens_per_expert, domain_T, x.shape[1])
        loss = (losses["balance_loss"] + losses["domain_loss"]) * self.loss_scale
        if loss.requires_grad:
            y_TD = _AttachLoss.apply(y_TD, loss)
        counted = {"passes": 1, "dropped": dropped, **losses}
        rest = torch.stack([_as_count(counted[n], x.device) for n in COUNTS])
        return y_TD.view_as(x), torch.cat([tokens_per_expert.double(), rest])

    def _n_here(self) -> int:
        """Return the number of experts on this rank; reading a stack for it would compute a transformed one."""
        if self.slot_of_E is None:
            return self.cfg.n_routed_experts // self.dispatcher.n_ranks
        return len(self.experts.w_gate)

    def _through_experts(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send tokens to their experts and back: their sums (tokens, d_model), each expert's load, and dropped rows."""
        sent = self.dispatcher.dispatch(x_TD, slots_TK, self._n_here(), self._capacity(slots_TK))
        y_TD = self.dispatcher.combine(self.experts(sent.x_RD, sent.offsets_E), weights_TK, sent)
        dropped = 0 * sent.tokens_per_expert.sum() if sent.kept_R is None else (~sent.kept_R).sum()
        return y_TD, sent.tokens_per_expert, dropped

    def _through_fused_experts(
        self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do `_through_experts` with one operation from tokens, or their exchanged rows, to their sums."""
        n, capacity = self._n_here() * self.dispatcher.n_ranks, self._capacity(slots_TK)
        order_R, inverse_R, offsets_E = self.ops.sort_by_expert(slots_TK, n)
        tokens_per_expert = offsets_E.diff(prepend=offsets_E.new_zeros(1)).long()
        if capacity is not None:
            expert_R = slots_TK.flatten()[order_R]
            place_R = torch.arange(len(order_R), device=order_R.device) - (offsets_E - tokens_per_expert)[expert_R]
            kept_TK = (place_R < capacity)[inverse_R].view_as(slots_TK)
            slots_TK = torch.where(kept_TK, slots_TK, n)
            order_R, inverse_R, offsets_E = self.ops.sort_by_expert(slots_TK, n)
        y_TD = self.dispatcher.through(self.experts.weighted, x_TD, weights_TK, order_R, inverse_R, offsets_E)
        return y_TD, tokens_per_expert, len(order_R) - offsets_E[-1].long()

    def set_dispatcher(self, dispatcher: Dispatcher) -> None:
        """Route tokens to experts on other ranks. Not compiled, because row counts are data-dependent."""
        self.dispatcher = dispatcher
        for name in ("_through_experts", "_through_fused_experts"):
            setattr(self, name, torch.compiler.disable(getattr(self, name)))

    def record(self, counts: Tensor) -> None:
        """Add the counts of one forward pass."""
        self.counts += counts

    def reset_counts(self) -> None:
        """Reset the counts to 0."""
        self.counts.zero_()

    def update_bias(self) -> None:
        """Update the router's bias from the loads counted since the last reset, unless it has none or is frozen."""
        if self.updates_bias:
            self.router.update_bias(self.counts[: self.cfg.n_routed_experts])

    def domain_state(self, domain: int) -> dict[str, Tensor]:
        """Return the weights that belong to one domain, by name; views, not copies."""
        first, last = self._experts_of(domain)
        slots = slice(first, last) if self.slot_of_E is None else self.slot_of_E[first:last]
        state = {f"experts.{name}": p[slots] for name, p in self.experts.named_parameters()}
        state |= {"router.weight": self.router.weight[first:last], "router.domain_weight": self._domain_row(domain)}
        return state if self.router.bias is None else state | {"router.bias": self.router.bias[first:last]}

    @torch.no_grad()
    def remove_domain(self, domain: int) -> None:
        """Remove a domain's experts from memory; until they are inserted again, its tokens go to the first domain's."""
        first, last = self._experts_of(domain)
        gone = self._slots()[first:last]
        for name, p in list(self.experts.named_parameters()):
            rest = torch.cat([p[: gone[0]], p[gone[-1] + 1 :]])
            setattr(self.experts, name, nn.Parameter(rest, p.requires_grad))
        self.router.loaded[domain] = False
        self.slot_of_E = self._slots()

    @torch.no_grad()
    def insert_domain(self, domain: int, state: dict[str, Tensor]) -> None:
        """Insert the experts of a domain, with the weights of `domain_state`."""
        self.router.loaded[domain] = True
        slots = self._slots()
        first, last = self._experts_of(domain)
        for name, p in list(self.experts.named_parameters()):
            new = state[f"experts.{name}"].to(p)
            whole = torch.cat([p[: slots[first]], new, p[slots[first] :]])
            setattr(self.experts, name, nn.Parameter(whole, p.requires_grad))
        self.router.weight[first:last] = state["router.weight"].to(self.router.weight)
        self._domain_row(domain).copy_(state["router.domain_weight"])
        if self.router.bias is not None:
            self.router.bias[first:last] = state["router.bias"].to(self.router.bias)
        self.slot_of_E = None if self.router.loaded.all() else slots

    def _experts_of(self, domain: int) -> tuple[int, int]:
        size = self.cfg.n_routed_experts // len(self.cfg.domains)
        return domain * size, (domain + 1) * size

    def _domain_row(self, domain: int) -> Tensor:
        return self.router.domain_weight[domain : domain + 1]

    def _slots(self) -> Tensor:
        """Return where each expert lies in the stacks: (experts,) int64; for an unloaded one, where it would lie."""
        size = self.cfg.n_routed_experts // len(self.cfg.domains)
        here_E = self.router.loaded.repeat_interleave(size)
        return here_E.cumsum(0) - here_E.long()

    def _capacity(self, slots_TK: Tensor) -> int | None:
        if not (self.training and self.cfg.capacity_factor):
            return None
        return max(1, int(self.cfg.capacity_factor * slots_TK.numel() / self.cfg.n_routed_experts))

    def _losses(
        self, routing: Routing, tokens_per_expert: Tensor, domain_T: Tensor | None, seq: int
    ) -> dict[str, Tensor]:
        """Return the weighted losses of this batch, and the accuracy counts of the domain classifier."""
        zero = routing.scores_TE.new_zeros(())
        losses = dict.fromkeys(("balance_loss", "domain_loss", "domain_hits", "domain_labels"), zero)
        if not self.training:
            return losses
        scores_BSE = routing.scores_TE.unflatten(0, (-1, seq))
        if self.cfg.balance is Balance.aux_loss:
            batch = balance_loss(scores_BSE.flatten(0, 1)[None], tokens_per_expert[None], self.cfg.top_k)
            losses["balance_loss"] = self.cfg.aux_loss_weight * batch
        if self.cfg.sequence_loss_weight:
            ids = routing.ids_TK.unflatten(0, (-1, seq)).flatten(1)  # (batch, seq * top_k)
            tokens_per_expert_BE = offsets_of(ids.sort(-1).values, self.cfg.n_routed_experts).diff(
                prepend=ids.new_zeros(len(ids), 1)
            )
            by_sequence = balance_loss(scores_BSE, tokens_per_expert_BE, self.cfg.top_k)
            losses["balance_loss"] = losses["balance_loss"] + self.cfg.sequence_loss_weight * by_sequence
        if routing.domain_logits_TN is not None and domain_T is not None:
            n_labels = (domain_T >= 0).sum()
            nats = F.cross_entropy(routing.domain_logits_TN, domain_T, ignore_index=-1, reduction="sum")
            losses["domain_loss"] = self.cfg.domain_loss_weight * nats / n_labels.clamp(min=1)
            losses["domain_hits"] = (routing.domain_logits_TN.argmax(-1) == domain_T).sum()
            losses["domain_labels"] = n_labels
        return losses


def balance_loss(scores_BSE: Tensor, tokens_per_expert_BE: Tensor, top_k: int) -> Tensor:
    """Return the mean over rows of sum over experts of f * P; 1 for an even load, at most experts / top_k otherwise.

    f = experts * load / (top_k * tokens), P = mean over tokens of the scores divided by their sum. Gradients flow
    through P only. Sources: Dai et al. 2024, "DeepSeekMoE", equations 12 to 14; DeepSeek-AI 2024, "DeepSeek-V3
    Technical Report", equations 17 to 20, where a row is one sequence.

    Args:
        scores_BSE: scores of all experts.
        tokens_per_expert_BE: how often each expert was chosen in each row.
        top_k: experts per token.
    """
    f_BE = tokens_per_expert_BE.to(scores_BSE.dtype) * scores_BSE.shape[2] / (top_k * scores_BSE.shape[1])
    p_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


def _as_count(value: Tensor | int, device: torch.device) -> Tensor:
    """Return a float64 scalar on the device; a number is created there without a synchronising copy."""
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.full((), value, dtype=torch.float64, device=device)


class _AttachLoss(torch.autograd.Function):
    """Pass x on; in the backward pass the loss gets gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)
