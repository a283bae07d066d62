"""Parameter names that do not depend on weight transforms.

`torch.nn.utils.parametrize` moves a parameter into a list of its module: `wq.weight` becomes
`wq.parametrizations.weight.original`, and a parameter `lora_a` of its first transform
`wq.parametrizations.weight.0.lora_a`. A model, its optimizer and its checkpoints know them as `wq.weight` and
`wq.weight.lora_a`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

LIST = "parametrizations."
ORIGINAL = re.compile(r"parametrizations\.(\w+)\.original$")
OF_A_TRANSFORM = re.compile(r"parametrizations\.(\w+)\.\d+\.(\w+)$")


def own_name(name: str) -> str:
    """Return the name of a parameter without the list that it was moved to."""
    if LIST not in name:
        return name
    return OF_A_TRANSFORM.sub(r"\1.\2", ORIGINAL.sub(r"\1", name))


class OwnNames(nn.Module):
    """A module whose parameters keep their names when their tensors are transformed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_to_own_names)
        self.register_load_state_dict_pre_hook(_to_names_of_torch)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters as `nn.Module` does, under their own names."""
        for name, p in super().named_parameters(prefix, recurse, remove_duplicate):
            yield own_name(name), p


def _to_own_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and LIST in name]:
        state[prefix + own_name(name.removeprefix(prefix))] = state.pop(name)


def _to_names_of_torch(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    # named_parameters of nn.Module, which has torch's names
    for name, _ in nn.Module.named_parameters(module, remove_duplicate=False):
        if LIST in name and prefix + own_name(name) in state:
            state[prefix + name] = state.pop(prefix + own_name(name))
