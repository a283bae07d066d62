"""Sizes that kernels need and that the planner and the rules count with; without torch."""

from __future__ import annotations

# PyTorch's fp8 matrix products need widths, and the summed dimension, in multiples of this.
FP8_MULTIPLE = 16
# Attention kernels require head widths in multiples of eight, for q, k and v; a gate takes one more column.
ATTENTION_PAD = 8
# Names of our chat templates; their texts are in data/template.py.
TEMPLATES = ("plain", "chatml", "raw")
# The chunks of the fused cross entropy.
# Minimum logits per chunk, 64 MiB in bf16: a vocabulary that is sharded over ranks, or small, gets longer chunks.
CHUNK_LOGITS = 2**25
# Minimum tokens per chunk: fewer are too little work for a product that reads and writes all of dw, and too few rows of
# dh to fill a GPU.
LEAST_TOKENS = 1024
# The maximum number of chunks, limited by the rounding of dw. Tokens per chunk are a multiple of TOKEN_TILE, a tile of
# the products.
MOST_CHUNKS, TOKEN_TILE = 4, 128


def tokens_of_chunk(n_tokens: int, n_entries: float) -> int:
    """Return the number of tokens per chunk of logits.

    Args:
        n_tokens: tokens of a micro-batch.
        n_entries: entries of the vocabulary on a rank.
    """
    even = -(-n_tokens // (MOST_CHUNKS * TOKEN_TILE)) * TOKEN_TILE
    return min(n_tokens, max(LEAST_TOKENS, int(CHUNK_LOGITS // n_entries), even))
