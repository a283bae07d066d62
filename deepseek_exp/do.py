"""What `do` means: train, evaluate, sample, export, plan or verify."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from deepseek_exp import planner, saved_config
from deepseek_exp.commands import command, resume_words, shown
from deepseek_exp.config import ROOT, Device, Do, ExperimentConfig, ExportFormat, Launcher
from deepseek_exp.disk import check_writable, disk_error, expand
from deepseek_exp.errors import CheckpointError, ConfigError, DataError, Problem, UserError, VerifyError
from deepseek_exp.job import COMMAND_FILE, Job
from deepseek_exp.layout import degrees
from deepseek_exp.parallel import launch, manifest, member, nodes
from deepseek_exp.redact import redact
from deepseek_exp.telling import plan_text, say, summary, validation_lines
from deepseek_exp.tracking import RunLog, TrackedRun, copy_history

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

    from deepseek_exp.build import Parts
    from deepseek_exp.callbacks import Checkpoints, Progress
    from deepseek_exp.data import Tokenizer
    from deepseek_exp.models import Transformer

READY_SECONDS = 60.0
DIGESTS = "data.json"
# what of the environment changes how ranks run
ENVIRONMENT = ("NCCL_", "GLOO_", "TORCH_", "OMP_", "CUDA_VISIBLE_DEVICES")


def run(job: Job) -> float | None:
    """Do what the job says; gives the validation loss where there is one."""
    if job.cfg.do is Do.plan:
        return say(planner.report(job.cfg))
    if job.cfg.do in (Do.sample, Do.export):
        return sample(job) if job.cfg.do is Do.sample else export(job)
    check_writable("output_dir", Path(job.cfg.output_dir))
    check_writable("run_dir", job.run_dir)
    if job.cfg.launch.launcher is not Launcher.local:
        return say(hand_out(job))
    if job.cfg.do is Do.verify:
        return _tracked(job, verify)
    return _tracked(job, in_ranks if job.n_ranks > 1 else ACTIONS[job.cfg.do])


def in_ranks(job: Job, tracked: RunLog, run_id: str) -> float | None:
    """Do it in several processes on this machine, which log into the run of this one."""
    from deepseek_exp.callbacks import Stopped

    command = [sys.executable, "-m", "deepseek_exp.rank", str(job.save(run_id))]
    ended = launch.run(
        command,
        job.n_ranks,
        job.run_dir / member.FOLDER,
        _rank_variables(job, job.n_ranks),
        saves=job.cfg.do is not Do.eval,
    )
    if ended.stopped_at is not None:
        raise Stopped(ended.signum, ended.stopped_at)
    return ended.loss


def run_rank(job_file: Path) -> member.Ended:
    """Do one rank's part; all ranks do the same, and rank 0 is the one that records it."""
    from deepseek_exp.callbacks import Stopped

    job, run_id = Job.load(job_file)
    action, first = ACTIONS[job.cfg.do], member.number() == 0
    try:
        if run_id is None and first:
            return member.Ended(loss=_tracked(job, _telling_the_run_id(action)))
        run_id = run_id or member.share(RUN_ID, None)
        return member.Ended(loss=action(job, RunLog.attach(job.run_dir, records=first), run_id))
    except Stopped as stopped:
        return member.Ended(stopped_at=stopped.step)
    except SystemExit as leaving:
        if not isinstance(leaving.__cause__, Stopped):
            raise
        return member.Ended(stopped_at=leaving.__cause__.step)


