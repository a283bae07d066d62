import dataclasses
import itertools
import json
import logging
import math
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_exp.config import MixturePart, Source
from deepseek_exp.data import Tokenizer, prepare, shards
from deepseek_exp.data.corpus import Corpus
from deepseek_exp.data.order import Mixed
from deepseek_exp.errors import DataError
from tests.data.test_module import fit, module, row


def texts(cfg, split: str) -> list[list[str]]:
    return [[text for side, text in corpus.documents(Counter()) if side == split] for corpus in Corpus.parts(cfg)]


def changed(cfg, name: str, **changes):
    """Give the section with other values for one part."""
    part = dataclasses.replace(cfg.mixture[name], **changes)
    return dataclasses.replace(cfg, mixture={**cfg.mixture, name: part})


def packed(caplog) -> int:
    found = sum(message.startswith("packed ") for message in caplog.messages)
    caplog.clear()
    return found


def test_each_part_has_its_own_tokens_by_one_tokenizer(mixture_cfg) -> None:
    data = prepare(mixture_cfg)
    train = texts(mixture_cfg, "train")
    assert data.tokenizer.digest == Tokenizer.train(itertools.chain(*train), 300).digest
    assert data.part_names == ["sums", "words", "code"]
    assert [part.weight for part in data.parts] == [3, 0.5, 1]
    for split in ("train", "valid"):
        for part, documents in zip(data.parts, texts(mixture_cfg, split), strict=True):
            ids = getattr(part, split).open()
            ends = np.flatnonzero(ids == data.tokenizer.end_id)
            found = [data.tokenizer.decode(piece[:-1].tolist()) for piece in np.split(ids, ends + 1)[:-1]]
            assert found == documents
    assert data.n_train_tokens == sum(part.train.n_tokens for part in data.parts)
    assert data.n_valid_tokens == sum(part.valid.n_tokens for part in data.parts)


def test_what_is_recorded_and_compared_of_each_part(mixture_cfg) -> None:
    data = prepare(mixture_cfg)
    shown = [(i["name"], i["context"], i["digest"], i["source"]) for i in data.inputs]
    paths = {name: part.path for name, part in mixture_cfg.mixture.items()}
    expected = []
    for part in data.parts:
        valid_path = mixture_cfg.mixture[part.name].valid_path or paths[part.name]
        expected.append((part.name, "train", part.train.digest, paths[part.name]))
        expected.append((part.name, "valid", part.valid.digest, valid_path))
    assert shown == expected
    assert len({digest for _, _, digest, _ in shown}) == 6
    digests = {f"{context} of {name}": digest for name, context, digest, _ in shown}
    for part in data.parts:
        digests |= {f"{s} tokens of {part.name}": getattr(part, s).tokens_digest for s in ("train", "valid")}
    assert data.digests() == {"tokenizer": data.tokenizer.digest, **digests}
    assert len(set(data.digests().values())) == 13
    single = prepare(dataclasses.replace(mixture_cfg, source=Source.synthetic, mixture={}, max_bytes=30_000))
    assert list(single.digests()) == ["tokenizer", "train", "train tokens", "valid", "valid tokens"]
    assert single.part_names == []


def test_unigram_bits_weigh_the_parts(mixture_cfg) -> None:
    data, total = prepare(mixture_cfg), 0.0
    counts = [Counter(part.train.open().tolist()) for part in data.parts]
    for token, bits in enumerate(data.unigram_bits.tolist()):
        share = sum(
            part.weight / 4.5 * (count[token] + 1) / (part.train.n_tokens + data.tokenizer.vocab_size)
            for part, count in zip(data.parts, counts, strict=True)
        )
        assert bits == pytest.approx(-math.log2(share), rel=1e-12)
        total += 2**-bits
    assert total == pytest.approx(1)


