"""Models with adapters whose B is not 0, for tests."""

from __future__ import annotations

import dataclasses

import torch

from deepseek_exp import adapt
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.config.matrices import adapted
from deepseek_exp.kernels import TORCH, Ops
from deepseek_exp.kernels.low_rank_linears import low_rank_linears
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed


def by_expert(x_RD: torch.Tensor, w_ERD: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Compute grouped products one by one; PyTorch's have no float64."""
    ends = offsets_E.tolist()
    dropped = x_RD.new_zeros(len(x_RD) - ends[-1], w_ERD.shape[1])
    return torch.cat([*(x_RD[a:b] @ w.T for a, b, w in zip([0, *ends], ends, w_ERD, strict=False)), dropped])


WIDE = dataclasses.replace(TORCH, grouped_mm=by_expert)
SCALE = 2.0  # alpha / rank of conf/lora/default.yaml with rank 4


def experiment(version: str, *overrides: str) -> ExperimentConfig:
    """Compose a tiny model with adapters of every matrix."""
    lora = ("lora=default", "lora.rank=4", "lora.alpha=8", "lora.targets=['*']")
    return composed(f"model={version}", "size=tiny", *lora, *overrides)


def base(exp: ExperimentConfig, ops: Ops = TORCH, dtype: torch.dtype = torch.float32) -> Transformer:
    """Build the model without adapters."""
    model = Transformer(exp.model, ops, exp.trainer.activation_checkpointing)
    init_weights(model, exp.model, 0)
    return model.to(dtype)


def attached(
    exp: ExperimentConfig, ops: Ops = TORCH, dtype: torch.dtype = torch.float32, *, b_std: float = 0.1
) -> Transformer:
    """Build the model with adapters; B is normal with this standard deviation."""
    model = base(exp, ops, dtype)
    found = adapt.initial_adapters(adapted(exp.model, exp.lora), exp.lora, seed=1)
    draws = torch.Generator().manual_seed(2)
    adapters = {
        name: adapt.Adapter(a.to(dtype), torch.randn(b.shape, generator=draws).mul(b_std).to(dtype))
        for name, (a, b) in found.items()
    }
    adapt.attach(model, adapters, SCALE)
    return model


def narrow(ops: Ops, *, in_one: bool = False) -> Ops:
    """Return operations as a training with adapters has them; `in_one`: as kernels.linears=accumulated has them."""
    return dataclasses.replace(ops, linears=adapt.with_adapters(ops.linears, low_rank_linears if in_one else None))


def some_tokens(exp: ExperimentConfig, batch: int = 2, n: int = 12) -> torch.Tensor:
    return torch.randint(0, exp.model.vocab_size, (batch, n), generator=torch.Generator().manual_seed(3))
