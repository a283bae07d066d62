"""Multi-token prediction: what each depth sees, what it is to predict, and what its modules are made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepseek_exp.kernels import TORCH, reference
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed
from tests.models.looking import logits_ahead, segment_logits

TINY = composed("model=v3_moe", "size=tiny").model
SEQ = 12


def build(n_mtp_layers=3, dtype=torch.float64, seed=0, **changes) -> Transformer:
    cfg = dataclasses.replace(TINY, n_mtp_layers=n_mtp_layers, init_std=0.2, **changes)
    ops = dataclasses.replace(TORCH, grouped_mm=reference.grouped_mm)
    model = Transformer(cfg, ops).to(dtype)
    init_weights(model, cfg, seed)
    return model.eval()


def some_tokens(batch=2, seq=SEQ + 1, seed=0):
    return torch.randint(0, TINY.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def test_each_depth_predicts_one_token_further_and_sees_all_before_it():
    """Logits of depth k at position i are those of token i + k + 1 and depend on tokens 0 .. i + k, on each of them.

    Their targets are tokens[:, k + 1 :], as those of the main model (depth 0) are tokens[:, 1:]. The last token is a
    target alone.
    """
    model, tokens = build(), some_tokens(1)
    with torch.no_grad():
        main, ahead = logits_ahead(model, tokens)
        before = [main, *ahead]
        for k, logits in enumerate(before):
            assert logits.shape == (1, SEQ - k, TINY.vocab_size) == (*tokens[:, k + 1 :].shape, TINY.vocab_size)
        for position in range(SEQ + 1):
            changed = tokens.clone()
            changed[0, position] = (changed[0, position] + 1) % TINY.vocab_size
            main, ahead = logits_ahead(model, changed)
            for k, logits in enumerate([main, *ahead]):
                moved = (logits - before[k])[0].abs().amax(-1) > 1e-9
                assert moved.tolist() == [i + k >= position for i in range(SEQ - k)], (k, position)


def test_is_its_formula():
    """Each depth is norm(block(W [norm(emb(next token)); norm(h)])), with the main model's tables.

    h is what the output table reads at the depth before: transformers runs released weights so (tests/serve).
    """
    model, tokens = build(2), some_tokens()
    with torch.no_grad():
        main, ahead = logits_ahead(model, tokens)
        assert torch.equal(main, model(tokens[:, :-1]))
        h = model.embedding(tokens[:, :-1])
        for block in model.blocks:
            h = block(h)
        h = model.head.norm(h)
        for k, module in enumerate(model.mtp, start=1):
            halves = module.embedding_norm(model.embedding.weight[tokens[:, k:-1]]), module.hidden_norm(h[:, :-1])
            h = module.head_norm(module.block(torch.cat(halves, -1) @ module.projection.weight.T))
            torch.testing.assert_close(ahead[k - 1], h @ model.head.weight.T)


def test_its_loss_trains_the_modules_and_the_main_model():
    model, tokens = build(2).train(), some_tokens()
    _, ahead = model.losses(tokens)
    sum(mean for mean, _ in ahead).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_modules_there_is_nothing_ahead():
    model, tokens = build(0), some_tokens()
    main, ahead = logits_ahead(model, tokens)
    assert ahead == [] and torch.equal(main, model(tokens[:, :-1]))


def test_generation_does_not_run_them():
    model, tokens = build(2), some_tokens()
    model.mtp.forward = None
    for module in model.mtp:
        module.forward = None  # calling it would raise
    assert model(tokens).shape[1] == SEQ + 1


def test_they_have_experts_and_count_them():
    model, tokens = build(2).train(), some_tokens()
    model.losses(tokens)
    loads = [module.block.feed_forward.counts[: TINY.moe.n_routed_experts].sum() for module in model.mtp]
    assert loads == [2 * (SEQ - k) * TINY.moe.top_k for k in (1, 2)]


@pytest.mark.parametrize("n_memory", [0, 4])
def test_a_segment_looks_ahead_within_itself(n_memory):
    model = build(2, memory_len=5, window=6).train()
    memory = torch.randn(TINY.n_layers, 2, n_memory, TINY.d_model, dtype=torch.float64)
    tokens = some_tokens()
    with torch.no_grad():
        main, ahead, kept = segment_logits(model, tokens, memory)
        assert [out.shape[1] for out in (main, *ahead)] == [SEQ, SEQ - 1, SEQ - 2]
        assert kept.shape == (TINY.n_layers, 2, 5, TINY.d_model)
        assert (
            model.eval().segment_losses(tokens, memory)[1] == model.losses(tokens)[1] == []
        )  # nobody asks outside of training
        model.train()
        if n_memory == 0:
            plain, plain_ahead = logits_ahead(model, tokens)
            for a, b in zip((main, *ahead), (plain, *plain_ahead), strict=True):
                torch.testing.assert_close(a, b)