def test_a_second_start_builds_nothing_until_a_text_changes(mixture_cfg, caplog) -> None:
    caplog.set_level(logging.INFO)
    first = prepare(mixture_cfg)
    data_names = first.part_names
    assert packed(caplog) == 1
    assert prepare(mixture_cfg).digests() == first.digests()
    assert prepare(changed(mixture_cfg, "sums", weight=99.0)).digests() == first.digests()
    assert packed(caplog) == 0
    code = Path(mixture_cfg.mixture["code"].path)
    code.write_text(code.read_text().replace("return", "yield"))
    second = prepare(mixture_cfg)
    assert packed(caplog) == 1
    names = [name for name, digest in second.digests().items() if digest != first.digests()[name]]
    all_tokens = [f"{split} tokens of {name}" for name in data_names for split in ("train", "valid")]
    assert set(names) == {"tokenizer", "train of code", "valid of code", *all_tokens}
    (Path(first.parts[1].train.path).parent / "meta.json").unlink()
    prepare(mixture_cfg)
    assert packed(caplog) == 0  # that was the first tokenizer's
    (Path(second.parts[1].train.path).parent / "meta.json").unlink()
    assert prepare(mixture_cfg).digests() == second.digests()
    assert packed(caplog) == 1


def test_with_a_given_tokenizer_a_new_part_leaves_the_others_packed(mixture_cfg, tmp_path, monkeypatch) -> None:
    Tokenizer.train(["some other text " * 50], 290).save(tmp_path / "t.json")
    mixture_cfg = dataclasses.replace(mixture_cfg, tokenizer=str(tmp_path / "t.json"))
    build, names = shards.build, []

    def note(corpus, *args):
        names.append(corpus.name)
        return build(corpus, *args)

    monkeypatch.setattr(shards, "build", note)
    two = {name: mixture_cfg.mixture[name] for name in ("sums", "code")}
    first = prepare(dataclasses.replace(mixture_cfg, mixture=two))
    assert names == ["sums", "code"]
    second = prepare(mixture_cfg)
    assert names == ["sums", "code", "words"]
    assert second.tokenizer.digest == first.tokenizer.digest == Tokenizer.load(tmp_path / "t.json").digest
    Tokenizer.train(["another text " * 50], 290).save(tmp_path / "t.json")
    assert prepare(mixture_cfg).tokenizer.digest == Tokenizer.load(tmp_path / "t.json").digest
    assert names[3:] == ["sums", "words", "code"]


def test_parts_packed_by_two_tokenizers_are_packed_again(mixture_cfg, tmp_path) -> None:
    data = prepare(mixture_cfg)
    words = data.parts[1].train.path.parent
    shutil.copytree(words, tmp_path / "before")
    (cached,) = Path(mixture_cfg.cache_dir).glob("tokenizers/*")
    Tokenizer.train(["other"], 300).save(cached)
    prepare(mixture_cfg)
    shutil.rmtree(words)
    shutil.copytree(tmp_path / "before", words)  # as if the build had been killed after the first part
    again = prepare(mixture_cfg)
    for part in again.parts:
        assert again.tokenizer.token_bytes[part.train.open().tolist()].sum() == part.train.n_bytes


def test_errors_name_the_part(mixture_cfg, tmp_path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "short.txt").write_text("1")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    words = mixture_cfg.mixture["words"].path
    cases = {
        "path": [
            (str(tmp_path / "empty.txt"), "holds no text to train on"),
            (str(tmp_path / "bad.jsonl"), "bad.jsonl:1"),
        ],
        "valid_path": [(str(tmp_path / "empty.txt"), "holds no text to validate on"), (words, "words.path names too")],
    }
    for key, tries in cases.items():
        for value, rule in tries:
            with pytest.raises(DataError, match=rule) as error:
                prepare(changed(mixture_cfg, "words", **{key: value}))
            assert str(error.value).startswith(f"data.mixture.words.{key}=")
    with pytest.raises(DataError) as error:
        prepare(changed(mixture_cfg, "words", path=str(tmp_path / "short.txt"), valid_path=None))
    assert str(error.value) == (
        "data.valid_fraction=0.1 holds out nothing of 1 documents of words to validate on. "
        "Fix: set data.mixture.words.valid_path to validation text, or raise data.valid_fraction."
    )
    with pytest.raises(DataError) as error:
        prepare(dataclasses.replace(mixture_cfg, seq_len=10**6))
    assert len(error.value.problems) == 6
    assert "valid text of words" in str(error.value.problems[3])


