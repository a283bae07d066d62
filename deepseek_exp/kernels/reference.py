"""The operations in plain PyTorch: the definition of correct that every faster implementation is tested against.

Shapes: B batch, H query heads, K key-value heads, S queries, T keys, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_exp.config import GroupScore, Score
from deepseek_exp.kernels.masks import attention_mask, document_mask

# Number of elements of an optimizer's moment that share one scale.
BLOCK = 256
# The largest number of each 8-bit floating-point type.
FP8_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# Lower bound of the magnitude in a scale: its inverse times FP8_LARGEST is still finite in fp32.
FP8_LEAST = 2.0**-100


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector to unit root mean square: y = x / sqrt(mean(x^2) + eps) * weight.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", section 4. Computed in fp32 for any input
    type, as in Llama.

    Args:
        x: (..., d_model), any floating type.
        weight: (d_model,).
        eps: added to the mean square.

    Returns:
        (..., d_model), the type of x.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(normed.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise the result: s = x + y, and rms_norm(s).

    Args:
        x: (..., d_model), the stream.
        y: the same shape and type, the output of one half of a block.
        weight: (d_model,).
        eps: added to the mean square.

    Returns:
        s and the normed s, each (..., d_model) in the type of x.
    """
    added = x + y
    return added, rms_norm(added, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Rotate the pair (x_i, x_{i + R/2}) of each head's last R columns by the angle of its position.

    y_i = x_i cos - x_{i+R/2} sin,  y_{i+R/2} = x_{i+R/2} cos + x_i sin; the other columns are unchanged.
    Sources: Su et al. 2021, "RoFormer", section 3.2.2; the members of a pair are R/2 apart as in Llama's Hugging Face
    layout, not adjacent as in the paper. Heads that rotate in part: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.3.

    Args:
        x: (B, heads, S, D).
        cos: (S, R / 2), fp32; R is at most D.
        sin: (S, R / 2), fp32.
        norm_weight: (D,), of an `rms_norm` of each head before the rotation, as in QK norm; or None.
        eps: of that norm.

    Returns:
        (B, heads, S, D), the type of x.
    """
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    half = cos.shape[-1]
    still, a, b = x.split(
        [x.shape[-1] - 2 * half, half, half], dim=-1
    )  # (batch, heads, seq, D - R), twice (..., R / 2)
    cos, sin = (t if x.dtype == torch.float64 else t.float() for t in (cos, sin))
    return torch.cat([still, a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)  # (batch, heads, seq, head_dim)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate a hidden layer: silu(gate) * up, element by element.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """
    return F.silu(gate) * up


def top_k_swiglu(gate: Tensor, up: Tensor, k: int) -> Tensor:
    """Keep the k hidden units of each token with the largest gates: silu(gate) * up there, 0 elsewhere.

    Our reading of the sources' "sparse activation"; only the gates of the kept units get a gradient, as for a ReLU.

    Args:
        gate: (..., d_ff).
        up: (..., d_ff).
        k: number of units to keep; ties with the k-th gate are all kept.

    Returns:
        (..., d_ff).
    """
    border = gate.topk(k, dim=-1).values[..., -1:]  # (..., 1)
    return torch.where(gate >= border, F.silu(gate) * up, 0)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix: y_r = weight_g x_r for the rows offsets[g-1] <= r < offsets[g].

    Args:
        x: (rows, d_in), sorted by group.
        weight: (groups, d_out, d_in).
        offsets: (groups,) int32, where each group ends; a group may be empty. Rows past the last end belong to none.

    Returns:
        (rows, d_out); rows that belong to no group are 0 here and undefined in faster implementations.
    """
    borders = [0, *offsets.tolist()]
    groups = [x[a:b] @ w.T for a, b, w in zip(borders, borders[1:], weight, strict=False)]
    return torch.cat([*groups, x.new_zeros(len(x) - borders[-1], weight.shape[1])])


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    open_TE: Tensor | None,
    score: Score,
    top_k: int,
    n_groups: int,
    top_k_groups: int,
    group_score: GroupScore,
    norm_top_k: bool,
    route_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the experts of each token and their weights: the top_k of s + bias, and s of those.

    s = softmax(logits) or sigmoid(logits); only experts of the top_k_groups best of n_groups groups of adjacent experts
    are candidates; weights are divided by their sum + 1e-20 if norm_top_k, and multiplied by route_scale. The order of
    ties is unspecified. Sources: DeepSeek-AI 2024, "DeepSeek-V2", section 2.2.2, and "DeepSeek-V3 Technical Report",
    section 2.1.2.

    Args:
        logits_TE: (T, E), in fp32 or wider.
        bias_E: (E,), added for the choice only; None means 0. It gets no gradient.
        open_TE: (T, E) bool, the experts that a token may use, over which the scores are normalised; None means all. If
            there are fewer candidates than top_k, other experts fill the remaining places.
        score: softmax or sigmoid.
        top_k: experts per token.
        n_groups: number of groups, of E / n_groups experts each.
        top_k_groups: number of groups that a token's experts may come from.
        group_score: score of a group: its best s + bias, the sum of its two best, or the sum of all.
        norm_top_k: whether weights are normalised.
        route_scale: factor on the weights.

    Returns:
        ids: (T, top_k) int64, the best first.
        weights: (T, top_k).
        scores: (T, E), s without the bias; 0 if an expert is not open.
    """
    if open_TE is not None:
        logits_TE = logits_TE.masked_fill(~open_TE, float("-inf"))
    scores_TE = logits_TE.softmax(-1) if score is Score.softmax else logits_TE.sigmoid()
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if open_TE is not None:
        choice_TE = choice_TE.masked_fill(~open_TE, float("-inf"))
    if n_groups > 1:
        choice_TE = _within_groups(choice_TE.unflatten(1, (n_groups, -1)), top_k_groups, group_score)
    ids_TK = _best(choice_TE, top_k)
    weights_TK = scores_TE.gather(1, ids_TK)
    if norm_top_k:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * route_scale, scores_TE


def _within_groups(in_groups: Tensor, top_k_groups: int, group_score: GroupScore) -> Tensor:
    """Mask (tokens, groups, experts per group) with -inf outside the best groups: (tokens, experts)."""
    if group_score is GroupScore.sum:
        score_TG = in_groups.sum(-1)
    else:
        score_TG = in_groups.topk(1 if group_score is GroupScore.max else 2, dim=-1).values.sum(-1)
    keep_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter(1, _best(score_TG, top_k_groups), True)
    return in_groups.masked_fill(~keep_TG[..., None], float("-inf")).flatten(1)


def _best(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of each row: (rows, k)."""
    return scores.topk(k, dim=-1).indices


def sort_by_expert(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the rows t * K + k by their experts; the sort is stable.

    Args:
        ids_TK: (T, K) int64, the experts of each token; n_experts marks a dropped row: such rows come last.
        n_experts: number of experts.

    Returns:
        order: (T * K,) int64, sorted row -> t * K + k.
        inverse: (T * K,) int64, the inverse permutation.
        offsets: (n_experts,) int32, where each expert's sorted rows end.
    """
    ids_R, order_R = ids_TK.flatten().sort(stable=True)
    experts = torch.arange(n_experts, device=ids_R.device)
    return order_R, order_R.argsort(), torch.searchsorted(ids_R, experts, right=True).int()


def permute(x_TD: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """Copy each token to its K rows.

    Args:
        x_TD: (T, D), the tokens.
        inverse_TK: (T, K) int64, a token's rows, all different.
        offsets_E: (E,) int32; rows from the last end on were dropped.

    Returns:
        (T * K, D); the content of dropped rows is undefined, and they get no gradient.
    """
    x_RD = x_TD[inverse_TK.flatten().argsort() // inverse_TK.shape[1]]
    kept_R = torch.arange(len(x_RD), device=x_RD.device) < offsets_E[-1]
    return torch.where(kept_R[:, None], x_RD, 0)


def unpermute(y_RD: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum each token's rows: (T, D).

    Args:
        y_RD: (T * K, D), the rows.
        inverse_TK: (T, K) int64, a token's rows, all different.
        offsets_E: (E,) int32; rows from the last end on were dropped: they count as 0, and their gradient is undefined.
    """
    return torch.where((inverse_TK < offsets_E[-1])[:, :, None], y_RD[inverse_TK], 0).sum(1)


def routed_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    inverse_R: Tensor,
    offsets_E: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
) -> Tensor:
    """Return the weighted sum of each token's experts: y_t = sum over its rows r of weight_r * expert_r(x_t).

    An expert is down(silu(gate x) * (up x)). Token t has the K rows t * K + k, here sorted by expert. Source: Dai et
    al. 2024, "DeepSeekMoE", section 2.

    Args:
        x_TD: (T, D), the tokens.
        weights_TK: (T, K), of each token's experts.
        order_R: (T * K,) int64, sorted row -> t * K + k.
        inverse_R: (T * K,) int64, the inverse permutation.
        offsets_E: (E,) int32, where each expert's sorted rows end. Rows past the last end were dropped: they count as 0
            and get no gradient.
        w_gate: (E, F, D).
        w_up: (E, F, D).
        w_down: (E, D, F).

    Returns:
        (T, D), the type of x.
    """
    x_RD = x_TD[order_R // weights_TK.shape[1]]
    hidden_RF = swiglu(grouped_mm(x_RD, w_gate, offsets_E), grouped_mm(x_RD, w_up, offsets_E))
    y_TKD = grouped_mm(hidden_RF, w_down, offsets_E)[inverse_R].unflatten(0, weights_TK.shape)
    return (weights_TK[:, None].to(y_TKD.dtype) @ y_TKD).squeeze(1)  # (tokens, d_model)


def local_global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    scale: float,
    n_memory: int,
    window: int,
    n_global_tokens: int,
    document: Tensor | None = None,
) -> Tensor:
    """Compute softmax attention over a local window and global keys, balanced by one gate per head.

    With g_h = sigmoid(gate_h), the weight of key j for query i is proportional to
        g_h       * exp(scale q_i . k_j)   for a visible local key,
        (1 - g_h) * exp(scale q_i . k_j)   for a visible global key,
        0                                      for any other.
    At gate 0 the two count equally and this is plain masked attention. The sources' mask, where(pos_diff > 5, 0, 1), is
    local only; global keys and the gate are our reading of the "dynamic balance" they describe.

    Args:
        q: (B, H, S, D).
        k: (B, K, T, D); head h uses key-value head h // (H / K) (Ainslie et al. 2023, "GQA", section 2.2).
        v: (B, K, T, V), of any width V.
        gate: (H,) logits, or None for plain masked attention.
        scale: of the scores; 1 / sqrt(D) in plain attention.
        n_memory: number of keys of the previous segment, as for attention_mask, which defines what a query sees.
        window: number of keys that a query sees locally; 0 means all before it.
        n_global_tokens: number of keys after the memory that every later query sees.
        document: (B, S), the document of each token, as for document_mask, which then defines what a query sees; there
            is one key per query and no memory. None if a row is one document.

    Returns:
        (B, H, S, V).
    """
    if document is None:
        visible, is_global = attention_mask(q.shape[2], k.shape[2], n_memory, window, n_global_tokens, q.device)
    else:
        visible, is_global = document_mask(document, window, n_global_tokens)
        visible, is_global = visible[:, None], is_global[:, None]  # (batch, 1, ..., keys)
    n_rep = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(n_rep, dim=1) for t in (k, v))  # (batch, heads, keys, head_dim)
    scores = q @ k.transpose(-1, -2) * scale  # (batch, heads, queries, keys)
    if gate is not None:
        log_local, log_global = F.logsigmoid(gate), F.logsigmoid(-gate)  # (heads,)
        bias = torch.where(is_global, log_global[:, None], log_local[:, None])  # (..., heads, keys)
        scores = scores + bias[..., None, :]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return weights @ v  # (batch, heads, queries, v_head_dim)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, in nats: logsumexp(logits) - logits[target].

    Args:
        logits: (..., vocab_size); reduced in fp32 or wider.
        targets: (...), int64.

    Returns:
        (...), fp32 (float64 for float64 logits).
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Multiply by the output head and return the cross-entropy of the logits.

    Only the mean, or with `token_weights` the weighted sum, is differentiable; the nll of each token is for statistics.
    The incoming gradient of every token is then known up to one factor, so a faster implementation can compute both
    gradients while it holds the logits.

    Args:
        h: (..., d_model).
        weight: (vocab_size, d_model), the type of h.
        targets: (...), int64, each from 0 to vocab_size - 1.
        token_weights: (...), fp32, factor of each token's nll, without gradient; None: 1 / number of tokens.

    Returns:
        The mean nll in nats or the sum of token_weights * nll, (), and the nll of each token, (...), without gradient;
        both fp32 (float64 for float64 h).
    """
    nll = cross_entropy(F.linear(h, weight), targets)
    return nll.mean() if token_weights is None else (nll * token_weights).sum(), nll.detach()


def quantize_blocks(x: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize an optimizer's moment to 8 bits, relative to the largest magnitude of each block of 256 elements.

    With r = |x| / largest, the code is round(127 sqrt(r)) with the sign of x for the first moment and
    round(255 r^(1/4)) for the second, at least 1 if x > 0, since the update divides by the root of the second moment.
    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.1; the roots are ours: finer
    near 0 like their dynamic map of section 2.2, but without a table.

    Args:
        x: any shape, fp32; non-negative if not is_signed.
        is_signed: True for a first moment.

    Returns:
        The codes in the shape of x, int8 or uint8, and the largest magnitudes (blocks,), fp32. Blocks are runs of the
        flattened x; the last may be short.
    """
    flat = F.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)  # (blocks, 256)
    largest = flat.abs().amax(1)  # (blocks,)
    share = flat.abs() / torch.where(largest > 0, largest, 1)[:, None]
    if is_signed:
        codes = ((share.sqrt() * 127 + 0.5).floor() * flat.sign()).to(torch.int8)
    else:
        codes = (share.sqrt().sqrt() * 255 + 0.5).floor().maximum((flat > 0).to(flat.dtype)).to(torch.uint8)
    return codes.flatten()[: x.numel()].view(x.shape), largest


def dequantize_blocks(codes: Tensor, largest: Tensor) -> Tensor:
    """Undo `quantize_blocks` up to rounding: quantizing the result gives the same codes.

    Args:
        codes: any shape, int8 for a first moment, uint8 for a second.
        largest: (blocks,), fp32.

    Returns:
        fp32 in the shape of the codes.
    """
    of_element = largest.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    if codes.dtype is torch.int8:
        root = codes.to(largest.dtype) / 127
        return root * root.abs() * of_element
    return (codes.to(largest.dtype) / 255).square().square() * of_element


def dequantize_weight(q: Tensor, scale: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """Return the matrix that `weight_only.quantize_weight` rounded: each integer times the scale of its group.

    Args:
        q: (d_out, d_in) int8; at 4 bits (d_out, d_in / 2) int8, where a byte holds two integers of -8..7: the low half
            that of a column in the first half of the group, the high half that of the column half a group further on.
        scale: (d_out, d_in / group_size).
        bits: 8 or 4.
        group_size: number of adjacent columns that share a scale; 0 means all.

    Returns:
        (d_out, d_in), the type of the scale.
    """
    groups = q.unflatten(1, (-1, group_size * bits // 8 or q.shape[1]))  # (d_out, groups, bytes)
    if bits == 4:
        groups = torch.cat([groups << 4 >> 4, groups >> 4], dim=2)  # (d_out, groups, columns)
    return (groups * scale[:, :, None]).flatten(1)  # (d_out, d_in)


def weight_only_linear(x: Tensor, q: Tensor, scale: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """Multiply by a quantized matrix: y = x W^T.

    Args:
        x: (..., d_in).
        q: integers, as for `dequantize_weight`.
        scale: (d_out, d_in / group_size).
        bits: 8 or 4.
        group_size: number of columns that share a scale; 0 means all.

    Returns:
        (..., d_out), the type of x.
    """
    return F.linear(x, dequantize_weight(q, scale, bits, group_size).to(x.dtype))


def linears(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Apply several linear layers to one input.

    Args:
        x: (..., d_in).
        layers: each maps (..., d_in) to (..., its d_out).

    Returns:
        The result of each layer.
    """
    return [layer(x) for layer in layers]


def quantize_fp8(x: Tensor, dtype: torch.dtype, *, by_row: bool = False) -> tuple[Tensor, Tensor]:
    """Round to 8-bit floating-point numbers, scaled so that the largest magnitude is the type's largest number.

    q = round(x * (M / a)), scale = a / M, with a = max |x| and M = 448 for e4m3, 57344 for e5m2; x is about q * scale.
    Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3 (the formats and their scaling in
    software); taking a from the tensor itself is our choice, as is the NaN. Computed in fp32 for any x. If a is
    infinite or NaN, the scale is NaN, and so is everything computed from the tensor.

    Args:
        x: (..., columns), any floating type.
        dtype: float8_e4m3fn or float8_e5m2.
        by_row: use one scale per row.

    Returns:
        q in the shape of x, and the scale, fp32: (), or (...) if by_row.
    """
    wide = x.float()
    largest = (wide.abs().amax(-1, keepdim=True) if by_row else wide.abs().amax()).clamp(min=FP8_LEAST)
    most = torch.full_like(largest, FP8_LARGEST[dtype])  # with a Python number PyTorch would multiply by a reciprocal
    scale = torch.where(largest.isfinite(), largest / most, float("nan"))
    return (wide * (most / largest)).to(dtype), scale.squeeze(-1) if by_row else scale
