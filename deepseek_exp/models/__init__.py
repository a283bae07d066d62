"""Language models: one Transformer whose parts the configuration chooses."""

from deepseek_exp.models.transformer import Transformer, init_weights

__all__ = ["Transformer", "init_weights"]
