"""The only list of configuration keys, with their types, units, ranges and meaning.

Values are in conf/*.yaml; this file declares the type, documentation and range of each key. `rules/validate.py` checks
the ranges and the rules that span several keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from deepseek_exp.config.enums import (
    ActivationCheckpointing,
    AttentionKind,
    Balance,
    Device,
    Do,
    ExportFormat,
    GroupScore,
    Kernel,
    Launcher,
    Linears,
    OnBadLine,
    OnNonfinite,
    Order,
    Precision,
    RopeScalingKind,
    Score,
    Source,
)

ROOT = Path(__file__).resolve().parents[2]


def key(
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    default: Any = MISSING,
) -> Any:
    """Declare a configuration key: its meaning (with its unit) and the range of its value.

    A default is only for entries of a mapping, which no YAML file lists; all other values are in conf/.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    return field(default=default, metadata={"doc": doc, "bounds": {k: v for k, v in bounds.items() if v is not None}})


@dataclass
class RopeScalingConfig:
    """Scaling of the rotary embedding to contexts longer than it was trained for."""

    kind: RopeScalingKind = key("none, linear, llama3 (by wavelength) or yarn (by wavelength, with attention scaling)")
    factor: float = key("new length / original length", ge=1, le=1e6)
    original_max_seq_len: int = key("length before scaling, tokens", ge=1, le=10**9)
    low_freq_factor: float = key(
        "llama3: waves longer than original length / this are stretched whole", ge=1e-6, le=1e6
    )
    high_freq_factor: float = key("llama3: waves shorter than original length / this are kept", ge=1e-6, le=1e6)
    beta_fast: float = key(
        "yarn: waves that turn more often than this within the original length are kept", ge=1e-6, le=1e6
    )
    beta_slow: float = key("yarn: waves that turn less often than this are stretched whole", ge=1e-6, le=1e6)
    mscale: float = key("yarn: grows the attention logits' scale with the factor, in the rotary table", ge=0, le=100)
    mscale_all_dim: float = key("yarn: the same for all of an MLA head's coordinates", ge=0, le=100)


@dataclass
class MoEConfig:
    """The mixture of experts; n_routed_experts=0 turns it off."""

    n_routed_experts: int = key("experts that a router chooses from; 0: a dense feed-forward network", ge=0, le=8192)
    n_shared_experts: int = key("experts that every token meets, as one network of that many d_expert", ge=0, le=1024)
    d_expert: int = key("hidden width of one expert; a multiple of 8", ge=0, le=10**6)
    n_dense_layers: int = key("first blocks that keep a dense feed-forward network of width d_ff", ge=0, le=10_000)
    top_k: int = key("routed experts of a token", ge=0, le=8192)
    score: Score = key("softmax over the experts, or an independent sigmoid for each")
    norm_top_k: bool = key("divide a token's expert weights by their sum")
    route_scale: float = key("factor on the weights of the routed experts", ge=1e-6, le=1000)
    n_groups: int = key("groups of experts for routing in two stages; 1: one stage", ge=1, le=8192)
    top_k_groups: int = key("groups that a token's experts may come from", ge=1, le=8192)
    group_score: GroupScore = key("a group counts as its best score, its two best, or the sum of all")
    capacity_factor: float = key(
        "largest load factor (load / mean load) of an expert in training; more is dropped; 0: nothing is", ge=0, le=1e6
    )
    balance: Balance = key("none, aux_loss (a loss term) or bias (added to the scores for the choice only)")
    bias_update_rate: float = key("balance=bias: step of each expert's bias after an optimizer step", gt=0, le=1)
    aux_loss_weight: float = key("balance=aux_loss: weight of the batch-wise balance loss", gt=0, le=1000)
    sequence_loss_weight: float = key("weight of the balance loss within each sequence; 0: none", ge=0, le=1000)
    domains: list[str] = key("names that share the experts evenly, the first is open to every token; []: no domains")
    domain_loss_weight: float = key("weight of the loss that teaches the router to recognize the domain", ge=0, le=1000)


