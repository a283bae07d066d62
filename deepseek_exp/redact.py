"""Hide passwords and tokens in text that is shown, logged or stored.

Each of these is replaced by `***`:

- The password in `scheme://user:password@host`, for every scheme. It may contain `/`, `@`, `:` and spaces, and also
  quotes if the URL is quoted or is the entire text. If the end of a URL is ambiguous, more is hidden rather than less:
  `http://host:80/a@b` becomes `http://host:***@b`.
- A user name without a password in `http://token@host` and `https://token@host`, because tokens are passed this way.
  With other schemes (`ssh://git@host`, `postgresql://user@host`) only if it looks like a token: 16 or more characters
  with a digit.
- The value of a key whose last word is secret: `password=`, `db_password:`, `"apiKey": "..."`, `?access_token=`,
  `--token ...`, `pwd%3D...`. Only complete words count: `n_tokens`, `tokenizer` and `tokens_per_second` are not secret,
  and neither are a tokenizer's `eos_token` and quantities per token. A token has at least 6 characters. If the text
  begins with `password=`, as an override does, the value is the rest of the line.
- The value of an `Authorization` header, and the text after `Bearer`.
- Private keys in PEM format, and tokens in a known format: GitHub, GitLab, Hugging Face, OpenAI, AWS, Google, Slack,
  JSON web tokens.

The time is linear in the length of the text, so large diffs can be passed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# Text hidden by one pass can be the boundary that a pattern needs to match in the next pass.
_MAX_PASSES = 5
_SCHEME = r"[A-Za-z][\w+.-]{0,40}://"
_QUOTED = re.compile(rf"(?P<quote>[\"'`])(?P<scheme>{_SCHEME})(?P<rest>(?:\\[^\n]|(?!(?P=quote))[^\n])*)(?P=quote)")
_WHOLE = re.compile(rf"(?P<scheme>\s*(?:[+~]{{0,2}}[\w.@/-]+=)?[\"'`]?{_SCHEME})(?P<rest>[^\n]*)\Z")
# Unquoted, with a space in the password. A port after `host:` is not a password.
_WITH_BLANK = re.compile(
    r"(://[^\s/?#@:\"'`<>]*:)(?!\d{1,5}(?:[\s/?#,;.)\]]|$))[^\n@\"'`<>]{1,200}@(?:[^\s\"'`<>]*@)?(?=[\w\[])",
    re.MULTILINE,
)
_RUN = re.compile(r"(?P<scheme>https?://|://)(?P<rest>[^\s\"'`<>]+)")
_USER = re.compile(r"[^\s/?#:]*")
_PORT = re.compile(r"\d{1,5}(?=[\s/?#]|$)")
_TOKEN_LIKE = re.compile(r"(?=\D*\d)[\w.~+-]{16,}")

_KEY = re.compile(
    r"""(?:
        (?P<long>password|passwd|passphrase)
        | (?:(?<![A-Za-z0-9]) | (?-i:(?<=[a-z0-9])(?=[A-Z])))
          (?: (?P<token>(?:auth|access|refresh)?token)
            | (?P<line>authorization)
            | (?P<query>sig|signature|auth|sas|code|key)
            | (?:client[_-]?)?secret(?:[_-]?(?:access[_-]?)?key)?
            | (?:api|access|account|private|encryption|signing|storage)[_-]?key
            | pwd | credentials?
          )
    )
    (?![\w.-])
    \\{0,3}["'`]? (?: \][ \t]* )?
    (?: [ \t]*:[ \t]*(?:str|bytes|str[ ]\|[ ]None|Optional\[str\])[ \t]*=[ \t]*
      | [ \t]*(?:=>|:=|==?|:)[ \t]*
      | (?P<flag>[ \t]+)(?=[^\s=:-])
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_KEY_CHARACTERS = string.ascii_letters + string.digits + "_.-+~"
_WORD_BEFORE = re.compile(r"([A-Za-z0-9]+)[_.\-/ ]?\Z")
# Words before `token` that refer to tokens of text, not to access tokens.
# fmt: off
_TEXT_TOKENS = frozenset({
    "a", "added", "all", "an", "any", "bos", "class", "cls", "decoder", "domain", "draft", "each", "end", "eos",
    "every", "extra", "first", "global", "image", "last", "mask", "max", "min", "mtp", "new", "next", "no", "of",
    "one", "pad", "page", "per", "position", "prev", "previous", "prompt", "sample", "sep", "single", "special",
    "start", "stop", "target", "text", "that", "the", "this", "unk",
})
# fmt: on
_KEY_FIRST = re.compile(r"[+\- ]*[\"']?[\w.-]*")
_OPENING = re.compile(r"\\{0,3}[\"'`]")
_BODIES = {
    '"': re.compile(r'(?:[^"\\\n]|\\.)*'),
    "'": re.compile(r"(?:[^'\\\n]|\\.|'')*"),
    "`": re.compile(r"[^`\n]*"),
}
_BARE, _BARE_IN_QUERY, _BARE_LINE = (re.compile(f"[^{c}\"'`]+") for c in (r"\s", r"\s&#;<>", r"\n"))
_WHOLE_VALUE = re.compile(r"\*\*\*|[^\n]+")
# An ODBC value in braces, in which `}}` is an escaped brace.
_BRACED = re.compile(r"\{(?:[^}\n]|\}\})*\}?")
# Percent-encoded `PWD=...;`, as in `mssql+pyodbc:///?odbc_connect=...`.
_ENCODED = re.compile(
    r"((?:password|passwd|passphrase|pwd|token|secret|(?:api|access)[_-]?key)%3D)(?!\*\*\*)"
    r"(?:%7B(?:(?!%7D(?!%7D))[^\s&\"'`<>])*(?:%7D)*|(?:(?!%3B|%26)[^\s&;\"'`<>])+)",
    re.IGNORECASE,
)
_TRAILING = ",;.)]}>\\"
_NOTHING = frozenset({"", "null", "none", "true", "false", "~", HIDDEN})
_NO_TOKEN = re.compile(r"[+-]?[\d.,]+(?:e[+-]?\d+)?%?")
# Code in a diff, such as `token = next(tokens)`.
_CODE = re.compile(r"[A-Za-z_][\w.]*[(\[].*|(?:self|cls)\..*")

_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|hf_[A-Za-z0-9]{16,}|glpat-[\w-]{16,}"
    r"|sk-(?=[A-Za-z_-]{0,64}\d)[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])|AIza[\w-]{30,}"
    r"|xox[a-z]-[A-Za-z0-9-]{8,}|eyJ[\w-]{8,256}\.[\w-]{8,}[\w.-]*)"
)
_BEARER = re.compile(r"\b(Bearer[ \t]+)(?=[A-Za-z._~+/-]*\d|\S{24})[\w.~+/=-]{8,}", re.IGNORECASE)
_PEM = re.compile(
    r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----)(?:(?!-----).)*(-----END [A-Z ]{0,40}PRIVATE KEY-----)?", re.DOTALL
)


