"""Which keys a query sees: the masks that define attention.

Shapes: B batch, S tokens of a row.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def attention_mask(
    n_queries: int, n_keys: int, n_memory: int, window: int, n_global_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return which keys each query sees: those within the window and the sequence's first tokens, none ahead of it.

    Args:
        n_queries: number of queries; they are the last positions of the keys.
        n_keys: number of keys, the memory first.
        n_memory: number of keys that belong to the previous segment; global tokens are counted after them.
        window: number of keys that a query sees locally, including its own; 0 means all before it.
        n_global_tokens: number of global keys.
        device: the device of the masks.

    Returns:
        visible (n_queries, n_keys) and is_global (n_keys,), both bool.
    """
    with torch.inference_mode(False):
        j = torch.arange(n_keys, device=device)
        i = j[n_keys - n_queries :, None]
        is_global = (j >= n_memory) & (j < n_memory + n_global_tokens)
        local = i - j < window if window else torch.ones_like(i - j, dtype=torch.bool)
        return (j <= i) & (local | is_global), is_global


def document_mask(document: Tensor, window: int, n_global_tokens: int) -> tuple[Tensor, Tensor]:
    """Return which keys each query sees if documents share a row: those of `attention_mask` within its own document.

    Each document has its own global tokens.

    Args:
        document: (B, S), the document of each token; equal numbers of a row are adjacent.
        window: as for `attention_mask`.
        n_global_tokens: number of global tokens of each document.

    Returns:
        visible (B, S, S), queries by keys, and is_global (B, S), both bool.
    """
    j = torch.arange(document.shape[1], device=document.device)
    i = j[:, None]
    is_global = positions_in_documents(document) < n_global_tokens  # (batch, keys)
    same = document[:, :, None] == document[:, None, :]  # (batch, queries, keys)
    local = i - j < window if window else torch.ones_like(i - j, dtype=torch.bool)
    return same & (j <= i) & (local | is_global[:, None, :]), is_global


def positions_in_documents(document: Tensor) -> Tensor:
    """Return each token's position within its document: (B, S) int64.

    Args:
        document: (B, S), the document of each token; equal numbers of a row are adjacent.
    """
    j = torch.arange(document.shape[1], device=document.device)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    return j - torch.where(begins, j, 0).cummax(1).values
