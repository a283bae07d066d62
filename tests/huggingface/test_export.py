"""What do=export leaves behind and says: modes, modules of multi-token prediction, disks that fail."""

from __future__ import annotations

import dataclasses
import errno
import os
from types import SimpleNamespace

import pytest

from deepseek_exp.commands.export import export
from deepseek_exp.data import Tokenizer
from deepseek_exp.data.template import OURS, ChatEncoder, Template
from deepseek_exp.errors import DiskError
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed
from tests.huggingface.releases import transformers, write_checkpoint, write_shards


@pytest.fixture(scope="module")
def cfg():
    return composed("model=v3_moe", "size=tiny", "do=export", "model.vocab_size=300")


@pytest.fixture(params=[write_checkpoint, write_shards])
def checkpoint(request, cfg, tmp_path):
    model = Transformer(cfg.model, TORCH)
    init_weights(model, cfg.model, 0)
    return request.param(model, tmp_path / "run" / "checkpoints" / "step-00000001")


def exported(cfg, checkpoint, path):
    cfg = dataclasses.replace(cfg, export=dataclasses.replace(cfg.export, path=str(path)))
    export(SimpleNamespace(cfg=cfg, checkpoint=checkpoint))


def test_modes_and_what_it_says_of_modules_that_look_ahead(cfg, checkpoint, tmp_path, capsys):
    exported(cfg, checkpoint, tmp_path / "hf")
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {0o666 & ~mask}
    said = capsys.readouterr().out
    _, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    first = f"model.layers.{cfg.model.n_layers}."
    assert found["unexpected_keys"] and all(name.startswith(first) for name in found["unexpected_keys"])
    assert f"reports its weights, {first}*, as UNEXPECTED" in said


@pytest.mark.parametrize("where", ["deepseek_exp.huggingface.weights.save_file", "deepseek_exp.disk.fsync_path"])
def test_a_full_disk_leaves_nothing(where, cfg, checkpoint, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(DiskError, match=r"export.path='.*hf' cannot be written \(No space left on device\). Fix: free"):
        exported(cfg, checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_path_below_a_file(cfg, checkpoint, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiskError, match=r"export.path='.*file/hf.*' cannot be written \(Not a directory\)"):
        exported(cfg, checkpoint, tmp_path / "file" / "hf" / "deeper")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_chat_template_is_theirs(cfg, checkpoint, tmp_path):
    talk = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    template = Template("plain", OURS["plain"])
    (checkpoint / "chat_template.json").write_text(template.json)
    exported(cfg, checkpoint, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    encoder = ChatEncoder(template, Tokenizer.load(tmp_path / "hf" / "tokenizer.json"))
    assert theirs.apply_chat_template(talk, tokenize=False) == template.render(talk, encoder.eos)
    assert theirs.apply_chat_template(talk)["input_ids"] == encoder.encode([talk], ["assistant"])[0][0]
    assert theirs.apply_chat_template(talk[:1], add_generation_prompt=True)["input_ids"] == encoder.prompt(talk[:1])
