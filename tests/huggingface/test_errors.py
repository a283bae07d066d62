"""What cannot be read or written of Hugging Face's checkpoints, by the words that tell it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_exp.checkpoint.lightning_io import FolderCheckpointIO
from deepseek_exp.config import compose
from deepseek_exp.errors import CheckpointError, ConfigError, UserError
from deepseek_exp.experiment import init_from
from deepseek_exp.huggingface import other_tokenizer, read_release, stored_weights
from deepseek_exp.huggingface.write import family_of
from deepseek_exp.inference import export_hf, from_pretrained
from tests.composing import composed, shared_hydra, tree
from tests.huggingface.releases import load_ours, some_tokenizer, their_model, write_checkpoint, write_shards

FIELDS = [
    ("llama", "hidden_act", "gelu", "is not silu, the only gate of our feed-forward network"),
    ("llama", "mlp_bias", True, "asks for biases in the feed-forward network, which ours has not"),
    ("qwen3", "attention_bias", True, "asks for biases in the attention, of the output too, which ours has not"),
    ("llama", "partial_rotary_factor", 0.5, "is not 1: the family llama turns whole heads"),
    ("mistral", "quantization_config", {"quant_method": "fp8"}, "says that the weights are quantized"),
    ("llama", "sliding_window", 7, "is not a field that is known here, so it may change what the model computes"),
    ("llama", "vocab_size", "many", "is not a whole number"),
    ("llama", "hidden_size", None, "is needed: a whole number"),
    ("llama", "tie_word_embeddings", 1, "is not true or false"),
    ("llama", "rope_parameters", 3, "is not a mapping"),
    (
        "qwen2_window",
        "layer_types",
        ["full_attention", "sliding_attention", "full_attention"],
        "with use_sliding_window=True gives layers different windows, and ours share one",
    ),
    ("qwen3_moe", "decoder_sparse_step", 2, "is not 1: blocks with and without experts would take turns"),
    ("qwen3_moe", "mlp_only_layers", [1], "are not the first blocks, the only ones that can be dense here"),
    ("phi3", "rope_parameters", {"partial_rotary_factor": 0.2}, "turns 3 of 16 coordinates, and pairs of them turn"),
    ("glm4", "rope_parameters", {"partial_rotary_factor": 1.5}, "turns 36 of 24 coordinates, and pairs of them turn"),
    (
        "phi3",
        "rope_parameters",
        {"rope_type": "longrope", "factor": 2.0},
        "is not default: it chooses the wavelengths by",
    ),
    ("llama", "model_type", "gemma3_text", "needs gates with GELU, embeddings scaled by sqrt(hidden_size), and layers"),
    ("llama", "model_type", "gemma3", "needs images, gates with GELU, embeddings scaled by sqrt(hidden_size)"),
    ("deepseek_v2", "rms_norm_eps", 1e-05, "is not 1e-06, which the norms of the latents use whatever it says"),
    ("deepseek_v2", "norm_topk_prob", True, "is ignored by transformers, while the code of the release divides"),
    ("deepseek_v2", "topk_method", "noaux_tc", "is not one of greedy, group_limited_greedy"),
    ("deepseek_v2", "scoring_func", "sigmoid", "is not softmax, as in DeepSeek-V2"),
    ("deepseek_v3", "scoring_func", "softmax", "is not sigmoid, as in DeepSeek-V3"),
    ("deepseek_v3", "topk_method", "greedy", "is not noaux_tc, as in DeepSeek-V3"),
    ("deepseek_v3", "moe_layer_freq", 2, "is not 1: blocks with and without experts would take turns"),
    ("deepseek_v3", "num_key_value_heads", 2, "is not num_attention_heads=4, as latent attention needs"),
    ("deepseek_v3", "n_shared_experts", 0, "is less than 1, which transformers cannot build"),
    ("mistral", "quantization_config", "fp8", "says that the weights are quantized"),
    ("mistral", "quantization_config", ["fp8"], "says that the weights are quantized"),
    ("llama", "rms_norm_eps", 10**400, "is not a finite number"),
    ("llama", "hidden_size", 10**400, "is not a whole number from 0 to 2147483647"),
    ("llama", "vocab_size", -1, "is not a whole number from 0 to 2147483647"),
    ("llama", "num_hidden_layers", 10**12, "is not a whole number from 0 to 2147483647"),
    ("qwen3", "num_hidden_layers", 10**9, "is more than 10,000"),
    ("qwen2_window", "layer_types", [{}], "with use_sliding_window=True gives layers different windows"),
    ("llama", "model_type", "gpt2", "is not one of llama, mistral, qwen2, qwen3, qwen3_moe, mixtral, phi3, glm4"),
]
SCALINGS = [
    ("rope_type", "longrope", "is not one of default, linear, llama3, yarn"),
    ("attention_factor", 2.0, "is not the 1.13863 that follows from factor and mscale"),
    ("truncate", False, "is not true: the borders of YaRN's blend are rounded to whole pairs here"),
    ("short_factor", [1.0], "is not a field that is known here"),
    ("factor", "big", "is not a number"),
    ("mscale_all_dim", -10 / math.log(4), "makes the factor of the rotary tables no number above 0"),
    ("mscale", -1e308, "makes the factor of the rotary tables no number above 0"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each case, made when it is asked for."""
    root = tmp_path_factory.mktemp("releases")

    def make(name):
        if not (root / name).exists():
            their_model(name).save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture
