"""From a Hugging Face folder through training and back, as a person does it."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.inference import from_pretrained
from tests import forks, runs
from tests.huggingface.releases import some_tokenizer, their_model, transformers
from tests.huggingface.test_parity import distance, some_tokens

QUICK = [
    o for o in runs.QUICK if not o.startswith(("size=", "trainer.max_steps", "trainer.eval_every", "trainer.check"))
]
TWO_STEPS = ("trainer.max_steps=2", "trainer.eval_every_steps=2", "trainer.checkpoint_every_steps=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a release and a run of two steps from it."""
    name = "deepseek_v3"  # the other families: test_parity.py
    folder = tmp_path_factory.mktemp(name)
    their_model(name).save_pretrained(folder / "release")
    (folder / "release" / "tokenizer.json").write_text(some_tokenizer().json)
    done = forks.run(
        folder, "init_from=release", *[o.replace("warmup_steps=3", "warmup_steps=1") for o in QUICK], *TWO_STEPS
    )
    assert done.returncode == 0, done.stderr
    return folder, done, name


def test_starts_from_its_weights(trained):
    folder, done, name = trained
    assert f"run       {name} release synthetic" in done.stdout and "starts    from release" in done.stdout
    (run_dir,) = runs.run_dirs(folder)
    before = from_pretrained(folder / "release").model.state_dict()
    after = runs.weights(run_dir, 2)
    moved = [distance(after[k], before[k]) for k in after if before[k].any()]
    assert 0 < max(moved) < 0.2


def test_export_loads_in_transformers(trained):
    folder, _, _ = trained
    (run_dir,) = runs.run_dirs(folder)
    done = forks.run(folder, "do=export", "resume=last")
    assert done.returncode == 0, done.stderr
    out = run_dir.relative_to(folder) / "hf"
    assert f"wrote     {out}, " in done.stdout and "model.safetensors" in done.stdout
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in done.stdout
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / out).eval()
    ours = from_pretrained(run_dir / "checkpoints" / "step-00000002")
    tokens = some_tokens()
    with torch.no_grad():
        assert distance(ours.model(tokens), theirs(tokens).logits) < 1e-5
    again = forks.run(folder, "do=export", "resume=last")
    assert again.returncode == 2 and "is there already and not an empty folder" in again.stderr
    other = forks.run(folder, "do=export", "resume=last", "export.path=elsewhere")
    assert other.returncode == 0 and (folder / "elsewhere" / "config.json").is_file()


def test_goes_on_without_the_weights_of_the_release(trained):
    folder, _, _ = trained
    weights = folder / "release" / "model.safetensors"
    weights.rename(folder / "moved")
    done = forks.run(folder, "resume=last", "trainer.max_steps=3")
    (folder / "moved").rename(weights)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_evaluates_and_samples_without_a_run(trained):
    folder, _, _ = trained
    losses = []
    for override in ("init_from=release", "resume=last"):
        extra = QUICK if override.startswith("init") else ["trainer.eval_seqs=8"]
        done = forks.run(folder, "do=eval", override, *extra)
        assert done.returncode == 0, done.stderr
        losses.append(float(done.stdout.split("loss ")[1].split()[0]))
    assert losses[0] > losses[1]
    done = forks.run(folder, "do=sample", "init_from=release", "sample.max_new_tokens=5", "sample.prompt=the cat")
    assert done.returncode == 0 and done.stdout.startswith("the cat"), done.stderr
