"""The mechanism of weight transforms: a tensor of a model is replaced by a function of it, for every reader.

A transform is a module from a weight to a weight of the same shape and type. It is a parametrization of the tensor
(`torch.nn.utils.parametrize`), not a wrapper around a layer: models read weights directly in several places (fused
kernels, stacks of experts, MLA's absorbed decoding), and each of them has to see the transformed weight. The model, its
optimizer and its checkpoints keep the names of the weights; see `models/names.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def apply(model: nn.Module, transforms: Mapping[str, nn.Module]) -> None:
    """Transform weights of a model, in every module that has them: a tied table in both.

    A weight that already has transforms gets another one, which is applied last.

    Args:
        model: changed in place.
        transforms: parameter name -> its transform.

    Raises:
        ValueError: the model has no such parameter.
    """
    places = _places(model)
    parameters = dict(model.named_parameters())
    for name, transform in transforms.items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name}")
        for module, key in places[parameters[name]]:
            parametrize.register_parametrization(module, key, transform, unsafe=True)  # that is, without a trial


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Store each transformed weight in place of the original, and remove its transforms.

    Every reader gets the same bits afterwards as before.
    """
    for weight, places in _places(model).items():
        transformed = [(m, key) for m, key in places if parametrize.is_parametrized(m, key)]
        if transformed:
            module, key = transformed[0]
            value: Tensor = getattr(module, key)
            for module, key in transformed:
                parametrize.remove_parametrizations(module, key, leave_parametrized=False)
            weight.copy_(value)


def _places(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Return the modules and attribute names under which each weight is read."""
    found: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module, key, weight in _weights(model):
        found.setdefault(weight, []).append((module, key))
    return found


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for key, weight in module._parameters.items():
            if weight is not None:
                yield module, key, weight
        for key, transforms in getattr(module, "parametrizations", {}).items():
            yield module, key, transforms.original
