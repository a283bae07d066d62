"""Prepare the data of any source."""

from __future__ import annotations

from deepseek_exp.config import DataConfig
from deepseek_exp.data.prepare import PreparedData
from deepseek_exp.data.prepare import prepare as prepare_text
from deepseek_exp.data.rows import KEYS, prepare_rows


def prepare(cfg: DataConfig) -> PreparedData:
    """Return the data of a data section: packed text, or separate rows.

    Raises:
        DataError: as `prepare_text` and `prepare_rows` do.
    """
    return prepare_rows(cfg) if cfg.source in KEYS else prepare_text(cfg)
