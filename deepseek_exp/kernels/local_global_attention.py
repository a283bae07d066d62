"""Attention over a local window and global keys that skips blocks of keys without a visible pair, both ways.

    s_ij = scale q_i . k_j - gate [j is global],  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij v_j
    delta_i = do_i . o_i,  ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij do_i,
    dgate = - sum of ds_ij over the global keys j

over the pairs (i, j) that masks.attention_mask shows. Softmax is invariant to a shift of all scores, so only the
global keys' log(1 - g) - log(g) = -gate remains of the definition's two factors. o, and therefore delta, is rounded to
the inputs' type; dgate is corrected for that, see backward_queries.

Source: Dao 2023, "FlashAttention-2", algorithms 1 and 2 (tiles, online softmax, and scores recomputed from lse); the
definition is reference.py's. Scores, sums and the gate are fp32; p and ds are rounded to the inputs' type for products.

Each visible pair is visited once, as one of two kinds. Local pairs lie in the window: a program loops over the blocks
between its first and last query's windows and masks only those on the borders or with global keys. Far pairs are those
of a global key outside the window: few keys but many queries, so their contribution to dk and dv is computed by the
programs of the queries, one partial sum each, and reduced afterwards. No atomics are used: results are
bit-reproducible.

If possible, the loops load their rows through tensor descriptors made on the host (the GPU's tensor memory accelerator,
here TMA): a loop then keeps no addresses in registers, so that a smaller tile does not spill and leaves room for two
programs per multiprocessor. See _described for the conditions; otherwise each thread loads from addresses.

Floor for N visible pairs, heads of D and V: 2 N (D + V) FLOP forward; backward 2 N (3 D + 2 V), of which the scores and
do . v are computed twice here: N (8 D + 6 V) in all. Bytes: q, k, v and the result read or written once forward, and
those with their gradients backward. Measured, forward and backward, 8192 tokens, 16 heads of 128, bf16 on an H200:
window 512 0.41 ms, 1024 0.66 ms (FlexAttention 0.60 and 0.85). As CUDA graphs 0.39 and 0.63 (by addresses 0.45 and
0.69), with 4 global keys and the gate 0.45 and 0.69 (0.53 and 0.78).

Shapes: B batch, H query heads, K key-value heads, S queries, T keys, D and V head widths, G global keys, P blocks per
head's queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_exp.kernels import attention
from deepseek_exp.kernels.operation import operation
from deepseek_exp.kernels.triton.local_global_attention import backward_keys, backward_queries, forward

# The widest supported head: above it, a tile of queries and one of keys leave no room to prefetch the next.
WIDEST = 256


class Tile(NamedTuple):
    """Launch constants of a kernel.

    Attributes:
        queries: queries per tile.
        keys: keys per tile.
        warps: groups of 32 threads that share a tile.
        stages: tiles that are being loaded or worked on.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of the forward pass, of the queries' gradients and of the keys' and values' gradients."""

    forward: Tile
    queries: Tile
    keys: Tile


# Tiles by head width, for 16-bit types. As compiled for compute capability 9.0, a multiprocessor has room for at least
# two programs of 4 warps, or one of 8; with far keys, loops that load from addresses spill registers.
TILES = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 128, 8, 3)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
}
# The entries that differ if rows are loaded through descriptors.
TMA_TILES = {128: TILES[128]._replace(keys=Tile(64, 64, 4, 2))}
FP32_TILES = Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
INTERPRETER_TILES = Tiles(Tile(32, 16, 1, 1), Tile(32, 16, 1, 1), Tile(16, 32, 1, 1))


def choose_tiles(q: Tensor, v: Tensor, tma: bool) -> Tiles:
    """Choose the tiles for queries and values: small on a CPU, so that tests see many blocks."""
    if not q.is_cuda:
        return INTERPRETER_TILES
    width = max(64, _width(max(q.shape[-1], v.shape[-1])))
    return FP32_TILES if q.element_size() > 2 else (TILES | TMA_TILES if tma else TILES)[width]


