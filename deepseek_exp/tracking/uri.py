"""Store addresses: made absolute for other processes, and shown without their password."""

from __future__ import annotations

import re
from pathlib import Path

_PASSWORD = re.compile(r"(\w+://[^/\s:@]*):[^/\s@]+@")
_SQLITE = "sqlite:///"


def absolute_uri(uri: str) -> str:
    """Make the path of a sqlite address independent of the working directory; other addresses stay as they are."""
    if not uri.startswith(_SQLITE):
        return uri
    path, mark, query = uri.removeprefix(_SQLITE).partition("?")
    return f"{_SQLITE}{Path(path).resolve()}{mark}{query}"


def hide_password(text: str) -> str:
    """Replace the password of each `scheme://user:password@host` in a text by `***`."""
    return _PASSWORD.sub(r"\1:***@", text)
