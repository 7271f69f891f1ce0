"""Stacks that scan both ways, and tokens named by position, against an eager float64 reference.

The reference below is written from method.md: a row at a time, the module's own blocks one by one on hidden states that
are indexed between them, each scan's operands scored by a loop over tokens in the direction that the *class* of the
block says. It shares no code with the graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import graph_cases
import numpy as np
import pytest
import reference
import torch
from expecttest import assert_expected_inline
from graph_cases import WIDTH, Block, Both, Plain, Real, Turned, TurnedOutside
from hypothesis import given
from hypothesis import strategies as st
from reference import CLEAR_MARGIN, GRADIENT_TOLERANCE, TOLERANCE, assert_close
from strategies import examples, seeds, shares
from torch import Tensor, nn
from torch._dynamo.utils import counters

import simba_fx
from simba_fx.capture.export import capture_graph
from simba_fx.errors import GraphError, InputError, SimbaError
from simba_fx.frontends.module import model as plain
from simba_fx.graph import runner as pipeline
from simba_fx.ops import protect_tokens, row_positions

FLOAT = TOLERANCE[torch.float32]


class Three(Block):
    """Two scans forward and one reversed, on the same operands."""

    directions = (False, True, False)

    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        first, back, second = self.mixers
        return x + first(y) + back(y.flip(1)).flip(1) + second(y)


@dataclass(frozen=True)
class Stack:
    """A module, and which way the scans of its blocks run, in the order in which they are called."""

    name: str
    make: Callable[[], nn.Module]
    directions: tuple[tuple[bool, ...], ...]
    outside: bool = False
    """Whether the outer forward turns the tokens around for every second block."""

    def __str__(self) -> str:
        return self.name

    @functools.cache  # noqa: B019  # a few stacks, one module each: captured once
    def module(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().eval()

    def call(self, module: nn.Module, index: int, hidden: Tensor) -> Tensor:
        block: Any = module.get_submodule("layers")[index]  # type: ignore[index]  # a ModuleList
        turned = self.outside and index % 2
        result: Tensor = block(hidden.flip(1)).flip(1) if turned else block(hidden)
        return result


BOTH = Stack("two directions", lambda: Plain(Both(), Both(), Both()), ((False, True),) * 3)
THREE = Stack("three scans", lambda: Plain(Three(), Both(), Three()), (Three.directions, Both.directions, ()))
ALTERNATING = Stack("alternating", lambda: Plain(Block(), Turned(), Block(), Turned()), ((False,), (True,)) * 2)
OUTSIDE = Stack("turned outside", lambda: TurnedOutside(*(Block() for _ in range(4))), ((False,), (True,)) * 2, True)
MASKED = Stack("with a mask", lambda: Real(Both(), Turned(), Both()), ((False, True), (True,), (False, True)))
STACKS = (BOTH, THREE, ALTERNATING, OUTSIDE)


# --- the reference -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded() -> Iterator[list[reference.Scan]]:
    """Within it, the operands of every call of `loop_scan` are noted, in the scan's own order."""
    original, calls = graph_cases.loop_scan, []

    def noting(*operands: Tensor) -> Tensor:
        u, delta, a, b, c = (tensor.detach().double().numpy() for tensor in operands)
        read = (c[0].T[:, None], delta[0].T)
        calls.append(reference.Scan(u[0].T, delta[0].T, a, b[0].T[:, None], *read))
        return original(*operands)

    try:
        graph_cases.loop_scan = noting
        yield calls
    finally:
        graph_cases.loop_scan = original


@dataclass
class Row:
    output: Tensor  # (1, L, 4)
    kept: list[list[int]]  # per block, the positions that entered it
    margin: float


