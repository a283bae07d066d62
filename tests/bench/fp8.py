"""Products in fp8 on a GPU: the rounding kernel, the products alone, a linear layer and routed experts, beside bf16.

    python tests/bench/fp8.py

Checked first: the kernel gives the definition's bits, computed on the CPU; forward and gradients repeat bit for bit.
Times in milliseconds, medians over rounds in which all forms of a row take turns. torchao's Float8Linear (tensorwise,
compiled) is measured where it is installed. Errors are relative norms of the difference from bf16's operands in fp32.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.kernels import fp8, reference, routed_experts
from deepseek_exp.kernels.triton import fp8_quantize

TOKENS, SHAPES = 16384, [(3072, 8192), (8192, 3072), (2048, 5632)]
EXPERTS_TOKENS = [16384, 65536]
D_MODEL, D_EXPERT, N_EXPERTS, TOP_K = 2048, 1408, 64, 6
ROUNDS, REPEATS = 7, 5
DEVICE = torch.device("cuda")


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16()


def times(forms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Give the milliseconds of each form: medians over rounds that take turns."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        for _ in range(2):
            form()
    for _ in range(ROUNDS):
        for name, form in forms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # so that launches are ahead of the device
            start.record()
            for _ in range(REPEATS):
                form()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) / REPEATS)
    return {name: statistics.median(values) for name, values in found.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(torch.uint8).cpu() for t in (a, b)))


def check() -> list[str]:
    """Compare the kernel with the definition, computed on the CPU, bit for bit; names what differs."""
    wrong = []
    magnitudes = (4 * torch.randn(1000, 3072, device=DEVICE)).exp2()
    for dtype in reference.FP8_LARGEST:
        for x in (rand(1000, 3072), (rand(1000, 3072) * magnitudes).bfloat16(), torch.zeros_like(rand(40, 64))):
            wanted, scale = reference.quantize_fp8(x.cpu(), dtype)
            parts = fp8.largest([x], True)
            q, q_T, found = fp8.cast([x], parts, dtype, 0, True, as_is=True, transposed=True)
            n_off = int((q.view(torch.uint8).cpu() != wanted.view(torch.uint8)).sum())
            if n_off or not same_bits(q_T[:, : len(x)], q.view(torch.uint8).T) or found.item() != scale.item():
                wrong.append(f"{dtype}: {n_off} of {x.numel()} differ, scale {found.item()} and {scale.item()}")
            rows, by_row = fp8_quantize.cast_rows(x, dtype), reference.quantize_fp8(x.cpu(), dtype, by_row=True)
            if not all(same_bits(a, b) for a, b in zip(rows, by_row, strict=True)):
                wrong.append(f"{dtype}: rows differ")
    for bad in (float("nan"), float("inf")):
        x, layer = rand(64, 64), nn.Linear(64, 64, bias=False, device=DEVICE, dtype=torch.bfloat16)
        x[3, 5] = bad
        if not fp8.linears(x, [layer], fused=True)[0].isnan().all():
            wrong.append(f"{bad} is not seen")
    return wrong


def rounding() -> tuple[list[str], list[str]]:
    """Time the kernels against a copy."""
    x = rand(TOKENS, 8192)
    out, parts = torch.empty_like(x), fp8.largest([x], True)

    def cast(as_is: bool, transposed: bool) -> Callable[[], object]:
        return lambda: fp8.cast([x], parts, fp8.INPUT, 0, True, as_is=as_is, transposed=transposed)

    forms = {
        "copy": (lambda: out.copy_(x), 4), "largest": (lambda: fp8.largest([x], True), 2),
        "cast both": (cast(True, True), 4), "cast as it is": (cast(True, False), 3),
        "cast transposed": (cast(False, True), 3), "cast rows": (lambda: fp8_quantize.cast_rows(x, fp8.INPUT), 3),
    }  # fmt: skip
    found = times({name: form for name, (form, _) in forms.items()})
    cells = [f"{found[name]:.3f} ({forms[name][1] * x.numel() / found[name] / 1e6:,.0f} GB/s)" for name in forms]
    return list(forms), [f"rounding {TOKENS} x 8192", *cells]


def trained(apply: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x.grad = weight.grad = None
    y = apply(x)
    y.backward(grad)
    return [y.detach(), x.grad, weight.grad]


def linear(d_in: int, d_out: int) -> tuple[list[str], list[str]]:
    """Time products and a whole layer; the widths are those of the layer."""
    x, grad = rand(TOKENS, d_in).requires_grad_(), rand(TOKENS, d_out, scale=1e-3)
    layer = nn.Linear(d_in, d_out, bias=False, device=DEVICE, dtype=torch.bfloat16)
    xd, wd = x.detach(), layer.weight.detach()
    q, _, s = fp8.cast([xd], fp8.largest([xd], True), fp8.INPUT, 0, True, as_is=True)
    w, _, t = fp8.cast([wd], fp8.largest([wd], True), fp8.INPUT, 0, True, as_is=True)

    def ours(x: Tensor) -> Tensor:
        return fp8.linears(x, [layer], fused=True)[0]

    def run(apply: Callable[[Tensor], Tensor], own: Tensor) -> Callable[[], object]:
        return lambda: trained(apply, x, own, grad)

    forms = {
        "mm bf16": lambda: xd @ wd.T,
        "mm fp8 fast": lambda: fp8.product(q, w, s, t, torch.bfloat16, fast=True),
        "mm fp8": lambda: fp8.product(q, w, s, t, torch.bfloat16, fast=False),
        "layer bf16": run(layer, layer.weight),
        "layer fp8": run(ours, layer.weight),
    }
    peer = torchao_layer(layer)
    if peer is not None:
        forms["layer torchao"] = run(torch.compile(peer, dynamic=False), peer.weight)
    found = times(forms)
    exact = [xd.float() @ wd.float().T, grad.float() @ wd.float(), grad.float().T @ xd.float()]
    first, again = (trained(ours, x, layer.weight, grad) for _ in range(2))
    repeats = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    errors = [f"{((a - b).norm() / b.norm()).item():.3f}" for a, b in zip(first, exact, strict=True)]
    work = 2 * TOKENS * d_in * d_out / 1e9
    rates = [f"{found[n]:.3f} ({(1 if n.startswith('mm') else 3) * work / found[n]:,.0f} TFLOP/s)" for n in found]
    rates += ["not here"] * (peer is None)
    head = [*found, *["layer torchao"] * (peer is None), "errors y, dx, dw", "repeats"]
    return head, [f"{d_in} -> {d_out}", *rates, ", ".join(errors), str(repeats)]


def torchao_layer(layer: nn.Linear) -> nn.Module | None:
    """Give torchao's form of a layer, with a weight of its own; None where it is not installed."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        return None
    model = nn.Sequential(nn.Linear(layer.in_features, layer.out_features, bias=False, device=DEVICE))
    model = model.bfloat16()
    return convert_to_float8_training(model, config=Float8LinearConfig())[0]


