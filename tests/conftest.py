"""What holds for all tests."""

from __future__ import annotations

import os

# one thread an operation: the tests run two at a time, and losses stay the same on any number of cores
os.environ["OMP_NUM_THREADS"] = "1"
# Triton's interpreter, which runs kernels on a CPU; it must be chosen before anything imports Triton
os.environ["TRITON_INTERPRET"] = "1"
