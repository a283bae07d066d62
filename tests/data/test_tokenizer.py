import hashlib
import json
import os
import pickle
import random
import signal
import threading
from pathlib import Path

import pytest

from deepseek_exp.data import tokenizer as tokenizer_module
from deepseek_exp.data.tokenizer import END, ENDS, Tokenizer, pieces
from deepseek_exp.errors import DataError

TEXTS = ["the cat sat on the mat.\n" * 20, "def f(x):\n    return x + 1\n" * 20, "大家好，世界。" * 20]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS), 290)


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    wild = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(3000))
    for text in ("", " a  b\t\r\n\x00", "naïve 🙂 مرحبا", wild, *TEXTS):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_of_a_document_is_never_text(tokenizer: Tokenizer) -> None:
    text = f"a{END}b {END}"
    for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text, text])):
        assert tokenizer.end_id not in ids
        assert tokenizer.decode(ids) == text
    trained = Tokenizer.train([text * 50], 600)
    assert trained.end_id not in trained.encode(text)


def test_decoding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ä")
    assert tokenizer.decode([*tokenizer.encode("the"), tokenizer.end_id, *tokenizer.encode("cat")]) == "thecat"
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_the_vocabulary_has_all_bytes_and_ends(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 290
    assert (tokenizer.end_id, tokenizer.token_bytes[0].item()) == (0, 0)
    assert Tokenizer.train(["ab"], 300).vocab_size == 257
    assert (Tokenizer.train(["ab"], 300).token_bytes == 1).sum() == 256


def test_token_bytes_add_up(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())
    assert tokenizer.token_bytes.shape == (290,)


def test_training_repeats_and_follows_the_text(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(iter(TEXTS), 290).digest == tokenizer.digest
    assert Tokenizer.train(TEXTS[:1], 290).digest != tokenizer.digest


def test_saved_and_loaded_or_sent_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.json"
    tokenizer.save(path)
    assert list(path.parent.iterdir()) == [path]
    for copy in (Tokenizer.load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.digest == tokenizer.digest
        assert copy.encode(f"the cat{END}") == tokenizer.encode(f"the cat{END}")


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is not the JSON of a tokenizer"):
        Tokenizer.load(path)
    path.write_text('{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    with pytest.raises(ValueError, match=r"has no special token <\|endoftext\|> or <\|end_of_text\|> or"):
        Tokenizer.load(path)


def test_pieces_encode_like_the_whole(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    text = "".join(
        rng.choice(["the", " cat", "\n", "\n\n", "  \n", "\n  ", "\t", "世界", "'s", "7", "!"]) for _ in range(200_000)
    )
    parts = list(pieces(text))
    assert len(parts) > 4
    assert "".join(parts) == text
    assert [i for part in tokenizer.encode_batch(parts) for i in part] == tokenizer.encode(text)
    assert list(pieces("x" * 200_000)) == ["x" * 200_000]
    assert list(pieces(" \n" * 100_000)) == [" \n" * 100_000]


LATER = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def foreign(tmp_path: Path, tokenizer: Tokenizer):
    """Give a function that writes a tokenizer.json as others make them, with some of it changed."""

    def write(**changes: object) -> Path:
        tree = json.loads(tokenizer.json)
        del tree["model"]["vocab"][END]
        vocab = {token: i for i, token in enumerate(tree["model"]["vocab"])}
        model = {**tree["model"], "vocab": vocab, **changes.pop("model", {})}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**tree, "added_tokens": [], "model": model, **changes}))
        return path

    return write


def added(*names: str, special: bool = True) -> list[dict]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": 289 + i, "content": name, "special": special, **flags} for i, name in enumerate(names)]


def test_a_given_tokenizer_without_an_end_gets_one(foreign, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = Tokenizer.given(foreign())
    assert (found.end_id, found.vocab_size) == (289, 290)
    assert found.encode(TEXTS[0] + END) == [i - 1 for i in tokenizer.encode(TEXTS[0] + END)]
    assert found.token_bytes.tolist() == [*tokenizer.token_bytes[1:].tolist(), 0]
    found.save(tmp_path / "saved.json")
    assert Tokenizer.load(tmp_path / "saved.json").encode(TEXTS[1]) == found.encode(TEXTS[1])
    assert Tokenizer.given(tmp_path / "saved.json").digest == found.digest


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_given_tokenizer_is_a_special_token_of_its_own(foreign, name: str) -> None:
    found = Tokenizer.given(foreign(added_tokens=added("<|user|>", name)))
    assert (found.end_id, found.vocab_size) == (290, 291)
    text = f"a<|user|>b{name}"
    assert not {289, 290} & set(found.encode(text)) and found.decode(found.encode(text)) == text
    assert found.token_bytes[289:].tolist() == [0, 0]
    both = Tokenizer.given(foreign(added_tokens=added("</s>", END)))
    assert both.end_id == 290


def test_tokens_that_are_written_as_text_count_their_bytes(foreign) -> None:
    found = Tokenizer.given(foreign(added_tokens=added("<｜User｜>", special=False)))
    ids = found.encode("é<｜User｜>")
    assert 289 in ids
    assert found.token_bytes[ids].sum() == len("é<｜User｜>".encode())
    assert found.end_id == 290


def test_ids_may_be_left_out_where_an_end_is_there(foreign) -> None:
    vocab = json.loads(foreign().read_text())["model"]["vocab"]
    vocab = {token: i + 5 * (i > 270) for token, i in vocab.items()}
    with pytest.raises(ValueError, match=r"leaves ids out, so that <\|endoftext\|> cannot be added"):
        Tokenizer.given(foreign(model={"vocab": vocab}))
    end = {**added("</s>")[0], "id": 294}
    found = Tokenizer.given(foreign(model={"vocab": {**vocab, "</s>": 294}}, added_tokens=[end]))
    ids = found.encode(TEXTS[0])
    assert (found.end_id, found.vocab_size) == (294, 295)
    assert max(ids) < 294 and found.token_bytes[ids].sum() == len(TEXTS[0])
    assert found.token_bytes[271:276].sum() == found.token_bytes[294] == 0


def test_a_given_tokenizer_neither_cuts_nor_pads_nor_adds(foreign) -> None:
    plain = Tokenizer.given(foreign(added_tokens=added("</s>")))
    dressed = foreign(
        added_tokens=added("</s>"),
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 289,
            "pad_type_id": 0,
            "pad_token": "</s>",
        },
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [289], "tokens": ["</s>"]}},
        },
    )
    found = Tokenizer.given(dressed)
    assert found.encode_batch(TEXTS) == [found.encode(text) for text in TEXTS] == plain.encode_batch(TEXTS)
    saved = Tokenizer(found.json)
    assert saved.encode_batch(TEXTS) == plain.encode_batch(TEXTS)


