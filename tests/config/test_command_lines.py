"""Every mistake of a command line that a rule is about, by the key and the rule that finds it."""

from __future__ import annotations

import functools

import pytest

from deepseek_exp import config
from deepseek_exp.config import compose
from deepseek_exp.errors import ConfigError
from deepseek_exp.experiment import command_line
from tests.config.command_lines import REFUSED, ids, refusal
from tests.golden import messages

pytestmark = pytest.mark.xdist_group("command_lines")  # what one process has composed is not composed again


@pytest.fixture(autouse=True, scope="module")
def _hydra():
    config.register()
    with compose.hydra_ready():
        yield


@functools.cache
def refused(line: str) -> ConfigError | None:
    """Return the refusal of a line, composed as the jobs of a sweep are: they share what their groups compose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "compose_run", lambda overrides: None)
        return refusal(line.split(" "))


@pytest.mark.parametrize("line", REFUSED)
def test_the_rule_that_finds_it(line):
    assert ", ".join(ids(refused(line))) == REFUSED[line]


@pytest.mark.parametrize("line", list(REFUSED)[::12])
def test_a_single_run_is_refused_alike(line):
    """Hydra composes a single run itself, which takes most of the time of a refusal."""
    assert str(refusal(line.split(" "))) == str(refused(line))


def test_the_words():
    if messages.rendered({line: refused(line) for line in REFUSED}) != messages.FILE.read_text(encoding="utf-8"):
        pytest.fail("tests/golden/messages.txt has other words: run `make golden` and review the difference")
