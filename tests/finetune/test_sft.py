"""Supervised fine-tuning: the loss is the mean over the supervised tokens of the whole step, however it is divided."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from deepseek_exp.checkpoint import manifest
from deepseek_exp.data.template import OURS
from tests import forks
from tests.parallel.layouts import FEW, Watch, difference, layout, n_ranks

SEQUENCE = "parallel.sequence_parallel=true"
# rows of very different lengths, so that micro-batches have unequal numbers of supervised tokens
ROWS = [
    {
        "prompt": f"Write {i % 7} times x, after {'some ' * (i * 5 % 23)}words.",
        "response": " x" * (1 + (i * i) % 7 * (i % 5)),
    }
    for i in range(160)
]
DATA = ("do=sft", "data=chat", "model.max_seq_len=128", "data.vocab_size=300")
# a balance loss is computed from a micro-batch as a whole
NO_BALANCE = ("model.moe.aux_loss_weight=1e-30", "model.moe.capacity_factor=0")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return f"data.path={path}"


def same(one, many):
    found = difference(one, many)
    assert found.loss <= 2e-6 and found.grad_norm <= 1e-5 and found.weight <= 1e-5, found


@pytest.mark.parametrize(
    "model",
    [
        ("model=v1_dense",),
        pytest.param(("model=v3_moe", "model.n_mtp_layers=2"), marks=pytest.mark.long),
        pytest.param(("model=v2_moe", *NO_BALANCE), marks=pytest.mark.long),
    ],
    ids=lambda model: model[0],
)
def test_micro_batches_of_one_and_of_four_train_the_same(alone, rows, model):
    shape = (*FEW, *DATA, rows, *model, "trainer.global_batch_seqs=4")
    one, four = (alone(*shape, f"trainer.micro_batch_seqs={n}") for n in (1, 4))
    same(one, four)
    assert len(set(one.trace("train/loss"))) == len(one.trace("train/loss"))


def test_a_growing_batch_weighs_its_supervised_tokens_as_one_of_its_size(alone, rows):
    shape = (*FEW, *DATA, rows, "model=v1_dense", "trainer.batch_ramp_seqs=2", "trainer.batch_ramp_steps=2")
    one, two = (alone(*shape, "trainer.global_batch_seqs=4", f"trainer.micro_batch_seqs={n}") for n in (1, 2))
    same(one, two)
    small = alone(*FEW, *DATA, rows, "model=v1_dense", "trainer.global_batch_seqs=2", "trainer.micro_batch_seqs=1")
    for name in ("train/loss", "optim/grad_norm"):
        assert small.trace(name)[0] == one.trace(name)[0]


CASES = {
    "v1 dp2": (["model=v1_dense"], {"dp": 2}, []),
    "v1 dp2, no ZeRO": (["model=v1_dense"], {"dp": 2, "zero_stage": 0}, []),
    "v1 tp2 dp2, sequences cut": (["model=v1_dense"], {"tp": 2, "dp": 2}, [SEQUENCE]),
    "v3 pp2 dp2 ep2": (["model=v3_moe", "model.n_mtp_layers=2"], {"pp": 2, "dp": 2, "ep": 2}, []),
    "v2 dp2, ZeRO 3": (["model=v2_moe", "model.moe.capacity_factor=0"], {"dp": 2, "zero_stage": 3}, []),
}


@pytest.mark.parametrize(
    ("model", "degrees", "only_parts"),
    [pytest.param(*case, marks=() if name == "v1 dp2" else pytest.mark.long, id=name) for name, case in CASES.items()],
)
def test_a_layout_trains_what_one_process_trains(layouts, alone, rows, model, degrees, only_parts):
    shape = (*FEW, *DATA, rows, *model)
    same(alone(*shape), layouts.run(n_ranks(degrees), *shape, *only_parts, *layout(**degrees)))


@pytest.mark.long
def test_fused_kernels_train_the_same(alone, rows):
    shape = (*FEW, *DATA, rows, "model=v3_moe", "model.n_layers=2", "trainer.max_steps=2", "trainer.eval_every_steps=2")
    shape = (*shape, "trainer.global_batch_seqs=2", "trainer.eval_seqs=1")
    same(alone(*shape), alone(*shape, "kernels=fused"))


@pytest.mark.long
def test_fused_attention_over_a_window_trains_the_same_on_one_row_per_sequence(alone, rows):
    """Its tiles know no documents; with several in a sequence it is refused."""
    shape = (*FEW, *DATA, rows, "model=v2_5_sparse", "data.packing=false", "data.seq_len=80", "data.on_long_row=drop")
    shape = (*shape, "model.n_layers=2", "trainer.max_steps=1", "trainer.eval_every_steps=1", "optim.warmup_steps=0")
    shape = (*shape, "trainer.global_batch_seqs=2", "trainer.eval_seqs=1")
    same(alone(*shape), alone(*shape, "kernels=fused"))


class Leaks(Watch):
    """Has the attention see across documents."""

    def before_fit(self, parts, trainer):
        for block in parts.lit.model.blocks:
            block.register_forward_pre_hook(lambda _, args: (*args[:4], torch.zeros_like(args[4])))


def test_documents_that_see_each_other_are_found_before_the_first_step(layouts, rows):
    with pytest.raises(AssertionError, match=r"isolate_documents=true does not hold: changing one document changes"):
        layouts.run(1, *FEW, *DATA, rows, "model=v1_dense", watch=Leaks)


def run(folder, *overrides):
    done = forks.run(folder, *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout


def checkpoints(folder):
    return manifest.list_checkpoints(next((folder / "outputs" / "runs").iterdir()))


def test_a_run_is_fine_tuned_and_resumed_within_an_epoch_bit_for_bit(tmp_path, rows):
    few = ("device=cpu", "tracking=none", "trainer.n_threads=1", "trainer.eval_seqs=4")
    every = ("trainer.global_batch_seqs=4", "trainer.micro_batch_seqs=2", "trainer.log_every_steps=1")
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for folder in (base, tuned):
        folder.mkdir()
    tiny = ("size=tiny", "model.n_layers=2", "model.max_seq_len=256", "data.vocab_size=300")
    run(base, *few, *tiny, "data=synthetic", "trainer.max_steps=1")
    start = f"init_from={checkpoints(base)[-1]}"
    lengths = ("trainer.max_steps=8", "trainer.checkpoint_every_steps=4", "trainer.eval_every_steps=4")
    said = run(tuned, *few, *every, "do=sft", "data=chat", rows, start, *lengths)
    assert re.search(r"supervised [0-9,]+ tokens of 1\d\d rows \(per row mean [0-9.]+, least \d+\) in", said)
    found = re.search(
        r"isolation  changing one document of a sequence changes its own losses by up to (\S+) nats", said
    )
    assert float(found[1]) > 0.01 and "the others' by 0" in said
    half, whole = checkpoints(tuned)
    assert json.loads((half / "chat_template.json").read_text())["text"] == OURS["plain"]
    files = ("model.safetensors", "state.safetensors")
    before = {name: (whole / name).read_bytes() for name in files}
    shutil.rmtree(whole)
    run(tuned, "do=sft", f"resume={half}")
    assert {name: (whole / name).read_bytes() for name in files} == before
    scored = run(tuned, "do=eval", f"resume={whole}")
    assert re.search(r"loss (\S+) nats per token", scored)[1] == re.search(r"loss (\S+) nats per token", said)[1]
