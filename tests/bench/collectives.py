"""What ranks of one machine need to exchange numbers: bandwidth and latency, for `cluster.intra_node_*`.

    torchrun --standalone --nproc-per-node 2 tests/bench/collectives.py

For each collective and size: the median time, and what a rank sends in it (`planner/traffic.py`) over that time. A line
through the times, least squares of relative errors, gives what the plan has: bytes / bandwidth + latency. Then what one
wait of the host for the device costs where the host is ahead, and with a gather of a few numbers before it, as an
exchange of tokens between experts begins.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.planner.traffic import ring_all_reduce, ring_gather

SIZES = [2**k for k in range(16, 30, 2)]
ROUNDS = 20


def collectives(x: Tensor) -> dict[str, tuple[Callable[[], object], float]]:
    """Give what there is to time on x, and the bytes that a rank sends in each."""
    n, n_bytes, rank = dist.get_world_size(), x.numel() * x.element_size(), dist.get_rank()
    part, other = x.chunk(n)[0].clone(), torch.empty_like(x)

    def to_the_next() -> None:
        works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, x, (rank + 1) % n), dist.P2POp(dist.irecv, other, (rank - 1) % n)
        ])  # fmt: skip
        for work in works:
            work.wait()

    return {
        "all-reduce": (lambda: dist.all_reduce(x), ring_all_reduce(n_bytes, n)),
        "all-gather": (lambda: dist.all_gather_into_tensor(other, part), ring_gather(n_bytes, n)),
        "reduce-scatter": (lambda: dist.reduce_scatter_tensor(part, x), ring_gather(n_bytes, n)),
        "all-to-all": (lambda: dist.all_to_all_single(other, x), ring_gather(n_bytes, n)),
        "send and receive": (to_the_next, n_bytes),
    }


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Give the median time of a call, the slowest rank's; each begins when all ranks are there."""
    times = []
    for i in range(ROUNDS + 3):
        dist.barrier()
        wait(device)
        began = time.perf_counter()
        for _ in range(4):
            call()
        wait(device)
        taken = torch.tensor((time.perf_counter() - began) / 4, device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        if i >= 3:
            times.append(float(taken))
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fitted(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Give bytes a second and seconds a message of the line with the least squares of relative errors."""
    bytes_seconds = torch.tensor(points, dtype=torch.float64)
    columns = torch.stack([bytes_seconds[:, 0], torch.ones(len(points), dtype=torch.float64)], 1)
    line = torch.linalg.lstsq(columns / bytes_seconds[:, 1:], torch.ones(len(points), 1, dtype=torch.float64)).solution
    return 1 / float(line[0]), float(line[1])


def host_waits(device: torch.device) -> dict[str, float]:
    """Give the seconds of a wait in a row of small kernels, beside the row alone, and with a gather before it."""
    x = torch.ones(1024, device=device)
    few = torch.zeros(64, device=device)
    gathered = few.new_empty(64 * dist.get_world_size())

    def kernels() -> None:
        for _ in range(50):
            x.mul_(1.0)

    def one_wait() -> None:
        kernels()
        float(x[0])

    def gather() -> None:
        kernels()
        dist.all_gather_into_tensor(gathered, few)
        float(gathered[0])

    return {"50 kernels": seconds(kernels, device), "and a wait": seconds(one_wait, device),
            "and a gather and a wait": seconds(gather, device)}  # fmt: skip


def main() -> None:
    """Print the tables, on the first rank."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    lines, points = ["| | MB | ms | GB/s |", "|---|---|---|---|"], {}
    for size in SIZES if on_gpu else SIZES[:3]:
        x = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
        for name, (call, sent) in collectives(x).items():
            taken = seconds(call, device)
            points.setdefault(name, []).append((sent, taken))
            lines.append(f"| {name} | {size / 1e6:.2f} | {taken * 1e3:.3f} | {sent / taken / 1e9:.1f} |")
    for name, pairs in points.items():
        bandwidth, latency = fitted(pairs)
        lines.append(f"| {name}, line | | {latency * 1e3:.4f} + bytes / | {bandwidth / 1e9:.1f} |")
    lines += [f"| {name} | | {taken * 1e3:.3f} | |" for name, taken in host_waits(device).items()]
    if dist.get_rank() == 0:
        sys.stdout.write("\n".join(lines) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
