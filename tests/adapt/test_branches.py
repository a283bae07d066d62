"""Branches of v5: merged from checkpoints, in a run, and as the stages of a chain."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from deepseek_exp.adapt import merge_branches
from deepseek_exp.checkpoint import manifest
from deepseek_exp.checkpoint.lightning_io import load_weights
from deepseek_exp.errors import ChainError
from deepseek_exp.experiment.chain_file import ChainFile
from deepseek_exp.kernels import TORCH
from deepseek_exp.models import Transformer, init_weights
from deepseek_exp.train.build import build_model
from tests import forks, runs
from tests.commands.test_chain import run
from tests.config.test_config import composed

DOMAINS = ("general", "finance", "medical", "law")
MODEL = (
    "model=v5_domain_moe", "size=tiny", f"model.moe.domains=[{','.join(DOMAINS)}]", "model.moe.n_routed_experts=8",
    "model.moe.top_k=2", "model.moe.d_expert=16",
)  # fmt: skip
CFG = composed(*MODEL).model


def model(seed: int) -> Transformer:
    """Make a model, with biases of its router that are not 0."""
    made = Transformer(CFG, TORCH)
    init_weights(made, CFG, seed)
    for name, buffer in made.named_buffers():
        if name.endswith("router.bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed)) / 100)
    return made.eval()


def saved(folder, weights):
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"aliases": json.dumps({})})
    return folder


class TestMergeBranches:
    def test_equal_branches_are_merged_into_themselves(self, tmp_path):
        weights = model(1).state_dict()
        same = {name: saved(tmp_path / name, weights) for name in DOMAINS[1:]}
        merged = merge_branches(same, DOMAINS)
        assert merged.keys() == weights.keys() and all(torch.equal(merged[n], weights[n]) for n in weights)

    def test_rows_of_a_domain_are_those_of_its_branch_and_the_rest_is_the_mean(self, tmp_path):
        law, finance = (model(seed).state_dict() for seed in (1, 2))
        folders = {"law": saved(tmp_path / "law", law), "finance": saved(tmp_path / "finance", finance)}
        merged = merge_branches(folders, DOMAINS)
        by_domain = [n for n in merged if n.split("feed_forward.")[-1].startswith(("experts", "router"))]
        assert len(by_domain) == 6 * CFG.n_layers  # three stacks; the router's rows, biases and classifier
        for name in merged:
            mean = (law[name] + finance[name]) / 2
            if name not in by_domain:
                torch.testing.assert_close(merged[name], mean, rtol=1e-6, atol=1e-9)
                continue
            for i, own in enumerate((None, finance, None, law)):
                rows = slice(i * len(mean) // 4, (i + 1) * len(mean) // 4)
                if own is None:
                    torch.testing.assert_close(merged[name][rows], mean[rows], rtol=1e-6, atol=1e-9)
                else:
                    assert torch.equal(merged[name][rows], own[name][rows])

    def test_branches_that_train_only_their_experts_keep_their_function(self, tmp_path):
        start, folders, logits = model(1), {}, {}
        tokens = torch.randint(0, CFG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        for i, name in enumerate(DOMAINS):
            branch = model(1)
            for layer in (block.feed_forward for block in branch.blocks):
                for p in layer.domain_state(i).values():
                    p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 10)
            if i:  # the experts of the first domain are open to all, so they stay those of the start
                folders[name] = saved(tmp_path / name, branch.state_dict())
                logits[i] = branch(tokens, domain=torch.tensor([i, i]))
        merged = model(2)
        merged.load_state_dict(merge_branches(folders, DOMAINS))
        for i, want in logits.items():
            assert torch.equal(merged(tokens, domain=torch.tensor([i, i])), want)
            assert not torch.equal(start(tokens, domain=torch.tensor([i, i])), want)


TEXTS = {"general": "the {0}th word", "law": "party {0} agrees", "finance": "{0} + {0} = {1}"}
NAME = "all-law-finance-merged"
ONLY_ROUTERS = "{embedding.*:0,head.*:0,*norm.weight:0,*.attention.*:0,*.shared.*:0,*.experts.*:0}"


def stages(folder) -> list[str]:
    """Write the texts; return the words of a chain of a start, two branches and their merge."""
    for name, line in TEXTS.items():
        (folder / f"{name}.txt").write_text("".join(line.format(i, 2 * i) + "\n" for i in range(2000)))
    part = {name: f"{name}:{{path:{name}.txt}}" for name in TEXTS}
    every = ",".join(part.values())
    return [
        *(word for word in runs.QUICK if word not in ("size=tiny", "data=synthetic")),
        *MODEL, "data=mixture", "trainer.max_steps=4", "trainer.eval_every_steps=4", "chain.yardstick.tokens=0",
        f"+chain.stages.all={{do:train,set:{{data.mixture:{{{every}}}}}}}",
        f"+chain.stages.law={{do:train,start:all,set:{{data.mixture:{{{part['law']}}}}}}}",
        f"+chain.stages.finance={{do:train,start:all,set:{{data.mixture:{{{part['finance']}}}}}}}",
        f"+chain.stages.merged={{do:train,start:all,branches:{{law:law,finance:finance}},"
        f"set:{{data.mixture:{{{every}}},optim.lr_multipliers:{ONLY_ROUTERS}}}}}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the chain once, in this process."""
    folder = tmp_path_factory.mktemp("branches")
    words = stages(folder)
    return folder, words, run(folder, stages=words)


