"""A model as a list of layers with the weights and FLOPs of each, and its split into stages of equal time."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from deepseek_exp.config import AttentionKind, ClusterConfig, ExperimentConfig, LoraConfig, ModelConfig
from deepseek_exp.config.matrices import adapted, adapter_size
from deepseek_exp.planner import cost


@dataclass(frozen=True)
class Layers:
    """Weights and FLOPs of one or several layers.

    Attributes:
        split: parameters sharded by tensor parallelism: matrices by heads or hidden units, tables by vocabulary
            entries.
        kv: wk and wv of gqa, sharded by key-value heads, so at most n_kv_heads ways.
        whole: parameters replicated on every tensor rank: norms, routers, the projections down to MLA's latents, and
            the MTP projection.
        experts: parameters of routed experts, sharded by ep and tp.
        copies: entries of tables that another stage also has: the embedding on the last stage, for a tied output head
            or MTP; sharded by tp, and not counted as parameters.
        flops: FLOPs per token, forward and backward, except those of the routed experts.
        expert_flops: those of a token's top_k experts.
        product_flops: those of `flops` in the blocks' linear layers, which precision=fp8 computes in 8 bits.
        n_dense: number of blocks with a dense feed-forward network.
        n_moe: number of blocks with experts, including those of MTP modules.
        n_mtp: number of MTP modules.
        n_heads_out: number of output heads: 1 on the last stage, 0 elsewhere.
        adapters: parameters of adapters, except of those of routed experts.
        expert_adapters: parameters of the adapters of routed experts.
        sums: elements of weights that are computed from a stored weight and an adapter and kept for the backward pass:
            of all adapted matrices except linear layers.
        expert_sums: the same of routed experts.
    """

    split: int = 0
    kv: int = 0
    whole: int = 0
    experts: int = 0
    copies: int = 0
    flops: float = 0.0
    expert_flops: float = 0.0
    product_flops: float = 0.0
    n_dense: int = 0
    n_moe: int = 0
    n_mtp: int = 0
    n_heads_out: int = 0
    adapters: int = 0
    expert_adapters: int = 0
    sums: int = 0
    expert_sums: int = 0

    def __add__(self, other: Layers) -> Layers:
        """Return the sum of two."""
        return Layers(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def parameters(self) -> int:
        """Return the number of the model's parameters, each once, without adapters."""
        return self.split + self.kv + self.whole + self.experts

    def dense_on_rank(self, tp: int, n_kv_heads: int) -> float:
        """Return the non-expert parameters on one rank, including copies of tables."""
        return (self.split + self.copies) / tp + self.kv / min(tp, n_kv_heads) + self.whole

    def flops_on_rank(self, tp: int) -> float:
        """Return the part of `flops` on one rank: all tensor ranks repeat the work of replicated parameters."""
        same = 6 * self.whole
        return (self.flops - same) / tp + same

    def adapters_on_rank(self, ep: int) -> float:
        """Return the adapters' parameters on one rank; those that tensor parallelism shards are counted whole."""
        return self.adapters + self.expert_adapters / ep

    def sums_on_rank(self, tp: int, ep: int) -> float:
        """Return the elements of summed weights on one rank."""
        return self.sums / tp + self.expert_sums / (tp * ep)

    def experts_on_rank(self, tp: int, ep: int) -> float:
        """Return the experts' parameters on one rank."""
        return self.experts / (tp * ep)


