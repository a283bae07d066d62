"""Sharded checkpoints: saved under one layout, read under any other or by one process, and whole at every moment."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO, begin, in_one_file, load_weights
from deepseek_exp.checkpoint.manifest import MODEL
from deepseek_exp.checkpoint.shards import Cut, Piece, Whole, box_of, open_state, save_shard, shard_name
from deepseek_exp.checkpoint.tensors import write_tensors
from deepseek_exp.errors import CheckpointError
from deepseek_exp.models import Transformer
from deepseek_exp.train.optim import build_optimizer
from tests import forks, runs
from tests.checkpoint.test_lightning_io import assert_equal
from tests.config.test_config import composed
from tests.models.test_transformer import build, some_tokens

WHOLE = Whole(torch.float32, [{"lr": 0.1, "betas": (0.9, 0.95), "param_names": []}], {"step": 7.0}, {})
CHECKPOINT = {"global_step": 7, "val_loss": 1.5, "rng": torch.get_rng_state(), "loops": {"a": (1, None)}}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How ranks share a model: stages x data ranks (of which every ep hold all experts) x tensor ranks."""

    pp: int
    dp: int
    ep: int
    tp: int

    @classmethod
    def any(cls, rng):
        dp = rng.choice([1, 2, 4])
        return cls(rng.choice([1, 2, 3]), dp, rng.choice([n for n in (1, 2, 4) if n <= dp]), rng.choice([1, 2, 4]))

    def rank(self, stage, data, tensor):
        return (stage * self.dp + data) * self.tp + tensor

    def local(self, dims):
        """List the different local tensors of a parameter cut along `dims` = (by experts, by tensor): cuts, holders."""
        expert, tensor = dims
        for e in range(self.ep if expert is not None else 1):
            holders = [d for d in range(self.dp) if expert is None or d % self.ep == e]
            for t in range(self.tp if tensor is not None else 1):
                of_expert = () if expert is None else (Cut(expert, self.ep, e),)
                yield of_expert + (() if tensor is None else (Cut(tensor, self.tp, t),)), holders, t


def part(tensor, cuts):
    return tensor[tuple(slice(*ends) for ends in box_of(tensor.shape, cuts))]


def some_parameters(rng):
    """Random parameters of several shapes: name -> ({kind: tensor}, dims)."""
    found = {}
    for i in range(rng.randint(1, 6)):
        a, b, c = (4 * rng.randint(1, 4) for _ in range(3))
        odd = rng.randint(1, 9)
        shape, dims = rng.choice(
            [
                ((a, b), (None, 0)),
                ((b, a), (None, 1)),
                ((odd, a), (None, 1)),
                ((odd, odd + 1), (None, None)),
                ((odd,), (None, None)),
                ((a,), (None, 0)),
                ((), (None, None)),
                ((a, b, c), (0, 1)),
                ((a, odd, c), (0, 2)),
                ((16 * odd, a), (0, 0)),
            ]
        )
        kinds = {
            "weight": torch.randn(shape),
            "exp_avg": torch.randn(shape),
            "exp_avg_sq": torch.rand(shape).bfloat16(),
        }
        found[f"blocks.{i}.w"] = kinds, dims
    return found


def pieces_of(parameters, layout, rng):
    """Share parameters out: rank -> pieces, with partitions at random places, empty ones too."""
    ranks = {rank: [] for rank in range(layout.pp * layout.dp * layout.tp)}
    for name, (kinds, dims) in parameters.items():
        stage = rng.randrange(layout.pp)
        for cuts, holders, t in layout.local(dims):
            rows = {kind: part(tensor, cuts).flatten() for kind, tensor in kinds.items()}
            n = rows["weight"].numel()
            ends = [0, *sorted(rng.randint(0, n) for _ in holders[1:]), n]
            for d, start, stop in zip(holders, ends, ends[1:], strict=False):
                values = {kind: row[start:stop] for kind, row in rows.items()}
                piece = Piece(name, tuple(kinds["weight"].shape), cuts, start, values)
                ranks[layout.rank(stage, d, t)].append(piece)
    return ranks


def save(target, ranks, whole=WHOLE, buffers=None, checkpoint=CHECKPOINT, texts=None):
    folder, records = begin(target), {}
    for rank, pieces in ranks.items():
        records |= save_shard(folder, rank, pieces, buffers or {} if rank == len(ranks) - 1 else {})
    FolderCheckpointIO(texts or {}, "abcdef0123").finish(folder, target, checkpoint, whole, records)
    return target


def place(run_dir, step=7):
    return run_dir / manifest.FOLDER / manifest.checkpoint_name(step)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("seed", range(12))
