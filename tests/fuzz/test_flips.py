"""One changed byte in any file of a checkpoint is found; `python -m tests.fuzz.flips` tries more."""

from __future__ import annotations

import pytest

from tests.fuzz.flips import campaign


@pytest.mark.long
def test_every_changed_byte_is_found(tmp_path):
    found = campaign(tmp_path, 210, 20261)
    assert found.missed == []
    assert sum(found.flips.values()) == 210 and min(found.flips.values()) >= 10
    assert set(found.flips) == {
        *("manifest.json", "state.json", "state.safetensors", "config.yaml", "tokenizer.json", "data.json"),
        *("model.safetensors", "shard-00000.safetensors", "shard-00001.safetensors"),
    }
