"""Existing tokenizers of every kind: what comes back of a text, its bytes, where it begins, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from deepseek_exp.data.tokenizer import END, Tokenizer
from deepseek_exp.data.tokenizer_config import TokenizerConfig
from tests.data import tokenizer_kinds
from tests.data.tokenizer_kinds import KINDS, wild, with_template, write


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_comes_back_of_any_text(kind: str, tmp_path: Path) -> None:
    found, expected = Tokenizer.given(write(kind, tmp_path)), KINDS[kind][1]
    assert found.changes_text is (expected is not tokenizer_kinds.same)
    texts = list(wild(0))
    for text, ids in zip(texts, found.encode_batch(texts), strict=True):
        assert found.decode(ids) == found.normalize(text) == expected(text)
        assert ids == found.encode(text) and not found._special & set(ids)
        n_bytes = int(found.token_bytes[[*ids, found.end_id]].sum())
        assert n_bytes == len(expected(text).encode())
    again = Tokenizer(found.json)
    assert again.encode_batch(texts) == found.encode_batch(texts) and again.digest == found.digest
    assert Tokenizer.given(write(kind, tmp_path)).digest == found.digest


def test_same_tokens_as_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(write(kind, tmp_path)))
    found = Tokenizer.given(tmp_path / "tokenizer.json")
    texts = [text for text in wild(1) if not any(name in text for name in ("</s>", "<unk>", "<0x41>"))]
    assert len(texts) > 100
    assert found.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]


class TestWhereATextBegins:
    def test_a_post_processor_puts_a_token_in_front(self, tmp_path: Path) -> None:
        path = write("Llama 2", tmp_path)
        assert Tokenizer.given(path).start == []
        path.write_text(with_template("Llama 2", "<s>", "</s>"), encoding="utf-8")
        found = Tokenizer.given(path)
        assert found.start == [1] and found.prompt("the") == [1, *found.encode("the")] and found.prompt("") == [1]
        assert found.decode(found.prompt("the cat")) == "the cat"
        assert found.continuation(found.prompt("the"), found.encode("x")) == " x"

    def test_tokenizer_config_decides(self, tmp_path: Path) -> None:
        bos = {"content": "<s>", "lstrip": False}
        path = write("Llama 2", tmp_path, add_bos_token=True, bos_token=bos)
        found = Tokenizer.given(path)
        assert found.start == [1] == tokenizers.Tokenizer.from_str(found.json).encode("the").ids[:1]
        path = write("Llama 2", tmp_path, add_bos_token=False, bos_token="<s>")
        path.write_text(with_template("Llama 2", "<s>"), encoding="utf-8")
        off = Tokenizer.given(path)
        assert off.start == [] and tokenizers.Tokenizer.from_str(off.json).encode("the").ids == off.encode("the")

    def test_padding_on_the_left_is_no_beginning(self, tmp_path: Path) -> None:
        tree = json.loads(write("Llama 2", tmp_path).read_text(encoding="utf-8"))
        pad = {"pad_id": 2, "pad_type_id": 0, "pad_token": "</s>", "pad_to_multiple_of": None}
        tree["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", **pad}
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
        assert Tokenizer.given(tmp_path / "tokenizer.json").start == []

    def test_it_is_kept_with_its_files_and_part_of_the_digest(self, tmp_path: Path) -> None:
        path = write("Llama 2", tmp_path / "theirs", chat_template="{{ bos_token }}", bos_token="<s>")
        plain = Tokenizer.given(path)
        path.write_text(with_template("Llama 2", "<s>"), encoding="utf-8")
        found = Tokenizer.given(path)
        (tmp_path / "ours").mkdir()
        for name, content in found.files().items():
            (tmp_path / "ours" / name).write_text(content, encoding="utf-8")
        (tmp_path / "ours" / "manifest.json").write_text("{}")
        ours = tmp_path / "ours" / "tokenizer.json"
        for copy in (Tokenizer.load(ours), Tokenizer.given(ours), pickle.loads(pickle.dumps(found))):
            assert (copy.start, copy.digest, copy.config) == ([1], found.digest, found.config)
        assert Tokenizer(found.json).digest != found.digest and plain.digest != found.digest

    def test_a_checkpoint_that_was_trained_without_it_keeps_to_that(self, tmp_path: Path) -> None:
        """Versions before stored the tokenizer alone, and put nothing in front."""
        (tmp_path / "manifest.json").write_text("{}")
        path = tmp_path / "tokenizer.json"
        path.write_text(with_template("Llama 2", "<s>"), encoding="utf-8")
        found = Tokenizer.given(path)
        assert found.start == [] and found.json == path.read_text(encoding="utf-8")
        assert found.files() == {"tokenizer.json": found.json}

    @pytest.mark.parametrize("bos", ["the", None])
    def test_a_beginning_that_is_no_special_token(self, bos: str | None, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"says add_bos_token, and its bos_token {bos!r} is no special token"):
            Tokenizer.given(write("Llama 2", tmp_path, add_bos_token=True, bos_token=bos))


def test_the_end_that_tokenizer_config_names(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer.from_str(tokenizer_kinds.text_of("BPE on bytes"))
    tree = json.loads(made.to_str())
    for entry in tree["added_tokens"]:
        entry["content"] = "<stop>"
    tree["model"]["vocab"]["<stop>"] = tree["model"]["vocab"].pop("</s>")
    path = write("BPE on bytes", tmp_path, eos_token="<stop>")
    path.write_text(json.dumps(tree), encoding="utf-8")
    found = Tokenizer.given(path)
    assert found.end_id == tree["added_tokens"][0]["id"] and found.vocab_size == len(tree["model"]["vocab"])
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.given(path).end_id == len(tree["model"]["vocab"])  # a new entry


class TestTemplates:
    def test_they_are_kept(self, tmp_path: Path) -> None:
        path = write("BPE on bytes", tmp_path, chat_template="{{ messages }}")
        found = Tokenizer.given(path)
        assert found.chat_template == "{{ messages }}"
        assert json.loads(found.files()["tokenizer_config.json"]) == {"chat_template": "{{ messages }}"}
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
        assert Tokenizer.given(write("BPE on bytes", tmp_path, chat_template=named)).chat_template == "y"
        (tmp_path / "chat_template.jinja").write_text("of the file")
        assert Tokenizer.given(path).chat_template == "of the file"

    def test_without_one(self, tmp_path: Path) -> None:
        found = Tokenizer.given(write("BPE on bytes", tmp_path))
        assert found.chat_template is None and list(found.files()) == ["tokenizer.json"]

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("{", "is next to a tokenizer_config.json that is not JSON"),
            ("[" * 100_000, "is next to a tokenizer_config.json that is nested too deeply"),
            ("[]", "is next to a tokenizer_config.json that is no JSON object"),
            ("\udc80", "is next to a tokenizer_config.json that cannot be read"),
            ('{"chat_template": 3}', "whose chat_template is not a text"),
            ('{"bos_token": 3}', "in which a token is 3"),
            ('{"add_bos_token": "yes"}', "in which add_bos_token='yes' is not true or false"),
        ],
        ids=range(7),
    )
    def test_a_file_that_says_nothing(self, text: str, rule: str, tmp_path: Path) -> None:
        path = write("BPE on bytes", tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=rule):
            Tokenizer.given(path)


def word_level() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))


def changed(kind: str, **parts: object) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(tokenizer_kinds.text_of(kind))
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def short_words() -> tokenizers.Tokenizer:
    tree = json.loads(tokenizer_kinds.text_of("WordPiece on bytes"))
    return tokenizers.Tokenizer.from_str(
        json.dumps({**tree, "model": {**tree["model"], "max_input_chars_per_word": 100}})
    )


def swallowing(name: str) -> tokenizers.Tokenizer:
    """A tokenizer with an added token that takes the white space around it along."""
    made = changed("BPE on bytes")
    made.add_tokens([tokenizers.AddedToken(name, lstrip=True, rstrip=True, normalized=False)])
    return made


def lower(text: str) -> object:
    return normalizers.Sequence([normalizers.NFKC(), getattr(normalizers, text)()])


REFUSED = {
    "is a WordLevel that does not encode every text: .* characters without an entry would be lost": word_level,
    "is a BPE that does not encode every text: it has no complete byte fallback, and it is not on bytes": lambda: (
        tokenizer_kinds.fallback(tokenizer_kinds.bpe_with_fallback(byte_fallback=False), [], strip=True)
    ),
    "changes text by its normalizer Lowercase: 'A' becomes 'a'": lambda: changed(
        "Llama 2", normalizer=lower("Lowercase")
    ),
    "changes text by its normalizer StripAccents: 'é' becomes 'e'": lambda: changed(
        "Llama 2", normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "does not return text as it was, .*'a <x> b' becomes 'a<x>b'": lambda: swallowing("<x>"),
    "does not return text as it was, .*'##! ##a' becomes '! ##a'": lambda: tokenizer_kinds.word_piece("##"),
    r"does not return text as it was, .*'aaaaaaaaa... of 300 characters' becomes ": short_words,
    "does not return text as it was, .*: .A b  c": lambda: changed(
        "Unigram with fallback", pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Punctuation("removed")])
    ),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_what_cannot_be_used(rule: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(REFUSED[rule]().to_str(), encoding="utf-8")
    with pytest.raises(ValueError, match=rule):
        Tokenizer.given(path)


@pytest.mark.parametrize("made", ["space in front", "stripped", "NFC"])
def test_a_long_text_is_cut_only_where_nothing_changes_at_its_ends(made: str, tmp_path: Path) -> None:
    form = {"stripped": normalizers.Strip(), "NFC": normalizers.NFC()}.get(made)
    whole = changed("space in front" if form is None else "BPE on bytes", **({"normalizer": form} if form else {}))
    (tmp_path / "tokenizer.json").write_text(whole.to_str(), encoding="utf-8")
    found, text = Tokenizer.given(tmp_path / "tokenizer.json"), "the cat\n" * 20_000
    parts = list(found.pieces(text))
    assert len(parts) == (3 if made == "NFC" else 1) and "".join(parts) == text


def test_literal_names_are_text(kind: str, tmp_path: Path) -> None:
    found = Tokenizer.given(write(kind, tmp_path))
    names = [token for token in tokenizers.Tokenizer.from_str(found.json).get_vocab() if token.startswith("<")]
    for name in [*names, END]:
        text = f"{name}a{name} {name}"
        ids = found.encode(text)
        assert found.decode(ids) == found.normalize(text) and not found._special & set(ids)


def test_an_empty_config_says_nothing() -> None:
    assert TokenizerConfig().to_json() == "" and TokenizerConfig(add_bos_token=False).to_json() == ""
