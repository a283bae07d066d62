"""Targets that do not count, and documents that share a row: the losses are those of each document alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepseek_exp.kernels import TORCH, attention, reference
from deepseek_exp.models import MicroBatch, NextTokenObjective, Transformer, init_weights
from tests.config.test_config import composed

LENGTHS = (7, 4, 9)
EXACT = dataclasses.replace(TORCH, grouped_mm=reference.grouped_mm)  # in float64 too
VERSIONS = ["v1_dense", "v2_moe", "v2_5_sparse", "v3_moe", "v4_distill"]


def built(version, *more):
    cfg = composed(f"model={version}", "size=tiny", "model.n_layers=2", *more).model
    if cfg.window:
        cfg = dataclasses.replace(cfg, window=3, n_global_tokens=2)
    # what is computed from all tokens of a micro-batch together
    moe = dataclasses.replace(cfg.moe, capacity_factor=0.0, aux_loss_weight=1e-30, sequence_loss_weight=0.0)
    model = Transformer(dataclasses.replace(cfg, moe=moe), EXACT).double()
    init_weights(model, cfg, 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "attention" in name and p.ndim == 2:
                p.mul_(8)  # so that it matters what is attended to
            if name.endswith("gate"):
                p.fill_(1.5)
    return model, cfg


def packed(lengths, seq_len, vocab_size=512):
    """Return tokens of documents one after the other, with padding, the mask of their targets, and their numbers."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]
    row = torch.zeros(seq_len + 1, dtype=torch.int64)
    document = torch.full((seq_len + 1,), len(lengths), dtype=torch.int32)
    row[: sum(lengths)] = torch.cat(documents)
    document[: sum(lengths)] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    mask = (document[1:] == document[:-1]) & (document[1:] < len(lengths))
    return documents, row[None], mask[None], document[None, :-1]


@pytest.mark.parametrize("attend", [reference.local_global_attention, attention.local_global_attention])
@pytest.mark.parametrize(("window", "n_global", "gated"), [(0, 0, False), (3, 0, False), (3, 2, True)])
def test_attention_within_documents_is_that_of_each_document(attend, window, n_global, gated):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 20, 8, dtype=torch.float64) for heads in (4, 2, 2))
    gate = torch.randn(4, dtype=torch.float64) if gated else None
    document = packed(LENGTHS, 20)[3].expand(2, -1).clone()
    document[1] = 0  # one document
    numbers = 0.3, 0, window, n_global
    out = attend(q, k, v, gate, *numbers, document)
    for start, end in ((0, 7), (7, 11), (11, 20)):
        alone = (t[:1, :, start:end] for t in (q, k, v))
        torch.testing.assert_close(out[:1, :, start:end], attend(*alone, gate, *numbers), rtol=1e-12, atol=1e-12)
    whole = attend(*(t[1:] for t in (q, k, v)), gate, *numbers)
    torch.testing.assert_close(out[1:], whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(version):
    more = ["model.n_mtp_layers=2"] if version == "v3_moe" else []
    model, cfg = built(version, *more)
    objective = NextTokenObjective(0.5)
    documents, tokens, mask, document = packed(LENGTHS, 24)
    n_targets = torch.tensor(float(sum(LENGTHS) - len(LENGTHS)), dtype=torch.float64)
    found = objective.from_tokens(model, MicroBatch(tokens, None, mask, document, n_targets))
    found.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nlls, loss, mtp_loss = [], 0, 0
    for alone in documents:
        ones = torch.ones(1, len(alone) - 1, dtype=torch.bool)
        losses = objective.from_tokens(model, MicroBatch(alone[None], None, ones, None, n_targets))
        losses.loss.backward()
        nlls.append(losses.nll[0])
        loss, mtp_loss = loss + losses.loss, mtp_loss + losses.mtp_loss
    exact = dict(rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.nll[0][mask[0]], torch.cat(nlls), **exact)
    assert not found.nll[0][~mask[0]].any()
    torch.testing.assert_close(found.loss, loss, **exact)
    torch.testing.assert_close(found.mtp_loss, mtp_loss, **exact)
    assert (found.mtp_loss > 0) == bool(cfg.n_mtp_layers)
    for wanted, (name, p) in zip(gradients, model.named_parameters(), strict=True):
        torch.testing.assert_close(wanted, p.grad, **exact, msg=lambda text, name=name: f"{name}: {text}")


def test_documents_that_are_not_isolated_see_each_other():
    model, _ = built("v4_distill")
    _, tokens, mask, document = packed(LENGTHS, 24)
    objective = NextTokenObjective(0.0)
    apart = objective.from_tokens(model, MicroBatch(tokens, None, mask, document)).nll
    together = objective.from_tokens(model, MicroBatch(tokens, None, mask, None)).nll
    assert torch.equal(apart[0, :6], together[0, :6]) and (apart[0, 7:10] - together[0, 7:10]).abs().min() > 1e-3


def test_uneven_micro_batches_have_the_loss_of_the_whole():
    """A mask of no target, of some and of all; with multi-token prediction."""
    model, _ = built("v3_moe", "model.n_mtp_layers=2")
    objective = NextTokenObjective(0.5)
    tokens = torch.randint(0, 512, (4, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.0, 0.1, 0.9, 1.0])[:, None]

    def gradients(rows):
        model.zero_grad()
        mean_targets = mask.sum().double() * rows / 4
        total = 0
        for part, counted in zip(tokens.split(rows), mask.split(rows), strict=True):
            losses = objective.from_tokens(model, MicroBatch(part, None, counted, None, mean_targets))
            (losses.loss * rows / 4).backward()
            total += losses.loss.detach() * rows / 4
        return total, [p.grad.clone() for p in model.parameters()]

    (whole, wanted), (split, found) = gradients(4), gradients(1)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
    nll = objective.from_tokens(model.eval(), MicroBatch(tokens, None, mask)).nll
    assert nll.sum() / mask.sum() < whole  # which has the loss of multi-token prediction too
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