def redact(text: str) -> str:
    """Return the text with each password and token replaced by `***`. Idempotent."""
    for _ in range(_MAX_PASSES):
        hidden = _redact_once(text)
        if hidden == text:
            break
        text = hidden
    return text


def _redact_once(text: str) -> str:
    if "://" in text:
        text = _QUOTED.sub(_hide_userinfo, text)
        text = _WHOLE.sub(_hide_userinfo, text, count=1) if _WHOLE.match(text) else text
        text = _WITH_BLANK.sub(rf"\1{HIDDEN}@", text)
        text = _RUN.sub(_hide_userinfo, text)
    text = _hide_values(text)
    text = _ENCODED.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    text = _SHAPES.sub(HIDDEN, text)
    return _PEM.sub(rf"\1{HIDDEN}\2", text)


def redact_tree(tree: Any) -> Any:
    """Return a copy of nested mappings and lists with their strings redacted, by key and by content."""
    if isinstance(tree, Mapping):
        return {key: HIDDEN if _is_secret(key, value) else redact_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [redact_tree(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def _is_secret(key: Any, value: Any) -> bool:
    """Return whether the key marks its value as secret. A number may be a password but not a token."""
    if value is None or isinstance(value, (bool, Mapping, list, tuple)) or not str(value).strip():
        return False
    sample = value if not isinstance(value, str) else "a1" * 8
    return redact(f"{key}={sample}") == f"{key}={HIDDEN}"


def _hide_userinfo(match: re.Match[str]) -> str:
    """Hide the password or token of each URL in the text after `scheme://`."""
    text, last_at = match["rest"], match["rest"].rfind("@")
    if last_at < 0:
        return match[0]
    last_blank = max(text.rfind(blank, 0, last_at) for blank in " \t")
    http = match["scheme"].lower().endswith(("http://", "https://"))
    kept, done, start = [], 0, 0
    while start <= last_at:
        user = _USER.match(text, start)
        colon = user.end()  # type: ignore[union-attr]
        at = text.rfind("@", start, colon)
        hidden_user = at >= 0 and (http or _TOKEN_LIKE.fullmatch(text, start, at) is not None)
        if text.startswith(f":{HIDDEN}@", colon):
            start = text.find("://", colon) + 3
            if start < 3:
                break
            http = text.endswith(("http", "https"), 0, start - 3)
            continue
        # It is a port if the last `@` belongs to other words.
        is_port = last_blank > colon and _PORT.match(text, colon + 1) is not None
        if text.startswith(":", colon) and colon < last_at and not is_port:
            name = HIDDEN if hidden_user else text[start:colon]
            kept.append(f"{text[done:start]}{name}:{HIDDEN}")
            done = last_at
            break
        if hidden_user:
            kept.append(text[done:start] + HIDDEN)
            done = at
        nested = text.find("://", colon)
        if nested < 0:
            break
        http = text.endswith(("http", "https"), 0, nested)
        start = nested + 3
    before, after = match.start("rest") - match.start(), match.end("rest") - match.start()
    return match[0][:before] + "".join(kept) + text[done:] + match[0][after:]


def _hide_values(text: str) -> str:
    """Hide the values of secret keys."""
    kept, done = [], 0
    begin = len(text) - len(text.lstrip())
    for key in _KEY.finditer(text):
        if key.start() < done:
            continue
        found = _value(text, key, begin)
        if found is not None:
            kept += [text[done : found[0]], HIDDEN]
            done = found[1]
    return "".join([*kept, text[done:]])


def _value(text: str, key: re.Match[str], begin: int) -> tuple[int, int] | None:
    """Return the start and end of the key's secret value, or None if it has none."""
    before = text[max(0, key.start() - 64) : key.start()]
    first = key.start() - len(before) + len(before.rstrip(_KEY_CHARACTERS))
    in_query = first > 0 and text[first - 1] in "?&;"
    if key["query"] and not in_query:
        return None
    if key["flag"] and not text.startswith("--", first):
        return None
    if key["token"] and _is_text_token(text, key):
        return None
    start, end = _span(text, key, in_query, is_override=first == begin and text[key.end() - 1] == "=")
    value = text[start:end]
    if value.strip().lower() in _NOTHING or (value.startswith("${") and "}" in text[start : end + 1]):
        return None
    if key["token"] and (len(value) < 6 or _NO_TOKEN.fullmatch(value)):
        return None
    if key["token"] and text.endswith(" = ", 0, start) and _CODE.fullmatch(value):
        return None
    return start, end


def _is_yaml_line(text: str, key: re.Match[str]) -> bool:
    """Return whether the line begins with the key and a colon, as in YAML. Its value is then the rest of the line.

    Tokens are excluded: they contain no spaces, and `token: int = 1` is code.
    """
    line = text[text.rfind("\n", max(0, key.start() - 128), key.start()) + 1 : key.start()]
    return not key["token"] and key[0].endswith(": ") and _KEY_FIRST.fullmatch(line) is not None


def _is_text_token(text: str, key: re.Match[str]) -> bool:
    """Return whether the word before `token` shows that it is a token of text."""
    before = _WORD_BEFORE.search(text, max(0, key.start() - 24), key.start())
    return before is not None and before[1].lower() in _TEXT_TOKENS


def _span(text: str, key: re.Match[str], in_query: bool, *, is_override: bool) -> tuple[int, int]:
    """Return the start and end of the value after a key, without its quotes."""
    start = key.end()
    opening = _OPENING.match(text, start)
    if opening:
        start = opening.end()
        if len(opening[0]) == 1:
            return start, _BODIES[opening[0]].match(text, start).end()  # type: ignore[union-attr]
        end = text.find(opening[0], start)
        end = end if end >= 0 else len(text)
        line_end = text.find("\n", start, end)
        return start, end if line_end < 0 else line_end
    pattern = _BARE_IN_QUERY if in_query else _BARE_LINE if key["line"] or _is_yaml_line(text, key) else _BARE
    if is_override and not in_query:
        pattern = _WHOLE_VALUE
    braced = _BRACED.match(text, start) if in_query else None
    if braced:
        return start, braced.end()
    bare = pattern.match(text, start)
    if not bare:
        return start, start
    return start, start + len(bare[0].rstrip(_TRAILING if not is_override else ""))
