"""The moving average of the weights: its formula, what holds it, and who reads it."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.checkpoint.lightning_io import in_one_file, load_weights
from deepseek_exp.checkpoint.shards import open_state
from deepseek_exp.errors import CheckpointError
from deepseek_exp.train import build
from deepseek_exp.train.ema import drop_average, update_average
from deepseek_exp.train.optim import MasterWeights
from tests.config.test_config import composed
from tests.train.test_callbacks import Recorder, fit  # noqa: F401 - a fixture


def steps(optimizer, weight, n):
    """Make n steps; give the weights after each."""
    passed = []
    for _ in range(n):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        update_average(optimizer, 0.75)
        passed.append(weight.detach().double().clone())
    return passed


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_is_the_weighted_mean_of_the_weights(kind):
    weight = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([weight], lr=0.1)
    first, *rest = steps(optimizer, weight, 4)
    for w in rest:
        first = 0.75 * first + 0.25 * w
    assert torch.allclose(optimizer.state[weight]["ema"].double(), first, atol=1e-6)
    drop_average(optimizer)
    assert "ema" not in optimizer.state[weight]


def test_is_of_the_masters():
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    make = lambda groups: torch.optim.SGD(groups, lr=1e-4)  # noqa: E731 - too little for bf16
    optimizer = MasterWeights([{"params": [("w", weight)]}], make)
    for _ in range(3):
        optimizer.masters[0].grad = torch.ones(8)
        optimizer.step()
        update_average(optimizer, 0.5)
    assert torch.all(weight == 1) and optimizer.state[optimizer.masters[0]]["ema"].dtype is torch.float32
    assert optimizer.state[optimizer.masters[0]]["ema"][0] == pytest.approx(1 - 1e-4 * (0.25 * 1 + 0.25 * 2 + 0.5 * 3))


def test_a_resumed_run_keeps_it_bit_for_bit_and_others_read_it(fit, tmp_path):  # noqa: F811
    averaged = ("optim.ema_decay=0.9", "trainer.checkpoint_every_steps=4", "trainer.keep_checkpoints=9")
    fit(overrides=averaged)
    last, half = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (6, 4))
    state = open_state(last)
    want = {name: state.read(name, "ema") for name in state.names}
    fit(overrides=averaged, checkpoint=half)
    state = open_state(last)
    assert all(torch.equal(want[name], state.read(name, "ema")) for name in want)
    found = load_weights(last, use_ema=True)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert not torch.equal(found["embedding.weight"], load_weights(last)["embedding.weight"])
    cfg = composed("size=tiny", "data=synthetic", "do=eval", "use_ema=true", f"init_from={last}")
    model = build.build_model(cfg, torch.device("cpu"), None)
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())
    with in_one_file(last, tmp_path / "hf", use_ema=True) as folder:
        assert all(torch.equal(w, found[name]) for name, w in load_weights(folder).items())


def test_a_run_without_one_is_refused(fit, tmp_path):  # noqa: F811
    fit()
    with pytest.raises(CheckpointError, match=r"holds no moving average of its weights"):
        load_weights(tmp_path / "checkpoints" / "step-00000006", use_ema=True)
