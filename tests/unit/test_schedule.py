"""The count rule and the schedules, against method.md section 4 written out a second time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from simba_fx.errors import ScheduleError
from simba_fx.schedule import (
    Budget,
    Constant,
    Cosine,
    Custom,
    Dense,
    Explicit,
    Linear,
    Schedule,
    Stages,
    as_schedule,
    kept_count,
    resolve_shares,
)

ONE = Fraction(1)
LENGTHS = range(1, 301)

shares_of_tokens = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)
schedules_by_shape = st.sampled_from([Linear, Cosine])


def mean(shares: tuple[Fraction, ...]) -> Fraction:
    return sum(shares, Fraction(0)) / len(shares)


def sequential_counts(length: int, shares: tuple[Fraction, ...], tail: int, floor: int) -> list[int]:
    """method.md section 4 as written: block after block, each count at most the one before."""
    counts = [length]
    for share in shares[1:]:
        counts.append(min(counts[-1], tail + max(math.ceil(share * (length - tail)), floor)))
    return counts


@pytest.mark.parametrize("schedule", [Linear(), Linear(every=3), Cosine(final=0.3), Constant(), Dense()], ids=str)
@pytest.mark.parametrize(("tail", "floor"), [(1, 4), (1, 0), (7, 4), (100, 9)])
def test_counts_equal_the_sequential_rule_at_every_length(schedule: Schedule, tail: int, floor: int) -> None:
    shares = resolve_shares(schedule, 12)
    for length in LENGTHS:
        counts = [kept_count(length, share, tail, floor) for share in shares]
        assert counts == sequential_counts(length, shares, tail, floor), length
        assert all(isinstance(count, int) and 1 <= count <= length for count in counts)


def test_tensor_counts_equal_int_counts_row_by_row() -> None:
    lengths = torch.arange(1, 301)
    for share in resolve_shares(Linear(), 24):
        for tail in (1, 50):
            counts = kept_count(lengths, share, tail)
            assert counts.dtype == torch.int64
            assert counts.tolist() == [kept_count(length, share, tail) for length in LENGTHS]
    tails = torch.tensor([1, 2, 3])
    assert kept_count(torch.tensor([3, 50, 300]), Fraction(1, 10), tails).tolist() == [3, 7, 33]


def test_largest_denominator_stays_inside_int64() -> None:
    share = resolve_shares(Explicit([1, Fraction(999_999_999, 1_000_000_000)]), 2)[1]
    length = 2**33 - 1
    assert kept_count(torch.tensor([length]), share).tolist() == [kept_count(length, share)]


def test_symbolic_count_equals_int_counts_and_adds_no_guard() -> None:
    env = ShapeEnv()
    dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    fake = FakeTensorMode(shape_env=env).from_tensor(torch.empty(64), symbolic_context=dynamic)
    length = fake.shape[0]
    assert isinstance(length, torch.SymInt)
    for share in resolve_shares(Linear(), 6)[1:]:
        count = kept_count(length, share, tail=2)
        assert isinstance(count, torch.SymInt)
        expression = count.node.expr
        for concrete in LENGTHS:
            value = expression.xreplace({length.node.expr: sympy.Integer(concrete)})
            assert int(value) == kept_count(concrete, share, tail=2), concrete
    assert kept_count(length, ONE) is length
    assert env.guards == []


def test_count_of_a_proxy_is_a_graph_that_counts() -> None:
    traced = fx.symbolic_trace(lambda tokens: kept_count(tokens.shape[1], Fraction(3, 10), tail=2))
    for length in (1, 5, 6, 7, 100):
        assert traced(torch.empty(2, length)) == kept_count(length, Fraction(3, 10), tail=2)


def test_one_compiled_graph_serves_every_length() -> None:
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x: x.new_ones(kept_count(x.shape[0], Fraction(1, 10))), backend=counter, fullgraph=True, dynamic=True
    )
    for length in (64, 2, 9, 300):
        assert compiled(torch.empty(length)).shape[0] == kept_count(length, Fraction(1, 10))
    assert counter.frame_count == 1


@given(st.integers(1, 10**6), shares_of_tokens, shares_of_tokens, st.integers(1, 10**6), st.integers(0, 64))
def test_count_properties(length: int, share: Fraction, other: Fraction, tail: int, floor: int) -> None:
    count = kept_count(length, share, tail, floor)
    assert count == min(length, tail + max(math.ceil(share * (length - tail)), floor))
    assert min(length, tail + floor) <= count <= length
    assert kept_count(length, ONE, tail, floor) == length
    low, high = sorted((share, other))
    assert kept_count(length, low, tail, floor) <= kept_count(length, high, tail, floor)
    assert count <= kept_count(length + 1, share, tail, floor) <= count + 1


@given(st.integers(2, 80), shares_of_tokens)
def test_linear_is_the_formula(n_blocks: int, final: Fraction) -> None:
    assert Linear(final).shares(n_blocks) == tuple(1 - (1 - final) * Fraction(i, n_blocks - 1) for i in range(n_blocks))


def test_linear_default_is_the_papers_setting() -> None:
    assert [round(float(share), 3) for share in Linear().shares(4)] == [1.0, 0.7, 0.4, 0.1]
    assert mean(Linear().shares(24)) == Fraction(55, 100)


def test_cosine_is_the_formula_to_a_millionth() -> None:
    for block, share in enumerate(Cosine(final=0.2).shares(48)):
        assert float(share) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * block / 47)) / 2, abs=1e-6)


@given(schedules_by_shape, st.integers(2, 80), shares_of_tokens, st.integers(1, 40), st.integers(0, 10))
def test_stages_keep_the_mean_exactly_when_twice_every_fits(
    ramp: type[Linear] | type[Cosine], n_blocks: int, final: Fraction, every: int, start: int
) -> None:
    if start + every >= n_blocks:
        with pytest.raises(ScheduleError):
            ramp(final, every, start).shares(n_blocks)
        return
    staged, smooth = ramp(final, every, start).shares(n_blocks), ramp(final, 1, start).shares(n_blocks)
    assert len(staged) == n_blocks
    assert staged[: start + 1] == (ONE,) * (start + 1)
    assert staged[-1] == final
    assert all(after <= before for before, after in pairwise(staged))
    changes = [block for block in range(1, n_blocks) if staged[block] != staged[block - 1]]
    assert all((block - start) % every == 0 for block in changes)
    if 2 * every <= n_blocks - start:
        assert mean(staged) == mean(smooth)
    else:
        assert set(staged[start + every :]) == {final}
        assert mean(staged) >= mean(smooth)


def test_stages_of_equal_length_are_a_ramp_of_their_own() -> None:
    staged = Linear(every=4).shares(12)
    assert staged[::4] == Linear().shares(3)


def test_constant_stages_and_explicit_place_their_shares() -> None:
    half = Fraction(1, 2)
    assert Constant(0.5).shares(4) == (ONE, half, half, half)
    assert Constant(0.5, start=0).shares(4) == Constant(0.5, start=1).shares(4)
    assert Constant(0.5, start=3).shares(4) == (ONE, ONE, ONE, half)
    assert Stages({3: 0.5, 1: 0.7}).shares(5) == (ONE, Fraction(7, 10), Fraction(7, 10), half, half)
    assert Stages({}).shares(3) == Dense().shares(3) == (ONE, ONE, ONE)
    assert Explicit([1, 0.5]).shares(2) == Custom(lambda n: [1, 0.5]).shares(2) == (ONE, half)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Constant(), Dense(), Stages({}), Linear(every=9)], ids=str)
def test_a_model_of_one_block_is_dense(schedule: Schedule) -> None:
    assert resolve_shares(schedule, 1) == (ONE,)


def test_floats_mean_the_decimals_they_print() -> None:
    third = Fraction(1, 3)
    written = Explicit([1, 0.7, float(torch.tensor(0.3)), Fraction(0.1), 1 / 3, 1e-9])
    assert written.shares(6) == (ONE, Fraction(7, 10), Fraction(3, 10), Fraction(1, 10), third, Fraction(1, 10**6))


@given(schedules_by_shape, st.integers(2, 128), shares_of_tokens, st.integers(1, 8))
def test_resolved_shares_are_valid_with_small_denominators(
    ramp: type[Linear] | type[Cosine], n_blocks: int, final: Fraction, every: int
) -> None:
    every = min(every, n_blocks - 1)
    shares = resolve_shares(ramp(final, every), n_blocks)
    assert shares[0] == 1
    assert all(0 < after <= before and after.denominator <= 10**9 for before, after in pairwise(shares))


def halves(n_blocks: int) -> list[float]:
    return [1.0] + [0.5] * (n_blocks - 1)


@pytest.mark.parametrize(
    ("value", "schedule"),
    [
        ("linear", Linear()),
        ("cosine", Cosine()),
        ("constant", Constant(0.55)),
        ("dense", Dense()),
        (0.3, Constant(0.3)),
        (1, Constant(1)),
        (Fraction(1, 3), Constant(Fraction(1, 3))),
        ([1, 0.5], Explicit((1, 0.5))),
        ((1, 0.5), Explicit((1, 0.5))),
        (torch.tensor([1.0, 0.5]).tolist(), Explicit((1.0, 0.5))),
        ({4: 0.5}, Stages({4: 0.5})),
        (halves, Custom(halves)),
        (Linear(final=0.2), Linear(final=0.2)),
        (Budget(0.5), Budget(0.5)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # no addresses: xdist workers must agree
)
def test_every_spelling_becomes_one_object(value: object, schedule: Schedule) -> None:
    assert as_schedule(value) == schedule
    assert hash(as_schedule(value)) == hash(schedule)


def test_an_object_of_the_users_own_is_taken_as_it_is() -> None:
    class Mine:
        def shares(self, n_blocks: int) -> tuple[Fraction, ...]:
            return (ONE,) * n_blocks

    mine = Mine()
    assert as_schedule(mine) is mine


@pytest.mark.parametrize(
    "text",
    [
        "Linear(final=0.1, every=2, start=3)",
        "Cosine(final=0.25, every=1, start=0)",
        "Constant(share=0.55, start=1)",
        "Dense()",
        "Stages({1: 0.7, 3: 0.5})",
        "Explicit(values=(1, 0.5))",
        "Budget(flops=0.5, shape='cosine', every=1, start=0, length=2048)",
    ],
)
def test_a_schedule_prints_as_its_configuration(text: str) -> None:
    assert str(eval(text)) == text


def test_custom_prints_its_function() -> None:
    assert str(Custom(halves)) == "Custom(halves)"


def overhead_plus_mean(shares: tuple[Fraction, ...]) -> float:
    """A fifth of the forward is an LM head that no schedule shrinks."""
    return 0.2 + 0.8 * float(mean(shares))


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_budget_is_the_largest_final_share_that_meets_it(shape: str) -> None:
    budget = Budget(0.7, shape)
    shares = resolve_shares(budget, 12, overhead_plus_mean)
    more = budget._shares(int(shares[-1] * 10_000) + 1, 12)
    assert overhead_plus_mean(shares) <= 0.7 < overhead_plus_mean(more)


def test_budget_of_everything_is_dense() -> None:
    assert Budget(1).solve(overhead_plus_mean, 12) == Dense().shares(12)


@given(st.integers(1, 10_000), st.integers(2, 12))
def test_budget_finds_the_final_share_that_costs_it(steps: int, n_blocks: int) -> None:
    shares = Linear(Fraction(steps, 10_000)).shares(n_blocks)
    calls = []

    def cost(candidate: tuple[Fraction, ...]) -> float:
        calls.append(candidate)
        return overhead_plus_mean(candidate)

    assert Budget(overhead_plus_mean(shares)).solve(cost, n_blocks) == shares
    assert len(calls) <= 17


def test_budget_of_everything_is_dense_although_scoring_costs_more() -> None:
    """Case 11: a share just below 1 scores at every cut, and costs more than dense."""

    def cost(shares: tuple[Fraction, ...]) -> float:
        cuts = sum(later < earlier for earlier, later in itertools.pairwise(shares))
        return float(sum(shares)) / len(shares) + 0.01 * cuts

    assert Budget(1).solve(cost, 12) == Dense().shares(12)
    for flops in (0.99, 0.9, 0.7):
        assert flops - 0.01 < cost(Budget(flops).solve(cost, 12)) <= flops


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_budget_below_any_ramp_is_met_by_a_steeper_one(shape: str) -> None:
    shares = resolve_shares(Budget(0.5, shape), 12, overhead_plus_mean)
    assert 0.49 < overhead_plus_mean(shares) <= 0.5
    assert shares[0] == 1
    assert shares[-1] == shares[-2] == Fraction(1, 10_000)


ERRORS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: as_schedule("lineal"),
        "expected a schedule name, one of linear, constant, cosine, dense; found 'lineal'.",
    ),
    (
        lambda: as_schedule(None),
        "expected a schedule (a name, share, mapping, function, sequence or object), found None;"
        " write for example schedule='linear' or schedule=Linear(final=0.1).",
    ),
    (
        lambda: as_schedule(Linear),
        "expected a schedule (a name, share, mapping, function, sequence or object),"
        " found <class 'simba_fx.schedule.Linear'>;"
        " write for example schedule='linear' or schedule=Linear(final=0.1).",
    ),
    (lambda: as_schedule(1.5), "Constant(share=1.5, start=1): expected share in (0, 1], found 1.5."),
    (lambda: as_schedule(0), "Constant(share=0, start=1): expected share in (0, 1], found 0."),
    (
        lambda: Linear(final=float("nan")),
        "Linear(final=nan, every=1, start=0): expected final in (0, 1], found nan.",
    ),
    (
        lambda: Linear(every=0),
        "Linear(final=0.1, every=0, start=0): expected every to be an int of at least 1, found 0.",
    ),
    (
        lambda: Cosine(start=-1),
        "Cosine(final=0.1, every=1, start=-1): expected start to be an int of at least 0, found -1.",
    ),
    (
        lambda: Linear(every=8, start=4).shares(12),
        "Linear(final=0.1, every=8, start=4): expected start + every below the model's 12 blocks, found 12; nothing"
        " would be pruned, so lower them.",
    ),
    (
        lambda: Constant(0.5, start=12).shares(12),
        "Constant(share=0.5, start=12): expected start below the model's 12 blocks, found 12; nothing would be pruned,"
        " so lower start.",
    ),
    (lambda: Stages({-1: 0.5}), "Stages({-1: 0.5}): expected each block to be an int of at least 0, found -1."),
    (
        lambda: Stages({2: 0.5}).shares(2),
        "Stages({2: 0.5}): expected blocks 0 to 1, found block 2; the model has 2 blocks.",
    ),
    (
        lambda: resolve_shares(Explicit([1, 0.5]), 3),
        "Explicit(values=(1, 0.5)): expected 3 shares, one per block, found 2; write 3 shares or a mapping block ->"
        " share.",
    ),
    (
        lambda: resolve_shares(Explicit([1, 0.5, 0.6]), 3),
        "Explicit(values=(1, 0.5, 0.6)): expected shares that never increase, found 0.6 at block 2 after 0.5; a token"
        " that left cannot come back, so lower this share or raise those before it.",
    ),
    (
        lambda: resolve_shares(Explicit([1, 0]), 2),
        "Explicit(values=(1, 0)): expected shares in (0, 1], found 0 at block 1; a share is the part of the input's"
        " tokens that enters the block.",
    ),
    (
        lambda: resolve_shares(Stages({0: 0.5}), 2),
        "Stages({0: 0.5}): expected share 1 at block 0, found 0.5; every token enters the first block, so begin"
        " with 1.",
    ),
    (
        lambda: resolve_shares(Explicit([1, "half"]), 2),  # type: ignore[list-item]
        "expected a number for a share, found 'half'.",
    ),
    (
        lambda: resolve_shares(Custom(lambda n: 0.5), 2),  # type: ignore[arg-type, return-value]
        "Custom(<lambda>): expected the function to return 2 shares, one per block, found 0.5.",
    ),
    (
        lambda: Budget(0.5, shape="square"),
        "Budget(flops=0.5, shape='square', every=1, start=0, length=2048): expected shape 'linear', 'cosine' or"
        " 'constant', found 'square'.",
    ),
    (
        lambda: Budget(0.5, shape="constant", every=2),
        "Budget(flops=0.5, shape='constant', every=2, start=0, length=2048): expected every=1 with shape='constant',"
        " found 2.",
    ),
    (
        lambda: Budget(2),
        "Budget(flops=2, shape='linear', every=1, start=0, length=2048): expected flops in (0, 1], found 2.",
    ),
    (
        lambda: resolve_shares(Budget(0.5), 12),
        "Budget(flops=0.5, shape='linear', every=1, start=0, length=2048): expected the model's cost, found none; call"
        " solve(cost, 12) instead.",
    ),
    (
        lambda: resolve_shares(Budget(0.2), 12, overhead_plus_mean),
        "Budget(flops=0.2, shape='linear', every=1, start=0, length=2048) cannot be met: even with share 0.0001 from"
        " the first cut on the forward costs 0.267 of dense; ask for a budget from 0.267 to 1, or prune earlier"
        " (smaller start or every).",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors_word_for_word(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        call()
    assert str(caught.value) == message