def hand_out(job: Job) -> str:
    """Write what starts the job's ranks on other machines, and say how; submit it where that is asked for."""
    cfg, file = job.cfg.launch, job.save(None)
    variables = _rank_variables(job, nodes.ranks_per_node(cfg, job.n_ranks))
    if cfg.launcher is Launcher.torchrun:
        which = "this machine" if cfg.n_nodes == 1 else f"each of the {cfg.n_nodes} machines"
        return f"run this on {which}:\n\n{nodes.torchrun_command(cfg, job.n_ranks, file, variables)}\n"
    script = file.with_name("job.sbatch")
    on_gpus = job.cfg.device is not Device.cpu
    script.touch(0o600)
    script.write_text(nodes.slurm_script(cfg, job.n_ranks, file, variables, on_gpus=on_gpus), encoding="utf-8")
    if not cfg.submit:
        return f"wrote     {shown(script)}\nsubmit it sbatch {shlex.quote(shown(script))}"
    done = subprocess.run(["sbatch", str(script)], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        rule = f"failed: sbatch {shown(script)} said {done.stderr.strip()!r}"
        raise ConfigError(Problem("launch.submit", True, rule, "correct that, or set launch.submit=false"))
    return f"wrote     {shown(script)}\nsubmitted {done.stdout.strip()}"


def _rank_variables(job: Job, ranks_here: int) -> dict[str, str]:
    return launch.rank_variables(job.cfg.launch, job.cfg.trainer.n_threads, ranks_here)


def _telling_the_run_id(action: Action) -> Action:
    """Let the ranks that wait for the run's id have it before the action begins."""

    def told(job: Job, tracked: RunLog, run_id: str) -> float | None:
        return action(job, tracked, member.share(RUN_ID, run_id))

    return told


def train(job: Job, tracked: RunLog, run_id: str) -> float:
    """Train, from the start or from a checkpoint, and tell how it went."""
    started = time.monotonic()
    if job.checkpoint is not None and job.continues is None:
        tracked.skip_known_after(manifest.read_manifest(job.checkpoint).step)
    parts, (trainer, checkpoints, progress) = _ready_to_train(job, tracked, run_id)
    say(plan_text(job, parts, run_id))
    if job.n_ranks > 1:
        for path, content in planner.plan_artifacts(job.cfg).items():
            tracked.log_text(content, path)
    trainer.fit(parts.lit, datamodule=parts.datamodule, ckpt_path=job.checkpoint)
    text = None
    if job.n_ranks == 1:  # no rank of several has the whole model
        cfg = _prompted(job.cfg, parts.data.first_words())
        text = _sample_text(cfg, parts.lit.model.to(parts.device), parts.data.tokenizer)
        tracked.log_text(text, "sample.txt")
    say(summary(job, parts, run_id, checkpoints.saved, progress.speed, text, time.monotonic() - started))
    return float(trainer.callback_metrics["val/loss"])


def train_briefly(job: Job, tracked: RunLog, run_id: str) -> float:
    """Train as `train` does, one of the two times that are compared, and tell no more than the progress."""
    parts, (trainer, _, _) = _ready_to_train(job, tracked, run_id)
    trainer.fit(parts.lit, datamodule=parts.datamodule)
    return float(trainer.callback_metrics["val/loss"])


def _ready_to_train(job: Job, tracked: RunLog, run_id: str) -> tuple[Parts, tuple[Trainer, Checkpoints, Progress]]:
    from deepseek_exp import build

    # weights that Lightning takes from the checkpoint need not be read from anywhere else before
    cfg = job.cfg if job.checkpoint is None else dataclasses.replace(job.cfg, init_from=None)
    parts = build.build_parts(cfg, None)
    _log_inputs(parts, tracked)
    digests = json.dumps(parts.data.digests())
    texts = {saved_config.FILE: job.shown_yaml, COMMAND_FILE: job.command_json, DIGESTS: digests}
    texts |= {"tokenizer.json": parts.data.tokenizer.json}
    return parts, build.build_trainer(job.cfg, parts, tracked, run_id, texts)


def verify(job: Job, tracked: RunLog, run_id: str) -> None:
    """Train some steps in one process and in the layout asked for, and compare the two.

    Raises:
        VerifyError: they differ by more than the bounds.
    """
    from deepseek_exp import certificate

    n_steps = job.cfg.verify.steps
    one, other = _alone(job), _compared(job, f"ranks-{job.n_ranks}" if job.n_ranks > 1 else "again")
    for run in (one, other):
        ranks = f"{run.n_ranks} ranks" if run.n_ranks > 1 else "one process"
        say(f"{ranks}, {n_steps} steps, in {shown(run.run_dir)}")
        in_ranks(run, tracked, run_id)
    found = certificate.compare(job.cfg, one.run_dir, other.run_dir)
    for row in found.rows:
        for step, difference in row.by_step(n_steps).items():
            tracked.log_metrics({row.metric: difference}, step)
    for file, content in {"certificate.md": found.markdown, "certificate.json": found.json}.items():
        (job.run_dir / file).write_text(content + "\n", encoding="utf-8")
        tracked.log_text(content, file)
    say(f"\n{found.markdown}")
    if not found.holds:
        raise VerifyError(_not_verified(job, found.first_difference))


def _alone(job: Job) -> Job:
    """Make the run of one process that a layout is compared with."""
    one = {"auto": False, "dp": 1, "tp": 1, "pp": 1, "ep": 1, "zero_stage": 0, "sequence_parallel": False}
    return _compared(job, "one", parallel=one)


def _compared(job: Job, folder: str, **sections: Any) -> Job:
    """Make one of the two runs that are compared: it logs each step, and saves the last."""
    n_steps = job.cfg.verify.steps
    every = {"log_every_steps": 1, "eval_every_steps": n_steps, "checkpoint_every_steps": n_steps}
    saved = saved_config.literal(saved_config.parse(job.yaml))
    changed = {"trainer": {**every, "keep_checkpoints": 1}, **sections}
    tree = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), saved, changed)
    yaml, run_dir = saved_config.dump(tree), job.run_dir / folder
    return dataclasses.replace(job, cfg=OmegaConf.to_object(tree), yaml=yaml, run_dir=run_dir)


