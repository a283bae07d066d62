"""Names, parameters and addresses: pure functions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import pytest
from sqlalchemy import make_url

from deepseek_exp.tracking.metrics import METRICS, check_names, describe
from deepseek_exp.tracking.params import cut, flatten
from deepseek_exp.tracking.uri import absolute_uri, sqlite_path


class Colour(StrEnum):
    red = "red"


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    assert len(METRICS) >= 13
    assert all(metric.unit and metric.meaning for metric in METRICS.values())


def test_a_name_outside_of_the_table_is_an_error_that_names_the_table() -> None:
    check_names(["train/loss", "attn/gate"])
    with pytest.raises(ValueError, match=r"'train/los' is not in METRICS \(deepseek_exp/tracking/metrics.py\)"):
        check_names(["train/loss", "train/los"])


def test_a_row_may_stand_for_many_names() -> None:
    check_names(["val/loss", "val/loss/finance", "val/loss/law_en"])
    for name in ("val/loss/", "val/loss/a/b", "val/loss/<part>", "xval/loss/a"):
        with pytest.raises(ValueError, match="is not in METRICS"):
            check_names([name])
    text = describe(["val/loss/finance", "val/loss/a/b"])
    assert "| `val/loss/finance` | nats per token | cross entropy of the validation text of one part" in text
    assert "a/b" not in text


def test_description_lists_only_known_metrics_that_were_logged() -> None:
    text = describe(["val/loss", "callback/x"])
    assert "| `val/loss` | nats per token | loss of the validation set: of text its cross entropy |" in text
    assert "callback" not in text and "train/loss" not in text
    assert describe(["callback/x"]) == ""


def test_parameters_are_flat_strings() -> None:
    tree = {"a": {"b": {"c": 0.001}, "on": True}, "none": None, "list": [1, "x"], "e": Colour.red, "empty": {}}
    assert flatten(tree) == {
        "a.b.c": "0.001",
        "a.on": "true",
        "none": "null",
        "list": '[1, "x"]',
        "e": "red",
        "empty": "{}",
    }
    assert flatten({"a.b": "x"}) == {"a.b": "x"}


def test_secrets_are_hidden_in_parameters() -> None:
    tree = {"uri": "https://me:s3cret@host", "tags": {"db_password": "s3 cret"}, "all": [{"token": "abcdef1"}]}
    expected = {"uri": "https://me:***@host", "tags.db_password": "***", "all": '[{"token": "***"}]'}
    assert flatten(tree) == expected


def test_a_long_text_is_cut_with_a_note() -> None:
    assert cut("x" * 100, 100) == "x" * 100
    short = cut("x" * 101, 100)
    assert len(short) == 100
    assert short.endswith("[cut, 101 characters in all]")


def test_sqlite_addresses_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///out/m.db?timeout=9") == f"sqlite:///{tmp_path}/out/m.db?timeout=9"
    assert absolute_uri("sqlite:////abs/m.db") == "sqlite:////abs/m.db"
    assert absolute_uri("http://host") == "http://host"
    assert absolute_uri("sqlite:///file:a.db?uri=true") == "sqlite:///file:a.db?uri=true"


def test_a_path_is_what_sqlalchemy_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "50% of?"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for uri in ("sqlite:///a b.db", "sqlite:///a%20b.db", "sqlite+pysqlite:///a.db?timeout=9", "sqlite:////x/ü#.db"):
        asked, absolute = make_url(uri), absolute_uri(uri)
        assert str(sqlite_path(uri)) == str(Path(asked.database).resolve()) == make_url(absolute).database
        assert make_url(absolute).query == asked.query and sqlite_path(absolute) == sqlite_path(uri)
