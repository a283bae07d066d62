"""The words that a configuration key may have as its value."""

from __future__ import annotations

from enum import StrEnum


class Do(StrEnum):
    """What to do with the composed experiment."""

    train = "train"
    eval = "eval"
    sample = "sample"
    export = "export"
    plan = "plan"
    verify = "verify"

    @property
    def trains(self) -> bool:
        """It does optimizer steps."""
        return self in (Do.train, Do.verify)


class ExportFormat(StrEnum):
    """How a checkpoint is written for other programs."""

    hf = "hf"


class Launcher(StrEnum):
    """What starts the ranks."""

    local = "local"
    torchrun = "torchrun"
    slurm = "slurm"


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


class OnBadLine(StrEnum):
    """What to do with a line of input that cannot be read."""

    stop = "stop"
    skip = "skip"


class OnNonfinite(StrEnum):
    """What to do with a training step whose loss or gradient is infinite or NaN."""

    stop = "stop"
    skip = "skip"


class Order(StrEnum):
    """In which order the sequences of the token stream are visited."""

    shuffled = "shuffled"
    contiguous = "contiguous"


class Precision(StrEnum):
    """Data type of weights and activations."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"

    @property
    def keeps_masters(self) -> bool:
        """Weights and activations are in bf16, beside fp32 masters; of fp8, products alone are in 8 bits."""
        return self is not Precision.fp32


class ActivationCheckpointing(StrEnum):
    """Which activations are recomputed in the backward pass instead of stored."""

    none = "none"
    selective = "selective"
    full = "full"


class Kernel(StrEnum):
    """What computes an operation."""

    torch = "torch"
    triton = "triton"


class Linears(StrEnum):
    """How several linear layers of one input make its gradient."""

    torch = "torch"
    accumulated = "accumulated"


class AttentionKind(StrEnum):
    """How a block attends."""

    gqa = "gqa"
    mla = "mla"


class RopeScalingKind(StrEnum):
    """How rotary wavelengths are stretched beyond the length that was trained."""

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


class Score(StrEnum):
    """How a router's logits become scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class GroupScore(StrEnum):
    """What a group of experts is chosen by."""

    max = "max"
    top2_sum = "top2_sum"
    sum = "sum"


class Balance(StrEnum):
    """What keeps the load of the experts even."""

    none = "none"
    aux_loss = "aux_loss"
    bias = "bias"
