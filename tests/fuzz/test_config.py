"""Random command lines are accepted or refused in words."""

from __future__ import annotations

import pytest

from tests.fuzz import config


@pytest.mark.long
def test_random_command_lines_end_in_words():
    counts = config.run(100, seed=14)
    assert counts.defects == []
    assert counts.outcomes["refused"] > 50
    assert counts.outcomes["accepted"] > 5


class Odd(config.UserError):
    def __str__(self):
        return "odd"


def test_a_defect_is_seen(monkeypatch):
    """A traceback, a hang and a sentence in another form, each made on purpose."""
    problems = iter([ValueError("x"), None, Odd()])
    monkeypatch.setattr(config, "SECONDS", 1)

    def check(argv):
        error = next(problems)
        while error is None:  # until the alarm
            pass
        raise error

    monkeypatch.setattr(config, "check_command_line", check)
    counts = config.run(3, seed=1)
    assert dict(counts.outcomes) == {"traceback": 1, "hang": 1, "refused, not in our form": 1}
    assert [what.split(" in case")[0] for _, what in counts.defects] == [
        "traceback",
        "hang",
        "refused, not in our form",
    ]
