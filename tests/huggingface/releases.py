"""Tiny random models of every Hugging Face family that our parts express, for tests."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deepseek_exp.checkpoint.lightning_io import PREFIX, FolderCheckpointIO, begin
from deepseek_exp.checkpoint.shards import Piece, Whole, save_shard
from deepseek_exp.config import ModelConfig
from deepseek_exp.data import Tokenizer
from deepseek_exp.huggingface.read import Release, read_release
from deepseek_exp.huggingface.weights import load_release
from deepseek_exp.inference.pretrained import model_config
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SIZE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
MLA = {
    **SIZE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "q_lora_rank": 40,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "rms_norm_eps": 1e-6,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
V2 = {**MLA, "topk_method": "greedy"}
V3 = {**MLA, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0}
QWEN = {**SIZE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}
QWEN3_MOE = {
    **SIZE, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
}  # fmt: skip
NO_PAD = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZE),
    "llama_tied_llama3": ("llama", {**SIZE, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama_linear_wide_heads": ("llama", {**SIZE, "head_dim": 32, "rope_parameters": LINEAR, "rms_norm_eps": 1e-5}),
    "llama_yarn": ("llama", {**SIZE, "rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}}),
    "mistral_window": ("mistral", {**SIZE, "sliding_window": 9}),
    "mistral": ("mistral", {**SIZE, "sliding_window": None}),
    "qwen2": ("qwen2", {**SIZE, "tie_word_embeddings": True}),
    "qwen2_window": ("qwen2", QWEN),
    "qwen3": ("qwen3", {**SIZE, "head_dim": 24}),
    "mixtral": ("mixtral", {**SIZE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral_window": ("mixtral", {**SIZE, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 9}),
    "qwen3_moe": ("qwen3_moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3_moe_dense_window": (
        "qwen3_moe",
        {**QWEN3_MOE, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 9},
    ),
    "phi3": ("phi3", {**SIZE, **NO_PAD}),
    "phi3_window_tied": ("phi3", {**SIZE, **NO_PAD, "sliding_window": 9, "tie_word_embeddings": True}),
    "phi3_partial": ("phi3", {**SIZE, **NO_PAD, "partial_rotary_factor": 0.75}),
    "glm4": ("glm4", {**SIZE, **NO_PAD, "head_dim": 24}),
    "glm4_linear_no_bias": (
        "glm4",
        {
            **SIZE,
            **NO_PAD,
            "head_dim": 32,
            "attention_bias": False,
            "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.25},
        },
    ),
    "deepseek_v2": ("deepseek_v2", V2),
    "deepseek_v2_no_q_lora": ("deepseek_v2", {**V2, "q_lora_rank": None}),
    "deepseek_v2_groups_yarn": (
        "deepseek_v2",
        {**V2, **GROUPS, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek_v3": ("deepseek_v3", {**V3, "norm_topk_prob": True}),
    "deepseek_v3_no_q_lora": ("deepseek_v3", {**V3, "q_lora_rank": None, "norm_topk_prob": False}),
    "deepseek_v3_yarn": ("deepseek_v3", {**V3, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    "deepseek_v3_one_group_halves": ("deepseek_v3", {**V3, "n_group": 1, "topk_group": 1, "rope_interleave": False}),
    "deepseek_v3_dense_tied": ("deepseek_v3", {**V3, "first_k_dense_replace": 3, "tie_word_embeddings": True}),
}


def their_model(name: str, seed: int = 0) -> Any:
    """Build a model of transformers with random weights; every vector is random too."""
    family, fields = CASES[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **fields)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    return model


def load_ours(folder: Path) -> tuple[Transformer, ModelConfig, Release]:
    """Build our model from a Hugging Face folder."""
    release = read_release(folder)
    cfg = model_config(release.model)
    model = Transformer(cfg, TORCH)
    load_release(model, cfg, folder)
    return model.eval(), cfg, release


def some_tokenizer() -> Tokenizer:
    """Train a tokenizer of at most 300 entries."""
    return Tokenizer.train(["the cat sat on the mat, and that was that. " * 20], 300)


def write_checkpoint(model: Transformer, folder: Path) -> Path:
    """Write a checkpoint of ours as one process does, without an optimizer."""
    weights = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    FolderCheckpointIO(texts_of(model), "abcd").save_checkpoint({"state_dict": weights, "global_step": 1}, folder)
    return folder


def write_shards(model: Transformer, folder: Path, n_ranks: int = 2) -> Path:
    """Write the same as so many ranks of ZeRO would, each with its share of every parameter in fp32."""
    part = begin(folder)
    aliases = {"head.weight": "embedding.weight"} if model.cfg.tie_embeddings else {}
    weights = dict(model.named_parameters())
    whole = Whole(model.embedding.weight.dtype, [{"lr": 0.1, "param_names": list(weights)}], {"step": 1.0}, aliases)
    written: dict[str, Any] = {}
    for rank in range(n_ranks):
        pieces = []
        for name, weight in weights.items():
            first, last = (weight.numel() * r // n_ranks for r in (rank, rank + 1))
            row = weight.detach().float().flatten()[first:last]
            pieces.append(Piece(name, tuple(weight.shape), (), first, {"weight": row}))
        state = model.state_dict()
        buffers = {name: t for name, t in state.items() if name not in weights and name not in aliases}
        written |= save_shard(part, rank, pieces, buffers if rank == 0 else {})
    FolderCheckpointIO(texts_of(model), "abcd").finish(part, folder, {"global_step": 1}, whole, written)
    return folder


def texts_of(model: Transformer) -> dict[str, str]:
    """Return the texts of a checkpoint: the configuration and the tokenizer."""
    return {"config.yaml": yaml.safe_dump({"model": plain(asdict(model.cfg))}), "tokenizer.json": some_tokenizer().json}


def plain(tree: Any) -> Any:
    """Replace enums by their values."""
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    return tree.value if isinstance(tree, Enum) else tree
