"""Enumerations of the values that configuration keys accept."""

from __future__ import annotations

from enum import StrEnum


class Do(StrEnum):
    """What to do with the composed experiment."""

    train = "train"
    sft = "sft"
    eval = "eval"
    sample = "sample"
    export = "export"
    plan = "plan"
    verify = "verify"
    dpo = "dpo"
    grpo = "grpo"

    @property
    def trains(self) -> bool:
        """Whether the verb runs optimizer steps."""
        return self.is_training or self is Do.verify

    @property
    def is_training(self) -> bool:
        """Whether the verb is a training: a run with checkpoints, which can be resumed."""
        return self in (Do.train, Do.sft, Do.dpo, Do.grpo)


class Reuse(StrEnum):
    """Which finished stages of a chain are not run again."""

    unchanged = "unchanged"
    strict = "strict"
    never = "never"


class ExportFormat(StrEnum):
    """Format of a checkpoint exported for other programs."""

    hf = "hf"
    adapter = "adapter"
    peft = "peft"


class Launcher(StrEnum):
    """What starts the ranks."""

    local = "local"
    torchrun = "torchrun"
    slurm = "slurm"


class Tracker(StrEnum):
    """Where a run is recorded, in addition to its folder."""

    mlflow = "mlflow"
    none = "none"


class Device(StrEnum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Source(StrEnum):
    """Where text comes from."""

    stdlib = "stdlib"
    text = "text"
    synthetic = "synthetic"
    mixture = "mixture"
    chat = "chat"
    preference = "preference"
    prompts = "prompts"


class OnBadLine(StrEnum):
    """What to do with a line of input that cannot be read."""

    stop = "stop"
    skip = "skip"


class OnLongRow(StrEnum):
    """What to do with a row of instruction data that is longer than a sequence."""

    stop = "stop"
    truncate = "truncate"
    drop = "drop"


class OnEmptyMask(StrEnum):
    """What to do with a row of instruction data without a token to learn."""

    stop = "stop"
    drop = "drop"


class PreferenceLoss(StrEnum):
    """Loss of a pair of a chosen and a rejected completion."""

    dpo = "dpo"
    ipo = "ipo"
    orpo = "orpo"


class OnNonfinite(StrEnum):
    """What to do if the loss or gradient of a training step is infinite or NaN."""

    stop = "stop"
    skip = "skip"


class Schedule(StrEnum):
    """Learning-rate schedule after the warm-up."""

    cosine = "cosine"
    wsd = "wsd"


class DecayShape(StrEnum):
    """How the learning rate falls at the end of schedule=wsd."""

    linear = "linear"
    sqrt = "sqrt"
    cosine = "cosine"


class TaskKind(StrEnum):
    """What a task of an evaluation asks, and what counts as right."""

    text = "text"
    gsm8k = "gsm8k"
    numeric = "numeric"
    choice = "choice"
    code = "code"
    lm_eval = "lm_eval"


class Order(StrEnum):
    """Order in which the sequences of the token stream are visited."""

    shuffled = "shuffled"
    contiguous = "contiguous"


class Precision(StrEnum):
    """Data type of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"

    @property
    def dtype_name(self) -> str:
        """Name of PyTorch's data type of weights and activations."""
        return "bfloat16" if self.keeps_masters else "float32"

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 2 if self.keeps_masters else 4

    @property
    def computes_in_fp8(self) -> bool:
        """Linear layers multiply 8-bit floating-point numbers, and keep their inputs in them."""
        return self is Precision.fp8

    @property
    def keeps_masters(self) -> bool:
        """Whether weights and activations are bf16 with fp32 masters. With fp8, only matrix products are 8-bit."""
        return self is not Precision.fp32


class ActivationCheckpointing(StrEnum):
    """Which activations are recomputed in the backward pass instead of stored."""

    none = "none"
    selective = "selective"
    full = "full"


class Kernel(StrEnum):
    """Implementation of an operation."""

    torch = "torch"
    triton = "triton"


class Linears(StrEnum):
    """How linear layers that share an input compute its gradient."""

    torch = "torch"
    accumulated = "accumulated"


class LoraInit(StrEnum):
    """Distribution of an adapter's matrix A at the start."""

    kaiming = "kaiming"
    gaussian = "gaussian"


class AttentionKind(StrEnum):
    """Attention mechanism of a block."""

    gqa = "gqa"
    mla = "mla"


class RopeScalingKind(StrEnum):
    """How rotary wavelengths are scaled for contexts longer than the trained length."""

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


class Score(StrEnum):
    """How a router's logits become scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class GroupScore(StrEnum):
    """Score by which a group of experts is selected."""

    max = "max"
    top2_sum = "top2_sum"
    sum = "sum"


class Balance(StrEnum):
    """How the load of the experts is balanced."""

    none = "none"
    aux_loss = "aux_loss"
    bias = "bias"
