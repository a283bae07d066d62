"""Several adapters in one model, of which one or none is used at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from deepseek_exp.adapt.lora import Adapter, low_rank_sum
from deepseek_exp.adapt.transforms import apply
from deepseek_exp.errors import Problem, UserError
from deepseek_exp.models import Transformer


class Adapters:
    """The adapters of a model for inference; its stored weights stay as they are.

    Attributes:
        active: name of the adapter that is used; None: the model itself.
    """

    def __init__(self, model: Transformer) -> None:
        """Start without adapters."""
        self.active: str | None = None
        self._model, self._loaded = model, dict[str, tuple[dict[str, Adapter], float]]()
        self._adapted: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._loaded)

    def add(self, name: str, adapters: Mapping[str, Adapter], scale: float) -> None:
        """Load an adapter, which is not used until `use` names it.

        Args:
            name: to use it by; an adapter of this name is replaced.
            adapters: parameter name -> its matrices.
            scale: alpha / rank.

        Raises:
            UserError: it has a matrix for a weight that the model does not have, or of another shape.
        """
        weights = dict(self._model.named_parameters())
        for weight, (a, b) in adapters.items():
            shape = (*b.shape[:-1], a.shape[-1]) if a.shape[-2] == b.shape[-1] else None
            if weight not in weights or shape != tuple(weights[weight].shape):
                rule = f"has matrices for {weight} of shape {shape}, which this model does not have"
                raise UserError(Problem("adapter", name, rule, "load an adapter of this model"))
        ready = {n: Adapter(*(t.to(weights[n].device, weights[n].dtype) for t in pair)) for n, pair in adapters.items()}
        new = adapters.keys() - self._adapted
        apply(self._model, {weight: _Chosen(self, weight) for weight in weights if weight in new})
        self._adapted |= new
        self._loaded[name] = ready, scale

    def remove(self, name: str) -> None:
        """Remove an adapter from memory; if it is used, the model itself is used afterwards."""
        self._check(name)
        del self._loaded[name]
        self.active = None if self.active == name else self.active

    def use(self, name: str | None) -> None:
        """Choose the adapter of the next forward passes; None: the model itself.

        Raises:
            UserError: none of this name is loaded.
        """
        if name is not None:
            self._check(name)
        self.active = name

    def summed(self, weight: str, w: Tensor) -> Tensor:
        """Return a weight with the used adapter added, if it has one for it."""
        if self.active is None:
            return w
        adapters, scale = self._loaded[self.active]
        return low_rank_sum(w, *adapters[weight], scale) if weight in adapters else w

    def _check(self, name: str) -> None:
        if name not in self._loaded:
            rule = f"is not loaded (loaded: {', '.join(self._loaded) or 'none'})"
            raise UserError(Problem("adapter", name, rule, "load it first"))


class _Chosen(nn.Module):
    """The transform of a weight that adds the adapter in use."""

    def __init__(self, adapters: Adapters, weight: str) -> None:
        super().__init__()
        self.adapters, self.weight = adapters, weight

    def forward(self, w: Tensor) -> Tensor:
        return self.adapters.summed(self.weight, w)
