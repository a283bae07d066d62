"""Load-balance metrics of the experts, from what the layers counted.

Suffixes of tensors: L layers, E routed experts, N domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_exp.config import Balance, MoEConfig
from deepseek_exp.models.moe.layer import COUNTS
from deepseek_exp.models.moe.router import mean_load


def routing_metrics(cfg: MoEConfig, counts: Tensor, *, labelled: bool = False) -> dict[str, Tensor]:
    """Return metrics of the routing since the counts were reset.

    With the load factor = load / mean load of an expert (of its domain, if there are domains): load_factor_max is the
    largest of all; max_violation = largest of a layer - 1, mean over layers (MaxVio of Wang et al. 2024,
    "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts"); utilisation = mean load / max load, mean over
    layers; load_cv = standard deviation / mean, mean over layers.

    Args:
        cfg: the configuration of the layers.
        counts: (layers, experts + COUNTS), what each layer counted; each saw tokens.
        labelled: the text has domain labels, so that the classifiers can be measured.

    Returns:
        Name without the moe/ prefix -> scalar on the device of the counts.
    """
    tokens_per_expert_LE = counts[:, : cfg.n_routed_experts]
    rest = dict(zip(COUNTS, counts[:, cfg.n_routed_experts :].unbind(1), strict=True))
    mean_LE = mean_load(tokens_per_expert_LE, max(1, len(cfg.domains)))
    factor_LE = torch.where(mean_LE > 0, tokens_per_expert_LE / mean_LE, 1)  # a domain without tokens is even
    worst_L = factor_LE.amax(1)
    values = {
        "load_factor_max": worst_L.max(),
        "max_violation": (worst_L - 1).mean(),
        "utilisation": (1 / worst_L).mean(),
        "load_cv": factor_LE.var(1, correction=0).sqrt().mean(),
    }
    if cfg.capacity_factor:
        values["drop_rate"] = rest["dropped"].sum() / tokens_per_expert_LE.sum()
    if cfg.balance is Balance.aux_loss or cfg.sequence_loss_weight:
        values["balance_loss"] = (rest["balance_loss"] / rest["passes"]).sum()
    if cfg.domains:
        share_N = tokens_per_expert_LE.unflatten(1, (len(cfg.domains), -1)).sum((0, 2)) / tokens_per_expert_LE.sum()
        values |= {f"use/{name}": share for name, share in zip(cfg.domains, share_N, strict=True)}
    if cfg.domains and labelled:
        values["domain_loss"] = (rest["domain_loss"] / rest["passes"]).sum()
        values["domain_accuracy"] = rest["domain_hits"].sum() / rest["domain_labels"].sum().clamp(min=1)
    return values
