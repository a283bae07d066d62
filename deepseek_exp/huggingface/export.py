"""Export one of our checkpoints as a Hugging Face checkpoint that transformers and other libraries load."""

from __future__ import annotations

import json
from pathlib import Path

from deepseek_exp.config import ModelConfig
from deepseek_exp.data import Tokenizer
from deepseek_exp.data.template import Template
from deepseek_exp.disk import new_folder
from deepseek_exp.huggingface import stored_weights, weights, write_config
from deepseek_exp.huggingface.files import CONFIG, TOKENIZER

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def export_hf(m: ModelConfig, checkpoint: Path, target: Path, *, shard_bytes: int = weights.SHARD_BYTES) -> list[str]:
    """Write config.json, generation_config.json, the weights and the tokenizer, and return the file names.

    The folder is written under a temporary name and renamed when everything is on disk, so it is complete or absent.

    Args:
        m: the checkpoint's model.
        checkpoint: one of our checkpoint folders.
        target: the folder to create. It may exist if it is empty.
        shard_bytes: maximum size of one weights file.

    Returns:
        The names of the files.

    Raises:
        ConfigError: no Hugging Face family can express the model, or the target is not empty.
    """
    with new_folder(target, "export.path") as part:
        tokenizer, template = Tokenizer.load(checkpoint / TOKENIZER), Template.next_to(checkpoint / TOKENIZER)
        dtype = DTYPES[stored_weights(checkpoint, "resume")[weights.EMBEDDING].dtype]
        start_id = next(iter(tokenizer.start), None)
        texts = {
            CONFIG: write_config(m, dtype=dtype, start_id=start_id, end_id=tokenizer.end_id),
            "generation_config.json": {"eos_token_id": tokenizer.end_id},
            "tokenizer_config.json": _tokenizer_config(tokenizer, m.max_seq_len, template),
        }
        for name, content in texts.items():
            (part / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (part / TOKENIZER).write_text(tokenizer.json, encoding="utf-8")
        weights.save(m, checkpoint, part, shard_bytes=shard_bytes)
        names = sorted(path.name for path in part.iterdir())
    return names


def _tokenizer_config(tokenizer: Tokenizer, max_seq_len: int, template: Template | None) -> dict[str, object]:
    """Return tokenizer_config.json; whether a text begins with bos_token is in tokenizer.json's post-processor."""
    added = json.loads(tokenizer.json)["added_tokens"]
    end = next(token["content"] for token in added if token["id"] == tokenizer.end_id)
    chat: dict[str, str | None] = {}
    if template is not None:
        chat = {"chat_template": template.text, "bos_token": template.bos, "eos_token": template.eos}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        **tokenizer.config.roles,
        **{name: text for name, text in chat.items() if text},
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
