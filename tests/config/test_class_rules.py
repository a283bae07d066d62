"""Classes that a configuration may name: what is listed of them is what they take, and they work."""

from __future__ import annotations

import inspect

import pytest
import torch
from pytorch_lightning import callbacks
from torch import nn

from deepseek_exp.config import OptimConfig
from deepseek_exp.config.rules import classes as class_rules
from deepseek_exp.config.rules.classes import CALLBACKS, OPTIMIZERS, REQUIRED
from deepseek_exp.train.optim import build_optimizer

# arguments that are not for a configuration: made by us, of no use here, or ascending instead of descending
NOT_LISTED = {
    "params", "lr", "weight_decay", "maximize", "capturable", "differentiable", "check_on_train_epoch_end",
    "summarize_kwargs",
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "classes"), [(torch.optim, OPTIMIZERS), (callbacks, CALLBACKS)], ids=["optimizers", "callbacks"]
)
def test_the_lists_are_what_the_classes_take(module, classes):
    for name, listed in classes.items():
        taken = inspect.signature(getattr(module, name)).parameters
        assert set(listed) == set(taken) - NOT_LISTED, name
        if module is callbacks:
            needed = [n for n, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            assert set(needed) <= {REQUIRED.get(name)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps(name):
    """With each argument that is listed set to what its remedy says."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    given = {k: kind.example for k, kind in OPTIMIZERS[name].items()}
    values = {k: _parsed(v) for k, v in given.items()}
    assert all(kind.holds(values[k]) for k, kind in OPTIMIZERS[name].items())
    cfg = OptimConfig({"_target_": f"torch.optim.{name}", **values}, 32, 0.01, 0.1, 0, 0.1, 1.0)
    optimizer = build_optimizer(cfg, model)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) and b.isfinite().all() for a, b in zip(before, model.parameters(), strict=True))


def _parsed(example: str):
    from deepseek_exp.config.explain import parse_one

    return parse_one(f"x={example}").value()


def test_what_is_added_to_callbacks_py_is_found_with_its_arguments():
    source = "import pytorch_lightning as pl\nclass Mine(pl.Callback):\n    def __init__(self, a, *, b=1): ...\n"
    found = class_rules.callbacks_in(source + "class Other: ...\ndef Callback(): ...\n")
    assert {name: list(arguments) for name, arguments in found.items()} == {"Mine": ["a", "b"]}
    assert class_rules.own_callbacks() == {}
