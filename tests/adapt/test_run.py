"""Runs with adapters: trained, resumed, used and exported by command lines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from deepseek_exp.adapt.files import read_adapter
from deepseek_exp.adapt.stored import check_adapters, fold, is_adapter, load_merged
from deepseek_exp.errors import CheckpointError
from deepseek_exp.inference import from_pretrained
from deepseek_exp.inference.adapters import stored_adapters
from tests import forks, runs
from tests.adapt.adapters import SCALE

LORA = ("lora=default", "lora.rank=4", "lora.alpha=8", "optim.lr=1e-2", "trainer.keep_checkpoints=3")
AVERAGED = (*LORA, "optim.ema_decay=0.5")
BASE = ("model=v3_moe", *runs.QUICK, "device=cpu", "trainer.max_steps=2", "trainer.eval_every_steps=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a short training, and of one that has adapted its weights."""
    folder = tmp_path_factory.mktemp("adapters")
    done = forks.run(folder, *BASE, "optim.warmup_steps=1")
    assert done.returncode == 0, done.stderr
    (base,) = runs.run_dirs(folder)
    same = [word for word in runs.QUICK if not word.startswith("size=")]
    done = forks.run(folder, *same, f"init_from={base}", *AVERAGED, "device=cpu", "data.seq_len=64")
    assert done.returncode == 0, done.stderr
    (adapted,) = (run_dir for run_dir in runs.run_dirs(folder) if run_dir != base)
    return folder, base, adapted, done.stdout


def checkpoint(run_dir, step):
    return run_dir / "checkpoints" / f"step-{step:08d}"


