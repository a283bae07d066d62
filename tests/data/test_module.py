import dataclasses
import itertools
import multiprocessing
import os
import pickle
import warnings

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer

from deepseek_exp.config import Order
from deepseek_exp.data import Batch, TokenDataModule, prepare
from deepseek_exp.data.order import Shuffled
from deepseek_exp.errors import DataError


def module(cfg, *, seed=3, eval_seqs=0, global_batch_seqs=8, micro_batch_seqs=4, **ranks) -> TokenDataModule:
    return TokenDataModule(
        prepare(cfg),
        cfg,
        seed=seed,
        global_batch_seqs=global_batch_seqs,
        micro_batch_seqs=micro_batch_seqs,
        eval_seqs=eval_seqs,
        **ranks,
    )


def take(loader, n: int | None = None) -> list[torch.Tensor]:
    """Give the tokens of the first batches, or of all; without a mixture their sequences are of no part."""
    batches = list(itertools.islice(loader, n))
    assert all(batch.part.dtype == torch.int64 and batch.part.tolist() == [-1] * len(batch.tokens) for batch in batches)
    return [batch.tokens for batch in batches]


def same(left, right) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def row(tokens, i: int, seq_len: int) -> list[int]:
    return tokens[i * seq_len : i * seq_len + seq_len + 1].tolist()


def test_batches_are_the_sequences_in_order(cfg) -> None:
    data, loader = prepare(cfg), module(cfg).train_dataloader()
    tokens, n = data.parts[0].train.open(), (data.parts[0].train.n_tokens - 1) // 16
    order = Shuffled(n, 3)
    batches = take(loader, n // 8 + 2)  # into the second epoch
    assert batches[0].shape == (8, 17)
    assert batches[0].dtype == torch.int64
    rows = torch.cat(batches).tolist()
    assert rows == [row(tokens, order.sequence_at(g), 16) for g in range(len(rows))]
    assert not same(take(module(cfg, seed=4).train_dataloader(), 1), batches[:1])


def test_a_loader_starts_at_the_position(cfg) -> None:
    batches = take(module(cfg).train_dataloader(), 6)
    resumed = module(cfg)
    resumed.advance(8)
    resumed.advance(16)
    assert same(take(resumed.train_dataloader(), 3), batches[3:])
    other = module(cfg)
    other.load_state_dict(resumed.state_dict())
    assert resumed.state_dict() == {"position": 24}
    loader = other.train_dataloader()
    assert same(take(loader, 3), batches[3:])
    other.advance(-24)
    assert same(take(loader, 6), batches)


def test_a_far_position_costs_nothing(cfg) -> None:
    resumed = module(cfg)
    resumed.advance(8 * 10**12)
    assert take(resumed.train_dataloader(), 1)[0].shape == (8, 17)


@pytest.mark.parametrize(("n_workers", "start"), [(1, "forkserver"), (2, "fork")])
def test_workers_change_nothing(cfg, n_workers: int, start: str, monkeypatch, capfd) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    plain = take(module(cfg).train_dataloader(), 8)
    data = module(dataclasses.replace(cfg, n_workers=n_workers))
    data.advance(16)
    loader = data.train_dataloader()
    loader.multiprocessing_context = multiprocessing.get_context(start)
    random_state = torch.get_rng_state()
    assert same(take(loader, 4), plain[2:6])
    processes = {child.pid for child in multiprocessing.active_children()}
    assert len(processes) >= n_workers
    data.advance(16)
    assert same(take(loader, 4), plain[4:])  # the same processes again, from the new position
    assert {child.pid for child in multiprocessing.active_children()} == processes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert "forked" not in capfd.readouterr().err


def test_a_dataset_travels_without_its_tokens(cfg) -> None:
    data = module(dataclasses.replace(cfg, max_bytes=300_000))
    loader = data.train_dataloader()
    first = take(loader, 1)
    dataset = loader.dataset
    assert len(pickle.dumps(dataset)) < 2000
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).__getitems__([0]).tokens, dataset.__getitems__([0]).tokens)
    assert same(take(loader, 1), first)


