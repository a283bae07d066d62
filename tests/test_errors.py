"""How a value is shown in a message: short, without passwords and control characters."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from deepseek_exp import errors
from deepseek_exp.errors import Problem, UserError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ("a", "'a'"),
        (1e-3, "0.001"),
        ("日本 é", "'日本 é'"),
        ("\x1b]0;title\x07", "'\\x1b]0;title\\x07'"),
        ("a\nb\x00\ud800", "'a\\nb\\x00\\ud800'"),
        ("x" * 5000, "'" + "x" * 180 + "... (5,000 characters)'"),
        (["x" * 500], "['" + "x" * 178 + "... (504 characters)"),
        (10**5000, "a number of 5,001 digits"),
        ("http://me:" + "p" * 300 + "@host", "'http://me:***@host'"),
    ],
    ids=lambda value: f"{value!s:.20}" if not isinstance(value, int) else type(value).__name__,
)
def test_a_value_is_shown(value, shown):
    assert str(Problem("key", value, "is odd", "use another")) == f"key={shown} is odd. Fix: use another."


def test_the_rule_and_the_fix_are_printable_too():
    assert str(Problem("k", 1, "is \x1b[31m", "use \r")) == "k=1 is \\x1b[31m. Fix: use \\r."


def test_a_problem_is_known_by_the_function_that_finds_it():
    def nested():
        return next(Problem("k", 1, "is odd", "use 2") for _ in range(1))

    assert nested().id == "test_a_problem_is_known_by_the_function_that_finds_it"
    assert Problem("k", 1, "is odd", "use 2", id="odd").id == "odd"
    assert dataclasses.replace(nested(), key="other").id == nested().id
    assert pickle.loads(pickle.dumps(nested())).id == nested().id


def test_every_error_of_the_user_has_its_kind():
    found = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, UserError)}
    assert set(errors.KINDS.values()) == found
