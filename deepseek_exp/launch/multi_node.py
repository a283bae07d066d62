"""Commands that start the ranks of one job on several machines: a torchrun command for each, or a Slurm script."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from deepseek_exp.config import LaunchConfig

# On SIGUSR1 torchrun asks the ranks to save and stop, and waits that long.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
STOP_SECONDS = 600
NO_VALUE = ""


def ranks_per_node(launch: LaunchConfig, n_ranks: int) -> int:
    """Return the number of ranks per machine."""
    return launch.ranks_per_node or n_ranks // launch.n_nodes


def torchrun_command(launch: LaunchConfig, n_ranks: int, job_file: Path, env: Mapping[str, str]) -> str:
    """Return the command to run on each machine; all see the same folders under the same paths."""
    endpoint = f"{launch.master_addr or socket.gethostname()}:{launch.master_port}"
    words = _torchrun(launch, n_ranks, job_file, shlex.quote(endpoint), shlex.quote(job_file.parent.parent.name))
    return f"cd {shlex.quote(str(Path.cwd()))} && {_assignments(env)} {words}"


def slurm_script(launch: LaunchConfig, n_ranks: int, job_file: Path, env: Mapping[str, str], *, on_gpus: bool) -> str:
    """Return the batch script: one task per machine, which is torchrun; the ranks meet on the job's first machine."""
    options = {
        "job-name": shlex.quote(job_file.parent.parent.name),
        "nodes": launch.n_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": ranks_per_node(launch, n_ranks) if on_gpus else None,
        "exclusive": NO_VALUE,
        "account": _quoted(launch.account),
        "partition": _quoted(launch.partition),
        "time": _quoted(launch.time_limit),
        "output": shlex.quote(f"{job_file.parent.resolve()}/slurm_%j.log"),
        "signal": f"USR1@{STOP_SECONDS}" if launch.time_limit else None,
    }
    lines = [_directive(name, value) for name, value in options.items() if value is not None]
    words = _torchrun(launch, n_ranks, job_file, f'"$head:{launch.master_port}"', '"$SLURM_JOB_ID"')
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "head=${hosts%%$'\\n'*}",
            f"export {_assignments(env)}",
            f"srun --kill-on-bad-exit=1 --cpu-bind=none {words}",
            "",
        ]
    )


def _directive(name: str, value: object) -> str:
    return f"#SBATCH --{name}" if value is NO_VALUE else f"#SBATCH --{name}={value}"


def _quoted(word: str | None) -> str | None:
    """Quote a word for sbatch, which reads quotes as a shell does; None stays None."""
    return None if word is None else shlex.quote(word)


def _torchrun(launch: LaunchConfig, n_ranks: int, job_file: Path, endpoint: str, job_id: str) -> str:
    """Return torchrun's command line; it is called as a module, so that it runs under this Python."""
    options = {
        "nnodes": launch.n_nodes,
        "nproc-per-node": ranks_per_node(launch, n_ranks),
        "max-restarts": 0,
        "rdzv-backend": "c10d",
        "rdzv-endpoint": endpoint,
        "rdzv-id": job_id,
        "signals-to-handle": SIGNALS,
    }
    words = [f"--{name} {value}" for name, value in options.items()]
    python, file = shlex.quote(sys.executable), shlex.quote(str(job_file))
    return " ".join([f"{python} -m torch.distributed.run", *words, f"-m deepseek_exp.commands.rank {file}"])


def _assignments(env: Mapping[str, str]) -> str:
    every = {**env, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_SECONDS)}
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in every.items())