def copied(folders, tmp_path):
    """Give a function that copies a case's folder, to be changed."""
    return lambda name: shutil.copytree(folders(name), tmp_path / name)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(("case", "field", "value", "rule"), FIELDS, ids=lambda v: str(v)[:30])
def test_a_field_that_cannot_be_expressed(case, field, value, rule, copied):
    folder = change(copied(case), **{field: value})
    with pytest.raises(ConfigError) as caught:
        read_release(folder)
    told = [p for p in caught.value.problems if p.key.split(".")[0] == field]
    assert len(told) == 1 and told[0].rule.startswith(f"in {folder / 'config.json'} {rule}") and told[0].fix


@pytest.mark.parametrize(("field", "value", "rule"), SCALINGS, ids=lambda v: str(v)[:30])
def test_a_rotary_scaling_that_cannot_be_expressed(field, value, rule, copied):
    folder = copied("llama_yarn")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    both = {"mscale": 1.0, "mscale_all_dim": 1.0} if field.startswith("mscale") else {}
    change(folder, rope_parameters={**rope, **both, field: value})
    with pytest.raises(ConfigError, match=f"rope_parameters.{field}=.*{rule}"):
        read_release(folder)


def test_all_fields_are_told_together_and_in_full(copied):
    folder = change(copied("llama"), mlp_bias=True, logit_scale=2.0)
    with pytest.raises(ConfigError) as caught:
        read_release(folder)
    file = folder / "config.json"
    assert str(caught.value).splitlines() == [
        f"mlp_bias=true in {file} asks for biases in the feed-forward network, which ours has not. "
        "Fix: use another checkpoint: this part is not built.",
        f"logit_scale=2.0 in {file} is not a field that is known here, so it may change what the model computes. "
        "Fix: remove it if it changes nothing, or use another checkpoint.",
    ]


@pytest.mark.parametrize(
    "text", ["{", "[]", "\udc80", "[" * 100_000, '{"a": NaN}', '{"a": ' + "9" * 5000 + "}"], ids=range(6)
)
def test_a_config_that_is_no_json(text, copied):
    folder = copied("llama")
    (folder / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"init_from='.*llama' has a config.json that (cannot be read|is no JSON)"):
        read_release(folder)


def test_a_folder_that_is_not_there_and_files_that_are_none(copied, tmp_path):
    with pytest.raises(
        ConfigError, match=r"init_from='.*qwen3-0.6b' is a folder that does not exist. Fix: .*hf download"
    ):
        read_release(tmp_path / "qwen3-0.6b")
    folder = copied("llama")
    (folder / "config.json").rename(folder / "old.json")
    os.mkfifo(folder / "config.json")
    with pytest.raises(ConfigError, match=r"has a config.json that cannot be read \(it is no regular file\)"):
        read_release(folder)


def test_what_a_foreign_file_says_moves_no_cursor(copied):
    folder = change(copied("llama"), model_type="\x1b]0;title\x07")
    with pytest.raises(ConfigError) as caught:
        read_release(folder)
    assert str(caught.value).startswith("model_type='\\x1b]0;title\\x07' in ") and str(caught.value).isprintable()


