"""Runs that continue or refer to others: the verb of a checkpoint, and the reference of preference training."""

from __future__ import annotations

import pytest

from deepseek_exp.errors import CheckpointError, ConfigError
from tests.experiment.test_job import checkpoint, job


def pairs(folder, *more):
    path = folder / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    rows = ("data=preference", f"data.path={path}", f"output_dir={folder}", "trainer.max_steps=9")
    return "do=dpo", *rows, "data.seq_len=32", *more


def saved_pairs(folder):
    """Write the checkpoint of a preference training."""
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return checkpoint(folder, *pairs(folder), f"data.tokenizer={folder / 'tokenizer.json'}")


def test_a_run_is_continued_by_its_own_verb(tmp_path):
    saved = saved_pairs(tmp_path)
    again = job("do=dpo", "resume=last", f"output_dir={tmp_path}")
    assert again.checkpoint == saved and again.continues is None and again.cfg.data.source == "preference"
    for verb in ("train", "sft", "grpo"):
        with pytest.raises(ConfigError, match=f"do='{verb}' cannot continue a run of do=dpo.* Fix: set do=dpo"):
            job(f"do={verb}", "resume=last", f"output_dir={tmp_path}")
    assert job("do=sample", "resume=last", f"output_dir={tmp_path}").checkpoint == saved


def test_a_pretrained_run_is_no_preference_training(tmp_path):
    checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="do='dpo' cannot continue a run of do=train"):
        job(*pairs(tmp_path, "resume=last"))


def test_the_reference_is_a_run_of_the_same_model(tmp_path):
    start = checkpoint(tmp_path, "model.n_layers=2", run="a")
    other = checkpoint(tmp_path, "model.n_layers=3", run="b", step=4)
    words = pairs(tmp_path, f"init_from={start}")
    assert job(*words).cfg.dpo.reference is None
    assert job(*words, f"dpo.reference={start.parent.parent}").cfg.dpo.reference == str(start)
    with pytest.raises(ConfigError, match=r"dpo.reference=.* has another model .*\(model.n_layers\)"):
        job(*words, f"dpo.reference={other}")
    with pytest.raises(CheckpointError, match=r"dpo.reference='/nowhere'"):
        job(*words, "dpo.reference=/nowhere")
