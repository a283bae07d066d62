"""Domain packs: the experts of one domain as a file, to unload from and to load into a running model.

A pack is a safetensors file with the expert stacks, router rows and classifier row of one domain for every mixture of
experts of the model, under the layer's name; its metadata names the domain and the model version.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deepseek_exp.errors import Problem, UserError
from deepseek_exp.models import Transformer
from deepseek_exp.moe import MoE


def save_module(model: Transformer, domain: str, path: Path | str) -> None:
    """Write the pack of a loaded domain.

    Raises:
        UserError: the model has no such domain, or it is not loaded.
    """
    index = domain_index(model, domain, loaded=True)
    layers = _layers(model).items()
    tensors = {f"{name}.{key}": t for name, layer in layers for key, t in layer.domain_state(index).items()}
    metadata = {"domain": domain, "version": model.cfg.version}
    save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, path, metadata=metadata)


def unload_module(model: Transformer, domain: str) -> None:
    """Take a domain's experts out of memory.

    What other domains' tokens get does not change by a bit; what the router takes for text of this domain goes to the
    first domain's experts until the pack is loaded again.

    Raises:
        UserError: the model has no such domain, it is the first one, or it is not loaded.
    """
    index = domain_index(model, domain, loaded=True)
    if index == 0:
        raise UserError(Problem("domain", domain, "is open to every token and always loaded", "unload another one"))
    for layer in _layers(model).values():
        layer.remove_domain(index)
    _give_back_memory()


def load_module(model: Transformer, path: Path | str) -> str:
    """Load a pack into a model from which that domain is unloaded; gives the domain's name.

    Raises:
        UserError: the file is no pack, or does not fit the model, or the domain is loaded already.
    """
    try:
        opened = safe_open(path, framework="pt")
        domain = (opened.metadata() or {})["domain"]
    except (OSError, SafetensorError, KeyError) as error:
        rule = f"is no pack ({type(error).__name__}: {error})"
        raise UserError(Problem("pack", str(path), rule, "name a file that save_module wrote")) from error
    with opened as file:
        index = domain_index(model, domain, loaded=False)
        layers = _layers(model)
        wanted = {f"{n}.{k}": tuple(t.shape) for n, layer in layers.items() for k, t in layer.domain_state(0).items()}
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        if wrong := sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)):
            rule = f"does not fit the model: {', '.join(f'{k} {found.get(k)} for {wanted.get(k)}' for k in wrong[:3])}"
            raise UserError(Problem("pack", str(path), rule, "load a pack that was saved from a model of this shape"))
        for name, layer in layers.items():
            layer.insert_domain(index, {key: file.get_tensor(f"{name}.{key}") for key in layer.domain_state(0)})
    _give_back_memory()
    return domain


def _give_back_memory() -> None:
    """Let glibc return freed memory to the system, which it does not do for blocks below its mmap threshold."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _layers(model: Transformer) -> dict[str, MoE]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MoE)}


def domain_index(model: Transformer, domain: str, *, loaded: bool = True) -> int:
    """Find a domain of the model by name.

    Raises:
        UserError: it has no such domain, or that is not loaded (`loaded`), or it is (not `loaded`).
    """
    names = model.cfg.moe.domains
    if domain not in names:
        rule = f"is not a domain of this model ({', '.join(names) or 'it has none'})"
        raise UserError(Problem("domain", domain, rule, "name one of them"))
    index = names.index(domain)
    if bool(next(iter(_layers(model).values())).router.loaded[index]) is not loaded:
        state, fix = ("not loaded", "load its pack first") if loaded else ("loaded already", "unload it first")
        raise UserError(Problem("domain", domain, f"is {state}", fix))
    return index