def test_pieces_encode_like_the_whole_where_punctuation_takes_line_breaks_along(foreign) -> None:
    split = {"type": "Split", "pattern": {"Regex": LATER}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = {"vocab": json.loads(foreign().read_text())["model"]["vocab"] | {"!Ċ": 289, "Ċt": 290}}
    merges["merges"] = [["!", "Ċ"], ["Ċ", "t"]]
    sequence = {"type": "Sequence", "pretokenizers": [split, level]}
    found = Tokenizer.given(foreign(model=merges, pre_tokenizer=sequence))
    rng = random.Random(0)
    text = "".join(rng.choice(["the", "!\n", "!!\n\n", "\n", " \n", "7", "世"]) for _ in range(200_000))
    parts = list(pieces(text))
    assert len(parts) > 3 and 289 in found.encode(text)
    assert [i for part in found.encode_batch(parts) for i in part] == found.encode(text)


WRONG = {
    "is not the JSON of a tokenizer": lambda write: write(version="9"),
    "does not always encode a text in the same way: it samples how words are split": lambda write: write(
        model={"dropout": 0.5}
    ),
    "is a BPE that does not encode every text: .* and 1 of the 256 bytes have no entry": lambda write: write(
        model={"vocab": {t: i for t, i in json.loads(write().read_text())["model"]["vocab"].items() if t != "!"}}
    ),
    "changes text by its normalizer Lowercase": lambda write: write(normalizer={"type": "Lowercase"}),
    "does not return text as it was, beyond what its normalizer says: .A b  c": lambda write: write(decoder=None),
}


@pytest.mark.parametrize("rule", WRONG)
def test_a_given_tokenizer_of_another_kind(foreign, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Tokenizer.given(WRONG[rule](foreign))


FORMS = {"NFC": "é ﬁ Ⅳ", "NFKC": "é fi IV", "NFD": "e\u0301 ﬁ Ⅳ"}


@pytest.mark.parametrize("name", FORMS)
def test_a_unicode_normal_form_is_what_comes_back(foreign, name: str) -> None:
    """As Qwen's: transformers' class for them always writes NFC."""
    found = Tokenizer.given(foreign(normalizer={"type": "Sequence", "normalizers": [{"type": name}]}))
    for text in ("é ﬁ Ⅳ", "e\u0301 ﬁ Ⅳ"):
        ids = found.encode(text)
        assert found.decode(ids) == found.normalize(text) == FORMS[name]
        assert found.token_bytes[ids].sum() == len(FORMS[name].encode())
    assert Tokenizer(found.json).normalize(text) == FORMS[name]
    rng = random.Random(0)
    long = "".join(rng.choice(["the", "\n", "e\u0301\n", "\n\u0301", "ﬁ\n", "世\n"]) for _ in range(200_000))
    parts = list(found.pieces(long))
    assert len(parts) > 3 and "".join(parts) == long
    assert [i for part in found.encode_batch(parts) for i in part] == found.encode(long)


def sentencepiece(path: Path, kind: str, **changes: object) -> Path:
    """Write a BPE with byte fallback as the files of Llama 2 have it, or as transformers' own class writes it."""
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t"), ("c", "at"), ("▁", "cat"), ("▁", "▁"), ("大", "家")]
    for token in [*"▁abcdefghijklmnopqrstuvwxyz.,!<>/é大家", *(a + b for a, b in merges)]:
        vocab.setdefault(token, len(vocab))
    special = [{**added(name)[0], "id": i} for i, name in enumerate(["<unk>", "<s>", "</s>"])]
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    tree = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True},
    }
    if kind == "llama 2":
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        tree["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    else:
        scheme = kind.removeprefix("metaspace ")
        tree["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    path.write_text(json.dumps({**tree, **changes}), encoding="utf-8")
    return path


KINDS = ("llama 2", "metaspace first", "metaspace always")


class TestSentencePiece:
    @pytest.fixture(params=KINDS)
    def found(self, request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
        return Tokenizer.given(sentencepiece(tmp_path / "tokenizer.json", request.param))

    def test_its_entries(self, found: Tokenizer) -> None:
        assert found.end_id == 2 and found.token_bytes[:3].tolist() == [0, 0, -1]  # the end takes the space back
        assert found.token_bytes[3:259].tolist() == [1] * 256
        ids = found.encode("the cat")
        assert found.token_bytes[ids].tolist() == [4, 4]  # each with its space
        assert not {0, 1, 2} & set(found.encode("a</s>b <s><unk>"))

    def test_any_text_comes_back(self, found: Tokenizer) -> None:
        rng = random.Random(0)
        words = ["the", " cat", "  ", "\n", "\r\n", "\t", "é", "e\u0301", "🙂", "大家", "</s>", "<0x41>", "\x00", "'s"]
        for _ in range(300):
            text = "".join(rng.choice(words) for _ in range(rng.randrange(1, 12)))
            ids = found.encode(text)
            assert found.decode(ids) == found.normalize(text)
            assert found.normalize(text) in (text, text.removeprefix(" "))
            assert found.token_bytes[ids].sum() == len(found.normalize(text).encode()) + 1
        assert found.normalize("a▁b") == found.decode(found.encode("a▁b")) == "a b"
        assert found.encode("") == []

    def test_a_continuation_keeps_its_first_space(self, found: Tokenizer) -> None:
        prompt, whole = found.encode("the"), found.encode("the cat")
        assert whole[: len(prompt)] == prompt
        assert found.decode(whole[len(prompt) :]) == "cat"
        assert found.continuation(prompt, whole[len(prompt) :]) == " cat"

    def test_a_long_text_is_not_cut(self, found: Tokenizer) -> None:
        text = "the cat\n" * 20_000
        (whole,) = found.pieces(text)
        assert whole == text


def test_transformers_writes_and_reads_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tree = json.loads(sentencepiece(tmp_path / "tokenizer.json", "llama 2").read_text(encoding="utf-8"))

    def pairs(model: dict) -> list[tuple[str, str]]:
        return [tuple(pair) for pair in model["merges"]]

    theirs = transformers.LlamaTokenizer(vocab=tree["model"]["vocab"], merges=pairs(tree["model"]))
    theirs.save_pretrained(tmp_path / "llama")
    level = json.loads(Tokenizer.train(iter(TEXTS), 290).json)["model"]
    qwen = transformers.Qwen2Tokenizer(vocab=level["vocab"], merges=pairs(level))
    qwen.save_pretrained(tmp_path / "qwen")
    for folder, other in (("llama", theirs), ("qwen", qwen)):
        found = Tokenizer.given(tmp_path / folder / "tokenizer.json")
        for text in ("the cat, é e\u0301 大家🙂\n", " the", "def f(x):\n    return x"):
            ids = found.encode(text)
            assert ids == other.encode(text, add_special_tokens=False)
            assert found.decode(ids) == other.decode(ids, clean_up_tokenization_spaces=False)


LOWER = {"type": "Lowercase"}
WRONG_PIECES = {
    "it has no complete byte fallback, and it is not on bytes": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True}
    },
    "changes text by its normalizer Lowercase": {"normalizer": LOWER},
    "does not return text as it was, .* becomes '▁<0x41>▁b▁▁c": {"decoder": {"type": "Fuse"}},
    "does not return text as it was, beyond what its normalizer says: 'a<x>b'": {"added_tokens": "x"},
}


@pytest.mark.parametrize("rule", WRONG_PIECES)
def test_sentencepiece_that_is_not_understood(tmp_path: Path, rule: str) -> None:
    path, changes = tmp_path / "t.json", WRONG_PIECES[rule]
    if changes.get("added_tokens"):  # after it the normalizer puts another space
        known = json.loads(sentencepiece(path, "llama 2").read_text(encoding="utf-8"))
        token = {**added("<x>", special=False)[0], "id": len(known["model"]["vocab"])}
        changes = {"added_tokens": [*known["added_tokens"], token]}
    with pytest.raises(ValueError, match=rule):
        Tokenizer.given(sentencepiece(path, "llama 2", **changes))


def test_a_file_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="is no regular file"):
        Tokenizer.given(tmp_path / "tokenizer.json")


