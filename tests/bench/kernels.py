"""Each fused kernel on a GPU in bf16: its error beside PyTorch's own, whether it repeats, time and memory beside peers.

    python tests/bench/kernels.py [NAME ...] [--json FILE]

Errors: the largest difference from the definition in float64 of each result and gradient, relative to the largest
number there; "error" is the worst of the kernel's over PyTorch's own in bf16, wanted at most 2. Repeats: 20 runs give
the same bits. Times: forward and backward together (kernel_cases.py), or one call (kernel_calls.py), short ones as CUDA
graphs, so that the host is in none of them; medians over rounds that take turns among the forms: ours, PyTorch's, the
same compiled, and others' where they are installed. One that cannot run is told in one line and left out. Each
operation has a process of its own; all check and compile at once, and then measure one after the other. "Floor" is
bytes over the copy bandwidth of this run, or FLOPs over its matrix throughput. Memory: the peak of what a call
allocates, its gradients included. Under the table: the error of the output table's gradient in each form of
linear_cross_entropy, and over the kernels that memory alone limits the geometric means of floor / ours and of Liger /
ours. On a CPU, under Triton's interpreter, only the small shapes run, in fp32 and without times: a check of this
script.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.kernel_calls import CALLS, Product, Step
from tests.bench.kernel_cases import CASES, DEVICE, DTYPE, Call, Case, Inputs, as_graph, table_errors
from tests.bench.turns import Child, Failure, Turns, one_line

ROUNDS = 9
KERNELS: dict[str, Case | Step | Product] = {**CASES, **CALLS}


@dataclass
class Form:
    """What came out for one form of an operation.

    Attributes:
        ms: median time.
        spread: largest minus smallest time of a round, over ms.
        extra_bytes: peak of what a call allocates; None: not measured.
    """

    ms: float
    spread: float
    extra_bytes: int | None


@dataclass
class Row:
    """What came out for one kernel."""

    name: str
    by_bytes: bool
    error: float | None
    repeats: bool
    floor_ms: float | None = None
    forms: dict[str, Form] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def milliseconds(calls: Sequence[Call]) -> list[list[float]]:
    """Time calls in turns: for each its time in every round."""
    for call in calls:
        for _ in range(3):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, found in zip(calls, times, strict=True):
            found.append(triton.testing.do_bench(call, warmup=20, rep=60, return_mode="median"))
    return times


def extra_bytes(call: Call) -> int:
    """Give the peak of what a call allocates beyond what there was before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> tuple[float, float]:
    """Measure copied bytes (read and written) and bf16 matrix FLOPs a second."""
    a, b = torch.empty(2**30, dtype=torch.int8, device=DEVICE), torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    copy, product = milliseconds([lambda: b.copy_(a), lambda: x @ y])
    return 2 * 2**30 / statistics.median(copy) * 1e3, 2 * 8192**3 / statistics.median(product) * 1e3


def measure(turns: Turns, name: str, bandwidth: float, flops: float) -> None:
    """Check one kernel, and in its turn time it and its peers; give the row, the errors of dw, and what to tell."""
    kernel, errors, told = KERNELS[name], {}, []
    row = Row(name, kernel.by_bytes, *kernel.check())
    if DEVICE.type == "cuda":
        inputs = kernel.large()
        calls = working(row, kernel, inputs)
        turns.give("ready")
        turns.wait()
        time_forms(row, kernel, calls)
        n_bytes, n_flops = kernel.floor(inputs)
        row.floor_ms = max(n_bytes / bandwidth, n_flops / flops) * 1e3
    if name == "linear_cross_entropy":
        errors = table_errors(kernel, told.append)
    turns.give((row, errors, told))


def working(row: Row, kernel: Case | Step | Product, inputs: Inputs) -> dict[str, Call]:
    """Make a call of each form and try it; note why one cannot run."""
    calls = {}
    for form, make in kernel.forms(inputs).items():
        try:
            call = make()
            call()
            torch.cuda.synchronize()
            calls[form] = call
        except Exception as error:  # what one of the peers lacks must not end the others
            row.left_out[form] = one_line(error)
    return calls


def time_forms(row: Row, kernel: Case | Step | Product, calls: dict[str, Call]) -> None:
    """Fill in what each form takes."""
    memory = [extra_bytes(call) if kernel.has_memory else None for call in calls.values()]
    if kernel.graphed:
        calls = {form: as_graph(call) for form, call in calls.items()}
    for form, times, extra in zip(calls, milliseconds(list(calls.values())), memory, strict=True):
        middle = statistics.median(times)
        row.forms[form] = Form(middle, (max(times) - min(times)) / middle, extra)


