"""A data section with everything small, in a folder of its own."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_exp.config import DataConfig, MixturePart, OnBadLine, OnEmptyMask, OnLongRow, Order, Source


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
        isolate_documents=False,
        prompt_key="prompt",
        response_key="response",
        template="auto",
        train_on=["assistant"],
        packing=True,
        on_long_row=OnLongRow.stop,
        on_empty_mask=OnEmptyMask.stop,
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


@pytest.fixture
def mixture_cfg(cfg: DataConfig, tmp_path: Path) -> DataConfig:
    """Three parts of different sizes; of the first and the last, validation text is held out."""
    kinds = {
        "sums": [f"{i} + {i} = {2 * i}" for i in range(400)],
        "words": [f"the {i}th word of the {i % 9}th kind" for i in range(150)],
        "words_valid": [f"another word, number {i}" for i in range(60)],
        "code": [f"def f{i}(x):\n    return x * {i}\n" for i in range(200)],
    }
    paths = {name: tmp_path / f"{name}.jsonl" for name in kinds}
    for name, texts in kinds.items():
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parts = {
        "sums": MixturePart(str(paths["sums"]), weight=3),
        "words": MixturePart(str(paths["words"]), valid_path=str(paths["words_valid"]), weight=0.5),
        "code": MixturePart(str(paths["code"])),
    }
    return dataclasses.replace(cfg, source=Source.mixture, mixture=parts, max_bytes=None)


@pytest.fixture
def chat_cfg(cfg: DataConfig, tmp_path: Path) -> Callable[..., DataConfig]:
    """Return a function that writes rows of instruction data and returns their data section, with some keys changed."""

    def make(rows: list, **changes: object) -> DataConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        same = dict(source=Source.chat, path=str(path), max_bytes=None, isolate_documents=True)
        return dataclasses.replace(cfg, **{**same, **changes})

    return make
