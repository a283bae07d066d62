"""The operations that models are built from: a frozen set of callables, defined by reference.py."""

from deepseek_exp.kernels.ops import TORCH, Ops, resolve

__all__ = ["TORCH", "Ops", "resolve"]
