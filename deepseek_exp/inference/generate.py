"""Generate text token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_exp.errors import Problem, UserError
from deepseek_exp.models import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    end_id: int,
    domain: int | None = None,
    use_cache: bool = True,
) -> list[int]:
    """Sample tokens one by one, caching the keys and values of earlier tokens.

    Args:
        model: the model in evaluation mode, on any device.
        prompt: token ids; empty starts a new document.
        max_new_tokens: maximum number of tokens to sample. Sampling ends early at end_id.
        temperature: divides the logits; 0 always selects the most likely token.
        top_p: sample from the smallest set of tokens with this probability (Holtzman et al. 2020, "The Curious Case of
            Neural Text Degeneration", section 3.1).
        seed: seed of the sampling, which is done on the CPU for every device of the model.
        end_id: the token that separates documents.
        domain: index of the text's domain in moe.domains. If None, the routers infer it for each token.
        use_cache: if False, recompute all tokens at each step; the result is the same.

    Returns:
        The new token ids, without end_id.

    Raises:
        ValueError: temperature is negative, top_p is not in (0, 1], or prompt and new tokens are more than the
            model's max_seq_len.
        UserError: the model computes logits that are not finite.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be at least 0, and top_p={top_p} above 0 and at most 1")
    tokens = list(prompt) or [end_id]
    room = model.cfg.max_seq_len - len(tokens)
    if max_new_tokens > room:
        raise ValueError(f"{len(tokens)} prompt tokens leave room for {room} of {max_new_tokens} new ones")
    device = model.embedding.weight.device
    draws = torch.Generator().manual_seed(seed)
    label = None if domain is None else torch.tensor([domain], device=device)
    caches = model.new_caches(1, len(tokens) + max_new_tokens) if use_cache else None
    start = len(tokens)
    unseen = tokens
    for _ in range(max_new_tokens):
        # Call forward, not the module: a compiled model would be recompiled for each length.
        logits = model.forward(torch.tensor([unseen], device=device), caches, label)[0, -1]  # (vocab_size,)
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            rule = f"computes logits that are not finite after {len(tokens)} tokens, as with weights that are NaN"
            fix = "use a checkpoint with finite weights, such as an earlier one of the run"
            raise UserError(Problem("model", model.cfg.version, rule, fix))
        token = pick(logits, temperature, top_p, draws)
        if token == end_id:
            break
        tokens.append(token)
        unseen = [token] if use_cache else tokens
    return tokens[start:]


def pick(logits: Tensor, temperature: float, top_p: float, draws: torch.Generator) -> int:
    """Sample one token.

    Args:
        logits: (vocab_size,), on the CPU.
        temperature: divides the logits; 0 selects the largest.
        top_p: probability of the set to sample from.
        draws: random number generator.
    """
    if temperature == 0:
        return int(logits.argmax())
    below = logits.double() - logits.max()  # at most 0, so even the smallest temperature cannot yield inf
    probs, order = (below / temperature).softmax(-1).sort(descending=True, stable=True)
    before = probs.cumsum(-1) - probs  # (vocab_size,) probability of the more likely tokens
    probs[before >= top_p] = 0
    return int(order[torch.multinomial(probs, 1, generator=draws)])
