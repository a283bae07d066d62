"""do=verify: a layout that computes what one process does gets its certificate, a broken one is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from deepseek_exp.commands.certificate import compare
from tests import forks
from tests.checkpoint.test_manifest import renew
from tests.config.test_config import composed
from tests.runs import QUICK, ROOT, TRACKED, ending, run_dirs, trace

STEPS = 3
OWN = (
    "do=verify",
    f"verify.steps={STEPS}",
    "trainer.micro_batch_seqs=2",
    "parallel.zero_stage=1",
    "device=cpu",
)
WORDS, TRACKED_WORDS = ((*(word for word in words if "micro_batch" not in word), *OWN) for words in (QUICK, TRACKED))


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A run of v3_moe in two stages, with what it said."""
    folder = tmp_path_factory.mktemp("verified")
    done = forks.run(folder, *TRACKED_WORDS, "model=v3_moe", "parallel.pp=2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, run_dirs(folder)[0], done.stdout


def test_a_right_layout_gets_its_certificate(verified):
    _, run_dir, out = verified
    page = (run_dir / "certificate.md").read_text()
    assert out.endswith(page)
    assert page.endswith(
        "\nverified: dp 1 x tp 1 x pp 2 computes the same as one process, within the bounds above\n"
    ) and page.startswith("# Certificate: dp 1 x tp 1 x pp 2 compared with one process\n")
    rows = re.findall(r"^\| (\w+ \w+).* \| (\S+) \| (.+) \| (\S+) \| ok \|$", page, re.M)
    assert [(name, bound) for name, _, _, bound in rows] == [
        ("training loss", "2e-06"),
        ("gradient norm", "1e-05"),
        ("validation loss", "2e-06"),
        ("final weights", "1e-05"),
        ("final buffers", "1e-05"),
    ]
    found = json.loads((run_dir / "certificate.json").read_text())
    assert found["holds"] and found["facts"]["seed"] == "1234"
    loss, norm, *_ = found["rows"]
    assert list(loss["values"]) == list(norm["values"]) == [f"step {i + 1}" for i in range(STEPS)]
    assert {name.split(".")[0] for name in found["rows"][3]["differences"]} == {
        "embedding", "blocks", "head", "mtp"
    }  # fmt: skip


def test_it_is_one_run_with_metrics_and_the_page(verified):
    folder, run_dir, _ = verified
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (recorded,) = client.search_runs([experiment.experiment_id])
    assert recorded.info.status == "FINISHED" and recorded.data.tags["do"] == "verify"
    names = [n for n in recorded.data.metrics if n.startswith("verify/")]
    assert len(names) == 5
    history = client.get_metric_history(recorded.info.run_id, "verify/loss_difference")
    assert [m.step for m in history] == [1, 2, 3]
    assert {"certificate.md", "certificate.json"} <= {a.path for a in client.list_artifacts(recorded.info.run_id)}
    assert {p.name for p in run_dir.iterdir() if p.is_dir()} == {"one", "ranks-2"}


@pytest.fixture
def altered(verified, tmp_path):
    """The folders of the two runs; the second is a copy."""
    _, run_dir, _ = verified
    return run_dir / "one", Path(shutil.copytree(run_dir / "one", tmp_path / "two"))


def test_one_process_is_held_to_every_bit(altered):
    one, other = altered
    cfg = composed(*WORDS, "model=v3_moe")
    same = compare(cfg, one, other)
    assert same.verdict == "verified: a second run of one process computes the same as one process, bit for bit"
    file = other / f"checkpoints/step-{STEPS:08d}/model.safetensors"
    weights = load_file(file)
    weights["blocks.1.attention.wo.weight"].view(-1)[7] *= 1 + 1e-6
    save_file(weights, file, metadata={"aliases": "{}"})
    renew(file.parent)
    found = compare(cfg, one, other)
    assert found.verdict.startswith(
        "NOT verified: a second run of one process does not compute the same as one process: "
        "final weights, absolute of blocks.1.attention.wo.weight ("
    )
    assert compare(composed(*WORDS, "model=v3_moe", "parallel.pp=2"), one, other).holds


def test_what_differs_first_is_told_first_and_a_missing_step_is_a_difference(altered):
    one, other = altered
    cfg = composed(*WORDS, "model=v3_moe", "parallel.pp=2")
    journal = other / "journal.jsonl"
    lines = journal.read_text().splitlines()
    kept = [re.sub(r'("optim/grad_norm"):[\d.]+', r"\1:9.0", x) if '"step":2' in x else x for x in lines]
    journal.write_text("\n".join(x for x in kept if '"train/loss"' not in x or '"step":3' not in x) + "\n")
    found = compare(cfg, one, other)
    assert re.match(r"gradient norm, relative at step 2 is \d.\S+ and 9 \(\S+ apart, bound 1e-05\)$",
                    found.first_difference)  # fmt: skip
    assert found.rows[0].wrong == ["step 3"] and "| inf | step 3 |" in found.markdown


@pytest.mark.long
def test_a_broken_layout_is_caught(tmp_path):
    command = [sys.executable, "-m", "tests.commands.verify_parts", *WORDS, "parallel.pp=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    (run_dir,) = run_dirs(tmp_path)
    assert re.fullmatch(
        r"parallel='dp 1 x tp 1 x pp 2' does not compute the same as one process: gradient norm, relative at step 1 is "
        rf"\S+ and \S+ \(\S+ apart, bound 1e-05\)\. Fix: read outputs/runs/{run_dir.name}/certificate\.md, and train "
        r"with another layout until that is fixed\.",
        done.stderr.splitlines()[-1],
    )
    assert done.stdout.splitlines()[-1].startswith("NOT verified: dp 1 x tp 1 x pp 2 does not compute the same")
    assert ending(run_dir) == "FAILED" and max(trace(run_dir, "verify/grad_norm_difference").values()) > 1e-3
