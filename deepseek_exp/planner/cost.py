"""Parameters, FLOPs per token and cache bytes of a model, by arithmetic on its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_exp.config import AttentionKind, ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of one model, without buffers (rotary tables, the experts' balance bias).

    Attributes:
        total: every trainable parameter of the main model: embedding, blocks, head, with norms, biases, gates, routers
            and domain classifiers. A tied table counts once; MTP modules are excluded.
        active: those of `total` that a token is multiplied by: top_k of the routed experts; w_gate and d_ff_active /
            d_ff of w_up and w_down of a sparse feed-forward network; everything else. The output head counts, tied or
            not; the embedding look-up does not, as it multiplies nothing. That is the convention behind DeepSeek-V3's
            37B (arXiv 2412.19437, abstract): it yields 36.63B, as README_WEIGHTS.md of deepseek-ai/DeepSeek-V3-Base
            says (36.6B with the output head); with the look-up it would be 37.55B.
        mtp: all parameters of the MTP modules, which share the embedding and the output head.
        embedding: the look-up table, tied or not; included in `total`.
    """

    total: int
    active: int
    mtp: int
    embedding: int


def parameters(cfg: ModelConfig) -> Parameters:
    """Return the parameter counts of a model; `Parameters` defines each count.

    Args:
        cfg: the model; only widths, depths and counts matter.

    Returns:
        The exact counts of the built modules.
    """
    table = cfg.vocab_size * cfg.d_model
    n_dense = min(cfg.moe.n_dense_layers, cfg.n_layers) if cfg.moe.n_routed_experts else cfg.n_layers
    n_moe = cfg.n_layers - n_dense
    # The output head, the last norm, and everything in a block except its feed-forward network.
    frame = table + cfg.d_model + cfg.n_layers * count_block_without_feed_forward(cfg)
    total = (
        frame + n_dense * count_feed_forward(cfg, cfg.d_ff, cfg.d_ff) + n_moe * count_moe(cfg, cfg.moe.n_routed_experts)
    )
    kept = cfg.d_ff_active or cfg.d_ff
    active = frame + n_dense * count_feed_forward(cfg, cfg.d_ff, kept) + n_moe * count_moe(cfg, cfg.moe.top_k)
    return Parameters(
        total=total if cfg.tie_embeddings else total + table,
        active=active,
        mtp=cfg.n_mtp_layers * count_mtp_module(cfg),
        embedding=table,
    )


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Return the training FLOPs per token: the numerator of every MFU in this project.

    6 * N_active + 12 * n_layers * n_heads * head_dim * reach

    A multiply-add is two FLOPs, and the backward pass is twice the forward pass. N_active is `Parameters.active`:
    without the embedding look-up, with the output head, and only the experts that a token is routed to. `reach` is the
    mean number of keys that a query sees (`mean_reach`): seq_len / 2 under a causal mask, so without a window the
    second term is 6 * n_layers * n_heads * head_dim * seq_len (Chowdhery et al. 2022, "PaLM", appendix B, counts twice
    that, the whole square). A window shortens the reach, since FLOPs that the mask removes are not work of the model.
    For mla, head_dim is the mean of q.k's width (qk_nope_head_dim + qk_rope_head_dim) and the values' (v_head_dim).

    Not counted: norms, softmax, rotary embedding, recomputed activations, repeated projections of the memory to keys
    and values, and the MTP modules, which exist only in training: a run that trains them shows a lower MFU than its
    kernels reach.

    Args:
        cfg: the model.
        seq_len: length of a training sequence, tokens.

    Returns:
        FLOPs per token, forward and backward.
    """
    head_dim: float = cfg.head_dim
    if cfg.attention is AttentionKind.mla:
        head_dim = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim) / 2
    attention = 12 * cfg.n_layers * cfg.n_heads * head_dim * mean_reach(cfg, seq_len)
    return 6 * parameters(cfg).active + attention


def cache_bytes_per_token(cfg: ModelConfig, bytes_per_element: int) -> int:
    """Return the bytes that generation caches per token of one sequence, in all blocks.

    gqa keeps keys and values, 2 * n_kv_heads * head_dim per block; mla keeps the latent and the shared rotary key,
    kv_lora_rank + qk_rope_head_dim per block (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1, table 1).

    Args:
        cfg: the model; a window limits how many tokens are kept, not the bytes per token.
        bytes_per_element: of the cache's data type, e.g. 2 for bf16.

    Returns:
        Bytes per token.
    """
    if cfg.attention is AttentionKind.mla:
        elements = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    else:
        elements = 2 * cfg.n_kv_heads * cfg.head_dim
    return cfg.n_layers * elements * bytes_per_element


def mean_reach(cfg: ModelConfig, seq_len: int) -> float:
    """Return the mean number of keys that a query of a sequence sees.

    The query at x sees min(memory_len + x, window) local keys (without a window: x), and those of the first
    n_global_tokens keys that lie before its window. The mean is an integral over x, so that causal attention is
    seq_len / 2; a sum over whole keys would be up to half a key more.
    """
    if not cfg.window:
        return seq_len / 2
    local = _area_below(cfg.memory_len + seq_len, cfg.window) - _area_below(cfg.memory_len, cfg.window)
    left_behind = _area_below(max(0, seq_len - cfg.window), cfg.n_global_tokens)
    return (local + left_behind) / seq_len


def _area_below(length: int, limit: int) -> float:
    """Integrate min(x, limit) over x from 0 to length."""
    rising = min(length, limit)
    return rising**2 / 2 + limit * (length - rising)


def count_block_without_feed_forward(cfg: ModelConfig) -> int:
    """Return the number of parameters of attention and the norms of a block."""
    gate = cfg.n_heads if cfg.window and cfg.n_global_tokens else 0
    attention = count_mla(cfg) if cfg.attention is AttentionKind.mla else count_gqa(cfg)
    return count_block_norms(cfg) + attention + gate


def count_block_norms(cfg: ModelConfig) -> int:
    """Return the parameters of the norms around attention and the feed-forward network."""
    return (4 if cfg.sandwich_norm else 2) * cfg.d_model


def count_gqa(cfg: ModelConfig) -> int:
    """Return the parameters of wq, wk, wv with their biases, wo, and the norms of queries and keys."""
    d_q, d_kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    matrices = 2 * cfg.d_model * d_q + 2 * cfg.d_model * d_kv
    biases = d_q + 2 * d_kv if cfg.qkv_bias else 0
    norms = 2 * cfg.head_dim if cfg.qk_norm else 0
    return matrices + biases + norms


def count_mla(cfg: ModelConfig) -> int:
    """Return the parameters of wq, or wq_a, q_norm and wq_b; wkv_a, kv_norm and wkv_b; wo."""
    d_q = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    d_v = cfg.n_heads * cfg.v_head_dim
    queries = cfg.q_lora_rank * (cfg.d_model + 1 + d_q) if cfg.q_lora_rank else d_q * cfg.d_model
    latent = (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * cfg.d_model + cfg.kv_lora_rank
    keys_values = (cfg.n_heads * cfg.qk_nope_head_dim + d_v) * cfg.kv_lora_rank
    return queries + latent + keys_values + cfg.d_model * d_v


def count_feed_forward(cfg: ModelConfig, width: int, kept: int) -> int:
    """Return the parameters of w_gate with `width` hidden units, and w_up and w_down with `kept` of them."""
    return cfg.d_model * (width + 2 * kept)


def count_moe(cfg: ModelConfig, n_routed: int) -> int:
    """Return the parameters of a router with its domain classifier, `n_routed` experts and the shared experts."""
    router = (cfg.moe.n_routed_experts + len(cfg.moe.domains)) * cfg.d_model
    return router + (n_routed + cfg.moe.n_shared_experts) * count_feed_forward(cfg, cfg.moe.d_expert, cfg.moe.d_expert)


def count_mtp_module(cfg: ModelConfig) -> int:
    """Return the parameters of three norms, the projection of two vectors to one, and a block like the last one."""
    moe = cfg.moe.n_routed_experts
    feed_forward = count_moe(cfg, moe) if moe else count_feed_forward(cfg, cfg.d_ff, cfg.d_ff)
    return 3 * cfg.d_model + 2 * cfg.d_model**2 + count_block_without_feed_forward(cfg) + feed_forward