def test_any_layout_reads_what_another_saved(tmp_path, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    parameters, before, after = some_parameters(rng), Layout.any(rng), Layout.any(rng)
    state = open_state(save(place(tmp_path), pieces_of(parameters, before, rng)))
    assert set(state.names) == set(parameters)
    for name, (kinds, dims) in parameters.items():
        assert state.kinds(name) == list(kinds) and state.shape(name) == kinds["weight"].shape
        for kind, tensor in kinds.items():
            assert same(state.read(name, kind), tensor)
            for cuts, _, _ in after.local(dims):
                assert same(state.read(name, kind, cuts), part(tensor, cuts).contiguous())


def test_the_rest_comes_back(tmp_path):
    parameters = {"blocks.0.w": ({"weight": torch.randn(4, 4)}, (None, 0))}
    groups = [{"lr": 0.1, "betas": (0.9, 0.95), "decays": True, "param_names": ["blocks.0.w"]}]
    whole = dataclasses.replace(WHOLE, param_groups=groups, aliases={"head.weight": "blocks.0.w"})
    bias = torch.randn(8)
    path = save(place(tmp_path), pieces_of(parameters, Layout(2, 2, 1, 2), random.Random(0)), whole, {"bias": bias})
    state = open_state(path)
    assert_equal(state.rest, CHECKPOINT)
    assert_equal(state.param_groups, groups)
    assert state.optimizer_step == 7 and state.buffers == ["bias"] and same(state.buffer("bias"), bias)
    cut = (Cut(1, 2, 1),)
    assert same(state.read("head.weight", "weight", cut), state.read("blocks.0.w", "weight", cut))
    assert state.shape("head.weight") == (4, 4) and state.kinds("head.weight") == ["weight"]
    loaded = load_weights(path)
    assert loaded["head.weight"] is loaded["blocks.0.w"] and set(loaded) == {"head.weight", "blocks.0.w", "bias"}
    assert manifest.verify(path).step == 7


def test_only_what_overlaps_is_read(tmp_path, monkeypatch):
    weight = torch.arange(64.0).view(16, 4)
    path = save(place(tmp_path), pieces_of({"w": ({"weight": weight}, (None, 0))}, Layout(1, 1, 1, 4), random.Random()))
    state, read = open_state(path), []

    class Watched:
        def __init__(self, file):
            self.file = file

        def __getitem__(self, index):
            read.append(index.stop - index.start)
            return self.file[index]

    parts = state._stored["w"]["weight"]
    kept = parts[0].dtype
    monkeypatch.setattr(type(parts[0]), "dtype", kept)
    state._stored["w"]["weight"] = [dataclasses.replace(p, file=Watched(p.file)) for p in parts]
    assert same(state.read("w", "weight", (Cut(0, 8, 3),)), weight[6:8])
    assert read == [8]


def train(dtype, **changes):
    """Give a small model that has been trained for three steps, and its optimizer."""
    model = build(dtype, **changes)
    optimizer = build_optimizer(composed("size=tiny").optim, model)
    for step in range(3):
        tokens = some_tokens(seed=step)
        torch.nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def lightning(model, optimizer):
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {**CHECKPOINT, "state_dict": weights, "optimizer_states": [optimizer.state_dict()]}


def of_state(state, rng):
    """Take a checkpoint's parameters for `pieces_of`, with dimensions to cut that 4 divides."""
    found = {}
    for name in state.names:
        kinds = {kind: state.read(name, kind) for kind in state.kinds(name)}
        even = [i for i, n in enumerate(state.shape(name)) if n % 4 == 0]
        expert = 0 if "experts" in name else None
        found[name] = kinds, (expert, rng.choice([None, *(i for i in even if i != expert)]))
    return found


V3 = composed("size=tiny", "model=v3_moe").model
MODELS = {"dense, tied": {}, "experts": {f.name: getattr(V3, f.name) for f in dataclasses.fields(V3)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_one_process_to_shards_and_back(tmp_path, dtype, changes):
    rng = random.Random(0)
    model, optimizer = train(dtype, **changes)
    io, first, second = FolderCheckpointIO({}, "abcdef"), place(tmp_path / "a"), place(tmp_path / "b")
    io.save_checkpoint(lightning(model, optimizer), first)
    one = open_state(first)
    assert one.dtype is dtype and one.optimizer_step == 3
    assert {one.read(name, "weight").dtype for name in one.names} == {torch.float32}
    whole = Whole(one.dtype, one.param_groups, one.scalars, one.aliases)
    ranks = pieces_of(of_state(one, rng), Layout(2, 4, 2, 2), rng)
    save(second, ranks, whole, {name: one.buffer(name) for name in one.buffers}, one.rest)
    want, got = io.load_checkpoint(first), io.load_checkpoint(second)
    assert set(got) == set(want) and set(got["state_dict"]) == set(want["state_dict"])
    for key in ("state_dict", *CHECKPOINT):
        assert_equal(in_order(got[key]), in_order(want[key]))
    assert_equal(in_order(got["optimizer_states"]), in_order(want["optimizer_states"]))
    assert_equal(in_order(load_weights(second)), in_order(load_weights(first)))

    other, again = train(dtype, **changes)
    again.load_state_dict(got["optimizer_states"][0])
    other.load_state_dict({k.removeprefix("model."): v for k, v in got["state_dict"].items()})
    assert_equal(in_order(lightning(other, again)), in_order(lightning(model, optimizer)))


def in_order(node):
    """Sort the keys of a tree of dicts, lists and tuples."""
    if isinstance(node, dict):
        return {key: in_order(node[key]) for key in sorted(node, key=str)}
    return type(node)(in_order(x) for x in node) if isinstance(node, (list, tuple)) else node


def test_a_layout_reads_a_checkpoint_of_one_process(tmp_path):
    model, optimizer = train(torch.bfloat16)
    FolderCheckpointIO({}, "abcdef").save_checkpoint(lightning(model, optimizer), place(tmp_path))
    state, cut = open_state(place(tmp_path)), (Cut(1, 4, 2),)
    (i,) = (i for i, name in enumerate(state.names) if name == "blocks.1.attention.wq.weight")
    got = state.read("blocks.1.attention.wq.weight", "weight", cut)
    assert same(got, part(optimizer.masters[i], cut).contiguous())
    got = state.read("blocks.1.attention.wq.weight", "exp_avg", cut)
    assert same(got, part(optimizer.state[optimizer.masters[i]]["exp_avg"], cut).contiguous())
    assert same(state.read("head.weight", "weight"), state.read("embedding.weight", "weight"))


def test_one_file_holds_what_the_model_computes_with(tmp_path):
    rng, (model, optimizer) = random.Random(1), train(torch.bfloat16)
    FolderCheckpointIO({}, "abcdef").save_checkpoint(lightning(model, optimizer), place(tmp_path / "a"))
    one = open_state(place(tmp_path / "a"))
    whole = Whole(one.dtype, one.param_groups, one.scalars, one.aliases)
    ranks = pieces_of(of_state(one, rng), Layout(2, 2, 1, 2), rng)
    path = save(place(tmp_path / "b"), ranks, whole, texts={"tokenizer.json": "{}"})
    with in_one_file(path, tmp_path / "out" / "hf") as folder:
        assert sorted(p.name for p in folder.iterdir()) == [MODEL, "tokenizer.json"]
        assert_equal(in_order(load_file(folder / MODEL)), in_order(load_file(place(tmp_path / "a") / MODEL)))
        assert_equal(in_order(load_weights(folder)), in_order(dict(model.state_dict())))
    assert list((tmp_path / "out").iterdir()) == []
    with in_one_file(place(tmp_path / "a"), tmp_path / "out" / "hf") as folder:
        assert folder == place(tmp_path / "a")


def test_factored_states_are_not_cut(tmp_path):
    model = build()
    optimizer = build_optimizer(composed("optim=adafactor").optim, model)
    model(some_tokens()).sum().backward()
    optimizer.step()
    texts = {"config.yaml": "optim: {optimizer: {_target_: torch.optim.Adafactor}}"}
    FolderCheckpointIO(texts, "abcdef").save_checkpoint(lightning(model, optimizer), place(tmp_path))
    state, name = open_state(place(tmp_path)), "embedding.weight"
    n = state.shape(name)[0]
    assert same(state.read(name, "row_var"), optimizer.state[model.embedding.weight]["row_var"])
    assert same(state.read(name, "weight", (Cut(0, 2, 1),)), model.embedding.weight.detach()[n // 2 :])
    rule = rf"optim.optimizer='torch.optim.Adafactor' keeps a row_var of shape \[{n}, 1\] for embedding.weight of shape"
    with pytest.raises(CheckpointError, match=rule):
        state.read(name, "row_var", (Cut(0, 2, 1),))


def test_a_state_that_is_not_there_is_told(tmp_path):
    state = open_state(save(place(tmp_path), {0: [Piece("w", (2,), (), 0, {"weight": torch.ones(2)})]}))
    for name, kind in (("w", "exp_avg"), ("v", "weight")):
        with pytest.raises(CheckpointError, match=f"holds no {kind} of {name}"):
            state.read(name, kind)
    with pytest.raises(ValueError, match="does not cut 2 elements"):
        state.read("w", "weight", (Cut(0, 4, 0),))


def test_a_checkpoint_without_names_is_told(tmp_path):
    model, optimizer = train(torch.float32)
    content = lightning(model, optimizer)
    for group in content["optimizer_states"][0]["param_groups"]:
        del group["param_names"]
    io = FolderCheckpointIO({}, "abcdef")
    io.save_checkpoint(content, place(tmp_path))
    with pytest.raises(CheckpointError, match="did not name the optimizer's parameters"):
        open_state(place(tmp_path))
    _, again = train(torch.float32)
    again.load_state_dict(io.load_checkpoint(place(tmp_path))["optimizer_states"][0])
    assert "param_names" in again.param_groups[0]


def test_steps_that_differ_are_told(tmp_path):
    model, optimizer = train(torch.float32)
    optimizer.state[model.head.norm.weight]["step"] += 1
    FolderCheckpointIO({}, "abcdef").save_checkpoint(lightning(model, optimizer), place(tmp_path))
    with pytest.raises(CheckpointError, match=r"has step=4 for head.norm.weight and 3 for others"):
        open_state(place(tmp_path))


def to_shards(path: Path) -> None:
    """Write a checkpoint of one process anew as many ranks would have."""
    rng, one = random.Random(0), open_state(path)
    texts = {name: (path / name).read_text() for name in ("config.yaml", "tokenizer.json", "data.json")}
    ranks = pieces_of(of_state(one, rng), Layout(2, 4, 2, 2), rng)
    whole = Whole(one.dtype, one.param_groups, one.scalars, one.aliases)
    buffers = {name: one.buffer(name) for name in one.buffers}
    folder, records = begin(path), {}
    for rank, pieces in ranks.items():
        records |= save_shard(folder, rank, pieces, buffers if rank == 0 else {})
    io = FolderCheckpointIO(texts, manifest.read_manifest(path).run_id)
    io.finish(folder, path, one.rest, whole, records)


@pytest.mark.long
def test_run_py_goes_on_from_shards_as_if_they_were_one_file(tmp_path):
    done = forks.run(tmp_path, *runs.QUICK, "model=v3_moe", "trainer.precision=bf16", "trainer.keep_checkpoints=9")
    assert done.returncode == 0, done.stderr
    (run_dir,) = runs.run_dirs(tmp_path)
    path, last, want = place(run_dir, 8), place(run_dir, 12), runs.weights(run_dir, 12)
    used = {}
    for form in ("one", "many"):
        where = ("do=export", f"resume={path}", f"export.path={form}")
        exported, sampled = (forks.run(tmp_path, *words) for words in (where, ("do=sample", f"resume={path}")))
        assert exported.returncode == sampled.returncode == 0, exported.stderr + sampled.stderr
        used[form] = load_file(tmp_path / form / MODEL), sampled.stdout
        if form == "one":
            to_shards(path)
    assert not (path / MODEL).exists()
    assert_equal(in_order(used["many"]), in_order(used["one"]))
    measured = forks.run(tmp_path, "do=eval", f"resume={path}")
    assert measured.returncode == 0, measured.stderr
    shutil.rmtree(last)
    again = forks.run(tmp_path, f"resume={path}")
    assert again.returncode == 0, again.stderr
    assert set(runs.trace(run_dir, "train/loss")) == set(range(1, 13))  # and the same again from step 9 on
    assert_equal(in_order(runs.weights(run_dir, 12)), in_order(want))


def test_tensors_are_written_one_by_one(tmp_path):
    tensors = {
        "bool": torch.tensor([True, False, True]),
        "half": torch.randn(3).half(),
        "double": torch.randn(2, 3, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5),
        "turned": torch.randn(4, 3).T,
    }
    like = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    asked = []
    record = write_tensors(tmp_path / "x", like, {"a": "b"}, lambda name: asked.append(name) or tensors[name])
    loaded = load_file(tmp_path / "x")
    assert set(loaded) == set(tensors) == set(asked) and all(same(loaded[n], tensors[n]) for n in tensors)
    assert record == manifest._digest(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"a": "b"} and length % 8 == 0
    assert all(entry["data_offsets"][0] % tensors[n].itemsize == 0 for n, entry in header.items())


def test_the_description_is_plain(tmp_path):
    path = save(place(tmp_path), {0: [Piece("w", (2,), (), 0, {"weight": torch.ones(2)})]})
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", shard_name(0), "state.json", "state.safetensors",
    ]  # fmt: skip
    assert "sharded" in dict(json.loads((path / "state.json").read_text())["dict"])
    assert isinstance(build(), Transformer)
