"""Find the text files that a configured path names: a file, a folder or a glob. Uses only the standard library.

Links are followed, in folders and in globs. Each folder is visited once, so circular links terminate. Names that begin
with a dot are skipped unless the pattern names them. Anything else than a file or folder (a pipe, a device) is skipped
without being opened.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_exp.disk import expand
from deepseek_exp.errors import DataError, Problem

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")


def find_files(key: str, path: str, unreadable: list[str] | None = None) -> list[Path]:
    """Return the text files that a path names, in the order in which they are read.

    A file names itself. A folder names every file below it with a known suffix. Anything else is a glob (`**` crosses
    folders); matches with an unknown suffix are skipped.

    Args:
        key: configuration key of the path, for the message.
        path: file, folder or glob.
        unreadable: list that collects folders and links that cannot be read. If None, the first one is an error.

    Returns:
        Absolute paths, sorted.

    Raises:
        DataError: nothing matches, a file that is named directly has an unknown suffix, or something cannot be read.
    """
    known, noted = " ".join(SUFFIXES), [] if unreadable is None else unreadable

    def note(place: str, error: OSError) -> None:
        if unreadable is None:
            raise unreadable_error(key, place, error)
        noted.append(place)

    try:
        place = expand(path)
        if place.is_file():
            if not _is_text(place.name):
                fix = "convert or rename the file"
                raise DataError(Problem(key, path, f"has none of the known suffixes {known}", fix))
            return [place.resolve()]
        walk = _Walk(note)
        found = {p.resolve() for p in (walk.below(place) if place.is_dir() else walk.matching(place))}
    except OSError as error:
        raise unreadable_error(key, path, error) from error
    except ValueError as error:  # a character that no path can hold
        raise DataError(Problem(key, path, f"is not a path ({error})", f"point {key} at text files")) from error
    if not found and noted:
        raise DataError(Problem(key, noted[0], "cannot be read, and nothing else matches", "make it readable"))
    if not found:
        raise DataError(Problem(key, path, f"matches no file with a suffix of {known}", f"point {key} at such files"))
    return sorted(found)


def exists(path: str) -> bool:
    """Return whether a path names any file or folder. Unreadable ones count; they are reported when they are read.

    Raises:
        OSError: the path is in a folder that may not be entered.
    """
    place, seen = expand(path), []
    if place.exists():
        return True
    found = _Walk(lambda folder, _: seen.append(folder), _any_name).matching(place)
    return next(found, None) is not None or bool(seen)


def shown(path: Path | str) -> str:
    """Return a path as printable text, even if its name is not valid UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def unreadable_error(key: str, place: str | Path, error: OSError) -> DataError:
    """Return the error for a file, link or folder that cannot be read."""
    reason = f"{error.strerror or error}"
    if error.filename is not None and os.fspath(error.filename) != os.fspath(place):
        reason += f": {shown(error.filename)}"
    fix = f"make it readable, leave it out of {key}, or skip and count it with data.on_bad_line=skip"
    return DataError(Problem(key, shown(place), f"cannot be read ({reason})", fix))


def _is_text(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _any_name(name: str) -> bool:
    return True


@dataclass(frozen=True)
class _Walk:
    """Finds files.

    Attributes:
        note: called with each path that cannot be read, and the error.
        wanted: whether to yield a file of this name.
    """

    note: Callable[[str, OSError], None]
    wanted: Callable[[str], bool] = _is_text

    def below(self, folder: Path) -> Iterator[Path]:
        """Yield the files below a folder."""
        return self._expand(folder, ("**",))

    def matching(self, pattern: Path) -> Iterator[Path]:
        """Yield the files that match a glob; `**` at its end matches all files below."""
        parts = pattern.parts
        first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        # Consecutive ** are the same as one, and each would multiply the work.
        magic = [part for i, part in enumerate(parts[first:]) if part != "**" or parts[first:][i - 1 : i] != ("**",)]
        return self._expand(Path(*parts[:first]), tuple(magic))

    def _expand(self, place: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        if not parts:
            try:
                if self.wanted(place.name) and place.is_file():
                    yield place
            except OSError as error:
                self.note(str(place), error)
            return
        head, rest = parts[0], parts[1:]
        if head == "**":
            for folder in self._folders(place):
                yield from self._expand(folder, rest or ("*",))
        elif glob.has_magic(head):
            for entry in self._entries(place):
                hidden = entry.name.startswith(".") and not head.startswith(".")
                if not hidden and fnmatch.fnmatchcase(entry.name, head):
                    yield from self._expand(Path(entry.path), rest) if rest else self._file(entry)
        else:
            yield from self._expand(place / head, rest)

    def _folders(self, top: Path) -> Iterator[Path]:
        """Yield a folder and all folders below it, each once."""
        todo, seen = [top], set()
        while todo:
            folder = todo.pop()
            try:
                stat = folder.stat()
            except OSError as error:
                self._note_unless_gone(folder, error)
                continue
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            yield folder
            todo += [Path(e.path) for e in self._entries(folder) if not e.name.startswith(".") and self._is(e, "dir")]

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except OSError as error:
            self._note_unless_gone(folder, error)
            return []

    def _note_unless_gone(self, folder: Path, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # else there is nothing to match
            self.note(str(folder), error)

    def _file(self, entry: os.DirEntry[str]) -> Iterator[Path]:
        if self.wanted(entry.name) and self._is(entry, "file"):
            yield Path(entry.path)

    def _is(self, entry: os.DirEntry[str], kind: str) -> bool:
        """Return whether an entry, or its link target, is of the kind. Dangling links to text files are noted."""
        try:
            if entry.is_symlink():
                entry.stat()
            return entry.is_dir() if kind == "dir" else entry.is_file()
        except OSError as error:
            if kind == "file" or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                self.note(entry.path, error)
            return False