def run_row(
    stack: Stack,
    module: nn.Module,
    x: Tensor,
    schedule: Sequence[Fraction],
    *,
    query: int | None = None,
    protect: Sequence[int] = (),
    floor: int = 4,
    tail: int | None = None,
    criterion: str = "simba",
) -> Row:
    """The method on one row `x (1, L, D)` without padding."""
    length = x.shape[1]
    named = {(p + length) % length for p in (*protect, *(() if query is None else (query,)))}
    distinct = {*protect, *(() if query is None else (query,))}
    tail = (query is None) if tail is None else tail
    needed = {None: set(), 0: {True}, -1: {False}}.get(query, {False, True})
    planned = reference.counts(length, schedule, tail, max(floor, len(distinct)))
    hidden = carried = x
    positions, every, closest = list(range(length)), [], float("inf")
    for index, directions in enumerate(stack.directions):
        every.append(list(positions))
        with recorded() as calls:
            hidden = stack.call(module, index, hidden)
        carried = carried.index_copy(1, torch.tensor(positions), hidden)
        last = index + 1 == len(stack.directions)
        if last or planned[index + 1] >= len(positions) or not needed <= set(directions):
            continue
        m, at = len(positions), None if query is None else positions.index((query + length) % length)
        scores, sizes = np.full(m, -np.inf), np.full(m, 1e-30)
        assert len(calls) == len(directions)
        for scan, backward in zip(calls, directions):
            end = (m - 1 if backward else m - tail) if at is None else m - 1 - at if backward else at
            own, own_sizes = reference.score(scan, end, criterion)
            slots = [m - 1 - t if backward else t for t in range(end + 1)]
            scores[slots] = np.maximum(scores[slots], own)
            sizes[slots] = np.maximum(sizes[slots], own_sizes)
        free = [t for t in range(m - tail) if positions[t] not in named]
        stay = sorted(set(range(m)) - set(free))
        best = reference.choose(scores[free].tolist(), planned[index + 1] - len(stay))
        closest = min(closest, reference.margin(scores[free], sizes[free], best))
        stay = sorted([*stay, *(free[t] for t in best)])
        hidden, positions = hidden[:, stay], [positions[t] for t in stay]
    outer: Any = module
    return Row(outer.head(outer.norm(carried)), every, closest)


