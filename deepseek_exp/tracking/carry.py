"""Moves the journal of a run into the store, while the training process lives and shortly after."""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from mlflow.entities import Metric

from deepseek_exp.tracking.connect import reason
from deepseek_exp.tracking.journal import Event, read_events
from deepseek_exp.tracking.outbox import Outbox
from deepseek_exp.tracking.rundir import FACTS, JOURNAL, Progress, Spec
from deepseek_exp.tracking.system import SystemSampler

POLL_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0
_KEPT_SAMPLES = 20_000
_VALUES = {"metrics", "params", "tags", "unreadable"}
_KILLED = "the training process was killed: it went away without reporting how the run ended"


class Lifeline:
    """Detects the end of the training process: its end of standard input closes, or it is no longer our parent."""

    def __init__(self, parent_pid: int) -> None:
        self._parent_pid = parent_pid

    def is_cut(self, wait_seconds: float) -> bool:
        """Wait for the training process to end, at most this long; return whether it did.

        A worker that it forked may hold the pipe open after its death, so the parent's process id is checked too.
        """
        readable, _, _ = select.select([sys.stdin], [], [], wait_seconds)
        return bool(readable) or os.getppid() != self._parent_pid


class Carrier:
    """Moves the journal's events into the store and remembers how far it got.

    Args:
        run_dir: the run's folder.
        spec: what the run is.
        progress: how far earlier senders got; updated and saved.
        outbox: the run in the store.
        sampler: source of system metrics, or None.
    """

    def __init__(
        self, run_dir: Path, spec: Spec, progress: Progress, outbox: Outbox, sampler: SystemSampler | None
    ) -> None:
        self._run_dir = run_dir
        self._spec = spec
        self._progress = progress
        self._outbox = outbox
        self._sampler = sampler
        self._samples: deque[Metric] = deque(maxlen=_KEPT_SAMPLES)
        self._last_progress = 0.0

    def watch(self, lifeline: Lifeline, when_gone: Callable[[], None]) -> None:
        """Wait for the training process to end, in a separate thread.

        After that this process ends, even if it hangs, once nothing has arrived for `drain_seconds`; the rest stays in
        the journal.

        Args:
            lifeline: detects the end of the training process.
            when_gone: called when it has ended.
        """
        threading.Thread(target=self._give_up_without_progress, args=[lifeline, when_gone], daemon=True).start()

    def run(self, lifeline: Lifeline, when_gone: Callable[[], None]) -> None:
        """Send until the training process has ended and everything has arrived.

        Args:
            lifeline: detects the end of the training process.
            when_gone: called when it has ended.
        """
        pause, gone = 0.0, False
        while True:
            if not gone and (self._progress.end or lifeline.is_cut(pause)):
                gone, pause = True, POLL_SECONDS
                when_gone()
            elif gone:
                time.sleep(POLL_SECONDS)
            if self.attempt(closing=gone) and gone:
                return
            pause = (
                POLL_SECONDS
                if self._progress.trouble is None
                else min(max(2 * pause, POLL_SECONDS), _LONGEST_PAUSE_SECONDS)
            )

    def attempt(self, *, closing: bool) -> bool:
        """Send everything available; if `closing`, set the final status too. Return whether everything went well."""
        troubles = []
        for send in (lambda: self._send_values(closing=closing), self._send_artifacts):
            try:
                send()
            except Exception as error:  # any error of the store's driver; the next attempt may succeed
                troubles.append(reason(error))
                sys.stderr.write(f"{time.strftime('%FT%T')} {error!r}\n")
        trouble = troubles[0] if troubles else None
        if trouble != self._progress.trouble:
            self._progress.trouble = trouble
            self._progress.save(self._run_dir)
        return trouble is None

    def _save(self) -> None:
        self._progress.save(self._run_dir)
        self._last_progress = time.monotonic()

    def _give_up_without_progress(self, lifeline: Lifeline, when_gone: Callable[[], None]) -> None:
        while not lifeline.is_cut(POLL_SECONDS):
            pass
        when_gone()
        self._last_progress = time.monotonic()
        while time.monotonic() - self._last_progress < self._spec.tracking.drain_seconds:
            time.sleep(0.1)
        os._exit(1)

    def _send_values(self, *, closing: bool) -> None:
        if self._sampler:
            self._samples.extend(self._sampler.sample())
        while True:
            events, offset = read_events(self._run_dir / JOURNAL, self._progress.values_offset)
            if not events:
                break
            self._outbox.send_values(events)
            self._remember_end(events)
            self._progress.values_offset = offset
            self._save()
        if self._samples:
            self._outbox.send_metrics(list(self._samples))
            self._samples.clear()
        if closing and not self._progress.closed:
            self._outbox.close(self._progress.end or self._killed())
            self._progress.closed = True
            self._save()

    def _send_artifacts(self) -> None:
        if not self._progress.facts_sent:
            known = json.loads((self._run_dir / FACTS).read_text(encoding="utf-8"))
            for path, text in known.items():
                self._outbox.send_text(text, path)
            self._progress.facts_sent = True
            self._save()
        while True:
            events, offset = read_events(self._run_dir / JOURNAL, self._progress.artifacts_offset)
            if not events:
                return
            to_send = [event for event in events if event["kind"] not in _VALUES]
            self._outbox.send_artifacts(to_send)
            self._progress.artifacts_offset = offset
            self._save()

    def _remember_end(self, events: list[Event]) -> None:
        """Keep the end of the run's last life: an end that was followed by a resume does not count."""
        for event in events:
            if event["kind"] == "end":
                self._progress.end = event
            elif event["kind"] == "start":
                self._progress.end = None

    def _killed(self) -> Event:
        """Return the end event of a training process that could not write one."""
        died_ms = int((self._run_dir / JOURNAL).stat().st_mtime * 1000)
        return {"t": died_ms, "kind": "end", "status": "FAILED", "error": _KILLED}
