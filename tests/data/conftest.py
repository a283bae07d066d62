"""A data section with everything small, in a folder of its own."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_exp.config import DataConfig, OnBadLine, Order, Source


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    return DataConfig(
        source=Source.synthetic,
        path=None,
        valid_path=None,
        mixture={},
        valid_fraction=0.1,
        text_key="text",
        on_bad_line=OnBadLine.stop,
        max_bytes=30_000,
        tokenizer=None,
        vocab_size=300,
        seq_len=16,
        order=Order.shuffled,
        n_workers=0,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def text_cfg(cfg: DataConfig) -> Callable[..., DataConfig]:
    """Give a function that makes a data section of files, with other values for some keys."""

    def make(path: Path, **changes: object) -> DataConfig:
        return dataclasses.replace(cfg, source=Source.text, path=str(path), max_bytes=None, **changes)

    return make
