"""Multi-token prediction: modules that look one token further ahead each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_exp.config import ActivationCheckpointing, ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.block import Block
from deepseek_exp.models.norm import RMSNorm


class MTPModule(nn.Module):
    """One depth of multi-token prediction: h' = block(W [norm(embedding of the next token); norm(h)]).

    Embedding and output table are those of the main model. Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
    section 2.2. Two things are as the released weights are run (transformers 5.23, modeling_layers.py, `MtpLayer`): the
    order of the two halves of W's input (eh_proj), which the paper has the other way round, and that h is what the
    output table reads at the depth before, after the final normalisation, which the paper leaves open.
    """

    def __init__(
        self, cfg: ModelConfig, ops: Ops, checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    ) -> None:
        super().__init__()
        self.ops = ops
        self.embedding_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        self.hidden_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)
        self.projection = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False)
        self.block = Block(cfg, ops, cfg.n_layers, checkpointing)
        self.head_norm = RMSNorm(cfg.d_model, cfg.norm_eps, ops)

    def forward(self, h: Tensor, next_embedded: Tensor, domain: Tensor | None = None) -> Tensor:
        """Look one token further.

        Args:
            h: (batch, seq, d_model), normalised, of the depth before, or of the main model.
            next_embedded: (batch, seq, d_model), the embedding of the token one further ahead than h has seen.
            domain: (batch,), as for a block.

        Returns:
            (batch, seq, d_model), normalised: it goes through the output table, and to the next depth.
        """
        both = torch.cat([self.embedding_norm(next_embedded), self.hidden_norm(h)], dim=-1)
        return self.head_norm(self.block(self.ops.linears(both, (self.projection,))[0], domain=domain))