def _not_verified(job: Job, first_difference: str) -> Problem:
    d, fix = degrees(job.cfg), f"read {shown(job.run_dir / 'certificate.md')}"
    rule = f"does not compute what one process does: {first_difference}"
    if job.n_ranks > 1:
        fix += ", and train with another layout until that is mended"
    elif not job.cfg.trainer.deterministic:
        fix += ", and set trainer.deterministic=true"
    return Problem("parallel", f"dp {d.dp} x tp {d.tp} x pp {d.pp}", rule, fix)


def evaluate(job: Job, tracked: RunLog, run_id: str) -> float:
    """Measure the validation loss of a checkpoint, one of ours or the one that `init_from` names."""
    from deepseek_exp import build

    parts = build.build_parts(job.cfg, job.checkpoint)
    _log_inputs(parts, tracked)
    parts.lit.steps_done = manifest.read_manifest(job.checkpoint).step if job.checkpoint is not None else 0
    trainer, _, _ = build.build_trainer(job.cfg, parts, tracked, run_id, {})
    say(f"evaluating {job.checkpoint or job.cfg.init_from} on {parts.data.n_valid_tokens:,} tokens")
    trainer.validate(parts.lit, datamodule=parts.datamodule, verbose=False)
    say("\n".join(validation_lines(trainer.callback_metrics)))
    return float(trainer.callback_metrics["val/loss"])


Action = Callable[[Job, RunLog, str], float | None]
# what the ranks do, where there are several
ACTIONS: dict[Do, Action] = {Do.train: train, Do.eval: evaluate, Do.verify: train_briefly}
RUN_ID = "deepseek_exp/run_id"


def sample(job: Job) -> None:
    """Continue the prompt from a checkpoint with its own tokenizer; this is not recorded in MLflow."""
    from deepseek_exp import build, serve
    from deepseek_exp.data import Tokenizer

    if job.checkpoint is not None:
        tokenizer = Tokenizer.load(job.checkpoint / "tokenizer.json")
    else:
        tokenizer = Tokenizer.named(job.cfg.data.tokenizer, job.cfg.data.vocab_size)
    asked = any(o.startswith("sample.max_new_tokens=") for o in job.overrides)
    cfg = _prompted(job.cfg, "")
    _check_prompt(cfg, len(tokenizer.encode(cfg.sample.prompt)), every_token=asked)
    device = build.pick_device(job.cfg.device)
    build.check_memory(job.cfg, device)
    build.set_up_torch(job.cfg)
    model = build.build_model(job.cfg, device, job.checkpoint)
    if job.cfg.sample.weight_bits:
        saved = serve.quantize_matrices(model, job.cfg.sample.weight_bits)
        say(f"matrices  of {job.cfg.sample.weight_bits} bits, {saved / 1e6:,.1f} MB less")
    say(_sample_text(cfg, model, tokenizer))


