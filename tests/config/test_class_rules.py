"""Classes that a configuration may name: what is listed of them is what they take, and they work."""

from __future__ import annotations

import inspect

import pytest
import torch
from pytorch_lightning import callbacks
from torch import nn

from deepseek_exp import config
from deepseek_exp.config import OptimConfig
from deepseek_exp.config.rules import classes as class_rules
from deepseek_exp.config.rules.classes import CALLBACKS, OPTIMIZERS, REQUIRED
from deepseek_exp.train.optim import build_optimizer
from tests.experiment.test_command_line import problems_of

# arguments that are not for a configuration: made by us, of no use here, or ascending instead of descending
NOT_LISTED = {
    "params", "lr", "weight_decay", "maximize", "capturable", "differentiable", "check_on_train_epoch_end",
    "summarize_kwargs",
}  # fmt: skip
ADAMW = "betas, eps, foreach, amsgrad, fused"
MESSAGES = {
    "optim.optimizer._target_=torch.optim.LBFGS": "optim.optimizer._target_='torch.optim.LBFGS' is not a class that "
    "can work here. Fix: use torch.optim.SGD, or another of " + ", ".join(f"torch.optim.{n}" for n in OPTIMIZERS) + ".",
    "optim.optimizer._target_=torch.optim.SGD": "optim.optimizer.betas=[0.9, 0.95] is not an argument of "
    "torch.optim.SGD that may be set (momentum, dampening, nesterov, foreach, fused). "
    "Fix: remove it: ~optim.optimizer.betas.\n"
    "optim.optimizer.eps=1e-08 is not an argument of torch.optim.SGD that may be set (momentum, dampening, nesterov, "
    "foreach, fused). Fix: remove it: ~optim.optimizer.eps.",
    "+optim.optimizer.lr=1": "optim.optimizer.lr=1 has no effect next to optim.lr. "
    "Fix: leave it out, and set optim.lr=1.",
    "+optim.optimizer.weight_decay=5": "optim.optimizer.weight_decay=5 has no effect next to "
    "optim.weight_decay. Fix: leave it out, and set optim.weight_decay=5.",
    "+optim.optimizer._args_=[1]": "optim.optimizer._args_=[1] is not an argument of torch.optim.AdamW that may be set "
    f"({ADAMW}). Fix: remove it: ~optim.optimizer._args_.",
    "optim.optimizer.betas=[2,3]": "optim.optimizer.betas=[2, 3] is not two numbers from 0 up to 1, 1 left out. "
    "Fix: use optim.optimizer.betas=[0.9,0.95].",
    "optim.optimizer.betas=[0.9]": "optim.optimizer.betas=[0.9] is not two numbers from 0 up to 1, 1 left out. "
    "Fix: use optim.optimizer.betas=[0.9,0.95].",
    "optim.optimizer.eps=-1": "optim.optimizer.eps=-1 is not a number of at least 0. Fix: use optim.optimizer.eps=0.",
    "optim.optimizer.fused=maybe": "optim.optimizer.fused='maybe' is not true, false or null. "
    "Fix: use optim.optimizer.fused=null.",
    "+optim.optimizer.foreach=true": "optim.optimizer.foreach=true cannot be used with fused=true, which is another "
    "way to compute the same. Fix: remove it: ~optim.optimizer.foreach.",
    "+trainer.callbacks.a._target_=pytorch_lightning.callbacks.EarlyStopping": "trainer.callbacks.a.monitor=null is "
    "needed by pytorch_lightning.callbacks.EarlyStopping. Fix: add +trainer.callbacks.a.monitor=val/loss.",
    "+trainer.callbacks.a={_target_:pytorch_lightning.callbacks.Timer,duration:abc}": "trainer.callbacks.a.duration="
    "'abc' is not days:hours:minutes:seconds. Fix: use trainer.callbacks.a.duration=00:12:00:00.",
    "+trainer.callbacks.a._target_=deepseek_exp.train.callbacks.Path": "trainer.callbacks.a._target_="
    "'deepseek_exp.train.callbacks.Path' is not a class that can work here. Fix: use one of "
    + ", ".join(f"pytorch_lightning.callbacks.{n}" for n in CALLBACKS)
    + ".",
    "+trainer.callbacks.a._target_=torch.optim.AdamW": "trainer.callbacks.a._target_='torch.optim.AdamW' is not a "
    "class that can work here. Fix: use one of "
    + ", ".join(f"pytorch_lightning.callbacks.{n}" for n in CALLBACKS)
    + ".",
}


@pytest.fixture(autouse=True, scope="module")
def _schema():
    config.register()


@pytest.mark.parametrize("command_line", MESSAGES)
def test_message(command_line):
    assert problems_of(command_line) == MESSAGES[command_line]


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
