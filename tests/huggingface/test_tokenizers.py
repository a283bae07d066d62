"""A checkpoint with its own tokenizer, in through training and out again: same tokens, same logits in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepseek_exp.huggingface.files import tokenizer_file
from deepseek_exp.inference import from_pretrained
from tests import forks, runs
from tests.data.tokenizer_kinds import sentencepiece_model, text_of, wild
from tests.huggingface.releases import SIZE, transformers
from tests.huggingface.test_parity import distance

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
TEXT = ["the cat sat on the mat.", "caf\u0065\u0301 大家好 🙂", " def f(x):\r\n    return x + 1\n", ""]
LITTLE = ("data=text", "data.path=texts.jsonl", "data.seq_len=32", "trainer.max_steps=3", "trainer.eval_every_steps=3")
LITTLE += ("trainer.checkpoint_every_steps=3", "trainer.global_batch_seqs=4", "trainer.micro_batch_seqs=2")
LITTLE += ("trainer.eval_seqs=4", "trainer.n_threads=1", "optim.warmup_steps=1", "optim.lr=1e-3", "tracking=none")


def write_release(folder: Path, family: str) -> None:
    """Write a tiny random model of a family with a tokenizer as the family's releases have it."""
    config = transformers.AutoConfig.for_model(family, **{**SIZE, "vocab_size": 512, "head_dim": 16})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    says = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    if family == "llama":
        pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
        (folder / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
        says |= {"bos_token": "<s>", "add_bos_token": True}
    else:
        tree = json.loads(text_of("tiktoken"))
        (folder / "tokenizer.json").write_text(json.dumps({**tree, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(says))


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_trained_further_and_written(family: str, tmp_path: Path) -> None:
    write_release(tmp_path / "release", family)
    texts = [*TEXT, *wild(3, 300)]
    rows = "".join(json.dumps({"text": text + " the cat " * 4}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(rows, encoding="utf-8")
    for words in (("init_from=release", *LITTLE), ("do=export", "resume=last")):
        done = forks.run(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    (run_dir,) = runs.run_dirs(tmp_path)
    ours, before = from_pretrained(run_dir), from_pretrained(tmp_path / "release")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "hf").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(run_dir / "hf")
    assert ours.tokenizer.digest == before.tokenizer.digest
    assert tokens.eos_token_id == ours.tokenizer.end_id == theirs.config.eos_token_id
    assert theirs.config.bos_token_id == (1 if family == "llama" else None)
    for text in texts:
        ids = ours.tokenizer.prompt(text)
        if not any(name in text for name in ("<unk>", "<s>", "</s>")):  # transformers takes them for special tokens
            assert tokens(text)["input_ids"] == ids
        assert tokens.decode(ids, skip_special_tokens=True) == ours.tokenizer.normalize(text)
    assert before.tokenizer.prompt("x")[:-1] == ([1, *before.tokenizer.encode("")] if family == "llama" else [])
    messages = [{"role": "user", "content": "the cat"}]
    wanted = ("<s>" if family == "llama" else "") + "<user>the cat</s>"
    assert tokens.apply_chat_template(messages, tokenize=False) == wanted
    batch = torch.tensor([ours.tokenizer.prompt("the cat sat on the mat. " * 5)])
    with torch.no_grad():
        assert distance(ours.model(batch), theirs(batch).logits) < 1e-5
        assert distance(ours.model(batch), before.model(batch)) > 1e-4  # it was trained


def test_a_folder_with_a_sentencepiece_model(tmp_path: Path) -> None:
    """What `init_from` and `from_pretrained` take if there is no tokenizer.json."""
    assert tokenizer_file(tmp_path).name == "tokenizer.json"
    for name in ("spiece.model", "tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("")
        assert tokenizer_file(tmp_path).name == name