def layers_of(cfg: ModelConfig, seq_len: int, lora: LoraConfig | None = None) -> list[Layers]:
    """List the units that a pipeline can split between: each block, the first with the embedding, then the head.

    The last entry holds the MTP modules, the last norm and the output head, which belong together since the modules use
    the output head.

    Args:
        cfg: the model.
        seq_len: length of a training sequence, tokens.
        lora: its adapters; None: it has none.

    Returns:
        n_layers + 1 entries; together they have the parameters of `cost.parameters` and, except for MTP, the FLOPs of
        `cost.flops_per_token`.
    """
    table = cfg.vocab_size * cfg.d_model
    n_dense = min(cfg.moe.n_dense_layers, cfg.n_layers) if cfg.moe.n_routed_experts else cfg.n_layers
    blocks = [_block(cfg, seq_len, is_moe=i >= n_dense) for i in range(cfg.n_layers)]
    blocks[0] += Layers(split=table)
    end = Layers(whole=cfg.d_model, flops=6 * (table + cfg.d_model), n_heads_out=1)
    end += Layers(copies=table) if cfg.tie_embeddings else Layers(split=table)
    if cfg.n_mtp_layers and not cfg.tie_embeddings:
        end += Layers(copies=table)
    for _ in range(cfg.n_mtp_layers):
        d = cfg.d_model
        frame = Layers(whole=2 * d * d + 3 * d, flops=6 * (2 * d * d + 3 * d + table), n_mtp=1)
        frame += Layers(product_flops=12 * d * d)
        end += frame + _block(cfg, seq_len, is_moe=cfg.moe.n_routed_experts > 0)
    layers = [*blocks, end]
    return layers if lora is None else [x + y for x, y in zip(layers, _adapters(cfg, lora), strict=True)]


def _adapters(cfg: ModelConfig, lora: LoraConfig) -> list[Layers]:
    """Return the adapters of each entry of `layers_of`."""
    found = [Layers() for _ in range(cfg.n_layers + 1)]
    for name, shape in adapted(cfg, lora).items():
        size, kept = adapter_size({name: shape}, lora.rank), math.prod(shape)
        here = Layers(adapters=size, sums=0 if _is_linear(name) else kept)
        if ".experts." in name:
            here = Layers(expert_adapters=size, expert_sums=kept)
        room, _, rest = name.partition(".")
        index = {"embedding": 0, "blocks": int(rest.partition(".")[0]) if room == "blocks" else 0}.get(room, -1)
        found[index] += here
    return found


def _is_linear(name: str) -> bool:
    """Return whether a matrix is only read as a linear layer, so that an adapter is two narrow products more."""
    return "." in name.removesuffix(".weight") and not any(part in name for part in (".wkv_b.", ".router."))


def _block(cfg: ModelConfig, seq_len: int, *, is_moe: bool) -> Layers:
    """Return the weights and FLOPs of one block."""
    frame = cost.count_block_without_feed_forward(cfg)
    latent = cfg.attention is AttentionKind.mla
    kv = 0 if latent else 2 * cfg.d_model * cfg.n_kv_heads * cfg.head_dim
    kv += 0 if latent or not cfg.qkv_bias else 2 * cfg.n_kv_heads * cfg.head_dim
    whole = cost.count_block_norms(cfg) + (_latents(cfg) if latent else 2 * cfg.head_dim * cfg.qk_norm)
    width = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim if latent else 2 * cfg.head_dim
    flops = 6 * frame + 6 * cfg.n_heads * width * cost.mean_reach(cfg, seq_len)
    block = Layers(split=frame - kv - whole, kv=kv, whole=whole, flops=flops, product_flops=6 * _linears(cfg))
    if not is_moe:
        active = cost.count_feed_forward(cfg, cfg.d_ff, cfg.d_ff_active or cfg.d_ff)
        both = Layers(flops=6 * active, product_flops=6 * active)
        return block + both + Layers(split=cost.count_feed_forward(cfg, cfg.d_ff, cfg.d_ff), n_dense=1)
    expert = cost.count_feed_forward(cfg, cfg.moe.d_expert, cfg.moe.d_expert)
    router, shared = cost.count_moe(cfg, 0) - cfg.moe.n_shared_experts * expert, cfg.moe.n_shared_experts * expert
    return block + Layers(
        split=shared,
        whole=router,
        experts=cfg.moe.n_routed_experts * expert,
        flops=6 * (router + shared),
        product_flops=6 * shared,
        expert_flops=6 * cfg.moe.top_k * expert,
        n_moe=1,
    )


