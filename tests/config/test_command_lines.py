"""Every mistake of a command line that a rule is about, by the key and the rule that finds it."""

from __future__ import annotations

import functools

import pytest

from deepseek_exp.errors import ConfigError
from tests.composing import as_in_a_sweep, shared_hydra
from tests.config.command_lines import REFUSED, ids, refusal
from tests.golden import messages

pytestmark = pytest.mark.xdist_group("command_lines")  # what one process has composed is not composed again


@functools.cache
def refused(line: str) -> ConfigError | None:
    with as_in_a_sweep():
        return refusal(line.split(" "))


@pytest.mark.parametrize("line", REFUSED)
def test_the_rule_that_finds_it(line):
    assert ", ".join(ids(refused(line))) == REFUSED[line]


@pytest.mark.parametrize("line", list(REFUSED)[::12])
def test_a_single_run_is_refused_alike(line):
    with shared_hydra():
        assert str(refusal(line.split(" "))) == str(refused(line))


def test_the_words():
    if messages.rendered({line: refused(line) for line in REFUSED}) != messages.FILE.read_text(encoding="utf-8"):
        pytest.fail("tests/golden/messages.txt has other words: run `make golden` and review the difference")
