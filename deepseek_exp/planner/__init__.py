"""What a configuration costs before anything is built: parameters, FLOPs and cache bytes, by arithmetic alone."""

from deepseek_exp.planner.cost import Parameters, cache_bytes_per_token, flops_per_token, parameters
from deepseek_exp.planner.report import report

__all__ = ["Parameters", "cache_bytes_per_token", "flops_per_token", "parameters", "report"]
