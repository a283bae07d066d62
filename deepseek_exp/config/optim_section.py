"""The section `optim` of the schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_exp.config.enums import DecayShape, Schedule
from deepseek_exp.config.key import key


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: dict[str, Any] = key(
        "`_target_` and arguments of the optimizer class; parameter groups and lr are passed in addition"
    )
    state_bits: int = key("bits per element of AdamW's moments: 32, or 8 with kernels.adamw=triton")
    lr: float = key("peak learning rate", gt=0)
    min_lr_ratio: float = key("final learning rate / peak", ge=0, le=1)
    warmup_steps: int = key("steps of linear warm-up", ge=0, le=10**12)
    weight_decay: float = key("decoupled weight decay of matrices; vectors are not decayed", ge=0, le=1000)
    clip_norm: float = key("maximum global gradient norm; 0: no clipping", ge=0)
    schedule: Schedule = key(
        "learning rate after the warm-up: cosine decay; or wsd (warm-up, stable, decay): constant, then a decay in the "
        "last steps",
        default=Schedule.cosine,
    )
    decay_fraction: float = key("schedule=wsd: length of the decay / trainer.max_steps", gt=0, le=1, default=0.2)
    decay_shape: DecayShape = key(
        "schedule=wsd: the learning rate falls linearly, as 1 - sqrt or as a cosine", default=DecayShape.linear
    )
    lr_multipliers: dict[str, Any] = key(
        "pattern of parameter names -> factor on the learning rate; the factors of all patterns that match a name "
        "multiply, as in +optim.lr_multipliers={embedding.*:0.1,blocks.0.*:0.5}",
        default_factory=dict,
    )
    ema_decay: float = key(
        "decay per step of a moving average of the weights, kept with the optimizer's state (4 bytes per weight) and "
        "read by use_ema=true; 0: none",
        ge=0,
        lt=1,
        default=0.0,
    )
