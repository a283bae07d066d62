"""lm-eval on local tasks: it asks our model through its interface, and its numbers are those computed without it."""

from __future__ import annotations

import math
import sys

import pytest

from deepseek_exp.errors import UserError
from deepseek_exp.evaluate.harness import Harness, measures, require_lm_eval
from tests.evaluate.parts import TEXTS, scorer, write_rows

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{target}"
{more}
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Write one task of each kind of request, over a few rows."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": text.strip()[:60], "gold": i % 2, "number": str(i)} for i, text in enumerate(TEXTS) if text]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    kinds = {
        "my_choice": ("multiple_choice", "{{gold}}", 'doc_to_choice: ["yes", "no"]\nmetric_list: [{metric: acc}]'),
        "my_text": ("loglikelihood_rolling", "{{text}}", "metric_list: [{metric: bits_per_byte}]"),
        "my_number": (
            *("generate_until", "{{number}}"),
            'generation_kwargs: {until: ["."], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]',
        ),
    }
    for name, (kind, target, more) in kinds.items():
        text = TASK.format(name=name, data=data, kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(text)
    return folder, rows


@pytest.mark.long
def test_its_numbers_are_ours(tasks):
    folder, rows = tasks
    mine = scorer()
    harness = Harness("x", ["my_choice", "my_text", "my_number"], folder, 0, None, 8)
    found = {(m.task, m.metric): m for m in harness.run(mine)}
    pairs = mine.likelihoods([(row["text"], choice) for row in rows for choice in (" yes", " no")])
    right = [float((pairs[2 * i].log_prob < pairs[2 * i + 1].log_prob) == row["gold"]) for i, row in enumerate(rows)]
    assert found["my_choice", "acc"].value == sum(right) / len(rows) and found["my_choice", "acc"].n == len(rows)
    nats = sum(s.nll.double().sum().item() for s in mine.documents([row["text"] for row in rows]))
    n_bytes = sum(len(row["text"].encode()) for row in rows)
    assert found["my_text", "bits_per_byte"].value == pytest.approx(nats / math.log(2) / n_bytes)
    assert found["my_number", "exact_match"].value == 0.0
    with pytest.raises(UserError, match=r"evaluate\.tasks\.x\.tasks='nope' is no task of"):
        Harness("x", ["nope"], folder, 0, None, 8).run(mine)


def test_metrics_are_named_without_the_filter():
    values = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A"}
    found = {"results": {"t": values}, "n-samples": {"t": {"original": 9, "effective": 4}}}
    assert [(m.metric, m.value, m.stderr, m.n) for m in measures(found)] == [
        ("acc", 0.5, 0.1, 4),
        ("em.strict", 1.0, None, 4),
    ]


def test_the_package_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"needs the package lm-eval .* pip install 'deepseek_exp\[eval\]'"):
        require_lm_eval("evaluate.tasks.x.kind")
