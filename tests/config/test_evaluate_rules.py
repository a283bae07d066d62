"""Rules of an evaluation that hold for do=eval only: files that exist, and one process."""

from __future__ import annotations

import pytest

from deepseek_exp.errors import ConfigError
from tests.config.test_config import composed

TEXT = ("do=eval", "+evaluate.tasks.x.kind=text", "+evaluate.tasks.x.path=a.jsonl")


def keys(*overrides):
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    return {f"{p.key} {p.id}" for p in caught.value.problems}


def test_files_have_to_exist(tmp_path):
    assert keys(*TEXT, f"evaluate.folder={tmp_path}") == {"evaluate.tasks.x.path _file"}
    assert keys("do=eval", "evaluate.texts=/nowhere") == {"evaluate.texts _exists"}
    (tmp_path / "a.jsonl").write_text("{}")
    assert composed(*TEXT, f"evaluate.folder={tmp_path}").evaluate.tasks["x"].path == "a.jsonl"
    harness = ("do=eval", "+evaluate.tasks.x={kind:lm_eval,path:a.jsonl,tasks:[t]}")
    assert keys(*harness, f"evaluate.folder={tmp_path}") == {"evaluate.tasks.x.path _file"}  # a folder is needed


def test_tasks_need_one_process(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    found = keys(*TEXT, f"evaluate.folder={tmp_path}", "parallel.dp=2", "trainer.micro_batch_seqs=4", "device=cpu")
    assert found == {"evaluate.tasks _layout"}


def test_the_options_are_complete(tmp_path):
    """Only their files are missing."""
    found = keys("do=eval", "evaluate=tasks", f"evaluate.folder={tmp_path}")
    assert found == {f"evaluate.tasks.{name}.path _file" for name in ("gsm8k", "pubmedqa", "finance")}
    assert keys("do=eval", "evaluate=code", "evaluate.allow_code_execution=true", f"evaluate.folder={tmp_path}") == {
        "evaluate.tasks.humaneval.path _file"
    }
