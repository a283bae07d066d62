import pickle
import random
from pathlib import Path

import pytest

from deepseek_exp.data.tokenizer import END, Tokenizer, pieces

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
