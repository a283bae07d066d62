"""A training in parts whose rank is killed, then all of it while it saves, ends as the unbroken one."""

from __future__ import annotations

import pytest

from tests import forks, runs
from tests.bench.kill_ranks import WORDS, differences, has_done, kill_all_saving, kill_one, resume, unbroken, wait_until

SHORT = (*WORDS, "trainer.max_steps=12", "trainer.checkpoint_every_steps=3", "trainer.eval_every_steps=6")
TWO = ("parallel.pp=2", "parallel.zero_stage=1", "trainer.micro_batch_seqs=2")


@pytest.mark.long
def test_a_killed_rank_and_then_a_killed_save(tmp_path):
    reference = unbroken(tmp_path / "reference", (*SHORT, *TWO))
    folder = tmp_path / "killed"
    folder.mkdir()
    process = forks.start(folder, *SHORT, *TWO)
    wait_until(lambda: has_done(folder, 4, 1), process)
    death = kill_one(folder, process, 1)
    assert death.wrong == []
    process = forks.start(folder, "resume=last")
    wait_until(lambda: has_done(folder, 5, 2), process)
    death = kill_all_saving(folder, process, 0.01)
    assert death.wrong == []
    seconds, wrong = resume(folder, death)
    assert wrong == [] and seconds > 0
    assert differences(runs.run_dirs(folder)[-1], reference) == []
