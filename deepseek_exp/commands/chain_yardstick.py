"""Compare the stages of a chain on the same tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_exp.checkpoint import manifest
from deepseek_exp.commands.chain_text import Row
from deepseek_exp.config import Do, ExperimentConfig, Source
from deepseek_exp.errors import DataError, Problem
from deepseek_exp.experiment.chain import WITHOUT_TEXT, Stage
from deepseek_exp.experiment.chain_file import Record
from deepseek_exp.huggingface.files import TOKENIZER

if TYPE_CHECKING:
    from deepseek_exp.data.shards import Shard
    from deepseek_exp.evaluate import Scores, TokenSet


class Yardstick:
    """Scores the stages, and keeps the scores in files of the chain's folder.

    Attributes:
        rows: the results so far.
    """

    def __init__(self, exp: ExperimentConfig, stages: Sequence[Stage], folder: Path) -> None:
        """Choose what to score on.

        Args:
            exp: the shared tree; its section `chain.yardstick` is used.
            stages: all stages.
            folder: where scores are kept.
        """
        self.exp, self.folder, self.rows = exp, folder, list[Row]()
        self._training = [stage for stage in stages if stage.do is not Do.eval]
        self._sets: dict[str, TokenSet] = {}  # digest of the tokenizer -> tokens
        self._scores: dict[str, tuple[TokenSet, Scores]] = {}

    def row(self, stage: Stage, done: Record, checkpoint: Path | None, *, reused: bool) -> Row:
        """Score the checkpoint of a stage, if it has one, and add its row."""
        row = Row(
            stage=stage.name,
            do=stage.do.value,
            start=stage.start or "",
            n_parameters=None,
            n_bytes=None,
            loss=None,
            by_text={},
            bits_per_byte=None,
            to_start=None,
            to_first=None,
            agreement=None,
            val_loss=done.loss,
            tokens_per_second=done.tokens_per_second,
            seconds=done.seconds,
            reused=reused,
        )
        if checkpoint is not None and self.exp.chain.yardstick.tokens:
            row = self._scored(row, stage, checkpoint)
        self.rows.append(row)
        return row

    def _scored(self, row: Row, stage: Stage, checkpoint: Path) -> Row:
        from deepseek_exp.evaluate import agreement, change

        tokens, scores = self._score(stage, checkpoint)
        comparable = [n for n, (other, _) in self._scores.items() if other.digest == tokens.digest]
        start = self._scores[stage.start][1] if stage.start in comparable else None
        first = self._scores[comparable[0]][1] if comparable and comparable[0] == next(iter(self._scores)) else None
        self._scores[stage.name] = tokens, scores
        return dataclasses.replace(
            row,
            n_parameters=scores.n_parameters,
            n_bytes=scores.n_bytes,
            loss=scores.loss,
            by_text=scores.by_text(tokens),
            bits_per_byte=scores.loss * scores.nll.numel() / math.log(2) / tokens.n_bytes,
            to_start=None if start is None else change(scores, start),
            to_first=None if first is None else change(scores, first),
            agreement=None if first is None else agreement(scores, first),
        )

    def _score(self, stage: Stage, checkpoint: Path) -> tuple[TokenSet, Scores]:
        """Return the tokens and the scores of a checkpoint, from the file of an earlier start if there is one."""
        import torch

        from deepseek_exp.evaluate import Scores, score
        from deepseek_exp.train.build import pick_device

        tokens = self._tokens(checkpoint)
        path = self.folder / f"{manifest.digest(checkpoint)[:24]}-{tokens.digest[:24]}.safetensors"
        if path.is_file():
            return tokens, Scores.load(path)
        cfg = stage.exp
        scores = score(checkpoint, tokens, pick_device(cfg.device), getattr(torch, cfg.trainer.precision.dtype_name))
        self.folder.mkdir(exist_ok=True)
        scores.save(path)
        return tokens, scores

    def _tokens(self, checkpoint: Path) -> TokenSet:
        """Return the tokens of the yardstick's texts in a checkpoint's tokenizer."""
        from deepseek_exp.data import prepare
        from deepseek_exp.evaluate import token_set

        asked, first = self.exp.chain.yardstick, self._training[0].exp
        tokenizer = str(checkpoint / TOKENIZER)
        with_text = [stage for stage in self._training if stage.exp.data.source not in WITHOUT_TEXT]
        sections = {stage.name: stage.exp.data for stage in with_text}
        if asked.path is not None:
            text = {"source": Source.text, "path": asked.path, "valid_path": asked.path, "mixture": {}}
            sections = {Path(asked.path).name: dataclasses.replace(first.data, **text, max_bytes=None)}
        texts: dict[str, Shard] = {}
        for name, section in sections.items():
            data = prepare(dataclasses.replace(section, tokenizer=tokenizer))
            if data.tokenizer.digest in self._sets:
                return self._sets[data.tokenizer.digest]
            for part in data.parts:
                if part.valid.tokens_digest not in {shard.tokens_digest for shard in texts.values()}:
                    texts[f"{name}/{part.name}" if part.name else name] = part.valid
        lengths = [(stage.exp.data.seq_len, stage.exp.model.max_seq_len) for stage in self._training]
        seq_len = min(min(pair) for pair in lengths)
        texts = {name: shard for name, shard in texts.items() if shard.n_tokens > seq_len}
        if not texts:
            rule = f"finds no text of more than the {seq_len} tokens of a sequence"
            fix = "set chain.yardstick.path to a longer text, or chain.yardstick.tokens=0"
            raise DataError(Problem("chain.yardstick.path", asked.path, rule, fix))
        found = token_set(texts, data.tokenizer.token_bytes, seq_len, asked.tokens)
        self._sets[data.tokenizer.digest] = found
        return found
