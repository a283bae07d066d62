"""The one table of metric names: meaning and unit of each number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """The meaning and unit of a metric."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats per token", "loss of the training batch: of text its cross entropy"),
    "train/bits_per_byte": Metric("bits per byte", "training loss per byte of text; comparable across tokenizers"),
    "val/loss": Metric("nats per token", "loss of the validation set: of text its cross entropy"),
    "val/loss/<part>": Metric("nats per token", "cross entropy of the validation text of one part of a mixture"),
    "val/max_violation": Metric(
        "1", "largest load of an expert / mean load - 1 over the validation set, mean over layers"
    ),
    "val/utilisation": Metric("0..1", "mean load / largest load of an expert over the validation set"),
    "train/mtp_loss": Metric("nats per token", "cross entropy of the tokens further ahead, mean over depths"),
    "val/loss_without_labels": Metric(
        "nats per token", "cross entropy of the validation set with every domain inferred by the routers"
    ),
    "val/bits_per_byte": Metric("bits per byte", "validation loss per byte of text; comparable across tokenizers"),
    "val/unigram_bits_per_byte": Metric(
        "bits per byte", "validation text under the training text's token frequencies alone: the bar to beat"
    ),
    "perf/tokens_per_second": Metric("tokens per second", "training tokens over wall time, all devices together"),
    "perf/step_seconds": Metric("seconds", "wall time of one optimizer step"),
    "perf/peak_memory_bytes": Metric("bytes", "largest memory that was in use on the device so far"),
    "perf/flops_per_token": Metric("FLOPs per token", "forward and backward, by the parameters that a token meets"),
    "parallel/peak_memory_bytes/<stage>": Metric(
        "bytes", "largest memory in use so far on a rank of a pipeline stage; of a CPU the process's resident memory"
    ),
    "parallel/bubble_fraction": Metric(
        "0..1", "(p - 1) / (m + p - 1) of p stages and m micro batches: the time that a stage waits for others"
    ),
    "data/tokens": Metric("tokens", "training tokens consumed so far"),
    "data/supervised_tokens": Metric("tokens", "targets of the training rows of instruction data that count"),
    "data/supervised_tokens_per_row": Metric("tokens per row", "the same, mean over rows"),
    "data/supervised_tokens_least": Metric("tokens", "the same, of the row with the fewest"),
    "data/rows_without_supervised_tokens": Metric("rows", "training rows that were dropped for having none"),
    "data/rows_longer_than_a_sequence": Metric("rows", "training rows that were truncated or dropped for their length"),
    "optim/lr": Metric("1", "learning rate of the step"),
    "optim/grad_norm": Metric("1", "global gradient norm before clipping"),
    "optim/skipped_steps": Metric("steps", "steps so far that were left out, their gradient being infinite or NaN"),
    "data/position": Metric("sequences", "training sequences consumed so far"),
    "data/epoch": Metric(
        "passes", "passes over the training data so far; of a mixture, sequences over those of all parts"
    ),
    "attn/gate": Metric("0..1", "mean share that the attention gate gives to local attention"),
    "ffn/active_fraction": Metric("0..1", "hidden units of a token that are not 0, mean over layers"),
    "moe/load_factor_max": Metric("1", "largest load / mean load of an expert (of its domain's experts) in the step"),
    "moe/max_violation": Metric("1", "largest load of an expert / mean load - 1 in the step, mean over layers"),
    "moe/utilisation": Metric("0..1", "mean load / largest load of an expert in the step, mean over layers"),
    "moe/load_cv": Metric("1", "standard deviation of the loads / mean load, mean over layers"),
    "moe/drop_rate": Metric("0..1", "token slots that no expert had room for"),
    "moe/balance_loss": Metric("nats per token", "weighted balance loss, sum over layers"),
    "moe/domain_loss": Metric("nats per token", "weighted loss of the domain classifiers, sum over layers"),
    "moe/domain_accuracy": Metric("0..1", "labelled tokens whose domain the classifiers tell, mean over layers"),
    "moe/use/<domain>": Metric("0..1", "share of the token slots that go to the experts of one domain"),
    "verify/loss_difference": Metric("nats per token", "training loss of the layout against that of one process"),
    "verify/grad_norm_difference": Metric("1", "gradient norm of the layout against that of one process, relative"),
    "verify/val_loss_difference": Metric("nats per token", "validation loss of the layout against that of one process"),
    "verify/weight_difference": Metric("1", "largest difference of an element of the final weights, absolute"),
    "verify/buffer_difference": Metric("1", "the same of the buffers, such as the biases that balance experts"),
    "val/length_baseline": Metric(
        "0..1", "preference accuracy of the better of: the longer, or the shorter completion"
    ),
    "grpo/reward": Metric("1", "mean reward of the sampled completions"),
    "grpo/pass_at_1": Metric("0..1", "sampled completions with the full reward"),
    "grpo/truncated": Metric("0..1", "sampled completions that did not end within grpo.max_new_tokens"),
    "grpo/completion_tokens": Metric("tokens", "mean length of the sampled completions"),
    "grpo/zero_variance_groups": Metric("0..1", "prompts whose completions all have the same reward, and no gradient"),
    "grpo/sampler_difference_mean": Metric(
        "nats", "mean absolute difference of a token's log-probability between sampler and trainer"
    ),
    "grpo/sampler_difference_max": Metric("nats", "the largest such difference"),
    "train/clip_fraction": Metric("0..1", "tokens whose probability ratio is clipped, and that have no gradient"),
    "train/kl": Metric("nats per token", "estimated KL divergence from the reference"),
    "val/reward": Metric(
        "1", "mean reward of the most likely completions of the validation prompts; val/loss is minus this"
    ),
    "val/pass_at_1": Metric("0..1", "validation prompts whose most likely completion has the full reward"),
    "train/preference_accuracy": Metric(
        "0..1", "pairs whose chosen completion has the higher reward; equal ones count half"
    ),
    "train/reward_margin": Metric("nats", "mean implicit reward of the chosen minus that of the rejected completion"),
    "train/chosen_reward": Metric("nats", "mean implicit reward of the chosen completion"),
    "train/rejected_reward": Metric("nats", "mean implicit reward of the rejected completion"),
    "val/preference_accuracy": Metric(
        "0..1", "pairs whose chosen completion has the higher reward; equal ones count half"
    ),
    "val/reward_margin": Metric("nats", "mean implicit reward of the chosen minus that of the rejected completion"),
    "val/chosen_reward": Metric("nats", "mean implicit reward of the chosen completion"),
    "val/rejected_reward": Metric("nats", "mean implicit reward of the rejected completion"),
    "eval/<task>/loss": Metric("nats per token", "cross entropy of the task's texts"),
    "eval/<task>/bits_per_byte": Metric("bits per byte", "the same per byte of normalized text"),
    "eval/<task>/agreement": Metric("0..1", "tokens at whose place evaluate.agree_with finds the same one most likely"),
    "eval/<task>/loss_change": Metric("nats per token", "loss of the task's texts minus that of evaluate.agree_with"),
    "eval/<task>/accuracy": Metric("0..1", "rows whose right choice is the most likely one"),
    "eval/<task>/accuracy_per_byte": Metric("0..1", "the same by log-likelihood per byte of the choice"),
    "eval/<task>/most_frequent_label": Metric("0..1", "accuracy of the answer that is right most often"),
    "eval/<task>/exact_match": Metric("0..1", "rows whose generated answer is the right number"),
    "eval/<task>/answered": Metric("0..1", "rows whose generated answer has a number"),
    "eval/<task>/pass_at_1": Metric("0..1", "problems whose generated program passes its tests"),
    "eval/<task>/<metric>": Metric("as the task says", "a metric of lm-eval; with _stderr, a standard error"),
    "sweep/best_val_loss": Metric("nats per token", "lowest final val/loss among the runs of a sweep"),
}


