"""What this machine has, as far as rules depend on it; without torch."""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass

from deepseek_exp.config.enums import Device

# the CUDA driver's numbers of COMPUTE_CAPABILITY_MAJOR and _MINOR
CAPABILITY_ATTRIBUTES = (75, 76)


@dataclass(frozen=True)
class Machine:
    """The facts of a machine that rules read; the defaults are those of a machine with nothing but a CPU.

    Attributes:
        n_gpus: visible CUDA devices.
        compute_capability: of the first of them, as (major, minor).
        interprets_triton: Triton's interpreter is on, which runs kernels on a CPU, slowly; it is meant for tests.
        has_sbatch: Slurm's sbatch is in PATH.
    """

    n_gpus: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    interprets_triton: bool = False
    has_sbatch: bool = False

    @classmethod
    def here(cls) -> Machine:
        """Return the facts of this machine, as they are now; the driver answers within milliseconds."""
        n_gpus = _visible_gpus()
        return cls(
            n_gpus=n_gpus,
            compute_capability=_compute_capability() if n_gpus else (0, 0),
            interprets_triton=os.environ.get("TRITON_INTERPRET") == "1",
            has_sbatch=shutil.which("sbatch") is not None,
        )

    def runs_triton(self, device: Device) -> bool:
        """Return whether Triton's kernels run here if this device is asked for."""
        return self.interprets_triton or (device is not Device.cpu and self.n_gpus > 0)


def _compute_capability() -> tuple[int, int]:
    """Return the compute capability of the first GPU, as the CUDA driver reports it."""
    driver, found = ctypes.CDLL("libcuda.so.1"), (ctypes.c_int(), ctypes.c_int())
    for value, attribute in zip(found, CAPABILITY_ATTRIBUTES, strict=True):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
    return found[0].value, found[1].value


def _visible_gpus() -> int:
    """Return the number of GPUs that the CUDA driver sees; it heeds CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
