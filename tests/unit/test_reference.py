"""The oracle itself: consistent with the dense models, with the paper's identities and with sums done by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import reference
import strategies as domain
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CACHE, FLOAT32, REGISTRY, VOCABULARY, Entry, dense, keep_all, n_blocks, names, padded, tokens

every_entry = pytest.mark.parametrize("entry", REGISTRY, ids=names(REGISTRY))
every_float32 = pytest.mark.parametrize("entry", FLOAT32, ids=names(FLOAT32))


def scans_of(entry: Entry, ids: torch.Tensor) -> list[dict]:
    with reference.recorded_scans(dense(entry.name)) as calls, torch.no_grad():
        dense(entry.name)(input_ids=ids)
    return calls


# The registry.


@every_entry
def test_building_twice_gives_equal_weights_that_are_not_shared(entry: Entry) -> None:
    one, two = entry.build(), entry.build()
    assert not one.training
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.data_ptr() != q.data_ptr(), name
        assert p.dtype is entry.dtype


@every_float32
def test_scores_tell_tokens_apart(entry: Entry) -> None:
    """The random models are worth testing on: kept sets differ between criteria, and from the last k."""
    blocks = n_blocks(dense(entry.name))
    kept = {}
    for criterion in reference.CRITERIA:
        row = reference.run_row(dense(entry.name), tokens(3, 60), reference.linear(blocks), criterion=criterion)
        kept[criterion] = tuple(row.kept[-1])
    # `simba-abs` may agree with `simba`: some channel is nearly always positive and large
    assert len({kept[c] for c in ("simba", "no-decay", "delta-norm", "clip", "recent")}) == 5


# The dense model is the reference that keeps everything.


@every_entry
@pytest.mark.parametrize("length", [1, 2, 3, 5, 33])
def test_keeping_everything_gives_the_dense_models_bits(entry: Entry, length: int) -> None:
    model, ids = dense(entry.name), tokens(length, length)
    with torch.no_grad():
        expected = model(input_ids=ids[None], use_cache=True)
        row = reference.run_row(model, ids, keep_all(n_blocks(model)), use_cache=True)
    assert torch.equal(row.logits, expected.logits[0])
    assert row.margin == math.inf
    assert row.kept == [list(range(length))] * n_blocks(model)
    for own, theirs in zip(row.cache.layers, getattr(expected, CACHE).layers, strict=True):
        assert torch.equal(own.conv_states[0], theirs.conv_states[0])
        assert torch.equal(own.recurrent_states[0], theirs.recurrent_states[0])


@every_float32
def test_decoding_after_keeping_everything_is_the_dense_models_generation(entry: Entry) -> None:
    model, ids = dense(entry.name), tokens(11, 17)
    expected = model.generate(ids[None], max_new_tokens=12, do_sample=False)[0, 17:]
    with torch.no_grad():
        assert reference.generate(model, ids, keep_all(n_blocks(model)), 12).tokens == expected.tolist()


@every_entry
def test_a_cut_is_indexing_between_the_models_own_blocks(entry: Entry) -> None:
    """One cut after the first block, done here by hand from the positions that the reference reports."""
    model, ids = dense(entry.name), tokens(5, 30)
    blocks = n_blocks(model)
    with torch.no_grad():
        row = reference.run_row(model, ids, [1] + [Fraction(1, 2)] * (blocks - 1), tail=3)
        kept = row.kept[1]
        hidden = model.backbone.layers[0](model.backbone.embeddings(ids[None]))
        early = model.lm_head(model.backbone.norm_f(hidden).to(model.dtype)).float()[0]
        hidden = hidden[:, kept]
        for block in model.backbone.layers[1:]:
            hidden = block(hidden)
        late = model.lm_head(model.backbone.norm_f(hidden).to(model.dtype)).float()[0]
    assert len(kept) == 3 + 14
    assert kept[-3:] == [27, 28, 29]
    gone = sorted(set(range(30)) - set(kept))
    # a matmul over another number of rows may round differently
    tolerance = 1e-6 if entry.dtype is torch.float32 else 1e-2
    reference.assert_close("survivors", row.logits[kept], late, tolerance)
    reference.assert_close("early exits", row.logits[gone], early[gone], tolerance)


def test_the_scan_function_is_back_in_its_place_even_after_an_error() -> None:
    entry = REGISTRY[0]
    before = dict(vars(entry.modeling))
    with pytest.raises(RuntimeError, match="inside"), reference.recorded_scans(dense(entry.name)):
        raise RuntimeError("inside")
    assert dict(vars(entry.modeling)) == before


# Contributions.


@every_float32
@pytest.mark.parametrize("length", [1, 2, 9, 40])
def test_contributions_sum_to_the_models_own_scan_output(entry: Entry, length: int) -> None:
    """The sum rule of method §2, against the model's own scan function without skip and gate."""
    for call in scans_of(entry, tokens(length, 1, length)):
        scan = reference.operands(call)
        bare = {k: v for k, v in call.items() if k not in ("function", "original", "kwargs", "D", "z")}
        with torch.no_grad():
            y = call["original"](**bare)
        y = y[0] if isinstance(y, tuple) else y
        y = y[0].T if entry.kind == "selective" else y[0].reshape(length, -1)  # (L, D)
        recurrence = reference.outputs(scan)
        reference.assert_close("y", torch.from_numpy(recurrence), y, 1e-5)
        for q in {0, length // 2, length - 1}:
            values, sizes = reference.contributions(scan, q)
            np.testing.assert_allclose(values.sum(0), recurrence[q], rtol=1e-10, atol=1e-12)
            assert (np.abs(values) <= sizes * (1 + 1e-12)).all()


@every_float32
def test_a_contribution_is_the_derivative_of_the_output_along_one_tokens_input(entry: Entry) -> None:
    """The second check of method §2: no formula, only `torch.func.jvp` of a differentiable scan."""
    length, q = 12, 9
    call = scans_of(entry, tokens(2, 1, length))[1]
    scan = reference.operands(call)
    delta, a, b, c = (torch.from_numpy(np.ascontiguousarray(x)) for x in (scan.delta, scan.a, scan.b, scan.c))
    u = torch.from_numpy(np.ascontiguousarray(scan.u))

    def output(u: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(a)
        for t in range(q + 1):
            state = torch.exp(delta[t][:, None] * a) * state + (delta[t] * u[t])[:, None] * b[t]
        return (c[q] * state).sum(-1)

    values, _ = reference.contributions(scan, q)
    for t in range(q + 1):
        along = torch.zeros_like(u)
        along[t] = u[t]
        _, derivative = torch.func.jvp(output, (u,), (along,))
        np.testing.assert_allclose(values[t], derivative.numpy(), rtol=1e-9, atol=1e-14)


def small_scan() -> reference.Scan:
    """Two channels, one state, three tokens: small enough to do by hand."""
    return reference.Scan(
        u=np.array([[1.0, -1.0], [2.0, 0.5], [3.0, -3.0]]),
        delta=np.array([[0.5, 1.0], [0.25, 2.0], [1.0, 0.5]]),
        a=np.array([[-1.0], [-2.0]]),
        b=np.array([[[1.0]], [[2.0]], [[-1.0]]]),
        c=np.array([[[1.0]], [[1.0]], [[2.0]]]),
        steps=np.array([[0.5, 1.0], [0.25, 2.0], [1.0, 0.5]]),
    )


def test_criteria_by_hand() -> None:
    # with q = 2, R = Σ of the later Δ: token 0 has (1.25, 2.5), token 1 has (1, 0.5), token 2 has (0, 0)
    first = [0.5 * 1 * 2 * math.exp(-1.25), 1 * -1 * 2 * math.exp(-5.0)]
    second = [0.25 * 2 * 4 * math.exp(-1.0), 2 * 0.5 * 4 * math.exp(-1.0)]
    third = [1 * 3 * -2, 0.5 * -3 * -2]

    def scores(criterion: str) -> list[float]:
        return reference.score(small_scan(), 2, criterion)[0].tolist()

    assert scores("simba") == pytest.approx([max(first), max(second), max(third)])
    assert scores("simba-abs") == pytest.approx([max(map(abs, x)) for x in (first, second, third)])
    assert scores("no-decay") == pytest.approx([1.0, 4.0, 3.0])
    assert scores("delta-norm") == pytest.approx([math.hypot(0.5, 1), math.hypot(0.25, 2), math.hypot(1, 0.5)])
    y0 = [0.5 * 1, -1.0]
    y1 = [0.5 * math.exp(-0.25) + 0.25 * 2 * 2, -1 * math.exp(-4) + 2 * 0.5 * 2]
    y2 = [sum(x[0] for x in (first, second, third)), sum(x[1] for x in (first, second, third))]
    assert scores("clip") == pytest.approx([sum(max(0.0, v) for v in y) / 2 for y in (y0, y1, y2)])
    assert scores("recent") == [1, 2, 3]


def test_nothing_after_the_query_is_scored_or_used() -> None:
    scan = small_scan()
    values, _ = reference.contributions(scan, 1)
    later = reference.Scan(scan.u.copy(), scan.delta.copy(), scan.a, scan.b.copy(), scan.c.copy(), scan.steps)
    for x in (later.u, later.delta, later.b, later.c):
        x[2] = 99.0
    assert values.shape == (2, 2)
    np.testing.assert_array_equal(values, reference.contributions(later, 1)[0])


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(ValueError, match="random"):
        reference.score(small_scan(), 2, "random")


# Selection and counts.


def test_of_two_equal_scores_the_later_wins() -> None:
    assert reference.choose([1.0, 5.0, 1.0, 1.0, 0.0], 3) == [1, 2, 3]
    assert reference.choose([2.0] * 6, 4) == [2, 3, 4, 5]
    assert reference.choose([3.0, 1.0], 0) == []


@given(st.lists(st.integers(-5, 5), max_size=30), st.data())
def test_choosing_equals_dropping_the_worst_one_by_one(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    left = list(range(len(scores)))
    while len(left) > k:
        left.remove(min(left, key=lambda t: (scores[t], t)))  # of equals the earliest goes first
    assert reference.choose(scores, k) == left


def test_margin_is_relative_to_the_terms_and_zero_at_a_tie() -> None:
    scores, sizes = np.array([1.0, 2.0, 4.0]), np.array([1.0, 10.0, 4.0])
    assert reference.margin(scores, sizes, [2]) == pytest.approx(0.2)
    assert reference.margin(scores, sizes, [1, 2]) == pytest.approx(0.1)
    assert reference.margin(scores, sizes, [0, 1, 2]) == math.inf
    assert reference.margin(np.array([1.0, 1.0]), np.ones(2), [1]) == 0
    assert reference.margin(np.array([1e-40, 2e-40]), np.array([1e-40, 2e-40]), [1]) < reference.CLEAR_MARGIN


def test_discards_are_counted_and_limited() -> None:
    draws = reference.Draws()
    row = reference.Row(torch.zeros(0), torch.zeros(0), [], None, margin=1.0)
    assert all(draws.clear(row) for _ in range(20))
    row.margin = 1e-6
    assert not any(draws.clear(row) for _ in range(3))
    draws.check()
    draws.clear(row)
    with pytest.raises(AssertionError, match="4 of 24"):
        draws.check()


def test_counts_by_hand() -> None:
    five = reference.linear(5)
    assert five == (1, Fraction(31, 40), Fraction(11, 20), Fraction(13, 40), Fraction(1, 10))
    # L − tail = 100: 77.5, 55, 32.5, 10, each rounded up, and the tail
    assert reference.counts(101, five) == [101, 79, 56, 34, 11]
    assert reference.counts(11, five) == [11, 9, 7, 5, 5]  # 7.75, 5.5, 3.25, 1 (floor 4) of 10 earlier tokens
    assert reference.counts(5, five) == [5] * 5
    assert reference.counts(1, five) == [1] * 5
    assert reference.counts(20, five, tail=20) == [20] * 5
    assert reference.counts(103, five, tail=3) == [103, 81, 58, 36, 13]
    assert reference.counts(101, five, floor=1) == [101, 79, 56, 34, 11]
    assert reference.counts(8, five, floor=1) == [8, 7, 5, 4, 2]
    assert reference.linear(1) == (1,)


# Batches.


def test_rows_of_a_batch_are_run_alone_and_put_back() -> None:
    entry = FLOAT32[0]
    model, shares = dense(entry.name), reference.linear(4)
    rows = [tokens(1, 23), tokens(2, 9), tokens(3, 14)]
    ids, mask = padded(rows, [0, 14, 4], [0, 0, 5])
    with torch.no_grad():
        batch = reference.run(model, ids, shares, mask)
        alone = [reference.run_row(model, row, shares) for row in rows]
    assert mask.sum(1).tolist() == [23, 9, 14]
    for b, start in enumerate((0, 14, 4)):
        real = slice(start, start + len(rows[b]))
        assert torch.equal(batch.logits[b, real], alone[b].logits)
        assert batch.logits[b].isnan().any(-1).tolist() == [not m for m in mask[b]]
        for i in range(4):
            assert batch.kept[i][b] == [p + start for p in alone[b].kept[i]]


def test_the_relative_error_names_what_differs_and_never_passes_nan() -> None:
    assert reference.relative_rms(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert reference.relative_rms(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])) == 1
    with pytest.raises(AssertionError, match="logits"):
        reference.assert_close("logits", torch.tensor([float("nan")]), torch.tensor([1.0]), 1.0)
    with pytest.raises(AssertionError, match="shapes"):
        reference.assert_close("logits", torch.zeros(2), torch.zeros(1), 1.0)


# The strategies.


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), domain.shares(n))))
def test_shares_are_what_a_schedule_allows(drawn: tuple[int, tuple[Fraction, ...]]) -> None:
    n, shares = drawn
    assert len(shares) == n
    assert shares[0] == 1
    assert all(0 < later <= earlier for earlier, later in itertools.pairwise(shares))


@given(domain.lengths.flatmap(lambda n: st.tuples(st.just(n), domain.tails(n))))
def test_tails_fit_their_row(drawn: tuple[int, int]) -> None:
    length, tail = drawn
    assert 1 <= tail <= length <= 200


@settings(deadline=None)
@given(domain.padded_batches())
def test_padded_batches_hold_one_run_of_real_tokens_per_row(batch: domain.PaddedBatch) -> None:
    assert batch.ids.shape == batch.mask.shape
    assert batch.mask.sum(1).tolist() == list(batch.lengths)
    assert int(batch.ids.max()) < VOCABULARY
    for row in batch.mask:
        assert int(row.diff().abs().sum()) <= 2
        assert row.any()