def test_old_files_say_the_same_as_new_ones(copied):
    """rope_theta and rope_scaling with `type`, as transformers 4 and the releases have them."""
    folder = copied("deepseek_v2_groups_yarn")
    new = read_release(folder).model
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_release(folder).model == new


def test_the_description_has_every_key_of_the_model(folders):
    keys = [k.removeprefix("model.") for k in compose.schema_keys() if k.startswith("model.")]
    for case in ("llama", "mixtral", "deepseek_v3"):
        assert sorted(k for k, _ in init_from._flat(read_release(folders(case)).model, "")) == sorted(keys)


HEADERS = {
    "no dtype": {"a": {"shape": [1], "dtype": [], "data_offsets": [0, 4]}},
    "overlap": {n: {"shape": [1], "dtype": "F32", "data_offsets": [0, 4]} for n in "ab"},
    "hole": {"a": {"shape": [1], "dtype": "F32", "data_offsets": [4, 8]}},
    "negative": {"a": {"shape": [1], "dtype": "F32", "data_offsets": [-4, 0]}},
    "reversed": {"a": {"shape": [1], "dtype": "F32", "data_offsets": [4, 0]}},
    "another size": {"a": {"shape": [1], "dtype": "F64", "data_offsets": [0, 4]}},
    "negative shape": {"a": {"shape": [-1, -1], "dtype": "F32", "data_offsets": [0, 4]}},
    "huge shape": {"a": {"shape": [10**400, 0], "dtype": "F32", "data_offsets": [0, 0]}},
    "true for a length": {"a": {"shape": [True], "dtype": "F32", "data_offsets": [0, 4]}},
    "a number for a type": {"a": {"shape": [1], "dtype": 7, "data_offsets": [0, 4]}},
    "offsets past the end": {"a": {"shape": [2], "dtype": "F32", "data_offsets": [0, 8]}},
    "offsets that end before the file": {"a": {"shape": [1], "dtype": "I8", "data_offsets": [0, 1]}},
    "offsets of 2**63 bytes": {"a": {"shape": [2**61], "dtype": "F32", "data_offsets": [0, 2**63]}},
    "reversed offsets of an unknown type": {
        "a": {"shape": [1], "dtype": "F32", "data_offsets": [0, 4]},
        "b": {"shape": [1], "dtype": "F4", "data_offsets": [4, 0]},
    },
    "a list": [],
}


