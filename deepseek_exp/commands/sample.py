"""do=sample."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from deepseek_exp.config.schema import ExperimentConfig
from deepseek_exp.console import say, shown
from deepseek_exp.disk import expand
from deepseek_exp.errors import ConfigError, Problem
from deepseek_exp.experiment.job import Job

if TYPE_CHECKING:
    from deepseek_exp.data import Tokenizer
    from deepseek_exp.data.template import ChatEncoder
    from deepseek_exp.models import Transformer


def sample(job: Job) -> None:
    """Print a continuation of the prompt by a checkpoint with its own tokenizer. Not recorded in MLflow."""
    from deepseek_exp import inference
    from deepseek_exp.data import Tokenizer
    from deepseek_exp.parallel import runtime
    from deepseek_exp.train import build

    if job.checkpoint is not None:
        tokenizer = Tokenizer.load(job.checkpoint / "tokenizer.json")
    else:
        tokenizer = Tokenizer.named(job.cfg.data.tokenizer, job.cfg.data.vocab_size)
    asked = any(o.startswith("sample.max_new_tokens=") for o in job.overrides)
    cfg, encoder = with_prompt(job.cfg, ""), _encoder(job, tokenizer) if job.cfg.sample.as_message else None
    n_prompt = len(_prompt(cfg, tokenizer, encoder))
    _check_prompt(cfg, n_prompt, every_token=asked)
    device = build.pick_device(job.cfg.device)
    build.check_memory(job.cfg, device)
    runtime.set_up_torch(job.cfg)
    model = build.build_model(job.cfg, device, job.checkpoint)
    if job.cfg.sample.weight_bits:
        saved = inference.quantize_matrices(model, job.cfg.sample.weight_bits)
        say(f"quantized weights to {job.cfg.sample.weight_bits} bits, saving {saved / 1e6:,.1f} MB")
    say(sample_text(cfg, model, tokenizer, encoder))


def _encoder(job: Job, tokenizer: Tokenizer) -> ChatEncoder:
    """Return what encodes messages for the model: by the chat template that it was trained with.

    Raises:
        ConfigError: there is none.
    """
    from deepseek_exp.data.template import ChatEncoder, Template

    where = job.checkpoint / "tokenizer.json" if job.checkpoint is not None else expand(str(job.cfg.data.tokenizer))
    template = Template.next_to(where)
    if template is None:
        rule = f"needs a chat template, and {shown(where.parent)} has none: the model was not trained on messages"
        raise ConfigError(Problem("sample.as_message", True, rule, "set sample.as_message=false"))
    return ChatEncoder(template, tokenizer)


def _prompt(cfg: ExperimentConfig, tokenizer: Tokenizer, encoder: ChatEncoder | None) -> list[int]:
    """Return the token ids that are to be continued."""
    if encoder is None:
        return tokenizer.prompt(cfg.sample.prompt)
    return encoder.prompt([{"role": "user", "content": cfg.sample.prompt}])


def with_prompt(cfg: ExperimentConfig, prompt: str) -> ExperimentConfig:
    """Return the configuration with this prompt, unless it already has one."""
    if cfg.sample.prompt is not None:
        return cfg
    return dataclasses.replace(cfg, sample=dataclasses.replace(cfg.sample, prompt=prompt))


def _check_prompt(cfg: ExperimentConfig, n_prompt: int, *, every_token: bool) -> None:
    """Raise an error if a prompt of `n_prompt` tokens leaves no room for one new token, or for all (`every_token`)."""
    s, longest = cfg.sample, cfg.model.max_seq_len
    left = longest - max(1, n_prompt)
    if left < 1:
        rule = f"has {n_prompt} tokens, and with model.max_seq_len={longest} there is no room for a new one"
        raise ConfigError(Problem("sample.prompt", s.prompt, rule, f"shorten it to {longest - 1} tokens or less"))
    if every_token and s.max_new_tokens > left:
        rule = f"and a prompt of {n_prompt} tokens are more than model.max_seq_len={longest}"
        fix = f"use {left} or less, or a shorter prompt"
        raise ConfigError(Problem("sample.max_new_tokens", s.max_new_tokens, rule, fix))


def sample_text(
    cfg: ExperimentConfig, model: Transformer, tokenizer: Tokenizer, encoder: ChatEncoder | None = None
) -> str:
    """Return the configured prompt and the model's continuation, at most as many tokens as fit into max_seq_len.

    If the prompt leaves no room, only its last max_seq_len / 2 tokens are used.

    Args:
        cfg: the experiment.
        model: the model.
        tokenizer: its tokenizer.
        encoder: if the prompt is a message to be replied to; the continuation is the reply, on its own line.
    """
    from deepseek_exp.inference import generate

    s, longest = cfg.sample, cfg.model.max_seq_len
    text, prompt = s.prompt, _prompt(cfg, tokenizer, encoder)
    if len(prompt) >= longest:
        prompt = prompt[-(longest // 2) :]
        text = tokenizer.decode(prompt)
    tokens = generate(
        model.eval(),
        prompt,
        max_new_tokens=min(s.max_new_tokens, longest - max(1, len(prompt))),
        temperature=s.temperature,
        top_p=s.top_p,
        seed=cfg.seed,
        end_id=tokenizer.end_id if encoder is None else encoder.end_id,
        domain=None if s.domain is None else cfg.model.moe.domains.index(s.domain),
    )
    return text + "\n" * (encoder is not None) + tokenizer.continuation(prompt, tokens)
