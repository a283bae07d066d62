"""Every process-wide switch that the package sets: of PyTorch, of DeepSpeed, of Lightning and of warnings.

A switch outlives the experiment that set it, and another job of a sweep may follow in the same process. So what differs
between experiments is set for each of them, whatever an earlier one left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deepseek_exp.config import ExperimentConfig

# The number of threads that PyTorch chose by itself. An earlier job of a sweep may have set another one since.
N_THREADS = torch.get_num_threads()
# Max compiled graphs per block: dense and MoE, in training and validation, for each MTP depth.
MAX_GRAPHS = 64
# Warnings about choices that are made on purpose here.
EXPECTED_WARNINGS = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*GPU available but not used.*",
    ".*It is recommended to use `self.log\\('val/.*",  # the logged values are equal on all ranks already
    ".*`torch.distributed.\\w+_tensor` is deprecated.*",  # its replacement is not in every supported PyTorch
)


def set_up_torch(cfg: ExperimentConfig) -> None:
    """Set PyTorch's number of threads, seed and determinism."""
    n_threads = cfg.trainer.n_threads or N_THREADS
    if n_threads != torch.get_num_threads():
        torch.set_num_threads(n_threads)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(cfg.seed)
    if cfg.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.trainer.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over new memory


def limit_graphs() -> None:
    """Have torch.compile raise an error beyond `MAX_GRAPHS` graphs of one function, where it would run it eagerly."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def silence_expected() -> None:
    """Hide Lightning's hints and the warnings about choices that are made on purpose."""
    for pattern in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[Any]:
    """Import DeepSpeed and yield it; what it prints while an engine is set up is dropped."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_initialized() else "cpu")
    with Path(os.devnull).open("w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        import deepspeed

        # It would start compilers to find out which operators can be built, and then look for one alone, which shares
        # memory. That one would compile for over a minute, and no step waits for the links it speeds up.
        vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        yield deepspeed
