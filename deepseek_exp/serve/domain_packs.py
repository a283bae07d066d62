"""Domain packs: the experts of one domain as a file, to unload from and to load into a running model.

A pack is a safetensors file with the expert stacks, router rows and classifier row of one domain for every mixture of
experts of the model, under the layer's name; its metadata names the domain and the model version. A checkpoint holds
the same of all domains, so a domain can be loaded from it as well.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepseek_exp.disk import fsync_path
from deepseek_exp.errors import Problem, UserError
from deepseek_exp.models import Transformer
from deepseek_exp.moe import MoE


def save_module(model: Transformer, domain: str, path: Path | str) -> None:
    """Write the pack of a loaded domain.

    The file is written under another name and renamed when all is on disk: it is whole, or as it was before.

    Raises:
        UserError: the model has no such domain, or it is not loaded.
    """
    index = domain_index(model, domain, loaded=True)
    layers = _layers(model).items()
    tensors = {f"{name}.{key}": t for name, layer in layers for key, t in layer.domain_state(index).items()}
    metadata = {"domain": domain, "version": model.cfg.version}
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, part, metadata=metadata)
        fsync_path(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


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


@torch.no_grad()
def load_module(
    model: Transformer, path: Path | str, domain: str | None = None, max_resident_bytes: int | None = None
) -> str:
    """Load the experts of a domain into a model from which it is unloaded.

    Args:
        model: the running model.
        path: a pack, or a checkpoint's model.safetensors, of which the domain's rows alone are read.
        domain: which one to take from a checkpoint; a pack knows its own.
        max_resident_bytes: refuse before this process would hold more memory, the passing copy of a stack included.

    Returns:
        The domain's name.

    Raises:
        UserError: the file is no pack or does not fit the model, the domain is loaded already, or memory would not do.
    """
    try:
        opened = safe_open(path, framework="pt")
        packed = (opened.metadata() or {}).get("domain")
        name = packed or domain
        if name is None:
            raise ValueError("it names no domain")
    except (OSError, SafetensorError, ValueError) as error:
        rule = f"is no pack ({type(error).__name__}: {error})"
        raise UserError(Problem("pack", str(path), rule, "name a file that save_module wrote")) from error
    with opened as file:
        index, layers = domain_index(model, name, loaded=False), _layers(model)
        place = 0 if packed else index
        # shapes and types alone, without a graph: either would keep the old stacks in memory
        wanted = {f"{n}.{k}": t.to("meta") for n, layer in layers.items() for k, t in layer.domain_state(0).items()}
        _check_shapes(file, path, wanted, n_domains=1 if packed else len(model.cfg.moe.domains))
        if max_resident_bytes is not None:
            _check_memory(name, wanted.values(), layers.values(), max_resident_bytes)
        for prefix, layer in layers.items():
            layer.insert_domain(index, _rows(file, prefix, layer, place))
    _give_back_memory()
    return name


def loaded_rows(model: Transformer, name: str, stack: Any) -> Tensor:
    """Read from a checkpoint's slice `stack` what the model holds of the weight `name`: all, or the loaded experts."""
    layers = _layers(model)
    prefix, _, rest = name.partition(".experts.")
    if not rest or not model.cfg.moe.domains or bool(layers[prefix].router.loaded.all()):
        return stack[:]
    size = model.cfg.moe.n_routed_experts // len(model.cfg.moe.domains)
    here = layers[prefix].router.loaded.nonzero().flatten().tolist()
    return torch.cat([stack[d * size : (d + 1) * size] for d in here])


def _rows(file: Any, prefix: str, layer: MoE, place: int) -> dict[str, Tensor]:
    """Read what belongs to the `place`-th domain in a file."""
    n_rows = {k: len(t) for k, t in layer.domain_state(0).items()}
    return {k: file.get_slice(f"{prefix}.{k}")[place * n : (place + 1) * n] for k, n in n_rows.items()}


def _check_shapes(file: Any, path: Path | str, wanted: dict[str, Tensor], n_domains: int) -> None:
    """Refuse a file whose weights are not those of a domain of this model, before anything is changed."""
    keys = set(file.keys())
    shapes = {k: (len(t) * n_domains, *t.shape[1:]) for k, t in wanted.items()}
    found = {k: tuple(file.get_slice(k).get_shape()) if k in keys else None for k in shapes}
    if wrong := sorted(k for k in shapes if shapes[k] != found[k]):
        rule = f"does not fit the model: {', '.join(f'{k} {found[k]} for {shapes[k]}' for k in wrong[:3])}"
        raise UserError(Problem("pack", str(path), rule, "load a pack that was saved from a model of this shape"))


def _check_memory(domain: str, new: Iterable[Tensor], layers: Iterable[MoE], most: int) -> None:
    """Refuse to hold more than `most` bytes: what is resident, the new weights, and the copy of the largest stack."""
    resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    copy = max(p.numel() * p.element_size() for layer in layers for p in layer.experts.parameters())
    needed = resident + copy + sum(t.numel() * t.element_size() for t in new)
    if needed > most:
        rule = f"would need {needed:,} bytes of memory and max_resident_bytes is {most:,}"
        raise UserError(Problem("domain", domain, rule, "unload another domain first, or raise max_resident_bytes"))


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
