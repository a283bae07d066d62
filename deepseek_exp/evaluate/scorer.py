"""What a model says about token sequences: log-likelihoods, losses and completions, in batches.

Every sequence begins as a document does in training: with the tokenizer's beginning-of-text token, or, if it adds none,
with the token that ends the document before. Rows of a batch are padded on the right, which causal attention does not
see, so a result does not depend on the batch.

Shapes: batch (rows), seq (of the longest row), vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_exp.data import Tokenizer
from deepseek_exp.inference import sample_completions
from deepseek_exp.models import Transformer


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_prob: of all its tokens together, nats.
        is_greedy: each of its tokens is the most likely one.
        n_tokens: its tokens.
    """

    log_prob: float
    is_greedy: bool
    n_tokens: int


class TokenScores(NamedTuple):
    """The scores of the tokens of a document.

    Attributes:
        nll: (tokens,) float32, nats of each token.
        top: (tokens,) int64, the most likely token at its place.
    """

    nll: Tensor
    top: Tensor


class _Row(NamedTuple):
    """A sequence whose last `n_scored` tokens are scored; `index` is the caller's."""

    tokens: list[int]
    n_scored: int
    index: int


@dataclass
class Scorer:
    """A model with its tokenizer.

    Attributes:
        model: the whole model, on any device.
        tokenizer: its tokenizer.
        batch_seqs: sequences at once.
        n_truncated: contexts so far that lost their first tokens, because the model's max_seq_len is shorter.
    """

    model: Transformer
    tokenizer: Tokenizer
    batch_seqs: int
    n_truncated: int = field(default=0, init=False)

    @property
    def start(self) -> int:
        """Return the token that every sequence begins with."""
        return self.tokenizer.start[0] if self.tokenizer.start else self.tokenizer.end_id

    @property
    def max_seq_len(self) -> int:
        """Return the most tokens that the model sees at once."""
        return self.model.cfg.max_seq_len

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return how likely each continuation is after its context.

        The text of both is encoded as one, so that tokens at their border are those of running text. Spaces at the end
        of a context belong to the continuation.

        Args:
            pairs: context and continuation.

        Raises:
            ValueError: a continuation has no token, or more than the model sees at once.
        """
        rows = []
        for index, (context, continuation) in enumerate(pairs):
            n_spaces = len(context) - len(context.rstrip())
            context, continuation = (
                context[: len(context) - n_spaces],
                context[len(context) - n_spaces :] + continuation,
            )
            both, before = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
            n = len(both) - len(before)
            if not 1 <= n <= self.max_seq_len:
                raise ValueError(f"the continuation {continuation[:40]!r} has {n} tokens, not 1 to {self.max_seq_len}")
            tokens = [self.start, *both]
            self.n_truncated += len(tokens) > self.max_seq_len + 1
            rows.append(_Row(tokens[-self.max_seq_len - 1 :], n, index))
        found = {}
        for row, nll, top in self._scored(rows):
            targets = torch.tensor(row.tokens[-row.n_scored :])
            is_greedy = bool((top == targets).all())
            found[row.index] = Likelihood(-float(nll.sum(dtype=torch.float64)), is_greedy, row.n_scored)
        return [found[index] for index in range(len(pairs))]

    def documents(self, texts: Sequence[str]) -> list[TokenScores]:
        """Return the scores of every token of each text.

        A text that is longer than max_seq_len is cut into windows without overlap; the first token of a window is
        predicted from the last one of the window before it alone. An empty text has no scores.
        """
        n, rows = self.max_seq_len, []
        for index, text in enumerate(texts):
            tokens = [self.start, *self.tokenizer.encode(text)]
            for start in range(0, len(tokens) - 1, n):
                window = tokens[start : start + n + 1]
                rows.append(_Row(window, len(window) - 1, index))
        order: dict[int, list[tuple[int, Tensor, Tensor]]] = {index: [] for index in range(len(texts))}
        places = {id(row): place for place, row in enumerate(rows)}
        for row, nll, top in self._scored(rows):
            order[row.index].append((places[id(row)], nll, top))
        found = []
        for parts in order.values():
            parts.sort(key=lambda part: part[0])
            nll, top = ([part[i] for part in parts] for i in (1, 2))
            empty = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
            found.append(TokenScores(torch.cat(nll), torch.cat(top)) if parts else TokenScores(*empty))
        return found

    def complete(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return the most likely continuation of each prompt, token by token, up to the end of the document.

        The first tokens of a prompt are left out if it and the new tokens are more than max_seq_len.

        Raises:
            ValueError: max_new_tokens leaves no room for a prompt.
        """
        room = self.max_seq_len - max_new_tokens
        if room < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leave no room for a prompt in {self.max_seq_len} tokens")
        rows = []
        for index, prompt in enumerate(prompts):
            tokens = [self.start, *self.tokenizer.encode(prompt)]
            self.n_truncated += len(tokens) > room
            rows.append(_Row(tokens[-room:], 0, index))
        texts = {}
        for batch in self._batches(rows):
            done = sample_completions(
                self.model.eval(),
                [row.tokens for row in batch],
                max_new_tokens=max_new_tokens,
                temperature=0.0,
                top_p=1.0,
                seeds=[0] * len(batch),
                end_id=self.tokenizer.end_id,
            )
            for row, completion in zip(batch, done, strict=True):
                new = completion.tokens[:-1] if completion.ended else completion.tokens
                texts[row.index] = self.tokenizer.continuation(row.tokens, new)
        return [texts[index] for index in range(len(prompts))]

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Split rows into batches of about equal lengths, the longest first."""
        ordered = sorted(rows, key=lambda row: -len(row.tokens))
        for start in range(0, len(ordered), self.batch_seqs):
            yield ordered[start : start + self.batch_seqs]

    @torch.inference_mode()
    def _scored(self, rows: Sequence[_Row]) -> Iterator[tuple[_Row, Tensor, Tensor]]:
        """Yield each row with the nll and the most likely token of its scored places, on the CPU."""
        device = self.model.embedding.weight.device
        self.model.eval()
        for batch in self._batches(rows):
            n = len(batch[0].tokens)
            padded = [row.tokens + [self.tokenizer.end_id] * (n - len(row.tokens)) for row in batch]
            tokens = torch.tensor(padded, device=device)  # (batch, seq + 1)
            # Call forward, not the module: a compiled model would be recompiled for each length.
            logits = self.model.forward(tokens[:, :-1])  # (batch, seq, vocab_size)
            for i, row in enumerate(batch):
                stop = len(row.tokens) - 1
                places = slice(stop - row.n_scored, stop)
                log_probs = logits[i, places].float().log_softmax(-1)  # (scored, vocab_size)
                targets = tokens[i, 1:][places, None]  # (scored, 1)
                nll = -log_probs.gather(-1, targets).squeeze(-1)
                yield row, nll.cpu(), log_probs.argmax(-1).cpu()
