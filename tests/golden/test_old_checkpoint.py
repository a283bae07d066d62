"""Checkpoints of earlier versions stay usable.

`checkpoint_0_1` was saved by version 0.1.0 after the second of four steps of

    python run.py model=v3_moe size=tiny data=synthetic data.max_bytes=20000 data.vocab_size=270 model.vocab_size=270
        model.d_model=16 model.n_layers=2 model.n_heads=2 model.n_kv_heads=2 model.d_ff=16 model.q_lora_rank=8
        model.kv_lora_rank=8 model.qk_nope_head_dim=8 model.qk_rope_head_dim=4 model.v_head_dim=8
        model.moe.n_routed_experts=4 model.moe.top_k=2 model.moe.d_expert=8 data.seq_len=16 trainer.global_batch_seqs=4
        trainer.micro_batch_seqs=2 trainer.max_steps=4 trainer.checkpoint_every_steps=2 trainer.eval_every_steps=2
        trainer.eval_batches=2 trainer.log_every_steps=1 optim.warmup_steps=1 trainer.n_threads=1
"""

from __future__ import annotations

import shutil

import pytest
import torch

from deepseek_exp.inference import from_pretrained
from tests import forks, runs
from tests.golden.curves import HERE

CHECKPOINT = HERE / "checkpoint_0_1" / "step-00000002"
# what version 0.1.0 logged of the steps that follow
LOSSES = {3: 5.512635231018066, 4: 5.48731803894043}
GRAD_NORMS = {3: 1.1323894749549077, 4: 1.4608880032763023}
# processors round differently
ROUNDING = 1e-5


def test_training_continues_with_the_losses_of_the_version_that_saved_it(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "copied" / CHECKPOINT.name)
    done = forks.run(tmp_path, f"resume=copied/{CHECKPOINT.name}", "tracking=none", "tracking.new_run=true")
    assert done.returncode == 0, done.stderr
    (run_dir,) = runs.run_dirs(tmp_path)
    assert runs.trace(run_dir, "train/loss") == pytest.approx(LOSSES, rel=ROUNDING)
    assert runs.trace(run_dir, "optim/grad_norm") == pytest.approx(GRAD_NORMS, rel=ROUNDING)


def test_its_model_is_loaded():
    lm = from_pretrained(str(CHECKPOINT))
    logits = lm.model(torch.arange(8)[None])
    assert logits.shape == (1, 8, 270)
    assert torch.isfinite(logits).all()
