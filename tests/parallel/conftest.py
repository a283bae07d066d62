"""One process that forks the ranks of all tests."""

from __future__ import annotations

import pytest

from tests.parallel.layouts import Layouts


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    with Layouts(tmp_path_factory.mktemp("layouts")) as layouts:
        yield layouts


@pytest.fixture(scope="session")
def alone(layouts):
    """Train in one process; the same overrides train once."""
    done = {}

    def run(*overrides):
        if overrides not in done:
            done[overrides] = layouts.run(1, *overrides)
        return done[overrides]

    return run