@dataclass
class ModelConfig:
    """The architecture of one model version."""

    version: str = key("name of the model version")
    vocab_size: int = key("entries of the vocabulary; the tokenizer is trained to this size", ge=258, le=10**7)
    max_seq_len: int = key("longest sequence the model serves, tokens", ge=2, le=10**8)
    d_model: int = key("width of the residual stream", ge=8, le=10**6)
    n_layers: int = key("transformer blocks", ge=1, le=10_000)
    attention: AttentionKind = key("gqa: grouped-query attention; mla: multi-head latent attention")
    n_heads: int = key("query heads of a block", ge=1, le=65_536)
    n_kv_heads: int = key("gqa: key and value heads of a block; divides n_heads", ge=1, le=65_536)
    head_dim: int = key("gqa: width of one head; even, for the rotary embedding", ge=2, le=65_536)
    q_lora_rank: int = key(
        "mla: width of the queries' latent; 0: queries straight from the residual stream", ge=0, le=10**6
    )
    kv_lora_rank: int = key(
        "mla: width of the latent that keys and values are made from; the cache stores it", ge=0, le=10**6
    )
    qk_nope_head_dim: int = key("mla: width of a head's part without rotary positions", ge=0, le=65_536)
    qk_rope_head_dim: int = key(
        "mla: width of a head's part with them, its key shared by all heads; even", ge=0, le=65_536
    )
    v_head_dim: int = key("mla: width of a head's values", ge=0, le=65_536)
    qkv_bias: bool = key("gqa: queries, keys and values have a bias")
    qk_norm: bool = key("gqa: RMSNorm over each head of queries and keys")
    window: int = key("tokens that a query sees locally, itself included; 0: all before it", ge=0, le=10**8)
    n_global_tokens: int = key("first tokens of a sequence, seen by every later query; 0: none", ge=0, le=10**8)
    memory_len: int = key(
        "tokens of the segment before whose hidden states each block keeps as extra keys; 0: off", ge=0, le=10**8
    )
    rope_theta: float = key("base of the rotary embedding's wavelengths", gt=1, le=1e12)
    rope_scaling: RopeScalingConfig = MISSING
    d_ff: int = key("hidden width of the dense feed-forward network", ge=1, le=10**7)
    d_ff_active: int = key(
        "hidden units that a token keeps, those with the largest gates; 0: all of d_ff", ge=0, le=10**7
    )
    moe: MoEConfig = MISSING
    n_mtp_layers: int = key("modules that predict one more token ahead each; 0: none", ge=0, le=1000)
    mtp_loss_weight: float = key("weight of the mean loss of those modules", ge=0, le=1000)
    norm_eps: float = key("epsilon under the square root of RMSNorm", lt=1, ge=1e-12)
    tie_embeddings: bool = key("the output projection is the embedding table")
    init_std: float = key("standard deviation of the initial weights", gt=0, le=1)


@dataclass
class MixturePart:
    """One text of a mixture."""

    path: str = key("file, folder or glob of .txt .md .jsonl .jsonl.gz .parquet")
    valid_path: str | None = key("the same for validation; null: a part of `path` is held out", default=None)
    weight: float = key("its share of the sequences is this / the sum of all weights", gt=0, default=1.0)


