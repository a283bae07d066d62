"""What holds for all tests."""

from __future__ import annotations

import os
import sys

# one thread an operation: the tests run two at a time, and losses stay the same on any number of cores
os.environ["OMP_NUM_THREADS"] = "1"
# Triton's interpreter, which runs kernels on a CPU; it must be chosen before anything imports Triton
os.environ["TRITON_INTERPRET"] = "1"

import pytest

from tests.interpreter import quicken

# Fixtures that train or start servers. The tests of a module that use one run in one worker, so it is made once.
EXPENSIVE = {"finished", "swept", "verified", "trained", "outage", "recorded", "whole"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Name the group of each test for `--dist loadgroup`."""
    for item in items:
        used, module = set(getattr(item, "fixturenames", ())), item.module.__name__
        if "layouts" in used:
            group = module if module.endswith("test_equivalence") else "layouts"
        elif used & EXPENSIVE:
            parameters = getattr(item, "callspec", None)
            group = f"{module} {parameters.params.get('trained', '') if parameters else ''}"
        else:
            continue
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session):
    """Prepare the interpreter, if a test that is collected has imported Triton; check the groups of the tests.

    Stop if pytest-xdist ignores the groups: fixtures that train would be made once per worker, and say nothing.

    It writes the group behind the test's id, which pytest 9.2 no longer reads (pytest-dev/pytest-xdist#1386).
    """
    if "triton" in sys.modules:
        quicken()
    marked = next((item for item in session.items if item.get_closest_marker("xdist_group")), None)
    if marked is not None and getattr(session.config.option, "loadgroup", False) and "@" not in marked.nodeid:
        raise pytest.UsageError("--dist loadgroup has no effect with this pytest. Fix: install the pinned pytest")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """Return the process that forks the ranks of all tests."""
    from tests.parallel.layouts import Layouts

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
