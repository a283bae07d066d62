"""Rows put into sequences, and documents of text that do not see each other."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from deepseek_exp.config import MixturePart
from deepseek_exp.data import TokenDataModule, prepare
from deepseek_exp.data.packing import best_fit


def numbers(first, n):
    return " ".join(str(7919 * i % 997) for i in range(first, first + n))


ROWS = [{"prompt": numbers(i, 1 + 7 * i % 6), "response": numbers(3 * i, 1 + 5 * i % 4)} for i in range(90)]


def module(cfg, **ranks):
    sizes = dict(seed=3, global_batch_seqs=4, micro_batch_seqs=2, eval_seqs=0)
    return TokenDataModule(prepare(cfg), cfg, **{**sizes, **ranks})


def rows_of(shard):
    ids, mask, ends = shard.open().tolist(), shard.open_mask().tolist(), shard.open_ends().tolist()
    return [(ids[a:b], mask[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def unpacked(batch):
    """Return the documents of a batch with the mask of each."""
    found = []
    for tokens, mask, document in zip(batch.tokens, batch.loss_mask, batch.document, strict=True):
        for k in document.unique().tolist():
            at = (document == k).nonzero().squeeze(1)
            if mask[at].any():
                length = int(mask[at].nonzero().max()) + 2  # rows end in a supervised token
                first = int(at[0])
                found.append(
                    (tokens[first : first + length].tolist(), [0, *mask[first : first + length - 1].int().tolist()])
                )
                assert at.tolist() == list(range(first, first + len(at)))
    return found


@pytest.mark.parametrize("capacity", [7, 10, 31])
def test_best_fit_cuts_no_row_and_overfills_no_sequence(capacity):
    lengths = np.random.default_rng(capacity).integers(1, capacity + 1, 300)
    rows, first = best_fit(lengths, capacity)
    assert sorted(rows.tolist()) == list(range(300)) and first[0] == 0 and first[-1] == 300
    filled = np.add.reduceat(lengths[rows], first[:-1])
    assert filled.max() <= capacity
    least = -(-int(lengths.sum()) // capacity)
    assert least <= len(first) - 1 <= 11 / 9 * least + 4
    assert (np.sort(filled)[1:] + 1 > capacity / 2).all()  # two half-empty sequences would be one


def test_every_row_is_in_one_sequence_with_its_mask(chat_cfg):
    cfg = chat_cfg(ROWS, seq_len=47, template="raw")
    data = module(cfg)
    n, loader = data.n_train_sequences, iter(data.train_dataloader())
    assert data.supervision["train"].fill > 0.9
    found = []
    batches = [next(loader) for _ in range(-(-n // 4))]
    for batch in batches:
        found += unpacked(batch)
    wanted = rows_of(prepare(cfg).parts[0].train)
    if n % 4 == 0:
        assert sorted(found) == sorted(wanted)
    assert {str(row) for row in found} == {str(row) for row in wanted}
    assert all(batch.document.dtype == torch.int32 and batch.loss_mask.dtype == torch.bool for batch in batches)
    prompts = rows_of(prepare(dataclasses.replace(cfg, train_on=["user"])).parts[0].train)
    assert any(sum(mask) for _, mask in prompts) and not any(mask[0] for _, mask in prompts)  # it has no context


def test_without_packing_each_row_has_a_sequence(chat_cfg):
    cfg = chat_cfg(ROWS, seq_len=47, template="raw", packing=False)
    data = module(cfg)
    assert data.n_train_sequences == data.supervision["train"].n_rows
    batch = next(iter(data.train_dataloader()))
    wanted = {str(row) for row in rows_of(prepare(cfg).parts[0].train)}
    for tokens, mask in zip(batch.tokens, batch.loss_mask, strict=True):
        n = int(mask.nonzero().max()) + 2
        assert str((tokens[:n].tolist(), [0, *mask[: n - 1].int().tolist()])) in wanted and not tokens[n:].any()
    assert batch.document is None


def test_rows_that_see_each_other_have_no_documents(chat_cfg):
    cfg = chat_cfg(ROWS, seq_len=47, template="raw")
    apart, together = module(cfg), module(dataclasses.replace(cfg, isolate_documents=False))
    a, b = next(iter(apart.train_dataloader())), next(iter(together.train_dataloader()))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loss_mask, b.loss_mask) and b.document is None
    assert apart.isolated_sample() is not None and together.isolated_sample() is None


def test_a_loader_starts_at_the_position_and_forks_copy_no_tokens(chat_cfg):
    cfg = chat_cfg(ROWS, seq_len=47, template="raw")
    loader = iter(module(cfg).train_dataloader())
    batches = [next(loader) for _ in range(9)]
    resumed = module(cfg)
    resumed.load_state_dict({"position": 5 * 4})
    for wanted, found in zip(batches[5:], iter(resumed.train_dataloader()), strict=False):
        for name in ("tokens", "loss_mask", "document"):
            assert torch.equal(getattr(wanted, name), getattr(found, name)), name
    halves = [next(iter(module(cfg, dp=2, dp_rank=rank).train_dataloader())) for rank in range(2)]
    assert torch.equal(torch.cat([h.loss_mask for h in halves]), batches[0].loss_mask)
    next(iter(resumed.train_dataloader()))
    assert pickle.loads(pickle.dumps(resumed._train))._masks is None


def test_validation_is_filled_up_with_rows_of_no_target(chat_cfg):
    cfg = chat_cfg(ROWS, seq_len=47, template="raw", valid_fraction=0.3)
    batches = [
        b for r in range(2) for b in module(cfg, dp=2, dp_rank=r, micro_batch_seqs=4, fill_up=True).val_dataloader()
    ]
    assert {len(b.tokens) for b in batches} == {4} and len(batches) % 2 == 0
    assert sum(b.n_counted for b in batches) == module(cfg).supervision["valid"].n_sequences
    assert not any(b.loss_mask[b.n_counted :].any() for b in batches)


def test_several_files_with_shares(chat_cfg, tmp_path):
    cfg = chat_cfg(ROWS, seq_len=47, template="raw")
    (tmp_path / "other.jsonl").write_text(
        (tmp_path / "rows.jsonl").read_text().replace('"prompt": "', '"prompt": "and ')
    )
    parts = {"a": MixturePart(cfg.path, weight=3.0), "b": MixturePart(str(tmp_path / "other.jsonl"))}
    data = module(dataclasses.replace(cfg, path=None, mixture=parts), global_batch_seqs=64)
    assert next(iter(data.train_dataloader())).part.bincount().tolist() == [48, 16]


def test_documents_of_text_end_with_their_token(text_cfg, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "{"ab" * (i % 9)}x"}}\n' for i in range(400)))
    cfg = text_cfg(tmp_path / "t.jsonl", isolate_documents=True)
    data = module(cfg)
    end, batch = prepare(cfg).tokenizer.end_id, next(iter(data.train_dataloader()))
    for tokens, mask, document in zip(batch.tokens.tolist(), batch.loss_mask, batch.document, strict=True):
        number = 0
        for i, token in enumerate(tokens[:-1]):
            assert int(document[i]) == number and bool(mask[i]) == (token != end)
            number += token == end
    assert batch.document.max() > 1
    plain = next(iter(module(dataclasses.replace(cfg, isolate_documents=False)).train_dataloader()))
    assert torch.equal(plain.tokens, batch.tokens) and plain.loss_mask is None and plain.document is None
    sample = data.isolated_sample()
    assert sample.tokens.shape == (2, 17) and all(len(d.unique()) > 1 for d in sample.document)
