"""What a model is worth: its loss on the same tokens as others."""

from deepseek_exp.evaluate.yardstick import Scores, TokenSet, agreement, change, score, token_set

__all__ = ["Scores", "TokenSet", "agreement", "change", "score", "token_set"]
