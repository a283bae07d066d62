"""How an error is worded: the key, its value, the rule with its numbers, and the remedy."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_exp.redact import redact

MOST_SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user asked for.

    Reads as `<key>=<value> <rule>. Fix: <fix>.`; the rule starts with a verb.
    """

    key: str
    value: Any
    rule: str
    fix: str

    def __str__(self) -> str:
        """Render the one-line message."""
        return redact(f"{printable(self.key)}={self.shown()} {printable(self.rule)}. Fix: {printable(self.fix)}.")

    def shown(self) -> str:
        """Return the value as it is written in YAML: short, without passwords and control characters."""
        if self.value is None:
            return "null"
        if isinstance(self.value, bool):
            return str(self.value).lower()
        if isinstance(self.value, int) and self.value.bit_length() > 4 * MOST_SHOWN:
            return f"a number of {int(self.value.bit_length() * math.log10(2)) + 1:,} digits"
        text = printable(redact(str(self.value)))
        if len(text) > MOST_SHOWN:
            text = f"{text[: MOST_SHOWN - 20]}... ({len(text):,} characters)"
        return f"'{text}'" if isinstance(self.value, str) else text


def printable(text: str) -> str:
    """Return a text with its control characters and lone surrogates written as escapes.

    What comes from a file or a server must not move the cursor or change the title of a terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class UserError(Exception):
    """What the user asked for cannot be done; all its problems are reported together."""

    def __init__(self, *problems: Problem) -> None:
        self.problems: Sequence[Problem] = problems
        super().__init__("\n".join(str(p) for p in problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the trip between processes with the problems intact."""
        return type(self), tuple(self.problems)


class ConfigError(UserError):
    """The composed configuration breaks a rule."""


class DataError(UserError):
    """The data named by the configuration cannot be used."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or of another experiment."""


class TrackingError(UserError):
    """The MLflow server named by the configuration cannot be used."""


class VerifyError(UserError):
    """A layout does not compute what one process does."""


class DiskError(UserError):
    """A file or folder cannot be read or written: a full disk, or no permission."""


class DeviceError(UserError):
    """The device asked for is not there."""


class RankError(UserError):
    """One of the processes of a run died and took the others with it."""

    def __init__(self, problem: Problem, log_end: str = "") -> None:
        """Take what to say first, and the last lines of that process's log."""
        super().__init__(problem)
        self.log_end = log_end

    def __str__(self) -> str:
        """Put the log's end under the message."""
        return "\n".join(filter(None, [super().__str__(), self.log_end]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the trip between processes whole."""
        return type(self), (self.problems[0], self.log_end)


class Stopped(Exception):
    """A signal asked the run to end; its state is saved.

    Attributes:
        signum: the signal.
        step: optimizer steps done.
    """

    def __init__(self, signum: int, step: int) -> None:
        self.signum, self.step = signum, step
        after = f" after step {step}" if step else ""
        super().__init__(f"stopped by {signal.Signals(signum).name}{after}")
