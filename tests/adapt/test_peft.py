"""peft's files, both ways, against peft on transformers' own models."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from deepseek_exp import adapt
from deepseek_exp.errors import CheckpointError, ConfigError
from deepseek_exp.huggingface.adapters import CONFIG, Pair, read_peft, write_peft
from deepseek_exp.huggingface.read import read_release
from deepseek_exp.inference import from_pretrained
from tests.huggingface.releases import model_config, some_tokenizer, their_model

TOKENS = torch.arange(40).view(2, 20) * 7 % 300
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
CASES = {"llama": [*LINEARS, "embed_tokens", "lm_head"], "qwen3": LINEARS, "deepseek_v3": MLA}


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "base", tmp_path / "adapter"


def saved(case, folder):
    """Save a random model of transformers, with a tokenizer, and return it."""
    model = their_model(case)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(some_tokenizer().json)
    return model


def random_pairs(shapes, rank=4):
    draws = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in shapes.items():
        a, b = torch.randn(rank, shape[1], generator=draws), torch.randn(shape[0], rank, generator=draws)
        found[name] = Pair(a * 0.1, b * 0.1)
    return found


@pytest.mark.long
@pytest.mark.parametrize("case", [*CASES, "glm4", "llama_tied_llama3"])
def test_what_peft_has_trained_is_loaded(folders, case):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, adapter = saved(case, folders[0]), folders[1]
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=12, target_modules=CASES.get(case, LINEARS[:4]))
    )
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(adapter)
    ours = from_pretrained(folders[0])
    before = ours.model(TOKENS)
    ours.load_adapter(adapter, "theirs")
    ours.set_adapter("theirs")
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
    assert (ours.model(TOKENS) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (before - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_exported(folders, case):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, adapter = saved(case, folders[0]), folders[1]
    m = model_config(read_release(folders[0]).model)
    wanted_names = ["wq", "wq_b", "wkv_a", "wkv_b", "wo", "embedding"]
    wanted_names += [] if m.moe.n_routed_experts else ["w_gate", "w_down"]
    shapes = {
        name: tuple(p.shape)
        for name, p in from_pretrained(folders[0]).model.named_parameters()
        if name.removesuffix(".weight").rpartition(".")[2] in wanted_names and p.ndim == 2 and ".shared." not in name
    }
    pairs = random_pairs(shapes)
    adapter.mkdir()
    write_peft(m, pairs, 4, 12.0, adapter, str(folders[0]))
    ours = from_pretrained(folders[0])
    ours.adapters.add("ours", {name: adapt.Adapter(*pair) for name, pair in pairs.items()}, 3.0)
    ours.set_adapter("ours")
    theirs = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        wanted = theirs(TOKENS).logits
    assert (ours.model(TOKENS) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_round_trip_and_what_is_refused(folders):
    folder, adapter = folders
    saved("deepseek_v3", folder)
    m = model_config(read_release(folder).model)
    model = from_pretrained(folder).model
    names = [n for n in dict(model.named_parameters()) if ".attention.w" in n] + ["embedding.weight", "head.weight"]
    pairs = random_pairs({n: tuple(dict(model.named_parameters())[n].shape) for n in names})
    adapter.mkdir()
    write_peft(m, pairs, 4, 12.0, adapter, None)
    found, rank, alpha = read_peft(m, adapter, "lora.path")
    assert (rank, alpha) == (4, 12.0) and found.keys() == pairs.keys()
    assert all(torch.equal(found[n].a, pairs[n].a) and torch.equal(found[n].b, pairs[n].b) for n in names)
    values = json.loads((adapter / CONFIG).read_text())
    for change in (
        {"use_dora": True},
        {"rank_pattern": {"x": 2}},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"use_bdlora": {"nblocks": 2}},
    ):
        (adapter / CONFIG).write_text(json.dumps(values | change))
        with pytest.raises(ConfigError, match=f"{next(iter(change))}=.*asks for more than low-rank adapters"):
            read_peft(m, adapter, "lora.path")
    (adapter / CONFIG).write_text(json.dumps(values | {"init_lora_weights": "gaussian"}))
    assert read_peft(m, adapter, "lora.path")[0].keys() == pairs.keys()
    tied = dataclasses.replace(m, tie_embeddings=True)  # peft adapts the embedding alone, and ours the one table
    with pytest.raises(CheckpointError, match=r"has base_model.model.lm_head.*, one of \d+ tensors for which"):
        read_peft(tied, adapter, "lora.path")
    with pytest.raises(ConfigError, match=r"no place for adapters of embedding.weight.*lora.exclude=\['embedding'\]"):
        write_peft(tied, {"embedding.weight": pairs["embedding.weight"]}, 4, 12.0, adapter, None)
    fewer = model_config({**read_release(folder).model, "n_layers": 2})
    with pytest.raises(CheckpointError, match=r"has base_model.model.model.layers.2.* for which .* has no matrix"):
        read_peft(fewer, adapter, "lora.path")
    with pytest.raises(
        ConfigError, match=r"export.format='peft' has no place for adapters of blocks.1.feed_forward.ex"
    ):
        write_peft(m, {"blocks.1.feed_forward.experts.w_up": pairs[names[0]]}, 4, 12.0, adapter, None)