@dataclass
class DataConfig:
    """The text, its tokenizer and the order of its sequences."""

    source: Source = key(
        "stdlib: the running Python's standard library; text: files of yours; synthetic: generated tokens; "
        "mixture: several texts of yours, each with a share"
    )
    path: str | None = key("file, folder or glob of .txt .md .jsonl .jsonl.gz .parquet (source=text)")
    valid_path: str | None = key("the same for validation; null: a part of `path` is held out")
    mixture: dict[str, Any] = key(
        "source=mixture: name -> path, valid_path (left out: null) and weight (left out: 1), as in "
        "+data.mixture.law.path=texts/law +data.mixture.law.weight=2"
    )
    valid_fraction: float = key(
        "share of the text held out for validation when valid_path is null: one document at least, or the ends of few",
        gt=0,
        le=0.99,
    )
    text_key: str = key("field of a .jsonl row or column of a .parquet file that holds the text")
    on_bad_line: OnBadLine = key("a row, or a folder of path, that cannot be read: stop, or skip and count it")
    max_bytes: int | None = key(
        "read (source=synthetic: generate) at most this much text, source=mixture: of each part; bytes; null: all",
        ge=1,
        le=10**15,
    )
    tokenizer: str | None = key(
        "tokenizer.json (Hugging Face's tokenizers library) of a BPE on bytes or with byte fallback; null: train one"
    )
    vocab_size: int = key("entries that the tokenizer is trained to; a given one has at most as many", ge=258, le=10**7)
    seq_len: int = key("tokens of one training sequence", ge=2, le=10**8)
    order: Order = key("shuffled: a random order each epoch; contiguous: each lane of a batch reads on where it was")
    n_workers: int = key("loader processes; 0: in the training process", ge=0, le=256)
    cache_dir: str = key("folder for trained tokenizers and packed shards")

    def __post_init__(self) -> None:
        """Convert the entries of `mixture` without unknown keys to `MixturePart`; `validate` reports the others.

        In the tree they are plain mappings, because OmegaConf cannot add a dataclass from the command line.
        """
        names = {f.name for f in fields(MixturePart)}
        if isinstance(self.mixture, dict):
            self.mixture = {
                str(name): MixturePart(**part) if isinstance(part, dict) and part.keys() <= names else part
                for name, part in self.mixture.items()
            }


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: dict[str, Any] = key(
        "`_target_` and arguments of the optimizer class; it is given parameter groups and lr"
    )
    state_bits: int = key("bits of each of AdamW's moments: 32, or 8 with kernels.adamw=triton")
    lr: float = key("peak learning rate", gt=0)
    min_lr_ratio: float = key("final learning rate / peak", ge=0, le=1)
    warmup_steps: int = key("steps of linear warm-up", ge=0, le=10**12)
    weight_decay: float = key("decoupled weight decay of matrices; vectors have none", ge=0, le=1000)
    clip_norm: float = key("largest global gradient norm; 0: no clipping", ge=0)


@dataclass
class TrainerConfig:
    """The training loop."""

    max_steps: int = key("optimizer steps in all", ge=1, le=10**12)
    global_batch_seqs: int = key("sequences in one optimizer step", ge=1, le=10**6)
    micro_batch_seqs: int = key("sequences in one forward and backward pass; divides global_batch_seqs", ge=1, le=10**6)
    precision: Precision = key(
        "bf16 keeps fp32 master weights and accumulates gradients in fp32; fp8: bf16, and the matrix products of the "
        "blocks in 8-bit floating numbers while it trains (needs a GPU of compute capability 8.9 or more)"
    )
    activation_checkpointing: ActivationCheckpointing = key(
        "what a block computes again in the backward pass; selective: all but matrix products and attention; full: all"
    )
    compile: bool = key("compile with torch.compile: the model, in a layout of several ranks its blocks one by one")
    deterministic: bool = key("use only kernels whose results repeat bit for bit")
    n_threads: int = key("CPU threads of one operation; 0: PyTorch's choice", ge=0, le=1024)
    log_every_steps: int = key("steps between logged training metrics", ge=1, le=10**12)
    eval_every_steps: int = key("steps between validations; the last step always validates", ge=1, le=10**12)
    eval_seqs: int = key(
        "sequences of one validation, the same ones whatever the micro batch and the layout; 0: the whole validation "
        "set. Each part of a mixture has an equal number. With data.order=contiguous rounded down to steps of "
        "global_batch_seqs lanes",
        ge=0,
        le=10**12,
    )
    checkpoint_every_steps: int = key("steps between checkpoints; the last step always saves", ge=1, le=10**12)
    keep_checkpoints: int = key(
        "newest checkpoints that stay, in addition to the best one; 0: none is saved", ge=0, le=10**6
    )
    on_nonfinite: OnNonfinite = key(
        "a step whose gradient is infinite or NaN: stop ends the run, skip leaves weights and optimizer as they were "
        "and counts it (on a GPU the host then waits for each step's gradient norm)"
    )
    max_skipped_steps: int = key(
        "steps that trainer.on_nonfinite=skip leaves out in all before it stops", ge=0, le=10**6
    )
    callbacks: dict[str, Any] = key("further Lightning callbacks: name -> `_target_` and arguments")


