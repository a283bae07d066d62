"""Path expansion, fsync, and messages for disk errors. Uses only the standard library."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek_exp.errors import ConfigError, DiskError, Problem

FOLDER = "use a folder that this user may write"
# errno -> fix. An OSError with any other errno is a bug in this program, not a disk problem.
REMEDIES = {
    errno.ENOSPC: "free space on that disk, or use a folder on another disk",
    errno.EDQUOT: "free some of this user's quota on that disk, or use a folder on another disk",
    errno.EFBIG: "raise the largest file size that this process may write (ulimit -f)",
    errno.EIO: "check that disk",
    errno.EROFS: FOLDER,
    errno.EACCES: FOLDER,
    errno.EPERM: FOLDER,
    errno.EEXIST: "remove that file, or use another path",
    errno.ENOTDIR: "use a path whose parents are folders",
    errno.EISDIR: "use the path of a file",
    errno.ELOOP: "use a path whose links do not lead back to themselves",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EMFILE: "raise the number of files that this process may open (ulimit -n)",
}
TESTED_BYTES = 1 << 16


def expand(path: str | Path) -> Path:
    """Return a configured path with a leading `~` or `~user` replaced by that home directory.

    If the user does not exist, the path is unchanged, as in a shell.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for such a user


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's directory entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(target: Path, key: str) -> Iterator[Path]:
    """Yield a folder to write to, which becomes `target` when everything in it is on disk; it is complete or absent.

    Args:
        target: the folder to create. It may exist if it is empty.
        key: the configuration key that names it, for the message.

    Raises:
        ConfigError: the target is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        rule, fix = "is there already and not an empty folder", f"set {key} to another folder, or remove that one"
        raise ConfigError(Problem(key, str(target), rule, fix))
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    mode = part.stat().st_mode & 0o666  # from the umask; safetensors creates files with mode 0600
    try:
        yield part
        for path in part.iterdir():
            path.chmod(mode)
        for path in [*part.iterdir(), part]:
            fsync_path(path)
        if target.exists():
            target.rmdir()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def disk_error(error: BaseException, key: str, value: str) -> DiskError | None:
    """Return the error to show for a failure of the disk, the permissions or the locale.

    Args:
        error: any error.
        key: the key to name if the error names no file. Its folder is the one most often written to.
        value: the key's value.

    Returns:
        The error, or None if `error` is of another kind.
    """
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        rule = f"cannot be a file name in the encoding of this locale ({error.encoding})"
        return DiskError(Problem("path", error.object, rule, "use a UTF-8 locale: export LC_ALL=C.UTF-8"))
    number = _errno(error)
    if number not in REMEDIES:
        return None
    name = getattr(error, "filename", None)
    if name is not None:
        key, value = "file", os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
    rule = f"cannot be {'used' if name is not None else 'written'} ({os.strerror(number)})"
    return DiskError(Problem(key, value, rule, REMEDIES[number]))


def check_writable(key: str, folder: Path) -> None:
    """Raise an error if nothing can be written to the folder, which need not exist. Leaves nothing behind.

    Args:
        key: the key that names the folder.
        folder: the folder.

    Raises:
        DiskError: the folder, or its nearest existing parent, is not a directory, not permitted, read-only or full.
    """
    whole = folder.absolute()
    try:
        there = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
        if any(len(os.fsencode(part)) > os.pathconf(there, "PC_NAME_MAX") for part in whole.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(TESTED_BYTES))
            file.flush()
    except OSError as error:
        rule = f"cannot be written ({os.strerror(error.errno or 0)})"
        raise DiskError(Problem(key, str(folder), rule, REMEDIES.get(error.errno or 0, FOLDER))) from error


def _errno(error: BaseException) -> int:
    """Return the error number, also from the message of a library written in Rust; 0 if there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0
