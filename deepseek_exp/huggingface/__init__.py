"""Convert between Hugging Face's config.json and our model section. No torch, so that composing can use it."""

from deepseek_exp.huggingface.files import stored_weights
from deepseek_exp.huggingface.read import read_release
from deepseek_exp.huggingface.vocabulary import other_tokenizer
from deepseek_exp.huggingface.write import write_config

__all__ = ["other_tokenizer", "read_release", "stored_weights", "write_config"]
