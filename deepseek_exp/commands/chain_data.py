"""Check the data of all stages of a chain before the first one starts."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_exp import huggingface
from deepseek_exp.checkpoint import manifest
from deepseek_exp.commands.train import with_epochs
from deepseek_exp.config import ExperimentConfig
from deepseek_exp.errors import ConfigError, Problem, UserError
from deepseek_exp.experiment.chain import Stage


@dataclass(frozen=True)
class _Trained:
    """What a stage hands on to those that start from it.

    Attributes:
        name: the stage, or the folder of the weights.
        template: digest of its chat template; None if it has none.
        tokenizer: path of its tokenizer.json; None if a folder's own is set already.
    """

    name: str
    template: str | None
    tokenizer: Path | None = None


def check_data(stages: Sequence[Stage]) -> None:
    """Prepare the data of every stage, each with the tokenizer that it will have.

    So what would stop a late stage is found now: a malformed row, one without supervised tokens, a text that is too
    short, a chat template other than that of the weights, a warm-up that takes all epochs.

    Args:
        stages: each after the one it starts from.

    Raises:
        UserError: of the kind of the first problem; has those of all stages, each with the stage's name.
    """
    errors: list[UserError] = []
    with tempfile.TemporaryDirectory() as top:
        known: dict[str, _Trained] = {}
        for stage in stages:
            if stage.start is not None and stage.start not in known:
                continue  # what is wrong with its start is reported
            try:
                known[stage.name] = _checked(stage, known.get(str(stage.start)), Path(top) / stage.name)
            except UserError as error:
                found = (dataclasses.replace(p, key=f"{stage.name}: {p.key}") for p in error.problems)
                errors.append(type(error)(*found))
    if errors:
        raise type(errors[0])(*(problem for error in errors for problem in error.problems))


def _checked(stage: Stage, start: _Trained | None, folder: Path) -> _Trained:
    """Check one stage, and write its tokenizer to a folder."""
    from deepseek_exp.data import prepare

    exp, start = stage.exp, start or _outside(stage.exp)
    if start is not None and start.tokenizer is not None and not stage.own_tokenizer:
        exp = dataclasses.replace(exp, data=dataclasses.replace(exp.data, tokenizer=str(start.tokenizer)))
    data = prepare(exp.data)
    template = None if data.template is None else data.template.digest
    problems = [] if start is None else list(_contract_problems(exp, start, template))
    if problems:
        raise ConfigError(*problems)
    with_epochs(exp)
    files = data.tokenizer.files() | ({} if data.template is None else data.template.files())
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return _Trained(stage.name, template, folder / "tokenizer.json")


def _outside(exp: ExperimentConfig) -> _Trained | None:
    """Return what the run that a stage starts from hands on, if it is one of ours."""
    if exp.init_from is None or not manifest.is_checkpoint(Path(exp.init_from)):
        return None
    contract = manifest.read_manifest(Path(exp.init_from)).lineage.contract
    return None if contract is None else _Trained(exp.init_from, contract.template)


def _contract_problems(exp: ExperimentConfig, start: _Trained, template: str | None) -> Iterator[Problem]:
    """Yield a problem for a tokenizer or chat template other than that of the weights that a stage starts from."""
    if start.tokenizer is not None and exp.data.tokenizer is not None:
        other = huggingface.other_tokenizer(start.tokenizer, exp.data.tokenizer)
        if other is not None:
            rule = f"has other ids than the tokenizer of {start.name}, whose weights the stage starts from"
            yield dataclasses.replace(other, rule=rule)
    if template is not None and start.template is not None and template != start.template:
        rule = f"is another chat template than that of {start.name}, whose weights the stage starts from"
        yield Problem("data.template", exp.data.template, rule, "set data.template=auto, or name the same template")
