"""What do=sample refuses before it builds a model, and what the sample at the end of a training does instead."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from deepseek_exp.commands import sample
from deepseek_exp.data import Tokenizer
from deepseek_exp.data.template import OURS, ChatEncoder, Template
from deepseek_exp.errors import ConfigError, DataError
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer, init_weights
from tests.config.test_config import composed

TOKENIZER = Tokenizer.train(["ab ab ab cd"], 300)


@pytest.fixture
def cfg():
    return composed("size=tiny", "do=sample", "model.max_seq_len=16", "data.seq_len=16")


def sampled(cfg, *overrides, prompt, **changes):
    """Do do=sample with a tokenizer.json that is read first."""
    cfg = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, prompt=prompt, **changes))
    sample.sample(SimpleNamespace(cfg=cfg, overrides=overrides, checkpoint=None))


@pytest.fixture
def given(cfg, tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(path))), path


def test_a_prompt_that_leaves_no_room(given):
    cfg, _ = given
    for n in (16, 400):
        with pytest.raises(ConfigError) as error:
            sampled(cfg, prompt="x" * n)
        (problem,) = error.value.problems
        assert (problem.key, problem.fix) == ("sample.prompt", "shorten it to 15 tokens or less")
        assert problem.rule == f"has {n} tokens, and with model.max_seq_len=16 there is no room for a new one"
    asked = "sample.max_new_tokens=9"
    with pytest.raises(ConfigError, match=r"sample.max_new_tokens=9 and a prompt of 8 tokens are more than .*use 8 or"):
        sampled(cfg, asked, prompt="x" * 8, max_new_tokens=9)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda text: text[: len(text) // 2], "is not the JSON of a tokenizer"),
        (lambda text: text.replace('"type":"BPE"', '"type":"WordPiece"', 1), "is not "),
        (lambda text: text.replace('"normalizer":null', '"normalizer":{"type":"Lowercase"}', 1), "changes text by"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(given, damage, rule):
    cfg, path = given
    text = path.read_text(encoding="utf-8")
    compact = Tokenizer(text).json.replace('": ', '":')
    path.write_text(damage(compact), encoding="utf-8")
    with pytest.raises(DataError, match=rf"data.tokenizer='.*' {rule}"):
        sampled(cfg, prompt="ab")


def test_a_tokenizer_with_more_entries_than_the_model(given):
    cfg, _ = given
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, vocab_size=TOKENIZER.vocab_size - 1))
    with pytest.raises(DataError, match=r"data.tokenizer='.*' has \d+ entries and data.vocab_size is"):
        sampled(cfg, prompt="ab")


def test_at_the_end_of_a_training_a_long_prompt_is_shortened(cfg):
    model = Transformer(cfg.model, TORCH)
    init_weights(model, cfg.model, 0)
    long = "".join(chr(97 + i % 26) for i in range(100))
    cfg = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, prompt=long, max_new_tokens=99))
    text = sample.sample_text(cfg, model, TOKENIZER)
    assert text.startswith(long[-8:]) and len(text) > 8
    cfg = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, prompt="x" * 12))
    assert sample.sample_text(cfg, model, TOKENIZER).startswith("x" * 12)


def test_a_prompt_that_is_not_set(cfg):
    unset, own = (
        dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, prompt=prompt)) for prompt in (None, "mine")
    )
    assert sample.with_prompt(unset, "first words").sample.prompt == "first words"
    assert sample.with_prompt(own, "first words") is own
    model = Transformer(cfg.model, TORCH)
    init_weights(model, cfg.model, 0)
    assert sample.sample_text(sample.with_prompt(unset, ""), model, TOKENIZER)  # a new document


def test_a_message_needs_the_template_that_the_model_was_trained_with(given):
    cfg, path = given
    with pytest.raises(ConfigError, match=r"sample.as_message=true needs a chat template, and .* has none"):
        sampled(cfg, prompt="ab", as_message=True)
    (path.parent / "chat_template.json").write_text(Template("plain", OURS["plain"]).json)
    with pytest.raises(ConfigError) as error:  # its headings are more than the 16 tokens of the model
        sampled(cfg, prompt="ab", as_message=True)
    assert error.value.problems[0].key == "sample.prompt"


@pytest.mark.parametrize("name", ["raw", "chatml"])
def test_a_reply_to_a_message_ends_with_its_own_token(cfg, monkeypatch, name):
    bpe = Tokenizer(TOKENIZER.json)._inner
    bpe.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer = Tokenizer(bpe.to_str())
    encoder, seen = ChatEncoder(Template(name, OURS[name]), tokenizer), {}
    cfg = composed("size=tiny", "do=sample", "model.max_seq_len=64", "data.seq_len=64")
    monkeypatch.setattr(
        "deepseek_exp.inference.generate", lambda model, prompt, **options: seen.update(options, prompt=prompt) or [97]
    )
    cfg = dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, prompt="ab", as_message=True))
    text = sample.sample_text(cfg, Transformer(cfg.model, TORCH), tokenizer, encoder)
    assert text.startswith("ab\n") and seen["prompt"] == encoder.prompt([{"role": "user", "content": "ab"}])
    assert seen["end_id"] == tokenizer.special_tokens["<|im_end|>" if name == "chatml" else "<|endoftext|>"]
