"""The content of manifest.json: its form in each format, and the migrations that turn an older one into today's.

The format is a semantic version. A new major version changes what a reader has to understand, so an older program
refuses it. A new minor version adds fields that a reader may ignore. The formats so far:

    1      no `format`; one process saved the checkpoint
    2      shards of several ranks
    3.0    `finite`, and the digest of the manifest itself
    3.1    `minor`, `inputs`, `contract`, `kind`, `coverage` and `stage_key`
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FORMAT, MINOR = 3, 1
Fields = dict[str, Any]


class NewerFormatError(Exception):
    """The manifest has a newer major version; its text is that version."""


class FormError(Exception):
    """The manifest is not what any version writes; its text says what is wrong."""


def read_fields(text: str) -> Fields:
    """Return the fields of a manifest.json of any format in today's form, without its digest.

    Fields that a newer minor version has added are left out.

    Raises:
        NewerFormatError: it is of a newer major version.
        FormError: it is not what any version writes, or its digest does not match.
        ValueError: it is not JSON.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise FormError("it is not a JSON object")
    major, minor = fields.get("format", 1), fields.get("minor", 0)
    if not _is_count(major) or not _is_count(minor):
        raise FormError("its 'format' is not what a version writes")
    if major > FORMAT:
        raise NewerFormatError(f"{major}.{minor}")
    is_newer = major == FORMAT and minor > MINOR
    wrong = _what_is_wrong(fields, FORM.get((major, MINOR if is_newer else minor)), is_newer=is_newer)
    if wrong is not None:
        raise FormError(wrong)
    recorded = fields.pop("sha256", None)
    if major >= 3 and (recorded != digest_of(fields) or with_digest(fields) != text):
        raise FormError("its SHA-256 is not the one recorded in it")
    if is_newer:
        return {key: fields[key] for key in FORM[FORMAT, MINOR] if key != "sha256"} | {"minor": MINOR}
    while (fields.get("format", 1), fields.get("minor", 0)) != (FORMAT, MINOR):
        fields = MIGRATIONS[fields.get("format", 1), fields.get("minor", 0)](fields)
    return fields


def with_digest(fields: Mapping[str, Any]) -> str:
    """Return the content of manifest.json, which ends with its own digest."""
    return json.dumps({**fields, "sha256": digest_of(fields)}, indent=1)


def digest_of(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's fields."""
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def from_1(fields: Fields) -> Fields:
    """Return a manifest of format 1 in format 2."""
    return {**fields, "format": 2}


def from_2(fields: Fields) -> Fields:
    """Return a manifest of format 2 in format 3.0; whether its numbers are finite was not checked."""
    return {**fields, "finite": None, "format": 3}


def from_3_0(fields: Fields) -> Fields:
    """Return a manifest of format 3.0 in format 3.1; every parameter was trained, from inputs that were not named."""
    return {**fields, "inputs": {}, "contract": None, "kind": "full", "coverage": 1.0, "stage_key": None, "minor": 1}


MIGRATIONS: dict[tuple[int, int], Callable[[Fields], Fields]] = {(1, 0): from_1, (2, 0): from_2, (3, 0): from_3_0}


def _what_is_wrong(fields: Fields, form: Mapping[str, Callable[[Any], bool]] | None, *, is_newer: bool) -> str | None:
    """Return what is wrong with the fields of a manifest; None if nothing is."""
    if form is None:
        return "its 'format' is not what a version writes"
    for key in sorted(form.keys() - fields.keys()):
        return f"it has no {key!r}"
    for key in sorted(fields.keys() - form.keys()):
        if not is_newer:
            return f"it has {key!r}, which no version writes"
    return next((f"its {key!r} is not what a version writes" for key in form if not form[key](fields[key])), None)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_loss(value: Any) -> bool:
    return value is None or isinstance(value, float) or _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_files(value: Any) -> bool:
    """Return whether this maps plain file names to sizes and digests."""
    return isinstance(value, dict) and all(
        name == Path(name).name
        and isinstance(record, dict)
        and record.keys() == {"bytes", "sha256"}
        and _is_count(record["bytes"])
        and isinstance(record["sha256"], str)
        for name, record in value.items()
    )


def _are_inputs(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def _is_contract(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and value.keys() == {"tokenizer", "template", "max_seq_len"}
        and _is_text(value["tokenizer"])
        and _is_text_or_none(value["template"])
        and _is_count(value["max_seq_len"])
    )


_FORM_1: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "run_id": _is_text,
    "saved_at": _is_number,
    "val_loss": _is_loss,
    "files": _are_files,
}
_FORM_2 = {**_FORM_1, "format": _is_count}
_FORM_3_0 = {**_FORM_2, "finite": lambda v: v is None or isinstance(v, bool), "sha256": _is_text}
_FORM_3_1 = {
    **_FORM_3_0,
    "inputs": _are_inputs,
    "contract": _is_contract,
    "kind": _is_text,
    "coverage": lambda v: _is_number(v) and 0 <= v <= 1,
    "stage_key": _is_text_or_none,
    "minor": _is_count,
}
# (major, minor) -> what its manifest consists of: field -> whether a value is what a version writes.
FORM = {(1, 0): _FORM_1, (2, 0): _FORM_2, (3, 0): _FORM_3_0, (3, 1): _FORM_3_1}