def export(job: Job) -> None:
    """Write a checkpoint for other programs, and tell how they load it; this is not recorded in MLflow."""
    from deepseek_exp import serve
    from deepseek_exp.parallel.checkpoint import in_one_file

    wanted = job.cfg.export
    if wanted.path is not None:
        target = expand(wanted.path)
    else:
        target = manifest.run_dir_of(job.checkpoint, "set export.path to a new folder") / "hf"
    check_writable("export.path", target.parent)
    writers = {ExportFormat.hf: serve.export_hf}
    try:
        with in_one_file(job.checkpoint, target) as checkpoint:
            names = writers[wanted.format](job.cfg.model, checkpoint, target)
    except Exception as error:
        worded = disk_error(error, "export.path", str(target))
        if worded is None:
            raise
        raise worded from error
    size = sum((target / name).stat().st_size for name in names)
    say(f"wrote     {shown(target)}, {size / 1e6:,.1f} MB: {', '.join(names)}")
    say(f"from      {shown(job.checkpoint)}, a {job.cfg.model.version}")
    say(f"load it   transformers.AutoModelForCausalLM.from_pretrained({json.dumps(shown(target))})")
    m = job.cfg.model
    if m.n_mtp_layers:
        last = f" to {m.n_layers + m.n_mtp_layers - 1}" if m.n_mtp_layers > 1 else ""
        say(f"note      layer {m.n_layers}{last} predicts further tokens. transformers does not use it,")
        say(f"          and lists its weights, model.layers.{m.n_layers}.*, as UNEXPECTED; init_from reads them")


