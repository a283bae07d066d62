"""Several adapters in one model: each request gets the one that it asks for."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrize

from deepseek_exp import adapt
from deepseek_exp.adapt import files
from deepseek_exp.errors import CheckpointError, UserError
from deepseek_exp.inference import generate
from tests.adapt.adapters import SCALE, attached, base, experiment, some_tokens


def adapters_of(model):
    found = dict(model.named_parameters())
    names = [name.removesuffix(".lora_a") for name in found if name.endswith(".lora_a")]
    return {n: adapt.Adapter(found[f"{n}.lora_a"].detach(), found[f"{n}.lora_b"].detach()) for n in names}


def greedy(model, prompt):
    return generate(model, prompt, max_new_tokens=4, temperature=0.0, top_p=1.0, seed=0, end_id=-1)


def test_each_request_gets_its_adapter():
    wide, narrow = experiment("v3_moe"), experiment("v3_moe", "lora.targets=[*.attention.*,head]")
    models = {"wide": attached(wide).eval(), "narrow": attached(narrow, b_std=0.3).eval()}
    model, tokens = base(wide).eval(), some_tokens(wide)
    plain = model(tokens)
    adapters = adapt.Adapters(model)
    for name, other in models.items():
        adapters.add(name, adapters_of(other), SCALE)
    assert adapters.names == ["wide", "narrow"] and torch.equal(model(tokens), plain)
    for name in ("wide", "narrow", "wide"):
        adapters.use(name)
        wanted = models[name](tokens)
        assert torch.equal(model(tokens), wanted) and not torch.equal(wanted, plain)
        prompt = tokens[0].tolist()
        with parametrize.cached():
            found = greedy(model, prompt)
        assert found == greedy(models[name], prompt)
    adapters.remove("wide")
    assert adapters.active is None and torch.equal(model(tokens), plain)
    with pytest.raises(UserError, match=r"adapter='wide' is not loaded \(loaded: narrow\)"):
        adapters.use("wide")


def test_an_adapter_of_another_model_is_refused_before_anything_changes():
    model = base(experiment("v1_dense"))
    adapters = adapt.Adapters(model)
    for other in (experiment("v3_moe"), experiment("v1_dense", "model.d_ff=64")):
        with pytest.raises(UserError, match="which this model does not have"):
            adapters.add("other", adapters_of(attached(other)), SCALE)
    assert adapters.names == [] and not any(parametrize.is_parametrized(m) for m in model.modules())


def test_files_of_an_adapter(tmp_path):
    exp = experiment("v3_moe")
    wanted = adapters_of(attached(exp))
    files.write_adapter(tmp_path, wanted, 4, 8.0, "v3_moe")
    found, rank, alpha = files.read_adapter(tmp_path, "lora.path")
    assert (rank, alpha) == (4, 8.0) and found.keys() == wanted.keys()
    assert all(torch.equal(found[n].a, wanted[n].a) and torch.equal(found[n].b, wanted[n].b) for n in wanted)
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    n_bytes = sum(4 * (a.numel() + b.numel()) for a, b in wanted.values())
    assert n_bytes < size < 1.2 * n_bytes + 2000
    (tmp_path / files.WEIGHTS).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="holds no adapter that can be read"):
        files.read_adapter(tmp_path, "lora.path")
