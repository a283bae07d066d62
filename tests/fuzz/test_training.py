"""What random command lines make run.py accept also runs."""

from __future__ import annotations

import pytest

from tests.fuzz import training


@pytest.mark.long
def test_what_is_accepted_runs(tmp_path):
    counts = training.run(15, 15, tmp_path)
    assert counts.defects == []
    assert counts.outcomes["ran"] >= 1


def test_a_run_that_fails_is_seen(tmp_path, monkeypatch):
    """A defect of run.py, an error in words, a hang, and a run that ends well, each made on purpose."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "what = sys.argv[1]\n"
        "if what == 'defect': raise ValueError('x')\n"
        "if what == 'error': sys.exit(print('a=1 is wrong. Fix: use 2.') or 2)\n"
        "if what == 'hang': time.sleep(60)\n"
    )
    monkeypatch.setattr(training, "ROOT", tmp_path)
    monkeypatch.setattr(training, "SECONDS", 1)
    found = {what: training.outcome([what], tmp_path / "log") for what in ("defect", "error", "hang", "well")}
    assert found == {"defect": "failed", "error": "refused while it ran", "hang": "hang", "well": "ran"}
