"""Check, before the first step, that documents of one sequence do not see each other."""

from __future__ import annotations

import pytorch_lightning as pl
import torch

from deepseek_exp.config import Precision
from deepseek_exp.config.topology import degrees
from deepseek_exp.console import say
from deepseek_exp.errors import DataError, Problem

# Largest change of a loss, in nats per token, that rounding explains: routed tokens are summed in another order, and in
# fp8 all tokens share one scale.
TOLERANCE = {Precision.fp32: 1e-4, Precision.bf16: 0.05, Precision.fp8: 0.5}


def check_isolation(lit: pl.LightningModule) -> None:
    """Change one document of some training sequences, and compare the losses of the others with those before.

    All ranks call it together. Nothing of the model changes.

    Args:
        lit: the language model, in training, with its engine started.

    Raises:
        DataError: the loss of another document has changed.
    """
    batch = lit.trainer.datamodule.isolated_sample()
    if batch is None:
        if lit.trainer.is_global_zero:
            say("isolation  no sequence holds two documents, so there is nothing to check")
        return
    batch = lit.transfer_batch_to_device(batch, lit.device, 0)
    whole = lit.micro_batch(batch)
    first, inputs = whole.document == whole.document[:, :1], whole.tokens[:, :-1]
    inputs = torch.where(first, (inputs + 1) % len(lit.token_bytes), inputs)
    changed = whole._replace(tokens=torch.cat([inputs, whole.tokens[:, -1:]], 1))
    before, after = (lit.nll_without_training(each) for each in (whole, changed))
    found = torch.zeros(2, dtype=torch.float64, device=lit.device)
    if before is not None:
        difference = (after - before).abs().double()
        for i, mask in enumerate((first, ~first)):
            found[i] = difference.masked_fill(~(mask & whole.loss_mask), 0).max()
    (summed,), _ = lit.ranks.sum([found], [])
    own, others = (summed / degrees(lit.cfg).dp).tolist()  # data-parallel ranks have the same sequences
    if others > TOLERANCE[lit.cfg.trainer.precision]:
        rule = f"does not hold: changing one document changes the loss of another by {others:.2g} nats"
        fix = "set data.isolate_documents=false, and report the layout and the kernels"
        raise DataError(Problem("data.isolate_documents", True, rule, fix))
    if lit.trainer.is_global_zero:
        effect = f"its own losses by up to {own:.2g} nats, the others' by {others:.2g}"
        say(f"isolation  changing one document of a sequence changes {effect}")