@pytest.fixture(autouse=True, scope="module")
def one_capture_per_module() -> Iterator[None]:
    """A capture does not depend on what is asked of it, and takes most of a transform's time."""
    known: dict[nn.Module, Any] = {}

    def remembered(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model not in known:
            known[model] = capture_graph(model, *args, **kwargs)
        return known[model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "capture_graph", remembered)
        yield


def kept_rows(sparse: nn.Module) -> list[list[list[int]]]:
    """Per block and row, without the −1 of pads."""
    return [[[p for p in row if p >= 0] for row in block.tolist()] for block in simba_fx.kept(sparse)]


def rows_of(generator: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, WIDTH, generator=torch.Generator().manual_seed(generator))


def transformed(module: nn.Module, schedule: Any, *, mask: bool = False, **options: Any) -> Any:
    inputs = (torch.zeros(2, 24, WIDTH), *((torch.ones(2, 24),) if mask else ()))
    options = {"criterion": "simba", **options}
    return simba_fx.transform(module, schedule, mask="mask" if mask else None, example_inputs=inputs, **options)


def assert_equals_reference(
    stack: Stack, module: nn.Module, sparse: Any, x: Tensor, schedule: Any, **options: Any
) -> int:
    """Kept sets exactly, outputs to the tolerance; returns how many rows were too close to call."""
    output = sparse(x)
    found, discarded = kept_rows(sparse), 0
    for b, row in enumerate(x):
        expected = run_row(stack, module, row[None], schedule, **options)
        if expected.margin < CLEAR_MARGIN:
            discarded += 1
            continue
        assert [block[b] for block in found] == expected.kept
        assert_close(f"row {b}", output[b : b + 1], expected.output, FLOAT)
    return discarded


# --- the method --------------------------------------------------------------------------------------------------

QUERIES = (None, -1, 0, 7)  # of rows of at least 8 tokens


def queries(stack: Stack) -> list[int | None]:
    """The positions that some block carries every token to."""
    return [q for q in QUERIES if q != 7 or stack in (BOTH, THREE)]


@pytest.mark.parametrize(("stack", "query"), [(s, q) for s in STACKS for q in queries(s)], ids=str)
def test_what_is_kept_and_what_comes_out(stack: Stack, query: int | None) -> None:
    schedule = (Fraction(1), Fraction(6, 10), Fraction(4, 10), Fraction(2, 10))[: len(stack.directions)]
    module, protect = stack.module(), (0, -3)
    sparse = transformed(module, schedule, query=query, protect=protect)
    discarded = 0
    with torch.no_grad():
        for length in (9, 26):
            x = rows_of(length, 2, length)
            discarded += assert_equals_reference(stack, module, sparse, x, schedule, query=query, protect=protect)
    assert discarded <= 1
    assert all({0, length - 3} <= set(row) for block in kept_rows(sparse) for row in block)


@pytest.mark.parametrize("criterion", ["simba-abs", "no-decay", "delta-norm", "clip"])
@pytest.mark.parametrize("query", [None, 7])
def test_other_criteria(criterion: str, query: int | None) -> None:
    schedule = (Fraction(1), Fraction(1, 2), Fraction(1, 3))
    module = THREE.module()
    sparse = transformed(module, schedule, query=query, criterion=criterion)
    with torch.no_grad():
        assert assert_equals_reference(THREE, module, sparse, rows_of(1, 2, 25), schedule, query=query,
                                       criterion=criterion) <= 1  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """What may be asked of rows of at least 8 tokens."""
    position = st.integers(-8, 7)
    return {
        "query": draw(st.one_of(st.none(), position)),
        "protect": tuple(draw(st.lists(position, max_size=4))),
        "floor": draw(st.integers(0, 5)),
    }


@given(requests(), shares(3), st.integers(8, 40), seeds)
@examples(10)
def test_any_request(request: dict[str, Any], schedule: tuple[Fraction, ...], length: int, seed: int) -> None:
    module = BOTH.module(seed % 3)
    sparse = transformed(module, schedule, **request)
    with torch.no_grad():
        assert_equals_reference(BOTH, module, sparse, rows_of(seed, 2, length), schedule, **request)
    named = {p % length for p in (*request["protect"], *([] if request["query"] is None else [request["query"]]))}
    assert all(named <= set(row) for block in kept_rows(sparse) for row in block)


def test_a_tail_beside_a_query_is_kept_and_does_not_move_it() -> None:
    schedule = (Fraction(1), Fraction(1, 2), Fraction(1, 3))
    module, x = BOTH.module(), rows_of(3, 2, 30)
    sparse = transformed(module, schedule, query=4)
    with torch.no_grad(), simba_fx.tail(sparse, 6):
        assert assert_equals_reference(BOTH, module, sparse, x, schedule, query=4, tail=6) == 0
        assert simba_fx.report(sparse, x).tail == 6
    with torch.no_grad():
        assert assert_equals_reference(BOTH, module, sparse, x, schedule, query=4) == 0
        assert simba_fx.report(sparse, x).tail == 0


def test_a_tail_without_a_query_leaves_reversed_scans_at_their_own_end() -> None:
    schedule = (Fraction(1), Fraction(1, 2), Fraction(1, 3))
    module, x = BOTH.module(), rows_of(4, 2, 30)
    sparse = transformed(module, schedule)
    with torch.no_grad(), simba_fx.tail(sparse, 6):
        assert assert_equals_reference(BOTH, module, sparse, x, schedule, tail=6) == 0


def test_blocks_that_do_not_carry_every_token_to_the_query_drop_none() -> None:
    """And the next block that does catches up with the schedule: the report and `explain` say so."""
    module, x = ALTERNATING.module(), rows_of(5, 2, 20)
    sparse = transformed(module, (1, 0.8, 0.5, 0.3), query=0)
    sparse(x)
    assert [tokens.shape[1] for tokens in simba_fx.kept(sparse)] == [20, 20, 10, 10]
    reasons = [block.reason for block in simba_fx.report(sparse, x).blocks]
    assert reasons[0] == "it has no scan to score tokens with; the next block that has one catches up"
    assert "layers.0: it has no scan to score tokens with" in simba_fx.explain(sparse)


@pytest.mark.parametrize("backward", [False, True])
def test_contributions_sum_to_the_output_at_the_query(backward: bool) -> None:
    """The sum rule of method.md section 2 in each direction: what reaches the query adds up to the scan's output."""
    module, x = BOTH.module(), rows_of(6, 1, 15)
    with recorded() as calls, torch.no_grad():
        BOTH.call(module, 0, x)
    scan = calls[int(backward)]
    y = reference.outputs(scan)
    for slot in range(15):
        own = 14 - slot if backward else slot
        assert np.allclose(reference.contributions(scan, own)[0].sum(0), y[own], rtol=1e-10, atol=1e-12)


# --- padding -----------------------------------------------------------------------------------------------------


def padded(rows: Sequence[Tensor], left: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    x, mask = torch.full((len(rows), width, WIDTH), 3.0), torch.zeros(len(rows), width)
    for b, (row, pads) in enumerate(zip(rows, left)):
        x[b, pads : pads + len(row)], mask[b, pads : pads + len(row)] = row, 1
    return x, mask


@given(st.sampled_from([(None, ()), (None, (2, -1)), (-2, (0,)), (3, (-5,)), (0, ())]), seeds, st.data())
@examples(10)
@pytest.mark.capability("padding", "both directions (Vision Mamba)")
def test_a_row_in_a_padded_batch_is_the_row_alone(named: tuple[int | None, tuple[int, ...]], seed: int,
                                                  data: st.DataObject) -> None:  # fmt: skip
    """For any padding side; and alone it is the reference's row."""
    query, protect = named
    schedule = (Fraction(1), Fraction(6, 10), Fraction(3, 10))
    module = MASKED.module()
    sparse = transformed(module, schedule, mask=True, query=query, protect=protect)
    sizes = data.draw(st.lists(st.integers(6, 30), min_size=2, max_size=3))
    width = max(sizes) + data.draw(st.sampled_from([0, 3]))
    left = [data.draw(st.integers(0, width - size)) for size in sizes]
    rows = [rows_of(seed % 1000 + b, size) for b, size in enumerate(sizes)]
    x, mask = padded(rows, left, width)
    with torch.no_grad():
        together = sparse(x, mask)
        found = kept_rows(sparse)
        for b, (row, pads) in enumerate(zip(rows, left)):
            expected = run_row(MASKED, module, row[None], schedule, query=query, protect=protect)
            if expected.margin < CLEAR_MARGIN:
                continue
            alone = sparse(row[None], torch.ones(1, len(row)))
            assert [block[0] for block in kept_rows(sparse)] == expected.kept
            assert [[p - pads for p in block[b]] for block in found] == expected.kept
            assert_close("alone", alone, expected.output, FLOAT)
            assert_close("in the batch", together[b : b + 1, pads : pads + len(row)], expected.output, FLOAT)


# --- everything kept, gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", STACKS, ids=str)
@pytest.mark.capability("parity", "both directions (Vision Mamba)")
def test_everything_kept_is_the_dense_module_bit_for_bit(stack: Stack) -> None:
    """With score, protection, selection and gathers in the graph: only the counts keep every token."""
    module, x = stack.module(), rows_of(7, 2, 21)
    query = 5 if stack in (BOTH, THREE) else None
    blocks = len(stack.directions)
    sparse = transformed(module, (1, *(0.1,) * (blocks - 1)), floor=99, kernels="model", query=query, protect=(-4,))
    assert "protect_tokens" in simba_fx.explain(sparse)
    results = [run(x) for run in (module, sparse)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(result.square().sum(), list(module.parameters())) for result in results]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.capability("train", "both directions (Vision Mamba)")
def test_gradients_equal_the_references() -> None:
    schedule = (Fraction(1), Fraction(1, 2), Fraction(1, 4))
    module, x = BOTH.module(), rows_of(8, 1, 30)
    sparse = transformed(module, schedule, query=11, protect=(0,))
    expected = run_row(BOTH, module, x, schedule, query=11, protect=(0,))
    assert expected.margin >= CLEAR_MARGIN
    names = dict(module.named_parameters())
    found, right = (torch.autograd.grad(y.square().sum(), list(names.values())) for y in (sparse(x), expected.output))
    for name, a, b in zip(names, found, right):
        assert_close(name, a, b, GRADIENT_TOLERANCE[torch.float32])


# --- heads that read every token ---------------------------------------------------------------------------------


class Classifier(Plain):
    """A class token among the patches, `(B, L, D)` to `(B, 4)`: read by the head, or the mean of all tokens."""

    def __init__(self, place: int | None) -> None:
        super().__init__(Both(), Both(), Both())
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.place is None else x[:, self.place])


@pytest.mark.parametrize("place", [0, 9, -1, None])
def test_a_head_sees_the_class_token_and_pooling_every_token(place: int | None) -> None:
    torch.manual_seed(0)
    module, x = Classifier(place).eval(), rows_of(9, 1, 20)
    schedule = (Fraction(1), Fraction(1, 2), Fraction(1, 4))
    sparse = transformed(module, schedule, query=place)
    expected = run_row(BOTH, module, x, schedule, query=place)  # head(norm(·)) of every token
    assert expected.margin >= CLEAR_MARGIN
    every = expected.output  # the head is affine: the mean of its results is its result of the mean
    wanted = every.mean(1) if place is None else every[:, place]
    assert_close("logits", sparse(x), wanted, FLOAT)
    assert len(expected.kept[-1]) < 20


# --- criteria that read no scan, and a user's own ------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["random", "stride", "recent"])
@pytest.mark.parametrize("query", [None, 7])
def test_criteria_by_position_honour_what_is_protected(criterion: str, query: int | None) -> None:
    """Also in a stack whose scans could not be scored at the query."""
    for stack in (BOTH, ALTERNATING):
        module, x = stack.module(), rows_of(10, 2, 30)
        schedule = (Fraction(1), Fraction(5, 10), Fraction(3, 10), Fraction(2, 10))[: len(stack.directions)]
        sparse = transformed(module, schedule, query=query, protect=(1, 12), criterion=criterion)
        sparse(x)
        named = {1, 12, 29 if query is None else 7}
        for block, counted in zip(kept_rows(sparse), reference.counts(30, schedule, query is None)):
            assert all(named <= set(row) and len(row) == counted for row in block)
        if criterion == "recent":
            others = [p for p in kept_rows(sparse)[1][0] if p not in named]
            assert others == list(range(30 - len(others) - (query is None), 30))[: len(others)]


def test_a_users_criterion_gets_the_scans_own_direction() -> None:
    """Its operands as the scan has them, the query's slot among them, and its scores are flipped back."""
    module, x = BOTH.module(), rows_of(11, 2, 20)
    seen: list[tuple[Tensor, Tensor]] = []

    def first_channel(scan: Any, query: Tensor) -> Tensor:
        seen.append((scan.u, query))
        return scan.u[:, 0]

    sparse = transformed(module, (1, 0.5, 0.5), query=4, protect=(-1,), criterion=first_channel)
    with torch.no_grad():
        sparse(x)
    (forward, at), (backward, turned) = seen
    assert torch.equal(backward, forward.flip(2))
    assert (at.tolist(), turned.tolist()) == ([4, 4], [15, 15])
    for b in range(2):
        free = [t for t in range(20) if t not in (4, 19)]
        best = reference.choose(forward[b, 0, free].tolist(), 8)
        assert kept_rows(sparse)[1][b] == sorted([*(free[t] for t in best), 4, 19])


def test_a_users_criterion_cannot_push_a_protected_token_out() -> None:
    module, x = BOTH.module(), rows_of(12, 2, 20)

    def infinite(scan: Any, query: Tensor) -> Tensor:
        return torch.full((2, 20), torch.inf)

    sparse = transformed(module, (1, 0.3, 0.3), query=0, protect=(3,), criterion=infinite)
    sparse(x)
    assert kept_rows(sparse)[1] == [[0, 3, 16, 17, 18, 19]] * 2


def test_the_floor_makes_room_for_what_is_protected() -> None:
    module, x = BOTH.module(), rows_of(13, 2, 20)
    sparse = transformed(module, (1, 0.1, 0.1), query=0, protect=(3, 5, 7, 9, 9), floor=0)
    sparse(x)
    assert kept_rows(sparse)[1] == [[0, 3, 5, 7, 9]] * 2


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["blocks", "whole"])
@pytest.mark.capability("compile", "both directions (Vision Mamba)")
def test_compiled_code_equals_eager_and_serves_every_length(mode: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    module = BOTH.module()
    sparse = transformed(module, (1, 0.6, 0.3), query=6, protect=(0,), compile=mode)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=mode == "whole", dynamic=True)
    with torch.no_grad():
        compiled(rows_of(0, 3, 20))
        graphs = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows, length in ((3, 41), (2, 23), (4, 12)):
                x = rows_of(length, rows, length)
                found, kept = compiled(x), simba_fx.kept(compiled)
                assert_close(f"({rows}, {length})", found, sparse(x), FLOAT)
                assert all(torch.equal(a, b) for a, b in zip(kept, simba_fx.kept(sparse), strict=True))
        assert counters["stats"]["unique_graphs"] == graphs