def local_global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    scale: float,
    n_memory: int,
    window: int,
    n_global_tokens: int,
) -> Tensor:
    """Compute `reference.local_global_attention`; same arguments and result, in fp32, fp16 and bf16.

    Heads wider than 256 and scales that are not positive go to PyTorch's kernels.
    """
    if max(q.shape[-1], v.shape[-1]) > WIDEST or scale <= 0:
        return attention.local_global_attention(q, k, v, gate, scale, n_memory, window, n_global_tokens)
    return _attention(q, k, v, gate, scale, n_memory, window, n_global_tokens)[0]


def _width(n: int) -> int:
    """Return the width of a tile that holds n numbers: at least 16, as products need."""
    return max(16, triton.next_power_of_2(n))


def _rows(t: Tensor) -> Tensor:
    """Make the numbers of a head contiguous, as they are in the output of projections."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _row_length(t: Tensor) -> int:
    """Return the distance from a token's first head to the end of its last."""
    return (t.shape[1] - 1) * t.stride(1) + t.shape[-1]


def _described(*tensors: Tensor) -> bool:
    """Return whether descriptors can replace tensors of heads (B, heads, tokens, width) whose last stride is 1.

    They can on GPUs with compute capability 9.0 or higher, for 16-bit types (the interpreter takes all), if a tile is
    as wide as a head, a token's heads lie in one row, and the strides of rows, heads and sequences are multiples of 16
    bytes. Outputs of projections and of kernels/rope.py meet this; those of PyTorch's rotation or a cache of several
    heads do not.
    """
    first = tensors[0]
    if first.is_cuda and (first.element_size() > 2 or torch.cuda.get_device_capability(first.device) < (9, 0)):
        return False
    return all(
        t.numel() > 0
        and t.shape[-1] == _width(t.shape[-1])
        and t.data_ptr() % 16 == 0
        and all(stride > 0 and stride * t.element_size() % 16 == 0 for stride in t.stride()[:3])
        and _row_length(t) <= t.stride(2)
        for t in tensors
    )


def _describe(t: Tensor, rows: int, tma: bool) -> Tensor | TensorDescriptor:
    """Describe tiles of a head's rows, for a tensor (B, heads, tokens, width), if tma.

    The descriptor sees a sequence as a matrix of tokens by the numbers of a row, so that reads out of bounds are 0.
    """
    if not tma:
        return t
    shape, strides = [t.shape[0], t.shape[2], _row_length(t)], [t.stride(0), t.stride(2), 1]
    return TensorDescriptor(t, shape, strides, [1, rows, t.shape[-1]])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


class _Plan(NamedTuple):
    """How the queries of a head are split into blocks.

    Attributes:
        counts: of tokens: queries, keys, memory, window, global keys, and the first block of queries with far keys.
        n_blocks: number of blocks of queries.
        n_far: number of blocks with far keys.
        g_tile: global keys per tile.
    """

    counts: tuple[int, int, int, int, int, int]
    n_blocks: int
    n_far: int
    g_tile: int


