"""The lists of groups and keys in the --help text."""

from __future__ import annotations

from omegaconf import OmegaConf

from deepseek_exp.config.compose import option_groups
from deepseek_exp.config.keys import is_enum, schema_keys


def register_help() -> None:
    """Register the resolvers that insert the groups and keys into the help text of conf/config.yaml."""
    OmegaConf.register_new_resolver("groups", group_docs, replace=True)
    OmegaConf.register_new_resolver("keys", key_docs, replace=True)


def group_docs() -> str:
    """Return the groups with their options for --help, one line per group."""
    return "\n".join(f"  {name:12}{', '.join(options)}" for name, options in option_groups().items())


def key_docs() -> str:
    """Return the keys with their documentation and range for --help, one line per key."""
    lines = []
    for path, info in schema_keys().items():
        bounds = ", ".join(f"{SIGNS[k]} {v:g}" for k, v in info.metadata["bounds"].items())
        options = "|".join(m.value for m in info.type) if is_enum(info.type) else ""
        extra = "; ".join(x for x in (options, bounds) if x)
        lines.append(f"  {path:44}{info.metadata['doc']}{f' ({extra})' if extra else ''}")
    return "\n".join(lines)


SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
