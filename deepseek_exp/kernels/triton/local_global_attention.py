"""The Triton kernels of local_global_attention.py, which describes what they compute.

Every tensor is read with arbitrary strides except the last, which is 1, and written as (B, S or T, heads, width). With
TMA the rows that loops read come through descriptors of (B, S or T, numbers of a token's heads), each for tiles of one
head: in forward those of q, k and v, in backward_queries of k and v, in backward_keys of q and grad. far_k and far_v
are always k and v by address.

Suffixes: M queries and N keys per tile, G global keys per tile, D width of queries and keys, V of values. Positions i
of queries and j of keys are counted from the first key, the memory's.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# The initial maximum of a row's scores: finite, because differences of two maxima are computed.
NO_SCORE = tl.constexpr(-1e30)
# The precision of fp32 products: no other type is rounded for a product.
EXACT = tl.constexpr("ieee")
# lse and delta are stored in stats, each in the first of four numbers: for a tile with fewer numbers than a program has
# threads, the compiler would make every thread load its part number by number.
FOUR = tl.constexpr(4)
# Minimum number of blocks in a loop: if ptxas cannot prove that there is one, it serialises the products.
AT_LEAST_ONE = tl.constexpr(1)
# Token counts that Triton must not specialise kernels on.
COUNTS = ["n_queries", "n_keys", "n_memory", "window", "n_global", "first_far"]


@triton.jit
def _at(batch, head, stride_b, stride_h, TMA: tl.constexpr):
    """Return where a head's rows begin: a batch and column of a descriptor, or an offset from an address."""
    if TMA:
        return batch.to(tl.int32), (head * stride_h).to(tl.int32)
    else:
        return batch * stride_b + head * stride_h