def test_lanes_read_on(cfg) -> None:
    cfg = dataclasses.replace(cfg, order=Order.contiguous)
    tokens, data = prepare(cfg).parts[0].train.open(), module(cfg)
    first, second = take(data.train_dataloader(), 2)
    assert torch.equal(first[:, -1], second[:, 0])
    assert first[1].tolist() == row(tokens, ((len(tokens) - 1) // 16) // 8, 16)


def test_validation_reads_all_in_order_or_some_at_even_distances(cfg) -> None:
    tokens = prepare(cfg).parts[0].valid.open()
    n = (len(tokens) - 1) // 16
    rows = [row(tokens, i, 16) for i in range(n)]
    for micro in (4, 5, 7):
        batches = take(module(cfg, micro_batch_seqs=micro).val_dataloader())
        assert torch.cat(batches).tolist() == rows
        assert [len(b) for b in batches] == [micro] * (n // micro) + [n % micro] * (n % micro > 0)
    for micro in (1, 4, 5):  # the last batch of 5 is partly filled
        batches = take(module(cfg, eval_seqs=12, micro_batch_seqs=micro).val_dataloader())
        assert torch.cat(batches).tolist() == [rows[i * n // 12] for i in range(12)]
        assert [len(b) for b in batches] == [micro] * (12 // micro) + [12 % micro] * (12 % micro > 0)
    assert n > 24
    assert torch.cat(take(module(cfg, eval_seqs=10_000).val_dataloader())).tolist() == rows


def test_validation_of_ranks_is_that_of_one(cfg) -> None:
    for order, eval_seqs, micro, dp in itertools.product(Order, (0, 13), (1, 2, 4, 8), (1, 2, 4)):
        changed = dataclasses.replace(cfg, order=order)
        one = take(module(changed, eval_seqs=eval_seqs).val_dataloader())
        sizes = {"eval_seqs": eval_seqs, "micro_batch_seqs": micro, "dp": dp, "fill_up": dp > 1}
        ranks = [list(module(changed, **sizes, dp_rank=rank).val_dataloader()) for rank in range(dp)]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(len(batch.tokens) == micro for batches in ranks for batch in batches) or dp == 1
        counted = [row for batches in ranks for batch in batches for row in batch.tokens[: batch.n_counted].tolist()]
        assert sorted(counted) == sorted(torch.cat(one).tolist())


def test_validation_in_lanes_reads_on(cfg) -> None:
    cfg = dataclasses.replace(cfg, order=Order.contiguous)
    tokens = prepare(cfg).parts[0].valid.open()
    n = (len(tokens) - 1) // 16
    rows = [row(tokens, i, 16) for i in range(n)]
    # eval_seqs, global batch, and what they make: lanes, steps
    for eval_seqs, n_global, lanes, steps in ((0, 8, 8, n // 8), (50, 8, 8, 6), (5, 8, 5, 1), (0, 2 * n, n, 1)):
        for micro in (1, 3, 8):
            data = module(cfg, eval_seqs=eval_seqs, global_batch_seqs=n_global, micro_batch_seqs=micro)
            assert (data.n_eval_lanes, data.batches_per_eval_step) == (lanes, -(-lanes // micro))
            batches = take(data.val_dataloader())
            assert torch.cat(batches).tolist() == [
                rows[lane * (n // lanes) + s] for s in range(steps) for lane in range(lanes)
            ]
            for before, after in zip(batches, batches[data.batches_per_eval_step :], strict=False):
                assert torch.equal(before[:, -1], after[:, 0])
    assert n // 8 > 6


def test_fewer_training_sequences_than_lanes(cfg) -> None:
    cfg = dataclasses.replace(cfg, order=Order.contiguous)
    n = (prepare(cfg).parts[0].train.n_tokens - 1) // 16
    module(cfg, global_batch_seqs=n)
    with pytest.raises(DataError) as error:
        module(cfg, global_batch_seqs=n + 1)
    assert str(error.value) == (
        f"trainer.global_batch_seqs={n + 1} needs as many sequences of train text with data.order=contiguous and there "
        f"are {n}. Fix: lower trainer.global_batch_seqs or data.seq_len, or add more train text."
    )


class Watcher(LightningModule):
    """Keeps the batches it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.seen.append(batch.tokens)
        self.trainer.datamodule.advance(len(batch.tokens))
        return self.weight * 1.0

    def validation_step(self, batch: Batch) -> None:
        assert batch.tokens.shape == (4, 17)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: TokenDataModule, folder, max_steps: int, ckpt_path: str | None = None) -> tuple[Watcher, Trainer]:
    watcher = Watcher()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(watcher, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return watcher, trainer


@pytest.mark.parametrize("n_workers", [0, 1])
def test_lightning_resumes_in_the_middle_of_an_epoch(cfg, tmp_path, n_workers: int) -> None:
    cfg = dataclasses.replace(cfg, n_workers=n_workers)
    batches = take(module(cfg).train_dataloader(), 7)
    watcher, trainer = fit(module(cfg, eval_seqs=8), tmp_path, 3)
    assert same(watcher.seen, batches[:3])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watcher, trainer = fit(module(cfg, eval_seqs=8), tmp_path, 7, str(tmp_path / "a.ckpt"))
    assert not [str(warning.message) for warning in caught if "resum" in str(warning.message)]
    assert same(watcher.seen, batches[3:])
    assert trainer.global_step == 7
    assert trainer.datamodule.position == 56
