"""Every family against transformers: same logits and gradients, and the same weights after the way there and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from deepseek_exp.huggingface import weights
from deepseek_exp.inference import export_hf
from deepseek_exp.kernels import TORCH, reference
from deepseek_exp.models import Transformer, init_weights
from tests.huggingface.releases import CASES, load_ours, some_tokenizer, their_model, transformers, write_checkpoint
from tests.models.looking import logits_ahead


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def some_tokens(batch=2, seq=48):
    return torch.randint(0, 300, (batch, seq), generator=torch.Generator().manual_seed(0))


def gradients_by_their_names(model, cfg, release) -> dict[str, torch.Tensor]:
    """Map our gradients through the table of names."""
    found, grads = {}, {name: p.grad for name, p in model.named_parameters()}
    for entry in weights.table(cfg, release.family, interleaved=release.interleaved):
        grad = grads.get(entry.ours)
        if grad is not None and not entry.copy:
            for i, name in enumerate(entry.theirs):
                part = grad[i] if entry.stacked else grad
                part = part if entry.order is None else weights.to_theirs(part, entry.order)
                found[name] = torch.cat([found[name], part]) if name in found else part
    return found


def gradients_by_saved_names(model, folder) -> dict[str, torch.Tensor]:
    """Give transformers' own gradients under the names that it saves weights with."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_same_logits_and_gradients(name, tmp_path, record_property):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, cfg, release = load_ours(tmp_path / "theirs")
    tokens = some_tokens()
    logits = [ours(tokens), theirs(tokens).logits]
    error = distance(*logits)
    assert error < 1e-5  # measured: 1.3e-6 at most
    for out in logits:
        reference.cross_entropy(out[:, :-1], tokens[:, 1:]).mean().backward()
    mine = gradients_by_their_names(ours, cfg, release)
    want = gradients_by_saved_names(theirs, tmp_path / "grads")
    want = {k: v for k, v in want.items() if not k.endswith("e_score_correction_bias")}
    assert set(mine) == set(want)
    errors = {k: distance(mine[k], want[k]) if want[k].any() else mine[k].norm().item() for k in want}
    worst = max(errors, key=errors.get)
    record_property("errors", (error, errors[worst]))
    assert errors[worst] < 1e-4, worst  # measured: 4.6e-6 at most


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_changes_no_bit(name, shards, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB" if shards else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == shards
    ours, cfg, _ = load_ours(tmp_path / "theirs")
    checkpoint = write_checkpoint(ours, tmp_path / "step-00000001")
    names = export_hf(cfg, checkpoint, tmp_path / "back", shard_bytes=40_000 if shards else 10**9)
    assert ("model.safetensors" not in names) == shards
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    family = {"mistral": "llama", "phi3": "llama", "phi3_window_tied": "mistral"}.get(name, CASES[name][0])
    assert back.config.model_type == family and back.dtype == torch.float32
    want = theirs.state_dict()
    if name == "deepseek_v3_one_group_halves":  # written with neighbouring pairs, as every other release
        assert back.config.rope_interleave
        want = {k: v for k, v in want.items() if not k.endswith(("q_b_proj.weight", "kv_a_proj_with_mqa.weight"))}
    if name.startswith("phi3") and family != "phi3":  # written with a tensor for each matrix
        want = {k: v for k, v in want.items() if not k.endswith(("qkv_proj.weight", "gate_up_proj.weight"))}
    else:
        assert set(back.state_dict()) == set(theirs.state_dict())
    assert all(torch.equal(back.state_dict()[k], v) for k, v in want.items())
    tokens = some_tokens()
    assert distance(back(tokens).logits, theirs(tokens).logits) < 2e-6
    again, cfg_again, _ = load_ours(tmp_path / "back")
    assert dataclasses.replace(cfg_again, version=cfg.version) == cfg
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


class TestLookingAhead:
    """DeepSeek-V3's modules for multi-token prediction, which transformers runs when it drafts tokens."""

    @pytest.fixture
    def with_two_modules(self, tmp_path):
        """A folder of ours with two modules, written for transformers, and the model."""
        their_model("deepseek_v3").save_pretrained(tmp_path / "theirs")
        _, cfg, _ = load_ours(tmp_path / "theirs")
        cfg = dataclasses.replace(cfg, n_mtp_layers=2, init_std=0.2)
        ours = Transformer(cfg, TORCH).eval()
        init_weights(ours, cfg, 0)
        with torch.no_grad():
            for p in ours.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
        export_hf(cfg, write_checkpoint(ours, tmp_path / "step-00000001"), tmp_path / "hf")
        return ours, tmp_path / "hf"

    def test_same_logits(self, with_two_modules, monkeypatch):
        from transformers.modeling_layers import MtpModel

        ours, folder = with_two_modules
        classes = transformers.models.deepseek_v3.modeling_deepseek_v3
        pattern = [r"model\.layers\.[34].*"]  # their class knows the released model's number of layers only
        monkeypatch.setattr(classes.DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", pattern)
        main = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        assert main.config.num_nextn_predict_layers == 2
        ahead = MtpModel.from_pretrained(main).eval()
        tokens = some_tokens(2, 33)
        with torch.no_grad():
            _, mine = logits_ahead(ours, tokens)
            h = main.model(tokens[:, :-1]).last_hidden_state
            for k, logits in enumerate(mine, start=1):
                positions = torch.arange(k, 32)[None]
                h = ahead.forward_layer(k - 1, h[:, : 32 - k], positions, None, input_ids=tokens[:, k:-1])
                assert distance(logits, main.lm_head(h)) < 1e-5, k

    def test_there_and_back(self, with_two_modules):
        ours, folder = with_two_modules
        again, cfg, _ = load_ours(folder)
        assert cfg.n_mtp_layers == 2
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))

    def test_none_where_the_weights_are_left_out(self, tmp_path):
        """Transformers saves a model without them and still says that there is one."""
        theirs = their_model("deepseek_v3")
        theirs.config.num_nextn_predict_layers = 1
        theirs.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
        assert load_ours(tmp_path)[1].n_mtp_layers == 0


def test_bf16_comes_back_bit_for_bit(tmp_path):
    """Weights of bf16 are held in fp32 here without a change; the router's bias stays fp32."""
    theirs = their_model("deepseek_v3").bfloat16()
    theirs.save_pretrained(tmp_path)
    ours, cfg, _ = load_ours(tmp_path)
    for p in ours.parameters():
        p.data = p.data.bfloat16()
    export_hf(cfg, write_checkpoint(ours, tmp_path / "step-00000001"), tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == torch.bfloat16
    assert all(torch.equal(back.state_dict()[k], v) for k, v in theirs.state_dict().items())


def test_a_tokenizer_of_ours_is_one_of_theirs(tmp_path):
    their_model("llama").save_pretrained(tmp_path / "theirs")
    ours, cfg, _ = load_ours(tmp_path / "theirs")
    export_hf(cfg, write_checkpoint(ours, tmp_path / "step-00000001"), tmp_path / "hf")
    theirs, mine = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), some_tokenizer()
    text = "the mat, dont  ü\n <|endoftext|"
    assert theirs(text)["input_ids"] == mine.encode(text)
    assert theirs.eos_token_id == mine.end_id and theirs.decode(mine.encode(text)) == text
