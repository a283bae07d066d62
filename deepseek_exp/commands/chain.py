"""Run the stages of a chain, one after the other: what is done is reused, what was interrupted continues.

Every start walks the same stages in the same order. A stage is known by its key (experiment/chain_file.py): if a stage
with this key is done and its files are whole, it is not run again; if one was interrupted, its training continues from
its last checkpoint, bit for bit. So the command that started a chain also continues it.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import importlib.metadata
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import open_dict

from deepseek_exp import console, huggingface
from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.saved_config import literal
from deepseek_exp.commands.chain_data import check_data
from deepseek_exp.commands.chain_text import aligned, csv_text, diff_text, markdown, plan_text, table
from deepseek_exp.commands.chain_yardstick import Yardstick
from deepseek_exp.commands.next_commands import words
from deepseek_exp.commands.recorded import record
from deepseek_exp.commands.spawn import ACTIONS, in_ranks
from deepseek_exp.config import ROOT, Do, ExperimentConfig, Reuse, Tracker
from deepseek_exp.config.compose import to_experiment
from deepseek_exp.config.machine import Machine
from deepseek_exp.console import command, say, shown
from deepseek_exp.disk import check_writable, expand
from deepseek_exp.errors import ChainError, ConfigError, Problem, Stopped, UserError
from deepseek_exp.experiment.chain import Stage
from deepseek_exp.experiment.chain_file import FOLDER, ChainFile, Record, checked, how, stage_key, unfinished
from deepseek_exp.experiment.job import Job, make_job, origin, resumed
from deepseek_exp.redact import redact
from deepseek_exp.tracking import ChainRun, RunLog
from deepseek_exp.tracking.facts import git_facts
from deepseek_exp.tracking.rundir import Progress, lock

LOCK, TABLE = "lock", "chain"
# Packages whose version may change what a stage computes.
PACKAGES = ("deepseek_exp", "torch", "pytorch-lightning", "deepspeed", "triton", "tokenizers")
SPEED = "perf/tokens_per_second"


@dataclass(frozen=True)
class Ready:
    """A stage whose inputs are known.

    Attributes:
        stage: the stage, with the paths of its inputs in its tree.
        key: identity of what it computes.
        how: how it computes it.
        source: what its weights come from, in words.
        start: run id and digest of the checkpoint that they come from; empty if from scratch.
    """

    stage: Stage
    key: str
    how: dict[str, str]
    source: str
    start: str


class Chain:
    """A chain that is being run.

    Attributes:
        exp: the shared tree.
        stages: all stages, each after the one it starts from.
        file: what was done before, and is being done.
        done: stage -> what was done for it.
        reused: names of the stages that were not run.
    """

    def __init__(self, name: str, exp: ExperimentConfig, stages: Sequence[Stage], file: ChainFile, machine: Machine):
        self.name, self.exp, self.stages, self.file, self.machine = name, exp, stages, file, machine
        self.output_dir, self.code = Path(exp.output_dir), code_facts()
        self.done: dict[str, Record] = {}
        self.reused: set[str] = set()
        self.run: ChainRun | None = None
        self.yardstick = Yardstick(exp, stages, file.folder / "yardstick")
        only = set(exp.chain.only) or {stage.name for stage in stages}
        self.asked = {stage.name for stage in stages if stage.name in only}
        self.needed = [stage for stage in stages if stage.name in only | self._ancestors(only)]

    def _ancestors(self, names: set[str]) -> set[str]:
        reads = {stage.name: stage.reads for stage in self.stages}
        found, todo = set[str](), list(names)
        while todo:
            new = set(reads[todo.pop()]) - found
            found |= new
            todo += new
        return found

    def checkpoint(self, stage: str) -> Path:
        """Return the checkpoint that a stage has saved."""
        return self.output_dir / str(self.done[stage].checkpoint)

    def ready(self, stage: Stage) -> Ready:
        """Return a stage whose start is done, with its key.

        Raises:
            UserError: its data cannot be read, or its tokenizer is not that of its start.
        """
        from deepseek_exp.data import prepare

        tree, inputs, source, named = copy.deepcopy(stage.tree), dict[str, str](), "scratch", ""
        if stage.start is not None:
            start = self.checkpoint(stage.start)
            tree.init_from, inputs["start"] = literal(str(start)), manifest.digest(start)
            source = f"{stage.start} (sha256:{inputs['start'][:8]}...)"
            named = f"{self.done[stage.start].run_id} sha256:{inputs['start']}"
            if not stage.own_tokenizer:
                tree.data.tokenizer = literal(str(start / "tokenizer.json"))
            branches = {domain: self.checkpoint(name) for domain, name in stage.branches.items()}
            tree.branches = {domain: literal(str(folder)) for domain, folder in branches.items()}
            inputs |= {f"branch.{domain}": manifest.digest(folder) for domain, folder in branches.items()}
            source += f", merged with {', '.join(stage.branches.values())}" if stage.branches else ""
            wrong = huggingface.other_tokenizer(start / "tokenizer.json", tree.data.tokenizer)
            if wrong is not None:
                raise ConfigError(dataclasses.replace(wrong, key=f"{stage.name}: {wrong.key}"))
        elif tree.init_from is not None:
            inputs["start"] = digest_of_weights(Path(tree.init_from))
            source = f"{tree.init_from} (sha256:{inputs['start'][:8]}...)"
            named = f"{tree.init_from} sha256:{inputs['start']}"
        if stage.reference is not None:
            tree.dpo.reference = literal(str(self.checkpoint(stage.reference)))
            source += f", compared with {stage.reference}"
        exp = to_experiment(tree, self.machine)
        if exp.lora.path is not None:
            inputs["adapter"] = digest_of_weights(expand(exp.lora.path))
        if stage.do is Do.dpo and exp.dpo.reference is not None:
            inputs["reference"] = digest_of_weights(expand(exp.dpo.reference))
        try:
            data = prepare(exp.data).digests()
        except UserError as error:
            raise type(error)(
                *(dataclasses.replace(p, key=f"{stage.name}: {p.key}") for p in error.problems)
            ) from error
        key = stage_key(stage.do, tree, inputs, data)
        return Ready(dataclasses.replace(stage, tree=tree, exp=exp), key, how(tree, self.code), source, named)

    def reusable(self, ready: Ready) -> tuple[Record | None, str]:
        """Return what was done for a stage if it need not run again, and a remark about it."""
        stage, reuse = ready.stage, self.exp.chain.reuse
        found, asked = self.file.find(ready.key), stage.name in self.asked
        if found is None or found.state != "done" or (reuse is Reuse.never and asked):
            return None, ""
        wrong = checked(found, self.output_dir)
        if wrong is not None:
            return None, f"{stage.name} is run again: {wrong}"
        names = sorted(ready.how.keys() | found.how.keys())
        apart = ((name, found.how.get(name), ready.how.get(name)) for name in names)
        differ = ", ".join(f"{name} {old} -> {new}" for name, old, new in apart if old != new)
        if differ and reuse is Reuse.strict and asked:
            return None, f"{stage.name} is run again, since chain.reuse=strict: {differ}"
        though = f", though {differ}" if differ else ""
        return found, f"{stage.name} is reused: run {found.run_id[:12]}, key {ready.key[:12]}{though}"

    def interrupted(self, ready: Ready) -> Record | None:
        """Return what was begun for a stage and can continue: it was interrupted, or its last checkpoint is damaged."""
        found, reuse = self.file.find(ready.key), self.exp.chain.reuse
        if found is None or reuse is Reuse.never or ready.stage.do is Do.eval:
            return None
        if reuse is Reuse.strict and found.how != ready.how:
            return None
        return found if found.state != "done" or checked(found, self.output_dir) is not None else None

    def check_only(self) -> None:
        """Raise if a stage of `chain.only` starts from one that is not done.

        Raises:
            ChainError: names it.
        """
        if len(self.asked) == len(self.stages):
            return
        for stage in self.needed:
            known = self.done.keys() >= set(stage.reads)
            found = self.reusable(self.ready(stage))[0] if known else None
            if found is not None:
                self.done[stage.name] = found
            elif stage.name not in self.asked:
                rule = f"leaves out {stage.name}, which is not done with this configuration"
                fix = f"add {stage.name} to chain.only, or leave chain.only out"
                raise ChainError(Problem("chain.only", ", ".join(self.exp.chain.only), rule, fix))
        self.done = {}

    def do(self, stage: Stage, number: str) -> None:
        """Do one stage, unless it is done."""
        ready = self.ready(stage)
        found, remark = self.reusable(ready)
        if remark:
            say(remark)
        if found is None:
            start = next((s for s in self.stages if s.name == stage.start), None)
            say(f"\n{diff_text(ready.stage, start, ready.source, number)}\n")
            found = self._run(ready)
        else:
            self.reused.add(stage.name)
            self.file.put(stage.name, found)
            if self.run is not None and stage.name in self.asked:
                tags = {**self._tags(ready), "reused_from": found.run_id}
                metrics = {} if found.loss is None else {"val/loss": found.loss}
                self.run.add_reused(f"{self.name} {stage.name}", tags, metrics)
        self.done[stage.name] = found

    def _tags(self, ready: Ready) -> dict[str, str]:
        return {"chain.stage": ready.stage.name, "chain.key": ready.key, "chain.start": ready.start}

    def _run(self, ready: Ready) -> Record:
        """Run a stage to its end, from its last checkpoint if it was interrupted."""
        began, before = time.monotonic(), self.interrupted(ready)
        job, is_complete = self._job(ready, before)
        spent = before.seconds if before is not None and job.checkpoint is not None else 0.0
        so_far = Record("running", ready.key, "", self._relative(job.run_dir), seconds=spent, how=ready.how)
        self.file.put(ready.stage.name, so_far)
        action = in_ranks if job.n_ranks > 1 else ACTIONS[job.cfg.do]
        try:
            loss = record(job, (lambda job, tracked, run_id: _loss_of(job)) if is_complete else action)
        except BaseException as error:
            state, seconds = "stopped" if _is_stop(error) else "failed", spent + time.monotonic() - began
            self.file.put(ready.stage.name, dataclasses.replace(so_far, state=state, seconds=seconds))
            raise
        free_memory()
        checkpoint = manifest.locate(str(job.run_dir), self.output_dir)[0] if job.cfg.do is not Do.eval else None
        speeds = RunLog.attach(job.run_dir, records=False).logged(SPEED)
        ended = dataclasses.replace(
            so_far,
            state="done",
            run_id=Progress.load(job.run_dir).run_id or "",
            checkpoint=None if checkpoint is None else self._relative(checkpoint),
            digest=None if checkpoint is None else manifest.digest(checkpoint),
            loss=loss,
            tokens_per_second=speeds[max(speeds)] if speeds else None,
            seconds=spent + time.monotonic() - began,
        )
        self.file.put(ready.stage.name, ended)
        self._register(ready.stage.name, ended, checkpoint)
        return ended

    def _job(self, ready: Ready, before: Record | None) -> tuple[Job, bool]:
        """Return the job of a stage, and whether its training was complete when it was interrupted."""
        stage, tree = ready.stage, copy.deepcopy(ready.stage.tree)
        tree.tracking.run_name = literal(f"{self.name} {stage.name}")
        tree.tracking.parent_run_id = None if self.run is None else self.run.run_id
        with open_dict(tree.tracking.tags):
            tree.tracking.tags.update(literal(self._tags(ready)))
        exp = to_experiment(tree, self.machine)
        job = make_job(tree, stage.overrides, stage.size, None, self.machine, exp)
        start = Path(exp.init_from) if exp.init_from is not None else None
        from_run = origin(start) if start is not None and manifest.is_checkpoint(start) else None
        job = dataclasses.replace(job, history=None, stage_key=ready.key, started_from=from_run)
        checkpoint, passed_over = (None, []) if before is None else unfinished(before, self.output_dir)
        for sentence in passed_over:
            say(sentence)
        if checkpoint is None:
            return job, False
        if manifest.read_manifest(checkpoint).step >= last_step(exp):
            return dataclasses.replace(job, checkpoint=checkpoint, run_dir=manifest.run_dir_of(checkpoint)), True
        say(f"continuing {stage.name} from {shown(checkpoint)}\n")
        return resumed(job, checkpoint), False

    def _relative(self, path: Path) -> str:
        whole, above = path.absolute(), self.output_dir.absolute()
        return str(whole.relative_to(above)) if whole.is_relative_to(above) else str(whole)

    def _register(self, stage: str, ended: Record, checkpoint: Path | None) -> None:
        """Register a checkpoint in the store's registry, if the store is a database."""
        if self.run is None or checkpoint is None or self.exp.tracking.uri.startswith(("http://", "https://")):
            return
        why = self.run.register(f"chain-{self.name}", stage, checkpoint, ended.run_id)
        if why is not None:
            say(f"the model registry does not take {stage}: {why}")

    def walk(self) -> None:
        """Do the stages, and compare each with its start and the first one.

        Raises:
            ChainError: a loss has risen by more than `chain.stop_if` allows.
        """
        for i, stage in enumerate(self.needed):
            self.do(stage, f"{i + 1}/{len(self.needed)}")
            checkpoint = self.checkpoint(stage.name) if self.done[stage.name].checkpoint is not None else None
            row = self.yardstick.row(stage, self.done[stage.name], checkpoint, reused=stage.name in self.reused)
            if self.run is not None and row.loss is not None:
                self.run.log({"yardstick/loss": row.loss, **{f"yardstick/{n}": x for n, x in row.by_text.items()}}, i)
            limit, risen = self.exp.chain.stop_if.loss_rise_percent, row.to_start
            if limit is not None and risen is not None and risen.percent > limit:
                rule = f"is exceeded by {stage.name}, whose loss on the yardstick is {risen.percent:.2f}% above"
                rule += f" that of {stage.start}"
                fix = f"change chain.stages.{stage.name}.set, or raise chain.stop_if.loss_rise_percent"
                raise ChainError(Problem("chain.stop_if.loss_rise_percent", limit, rule, fix))


