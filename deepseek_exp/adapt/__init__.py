"""Weight transforms: what a model reads instead of its stored weights. Low-rank adapters are the first."""

from deepseek_exp.adapt.branches import merge_branches
from deepseek_exp.adapt.lora import Adapter, attach, initial_adapters
from deepseek_exp.adapt.products import with_adapters
from deepseek_exp.adapt.stored import load_merged, merged, saved_scale
from deepseek_exp.adapt.switch import Adapters
from deepseek_exp.adapt.transforms import apply, merge

__all__ = [
    "Adapter",
    "Adapters",
    "apply",
    "attach",
    "initial_adapters",
    "load_merged",
    "merge",
    "merge_branches",
    "merged",
    "saved_scale",
    "with_adapters",
]
