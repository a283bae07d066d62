"""Which operators PyTorch calls."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Called(TorchDispatchMode):
    """Notes their names, such as aten::add_.Tensor."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))
