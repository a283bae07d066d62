"""The routing metrics on loads made by hand."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.models.moe import routing_metrics
from deepseek_exp.models.moe.layer import COUNTS
from tests.models.moe.moe_parts import build


def counted(load: list[float], n_passes: int = 1, moe: dict | None = None, **counts: float):
    layer = build(**(moe or {}))
    rest = {"passes": n_passes, **counts}
    layer.record(torch.tensor([*load, *(rest.get(name, 0.0) for name in COUNTS)], dtype=torch.float64))
    return layer


def measured(layers, **labelled):
    counts = torch.stack([layer.counts for layer in layers])
    return {name: value.item() for name, value in routing_metrics(layers[0].cfg, counts, **labelled).items()}


def test_an_even_load():
    values = measured([counted([5.0] * 8)])
    assert values == {"load_factor_max": 1, "max_violation": 0, "utilisation": 1, "load_cv": 0}


def test_means_are_over_layers_and_the_largest_factor_is_of_all():
    layers = [counted([2.0] * 8), counted([8.0, 4, 4, 4, 4, 4, 4, 0])]  # load factors 1, and 2 at most
    values = measured(layers)
    assert values["load_factor_max"] == 2
    assert values["max_violation"] == 0.5
    assert values["utilisation"] == 0.75
    assert values["load_cv"] == pytest.approx((0 + (2 / 8) ** 0.5) / 2)


def test_a_domain_is_measured_against_its_own_mean():
    moe = {"domains": ["general", "law"], "top_k": 2}
    values = measured([counted([9.0, 9, 9, 9, 1, 1, 1, 1], moe=moe, domain_hits=3.0, domain_labels=4.0)], labelled=True)
    assert values["max_violation"] == 0
    assert values["use/general"] == 0.9
    assert values["use/law"] == 0.1
    assert values["domain_accuracy"] == 0.75


def test_a_domain_without_tokens_is_even():
    values = measured([counted([6.0, 2, 2, 2, 0, 0, 0, 0], moe={"domains": ["general", "law"]})])
    assert values["load_factor_max"] == 2
    assert values["utilisation"] == 0.5
    assert "domain_accuracy" not in values  # nothing is labelled


def test_fewer_token_slots_than_experts():
    values = measured([counted([2.0, 1, 1, 0, 0, 0, 0, 0])])
    assert values["load_factor_max"] == 4
    assert values["utilisation"] == 0.25


def test_losses_are_means_over_passes_and_drops_over_slots():
    moe = {"capacity_factor": 1.0, "balance": "aux_loss"}
    layers = [counted([4.0] * 8, 2, moe, dropped=4.0, balance_loss=0.3) for _ in range(2)]
    values = measured(layers)
    assert values["drop_rate"] == 8 / 64
    assert values["balance_loss"] == pytest.approx(0.3)
