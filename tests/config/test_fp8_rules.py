"""The rules of training in fp8, and what the plan expects of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_exp.config import machine
from deepseek_exp.config.machine import Machine
from deepseek_exp.experiment import command_line
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer
from deepseek_exp.planner import parameters
from deepseek_exp.planner.layers import layers_of, stages_of
from tests.composing import as_in_a_sweep
from tests.config.command_lines import ids, refusal
from tests.planner.plan_parts import experiment, layout, planned


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with as_in_a_sweep():
        yield


class TestRules:
    TINY = ("model=v1_dense", "size=tiny", "trainer.precision=fp8")

    @pytest.mark.parametrize(
        ("argv", "key", "width"),
        [
            (("model.d_ff=168",), "model.d_ff", 168),
            (("model.d_model=72",), "model.d_model", 72),
            (("model.head_dim=12", "model.n_heads=2", "model.n_kv_heads=2"), "model.head_dim", 24),
            (("model=v3_moe",), "model.kv_lora_rank", 72),
            (("model=v2_moe", "model.moe.d_expert=24", "kernels.fp8_experts=true"), "model.moe.d_expert", 24),
            (("model=v2_moe", "model.moe.d_expert=24", "model.moe.n_shared_experts=1"), "model.moe.d_expert", 24),
        ],
    )
    def test_widths(self, argv, key, width):
        found = [p for p in refusal([*self.TINY, *argv]).problems if p.key == key]
        assert found and all(p.id == "_fp8" and str(width) in p.rule for p in found)
        command_line.check_command_line([*self.TINY, *argv, "trainer.precision=bf16", "kernels.fp8_experts=false"])
        command_line.check_command_line([*self.TINY, *argv, "do=eval"])

    def test_what_tensor_parallelism_leaves(self):
        (problem,) = refusal([*self.TINY, "parallel.tp=2", "parallel.zero_stage=1"]).problems
        assert (problem.key, problem.id) == ("parallel.tp", "_fp8")
        assert "88 of a width of 176 (model.d_ff)" in problem.rule and "parallel.tp of 1" in problem.fix
        command_line.check_command_line([*self.TINY, "parallel.tp=2", "parallel.zero_stage=1", "model.d_ff=192"])

    def test_a_layout_that_is_chosen_keeps_to_it(self):
        assert "model.d_ff _fp8" in ids(refusal([*self.TINY, "model.d_ff=168", "parallel=auto"]))

    def test_a_plan_for_gpus_without_it(self):
        assert ids(refusal([*self.TINY, "do=plan", "cluster=a100_1024"])) == ["trainer.precision fp8_problems"]
        command_line.check_command_line([*self.TINY, "do=plan", "cluster=h100_8"])

    @pytest.mark.parametrize(
        ("capability", "model", "found"),
        [
            ((8, 0), "v1_dense", ["trainer.precision fp8_problems"]),
            ((8, 0), "v2_moe", ["trainer.precision fp8_problems"]),
            ((8, 9), "v1_dense", []),
            ((8, 9), "v2_moe", []),
        ],
    )
    def test_gpus(self, capability, model, found):
        machine = Machine(n_gpus=1, compute_capability=capability)
        argv = [f"model={model}", "size=tiny", "trainer.precision=fp8"]
        for fine in ("do=eval", "device=cpu", "trainer.precision=bf16"):
            command_line.check_command_line([*argv, fine], machine)
        assert ids(refusal(argv, machine)) == found

    def test_experts(self):
        ada, hopper, blackwell = (Machine(n_gpus=1, compute_capability=found) for found in ((8, 9), (9, 0), (10, 0)))
        argv = ["size=tiny", "trainer.precision=fp8", "kernels.fp8_experts=true"]
        command_line.check_command_line(["model=v1_dense", *argv], ada)
        found = ["kernels.fp8_experts fp8_problems"]
        assert ids(refusal(["model=v2_moe", *argv], ada)) == found
        assert ids(refusal(["model=v2_moe", *argv], blackwell)) == found
        command_line.check_command_line(["model=v2_moe", *argv], hopper)
        assert ids(refusal([*argv, "trainer.precision=bf16"])) == found


def test_the_driver_is_asked_for_the_capability(monkeypatch):
    """With a driver that answers as that of an H100 does, in the numbers of cuda.h."""

    class Driver:
        @staticmethod
        def cuInit(flags):
            return 0

        @staticmethod
        def cuDeviceGetCount(count):
            count._obj.value = 2
            return 0

        @staticmethod
        def cuDeviceGetAttribute(value, attribute, device):
            value._obj.value = {75: 9, 76: 0}[attribute]
            return 0

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Driver)
    here = Machine.here()
    assert (here.n_gpus, here.compute_capability) == (2, (9, 0))


def test_the_plan_is_faster_by_the_products_alone():
    """Twice the peak halves their time at the peak; attention, tables, routers and experts' gradients stay."""
    for model, experts, share in (("v1_dense", "true", 1.0), ("v2_moe", "true", 2 / 3), ("v2_moe", "false", 0.0)):
        argv = (f"model={model}", "size=1b", "cluster=h100_1")
        of = {"bf16": "false", "fp8": experts}
        seconds = {
            p: planned(
                experiment(*argv, f"trainer.precision={p}", f"kernels.fp8_experts={of[p]}"), layout()
            ).seconds.compute
            for p in of
        }
        exp = experiment(*argv)
        (stage,), c = stages_of(layers_of(exp.model, exp.data.seq_len), 1, exp.cluster), exp.cluster
        tokens = exp.trainer.global_batch_seqs * exp.data.seq_len
        halved = stage.product_flops + share * stage.expert_flops
        saved = tokens * halved * (1 / c.peak_bf16_flops - 1 / c.peak_fp8_flops)
        assert seconds["bf16"] - seconds["fp8"] == pytest.approx(saved)
        rest = stage.flops - stage.product_flops - 6 * exp.model.vocab_size * exp.model.d_model
        assert 0 < rest < 0.35 * stage.flops  # attention, routers, norms


def test_experts_in_bf16_may_be_of_any_width():
    for shared in (0, 2):
        command_line.check_command_line(
            [*TestRules.TINY, "model=v2_moe", "model.moe.d_expert=24", f"model.moe.n_shared_experts={shared}"]
        )


@pytest.mark.parametrize("name", ["v1_dense", "v2_moe", "v3_moe", "v4_distill"])
def test_the_plan_knows_the_linear_layers(name):
    """All of the blocks' and of prediction ahead, but for MLA's way up, which stays in bf16."""
    exp = experiment(f"model={name}", "size=tiny", "model.qkv_bias=false")
    with torch.device("meta"):
        model = Transformer(exp.model, TORCH)
    matrices = sum(
        layer.weight.numel()
        for part, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not part.endswith("wkv_b") and not part.startswith("head")
    )
    (stage,) = stages_of(layers_of(exp.model, exp.data.seq_len), 1, exp.cluster)
    assert stage.product_flops == 6 * matrices


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_weights_of_fp8_weigh_what_those_of_bf16_do(precision):
    exp = experiment("model=v1_dense", "size=tiny", f"trainer.precision={precision}", "cluster=h100_1")
    memory, n = planned(exp, layout()).memory[0], parameters(exp.model).total
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * n, 4 * n, 12 * n)
