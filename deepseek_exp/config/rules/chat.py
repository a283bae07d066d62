"""Rules of instruction data, and of documents that do not see each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from deepseek_exp.config.enums import Do, Kernel, Order, Source
from deepseek_exp.config.limits import TEMPLATES
from deepseek_exp.config.rules.values import is_file
from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.disk import expand
from deepseek_exp.errors import Problem

ROLES = ("system", "user", "assistant", "tool")
# Keys that only instruction data reads.
OF_CHAT = ("prompt_key", "response_key", "template", "train_on", "packing", "on_long_row", "on_empty_mask")


def chat_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems of instruction data and the verb that learns it."""
    d = exp.data
    if d.source is Source.chat and exp.do is Do.train:
        yield Problem("data.source", d.source.value, "is trained on by do=sft, and this is do=train", "set do=sft")
    if d.source is not Source.chat:
        if exp.do is Do.sft:
            rule = f"trains on the replies of instruction data, and data.source='{d.source.value}' has none"
            yield Problem("do", exp.do.value, rule, "add data=chat data.path=<file.jsonl>, or set do=train")
        return
    if d.order is not Order.shuffled:
        rule = "cannot be used with data.source='chat', whose rows do not continue each other"
        yield Problem("data.order", d.order.value, rule, "set data.order=shuffled")
    unknown = [role for role in d.train_on if role not in ROLES]
    if unknown or not d.train_on:
        rule = f"has {unknown[0]!r}, which is no role" if unknown else "names no role, so that no token is supervised"
        yield Problem("data.train_on", list(d.train_on), rule, f"use some of {', '.join(ROLES)}, as in [assistant]")
    yield from template_problems(exp)


def template_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem if the chat template is neither one of ours nor a file."""
    d = exp.data
    if d.template not in ("auto", *TEMPLATES) and not is_file(expand(d.template)):
        rule = f"is neither auto, {', '.join(TEMPLATES)} nor the path of a file"
        yield Problem("data.template", d.template, rule, "use one of them, or name a Jinja file")


def isolation_problems(exp: ExperimentConfig) -> Iterator[Problem]:
    """Yield problems of documents that do not see each other."""
    d, m = exp.data, exp.model
    if not d.isolate_documents or exp.do in (Do.sample, Do.export):
        return
    fix = "or data.isolate_documents=false"
    if m.memory_len:
        rule = f"cannot be used with model.memory_len={m.memory_len}, whose keys are those of the text before"
        yield Problem("data.isolate_documents", True, rule, f"set model.memory_len=0, {fix}")
    if m.window and exp.kernels.local_global_attention is Kernel.triton and (d.packing or d.source is not Source.chat):
        rule = f"cannot be used with the fused attention over model.window={m.window}, whose tiles know no documents"
        yield Problem("data.isolate_documents", True, rule, f"set kernels.local_global_attention=torch, {fix}")


def unread_chat_problems(exp: ExperimentConfig, named: Collection[str]) -> Iterator[Problem]:
    """Yield a problem for each key of instruction data that the command line sets while there is none.

    Args:
        exp: the experiment.
        named: the keys that the command line names.
    """
    if exp.data.source is Source.chat:
        return
    renders = exp.data.source in (Source.preference, Source.prompts)
    for name in OF_CHAT:
        path = f"data.{name}"
        if path in named and not (name == "template" and renders):
            rule = f"does nothing while data.source='{exp.data.source.value}'"
            yield Problem(path, getattr(exp.data, name), rule, f"leave {path} out, or add data=chat")
