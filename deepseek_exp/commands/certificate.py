"""The certificate of do=verify: compares two runs of the same steps and states whether they computed the same.

Compared are the loss and gradient norm of each step, the validation loss after the last step, and the final weights and
buffers, unsharded, parameter by parameter, whatever layout saved them.

Bounds:

- fp32: sums in a different order differ in their last bits, about 1e-6 of a loss. A bug in a layout (a gradient that is
  not summed, a skipped micro-batch) is larger by orders of magnitude. Adam divides a gradient by its own magnitude, so
  for a weight whose gradient is barely above rounding error, rounding decides by which fraction of the learning rate it
  moves. The weight bound is therefore 1e-5 or a thousandth of the sum of the learning rates, whichever is larger.
- bf16: every operation rounds to 8 bits, so two correct layouts differ by a few percent in the gradient norm, and
  single weights by as much as they moved. The bounds only distinguish gross errors from rounding, and the certificate
  says so.
- fp8: the operands of matrix products are rounded to 4 or 3 bits, with separate scales on each rank, so the bounds are
  wider still.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.shards import WEIGHT, State, open_state
from deepseek_exp.config import ROOT, ExperimentConfig, Precision
from deepseek_exp.config.topology import Degrees, degrees
from deepseek_exp.planner import parameters
from deepseek_exp.tracking import RunLog
from deepseek_exp.tracking.facts import git_facts


@dataclass(frozen=True)
class Bounds:
    """Tolerances: loss in nats per token, gradient norm relative, weights absolute."""

    loss: float
    grad_norm: float
    weight: float


BOUNDS = {
    Precision.fp32: Bounds(2e-6, 1e-5, 1e-5),
    Precision.bf16: Bounds(2e-2, 1e-1, 1e-2),
    Precision.fp8: Bounds(5e-2, 3e-1, 1e-2),
}
# Weight tolerance as a fraction of sum(lr), the distance Adam can move a weight.
SHARE_OF_WAY = {Precision.fp32: 1e-3, Precision.bf16: 2.0, Precision.fp8: 2.0}
ROUGH = "in {} these bounds only distinguish gross errors from rounding; trainer.precision=fp32 is the sharp test"


@dataclass(frozen=True)
class Row:
    """One compared quantity.

    Attributes:
        quantity: description, with its unit.
        metric: its name in MLflow.
        differences: place -> difference of the two runs; infinite if one of them lacks it.
        bound: the largest allowed difference.
        values: place -> the values of both runs, if there are few.
    """

    quantity: str
    metric: str
    differences: Mapping[str, float]
    bound: float
    values: Mapping[str, tuple[float, float]]

    @property
    def largest(self) -> float:
        """The largest difference."""
        return max(self.differences.values(), default=0.0)

    @property
    def where(self) -> str:
        """The place of the largest difference; the first one if there are several."""
        return next((place for place, d in self.differences.items() if d == self.largest), "")

    def by_step(self, last_step: int) -> dict[int, float]:
        """Return the differences by step; for a quantity not compared per step, its largest one at `last_step`."""
        if self.metric not in PER_STEP:
            return {last_step: self.largest}
        return {int(place.removeprefix("step ")): d for place, d in self.differences.items()}

    @property
    def wrong(self) -> list[str]:
        """The places where the difference exceeds the bound."""
        return [place for place, d in self.differences.items() if d > self.bound]


@dataclass(frozen=True)
class Certificate:
    """The result of a comparison.

    Attributes:
        facts: name -> description of what was run.
        other: description of what was compared with one process.
        rows: training loss and gradient norm first, which are compared at each step.
        note: remark about the bounds; may be empty.
    """

    facts: Mapping[str, str]
    other: str
    rows: Sequence[Row]
    note: str

    @property
    def holds(self) -> bool:
        """Whether all differences are within the bounds."""
        return not any(row.wrong for row in self.rows)

    @property
    def verdict(self) -> str:
        """The last line of the certificate."""
        if not self.holds:
            return f"NOT verified: {self.other} does not compute the same as one process: {self.first_difference}"
        exactly = "bit for bit" if all(row.bound == 0 for row in self.rows) else "within the bounds above"
        return f"verified: {self.other} computes the same as one process, {exactly}"

    @property
    def first_difference(self) -> str:
        """Return the first quantity out of bounds: that of the earliest step, the loss before the gradient norm."""

        def when(row: Row) -> float:
            return list(row.differences).index(row.wrong[0]) if row.metric in PER_STEP else math.inf

        row = min((row for row in self.rows if row.wrong), key=when)
        place = row.wrong[0]
        apart = f"{row.differences[place]:.2e} apart, bound {row.bound:.0e}"
        if place in row.values:
            one, other = row.values[place]
            return f"{row.quantity} at {place} is {one:.9g} and {other:.9g} ({apart})"
        return f"{row.quantity} of {place} ({apart})"

    @property
    def markdown(self) -> str:
        """The certificate as Markdown."""
        width = max(map(len, self.facts))
        table = [("quantity", "largest difference", "where", "bound", ""), ("---",) * 5]
        for row in self.rows:
            table.append(
                (row.quantity, f"{row.largest:.2e}", row.where, f"{row.bound:.0e}", "NO" if row.wrong else "ok")
            )
        return "\n".join(
            [
                f"# Certificate: {self.other} compared with one process",
                "",
                *(f"    {name:{width}}  {text}" for name, text in self.facts.items()),
                "",
                *(f"| {' | '.join(cells)} |" for cells in table),
                "",
                *([self.note, ""] if self.note else []),
                self.verdict,
            ]
        )

    @property
    def json(self) -> str:
        """The certificate as JSON, with every difference."""
        return json.dumps({**dataclasses.asdict(self), "holds": self.holds, "verdict": self.verdict}, indent=1)


PER_STEP = ("verify/loss_difference", "verify/grad_norm_difference")


def compare(cfg: ExperimentConfig, one: Path, other: Path) -> Certificate:
    """Compare two finished runs.

    Args:
        cfg: the experiment, with the layout of the other run.
        one: folder of the run in one process.
        other: folder of the other run.
    """
    logs = [RunLog.attach(folder, records=False) for folder in (one, other)]
    d = degrees(cfg)
    bounds = _bounds(cfg, d, sum(logs[0].logged("optim/lr").values()))
    traces = [
        ("training loss, nats per token", PER_STEP[0], "train/loss", bounds.loss, False),
        ("gradient norm, relative", PER_STEP[1], "optim/grad_norm", bounds.grad_norm, True),
        ("validation loss, nats per token", "verify/val_loss_difference", "val/loss", bounds.loss, False),
    ]
    rows = []
    for quantity, metric, traced, bound, relative in traces:
        values = dict(_pairs(*(log.logged(traced) for log in logs)))
        differences = {place: _apart(a, b, relative=relative) for place, (a, b) in values.items()}
        rows.append(Row(quantity, metric, differences, bound, values))
    states = [open_state(_checkpoint(folder, cfg)) for folder in (one, other)]
    weights, buffers = (dict(found(*states)) for found in (_weights, _buffers))
    rows.append(Row("final weights, absolute", "verify/weight_difference", weights, bounds.weight, {}))
    if buffers:
        rows.append(Row("final buffers, absolute", "verify/buffer_difference", buffers, bounds.weight, {}))
    if d.world_size == 1:
        return Certificate(_facts(cfg, d), "a second run of one process", rows, "")
    note = ROUGH.format(cfg.trainer.precision.value) if cfg.trainer.precision.keeps_masters else ""
    return Certificate(_facts(cfg, d), str(d), rows, note)


def _bounds(cfg: ExperimentConfig, d: Degrees, way: float) -> Bounds:
    if d.world_size == 1:
        return Bounds(0, 0, 0)
    asked, usual = cfg.verify, BOUNDS[cfg.trainer.precision]
    return Bounds(
        usual.loss if asked.loss_tolerance is None else asked.loss_tolerance,
        usual.grad_norm if asked.grad_norm_tolerance is None else asked.grad_norm_tolerance,
        max(usual.weight, SHARE_OF_WAY[cfg.trainer.precision] * way)
        if asked.weight_tolerance is None
        else asked.weight_tolerance,
    )


def _pairs(one: Mapping[int, float], other: Mapping[int, float]) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield the values of both runs for each step; NaN if one is missing."""
    for step in sorted({*one, *other}):
        yield f"step {step}", (one.get(step, math.nan), other.get(step, math.nan))


