"""Likelihoods, losses and completions: against the model row by row, whatever the batch."""

from __future__ import annotations

import pytest
import torch

from deepseek_exp.data import Tokenizer
from deepseek_exp.evaluate import Scorer
from deepseek_exp.inference import generate
from tests.evaluate.parts import TEXTS, model, scorer, tokenizer

PAIRS = [
    ("The cat sat", " on the mat."),
    ("", "A dog"),
    ("Numbers 1 2 ", "3"),
    ("The cat sat", " 6"),
    ("A dog ran.", " 4"),
]


def by_hand(tokens, version="v4_distill"):
    """Return the log-probability of each token after the first, and the most likely ones."""
    logits = model(version)(torch.tensor([tokens]))[0, :-1].double()
    found = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)
    return found, logits.argmax(-1)


@pytest.mark.parametrize("version", ["v4_distill", "v1_dense", "v3_moe"])
@torch.no_grad()
def test_likelihoods_are_the_models_whatever_the_batch(version):
    """Padding changes nothing but the rounding of products of another size."""
    together, alone = scorer(version, 5).likelihoods(PAIRS), scorer(version, 1).likelihoods(PAIRS)
    for (context, continuation), a, b in zip(PAIRS, together, alone, strict=True):
        text = tokenizer().encode(context + continuation)
        found, top = by_hand([tokenizer().end_id, *text], version)
        n = len(text) - len(tokenizer().encode(context.rstrip()))
        assert a.n_tokens == b.n_tokens == n
        assert a.log_prob == pytest.approx(found[-n:].sum().item(), abs=2e-4)
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-5)
        assert a.is_greedy == b.is_greedy == bool((top[-n:] == torch.tensor(text[-n:])).all())


@torch.no_grad()
def test_a_sequence_begins_as_the_tokenizer_says():
    begins = Tokenizer(tokenizer().json)
    begins.start = [7]
    mine, text = Scorer(model(), begins, 2), tokenizer().encode("The cat sat")
    want = by_hand([7, *text])[0].sum().item()
    assert mine.likelihoods([("", "The cat sat")])[0].log_prob == pytest.approx(want, abs=2e-4)
    assert -mine.documents(["The cat sat"])[0].nll.double().sum().item() == pytest.approx(want, abs=2e-4)


def test_the_greedy_continuation_is_found_greedy():
    said = scorer().complete(["The cat"], 4)[0]
    assert scorer().likelihoods([("The cat", said)])[0].is_greedy == (
        tokenizer().encode("The cat" + said)[len(tokenizer().encode("The cat")) :] == tokens_after("The cat", 4)
    )


def tokens_after(prompt, n):
    tokens = [tokenizer().end_id, *tokenizer().encode(prompt)]
    options = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "end_id": tokenizer().end_id}
    return generate(model(), tokens, max_new_tokens=n, **options)


@torch.no_grad()
def test_documents_are_scored_in_windows():
    found = scorer(batch_seqs=4).documents(TEXTS)
    tokens = [tokenizer().end_id, *tokenizer().encode(TEXTS[0])]
    assert len(tokens) > 65  # more than the model sees at once
    want = torch.cat([by_hand(tokens[i : i + 65])[0] for i in range(0, len(tokens) - 1, 64)])
    assert torch.allclose(-found[0].nll.double(), want, atol=2e-4)
    assert [len(x.nll) for x in found] == [len(tokenizer().encode(text)) for text in TEXTS]
    alone = scorer(batch_seqs=1).documents(TEXTS)
    assert all(torch.allclose(a.nll, b.nll, atol=1e-5) for a, b in zip(found, alone, strict=True))


def test_completions_are_those_of_generate():
    prompts = ["The cat", "Numbers", "A dog ran. " * 20]
    mine = scorer(batch_seqs=3)
    found = mine.complete(prompts, 8)
    for prompt, text in zip(prompts[:2], found, strict=False):
        before = [tokenizer().end_id, *tokenizer().encode(prompt)]
        assert text == tokenizer().continuation(before, tokens_after(prompt, 8))
    assert mine.n_truncated == 1


def test_a_long_context_loses_its_first_tokens():
    mine = scorer()
    ((log_prob, _, n),) = mine.likelihoods([("A dog ran. " * 30, " on")])
    tokens = tokenizer().encode("A dog ran. " * 30 + " on")[-65:]
    assert mine.n_truncated == 1 and log_prob == pytest.approx(by_hand(tokens)[0][-n:].sum().item(), abs=2e-4)
    with pytest.raises(ValueError, match="has 0 tokens"):
        mine.likelihoods([("A dog", "")])
    with pytest.raises(ValueError, match="leave no room"):
        mine.complete(["A"], 64)