class TestWeights:
    def change_weights(self, folder, **changes):
        path = folder / "model.safetensors"
        weights = load_file(path)
        for name, value in changes.items():
            if value is None:
                del weights[name]
            else:
                weights[name] = value
        save_file(weights, path)
        return folder

    def test_missing_left_over_and_wrong_shapes_are_told_together(self, copied):
        norm, wrong, extra = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "score.weight"
        changes = {norm: None, wrong: torch.zeros(64, 32), extra: torch.zeros(2, 64), "lm_head.weight": None}
        folder = self.change_weights(copied("llama"), **changes)
        with pytest.raises(CheckpointError) as caught:
            load_ours(folder)
        assert str(caught.value).splitlines() == [
            f"init_from='{folder}' lacks 2 of its weights: lm_head.weight [300, 64], model.norm.weight [64]. "
            "Fix: use a whole checkpoint.",
            f"init_from='{folder}' has left over 1 of its weights: score.weight [2, 64]. Fix: use a whole checkpoint.",
            f"init_from='{folder}' has in another shape 1 of its weights: model.layers.0.self_attn.q_proj.weight "
            "[64, 32] instead of [64, 64]. Fix: use a whole checkpoint.",
        ]

    def test_a_missing_expert(self, copied):
        name = "model.layers.1.mlp.experts.5.up_proj.weight"
        with pytest.raises(CheckpointError, match=rf"lacks 1 of its weights: {name} \[24, 64\]"):
            load_ours(self.change_weights(copied("deepseek_v3"), **{name: None}))

    def test_quantized_weights(self, copied):
        name = "model.norm.weight"
        with pytest.raises(CheckpointError, match=f"another type 1 of its weights: {name} I8"):
            load_ours(self.change_weights(copied("llama"), **{name: torch.ones(64, dtype=torch.int8)}))

    def test_copies_of_tied_tables_may_be_there_but_must_be_equal(self, copied):
        folder = copied("qwen2")
        table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        self.change_weights(folder, **{"lm_head.weight": table.clone()})
        load_ours(folder)
        self.change_weights(folder, **{"lm_head.weight": table + 1})
        with pytest.raises(CheckpointError, match=r"copy lm_head.weight of model.embed_tokens.weight that differs"):
            load_ours(folder)

    def test_tables_of_angles_in_old_files_are_passed_over(self, copied):
        load_ours(
            self.change_weights(copied("llama"), **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
        )

    def test_pickles_are_refused(self, copied):
        folder = copied("llama")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"holds its weights as pytorch_model.bin, a pickle"):
            load_ours(folder)

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:-5], lambda b: b[:4], lambda b: b"\xff" * 8 + b[8:], lambda b: b""]
    )
    def test_a_damaged_file(self, damage, copied):
        path = copied("llama") / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CheckpointError, match=r"has a file model.safetensors that is missing or damaged"):
            load_ours(path.parent)

    @pytest.mark.parametrize("name", HEADERS)
    def test_a_header_that_does_not_describe_the_file(self, name, tmp_path):
        text = json.dumps(HEADERS[name]).encode()
        sizes = {"overlap": 8, "hole": 8, "a list": 0, "huge shape": 0, "reversed offsets of an unknown type": 0}
        size = sizes.get(name, 4)
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
        with pytest.raises(CheckpointError, match=r"has a file model.safetensors that is missing or damaged"):
            stored_weights(tmp_path)

    def test_a_header_longer_than_the_library_reads(self, tmp_path):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write((10**8 + 1).to_bytes(8, "little"))
            file.truncate(10**8 + 9)  # sparse
        with pytest.raises(CheckpointError, match=r"\(ValueError: a header of 100000001 bytes in a file of"):
            stored_weights(tmp_path)

    def test_nested_headers_and_indices(self, copied):
        folder, text = copied("llama"), b"[" * 100_000
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CheckpointError, match=r"has a file model.safetensors that is missing or damaged"):
            load_ours(folder)
        (folder / "model.safetensors.index.json").write_bytes(text)
        with pytest.raises(ConfigError, match=r"has a model.safetensors.index.json that cannot be read"):
            load_ours(folder)

    def test_a_header_that_the_library_does_not_read(self, copied):
        path = copied("llama") / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = {**json.loads(data[8 : 8 + length]), "__metadata__": {"a": 1}}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(CheckpointError, match=r"has a file model.safetensors that cannot be read"):
            load_ours(path.parent)

    def test_more_layers_than_weights_are_told_before_a_model_is_built(self, copied, monkeypatch):
        folder = change(copied("llama"), num_hidden_layers=9999)
        monkeypatch.setattr("deepseek_exp.inference.pretrained.Transformer", None)
        with pytest.raises(
            CheckpointError, match=r"path='.*' says num_hidden_layers=9999 in its config.json and has 30 w"
        ):
            from_pretrained(folder)

    def test_an_index_cannot_lead_out_of_the_folder(self, copied):
        folder = copied("llama")
        index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"whose weight_map does not name files of that folder"):
            load_ours(folder)


NOT_WRITTEN = {
    "model=v1_dense": ["model.n_global_tokens"],
    "model=v2_5_sparse": ["model.d_ff_active"],
    "model=v5_domain_moe": ["model.moe.domains"],
}


