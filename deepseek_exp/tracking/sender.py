"""The process that sends a run's journal to MLflow: `python -m deepseek_exp.tracking.sender RUN_DIR`.

`TrackedRun` starts it with `--live PID` next to the training process; it ends by itself when that process has ended. By
hand, without `--live`, it sends what an earlier sender could not, and ends.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from deepseek_exp.errors import TrackingError
from deepseek_exp.redact import redact
from deepseek_exp.tracking import facts
from deepseek_exp.tracking.journal import is_being_written
from deepseek_exp.tracking.rundir import FACTS, JOURNAL, SENDER_LOCK, Progress, Spec, lock, write_json

if TYPE_CHECKING:
    from deepseek_exp.tracking.system import SystemSampler

# The lowest priority while training runs: with both cores of a machine in use, 20 metrics per step at 70 steps/s cost
# training 4.4 ms per step at 5 and 1.2 ms at 19 (2026-11-22; tests/bench/README.md has the conditions).
NICE = 19


def send_live(run_dir: Path, parent_pid: int) -> int:
    """Send a run while its training process lives; answer the run id, or the problem, on standard output."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    answers = _take_standard_output()
    with lock(run_dir / SENDER_LOCK, wait=True):
        spec, progress = Spec.load(run_dir, pending=True), Progress.load(run_dir)
        progress.closed, progress.end, progress.facts_sent = False, None, False
        git_tags, git_diff = facts.git_facts(Path(spec.source_dir))
        from deepseek_exp.tracking.carry import Carrier, Lifeline
        from deepseek_exp.tracking.outbox import open_run

        notes: list[str] = []
        try:
            outbox, start_ms = open_run(run_dir, spec, progress, git_tags, live=True, on_repair=notes.append)
        except TrackingError as error:
            if not spec.run_id:
                progress.trouble = error.problems[0].rule
                progress.save(run_dir)
            _answer(answers, {"problem": vars(error.problems[0])})
            return 1
        _answer(answers, {"run_id": progress.run_id, "notes": notes})
        if spec.run_id:
            os.read(0, 1)  # until the training process is sure to continue, or has ended: the folder stays unchanged
            Spec.settle(run_dir, keep=True)
        progress.save(run_dir)
        _be_nice(NICE)
        _tune_garbage_collection()
        sampler = _sampler(spec, str(progress.run_id), start_ms)
        carrier, lifeline = Carrier(run_dir, spec, progress, outbox, sampler), Lifeline(parent_pid)
        carrier.watch(lifeline, when_gone=lambda: _be_nice(0))  # already now: what follows is slow on a busy machine
        _save_facts(run_dir, spec, git_diff)
        carrier.run(lifeline, when_gone=lambda: _be_nice(0))
    return 0


def send_rest(run_dir: Path) -> int:
    """Send what did not arrive during the run; report the result on standard output."""
    from deepseek_exp.tracking.carry import Carrier
    from deepseek_exp.tracking.outbox import open_run

    answers = _take_standard_output()
    try:
        with lock(run_dir / SENDER_LOCK, wait=False):
            spec, progress = Spec.load(run_dir), Progress.load(run_dir)
            git_tags, git_diff = facts.git_facts(Path(spec.source_dir)) if progress.run_id is None else ({}, "")
            outbox, _ = open_run(run_dir, spec, progress, git_tags, live=False)
            if not (run_dir / FACTS).exists():
                _save_facts(run_dir, spec, git_diff)
            alive = is_being_written(run_dir / JOURNAL)
            arrived = Carrier(run_dir, spec, progress, outbox, None).attempt(closing=not alive)
    except (TrackingError, FileNotFoundError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except BlockingIOError:
        sys.stderr.write(f"another process is sending {run_dir} at this moment\n")
        return 1
    if not arrived:
        sys.stderr.write(f"not everything in {run_dir} could be sent: {progress.trouble}\n")
        return 1
    uri = redact(spec.tracking.uri)
    with answers:
        answers.write(f"everything in {run_dir} is in run {progress.run_id} of {uri}\n")
    return 0


def _save_facts(run_dir: Path, spec: Spec, git_diff: str) -> None:
    """Save the environment of this life of the run, to be sent as artifacts; each resume has its own folder."""
    folder = time.strftime("resumed_%Y-%m-%dT%H-%M-%SZ/", time.gmtime()) if spec.run_id else ""
    files = {"config.yaml": spec.config_yaml, **facts.environment_files()}
    if git_diff:
        files["git.diff"] = git_diff
    write_json(run_dir / FACTS, {folder + name: redact(text) for name, text in files.items()})


def _sampler(spec: Spec, run_id: str, start_ms: int) -> SystemSampler | None:
    if not spec.tracking.system_metrics:
        return None
    from deepseek_exp.tracking.system import SystemSampler

    return SystemSampler(spec.tracking.uri, run_id, start_ms)


def _be_nice(level: int) -> None:
    """Yield the CPU to the training process: within a session by the nice level, across sessions by the session's.

    Linux distributes the CPU between sessions first (autogroup), so the nice level alone would have no effect here.
    Resetting it to 0 needs a privilege for the first and none for the second.
    """
    for thread in Path("/proc/self/task").glob("*"):  # the level is per thread, and another thread may call this
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(thread.name), level)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(level), encoding="utf-8")


def _tune_garbage_collection() -> None:
    """Exclude MLflow's modules from garbage collection, which took 40% of the time of sending a metric."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def _take_standard_output() -> TextIO:
    """Reserve standard output for answers; what libraries print goes to standard error, with secrets hidden."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr = cast(TextIO, _Redacted(sys.stderr))
    return answers


class _Redacted(io.TextIOBase):
    """A text stream that hides secrets, line by line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        """Write the complete lines."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._stream.write(redact(line) + "\n")
        return len(text)

    def flush(self) -> None:
        """Flush the complete lines."""
        self._stream.flush()


def _answer(answers: TextIO, content: dict[str, object]) -> None:
    with suppress(BrokenPipeError), answers:
        answers.write(json.dumps(content) + "\n")


def main() -> int:
    """Parse the command line and send; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deepseek_exp.tracking.sender", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run, with its journal.jsonl")
    parser.add_argument("--live", type=int, metavar="PID", help="go along with this training process")
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    return send_rest(run_dir) if arguments.live is None else send_live(run_dir, arguments.live)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # tearing down the interpreter and MLflow's modules takes 0.75 s that training would wait for
