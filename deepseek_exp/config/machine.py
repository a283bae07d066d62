"""What this machine has, as far as rules depend on it; without torch."""

from __future__ import annotations

import ctypes
import os

from deepseek_exp.config.enums import Device
from deepseek_exp.config.schema import ExperimentConfig

# the CUDA driver's numbers of COMPUTE_CAPABILITY_MAJOR and _MINOR
CAPABILITY_ATTRIBUTES = (75, 76)


def runs_triton(exp: ExperimentConfig) -> bool:
    """Say whether Triton's kernels run here; its interpreter runs them on a CPU, slowly, which is meant for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" or (exp.device is not Device.cpu and visible_gpus() > 0)


def compute_capability() -> tuple[int, int]:
    """Ask the CUDA driver for the compute capability of the first GPU."""
    driver, found = ctypes.CDLL("libcuda.so.1"), (ctypes.c_int(), ctypes.c_int())
    for value, attribute in zip(found, CAPABILITY_ATTRIBUTES, strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return found[0].value, found[1].value


def visible_gpus() -> int:
    """Ask the CUDA driver itself for the GPUs there are, which takes milliseconds; it heeds CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
