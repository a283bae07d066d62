"""do=eval with tasks: a checkpoint is measured, and the table is printed and recorded."""

from __future__ import annotations

import json

import pytest

from tests import forks, runs
from tests.evaluate.parts import write_rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    assert forks.run(folder, *runs.QUICK, "optim.ema_decay=0.5").returncode == 0
    (folder / "texts").mkdir()
    for name, line in {"law": "The parties agree. ", "news": "It rained. "}.items():
        write_rows(folder / "texts" / f"{name}.jsonl", [{"text": line * n} for n in (1, 2, 3)])
    write_rows(folder / "q.jsonl", [{"question": f"{i}+1?", "label": "yes"} for i in range(3)])
    return folder


ASKED = (
    *("do=eval", "resume=last", "evaluate.folder=.", "evaluate.texts=texts", "+evaluate.tasks.q.kind=choice"),
    *("+evaluate.tasks.q.path=q.jsonl", "+evaluate.tasks.q.prompt='{question}'", "+evaluate.tasks.q.answer=label"),
    "+evaluate.tasks.q.choices=[yes,no]",
)


def test_tasks_are_measured_and_recorded(trained):
    (first,) = runs.run_dirs(trained)
    done = forks.run(trained, *ASKED, f"evaluate.agree_with={first}")
    assert done.returncode == 0, done.stderr
    values = {name: value for name, step, value in runs.metrics(runs.run_dirs(trained)[-1]) if step == 12}
    assert values["eval/law/agreement"] == values["eval/news/agreement"] == 1.0
    assert values["eval/law/loss_change"] == pytest.approx(0.0, abs=1e-6) and values["eval/law/loss"] > 0
    assert values["eval/q/most_frequent_label"] == 1.0 and "eval/q/accuracy_stderr" in values
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["law", "loss"] in lines and ["q", "accuracy"] in lines and "bits per byte" in done.stdout
    averaged = forks.run(trained, *ASKED[:4], "use_ema=true", f"evaluate.agree_with={first}")
    other = {name: value for name, _, value in runs.metrics(runs.run_dirs(trained)[-1])}
    assert averaged.returncode == 0 and abs(other["eval/law/loss_change"]) > 1e-4


def test_what_is_missing_is_told_before_a_model_is_loaded(trained):
    rows = trained / "bad.jsonl"
    rows.write_text(json.dumps({"question": "1"}) + "\n")
    done = forks.run(trained, *(word.replace("q.path=q", "q.path=bad") for word in ASKED))
    assert done.returncode == 1 and "evaluate.tasks.q.answer='label' has no text" in done.stderr
    assert "evaluating" not in done.stdout
    done = forks.run(trained, *ASKED[:4], "evaluate.agree_with=nowhere")
    assert done.returncode == 1 and "evaluate.agree_with='nowhere' matches no single run" in done.stderr
