"""No password or token is left in a redacted text, and nothing else is lost."""

from __future__ import annotations

import random
import time

import pytest

from deepseek_exp.redact import HIDDEN, redact, redact_tree

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"
HIDES = {
    "http://alice:S3@127.0.0.1:5000/x": "http://alice:***@127.0.0.1:5000/x",
    "postgresql://me:s3cret@host:5432/db": "postgresql://me:***@host:5432/db",
    "postgresql+psycopg2://a:p/w@h": "postgresql+psycopg2://a:***@h",
    "ftp://alice:pw@h": "ftp://alice:***@h",
    "http://a:p@w@h": "http://a:***@h",
    "http://a:p:w@h": "http://a:***@h",
    "http://a:p%2Fw%40@h": "http://a:***@h",
    "http://a:p w@h": "http://a:***@h",
    "redis://:pw@h": "redis://:***@h",
    "tracking.uri=http://a:p w@ss@h": "tracking.uri=http://a:***@h",
    "'tracking.uri=\"http://a:p w@h\"' x": "'tracking.uri=\"http://a:***@h\"' x",
    "uri=http://a:***@h:5 x=y@z": "uri=http://a:***@h:5 x=y@z",
    "see 'http://a:p\"w@ z@h' for more": "see 'http://a:***@h' for more",
    "see http://a:p w@h and more": "see http://a:***@h and more",
    "two: http://a:b@h mysql://c:d@h": "two: http://a:***@h mysql://c:***@h",
    "http://h/?next=http://a:b@h": "http://h/?next=http://a:***@h",
    "http://token@h:80/x": "http://***@h:80/x",
    "http://u@corp:p/w@h": "http://***:***@h",
    "postgresql://u@corp:p/w@h": "postgresql://u@corp:***@h",
    "git+ssh://abcdefghij1234567890@h": "git+ssh://***@h",
    "http://h/?user=u&password=pw&x=1": "http://h/?user=u&password=***&x=1",
    "http://h/?sig=ab%2B&access_token=abcdef1#top": "http://h/?sig=***&access_token=***#top",
    "http://h/?auth=ab;pwd=c": "http://h/?auth=***;pwd=***",
    '{"db_password": "a b\\"c", "x": 1}': '{"db_password": "***", "x": 1}',
    "{'apiKey': 'abc', 'x': 1}": "{'apiKey': '***', 'x': 1}",
    '{\\"client_secret\\": \\"a b\\", \\"x\\": 1}': '{\\"client_secret\\": \\"***\\", \\"x\\": 1}',
    "odbc_connect=DRIVER={O D};UID=u;PWD={a;b}}c};X=y": "odbc_connect=DRIVER={O D};UID=u;PWD=***;X=y",
    "x:///?odbc_connect=UID%3Du%3BPWD%3Dp%2Fw%3BX%3Dy": "x:///?odbc_connect=UID%3Du%3BPWD%3D***%3BX%3Dy",
    "x:///?odbc_connect=PWD%3D%7Bp%3Bw%7D%3BX%3Dy": "x:///?odbc_connect=PWD%3D***%3BX%3Dy",
    '\'x="http://a:p\\"w@h"\' y': "'x=\"http://a:***@h\"' y",
    "+tracking.tags.password=a b c": "+tracking.tags.password=***",
    "password=a b x.y=5": "password=***",
    "+a.password=*** x.y=5 b.token=abcdef": "+a.password=*** x.y=5 b.token=***",
    "a: 1\npassword: hunter2\nb: 2": "a: 1\npassword: ***\nb: 2",
    "a:\n  db_password: hunter 2\nb: 2": "a:\n  db_password: ***\nb: 2",
    "env AWS_SECRET_ACCESS_KEY=ab/c+d HF_TOKEN=abcdef": "env AWS_SECRET_ACCESS_KEY=*** HF_TOKEN=***",
    "run PGPASSWORD=1234 psql": "run PGPASSWORD=*** psql",
    "run --token abcdef --password=x y": "run --token *** --password=*** y",
    "os.environ['API_KEY'] = 'abc'": "os.environ['API_KEY'] = '***'",
    "password: str = 'abc'": "password: str = '***'",
    "(api_key=abc, x=1)": "(api_key=***, x=1)",
    "Authorization: Basic YTpi\nHost: h": "Authorization: ***\nHost: h",
    "curl -H 'Authorization: Bearer abc' h": "curl -H 'Authorization: ***' h",
    "sent Bearer abcdef123": "sent Bearer ***",
    f"+{PEM}\n": "+-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\n",
}
SHAPES = [
    "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
    "github_pat_11ABCDEFG0abcdefghijkl",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "sk-proj-abcdefghijkl1234567890",
    "AKIAIOSFODNN7EXAMPLE",
    "xoxb-123456789012-abcdef",
    "glpat-abcdefghij1234567890",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3.SflKxwRJSMeKKF2QT4",
]
KEEPS = [
    "http://host:5000/x",
    "http://h:5000 is down, mail a@b",
    "run x in http://h:5000; mail a@b.org",
    "ssh://git@github.com/a/b",
    "postgresql://me@h/d",
    "sqlite:////home/me@host/m.db",
    "https://registry.npmjs.org/@scope/pkg",
    "n_tokens=5 end_token=<endoftext> max_new_tokens=5 data.tokenizer=a/b.json data.text_key=text",
    "tokens_per_second: 3000 perf/flops_per_token=123456789 bits per token: 3.14159265",
    "eos_token: '<|endoftext|>' pad_token='<padding>'",
    "    token = next(tokens)\nnext_token = sampled[0]\ntoken: int = 100000",
    "password: null\ntoken: none\nsecret=\napi_key=${oc.env:KEY}",
    "sort(key=lambda row: row.name) auth: basic code=1234567",
    "a password is asked for; passwords: many; secretary: me; the token is lost",
    "-sk-learn-is-a-library-for-python hf_config_of_the_model",
]


