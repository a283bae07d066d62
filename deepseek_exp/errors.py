"""Errors shown to the user: each names the key, its value, the rule with its numbers, and the fix."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deepseek_exp.redact import redact

MOST_SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True)
class Problem:
    """One problem with the user's request.

    Reads as `<key>=<value> <rule>. Fix: <fix>.`; the rule starts with a verb.

    Attributes:
        id: name of the function that found it, by which tests know it; its words may then change.
    """

    key: str
    value: Any
    rule: str
    fix: str
    id: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        """Take the name of the function that makes it, unless an id is set."""
        if not self.id:
            found_by = sys._getframe(2).f_code.co_qualname  # above this method and the generated __init__
            object.__setattr__(self, "id", found_by.partition(".<locals>")[0])

    def __str__(self) -> str:
        """Return the message as one line."""
        return redact(f"{printable(self.key)}={show(self.value)} {printable(self.rule)}. Fix: {printable(self.fix)}.")


def show(value: Any) -> str:
    """Return a value in YAML notation: truncated, without passwords and control characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 4 * MOST_SHOWN:
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1:,} digits"
    text = printable(redact(str(value)))
    if len(text) > MOST_SHOWN:
        text = f"{text[: MOST_SHOWN - 20]}... ({len(text):,} characters)"
    return f"'{text}'" if isinstance(value, str) else text


def printable(text: str) -> str:
    """Return the text with control characters and lone surrogates escaped.

    Text from a file or a server must not move the cursor or change the title of the terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class UserError(Exception):
    """The user's request cannot be fulfilled; all its problems are reported together."""

    def __init__(self, *problems: Problem) -> None:
        self.problems: Sequence[Problem] = problems
        super().__init__("\n".join(str(p) for p in problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the problems intact, so that the error can cross process boundaries."""
        return type(self), tuple(self.problems)


class ConfigError(UserError):
    """The composed configuration breaks a rule."""


class DataError(UserError):
    """The data named by the configuration cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another experiment."""


class TrackingError(UserError):
    """The MLflow server named by the configuration cannot be used."""


class VerifyError(UserError):
    """A parallel layout does not compute the same result as one process."""


class ChainError(UserError):
    """A chain of stages cannot start, or a stage has met a condition that stops it."""


class DiskError(UserError):
    """A file or folder cannot be read or written: a full disk, or no permission."""


class DeviceError(UserError):
    """The requested device is not available."""


class RankError(UserError):
    """A rank of the run died, and the other ranks were stopped."""

    def __init__(self, problem: Problem, log_end: str = "") -> None:
        """Store the problem and the last lines of the dead rank's log."""
        super().__init__(problem)
        self.log_end = log_end

    def __str__(self) -> str:
        """Return the message, followed by the end of the log."""
        return "\n".join(filter(None, [super().__str__(), self.log_end]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the problem and the log intact."""
        return type(self), (self.problems[0], self.log_end)


# The errors by name: a rank sends its own to the process that started it.
KINDS: dict[str, type[UserError]] = {
    kind.__name__: kind
    for kind in (
        UserError,
        ConfigError,
        DataError,
        CheckpointError,
        TrackingError,
        VerifyError,
        ChainError,
        DiskError,
        DeviceError,
        RankError,
    )
}


class Stopped(Exception):
    """A signal stopped the run; its state is saved.

    Attributes:
        signum: the signal number.
        step: number of completed optimizer steps.
    """

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step
        after = f" after step {step}" if step else ""
        super().__init__(f"stopped by {signal.Signals(signum).name}{after}")
