"""The configuration section of chains of stages."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from deepseek_exp.config.enums import Do, Reuse
from deepseek_exp.config.key import key


@dataclass
class StageConfig:
    """One stage of a chain."""

    do: Do = key("train, or eval (which leaves the weights as they are)")
    start: str | None = key(
        "what its weights come from: another stage, scratch, or a run or folder as in init_from; null: the last stage "
        "above that trains, if any",
        default=None,
    )
    reference: str | None = key(
        "do=dpo: weights of its reference policy: another stage, or a run or folder as in dpo.reference; null: those "
        "that it starts from",
        default=None,
    )
    branches: dict[str, str] = field(
        default_factory=dict,
        metadata={"doc": "domain -> stage whose weights are merged into those it starts from, as in the key branches"},
    )
    set: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "doc": "what it changes, as in a recipe: group: option, section: {key: value}, or section.key: value"
        },
    )


@dataclass
class YardstickConfig:
    """The text on which the stages of a chain are compared."""

    path: str | None = key(
        "file, folder or glob of .txt .md .jsonl .jsonl.gz .parquet; null: the validation text of each stage"
    )
    tokens: int = key("tokens of each text, rounded down to whole sequences; 0: no comparison", ge=0, le=10**10)


@dataclass
class StopIfConfig:
    """When a chain stops before its end."""

    loss_rise_percent: float | None = key(
        "by how much the loss on the yardstick may exceed that of the stage before, in percent; null: by any amount",
        ge=0,
        le=1e6,
    )


@dataclass
class ChainConfig:
    """Stages that start from each other's weights, over one shared tree."""

    stages: dict[str, Any] = key(
        "name -> do, start, reference, branches and set, as in +chain.stages.domain.do=train; if there are any, the "
        "command runs them"
    )
    only: list[str] = key("names of the stages to run; what they start from must be done; []: all")
    reuse: Reuse = key(
        "which finished stages are not run again. unchanged: those whose verb, configuration, inputs and data are the "
        "same; strict: if also code, versions, layout and kernels are; never: none"
    )
    yardstick: YardstickConfig = MISSING
    stop_if: StopIfConfig = MISSING

    def __post_init__(self) -> None:
        """Convert the well-formed entries of `stages` to `StageConfig`; `chain_problems` reports the others.

        In the tree they are plain mappings, because OmegaConf cannot add a dataclass from the command line.
        """
        if isinstance(self.stages, dict):
            self.stages = {str(name): _as_stage(value) for name, value in self.stages.items()}


def _as_stage(value: Any) -> Any:
    """Return a stage as `StageConfig`, or unchanged if it has another form."""
    if not isinstance(value, dict) or not value.keys() <= {f.name for f in fields(StageConfig)}:
        return value
    do, start, changes = value.get("do"), value.get("start"), value.get("set", {})
    reference, branches = value.get("reference"), value.get("branches", {})
    well_formed = (
        isinstance(do, str)
        and do in list(Do)
        and (start is None or isinstance(start, str))
        and (reference is None or isinstance(reference, str))
        and isinstance(changes, dict)
        and isinstance(branches, dict)
        and all(isinstance(stage, str) for stage in branches.values())
    )
    return StageConfig(Do(str(do)), start, reference, branches, changes) if well_formed else value