@triton.jit
def _load(
    x, at, start, stride, n_rows, COLS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Load the rows from start on of a head's n_rows by COLS numbers; 0 out of bounds."""
    if TMA:
        return tl.reshape(x.load([at[0], start, at[1]]), (ROWS, WIDTH))
    else:
        rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
        here = rows < n_rows - start
        if WIDTH != COLS:
            here = here & (cols < COLS)
        return tl.load(x + at + start.to(tl.int64) * stride + rows * stride + cols, here, 0.0)


@triton.jit
def _load_column(stats, at, here, ROWS: tl.constexpr):
    """Load one number of stats per row."""
    all_R4 = tl.load(stats + at[:, None] * (2 * FOUR) + tl.arange(0, FOUR)[None, :], here[:, None], 0.0)
    left_R2, _ = tl.split(tl.reshape(all_R4, (ROWS, FOUR // 2, 2)))
    left_R, _ = tl.split(left_R2)
    return left_R


@triton.jit
def _load_both(
    k, v, k_at, v_at, start, k_s, v_s, n_rows, D: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, D_TILE: tl.constexpr, V_TILE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    k_ND = _load(k, k_at, start, k_s, n_rows, D, ROWS, D_TILE, TMA)
    return k_ND, _load(v, v_at, start, v_s, n_rows, V, ROWS, V_TILE, TMA)


@triton.jit
def _store(x, base, start, stride, n_rows, COLS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    here = (rows < n_rows - start) & (cols < COLS)
    tl.store(base + start.to(tl.int64) * stride + rows * stride + cols, x.to(base.dtype.element_ty), here)


@triton.jit
def _bias(gate, head, scale, GATED: tl.constexpr):
    """Return the term added to the unscaled products of queries and global keys: -gate / scale."""
    bias = 0.0
    if GATED:
        bias = -tl.load(gate + head).to(tl.float32) / scale
    return bias


@triton.jit
def _masked(scores, i, j, bias, n_memory, window, n_global, GATED: tl.constexpr, FAR: tl.constexpr):
    """Bias the global keys, and mask everything but the local pairs, or the far pairs, of the positions i and j."""
    distance = i - j
    # One comparison for both ends of the window: as unsigned numbers, negative distances are the largest.
    local = distance.to(tl.uint32, bitcast=True) < window.to(tl.uint32, bitcast=True)
    is_global = (j >= n_memory) & (j < n_memory + n_global)
    if GATED:
        scores += tl.where(is_global, bias, 0.0)
    visible = is_global & (distance >= window) if FAR else local
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _key_blocks(first, last, n_memory, window, n_global, GATED: tl.constexpr, KEYS: tl.constexpr):
    """Return where the windows of queries at the positions first to last begin, and which blocks need no mask or bias.

    Returns:
        The first key; the number of blocks before the unmasked ones, up to their end, and in total.
    """
    start = tl.maximum(first - window + 1, 0)
    partial = last - window + 1
    if GATED:
        partial = tl.maximum(partial, n_memory + n_global)
    head = tl.cdiv(tl.maximum(partial - start, 0), KEYS)
    return start, head, (first + 1 - start) // KEYS, tl.cdiv(last + 1 - start, KEYS)


@triton.jit
def _add_keys(scores, v, top, total, out, scale):
    """Add one tile of keys to the running maximum, sum and result of each query (online softmax)."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=EXACT)
    return new_top, total * shrink + tl.sum(p, 1), out


@triton.jit
def _gradient_of_scores(scores, grad, v, lse, delta, scale):
    """Return the weights of keys for queries, and the gradient of the scores, also used for the gate."""
    p = tl.exp2(scores * scale - lse[:, None])
    return p, p * (tl.dot(grad, tl.trans(v), input_precision=EXACT) - delta[:, None])


@triton.jit
def _any_global(key, n_memory, n_global, KEYS: tl.constexpr):
    return (key < n_memory + n_global) & (key + KEYS > n_memory)


@triton.jit
def _add_to_gate(dgate, share, error, p, ds, key, j, n_memory, n_global, KEYS: tl.constexpr):
    """Add one tile of keys j, from key on, to the sums that `backward_queries` computes the gate's gradient from.

    Few tiles contain global keys.
    """
    if _any_global(key, n_memory, n_global, KEYS):
        is_global = (j >= n_memory) & (j < n_memory + n_global)
        dgate += tl.sum(tl.where(is_global, ds, 0.0), 1)
        share += tl.sum(tl.where(is_global, p, 0.0), 1)
    return dgate, share, error + tl.sum(ds, 1)


@triton.jit(do_not_specialize=COUNTS)
def forward(
    q, k, v, far_k, far_v, gate, out, lse, scale, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    n_queries, n_keys, n_memory, window, n_global, first_far,
    TMA: tl.constexpr, GATED: tl.constexpr, FAR: tl.constexpr, N_REP: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    D_TILE: tl.constexpr, V_TILE: tl.constexpr, G_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute attention: one program per tile of a head's queries."""
    # Without a window the last queries see the most keys: they start first.
    block, n_heads = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = block * QUERIES
    first = n_keys - n_queries + row
    i_M = (first + tl.arange(0, QUERIES))[:, None]
    q_MD = _load(q, _at(batch, head, q_b, q_h, TMA), row, q_s, n_queries, D, QUERIES, D_TILE, TMA)
    bias = _bias(gate, head, scale, GATED)
    top_M = tl.full((QUERIES,), NO_SCORE, tl.float32)
    total_M = tl.zeros((QUERIES,), tl.float32)
    out_MV = tl.zeros((QUERIES, V_TILE), tl.float32)
    if FAR:
        far_k += _at(batch, head // N_REP, k_b, k_h, False)
        far_v += _at(batch, head // N_REP, v_b, v_h, False)
        for tile in range(tl.where(block >= first_far, tl.cdiv(n_global, G_TILE), 0)):
            key = n_memory + tile * G_TILE
            k_GD, v_GV = _load_both(
                far_k, far_v, 0, 0, key, k_s, v_s, n_memory + n_global, D, V, G_TILE, D_TILE, V_TILE, False
            )  # fmt: skip
            j_G = (key + tl.arange(0, G_TILE))[None, :]
            scores_MG = tl.dot(q_MD, tl.trans(k_GD), input_precision=EXACT)
            scores_MG = _masked(scores_MG, i_M, j_G, bias, n_memory, window, n_global, GATED, True)
            top_M, total_M, out_MV = _add_keys(scores_MG, v_GV, top_M, total_M, out_MV, scale * LOG2_E)
    last = tl.minimum(first + QUERIES, n_keys) - 1
    start, whole, whole_end, n_blocks = _key_blocks(first, last, n_memory, window, n_global, GATED, KEYS)
    k_at, v_at = _at(batch, head // N_REP, k_b, k_h, TMA), _at(batch, head // N_REP, v_b, v_h, TMA)
    # After the loop over far keys ptxas overlaps products without AT_LEAST_ONE; with it, it does not.
    for tile in range(n_blocks if FAR else tl.maximum(n_blocks, AT_LEAST_ONE)):
        key = start + tile * KEYS
        k_ND, v_NV = _load_both(k, v, k_at, v_at, key, k_s, v_s, n_keys, D, V, KEYS, D_TILE, V_TILE, TMA)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=EXACT)
        if (tile < whole) | (tile >= whole_end):
            j_N = (key + tl.arange(0, KEYS))[None, :]
            scores_MN = _masked(scores_MN, i_M, j_N, bias, n_memory, window, n_global, GATED, False)
        top_M, total_M, out_MV = _add_keys(scores_MN, v_NV, top_M, total_M, out_MV, scale * LOG2_E)
    out += (batch * n_queries * n_heads + head) * V
    _store(out_MV / total_M[:, None], out, row, n_heads * V, n_queries, V, QUERIES, V_TILE)
    rows = row + tl.arange(0, QUERIES)
    tl.store(lse + (batch * n_heads + head) * n_queries + rows, top_M + tl.log2(total_M), rows < n_queries)


@triton.jit
def _far_gradients(
    q_MD, grad_MV, k, v, far, lse_M, delta_M, dq_MD, dgate_M, share_M, error_M, i_M, bias, scale, k_s, v_s,
    n_memory, window, n_global,
    GATED: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    D_TILE: tl.constexpr, V_TILE: tl.constexpr, G_TILE: tl.constexpr,
):  # fmt: skip
    """Add far keys to dq and the gate's sums, and store these queries' term of dk, not yet scaled, and of dv."""
    for tile in range(tl.cdiv(n_global, G_TILE)):
        key = n_memory + tile * G_TILE
        k_GD, v_GV = _load_both(
            k, v, 0, 0, key, k_s, v_s, n_memory + n_global, D, V, G_TILE, D_TILE, V_TILE, False
        )  # fmt: skip
        j_G = (key + tl.arange(0, G_TILE))[None, :]
        scores_MG = tl.dot(q_MD, tl.trans(k_GD), input_precision=EXACT)
        scores_MG = _masked(scores_MG, i_M, j_G, bias, n_memory, window, n_global, GATED, True)
        p_MG, ds_MG = _gradient_of_scores(scores_MG, grad_MV, v_GV, lse_M, delta_M, scale * LOG2_E)
        if GATED:
            dgate_M, share_M, error_M = _add_to_gate(
                dgate_M, share_M, error_M, p_MG, ds_MG, key, j_G, n_memory, n_global, G_TILE
            )  # fmt: skip
        ds_MG = ds_MG.to(q_MD.dtype)
        dq_MD = tl.dot(ds_MG, k_GD, dq_MD, input_precision=EXACT)
        dk_GD = tl.dot(tl.trans(ds_MG), q_MD, input_precision=EXACT)
        dv_GV = tl.dot(tl.trans(p_MG.to(grad_MV.dtype)), grad_MV, input_precision=EXACT)
        _store(dk_GD, far, key - n_memory, D + V, n_global, D, G_TILE, D_TILE)
        _store(dv_GV, far + D, key - n_memory, D + V, n_global, V, G_TILE, V_TILE)
    return dq_MD, dgate_M, share_M, error_M


@triton.jit(do_not_specialize=COUNTS)
def backward_queries(
    grad, q, k, v, far_k, far_v, gate, out, lse, stats, dq, dgate, far, scale,
    g_b, g_h, g_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    n_queries, n_keys, n_memory, window, n_global, first_far,
    TMA: tl.constexpr, GATED: tl.constexpr, FAR: tl.constexpr, N_REP: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    D_TILE: tl.constexpr, V_TILE: tl.constexpr, G_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute dq, stats, and partial sums of dgate and of far keys' dk and dv: one program per tile of queries.

    delta comes from a rounded result, so all ds of a query have an error: the error of delta times their p. In dgate, a
    sum of ds, these errors accumulate. The exact ds of a query sum to 0, so the sum of the computed ones is the error;
    it is subtracted, times the global keys' total p.
    """
    block, n_heads = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = block * QUERIES
    first = n_keys - n_queries + row
    i_M = (first + tl.arange(0, QUERIES))[:, None]
    q_at, grad_at = _at(batch, head, q_b, q_h, False), _at(batch, head, g_b, g_h, False)
    q_MD, grad_MV = _load_both(
        q, grad, q_at, grad_at, row, q_s, g_s, n_queries, D, V, QUERIES, D_TILE, V_TILE, False
    )  # fmt: skip
    out_MV = _load(out, _at(batch, head, o_b, o_h, False), row, o_s, n_queries, V, QUERIES, V_TILE, False)
    rows = row + tl.arange(0, QUERIES)
    at = (batch * n_heads + head) * n_queries + rows
    lse_M = tl.load(lse + at, rows < n_queries, float("inf"))  # past the last query every p is 0
    delta_M = tl.sum(grad_MV.to(tl.float32) * out_MV.to(tl.float32), 1)
    tl.store(stats + at * (2 * FOUR), lse_M, rows < n_queries)
    tl.store(stats + at * (2 * FOUR) + FOUR, delta_M, rows < n_queries)
    bias = _bias(gate, head, scale, GATED)
    dq_MD = tl.zeros((QUERIES, D_TILE), tl.float32)
    dgate_M = tl.zeros((QUERIES,), tl.float32)
    share_M = tl.zeros((QUERIES,), tl.float32)
    error_M = tl.zeros((QUERIES,), tl.float32)
    last = tl.minimum(first + QUERIES, n_keys) - 1
    start, whole, whole_end, n_blocks = _key_blocks(first, last, n_memory, window, n_global, GATED, KEYS)
    k_at, v_at = _at(batch, head // N_REP, k_b, k_h, TMA), _at(batch, head // N_REP, v_b, v_h, TMA)
    for tile in range(tl.maximum(n_blocks, AT_LEAST_ONE)):
        key = start + tile * KEYS
        k_ND, v_NV = _load_both(k, v, k_at, v_at, key, k_s, v_s, n_keys, D, V, KEYS, D_TILE, V_TILE, TMA)
        j_N = (key + tl.arange(0, KEYS))[None, :]
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=EXACT)
        if (tile < whole) | (tile >= whole_end):
            scores_MN = _masked(scores_MN, i_M, j_N, bias, n_memory, window, n_global, GATED, False)
        p_MN, ds_MN = _gradient_of_scores(scores_MN, grad_MV, v_NV, lse_M, delta_M, scale * LOG2_E)
        if GATED:
            dgate_M, share_M, error_M = _add_to_gate(
                dgate_M, share_M, error_M, p_MN, ds_MN, key, j_N, n_memory, n_global, KEYS
            )  # fmt: skip
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=EXACT)
    if FAR and block >= first_far:
        n_far = tl.num_programs(0) - first_far
        far += ((batch * n_heads + head) * n_far + block - first_far) * n_global * (D + V)
        far_k += _at(batch, head // N_REP, k_b, k_h, False)
        far_v += _at(batch, head // N_REP, v_b, v_h, False)
        # Loaded again: registers held through the loop above would leave no room for a second program.
        q_MD, grad_MV = _load_both(
            q, grad, q_at, grad_at, row, q_s, g_s, n_queries, D, V, QUERIES, D_TILE, V_TILE, False
        )  # fmt: skip
        dq_MD, dgate_M, share_M, error_M = _far_gradients(
            q_MD, grad_MV, far_k, far_v, far, lse_M, delta_M, dq_MD, dgate_M, share_M, error_M,
            i_M, bias, scale, k_s, v_s,
            n_memory, window, n_global, GATED, D, V, D_TILE, V_TILE, G_TILE,
        )  # fmt: skip
    dq += (batch * n_queries * n_heads + head) * D
    _store(dq_MD * scale, dq, row, n_heads * D, n_queries, D, QUERIES, D_TILE)
    if GATED:
        tl.store(dgate + (batch * n_heads + head) * tl.num_programs(0) + block, tl.sum(share_M * error_M - dgate_M))


@triton.jit(do_not_specialize=COUNTS)
def backward_keys(
    grad, q, k, v, gate, stats, dk, dv, far, scale,
    g_b, g_h, g_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    n_queries, n_keys, n_memory, window, n_global,
    TMA: tl.constexpr, GATED: tl.constexpr, FAR: tl.constexpr, N_REP: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    D_TILE: tl.constexpr, V_TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv: one program per tile of a key-value head's keys, over all its query heads."""
    key, n_kv_heads = tl.program_id(0) * KEYS, tl.num_programs(1)
    kv_head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offset = n_keys - n_queries
    j_N = (key + tl.arange(0, KEYS))[:, None]
    k_at, v_at = _at(batch, kv_head, k_b, k_h, False), _at(batch, kv_head, v_b, v_h, False)
    k_ND, v_NV = _load_both(k, v, k_at, v_at, key, k_s, v_s, n_keys, D, V, KEYS, D_TILE, V_TILE, False)
    dk_ND = tl.zeros((KEYS, D_TILE), tl.float32)
    dv_NV = tl.zeros((KEYS, V_TILE), tl.float32)
    if FAR and _any_global(key, n_memory, n_global, KEYS):
        rows = j_N - n_memory
        here = (rows >= 0) & (rows < n_global)
        far += (batch * n_kv_heads + kv_head) * n_global * (D + V)
        cols_D, cols_V = tl.arange(0, D_TILE)[None, :], tl.arange(0, V_TILE)[None, :]
        dk_ND = tl.load(far + rows * (D + V) + cols_D, here & (cols_D < D), 0.0)
        dv_NV = tl.load(far + rows * (D + V) + D + cols_V, here & (cols_V < V), 0.0)
    # Queries from the block's first key to the end of the last one's window; those in between see the full block.
    start = tl.maximum(key - offset, 0)
    n_blocks = tl.cdiv(tl.maximum(tl.minimum(key + KEYS - 1 + window - offset, n_queries) - start, 0), QUERIES)
    whole = tl.cdiv(tl.maximum(key + KEYS - 1 - offset - start, 0), QUERIES)
    whole_end = tl.maximum(window + key - offset - start, 0) // QUERIES
    if GATED:
        whole_end = tl.where(_any_global(key, n_memory, n_global, KEYS), 0, whole_end)
    n_blocks = tl.maximum(n_blocks, AT_LEAST_ONE)  # keys that no query sees get one fully masked block
    for step in range(N_REP * n_blocks):
        head, tile = kv_head * N_REP + step // n_blocks, step % n_blocks
        row = start + tile * QUERIES
        q_at, grad_at = _at(batch, head, q_b, q_h, TMA), _at(batch, head, g_b, g_h, TMA)
        q_MD, grad_MV = _load_both(q, grad, q_at, grad_at, row, q_s, g_s, n_queries, D, V, QUERIES, D_TILE, V_TILE, TMA)
        scores_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=EXACT)
        dp_NM = tl.dot(v_NV, tl.trans(grad_MV), input_precision=EXACT)
        rows = row + tl.arange(0, QUERIES)
        at = (batch * n_kv_heads * N_REP + head) * n_queries + rows
        lse_M = _load_column(stats, at, rows < n_queries, QUERIES)
        if (tile < whole) | (tile >= whole_end):
            i_M = (offset + rows)[None, :]
            bias = _bias(gate, head, scale, GATED)
            scores_NM = _masked(scores_NM, i_M, j_N, bias, n_memory, window, n_global, GATED, False)
        p_NM = tl.exp2(scores_NM * (scale * LOG2_E) - lse_M[None, :])
        dv_NV = tl.dot(p_NM.to(grad_MV.dtype), grad_MV, dv_NV, input_precision=EXACT)
        delta_M = _load_column(stats + FOUR, at, rows < n_queries, QUERIES)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision=EXACT)
    dk += (batch * n_keys * n_kv_heads + kv_head) * D
    dv += (batch * n_keys * n_kv_heads + kv_head) * V
    _store(dk_ND * scale, dk, key, n_kv_heads * D, n_keys, D, KEYS, D_TILE)
    _store(dv_NV, dv, key, n_kv_heads * V, n_keys, V, KEYS, V_TILE)