def test_equal_blocks_are_one_kind() -> None:
    module = Plain(*(Both() for _ in range(4))).eval()
    for options in ({"query": 5}, {"protect": (0,)}, {"query": -1, "protect": (2, 3)}):
        sparse = transformed(module, (1, 0.8, 0.6, 0.4), **options)
        held = simba_fx.program(sparse).program.attributes()
        assert len({held[f"block_{i}"].kind for i in (1, 2)}) == 1


def test_the_outlined_graph_and_what_a_block_does_at_its_end() -> None:
    program = simba_fx.program(transformed(BOTH.module(), (1, 0.5, 0.3), query=5, protect=(0,))).program
    assert_expected_inline(
        pipeline.text(program.graph),
        """\
forward(x, tail):
batch = sym_size(x, 0)    # track-tokens, block -1
input_length = sym_size(x, 1)    # track-tokens, block -1
arange_default = arange(batch, dtype=torch.int64, device=cpu)    # track-tokens, block -1
rows = unsqueeze(arange_default, 1)    # track-tokens, block -1
arange_default_1 = arange(input_length, dtype=torch.int64, device=cpu)    # track-tokens, block -1
positions = expand(arange_default_1, [batch, input_length])    # track-tokens, block -1
query = row_positions(positions, None, [5])    # protect-tokens, block -1
protected = row_positions(positions, None, [5, 0])    # protect-tokens, block -1
block_0 = block_0(x, positions, query)    # outline-blocks, block 0
hidden_0 = getitem(block_0, 0)    # outline-blocks, block 0
unprotected_0 = getitem(block_0, 1)    # outline-blocks, block 0
score_0 = protect_tokens(unprotected_0, positions, protected)    # score-tokens, block 0
chosen_0 = select_tokens(score_0, positions, input_length, tail, 1, 2, 4)    # select-tokens, block 0
kept_0 = getitem(chosen_0, 0)    # select-tokens, block 0
dropped_0 = getitem(chosen_0, 1)    # select-tokens, block 0
positions_0 = getitem(chosen_0, 2)    # select-tokens, block 0
left_0 = getitem(chosen_0, 3)    # select-tokens, block 0
exit_0 = take_tokens(hidden_0, dropped_0)    # restore-length, block 0
block_1 = block_1(hidden_0, rows, kept_0, positions_0, query)    # outline-blocks, block 1
hidden_1 = getitem(block_1, 0)    # outline-blocks, block 1
unprotected_1 = getitem(block_1, 1)    # outline-blocks, block 1
score_1 = protect_tokens(unprotected_1, positions_0, protected)    # score-tokens, block 1
chosen_1 = select_tokens(score_1, positions_0, input_length, tail, 3, 10, 4)    # select-tokens, block 1
kept_1 = getitem(chosen_1, 0)    # select-tokens, block 1
dropped_1 = getitem(chosen_1, 1)    # select-tokens, block 1
positions_1 = getitem(chosen_1, 2)    # select-tokens, block 1
left_1 = getitem(chosen_1, 3)    # select-tokens, block 1
exit_1 = take_tokens(hidden_1, dropped_1)    # restore-length, block 1
hidden_2 = block_2(hidden_1, rows, kept_1)    # outline-blocks, block 2
restore_tokens_default = restore_tokens([exit_0, exit_1, hidden_2], [left_0, left_1, positions_1], input_length)    # restore-length, block 3
layer_norm_3 = layer_norm(restore_tokens_default, [6], norm_weight, norm_bias, 1e-05, False)
linear_18 = linear(layer_norm_3, head_weight, head_bias)
return [linear_18, positions_0, positions_1]""",  # noqa: E501
    )
    block = pipeline.text(program.attributes()["block_1"].graph)
    assert_expected_inline(
        "\n".join(line for line in block.splitlines() if "score-tokens" in line),
        """\
le_tensor = le(positions, query)    # score-tokens, block 1
selective_token_score_default = selective_token_score(transpose_int, transpose_int_1, neg_default, transpose_int_2, transpose_int_3, None, False, le_tensor, 1, simba)    # score-tokens, block 1
ge_tensor = ge(positions, query)    # score-tokens, block 1
flip_default_2 = flip(ge_tensor, [1])    # score-tokens, block 1
selective_token_score_default_1 = selective_token_score(transpose_int_5, transpose_int_6, neg_default_1, transpose_int_7, transpose_int_8, None, False, flip_default_2, 1, simba)    # score-tokens, block 1
flip_default_3 = flip(selective_token_score_default_1, [1])    # score-tokens, block 1
unprotected = where(le_tensor, selective_token_score_default, flip_default_3)    # score-tokens, block 1""",  # noqa: E501
    )