@pytest.mark.parametrize("override", NOT_WRITTEN)
def test_models_without_a_family(override):
    with pytest.raises(ConfigError) as caught:
        family_of(composed(override, "size=tiny").model)
    assert set(NOT_WRITTEN[override]) <= {p.key for p in caught.value.problems}
    assert "has no place in a Hugging Face model of the family" in str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "key"),
    [
        ("llama", {"n_mtp_layers": 1}, "model.n_mtp_layers"),
        ("llama", {"memory_len": 3}, "model.memory_len"),
        ("qwen3", {"qkv_bias": True}, "model.qkv_bias"),
        ("mixtral", {"qkv_bias": True}, "model.qkv_bias"),
        ("llama", {"rotary_dim": 8, "qk_norm": True}, "model.qk_norm"),
        ("phi3_partial", {"qkv_bias": True}, "model.qkv_bias"),
        ("qwen3_moe", {"rotary_dim": 8}, "model.rotary_dim"),
        ("qwen3_moe", {"sandwich_norm": True}, "model.sandwich_norm"),
        ("glm4", {"window": 8}, "model.window"),
        ("glm4", {"qk_norm": True}, "model.qk_norm"),
        ("deepseek_v3", {"sandwich_norm": True}, "model.sandwich_norm"),
        ("qwen3_moe", {"moe": {"n_shared_experts": 1}}, "model.moe.n_shared_experts"),
        ("qwen3_moe", {"moe": {"balance": "bias"}}, "model.moe.balance"),
        ("mixtral", {"moe": {"n_shared_experts": 1}}, "model.moe.n_shared_experts"),
        ("mixtral", {"moe": {"norm_top_k": False}}, "model.moe.norm_top_k"),
        ("mixtral", {"moe": {"route_scale": 2.0}}, "model.moe.route_scale"),
        ("mixtral", {"moe": {"n_dense_layers": 1}}, "model.moe.n_dense_layers"),
        ("mixtral", {"moe": {"balance": "bias"}}, "model.moe.balance"),
        ("deepseek_v2", {"moe": {"norm_top_k": True}}, "model.moe.norm_top_k"),
        ("deepseek_v2_groups_yarn", {"moe": {"group_score": "sum"}}, "model.moe.group_score"),
        ("deepseek_v3", {"norm_eps": 1e-5}, "model.norm_eps"),
        ("deepseek_v3", {"window": 8}, "model.window"),
        ("deepseek_v3", {"moe": {"n_shared_experts": 0}}, "model.moe.n_shared_experts"),
        ("deepseek_v3", {"moe": {"group_score": "max"}}, "model.moe.group_score"),
    ],
)
def test_keys_without_a_place(case, changes, key, folders):
    _, cfg, _ = load_ours(folders(case))
    assert family_of(cfg) == ("phi3" if case == "phi3_partial" else case[:11])
    if "moe" in changes:
        changes = {"moe": dataclasses.replace(cfg.moe, **changes["moe"])}
    with pytest.raises(ConfigError) as caught:
        family_of(dataclasses.replace(cfg, **changes))
    assert [p.key for p in caught.value.problems] == [key]


def test_a_bias_that_has_no_place(folders):
    """A router's bias that is not zero needs balance=bias."""
    from deepseek_exp.inference import load_release
    from deepseek_exp.kernels import TORCH
    from deepseek_exp.models import Transformer

    _, cfg, _ = load_ours(folders("deepseek_v3"))
    cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, balance=type(cfg.moe.balance).none))
    with pytest.raises(CheckpointError, match=r"model.moe.balance='none' has no place for the router's bias"):
        load_release(Transformer(cfg, TORCH), cfg, folders("deepseek_v3"))


class TestExport:
    def test_only_into_an_empty_folder_and_whole_or_not_at_all(self, folders, tmp_path, monkeypatch):
        ours, cfg, _ = load_ours(folders("llama"))
        checkpoint, target = write_checkpoint(ours, tmp_path / "step-00000001"), tmp_path / "hf"
        target.mkdir()
        (target / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match=r"export.path='.*hf' is there already and not an empty folder"):
            export_hf(cfg, checkpoint, target)
        (target / "notes.txt").unlink()
        with monkeypatch.context() as patched:
            patched.setattr("deepseek_exp.huggingface.weights.save_file", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                export_hf(cfg, checkpoint, target)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "step-00000001"] and not any(target.iterdir())
        export_hf(cfg, checkpoint, target)
        assert (target / "model.safetensors").is_file()


