"""Merge branches, trainings of one model on one domain each, into the experts of one model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deepseek_exp.adapt.stored import load_merged

# Weights whose rows belong to experts or domains: equal parts of the first dimension, one per domain.
BY_DOMAIN = re.compile(r"\.experts\.\w+$|\.router\.(weight|bias|domain_weight)$")


@torch.no_grad()
def merge_branches(branches: Mapping[str, Path], domains: Sequence[str], *, use_ema: bool = False) -> dict[str, Tensor]:
    """Return the weights of one model from branches that share a start.

    The experts of a domain, with the router's rows for them and the classifier's row, come from its branch. Everything
    else, and the rows of domains without a branch, is the mean of the branches, computed in float64. So equal branches
    are merged into themselves, bit for bit; and if the branches have trained nothing but the experts of their domain,
    the merged model computes the same as each branch on text with the label of its domain.

    Source: Sukhbaatar et al. 2024, "Branch-Train-MiX", section 3.2, where each feed-forward network is one expert.

    Args:
        branches: domain -> its checkpoint, all of models of the same shape.
        domains: all domains of the model, in order.
        use_ema: read the moving averages of what was trained.

    Returns:
        Parameters and persistent buffers by name.
    """
    total: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    own: dict[tuple[str, str], Tensor] = {}
    for domain, folder in branches.items():
        for name, w in load_merged(folder, use_ema=use_ema).items():
            total[name] = total[name] + w.double() if name in total else w.double()
            merged[name] = w
            if BY_DOMAIN.search(name):
                own[name, domain] = _rows(w, domains, domain).clone()
    merged = {name: (total[name] / len(branches)).to(w.dtype) for name, w in merged.items()}
    for (name, domain), rows in own.items():
        _rows(merged[name], domains, domain).copy_(rows)
    return merged


def _rows(w: Tensor, domains: Sequence[str], domain: str) -> Tensor:
    """Return the rows of one domain, as a view."""
    return w.chunk(len(domains))[domains.index(domain)]
