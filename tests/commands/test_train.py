"""What a training says of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from deepseek_exp.checkpoint import manifest, migrations
from deepseek_exp.checkpoint.manifest import Contract, Lineage
from deepseek_exp.commands.train import _lineage, _with_steps
from deepseek_exp.data import prepare
from deepseek_exp.data.sequences import sequences_of
from deepseek_exp.errors import ConfigError
from tests.experiment.test_job import QUICK, checkpoint, job

CONTRACT = Contract("7" * 64, None, 128)
PARTS = SimpleNamespace(data=SimpleNamespace(tokenizer=SimpleNamespace(digest=CONTRACT.tokenizer), template=None))


def test_a_run_from_scratch_has_a_contract_and_no_inputs(tmp_path):
    fresh = job(*QUICK, f"output_dir={tmp_path}", "model.max_seq_len=128")
    assert _lineage(fresh, PARTS) == Lineage({}, CONTRACT)


def test_a_run_from_weights_names_their_checkpoint(tmp_path):
    start = checkpoint(tmp_path, "model.max_seq_len=128")
    from_weights = job(*QUICK[1:], f"output_dir={tmp_path}", f"init_from={start.parent.parent}")
    from_weights = dataclasses.replace(from_weights, stage_key="a" * 64)
    assert _lineage(from_weights, PARTS) == Lineage({"start": manifest.digest(start)}, CONTRACT, stage_key="a" * 64)


def test_a_resumed_run_keeps_what_its_checkpoint_says(tmp_path):
    saved = checkpoint(tmp_path, "model.max_seq_len=128")
    fields = json.loads((saved / manifest.MANIFEST).read_text())
    del fields["sha256"]
    fields |= {"inputs": {"start": "b" * 64}, "stage_key": "c" * 64}
    (saved / manifest.MANIFEST).write_text(migrations.with_digest(fields))
    words = (f"output_dir={tmp_path}", "resume=last", "trainer.max_steps=300")
    resumed = dataclasses.replace(job(*words), continues=None)
    assert _lineage(resumed, PARTS) == Lineage({"start": "b" * 64}, CONTRACT, stage_key="c" * 64)
    changed = job(*words, "optim.lr=1")
    assert changed.continues is not None
    assert _lineage(changed, PARTS) == Lineage({"start": "b" * 64}, CONTRACT)


def test_epochs_become_steps(tmp_path):
    fresh = job(*QUICK, f"output_dir={tmp_path}", "trainer.max_epochs=1.5", "trainer.global_batch_seqs=8")
    steps = _with_steps(fresh).cfg.trainer.max_steps
    n_sequences = sequences_of(prepare(fresh.cfg.data), fresh.cfg.data, "train").n_sequences
    assert steps == math.ceil(1.5 * n_sequences / 8) and steps != fresh.cfg.trainer.max_steps
    assert _with_steps(dataclasses.replace(fresh, cfg=_with_steps(fresh).cfg)).cfg.trainer.max_steps == steps


def test_epochs_too_few_for_the_warm_up_or_already_done(tmp_path):
    few = (*QUICK, f"output_dir={tmp_path}", "trainer.max_epochs=0.001")
    with pytest.raises(ConfigError, match=r"optim.warmup_steps=\d+ leaves no step of the \d+ of trainer.max_epochs="):
        _with_steps(job(*few, "optim.warmup_steps=999"))
    saved = checkpoint(tmp_path, "trainer.max_epochs=0.001", "optim.warmup_steps=0")
    resumed = job(f"output_dir={tmp_path}", "resume=last")
    assert resumed.checkpoint == saved
    with pytest.raises(ConfigError, match=r"trainer.max_epochs=0.001 is reached: .* is at step \d+ of \d+"):
        _with_steps(resumed)
