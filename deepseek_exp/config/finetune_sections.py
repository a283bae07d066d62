"""The sections `dpo` and `grpo` of the schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_exp.config.enums import PreferenceLoss
from deepseek_exp.config.key import key


@dataclass
class DPOConfig:
    """Training on preferences."""

    loss: PreferenceLoss = key(
        "dpo, ipo (a squared distance instead of a logarithm) or orpo (with the chosen completion's loss, no reference)"
    )
    beta: float = key(
        "dpo, ipo: scale of the log-ratio to the reference; orpo: weight of the odds ratio", gt=0, le=1000
    )
    label_smoothing: float = key("loss=dpo: assumed share of pairs whose labels are swapped", ge=0, lt=0.5)
    reference: str | None = key(
        "loss=dpo, ipo: weights of the reference: a run, a checkpoint or a Hugging Face folder; null: those that "
        "training starts from"
    )


@dataclass
class GRPOConfig:
    """Reinforcement learning from verifiable rewards."""

    group_size: int = key("completions sampled per prompt; divides trainer.global_batch_seqs", ge=2, le=10**6)
    iterations: int = key("optimizer steps on the same completions before new ones are sampled", ge=1, le=1000)
    clip_low: float = key(
        "a token's probability ratio is clipped at 1 - this if the advantage is negative; from the second iteration on",
        gt=0,
        le=1,
    )
    clip_high: float = key("and at 1 + this if the advantage is positive", gt=0, le=1000)
    kl_beta: float = key(
        "weight of the KL divergence from the weights that training starts from; 0: none", ge=0, le=1000
    )
    mask_truncated: bool = key("leave completions that did not end within max_new_tokens out of the loss")
    max_new_tokens: int = key("maximum length of a completion, in tokens", ge=1, le=10**8)
    temperature: float = key("softmax temperature of the sampling, and of the policy that is trained", ge=0.01, le=100)
    sampling_seqs: int = key("completions sampled at once on one rank; 0: all of a step", ge=0, le=10**6)
    rewards: dict[str, Any] = key(
        "name -> `_target_` (a function), its arguments and weight (default: 1); the reward is their weighted sum"
    )
