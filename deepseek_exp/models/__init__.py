"""Language models: one Transformer whose parts are chosen by the configuration."""

from deepseek_exp.models.objective import Losses, MicroBatch, NextTokenObjective, Objective
from deepseek_exp.models.transformer import Transformer, init_weights

__all__ = ["Losses", "MicroBatch", "NextTokenObjective", "Objective", "Transformer", "init_weights"]
