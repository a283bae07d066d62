"""How an error is worded: the key, its value, the rule with its numbers, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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
        return f"{self.key}={self._shown()} {self.rule}. Fix: {self.fix}."

    def _shown(self) -> str:
        if self.value is None:
            return "null"
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return f"'{self.value}'" if isinstance(self.value, str) else str(self.value)


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