def test_text_of_a_part_that_changes_while_it_is_read(mixture_cfg, monkeypatch) -> None:
    build, path = shards.build, Path(mixture_cfg.mixture["words"].path)

    def build_slowly(corpus, *args):
        if corpus.name == "code":
            path.write_text(json.dumps({"text": "other"}))
        return build(corpus, *args)

    monkeypatch.setattr(shards, "build", build_slowly)
    with pytest.raises(DataError) as error:
        prepare(mixture_cfg)
    assert str(error.value).startswith(f"data.mixture.words.path='{path}' names text that changed while it was read.")
    assert not list(Path(mixture_cfg.cache_dir).glob("shards/*/meta.json"))


def expected_rows(data, seed: int, n: int) -> tuple[list[list[int]], list[int]]:
    """Compute the first n training sequences and their parts from the order alone."""
    sizes = [(part.train.n_tokens - 1) // 16 for part in data.parts]
    order = Mixed(tuple(data.part_names), tuple(sizes), tuple(part.weight for part in data.parts), seed)
    numbers = [order.sequence_at(g) for g in range(n)]
    parts = [sum(number >= start for start in order.starts) - 1 for number in numbers]
    files = [part.train.open() for part in data.parts]
    return [row(files[p], number - order.starts[p], 16) for number, p in zip(numbers, parts, strict=True)], parts


@pytest.mark.parametrize("n_workers", [0, 2])
def test_batches_know_the_parts_of_their_sequences(mixture_cfg, n_workers) -> None:
    rows, parts = expected_rows(prepare(mixture_cfg), 3, 800)
    loader = module(dataclasses.replace(mixture_cfg, n_workers=n_workers)).train_dataloader()
    batches = list(itertools.islice(loader, 100))
    assert torch.cat([batch.tokens for batch in batches]).tolist() == rows
    assert torch.cat([batch.part for batch in batches]).tolist() == parts
    assert batches[0].part.dtype == torch.int64
    shares = [parts.count(k) / 800 for k in range(3)]
    assert shares == pytest.approx([3 / 4.5, 0.5 / 4.5, 1 / 4.5], abs=0.01)


def test_lightning_resumes_in_the_middle_of_a_mixture(mixture_cfg, tmp_path) -> None:
    rows, _ = expected_rows(prepare(mixture_cfg), 3, 7 * 8)
    watcher, trainer = fit(module(mixture_cfg, eval_seqs=12), tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed, _ = fit(module(mixture_cfg, eval_seqs=12), tmp_path, 7, str(tmp_path / "a.ckpt"))
    assert torch.cat([*watcher.seen, *resumed.seen]).tolist() == rows


@pytest.mark.parametrize(("eval_seqs", "wanted"), [(0, None), (1, [1, 1, 1]), (12, [4, 4, 4]), (32, [11, 11, 10])])
def test_validation_serves_each_part_alone(mixture_cfg, eval_seqs, wanted) -> None:
    data = prepare(mixture_cfg)
    sizes = [(part.valid.n_tokens - 1) // 16 for part in data.parts]
    batches = list(module(mixture_cfg, eval_seqs=eval_seqs).val_dataloader())
    assert all(len(set(batch.part.tolist())) == 1 for batch in batches)
    for k, part in enumerate(data.parts):
        own = [batch for batch in batches if batch.part[0] == k]
        n = sizes[k] if wanted is None else min(sizes[k], wanted[k])
        tokens = part.valid.open()
        assert torch.cat([batch.tokens for batch in own]).tolist() == [
            row(tokens, i * sizes[k] // n, 16) for i in range(n)
        ]
    assert min(sizes) > 12


def test_a_mixture_of_one_is_a_mixture(mixture_cfg) -> None:
    one = {"sums": MixturePart(mixture_cfg.mixture["sums"].path)}
    data = module(dataclasses.replace(mixture_cfg, mixture=one))
    assert next(iter(data.train_dataloader())).part.tolist() == [0] * 8
