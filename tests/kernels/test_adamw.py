"""AdamW in Triton against torch.optim.AdamW in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_exp.kernels.reference import dequantize_blocks, quantize_blocks
from deepseek_exp.kernels.triton.adamw import FusedAdamW
from deepseek_exp.kernels.triton.multi_tensor import gradient_norm
from deepseek_exp.train.ema import update_average
from deepseek_exp.train.optim import MasterWeights, clip_gradients
from deepseek_exp.train.optim import gradient_norm as norm_by_definition
from tests.kernels.fused import BOUND

SHAPES = [(5,), (30, 41), (), (1024,), (3, 1025), (0, 3), (2, 512)]


def tensors(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def trainable(dtype=torch.float32, shapes=SHAPES, seed=0):
    return [t.to(torch.bfloat16).to(dtype).requires_grad_() for t in tensors(seed, shapes)]


def groups_of(params):
    """Give two groups that differ in all that may differ."""
    first, second = [("a", params[0]), ("b", params[1])], [(str(i), p) for i, p in enumerate(params[2:])]
    return [
        {"params": first, "weight_decay": 0.3, "decays": True},
        {"params": second, "lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.0, "decays": False},
    ]


def run(optimizer, params, steps, first=0, clip=None):
    """Step with the same gradients whatever the type of the parameters."""
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        for i, (p, grad) in enumerate(zip(params, tensors(100 + step, [p.shape for p in params]), strict=True)):
            if not (i == 1 and step == 1):  # counts of steps differ in a group
                p.grad = grad.to(p.dtype) * 10 ** (step - 1)
        if clip is not None:
            clip(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def assert_close(found, wanted, bound=BOUND):
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a.numel():
            difference = ((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-30)).item()
            assert difference < bound, f"tensor {i}: {difference:.1e}"


def moments(optimizer, name):
    return [optimizer.state[p][name] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("clip_norm", [None, 0.0, 0.5])
def test_equals_the_definition(clip_norm):
    params, exact, again = trainable(), trainable(torch.float64), trainable()
    found, wanted, repeated = (
        FusedAdamW(groups_of(params)),
        torch.optim.AdamW(groups_of(exact)),
        FusedAdamW(groups_of(again)),
    )
    clip = None if clip_norm is None else lambda optimizer: optimizer.clip(clip_norm)
    run(found, params, 4, clip=clip)
    run(repeated, again, 4, clip=clip)
    run(wanted, exact, 4, clip=None if clip_norm is None else lambda optimizer: clip_gradients(optimizer, clip_norm))
    assert_close(params, exact)
    for name in ("exp_avg", "exp_avg_sq"):
        assert_close(moments(found, name), moments(wanted, name))
    assert moments(found, "step") == moments(wanted, "step")
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_tensors_that_lie_anywhere():
    buffer, exact = tensors(shapes=[(4099,)])[0], trainable(torch.float64, [(1365,)] * 3)
    params = [part.requires_grad_() for part in buffer[3:-1].split(1365)]
    for p, q in zip(params, exact, strict=True):
        p.data.copy_(q)
    run(FusedAdamW(params), params, 3)
    run(torch.optim.AdamW(exact), exact, 3)
    assert_close(params, exact)


def test_gradients_that_do_not_lie_one_after_the_other():
    p, q = torch.ones(6, 4).requires_grad_(), torch.ones(6, 4).requires_grad_()
    p.grad = torch.randn(4, 6).T
    q.grad = p.grad.contiguous()
    assert torch.equal(gradient_norm([p.grad]), gradient_norm([q.grad]))
    FusedAdamW([p]).step()
    FusedAdamW([q]).step()
    assert torch.equal(p, q)


def test_autograd_sees_the_update():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    out = (p * p).sum()
    FusedAdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_closure_and_schedule():
    p = torch.ones(3, requires_grad=True)
    optimizer = FusedAdamW([p], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    schedule.step()
    torch.testing.assert_close(p, torch.full((3,), 0.95))


class TestNorm:
    def test_equals_the_definition(self):
        wide, narrow = tensors(1), [t.bfloat16() for t in tensors(2)]
        for gradients, bound in ((wide, 1e-14), (narrow, 1e-8), (wide + narrow, 1e-8)):  # bf16 is added in fours first
            norm = gradient_norm(gradients)
            assert norm.dtype == torch.float64 and norm.shape == ()
            assert norm.item() == pytest.approx(norm_by_definition(gradients).item(), rel=bound)
            assert torch.equal(norm, gradient_norm(gradients))

    @pytest.mark.parametrize("size", [1e-18, 1e18])
    def test_reach_of_bf16(self, size):
        gradient = torch.full((1000,), size, dtype=torch.bfloat16)
        assert gradient_norm([gradient]).item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)

    def test_sums_are_wide(self):
        """fp32 would lose each of the small squares beside the large one."""
        gradient = torch.full((20000,), 1e-3)
        gradient[0] = 1e3
        exact = (1e6 + 19999 * torch.tensor(1e-3).double().item() ** 2) ** 0.5
        assert gradient_norm([gradient]).item() == pytest.approx(exact, rel=1e-15)


class TestCheckpoints:
    @pytest.mark.parametrize("fused", [False, True])
    def test_pass_from_and_to_torch(self, fused):
        ours, theirs, exact = trainable(), trainable(), trainable(torch.float64)
        first, second = FusedAdamW(groups_of(ours)), torch.optim.AdamW(groups_of(theirs), fused=fused)
        run(first, ours, 2)
        run(second, theirs, 2)
        run(torch.optim.AdamW(groups_of(exact)), exact, 4)  # without a pause
        saved = copy.deepcopy(first.state_dict()), copy.deepcopy(second.state_dict())
        assert saved[0]["param_groups"][0]["param_names"] == ["a", "b"]
        for params, optimizer, state in ((theirs, FusedAdamW, saved[1]), (ours, torch.optim.AdamW, saved[0])):
            resumed = optimizer(groups_of(params))
            resumed.load_state_dict(state)
            assert resumed.param_groups[1]["betas"] == (0.8, 0.99)
            run(resumed, params, 2, first=2)
            assert_close(params, exact)

    @pytest.mark.parametrize("bits", [8, 32])
    def test_continue_to_the_bit(self, bits):
        a = trainable()
        first = FusedAdamW(groups_of(a), state_bits=bits)
        run(first, a, 2)
        b = [p.detach().clone().requires_grad_() for p in a]
        second = FusedAdamW(groups_of(b), state_bits=bits)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for optimizer, params in ((first, a), (second, b)):
            run(optimizer, params, 2, first=2)
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

    def test_of_masters_pass_from_and_to_master_weights(self):
        shapes = [(30, 41), (7,)]
        ours, theirs = trainable(torch.bfloat16, shapes), trainable(torch.bfloat16, shapes)
        first = FusedAdamW([("w", ours[0]), ("v", ours[1])], lr=0.01)
        second = MasterWeights(
            [{"params": [("w", theirs[0]), ("v", theirs[1])]}], lambda groups: torch.optim.AdamW(groups, lr=0.01)
        )
        step_of_masters(first, ours, 0)
        saved = copy.deepcopy(first.state_dict())
        assert set(saved) == {"inner", "masters"} and set(saved["inner"]["state"][0]) == {
            "step",
            "exp_avg",
            "exp_avg_sq",
        }
        second.load_state_dict(saved)
        third = FusedAdamW([("w", theirs[0]), ("v", theirs[1])], lr=0.5)
        third.load_state_dict(copy.deepcopy(second.state_dict()))
        assert third.param_groups[0]["lr"] == 0.01
        for optimizer in (first, third):
            for master, grad in zip(optimizer.masters, tensors(1, shapes), strict=True):
                master.grad = grad
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(first.masters, third.masters, strict=True))

    def test_of_other_variants_are_refused(self):
        params = trainable()
        other = torch.optim.AdamW(params, amsgrad=True)
        with pytest.raises(ValueError, match="amsgrad"):
            FusedAdamW(params).load_state_dict(other.state_dict())


def step_of_masters(optimizer, params, seed, micro_batches=1):
    """Step with the gradients of a linear loss, which autograd makes; gives what they were, in float64."""
    sums = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    for i in range(micro_batches):
        grads = [t.bfloat16() for t in tensors(10 * seed + i, [p.shape for p in params])]
        sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
        sums = [s + g.double() for s, g in zip(sums, grads, strict=True)]
    optimizer.step()
    return sums


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 32), (torch.float32, 8)])
def test_an_average_of_the_weights_is_saved_and_restored(dtype, bits):
    first, second = (trainable(dtype, [(30, 41)]) for _ in range(2))
    optimizer, again = (FusedAdamW(params, state_bits=bits) for params in (first, second))
    for seed in range(2):
        step_of_masters(optimizer, first, seed)
        update_average(optimizer, 0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (held,), (restored,) = optimizer.state.values(), again.state.values()
    assert torch.equal(held["ema"], restored["ema"]) and held.keys() == restored.keys()


class TestMasters:
    @pytest.mark.parametrize(("micro_batches", "wide"), [(1, False), (1, True), (3, False)])
    def test_equal_the_definition(self, micro_batches, wide):
        shapes = [(30, 41), (), (1024,)]
        params, exact = trainable(torch.bfloat16, shapes), trainable(torch.float64, shapes)
        optimizer, wanted = FusedAdamW(params, lr=0.01, wide_gradients=wide), torch.optim.AdamW(exact, lr=0.01)
        for seed in range(3):
            sums = step_of_masters(optimizer, params, seed, micro_batches)
            for q, total in zip(exact, sums, strict=True):
                q.grad = total
            wanted.step()
            kept = torch.bfloat16 if micro_batches == 1 and not wide else torch.float32
            assert all(p.grad is None for p in params) and {m.grad.dtype for m in optimizer.masters} == {kept}
            optimizer.zero_grad()
            assert all(m.grad is None for m in optimizer.masters)
        assert_close(optimizer.masters, exact)
        for p, master in zip(params, optimizer.masters, strict=True):  # the interpreter truncates
            assert torch.all((p.float() - master).abs() <= 2**-7 * master.abs())

    def test_of_fp32_parameters_are_these(self):
        params = trainable()
        optimizer = FusedAdamW(params)
        assert all(a is b for a, b in zip(optimizer.masters, params, strict=True))
        assert all(a is b for a, b in zip(optimizer.params, params, strict=True))

    def test_clip(self):
        (param,) = trainable(torch.bfloat16, [(30, 41)])
        optimizer = FusedAdamW([param])
        (grad,) = (t.bfloat16() for t in tensors(5, [(30, 41)]))
        (param * grad).sum().backward()
        assert optimizer.clip(1.0).item() == pytest.approx(grad.double().norm().item(), rel=1e-8)
        optimizer.step()
        assert_close(moments(optimizer, "exp_avg"), [0.1 * grad.double() / grad.double().norm()])
        assert optimizer.grad_scale is None

    def test_may_be_left_to_another(self):
        params = trainable(torch.bfloat16)
        optimizer = FusedAdamW(params, masters=False)
        flat = torch.ones(7)
        flat.grad = torch.ones(7)
        optimizer.param_groups[0]["params"] = [flat]
        optimizer.step()
        assert torch.all(flat < 1) and params[0]._post_accumulate_grad_hooks is None


class TestEightBits:
    def test_codes_are_the_definition(self):
        """From codes of four magnitudes in a block, one step against the definition's."""
        generator = torch.Generator().manual_seed(0)
        size = 1500
        m = torch.randn(size, generator=generator) * torch.logspace(0, -4, size)
        v = torch.randn(size, generator=generator).square() * torch.logspace(0, -8, size)
        v[256:512], m[512:768] = 0.0, 0.0
        param, grad = torch.ones(size, requires_grad=True), torch.randn(size, generator=generator) * 1e-3
        param.grad = grad.clone()
        optimizer = FusedAdamW([param], state_bits=8)
        state = optimizer.state[param]
        state["step"] = torch.tensor(3.0)
        state["exp_avg"], state["exp_avg_largest"] = quantize_blocks(m, is_signed=True)
        state["exp_avg_sq"], state["exp_avg_sq_largest"] = quantize_blocks(v, is_signed=False)
        exact = torch.ones(size, dtype=torch.float64, requires_grad=True)
        wanted = torch.optim.AdamW([exact])
        exact.grad = grad.double()
        wanted.state[exact] = {
            "step": torch.tensor(3.0),
            "exp_avg": dequantize_blocks(state["exp_avg"], state["exp_avg_largest"]).double(),
            "exp_avg_sq": dequantize_blocks(state["exp_avg_sq"], state["exp_avg_sq_largest"]).double(),
        }
        optimizer.step()
        wanted.step()
        assert_close([param], [exact])
        for name, is_signed in (("exp_avg", True), ("exp_avg_sq", False)):
            codes, largest = quantize_blocks(wanted.state[exact][name].float(), is_signed=is_signed)
            torch.testing.assert_close(state[f"{name}_largest"], largest)
            difference = (state[name].int() - codes.int()).abs()
            assert difference.max() <= 1 and difference.count_nonzero() < 5  # where fp32 rounds the other way

    def test_rounding_is_bounded_and_done_once(self):
        m = torch.randn(1000) * torch.logspace(0, -3, 1000)
        for x, is_signed, bound in ((m, True, 2 / 254), (m.square(), False, 4 / 510)):
            codes, largest = quantize_blocks(x, is_signed=is_signed)
            wide = dequantize_blocks(codes, largest)
            of_element = largest.repeat_interleave(256)[:1000]
            assert torch.all((wide - x).abs() <= bound * 1.02 * of_element)
            again = quantize_blocks(wide, is_signed=is_signed)
            assert torch.equal(again[0], codes) and torch.equal(again[1], largest)

    def test_small_second_moments_do_not_become_zero(self):
        codes, _ = quantize_blocks(torch.tensor([1.0, 1e-20, 0.0]), is_signed=False)
        assert codes.tolist() == [255, 1, 0]

    def test_trains_as_wide_moments_do(self):
        """A small regression with inputs of badly scaled widths: the loss after 200 steps."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(128, 16, generator=generator) * torch.logspace(0, -3, 16)
        y = torch.tanh(x @ torch.randn(16, 4, generator=generator))
        start = [torch.randn(16, 24, generator=generator) / 4, torch.randn(24, 4, generator=generator) / 5]

        def train(make):
            first, second = (t.clone().requires_grad_() for t in start)
            optimizer, losses = make([first, second]), []
            for _ in range(200):
                optimizer.zero_grad()
                loss = (torch.tanh(x @ first) @ second - y).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        narrow = train(lambda params: FusedAdamW(params, lr=0.01, state_bits=8))
        wide = train(lambda params: torch.optim.AdamW(params, lr=0.01))
        assert narrow[-1] == pytest.approx(wide[-1], rel=0.05) and wide[-1] < wide[0] / 10


class TestRefusals:
    def test_other_numbers_of_bits(self):
        with pytest.raises(ValueError, match="state_bits=4 must be 8 or 32"):
            FusedAdamW(trainable(), state_bits=4)

    @pytest.mark.parametrize("param", [torch.ones(3, dtype=torch.float64), torch.ones(4, 6).T])
    def test_other_types_and_layouts(self, param):
        with pytest.raises(ValueError, match="must be contiguous fp32 or bf16"):
            FusedAdamW([param.requires_grad_()])

    def test_a_parameter_in_two_groups(self):
        (param,) = trainable(torch.bfloat16, [(3,)])
        with pytest.raises(ValueError, match="more than one parameter group"):
            FusedAdamW([{"params": [param]}, {"params": [param]}])
