"""Domain packs: the experts of one domain as a file, to be unloaded from and loaded into a running model.

A pack is a safetensors file with the expert stacks, router rows and classifier row of one domain for every MoE layer of
the model, under the layer's name. Its metadata holds the domain, the model version and `shared`, the digest of the
weights that all domains share. Experts only work with the shared weights they were trained with, so a pack only fits a
model with the same digest. A checkpoint holds the experts of all domains, so a domain can also be loaded from it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepseek_exp.disk import fsync_path
from deepseek_exp.errors import Problem, UserError
from deepseek_exp.inference.stored import OneFile, StoredWeights
from deepseek_exp.models import Transformer
from deepseek_exp.models.moe import MoE

SHARED = "shared"
# Number of elements that are hashed at a time.
DIGEST_CHUNK = 1 << 22


def save_module(model: Transformer, domain: str, path: Path | str) -> None:
    """Write the pack of a loaded domain.

    The file is written under a temporary name and renamed when everything is on disk, so it is complete or unchanged.

    Raises:
        UserError: the model has no such domain, or it is not loaded.
    """
    index = domain_index(model, domain, loaded=True)
    layers = _layers(model).items()
    tensors = {f"{name}.{key}": t for name, layer in layers for key, t in layer.domain_state(index).items()}
    metadata = {"domain": domain, "version": model.cfg.version, SHARED: shared_digest(model)}
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, part, metadata=metadata)
        fsync_path(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def unload_module(model: Transformer, domain: str) -> None:
    """Remove a domain's experts from memory.

    The results for other domains' tokens do not change by a bit. Tokens that the router assigns to this domain go to
    the first domain's experts until the pack is loaded again.

    Raises:
        UserError: the model has no such domain, it is the first one, or it is not loaded.
    """
    index = domain_index(model, domain, loaded=True)
    if index == 0:
        raise UserError(Problem("domain", domain, "is open to every token and always loaded", "unload another one"))
    for layer in _layers(model).values():
        layer.remove_domain(index)
    _give_back_memory()


def load_module(
    model: Transformer,
    path: Path | str,
    max_resident_bytes: int | None = None,
    *,
    check_model: bool = True,
) -> str:
    """Load a domain pack into a model from which the domain is unloaded.

    Args:
        model: the running model.
        path: a file that `save_module` wrote.
        max_resident_bytes: raise an error if this process would exceed this memory, including the temporary copy of a
            stack.
        check_model: raise an error if the pack was made with other shared weights. If False, such a pack is accepted if
            its shapes fit, and so is a pack from a version that did not record them.

    Returns:
        The domain's name.

    Raises:
        UserError: the file is not a pack or belongs to another model, the domain is already loaded, or there is not
            enough memory.
    """
    try:
        opened = safe_open(path, framework="pt")
        metadata = opened.metadata() or {}
        name = metadata.get("domain")
        if name is None:
            raise ValueError("it names no domain")
    except (OSError, SafetensorError, ValueError) as error:
        rule = f"is no pack ({type(error).__name__}: {error})"
        raise UserError(Problem("pack", str(path), rule, "name a file that save_module wrote")) from error
    with opened as file:
        domain_index(model, name, loaded=False)
        weights = OneFile(file, {})
        _check_shapes(model, weights, path, n_domains=1)
        if check_model:
            _check_shared(model, metadata.get(SHARED), path)
        _insert(model, name, weights, 1, 0, max_resident_bytes)
    return str(name)


def load_domain(
    model: Transformer, weights: StoredWeights, folder: Path, domain: str, max_resident_bytes: int | None = None
) -> str:
    """Load the experts of a domain from the model's checkpoint, reading only the domain's rows.

    Args:
        model: the running model.
        weights: weights of the checkpoint.
        folder: folder of the checkpoint, for the messages.
        domain: the domain's name.
        max_resident_bytes: as in `load_module`.

    Returns:
        The domain's name.

    Raises:
        UserError: the model has no such domain, it is already loaded, or there is not enough memory.
    """
    index, n_domains = domain_index(model, domain, loaded=False), len(model.cfg.moe.domains)
    _check_shapes(model, weights, folder, n_domains)
    _insert(model, domain, weights, n_domains, index, max_resident_bytes)
    return domain


def loaded_rows(model: Transformer, name: str, weights: StoredWeights) -> Tensor:
    """Return the rows of the weight `name` that the model holds: all of them, or those of the loaded experts."""
    prefix, _, rest = name.partition(".experts.")
    domains = model.cfg.moe.domains
    if not rest or not domains:
        return weights.read(name)
    loaded = _layers(model)[prefix].router.loaded
    if bool(loaded.all()):
        return weights.read(name)
    return torch.cat([weights.read(name, len(domains), d) for d in loaded.nonzero().flatten().tolist()])


@torch.no_grad()
def shared_digest(model: Transformer) -> str:
    """Return the SHA-256, in hexadecimal, of the parameters that belong to no domain.

    They are rounded to bf16 first, so that a model has the same digest in fp32 and bf16. A model loaded in fp16 has a
    different one, because rounding twice is not the same as rounding once.
    """
    of_domains = set(_domain_state(model))
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in of_domains:
            continue
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        for chunk in parameter.detach().reshape(-1).split(DIGEST_CHUNK):
            digest.update(chunk.to(torch.bfloat16).cpu().view(torch.int16).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _insert(
    model: Transformer, domain: str, weights: StoredWeights, ways: int, place: int, max_resident_bytes: int | None
) -> None:
    """Copy part `place` of `ways` equal parts of the stored stacks into the model."""
    layers, index = _layers(model), model.cfg.moe.domains.index(domain)
    if max_resident_bytes is not None:
        _check_memory(domain, _domain_state(model).values(), layers.values(), max_resident_bytes)
    for prefix, layer in layers.items():
        keys = list(layer.domain_state(0))
        layer.insert_domain(index, {key: weights.read(f"{prefix}.{key}", ways, place) for key in keys})
    _give_back_memory()


def _domain_state(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors of one domain by name, as shapes and types only: views would keep the old stacks in memory."""
    layers = _layers(model).items()
    return {f"{n}.{k}": t.detach().to("meta") for n, layer in layers for k, t in layer.domain_state(0).items()}


