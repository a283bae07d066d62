"""Products that sum over tensor ranks train, bit for bit, what exchanges beside them train."""

from __future__ import annotations

import time

import pytest

from tests.parallel.layouts import Watch, layout

FEW = ("trainer.max_steps=2", "optim.warmup_steps=1", "trainer.eval_every_steps=2", "trainer.checkpoint_every_steps=2")
TWO = (*FEW, *layout(tp=2), "kernels.linears=accumulated", "data.seq_len=32", "model.n_layers=3")
PASSES = 8 * 2  # micro batches of a step, steps


class Joined(Watch):
    """Counts exchanges of activations; the second rank comes late to those that the first need not wait for."""

    def before_build(self, cfg):
        import torch.distributed as dist

        self.n_async, self.n_sync, exchange = 0, 0, dist.all_reduce

        def noted(tensor, *args, async_op=False, **kwargs):
            is_activation = tensor.ndim > 1 and tensor.shape[-1] == cfg.model.d_model
            self.n_async += async_op and is_activation
            self.n_sync += is_activation and not async_op
            if async_op and is_activation and dist.get_rank() == 1:
                time.sleep(0.003)
            return exchange(tensor, *args, async_op=async_op, **kwargs)

        dist.all_reduce = noted
        return cfg

    def result(self):
        return [self.n_async, self.n_sync]


class Beside(Joined):
    """Has the exchanges beside the products."""

    def before_build(self, cfg):
        from deepseek_exp.parallel import tensor

        tensor.Region.join = lambda region, module, ops, is_recomputed: region.wrap(module)
        return super().before_build(cfg)


def assert_equal(one, other):
    assert one.metrics == other.metrics and "optim/grad_norm" in one.metrics[2]
    before, after = one.weights(), other.weights()
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


@pytest.fixture(scope="module")
def beside(layouts):
    return layouts.run(2, "model=v1_dense", "model.qkv_bias=true", *TWO, watch=Beside)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_dense_blocks(layouts, beside, kind):
    """Where all of a block is computed again, what attention gives is summed again; nothing else is, nowhere else."""
    what = ("model=v1_dense", "model.qkv_bias=true", f"trainer.activation_checkpointing={kind}")
    joined = layouts.run(2, *what, *TWO, watch=Joined)
    assert_equal(beside, joined)
    again = 3 * PASSES if kind == "full" else 0
    assert beside.said == [[0, sum(joined.said[0]) - again]] * 2
    assert [n_async for n_async, _ in joined.said] == [3 * 2 * PASSES] * 2


def test_latents_and_experts(layouts):
    """Attention of four blocks, of which one looks ahead, and the dense network of the first; not experts."""
    beside, joined = (layouts.run(2, "model=v3_moe", *TWO, watch=watch) for watch in (Beside, Joined))
    assert_equal(beside, joined)
    assert beside.said == [[0, sum(joined.said[0])]] * 2
    assert [n_async for n_async, _ in joined.said] == [(4 + 1) * PASSES] * 2
