"""Processes side by side that use one GPU in turns, so that none disturbs what another measures.

Each has its own start, its own compiler and its own global switches; what one gets wrong does not end the others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


@dataclass
class Failure:
    """Why a process ended early, in one line."""

    reason: str


class Turns:
    """A process's side: waits until it may go on, and gives what it has found."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def wait(self) -> None:
        self.pipe.recv()

    def give(self, found: Any) -> None:
        self.pipe.send(found)


@dataclass
class Child:
    """A process as its parent sees it."""

    name: str
    process: BaseProcess
    pipe: Connection

    @classmethod
    def start(cls, target: Callable[..., None], name: str, *args: Any) -> Child:
        """Start target(turns, name, *args) in a process of its own."""
        context = multiprocessing.get_context("spawn")
        ours, its = context.Pipe()
        process = context.Process(target=_run, args=(target, its, name, *args))
        process.start()
        its.close()
        return cls(name, process, ours)

    def go(self) -> None:
        """Let it go on until it gives something."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: `result` says so
            self.pipe.send(None)

    def result(self) -> Any:
        """Wait for what it gives: that, or a Failure."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return Failure(f"ended by itself, exit code {self.process.exitcode}")


def one_line(error: Exception) -> str:
    """Say what went wrong."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def _run(target: Callable[..., None], pipe: Connection, name: str, *args: Any) -> None:
    try:
        target(Turns(pipe), name, *args)
    except Exception as error:  # the parent says it, and goes on with the others
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            pipe.send(Failure(one_line(error)))