def _linears(cfg: ModelConfig) -> int:
    """Return the weights of attention's linear layers, except MLA's wkv_b, which no precision rounds to 8 bits."""
    d, n = cfg.d_model, cfg.n_heads
    if cfg.attention is not AttentionKind.mla:
        return 2 * d * (n + cfg.n_kv_heads) * cfg.head_dim
    q = n * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    q = cfg.q_lora_rank * (d + q) if cfg.q_lora_rank else d * q
    return q + d * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) + n * cfg.v_head_dim * d


def _latents(cfg: ModelConfig) -> int:
    """Return the parameters of the projections to MLA's latents: wq_a and q_norm, wkv_a and kv_norm."""
    down = (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * cfg.d_model + cfg.kv_lora_rank
    return down + (cfg.q_lora_rank * (cfg.d_model + 1) if cfg.q_lora_rank else 0)


def stages_of(layers: Sequence[Layers], pp: int, cluster: ClusterConfig) -> list[Layers]:
    """Split a model into stages so that the slowest takes as little time as possible.

    The time of a layer is flops / matmul_efficiency + expert_flops / grouped_efficiency. If stages can differ, the
    first ones are lighter, since they keep the activations of the most micro-batches.

    Args:
        layers: from `layers_of`.
        pp: number of stages, at most the number of layers.
        cluster: provides the efficiencies.

    Returns:
        The sum of each stage's layers.
    """
    ends = _ends(layers, pp, cluster)
    stages = [_total(layers[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    return stages if pp > 1 else [replace(stages[0], copies=0)]  # one stage has no copies


def stage_bounds(exp: ExperimentConfig, pp: int) -> list[int]:
    """Split the model of an experiment into stages as its plan does.

    Args:
        exp: provides the model, the length of a sequence and the cluster.
        pp: number of stages, at most n_layers + 1.

    Returns:
        For each stage, the index after its last entry of `layers_of`; the last is n_layers + 1, and every stage has at
        least one entry.
    """
    return _ends(layers_of(exp.model, exp.data.seq_len), pp, exp.cluster)


def _ends(layers: Sequence[Layers], pp: int, cluster: ClusterConfig) -> list[int]:
    seconds = tuple(x.flops / cluster.matmul_efficiency + x.expert_flops / cluster.grouped_efficiency for x in layers)
    return balance(seconds, pp)


def largest_gathered(cfg: ModelConfig, seq_len: int) -> int:
    """Return the parameters of the largest unit that ZeRO 3 gathers at once: a block, or a table."""
    table = cfg.vocab_size * cfg.d_model
    first, *others = (x.parameters for x in layers_of(cfg, seq_len)[:-1])
    return max(table, first - table, *others)


@functools.lru_cache(maxsize=256)
def balance(costs: tuple[float, ...], n: int) -> list[int]:
    """Split a list of costs into n non-empty runs that minimise the cost of the most expensive run.

    Bisects over that cost; runs are filled from the end of the list up to the cost.

    Returns:
        The end of each run.

    Raises:
        ValueError: there are more runs than costs.
    """
    if n > len(costs):
        raise ValueError(f"{len(costs)} layers cannot make {n} stages")
    low, high, ends = max(costs), sum(costs), _fill(costs, n, math.inf)
    for _ in range(50):
        middle = (low + high) / 2
        tried = _fill(costs, n, middle)
        if len(tried) == n:
            high, ends = middle, tried
        else:
            low = middle
    return ends


def _fill(costs: Sequence[float], n: int, most: float) -> list[int]:
    """Split from the end into n runs of at most `most` each, or into more if n are not enough."""
    ends, total = [len(costs)], 0.0
    for i in range(len(costs) - 1, -1, -1):
        room = total + costs[i] <= most
        needed = i + 1 <= n - len(ends)  # every remaining layer starts a new run
        if ends[-1] > i + 1 and (needed or not room):
            ends.append(i + 1)
            total = 0.0
        total += costs[i]
    return ends[::-1]


def _total(layers: Sequence[Layers]) -> Layers:
    return functools.reduce(Layers.__add__, layers)
