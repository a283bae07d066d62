"""Use of trained models."""

from deepseek_exp.serve.generate import generate

__all__ = ["generate"]
