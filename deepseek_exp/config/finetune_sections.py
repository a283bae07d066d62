"""The sections `lora`, `dpo` and `grpo` of the schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_exp.config.enums import LoraInit, PreferenceLoss
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


@dataclass
class LoraConfig:
    """Low-rank adapters: instead of a matrix W, W + alpha / rank * B A is used, and only A and B are trained."""

    rank: int = key(
        "rank of the adapters: A has this many rows and B as many columns; 0: none, W is trained", ge=0, le=65_536
    )
    alpha: float = key("scale of the adapters: their product is multiplied by alpha / rank", gt=0, le=1e6)
    targets: list[str] = key(
        "matrices that get an adapter: patterns of parameter names with the wildcards * ? [...], matched without a "
        "final .weight; *.w* matches every matrix of attention, feed-forward networks and experts"
    )
    exclude: list[str] = key("patterns of those of lora.targets that get none")
    init: LoraInit = key(
        "A at the start: kaiming, uniform within +- 1 / sqrt(d_in), or gaussian with standard deviation 1 / rank; "
        "B starts at 0, so that the first output is that of W alone"
    )
    path: str | None = key(
        "folder of an adapter to start from: of do=export with export.format=adapter or peft, or of the peft library; "
        "rank and alpha must be its own; null: as `init` says"
    )
