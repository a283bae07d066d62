"""Tasks: what they read, ask and count; results with standard errors; and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from deepseek_exp.config import EvaluateConfig, TaskConfig
from deepseek_exp.errors import DataError
from deepseek_exp.evaluate import Measure, as_json, as_metrics, table
from deepseek_exp.evaluate.answers import marked_number, scaled_numbers, until
from deepseek_exp.evaluate.results import mean, ratio
from deepseek_exp.evaluate.tasks import make_task, text_tasks
from deepseek_exp.tracking.metrics import check_names
from tests.config.test_config import composed
from tests.evaluate.parts import TEXTS, Scripted, scorer, write_rows


def config(folder, **changed) -> EvaluateConfig:
    made = composed().evaluate
    for name, value in {"folder": str(folder), **changed}.items():
        setattr(made, name, value)
    return made


def values(measures):
    return {m.metric: m.value for m in measures}


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 4+4=8\n#### 1,234", 1234.0), ("#### $5.50 each", 5.5), ("#### -3", -3.0), ("8", None), ("#### none", None)],
)
def test_the_marked_number(text, number):
    assert marked_number(text) == number


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("$1.2 million", [1.2e6]),
        ("rose 5% to 12,345", [0.05, 12345.0]),
        ("(3.5)", [-3.5]),
        ("(see 4)", [4.0]),
        ("-7 thousand and .5", [-7000.0, 0.5]),
        ("2018-2019", [2018.0, 2019.0]),
        ("no number", []),
    ],
)
def test_numbers_with_their_scale(text, numbers):
    assert scaled_numbers(text) == pytest.approx(numbers)


def test_an_answer_ends_at_the_first_stop():
    assert until("a b\nc\n\nd", ["\n\n", "\nc"]) == "a b" and until("a", ["\n"]) == "a"


def test_standard_errors():
    m = mean("t", "accuracy", [1.0, 0.0, 1.0, 1.0])
    assert (m.value, m.n) == (0.75, 4) and m.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert mean("t", "accuracy", [1.0]).stderr is None
    even = ratio("t", "loss", [2.0, 4.0, 6.0], [2.0, 2.0, 2.0], 6)  # equal weights: that of a mean
    assert even.value == 2.0 and even.stderr == pytest.approx(mean("t", "x", [1.0, 2.0, 3.0]).stderr)
    assert ratio("t", "loss", [3.0, 6.0], [1.0, 2.0], 3).stderr == 0.0  # every item has the ratio


def test_the_table_and_the_metrics():
    found = [Measure("law", "loss", 2.5, 0.125, 1000), Measure("gsm8k", "exact_match", 0.5, None, 2)]
    assert table(found).splitlines()[1].split() == ["law", "loss", "2.5000", "0.1250", "1,000"]
    assert as_metrics(found) == {"eval/law/loss": 2.5, "eval/law/loss_stderr": 0.125, "eval/gsm8k/exact_match": 0.5}
    check_names(as_metrics(found))
    assert json.loads(as_json(found))[1]["stderr"] is None


def test_texts_by_file_and_against_another_model(tmp_path):
    write_rows(tmp_path / "law.jsonl", [{"text": text} for text in TEXTS if text])
    (tmp_path / "news.txt").write_text(TEXTS[3])
    law, news = text_tasks(config(tmp_path, texts=str(tmp_path)))
    assert (law.name, news.name, len(law.documents)) == ("law", "news", 3)
    mine, other = scorer(), scorer(seed=1)
    found = {m.metric: m for m in law.run(mine)}
    nll = [s.nll.double() for s in mine.documents(law.documents)]
    n_bytes = sum(len(text.encode()) for text in law.documents)
    assert found["loss"].value == pytest.approx(torch.cat(nll).mean().item())
    assert found["loss"].n == len(torch.cat(nll)) and found["loss"].stderr > 0
    assert found["bits_per_byte"].value == pytest.approx(torch.cat(nll).sum().item() / math.log(2) / n_bytes)
    same = {m.metric: m for m in law.against(scorer(batch_seqs=1))}
    assert same["agreement"].value == 1.0 and same["loss_change"].value == pytest.approx(0.0, abs=1e-5)
    change = {m.metric: m for m in law.against(other)}
    want = torch.cat(nll).mean() - torch.cat([s.nll.double() for s in other.documents(law.documents)]).mean()
    assert change["loss_change"].value == pytest.approx(want.item()) and 0 <= change["agreement"].value < 1


def test_gsm8k_counts_the_marked_number(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(1, 5)]
    write_rows(tmp_path / "q.jsonl", rows)
    task = TaskConfig("gsm8k", "q.jsonl", prompt="Q: {question}\nA:", answer="answer", stops=["\nQ:"])
    scripted = Scripted([" #### 2", " it is 4", " x\n#### 6.0", " 8\nQ: more #### 8"])
    assert values(make_task("gsm8k", task, config(tmp_path)).run(scripted)) == {"exact_match": 0.5, "answered": 0.5}
    assert scripted.asked[0] == "Q: What is 1 + 1?\nA:"
    limited = TaskConfig("gsm8k", "q.jsonl", 2, prompt="{question}", answer="answer")
    assert len(make_task("gsm8k", limited, config(tmp_path)).prompts) == 2


def test_numeric_answers_are_right_within_a_tolerance(tmp_path):
    rows = [{"p": "a", "r": "$2.0 million"}, {"p": "b", "r": "1 and 2"}, {"p": "c", "r": "10%"}, {"p": "d", "r": "7"}]
    write_rows(tmp_path / "n.jsonl", rows)
    task = make_task("n", TaskConfig("numeric", "n.jsonl", prompt="{p}", answer="r"), config(tmp_path))
    assert task.n_skipped == 1  # an answer of two numbers
    assert values(task.run(Scripted([" 2,010,000", " 0.12", "none"]))) == {
        "exact_match": pytest.approx(1 / 3),
        "answered": pytest.approx(2 / 3),
    }


def test_choices_are_ranked_by_likelihood(tmp_path):
    rows = [{"prompt": str(i), "label": label} for i, label in enumerate(["yes", "no", "maybe", "yes"])]
    write_rows(tmp_path / "c.jsonl", rows)
    cfg = TaskConfig("choice", "c.jsonl", prompt="{prompt}?", answer="label", choices=["yes", "no", "maybe"])
    scripted = Scripted(log_probs={" yes": -4.0, " no": -3.5, " maybe": -5.0})
    found = values(make_task("c", cfg, config(tmp_path)).run(scripted))
    assert found == {"accuracy": 0.25, "accuracy_per_byte": 0.25, "most_frequent_label": 0.5}
    assert scripted.asked[:2] == [("0?", " yes"), ("0?", " no")]


def test_programs_pass_their_tests(tmp_path):
    rows = [
        {"prompt": f"def f{i}(x):\n", "test": f"def check(f):\n    assert f(2) == {2 * i}\n", "entry_point": f"f{i}"}
        for i in range(3)
    ]
    write_rows(tmp_path / "h.jsonl", rows)
    task = make_task("h", TaskConfig("code", "h.jsonl"), config(tmp_path, allow_code_execution=True))
    scripted = Scripted(["    return 0\ndef other(:", "    return x", "    exit(0)"])
    assert values(task.run(scripted)) == {"pass_at_1": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("content", "task", "rule"),
    [
        ("{", {}, r"q\.jsonl:1' is no JSON"),
        ("[1]\n", {}, "is no JSON object"),
        ("\n", {}, "has no row"),
        ('{"q": "a"}\n', {}, r"has no text 'answer' \(row 1 has q\)"),
        ('{"a": "b", "answer": "#### 1"}\n', {}, "names the field 'q', and row 1 has a, answer"),
        ('{"q": "b", "answer": "1"}\n', {}, "has no number after #### in row 1"),
        ('{"q": "b", "answer": "1"}\n', {"prompt": "{q"}, "is no template"),
        ('{"q": "b", "answer": "two"}\n', {"kind": "numeric"}, "holds one number in no row"),
        ('{"q": "b", "answer": "1"}\n', {"kind": "choice", "choices": ["yes"]}, "holds '1', which is not one of"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, content, task, rule):
    (tmp_path / "q.jsonl").write_text(content)
    cfg = TaskConfig(**{"kind": "gsm8k", "path": "q.jsonl", "prompt": "{q}", "answer": "answer", **task})
    with pytest.raises(DataError, match=rule):
        make_task("t", cfg, config(tmp_path))
