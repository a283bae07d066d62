"""The only list of configuration keys, with their types, units, ranges and meaning.

Values are in conf/*.yaml; this file declares the type, documentation and range of each key. `rules/validate.py` checks
the ranges and the rules that span several keys.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from deepseek_exp.config.chain_section import ChainConfig
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
    OnEmptyMask,
    OnLongRow,
    OnNonfinite,
    Order,
    Precision,
    RopeScalingKind,
    Score,
    Source,
    Tracker,
)
from deepseek_exp.config.evaluate_section import EvaluateConfig
from deepseek_exp.config.finetune_sections import DPOConfig, GRPOConfig, LoraConfig
from deepseek_exp.config.key import key
from deepseek_exp.config.optim_section import OptimConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class RopeScalingConfig:
    """Scaling of the rotary embedding to contexts longer than it was trained for."""

    kind: RopeScalingKind = key("none, linear, llama3 (by wavelength) or yarn (by wavelength, with attention scaling)")
    factor: float = key("new length / original length", ge=1, le=1e6)
    original_max_seq_len: int = key("context length before scaling, in tokens", ge=1, le=10**9)
    low_freq_factor: float = key(
        "llama3: wavelengths longer than original length / this are fully scaled", ge=1e-6, le=1e6
    )
    high_freq_factor: float = key("llama3: wavelengths shorter than original length / this are kept", ge=1e-6, le=1e6)
    beta_fast: float = key(
        "yarn: frequencies with more rotations than this within the original length are kept", ge=1e-6, le=1e6
    )
    beta_slow: float = key("yarn: frequencies with fewer rotations than this are fully scaled", ge=1e-6, le=1e6)
    mscale: float = key(
        "yarn: growth of the attention logits' scale with the factor, applied in the rotary table", ge=0, le=100
    )
    mscale_all_dim: float = key("yarn: the same, applied to all coordinates of an MLA head", ge=0, le=100)


@dataclass
class MoEConfig:
    """The mixture of experts; n_routed_experts=0 turns it off."""

    n_routed_experts: int = key("routed experts per layer; 0: a dense feed-forward network", ge=0, le=8192)
    n_shared_experts: int = key(
        "shared experts, applied to every token as one FFN of width n_shared_experts * d_expert", ge=0, le=1024
    )
    d_expert: int = key("hidden width of one expert; a multiple of 8", ge=0, le=10**6)
    n_dense_layers: int = key("number of first blocks with a dense feed-forward network of width d_ff", ge=0, le=10_000)
    top_k: int = key("routed experts per token", ge=0, le=8192)
    score: Score = key("softmax over the experts, or an independent sigmoid per expert")
    norm_top_k: bool = key("divide a token's expert weights by their sum")
    route_scale: float = key("factor on the weights of the routed experts", ge=1e-6, le=1000)
    n_groups: int = key("groups of experts for two-stage routing; 1: one stage", ge=1, le=8192)
    top_k_groups: int = key("groups that the experts of a token may come from", ge=1, le=8192)
    group_score: GroupScore = key("score of a group: its largest score, the sum of its two largest, or the sum of all")
    capacity_factor: float = key(
        "largest load of an expert in training / mean load; tokens beyond it are dropped; 0: dropless", ge=0, le=1e6
    )
    balance: Balance = key("none, aux_loss (a loss term) or bias (added to the scores for expert selection only)")
    bias_update_rate: float = key("balance=bias: change of each expert's bias per optimizer step", gt=0, le=1)
    aux_loss_weight: float = key("balance=aux_loss: weight of the batch-wise balance loss", gt=0, le=1000)
    sequence_loss_weight: float = key("weight of the sequence-wise balance loss; 0: none", ge=0, le=1000)
    domains: list[str] = key(
        "domains that divide the experts evenly; the first one's are open to every token; []: no domains"
    )
    domain_loss_weight: float = key("weight of the loss of the router's domain classifier", ge=0, le=1000)


@dataclass
class ModelConfig:
    """The architecture of one model version."""

    version: str = key("name of the model version")
    vocab_size: int = key("vocabulary size; the tokenizer is trained to this size", ge=258, le=10**7)
    max_seq_len: int = key("maximum sequence length, in tokens", ge=2, le=10**8)
    d_model: int = key("width of the residual stream", ge=8, le=10**6)
    n_layers: int = key("transformer blocks", ge=1, le=10_000)
    attention: AttentionKind = key("gqa: grouped-query attention; mla: multi-head latent attention")
    n_heads: int = key("query heads per block", ge=1, le=65_536)
    n_kv_heads: int = key("gqa: key and value heads per block; divides n_heads", ge=1, le=65_536)
    head_dim: int = key("gqa: width of one head; even, for the rotary embedding", ge=2, le=65_536)
    q_lora_rank: int = key(
        "mla: width of the query latent; 0: queries are projected from the residual stream", ge=0, le=10**6
    )
    kv_lora_rank: int = key(
        "mla: width of the latent from which keys and values are projected; stored in the cache", ge=0, le=10**6
    )
    qk_nope_head_dim: int = key("mla: width of the non-rotary part of a head", ge=0, le=65_536)
    qk_rope_head_dim: int = key(
        "mla: width of the rotary part of a head, whose key is shared by all heads; even", ge=0, le=65_536
    )
    v_head_dim: int = key("mla: width of the values of a head", ge=0, le=65_536)
    qkv_bias: bool = key("gqa: bias in the projections of queries, keys and values")
    qk_norm: bool = key("gqa: RMSNorm over each head of queries and keys")
    rotary_dim: int = key(
        "gqa: coordinates of a head that the rotary embedding turns; even; 0: all of head_dim",
        ge=0,
        le=65_536,
        default=0,
    )
    window: int = key(
        "sliding window: tokens that a query attends to, including itself; 0: all earlier tokens", ge=0, le=10**8
    )
    n_global_tokens: int = key("first tokens of a sequence that every later query attends to; 0: none", ge=0, le=10**8)
    memory_len: int = key(
        "tokens of the previous segment whose hidden states each block keeps as extra keys; 0: off", ge=0, le=10**8
    )
    rope_theta: float = key("base of the rotary embedding's wavelengths", gt=1, le=1e12)
    rope_scaling: RopeScalingConfig = MISSING
    d_ff: int = key("hidden width of the dense feed-forward network", ge=1, le=10**7)
    d_ff_active: int = key("hidden units kept per token, those with the largest gates; 0: all of d_ff", ge=0, le=10**7)
    moe: MoEConfig = MISSING
    n_mtp_layers: int = key(
        "multi-token prediction (MTP) modules, each predicting one token further ahead; 0: none", ge=0, le=1000
    )
    mtp_loss_weight: float = key("weight of the mean loss of the MTP modules", ge=0, le=1000)
    norm_eps: float = key("epsilon of RMSNorm, inside the square root", lt=1, ge=1e-12)
    sandwich_norm: bool = key(
        "also normalize the outputs of attention and feed-forward network before they are added", default=False
    )
    tie_embeddings: bool = key("share the embedding table with the output projection")
    init_std: float = key("standard deviation of the initial weights", gt=0, le=1)


@dataclass
class MixturePart:
    """One text of a mixture."""

    path: str = key("file, folder or glob of .txt .md .jsonl .jsonl.gz .parquet")
    valid_path: str | None = key("the same for validation; null: a part of `path` is held out", default=None)
    weight: float = key("share of the sequences = this / the sum of all weights", gt=0, default=1.0)


@dataclass
class DataConfig:
    """The text, its tokenizer and the order of its sequences."""

    source: Source = key(
        "stdlib: the running Python's standard library; text: your files; synthetic: generated text; "
        "mixture: several texts, each with a share; chat: instruction data, rows of .jsonl files; preference: rows of "
        "prompt, chosen and rejected; prompts: rows of prompt and answer"
    )
    path: str | None = key(
        "file, folder or glob of .txt .md .jsonl .jsonl.gz .parquet (source=text), or of .jsonl .jsonl.gz "
        "(source=chat, preference, prompts)"
    )
    valid_path: str | None = key("the same for validation; null: a part of `path` is held out")
    mixture: dict[str, Any] = key(
        "source=mixture or chat: name -> path, valid_path (default: null) and weight (default: 1), as in "
        "+data.mixture.law.path=texts/law +data.mixture.law.weight=2"
    )
    valid_fraction: float = key(
        "fraction of the text held out for validation if valid_path is null: at least one document, or the ends if few",
        gt=0,
        le=0.99,
    )
    text_key: str = key("field of a .jsonl row or column of a .parquet file that holds the text")
    on_bad_line: OnBadLine = key("if a row, or a folder of path, cannot be read: stop, or skip and count it")
    max_bytes: int | None = key(
        "maximum text to read (source=synthetic: to generate; source=mixture: per part), in bytes; null: all",
        ge=1,
        le=10**15,
    )
    tokenizer: str | None = key(
        "tokenizer.json (Hugging Face's tokenizers library) or SentencePiece .model, on bytes or with byte fallback; "
        "null: train one"
    )
    vocab_size: int = key(
        "vocabulary size to train the tokenizer to; an existing tokenizer may not exceed it", ge=258, le=10**7
    )
    seq_len: int = key("tokens per training sequence", ge=2, le=10**8)
    isolate_documents: bool = key(
        "documents in one sequence do not see each other, and positions start over in each; false: they do"
    )
    prompt_key: str = key("source=chat: field of the prompt; a row may have `messages` instead")
    response_key: str = key("source=chat: field of the response")
    template: str = key(
        "source=chat: chat template: plain (roles as headings), chatml, raw (contents only), a Jinja file, or auto: "
        "the one that lies next to data.tokenizer, else plain"
    )
    train_on: list[str] = key("source=chat: roles whose messages are supervised, of system, user, assistant and tool")
    packing: bool = key("source=chat: put several rows into one sequence; false: one row each, with padding")
    on_long_row: OnLongRow = key("source=chat: if a row is longer than a sequence: stop, truncate it or drop it")
    on_empty_mask: OnEmptyMask = key("source=chat: if a row has no supervised token: stop, or drop and count it")
    order: Order = key("shuffled: a random order per epoch; contiguous: each lane of a batch continues where it was")
    n_workers: int = key("data loader processes; 0: load in the training process", ge=0, le=256)
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
class TrainerConfig:
    """The training loop."""

    max_steps: int = key("total number of optimizer steps", ge=1, le=10**12)
    max_epochs: float | None = key(
        "total number of passes over the training sequences, instead of max_steps; null: max_steps", gt=0, le=1e9
    )
    global_batch_seqs: int = key("sequences per optimizer step", ge=1, le=10**6)
    batch_ramp_seqs: int = key(
        "sequences of the first optimizer step, from which steps grow in multiples of it to "
        "global_batch_seqs, which it divides; 0: no ramp",
        ge=0,
        le=10**6,
        default=0,
    )
    batch_ramp_steps: int = key("batch_ramp_seqs: steps until global_batch_seqs", ge=0, le=10**6, default=0)
    micro_batch_seqs: int = key("sequences per forward and backward pass; divides global_batch_seqs", ge=1, le=10**6)
    precision: Precision = key(
        "bf16 keeps fp32 master weights and accumulates gradients in fp32; fp8: bf16, and the matrix products of the "
        "blocks in 8-bit floating point during training (needs a GPU of compute capability 8.9 or more)"
    )
    activation_checkpointing: ActivationCheckpointing = key(
        "what is recomputed in the backward pass; selective: all except matrix products and attention; full: all"
    )
    compile: bool = key("use torch.compile: on the model, or with several ranks on each of its blocks")
    cuda_graphs: bool = key(
        "record the kernels of a micro-batch once and launch them as one CUDA graph: the same results, faster for "
        "models whose kernels are shorter than their launches; one process",
        default=False,
    )
    deterministic: bool = key("use only kernels whose results are reproducible bit for bit")
    n_threads: int = key("CPU threads per operation; 0: PyTorch's default", ge=0, le=1024)
    log_every_steps: int = key("steps between logged training metrics", ge=1, le=10**12)
    eval_every_steps: int = key("steps between validations; the last step always validates", ge=1, le=10**12)
    eval_seqs: int = key(
        "sequences per validation, the same ones for every micro-batch and layout; 0: the entire validation "
        "set. Each part of a mixture has an equal number. With data.order=contiguous, rounded down to steps of "
        "global_batch_seqs lanes",
        ge=0,
        le=10**12,
    )
    checkpoint_every_steps: int = key("steps between checkpoints; the last step always saves", ge=1, le=10**12)
    keep_checkpoints: int = key(
        "number of newest checkpoints to keep, in addition to the best one; 0: none are saved", ge=0, le=10**6
    )
    on_nonfinite: OnNonfinite = key(
        "if a gradient is infinite or NaN: stop ends the run, skip leaves weights and optimizer unchanged "
        "and counts the step (on a GPU the host then waits for each step's gradient norm)"
    )
    max_skipped_steps: int = key(
        "total number of steps that trainer.on_nonfinite=skip may skip before the run stops", ge=0, le=10**6
    )
    patience: int = key(
        "end the run after this many validations in a row without a new best val/loss, which is saved whenever it is "
        "reached; 0: never",
        ge=0,
        le=10**6,
        default=0,
    )
    min_delta: float = key(
        "patience: nats per token by which val/loss must fall below the best to be a new best",
        ge=0,
        le=1e6,
        default=0.0,
    )
    callbacks: dict[str, Any] = key("additional Lightning callbacks: name -> `_target_` and arguments")


@dataclass
class KernelsConfig:
    """Implementation of each operation: torch (PyTorch's kernels) or triton (our fused kernel; needs a GPU)."""

    rms_norm: Kernel = key("RMSNorm, with the residual addition before it")
    rope: Kernel = key("rotary embedding, with the norm of queries and keys before it")
    swiglu: Kernel = key("gated activation of a feed-forward network")
    linears: Linears = key(
        "linear layers that share an input: torch sums the parts of its gradient after their products, accumulated "
        "inside them; no effect with trainer.precision=fp8, where they are one product"
    )
    fp8_experts: bool = key(
        "trainer.precision=fp8: fp8 products also for routed experts; false: bf16, which is as fast for few tokens"
    )
    fp8_quantize: Kernel = key("trainer.precision=fp8: rounding a matrix and its transpose to 8 bits")
    local_global_attention: Kernel = key("attention; triton skips keys outside the window, if any")
    router: Kernel = key("expert selection from the router's logits")
    experts: Kernel = key("permute tokens, apply the experts, and sum per token, if all experts are on one rank")
    linear_cross_entropy: Kernel = key("output projection and loss; triton never materializes all logits")
    adamw: Kernel = key("AdamW: master weights, clipping, update and rounding to bf16")


@dataclass
class ParallelConfig:
    """Parallel degrees, dp x tp x pp ranks. One of dp, tp and pp may be 0 to be derived from the other two."""

    auto: bool = key(
        "choose the fastest layout of the entire cluster that fits, as planned; all degrees must then be 0"
    )
    dp: int = key("data-parallel degree: model replicas, each with its share of the sequences; 0: auto", ge=0, le=10**6)
    tp: int = key("tensor-parallel degree: shards of each matrix; 0: auto", ge=0, le=65_536)
    pp: int = key("pipeline-parallel degree: stages of layers; 0: auto", ge=0, le=10_000)
    ep: int = key(
        "expert-parallel degree: shards of the experts within dp; 0: the largest that divides both", ge=0, le=8192
    )
    zero_stage: int = key(
        "ZeRO: what is sharded over dp / ep ranks: 1 optimizer state, 2 also gradients, 3 also weights; 0: nothing",
        ge=0,
        le=3,
    )
    sequence_parallel: bool = key(
        "shard the activations between tensor-parallel matrices by position over the tp ranks"
    )


@dataclass
class LaunchConfig:
    """How the ranks of a layout are started, if it has more than one."""

    launcher: Launcher = key(
        "local: start on this machine; torchrun: print the command for each node; slurm: write a batch script"
    )
    n_nodes: int = key("number of machines; the ranks are divided evenly", ge=1, le=10**5)
    ranks_per_node: int = key("ranks per machine; 0: auto, all ranks / n_nodes", ge=0, le=1024)
    master_addr: str | None = key(
        "torchrun: address of the rendezvous machine; null: this one (slurm: the job's first)"
    )
    master_port: int = key("torchrun, slurm: TCP port of the rendezvous", ge=1, le=65535)
    socket_ifname: str | None = key("network interface for NCCL and Gloo, such as eth0; null: their default")
    account: str | None = key("slurm: account to charge; null: not set")
    partition: str | None = key("slurm: partition; null: not set")
    time_limit: str | None = key("slurm: time limit, such as 12:00:00; null: not set")
    submit: bool = key("slurm: submit the script with sbatch")


@dataclass
class ClusterConfig:
    """The machines that a plan is made for."""

    gpu: str = key("name of the GPU")
    gpus_per_node: int = key("GPUs per machine; on CPUs: processes", ge=1, le=1024)
    n_nodes: int = key("machines", ge=1, le=10**5)
    memory_bytes: float = key("memory of one GPU, in bytes", ge=1, le=1e18)
    memory_bandwidth: float = key("memory bandwidth of one GPU, read + write, in bytes/s", ge=1, le=1e18)
    peak_bf16_flops: float = key("dense bf16 peak of one GPU, in FLOP/s; the denominator of MFU", ge=1, le=1e24)
    peak_fp32_flops: float = key("fp32 peak of one GPU, in FLOP/s", ge=1, le=1e24)
    peak_fp8_flops: float | None = key("dense fp8 peak of one GPU, in FLOP/s; null: not supported", ge=1, le=1e24)
    matmul_efficiency: float = key("fraction of the peak that a dense block reaches in training", le=1, ge=1e-6)
    grouped_efficiency: float = key("fraction of the peak that the routed experts reach in training", le=1, ge=1e-6)
    intra_node_bandwidth: float = key(
        "bandwidth of one GPU to the others of its machine, each way, in bytes/s", ge=1, le=1e18
    )
    inter_node_bandwidth: float = key("bandwidth of one GPU to other machines, each way, in bytes/s", ge=1, le=1e18)
    overlap: float = key(
        "fraction of non-TP communication that overlaps with compute, at most the compute time", ge=0, le=1
    )
    intra_node_latency: float = key("latency of one message within a machine, in seconds", ge=0, le=1e6)
    inter_node_latency: float = key("latency of one message between machines, in seconds", ge=0, le=1e6)
    price_per_gpu_hour: float = key("price per GPU and hour, in dollars", ge=0, le=1e9)


@dataclass
class TrackingConfig:
    """Where a run is recorded, and under which name."""

    uri: str = key("MLflow tracking store: sqlite:///file.db, a database URL or http(s)://server")
    experiment: str = key("MLflow experiment")
    run_name: str | None = key("name of the run; null: generated from the configuration")
    parent_run_id: str | None = key("parent MLflow run; set by a sweep")
    tags: dict[str, str] = key("additional tags of the run")
    system_metrics: bool = key("log the machine's CPU, memory, disk, network and GPU usage")
    drain_seconds: float = key("how long a run waits at its end for an unresponsive store, in seconds", gt=0, le=1e6)
    new_run: bool = key("resume: record as a new MLflow run that refers to the one it continues", default=False)
    backend: Tracker = key("mlflow; none: the run's own folder only, without MLflow", default=Tracker.mlflow)


@dataclass
class SampleConfig:
    """Text generation."""

    prompt: str | None = key(
        "text to continue; null: the first words of the validation text after training, a new document in do=sample"
    )
    as_message: bool = key(
        "do=sample: the prompt is a user's message, and the checkpoint's chat template asks for a reply"
    )
    max_new_tokens: int = key("maximum number of tokens to generate", ge=1, le=10**8)
    temperature: float = key("softmax temperature; 0: always the most likely token", ge=0, le=1e6)
    top_p: float = key("sample from the smallest set of tokens with this probability", gt=0, le=1)
    domain: str | None = key("domain of the text, one of model.moe.domains; null: the router infers it")
    weight_bits: int = key("do=sample: quantize the blocks' matrices to 8 or 4 bits (needs a GPU); 0: no quantization")


@dataclass
class ExportConfig:
    """Checkpoints for other programs."""

    format: ExportFormat = key(
        "hf: config.json, safetensors and tokenizer for Hugging Face's transformers, with any adapters added to the "
        "weights; adapter: the adapters alone, for lora.path; peft: the same in the format of the peft library"
    )
    path: str | None = key("folder to create; null: a folder in the run's folder, named like the format")


@dataclass
class VerifyConfig:
    """How far a layout may differ from one process; parallel=single must instead repeat itself bit for bit."""

    steps: int = key("number of optimizer steps to compare, with the schedule of trainer.max_steps", ge=1, le=10**12)
    loss_tolerance: float | None = key(
        "maximum difference of a training or validation loss, nats per token; null: by trainer.precision", ge=0
    )
    grad_norm_tolerance: float | None = key(
        "maximum relative difference of a gradient norm; null: by trainer.precision", ge=0
    )
    weight_tolerance: float | None = key(
        "maximum absolute difference of an element of the final weights; null: by trainer.precision", ge=0
    )


@dataclass
class ExperimentConfig:
    """The complete configuration of one experiment."""

    do: Do = key(
        "train, sft (train on the replies of instruction data), dpo (on preferences), grpo (reinforce verified "
        "answers), eval (validation loss of a checkpoint), sample (text from a checkpoint), export (a checkpoint for "
        "other programs), plan (legality, memory, speed and price; it runs nothing) or verify (check that the layout "
        "computes the same as one process)"
    )
    device: Device = key("auto: use a GPU if there is one")
    seed: int = key("seed of weights, data order and sampling", ge=0, lt=2**63)
    resume: str | None = key("checkpoint to resume from: last, a run id, or a path; null: start from scratch")
    init_from: str | None = key(
        "folder of a Hugging Face checkpoint to start from: its config.json sets the model section, its "
        "tokenizer.json the tokenizer; null: weights from the seed"
    )
    branches: dict[str, str] = key(
        "domain -> run, trained from init_from on text of this domain, as in +branches.law=<run>: the experts of a "
        "domain come from its branch, everything else is the mean of all branches",
        default_factory=dict,
    )
    use_ema: bool = key(
        "read the moving average of a run's weights (optim.ema_decay) instead of its last weights: for do=eval, sample "
        "and export, and for init_from",
        default=False,
    )
    output_dir: str = key("folder for runs, the MLflow database and caches")
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    lora: LoraConfig = MISSING
    kernels: KernelsConfig = MISSING
    parallel: ParallelConfig = MISSING
    cluster: ClusterConfig = MISSING
    launch: LaunchConfig = MISSING
    tracking: TrackingConfig = MISSING
    sample: SampleConfig = MISSING
    evaluate: EvaluateConfig = MISSING
    export: ExportConfig = MISSING
    verify: VerifyConfig = MISSING
    dpo: DPOConfig = MISSING
    grpo: GRPOConfig = MISSING
    chain: ChainConfig = MISSING

    @property
    def last_step(self) -> int:
        """The last optimizer step of training. The learning rate schedule always follows trainer.max_steps."""
        return self.verify.steps if self.do is Do.verify else self.trainer.max_steps
