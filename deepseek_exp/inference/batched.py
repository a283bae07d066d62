"""Sample completions of many prompts at once, over one static cache.

Shapes: batch (prompts), seq (of the longest prompt with its completion), vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_exp.errors import Problem, UserError
from deepseek_exp.models import Transformer


class Completion(NamedTuple):
    """A sampled completion.

    Attributes:
        tokens: the new tokens; the last one is the end token if the completion has ended.
        log_probs: log-probability of each in nats, under the distribution at the temperature before top_p and n_ids
            truncate it (at temperature 0: under the model's own).
        ended: whether it ended with the end token, rather than after max_new_tokens.
    """

    tokens: list[int]
    log_probs: list[float]
    ended: bool


@torch.no_grad()
def sample_completions(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    end_id: int,
    n_ids: int | None = None,
) -> list[Completion]:
    """Sample one completion per prompt, all at once.

    Prompts may have different lengths. The shortest length is read at once; from there on every sequence advances by
    one token per step, its next prompt token as long as there is one, else a sampled one. So all sequences are at the
    same position, nothing is padded on the left, and each is computed as it would be alone. A sequence that has ended
    is fed the end token until all have.

    Each sequence has its own random numbers, so a completion depends on its seed and prompt, not on its neighbours
    (except for the rounding of products of another size).

    Args:
        model: the whole model in evaluation mode, on any device; its weights are read in place.
        prompts: token ids; an empty prompt starts a new document.
        max_new_tokens: most tokens of a completion, the end token included.
        temperature: divides the logits; 0 always selects the most likely token.
        top_p: sample from the smallest set of tokens with this probability (Holtzman et al. 2020, "The Curious Case of
            Neural Text Degeneration", section 3.1).
        seeds: seed of each completion.
        end_id: the token that ends a completion.
        n_ids: ids from this on are never selected, as the tokenizer has none of them; None: all may be.

    Returns:
        A completion per prompt.

    Raises:
        ValueError: temperature is negative, top_p is not in (0, 1], or prompt and new tokens are more than the
            model's max_seq_len.
        UserError: the model computes logits that are not finite.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be at least 0, and top_p={top_p} above 0 and at most 1")
    rows = [list(prompt) or [end_id] for prompt in prompts]
    lengths = [len(row) for row in rows]
    room = model.cfg.max_seq_len - max(lengths)
    if max_new_tokens > room:
        raise ValueError(f"{max(lengths)} prompt tokens leave room for {room} of {max_new_tokens} new ones")
    device, n_max = model.embedding.weight.device, max(lengths) + max_new_tokens
    tokens = torch.full((len(rows), n_max), end_id)
    for row, prompt in zip(tokens, rows, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens, length = tokens.to(device), torch.tensor(lengths, device=device)
    draws = torch.stack([_draws(seed, max_new_tokens) for seed in seeds]).to(device)  # (batch, max_new_tokens)
    log_probs = torch.zeros(len(rows), max_new_tokens, device=device)
    n_new, ended = torch.zeros_like(length), torch.zeros_like(length, dtype=torch.bool)
    caches, seen = model.new_caches(len(rows), n_max), 0
    every = torch.arange(len(rows), device=device)
    for at in range(min(lengths), n_max):  # the position that is filled
        # Call forward, not the module: a compiled model would be recompiled for each length.
        logits = model.forward(tokens[:, seen:at], caches)[:, -1].float()  # (batch, vocab_size)
        _check_finite(logits, model)
        place = at - length  # (batch,), index in the completion; negative inside the prompt
        samples = (place >= 0) & (place < max_new_tokens) & ~ended
        slot = place.clamp(0, max_new_tokens - 1)
        token, log_prob = _pick(logits, temperature, top_p, draws[every, slot], n_ids)
        tokens[:, at] = torch.where(samples, token, tokens[:, at])
        log_probs[every, slot] = torch.where(samples, log_prob, log_probs[every, slot])
        n_new += samples
        ended |= samples & (token == end_id)
        seen = at
        if bool((ended | (n_new == max_new_tokens)).all()):
            break
    return _completions(tokens.cpu(), log_probs.cpu(), lengths, n_new.tolist(), ended.tolist())


def _draws(seed: int, n: int) -> Tensor:
    """Return uniform numbers of a seed, drawn on the CPU for every device."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pick(
    logits: Tensor, temperature: float, top_p: float, draw: Tensor, n_ids: int | None = None
) -> tuple[Tensor, Tensor]:
    """Select a token per row and return it with its log-probability, each (batch,).

    Inverts the cumulative distribution at a uniform number: one read of the row, and the same result for the same
    number wherever the row stands in the batch.

    Args:
        logits: (batch, vocab_size).
        temperature: divides the logits; 0 selects the largest.
        top_p: probability of the set to sample from.
        draw: (batch,), float64, uniform in [0, 1).
        n_ids: entries from this on are not selected.
    """
    scaled = logits / temperature if temperature else logits
    log_probs = scaled.log_softmax(-1)
    if not temperature:
        token = logits[:, :n_ids].argmax(-1)
    elif top_p < 1:
        probs, order = log_probs[:, :n_ids].double().exp().sort(dim=-1, descending=True, stable=True)
        probs = probs / probs.sum(-1, keepdim=True)
        before = probs.cumsum(-1) - probs  # (batch, vocab_size) probability of the more likely tokens
        token = order.gather(-1, _invert(probs * (before < top_p), draw)[:, None]).squeeze(-1)
    else:
        token = _invert(log_probs[:, :n_ids].double().exp(), draw)
    return token, log_probs.gather(-1, token[:, None]).squeeze(-1)


def _invert(probs: Tensor, draw: Tensor) -> Tensor:
    """Return the first index whose cumulative share of the total exceeds `draw`, (batch,)."""
    total = probs.cumsum(-1)  # (batch, vocab_size)
    index = torch.searchsorted(total, (draw * total[:, -1])[:, None], right=True).squeeze(-1)
    last = (probs > 0).cumsum(-1).argmax(-1)  # rounding must not select a token beyond the last possible one
    return index.minimum(last)


def _check_finite(logits: Tensor, model: Transformer) -> None:
    if not bool(logits.isfinite().all()):
        rule = "computes logits that are not finite, as with weights that are NaN"
        fix = "use a checkpoint with finite weights, such as an earlier one of the run"
        raise UserError(Problem("model", model.cfg.version, rule, fix))


def _completions(
    tokens: Tensor, log_probs: Tensor, lengths: list[int], n_new: list[int], ended: list[bool]
) -> list[Completion]:
    found = []
    for row, start in enumerate(lengths):
        new = tokens[row, start : start + n_new[row]].tolist()
        found.append(Completion(new, log_probs[row, : n_new[row]].tolist(), ended[row]))
    return found