def _apart(one: float, other: float, *, relative: bool) -> float:
    difference = abs(one - other) / (abs(one) or 1.0) if relative else abs(one - other)
    return difference if math.isfinite(difference) else math.inf


def _checkpoint(folder: Path, cfg: ExperimentConfig) -> Path:
    checkpoint = folder / manifest.FOLDER / manifest.checkpoint_name(cfg.last_step)
    manifest.verify(checkpoint)
    return checkpoint


def _weights(one: State, other: State) -> Iterator[tuple[str, float]]:
    """Yield the difference of each weight as the optimizer holds it: the fp32 master if the model is bf16."""
    for name in dict.fromkeys([*one.names, *other.names]):
        if name in one.names and name in other.names:
            yield name, _furthest(one.read(name, WEIGHT), other.read(name, WEIGHT))
        else:
            yield name, math.inf


def _buffers(one: State, other: State) -> Iterator[tuple[str, float]]:
    for name in dict.fromkeys([*one.buffers, *other.buffers]):
        if name in one.buffers and name in other.buffers:
            yield name, _furthest(one.buffer(name), other.buffer(name))
        else:
            yield name, math.inf


def _furthest(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not a.numel():
        return 0.0
    difference = (a.double() - b.double()).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def _facts(cfg: ExperimentConfig, d: Degrees) -> dict[str, str]:
    m, t = cfg.model, cfg.trainer
    counted, git = parameters(m), git_facts(ROOT)[0]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and cfg.device != "cpu" else ""
    n_micro = t.global_batch_seqs // t.micro_batch_seqs
    return {
        "model": f"{m.version}, {counted.total + counted.mtp:,} parameters",
        "layout": f"{d}, ep {d.ep}, ZeRO {cfg.parallel.zero_stage}"
        + (", sequence parallel" if cfg.parallel.sequence_parallel else ""),
        "precision": t.precision.value,
        "steps": f"{cfg.last_step}, each of {n_micro} x {t.micro_batch_seqs} sequences x {cfg.data.seq_len} tokens",
        "schedule": f"warm-up {cfg.optim.warmup_steps} of {t.max_steps} steps to lr {cfg.optim.lr:g}, "
        f"clipped at {cfg.optim.clip_norm:g}",
        "data": cfg.data.source.value,
        "seed": f"{cfg.seed}" + (f", weights from {cfg.init_from}" if cfg.init_from else ""),
        "commit": f"{git.get('mlflow.source.git.commit', 'none')} ({git['git.state']})",
        "host": ", ".join(filter(None, [platform.node(), gpu or "cpu", f"torch {torch.__version__}"])),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
    }
