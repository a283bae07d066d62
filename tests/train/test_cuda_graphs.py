"""Replayed passes against ordinary ones, with a recording that a CPU can replay."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.errors import UserError
from deepseek_exp.models import Losses, MicroBatch
from deepseek_exp.train import cuda_graphs
from deepseek_exp.train.cuda_graphs import WARM_UP, CudaGraphs
from deepseek_exp.train.optim import MasterWeights


def fake_capture(calls):
    """Return a stand-in for `capture` whose replay overwrites the results in place, as a graph does."""

    def capture(run):
        results = losses, gradients = run()
        for tensor in (*losses, *gradients.values()):
            if tensor is not None:
                tensor.fill_(torch.nan)  # recording runs nothing

        def replay():
            calls.append(1)
            new_losses, new_gradients = run()
            for mine, new in zip((*losses, *gradients.values()), (*new_losses, *new_gradients.values()), strict=True):
                if mine is not None:
                    mine.copy_(new)

        return results, replay

    return capture


def trained(use_graphs, n_steps, n_micro_batches, dtype):
    """Train a linear layer; returns its weights and the losses of each micro-batch."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).to(dtype)
    frozen = torch.nn.Linear(3, 3).to(dtype).requires_grad_(False)
    unused = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    model.register_parameter("unused", unused)

    def losses_of(batch):
        nll = frozen(model(batch.tokens.to(dtype))).pow(2).sum(-1)
        return Losses(nll.float().mean(), nll.detach(), nll.new_zeros(()), sums=nll.detach().sum()[None])

    def make(groups):
        return torch.optim.SGD([{**g, "params": [p for _, p in g["params"]]} for g in groups], lr=0.1)

    optimizer = MasterWeights([{"params": list(model.named_parameters())}], make)
    graphs, found = CudaGraphs(model, losses_of), []
    for _ in range(n_steps):
        for _ in range(n_micro_batches):
            batch = MicroBatch(torch.randint(0, 9, (2, 4)), None)
            if use_graphs:
                found.append(graphs(batch, n_micro_batches, torch.Tensor.backward))
                assert found[-1].loss.grad_fn is None
            else:
                losses = losses_of(batch)
                losses = losses._replace(loss=losses.loss / n_micro_batches)
                losses.loss.backward()
                found.append(losses)
        optimizer.step()
        optimizer.zero_grad()
    return model.weight.detach(), found


@pytest.mark.parametrize("n_micro_batches", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_steps_equal_ordinary_ones(monkeypatch, n_micro_batches, dtype):
    monkeypatch.setattr(cuda_graphs, "capture", fake_capture(calls := []))
    weight, found = trained(True, 4, n_micro_batches, dtype)
    assert len(calls) == 4 * n_micro_batches - WARM_UP
    wanted_weight, wanted = trained(False, 4, n_micro_batches, dtype)
    assert torch.equal(weight, wanted_weight)
    for a, b in zip(found, wanted, strict=True):  # results of earlier passes are kept
        assert torch.equal(a.loss, b.loss) and torch.equal(a.nll, b.nll) and torch.equal(a.sums, b.sums)


@pytest.fixture
def broken_off(monkeypatch):
    """Make a recording end with a second error after one inside, as PyTorch does."""

    class Graph:
        def __init__(self, _graph):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)


def test_a_lack_of_memory_stays_what_it_is(broken_off):
    def run():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        cuda_graphs.capture(run)


def test_an_operation_that_waits_is_named(broken_off):
    def run():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(UserError, match=r"trainer\.cuda_graphs=true cannot record .*stream is capturing"):
        cuda_graphs.capture(run)
