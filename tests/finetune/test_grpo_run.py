"""Reinforcement learning as a run: the sampler agrees with the trainer, ranks and resumes sample the same."""

from __future__ import annotations

import pytest
import torch

from tests.finetune import row_files
from tests.parallel.layouts import Watch, difference, layout

STEPS = (
    "do=grpo",
    "grpo.group_size=4",
    "grpo.max_new_tokens=5",
    "~grpo.rewards.answer",
    "+grpo.rewards.letter._target_=deepseek_exp.finetune.rewards.regex_match",
    "+grpo.rewards.letter.pattern='[a-m]'",
    "trainer.max_steps=4",
    "trainer.eval_every_steps=4",
    "trainer.eval_seqs=4",
    "trainer.checkpoint_every_steps=4",
    "trainer.micro_batch_seqs=4",
    "trainer.global_batch_seqs=16",
    "optim.warmup_steps=1",
    "optim.lr=1e-2",
    "data.seq_len=24",
    "model.n_layers=2",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return row_files.prompts(tmp_path_factory.mktemp("prompts"))


class Seen(Watch):
    """Notes the completions that each step trains on, and how many tokens the experts are charged with."""

    def before_fit(self, parts, trainer):
        self.lit, self.tokens, self.counts = parts.lit, [], []
        train = parts.lit.training_step

        def step(batch, batch_idx):
            found = train(batch, batch_idx)
            self.tokens.append(parts.lit.rounds.batch.tokens.tolist())
            self.counts.append([c[: -len(COUNTS)].sum().item() for c in found["expert_counts"]])
            return found

        from deepseek_exp.models.moe.layer import COUNTS

        parts.lit.training_step = step

    def result(self):
        return {"tokens": self.tokens, "counts": self.counts}


@pytest.fixture(scope="module")
def whole(layouts, data):
    return layouts.run(1, *STEPS, *data, watch=Seen)


def test_sampler_and_trainer_agree(whole):
    assert len(whole.metrics) == 4
    for values in whole.metrics.values():
        assert 0 < values["grpo/sampler_difference_max"] < 1e-4
        assert values["grpo/sampler_difference_mean"] < 1e-5
        assert 0 <= values["grpo/reward"] <= 1 and values["grpo/pass_at_1"] == values["grpo/reward"]
        assert 1 <= values["grpo/completion_tokens"] <= 5 and values["train/clip_fraction"] == 0
    assert whole.metrics[4]["val/loss"] == -whole.metrics[4]["val/reward"]
    first, second = whole.said[0]["tokens"][:2]
    assert first != second


def test_the_reward_rises(layouts, data):
    longer = layouts.run(1, *STEPS, *data, "trainer.max_steps=12", "trainer.eval_every_steps=12")
    rewards = longer.trace("grpo/reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_two_ranks_sample_and_train_what_one_does(layouts, data, whole):
    many = layouts.run(2, *STEPS, *data, *layout(dp=2), watch=Seen)
    halves = [said["tokens"] for said in many.said]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole.said[0]["tokens"]
    found = difference(whole, many)
    assert found.loss <= 1e-5 and found.grad_norm <= 1e-4 and found.weight <= 1e-5, found
    for name in ("grpo/reward", "grpo/zero_variance_groups", "val/pass_at_1"):
        assert many.trace(name) == pytest.approx(whole.trace(name))


def test_a_resume_inside_a_round_continues_bit_for_bit(layouts, data):
    """Rounds of two steps; the checkpoint of step 3 is between the two steps of the second round."""
    rounds = (*STEPS, *data, "grpo.iterations=2", "grpo.kl_beta=0.1", "trainer.checkpoint_every_steps=3")
    unbroken = layouts.run(1, *rounds, watch=Seen)
    tokens = unbroken.said[0]["tokens"]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]
    assert "grpo/reward" in unbroken.metrics[3] and "grpo/reward" not in unbroken.metrics[4]
    assert unbroken.metrics[1]["train/kl"] == 0 < unbroken.metrics[4]["train/kl"]
    half = layouts.run(1, *rounds, watch=row_files.Stopped, watch_args=(3,))
    resumed = layouts.run(1, *rounds, watch=Seen, resume=half)
    assert resumed.said[0]["tokens"] == tokens[3:]
    assert resumed.metrics[4]["train/loss"] == unbroken.metrics[4]["train/loss"]
    wanted = unbroken.weights()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.weights().items())


@pytest.mark.long
def test_fused_kernels_sample_the_same(layouts, data, whole):
    one = ("trainer.max_steps=1", "optim.warmup_steps=0", "kernels=fused")
    fused = layouts.run(1, *STEPS, *data, *one, watch=Seen)
    assert fused.said[0]["tokens"] == whole.said[0]["tokens"][:1]
    assert fused.metrics[1]["grpo/sampler_difference_max"] < 1e-4
    assert fused.metrics[1]["optim/grad_norm"] == pytest.approx(whole.metrics[1]["optim/grad_norm"], rel=1e-3)


def test_sampling_is_not_counted_by_the_routers(layouts, data):
    more = ("model=v2_moe", "model.moe.capacity_factor=0", "trainer.max_steps=1", "optim.warmup_steps=0")
    moe = layouts.run(1, *STEPS, *data, *more, watch=Seen)
    top_k = 2
    assert moe.said[0]["counts"][0] and set(moe.said[0]["counts"][0]) == {16 * 24 * top_k}
