"""Operations that PyTorch's compiler and dispatch modes know by name, without the usual overhead.

A custom operator goes through PyTorch's dispatcher, which calls Python several times to find the derivative. If nothing
inspects operators (no compiler, no dispatch mode, real memory) the same functions are called through one
`torch.autograd.Function`: same kernels, same numbers. Measured on one core of an AMD EPYC, forward and backward without
the kernels: rms_norm 80 microseconds instead of 125, swiglu 86 instead of 125, three linear layers 142 instead of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Operation:
    """A function of tensors, numbers and lists of tensors; for the compiler, the operator `deepseek_exp::name`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        self.operator = torch.library.custom_op(f"deepseek_exp::{name}", function, mutates_args=())
        self.direct: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Register the shapes and types of the results; a decorator, as in `torch.library.custom_op`."""
        return self.operator.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Register the gradients, as in `torch.library.custom_op`."""
        self.operator.register_autograd(backward, setup_context=setup_context)
        self.direct = _direct(self.name, self.function, backward, setup_context)

    def __call__(self, *args: Any) -> Any:
        """Compute the operation."""
        if _is_watched(args):
            return self.operator(*args)
        flat = _flat(args)
        if not torch.is_grad_enabled() or not any(isinstance(a, torch.Tensor) and a.requires_grad for a in flat):
            return self.function(*args)
        if self.direct is None:
            return self.operator(*args)  # raises that it has no gradient
        return self.direct.apply([len(a) if isinstance(a, list) else None for a in args], *flat)


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Return a decorator that makes a function an operation."""
    return lambda function: Operation(name, function)


def _direct(
    name: str, function: Callable[..., Any], differentiate: Callable[..., Any], save: Callable[..., None]
) -> type[torch.autograd.Function]:
    """Return an autograd function that needs no operator; lists of tensors are passed as single tensors."""

    def forward(ctx: Any, lengths: Sequence[int | None], *flat: Any) -> Any:
        args = _unflat(flat, lengths)
        results = function(*args)
        save(ctx, args, results)
        ctx.gives_list = isinstance(results, list)
        return tuple(results) if ctx.gives_list else results

    def backward(ctx: Any, *grads: Any) -> Any:
        found = differentiate(ctx, list(grads)) if ctx.gives_list else differentiate(ctx, *grads)
        return None, *_flat(found if isinstance(found, tuple) else (found,))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"deepseek_exp_{name}", (torch.autograd.Function,), methods)


def _is_watched(args: Sequence[Any]) -> bool:
    """Return whether the operator is needed: by the compiler, by a dispatch mode, or for tensors without memory."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return any(isinstance(a, torch.Tensor) and a.is_meta for a in args)


def _flat(args: Sequence[Any]) -> list[Any]:
    """Replace each list by its elements."""
    return [x for a in args for x in (a if isinstance(a, list) else [a])]


def _unflat(flat: Sequence[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
    """Undo `_flat`; an entry of `lengths` is None if the argument is not a list."""
    given = iter(flat)
    return tuple(next(given) if n is None else [next(given) for _ in range(n)] for n in lengths)