def _tracked(job: Job, action: Action) -> float | None:
    """Run an action with its MLflow run around it: started before the slow imports, ended whatever happens."""
    cfg = job.cfg
    _check_data(job)
    resumed = job.checkpoint if cfg.do is Do.train and job.continues is None else None
    if job.continues is not None:
        copy_history(job.continues.run_dir, job.run_dir, job.continues.step)
    run_id = manifest.read_manifest(resumed).run_id if resumed is not None else None
    tracked = TrackedRun.start(
        cfg.tracking,
        run_dir=job.run_dir,
        name=job.name,
        params=saved_config.parse(job.shown_yaml) | _sizes(cfg),
        config_yaml=job.shown_yaml,
        tags=_tags(job),
        source_dir=ROOT,
        artifact_dir=Path(cfg.output_dir) / "artifacts",
        run_id=run_id,
        continues=None if job.continues is None else (job.continues.run_id, job.continues.step),
    )
    try:
        from deepseek_exp.callbacks import Stopped  # imports torch and Lightning while the store is opened

        run_id = tracked.wait_ready(READY_SECONDS)
        for note in tracked.notes:
            say(note)
        if resumed is None:  # at once, for every run: one that fails early is to be compared too
            tracked.log_metrics({"perf/flops_per_token": planner.flops_per_token(cfg.model, cfg.data.seq_len)}, 0)
        try:
            loss = action(job, tracked, run_id)
        except Stopped as stopped:
            if stopped.signum == signal.SIGHUP:  # the shell that ends may send another one
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            _end(tracked, "KILLED", str(stopped))
            saved = f"; the checkpoint is saved. Go on with: {command()} {resume_words(job, run_id)}"
            kept = cfg.do is Do.train and cfg.trainer.keep_checkpoints
            say(f"{stopped}{saved if kept else ''}")
            raise SystemExit(128 + stopped.signum) from stopped
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.__cause__, Stopped):
            raise
        if _is_interrupt(error):
            _end(tracked, "KILLED", "stopped by SIGINT")
            raise KeyboardInterrupt from error
        _end(tracked, "FAILED", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise
    _end(tracked, "FINISHED", None)
    return loss


def _is_interrupt(error: BaseException) -> bool:
    """Return whether Ctrl-C ended it; Lightning turns that into an exit with status 1 while it validates."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def _sizes(cfg: ExperimentConfig) -> dict[str, int]:
    """Return how many parameters the model has, and how many of them one token meets."""
    counted = planner.parameters(cfg.model)
    return {"n_params": counted.total + counted.mtp, "n_active_params": counted.active}


def _end(tracked: TrackedRun, status: Any, error: str | None) -> None:
    delivery = tracked.finish(status, error)
    if delivery.message:
        say(delivery.message)


def _log_inputs(parts: Parts, tracked: RunLog) -> None:
    for entry in parts.data.inputs:
        profile = {k: v for k, v in entry.items() if k.startswith("n_")}
        tracked.log_dataset(entry["name"], entry["context"], entry["digest"], entry["source"], profile)


def _saved_digests(checkpoint: Path) -> dict[str, str]:
    """Return the digests of a checkpoint's tokenizer and text.

    Raises:
        CheckpointError: its file is missing or holds something else.
    """
    try:
        found = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        if isinstance(found, dict) and "tokenizer" in found and all(isinstance(v, str) for v in found.values()):
            return found
        reason = "it is not a mapping of digests"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    fix = "name another checkpoint, or resume=last for the newest whole one"
    raise CheckpointError(Problem("resume", str(checkpoint), f"has no readable {DIGESTS} ({reason})", fix))


def _check_data(job: Job) -> None:
    """Refuse to use a checkpoint with other text, or another tokenizer, before anything is recorded or written.

    Raises:
        DataError: a digest is not the one that the checkpoint has.
    """
    if job.checkpoint is None:
        return
    from deepseek_exp.data import prepare

    saved = _saved_digests(job.checkpoint)
    compared = saved if job.cfg.do is Do.train else ["tokenizer"]
    now = prepare(job.cfg.data).digests()
    changed = [name for name in compared if saved[name] != now.get(name)]
    changed = [name for name in changed if " tokens" not in name or name.replace(" tokens", "", 1) not in changed]
    if changed:
        d = job.cfg.data
        rule = f"is not what {job.checkpoint} was trained with any more: its {', '.join(changed)} has changed"
        fix = "bring back the text as it was (for stdlib: the same Python), "
        fix += f"or train on this text in a new run from its weights with init_from={job.checkpoint}"
        if job.cfg.do is Do.eval:
            fix = f"set data.tokenizer={job.checkpoint / 'tokenizer.json'}"
        raise DataError(Problem("data.path" if d.path else "data.source", d.path or d.source.value, rule, fix))


def _prompted(cfg: ExperimentConfig, prompt: str) -> ExperimentConfig:
    """Return the configuration with this prompt, unless it has one."""
    if cfg.sample.prompt is not None:
        return cfg
    return dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, prompt=prompt))


def _check_prompt(cfg: ExperimentConfig, n_prompt: int, *, every_token: bool) -> None:
    """Refuse a prompt of `n_prompt` tokens that leaves no room for a new one, or for every token that is asked for."""
    s, longest = cfg.sample, cfg.model.max_seq_len
    left = longest - max(1, n_prompt)
    if left < 1:
        rule = f"has {n_prompt} tokens, and with model.max_seq_len={longest} there is no room for a new one"
        raise ConfigError(Problem("sample.prompt", s.prompt, rule, f"shorten it to {longest - 1} tokens or less"))
    if every_token and s.max_new_tokens > left:
        rule = f"and a prompt of {n_prompt} tokens are more than model.max_seq_len={longest}"
        fix = f"use {left} or less, or a shorter prompt"
        raise ConfigError(Problem("sample.max_new_tokens", s.max_new_tokens, rule, fix))


def _sample_text(cfg: ExperimentConfig, model: Transformer, tokenizer: Tokenizer) -> str:
    """Return the configured prompt and what the model continues it with, as many tokens as there is room for.

    Of a prompt that leaves no room, the last half of the model's max_seq_len is used.
    """
    from deepseek_exp.serve import generate

    s, longest = cfg.sample, cfg.model.max_seq_len
    text, prompt = s.prompt, tokenizer.encode(s.prompt)
    if len(prompt) >= longest:
        prompt = prompt[-(longest // 2) :]
        text = tokenizer.decode(prompt)
    tokens = generate(
        model.eval(),
        prompt,
        max_new_tokens=min(s.max_new_tokens, longest - max(1, len(prompt))),
        temperature=s.temperature,
        top_p=s.top_p,
        seed=cfg.seed,
        end_id=tokenizer.end_id,
        domain=None if s.domain is None else cfg.model.moe.domains.index(s.domain),
    )
    return text + tokenizer.continuation(prompt, tokens)


def _tags(job: Job) -> dict[str, str]:
    made_by = job.history if job.continues is not None and job.history is not None else job.overrides
    overrides = " ".join(map(redact, made_by))
    tags = {"do": job.cfg.do.value, "run_dir": str(job.run_dir)}
    every = os.environ if job.n_ranks == 1 else {**os.environ, **_rank_variables(job, job.n_ranks)}
    tags |= {f"env.{name}": value for name, value in sorted(every.items()) if name.startswith(ENVIRONMENT)}
    if job.started_from is not None:
        tags |= {"init_from.run_id": job.started_from.run_id, "init_from.step": str(job.started_from.step)}
    if job.checkpoint is None:
        return {"overrides": overrides, **tags}
    which = "overrides_on_resume" if job.cfg.do is Do.train and job.continues is None else "overrides"
    return {which: overrides, "checkpoint": str(job.checkpoint), **tags}