def _plan(q: Tensor, k: Tensor, counts: tuple[int, int, int], tile: Tile) -> _Plan:
    (n_memory, window, n_global), n_queries, n_keys = counts, q.shape[2], k.shape[2]
    window = min(window, n_keys) or n_keys
    n_global = max(0, min(n_global, n_keys - n_memory))
    n_blocks = triton.cdiv(n_queries, tile.queries)
    # The first query whose window no longer contains every global key is at position n_memory + window.
    row = n_memory + window - (n_keys - n_queries)
    first_far = max(0, row // tile.queries) if n_global and row < n_queries else n_blocks
    counts = n_queries, n_keys, n_memory, window, n_global, first_far
    return _Plan(counts, n_blocks, n_blocks - first_far, min(tile.keys, _width(n_global)))


def _constants(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, plan: _Plan, tile: Tile, tma: bool
) -> dict[str, int]:
    """Return the constants that a kernel is compiled for."""
    return dict(
        TMA=tma, GATED=gate is not None, FAR=plan.n_far > 0, N_REP=q.shape[1] // k.shape[1],
        D=q.shape[-1], V=v.shape[-1], D_TILE=_width(q.shape[-1]), V_TILE=_width(v.shape[-1]),
        QUERIES=tile.queries, KEYS=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, scale: float, counts: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    q, k, v = map(_rows, (q, k, v))
    n_batch, n_heads, n_queries, _ = q.shape
    tma = _described(q, k, v)
    tile = choose_tiles(q, v, tma).forward
    plan = _plan(q, k, counts, tile)
    out = q.new_empty(n_batch, n_queries, n_heads, v.shape[-1])
    lse = q.new_empty(n_batch, n_heads, n_queries, dtype=torch.float32)
    forward[(plan.n_blocks, n_heads, n_batch)](
        _describe(q, tile.queries, tma), _describe(k, tile.keys, tma), _describe(v, tile.keys, tma), k, v,
        lse if gate is None else gate, out, lse, scale, *_strides(q, k, v), *plan.counts,
        G_TILE=plan.g_tile, **_constants(q, k, v, gate, plan, tile, tma),
    )  # fmt: skip
    return out.transpose(1, 2), lse  # (B, H, S, V), (B, H, S)


def _launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, out: Tensor, lse: Tensor, scale: float,
    counts: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad, q, k, v, out = map(_rows, (grad, q, k, v, out))
    (n_batch, n_heads, n_queries, width), (_, n_kv_heads, n_keys, v_width) = q.shape, v.shape
    tma, no_gate = _described(grad, q, k, v), lse if gate is None else gate
    tiles = choose_tiles(q, v, tma)
    plan = _plan(q, k, counts, tiles.queries)
    dq = q.new_empty(n_batch, n_queries, n_heads, width)
    stats = lse.new_empty(n_batch, n_heads, n_queries, 2, 4)  # lse and delta
    dgate_BHP = lse.new_empty(n_batch, n_heads, plan.n_blocks)
    # dk and dv of far keys per key-value head, and per block of its query heads.
    far = lse.new_empty(n_batch, n_kv_heads, n_heads // n_kv_heads * plan.n_far, plan.counts[4], width + v_width)
    backward_queries[(plan.n_blocks, n_heads, n_batch)](
        grad, q, _describe(k, tiles.queries.keys, tma), _describe(v, tiles.queries.keys, tma), k, v,
        no_gate, out, lse, stats, dq, dgate_BHP, far, scale, *_strides(grad, q, k, v, out), *plan.counts,
        G_TILE=plan.g_tile, **_constants(q, k, v, gate, plan, tiles.queries, tma),
    )  # fmt: skip
    if plan.n_far:
        far = far.sum(2)  # (B, K, G, D + V)
    dk, dv = q.new_empty(n_batch, n_keys, n_kv_heads, width), q.new_empty(n_batch, n_keys, n_kv_heads, v_width)
    backward_keys[(triton.cdiv(n_keys, tiles.keys.keys), n_kv_heads, n_batch)](
        _describe(grad, tiles.keys.queries, tma), _describe(q, tiles.keys.queries, tma), k, v,
        no_gate, stats, dk, dv, far, scale, *_strides(grad, q, k, v), *plan.counts[:-1],
        **_constants(q, k, v, gate, plan, tiles.keys, tma),
    )  # fmt: skip
    dgate = lse.new_empty(0) if gate is None else dgate_BHP.sum((0, 2)).to(gate.dtype)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dgate


@operation("local_global_attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, scale: float, n_memory: int, window: int, n_global: int
) -> tuple[Tensor, Tensor]:
    """Return the result and, in base 2, the logarithm of each query's softmax denominator."""
    return _launch_forward(q, k, v, gate, scale, (n_memory, window, n_global))


@operation("local_global_attention_backward")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, n_memory: int, window: int, n_global: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch_backward(grad, q, k, v, gate, out, lse, scale, (n_memory, window, n_global))


def _like_heads(t: Tensor, width: int) -> Tensor:
    n_batch, n_heads, n_tokens, _ = t.shape
    return t.new_empty(n_batch, n_tokens, n_heads, width).transpose(1, 2)  # (batch, heads, tokens, width)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, scale: float, n_memory: int, window: int, n_global: int
) -> tuple[Tensor, Tensor]:
    return _like_heads(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, n_memory: int, window: int, n_global: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dgate = lse.new_empty(0) if gate is None else torch.empty_like(gate)
    return *(_like_heads(t, t.shape[-1]) for t in (q, k, v)), dgate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, gate, *output)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: a checkpoint recomputes them on every access
    *grads, dgate = _attention_backward(grad, *saved, *ctx.numbers)
    return *grads, None if saved[3] is None else dgate, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