def lines_of(row: Row) -> list[str]:
    """Give the lines of the table: ours, then the other forms."""
    checked = ["" if row.error is None else f"{row.error:.2f}", "yes" if row.repeats else "NO"]
    ours = row.forms.get("ours")
    lines = []
    for name, form in row.forms.items():
        cells = [f"{form.ms:.4f}", f"{form.ms / ours.ms:.2f}x" if ours else ""]
        cells += [f"{row.floor_ms / form.ms:.0%}" if row.floor_ms else "", f"{form.spread:.1%}"]
        cells.append("" if form.extra_bytes is None else f"{form.extra_bytes / 2**20:,.0f}")
        cells += checked if name == "ours" else ["", ""]
        lines.append(f"| {row.name} | {name} | {' | '.join(cells)} |")
    return lines or [f"| {row.name} | ours | | | | | | {' | '.join(checked)} |"]


def geometric_means(rows: Sequence[Row]) -> dict[str, Any]:
    """Give the means over the rows that memory alone limits, and which rows they are over."""
    shares, times = {}, {}
    for row in rows:
        if row.by_bytes and row.floor_ms and "ours" in row.forms:
            shares[row.name] = row.floor_ms / row.forms["ours"].ms
            if "Liger" in row.forms:
                times[row.name] = row.forms["Liger"].ms / row.forms["ours"].ms
    found = {"floor_over_ours": shares, "liger_over_ours": times}
    return {
        name: {"mean": statistics.geometric_mean(each.values()), "over": list(each)}
        for name, each in found.items()
        if each
    }


def versions() -> dict[str, str]:
    """Give the versions of what is compared, where it is installed."""
    names = "torch", "triton", "liger-kernel", "cut-cross-entropy", "torchao"
    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions() if d.name}
    return {name: installed.get(name, "not installed") for name in names}


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table, and write it as JSON where asked to."""
    arguments = sys.argv[1:]
    file = Path(arguments.pop(arguments.index("--json") + 1)) if "--json" in arguments else None
    names = [a for a in arguments if a != "--json"] or list(KERNELS)
    bandwidth, flops = ceilings() if DEVICE.type == "cuda" else (1.0, 1.0)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, interpreted"
    say(f"{where}, {DTYPE}, {', '.join(f'{name} {version}' for name, version in versions().items())}")
    if DEVICE.type == "cuda":
        say(f"copy {bandwidth / 1e12:.2f} TB/s, matrices {flops / 1e12:.0f} TFLOP/s\n")
    say("| kernel | form | ms | to ours | floor / it | spread | extra MiB | error | repeats |\n|---|" + "---|" * 8)
    rows, notes, errors = [], [], {}
    children = [Child.start(measure, name, bandwidth, flops) for name in names]
    ready = {child.name: child.result() for child in children if DEVICE.type == "cuda"}
    for child in children:
        if isinstance(ready.get(child.name), Failure):
            found = ready[child.name]
        else:
            child.go()
            found = child.result()
        if isinstance(found, Failure):
            notes.append(f"{child.name} FAILED: {found.reason}")
            continue
        row, of_table, told = found
        say("\n".join(lines_of(row)))
        rows.append(row)
        errors |= of_table
        notes += told + [f"{child.name}: {form} is left out: {reason}" for form, reason in row.left_out.items()]
    say("\n" + "\n".join(notes))
    if errors:
        each = ", ".join(f"{form} {error:.2e}" for form, error in errors.items())
        say(f"linear_cross_entropy, the norm of the error of dw over that of dw: {each}")
    means = geometric_means(rows)
    for name, found in means.items():
        say(f"{name.replace('_', ' ')}, geometric mean {found['mean']:.3f}, over {', '.join(found['over'])}")
    if file is not None:
        facts = {"device": where, "dtype": str(DTYPE), "versions": versions()}
        facts |= {"copy_bytes_per_second": bandwidth, "matrix_flops": flops, "dw_errors": errors}
        facts |= {"geometric_means": means, "rows": [asdict(r) for r in rows]}
        facts |= {"notes": notes}
        file.write_text(json.dumps(facts, indent=1) + "\n")
    if len(rows) < len(names):
        sys.exit(1)


if __name__ == "__main__":
    main()
