"""Muon: momentum whose update is orthogonalized, for the matrices of the blocks; AdamW for all other parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Coefficients of the quintic iteration: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
QUINTIC = (3.4445, -4.7750, 2.0315)
LEAST_NORM = 1e-7
# Elements that are orthogonalized at once, which bounds the memory of the iteration.
CHUNK = 1 << 26


class Muon(torch.optim.Optimizer):
    """Muon for the parameters of groups with orthogonal=True, AdamW for those of the others.

        b = momentum b + (1 - momentum) g,  u = g + momentum (b - g) with nesterov, else b
        w = (1 - lr wd) w - 0.2 lr sqrt(max(d_out, d_in)) orthogonalize(u)

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the factor 0.2
    sqrt(max(d_out, d_in)), with which updates have about the RMS of AdamW's, so that both share lr and weight decay, is
    from Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2. A parameter of three dimensions is a stack
    of matrices, such as experts, each orthogonalized on its own.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        """Set up the groups.

        Args:
            params: groups of parameters or of (name, parameter) pairs. orthogonal=True marks those for Muon.
            lr: learning rate of both.
            weight_decay: of both, decoupled and multiplied by lr.
            momentum: Muon's.
            nesterov: use Nesterov's momentum.
            ns_steps: Newton-Schulz iterations.
            betas: AdamW's.
            eps: AdamW's.

        Raises:
            ValueError: a parameter for Muon is not a matrix or a stack of matrices.
        """
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"ns_steps": ns_steps, "betas": tuple(betas), "eps": eps, "orthogonal": False}
        super().__init__(params, defaults)
        for group in self.param_groups:
            odd = [tuple(p.shape) for p in group["params"] if group["orthogonal"] and p.ndim not in (2, 3)]
            if odd:
                raise ValueError(f"Muon is for matrices and stacks of matrices, not for a parameter of shape {odd[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                self._start(p, orthogonal=group["orthogonal"])
            if group["orthogonal"]:
                self._step_muon(group, params)
            elif params:
                self._step_adamw(group, params)
        return loss

    def _start(self, p: Tensor, *, orthogonal: bool) -> None:
        """Make the state of a parameter, once. All count their steps, as a checkpoint stores one count for all."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for kind in ("momentum_buffer",) if orthogonal else ("exp_avg", "exp_avg_sq"):
                state[kind] = torch.zeros_like(p)

    def _step_muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for p in params:
            state = self.state[p]
            state["step"] += 1
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            alike[tuple(p.shape)].append(p)
        for shape, members in alike.items():
            scale = 0.2 * max(shape[-2:]) ** 0.5
            for some in _chunks(members):
                buffers = [self.state[p]["momentum_buffer"] for p in some]
                if group["nesterov"]:
                    buffers = [p.grad.lerp(b, momentum) for p, b in zip(some, buffers, strict=True)]
                updates = orthogonalize(torch.stack(buffers), group["ns_steps"])  # (n, ..., d_out, d_in)
                torch._foreach_mul_(some, 1 - lr * group["weight_decay"])
                torch._foreach_add_(some, list(updates.to(some[0].dtype)), alpha=-lr * scale)

    def _step_adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(x: Tensor, n_steps: int) -> Tensor:
    """Return about the nearest matrix with orthonormal rows or columns to each matrix: U V^T of U S V^T.

        x = x / |x|,  then n_steps times:  a = x x^T,  x = 3.4445 x + (-4.7750 a + 2.0315 a a) x

    Singular values end between about 0.7 and 1.2, which Muon does not mind. Computed in bf16 on a GPU, else in the
    matrices' type. Source: Jordan et al. 2024 (Newton-Schulz iteration with coefficients tuned for few steps).

    Args:
        x: (..., d_out, d_in).
        n_steps: number of iterations.

    Returns:
        (..., d_out, d_in), in the type that it was computed in.
    """
    a, b, c = QUINTIC
    is_tall = x.shape[-2] > x.shape[-1]
    shape = x.shape
    x = x.to(torch.bfloat16) if x.device.type == "cuda" else x
    x = x.reshape(-1, *shape[-2:])  # (n, d_out, d_in)
    x = x.mT if is_tall else x  # (n, the smaller, the larger)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST_NORM)
    for _ in range(n_steps):
        gram = x @ x.mT  # (n, the smaller, the smaller)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(shape)


def _chunks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split parameters of one shape into lists of at most CHUNK elements, or of one parameter."""
    n = max(1, CHUNK // params[0].numel())
    for i in range(0, len(params), n):
        yield params[i : i + n]
