"""Use trained models: text generation, domain packs, and loading checkpoints."""

from deepseek_exp.huggingface.export import export_hf
from deepseek_exp.huggingface.weights import load_release
from deepseek_exp.inference.batched import Completion, sample_completions
from deepseek_exp.inference.generate import generate
from deepseek_exp.inference.pretrained import from_pretrained
from deepseek_exp.inference.weight_only import quantize_matrices

__all__ = [
    "Completion",
    "export_hf",
    "from_pretrained",
    "generate",
    "load_release",
    "quantize_matrices",
    "sample_completions",
]
