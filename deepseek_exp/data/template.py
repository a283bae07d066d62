"""Chat templates: from messages with roles to text, and which of it is supervised.

A template is a Jinja text in the form that Hugging Face's tokenizers publish: it is given `messages`,
`add_generation_prompt`, `bos_token` and `eos_token`. It runs in Jinja's sandbox, since it may come with a download.

What a message adds to the text is found by rendering: the text of the first i messages must begin that of the first
i + 1. A reply begins where the text before it, rendered with add_generation_prompt, ends; that is what a model is given
to answer. A template may also mark replies itself, by `{% generation %}`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_exp.config import DataConfig
from deepseek_exp.config.limits import TEMPLATES
from deepseek_exp.data.tokenizer import Tokenizer
from deepseek_exp.disk import expand
from deepseek_exp.errors import DataError, Problem

# Noncharacters that stand in rendered text for: a break within a special token's name, begin and end of a reply.
BREAK, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
# The file in a checkpoint that holds the template it was trained with.
FILE = "chat_template.json"

# Roles as headings, for tokenizers without special tokens of a chat.
PLAIN = """\
{% for message in messages %}
{% if message.role == 'assistant' %}
{{ '### Assistant:\\n' + message.content + eos_token }}
{%- else %}
{{ '### ' + message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Assistant:\\n' }}
{%- endif %}
"""
# The contents one after the other, for texts that have their own markers.
RAW = """\
{% for message in messages %}
{{ message.content + (eos_token if message.role == 'assistant' else '') }}
{%- endfor %}
"""
# OpenAI's ChatML, as Qwen uses it.
CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""
OURS = dict(zip(TEMPLATES, (PLAIN, CHATML, RAW), strict=True))
NEEDS = {"chatml": ("<|im_start|>", "<|im_end|>")}

Message = dict[str, Any]  # role and content


class Piece(NamedTuple):
    """A piece of a rendered conversation; each is encoded separately.

    Attributes:
        text: may hold names of special tokens.
        is_supervised: whether its tokens are targets that count.
    """

    text: str
    is_supervised: bool


class TemplateError(Exception):
    """A template cannot render some messages; the message continues a sentence about them."""


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        name: `plain`, `raw`, `chatml`, or the file that it comes from.
        text: Jinja.
        bos: the token that begins a text; "" if there is none.
        eos: the token that ends a reply; None means the tokenizer's end of a document.
    """

    name: str
    text: str
    bos: str = ""
    eos: str | None = None

    @classmethod
    def of(cls, cfg: DataConfig) -> Template:
        """Return the template that `data.template` names, without reading the tokenizer itself.

        `auto` means the one that lies next to data.tokenizer, else `plain`.

        Raises:
            DataError: a file cannot be read, or is no template.
        """
        if cfg.template in OURS:
            return cls(cfg.template, OURS[cfg.template])
        try:
            if cfg.template == "auto":
                found = None if cfg.tokenizer is None else cls.next_to(expand(cfg.tokenizer))
                template = found or cls("plain", PLAIN)
            else:
                template = cls(cfg.template, expand(cfg.template).read_text(encoding="utf-8"))
            template._compiled  # noqa: B018 - raises
        except (OSError, ValueError, jinja2.TemplateError) as error:
            fix = f"name a Jinja file or one of {', '.join(OURS)}"
            raise DataError(Problem("data.template", cfg.template, f"cannot be read ({error})", fix)) from error
        return template

    @classmethod
    def next_to(cls, tokenizer: Path) -> Template | None:
        """Return the template in the folder of a tokenizer's file, None if there is none.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not JSON.
        """
        folder = tokenizer.parent
        ours, alone, config = folder / FILE, folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if ours.is_file():
            return cls(str(ours), **json.loads(ours.read_text(encoding="utf-8")))
        saved = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        text = alone.read_text(encoding="utf-8") if alone.is_file() else saved.get("chat_template")
        if isinstance(text, list):  # several, by name
            text = next((entry["template"] for entry in text if entry.get("name") == "default"), None)
        if not isinstance(text, str):
            return None
        bos, eos = (_content(saved.get(name)) for name in ("bos_token", "eos_token"))
        return cls(str(alone if alone.is_file() else config), text, bos or "", eos)

    @property
    def digest(self) -> str:
        """Sha256 of all that decides how messages become text, in hexadecimal."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def json(self) -> str:
        """The content of `FILE`."""
        return json.dumps({"text": self.text, "bos": self.bos, "eos": self.eos})

    def files(self) -> dict[str, str]:
        """Return the file of a checkpoint that `next_to` reads: name -> content."""
        return {FILE: self.json}

    def pieces(self, messages: Sequence[Message], train_on: Sequence[str], eos: str) -> list[Piece]:
        """Return the pieces of a conversation.

        Args:
            messages: the conversation.
            train_on: roles whose messages are supervised.
            eos: the tokenizer's end of a document, used if the template has no token of that kind.

        Raises:
            TemplateError: the messages cannot be rendered, or what each adds cannot be found.
        """
        if "generation" in self._tags and set(train_on) == {"assistant"}:
            return self._marked(messages, eos)
        found, before = [], ""
        for i, message in enumerate(messages):
            after = self.render(messages[: i + 1], eos)
            begin = before
            if message["role"] == "assistant" and i:
                begin = self.render(messages[:i], eos, ask=True)
            if not (begin.startswith(before) and after.startswith(begin)):
                rule = f"the template {self.name} renders message {i + 1} otherwise if others follow"
                raise TemplateError(f"{rule}, so that what is supervised of it cannot be found")
            found.append(Piece(begin[len(before) :], False))
            found.append(Piece(after[len(begin) :], message["role"] in train_on))
            before = after
        return [piece for piece in found if piece.text]

    def render(self, messages: Sequence[Message], eos: str, *, ask: bool = False) -> str:
        """Return messages as text, with `ask` followed by what a reply begins with.

        Raises:
            TemplateError: the template refuses them.
        """
        names = {"bos_token": self.bos, "eos_token": eos if self.eos is None else self.eos}
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=ask, tools=None, **names)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise TemplateError(f"the template {self.name} cannot render the messages ({error})") from error

    def _marked(self, messages: Sequence[Message], eos: str) -> list[Piece]:
        """Return the pieces by the template's own marks."""
        parts = re.split(f"{BEGIN}(.*?){END}", self.render(messages, eos), flags=re.DOTALL)
        return [Piece(text, i % 2 == 1) for i, text in enumerate(parts) if text]

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment().from_string(self.text)

    @cached_property
    def _tags(self) -> set[str]:
        return set(re.findall(r"\{%-?\s*(\w+)", self.text))


class _Generation(Extension):
    """The tag `{% generation %}` around what a reply adds."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Put marks around the body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that published templates are written for."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


class ChatEncoder:
    """Encodes conversations.

    Special tokens are those that the template writes: in a message's content their names are plain text. Pieces are
    encoded separately, as they are when a model is given a prompt and continues it. What a document begins with is put
    in front for our templates; others write it.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        """Check that a tokenizer has the special tokens that one of our templates needs.

        Raises:
            DataError: it has not.
        """
        missing = [name for name in NEEDS.get(template.name, ()) if name not in tokenizer.special_tokens]
        if missing:
            rule = f"needs the special tokens {' and '.join(missing)}, which the tokenizer does not have"
            raise DataError(Problem("data.template", template.name, rule, "set data.template=plain"))
        self.template, self.tokenizer = template, tokenizer
        self.eos = next(name for name, i in tokenizer.special_tokens.items() if i == tokenizer.end_id)
        self._start = tokenizer.start if template.text in OURS.values() else []
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # SentencePiece puts a space in front of each text; a line break in front takes it.
        puts_space = int(tokenizer.token_bytes[tokenizer.encode("a")].sum()) > 1
        self._lead = "\n" if puts_space else ""
        self._n_lead = len(tokenizer.encode(self._lead)) if puts_space else 0

    def encode(
        self, conversations: Sequence[Sequence[Message]], train_on: Sequence[str]
    ) -> list[tuple[list[int], list[bool]]]:
        """Return the token ids of each conversation, and which of them are supervised.

        Args:
            conversations: messages each.
            train_on: roles whose messages are supervised.

        Raises:
            TemplateError: one cannot be rendered.
        """
        pieces = [self.template.pieces(self._safe(c), train_on, self.eos) for c in conversations]
        return self._encode(pieces)

    @cached_property
    def end_id(self) -> int:
        """Id of the token that ends a reply: its last special one, else the tokenizer's end of a document."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        ids, supervised = self.encode([talk], ["assistant"])[0]
        special = set(self.tokenizer.special_tokens.values())
        ends = [i for i, is_reply in zip(ids, supervised, strict=True) if is_reply and i in special]
        return ends[-1] if ends else self.tokenizer.end_id

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids after which a model is to reply to messages.

        Raises:
            TemplateError: they cannot be rendered.
        """
        safe = self._safe(messages)
        pieces = self.template.pieces(safe, (), self.eos)
        asked = self.template.render(safe, self.eos, ask=True).removeprefix("".join(p.text for p in pieces))
        return self._encode([[*pieces, Piece(asked, False)]])[0][0]

    def _safe(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages whose contents hold no name of a special token."""

        def broken(text: str) -> str:
            return self._special.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)

        return [{**message, "content": broken(message["content"])} for message in messages]

    def _encode(self, conversations: list[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
        texts: list[str] = []
        # per conversation: an id, or None for the next of `texts`; whether it is supervised; whether it is the first
        plan: list[list[tuple[int | None, bool, bool]]] = []
        for pieces in conversations:
            steps: list[tuple[int | None, bool, bool]] = []
            for piece in pieces:
                for i, part in enumerate(self._special.split(piece.text)):
                    if i % 2:
                        steps.append((self.tokenizer.special_tokens[part], piece.is_supervised, False))
                    elif part:
                        steps.append((None, piece.is_supervised, not steps))
                        texts.append(("" if steps[-1][2] else self._lead) + part.replace(BREAK, ""))
            plan.append(steps)
        encoded, found = iter(self.tokenizer.encode_batch(texts)), []
        for steps in plan:
            ids, supervised = list(self._start), [False] * len(self._start)
            for special, is_supervised, is_first in steps:
                more = [special] if special is not None else next(encoded)[0 if is_first else self._n_lead :]
                ids += more
                supervised += [is_supervised] * len(more)
            found.append((ids, supervised))
        return found
