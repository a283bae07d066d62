"""Triton's interpreter, which runs kernels on a CPU; it must be chosen before a kernel is defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"