# --- what can be asked of the result -----------------------------------------------------------------------------


def test_report_and_explain_name_the_positions() -> None:
    module, x = BOTH.module(), rows_of(14, 2, 30)
    sparse = transformed(module, (1, 0.5, 0.3), query=6, protect=(0, -1))
    report = simba_fx.report(sparse, x)
    assert report.notes == ("every scan is scored at position 6; kept in every block: 6, 0, -1",)
    assert report.notes[0] in str(report)
    assert "== ProtectTokens(query=6, protect=(0, -1)): 1 sites" in simba_fx.explain(sparse)
    sparse = transformed(module, (1, 0.5, 0.3), protect=[0])
    assert simba_fx.report(sparse, x).notes == ("kept in every block: 0",)


def test_a_query_at_an_end_scores_half_of_the_scans() -> None:
    """Reversed scans carry no token to the last one: they are not scored, and the report does not count them."""
    module, x = BOTH.module(), rows_of(15, 2, 30)
    scorer = {q: simba_fx.report(transformed(module, (1, 0.5, 0.3), query=q), x).stack.scorer for q in (-1, 0, 6)}
    assert scorer[-1] == scorer[0] == scorer[6] // 2 > 0


def test_a_budget_counts_what_is_kept() -> None:
    module, x = BOTH.module(), rows_of(16, 2, 256)
    sparse = transformed(module, simba_fx.Budget(0.6, length=256), query=100, protect=(0,))
    assert 0.55 < simba_fx.report(sparse, x).total.share <= 0.6


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [1.0, True, "cls", 2**31])
def test_a_query_that_is_no_position(query: Any) -> None:
    with pytest.raises(SimbaError) as caught:
        transformed(BOTH.module(), "linear", query=query)
    assert str(caught.value) == (
        "transform expects query to be a position in the row, an int (0 the first token, -1 the last), or None; found"
        f" {query!r}. Write for example query=0."
    )


