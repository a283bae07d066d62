"""Hugging Face's description of a model, config.json, to and from ours; without torch, so that composing can use it."""

from deepseek_exp.huggingface.files import Stored, stored_weights
from deepseek_exp.huggingface.read import Release, read_release
from deepseek_exp.huggingface.write import family_of, write_config

__all__ = ["Release", "Stored", "family_of", "read_release", "stored_weights", "write_config"]
