"""Load models by path: `from_pretrained` reads our checkpoints and Hugging Face's, `generate` continues a text."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.nn.utils import parametrize

from deepseek_exp.adapt import Adapters
from deepseek_exp.checkpoint import manifest, saved_config
from deepseek_exp.config import ModelConfig
from deepseek_exp.data import Tokenizer
from deepseek_exp.errors import CheckpointError, Problem, UserError
from deepseek_exp.huggingface import read_release
from deepseek_exp.huggingface.files import CONFIG, TOKENIZER, tokenizer_file
from deepseek_exp.huggingface.weights import layers_stored, load_release
from deepseek_exp.inference.adapters import read_adapter
from deepseek_exp.inference.domain_packs import (
    domain_index,
    load_domain,
    load_module,
    loaded_rows,
    save_module,
    unload_module,
)
from deepseek_exp.inference.generate import generate
from deepseek_exp.inference.stored import open_weights
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer

OURS = "config.yaml"


@dataclass(frozen=True)
class Pretrained:
    """A model with its tokenizer, ready to use."""

    model: Transformer
    tokenizer: Tokenizer
    folder: Path
    adapters: Adapters

    def load_adapter(self, source: str | Path, name: str) -> None:
        """Load an adapter next to those that are loaded; the stored weights stay as they are.

        Args:
            source: a folder of do=export with export.format=adapter or peft, of the peft library, a checkpoint of a run
                with adapters, or the folder of such a run.
            name: to use it by.

        Raises:
            UserError: it is no adapter, or one of another model.
        """
        folder = Path(source)
        if _is_ours(folder):
            folder = _whole_checkpoint(folder)
        found, rank, alpha = read_adapter(self.model.cfg, folder, "path", self.folder)
        self.adapters.add(name, found, alpha / rank)

    def set_adapter(self, name: str | None) -> None:
        """Use a loaded adapter from now on; None: the model itself.

        Raises:
            UserError: none of this name is loaded.
        """
        self.adapters.use(name)

    def save_module(self, domain: str, path: str | Path) -> None:
        """Write a domain's experts to a file; see `domain_packs.save_module`."""
        save_module(self.model, domain, path)

    def unload_module(self, domain: str) -> None:
        """Remove a domain's experts from memory; see `domain_packs.unload_module`."""
        self._check_no_adapters(domain)
        unload_module(self.model, domain)

    def load_module(
        self, source: str | Path, max_resident_bytes: int | None = None, *, check_model: bool = True
    ) -> str:
        """Load a domain's experts: from the checkpoint by name, or from a pack by path (`domain_packs.load_module`)."""
        self._check_no_adapters(str(source))
        if source in self.model.cfg.moe.domains:
            weights = open_weights(self.folder)
            return load_domain(self.model, weights, self.folder, str(source), max_resident_bytes)
        return load_module(self.model, source, max_resident_bytes, check_model=check_model)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 120,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
        domain: str | None = None,
    ) -> str:
        """Continue a text. The arguments are those of `inference.generate`, with the domain given by name.

        Returns:
            The text after the prompt.

        Raises:
            ValueError: prompt and new tokens exceed the model's max_seq_len.
            UserError: the model has no such domain, its pack is not loaded, or its logits are not finite.
        """
        index = None if domain is None else domain_index(self.model, domain)
        before = self.tokenizer.prompt(prompt)
        with parametrize.cached():  # an adapter is added to each weight once, not for each token
            tokens = generate(
                self.model,
                before,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                end_id=self.tokenizer.end_id,
                domain=index,
            )
        return self.tokenizer.continuation(before, tokens)

    def _check_no_adapters(self, domain: str) -> None:
        """Raise if the stacks of experts have adapters, which are as long as the stacks were."""
        if self.adapters.names:
            rule = f"cannot change its place in memory while adapters are loaded ({', '.join(self.adapters.names)})"
            raise UserError(Problem("domain", domain, rule, "load the model again, and its adapters last"))