@pytest.mark.parametrize(("protect", "wrong"), [([0, 1.5], 1.5), ([True], True), (3, 3), ("01", "01"), (None, None)])
def test_what_is_protected_is_no_sequence_of_positions(protect: Any, wrong: Any) -> None:
    with pytest.raises(SimbaError) as caught:
        transformed(BOTH.module(), "linear", protect=protect)
    assert str(caught.value) == (
        "transform expects protect to be a sequence of positions in the row, ints (0 the first token, -1 the last);"
        f" found {wrong!r}. Write for example protect=[0]."
    )


@pytest.mark.parametrize(
    ("query", "needed"), [(-1, "a forward scan"), (0, "a reversed scan"), (4, "a forward scan and a reversed scan")]
)
def test_no_block_carries_every_token_to_the_query(query: int, needed: str) -> None:
    module = Plain(*((Turned(), Turned()) if query == -1 else (Block(), Block())))
    with pytest.raises(GraphError) as caught:
        transformed(module.eval(), "linear", query=query)
    assert str(caught.value) == (
        f"query={query} is reached by every token only where a block has {needed}; found no such block among the 2 of"
        " this model. Leave query out (each scan is then scored at its own end), or, to keep the last tokens of a text,"
        " use simba_fx.tail."
    )


@pytest.mark.parametrize(("options", "farthest", "needed"), [({"query": 9}, 9, 10), ({"protect": (0, -12)}, -12, 12)])
def test_a_prompt_too_short_for_a_position(options: dict[str, Any], farthest: int, needed: int) -> None:
    sparse = transformed(BOTH.module(), "linear", **options)
    with torch.no_grad():
        sparse(rows_of(0, 2, needed))
        with pytest.raises(InputError) as caught:
            sparse(rows_of(0, 2, needed - 1))
    assert str(caught.value) == (
        f"query or protect names position {farthest}, but the prompt has {needed - 1} tokens; expected at least"
        f" {needed}. Name a position that it has, or pass a longer prompt."
    )


