"""The messages that answer the command lines of tests/config/command_lines.py, word by word.

`make golden` writes them. A change of words is a difference of this one file, to be read before it is committed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from deepseek_exp.errors import ConfigError
from tests.composing import as_in_a_sweep
from tests.config.command_lines import REFUSED, refusal

FILE = Path(__file__).parent / "messages.txt"
MOST_SHOWN = 200  # characters of a command line


def rendered(refusals: Mapping[str, ConfigError | None]) -> str:
    """Return the content of the file: each command line, and below it what it is answered with."""
    return "\n".join(f"$ {_shortened(line)}\n{error}\n" for line, error in refusals.items())


def _shortened(line: str) -> str:
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN - 20]}... ({len(line):,} characters)"


def main() -> None:
    """Write the file."""
    with as_in_a_sweep():
        FILE.write_text(rendered({line: refusal(line.split(" ")) for line in REFUSED}), encoding="utf-8")
    sys.stdout.write(f"wrote {FILE}\n")


if __name__ == "__main__":
    main()
