"""Domain packs: the experts of one domain as a file, to unload from and to load into a running model.

A pack is a safetensors file with the expert stacks, router rows and classifier row of one domain for every mixture of
experts of the model, under the layer's name; its metadata names the domain, the model version and `shared`, the digest
of the weights that all domains share. Experts are trained for these weights and make no sense with others, so a pack
fits a model with the same digest alone. A checkpoint holds the experts of all domains, so a domain can be loaded from
it as well.
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
# elements that are digested at a time
DIGEST_CHUNK = 1 << 22


def save_module(model: Transformer, domain: str, path: Path | str) -> None:
    """Write the pack of a loaded domain.

    The file is written under another name and renamed when all is on disk: it is whole, or as it was before.

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
        max_resident_bytes: refuse before this process would hold more memory, the passing copy of a stack included.
        check_model: refuse a pack of a model whose shared weights are others. False takes it, and also a pack of a
            version that did not record them, if its shapes fit.

    Returns:
        The domain's name.

    Raises:
        UserError: the file is no pack or is of another model, the domain is loaded already, or memory would not do.
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
    """Load the experts of a domain from the checkpoint that the model comes from; the domain's rows alone are read.

    Args:
        model: the running model.
        weights: of the checkpoint.
        folder: of the checkpoint, for the messages.
        domain: the domain's name.
        max_resident_bytes: as in `load_module`.

    Returns:
        The domain's name.

    Raises:
        UserError: the model has no such domain, it is loaded already, or memory would not do.
    """
    index, n_domains = domain_index(model, domain, loaded=False), len(model.cfg.moe.domains)
    _check_shapes(model, weights, folder, n_domains)
    _insert(model, domain, weights, n_domains, index, max_resident_bytes)
    return domain


def loaded_rows(model: Transformer, name: str, weights: StoredWeights) -> Tensor:
    """Read from a checkpoint what the model holds of the weight `name`: all of it, or the loaded experts."""
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

    They are rounded to bf16 first, so that a model is the same in fp32 and in bf16. One that was loaded in fp16 has a
    digest of that type, since rounding twice is not rounding once.
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
    """Put the `place`-th of `ways` equal parts of the stored stacks into the model."""
    layers, index = _layers(model), model.cfg.moe.domains.index(domain)
    if max_resident_bytes is not None:
        _check_memory(domain, _domain_state(model).values(), layers.values(), max_resident_bytes)
    for prefix, layer in layers.items():
        keys = list(layer.domain_state(0))
        layer.insert_domain(index, {key: weights.read(f"{prefix}.{key}", ways, place) for key in keys})
    _give_back_memory()


def _domain_state(model: Transformer) -> dict[str, Tensor]:
    """Return by name what belongs to one domain, as shapes and types: views would keep the old stacks in memory."""
    layers = _layers(model).items()
    return {f"{n}.{k}": t.detach().to("meta") for n, layer in layers for k, t in layer.domain_state(0).items()}


def _check_shared(model: Transformer, recorded: str | None, path: Path | str) -> None:
    """Refuse a pack whose experts were not trained with the weights that this model's domains share."""
    if recorded == shared_digest(model):
        return
    rule, fix = "was saved from a model whose shared weights are others", "load a pack of this model"
    if recorded is None:
        rule, fix = "does not record the model that it belongs to", "save it again from its model with save_module"
    raise UserError(Problem("pack", str(path), rule, f"{fix}, or pass check_model=False to load it all the same"))


def _check_shapes(model: Transformer, weights: StoredWeights, path: Path | str, n_domains: int) -> None:
    """Refuse weights that are not those of `n_domains` domains of this model, before anything is changed."""
    names = set(weights.names)
    shapes = {k: (len(t) * n_domains, *t.shape[1:]) for k, t in _domain_state(model).items()}
    found = {k: weights.shape(k) if k in names else None for k in shapes}
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
