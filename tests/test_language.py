"""Docstrings, comments, messages and pages are in plain English."""

from __future__ import annotations

import io
import re
import tokenize

from tests.runs import ROOT

# words that a reader of technical English has to translate, with what to write instead
AVOIDED = {
    r'"""(?:Gives?|Says?|Tells?|Words?)\b': "Return, Print, Format ...",
    r"\banew\b": "again, from scratch",
    r"\bbeside\b": "next to, in addition to",
    r"\bmend(?:ed|s)?\b": "fix",
    r"\bbut for\b": "except",
    r"\bshared? out\b": "shard, divide",
    r"\b(?:go|goes|going) on with\b": "continue",
    r"\bwhere (?:there|it) is (?:one|none|asked)\b": "if any, if set",
    r"\bof its own\b": "its own",
}


def prose(source: str) -> list[tuple[int, str]]:
    """Return the comments and string literals of a module, with their lines; docstrings keep their quotes."""
    kinds = (tokenize.COMMENT, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


def avoided_in(text: str) -> list[str]:
    return [f"{found[0]!r}: write {instead}" for word, instead in AVOIDED.items() for found in re.finditer(word, text)]


def test_the_words_to_avoid_do_not_occur():
    found = []
    for path in sorted((ROOT / "deepseek_exp").rglob("*.py")):
        for line, text in prose(path.read_text()):
            found += [f"{path.relative_to(ROOT)}:{line}: {what}" for what in avoided_in(text)]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "conf").rglob("*.yaml")]
    for path in sorted([*pages, *(ROOT / "recipes").rglob("*.yaml")]):
        for number, text in enumerate(path.read_text().splitlines(), start=1):
            found += [f"{path.relative_to(ROOT)}:{number}: {what}" for what in avoided_in(text)]
    assert found == []


def test_a_word_to_avoid_is_seen():
    source = '"""Give it anew."""\nx = "mended"  # beside\n'
    found = [what.split(":")[0] for _, text in prose(source) for what in avoided_in(text)]
    assert found == ['\'"""Give\'', "'anew'", "'mended'", "'beside'"]
