"""Multi-token prediction: modules that look one token further ahead each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_exp.config import ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.attention import RMSNorm
from deepseek_exp.models.block import Block


class MTPModule(nn.Module):
    """One depth of multi-token prediction: h' = block(W [norm(embedding of the next token); norm(h)]).

    Embedding and output table are those of the main model. Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
    section 2.2. The order of the two halves of W's input is that of the released weights (eh_proj), the paper has them
    the other way round. h is the main model's representation before its final normalisation.
    """

    def __init__(self, cfg: ModelConfig, ops: Ops, *, recompute: bool = False) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        self.hidden_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        self.projection = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.block = Block(cfg, ops, cfg.n_layers, recompute=recompute)
        self.head_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)

    def forward(self, h: Tensor, next_embedded: Tensor, domain: Tensor | None = None) -> Tensor:
        """Look one token further.

        Args:
            h: (batch, seq, d_model), of the depth before, or of the main model.
            next_embedded: (batch, seq, d_model), the embedding of the token one further ahead than h has seen.
            domain: (batch,), as for a block.

        Returns:
            (batch, seq, d_model); `head_norm` of it goes through the output table.
        """
        both = torch.cat([self.embedding_norm(next_embedded), self.hidden_norm(h)], dim=-1)
        return self.block(self.projection(both), domain=domain)
