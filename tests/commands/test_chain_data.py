"""What is wrong with the data of a late stage stops a chain before its first stage starts."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from deepseek_exp import config
from deepseek_exp.checkpoint import manifest
from deepseek_exp.commands.chain import run_chain
from deepseek_exp.commands.chain_data import check_data
from deepseek_exp.data import Tokenizer
from deepseek_exp.errors import ConfigError, DataError
from deepseek_exp.experiment import command_line
from deepseek_exp.experiment.chain_file import ChainFile
from tests import runs
from tests.experiment.test_job import checkpoint

ROW = {"prompt": "Is it so?", "response": "It is."}
PAIR = {"prompt": "Is it so?", "chosen": "It is.", "rejected": "No."}


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Return a function that runs a chain in an empty folder: text, then replies, then whatever the words add."""
    config.register()
    monkeypatch.chdir(tmp_path)
    rows = write(tmp_path, "rows.jsonl", [ROW | {"prompt": f"Is it {i}?"} for i in range(40)])

    def start(*words):
        first = ("+chain.stages.text.do=train", f"+chain.stages.replies={{do:sft,set:{{data:chat,data.path:{rows}}}}}")
        few = ("model.max_seq_len=64", "chain.yardstick.tokens=0")
        composed = command_line.check_command_line([*runs.QUICK, *first, *few, *words])
        with contextlib.redirect_stdout(io.StringIO()):
            run_chain(composed.stages, composed.exp, None, words)

    return start


def nothing_was_started():
    return not Path("outputs/runs").exists()


def last(data, path, **changes):
    """Return the words that add a last stage."""
    sets = "".join(f",{key}:{value}" for key, value in changes.items())
    verb = {"chat": "sft", "preference": "dpo", "prompts": "grpo"}[data]
    return f"+chain.stages.end={{do:{verb},set:{{data:{data},data.path:{path}{sets}}}}}"


MALFORMED = {
    "chat": ([ROW] * 30 + [{"prompt": "a"}], r"^end: data\.path='\S*:31' has neither"),
    "preference": ([PAIR] * 30 + ["{"], r"^end: data\.path='\S*:31' "),
    "prompts": (
        [{"prompt": "1+1", "answer": 2}] * 30 + [{"prompt": "1"}],
        r"^end: data\.path='\S*:31' has no key 'answer'",
    ),
}


@pytest.mark.parametrize("data", MALFORMED)
def test_a_malformed_row(chain, tmp_path, data):
    rows, message = MALFORMED[data]
    more = ["grpo.group_size=2", "grpo.max_new_tokens=8"] if data == "prompts" else []
    with pytest.raises(DataError, match=message):
        chain(last(data, write(tmp_path, "last.jsonl", rows)), *more)
    assert nothing_was_started()


def test_a_row_without_supervised_tokens(chain, tmp_path):
    rows = write(tmp_path, "last.jsonl", [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(30)])
    with pytest.raises(DataError, match=r"^end: data\."):
        chain(last("chat", rows))
    assert nothing_was_started()


def test_another_chat_template_than_that_of_the_start(chain, tmp_path):
    rows = write(tmp_path, "last.jsonl", [ROW | {"response": f"It is {i}."} for i in range(40)])
    with pytest.raises(ConfigError, match=r"^end: data\.template='raw' is another chat template than that of repl"):
        chain(last("chat", rows, **{"data.template": "raw"}))
    assert nothing_was_started()


def test_another_chat_template_than_that_of_a_run(tmp_path):
    rows = write(tmp_path, "last.jsonl", [ROW | {"response": f"It is {i}."} for i in range(40)])
    tokenizer = Tokenizer.train([f"{row}" for row in range(9)], 258)
    saved = checkpoint(tmp_path / "before", "model.max_seq_len=64", "model.vocab_size=258")
    part = saved.rename(saved.with_name(".part"))
    (part / manifest.MANIFEST).unlink()
    tokenizer.save(part / "tokenizer.json")
    contract = manifest.Contract(tokenizer.digest, "0" * 64, 64)
    of_run = {"step": 2, "run_id": "a" * 32, "val_loss": None, "digests": {}}
    manifest.seal(part, saved, **of_run, lineage=manifest.Lineage(contract=contract))
    stage = f"+chain.stages.end={{do:sft,start:{saved},set:{{data:chat,data.path:{rows}}}}}"
    config.register()
    stages = command_line.check_command_line([*runs.QUICK[1:], "chain.yardstick.tokens=0", stage]).stages
    with pytest.raises(ConfigError, match=r"^end: data\.template='auto' is another chat template than that of .*step"):
        check_data(stages)


def test_a_warm_up_that_takes_all_epochs(chain, tmp_path):
    rows = write(tmp_path, "last.jsonl", [ROW | {"response": f"It is {i}."} for i in range(40)])
    epochs = {"trainer": "{max_epochs:2}", "optim": "{warmup_steps:50}", "data.packing": "false"}
    with pytest.raises(ConfigError, match=r"^end: optim\.warmup_steps=50 leaves no step of the 10 of trainer"):
        chain(last("chat", rows, **epochs))
    assert nothing_was_started()


def test_another_tokenizer_than_that_which_the_start_trains(chain, tmp_path):
    Tokenizer.train(["other words"], 258).save(tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"^end: data\.tokenizer='.*' is not the tokenizer that replies trains"):
        chain(last("chat", tmp_path / "rows.jsonl", **{"data.tokenizer": tmp_path / "other.json"}))
    assert nothing_was_started()


def test_the_problems_of_all_stages_are_reported_together(chain, tmp_path):
    bad = write(tmp_path, "last.jsonl", ["{"])
    words = [f"+chain.stages.{name}={{do:sft,start:text,set:{{data:chat,data.path:{bad}}}}}" for name in ("x", "y")]
    with pytest.raises(DataError) as error:
        chain(*words)
    assert [p.key for p in error.value.problems] == ["x: data.path", "y: data.path"]


def test_preferences_follow_a_stage_that_trains_its_tokenizer(chain, tmp_path):
    """The tokenizer of the pairs is that of the start, which has not run yet when the stages are composed."""
    rows = write(tmp_path, "pairs.jsonl", [PAIR | {"chosen": f"It is {i}."} for i in range(30)])
    chain(last("preference", rows), "+chain.stages.end.reference=text", "trainer.max_steps=2", "optim.warmup_steps=0")
    done = ChainFile.load(tmp_path / "outputs" / "chains" / "text-replies-end").stages
    saved = {name: tmp_path / "outputs" / record.checkpoint for name, record in done.items()}
    inputs = manifest.read_manifest(saved["end"]).lineage.inputs
    assert inputs == {"start": manifest.digest(saved["replies"]), "reference": manifest.digest(saved["text"])}