def test_the_tokenizer_that_a_configuration_names(foreign, tmp_path: Path) -> None:
    path = foreign()
    assert Tokenizer.named(str(path), 290).vocab_size == 290
    with pytest.raises(DataError, match=r"data.tokenizer='.*' has 290 entries and data.vocab_size is 289. Fix: set "):
        Tokenizer.named(str(path), 289)
    with pytest.raises(DataError, match=r"data.tokenizer='none' cannot be read \(No such file.*except with init_from"):
        Tokenizer.named("none", 290)
    path.write_text(path.read_text(encoding="utf-8")[:500], encoding="utf-8")
    with pytest.raises(DataError, match=r"data.tokenizer='.*' is not the JSON of a tokenizer"):
        Tokenizer.named(str(path), 290)


class Slow:
    """Stands for the library, whose training neither returns to Python for seconds nor looks at signals."""

    finished = False

    def __init__(self, model: object) -> None:
        self.model = model

    def train_from_iterator(self, texts: object, trainer: object) -> None:
        try:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)
        finally:
            Slow.finished = True


def test_a_signal_ends_the_training_of_a_tokenizer_at_once(monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_module.tokenizers, "Tokenizer", Slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            Tokenizer.train(iter(TEXTS), 300)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not Slow.finished


def test_an_error_in_the_text_ends_the_training_of_a_tokenizer() -> None:
    def texts():
        yield "some words"
        raise LookupError("of the text")

    with pytest.raises(LookupError, match="of the text"):
        Tokenizer.train(texts(), 300)
