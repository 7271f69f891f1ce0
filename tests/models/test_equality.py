"""A transformed model against the dense one (everything kept, the same bits) and against the oracle of reference.py.

A draw whose kept set hangs on two nearly equal scores is discarded, and counted (`reference.Draws`); what remains must
agree exactly in the positions kept, and to the one tolerance table in the numbers.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _pytest.python
import pytest
import reference
import strategies as domain
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import (
    BY_NAME,
    CACHE,
    CHECKPOINT,
    FLOAT32,
    PER_FAMILY,
    PER_KIND,
    REGISTRY,
    Entry,
    dense,
    keep_all,
    n_blocks,
    names,
    schedules,
    sparse,
    three_rows,
    tokens,
)
from reference import GRADIENT_TOLERANCE, TOLERANCE, assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import simba_fx

every_entry = pytest.mark.parametrize("entry", REGISTRY, ids=names(REGISTRY))
every_float32 = pytest.mark.parametrize("entry", FLOAT32, ids=names(FLOAT32))
every_family = pytest.mark.parametrize("entry", PER_FAMILY, ids=names(PER_FAMILY))
every_kind = pytest.mark.parametrize("entry", PER_KIND, ids=names(PER_KIND))

DRAWS = reference.Draws()


@pytest.fixture(scope="module", autouse=True)
def few_draws_are_discarded() -> Iterator[None]:
    yield
    DRAWS.check()


# Helpers.


class Operators(TorchDispatchMode):
    """Counts the calls of each of our operators, by name, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "simba_fx":
            self.calls[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def selections(self) -> int:
        """Calls that chose tokens, of rows without pads (`select_tokens`) or with (`select_real_tokens`)."""
        return sum(n for name, n in self.calls.items() if name.startswith("select_"))


def states(cache: Any) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(cache.layers):
        yield f"conv state of block {i}", layer.conv_states[0]
        yield f"recurrent state of block {i}", layer.recurrent_states[0]


def assert_kept_equal(model: nn.Module, expected: reference.Batch) -> None:
    """`simba_fx.kept` reports what the reference kept, row by row and block by block."""
    found = simba_fx.kept(model)
    assert len(found) == len(expected.kept)
    for i, (block, rows) in enumerate(zip(found, expected.kept)):
        assert block.dtype is torch.int64, f"block {i}"
        assert block.shape[0] == len(rows), f"block {i}"
        for b, row in enumerate(rows):
            assert block[b][block[b] >= 0].tolist() == row, f"block {i}, row {b}"


def assert_kept_contract(model: nn.Module, length: int, shares: Any, tail: int = 1) -> None:
    """For unpadded rows: the promised counts, ascending, nested from block to block, the tail inside."""
    found = simba_fx.kept(model)
    assert [block.shape[1] for block in found] == reference.counts(length, shares, tail)
    for earlier, block in itertools.pairwise([found[0], *found]):
        for before, row in zip(earlier.tolist(), block.tolist()):
            assert row == sorted(set(row))
            assert set(row) <= set(before)
            assert row[-tail:] == list(range(length - tail, length))


# Everything kept, with the machinery in the graph: the dense model's bits.


@every_entry
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_keeping_everything_gives_the_dense_bits(entry: Entry, masked: bool) -> None:
    model = dense(entry.name)
    pruned = sparse(entry.name, keep_all(n_blocks(model)), kernels="model")
    with torch.no_grad():
        expected = model(**three_rows(masked), use_cache=True)
        with Operators() as operators:
            found = pruned(**three_rows(masked), use_cache=True)
    assert operators.selections == n_blocks(model) - 1, "the machinery must not be elided"
    assert type(found) is type(expected)
    assert torch.equal(found.logits, expected.logits)
    assert type(getattr(found, CACHE)) is type(getattr(expected, CACHE))
    for (name, own), (_, theirs) in zip(states(getattr(found, CACHE)), states(getattr(expected, CACHE)), strict=True):
        assert own.dtype is theirs.dtype, name
        assert torch.equal(own, theirs), name


@every_entry
def test_keeping_everything_gives_the_dense_gradients_bits(entry: Entry) -> None:
    model = dense(entry.name)
    check_gradients_bits(model, sparse(entry.name, keep_all(n_blocks(model)), kernels="model"))


@every_kind
def test_keeping_everything_gives_the_dense_gradients_bits_in_training(entry: Entry) -> None:
    model = entry.build().train()
    check_gradients_bits(
        model, simba_fx.transform(model, keep_all(n_blocks(model)), kernels="model", criterion="simba")
    )


def check_gradients_bits(model: nn.Module, pruned: nn.Module) -> None:
    """Of a loss on every logit, pads included, without a cache and with a mask."""
    weights = torch.randn(3, 37, model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())

    ours, theirs = (one(**three_rows(True), use_cache=False) for one in (pruned, model))
    assert getattr(ours, CACHE) is None
    assert torch.equal(ours.logits, theirs.logits)
    found, expected = (torch.autograd.grad((o.logits * weights).sum(), parameters.values()) for o in (ours, theirs))
    for name, own, other in zip(parameters, found, expected):
        assert other.any(), f"{name}: this test proves nothing where the gradient is zero"
        assert torch.equal(own, other), name


def results_of(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Everything a call computes, by name: logits of real tokens, states, gradients of a loss on the logits."""
    real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        cache = getattr(model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True), CACHE)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[real]
    gradients = torch.autograd.grad(logits.square().mean(), list(parameters.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(parameters, gradients)}
    return {"logits": logits, **dict(states(cache)), **named}


@every_float32
def test_our_kernels_equal_the_models_to_rounding(entry: Entry) -> None:
    model = dense(entry.name)
    found = results_of(sparse(entry.name, keep_all(n_blocks(model)), kernels="auto"), **three_rows(True))
    for name, theirs in results_of(model, **three_rows(True)).items():
        table = GRADIENT_TOLERANCE if name.startswith("gradient") else TOLERANCE
        assert_close(name, found[name], theirs, table[entry.dtype])


@pytest.mark.parametrize("name", [entry.name for entry in REGISTRY if entry not in FLOAT32])
def test_in_low_precision_our_kernels_are_as_near_to_float32_as_the_models_own(name: str) -> None:
    """Two roundings of one truth may differ by more than either is off, so both are measured against float32.

    One tensor's luck proves nothing: what counts is the mean ratio of the two errors over all tensors. Where ours is
    much farther off, the model's own scans, rounded in eight other ways, say how far off rounding alone brings it.
    """
    model, truth_model = dense(name), BY_NAME[name].build().float()
    pruned = sparse(name, keep_all(n_blocks(model)), kernels="auto")
    ratios = []

    @functools.cache
    def others(inputs: tuple[tuple[str, Tensor], ...]) -> list[dict[str, Tensor]]:
        found = []
        for seed in range(8):
            with reference.rounded_otherwise(BY_NAME[name].modeling, seed):
                found.append(results_of(model, **dict(inputs)))
        return found

    for inputs in ({"input_ids": tokens(seed, 3, 37)} for seed in (50, 51, 52)):
        truth, found = results_of(truth_model, **inputs), results_of(pruned, **inputs)
        for what, theirs in results_of(model, **inputs).items():
            ours, own = (reference.relative_rms(x, truth[what]) for x in (found[what], theirs))
            if ours > 6 * own + 1e-3:
                spread = [reference.relative_rms(x[what], truth[what]) for x in others(tuple(inputs.items()))]
                assert ours <= 2 * max(spread), f"{what}: {ours:.3g} off, the model's own kernels {own:.3g} to {spread}"
            ratios.append(math.log(ours / own))
    assert math.exp(sum(ratios) / len(ratios)) < 1.2


@every_float32
def test_our_kernels_give_their_own_dense_graphs_bits(entry: Entry) -> None:
    """`kernels="auto"`, everything kept, against the same kernels in a graph without any cut."""
    whole = sparse(entry.name, "dense", kernels="auto")
    pruned = sparse(entry.name, keep_all(n_blocks(dense(entry.name))), kernels="auto")
    with torch.no_grad(), Operators() as operators:
        expected = whole(**three_rows(False), use_cache=True)
    assert operators.selections == 0
    with torch.no_grad():
        found = pruned(**three_rows(False), use_cache=True)
    assert torch.equal(found.logits, expected.logits)
    for (name, own), (_, theirs) in zip(states(getattr(found, CACHE)), states(getattr(expected, CACHE)), strict=True):
        assert torch.equal(own, theirs), name


# The whole model against the reference.


def check_against_reference(
    entry: Entry,
    shares: Any,
    ids: Tensor,
    tail: int,
    *,
    kernels: str,
    criterion: str = "simba",
    span: int = 1,
    exact: bool = False,
) -> None:
    model = dense(entry.name)
    with torch.no_grad():
        # with a cache, as the transformed model runs by default: dense models round differently without one
        expected = reference.run(model, ids, shares, criterion=criterion, span=span, tail=tail, use_cache=True)
    assume(DRAWS.clear(expected))
    pruned = sparse(entry.name, shares, kernels=kernels, criterion=criterion, span=span)
    with torch.no_grad(), simba_fx.tail(pruned, tail):
        found = pruned(input_ids=ids)
    assert_kept_equal(pruned, expected)
    assert_kept_contract(pruned, ids.shape[1], shares, tail)
    assert found.logits.shape == expected.logits.shape
    if exact:
        assert torch.equal(found.logits, expected.logits)
    assert_close("logits", found.logits, expected.logits, TOLERANCE[entry.dtype])


@every_float32
@domain.examples(14)
@given(data=st.data())
def test_the_whole_model_equals_the_reference(entry: Entry, data: st.DataObject) -> None:
    shares = data.draw(st.sampled_from(list(schedules(n_blocks(dense(entry.name))).values())))
    length = data.draw(domain.lengths)
    tail = data.draw(domain.tails(length))
    ids = tokens(data.draw(domain.seeds), data.draw(st.integers(1, 3)), length)
    check_against_reference(entry, shares, ids, tail, kernels="auto")


@every_entry
@domain.examples(10)
@given(data=st.data())
def test_with_the_models_kernels_one_row_has_the_references_bits(entry: Entry, data: st.DataObject) -> None:
    """The same functions on the same shapes in the same order: not one bit may differ, in any dtype."""
    choice = schedules(n_blocks(dense(entry.name)))
    shares = choice[data.draw(st.sampled_from(["linear", "stairs"]))]
    length = data.draw(domain.lengths)
    ids = tokens(data.draw(domain.seeds), 1, length)
    check_against_reference(entry, shares, ids, data.draw(domain.tails(length)), kernels="model", exact=True)


@every_kind
@domain.examples(5)
@given(data=st.data())
def test_any_schedule_equals_the_reference(entry: Entry, data: st.DataObject) -> None:
    """Schedules drawn anew: each example is a capture."""
    shares = data.draw(domain.shares(n_blocks(dense(entry.name))))
    length = data.draw(domain.lengths)
    ids = tokens(data.draw(domain.seeds), 2, length)
    check_against_reference(entry, shares, ids, data.draw(domain.tails(length)), kernels="auto")


@every_kind
@pytest.mark.parametrize("criterion", [c for c in reference.CRITERIA if c != "simba"])
@domain.examples(8)
@given(data=st.data())
def test_every_criterion_equals_the_reference(entry: Entry, criterion: str, data: st.DataObject) -> None:
    shares = schedules(n_blocks(dense(entry.name)))["linear"]
    length = data.draw(domain.lengths)
    ids = tokens(data.draw(domain.seeds), 2, length)
    tail = data.draw(domain.tails(length))
    check_against_reference(entry, shares, ids, tail, kernels="auto", criterion=criterion)


@every_kind
@pytest.mark.parametrize(("criterion", "span"), [("simba-l2", 5), ("simba", 3)])
@domain.examples(8)
@given(data=st.data())
def test_spans_equal_the_reference(entry: Entry, criterion: str, span: int, data: st.DataObject) -> None:
    shares = schedules(n_blocks(dense(entry.name)))["linear"]
    length = data.draw(domain.lengths)
    ids = tokens(data.draw(domain.seeds), 2, length)
    tail = data.draw(domain.tails(length))
    check_against_reference(entry, shares, ids, tail, kernels="auto", criterion=criterion, span=span)


def combined(scan: Any, query: Tensor) -> Tensor:
    """What "simba-l2+write" with a span of 5 says, by sorting in Python."""
    if isinstance(scan, simba_fx.SelectiveScan):
        given = (scan.u, scan.delta, scan.A, scan.B, scan.C, scan.delta_bias, scan.delta_softplus)
        score: Any = torch.ops.simba_fx.selective_token_score
    else:
        given = (scan.x, scan.dt, scan.A, scan.B, scan.C, scan.dt_bias, scan.dt_softplus, scan.dt_min, scan.dt_max)
        score = torch.ops.simba_fx.ssd_token_score
    ranks = []
    for criterion in ("simba-l2", "write"):
        found = score(*given, None, 1, criterion)
        rows = []
        for row in found.tolist():
            pooled = [max(row[max(0, t - 2) : t + 3]) for t in range(len(row))]
            order = sorted(range(len(row)), key=lambda t: (pooled[t], t), reverse=True)
            rows.append([-float(order.index(t)) for t in range(len(row))])
        ranks.append(torch.tensor(rows))
    return torch.maximum(*ranks)


@every_kind
def test_of_several_criteria_a_token_has_its_best_rank(entry: Entry) -> None:
    if entry.kind == "delta":
        pytest.skip("the operands of two kinds are enough")
    shares, ids = schedules(n_blocks(dense(entry.name)))["linear"], tokens(3, 2, 61)
    one = sparse(entry.name, shares, criterion="simba-l2+write", span=5)
    two = sparse(entry.name, shares, criterion=combined)
    others = [sparse(entry.name, shares, criterion=criterion, span=5) for criterion in ("simba-l2", "write")]
    kept = []
    for model in (one, two, *others):
        with torch.no_grad():
            model(input_ids=ids)
        kept.append([block.tolist() for block in simba_fx.kept(model)])
    assert kept[0] == kept[1]
    assert kept[0] not in kept[2:]


@pytest.mark.parametrize("criterion", ["random", "stride"])
@every_kind
@domain.examples(8)
@given(data=st.data())
def test_random_and_stride_keep_what_any_criterion_promises(entry: Entry, criterion: str, data: st.DataObject) -> None:
    shares = schedules(n_blocks(dense(entry.name)))["linear"]
    pruned = sparse(entry.name, shares, criterion=criterion)
    length = data.draw(domain.lengths)
    tail = data.draw(domain.tails(length))
    with torch.no_grad(), simba_fx.tail(pruned, tail):
        pruned(input_ids=tokens(data.draw(domain.seeds), 2, length))
    assert_kept_contract(pruned, length, shares, tail)


def test_random_is_decided_by_its_seed() -> None:
    shares, ids = schedules(4)["linear"], tokens(0, 1, 80)

    def kept(seed: int) -> list[list[int]]:
        pruned = simba_fx.transform(dense("mamba"), shares, criterion="random", seed=seed)
        with torch.no_grad():
            pruned(input_ids=ids)
        return [block[0].tolist() for block in simba_fx.kept(pruned)]

    assert kept(3) == kept(3)
    assert kept(3) != kept(4)


def test_the_default_is_linear_down_to_a_tenth_with_a_tail_of_one() -> None:
    model = dense("mamba")
    pruned = simba_fx.transform(model, "linear", criterion="simba")
    with torch.no_grad():  # 100 earlier tokens: r·100 is whole at the last block
        ids, _, expected = DRAWS.first(model, reference.linear(4), lambda seed: tokens(seed, 1, 101))
        found = pruned(input_ids=ids)
    assert [block.shape[1] for block in simba_fx.kept(pruned)] == [101, 71, 41, 11]
    assert_kept_equal(pruned, expected)
    assert_close("logits", found.logits, expected.logits, TOLERANCE[torch.float32])


@pytest.mark.parametrize("floor", [1, 30])
def test_the_floor_is_the_least_number_of_earlier_tokens_kept(floor: int) -> None:
    model, shares = dense("mamba"), schedules(4)["steep"]
    pruned = sparse("mamba", shares, floor=floor)
    with torch.no_grad():
        ids, _, expected = DRAWS.first(model, shares, lambda seed: tokens(seed, 1, 50), floor=floor)
        pruned(input_ids=ids)
    assert [block.shape[1] for block in simba_fx.kept(pruned)] == reference.counts(50, shares, floor=floor)
    assert_kept_equal(pruned, expected)


def test_embeddings_serve_as_inputs_like_ids() -> None:
    model, ids, shares = dense("mamba"), tokens(6, 2, 40), schedules(4)["linear"]
    pruned = sparse("mamba", shares)
    with torch.no_grad():
        from_ids = pruned(input_ids=ids).logits
        from_embeddings = pruned(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(from_ids, from_embeddings)


# The other output form.


@every_kind
def test_kept_output_holds_the_survivors_of_the_last_block(entry: Entry) -> None:
    model = dense(entry.name)
    shares = schedules(n_blocks(model))["linear"]
    pruned = sparse(entry.name, shares, output="kept")
    with torch.no_grad():
        ids, _, expected = DRAWS.first(model, shares, lambda seed: tokens(seed, 2, 61), tail=2)
        with simba_fx.tail(pruned, 2):
            found = pruned(input_ids=ids)
    assert_kept_equal(pruned, expected)
    assert found.logits.shape[1] == reference.counts(61, shares, 2)[-1]
    for b, last in enumerate(expected.kept[-1]):
        assert_close(f"row {b}", found.logits[b], expected.logits[b, last], TOLERANCE[entry.dtype])


# No peeking past the query.


@every_float32
@pytest.mark.parametrize("kernels", ["model", "auto"])
def test_an_output_does_not_depend_on_later_inputs_of_the_tail(entry: Entry, kernels: str) -> None:
    shares = schedules(n_blocks(dense(entry.name)))["linear"]
    pruned = sparse(entry.name, shares, kernels=kernels)
    length, tail = 70, 12
    ids = tokens(8, 2, length)

    def run(changed: int | None) -> tuple[Tensor, list[Tensor]]:
        inputs = ids.clone()
        if changed is not None:
            inputs[:, changed] = (inputs[:, changed] + 1) % 53
        with torch.no_grad(), simba_fx.tail(pruned, tail):
            return pruned(input_ids=inputs).logits, simba_fx.kept(pruned)

    logits, kept = run(None)
    for changed in (length - tail + 1, length - 5, length - 1):
        moved, kept_too = run(changed)
        for i, (before, after) in enumerate(zip(kept, kept_too)):
            assert torch.equal(before, after), f"block {i}, input {changed} changed"
        assert torch.equal(moved[:, :changed], logits[:, :changed]), f"input {changed} changed"
        assert not torch.equal(moved[:, changed:], logits[:, changed:])
    moved, kept_too = run(length - tail)  # the query itself decides
    assert not all(torch.equal(before, after) for before, after in zip(kept, kept_too))


def test_the_tail_holds_within_its_context_only() -> None:
    shares, ids = schedules(4)["steep"], tokens(5, 1, 90)
    pruned = sparse("mamba", shares)

    def widths() -> list[int]:
        with torch.no_grad():
            pruned(input_ids=ids)
        return [block.shape[1] for block in simba_fx.kept(pruned)]

    before = widths()
    with simba_fx.tail(pruned, 40):
        inside = widths()
        with simba_fx.tail(pruned, 3):
            inner = widths()
        assert widths() == inside
    with contextlib.suppress(KeyError), simba_fx.tail(pruned, 7):
        raise KeyError
    assert before == widths() == reference.counts(90, shares)
    assert inside == reference.counts(90, shares, 40)
    assert inner == reference.counts(90, shares, 3)


@pytest.mark.parametrize("tail", [0, -1, 1.5])
def test_a_tail_that_is_no_count_is_refused(tail: Any) -> None:
    pruned = sparse("mamba", schedules(4)["steep"])
    with pytest.raises(simba_fx.errors.SimbaError, match="tail"), simba_fx.tail(pruned, tail):
        pruned(input_ids=tokens(0, 1, 20))


# What must not happen.


def snapshot(entry: Entry, model: nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        logits = model(input_ids=tokens(0, 2, 19)).logits
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "storage": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "modules": {name: (type(module), module.training) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "patched": {name: id(value) for name, value in vars(entry.modeling).items()},
        "torch": {name: id(value) for name, value in vars(nn.functional).items()},
        "logits": logits,
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("storage", "modules", "attributes", "hooks", "patched", "torch"):
        assert before[key] == after[key], key
    assert torch.equal(before["logits"], after["logits"])
    for name, value in before["weights"].items():
        assert torch.equal(value, after["weights"][name]), name


@every_family
def test_the_original_is_unchanged_after_success(entry: Entry) -> None:
    model = entry.build()
    before = snapshot(entry, model)
    pruned = simba_fx.transform(model, "linear", kernels="model", criterion="simba")
    with torch.no_grad():
        pruned(input_ids=tokens(1, 2, 30), use_cache=True)
    pruned.train()
    pruned(input_ids=tokens(1, 2, 30)).logits.sum()
    assert pruned is not model
    assert isinstance(pruned, type(model))
    assert pruned.config is model.config or pruned.config == model.config
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert {n: v.data_ptr() for n, v in pruned.state_dict().items()} == before["storage"], "weights must be shared"
    model.eval()
    assert_unchanged(before, snapshot(entry, model))


@every_family
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"schedule": "no such schedule"}, "ScheduleError"),
        ({"schedule": [1, 2]}, "ScheduleError"),
        ({"criterion": "no such criterion"}, "CriterionError"),
    ],
    ids=["name", "shares", "criterion"],
)
def test_the_original_is_unchanged_after_a_refusal(entry: Entry, options: dict[str, Any], error: str) -> None:
    model = dense(entry.name)
    before = snapshot(entry, model)
    with pytest.raises(getattr(simba_fx.errors, error)):
        simba_fx.transform(model, **options)(input_ids=tokens(0, 1, 12))
    assert_unchanged(before, snapshot(entry, model))


@every_family
def test_the_original_is_unchanged_after_a_failed_capture(entry: Entry) -> None:
    model = entry.build()

    def broken(*_: Any) -> None:
        raise RuntimeError("broken on purpose")

    before = snapshot(entry, model)
    hook = model.backbone.layers[1].mixer.register_forward_pre_hook(broken)
    named = pytest.warns(UserWarning, match=r"hooks on what is not called .*layers\.1\.mixer")
    with named, pytest.raises(Exception, match="broken on purpose"):
        simba_fx.transform(model, "linear", criterion="simba")(input_ids=tokens(0, 1, 12))
    hook.remove()
    assert_unchanged(before, snapshot(entry, model))


def test_two_transformed_models_share_no_state() -> None:
    model, ids = dense("mamba"), tokens(2, 1, 64)
    one = simba_fx.transform(model, schedules(4)["linear"], criterion="simba")
    two = simba_fx.transform(model, schedules(4)["steep"], criterion="recent")
    with torch.no_grad():
        logits = one(input_ids=ids).logits
        kept = simba_fx.kept(one)
        with simba_fx.tail(two, 30):
            two(input_ids=tokens(3, 2, 33))
            assert torch.equal(one(input_ids=ids).logits, logits)
    for before, after in zip(kept, simba_fx.kept(one)):
        assert torch.equal(before, after)
    assert [block.shape for block in simba_fx.kept(two)] == [
        (2, k) for k in reference.counts(33, schedules(4)["steep"], 30)
    ]


def test_transforming_a_transformed_model_prunes_by_the_new_schedule_alone_or_is_refused() -> None:
    ids, shares = tokens(2, 1, 64), schedules(4)["steep"]
    with torch.no_grad():
        expected = sparse("mamba", shares)(input_ids=ids).logits
        try:
            again = simba_fx.transform(sparse("mamba", schedules(4)["linear"]), shares, criterion="simba")
        except simba_fx.errors.SimbaError:
            return
        assert torch.equal(again(input_ids=ids).logits, expected)


# Trained weights.


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    from transformers import MambaForCausalLM

    return MambaForCausalLM.from_pretrained(CHECKPOINT).eval()


def source_bytes(length: int, window: int) -> Tensor:
    """`(1, L)` bytes of an installed package's source, which the checkpoint was not trained on."""
    text = Path(_pytest.python.__file__).read_bytes()
    return torch.tensor(list(text[2000 + window * length :][:length]))[None]


@pytest.mark.parametrize("kernels", ["model", "auto"])
def test_the_trained_checkpoint_equals_the_reference_on_real_text(trained: nn.Module, kernels: str) -> None:
    shares = reference.linear(12)
    pruned = simba_fx.transform(trained, "linear", kernels=kernels, criterion="simba")
    checked = 0
    for window in range(4):
        ids = source_bytes(256, window)
        with torch.no_grad():
            expected = reference.run(trained, ids, shares, tail=100)
        if expected.margin < reference.CLEAR_MARGIN:
            continue
        checked += 1
        with torch.no_grad(), simba_fx.tail(pruned, 100):
            found = pruned(input_ids=ids).logits
        assert_kept_equal(pruned, expected)
        if kernels == "model":
            assert torch.equal(found, expected.logits)
        assert_close("logits", found, expected.logits, TOLERANCE[torch.float32])
    assert checked >= 2