def test_a_padded_row_too_short_for_a_position() -> None:
    sparse = transformed(MASKED.module(), "linear", mask=True, protect=(6,))
    x, mask = padded([rows_of(0, 12), rows_of(1, 6)], (0, 4), 12)
    with pytest.raises(InputError) as caught:
        sparse(x, mask)
    assert str(caught.value) == (
        "query or protect names position 6, but row 1 has 6 real tokens; expected at least 7 in every row. Name a"
        " position that every row has, or remove the row."
    )


# --- operators ---------------------------------------------------------------------------------------------------


REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
POSITIONS = torch.arange(6).repeat(3, 1)


def test_row_positions_count_real_tokens() -> None:
    assert row_positions(POSITIONS, REAL, [0, 1, -1, -3]).tolist() == [[2, 3, 5, 3], [0, 1, 2, 0], [0, 1, 5, 3]]
    assert row_positions(POSITIONS, None, [0, -1]).tolist() == [[0, 5]] * 3


def test_protected_tokens_outrank_every_other() -> None:
    score = torch.tensor([[1.0, torch.inf, -torch.inf, torch.nan]])
    found = protect_tokens(score, torch.tensor([[0, 4, 5, 9]]), torch.tensor([[5, 0]]))
    assert found[0, [0, 2]].tolist() == [torch.inf] * 2
    assert found[0, 1] == torch.finfo(torch.float32).max
    assert found[0, 3].isnan()


@pytest.mark.filterwarnings("ignore")  # torch's own test utilities warn about their internals
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.simba_fx.row_positions.default, (POSITIONS, REAL, [0, -2]))
    torch.library.opcheck(torch.ops.simba_fx.row_positions.default, (POSITIONS, None, [3]))
    torch.library.opcheck(torch.ops.simba_fx.protect_tokens.default, (torch.randn(3, 6), POSITIONS, POSITIONS[:, :2]))
