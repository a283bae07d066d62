"""Language models: one Transformer whose parts are chosen by the configuration."""

from deepseek_exp.models.transformer import Loss, Transformer, init_weights

__all__ = ["Loss", "Transformer", "init_weights"]
