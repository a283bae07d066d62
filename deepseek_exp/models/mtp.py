"""Multi-token prediction: modules that each predict one token further ahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_exp.config import ActivationCheckpointing, ModelConfig
from deepseek_exp.kernels import Ops
from deepseek_exp.models.block import Block
from deepseek_exp.models.norm import RMSNorm


class MTPModule(nn.Module):
    """One depth of multi-token prediction: h' = block(W [norm(embedding of the next token); norm(h)]).

    Embedding and output head are those of the main model. Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
    section 2.2. Two details follow the code that runs the released weights (transformers 5.23, modeling_layers.py,
    `MtpLayer`): the order of the two halves of W's input (eh_proj), which is reversed in the paper; and h is the output
    head's input at the previous depth, after the final normalisation, which the paper leaves open.
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

    def forward(
        self, h: Tensor, next_embedded: Tensor, domain: Tensor | None = None, document: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states that predict one token further ahead.

        Args:
            h: (batch, seq, d_model), normalised, from the previous depth or the main model.
            next_embedded: (batch, seq, d_model), the embedding of the token after the last one that h has seen.
            domain: (batch,), as for a block.
            document: (batch, seq), as for a block.

        Returns:
            (batch, seq, d_model), normalised: the input of the output head and of the next depth.
        """
        both = torch.cat([self.embedding_norm(next_embedded), self.hidden_norm(h)], dim=-1)
        projected = self.ops.linears(both, (self.projection,))[0]
        return self.head_norm(self.block(projected, domain=domain, document=document))