class TestFromPretrained:
    def test_ours_and_theirs_say_the_same(self, copied, tmp_path):
        folder = copied("deepseek_v3")
        (folder / "tokenizer.json").write_text(some_tokenizer().json)
        ours, _, _ = load_ours(folder)
        texts = [
            from_pretrained(path).generate("the cat", max_new_tokens=20, temperature=1.0, seed=5)
            for path in (folder, write_checkpoint(ours, tmp_path / "step-00000001"))
        ]
        assert texts[0] == texts[1] and len(texts[0]) > 5

    def test_what_it_holds(self, copied, tmp_path):
        folder = copied("qwen2")
        (folder / "tokenizer.json").write_text(some_tokenizer().json)
        handle = from_pretrained(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in handle.model.parameters()} == {torch.bfloat16} and not handle.model.training
        assert handle.model.head.weight is handle.model.embedding.weight
        assert handle.tokenizer.decode(handle.tokenizer.encode("the mat")) == "the mat"

    def test_what_is_no_checkpoint(self, copied, tmp_path):
        with pytest.raises(UserError, match=r"path='.*' has no config.json"):
            from_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"path='.*llama' has no tokenizer.json"):
            from_pretrained(copied("llama"))
        (tmp_path / "config.yaml").write_text("model: {}")
        with pytest.raises(UserError, match=r"path='.*' has no readable manifest.json"):
            from_pretrained(tmp_path)
        texts = {"config.yaml": "model: {}", "tokenizer.json": "{}"}
        FolderCheckpointIO(texts, "abcd").save_checkpoint({"state_dict": {}, "global_step": 1}, tmp_path / "step-1")
        with pytest.raises(UserError, match=r"path='.*' is no checkpoint that this version reads"):
            from_pretrained(tmp_path / "step-1")

    @pytest.mark.parametrize("write", [write_checkpoint, write_shards])
    @pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v3_dense_tied"])
    def test_any_layout(self, write, case, folders, tmp_path):
        ours, _, _ = load_ours(folders(case))
        run = tmp_path / "a run"
        write(ours, run / "checkpoints" / "step-00000001")
        for path in (run, run / "checkpoints" / "step-00000001"):
            read = from_pretrained(path)
            assert read.folder.name == "step-00000001"
            assert all(torch.equal(a, b) for a, b in zip(read.model.parameters(), ours.parameters(), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(read.model.buffers(), ours.buffers(), strict=True))
        assert (read.model.head.weight is read.model.embedding.weight) is ("tied" in case)

    @pytest.mark.parametrize(
        ("write", "name"), [(write_checkpoint, "model.safetensors"), (write_shards, "shard-00001.safetensors")]
    )
    def test_a_damaged_file_is_named(self, write, name, folders, tmp_path):
        ours, _, _ = load_ours(folders("deepseek_v3"))
        run = tmp_path / "run"
        path = write(ours, run / "checkpoints" / "step-00000001") / name
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"path='.*step-00000001' is damaged \({name} is corrupted"):
            from_pretrained(path.parent)
        with pytest.raises(CheckpointError, match=r"path='.*run' has no whole checkpoint in"):
            from_pretrained(run)
        path.parent.rename(tmp_path / "away")
        write(ours, run / "checkpoints" / "step-00000002")
        (tmp_path / "away").rename(path.parent)
        newer = run / "checkpoints" / "step-00000003"
        path = write(ours, newer) / "config.yaml"
        path.write_text(path.read_text() + "\n")
        with pytest.warns(UserWarning, match=r"step-00000003 is damaged \(config.yaml is .*; taking the one before"):
            assert from_pretrained(run).folder.name == "step-00000002"


def test_a_tokenizer_with_other_entries_than_the_weights_know(folders, tmp_path):
    folder = shutil.copytree(folders("llama"), tmp_path / "llama")
    own, other = folder / "tokenizer.json", tmp_path / "other.json"
    own.write_text(some_tokenizer().json, encoding="utf-8")
    assert other_tokenizer(own, str(own)) is None
    content = json.loads(own.read_text(encoding="utf-8"))
    content["model"]["vocab"] = {t: i + (i > 250) for t, i in content["model"]["vocab"].items()}
    other.write_text(json.dumps(content), encoding="utf-8")
    n = len(content["model"]["vocab"])
    for overrides, keys in (([f"data.tokenizer={other}"], ["data.tokenizer"]), ([f"data.tokenizer={own}"], [])):
        words = [f"init_from={folder}", *overrides]
        with shared_hydra():
            _, problems = init_from.start_from(tree(*words), words)
        assert [p.key for p in problems] == keys
    assert f"has other ids for {n - 251} of the {n} entries of {own}" in other_tokenizer(own, str(other)).rule
    other.write_text("[" * 100_000)
    assert other_tokenizer(own, str(other)) is None  # worded where it is read
    assert other_tokenizer(own, "~nobody-of-this-name/tokenizer.json") is None