# Rows that stand for many names: <> is replaced by one word chosen by the user.
PATTERNS = {
    re.compile(re.sub("<.*?>", "[^/]+", re.escape(name))): metric for name, metric in METRICS.items() if "<" in name
}


def check_names(names: Iterable[str]) -> None:
    """Reject metric names that are not in the table.

    Raises:
        ValueError: names the metrics and the table.
    """
    if unknown := sorted(name for name in set(names) if _row(name) is None):
        raise ValueError(
            f"metric {', '.join(map(repr, unknown))} is not in METRICS (deepseek_exp/tracking/metrics.py): "
            "add it there with its unit and meaning."
        )


def describe(names: Iterable[str]) -> str:
    """Render the table's rows for the metrics that a run logged, as Markdown; empty if it logged none of them."""
    known = [(name, metric) for name in sorted(set(names)) if (metric := _row(name)) is not None]
    if not known:
        return ""
    rows = [f"| `{name}` | {metric.unit} | {metric.meaning} |" for name, metric in known]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows])


def _row(name: str) -> Metric | None:
    """Return the table's row for a name."""
    if "<" in name:
        return None
    fitting = (metric for pattern, metric in PATTERNS.items() if pattern.fullmatch(name))
    return METRICS.get(name) or next(fitting, None)