def routed(tokens: int) -> tuple[list[str], list[str]]:
    """Time the routed experts of a layer, forward and backward."""
    ids = torch.rand(tokens, N_EXPERTS, device=DEVICE).topk(TOP_K).indices
    order, inverse, ends = reference.sort_by_expert(ids, N_EXPERTS)
    x, weights = rand(tokens, D_MODEL).requires_grad_(), torch.rand(tokens, TOP_K, device=DEVICE).requires_grad_()
    shapes = (N_EXPERTS, D_EXPERT, D_MODEL), (N_EXPERTS, D_EXPERT, D_MODEL), (N_EXPERTS, D_MODEL, D_EXPERT)
    stacks, grad = [rand(*shape, scale=0.02).requires_grad_() for shape in shapes], rand(tokens, D_MODEL, scale=1e-3)

    def run(function: Callable[..., Tensor], **how: bool) -> list[Tensor]:
        y = function(x, weights, order, inverse, ends, *stacks, **how)
        return [y.detach(), *torch.autograd.grad(y, (x, weights, *stacks), grad)]

    forms = {
        "experts bf16": lambda: run(routed_experts.routed_experts),
        "experts fp8": lambda: run(routed_experts.routed_experts_in_fp8, fused=True),
    }
    found, wide, narrow, again = times(forms), forms["experts bf16"](), *(forms["experts fp8"]() for _ in range(2))
    repeats = all(torch.equal(a, b) for a, b in zip(narrow, again, strict=True))
    errors = [f"{((a - b).float().norm() / b.float().norm()).item():.3f}" for a, b in zip(narrow, wide, strict=True)]
    work = 18 * tokens * TOP_K * D_MODEL * D_EXPERT / 1e9
    cells = [f"{t:.3f} ({work / t:,.0f} TFLOP/s)" for t in found.values()]
    head = [*found, "from bf16: y, dx, dweights, dw_gate, dw_up, dw_down", "repeats"]
    return head, [f"{N_EXPERTS} experts, top {TOP_K}, {tokens} tokens", *cells, ", ".join(errors), str(repeats)]


def main() -> None:
    """Print the tables."""
    wrong = check()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {TOKENS} tokens")
    say("the kernel equals the definition bit for bit: " + ("yes" if not wrong else "NO: " + "; ".join(wrong)))
    shown = None
    layers = (functools.partial(linear, *shape) for shape in SHAPES)
    for row in (rounding, *layers, *(functools.partial(routed, tokens) for tokens in EXPERTS_TOKENS)):
        try:
            head, cells = row()
        except Exception as error:  # one that this machine cannot run must not end the others
            say(f"{type(error).__name__}: {error}"[:400])
            continue
        if head != shown:
            shown = head
            say(f"\n| | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
        say(f"| {' | '.join(cells)} |")
        torch.cuda.empty_cache()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
