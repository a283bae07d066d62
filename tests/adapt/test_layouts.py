"""Adapters in every kind of layout train what one process trains."""

from __future__ import annotations

import dataclasses

import pytest

from tests.parallel.layouts import FEW, Watch, layout, n_ranks
from tests.parallel.test_equivalence import SEQUENCE, V2, V3, Copies, Traced, assert_same

EVERY = ("lora=default", "lora.rank=4", "lora.targets=['*']")
# what is trained, in which layout, and what one process does not know of
CASES = {
    "v3 pp2 tp2 dp2 ep2": (V3, {"pp": 2, "tp": 2, "dp": 2, "ep": 2}, []),
    "v3 tp2": (V3, {"tp": 2}, []),
    "v1 tp2 dp2, sequences cut": (["model=v1_dense"], {"tp": 2, "dp": 2}, [SEQUENCE]),
    "v2 dp2 ep2, rows dropped": (V2, {"dp": 2, "ep": 2}, []),
    "v1 tied pp2": (["model=v1_dense", "model.tie_embeddings=true"], {"pp": 2}, []),
    "v1 pp2, tables frozen": (["model=v1_dense", "lora.targets=['*.w*']"], {"pp": 2}, []),
    "v1 dp2, no ZeRO": (["model=v1_dense"], {"dp": 2, "zero_stage": 0}, []),
    "v1 dp2, ZeRO 2": (["model=v1_dense"], {"dp": 2, "zero_stage": 2}, []),
    "v3 dp2, ZeRO 3": (V3, {"dp": 2, "zero_stage": 3}, []),
    "v4 tp4, two key heads": (["model=v4_distill", "model.n_kv_heads=2"], {"tp": 4}, []),
    "v1 tp2, traced into graphs": (["model=v1_dense"], {"tp": 2}, ["trainer.compile=true"]),
}
QUICK = ("v3 tp2", "v1 dp2, no ZeRO")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.long) for c in CASES])
def test_a_layout_trains_what_one_process_trains(layouts, alone, case):
    model, degrees, only_parts = CASES[case]
    watch = Traced if only_parts == ["trainer.compile=true"] else Watch if degrees.get("zero_stage") == 3 else Copies
    one = alone(*FEW, *EVERY, *model)
    many = layouts.run(n_ranks(degrees), *FEW, *EVERY, *model, *only_parts, *layout(**degrees), watch=watch)
    assert_same(one, many)
    weights = one.weights()
    assert all(w.abs().max() > 0 for name, w in weights.items() if name.endswith("lora_b"))


@pytest.mark.long
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_checkpoint_continues_in_any_layout(layouts, zero_stage):
    steps = ("trainer.max_steps=4", "trainer.eval_every_steps=2", "trainer.checkpoint_every_steps=2")
    steps = (*steps, "optim.warmup_steps=1", "model=v3_moe", "trainer.keep_checkpoints=3", *EVERY)
    steps = (*steps, "model.tie_embeddings=true") if zero_stage == 1 else steps
    half = (*steps, "trainer.max_steps=2")
    whole = layouts.run(1, *steps)
    degrees = {"dp": 2, "ep": 1 if zero_stage == 3 else 2, "zero_stage": zero_stage}
    there = layout(**degrees)
    by_many = layouts.run(1, *steps, resume=layouts.run(2, *half, *there))
    by_one = layouts.run(2, *steps, *there, resume=layouts.run(1, *half))
    for found in (by_many, by_one):
        rest = {step: values for step, values in whole.metrics.items() if step > 2}
        assert_same(dataclasses.replace(whole, metrics=rest), found)
