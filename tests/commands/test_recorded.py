"""What surrounds a verb that is recorded."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.runs import ROOT

OPENING = """
import sys
from types import SimpleNamespace
from deepseek_exp.commands import recorded
from deepseek_exp.config.enums import Do

def wait_ready(seconds):
    print(all(name in sys.modules for name in ("torch", "pytorch_lightning")))
    raise SystemExit

tracked = SimpleNamespace(wait_ready=wait_ready, finish=lambda *_: SimpleNamespace(message=""))
recorded.check_data = lambda job: None
recorded.TrackedRun = SimpleNamespace(start=lambda *_, **__: tracked)
recorded.saved_config = SimpleNamespace(parse=lambda _: {})
recorded._sizes = recorded._tags = lambda _: {}
do, tracking = Do.train, None
cfg = SimpleNamespace(do=do, tracking=tracking, output_dir=".")
fields = dict(checkpoint=None, continues=None, run_dir=".", name="a", shown_yaml="")
assert "torch" not in sys.modules
recorded.record(SimpleNamespace(cfg=cfg, **fields), None)
"""


@pytest.mark.long
def test_torch_is_imported_while_the_store_is_opened():
    done = subprocess.run([sys.executable, "-c", OPENING], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
