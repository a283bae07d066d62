"""A domain's experts can be saved, unloaded and loaded, and nobody else notices."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_exp.adapt import Adapters
from deepseek_exp.errors import UserError
from deepseek_exp.inference import from_pretrained, generate
from deepseek_exp.inference.domain_packs import load_module, save_module, unload_module
from deepseek_exp.inference.pretrained import Pretrained
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed
from tests.huggingface.releases import write_checkpoint, write_shards
from tests.runs import ROOT

DOMAINS = ["general", "finance", "medical", "law"]


def build(*overrides: str, seed: int = 0) -> Transformer:
    cfg = composed("model=v5_domain_moe", "size=tiny", *overrides).model
    model = Transformer(cfg, TORCH)
    init_weights(model, cfg, seed)
    with torch.no_grad():
        for layer in model.routed_layers():
            layer.router.bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def logits(model, domain: str) -> torch.Tensor:
    tokens = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(tokens, domain=torch.full((2,), DOMAINS.index(domain)))


@pytest.mark.parametrize("domain", DOMAINS[1:])
def test_the_others_do_not_notice(domain, tmp_path):
    model = build()
    before = {name: logits(model, name) for name in DOMAINS}
    save_module(model, domain, tmp_path / "pack.safetensors")
    unload_module(model, domain)
    for name in DOMAINS:
        assert torch.equal(logits(model, name), before[name]) is (name != domain)
    assert load_module(model, tmp_path / "pack.safetensors") == domain
    for name in DOMAINS:
        assert torch.equal(logits(model, name), before[name])


def test_several_packs_in_any_order(tmp_path):
    model = build()
    before = {name: logits(model, name) for name in DOMAINS}
    for name in DOMAINS[1:]:
        save_module(model, name, tmp_path / name)
    for name in ("medical", "finance", "law"):
        unload_module(model, name)
    assert torch.equal(logits(model, "general"), before["general"])
    assert sum(p.numel() for p in model.routed_layers()[0].experts.parameters()) == 2 * 3 * 64 * 16
    for name in ("law", "finance", "medical"):
        load_module(model, tmp_path / name)
    for name in DOMAINS:
        assert torch.equal(logits(model, name), before[name])


def test_a_pack_of_another_training_replaces_that_domain_alone(tmp_path):
    model, other = build(), build(seed=1)
    before = {name: logits(model, name) for name in DOMAINS}
    save_module(other, "law", tmp_path / "law")
    unload_module(model, "law")
    load_module(model, tmp_path / "law", check_model=False)
    for name in DOMAINS:
        assert torch.equal(logits(model, name), before[name]) is (name != "law")
    layer, source = model.routed_layers()[0], other.routed_layers()[0]
    for key, tensor in layer.domain_state(3).items():
        assert torch.equal(tensor, source.domain_state(3)[key])


def test_a_pack_belongs_to_the_model_it_was_saved_from(tmp_path):
    model, other = build(), build(seed=1)
    save_module(other, "law", tmp_path / "law")
    save_module(model.bfloat16(), "law", tmp_path / "own")  # the same weights in another type
    model = build()
    unload_module(model, "law")
    before = logits(model, "law")
    with pytest.raises(UserError, match=r"pack='.*law' was saved from a model whose shared weights are others"):
        load_module(model, tmp_path / "law")
    tensors = load_file(tmp_path / "own")
    save_file(tensors, tmp_path / "old", metadata={"domain": "law", "version": "v5_domain_moe"})
    with pytest.raises(UserError, match=r"pack='.*old' does not record the model .*check_model=False"):
        load_module(model, tmp_path / "old")
    assert torch.equal(logits(model, "law"), before)
    load_module(model, tmp_path / "own")
    assert not torch.equal(logits(model, "law"), before)


def test_a_domain_that_was_trained_on_alone_still_fits(tmp_path):
    model, trained = build(), build()
    with torch.no_grad():
        for layer in trained.routed_layers():
            for tensor in layer.domain_state(3).values():
                tensor.add_(0.1)
    save_module(trained, "law", tmp_path / "law")
    unload_module(model, "law")
    load_module(model, tmp_path / "law")
    assert torch.equal(logits(model, "law"), logits(trained, "law"))


def test_errors(tmp_path):
    model = build()
    with pytest.raises(UserError, match="domain='general' is open to every token"):
        unload_module(model, "general")
    with pytest.raises(UserError, match=r"domain='sports' is not a domain of this model \(general, finance"):
        unload_module(model, "sports")
    save_module(model, "law", tmp_path / "law")
    with pytest.raises(UserError, match="domain='law' is loaded already"):
        load_module(model, tmp_path / "law")
    unload_module(model, "law")
    with pytest.raises(UserError, match="domain='law' is not loaded"):
        unload_module(model, "law")
    wide = build("model.moe.d_expert=24")
    save_module(wide, "finance", tmp_path / "wide")
    unload_module(model, "finance")
    before = logits(model, "medical")
    with pytest.raises(UserError, match=r"does not fit the model: blocks.0.feed_forward.experts.w_down"):
        load_module(model, tmp_path / "wide")
    assert torch.equal(logits(model, "medical"), before)
    with pytest.raises(UserError, match="it has none"):
        unload_module(Transformer(composed("size=tiny").model, TORCH), "law")


def test_a_pack_is_whole_or_as_it_was_before(tmp_path, monkeypatch):
    model, path = build(), tmp_path / "law"
    save_module(model, "law", path)
    before = path.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("deepseek_exp.inference.domain_packs.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_module(model, "law", path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_a_file_that_is_no_pack(tmp_path):
    model = build()
    (tmp_path / "text").write_text("no pack, whatever its name says")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    for name in ("nothing", "text", "weights"):
        with pytest.raises(UserError, match=rf"pack='.*{name}' is no pack .*Fix: name a file that save_module wrote"):
            load_module(model, tmp_path / name)


@pytest.mark.long
def test_resident_memory_follows(tmp_path):
    """In a fresh process, so that no memory freed earlier is handed out again."""
    script = f"""
