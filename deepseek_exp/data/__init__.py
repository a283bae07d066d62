"""From text to batches of token sequences: corpus -> tokenizer -> packed shards -> a resumable order."""

from deepseek_exp.data.module import Batch, TokenDataModule
from deepseek_exp.data.prepare import PreparedData, prepare
from deepseek_exp.data.tokenizer import Tokenizer

__all__ = ["Batch", "PreparedData", "TokenDataModule", "Tokenizer", "prepare"]
