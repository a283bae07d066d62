"""Change one byte of a checkpoint, in each of its files in turn, and see that it is found.

    python -m tests.fuzz.flips [N] [SEED]

A run of one process and one of two ranks each have two checkpoints. Of each flip `manifest.verify` of the newer has to
raise a CheckpointError, and `manifest.locate` to pass over it to the older with a sentence. Anything else is printed.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO, begin
from deepseek_exp.checkpoint.shards import Cut, Piece, Whole, save_shard
from deepseek_exp.errors import CheckpointError

SHAPES = {"a.weight": (16, 8), "b.weight": (32, 4)}
TEXTS = {
    "config.yaml": "seed: 1\nmodel:\n  version: v1_dense\n",
    "tokenizer.json": '{"model": {"type": "BPE"}}',
    "data.json": '{"train": "9f86d081884c7d65", "tokenizer": "2c26b46b68ffc68f"}',
}


class Found(NamedTuple):
    """What a campaign came to.

    Attributes:
        flips: per file name, how many.
        missed: a sentence for each flip that was not found, or not as it should be.
    """

    flips: Counter[str]
    missed: list[str]


def _rest(step: int) -> dict[str, object]:
    return {"global_step": step, "val_loss": 1.5 + step, "rng": torch.get_rng_state(), "loops": {"a": (1, None)}}


def save_single(run_dir: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Save as one process does."""
    group = {"lr": 1e-3, "params": [0, 1], "param_names": list(weights)}
    states = {i: {"step": torch.tensor(7.0), "exp_avg": w * 0.1} for i, w in enumerate(weights.values())}
    tree = {"state_dict": {f"model.{name}": w for name, w in weights.items()}, **_rest(step)}
    tree["optimizer_states"] = [{"state": states, "param_groups": [group]}]
    target = run_dir / manifest.FOLDER / manifest.checkpoint_name(step)
    FolderCheckpointIO(TEXTS, "0123456789abcdef").save_checkpoint(tree, target)


def save_sharded(run_dir: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Save as two ranks do that have half of each matrix."""
    target = run_dir / manifest.FOLDER / manifest.checkpoint_name(step)
    folder, records = begin(target), {}
    for rank in range(2):
        pieces = []
        for name, w in weights.items():
            half = w.chunk(2)[rank].flatten()
            pieces.append(Piece(name, tuple(w.shape), (Cut(0, 2, rank),), 0, {"weight": half, "exp_avg": half * 0.1}))
        records |= save_shard(folder, rank, pieces, {})
    whole = Whole(torch.float32, [{"lr": 1e-3, "param_names": list(weights)}], {"step": 7.0}, {})
    FolderCheckpointIO(TEXTS, "0123456789abcdef").finish(folder, target, _rest(step), whole, records)


def campaign(top: Path, n: int, seed: int) -> Found:
    """Make the checkpoints below `top` and flip `n` bytes of the newer ones."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    files = []
    for name, save in (("single", save_single), ("sharded", save_sharded)):
        run_dir = top / name / "runs" / "run"
        for step in (3, 7):
            save(run_dir, step, weights)
        newest = run_dir / manifest.FOLDER / manifest.checkpoint_name(7)
        assert manifest.locate("last", top / name) == (newest, [])
        files += [*sorted(newest.iterdir()), *[newest / manifest.MANIFEST] * 3]  # nothing but its own digest guards it
    found = Found(Counter(), [])
    for i in range(n):
        path = files[i % len(files)]
        whole = path.read_bytes()
        at, change = rng.randrange(len(whole)), rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        found.flips[path.name] += 1
        missed = _missed(path.parent)
        if missed is not None:
            found.missed.append(f"{path.name}: byte {at} of {len(whole)} changed by {change:#04x}: {missed}")
        path.write_bytes(whole)
    return found


def _missed(folder: Path) -> str | None:
    """Describe how a damaged checkpoint was not found; None: it was."""
    run_dir = manifest.run_dir_of(folder)
    try:
        manifest.verify(folder)
        return "verify finds nothing"
    except CheckpointError:
        pass
    except Exception as error:
        return f"verify raises {type(error).__name__}: {error}"
    try:
        taken, told = manifest.locate("last", run_dir.parents[1])
    except Exception as error:
        return f"locate raises {type(error).__name__}: {error}"
    if taken.name != manifest.checkpoint_name(3) or len(told) != 1:
        return f"locate takes {taken.name} and says {told}"
    return None


def main() -> int:
    """Print what was flipped in which file, and every flip that was missed."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory() as top:
        found = campaign(Path(top), n, seed)
    for name, count in sorted(found.flips.items()):
        sys.stdout.write(f"{count:5d} x {name}\n")
    sys.stdout.write("".join(f"MISSED {line}\n" for line in found.missed))
    sys.stdout.write(f"{n - len(found.missed)} of {n} flips found, seed {seed}\n")
    return bool(found.missed)


if __name__ == "__main__":
    sys.exit(main())