def _check_shared(model: Transformer, recorded: str | None, path: Path | str) -> None:
    """Raise an error if a pack's experts were not trained with the shared weights of this model."""
    if recorded == shared_digest(model):
        return
    rule, fix = "was saved from a model whose shared weights are others", "load a pack of this model"
    if recorded is None:
        rule, fix = "does not record the model that it belongs to", "save it again from its model with save_module"
    raise UserError(Problem("pack", str(path), rule, f"{fix}, or pass check_model=False to load it all the same"))


def _check_shapes(model: Transformer, weights: StoredWeights, path: Path | str, n_domains: int) -> None:
    """Raise an error if the weights are not those of `n_domains` domains of this model, before anything is changed."""
    names = set(weights.names)
    shapes = {k: (len(t) * n_domains, *t.shape[1:]) for k, t in _domain_state(model).items()}
    found = {k: weights.shape(k) if k in names else None for k in shapes}
    if wrong := sorted(k for k in shapes if shapes[k] != found[k]):
        rule = f"does not fit the model: {', '.join(f'{k} {found[k]} for {shapes[k]}' for k in wrong[:3])}"
        raise UserError(Problem("pack", str(path), rule, "load a pack that was saved from a model of this shape"))


def _check_memory(domain: str, new: Iterable[Tensor], layers: Iterable[MoE], most: int) -> None:
    """Raise an error if resident memory, the new weights and a copy of the largest stack would exceed `most` bytes."""
    resident = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    copy = max(p.numel() * p.element_size() for layer in layers for p in layer.experts.parameters())
    needed = resident + copy + sum(t.numel() * t.element_size() for t in new)
    if needed > most:
        rule = f"would need {needed:,} bytes of memory and max_resident_bytes is {most:,}"
        raise UserError(Problem("domain", domain, rule, "unload another domain first, or raise max_resident_bytes"))


def _give_back_memory() -> None:
    """Make glibc return freed memory to the system, which it does not do for blocks below its mmap threshold."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _layers(model: Transformer) -> dict[str, MoE]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MoE)}


def domain_index(model: Transformer, domain: str, *, loaded: bool = True) -> int:
    """Return the index of a domain of the model.

    Raises:
        UserError: the model has no such domain, or the domain is loaded although `loaded` is False, or vice versa.
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
