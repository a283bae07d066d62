"""Text in, batches of token sequences out: corpus -> tokenizer -> packed shards -> an order that can be resumed."""

from deepseek_exp.data.module import Batch, TokenDataModule
from deepseek_exp.data.prepare import PreparedData, prepare
from deepseek_exp.data.tokenizer import Tokenizer

__all__ = ["Batch", "PreparedData", "TokenDataModule", "Tokenizer", "prepare"]
