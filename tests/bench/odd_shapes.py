"""Errors of local-global attention and routed experts in odd shapes, tensor by tensor, on a GPU in bf16.

    python tests/bench/odd_shapes.py [--seeds N] [--shapes N] [--processes N]

First a few named shapes, each with N seeds, then random ones, a seed each. An error is the largest difference from the
definition in float64 relative to the largest number there; every input, also the gradient from above, is rounded to
bf16 for all. For each result and gradient the table has

    ours      error of the kernel over that of the definition in bf16, the median and the worst over the seeds
    PyTorch   the same for PyTorch's fastest form (scaled_dot_product_attention, grouped GEMM)
    roundings error of the kernel in halves of a bf16 rounding of the largest number, the median

and for the gate's gradient `one delta`: the ratio that fp32 arithmetic gets with delta from a result rounded to bf16,
as FlashAttention computes it. A definition's error below a quarter rounding counts as that much: where a tensor has few
numbers, it can be exact by luck, so a worst ratio alone says little. A median above 2 in a named shape is marked.

On a CPU, under Triton's interpreter, the first named shape of each in fp32 and with one seed: a check of this script.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from deepseek_exp.kernels import attention, masks, reference
from deepseek_exp.kernels.local_global_attention import local_global_attention
from deepseek_exp.kernels.routed_experts import routed_experts
from tests.bench.kernel_cases import DEVICE, DTYPE, Inputs, attended, grouped_experts, mixture

ATTENTION, EXPERTS = "attention", "experts"
TENSORS = {
    ATTENTION: ("out", "dq", "dk", "dv", "dgate"),
    EXPERTS: ("out", "dx", "dweights", "dw_gate", "dw_up", "dw_down"),
}
ONE_DELTA = "dgate, one delta"
WANTED = {ATTENTION: (0, 1, 2, 3), EXPERTS: (0, 1, 5, 6, 7)}
LIMIT = 2.0


@dataclass(frozen=True)
class Shape:
    """One operation in one shape.

    Attributes:
        name: in the table; shapes of one name are one row for each tensor.
        operation: ATTENTION or EXPERTS.
        sizes: arguments of `attended` or `mixture`.
        seed: of the inputs.
    """

    name: str
    operation: str
    sizes: tuple[int, ...]
    seed: int

    def inputs(self) -> Inputs:
        """Make the inputs."""
        torch.manual_seed(self.seed)
        return (attended if self.operation == ATTENTION else mixture)(*self.sizes)()


# batch, heads, key-value heads, positions, width of a head, window, global keys
NAMED_ATTENTION = {
    "window 1, 33 global keys, heads of 96": (1, 2, 2, 64, 96, 1, 33),
    "the same, 16 heads": (2, 16, 16, 64, 96, 1, 33),
    "window 1, 4 global keys": (1, 4, 2, 128, 64, 1, 4),
    "window 7, 5 global keys": (1, 4, 2, 65, 64, 7, 5),
    "window 64, 4 global keys": (1, 4, 4, 512, 64, 64, 4),
}
# tokens, experts of a token, experts, d_model, d_expert
NAMED_EXPERTS = {
    "one token, 8 of 16 experts": (1, 8, 16, 64, 64),
    "the same, wider": (1, 8, 16, 512, 264),
    "300 tokens, 2 of 8 experts": (300, 2, 8, 256, 128),
}


def named_shapes(n_seeds: int) -> list[Shape]:
    """List the named shapes with every seed."""
    both = ((ATTENTION, NAMED_ATTENTION), (EXPERTS, NAMED_EXPERTS))
    return [Shape(n, o, s, seed) for o, shapes in both for n, s in shapes.items() for seed in range(n_seeds)]


def random_shapes(n_shapes: int) -> list[Shape]:
    """Draw odd shapes; of what kernels are compiled for, few values, for that takes most of the time."""
    pick = torch.Generator().manual_seed(14)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=pick))

    def one_of(*values: int) -> int:
        return values[number(0, len(values) - 1)]

    shapes = []
    for i in range(n_shapes):
        if i % 3 < 2:
            kv, rep = number(1, 3), one_of(1, 2)
            sizes = (number(1, 2), kv * rep, kv, number(2, 300), one_of(64, 96), one_of(1, 2, 7, 16, 33, 100))
            shapes.append(Shape("random attention", ATTENTION, (*sizes, one_of(1, 4, 33)), i))
        else:
            n = number(2, 24)
            sizes = (number(1, 200), one_of(1, 2, 6) if n >= 6 else 1, n, 8 * number(2, 40), 8 * number(2, 40))
            shapes.append(Shape("random experts", EXPERTS, sizes, i))
    return shapes


def results(operation: str, function: Callable[..., Any], inputs: Inputs, above: Tensor, dtype: torch.dtype | None):
    """Return the result and the gradients of the wanted inputs, computed in a type (None: the inputs' own)."""
    given = [
        t.detach().to(dtype or t.dtype).requires_grad_() if i in WANTED[operation] else t for i, t in enumerate(inputs)
    ]
    out = function(*given)
    out.backward(above.to(out.dtype))
    return [out.detach(), *(given[i].grad for i in WANTED[operation])]


def rounded_delta(inputs: Inputs, above: Tensor) -> Tensor:
    """Compute the gate's gradient in fp32, except that delta comes from a result that was rounded."""
    q, k, v, gate, scale, n_memory, window, n_global = inputs
    n_rep = q.shape[1] // k.shape[1]
    q, k, v = q.float(), *(t.float().repeat_interleave(n_rep, dim=1) for t in (k, v))
    visible, is_global = masks.attention_mask(
        q.shape[2], k.shape[2], n_memory, window, n_global, q.device
    )  # (queries, keys), (keys,)
    scores = q @ k.transpose(-1, -2) * scale - gate.float()[:, None, None] * is_global
    p = scores.masked_fill(~visible, float("-inf")).softmax(-1)  # (batch, heads, queries, keys)
    delta = (above.float() * (p @ v).to(DTYPE).float()).sum(-1, keepdim=True)
    ds = p * (above.float() @ v.transpose(-1, -2) - delta)
    return -(ds * is_global).sum((0, 2, 3)).to(gate.dtype)  # (heads,)


def measure(shape: Shape) -> list[tuple[str, str, float, float, float]]:
    """Return for each tensor: the shape's name, the tensor's, ratios of ours and PyTorch's, and ours in roundings."""
    inputs, operation = shape.inputs(), shape.operation
    attends = operation == ATTENTION
    definition = reference.local_global_attention if attends else reference.routed_experts
    kernel = local_global_attention if attends else routed_experts
    fastest = attention.local_global_attention if attends else grouped_experts
    above = torch.randn(definition(*inputs).shape, device=DEVICE).to(DTYPE)
    exact = results(operation, definition, inputs, above, torch.float64)
    plain, ours, theirs = (results(operation, f, inputs, above, None) for f in (definition, kernel, fastest))
    names = list(TENSORS[operation])
    if attends:  # as one more tensor
        names.append(ONE_DELTA)
        exact, plain, theirs = ([*tensors, tensors[-1]] for tensors in (exact, plain, theirs))
        ours = [*ours, rounded_delta(inputs, above)]
    rows = []
    for name, a, b, c, d in zip(names, exact, plain, ours, theirs, strict=True):
        rounding = torch.finfo(DTYPE).eps / 2 * a.abs().max().item()
        own = max((b.double() - a).abs().max().item(), rounding / 2)
        error, other = ((t.double() - a).abs().max().item() for t in (c, d))
        rows.append((shape.name, name, error / own, other / own, error / max(rounding, 1e-30)))
    return rows


def report(rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Make the table."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for shape, tensor, *numbers in rows:
        found[shape, tensor].append(tuple(numbers))
    lines = [f"{'shape':38} {'tensor':17} {'n':>3}  {'ours':>13} {'PyTorch':>13} {'roundings':>9}"]
    for (shape, tensor), values in found.items():
        ours, theirs, roundings = (sorted(column) for column in zip(*values, strict=True))
        a, b = (f"{statistics.median(c):5.2f} {c[-1]:7.2f}" for c in (ours, theirs))
        marked = "  <--" if statistics.median(ours) > LIMIT and tensor != ONE_DELTA else ""
        lines.append(f"{shape:38} {tensor:17} {len(values):3}  {a} {b} {statistics.median(roundings):9.2f}{marked}")
    return "\n".join(lines)


def main() -> None:
    """Measure in several processes, since most of the time goes to compiling, and print the table."""
    on_gpu = DEVICE.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=9 if on_gpu else 1)
    parser.add_argument("--shapes", type=int, default=100)
    parser.add_argument("--processes", type=int, default=8 if on_gpu else 1)
    wanted = parser.parse_args()
    started, shapes = time.monotonic(), [*named_shapes(wanted.seeds), *random_shapes(wanted.shapes)]
    if not on_gpu:  # the interpreter needs many seconds for each
        shapes = [s for s in shapes if s.name in (next(iter(NAMED_ATTENTION)), next(iter(NAMED_EXPERTS)))]
    with multiprocessing.get_context("spawn").Pool(wanted.processes) as pool:
        rows = [row for some in pool.map(measure, shapes, chunksize=max(1, wanted.seeds // 3)) for row in some]
    sys.stdout.write(f"{report(rows)}\n{len(shapes)} shapes in {time.monotonic() - started:.0f} s, {DTYPE}\n")


if __name__ == "__main__":
    main()
