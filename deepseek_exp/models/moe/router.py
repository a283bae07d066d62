"""The router: which experts a token goes to, and with which weights.

Suffixes of tensors: T tokens, E routed experts, K experts per token (top_k), G groups, N domains, D d_model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_exp.config import Balance, ModelConfig
from deepseek_exp.kernels import Ops


class Routing(NamedTuple):
    """The result of a router.

    Attributes:
        ids_TK: experts of each token.
        weights_TK: their weights, fp32.
        scores_TE: scores of all experts, without the bias, fp32.
        domain_logits_TN: the classifier's logits, fp32; None without domains.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor
    domain_logits_TN: Tensor | None


class Router(nn.Module):
    """Token-choice routing.

    s = softmax(W x) or sigmoid(W x); the experts are the top_k of s + bias among the candidates, their weights
    s / sum(s) or s, times route_scale. Candidates can be restricted in two ways:

    - Groups: only experts of the top_k_groups groups with the best group score (the best of the group's s + bias, the
      sum of its two best, or the sum of all, which under softmax is the probability of the group: coarse, then fine).
    - Domains: only experts of the token's domain and of the first, general one; scores are over these only. The domain
      is the label if there is one, else the choice of a linear classifier on the same x.

    Computed in fp32 for any type of x. Sources: DeepSeek-AI 2024, "DeepSeek-V2", section 2.2.2 (groups), and
    "DeepSeek-V3 Technical Report", section 2.1.2 (sigmoid scores, bias for the choice only; groups by their best two).
    Domains are ours.
    """

    def __init__(self, cfg: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.cfg = ops, cfg.moe
        moe = cfg.moe
        self.weight = nn.Parameter(torch.empty(moe.n_routed_experts, cfg.d_model))
        bias = torch.zeros(moe.n_routed_experts) if moe.balance is Balance.bias else None
        self.register_buffer("bias", bias)  # updated from the loads, not by a gradient
        n_domains = len(moe.domains)
        self.domain_weight = nn.Parameter(torch.empty(n_domains, cfg.d_model)) if n_domains else None
        loaded = torch.ones(n_domains, dtype=torch.bool) if n_domains else None
        self.register_buffer("loaded", loaded, persistent=False)  # domains whose experts are in memory

    def forward(self, x_TD: Tensor, domain_T: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            x_TD: tokens.
            domain_T: int64 label of each token's domain, -1 if unknown; None if all are unknown.
        """
        wide = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
        logits_TE = F.linear(wide, self.weight.to(wide.dtype))
        domain_logits_TN = open_TE = None
        if self.domain_weight is not None:
            domain_logits_TN = F.linear(wide, self.domain_weight.to(wide.dtype))
            open_TE = self._open_to(domain_logits_TN, domain_T)
        m = self.cfg
        ids_TK, weights_TK, scores_TE = self.ops.route(
            logits_TE, self.bias, open_TE, m.score, m.top_k, m.n_groups, m.top_k_groups, m.group_score, m.norm_top_k,
            m.route_scale,
        )  # fmt: skip
        return Routing(ids_TK, weights_TK, scores_TE, domain_logits_TN)

    def update_bias(self, tokens_per_expert: Tensor) -> None:
        """Change each expert's bias by bias_update_rate: up if its load is below the mean, down if it is above.

        Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1.
        With domains, the mean is that of the expert's domain, since domains have different amounts of text.

        Args:
            tokens_per_expert: number of token slots that each expert was chosen for in the whole step.
        """
        mean_E = mean_load(tokens_per_expert, max(1, len(self.cfg.domains)))
        self.bias += self.cfg.bias_update_rate * torch.sign(mean_E - tokens_per_expert).to(self.bias.dtype)

    def _open_to(self, domain_logits_TN: Tensor, domain_T: Tensor | None) -> Tensor:
        """Return which experts each token may use: those of the first domain, and of the token's domain if loaded."""
        n_domains = domain_logits_TN.shape[1]
        inferred_T = domain_logits_TN.argmax(-1)
        known_T = inferred_T if domain_T is None else torch.where(domain_T >= 0, domain_T, inferred_T)
        known_T = torch.where(self.loaded[known_T], known_T, 0)
        of_E = torch.arange(self.cfg.n_routed_experts, device=known_T.device) // (
            self.cfg.n_routed_experts // n_domains
        )
        return (of_E == 0) | (of_E == known_T[:, None])  # (tokens, experts)


def mean_load(load: Tensor, n_domains: int) -> Tensor:
    """Return the mean load of each expert's domain: (..., experts) to the same shape, float64."""
    by_domain = load.double().unflatten(-1, (n_domains, -1))  # (..., domains, experts of a domain)
    return by_domain.mean(-1, keepdim=True).expand_as(by_domain).flatten(-2)
