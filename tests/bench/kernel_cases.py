"""The operations with gradients that `kernels.py` measures: their inputs, definitions, floors and peers.

Not among the peers: Liger has no norm of heads before the rotary positions, no rotation of a part of a head that starts
behind the others, no routed experts of this form and no windowed attention. Its rotation, which works in place, reads
and writes as many bytes as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepseek_exp.config import GroupScore, Score
from deepseek_exp.kernels import attention, grouped, reference
from deepseek_exp.kernels.local_global_attention import local_global_attention
from deepseek_exp.kernels.routed_experts import routed_experts
from deepseek_exp.kernels.triton.linear_cross_entropy import linear_cross_entropy
from deepseek_exp.kernels.triton.rms_norm import add_rms_norm, rms_norm
from deepseek_exp.kernels.triton.rope import rope
from deepseek_exp.kernels.triton.router import route
from deepseek_exp.kernels.triton.swiglu import swiglu
from tests.bench.turns import one_line

Inputs = tuple[Any, ...]
Function = Callable[..., Any]
Call = Callable[[], Any]
REPEATS = 20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@dataclass
class Case:
    """An operation with its gradients.

    Attributes:
        kernel: ours.
        definition: in plain PyTorch, for errors.
        small: makes inputs for errors.
        large: makes inputs for times.
        wanted: which inputs get a gradient.
        floor: bytes and FLOPs that forward and backward cannot do without, of the large inputs.
        eager: PyTorch's fastest of its own; None: the definition.
        peers: name -> makes another's form of it, or raises where that is not there.
        by_bytes: memory alone limits it.
        graphed: it is timed as a CUDA graph, for its launches may take the host longer than the GPU.
        has_memory: whether what it allocates is measured.
    """

    kernel: Function
    definition: Function
    small: Callable[[], Inputs]
    large: Callable[[], Inputs]
    wanted: tuple[int, ...]
    floor: Callable[[Inputs], tuple[float, float]]
    eager: Function | None = None
    peers: dict[str, Callable[[], Function]] = field(default_factory=dict)
    by_bytes: bool = False
    graphed: bool = True
    has_memory: bool = True

    def functions(self) -> dict[str, Callable[[], Function]]:
        """Give the makers of all forms, ours first."""
        plain = self.eager or self.definition
        makers = {"ours": lambda: self.kernel, "PyTorch eager": lambda: plain}
        return {**makers, "PyTorch compiled": lambda: torch.compile(plain, dynamic=False), **self.peers}

    def forms(self, inputs: Inputs) -> dict[str, Callable[[], Call]]:
        """Give for each form what makes a call of it, forward and backward.

        Each has inputs of its own: Liger's SwiGLU and rotation write over theirs.
        """
        return {
            name: lambda make=make: both_ways(make(), leaves(copied(inputs), self.wanted))
            for name, make in self.functions().items()
        }

    def check(self) -> tuple[float | None, bool]:
        """Give the kernel's worst error over PyTorch's own, and whether it repeats."""
        inputs = self.small()
        exact = results(self, self.definition, inputs, torch.float64)
        plain, ours = results(self, self.definition, inputs), results(self, self.kernel, inputs)
        inputs = self.large() if DEVICE.type == "cuda" else inputs
        return worst_ratio(exact, plain, ours), repeats(lambda: results(self, self.kernel, inputs))


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


def queries_and_keys(batch: int, n_heads: int, n_kv: int, seq: int, width: int) -> Callable[[], Inputs]:
    return lambda: (heads(batch, n_heads, seq, width), heads(batch, n_kv, seq, width), *angles(seq, width // 2))


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


def attended(
    batch: int, n_heads: int, n_kv: int, seq: int, width: int, window: int, n_global: int = 4
) -> Callable[[], Inputs]:
    def make() -> Inputs:
        q, k, v = (heads(batch, n, seq, width) for n in (n_heads, n_kv, n_kv))
        gate = torch.randn(n_heads, device=DEVICE).to(DTYPE) if n_global else None
        return q, k, v, gate, width**-0.5, 0, window, n_global

    return make


def grouped_experts(x_TD, weights_TK, order_R, inverse_R, offsets_E, w_gate, w_up, w_down):
    """Do `reference.routed_experts` with PyTorch's grouped GEMM, as its users would."""
    x_RD = x_TD[order_R // weights_TK.shape[1]]
    hidden_RF = reference.swiglu(grouped.grouped_mm(x_RD, w_gate, offsets_E), grouped.grouped_mm(x_RD, w_up, offsets_E))
    y_TKD = grouped.grouped_mm(hidden_RF, w_down, offsets_E)[inverse_R].unflatten(0, weights_TK.shape)
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


def leaves(inputs: Inputs, wanted: Sequence[int], dtype: torch.dtype | None = None) -> Inputs:
    """Give the inputs with gradients wanted of some, these in another type where one is given."""
    return tuple(
        t.detach().to(dtype or t.dtype).requires_grad_() if i in wanted and isinstance(t, Tensor) else t
        for i, t in enumerate(inputs)
    )


def copied(inputs: Inputs) -> Inputs:
    return tuple(t.clone() if isinstance(t, Tensor) else t for t in inputs)


def outputs(function: Function, inputs: Inputs) -> list[Tensor]:
    """Give the results that have a gradient."""
    out = function(*inputs)
    return [o for o in ([out] if isinstance(out, Tensor) else out) if o.requires_grad]


def results(case: Case, function: Function, inputs: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Give results and gradients, under the same gradients from above."""
    given = leaves(inputs, case.wanted, dtype)
    outs = outputs(function, given)
    torch.manual_seed(1)
    above = [torch.randn(o.shape, device=DEVICE).to(DTYPE) for o in outs]  # the same numbers for float64
    torch.autograd.backward(outs, [a.to(o.dtype) for a, o in zip(above, outs, strict=True)])
    return [o.detach() for o in outs] + [t.grad for i, t in enumerate(given) if i in case.wanted and t is not None]


def both_ways(function: Function, given: Inputs) -> Call:
    """Make a call of forward and backward; a loss has the gradient 1 from above, as in training."""
    above: list[Tensor] = []
    wanted = [t for t in given if isinstance(t, Tensor) and t.requires_grad]

    def run() -> None:
        outs = outputs(function, given)
        if not above:
            above.extend(torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in outs)
        torch.autograd.grad(outs, wanted, above)

    return run


def as_graph(function: Call) -> Call:
    """Capture a call into a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(keep: Call = function) -> None:  # which holds what the graph reads
        graph.replay()

    return replay


def worst_ratio(exact: Sequence[Tensor], plain: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    """Give the worst over tensors of our largest error by PyTorch's."""
    worst = 0.0
    for a, b, c in zip(exact, plain, ours, strict=True):
        least = torch.finfo(c.dtype).eps / 4 * a.abs().max().item()  # half a rounding: PyTorch may be exact by luck
        own = max((b.double() - a).abs().max().item(), least)
        worst = max(worst, (c.double() - a).abs().max().item() / own)
    return worst


def repeats(compute: Callable[[], Sequence[Tensor]]) -> bool:
    """Say whether REPEATS computations give the same bits."""
    first = compute()
    return all(torch.equal(a, b) for _ in range(REPEATS - 1) for a, b in zip(compute(), first, strict=True))


def table_errors(case: Case, tell: Callable[[str], None]) -> dict[str, float]:
    """Give for each form of linear_cross_entropy the error of the table's gradient, at the large size on a GPU.

    It is the norm of the difference from float64 over the norm of that. A form that cannot run is told and left out.
    """
    h, weight, targets = inputs = case.large() if DEVICE.type == "cuda" else case.small()
    exact = torch.zeros(weight.shape, dtype=torch.float64, device=DEVICE)
    for h_TD, target_T in zip(h.double().split(1024), targets.split(1024), strict=True):
        g_TV = (h_TD @ weight.double().T).softmax(-1)
        g_TV[torch.arange(len(target_T), device=DEVICE), target_T] -= 1
        exact.addmm_(g_TV.T, h_TD, alpha=1 / len(h))
    found = {}
    for name, make in case.functions().items():
        given = leaves(copied(inputs), case.wanted)
        try:
            outputs(make(), given)[0].backward()
        except Exception as error:  # what one of the peers lacks must not end the others
            tell(f"the error of {name} is left out: {one_line(error)}")
            continue
        found[name] = ((given[1].grad.double() - exact).norm() / exact.norm()).item()
    return found


def liger_rms_norm() -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w, eps: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False)


def liger_add_rms_norm() -> Function:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, y, w, eps: LigerFusedAddRMSNormFunction.apply(y, x, w, eps, 0.0, "llama", False)


def liger_swiglu() -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def liger_rope() -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    return lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos, sin, None, 1, 2 * cos.shape[-1])


def liger_cross_entropy(wide: bool) -> Callable[[], Function]:
    """Make the maker of Liger's form; wide: it adds up the table's gradient in fp32."""

    def make() -> Function:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        # the arguments after the targets, up to accum_dtype; all but that are the defaults
        rest = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32 if wide else None)
        return lambda h, w, t: LigerFusedLinearCrossEntropyFunction.apply(h, w, t, *rest)[0]

    return make


