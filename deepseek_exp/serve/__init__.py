"""Use of trained models: text from them, domain packs, and checkpoints that others read."""

from deepseek_exp.serve.export import export_hf
from deepseek_exp.serve.generate import generate
from deepseek_exp.serve.hf_weights import load_release
from deepseek_exp.serve.pretrained import from_pretrained
from deepseek_exp.serve.weight_only import quantize_matrices

__all__ = ["export_hf", "from_pretrained", "generate", "load_release", "quantize_matrices"]
