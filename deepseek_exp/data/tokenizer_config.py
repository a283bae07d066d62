"""The part of a tokenizer that is in tokenizer_config.json: what its special tokens are for, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TokenizerConfig:
    """What tokenizer_config.json says in addition to tokenizer.json.

    Attributes:
        add_bos_token: whether a text begins with the bos_token; None: the post-processor in tokenizer.json decides.
        roles: bos_token, eos_token, unk_token and pad_token, as far as they are named -> the token.
        chat_template: the Jinja template that turns messages into text, if there is one.
    """

    add_bos_token: bool | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    @classmethod
    def next_to(cls, path: Path) -> TokenizerConfig:
        """Read the configuration in the folder of a tokenizer's file; an empty one if there is none.

        Raises:
            ValueError: it cannot be read; the message continues a sentence that starts with the tokenizer's name.
        """
        folder = path.parent
        values = _read_json(folder / FILE)
        roles = {role: _content(values[role]) for role in ROLES if values.get(role)}
        adds = values.get("add_bos_token")
        if adds is not None and not isinstance(adds, bool):
            raise ValueError(f"has a {FILE} in which add_bos_token={adds!r} is not true or false")
        template = _default(values.get("chat_template"))
        if (folder / TEMPLATE).is_file():
            template = _read_text(folder / TEMPLATE)
        return cls(adds, roles, template)

    def to_json(self) -> str:
        """Return the content of tokenizer_config.json; an empty text if there is nothing to say."""
        said: dict[str, Any] = {"add_bos_token": True} if self.add_bos_token else {}
        said |= dict(self.roles)
        said |= {"chat_template": self.chat_template} if self.chat_template is not None else {}
        return json.dumps(said, indent=2, ensure_ascii=False) + "\n" if said else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"is next to a {path.name} that cannot be read ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(_read_text(path))
    except RecursionError as error:
        raise ValueError(f"is next to a {path.name} that is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is next to a {path.name} that is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"is next to a {path.name} that is no JSON object")
    return values


def _content(token: Any) -> str:
    """Return the text of a token, which is stored as a text or as an object with the text and flags."""
    found = token.get("content") if isinstance(token, dict) else token
    if not isinstance(found, str):
        raise ValueError(f"is next to a {FILE} in which a token is {token!r}")
    return found


def _default(template: Any) -> str | None:
    """Return the only template, or of several named ones the one named default."""
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template if isinstance(t, dict) and {"name", "template"} <= t.keys()}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"is next to a {FILE} whose chat_template is not a text")
    return template
