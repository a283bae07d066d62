"""The configuration in a checkpoint: plain values, written without secrets, read without evaluating anything.

A saved configuration is data. It may come from somebody else, so an interpolation or a resolver in it is plain text,
YAML tags create no objects, and aliases, with which a small file can describe a huge tree, are rejected.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from deepseek_exp.errors import CheckpointError, Problem

FILE = "config.yaml"
# Where our own callbacks were in version 0.1.0, and where they are.
OLD_CALLBACKS, CALLBACKS = "deepseek_exp.callbacks.", "deepseek_exp.train.callbacks."
# Keys of the model section that version 0.1.0 did not have, with what its models are built from.
LATER = {"rotary_dim": 0, "sandwich_norm": False}
MAX_BYTES = 1 << 20  # a configuration has about 10 kB
_INTERPOLATION = re.compile(r"(\\*)\$\{")


class _Loader(yaml.SafeLoader):
    """Loads only mappings, lists, texts, numbers, booleans and null."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


# Dates stay texts, as the configuration has none.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def dump(tree: DictConfig) -> str:
    """Return a composed tree as YAML: every interpolation resolved, every enum by its value."""
    return dump_values(OmegaConf.to_container(tree, resolve=True, enum_to_str=True))


def dump_values(values: Any) -> str:
    """Return plain values as YAML."""
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    return text


def parse(text: str) -> dict[str, Any]:
    """Return the values that `dump`, or an earlier version of it, wrote, under today's keys.

    Raises:
        ValueError: the text is not such a configuration.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} characters, and {MAX_BYTES:,} are the limit")
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError("it is not a mapping of sections")
    return _renamed(values)


def read(checkpoint: Path) -> dict[str, Any]:
    """Return the values in a checkpoint's folder.

    Raises:
        CheckpointError: the file is missing or is not a configuration.
    """
    try:
        with (checkpoint / FILE).open("rb") as file:
            text = file.read(4 * MAX_BYTES).decode("utf-8")
        return parse(text)
    except (OSError, ValueError) as error:
        rule = f"has no readable {FILE} ({error})"
        fix = "name another checkpoint, or resume=last for the newest whole one"
        raise CheckpointError(Problem("resume", str(checkpoint), rule, fix)) from error


def literal(value: Any) -> Any:
    r"""Return a value for an OmegaConf tree that reads literally: each `${` in a text is escaped.

    Backslashes in front of one are doubled, since OmegaConf reads `\\${` as a backslash and an interpolation.
    """
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    return [literal(inner) for inner in value] if isinstance(value, list) else value


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return saved values under today's keys: older versions lacked some and counted validation in micro-batches."""
    model, trainer = values.get("model"), values.get("trainer")
    if isinstance(model, dict) and model:
        values = {**values, "model": {**LATER, **model}}
    if isinstance(trainer, dict) and "eval_batches" in trainer:
        n_batches, micro_batch_seqs = trainer["eval_batches"], trainer.get("micro_batch_seqs")
        if not isinstance(n_batches, int) or not isinstance(micro_batch_seqs, int):
            raise ValueError("trainer.eval_batches and trainer.micro_batch_seqs are not whole numbers")
        kept = {key: value for key, value in trainer.items() if key != "eval_batches"}
        values = {**values, "trainer": {**kept, "eval_seqs": n_batches * micro_batch_seqs}}
    return _with_moved_callbacks(values)


def _with_moved_callbacks(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with the classes of callbacks.py named by the module that holds them now."""
    trainer = values.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    if not isinstance(callbacks, dict):
        return values
    moved = {}
    for name, node in callbacks.items():
        target = node.get("_target_") if isinstance(node, dict) else None
        if isinstance(target, str) and target.startswith(OLD_CALLBACKS):
            node = {**node, "_target_": CALLBACKS + target.removeprefix(OLD_CALLBACKS)}
        moved[name] = node
    return {**values, "trainer": {**trainer, "callbacks": moved}}
