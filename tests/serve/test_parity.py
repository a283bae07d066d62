"""Every family against transformers: same logits and gradients, and the same weights after the way there and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from deepseek_exp.kernels import reference
from deepseek_exp.serve import export_hf, hf_weights
from tests.serve.releases import CASES, load_ours, some_tokenizer, their_model, write_checkpoint

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def some_tokens(batch=2, seq=48):
    return torch.randint(0, 300, (batch, seq), generator=torch.Generator().manual_seed(0))


def gradients_by_their_names(model, cfg, release) -> dict[str, torch.Tensor]:
    """Map our gradients through the table of names."""
    found, grads = {}, {name: p.grad for name, p in model.named_parameters()}
    for entry in hf_weights.table(cfg, interleaved=release.interleaved):
        grad = grads.get(entry.ours)
        if grad is not None and not entry.copy:
            for i, name in enumerate(entry.theirs):
                part = grad[i] if entry.stacked else grad
                found[name] = part if entry.rope is None else hf_weights.to_pairs(part, entry.rope)
    return found


def gradients_by_saved_names(model, folder) -> dict[str, torch.Tensor]:
    """Give transformers' own gradients under the names that it saves weights with."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_gradients(name, tmp_path, record_property):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, cfg, release = load_ours(tmp_path / "theirs")
    tokens = some_tokens()
    logits = [ours(tokens), theirs(tokens).logits]
    error = distance(*logits)
    assert error < 1e-5
    for out in logits:
        reference.cross_entropy(out[:, :-1], tokens[:, 1:]).mean().backward()
    mine = gradients_by_their_names(ours, cfg, release)
    want = gradients_by_saved_names(theirs, tmp_path / "grads")
    want = {k: v for k, v in want.items() if not k.endswith("e_score_correction_bias")}
    assert set(mine) == set(want)
    errors = {k: distance(mine[k], want[k]) if want[k].any() else mine[k].norm().item() for k in want}
    worst = max(errors, key=errors.get)
    record_property("errors", (error, errors[worst]))
    assert errors[worst] < 1e-4, worst
    print(f"\nPARITY {name} logits {error:.1e} gradients {errors[worst]:.1e} ({worst})")