@dataclass
class KernelsConfig:
    """Implementation of each operation: torch (PyTorch's kernels) or triton (our fused kernel; needs a GPU)."""

    rms_norm: Kernel = key("RMSNorm, with the residual addition before it")
    rope: Kernel = key("rotary positions, with the norm of queries and keys before them")
    swiglu: Kernel = key("the gate of a feed-forward network")
    linears: Linears = key(
        "linear layers that share an input: torch adds the parts of its gradient up after their products, accumulated "
        "inside of them; of no effect under trainer.precision=fp8, where they are one product"
    )
    fp8_experts: bool = key(
        "trainer.precision=fp8: the routed experts' products too; else they are in bf16, as fast for few tokens"
    )
    fp8_quantize: Kernel = key("trainer.precision=fp8: rounding to 8 bits, as it is and transposed")
    local_global_attention: Kernel = key("attention; triton skips keys outside of the window, where there is one")
    router: Kernel = key("which experts a token goes to, from the router's logits")
    experts: Kernel = key("from tokens through their experts to their sums, where all experts are on one rank")
    linear_cross_entropy: Kernel = key("output table and loss; triton never has all logits at a time")
    adamw: Kernel = key("AdamW: masters, clipping, update and rounding to bf16")


@dataclass
class ParallelConfig:
    """Parallel degrees, dp x tp x pp ranks. One of dp, tp and pp may be 0 to be derived from the other two."""

    auto: bool = key("take the fastest layout of the whole cluster that fits, by the plan; all degrees are 0 then")
    dp: int = key("data parallel: copies of the model, each with its share of the sequences; 0: auto", ge=0, le=10**6)
    tp: int = key("tensor parallel: ways each matrix is cut; 0: auto", ge=0, le=65_536)
    pp: int = key("pipeline parallel: stages the layers are cut into; 0: auto", ge=0, le=10_000)
    ep: int = key("expert parallel: ways the experts are divided within dp; 0: as many as divide both", ge=0, le=8192)
    zero_stage: int = key(
        "what dp / ep ranks share instead of copy: 1 optimizer state, 2 and gradients, 3 and weights; 0: nothing",
        ge=0,
        le=3,
    )
    sequence_parallel: bool = key("tensor ranks also share out, by positions, what is between the cut matrices")


@dataclass
class LaunchConfig:
    """How the ranks of a layout are started, if it has more than one."""

    launcher: Launcher = key(
        "local: on this machine, at once; torchrun: prints the command for each node; slurm: writes a batch script"
    )
    n_nodes: int = key("machines that share the ranks evenly", ge=1, le=10**5)
    ranks_per_node: int = key("ranks of each machine; 0: auto, all ranks / n_nodes", ge=0, le=1024)
    master_addr: str | None = key("torchrun: machine where the ranks meet; null: this one (slurm: the job's first)")
    master_port: int = key("torchrun, slurm: TCP port that they meet at", ge=1, le=65535)
    socket_ifname: str | None = key("network interface for NCCL and Gloo, such as eth0; null: they choose")
    account: str | None = key("slurm: account that pays; null: left out")
    partition: str | None = key("slurm: partition; null: left out")
    time_limit: str | None = key("slurm: longest duration, such as 12:00:00; null: left out")
    submit: bool = key("slurm: hand the script to sbatch")


@dataclass
class ClusterConfig:
    """The machines that a plan is made for."""

    gpu: str = key("name of the GPU")
    gpus_per_node: int = key("GPUs of one machine; of a CPU: processes", ge=1, le=1024)
    n_nodes: int = key("machines", ge=1, le=10**5)
    memory_bytes: float = key("memory of one GPU, bytes", ge=1, le=1e18)
    memory_bandwidth: float = key("of one GPU's memory, read + written, bytes/s", ge=1, le=1e18)
    peak_bf16_flops: float = key("peak of one GPU in dense bf16, FLOP/s; what MFU is a share of", ge=1, le=1e24)
    peak_fp32_flops: float = key("peak of one GPU in fp32, FLOP/s", ge=1, le=1e24)
    peak_fp8_flops: float | None = key("peak of one GPU in dense fp8, FLOP/s; null: it has none", ge=1, le=1e24)
    matmul_efficiency: float = key("share of the peak that a dense block reaches in training", le=1, ge=1e-6)
    grouped_efficiency: float = key("share of the peak that the routed experts reach in training", le=1, ge=1e-6)
    intra_node_bandwidth: float = key("of one GPU to the others of its machine, each way, bytes/s", ge=1, le=1e18)
    inter_node_bandwidth: float = key("of one GPU to other machines, each way, bytes/s", ge=1, le=1e18)
    overlap: float = key("share of sends other than tp's that hides behind computing, as far as that lasts", ge=0, le=1)
    intra_node_latency: float = key("of one message within a machine, seconds", ge=0, le=1e6)
    inter_node_latency: float = key("of one message between machines, seconds", ge=0, le=1e6)
    price_per_gpu_hour: float = key("dollars for one GPU and hour", ge=0, le=1e9)


