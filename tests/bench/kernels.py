"""Each fused kernel on a GPU in bf16: its error beside PyTorch's own, whether it repeats, its time beside its peers.

    python tests/bench/kernels.py [NAME ...] [--json FILE]

Errors: the largest difference from the definition in float64 of each result and gradient, relative to the largest
number there; "error" is the worst of the kernel's over PyTorch's own in bf16, wanted at most 2. Repeats: 20 runs give
the same bits. Times: forward and backward together, medians over rounds that take turns (kernel, PyTorch eager, the
same compiled, Liger where it is installed); "floor" is bytes over the copy bandwidth of this run, or FLOPs over its
matrix throughput. On a CPU, under Triton's interpreter, only the small shapes run, in fp32 and without times: a check
of this script.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.config import GroupScore, Score
from deepseek_exp.kernels import attention, grouped, reference
from deepseek_exp.kernels.experts import routed_experts
from deepseek_exp.kernels.linear_cross_entropy import linear_cross_entropy
from deepseek_exp.kernels.local_global_attention import local_global_attention
from deepseek_exp.kernels.rms_norm import add_rms_norm, rms_norm
from deepseek_exp.kernels.rope import rope
from deepseek_exp.kernels.router import route
from deepseek_exp.kernels.swiglu import swiglu

Inputs = tuple[Any, ...]
ROUNDS, REPEATS = 9, 20


@dataclass
class Case:
    """What is measured.

    Attributes:
        kernel: ours.
        definition: in plain PyTorch, for errors.
        small: makes inputs for errors.
        large: makes inputs for times.
        wanted: which inputs get a gradient.
        floor: bytes and FLOPs that forward and backward cannot do without, of the large inputs.
        eager: PyTorch's fastest of its own; None: the definition.
        liger: makes Liger's form of it; None: it has none.
    """

    kernel: Callable[..., Any]
    definition: Callable[..., Any]
    small: Callable[[], Inputs]
    large: Callable[[], Inputs]
    wanted: tuple[int, ...]
    floor: Callable[[Inputs], tuple[float, float]]
    eager: Callable[..., Any] | None = None
    liger: Callable[[], Callable[..., Any]] | None = None


@dataclass
class Row:
    """What came out; times in milliseconds."""

    name: str
    error: float
    repeats: bool
    ours: float | None = None
    eager: float | None = None
    compiled: float | None = None
    liger: float | None = None
    floor: float | None = None
    spread: float | None = None


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE)


def heads(batch: int, n_heads: int, seq: int, width: int) -> Tensor:
    """Give heads as projections leave them: a transposed view of (batch, seq, heads, width)."""
    return rand(batch, seq, n_heads, width).transpose(1, 2)


def angles(seq: int, half: int) -> Inputs:
    turns = torch.rand(seq, half, device=DEVICE) * 6.3
    return turns.cos(), turns.sin()


def rows_of(*shape: int, n: int = 1, weight: bool = True) -> Callable[[], Inputs]:
    def make() -> Inputs:
        return (*(rand(*shape) for _ in range(n)), *((rand(shape[-1]), 1e-6) if weight else ()))

    return make


def head_rows(batch: int, n_heads: int, seq: int, width: int, turned: int, *, norm: bool) -> Callable[[], Inputs]:
    def make() -> Inputs:
        x, tables = heads(batch, n_heads, seq, width), angles(seq, turned // 2)
        return x, *tables, rand(width) if norm else None, 1e-6

    return make


def table(tokens: int, width: int, vocab: int) -> Callable[[], Inputs]:
    return lambda: (
        rand(tokens, width),
        rand(vocab, width, scale=width**-0.5),
        torch.randint(0, vocab, (tokens,), device=DEVICE),
    )


def mixture(tokens: int, k: int, n: int, d: int, f: int) -> Callable[[], Inputs]:
    def make() -> Inputs:
        ids = torch.rand(tokens, n, device=DEVICE).topk(k).indices
        weights = torch.rand(tokens, k, device=DEVICE)
        matrices = (rand(n, f, d, scale=d**-0.5), rand(n, f, d, scale=d**-0.5), rand(n, d, f, scale=f**-0.5))
        return rand(tokens, d), weights, *reference.sort_by_expert(ids, n), *matrices

    return make


def scored(tokens: int, n: int) -> Callable[[], Inputs]:
    chosen = (Score.sigmoid, 8, 8, 4, GroupScore.top2_sum, True, 2.5) if n >= 64 else (
        Score.softmax, 2, 1, 1, GroupScore.max, False, 1.0)  # fmt: skip
    return lambda: (torch.randn(tokens, n, device=DEVICE), torch.randn(n, device=DEVICE) / 10, None, *chosen)


def attended(batch: int, n_heads: int, n_kv: int, seq: int, width: int, window: int) -> Callable[[], Inputs]:
    def make() -> Inputs:
        q, k, v = (heads(batch, n, seq, width) for n in (n_heads, n_kv, n_kv))
        n_global = 4 if window else 0
        gate = torch.randn(n_heads, device=DEVICE).to(DTYPE) if window else None
        return q, k, v, gate, width**-0.5, 0, window, n_global

    return make


def grouped_experts(x_TD, weights_TK, order_R, inverse_R, ends_E, w_gate, w_up, w_down):
    """Do `reference.routed_experts` with PyTorch's grouped GEMM, as its users would."""
    x_RD = x_TD[order_R // weights_TK.shape[1]]
    hidden_RF = reference.swiglu(grouped.grouped_mm(x_RD, w_gate, ends_E), grouped.grouped_mm(x_RD, w_up, ends_E))
    y_TKD = grouped.grouped_mm(hidden_RF, w_down, ends_E)[inverse_R].unflatten(0, weights_TK.shape)
    return (weights_TK[:, None].to(y_TKD.dtype) @ y_TKD).squeeze(1)


def moved(times: float) -> Callable[[Inputs], tuple[float, float]]:
    """Count bytes as so many times the first input's."""
    return lambda inputs: (times * inputs[0].nbytes, 0.0)


def table_flops(inputs: Inputs) -> tuple[float, float]:
    return 0.0, 6.0 * inputs[0].numel() * inputs[1].shape[0]


def mixture_flops(inputs: Inputs) -> tuple[float, float]:
    return 0.0, 18.0 * inputs[1].numel() * inputs[5].shape[1] * inputs[5].shape[2]


def attention_flops(inputs: Inputs) -> tuple[float, float]:
    q, seq, window = inputs[0], inputs[0].shape[2], inputs[6]
    reach = seq / 2 if not window else window - window * window / 2 / seq
    return 0.0, 12.0 * q.numel() * reach  # forward 4 a pair and column, backward 8


def liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w, eps: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)


def liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def liger_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda h, w, t: LigerFusedLinearCrossEntropyFunction.apply(h, w, t)[0]


HEADS, LARGE_HEADS = (2, 3, 17, 64, 64), (8, 16, 2048, 128, 128)
CASES = {
    "rms_norm": Case(
        rms_norm, reference.rms_norm, rows_of(37, 200), rows_of(16384, 4096), (0, 1), moved(5), liger=liger_rms_norm
    ),
    "add_rms_norm": Case(
        add_rms_norm, reference.add_rms_norm, rows_of(37, 200, n=2), rows_of(16384, 4096, n=2), (0, 1, 2), moved(8)
    ),
    "swiglu": Case(
        swiglu, reference.swiglu, rows_of(37, 200, n=2, weight=False), rows_of(16384, 8192, n=2, weight=False),
        (0, 1), moved(8), liger=liger_swiglu,
    ),
    "rope": Case(
        rope, reference.rope, head_rows(*HEADS, norm=False), head_rows(*LARGE_HEADS, norm=False), (0,), moved(4)
    ),
    "rope with norm": Case(
        rope, reference.rope, head_rows(*HEADS, norm=True), head_rows(*LARGE_HEADS, norm=True), (0, 3), moved(5)
    ),
    "rope of a part": Case(
        rope, reference.rope, head_rows(2, 3, 17, 96, 32, norm=False), head_rows(8, 16, 2048, 192, 64, norm=False),
        (0,), moved(4),
    ),
    "linear_cross_entropy": Case(
        linear_cross_entropy, reference.linear_cross_entropy, table(70, 64, 300), table(16384, 2048, 32768),
        (0, 1), table_flops, liger=liger_cross_entropy,
    ),
    "routed_experts": Case(
        routed_experts, reference.routed_experts, mixture(40, 3, 8, 64, 32), mixture(16384, 6, 64, 2048, 1408),
        (0, 1, 5, 6, 7), mixture_flops, eager=grouped_experts,
    ),
    "route": Case(route, reference.route, scored(33, 8), scored(16384, 256), (0,), moved(5)),
    "window attention": Case(
        local_global_attention, reference.local_global_attention, attended(2, 4, 2, 70, 64, 16),
        attended(1, 16, 16, 8192, 128, 512), (0, 1, 2, 3), attention_flops, eager=attention.local_global_attention,
    ),
    "window 1024 attention": Case(
        local_global_attention, reference.local_global_attention, attended(2, 4, 2, 70, 64, 16),
        attended(1, 16, 16, 8192, 128, 1024), (0, 1, 2, 3), attention_flops, eager=attention.local_global_attention,
    ),
}  # fmt: skip


def leaves(inputs: Inputs, wanted: Sequence[int], dtype: torch.dtype | None = None) -> Inputs:
    """Give the inputs with gradients wanted of some, these in another type where one is given."""
    return tuple(
        t.detach().to(dtype or t.dtype).requires_grad_() if i in wanted and isinstance(t, Tensor) else t
        for i, t in enumerate(inputs)
    )


