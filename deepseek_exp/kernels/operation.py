"""Operations that PyTorch's compiler and dispatch modes know by name, and that nothing else slows down.

A custom operator passes PyTorch's dispatcher, which asks Python several times how to differentiate it. Where nothing
looks at operators (no compiler, no dispatch mode, real memory) the same functions are called through one
`torch.autograd.Function`: same kernels, same numbers. Measured on one core of an AMD EPYC, forward and backward without
the kernels: rms_norm 80 microseconds in place of 125, swiglu 86 of 125, three linear layers 142 of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Operation:
    """A function of tensors, numbers and lists of tensors; where that counts, the operator `deepseek_exp::name`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        self.operator = torch.library.custom_op(f"deepseek_exp::{name}", function, mutates_args=())
        self.direct: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the results look like, as a decorator; as `torch.library.custom_op` has it."""
        return self.operator.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Say what the gradients are; as `torch.library.custom_op` has it."""
        self.operator.register_autograd(backward, setup_context=setup_context)
        self.direct = _direct(self.name, self.function, backward, setup_context)

    def __call__(self, *args: Any) -> Any:
        """Compute it."""
        if _is_watched(args):
            return self.operator(*args)
        flat = _flat(args)
        if not torch.is_grad_enabled() or not any(isinstance(a, torch.Tensor) and a.requires_grad for a in flat):
            return self.function(*args)
        if self.direct is None:
            return self.operator(*args)  # which says that it has no gradient
        return self.direct.apply([len(a) if isinstance(a, list) else None for a in args], *flat)


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Make a function an operation, as a decorator."""
    return lambda function: Operation(name, function)


def _direct(
    name: str, function: Callable[..., Any], differentiate: Callable[..., Any], save: Callable[..., None]
) -> type[torch.autograd.Function]:
    """Give what differentiates a function without an operator; lists of tensors are handed over one by one."""

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
    """Say whether an operator is wanted: by the compiler, by a dispatch mode, or for tensors without memory."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return any(isinstance(a, torch.Tensor) and a.is_meta for a in args)


def _flat(args: Sequence[Any]) -> list[Any]:
    """Put the elements of lists in their place."""
    return [x for a in args for x in (a if isinstance(a, list) else [a])]


def _unflat(flat: Sequence[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
    """Undo `_flat`: `lengths` has None where there was no list."""
    given = iter(flat)
    return tuple(next(given) if n is None else [next(given) for _ in range(n)] for n in lengths)
