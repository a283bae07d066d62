"""Limit this process, then run a program in it. The sandbox starts this file; it imports the standard library only.

Arguments: seconds of CPU time, bytes of memory, number of processes, the program's file.

Where the kernel allows it, the program has no network (a namespace without an interface) and is the first process of a
process namespace, so that all that it starts ends with it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

PDEATHSIG, NO_NEW_PRIVS = 1, 38  # options of prctl
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000  # flags of unshare
FILE_BYTES = 10 * 1000**2
OPEN_FILES = 64


def leave_network() -> bool:
    """Move this process, and its children to another process namespace, away from the network; False if not allowed."""
    flags = NEW_PID | NEW_NET | (0 if os.getuid() == 0 else NEW_USER)
    return ctypes.CDLL(None).unshare(flags) == 0


def confine(seconds: int, memory_bytes: int, processes: int) -> None:
    """Set limits that this process and its children cannot raise unless they are root's."""
    libc = ctypes.CDLL(None)
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, most in {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_CORE: 0,
    }.items():
        _, hard = resource.getrlimit(kind)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


def main() -> None:
    """Run the program, in a child that ends with this process."""
    seconds, memory_bytes, processes, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    leave_network()
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.exit(code if code >= 0 else 128 - code)
    confine(seconds, memory_bytes, processes)
    source = Path(path).read_text(encoding="utf-8")
    sys.argv = [path]
    exec(compile(source, path, "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


if __name__ == "__main__":
    main()
