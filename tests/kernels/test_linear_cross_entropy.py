"""The output table's product and cross-entropy in chunks against their definition."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.config import limits
from deepseek_exp.kernels import reference
from deepseek_exp.kernels.triton import linear_cross_entropy as module
from deepseek_exp.kernels.triton.linear_cross_entropy import linear_cross_entropy
from tests.kernels.fused import BOUND, assert_equals_definition

# tokens, width, entries: one chunk and one step a row, three chunks and steps, exactly two and four, a single token
SHAPES = [((3,), 5, 7), ((2, 5), 6, 33), ((8,), 16, 64), ((1,), 1, 2)]


@pytest.fixture(autouse=True)
def chunks_of_four_tokens_and_steps_of_sixteen_entries(monkeypatch):
    monkeypatch.setattr(limits, "LEAST_TOKENS", 4)
    monkeypatch.setattr(limits, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(limits, "TOKEN_TILE", 4)
    monkeypatch.setattr(module, "WIDTH", 16)


def inputs(tokens, width, entries):
    torch.manual_seed(entries)
    return torch.randn(*tokens, width), torch.randn(entries, width), torch.randint(entries, tokens)


def mean_of(function):
    return lambda *args: function(*args)[0]


def wide(*tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_gradients(shape):
    assert_equals_definition(mean_of(linear_cross_entropy), mean_of(reference.linear_cross_entropy), inputs(*shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", [True, False])
def test_nll_of_each_token(shape, trained):
    h, weight, targets = inputs(*shape)
    mean, nll = linear_cross_entropy(h.requires_grad_(trained), weight, targets)
    wanted_mean, wanted = reference.linear_cross_entropy(*wide(h, weight, targets))
    assert mean.requires_grad == trained and not nll.requires_grad
    assert nll.shape == targets.shape and nll.dtype == mean.dtype == torch.float32
    torch.testing.assert_close(nll.double(), wanted, rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(mean.double(), wanted_mean, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [None, lambda own: own[None]])
def test_weights_of_tokens(shape, share):
    h, weight, targets = inputs(*shape)
    weights = torch.randn(targets.shape)
    weights.flatten()[0] = 0.0  # a token that does not count

    def weighted(function, *share):
        return lambda h, weight, targets: function(h, weight, targets, *share, token_weights=weights)[0]

    assert_equals_definition(
        weighted(linear_cross_entropy, share), weighted(reference.linear_cross_entropy), (h, weight, targets)
    )


def test_logits_far_apart():
    """Rows whose largest logit comes first, last and far above the others, and targets far below it."""
    weight = torch.linspace(-60, 60, 20)[:, None]
    h, targets = torch.tensor([[1.0], [-1.0], [0.0], [5.0], [1.0]]), torch.tensor([0, 0, 7, 3, 19])
    assert_equals_definition(
        mean_of(linear_cross_entropy), mean_of(reference.linear_cross_entropy), (h, weight, targets)
    )


def test_inputs_that_do_not_lie_one_after_the_other():
    h, weight, targets = torch.randn(5, 3, 6).transpose(0, 1), torch.randn(6, 9).T, torch.randint(9, (3, 10))[:, ::2]
    assert_equals_definition(
        mean_of(linear_cross_entropy), mean_of(reference.linear_cross_entropy), (h, weight, targets)
    )


@pytest.mark.parametrize("trained", ["h", "weight"])
def test_one_of_the_two_is_frozen(trained):
    h, weight, targets = inputs((2, 5), 6, 33)
    kept, other = (h, weight) if trained == "h" else (weight, h)
    kept.requires_grad_()
    linear_cross_entropy(h, weight, targets)[0].backward()
    exact = [t.detach().double() for t in (h, weight)]
    exact[trained == "weight"].requires_grad_()
    reference.linear_cross_entropy(*exact, targets)[0].backward()
    torch.testing.assert_close(kept.grad.double(), exact[trained == "weight"].grad, rtol=1e-5, atol=BOUND)
    assert other.grad is None


def test_without_gradients_none_are_made(monkeypatch):
    h, weight, targets = inputs((2, 5), 6, 33)
    products = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: products.append(args))
    with torch.no_grad():
        mean, _ = linear_cross_entropy(h.requires_grad_(), weight.requires_grad_(), targets)
    linear_cross_entropy(h.detach(), weight.detach(), targets)
    assert not products and not mean.requires_grad


def test_a_second_backward_pass_is_refused():
    h, weight, targets = inputs((3,), 5, 7)
    mean, _ = linear_cross_entropy(h.requires_grad_(), weight.requires_grad_(), targets)
    (2 * mean).backward(retain_graph=True)
    once = h.grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * mean).backward()
    assert torch.equal(h.grad, once)


def one_of(rank, share, h, weight, targets, n_ranks):
    """Compute on one rank: the mean, the nll, dh and this rank's part of dw."""
    rows = len(weight) // n_ranks
    h, part = h.clone().requires_grad_(), weight[rank * rows :][:rows].clone().requires_grad_()
    mean, nll = linear_cross_entropy(h, part, targets - rank * rows, share)
    (3 * mean).backward()
    return mean.detach(), nll, h.grad, part.grad