def from_pretrained(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    domains: Sequence[str] | None = None,
) -> Pretrained:
    """Load a model and its tokenizer.

    The files of our checkpoints are first compared with their digests; Hugging Face's have none.

    Args:
        path: a checkpoint folder of one of our runs (checkpoints/step-...) saved by any layout, the folder of a run
            (its newest complete checkpoint), or the folder of a Hugging Face checkpoint.
        device: device of the model.
        dtype: type of its weights; the router's bias stays fp32.
        domains: domains to load in addition to the first; the experts of the others are not read. None loads all.

    Raises:
        UserError: the folder holds no checkpoint, or its checkpoint is damaged or cannot be expressed.
    """
    folder = Path(path)
    if _is_ours(folder):
        folder = _whole_checkpoint(folder)
        model, tokenizer = _read_ours(folder, domains), Tokenizer.load
    else:
        model, tokenizer = _read_release(folder), Tokenizer.given
        for name in domains or ():
            domain_index(model, name)  # raises: a Hugging Face model has no domains
    file = tokenizer_file(folder)
    if not file.is_file():
        raise CheckpointError(Problem("path", str(path), f"has no {TOKENIZER}", "put the model's own there"))
    for p in model.parameters():
        p.data = p.data.to(device, dtype)
    model.to(device)
    try:
        return Pretrained(model.eval(), tokenizer(file), folder, Adapters(model))
    except ValueError as error:
        rule = f"has a {file.name} that {error}"
        raise CheckpointError(
            Problem("path", str(path), rule, "use serve.generate with token ids of your own")
        ) from error


def _is_ours(folder: Path) -> bool:
    if (folder / OURS).is_file() or (folder / manifest.MANIFEST).is_file():
        return True
    return (folder / manifest.FOLDER).is_dir() and not (folder / CONFIG).exists()


def _whole_checkpoint(folder: Path) -> Path:
    """Return the folder if it is a checkpoint, or a run's newest complete one, after comparing it with its digests.

    Raises:
        CheckpointError: it is damaged; the file is named.
    """
    try:
        if (folder / manifest.FOLDER).is_dir() and not (folder / manifest.MANIFEST).exists():
            found, passed_over = manifest.locate(str(folder), folder)
            for sentence in passed_over:
                warnings.warn(sentence, stacklevel=3)
            return found
        manifest.verify(folder)
    except CheckpointError as error:
        fix = "name another checkpoint, or a run's folder for its newest whole one"
        raise CheckpointError(*(dataclasses.replace(p, key="path", fix=fix) for p in error.problems)) from error
    return folder


def model_config(values: dict[str, Any]) -> ModelConfig:
    """Return the model section made from plain values. Interpolations in them are not evaluated.

    Raises:
        ValueError: the values do not fit the schema.
    """
    try:
        tree = OmegaConf.merge(OmegaConf.structured(ModelConfig), saved_config.literal(values))
        made: ModelConfig = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return made


def _read_release(folder: Path) -> Transformer:
    cfg = model_config(read_release(folder, "path").model)
    layers_stored(cfg, folder, "path")
    model = Transformer(cfg, TORCH)
    load_release(model, cfg, folder, "path")
    return model


@torch.no_grad()
def _read_ours(folder: Path, domains: Sequence[str] | None) -> Transformer:
    try:
        cfg = model_config(saved_config.read(folder)["model"])
        weights = open_weights(folder)
        if cfg.n_layers > len(weights.names):
            raise ValueError(f"{cfg.n_layers} layers in {OURS} and {len(weights.names)} weights")
        model = Transformer(cfg, TORCH)
    except Exception as error:
        raise _unreadable(folder, error) from error
    if domains is not None:
        wanted = {domain_index(model, name) for name in domains}
        for index in set(range(1, len(cfg.moe.domains))) - wanted:
            unload_module(model, cfg.moe.domains[index])
    try:
        state = model.state_dict()
        if set(weights.names) | set(weights.aliases) != set(state):
            raise ValueError(f"its weights and {OURS} are of different models")
        for name in weights.names:
            state[name].copy_(loaded_rows(model, name, weights))
    except Exception as error:
        raise _unreadable(folder, error) from error
    return model


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    """Return the error for a damaged file, about which the libraries raise many kinds of exceptions."""
    rule = f"is no checkpoint that this version reads ({type(error).__name__}: {error})"
    return CheckpointError(Problem("path", str(folder), rule, "name a folder step-... of a run"))