def test_only_the_adapters_are_trained_and_it_is_said(finished):
    _, base, adapted, said = finished
    before, after = runs.weights(base, 2), runs.weights(adapted, 12)
    assert all(torch.equal(before[name], after[name]) for name in before)
    added = after.keys() - before.keys()
    assert all(after[name].abs().max() > 0 for name in added)
    n = sum(after[name].numel() for name in added)
    assert f"rank 4 on {len(added) // 2} of 35 matrices" in said and f"{n:,} parameters are trained" in said
    events = [json.loads(line) for line in (adapted / "journal.jsonl").read_text().splitlines()]
    (listed,) = (event["text"] for event in events if event.get("path") == "adapters.txt")
    assert listed.count("\n") == 36
    losses = list(runs.trace(adapted, "train/loss").values())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_resume_is_bit_exact(finished, tmp_path):
    folder, _, adapted, _ = finished
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    (again,) = (d for d in runs.run_dirs(tmp_path) if d.name == adapted.name)
    for step in (8, 12):
        shutil.rmtree(checkpoint(again, step))
    done = forks.run(tmp_path, f"resume={again}", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert len(runs.trace(again, "train/loss")) == 12  # which also compares what was logged twice
    for name in ("model.safetensors", "state.safetensors"):
        one, other = (load_file(checkpoint(d, 12) / name) for d in (adapted, again))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_a_run_is_loaded_with_its_adapters_added(finished):
    _, base, adapted, _ = finished
    tokens = torch.arange(20)[None]
    logits = from_pretrained(adapted).model(tokens)
    wanted = from_pretrained(base).model
    wanted.load_state_dict(fold(runs.weights(adapted, 12), SCALE))
    assert torch.equal(logits, wanted(tokens))
    assert not torch.equal(logits, from_pretrained(base).model(tokens))


def test_an_adapter_without_its_other_half_or_its_scale_is_damage(finished):
    _, _, adapted, _ = finished
    folder = checkpoint(adapted, 12)
    names = list(runs.weights(adapted, 12))
    check_adapters(folder, names, SCALE)
    some = next(name for name in names if is_adapter(name))
    with pytest.raises(CheckpointError, match="holds only one of the two matrices of the adapter of"):
        check_adapters(folder, set(names) - {some}, SCALE)
    with pytest.raises(CheckpointError, match=r"its configuration has no lora\.rank"):
        check_adapters(folder, names, 0.0)


@pytest.mark.long
def test_other_verbs_take_the_run_as_one_model(finished, tmp_path):
    folder, _, adapted, _ = finished
    where = f"output_dir={folder / 'outputs'}"
    done = forks.run(tmp_path, "do=eval", f"resume={adapted}", where, "device=cpu", "tracking=none")
    assert f"loss {runs.trace(adapted, 'val/loss')[12]:.3f} nats" in done.stdout, done.stderr
    done = forks.run(tmp_path, "do=sample", f"resume={adapted}", "device=cpu", "sample.prompt=12 +")
    assert done.stdout.startswith("12 +"), done.stderr
    done = forks.run(tmp_path, "do=export", f"resume={adapted}", "export.path=hf", "device=cpu")
    assert "adapters  of rank 4 are added to the weights" in done.stdout, done.stderr
    tokens = torch.arange(20)[None]
    logits = from_pretrained(adapted).model(tokens)
    assert (from_pretrained(tmp_path / "hf").model(tokens) - logits).abs().max() <= 1e-5
    same = ("data=synthetic", "data.seq_len=64", "trainer.max_steps=1", "trainer.eval_seqs=8", "optim.warmup_steps=0")
    words = (f"init_from={adapted}", *same, "optim.lr=1e-9", "tracking=none", "device=cpu")  # of all weights again
    done = forks.run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    (again,) = runs.run_dirs(tmp_path)
    started, whole = runs.weights(again, 1), load_merged(checkpoint(adapted, 12))
    assert started.keys() <= whole.keys()
    assert max((started[n] - whole[n]).abs().max() for n in started if "bias" not in n) <= 1e-7


@pytest.mark.long
def test_other_adapters_are_refused(finished, tmp_path):
    _, base, adapted, _ = finished
    for run_dir, word in ((adapted, "lora.rank=2"), (adapted, "lora.exclude=[mtp.*]"), (base, "lora=default")):
        done = forks.run(tmp_path, f"resume={run_dir}", "trainer.max_steps=20", word, "device=cpu")
        assert "differs from the checkpoint's" in done.stderr and "lora." in done.stderr


@pytest.mark.long
def test_an_adapter_alone_starts_another_training(finished, tmp_path):
    _, base, adapted, _ = finished
    done = forks.run(tmp_path, "do=export", f"resume={adapted}", "export.format=adapter", "export.path=mine")
    assert done.returncode == 0 and "adapter.json, adapter.safetensors" in done.stdout, done.stderr
    done = forks.run(
        tmp_path, "do=export", f"resume={adapted}", "export.format=adapter", "export.path=mean", "use_ema=true"
    )
    assert done.returncode == 0, done.stderr
    raw, mean = (read_adapter(tmp_path / name, "lora.path")[0] for name in ("mine", "mean"))
    wanted = stored_adapters(checkpoint(adapted, 12), use_ema=True)
    assert all(torch.equal(mean[name].a, wanted[name].a) for name in wanted)
    assert any(not torch.equal(mean[name].a, raw[name].a) for name in wanted)
    same = ("data=synthetic", "data.seq_len=64", "trainer.max_steps=1", "trainer.eval_seqs=8", "optim.warmup_steps=0")
    words = (f"init_from={base}", *LORA, "optim.lr=1e-9", "lora.path=mine", *same, "tracking=none", "device=cpu")
    done = forks.run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    (again,) = runs.run_dirs(tmp_path)
    before, after = runs.weights(adapted, 12), runs.weights(again, 1)
    assert max((after[name] - before[name]).abs().max() for name in before) <= 1e-7
    for word, said in {
        "lora.rank=2": r"lora.rank=2 differs from the 4 of lora.path",
        "lora.targets=[*.attention.*]": "has adapters of 30 matrices and lora.targets selects",
    }.items():
        done = forks.run(tmp_path, *words, word)
        assert done.returncode and said in done.stderr, done.stderr
    done = forks.run(tmp_path, "do=export", f"resume={base}", "export.format=peft")
    assert "export.format='peft' is for a run with adapters" in done.stderr
    done = forks.run(tmp_path, "do=export", f"resume={adapted}", "export.format=peft")
    assert "export.format='peft' has no place for adapters of blocks.0.feed_forward" in done.stderr