def outputs(function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Give the results that have a gradient."""
    out = function(*inputs)
    return [o for o in ([out] if isinstance(out, Tensor) else out) if o.requires_grad]


def results(case: Case, function: Callable[..., Any], inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Give results and gradients, under the same gradients from above."""
    given = leaves(inputs, case.wanted, dtype)
    outs = outputs(function, given)
    torch.manual_seed(1)
    above = [torch.randn(o.shape, device=DEVICE) for o in outs]
    torch.autograd.backward(outs, [a.to(o.dtype) for a, o in zip(above, outs, strict=True)])
    return [o.detach() for o in outs] + [t.grad for i, t in enumerate(given) if i in case.wanted and t is not None]


def check(case: Case) -> tuple[float, bool]:
    """Give the kernel's worst error over PyTorch's own, and whether it repeats."""
    inputs = case.small()
    exact, plain = results(case, case.definition, inputs, torch.float64), results(case, case.definition, inputs)
    worst = 0.0
    for a, b, c in zip(exact, plain, results(case, case.kernel, inputs), strict=True):
        least = torch.finfo(c.dtype).eps / 4 * a.abs().max().item()  # half a rounding: PyTorch may be exact by luck
        own = max((b.double() - a).abs().max().item(), least)
        worst = max(worst, (c.double() - a).abs().max().item() / own)
    inputs = case.large() if DEVICE.type == "cuda" else inputs
    first = results(case, case.kernel, inputs)
    repeats = all(
        torch.equal(a, b)
        for _ in range(REPEATS - 1)
        for a, b in zip(results(case, case.kernel, inputs), first, strict=True)
    )
    return worst, repeats


def milliseconds(functions: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Time functions in turns: for each its time in every round."""
    for function in functions:
        for _ in range(3):
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, found in zip(functions, times, strict=True):
            found.append(triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median"))
    return times


def both_ways(case: Case, function: Callable[..., Any], inputs: Inputs) -> Callable[[], None]:
    """Make a call of forward and backward."""
    given = leaves(inputs, case.wanted)
    above: list[Tensor] = []

    def run() -> None:
        outs = outputs(function, given)
        if not above:
            above.extend(torch.randn_like(o) for o in outs)
        torch.autograd.backward(outs, above)
        for t in given:
            if isinstance(t, Tensor):
                t.grad = None

    return run


def ceilings() -> tuple[float, float]:
    """Measure copied bytes (read and written) and bf16 matrix FLOPs a second."""
    a, b = torch.empty(2**30, dtype=torch.int8, device=DEVICE), torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    copy, product = milliseconds([lambda: b.copy_(a), lambda: x @ y])
    return 2 * 2**30 / statistics.median(copy) * 1e3, 2 * 8192**3 / statistics.median(product) * 1e3


def measure(name: str, case: Case, bandwidth: float, flops: float) -> Row:
    """Check and time one kernel."""
    row = Row(name, *check(case))
    if DEVICE.type == "cpu":
        return row
    inputs = case.large()
    plain = case.eager or case.definition
    runs = {"ours": case.kernel, "eager": plain, "compiled": torch.compile(plain, dynamic=False)}
    if case.liger is not None:
        with contextlib.suppress(ImportError):
            runs["liger"] = case.liger()
    times = milliseconds([both_ways(case, function, inputs) for function in runs.values()])
    for key, found in zip(runs, times, strict=True):
        setattr(row, key, statistics.median(found))
    row.spread = (max(times[0]) - min(times[0])) / row.ours
    n_bytes, n_flops = case.floor(inputs)
    row.floor = max(n_bytes / bandwidth, n_flops / flops) * 1e3
    return row


def beside(other: float | None, ours: float | None) -> str:
    return f"{other:.3f} ({other / ours:.2f}x)" if other is not None and ours else ""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table, and write it as JSON where asked to."""
    arguments = sys.argv[1:]
    file = Path(arguments.pop(arguments.index("--json") + 1)) if "--json" in arguments else None
    names = [a for a in arguments if a != "--json"] or list(CASES)
    bandwidth, flops = ceilings() if DEVICE.type == "cuda" else (1.0, 1.0)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, interpreted"
    say(f"{where}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}")
    if DEVICE.type == "cuda":
        say(f"copy {bandwidth / 1e12:.2f} TB/s, matrices {flops / 1e12:.0f} TFLOP/s; milliseconds\n")
    say("| | error | repeats | ours | floor | of floor | eager | compiled | Liger | spread |\n|---|" + "---|" * 9)
    rows = []
    for name in names:
        row = measure(name, CASES[name], bandwidth, flops)
        rows.append(row)
        cells = [f"{x:.3f}" if x is not None else "" for x in (row.ours, row.floor)]
        cells.append(f"{row.floor / row.ours:.0%}" if row.ours and row.floor else "")
        cells += [beside(x, row.ours) for x in (row.eager, row.compiled, row.liger)]
        cells.append(f"{row.spread:.1%}" if row.spread is not None else "")
        say(f"| {name} | {row.error:.2f} | {'yes' if row.repeats else 'NO'} | {' | '.join(cells)} |")
        torch.cuda.empty_cache()
    if file is not None:
        facts = {"device": where, "torch": torch.__version__, "triton": triton.__version__}
        facts |= {"copy_bytes_per_second": bandwidth, "matrix_flops": flops}
        file.write_text(json.dumps(facts | {"rows": [asdict(r) for r in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
