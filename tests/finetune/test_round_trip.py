"""From a model of transformers through fine-tuning with adapters and back, into transformers and peft."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from deepseek_exp.data.template import Template
from deepseek_exp.inference import from_pretrained
from tests import forks, runs
from tests.data import tokenizer_kinds
from tests.huggingface.releases import CASES, transformers
from tests.huggingface.test_parity import distance

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = [{"prompt": f"what of {i}?", "response": f"the cat sat on {i % 7}"} for i in range(60)]
WORDS = [word for word in runs.QUICK if not word.startswith(("size=", "data="))]
CHAT = [{"role": "user", "content": "what of 3?"}, {"role": "assistant", "content": "the cat"}]


def write_qwen3(release):
    """Write a tokenizer of the kind of tiktoken, with a chat template; return the words that name it."""
    tokenizer_kinds.write("tiktoken", release, chat_template=TEMPLATE)
    return []


def write_llama(release):
    """Write a SentencePiece model and nothing else, as Llama 2 came; return the words that name it."""
    (release / "tokenizer.model").write_bytes(tokenizer_kinds.sentencepiece_model("bpe"))
    return ["data.tokenizer=release/tokenizer.model"]


@pytest.fixture(scope="module", params=[("qwen3", write_qwen3), ("llama", write_llama)], ids=lambda case: case[0])
def tuned(request, tmp_path_factory):
    """Fine-tune a random model with adapters, and export it for transformers and for peft."""
    case, write_tokenizer = request.param
    folder = tmp_path_factory.mktemp(case)
    family, fields = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**fields, "vocab_size": 512})
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base.save_pretrained(folder / "release")
    named = write_tokenizer(folder / "release")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = ("do=sft", "data=chat", "data.path=rows.jsonl", *named)
    for words in (
        ("init_from=release", *data, "lora=default", "optim.lr=1e-2", "device=cpu", *WORDS),
        ("do=export", "resume=last", "export.path=merged"),
        ("do=export", "resume=last", "export.path=adapter", "export.format=peft"),
    ):
        done = forks.run(folder, *words)
        assert done.returncode == 0, done.stderr
    (run_dir,) = runs.run_dirs(folder)
    return folder, base, from_pretrained(run_dir), run_dir


@torch.no_grad()
def logits(model):
    found = model(torch.arange(40).view(2, 20) * 7 % 500)
    return getattr(found, "logits", found)


@pytest.mark.long
def test_the_merged_model_is_loaded_by_transformers(tuned):
    folder, base, ours, run_dir = tuned
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert distance(logits(ours.model), logits(base)) > 1e-2
    assert distance(logits(theirs), logits(ours.model)) < 1e-5
    again = from_pretrained(folder / "merged")
    assert distance(logits(again.model), logits(ours.model)) < 1e-6
    losses = list(runs.trace(run_dir, "train/loss").values())
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.long
def test_the_tokenizer_and_its_template_are_loaded_by_transformers(tuned):
    folder, _, ours, run_dir = tuned
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    for text in ("the cat sat on the mat", "大家好 ☃", "a  b\n"):
        assert theirs.encode(text, add_special_tokens=False) == ours.tokenizer.encode(text)
        assert theirs.decode(ours.tokenizer.encode(text)) == text
    template = Template.next_to(run_dir / "checkpoints" / "step-00000012" / "tokenizer.json")
    rendered = template.render(CHAT[:1], theirs.eos_token, ask=True)
    assert theirs.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True) == rendered
    assert theirs.eos_token in theirs.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.long
def test_the_adapter_is_loaded_by_peft_on_the_model_of_transformers(tuned):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder, base, ours, _ = tuned
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter").eval()
    assert distance(logits(adapted), logits(ours.model)) < 1e-5
    with adapted.disable_adapter():
        assert distance(logits(adapted), logits(ours.model)) > 1e-2
