"""Rows of prompts and completions: how they are encoded, split, ordered and batched."""

from __future__ import annotations

import json

import numpy as np
import pytest

from deepseek_exp.data import TokenDataModule, Tokenizer, length_baseline, prepare
from deepseek_exp.data.order import Grouped, Paired, Shuffled
from deepseek_exp.data.readers import BadRow
from deepseek_exp.data.rows import parse_pair
from deepseek_exp.errors import DataError
from tests.config.test_config import composed


@pytest.fixture
def tokenizer(tmp_path):
    found = Tokenizer.train(["12+34=46"], 258)
    found.save(tmp_path / "tokenizer.json")
    return found


def prepared(tmp_path, source, rows, *overrides):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verb = {"preference": "dpo", "prompts": "grpo"}[source]
    fixed = ("size=tiny", f"do={verb}", "grpo.max_new_tokens=8", f"data={source}", f"data.path={path}")
    cfg = composed(*fixed, f"data.tokenizer={tmp_path / 'tokenizer.json'}", "data.seq_len=16", *overrides).data
    return prepare(cfg), cfg


PAIRS = [{"prompt": f"q{i}", "chosen": "a" * (i + 1), "rejected": "bb"} for i in range(8)]


def test_pairs_are_adjacent_rows_of_the_same_prompt(tmp_path, tokenizer):
    data, _ = prepared(tmp_path, "preference", PAIRS, "data.template=raw", "data.valid_fraction=0.25")
    rows = data.train
    assert len(rows.tokens) == 12 and len(data.valid.tokens) == 4 and data.unit == 2
    assert [row["prompt"] for row in data.valid.objects] == ["q3", "q7"]
    for i, row in enumerate(rows.objects):
        for k, name in enumerate(("chosen", "rejected")):
            n, end = rows.prompt_len[2 * i + k], rows.length[2 * i + k]
            ids = rows.tokens[2 * i + k].tolist()
            assert tokenizer.decode(ids[:n]) == row["prompt"] and tokenizer.decode(ids[n : end - 1]) == row[name]
            assert set(ids[end - 1 :]) == {tokenizer.end_id}
            mask = rows.loss_mask(np.array([2 * i + k]))[0]  # of the targets, ids[1:]
            assert np.flatnonzero(mask).tolist() == list(range(n - 1, end - 1))
    assert data.first_words() == "q3"


def test_a_template_surrounds_the_prompt(tmp_path, tokenizer):
    data, _ = prepared(tmp_path, "preference", PAIRS, "data.template=plain", "data.seq_len=64")
    first = data.train
    text = tokenizer.decode(first.tokens[0, : first.prompt_len[0]].tolist())
    assert text == "### User:\nq0\n\n### Assistant:\n" and data.template.name == "plain"
    assert data.stop_id == tokenizer.end_id and "template" in data.digests()


def test_long_prompts_lose_their_beginning_and_long_completions_are_left_out(tmp_path, tokenizer, caplog):
    long = [{"prompt": "x" * 30 + "yz", "chosen": "a" * 9, "rejected": "b"}]
    long.append({"prompt": "p", "chosen": "c" * 40, "rejected": "b"})
    rows = [*long, *PAIRS[:3]]
    data, _ = prepared(tmp_path, "preference", rows, "data.template=raw", "data.valid_fraction=0.25")
    assert tokenizer.decode(data.train.tokens[0, : data.train.prompt_len[0]].tolist()) == "xxxxxyz"
    assert data.train.prompt_len[0] == data.train.prompt_len[1]
    assert "left out 1 of 4 train rows" in caplog.text
    with pytest.raises(DataError, match="no row for train whose completions fit into"):
        prepared(tmp_path, "preference", long[1:] * 8, "data.template=raw", "data.valid_fraction=0.25")


def test_length_baseline(tmp_path, tokenizer):
    data, _ = prepared(tmp_path, "preference", PAIRS, "data.template=raw", "data.valid_fraction=0.25")
    assert length_baseline(data) == ("longer", 1.0)  # in training 1 shorter, 1 equal, 4 longer; valid: 4 and 8 letters
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    data, _ = prepared(tmp_path, "preference", swapped, "data.template=raw", "data.valid_fraction=0.25")
    assert length_baseline(data) == ("shorter", 1.0)


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": "a", "answer": True}, {"prompt": 1, "answer": "b"}])
def test_malformed_prompts(tmp_path, tokenizer, row):
    with pytest.raises(DataError, match=r"rows\.jsonl:9"):
        prepared(tmp_path, "prompts", [{"prompt": "a", "answer": 3}] * 8 + [row])


def module_of(data, cfg, **arguments):
    sizes = {"seed": 1, "global_batch_seqs": 8, "micro_batch_seqs": 2, "eval_seqs": 0}
    return TokenDataModule(data, cfg, **{**sizes, **arguments})


def test_batches_of_pairs(tmp_path, tokenizer):
    data, cfg = prepared(tmp_path, "preference", PAIRS, "data.template=raw", "data.valid_fraction=0.25")
    data = data.with_reference(np.arange(12.0), np.arange(4.0))
    whole = next(iter(module_of(data, cfg).train_dataloader()))
    assert (whole.reference[1::2] == whole.reference[::2] + 1).all() and (whole.reference[::2] % 2 == 0).all()
    halves = [next(iter(module_of(data, cfg, dp=2, dp_rank=rank).train_dataloader())) for rank in range(2)]
    assert halves[0].reference.tolist() + halves[1].reference.tolist() == whole.reference.tolist()
    valid = list(module_of(data, cfg, eval_seqs=2, micro_batch_seqs=4, fill_up=True).val_dataloader())
    assert [b.n_counted for b in valid] == [2] and valid[0].loss_mask.any(1).tolist() == [True, True, False, False]


def test_batches_of_prompts(tmp_path, tokenizer):
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(8)]
    data, cfg = prepared(tmp_path, "prompts", rows, "data.template=raw", "data.valid_fraction=0.25")
    module = module_of(data, cfg, group_size=4, iterations=2)
    first, second, third = (batch.row.tolist() for batch, _ in zip(module.train_dataloader(), range(3), strict=False))
    assert first == second != third and len(set(first)) == 2 and first[:4] == first[:1] * 4
    assert module.n_train_sequences == 6 * 4 * 2
    padded = list(module_of(data, cfg, fill_up=True, dp=2, dp_rank=1, micro_batch_seqs=2).val_dataloader())
    assert padded[0].row.tolist() == [-1, -1] and padded[0].n_counted == 0


def test_orders():
    pairs = Shuffled(5, 1)
    assert [Paired(pairs).sequence_at(i) // 2 for i in range(0, 10, 2)] == [pairs.sequence_at(i) for i in range(5)]
    assert [Paired(pairs).sequence_at(i) % 2 for i in range(4)] == [0, 1, 0, 1]
    grouped = Grouped(pairs, group_size=2, n_rows=4, iterations=3)
    prompts = [grouped.sequence_at(i) for i in range(24)]
    assert prompts[:4] == [pairs.sequence_at(i) for i in (0, 0, 1, 1)] and prompts[:4] * 3 == prompts[:12]
    assert prompts[12:16] == [pairs.sequence_at(i) for i in (2, 2, 3, 3)]


@pytest.mark.parametrize(("key", "text"), [("chosen", " \n"), ("rejected", ""), ("rejected", "yes")])
def test_a_pair_without_a_difference_is_refused(key, text):
    with pytest.raises(BadRow, match=r"holds no text under|has equal texts under"):
        parse_pair({"prompt": "a", "chosen": "yes", "rejected": "no", key: text})
