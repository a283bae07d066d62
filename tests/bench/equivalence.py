"""Compare every layout's training with that of one process: losses, gradient norms and the weights at the end.

    python tests/bench/equivalence.py [--rows v1,v3] [--layouts pp2,tp2] [--keep FOLDER]

20 steps on the CPU with clipping that bites, micro batches of one sequence, 4 layers. The column "nudged" is the
largest of four trainings of one process that round otherwise (tests/parallel/layouts.py, `Nudged`); a layout may differ
by twice as much, or by the fixed bounds where these are larger. Exit code 1: it differs by more, or a run died.
A row or layout is meant by its whole name or its first word. Results: README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.errors import UserError
from tests.config.test_config import composed
from tests.parallel.layouts import (
    SHORT,
    Difference,
    Layouts,
    Nudged,
    RankDied,
    difference,
    labelled_texts,
    layout,
    n_ranks,
)

FP32 = Difference(loss=2e-6, grad_norm=1e-5, weight=1e-5, routing=1e-9)
BF16 = Difference(loss=2e-3, grad_norm=1e-2, weight=3e-3, routing=1.0)
DEGREES = {
    "pp2": {"pp": 2},
    "tp2": {"tp": 2},
    "dp2": {"dp": 2},
    "dp2ep2": {"dp": 2, "ep": 2},
    "pp4": {"pp": 4},
    "tp4": {"tp": 4},
    "pp2tp2": {"pp": 2, "tp": 2},
    "pp2dp2": {"pp": 2, "dp": 2},
    "tp2dp2": {"tp": 2, "dp": 2},
    "tp2dp2ep2": {"tp": 2, "dp": 2, "ep": 2},
    "pp2tp2dp2": {"pp": 2, "tp": 2, "dp": 2},
    "pp2dp4ep2": {"pp": 2, "dp": 4, "ep": 2},
    "pp2tp2dp2ep2": {"pp": 2, "tp": 2, "dp": 2, "ep": 2},
    "dp2 z0": {"dp": 2, "zero_stage": 0},
    "tp2dp2 z0": {"tp": 2, "dp": 2, "zero_stage": 0},
    "tp2dp2ep2 z0": {"tp": 2, "dp": 2, "ep": 2, "zero_stage": 0},
    "dp2 z2": {"dp": 2, "zero_stage": 2},
    "dp2 z3": {"dp": 2, "zero_stage": 3},
}
NUDGED, N_NUDGES = "nudged", 4
LARGEST = ("pp2tp2dp2", "pp2tp2dp2ep2")


@dataclass(frozen=True)
class Row:
    """A model to train.

    Attributes:
        overrides: of the configuration, of one process too.
        layouts: that it is trained in, where they are legal.
        only_parts: overrides that one process does not know.
        labelled: on texts with labels.
        bounds: what it may differ by.
    """

    overrides: tuple[str, ...]
    layouts: tuple[str, ...] = tuple(DEGREES)
    only_parts: tuple[str, ...] = ()
    labelled: bool = False
    bounds: Difference = FP32


UNTIED, TIED, FULL = "model.tie_embeddings=false", "model.tie_embeddings=true", "trainer.activation_checkpointing=full"
SEQUENCE, BF = ("parallel.sequence_parallel=true",), "trainer.precision=bf16"
ZERO = ("dp2 z0", "dp2 z2", "dp2 z3")
EXPERTS = ("pp2", "tp2", "dp2", "dp2ep2", "pp4", "pp2dp2", "tp2dp2ep2", "pp2tp2dp2ep2")
CUT = ("tp2", "tp4", "tp2dp2", "pp2tp2", "tp2dp2ep2", "pp2tp2dp2")
ROWS = {
    "v1 tied": Row(("model=v1_dense",)),
    "v1 untied": Row(("model=v1_dense", UNTIED)),
    "v2": Row(("model=v2_moe",)),
    "v2.5": Row(("model=v2_5_sparse",)),
    "v3": Row(("model=v3_moe",)),
    "v3 tied": Row(("model=v3_moe", TIED), ("pp2", "tp2", "pp4", "pp2tp2dp2ep2")),
    "v3 capacity": Row(("model=v3_moe", "model.moe.capacity_factor=1.1", "model.moe.balance=aux_loss"), EXPERTS),
    "v4": Row(("model=v4_distill",)),
    "v5": Row(("model=v5_domain_moe",)),
    "v5 labels": Row(("model=v5_domain_moe",), labelled=True),
    "deepseek_v3": Row(("model=deepseek_v3",)),
    "v4 1 kv head": Row(("model=v4_distill", "model.n_kv_heads=1", "model.qkv_bias=true"), CUT),
    "v4 qkv_bias qk_norm": Row(("model=v4_distill", "model.qkv_bias=true", "model.qk_norm=true"), CUT),
    "v1 sequence": Row(("model=v1_dense",), CUT, SEQUENCE),
    "v2 sequence": Row(("model=v2_moe",), CUT, SEQUENCE),
    "v4 sequence": Row(("model=v4_distill", "model.n_kv_heads=1", "model.qk_norm=true"), CUT, SEQUENCE),
    "v5 sequence": Row(("model=v5_domain_moe",), CUT, SEQUENCE, labelled=True),
    "v1 recomputed": Row(("model=v1_dense", FULL), ("pp2", "tp2", *LARGEST)),
    "v3 recomputed": Row(("model=v3_moe", FULL), ("pp2", "tp2", "dp2ep2", *LARGEST)),
    "v1 bf16": Row(("model=v1_dense", BF), ("pp2", "tp2", "dp2", "pp2tp2dp2", *ZERO), bounds=BF16),
    "v3 bf16": Row(("model=v3_moe", BF), ("pp2", "tp2", "dp2", "dp2ep2", *LARGEST, *ZERO), bounds=BF16),
}


def meant(known: dict, asked: str) -> list[str]:
    """Pick the names that an argument means, by the whole name or its first word; all of them when it is empty."""
    words = asked.split(",")
    first = {name: name.split()[0] for name in known}
    return [n for n in known if not asked or n in words or (first[n] in words and first[n] not in known)]


def is_legal(overrides: tuple[str, ...]) -> bool:
    """Say whether a configuration is."""
    try:
        composed(*SHORT, *overrides)
    except UserError:
        return False
    return True


def cells(layouts: Layouts, row: Row, names: list[str], texts: tuple[str, ...]) -> Iterator[tuple[str, str, bool]]:
    """Train a row in its layouts; gives the column, the cell of the table, and whether the bounds hold."""
    base = (*row.overrides, "model.n_layers=4", *(texts if row.labelled else ()))
    one = layouts.run(1, *base, *layout())
    nudged = [layouts.run(1, *base, *layout(), watch=Nudged, watch_args=(seed,)) for seed in range(N_NUDGES)]
    noise = Difference(*map(max, zip(*(astuple(difference(one, run)) for run in nudged), strict=True)))
    yield NUDGED, cell(noise), True
    limits = [max(fixed, 2 * own) for fixed, own in zip(astuple(row.bounds), astuple(noise), strict=True)]
    for name in names:
        degrees, overrides = DEGREES[name], (*base, *row.only_parts, *layout(**DEGREES[name]))
        if name not in row.layouts or not is_legal(overrides):
            continue
        began = time.monotonic()
        try:
            found = difference(one, layouts.run(n_ranks(degrees), *overrides, hang_seconds=400))
        except RankDied as error:
            sys.stderr.write(f"{error}\n")
            yield name, "died", False
            continue
        holds = all(value <= limit for value, limit in zip(astuple(found), limits, strict=True))
        sys.stderr.write(f"{name} {found} {time.monotonic() - began:.0f} s{'' if holds else ' PASSES A BOUND'}\n")
        yield name, cell(found), holds


def cell(found: Difference) -> str:
    """Write losses, gradient norms and weights in short."""
    return " ".join(f"{value:.0e}" for value in astuple(found)[:3]).replace("e-0", "e-")


def main() -> int:
    """Print the table; gives the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="")
    parser.add_argument("--layouts", default="")
    parser.add_argument("--keep")
    asked = parser.parse_args()
    columns, good = meant(DEGREES, asked.layouts), True
    head = ["loss, norm, weights", NUDGED, *columns]
    print("|" + "|".join(f" {name} " for name in head) + "|\n|" + "---|" * len(head), flush=True)  # noqa: T201
    with contextlib.ExitStack() as stack:
        folder = Path(asked.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        layouts = stack.enter_context(Layouts(folder))
        texts = labelled_texts(folder)
        for name in meant(ROWS, asked.rows):
            sys.stderr.write(f"{name}\n")
            found = {}
            for column, cell, holds in cells(layouts, ROWS[name], columns, texts):
                found[column], good = cell if holds else f"**{cell}**", good and holds
            print(f"| {name} | " + " | ".join(found.get(column, "") for column in head[1:]) + " |", flush=True)  # noqa: T201
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