@dataclass
class TrackingConfig:
    """Where a run is recorded, and under which name."""

    uri: str = key("MLflow tracking store: sqlite:///file.db, a database URL or http(s)://server")
    experiment: str = key("MLflow experiment")
    run_name: str | None = key("name of the run; null: made from what it runs")
    parent_run_id: str | None = key("MLflow run that this one belongs to; a sweep fills it in")
    tags: dict[str, str] = key("further tags of the run")
    system_metrics: bool = key("log CPU, memory, disk, network and GPU use of the machine")
    drain_seconds: float = key("how long the end of a run waits for a store that takes nothing, seconds", gt=0, le=1e6)
    new_run: bool = key("resume: record as a new MLflow run that names the one it continues", default=False)


@dataclass
class SampleConfig:
    """Text generation."""

    prompt: str | None = key(
        "text to continue; null: at the end of a training the first words of its validation text, in do=sample none "
        "(a new document)"
    )
    max_new_tokens: int = key("tokens to generate at most", ge=1, le=10**8)
    temperature: float = key("softmax temperature; 0: always the most likely token", ge=0, le=1e6)
    top_p: float = key("draw from the smallest set of tokens with this probability", gt=0, le=1)
    domain: str | None = key("one of model.moe.domains that the text is of; null: the router infers it")
    weight_bits: int = key("do=sample: the blocks' matrices as integers of 8 or 4 bits; 0: as they are (needs a GPU)")


@dataclass
class ExportConfig:
    """Checkpoints for other programs."""

    format: ExportFormat = key("hf: config.json, safetensors and tokenizer of Hugging Face's transformers")
    path: str | None = key("folder to make; null: `hf` in the run's folder")


@dataclass
class VerifyConfig:
    """How far a layout may differ from one process; parallel=single must instead repeat itself bit for bit."""

    steps: int = key("optimizer steps that are compared, with the schedule of trainer.max_steps", ge=1, le=10**12)
    loss_tolerance: float | None = key(
        "largest difference of a training or validation loss, nats per token; null: by trainer.precision", ge=0
    )
    grad_norm_tolerance: float | None = key(
        "largest difference of a gradient norm, relative; null: by trainer.precision", ge=0
    )
    weight_tolerance: float | None = key(
        "largest difference of an element of the final weights, absolute; null: by trainer.precision", ge=0
    )


@dataclass
class ExperimentConfig:
    """The complete configuration of one experiment."""

    do: Do = key(
        "train, eval (validation loss of a checkpoint), sample (text from a checkpoint), export (a checkpoint for "
        "other programs), plan (legality, memory, speed and price, without running anything) or verify (whether the "
        "layout computes what one process does)"
    )
    device: Device = key("auto takes a GPU when there is one")
    seed: int = key("seed of weights, data order and sampling", ge=0, lt=2**63)
    resume: str | None = key("checkpoint to go on from: last, an MLflow run id, or a path; null: start anew")
    init_from: str | None = key(
        "folder of a Hugging Face checkpoint to start from: its config.json gives the model section, its "
        "tokenizer.json the tokenizer; null: weights from the seed"
    )
    output_dir: str = key("folder for runs, the MLflow database and caches")
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    kernels: KernelsConfig = MISSING
    parallel: ParallelConfig = MISSING
    cluster: ClusterConfig = MISSING
    launch: LaunchConfig = MISSING
    tracking: TrackingConfig = MISSING
    sample: SampleConfig = MISSING
    export: ExportConfig = MISSING
    verify: VerifyConfig = MISSING

    @property
    def last_step(self) -> int:
        """The last optimizer step of training. The learning rate schedule always follows trainer.max_steps."""
        return self.verify.steps if self.do is Do.verify else self.trainer.max_steps