def shared_out(h, weight, targets, n_ranks):
    """Compute on each rank in turn, first to learn what it shares, then with what all of them do."""
    told = [[] for _ in range(n_ranks)]

    def tell(rank):
        return lambda own: told[rank].append(own.clone()) or own[None]

    def hear(rank):
        chunks = iter(zip(*told, strict=True))

        def share(own):
            every = torch.stack(next(chunks))
            assert torch.equal(own, every[rank])
            return every

        return share

    for rank in range(n_ranks):
        one_of(rank, tell(rank), h, weight, targets, n_ranks)
    return [one_of(rank, hear(rank), h, weight, targets, n_ranks) for rank in range(n_ranks)]


@pytest.mark.parametrize(("tokens", "entries", "n_ranks"), [((2, 5), 34, 2), ((3,), 8, 4), ((4,), 6, 1)])
def test_table_shared_out_over_ranks(tokens, entries, n_ranks):
    h, weight, targets = inputs(tokens, 6, entries)
    weight[entries // 2] += 30 * h.flatten(0, -2)[0]  # a token whose probability lies with one rank alone
    parts = shared_out(h, weight, targets, n_ranks)
    exact = wide(h, weight)
    mean, nll = reference.linear_cross_entropy(*(t.requires_grad_() for t in exact), targets)
    (3 * mean).backward()
    for part in parts:
        assert all(torch.equal(a, b) for a, b in zip(part[:2], parts[0][:2], strict=True))
    found = *parts[0][:2], sum(p[2] for p in parts), torch.cat([p[3] for p in parts])
    for a, b in zip(found, (mean, nll, exact[0].grad, exact[1].grad), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() / b.abs().max() < BOUND
    again = shared_out(h, weight, targets, n_ranks)
    assert all(torch.equal(a, b) for p, q in zip(parts, again, strict=True) for a, b in zip(p, q, strict=True))


def test_shared_out_without_gradients():
    h, weight, targets = inputs((2, 5), 6, 8)
    with torch.no_grad():
        _, nll = linear_cross_entropy(h, weight.requires_grad_(), targets, lambda own: own[None])
    torch.testing.assert_close(nll, reference.linear_cross_entropy(h, weight, targets)[1])
    assert not nll.requires_grad


def test_compiles_without_a_break():
    def both_used(function):
        def loss(*args):
            mean, nll = function(*args)
            return mean * nll.max()

        return loss

    h, weight, targets = inputs((2, 5), 6, 33)
    compiled = torch.compile(both_used(linear_cross_entropy), backend="aot_eager", fullgraph=True)
    assert_equals_definition(compiled, both_used(reference.linear_cross_entropy), (h, weight, targets))
    op = torch.ops.deepseek_exp.linear_cross_entropy
    torch.library.opcheck(op, (h, weight, targets, True, True, torch.rand(2, 5)))
    torch.library.opcheck(op, (h, weight, targets, True, True))
    torch.library.opcheck(op, (h, weight, targets, False, False))
    torch.library.opcheck(torch.ops.deepseek_exp.multiply_gradient, (torch.randn(9), torch.tensor(2.0)))


def test_shared_out_in_a_compiled_model():
    h, weight, targets = inputs((2, 5), 6, 8)

    def tripled(function, *share):
        return lambda h, *args: 3 * function(2 * h, *args, *share)[0]

    compiled = torch.compile(tripled(linear_cross_entropy, lambda own: own[None]), backend="aot_eager")
    assert_equals_definition(compiled, tripled(reference.linear_cross_entropy), (h, weight, targets))
