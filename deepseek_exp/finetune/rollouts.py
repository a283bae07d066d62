"""Sample completions of a step's prompts, score them, and make them the sequences that the step trains on.

Shapes: sequences (completions on this rank), seq (targets of each).
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepseek_exp.config import ExperimentConfig, GRPOConfig
from deepseek_exp.config.rules.finetune import OWN_REWARDS, REWARD_FILES
from deepseek_exp.data import Batch, PreparedRows
from deepseek_exp.errors import DataError, Problem
from deepseek_exp.finetune import rewards
from deepseek_exp.finetune.grpo import advantages, informative
from deepseek_exp.inference import Completion, sample_completions
from deepseek_exp.models import Transformer


@dataclass(frozen=True)
class Reward:
    """A reward function of the configuration.

    Attributes:
        name: its name in grpo.rewards.
        weight: factor in the sum of all rewards.
        function: maps a completion's text and the row of its prompt to a number.
    """

    name: str
    weight: float
    function: Callable[[str, Mapping[str, Any]], float]


@dataclass(frozen=True)
class Round:
    """The sequences of one or more steps on the same completions.

    Attributes:
        batch: prompts with their completions, loss_mask, advantage and log-probabilities.
        statistics: sums over this rank's completions, by name; see `Rollouts.metrics`.
    """

    batch: Batch
    statistics: dict[str, float]


def load_rewards(cfg: GRPOConfig) -> list[Reward]:
    """Import the reward functions of grpo.rewards, whose names and arguments the rules have checked."""
    found = []
    for name, node in cfg.rewards.items():
        module, _, function = str(node["_target_"]).rpartition(".")
        arguments = {key: value for key, value in node.items() if key not in ("_target_", "weight")}
        loaded = _module(module)
        found.append(Reward(name, float(node.get("weight", 1.0)), partial(getattr(loaded, function), **arguments)))
    return found


def _module(name: str) -> Any:
    if name == OWN_REWARDS:
        return rewards
    spec = importlib.util.spec_from_file_location(name, REWARD_FILES[name])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rollouts:
    """Samples with the model that is trained: its weights are read in place, so sampler and trainer agree.

    The random numbers of a completion depend on the seed, the step and its row only, so that a resumed run and another
    number of ranks sample the same.
    """

    def __init__(self, exp: ExperimentConfig, data: PreparedRows, rewards: Sequence[Reward]) -> None:
        """Set what to sample and how to score it.

        Args:
            exp: the experiment.
            data: prompts with their rows.
            rewards: the reward functions.
        """
        self.exp, self.data, self.rewards = exp, data, rewards

    def sample(
        self,
        model: Transformer,
        batch: Batch,
        position: int,
        log_probs_of: Callable[[Batch], Tensor],
        reference_log_probs_of: Callable[[Batch], Tensor] | None,
    ) -> Round:
        """Complete the prompts of a training batch.

        Args:
            model: the whole model; it is in evaluation mode while it samples.
            batch: this rank's prompts, each repeated group_size times.
            position: global index of the first row of the batch on this rank.
            log_probs_of: the trainer's forward pass: log-probability of each counted target, (sequences, seq).
            reference_log_probs_of: that of the reference of the KL divergence; None without one.
        """
        cfg, rows = self.exp.grpo, batch.row.tolist()
        prompts = self._prompts(batch)
        seeds = [_seed(self.exp.seed, position + i) for i in range(len(rows))]
        found = self._complete(model, prompts, cfg.temperature, seeds)
        scores = torch.tensor([self.score(c, self.data.train.objects[i]) for c, i in zip(found, rows, strict=True)])
        counts = informative(scores, cfg.group_size)
        if cfg.mask_truncated:
            counts = counts & torch.tensor([c.ended for c in found])
        batch, sampled = self._with_completions(batch, prompts, found)
        mask, device = batch.loss_mask, batch.tokens.device
        old = log_probs_of(batch)  # (sequences, seq)
        gap = ((old - sampled).abs() * mask).double()
        if reference_log_probs_of is not None:
            batch = batch._replace(reference_log_probs=reference_log_probs_of(batch))
        batch = batch._replace(
            loss_mask=mask & counts.to(device)[:, None],
            advantage=advantages(scores, cfg.group_size).to(device),
            old_log_probs=old,
        )
        return Round(batch, self._statistics(found, scores, gap))

    def validate(self, model: Transformer, batches: Sequence[Batch]) -> tuple[float, float, int]:
        """Return the sum of rewards, the number of full rewards and the number of validation prompts of this rank.

        The most likely tokens are selected.
        """
        scores: list[float] = []
        for batch in batches:
            prompts = self._prompts(batch)
            found = self._complete(model, prompts, 0.0, [0] * len(prompts))
            pairs = zip(found, batch.row.tolist(), strict=True)
            scores += [self.score(c, self.data.valid.objects[row]) for c, row in pairs if row >= 0]
        return sum(scores), sum(map(self.is_full, scores)), len(scores)

    def is_full(self, reward: float) -> bool:
        """Return whether a completion got every reward in full, each taken to be at most 1."""
        return reward >= sum(each.weight for each in self.rewards) - 1e-6

    def score(self, completion: Completion, row: Mapping[str, Any]) -> float:
        """Return the weighted sum of the rewards of a completion.

        Raises:
            DataError: a reward function fails, or returns no finite number.
        """
        ids = completion.tokens[:-1] if completion.ended else completion.tokens
        text, total = self.data.tokenizer.decode(ids), 0.0
        for reward in self.rewards:
            try:
                value = float(reward.function(text, row))
            except Exception as error:  # of the user's function
                rule = f"failed on a completion ({type(error).__name__}: {error})"
                raise DataError(Problem(f"grpo.rewards.{reward.name}", text, rule, "correct the function")) from error
            if not math.isfinite(value):
                rule = f"returned {value} for a completion"
                raise DataError(
                    Problem(
                        f"grpo.rewards.{reward.name}", text, rule, "correct the function: it returns a finite number"
                    )
                )
            total += reward.weight * value
        return total

    def metrics(self, every: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return a round's metrics from the statistics of all ranks."""
        sums = {name: sum(each[name] for each in every) for name in every[0]}
        n, groups, tokens = sums["n"], sums["groups"], sums["tokens"]
        return {
            "grpo/reward": sums["reward"] / n,
            "grpo/pass_at_1": sums["full"] / n,
            "grpo/truncated": sums["truncated"] / n,
            "grpo/completion_tokens": tokens / n,
            "grpo/zero_variance_groups": sums["zero_variance"] / groups,
            "grpo/sampler_difference_mean": sums["gap"] / tokens,
            "grpo/sampler_difference_max": max(each["largest_gap"] for each in every),
        }

    def _prompts(self, batch: Batch) -> list[list[int]]:
        """Return the prompts of a batch, without the beginning of those that leave no room for a completion."""
        room = batch.tokens.shape[1] - 1 - self.exp.grpo.max_new_tokens
        lengths = batch.prompt_len.tolist()
        return [row[:n][-room:].tolist() for row, n in zip(batch.tokens, lengths, strict=True)]

    def _complete(
        self, model: Transformer, prompts: list[list[int]], temperature: float, seeds: Sequence[int]
    ) -> list[Completion]:
        cfg, found = self.exp.grpo, []
        n = cfg.sampling_seqs or len(prompts)
        was_training = model.training
        model.eval()
        for i in range(0, len(prompts), n):
            found += sample_completions(
                model,
                prompts[i : i + n],
                max_new_tokens=cfg.max_new_tokens,
                temperature=temperature,
                top_p=1.0,
                seeds=seeds[i : i + n],
                end_id=self.data.stop_id,
                n_ids=self.data.tokenizer.vocab_size,
            )
        model.train(was_training)
        return found

    def _with_completions(
        self, batch: Batch, prompts: list[list[int]], found: list[Completion]
    ) -> tuple[Batch, Tensor]:
        """Return a batch of prompts with completions and the mask of their targets, and the sampler's log p."""
        tokens = torch.full(batch.tokens.shape, self.data.tokenizer.end_id)
        mask = torch.zeros(len(tokens), tokens.shape[1] - 1, dtype=torch.bool)
        sampled = torch.zeros(mask.shape)
        for i, (prompt, completion) in enumerate(zip(prompts, found, strict=True)):
            n, end = len(prompt), len(prompt) + len(completion.tokens)
            tokens[i, :end] = torch.tensor(prompt + completion.tokens)
            mask[i, n - 1 : end - 1] = True
            sampled[i, n - 1 : end - 1] = torch.tensor(completion.log_probs)
        device = batch.tokens.device
        return batch._replace(tokens=tokens.to(device), loss_mask=mask.to(device)), sampled.to(device)

    def _statistics(self, found: list[Completion], scores: Tensor, gap: Tensor) -> dict[str, float]:
        """Return this rank's sums of a round; see `metrics`."""
        size = self.exp.grpo.group_size
        return {
            "n": len(found),
            "groups": len(found) / size,
            "reward": float(scores.double().sum()),
            "full": sum(map(self.is_full, scores.tolist())),
            "truncated": sum(not c.ended for c in found),
            "tokens": sum(len(c.tokens) for c in found),
            "zero_variance": float((~informative(scores, size)).sum()) / size,
            "gap": float(gap.sum()),
            "largest_gap": float(gap.max()),
        }


def _seed(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
