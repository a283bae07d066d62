"""The v1 decoder: against transformers' Llama, its segment memory, its initialisation, and its layer list."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from deepseek_exp.config import ActivationCheckpointing
from deepseek_exp.kernels import TORCH, reference
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed
from tests.models.looking import segment_logits

TINY = composed("size=tiny").model


def build(dtype=torch.float32, seed=0, ops=TORCH, checkpointing=ActivationCheckpointing.none, **changes) -> Transformer:
    cfg = dataclasses.replace(TINY, **changes)
    model = Transformer(cfg, ops, checkpointing).to(dtype)
    init_weights(model, cfg, seed)
    return model


def some_tokens(batch=2, seq=48, seed=0):
    return torch.randint(0, TINY.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def distance(a, b) -> float:
    """Relative distance |a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def with_strong_gates(model: Transformer) -> Transformer:
    """Gates start at 0, where they do nothing: give them values."""
    for i, block in enumerate(model.blocks):
        torch.nn.init.normal_(block.attention.gate, std=2.0, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers_llama_where_they_meet(tied):
    """Without window and global tokens v1 is Llama: same logits and gradients from the same weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = build(torch.float64, window=0, n_global_tokens=0, tie_embeddings=tied, init_std=0.2)
    cfg = ours.cfg
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_ff,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads,
            head_dim=cfg.head_dim,
            max_position_embeddings=cfg.max_seq_len,
            rms_norm_eps=cfg.norm_eps,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            attn_implementation="eager",
        )
    ).double()
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "head.norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.w": "self_attn.",
        "feed_forward.w_": "mlp.",
        "blocks.": "model.layers.",
    }

    def their_name(name: str) -> str:
        for a, b in names.items():
            name = name.replace(a, b)
        if "self_attn" in name or "mlp" in name:
            name = name.replace(".weight", "_proj.weight")
        return name

    theirs.load_state_dict({their_name(k): v for k, v in ours.state_dict().items()})
    tokens = some_tokens()
    logits = [ours(tokens), theirs(tokens).logits]
    assert distance(*logits) < 1e-6  # their angles are computed in fp32, ours are rounded once from fp64
    for out in logits:
        reference.cross_entropy(out[:, :-1], tokens[:, 1:]).mean().backward()
    their_grads = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert distance(p.grad, their_grads[their_name(name)].grad) < 1e-5, name


def test_layers_are_the_whole_model():
    model, tokens = build(), some_tokens()
    x = tokens
    for layer in model.layers():
        x = layer(x)
    assert torch.equal(x, model(tokens))
    assert len(model.layers()) == TINY.n_layers + 2


def test_no_token_sees_a_later_one():
    model, tokens = with_strong_gates(build()), some_tokens(1)
    changed = tokens.clone()
    changed[:, 30:] += 1
    before, after = model(tokens), model(changed % TINY.vocab_size)
    assert torch.equal(before[:, :30], after[:, :30]) and not torch.equal(before[:, 30:], after[:, 30:])


def test_reach_is_the_window_and_the_global_tokens():
    """With one block, the last token's logits depend on exactly the tokens that the mask names."""
    model = with_strong_gates(build(n_layers=1, window=5, n_global_tokens=2))
    tokens = some_tokens(1, 20)
    base, seen = model(tokens)[0, -1], []
    for position in range(20):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % TINY.vocab_size
        if not torch.equal(model(changed)[0, -1], base):
            seen.append(position)
    assert seen == [0, 1, 15, 16, 17, 18, 19]


class TestSegmentMemory:
    def segments(self, model, tokens, length):
        memory, out = model.empty_memory(len(tokens)), []
        for start in range(0, tokens.shape[1] - 1, length):
            logits, _, memory = segment_logits(model, tokens[:, start : start + length + 1], memory)
            out.append(logits)
        return torch.cat(out, dim=1), memory

    def test_long_enough_memory_is_one_long_pass(self):
        """A memory of window - 1 tokens holds all that any query can see, block by block."""
        model = build(torch.float64, memory_len=7, window=8, n_global_tokens=0, init_std=0.2)
        tokens = some_tokens(2, 49)
        out, memory = self.segments(model, tokens, 12)
        torch.testing.assert_close(out, model(tokens[:, :-1]), rtol=1e-5, atol=1e-6)
        assert memory.shape == (TINY.n_layers, 2, 7, TINY.d_model)

    def test_a_memory_too_short_is_not(self):
        model = build(torch.float64, memory_len=3, window=8, n_global_tokens=0, init_std=0.2)
        tokens = some_tokens(2, 49)
        out, _ = self.segments(model, tokens, 12)
        assert not torch.allclose(out, model(tokens[:, :-1]), atol=1e-3)

    def test_equals_naive_attention_over_concatenated_states(self):
        """Against the definition: the block run on memory and segment as one sequence, its last part kept."""
        model = with_strong_gates(build(torch.float64, memory_len=10, window=6, n_global_tokens=2))
        block = model.blocks[0]
        memory, x = (
            torch.randn(2, 10, TINY.d_model, dtype=torch.float64),
            torch.randn(2, 12, TINY.d_model, dtype=torch.float64),
        )
        out = block(x, memory)
        naive = copy.deepcopy(block)
        naive.attention.ops = dataclasses.replace(TORCH, local_global_attention=self._naive)
        want = naive(torch.cat([memory, x], dim=1))[:, 10:]
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)

    @staticmethod
    def _naive(q, k, v, gate, scale, n_memory, window, n_global_tokens, document):
        """All 22 positions as queries; the global tokens are the segment's first, at 10 and 11."""
        assert (q.shape[2], n_memory, window, n_global_tokens) == (22, 0, 6, 2)
        return reference.local_global_attention(q, k, v, gate, scale, 10, 6, 2)

    def test_no_gradient_flows_through_memory(self):
        model = build(memory_len=8)
        _, _, memory = model.segment_losses(some_tokens(2, 13), model.empty_memory(2))
        assert not memory.requires_grad


class TestInitialisation:
    def test_depends_on_seed_and_name_alone(self):
        a, b, c = build(seed=1), build(seed=1), build(seed=2)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert not torch.equal(a.embedding.weight, c.embedding.weight)
        deeper = build(seed=1, n_layers=3)
        assert torch.equal(a.blocks[1].attention.wq.weight, deeper.blocks[1].attention.wq.weight)

    def test_deviations(self):
        model = build(d_ff=2048, init_std=0.02)
        block = model.blocks[0]
        assert block.feed_forward.w_up.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert block.feed_forward.w_down.weight.std().item() == pytest.approx(0.02 / 2, rel=0.02)  # sqrt(2 * 2 layers)
        assert torch.all(block.attention_norm.weight == 1) and torch.all(block.attention.gate == 0)

    def test_sets_every_parameter(self):
        cfg = dataclasses.replace(TINY, tie_embeddings=False)
        model = Transformer(cfg, TORCH)
        for p in model.parameters():
            torch.nn.init.constant_(p, float("nan"))
        init_weights(model, cfg, 0)
        assert not any(p.isnan().any() for p in model.parameters())


def test_recomputing_blocks_keeps_fewer_activations():
    stored = []
    for checkpointing in (ActivationCheckpointing.none, ActivationCheckpointing.full):
        kept = 0

        def pack(t):
            nonlocal kept
            kept += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            build(checkpointing=checkpointing)(some_tokens(4, 64))
        stored.append(kept)
    assert stored[1] < stored[0] / 2
