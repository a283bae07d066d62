"""Save under one layout, load under another, and train on: how far are the next losses from the unbroken run?

    python tests/bench/reshard.py [MODEL ...]

The unbroken run is that of the layout that saved. Each layout is also resumed by itself, which has to repeat every bit
of losses and final weights. Then one Hugging Face folder from the shards of several ranks is compared with that of one
process, file by file, and one process samples from shards and evaluates them. Results: README.md beside this file.
"""

from __future__ import annotations

import filecmp
import math
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepseek_exp.checkpoint import manifest
from tests import runs
from tests.parallel.layouts import Layouts, Ran, layout

SAVED, MORE = 6, 5  # steps before the checkpoint and after it
BOUND = 1e-6  # nats per token; a loss of 6 nats is known to 4.8e-7 in fp32
LAYOUTS = {
    "v3_moe": {
        "single": {},
        "pp2": {"pp": 2},
        "tp2": {"tp": 2},
        "dp2": {"dp": 2},
        "dp2 ep2": {"dp": 2, "ep": 2},
        "pp4": {"pp": 4},
        "pp2 tp2": {"pp": 2, "tp": 2},
        "tp2 dp2": {"tp": 2, "dp": 2},
        "pp2 dp2 ep2": {"pp": 2, "dp": 2, "ep": 2},
        "pp2 tp2 dp2": {"pp": 2, "tp": 2, "dp": 2},
    },
    "v1_dense": {
        "single": {},
        "pp2": {"pp": 2},
        "tp2": {"tp": 2},
        "tp4": {"tp": 4},
        "pp2 dp2": {"pp": 2, "dp": 2},
    },
}
# what run.py trains for the exports: steps too small to change a weight, so that all layouts end with the same bits
STILL = ("optim.lr=1e-30", "optim.warmup_steps=1", "trainer.max_steps=2", "trainer.micro_batch_seqs=2")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Trainings:
    """The unbroken run of each layout of a model, and what goes on from its checkpoint."""

    def __init__(self, layouts: Layouts, model: str) -> None:
        self.layouts, self.model = layouts, model
        self.unbroken: dict[str, tuple[Ran, dict[str, torch.Tensor]]] = {}

    def train(self, name: str, resume: Ran | None) -> Ran:
        """Train under a layout, from the start or from what a run saved."""
        degrees = LAYOUTS[self.model][name]
        steps = f"trainer.max_steps={SAVED + MORE}", f"trainer.checkpoint_every_steps={SAVED}"
        words = (f"model={self.model}", "model.n_layers=4", *steps, *layout(**degrees))
        return self.layouts.run(math.prod(n for axis, n in degrees.items() if axis != "ep"), *words, resume=resume)

    def whole(self, name: str) -> tuple[Ran, dict[str, torch.Tensor]]:
        """Give the unbroken run of a layout and its final weights; of its checkpoints only the earlier one stays."""
        if name not in self.unbroken:
            ran = self.train(name, None)
            self.unbroken[name] = ran, ran.weights()
            shutil.rmtree(manifest.list_checkpoints(ran.folder)[-1])
        return self.unbroken[name]

    def compare(self, saved: str, loaded: str) -> tuple[float, bool]:
        """Give the largest difference of the losses after the checkpoint, and whether all is equal bit for bit."""
        before, weights = self.whole(saved)
        after = self.train(loaded, before)
        expected = {step: values["train/loss"] for step, values in before.metrics.items() if step > SAVED}
        found = {step: values["train/loss"] for step, values in after.metrics.items()}
        assert found.keys() == expected.keys() and len(found) == MORE, f"steps {list(found)}"
        apart = max(abs(found[step] - loss) for step, loss in expected.items())
        final = after.weights()
        return apart, apart == 0 and all(torch.equal(w, final[name]) for name, w in weights.items())


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """List which layouts are tried together: each with itself, with one process both ways, and with the next one."""
    others = names[1:]
    by_itself = [(name, name) for name in names]
    ring = [(a, b) for a, b in zip(others, [*others[1:], others[0]], strict=True)]
    return [*by_itself, *(("single", name) for name in others), *((name, "single") for name in others), *ring]


def table(model: str, folder: Path) -> bool:
    """Print the pairs of a model as a table; says whether all held."""
    say(f"\n| {model}: saved under | loaded under | next {MORE} losses differ by | seconds | |\n|---|---|---|---|---|")
    held = True
    with Layouts(folder) as layouts:
        trainings = Trainings(layouts, model)
        for saved, loaded in pairs(list(LAYOUTS[model])):
            trainings.whole(saved)
            began = time.monotonic()
            apart, equal = trainings.compare(saved, loaded)
            ok = equal if saved == loaded else apart <= BOUND
            held &= ok
            said = "bit for bit" if equal else f"{apart:.1e}"
            seconds = time.monotonic() - began
            say(f"| {saved} | {loaded} | {said} | {seconds:.0f} | {'ok' if ok else 'NO'} |")
    return held


def exports(folder: Path) -> list[str]:
    """Export, sample and evaluate the shards of four ranks in one process; names what went wrong."""
    found, targets, losses = [], [], []
    words = (*runs.QUICK, "model=v3_moe", "device=cpu", *STILL)
    for i, degrees in enumerate(({}, {"pp": 2, "dp": 2, "ep": 2})):
        here = folder / str(i)
        here.mkdir(parents=True)
        for verb in (words + layout(**degrees), ("do=export", "resume=last"), ("do=sample", "resume=last")):
            done = runs.run(here, *verb)
            if done.returncode:
                return [*found, f"{verb[-2:]} of {degrees} failed: {done.stderr[-2000:]}"]
        said = runs.run(here, "do=eval", "resume=last", *layout()).stdout
        losses.append(re.findall(r"loss (\S+) nats", said))
        targets.append(next((here / "outputs" / "runs").glob("*/hf")))
    names = sorted(path.name for path in targets[0].iterdir())
    same, different, missing = filecmp.cmpfiles(*targets, names, shallow=False)
    say(f"\nHugging Face folder of shards and of one process: {', '.join(same)} are equal bit for bit")
    say(f"validation loss in one process from one file and from shards: {losses}")
    found += [f"{name} differs" for name in different + missing]
    return found + ([] if losses[0] == losses[1] and losses[0] else ["the validation losses differ"])


def main() -> None:
    """Print the tables and what came of the exports; leave with status 1 where something does not hold."""
    models = sys.argv[1:] or list(LAYOUTS)
    with tempfile.TemporaryDirectory() as top:
        held = [table(model, Path(top) / model) for model in models]
        wrong = exports(Path(top) / "exports")
    say("\n".join(wrong) or "exports hold")
    sys.exit(not all(held) or bool(wrong))


if __name__ == "__main__":
    main()
