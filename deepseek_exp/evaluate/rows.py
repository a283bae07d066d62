"""The rows of a task's file, checked before a model is loaded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_exp.errors import DataError, Problem

Row = Mapping[str, Any]


def read_rows(key: str, path: Path, limit: int) -> list[Row]:
    """Read a .jsonl or .jsonl.gz file of JSON objects.

    Args:
        key: configuration key of the path, for messages.
        path: the file.
        limit: most rows to read; 0: all.

    Raises:
        DataError: a line is no JSON object, or there is none.
    """
    rows: list[Row] = []
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if limit and len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                rule = f"is no JSON ({error})"
                raise DataError(Problem(key, f"{path}:{number}", rule, "correct the line")) from error
            if not isinstance(row, dict):
                raise DataError(Problem(key, f"{path}:{number}", "is no JSON object", 'write {"prompt": ...}'))
            rows.append(row)
    if not rows:
        raise DataError(Problem(key, str(path), "has no row", "name a file with one JSON object per line"))
    return rows


def field(key: str, rows: Sequence[Row], name: str) -> list[str]:
    """Return a text field of every row.

    Raises:
        DataError: a row does not have it, or it is no text or number.
    """
    values = []
    for number, row in enumerate(rows, start=1):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            rule = f"has no text {name!r} (row {number} has {', '.join(map(str, row)) or 'no fields'})"
            raise DataError(Problem(key, name, rule, "name a field that every row has"))
        values.append(str(value))
    return values


def filled(key: str, rows: Sequence[Row], template: str) -> list[str]:
    """Return a template with the fields of every row in place of {their names}.

    Raises:
        DataError: the template names a field that a row does not have, or is malformed.
    """
    texts = []
    for number, row in enumerate(rows, start=1):
        try:
            texts.append(template.format_map(row))
        except KeyError as error:
            rule = f"names the field {error.args[0]!r}, and row {number} has {', '.join(map(str, row))}"
            raise DataError(Problem(key, template, rule, "name fields that every row has")) from error
        except (ValueError, IndexError, AttributeError) as error:
            rule = f"is no template ({error})"
            raise DataError(Problem(key, template, rule, "write {field}, and {{ or }} for a brace")) from error
    return texts
