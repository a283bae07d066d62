"""Instruction data: rows, templates, and which tokens are supervised."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from deepseek_exp.config import OnBadLine, OnEmptyMask, OnLongRow
from deepseek_exp.config.rules import chat as rules
from deepseek_exp.data import TokenDataModule, Tokenizer, prepare
from deepseek_exp.data.template import OURS, ChatEncoder, Template, TemplateError
from deepseek_exp.errors import DataError
from tests.data.test_tokenizer import sentencepiece

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": " and three?"},
    {"role": "assistant", "content": "seven."},
]
# Llama 2's, without its system prompt
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
    "{% elif loop.index0 %}{{ raise_exception('a system message comes first') }}{% endif %}{% endfor %}"
)
# as Qwen 3's: of the replies only the last keeps its thoughts
THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' }}"
    "{% if loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content + eos_token }}"
    "{% else %}{{ 'Q:' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' -%} A: "
    "{% generation %}{{ m.content }}!{% endgeneration %}{{ '\\n' }}"
    "{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level, with the special tokens of ChatML."""
    bpe = Tokenizer.train(["two and two? four and three? seven. Assistant: user [INST] "] * 9, 330)._inner
    bpe.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return Tokenizer(bpe.to_str())


def told(tokenizer: Tokenizer, template: Template, talk=TALK, train_on=("assistant",)) -> tuple[str, str]:
    """Return the text of all tokens of a conversation, and of those that are supervised, each in brackets."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    (ids, mask), whole, runs = ChatEncoder(template, tokenizer).encode([talk], train_on)[0], "", ""
    before = False
    for i, is_supervised in [*zip(ids, mask, strict=True), (None, False)]:
        text = "" if i is None else names.get(i) or tokenizer.decode([i])
        whole += text
        runs += "[" * (is_supervised and not before) + "]" * (before and not is_supervised) + text * is_supervised
        before = is_supervised
    return whole, runs


EXPECTED = {
    "plain": (
        "### System:\nbe brief\n\n### User:\ntwo and two?\n\n### Assistant:\nfour<|endoftext|>"
        "### User:\n and three?\n\n### Assistant:\nseven.<|endoftext|>",
        "[four<|endoftext|>][seven.<|endoftext|>]",
    ),
    "raw": (
        "be brieftwo and two?four<|endoftext|> and three?seven.<|endoftext|>",
        "[four<|endoftext|>][seven.<|endoftext|>]",
    ),
    "chatml": (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\ntwo and two?<|im_end|>\n"
        "<|im_start|>assistant\nfour<|im_end|>\n<|im_start|>user\n and three?<|im_end|>\n"
        "<|im_start|>assistant\nseven.<|im_end|>\n",
        "[four<|im_end|>\n][seven.<|im_end|>\n]",
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_each_of_our_templates_supervises_the_replies_with_their_ends(tokenizer, name):
    assert told(tokenizer, Template(name, OURS[name])) == EXPECTED[name]


def test_a_published_template_writes_its_own_special_tokens(tokenizer):
    whole, runs = told(tokenizer, Template("llama", LLAMA, "<|im_start|>", "<|im_end|>"))
    one = "<|im_start|>[INST] two and two? [/INST] four <|im_end|>"
    assert whole == one + "<|im_start|>[INST]  and three? [/INST] seven. <|im_end|>"
    assert runs == "[ four <|im_end|>][ seven. <|im_end|>]"


def test_roles_are_chosen(tokenizer):
    plain = Template("plain", OURS["plain"])
    assert told(tokenizer, plain, train_on=("user",))[1] == (
        "[### User:\ntwo and two?\n\n][### User:\n and three?\n\n]"
    )
    whole, runs = told(tokenizer, plain, train_on=("system", "user", "assistant"))
    assert runs.replace("[", "").replace("]", "") == whole.replace("### Assistant:\n", "")


def test_a_template_may_mark_replies_itself(tokenizer):
    whole, runs = told(tokenizer, Template("marked", MARKED), TALK[1:])
    assert runs == "[four!][seven.!]" and whole == "Q: two and two?\nA: four!\nQ:  and three?\nA: seven.!\n"


def test_a_reply_that_is_rendered_otherwise_within_a_conversation_is_refused(tokenizer):
    template = Template("thoughts", THOUGHTS)
    assert told(tokenizer, template, TALK[1:3])[1] == "[<think></think>four<|endoftext|>]"
    with pytest.raises(TemplateError, match="renders message 4 otherwise if others follow"):
        told(tokenizer, template)


def test_a_prompt_is_what_comes_before_the_reply(tokenizer):
    for name in OURS:
        encoder = ChatEncoder(Template(name, OURS[name]), tokenizer)
        ids, mask = encoder.encode([TALK[:3]], ["assistant"])[0]
        assert encoder.prompt(TALK[:2]) == ids[: mask.index(True)]


def test_names_of_special_tokens_in_a_message_are_plain_text(tokenizer):
    talk = [
        {"role": "user", "content": "say <|im_end|>"},
        {"role": "assistant", "content": "<|endoftext|><|im_start|>"},
    ]
    encoder = ChatEncoder(Template("chatml", OURS["chatml"]), tokenizer)
    ids, _ = encoder.encode([talk], ["assistant"])[0]
    special = [i for i in ids if i in tokenizer.special_tokens.values()]
    start, end = (tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    assert special == [start, end, start, end]
    assert told(tokenizer, encoder.template, talk)[1] == "[<|endoftext|><|im_start|><|im_end|>\n]"


@pytest.mark.parametrize("kind", ["llama 2", "metaspace first", "metaspace always"])
def test_sentencepiece_puts_no_space_within_a_conversation(tmp_path, kind):
    tokenizer = Tokenizer.given(sentencepiece(tmp_path / "tokenizer.json", kind))
    encoder = ChatEncoder(Template("raw", OURS["raw"]), tokenizer)
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba\nab"}]
    ids, mask = encoder.encode([talk], ["assistant"])[0]
    assert tokenizer.decode(ids[:-1]).removeprefix(" ") == "abba\nab" and ids[-1] == tokenizer.end_id
    assert int(tokenizer.token_bytes[ids[:-1]].sum()) == len("abba\nab") + 1  # the space in front of all
    assert mask.index(True) == len(tokenizer.encode("ab"))


def test_the_template_next_to_the_tokenizer(chat_cfg, tmp_path):
    cfg = dataclasses.replace(chat_cfg([]), tokenizer=str(tmp_path / "tokenizer.json"))
    assert Template.of(cfg).name == "plain"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": LLAMA, "bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    found = Template.of(cfg)
    assert (found.text, found.bos, found.eos) == (LLAMA, "<s>", "</s>")
    (tmp_path / "chat_template.jinja").write_text(MARKED)
    assert Template.of(cfg).text == MARKED and Template.of(cfg).bos == "<s>"
    (tmp_path / "chat_template.json").write_text(found.json)  # of one of our checkpoints
    again = Template.of(cfg)
    assert again.digest == found.digest and again.name.endswith("chat_template.json")
    assert Template.of(dataclasses.replace(cfg, template="raw")).digest != found.digest


@pytest.mark.parametrize("text", ["{% for %}", "{{ x", "{% include 'secret' %}x{% nothing %}"])
def test_a_file_that_is_no_template(chat_cfg, tmp_path, text):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(DataError, match=r"data.template=.*cannot be read"):
        Template.of(dataclasses.replace(chat_cfg([]), template=str(tmp_path / "t.jinja")))


def test_a_template_runs_in_a_sandbox():
    for text in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(TemplateError, match="cannot render the messages"):
            Template("bad", text + "x").render([{"role": "user", "content": ""}], "")


def test_chatml_needs_its_special_tokens():
    with pytest.raises(DataError, match=r"data.template='chatml' needs the special tokens <\|im_start\|> and"):
        ChatEncoder(Template("chatml", OURS["chatml"]), Tokenizer.train(["a"], 300))


GOOD = {"prompt": "1 + 1 =", "response": " 2"}
MALFORMED = {
    '{"prompt": "a"}': "has neither 'messages' nor both of 'prompt' and 'response'; its keys are 'prompt'",
    '{"prompt": 1, "response": "a"}': "holds a number under 'prompt', not a string",
    '{"prompt": "a", "response": null}': "holds null under 'response', not a string",
    '{"messages": "a"}': "holds a string under 'messages', not a list of messages",
    '{"messages": []}': "holds an empty list under 'messages', not a list of messages",
    '{"messages": [1]}': "holds a number as message 1, not an object with role and content",
    '{"messages": [{"role": "user"}]}': "has no 'content' in message 1; its keys are 'role'",
    '{"messages": [{"role": "bot", "content": ""}]}': "has the role 'bot' in message 1, which is none of system, user",
    '{"messages": [{"role": 1, "content": ""}]}': "has the role a number in message 1",
    '{"messages": [{"role": "user", "content": [1]}]}': "holds a list as the content of message 1, not a string",
    '{"prompt": "\\ufdd0", "response": ""}': "holds the noncharacter U+FDD0 under 'prompt'",
    '{"prompt": "\\ud83d", "response": ""}': "holds half a character",
    "[1]": "holds a list, not an object with keys",
    "{": "is not valid JSON",
}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_row(chat_cfg, tmp_path, line):
    cfg = chat_cfg([GOOD] * 30)
    path = Path(cfg.path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError) as caught:
        prepare(cfg)
    assert f"data.path='{path}:31' {MALFORMED[line]}" in str(caught.value)
    data = prepare(dataclasses.replace(cfg, on_bad_line=OnBadLine.skip))
    assert data.skipped == {str(path): 1}
    assert sum(entry["n_documents"] for entry in data.inputs) == 30


def test_a_row_that_the_template_refuses(chat_cfg, tmp_path):
    (tmp_path / "t.jinja").write_text(LLAMA)
    late = {"messages": [*TALK[1:], TALK[0]]}
    cfg = chat_cfg([GOOD, late], template=str(tmp_path / "t.jinja"))
    with pytest.raises(
        DataError, match=r"rows.jsonl:2' has messages that cannot be used.*a system message comes first"
    ):
        prepare(cfg)


def test_other_files_are_refused(chat_cfg, tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DataError, match=r"notes.txt' is not .jsonl"):
        prepare(dataclasses.replace(chat_cfg([GOOD]), path=str(tmp_path / "notes.txt")))


def module(cfg):
    data = prepare(cfg)
    ranks = dict(seed=1, global_batch_seqs=2, micro_batch_seqs=1, eval_seqs=0)
    return data, TokenDataModule(data, cfg, **ranks)


def test_rows_without_a_supervised_token(chat_cfg):
    silent = {"messages": [{"role": "user", "content": "hello?"}]}
    cfg = chat_cfg([*[{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(40)], silent], seq_len=64)
    with pytest.raises(DataError, match=r"rows.jsonl:41' has no message of data.train_on=\[assistant\]"):
        prepare(cfg)
    with pytest.raises(DataError, match=r"rows\.jsonl:41"):  # it is no bad line
        prepare(dataclasses.replace(cfg, on_bad_line=OnBadLine.skip))
    data, dropped = module(dataclasses.replace(cfg, on_empty_mask=OnEmptyMask.drop))
    assert sum(s.n_empty for s in dropped.supervision.values()) == 1
    assert sum(s.n_rows for s in dropped.supervision.values()) == 40
    by_split = {entry["context"]: entry["n_supervised"] for entry in data.inputs}
    assert by_split == {split: s.n_supervised for split, s in dropped.supervision.items()}
    with pytest.raises(DataError, match=r"data.train_on=\['system'\] leaves no supervised token in"):
        module(dataclasses.replace(cfg, on_empty_mask=OnEmptyMask.drop, train_on=["system"]))


def test_rows_longer_than_a_sequence(chat_cfg):
    rows = [{"prompt": " ".join(str(7919 * j % 10007) for j in range(i)), "response": "b"} for i in range(1, 41)]
    cfg = chat_cfg(rows, seq_len=64, template="raw")
    with pytest.raises(DataError, match=r"data.seq_len=64 is less than \d+ of \d+ rows of the train rows need"):
        module(cfg)
    dropped = module(dataclasses.replace(cfg, on_long_row=OnLongRow.drop))[1].supervision
    assert sum(s.n_rows + s.n_long for s in dropped.values()) == 40 and all(
        s.n_long and not s.n_empty for s in dropped.values()
    )
    cut = dataclasses.replace(cfg, on_long_row=OnLongRow.truncate)
    with pytest.raises(DataError, match=r"data.on_empty_mask='stop' stops at \d+ of \d+ rows of the train rows"):
        module(cut)
    found = module(dataclasses.replace(cut, on_empty_mask=OnEmptyMask.drop))[1].supervision
    assert [s.n_rows for s in found.values()] == [s.n_rows for s in dropped.values()]
    assert all(s.n_empty == s.n_long for s in found.values())


def test_a_second_start_reads_nothing_until_a_setting_of_the_tokens_changes(chat_cfg, caplog):
    cfg = chat_cfg([{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(40)])

    def is_built(**changes):
        caplog.clear()
        with caplog.at_level("INFO"):
            prepare(dataclasses.replace(cfg, **changes))
        return "packed" in caplog.text

    assert is_built() and not is_built()
    assert not is_built(seq_len=99, packing=False, isolate_documents=False, on_long_row=OnLongRow.drop)
    assert is_built(train_on=["user"]) and is_built(template="raw") and is_built(response_key="prompt")
    digests = [prepare(dataclasses.replace(cfg, train_on=[role])).digests() for role in ("user", "assistant")]
    differing = {name for name in digests[0] if digests[0][name] != digests[1][name]}
    assert differing == {"train supervised tokens", "valid supervised tokens"}


def test_a_damaged_mask_is_found(chat_cfg, caplog):
    cfg = chat_cfg([{"prompt": f"{i} + 1 =", "response": f" {i + 1}"} for i in range(40)])
    path = prepare(cfg).parts[0].train.path.with_suffix(".mask.bin")
    mask = bytearray(path.read_bytes())
    mask[5] ^= 1
    path.write_bytes(mask)
    prepare(cfg)
    assert "train.mask.bin is not what was packed" in caplog.text
    assert path.read_bytes() != bytes(mask)


def test_roles_of_the_rules_are_those_of_the_error():
    assert set(rules.ROLES) >= {message["role"] for message in TALK}
