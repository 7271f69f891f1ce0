"""A row's result in a batch equals its result alone (method §6): any padding side, any neighbours, any mask dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import reference
import strategies as domain
import torch
from graph_cases import WIDTH, Mixer
from hypothesis import assume, given
from hypothesis import strategies as st
from models import CACHE, FLOAT32, PER_KIND, Entry, dense, n_blocks, names, padded, schedules, sparse, tokens
from reference import TOLERANCE, assert_close
from torch import Tensor, nn

import simba_fx

every_float32 = pytest.mark.parametrize("entry", FLOAT32, ids=names(FLOAT32))
every_kind = pytest.mark.parametrize("entry", PER_KIND, ids=names(PER_KIND))

DRAWS = reference.Draws()


@pytest.fixture(scope="module", autouse=True)
def few_draws_are_discarded() -> Iterator[None]:
    yield
    DRAWS.check()


def call(model: nn.Module, ids: Tensor, mask: Tensor | None = None, tail: int = 1, **options: Any) -> Any:
    with torch.no_grad(), simba_fx.tail(model, tail):
        return model(input_ids=ids, attention_mask=mask, **options)


def kept_rows(model: nn.Module, b: int) -> list[list[int]]:
    """Per block, the real positions that row `b` kept in the last call."""
    return [block[b][block[b] >= 0].tolist() for block in simba_fx.kept(model)]


def check(entry: Entry, shares: Any, ids: Tensor, mask: Tensor, tail: int, *, kernels: str = "auto") -> bool:
    """One padded call against the reference, which runs every row alone; False if a near tie left it unchecked."""
    with torch.no_grad():
        expected = reference.run(dense(entry.name), ids, shares, mask, tail=tail)
    if not DRAWS.clear(expected):
        return False
    pruned = sparse(entry.name, shares, kernels=kernels)
    logits = call(pruned, ids, mask, tail).logits
    assert logits.shape == expected.logits.shape
    widths = [block.shape[1] for block in simba_fx.kept(pruned)]
    assert widths == reference.counts(ids.shape[1], shares, tail), "counts of the rectangle depend on shapes alone"
    lengths = mask.bool().sum(1).tolist()
    for b, (length, real) in enumerate(zip(lengths, mask.bool())):
        rows = kept_rows(pruned, b)
        assert [len(row) for row in rows] == reference.counts(length, shares, tail), f"row {b} of {length}"
        assert rows == [block[b] for block in expected.kept], f"row {b}"
        # every real position: survivors, and the exit states of tokens that left at each cut
        assert_close(f"row {b} of {length}", logits[b, real], expected.logits[b, real], TOLERANCE[entry.dtype])
    return True


@every_float32
@domain.examples(12)
@given(data=st.data())
def test_a_row_in_a_batch_equals_the_row_alone(entry: Entry, data: st.DataObject) -> None:
    choice = schedules(n_blocks(dense(entry.name)))
    shares = choice[data.draw(st.sampled_from(["linear", "stairs"]))]
    batch = data.draw(domain.padded_batches())
    tail = data.draw(st.one_of(st.just(1), st.integers(1, min(batch.lengths))))
    assume(check(entry, shares, batch.ids, batch.mask.to(data.draw(domain.mask_dtypes)), tail))


@every_kind
@domain.examples(6)
@given(data=st.data())
def test_the_same_with_the_models_own_kernels(entry: Entry, data: st.DataObject) -> None:
    shares = schedules(n_blocks(dense(entry.name)))["stairs"]
    batch = data.draw(domain.padded_batches(max_length=30))
    assume(check(entry, shares, batch.ids, batch.mask, 1, kernels="model"))


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_lengths_that_differ_by_one_round_apart(entry: Entry, side: str) -> None:
    """Two counts may round to the same at one block and differ again at a later one, when no pad is left."""
    shares = schedules(n_blocks(dense(entry.name)))["steep"]

    def apart_again(longest: int) -> bool:
        gaps = [a - b for a, b in zip(*(reference.counts(n, shares) for n in (longest, longest - 1)))]
        return any(later > earlier for earlier, later in itertools.pairwise(gaps))

    cases = [longest for longest in range(12, 60) if apart_again(longest)][:6]
    assert len(cases) == 6
    checked = 0
    for longest in cases:
        rows = [tokens(100 + longest, longest), tokens(longest, longest - 1), tokens(200 + longest, longest - 2)]
        pads, none = [0, 1, 2], [0, 0, 0]
        ids, mask = padded(rows, *((pads, none) if side == "left" else (none, pads)))
        checked += check(entry, shares, ids, mask, 1)
    assert checked >= 4


@every_float32
def test_neighbours_and_what_pads_hold_do_not_matter(entry: Entry) -> None:
    shares = schedules(n_blocks(dense(entry.name)))["linear"]
    pruned = sparse(entry.name, shares)
    row = tokens(77, 31)
    results, kept = [], []
    for neighbour, fill in ((1, 0), (2, 7), (3, 50)):
        ids, mask = padded([tokens(neighbour, 40), row, tokens(neighbour + 10, 22)], [0, 5, 9], [0, 4, 9], fill=fill)
        real = mask[1].bool()
        results.append(call(pruned, ids, mask).logits[1, real])
        kept.append(kept_rows(pruned, 1))
    assert kept[0] == kept[1] == kept[2]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_float32
def test_mask_dtypes_give_the_same_bits(entry: Entry) -> None:
    pruned = sparse(entry.name, schedules(n_blocks(dense(entry.name)))["linear"])
    ids, mask = padded([tokens(1, 30), tokens(2, 18), tokens(3, 25)], [0, 12, 2], [0, 0, 3])
    results, kept = [], []
    for dtype in domain.MASK_DTYPES:
        results.append(call(pruned, ids, mask.to(dtype)).logits)
        kept.append(simba_fx.kept(pruned))
    for other, positions in zip(results[1:], kept[1:]):
        assert torch.equal(results[0][mask.bool()], other[mask.bool()])
        assert all(torch.equal(a, b) for a, b in zip(kept[0], positions))


@every_float32
def test_a_mask_of_ones_is_no_mask(entry: Entry) -> None:
    pruned = sparse(entry.name, schedules(n_blocks(dense(entry.name)))["linear"])
    ids = tokens(6, 2, 45)
    plain, kept = call(pruned, ids).logits, simba_fx.kept(pruned)
    masked = call(pruned, ids, torch.ones_like(ids)).logits
    assert all(torch.equal(a, b) for a, b in zip(kept, simba_fx.kept(pruned)))
    assert_close("logits", masked, plain, TOLERANCE[entry.dtype])


@every_float32
def test_first_entry_of_kept_is_every_real_token(entry: Entry) -> None:
    pruned = sparse(entry.name, schedules(n_blocks(dense(entry.name)))["linear"])
    ids, mask = padded([tokens(1, 12), tokens(2, 9), tokens(3, 7)], [0, 3, 2], [0, 0, 3])
    call(pruned, ids, mask)
    assert kept_rows(pruned, 0)[0] == list(range(12))
    assert kept_rows(pruned, 1)[0] == list(range(3, 12))
    assert kept_rows(pruned, 2)[0] == list(range(2, 9))


@every_kind
@pytest.mark.parametrize(("left", "right"), [([0, 5, 11], [0, 0, 0]), ([0, 0, 0], [0, 5, 11]), ([0, 3, 4], [0, 2, 7])])
def test_kept_says_which_token_each_slot_of_a_kept_output_is(entry: Entry, left: list[int], right: list[int]) -> None:
    """It sorted the places of pads to the front, also where they are padded at the end."""
    shares = schedules(n_blocks(dense(entry.name)))["stairs"]
    ids, mask = padded([tokens(1, 30), tokens(2, 25), tokens(3, 19)], left, right)
    whole = call(sparse(entry.name, shares), ids, mask).logits
    pruned = sparse(entry.name, shares, output="kept")
    found = call(pruned, ids, mask).logits
    last = simba_fx.kept(pruned)[-1]
    assert found.shape[:2] == last.shape
    assert (last < 0).any(), "rows of one length would prove nothing"
    for b, row in enumerate(last):
        survivors = row[row >= 0]
        assert survivors.tolist() == sorted(survivors.tolist())
        assert_close(f"row {b}", found[b, row >= 0], whole[b, survivors], TOLERANCE[entry.dtype])


@pytest.mark.parametrize(
    ("criterion", "span"),
    [("random", 1), ("stride", 1), ("no-decay", 1), ("clip", 1), ("simba-l2", 1), ("simba-l2", 7), ("simba+write", 5)],
)
@every_kind
def test_other_criteria_keep_in_a_batch_what_they_keep_alone(entry: Entry, criterion: str, span: int) -> None:
    pruned = sparse(entry.name, schedules(n_blocks(dense(entry.name)))["linear"], criterion=criterion, span=span)
    rows, left = [tokens(31, 40), tokens(32, 29), tokens(33, 33)], [0, 11, 3]
    ids, mask = padded(rows, left, [0, 0, 4])
    batch = call(pruned, ids, mask).logits
    in_batch = [kept_rows(pruned, b) for b in range(len(rows))]
    for b, (row, start) in enumerate(zip(rows, left)):
        alone = call(pruned, row[None]).logits[0]
        assert [[p - start for p in block] for block in in_batch[b]] == kept_rows(pruned, 0), f"row {b}"
        assert_close(f"row {b}", batch[b, mask[b].bool()], alone, TOLERANCE[torch.float32])


@every_float32
def test_states_of_left_padded_rows_equal_the_rows_alone(entry: Entry) -> None:
    shares = schedules(n_blocks(dense(entry.name)))["linear"]

    def rows(seed: int) -> tuple[Tensor, Tensor]:
        return padded([tokens(seed, 36), tokens(seed + 10, 20), tokens(seed + 20, 35)], [0, 16, 1], [0, 0, 0])

    with torch.no_grad():
        ids, mask, expected = DRAWS.first(dense(entry.name), shares, rows, use_cache=True)
    cache = getattr(call(sparse(entry.name, shares), ids, mask, use_cache=True), CACHE)
    tolerance = TOLERANCE[entry.dtype]
    for b, row in enumerate(expected.rows):
        for i, (own, theirs) in enumerate(zip(cache.layers, row.cache.layers, strict=True)):
            assert_close(f"row {b}, conv state {i}", own.conv_states[0][b], theirs.conv_states[0][0], tolerance)
            assert_close(f"row {b}, state {i}", own.recurrent_states[0][b], theirs.recurrent_states[0][0], tolerance)


# Refused.


@every_kind
def test_a_row_of_pads_alone_is_refused(entry: Entry) -> None:
    pruned = sparse(entry.name, schedules(n_blocks(dense(entry.name)))["linear"])
    ids, mask = tokens(1, 3, 20), torch.ones(3, 20, dtype=torch.int64)
    mask[1] = 0
    with pytest.raises(simba_fx.errors.InputError, match=r"^Row 1 of attention_mask is all padding"):
        call(pruned, ids, mask)
    assert call(pruned, ids, mask | 1).logits.shape[:2] == (3, 20), "usable after the refusal"


@every_kind
def test_a_tail_longer_than_a_row_is_refused(entry: Entry) -> None:
    pruned = sparse(entry.name, schedules(n_blocks(dense(entry.name)))["linear"])
    with pytest.raises(simba_fx.errors.InputError, match="tail"):
        call(pruned, tokens(1, 2, 20), tail=21)
    ids, mask = padded([tokens(1, 20), tokens(2, 8)], [0, 12], [0, 0])
    with pytest.raises(simba_fx.errors.InputError, match="tail"):
        call(pruned, ids, mask, tail=9)
    assert call(pruned, ids, mask, tail=8).logits.shape[:2] == (2, 20)


class MaskedNet(nn.Module):
    """Blocks that read their mask as it comes: truth values are negated, numbers compared."""

    def __init__(self, truth: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MaskedBlock(truth) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class MaskedBlock(nn.Module):
    def __init__(self, truth: bool) -> None:
        super().__init__()
        self.truth, self.mixer = truth, Mixer()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        pads = (~mask if self.truth else mask == 0)[..., None]
        x = (x - x * pads).masked_fill(pads, 0.0)
        return x + self.mixer(x)


def test_a_mask_of_truth_values_stays_one_behind_a_cut() -> None:
    """Case 2: it became integers there, and `~mask` then -2."""
    torch.manual_seed(3)
    numbers, truth = MaskedNet(False), MaskedNet(True)
    truth.load_state_dict(numbers.state_dict())
    x, mask = torch.randn(3, 40, WIDTH), torch.arange(40) < torch.tensor([[40], [33], [21]])
    outputs = []
    for net, given_mask in ((numbers, mask.long()), (truth, mask)):
        pruned = simba_fx.transform(
            net, [1, 0.5, 0.3], mask="mask", example_inputs=(x[:, :24], given_mask[:, :24]), criterion="simba"
        )
        with torch.no_grad():
            outputs.append(pruned(x, given_mask)[mask])
            row = pruned(x[2:, :21], given_mask[2:, :21])[0]
        assert_close("row alone", outputs[-1][-21:], row, TOLERANCE[torch.float32])
    assert torch.equal(*outputs)
