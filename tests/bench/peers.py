"""What `training.py` runs beside ours: other programs' models in a bare loop, each at its best settings.

All have fp32 masters under bf16 weights, torch.optim.AdamW with fused=True, PyTorch's clipping over all tensors at
once, and attention by cuDNN where it can (on H200, in 2026-11: 516 TFLOP/s forward at heads of 128, against 298 of the
flash kernels). Compiled ones are compiled whole, as trainer.compile does it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepseek_exp.config import ExperimentConfig, ModelConfig
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer
from deepseek_exp.train.optim import MasterWeights, build_optimizer
from tests.bench.plain import Decoder

FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip


def plain(m: ModelConfig) -> nn.Module:
    """Build the plain decoder, with as many parameters as ours."""
    model = Decoder(m)
    with torch.device("meta"):
        ours = count(Transformer(m, TORCH))
    if count(model) != ours:
        raise ValueError(f"the plain decoder has {count(model):,} parameters, ours {ours:,}")
    return model


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def llama(m: ModelConfig) -> nn.Module:
    """Build transformers' Llama of the same sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    module, names = untouched_llama()
    vars(module).update(names)
    config = LlamaConfig(
        vocab_size=m.vocab_size, hidden_size=m.d_model, intermediate_size=m.d_ff, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, num_key_value_heads=m.n_kv_heads, head_dim=m.head_dim,
        max_position_embeddings=m.max_seq_len, rms_norm_eps=m.norm_eps, tie_word_embeddings=m.tie_embeddings,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)


@functools.cache
def untouched_llama() -> tuple[ModuleType, dict[str, Any]]:
    """Give the module of Llama and its names as they were at first: Liger puts its own there, for good."""
    from transformers.models.llama import modeling_llama

    return modeling_llama, dict(vars(modeling_llama))


def llama_with_liger(m: ModelConfig) -> nn.Module:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = llama(m)
    apply_liger_kernel_to_llama(model=model)
    return model


def with_fp8(make: Callable[[ModelConfig], nn.Module]) -> Callable[[ModelConfig], nn.Module]:
    """Let torchao compute the products of the blocks in fp8, one scale a tensor; the output table's stays as it is."""

    def converted(m: ModelConfig) -> nn.Module:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        def wanted(module: nn.Module, name: str) -> bool:
            return not name.endswith("head") and all(width % 16 == 0 for width in module.weight.shape)

        return convert_to_float8_training(
            make(m), module_filter_fn=wanted, config=Float8LinearConfig.from_recipe_name("tensorwise")
        )

    return converted


def deepseek_v2(experts: str) -> Callable[[ModelConfig], nn.Module]:
    """Make the builder of transformers' DeepSeek-V2 with the same experts; its attention is MLA."""

    def make(m: ModelConfig) -> nn.Module:
        from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

        config = DeepseekV2Config(
            vocab_size=m.vocab_size, hidden_size=m.d_model, intermediate_size=m.d_ff, num_hidden_layers=m.n_layers,
            num_attention_heads=m.n_heads, num_key_value_heads=m.n_heads, n_routed_experts=m.moe.n_routed_experts,
            num_experts_per_tok=m.moe.top_k, n_shared_experts=m.moe.n_shared_experts,
            moe_intermediate_size=m.moe.d_expert, first_k_dense_replace=m.moe.n_dense_layers, n_group=1, topk_group=1,
            topk_method="greedy", max_position_embeddings=m.max_seq_len, q_lora_rank=None,
        )  # fmt: skip
        config._experts_implementation = experts
        return DeepseekV2ForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)

    return make


Peer = tuple[Callable[[ModelConfig], nn.Module], bool]
PEERS: dict[str, dict[str, Peer]] = {
    "dense": {
        "plain PyTorch decoder, eager": (plain, False),
        "plain PyTorch decoder, compiled": (plain, True),
        "plain PyTorch decoder, torchao fp8, compiled": (with_fp8(plain), True),
        "transformers Llama, eager": (llama, False),
        "transformers Llama, compiled": (llama, True),
        "transformers Llama, torchao fp8, compiled": (with_fp8(llama), True),
        "transformers Llama + Liger, compiled": (llama_with_liger, True),
    },
    "moe": {
        "plain PyTorch MoE, eager": (plain, False),
        "plain PyTorch MoE, compiled": (plain, True),
        "transformers DeepSeek-V2, expert loop": (deepseek_v2("eager"), False),
        "transformers DeepSeek-V2, grouped_mm": (deepseek_v2("grouped_mm"), False),
        "transformers DeepSeek-V2, grouped_mm, compiled": (deepseek_v2("grouped_mm"), True),
    },
}


def peer(cfg: ExperimentConfig, laps: Any, make: Callable[[ModelConfig], nn.Module], compiled: bool) -> None:
    """Train in a bare loop; laps is what times steps, of training.py.

    Raises:
        ValueError: the optimizer is not what all rows have, or the first loss is not that of a new model.
    """
    laps.begin()
    device = laps.device
    with device:
        model = make(cfg.model).to(device).train()
    optimizer = build_optimizer(cfg.optim, model)
    check_optimizer(optimizer)
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    step = torch.compile(model) if compiled else model
    with sdpa_kernel(
        FASTEST_FIRST, set_priority=True
    ):  # a compiled model's choice is made when it is compiled, in here
        for tokens in random_tokens(cfg, laps.n_steps, device):
            for rows in tokens.split(cfg.trainer.micro_batch_seqs):
                loss = step(input_ids=rows, labels=rows, use_cache=False).loss  # they shift the labels themselves
                (loss * len(rows) / len(tokens)).backward()
            if cfg.optim.clip_norm:
                nn.utils.clip_grad_norm_(masters, cfg.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if not laps.done:
                check_first_loss(loss.item(), cfg.model.vocab_size)
            laps.ended()


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse anything but fused AdamW on fp32 masters."""
    inner = optimizer.inner if isinstance(optimizer, MasterWeights) else optimizer
    groups = inner.param_groups
    wide = all(p.dtype is torch.float32 for group in groups for p in group["params"])
    if not (isinstance(inner, torch.optim.AdamW) and wide and all(group["fused"] for group in groups)):
        raise ValueError(f"a peer's optimizer must be AdamW with fused=True on fp32 masters, not {inner}")


def check_first_loss(loss: float, vocab_size: int) -> None:
    """Refuse a model that is wrong: a new one knows nothing, so its loss is a little over log(vocab_size)."""
    if not abs(loss - math.log(vocab_size)) < 1:
        raise ValueError(
            f"a new model's loss is {loss:.2f}, must be near log {vocab_size} = {math.log(vocab_size):.2f}"
        )


def random_tokens(cfg: ExperimentConfig, n_steps: int, device: torch.device) -> Iterator[Tensor]:
    shape = cfg.trainer.global_batch_seqs, cfg.data.seq_len
    for _ in range(n_steps):
        yield torch.randint(0, cfg.model.vocab_size, shape, device=device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attention_order() -> list[str]:
    """Give the kernels of attention in the order in which PyTorch tries them when nobody sets one.

    On a GPU the order is settled by the first attention of a process. That comes here, before any peer sets its own, so
    that the one which is put back after a peer, and which ours runs with, is PyTorch's.
    """
    if torch.cuda.is_available():
        q = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device="cuda")
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with contextlib.suppress(AttributeError):  # no part of PyTorch's promised interface
        names = {int(backend): name for name, backend in SDPBackend.__members__.items()}
        return [names[number].removesuffix("_ATTENTION").lower() for number in torch._C._get_sdp_priority_order()]
    return ["not known"]