def checkpoint(folder, stage):
    output = folder / "outputs"
    return output / ChainFile.load(output / "chains" / NAME).stages[stage].checkpoint


class TestAChainOfBranches:
    def test_says_and_records_what_is_merged(self, finished):
        folder, _, out = finished
        assert "stage 4/4  merged  do=train  from all (sha256:" in out and "...), merged with law, finance\n" in out
        inputs = {"start": "all", "branch.law": "law", "branch.finance": "finance"}
        found = manifest.read_manifest(checkpoint(folder, "merged")).lineage.inputs
        assert found == {role: manifest.digest(checkpoint(folder, stage)) for role, stage in inputs.items()}

    def test_the_last_stage_trains_the_routers_of_the_merged_weights(self, finished):
        folder, _, _ = finished
        before = merge_branches({name: checkpoint(folder, name) for name in ("law", "finance")}, DOMAINS)
        after = load_weights(checkpoint(folder, "merged"))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if ".router." in name}

    def test_nothing_is_run_again_if_nothing_has_changed(self, finished):
        folder, words, _ = finished
        assert "0 stages run, 4 reused" in run(folder, stages=words)

    def test_a_changed_branch_is_merged_again(self, finished):
        folder, words, _ = finished
        out = run(folder, "+chain.stages.law.set.optim.lr=1e-3", stages=words)
        assert "all is reused" in out and "finance is reused" in out and "2 stages run, 2 reused" in out

    def test_a_branch_that_is_left_out_has_to_be_done(self, finished, tmp_path):
        _, words, _ = finished
        stages(tmp_path)
        with pytest.raises(ChainError, match=r"chain\.only='merged' leaves out all, which is not done"):
            run(tmp_path, "chain.only=[merged]", stages=words)


class TestARunFromBranches:
    def test_its_model_has_the_merged_weights(self, finished):
        folder, *_ = finished
        branches = {name: checkpoint(folder, name) for name in ("law", "finance")}
        words = [f"+branches.{name}={path}" for name, path in branches.items()]
        cfg = composed(*MODEL, f"init_from={checkpoint(folder, 'all')}", *words)
        found, want = build_model(cfg, torch.device("cpu"), None).state_dict(), merge_branches(branches, DOMAINS)
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)

    @pytest.mark.long
    def test_ranks_merge_the_same(self, finished):
        folder, *_ = finished
        mixture = ",".join(f"{name}:{{path:{name}.txt}}" for name in TEXTS)
        words = ["do=eval", f"init_from={checkpoint(folder, 'all')}", "data=mixture", f"+data.mixture={{{mixture}}}"]
        words += [f"+branches.{name}={checkpoint(folder, name)}" for name in ("law", "finance")]
        words += ["tracking=none", "device=cpu", "trainer.n_threads=1", "trainer.eval_seqs=8"]
        losses = []
        for layout in ((), ("parallel.dp=2", "parallel.ep=2", "trainer.micro_batch_seqs=2")):
            done = forks.run(folder, *words, *layout)
            assert done.returncode == 0, done.stderr
            run_dir = max(runs.run_dirs(folder), key=lambda path: path.stat().st_mtime)
            losses += runs.trace(run_dir, "val/loss").values()
        assert losses == [pytest.approx(losses[0], abs=1e-6)] * 2