import gc, os, sys, torch
from pathlib import Path
from tests.inference.test_domain_packs import build, unload_module, load_module, save_module

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

model = build("model.d_model=512", "model.moe.d_expert=1024", "model.moe.n_routed_experts=16")
save_module(model, "law", r"{tmp_path / "law"}")
size = Path(r"{tmp_path / "law"}").stat().st_size
unload_module(model, "law"); load_module(model, r"{tmp_path / "law"}")  # warm up
whole = resident()
unload_module(model, "law")
without = resident()
load_module(model, r"{tmp_path / "law"}")
print(size, whole - without, resident() - without)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    size, freed, taken = map(int, done.stdout.split())
    assert size > 40e6
    assert freed == pytest.approx(size, rel=0.1)
    assert taken == pytest.approx(size, rel=0.1)


def test_generation_of_a_domain(tmp_path):
    model = build()
    with torch.no_grad():
        for layer in model.routed_layers():
            layer.experts.w_down.mul_(50)  # so that the experts decide
    wanted = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0, "end_id": 0}
    texts = [generate(model, [5, 6, 7], domain=d, **wanted) for d in range(4)]
    assert len({tuple(t) for t in texts}) > 1
    for domain, text in enumerate(texts):  # each token is the likeliest one for that label
        tokens = torch.tensor([[5, 6, 7, *text]])
        with torch.no_grad():
            best = model(tokens, domain=torch.tensor([domain]))[0].argmax(-1)
        assert best[2:-1].tolist() == text
    lm = Pretrained(model, tokenizer=None, folder=tmp_path, adapters=Adapters(model))
    lm.save_module("law", tmp_path / "law")
    lm.unload_module("law")
    with pytest.raises(UserError, match="domain='law' is not loaded"):
        lm.generate("a", domain="law")
    assert lm.load_module(tmp_path / "law") == "law"


@pytest.fixture(params=[write_checkpoint, write_shards])
def checkpoint(request, tmp_path):
    """A checkpoint folder of a model with domains, of one process and of two ranks."""
    return request.param(build(), tmp_path / "checkpoints" / "step-00000001")


def test_only_the_wanted_domains_are_read(checkpoint):
    whole, part = from_pretrained(checkpoint), from_pretrained(checkpoint, domains=["law"])
    assert part.model.routed_layers()[0].router.loaded.tolist() == [True, False, False, True]
    assert len(part.model.routed_layers()[0].experts.w_up) == 4
    for domain in ("general", "law"):
        assert torch.equal(logits(part.model, domain), logits(whole.model, domain))
    assert part.load_module("medical") == "medical"  # by name, from the checkpoint it came from
    assert torch.equal(logits(part.model, "medical"), logits(whole.model, "medical"))
    with pytest.raises(UserError, match="domain='finance' is not loaded"):
        part.generate("a", domain="finance")
    with pytest.raises(UserError, match="domain='sports' is not a domain"):
        from_pretrained(checkpoint, domains=["sports"])


def test_a_saved_configuration_is_text(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "hunter2")
    model = build()
    model.cfg = dataclasses.replace(model.cfg, version="${oc.env:SOME_SECRET}")
    folder = write_checkpoint(model, tmp_path / "checkpoints" / "step-00000001")
    assert from_pretrained(folder).model.cfg.version == "${oc.env:SOME_SECRET}"


def test_a_budget_of_memory_is_kept(checkpoint):
    lm = from_pretrained(checkpoint, domains=[])
    before = logits(lm.model, "law")
    with pytest.raises(
        UserError, match=r"domain='law' would need [\d,]+ bytes of memory and max_resident_bytes is 1,000"
    ):
        lm.load_module("law", max_resident_bytes=1000)
    assert torch.equal(logits(lm.model, "law"), before)
    assert lm.load_module("law", max_resident_bytes=8 * 2**30) == "law"
    assert not torch.equal(logits(lm.model, "law"), before)
