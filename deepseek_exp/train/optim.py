"""The optimizer, its parameter groups and its fp32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from deepseek_exp.config import Kernel, OptimConfig
from deepseek_exp.config.parameter_groups import GroupSettings, group_names, is_muon


def build_optimizer(
    cfg: OptimConfig,
    model: nn.Module,
    kernel: Kernel = Kernel.torch,
    *,
    masters: bool = True,
    wide_gradients: bool = False,
) -> torch.optim.Optimizer:
    """Return the configured optimizer, over fp32 masters if the weights are bf16.

    Matrices decay with cfg.weight_decay, vectors (norm scales, gates) do not; see `settings_of` for what else makes a
    group. The groups hold the parameters' names, so that the optimizer's state can be identified in a checkpoint.

    Args:
        cfg: class, learning rate and decay.
        model: its parameters are trained.
        kernel: kernels.adamw.
        masters: keep fp32 master weights for bf16 parameters. False if ZeRO keeps them.
        wide_gradients: the masters' gradients are fp32 from the first micro-batch on, as for a sum over ranks.

    Returns:
        The optimizer.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [(name, params[name]) for name in names], **_of_group(cfg, settings)}
        for settings, names in group_names(cfg, {name: p.ndim for name, p in params.items()}).items()
    ]
    if kernel is Kernel.triton:
        from deepseek_exp.kernels.triton.adamw import FusedAdamW

        arguments = {name: cfg.optimizer[name] for name in ("betas", "eps") if name in cfg.optimizer}
        arguments |= {"masters": masters, "wide_gradients": wide_gradients, "state_bits": cfg.state_bits}
        return FusedAdamW(groups, lr=cfg.lr, **arguments)

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return instantiate(cfg.optimizer, _partial_=True, _recursive_=False, _convert_="all")(groups, lr=cfg.lr)

    needed = masters and any(p.dtype == torch.bfloat16 for p in params.values())
    return MasterWeights(groups, make) if needed else make(groups)


def _of_group(cfg: OptimConfig, settings: GroupSettings) -> dict[str, Any]:
    """Return the entries of an optimizer group; a choice that the configuration does not make has no entry."""
    entries = {"weight_decay": cfg.weight_decay if settings.decays else 0.0, "decays": settings.decays}
    if is_muon(cfg):
        entries["orthogonal"] = settings.orthogonal
    if cfg.lr_multipliers:
        entries |= {"lr_multiplier": settings.lr_multiplier, "lr": cfg.lr * settings.lr_multiplier}
    return entries


class MasterWeights(torch.optim.Optimizer):
    """Run an optimizer on fp32 copies of bf16 parameters.

    Gradients of the parameters are accumulated in the copies' fp32 gradients as the backward pass computes them, so
    that accumulation over micro-batches and clipping do not round to bf16; after a step the copies are rounded into the
    parameters. Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.1. `param_groups` are the
    copies', which clipping and schedules use.
    """

    def __init__(
        self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    ) -> None:
        self.params: list[Tensor] = [p for group in groups for _, p in group["params"]]
        self.masters = [p.detach().float().clone() for p in self.params]
        copies = iter(self.masters)
        inner = make([{**g, "params": [(name, next(copies)) for name, _ in g["params"]]} for g in groups])
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        for param, master in zip(self.params, self.masters, strict=True):
            param.register_post_accumulate_grad_hook(_move_gradient(master))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the copies and round them into the parameters."""
        loss = self.inner.step(closure)
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state and the copies."""
        return {"inner": self.inner.state_dict(), "masters": list(self.masters)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        with torch.no_grad():
            for master, saved in zip(self.masters, state_dict["masters"], strict=True):
                master.copy_(saved)


def _move_gradient(master: Tensor) -> Callable[[Tensor], None]:
    def hook(param: Tensor) -> None:
        assert param.grad is not None
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            master.grad.add_(param.grad)
        param.grad = None

    return hook


def clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `clip_norm`; 0 means no clipping.

    Squares are summed in float64: on a CPU the norm of 4 million fp32 numbers is off by 7e-5 otherwise (PyTorch 2.13).

    Returns:
        The norm before clipping, a scalar tensor.
    """
    if hasattr(optimizer, "clip"):
        return optimizer.clip(clip_norm)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = gradient_norm(gradients)
    if clip_norm:
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0).float())
    return norm


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the global norm of tensors, a float64 scalar."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]))
