"""A step whose gradient is not finite, under every engine: it ends the run, or it is left out and counted.

Nothing of it is ever saved, and no good checkpoint is removed for it.
"""

from __future__ import annotations

import pytest

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.shards import open_state
from tests.parallel.layouts import RankDied, layout, n_ranks
from tests.parallel.nonfinite import Poison
from tests.parallel.test_equivalence import assert_same

BAD = (
    "model=v3_moe",
    "model.n_layers=4",
    "trainer.max_steps=6",
    "trainer.eval_every_steps=6",
    "trainer.checkpoint_every_steps=1",
    "trainer.keep_checkpoints=1",
    "trainer.log_every_steps=5",
)
SKIP = "trainer.on_nonfinite=skip"
LAYOUTS = {
    "one": {},
    "zero0": {"dp": 2, "zero_stage": 0},
    "zero1": {"dp": 2},
    "zero2": {"dp": 2, "zero_stage": 2},
    "zero3": {"dp": 2, "zero_stage": 3},
    "pp2": {"pp": 2},
}


def finite_checkpoints(folder):
    """Name the checkpoints of a run, all of which hold finite numbers alone."""
    found = manifest.list_checkpoints(folder)
    for path in found:
        state = open_state(path)
        assert manifest.read_manifest(path).finite
        for name in state.names:
            assert all(state.read(name, kind).isfinite().all() for kind in state.kinds(name)), (path, name)
    return [path.name for path in found]


def layouts_but(*long):
    """Return all layouts as parameters, some of them in the long tier."""
    return [pytest.param(d, id=name, marks=pytest.mark.long if name in long else []) for name, d in LAYOUTS.items()]


@pytest.mark.parametrize("degrees", layouts_but("zero0", "zero1", "zero2", "zero3"))
def test_stop_ends_the_run_at_the_bad_step(layouts, degrees):
    with pytest.raises(RankDied, match=r"optim/grad_norm=(nan|inf) is not finite at step 3 \(optim\.lr=0\.001\)"):
        layouts.run(n_ranks(degrees), *BAD, *layout(**degrees), watch=Poison, watch_args=([3],))
    assert finite_checkpoints(layouts.folder / f"run-{layouts.n_runs - 1:03d}") == ["step-00000002"]


@pytest.fixture(scope="module")
def skipped(layouts):
    return layouts.run(1, *BAD, SKIP, watch=Poison, watch_args=([3, 5],))


@pytest.mark.parametrize("degrees", layouts_but("zero0", "zero1", "zero2"))
def test_skip_leaves_the_step_out_alike(layouts, skipped, degrees):
    if degrees:
        found = layouts.run(n_ranks(degrees), *BAD, SKIP, *layout(**degrees), watch=Poison, watch_args=([3, 5],))
        for rows in (skipped.metrics, found.metrics):
            for step in (3, 5):
                assert "optim/grad_norm" not in rows[step]
        assert_same(skipped, found)
    else:
        found = skipped
    assert set(map(tuple, found.said)) == {(True, True, False, True, False, True)}
    assert found.trace("optim/skipped_steps") == [0.0, 1.0, 2.0, 2.0]
    assert found.trace("data/position")[-1] == 48.0
    assert finite_checkpoints(found.folder) == ["step-00000006"]
