"""Use of trained models."""

from deepseek_exp.serve.domain_packs import load_module, save_module, unload_module
from deepseek_exp.serve.generate import generate

__all__ = ["generate", "load_module", "save_module", "unload_module"]
