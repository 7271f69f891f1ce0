"""Gradients of a pruned model against the autograd of the eager reference, and training on shared weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from models import FLOAT32, PER_KIND, Entry, dense, linear, names, padded, sparse, tokens
from reference import GRADIENT_TOLERANCE, assert_close
from torch import Tensor, nn

import simba_fx

every_float32 = pytest.mark.parametrize("entry", FLOAT32, ids=names(FLOAT32))
every_kind = pytest.mark.parametrize("entry", PER_KIND, ids=names(PER_KIND))

DRAWS = reference.Draws()


@pytest.fixture(scope="module", autouse=True)
def few_draws_are_discarded() -> Iterator[None]:
    yield
    DRAWS.check()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert theirs.any(), f"{name}: no gradient to compare"
        assert_close(f"gradient of {name}", found[name], theirs, GRADIENT_TOLERANCE[theirs.dtype])


@every_float32
@pytest.mark.parametrize("kernels", ["model", "auto"])
def test_gradients_equal_the_references(entry: Entry, kernels: str) -> None:
    check_gradients(dense(entry.name), sparse(entry.name, linear(entry), kernels=kernels), linear(entry))


@every_kind
def test_gradients_equal_the_references_in_training(entry: Entry) -> None:
    model = entry.build()
    check_gradients(model, simba_fx.transform(model, linear(entry), criterion="simba").train(), linear(entry))


def check_gradients(model: nn.Module, pruned: nn.Module, shares: Any) -> None:
    """Through every output position, tokens that left early included."""
    weights = torch.randn(48, model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    ids, _, expected = DRAWS.first(model, shares, lambda seed: tokens(seed, 1, 48))
    theirs = gradients((expected.rows[0].logits * weights).sum(), model)
    found = pruned(input_ids=ids)
    assert_gradients_close(gradients((found.logits[0] * weights).sum(), pruned), theirs)
    assert [block[0].tolist() for block in simba_fx.kept(pruned)] == [block[0] for block in expected.kept]


@every_float32
def test_the_loss_of_padded_rows_and_its_gradients_equal_the_references(entry: Entry) -> None:
    model = dense(entry.name)

    def rows(seed: int) -> tuple[Tensor, Tensor]:
        return padded([tokens(seed, 33), tokens(seed + 10, 20), tokens(seed + 20, 32)], [0, 13, 0], [0, 0, 1])

    ids, mask, expected = DRAWS.first(model, linear(entry), rows)
    labels = ids.masked_fill(mask == 0, -100)
    # every real token predicts the next one of its row, the mean over all of them
    losses = [
        nn.functional.cross_entropy(row.logits[:-1], ids[b][expected.real[b]][1:], reduction="sum")
        for b, row in enumerate(expected.rows)
    ]
    total = int(expected.real.sum()) - len(losses)
    # HF shifts labels inside the rectangle: with left pads, the last pad predicts the first real token
    found = sparse(entry.name, linear(entry))(input_ids=ids, attention_mask=mask, labels=mask_first(labels, mask))
    loss = torch.stack(losses).sum() / total
    assert_close("loss", found.loss, loss, 1e-5)
    assert_gradients_close(gradients(found.loss, model), gradients(loss, model))


def mask_first(labels: Tensor, mask: Tensor) -> Tensor:
    """No loss on each row's first real token: nothing real precedes it."""
    first = mask.argmax(1)
    labels = labels.clone()
    labels[torch.arange(len(labels)), first] = -100
    return labels


@every_float32
def test_a_protected_continuations_loss_has_the_references_gradients(entry: Entry) -> None:
    """Training on the answer alone: tail = its inputs, as method §5 has it."""
    model, tail = dense(entry.name), 10
    ids, _, expected = DRAWS.first(model, linear(entry), lambda seed: tokens(seed, 1, 60), tail=tail)
    pruned = sparse(entry.name, linear(entry))
    with simba_fx.tail(pruned, tail):
        found = pruned(input_ids=ids).logits

    def loss(logits: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[-tail:-1], ids[0, -tail + 1 :])

    assert_gradients_close(gradients(loss(found[0]), pruned), gradients(loss(expected.rows[0].logits), model))


@every_float32
def test_choosing_is_not_differentiated(entry: Entry) -> None:
    """A parameter that the output reaches only through scores gets no gradient; what is kept carries none."""
    pruned = sparse(entry.name, linear(entry))
    logits = pruned(input_ids=tokens(3, 1, 40)).logits
    assert logits.requires_grad
    assert not any(block.requires_grad or block.is_floating_point() for block in simba_fx.kept(pruned))
    with torch.no_grad():
        assert not pruned(input_ids=tokens(3, 1, 40)).logits.requires_grad


@every_float32
def test_scores_alone_pull_no_gradient(entry: Entry) -> None:
    """The loss on tokens that left after block 0 depends on block 0 alone: later blocks get exactly nothing."""
    model = dense(entry.name)
    pruned = sparse(entry.name, linear(entry))
    logits = pruned(input_ids=tokens(3, 1, 40)).logits
    after_first = {p for p in simba_fx.kept(pruned)[1][0].tolist() if p >= 0}
    gone = sorted(set(range(40)) - after_first)
    blocks = dict(model.backbone.layers.named_parameters())
    found = torch.autograd.grad(logits[0, gone].sum(), list(blocks.values()), allow_unused=True)
    for name, gradient in zip(blocks, found):
        if name.startswith("0."):
            assert gradient is not None, name
        else:
            assert gradient is None or not gradient.any(), name


@every_kind
def test_steps_on_the_pruned_model_train_the_dense_one_too(entry: Entry) -> None:
    model = entry.build()
    pruned = simba_fx.transform(model, linear(entry), criterion="simba")
    ids = tokens(2, 2, 32)
    with torch.no_grad():
        dense_before = model(input_ids=ids, labels=ids).loss.item()
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=3e-3)
    losses = []
    pruned.train()
    for _ in range(6):
        optimizer.zero_grad()
        loss = pruned(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    pruned.eval()
    model.eval()
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() < 0.95 * dense_before
        # what training left behind is a model like any other: it equals the reference on its new weights
        ids, _, expected = DRAWS.first(model, linear(entry), lambda seed: tokens(seed, 2, 32))
        found = pruned(input_ids=ids)
    for i, block in enumerate(simba_fx.kept(pruned)):
        assert block.tolist() == expected.kept[i]
    assert_close("logits", found.logits, expected.logits, reference.TOLERANCE[torch.float32])


def test_an_optimizer_over_the_original_trains_the_pruned_model() -> None:
    entry = FLOAT32[0]
    model = entry.build()
    pruned = simba_fx.transform(model, linear(entry), criterion="simba")
    ids = tokens(4, 1, 24)
    with torch.no_grad():
        before = pruned(input_ids=ids).logits
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(pruned(input_ids=ids).logits, before)


def test_a_frozen_parameter_gets_no_gradient() -> None:
    entry = FLOAT32[0]
    model = entry.build()
    pruned = simba_fx.transform(model, linear(entry), criterion="simba")
    pruned(input_ids=tokens(4, 1, 24))  # captured while everything was trainable
    frozen = model.backbone.layers[1].mixer.in_proj.weight
    frozen.requires_grad_(False)
    pruned(input_ids=tokens(4, 1, 24)).logits.sum().backward()
    assert frozen.grad is None
    assert model.backbone.layers[0].mixer.in_proj.weight.grad is not None
