"""Log-probabilities of preference pairs under the reference model: computed once, kept on disk by digest."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_exp.checkpoint import manifest
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.data import PreparedRows, Rows
from deepseek_exp.disk import expand
from deepseek_exp.finetune.log_probs import completion_log_probs
from deepseek_exp.models import MicroBatch, NextTokenObjective, Transformer

log = logging.getLogger(__name__)


def with_reference(
    exp: ExperimentConfig, data: PreparedRows, device: torch.device, build: Callable[[], Transformer]
) -> PreparedRows:
    """Return preference data with the reference's log-probabilities, from the cache or by one pass of the reference.

    The cache's key is the digest of the weights, the rows, the tokenizer and what the arithmetic depends on.

    Args:
        exp: the experiment.
        data: the pairs.
        device: where the reference runs.
        build: builds the reference.
    """
    words = [_weights_digest(exp), data.tokenizer.digest, data.train.digest, data.valid.digest, str(exp.data.seq_len)]
    words += [exp.trainer.precision.value, device.type, str(exp.kernels), str(exp.lora), _adapter_digest(exp)]
    key = hashlib.sha256(" ".join(words).encode()).hexdigest()[:32]
    path = expand(exp.data.cache_dir) / "reference" / f"{key}.safetensors"
    try:
        found = load_file(path)
        log.info("log-probabilities of the reference: read from %s", path)
    except (OSError, SafetensorError):
        model = build().eval()
        found = {split: _log_probs(exp, model, getattr(data, split), device) for split in ("train", "valid")}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{torch.randint(1 << 62, ()).item()}.part")
        save_file(found, part)
        part.rename(path)
        log.info("log-probabilities of the reference: computed for %d pairs", sum(map(len, found.values())) // 2)
    return data.with_reference(found["train"].numpy(), found["valid"].numpy())


def _weights_digest(exp: ExperimentConfig) -> str:
    """Return a digest of the reference's weights: of a checkpoint's manifest, a release's files, or the seed."""
    if exp.init_from is None:
        return hashlib.sha256(f"{exp.seed} {exp.model}".encode()).hexdigest()
    folder = Path(exp.init_from)
    if manifest.is_checkpoint(folder):
        return hashlib.sha256((folder / manifest.MANIFEST).read_bytes()).hexdigest()
    return _files_digest(folder)


def _adapter_digest(exp: ExperimentConfig) -> str:
    """Return a digest of the adapter that training starts from; "" without one."""
    return "" if exp.lora.path is None else _files_digest(expand(exp.lora.path))


def _files_digest(place: Path) -> str:
    digests = {}
    for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


@torch.no_grad()
def _log_probs(exp: ExperimentConfig, model: Transformer, rows: Rows, device: torch.device) -> Tensor:
    """Return the log-probability of each completion, (sequences,), float64."""
    objective, n, found = NextTokenObjective(0.0), exp.trainer.micro_batch_seqs, []
    for first in range(0, len(rows.tokens), n):
        at = range(first, min(first + n, len(rows.tokens)))
        tokens = torch.from_numpy(rows.tokens[at.start : at.stop]).long().to(device)
        mask = torch.from_numpy(rows.loss_mask(torch.tensor(at).numpy())).to(device)
        nll = objective.from_tokens(model, MicroBatch(tokens, None, mask)).nll
        found.append(completion_log_probs(-nll, mask).cpu())
    return torch.cat(found)
