"""Compare the entries of two tokenizer.json files as JSON, without the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path

from deepseek_exp.disk import expand
from deepseek_exp.errors import Problem


def other_tokenizer(own: Path, named: str) -> Problem | None:
    """Return a problem if data.tokenizer differs from the tokenizer that the weights were trained with.

    Args:
        own: the tokenizer.json that the weights were trained with.
        named: the value of data.tokenizer.

    Returns:
        The problem; None if all entries of `own` have the same ids in the other, or if a file cannot be read, which is
        reported where it is used.
    """
    wanted, found = _entries(own), _entries(expand(named))
    if not wanted or not found:
        return None
    differ = sum(found.get(token) != token_id for token, token_id in wanted.items())
    if not differ:
        return None
    rule = f"has other ids for {differ:,} of the {len(wanted):,} entries of {own}, which the weights were trained with"
    return Problem("data.tokenizer", named, rule, "leave data.tokenizer out, or name a tokenizer with these entries")


def _entries(path: Path) -> dict[str, int]:
    """Return the ids of all entries; empty if the file is no tokenizer.json."""
    try:
        if not path.is_file():
            return {}
        tree = json.loads(path.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in tree["added_tokens"]}
        vocab = tree["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram's entries, with their scores
            vocab = {entry[0]: i for i, entry in enumerate(vocab)}
        return {**vocab, **added}
    except (OSError, ValueError, LookupError, TypeError, RecursionError, RuntimeError):
        return {}