def flex_attention() -> Function:
    """Give PyTorch's FlexAttention, compiled, with a mask of blocks and the gate among the scores."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled = torch.compile(flex, dynamic=False)
    masks: dict[tuple[int, ...], Any] = {}

    def attend(q, k, v, gate, scale, n_memory, window, n_global):
        def visible(batch, head, i, j):
            return (i >= j) & ((i - j < window) | (j < n_global))

        def gated(score, batch, head, i, j):
            return score - torch.where(j < n_global, gate[head].float(), 0.0)

        sizes = q.shape[2], k.shape[2]
        if sizes not in masks:
            masks[sizes] = create_block_mask(visible, None, None, *sizes, device=q.device)
        return compiled(
            q, k, v, gated if gate is not None else None, masks[sizes], scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    return attend


def cut_cross_entropy() -> Function:
    """Give Apple's form at its defaults, which leave gradients below 2^-12 out."""
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda h, w, t: cut(h, w, t, impl="cce")


def of_both(turn: Function) -> Function:
    """Turn queries and keys."""
    return lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin))


HEADS, LARGE_HEADS = (2, 3, 17, 64, 64), (8, 16, 2048, 128, 128)
CASES = {
    "rms_norm": Case(
        rms_norm, reference.rms_norm, rows_of(37, 200), rows_of(16384, 4096), (0, 1), moved(5),
        peers={"Liger": liger_rms_norm}, by_bytes=True,
    ),
    "add_rms_norm": Case(
        add_rms_norm, reference.add_rms_norm, rows_of(37, 200, n=2), rows_of(16384, 4096, n=2), (0, 1, 2), moved(8),
        peers={"Liger": liger_add_rms_norm}, by_bytes=True,
    ),
    "swiglu": Case(
        swiglu, reference.swiglu, rows_of(37, 200, n=2, weight=False), rows_of(16384, 8192, n=2, weight=False),
        (0, 1), moved(8), peers={"Liger": liger_swiglu}, by_bytes=True,
    ),
    "rope": Case(
        of_both(rope), of_both(reference.rope),
        queries_and_keys(2, 3, 1, 17, 64), queries_and_keys(8, 16, 4, 2048, 128), (0, 1),
        lambda inputs: (4.0 * (inputs[0].nbytes + inputs[1].nbytes), 0.0),
        peers={"Liger": liger_rope}, by_bytes=True,
    ),
    "rope with norm": Case(
        rope, reference.rope, head_rows(*HEADS, norm=True), head_rows(*LARGE_HEADS, norm=True), (0, 3), moved(5),
        by_bytes=True,
    ),
    "rope of a part": Case(
        rope, reference.rope, head_rows(2, 3, 17, 96, 32, norm=False), head_rows(8, 16, 2048, 192, 64, norm=False),
        (0,), moved(4), by_bytes=True,
    ),
    "linear_cross_entropy": Case(
        linear_cross_entropy, reference.linear_cross_entropy, table(70, 64, 300), table(16384, 2048, 32768),
        (0, 1), table_flops,
        peers={
            "Liger": liger_cross_entropy(wide=False), "Liger, fp32 sums": liger_cross_entropy(wide=True),
            "cut-cross-entropy": cut_cross_entropy,
        },
        graphed=False,
    ),
    "routed_experts": Case(
        routed_experts, reference.routed_experts, mixture(40, 3, 8, 64, 32), mixture(16384, 6, 64, 2048, 1408),
        (0, 1, 5, 6, 7), mixture_flops, eager=grouped_experts, graphed=False,
    ),
    "route": Case(route, reference.route, scored(33, 8), scored(16384, 256), (0,), moved(5)),
    **{
        f"attention, window {window}, {n_global} global": Case(
            local_global_attention, reference.local_global_attention, attended(2, 4, 2, 70, 64, 16, n_global),
            attended(1, 16, 16, 8192, 128, window, n_global), (0, 1, 2, 3), attention_flops,
            eager=attention.local_global_attention, peers={"FlexAttention": flex_attention},
        )
        for window in (512, 1024)
        for n_global in (0, 4)
    },
}  # fmt: skip
