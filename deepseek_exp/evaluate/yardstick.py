"""The same tokens for every model of a chain: the loss of each token, and paired differences between two models.

Shapes: n (sequences), seq (targets of a sequence), vocab_size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_exp.data.shards import Shard
from deepseek_exp.inference import from_pretrained

# Tokens of one forward pass.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class TokenSet:
    """The tokens that models are compared on.

    Attributes:
        names: names of the texts.
        tokens: (n, seq + 1) int64.
        text: (n,) int64, index into `names` of the text of each sequence.
        n_bytes: bytes of text that the targets stand for.
    """

    names: tuple[str, ...]
    tokens: Tensor
    text: Tensor
    n_bytes: int

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and their texts, in hexadecimal."""
        found = hashlib.sha256(self.tokens.numpy().tobytes())
        found.update(self.text.numpy().tobytes())
        return found.hexdigest()


def token_set(texts: Mapping[str, Shard], token_bytes: Tensor, seq_len: int, n_tokens: int) -> TokenSet:
    """Take evenly spaced sequences of each text, which do not overlap.

    Args:
        texts: name -> packed tokens, of one tokenizer.
        token_bytes: (vocab_size,) int64, bytes of text that each token stands for.
        seq_len: targets per sequence.
        n_tokens: targets of each text, rounded down to whole sequences, at least one; a shorter text is taken whole.
    """
    rows, text = [], []
    for i, shard in enumerate(texts.values()):
        ids = shard.open()
        available = (len(ids) - 1) // seq_len
        n = min(available, max(1, n_tokens // seq_len))
        first = [k * available // n for k in range(n)]
        rows += [np.asarray(ids[k * seq_len : (k + 1) * seq_len + 1], dtype=np.int64) for k in first]
        text += [i] * n
    tokens = torch.from_numpy(np.stack(rows))  # (n, seq + 1)
    return TokenSet(tuple(texts), tokens, torch.tensor(text), int(token_bytes[tokens[:, 1:]].sum()))


@dataclass(frozen=True)
class Scores:
    """What a model makes of a token set.

    Attributes:
        nll: (n, seq) float32, negative log-likelihood of each target, in nats.
        top1: (n, seq) int32, the most likely token.
        n_parameters: of the model, tied ones once.
        n_bytes: of its weights as stored.
    """

    nll: Tensor
    top1: Tensor
    n_parameters: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Mean nll, in nats per token."""
        return float(self.nll.mean(dtype=torch.float64))

    def by_text(self, tokens: TokenSet) -> dict[str, float]:
        """Return the loss of each text."""
        return {
            name: float(self.nll[tokens.text == i].mean(dtype=torch.float64)) for i, name in enumerate(tokens.names)
        }

    def save(self, path: Path) -> None:
        """Write them to a file."""
        counts = {"n_parameters": torch.tensor(self.n_parameters), "n_bytes": torch.tensor(self.n_bytes)}
        part = path.with_name(f".{path.name}.part")
        save_file({"nll": self.nll, "top1": self.top1, **counts}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote."""
        found = load_file(path)
        return cls(found["nll"], found["top1"], int(found["n_parameters"]), int(found["n_bytes"]))


@torch.no_grad()
def score(checkpoint: Path, tokens: TokenSet, device: torch.device, dtype: torch.dtype) -> Scores:
    """Score a token set with the model of a checkpoint, in PyTorch's kernels.

    Args:
        checkpoint: its folder, saved by any layout.
        tokens: of the checkpoint's tokenizer.
        device: where to compute.
        dtype: type of weights and activations; log-probabilities are float32.

    Raises:
        UserError: the checkpoint is damaged.
    """
    model = from_pretrained(checkpoint, str(device), dtype).model
    rows = max(1, BATCH_TOKENS // tokens.tokens.shape[1])
    nll, top1 = [], []
    for batch in tokens.tokens.split(rows):
        ids = batch.to(device)
        logits = model(ids[:, :-1]).float()  # (rows, seq, vocab_size)
        nll.append(torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").cpu())
        top1.append(logits.argmax(-1).int().cpu())
    parameters = list(model.parameters())
    n_bytes = sum(tensor.nbytes for tensor in [*parameters, *model.buffers()])
    return Scores(torch.cat(nll), torch.cat(top1), sum(p.numel() for p in parameters), n_bytes)


@dataclass(frozen=True)
class Change:
    """How a model's loss differs from another's on the same tokens.

    Attributes:
        percent: difference / the other's loss, in percent.
        standard_error: of `percent`; NaN for a single sequence.
    """

    percent: float
    standard_error: float


def change(scores: Scores, other: Scores) -> Change:
    """Return the paired change of the loss.

    The standard error is over sequences, since the tokens of a sequence depend on each other:
    std of the sequences' mean differences / sqrt(n). Source: Miller 2024, "Adding Error Bars to Evals" (paired
    differences, clustered standard errors).
    """
    differences = (scores.nll.double() - other.nll.double()).mean(1)  # (n,)
    n = len(differences)
    error = float(differences.std()) / math.sqrt(n) if n > 1 else math.nan
    return Change(100 * float(differences.mean()) / other.loss, 100 * error / other.loss)


def agreement(scores: Scores, other: Scores) -> float:
    """Return the share of targets for which both models have the same most likely token."""
    return float((scores.top1 == other.top1).double().mean())