@pytest.mark.parametrize("text", HIDES)
def test_what_is_secret_is_hidden(text: str) -> None:
    assert redact(text) == HIDES[text]


@pytest.mark.parametrize("token", SHAPES)
def test_tokens_of_a_known_shape_are_hidden_anywhere(token: str) -> None:
    assert redact(f"a {token}, b") == "a ***, b"


@pytest.mark.parametrize("text", KEEPS)
def test_what_is_not_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_a_tree_is_redacted_by_key_and_by_content() -> None:
    tree = {"db": {"password": 1234, "port": 5}, "uris": ["http://a:b@h", 1], "token": "s p", "password": None}
    hidden = {"db": {"password": HIDDEN, "port": 5}, "uris": ["http://a:***@h", 1], "token": HIDDEN, "password": None}
    assert redact_tree(tree) == hidden
    assert tree["token"] == "s p"
    same = {"n_tokens": 5, "end_token": "<eos>", "data": {"tokenizer": "x.json"}, "token": 12, "tokens": ["token"]}
    assert redact_tree(same) == same


def test_no_secret_survives_in_random_surroundings() -> None:
    """500 texts of secrets in each form; what surrounds them is random."""
    draw = random.Random(14)
    inner = "/@: %2F?#&=+,;!*()[]{}~^|\\S3crEt"
    for _ in range(500):
        middle = "".join(draw.choice(inner) for _ in range(draw.randrange(2, 12)))
        password = f"Zq{middle}qZ"
        address = f"{draw.choice(['http', 'postgresql+x', 'ftp'])}://{draw.choice(['', 'al', 'a.b'])}:{password}@h:5/x"
        forms = [
            address,
            f"+tracking.uri={address}",
            f"see '{address}' or \"{address}\".",
            f"+tracking.tags.db_password={password}",
            f'{{"a": 1, "token": "{password}"}}'.replace("\\", "\\\\"),
        ]
        if " " not in password:
            forms += [f"run it in {address} now", f"x\n  secret: {password}\ny"]
        for form in forms:
            text = redact(form)
            assert "Zq" not in text and "qZ" not in text, (form, text)


def test_redacting_twice_changes_nothing_more() -> None:
    draw = random.Random(7)
    pieces = [*HIDES, *KEEPS, *SHAPES, "://", "@", ":", "/", " ", "\n", '"', "'", "=", "token", "password", "a", "\\"]
    for _ in range(3000):
        text = "".join(draw.choice(pieces) for _ in range(draw.randrange(1, 8)))
        once = redact(text)
        assert redact(once) == once, text


@pytest.mark.parametrize(
    "piece",
    [
        "a://b:",
        "a://b:80 ",
        '"a://h:80 ',
        "a://b@",
        "://",
        "://x@y:",
        "token=",
        'token="',
        'token\\"=\\"',
        "token     ",
        "--token",
        "password=\\'",
        "sk-",
        "eyJ-",
        "eyJaaaaaaaa.",
        "Bearer ",
        "-----BEGIN PRIVATE KEY-----",
        "a" * 50,
        "+    hidden = self.token(x)  # some usual line of a diff, http://host:80/path\n",
    ],
)
def test_time_is_linear(piece: str) -> None:
    """A line of 240 kB takes at most 16 times as long as one of 30 kB; 8 times is linear, 64 times quadratic."""
    seconds = []
    for size in (30_000, 240_000):
        text = piece * (size // len(piece)) + "@"
        begin = time.process_time()
        redact(text)
        seconds.append(time.process_time() - begin)
    assert seconds[1] < max(16 * seconds[0], 0.1), seconds
