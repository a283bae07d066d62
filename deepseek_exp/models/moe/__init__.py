"""The feed-forward half of a block: dense, sparsely active, or a mixture of experts."""

from deepseek_exp.models.feed_forward import FeedForward
from deepseek_exp.models.moe.layer import MoE
from deepseek_exp.models.moe.metrics import routing_metrics

__all__ = ["FeedForward", "MoE", "routing_metrics"]
