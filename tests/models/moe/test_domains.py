"""Experts that belong to domains: who may go where, what the classifier learns from, and unloaded packs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.models.moe.moe_parts import DEFINITION, build, counted, distance, tokens

CLASSIFIER = ("domain_loss", "domain_hits", "domain_labels")
DOMAINS = ["general", "finance", "medical", "law"]


def domain_layer(**moe):
    return build(domains=DOMAINS, domain_loss_weight=0.2, **moe)


def domains_of(ids_TK):
    """The domain that each chosen expert belongs to: two experts each."""
    return ids_TK // 2


def test_a_labelled_token_chooses_among_the_general_and_its_own():
    layer, x = domain_layer(), tokens(1, 200)[0]
    label = torch.arange(200) % 4
    of = domains_of(layer.router(x, label).ids_TK)
    assert torch.all((of == 0) | (of == label[:, None]))
    assert set(of.flatten().tolist()) == {0, 1, 2, 3}


def test_among_its_candidates_it_takes_the_best():
    layer, x = domain_layer(), tokens(1, 50)[0]
    routing = layer.router(x, torch.full((50,), 2))
    for scores, ids in zip(routing.scores_TE, routing.ids_TK.tolist(), strict=True):
        assert ids == sorted([0, 1, 4, 5], key=lambda e: -scores[e])[:2]
    assert torch.all(routing.scores_TE[:, [2, 3, 6, 7]] == 0)  # scores are over the candidates alone
    assert routing.scores_TE.sum(-1).tolist() == pytest.approx([1] * 50)


@pytest.mark.parametrize("unknown", [None, torch.full((60,), -1)], ids=["no labels", "-1"])
def test_without_a_label_the_classifier_decides(unknown):
    layer, x = domain_layer(), tokens(1, 60)[0]
    inferred = (x @ layer.router.domain_weight.T).argmax(-1)
    assert inferred.unique().numel() == 4
    assert torch.equal(layer.router(x, unknown).ids_TK, layer.router(x, inferred).ids_TK)


def test_a_label_beats_the_classifier_token_by_token():
    layer, x = domain_layer(), tokens(1, 40)[0]
    inferred = (x @ layer.router.domain_weight.T).argmax(-1)
    mixed = torch.where(torch.arange(40) < 20, (inferred + 1) % 4, -1)
    ids = layer.router(x, mixed).ids_TK
    assert torch.equal(ids[20:], layer.router(x, inferred).ids_TK[20:])
    assert not torch.equal(ids[:20], layer.router(x, inferred).ids_TK[:20])


class TestClassifier:
    def test_its_loss_is_that_of_the_labelled_tokens(self):
        layer, x = domain_layer(), tokens(4, 6).requires_grad_()
        label = torch.tensor([3, -1, 0, -1])
        layer.loss_scale = 0.5
        y, counts = layer(x, label)
        y.sum().backward()
        logits = x.detach()[[0, 2]].flatten(0, 1) @ (w := layer.router.domain_weight.detach().requires_grad_()).T
        labels = torch.tensor([3, 0]).repeat_interleave(6)
        loss = 0.2 * F.cross_entropy(logits, labels)
        (0.5 * loss).backward()
        assert distance(layer.router.domain_weight.grad, w.grad) < 1e-12
        hits = (logits.argmax(-1) == labels).sum()
        assert counted(counts, *CLASSIFIER) == pytest.approx([loss.item(), hits.item(), 12])

    def test_unlabelled_text_teaches_it_nothing(self):
        layer = domain_layer()
        y, counts = layer(tokens(3, 6), torch.full((3,), -1))
        y.sum().backward()
        assert torch.all(layer.router.domain_weight.grad == 0) and counted(counts, *CLASSIFIER) == [0, 0, 0]

    def test_it_learns(self):
        layer, x = domain_layer(), tokens(4, 50)
        x = x + 4 * F.one_hot(torch.arange(4), 24)[:, None]
        optimizer = torch.optim.Adam([layer.router.domain_weight], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            y, counts = layer(x, torch.arange(4))
            (0 * y.sum()).backward()
            optimizer.step()
        _, hits, labels = counted(counts, *CLASSIFIER)
        assert hits / labels > 0.9

    def test_validation_counts_loads_and_no_loss(self):
        layer = domain_layer().eval()
        _, counts = layer(tokens(2, 6), torch.tensor([1, 2]))
        assert counts[:8].sum() == 24 and counted(counts, *CLASSIFIER) == [0, 0, 0]


class TestUnloadedPacks:
    def unloaded(self, layer, kept: list[int]):
        """The layer with only those experts in its stacks, the rest unloaded."""
        layer = copy.deepcopy(layer)
        experts = [e for d in kept for e in (2 * d, 2 * d + 1)]
        for name, p in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, torch.nn.Parameter(p.detach()[experts]))
        slot_of_E = torch.full((8,), -1)
        slot_of_E[experts] = torch.arange(len(experts))
        layer.slot_of_E = slot_of_E
        layer.router.loaded = torch.tensor([d in kept for d in range(4)])
        return layer

    def test_text_of_loaded_domains_does_not_notice(self):
        full = domain_layer().eval()
        part, x, label = self.unloaded(full, [0, 3]), tokens(4, 6), torch.tensor([3, 0, 0, 3])
        assert distance(part(x, label)[0], full(x, label)[0]) < 1e-14

    def test_text_of_others_is_general(self):
        full = domain_layer().eval()
        part, x = self.unloaded(full, [0, 3]), tokens(4, 6)
        y, _ = part(x, torch.tensor([1, 2, 1, 2]))
        assert distance(y, full(x, torch.zeros(4, dtype=torch.int64))[0]) < 1e-14

    def test_what_the_classifier_names_may_be_unloaded(self):
        full = domain_layer().eval()
        part, x = self.unloaded(full, [0]), tokens(4, 6)
        assert distance(part(x)[0], full(x, torch.zeros(4, dtype=torch.int64))[0]) < 1e-14


def test_the_definition_is_what_these_tests_run_on():
    assert domain_layer().experts.ops is DEFINITION