def run_chain(stages: Sequence[Stage], exp: ExperimentConfig, recipe: str | None, overrides: Sequence[str]) -> None:
    """Plan or run a chain.

    Args:
        stages: composed and checked, each after the one it starts from.
        exp: the shared tree.
        recipe: the options of the group `recipes`, if any; they name the chain.
        overrides: overrides of the command line.

    Raises:
        UserError: a stage cannot run, or the chain is stopped.
    """
    if exp.do is Do.plan:
        return say(plan_text(stages))
    name = chain_name(exp, stages, recipe)
    folder = Path(exp.output_dir) / FOLDER / name
    check_writable("output_dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        chain = Chain(name, exp, stages, ChainFile.load(folder), Machine.here())
        chain.check_only()
        check_data(chain.needed)
        if exp.tracking.backend is Tracker.mlflow:
            chain.run = ChainRun.start(
                exp.tracking,
                name=name,
                tags={"do": "chain", "overrides": " ".join(map(redact, overrides)), "chain.folder": str(folder)},
                artifact_dir=Path(exp.output_dir) / "artifacts",
                run_id=chain.file.run_id,
                on_repair=lambda note: console.write(sys.stderr, note + "\n"),
            )
            chain.file.run_id = chain.run.run_id
            chain.file.save()
        try:
            chain.walk()
        except BaseException as error:
            _end(chain, "KILLED" if _is_stop(error) else "FAILED", error)
            if _is_stop(error):
                say(f"Continue the chain with: {command()} {words(overrides)}")
            raise
        _end(chain, "FINISHED", None)


def _end(chain: Chain, status: str, error: BaseException | None) -> None:
    """Print and store the table of the stages so far."""
    rows = chain.yardstick.rows
    if rows:
        say(f"\n{aligned(table(rows))}\n")
    texts = {f"{TABLE}.md": markdown(rows), f"{TABLE}.csv": csv_text(rows)}
    for path, text in texts.items():
        (chain.file.folder / path).write_text(redact(text), encoding="utf-8")
    n_run, where = len(rows) - len(chain.reused), shown(chain.file.folder)
    run = f"; MLflow run {chain.run.run_id}" if chain.run is not None else ""
    if error is None:
        say(f"chain {chain.name}: {n_run} stages run, {len(chain.reused)} reused; {where}{run}")
    if chain.run is not None:
        said = None if error is None else str(error.__cause__ or error) or type(error).__name__
        texts["chain.json"] = (chain.file.folder / "chain.json").read_text(encoding="utf-8")
        try:
            chain.run.finish(status, texts, markdown(rows), said)
        except UserError as unreachable:
            if error is None:
                raise
            say(str(unreachable))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the chain's folder for this process."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder / LOCK, wait=False))
        except BlockingIOError as error:
            rule, fix = "is being run by another process", "wait for it, or set tracking.run_name to another name"
            raise ChainError(Problem("chain", str(folder), rule, fix)) from error
        yield


def chain_name(exp: ExperimentConfig, stages: Sequence[Stage], recipe: str | None) -> str:
    """Return the name of a chain, which is also that of its folder: run_name, the recipe, or its stages."""
    name = exp.tracking.run_name or recipe or "-".join(stage.name for stage in stages)
    return re.sub(r"[^\w.=+-]+", "-", name, flags=re.ASCII).strip(".-")[:80] or "chain"


def code_facts() -> dict[str, str]:
    """Return the versions of the code: the commit, a digest of what differs from it, and of packages."""
    tags, diff = git_facts(ROOT)
    found = {
        "commit": tags.get("mlflow.source.git.commit", tags["git.state"])[:12],
        "python": platform.python_version(),
    }
    found |= {"uncommitted": hashlib.sha256(diff.encode()).hexdigest()[:12]} if diff else {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def digest_of_weights(folder: Path) -> str:
    """Return the digest of a checkpoint: of its manifest, or of the files of a Hugging Face folder."""
    if manifest.is_checkpoint(folder):
        return manifest.digest(folder)
    found = hashlib.sha256()
    for path in sorted(expand(folder).glob("*")):
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def free_memory() -> None:
    """Release what a stage has left on the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def last_step(exp: ExperimentConfig) -> int:
    """Return the last optimizer step of a training, whose epochs become steps once its data is read."""
    if exp.trainer.max_epochs is None:
        return exp.last_step
    from deepseek_exp.train.build import with_steps

    return with_steps(exp).last_step


def _is_stop(error: BaseException) -> bool:
    """Return whether a signal has stopped a stage."""
    return isinstance(error.__cause__, Stopped) or isinstance(error, KeyboardInterrupt)


def _loss_of(job: Job) -> float | None:
    assert job.checkpoint is not None
    return manifest.read_manifest(job.checkpoint).val_loss
