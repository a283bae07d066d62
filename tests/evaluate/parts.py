"""A tiny model with a tokenizer, and a scorer that answers as it is told."""

from __future__ import annotations

import functools
import json

import torch

from deepseek_exp.data import Tokenizer
from deepseek_exp.evaluate import Scorer
from deepseek_exp.evaluate.scorer import Likelihood
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed

TEXTS = ["The cat sat on the mat. " * 20, "A dog ran.", "", "Numbers 1 2 3 and more numbers 4 5 6. " * 3]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@functools.cache
def model(version: str = "v4_distill", seed: int = 0) -> Transformer:
    """Build a model far from a uniform distribution that sees 64 tokens at once."""
    sizes = (f"model.vocab_size={tokenizer().vocab_size}", "data.vocab_size=258")
    cfg = composed(f"model={version}", "size=tiny", "model.max_seq_len=64", "data.seq_len=64", *sizes).model
    made = Transformer(cfg, TORCH)
    init_weights(made, cfg, seed)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return made.eval()


def scorer(version: str = "v4_distill", batch_seqs: int = 3, seed: int = 0) -> Scorer:
    return Scorer(model(version, seed), tokenizer(), batch_seqs)


class Scripted(Scorer):
    """Continues each prompt as told, and finds a continuation as likely as told."""

    def __init__(self, completions=None, log_probs=None):
        super().__init__(model(), tokenizer(), 1)
        self.completions, self.log_probs, self.asked = completions, log_probs, []

    def complete(self, prompts, max_new_tokens):
        self.asked += prompts
        return self.completions

    def likelihoods(self, pairs):
        self.asked += pairs
        return [Likelihood(self.log_probs[continuation], False, 1) for _, continuation in pairs]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
