"""From text to batches of token sequences: corpus -> tokenizer -> packed shards -> a resumable order."""

from deepseek_exp.data.any_source import prepare
from deepseek_exp.data.module import Batch, TokenDataModule
from deepseek_exp.data.prepare import PreparedData
from deepseek_exp.data.rows import PreparedRows, Rows, length_baseline
from deepseek_exp.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "PreparedData",
    "PreparedRows",
    "Rows",
    "TokenDataModule",
    "Tokenizer",
    "length_baseline",
    "prepare",
]
