"""Rows of a batch as evaluation code gives them: padded at the end without a mask, answers, labels, packed texts."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any

import pytest
import torch
from models import FLOAT32, PER_KIND, Entry, dense, n_blocks, names, padded, schedules, sparse, tokens
from reference import TOLERANCE, assert_close
from torch import Tensor, nn
from transformers import (
    JambaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    ZambaForSequenceClassification,
)

import simba_fx

every_float32 = pytest.mark.parametrize("entry", FLOAT32, ids=names(FLOAT32))
every_kind = pytest.mark.parametrize("entry", PER_KIND, ids=names(PER_KIND))
EXACT = TOLERANCE[torch.float32]


def texts(*lengths: int, seed: int = 0) -> list[Tensor]:
    return [tokens(100 * seed + length, length) for length in lengths]


def padded_at_the_end(rows: list[Tensor], more: int = 0) -> Tensor:
    """`(B, L)`, padded with 0, the id of padding of the registry's models."""
    width = max(map(len, rows)) + more
    return torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])


def logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **more).logits
    return found


def kept_rows(model: nn.Module, row: int = 0) -> list[list[int]]:
    return [block[row][block[row] >= 0].tolist() for block in simba_fx.kept(model)]


def ambiguous(**more: Any) -> nn.Module:
    """A Mamba whose padding is its end of sequence, as in the checkpoints of state-spaces."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=53, hidden_size=16, num_hidden_layers=4, state_size=4, pad_token_id=0, eos_token_id=0
    )
    return simba_fx.transform(MambaForCausalLM(config).eval(), "linear", **more)


# --- padding without a mask ------------------------------------------------------------------------------------------


@every_float32
def test_trailing_padding_is_found_without_a_mask(entry: Entry) -> None:
    """Each row's logits and kept tokens are those of the row alone, as the dense model's are."""
    model, rows = sparse(entry.name, "linear"), texts(40, 23, 9, 31)
    together = logits(model, padded_at_the_end(rows, more=5))
    kept = [kept_rows(model, b) for b in range(len(rows))]
    for b, row in enumerate(rows):
        alone = logits(model, row[None])[0]
        assert_close(f"row {b}", together[b, : len(row)], alone, EXACT)
        assert kept[b] == kept_rows(model)


@every_kind
def test_rows_whose_padding_is_used_up_equal_the_rows_alone(entry: Entry) -> None:
    """Two counts may round to the same at one cut and differ again at the next, when a row has no pad left. The token
    that then stands in for one must stand behind the others: without a mask, the model computes with it."""
    model = sparse(entry.name, schedules(n_blocks(dense(entry.name)))["steep"])
    used_up = 0
    for longest in range(12, 30):
        rows = texts(longest, longest - 1, longest - 2)
        together = logits(model, padded_at_the_end(rows))
        blocks = torch.tensor([[int((row < 0).sum()) for row in block] for block in simba_fx.kept(model)])
        used_up += int(((blocks[:-1] == 0) & (blocks[1:] > 0)).sum())
        kept = [kept_rows(model, b) for b in range(3)]
        for b, row in enumerate(rows):
            alone = logits(model, row[None])[0]
            assert kept[b] == kept_rows(model)
            assert_close(f"row {b} of {len(row)}", together[b, : len(row)], alone, EXACT)
    assert used_up, "no row ran out of pads: nothing is shown"


@every_kind
def test_with_everything_kept_padding_changes_no_bit(entry: Entry) -> None:
    ids = padded_at_the_end(texts(24, 11))
    model = simba_fx.transform(dense(entry.name), [1.0] * dense(entry.name).config.num_hidden_layers, kernels="model")
    assert torch.equal(logits(model, ids, use_cache=False), logits(dense(entry.name), ids, use_cache=False))


def test_a_row_that_is_nothing_but_padding_is_text() -> None:
    model = sparse("mamba", "linear")
    ids = torch.zeros(2, 30, dtype=torch.int64)
    logits(model, ids)
    assert kept_rows(model, 1)[0] == list(range(30))


def test_a_mask_of_ones_says_that_nothing_is_padding() -> None:
    model = sparse("mamba", "linear")
    ids = padded_at_the_end(texts(30, 20))
    logits(model, ids, attention_mask=torch.ones_like(ids))
    assert kept_rows(model, 1)[-1][-1] == 29
    logits(model, ids)
    assert kept_rows(model, 1)[-1][-1] == 19


def test_lengths_may_be_stated() -> None:
    model, rows = ambiguous(), texts(30, 20)
    ids = padded_at_the_end(rows)
    with simba_fx.lengths(model, torch.tensor([30, 20])):
        together = logits(model, ids)
    assert_close("row 1", together[1, :20], logits(model, rows[1][None])[0], EXACT)
    stated = ambiguous(pad_token_id=0)
    assert torch.equal(logits(stated, ids), together)


def test_padding_that_may_be_text_is_told_once() -> None:
    model, ids = ambiguous(), padded_at_the_end(texts(30, 20))
    with pytest.warns(UserWarning, match="pass attention_mask, call it inside simba_fx.lengths.*pad_token_id=0"):
        logits(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, ids)
        logits(ambiguous(), padded_at_the_end(texts(30, 30)))  # nothing looks like padding


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([30], "one length for each of the 2 rows"), ([30, 31], "row 1 has 31 tokens"), ([0, 3], "row 0 has 0 tokens")],
)
def test_lengths_that_no_row_has_are_refused(lengths: list[int], message: str) -> None:
    model = ambiguous()
    with simba_fx.lengths(model, torch.tensor(lengths)), pytest.raises(simba_fx.errors.InputError, match=message):
        logits(model, padded_at_the_end(texts(30, 20)))


def test_tails_that_differ_and_positions_from_the_end_are_refused() -> None:
    """Such rows get padding at their ends, from which the positions would be counted."""
    model = simba_fx.transform(dense("mamba"), "linear", protect=(-3, 2))
    rows = [tokens(seed, 1, 11) for seed in range(3)]
    tails = torch.tensor([1, 2, 1])
    told = r"names position -3; expected positions from the start.*or call them one by one"
    with simba_fx.answer(model, tails), pytest.raises(simba_fx.errors.InputError, match=told):
        model(input_ids=torch.cat(rows))
    for row, tail in zip(rows, tails.tolist()):
        with simba_fx.answer(model, tail), torch.no_grad():
            model(input_ids=row)
        assert {8, 2} <= set(simba_fx.kept(model)[-1][0].tolist())
    from_the_start = simba_fx.transform(dense("mamba"), "linear", protect=(2,))
    with simba_fx.answer(from_the_start, tails), torch.no_grad():
        from_the_start(input_ids=torch.cat(rows))
    assert all(2 in row for row in simba_fx.kept(from_the_start)[-1].tolist())


@every_kind
@pytest.mark.parametrize("options", [{"protect": (1, -2)}, {"query": -1, "protect": (0,)}], ids=["protect", "query"])
def test_named_positions_count_a_rows_own_tokens_without_a_mask(entry: Entry, options: dict[str, Any]) -> None:
    """Positions are looked up among what is real: the nodes that say so stood in another order than with a mask."""
    model, rows = simba_fx.transform(dense(entry.name), "linear", floor=2, **options), texts(40, 23, 9)
    together = logits(model, padded_at_the_end(rows))
    kept = [kept_rows(model, b) for b in range(len(rows))]
    for b, row in enumerate(rows):
        assert_close(f"row {b}", together[b, : len(row)], logits(model, row[None])[0], EXACT)
        assert kept[b] == kept_rows(model)
        named = {p % len(row) for p in (*options["protect"], options.get("query", -1))}
        assert named <= set(kept[b][-1])


@pytest.mark.parametrize("stated", [False, True], ids=["found", "stated"])
def test_rows_without_a_mask_that_are_too_short_are_refused(stated: bool) -> None:
    """As with a mask: a tail, or a named position, that a row does not have."""
    model, ids = simba_fx.transform(dense("mamba"), "linear", protect=(5,)), padded_at_the_end(texts(30, 3))

    def own() -> Any:
        return simba_fx.lengths(model, torch.tensor([30, 3])) if stated else contextlib.nullcontext()

    with own(), pytest.raises(simba_fx.errors.InputError, match="names position 5, but row 1 has 3 real tokens"):
        logits(model, ids)
    model = sparse("mamba", "linear")
    with own(), simba_fx.tail(model, 4), pytest.raises(simba_fx.errors.InputError, match="last 4 tokens, but row 1 ha"):
        logits(model, ids)
    with own(), simba_fx.tail(model, 3):
        logits(model, ids)


def test_lengths_and_a_mask_are_refused_together() -> None:
    model, ids = ambiguous(), padded_at_the_end(texts(30, 20))
    with (
        simba_fx.lengths(model, torch.tensor([30, 20])),
        pytest.raises(simba_fx.errors.InputError, match=r"attention_mask inside simba_fx\.lengths"),
    ):
        logits(model, ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("name", ["lengths", "answer"])
def test_numbers_for_each_row_are_whole(name: str) -> None:
    context = getattr(simba_fx, name)
    for wrong in (torch.tensor([1.5, 2.0]), torch.tensor([[1, 2]]), torch.tensor([True, False])):
        with pytest.raises(simba_fx.errors.SimbaError, match=f"{name} expects"), context(ambiguous(), wrong):
            pass


CLASSIFIERS: list[tuple[str, type[Any]]] = [
    ("jamba", JambaForSequenceClassification),
    ("zamba", ZambaForSequenceClassification),
]


@pytest.mark.parametrize(("name", "cls"), CLASSIFIERS)
def test_a_classifier_without_a_mask(name: str, cls: type[Any]) -> None:
    """A class for each row, read at its last real token."""
    torch.manual_seed(1)
    model = cls(dense(name).config).eval()
    pruned, rows = simba_fx.transform(model, "linear"), texts(40, 17, 28)
    together = logits(pruned, padded_at_the_end(rows))
    for b, row in enumerate(rows):
        assert_close(f"row {b}", together[b], logits(pruned, row[None])[0], EXACT)


# --- answers ---------------------------------------------------------------------------------------------------------


@every_kind
def test_an_answer_does_not_choose_its_own_context(entry: Entry) -> None:
    """Twenty random answers: the kept prompt is the same, and holds the token that predicts the answer's first."""
    model, prompt, n = sparse(entry.name, "linear"), tokens(3, 30), 5
    found, predicted = [], []
    for seed in range(20):
        ids = torch.cat((prompt, tokens(1000 + seed, n)))[None]
        with simba_fx.answer(model, n):
            predicted.append(logits(model, ids)[0, 29])
        found.append([[p for p in block if p < 30] for block in kept_rows(model)])
        assert all(set(range(29, 35)) <= set(block) for block in kept_rows(model))
    assert all(kept == found[0] for kept in found)
    assert all(torch.equal(one, predicted[0]) for one in predicted)
    with simba_fx.tail(model, n + 1):
        logits(model, ids)
    assert kept_rows(model) == [block + list(range(30, 35)) for block in found[0]]


@every_kind
@pytest.mark.parametrize("side", ["none", "end", "start"])
def test_answers_of_different_lengths_in_a_batch(entry: Entry, side: str) -> None:
    """Each row is what it is alone with its own answer; left padding by a mask, trailing padding without one."""
    model, numbers = sparse(entry.name, "linear"), [3, 17, 9]
    rows = texts(33, 33, 33) if side == "none" else texts(33, 21, 27)
    rows[1] = rows[1].roll(1)
    mask = None
    ids, starts = padded_at_the_end(rows), [0, 0, 0]
    if side == "start":
        starts = [33 - len(row) for row in rows]
        ids, mask = padded(rows, starts, [0, 0, 0])
    with simba_fx.answer(model, torch.tensor(numbers)):
        together = logits(model, ids, attention_mask=mask)
    kept = [[[p - starts[b] for p in block] for block in kept_rows(model, b)] for b in range(3)]
    reached = simba_fx.reached(model)
    assert together.shape[:2] == reached.shape == ids.shape
    for b, (row, n) in enumerate(zip(rows, numbers)):
        with simba_fx.answer(model, n):
            alone = logits(model, row[None])[0]
        assert_close(f"row {b}", together[b, starts[b] : starts[b] + len(row)], alone, EXACT)
        assert kept[b] == kept_rows(model)
        assert torch.equal(reached[b, starts[b] : starts[b] + len(row)], simba_fx.reached(model)[0])


@pytest.mark.parametrize("criterion", ["random", "stride", "recent"])
def test_answers_of_different_lengths_and_criteria_that_look_at_positions(criterion: str) -> None:
    """A row that gets padding for a longer tail draws what it draws alone: distances are counted from the tail."""
    model, ids, numbers = sparse("mamba", "linear", criterion=criterion), tokens(1, 3, 33), [2, 11, 5]
    with simba_fx.answer(model, torch.tensor(numbers)):
        logits(model, ids)
    kept = [kept_rows(model, b) for b in range(3)]
    for row, n, own in zip(ids, numbers, kept):
        with simba_fx.answer(model, n):
            logits(model, row[None])
        assert own == kept_rows(model)


def test_answers_of_different_lengths_and_an_output_of_survivors() -> None:
    """Its slots are those of `kept`, also where nothing was dropped of rows that are as short as their tails."""
    short, full = sparse("mamba", "linear", output="kept"), sparse("mamba", "linear")
    for ids, numbers in ((tokens(1, 3, 2), [1, 1, 2]), (tokens(2, 2, 33), [3, 17]), (tokens(3, 2, 9), [1, 8])):
        with simba_fx.answer(short, torch.tensor(numbers)), simba_fx.answer(full, torch.tensor(numbers)):
            found, expected = logits(short, ids), logits(full, ids)
        last = simba_fx.kept(short)[-1]
        assert found.shape[:2] == last.shape
        for b, places in enumerate(last):
            assert places[places >= 0].tolist() == kept_rows(full, b)[-1]
            assert_close(f"row {b}", found[b, places >= 0], expected[b, places[places >= 0]], EXACT)


def test_a_row_may_be_nothing_but_answer() -> None:
    model, row = sparse("mamba", "linear"), tokens(5, 1, 20)
    with simba_fx.answer(model, 20):
        logits(model, row)
    assert kept_rows(model)[-1] == list(range(20))
    with simba_fx.answer(model, torch.tensor([20, 3])):
        logits(model, row.repeat(2, 1))
    assert [len(kept_rows(model, b)[-1]) < 20 for b in range(2)] == [False, True]


def test_a_tail_that_rows_replace_asks_nothing_of_them() -> None:
    """A tail around the call that is longer than the rows, which have tails of their own."""
    model, labelled_model = sparse("mamba", "linear"), simba_fx.transform(dense("mamba"), "linear", tail="labels")
    row = tokens(5, 1, 20)
    with simba_fx.tail(model, 30), simba_fx.answer(model, torch.tensor([3, 5])):
        logits(model, row.repeat(2, 1))
    assert [kept_rows(model, b)[-1][-6:] == list(range(14, 20)) for b in range(2)] == [False, True]
    with simba_fx.tail(labelled_model, 30):
        logits(labelled_model, row, labels=labelled(row[0], 15)[None])
    assert kept_rows(labelled_model)[-1][-6:] == list(range(14, 20))


def test_an_answer_longer_than_its_row_is_refused() -> None:
    model, ids = sparse("mamba", "linear"), padded_at_the_end(texts(20, 12))
    with (
        simba_fx.answer(model, torch.tensor([3, 13])),
        pytest.raises(simba_fx.errors.InputError, match="row 1 ends with"),
    ):
        logits(model, ids)
    with simba_fx.answer(model, 21), pytest.raises(simba_fx.errors.InputError, match="but the prompt has 20"):
        logits(model, ids)
    with (
        simba_fx.answer(model, torch.tensor([3])),
        pytest.raises(simba_fx.errors.InputError, match="each of the 2 rows"),
    ):
        logits(model, ids)


def test_answers_that_differ_fill_no_cache() -> None:
    model, ids = sparse("bamba", "linear"), padded_at_the_end(texts(20, 20))
    with torch.no_grad(), simba_fx.answer(model, torch.tensor([3, 8])):
        assert model(ids).past_key_values is None
        with pytest.raises(simba_fx.errors.InputError, match="use_cache=True and rows whose tails differ"):
            model(ids, use_cache=True)


def test_models_without_rows_of_their_own_refuse_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dense("mamba").backbone

        def forward(self, ids: Tensor) -> Tensor:
            hidden: Tensor = self.inner(ids, use_cache=False, return_dict=False)[0]
            return hidden

    model = simba_fx.transform(Net(), "linear")
    with simba_fx.answer(model, torch.tensor([3, 8])), pytest.raises(simba_fx.errors.InputError, match="for each row"):
        model(tokens(0, 2, 20))
    with simba_fx.answer(model, 3):
        model(tokens(0, 2, 20))
    assert kept_rows(model)[-1][-4:] == [16, 17, 18, 19]


# --- tails from labels -----------------------------------------------------------------------------------------------


def labelled(row: Tensor, first: int) -> Tensor:
    return torch.where(torch.arange(len(row)) >= first, row, -100)


@every_kind
def test_each_rows_tail_follows_from_its_labels(entry: Entry) -> None:
    model = simba_fx.transform(dense(entry.name), "linear", tail="labels", criterion="simba")
    rows, firsts = texts(33, 21, 27), [20, 12, 26]
    ids = padded_at_the_end(rows)
    labels = torch.full_like(ids, -100)
    for b, (row, first) in enumerate(zip(rows, firsts)):
        labels[b, : len(row)] = labelled(row, first)
    with torch.no_grad():
        together = model(ids, labels=labels, use_cache=False)
    total, count = 0.0, 0
    for row, first in zip(rows, firsts):
        stated = sparse(entry.name, "linear")
        with torch.no_grad(), simba_fx.answer(stated, len(row) - first):
            alone = stated(row[None], labels=labelled(row, first)[None], use_cache=False)
        total, count = total + float(alone.loss) * (len(row) - first), count + len(row) - first
    assert float(together.loss) == pytest.approx(total / count, rel=1e-5)
    logits(model, ids)  # without labels the last token is the query, as ever
    kept = [kept_rows(model, b) for b in range(3)]
    logits(stated, ids)
    assert kept == [kept_rows(stated, b) for b in range(3)]


def test_labels_that_nothing_reads_have_no_tail() -> None:
    model = simba_fx.transform(dense("mamba"), "linear", tail="labels")
    ids = tokens(4, 1, 30)
    for labels in (
        torch.full_like(ids, -100),
        labelled(ids[0], 30)[None],
        torch.cat((ids[:, :1], ids[:, 1:] * 0 - 100), 1),
    ):
        with torch.no_grad():
            model(ids, labels=labels)
        kept = kept_rows(model)
        logits(model, ids)
        assert kept == kept_rows(model)
    with torch.no_grad():
        model(ids, labels=ids)
    assert kept_rows(model)[-1] == list(range(30))  # every token but the first is an answer


def test_labels_of_another_kind_are_refused() -> None:
    model = simba_fx.transform(JambaForSequenceClassification(dense("jamba").config).eval(), "linear", tail="labels")
    with pytest.raises(simba_fx.errors.InputError, match="expected labels \\(B, L\\)"):
        model(tokens(0, 2, 20), labels=torch.tensor([0, 1]))
    with pytest.raises(simba_fx.errors.SimbaError, match="for models that are called with labels"):
        simba_fx.transform(dense("mamba").backbone, "linear", tail="labels")


def test_a_tail_around_the_call_counts_without_labels_only() -> None:
    """`answer` inside a call's labels would be two answers to one question: the labels are the call's own."""
    model = simba_fx.transform(dense("mamba"), "linear", tail="labels")
    ids = tokens(4, 1, 30)
    with torch.no_grad(), simba_fx.answer(model, 2):
        model(ids, labels=labelled(ids[0], 20)[None])
    assert kept_rows(model)[-1][-11:] == list(range(19, 30))


def test_the_tail_of_labels_and_labels_of_survivors() -> None:
    """Both options: of a masked prompt every label is read, since the whole answer is kept."""
    both = simba_fx.transform(dense("mamba"), "linear", tail="labels", labels="kept")
    plain = simba_fx.transform(dense("mamba"), "linear", tail="labels")
    ids = torch.cat((tokens(4, 1, 30), tokens(5, 1, 30)))
    labels = torch.stack([labelled(ids[0], 22), labelled(ids[1], 12)])
    with torch.no_grad():
        assert float(both(ids, labels=labels).loss) == float(plain(ids, labels=labels).loss)


# --- what is no row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2-one-group", "falcon-mamba", "bamba"])
def test_packed_rows_are_refused(name: str) -> None:
    model = sparse(name, "linear")
    ids = torch.cat(texts(30, 31, 29))[None]
    places = torch.cat([torch.arange(n) for n in (30, 31, 29)])[None]
    with pytest.raises(simba_fx.errors.InputError, match="do not rise by one"):
        model(ids, position_ids=places)
    with pytest.raises(simba_fx.errors.InputError, match="do not rise by one"):
        model(ids, position_ids=places, attention_mask=torch.ones_like(ids))
    with pytest.raises(simba_fx.errors.InputError, match="seq_idx, which says that rows pack several sequences"):
        model(ids, seq_idx=torch.zeros_like(ids, dtype=torch.int32))
    logits(model, ids, position_ids=torch.arange(90)[None])


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_generation_without_a_cache_is_refused(name: str) -> None:
    model, ids = sparse(name, "linear"), tokens(0, 1, 20)
    with pytest.raises(simba_fx.errors.InputError, match="use_cache=False; expected a cache"):
        model.generate(ids, max_new_tokens=3, use_cache=False)
    model.generation_config.use_cache, before = False, model.generation_config.use_cache
    try:
        with pytest.raises(simba_fx.errors.InputError, match="use_cache=False"):
            model.generate(ids, max_new_tokens=3)
    finally:
        model.generation_config.use_cache = before


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_between_the_tokens_of_a_row_is_refused(dtype: torch.dtype) -> None:
    model, ids = sparse("mamba", "linear"), tokens(0, 2, 20)
    mask = torch.ones_like(ids)
    mask[1, 7:9] = 0
    with pytest.raises(simba_fx.errors.InputError, match="Row 1 of attention_mask has padding between its tokens"):
        model(ids, attention_mask=mask.to(dtype))


# --- keywords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bamba", "jamba"])
def test_a_number_that_nobody_reads_captures_no_graph(name: str) -> None:
    """Trainers pass another `num_items_in_batch` at each call; a hybrid hands it to its block stack."""
    model, ids = simba_fx.transform(dense(name), "linear"), tokens(1, 1, 30)
    variants = model.__dict__["_simba"].variants
    right = logits(model, ids)
    before = [len(graphs) for graphs in variants.values()]
    for items in (57, 58, 59.5):
        assert torch.equal(logits(model, ids, num_items_in_batch=items), right)
    assert [len(graphs) for graphs in variants.values()] == before


def test_a_number_that_is_read_is_part_of_the_graph() -> None:
    class Scaled(type(dense("bamba").model)):  # type: ignore[misc]  # a class of transformers
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            scale = kwargs.pop("scale", 1)
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state * scale
            return output

    Scaled.forward.__signature__ = inspect.signature(type(dense("bamba").model).forward)
    plain = Scaled(dense("bamba").config).eval()
    model, ids = simba_fx.transform(plain, [1.0] * plain.config.num_hidden_layers), tokens(1, 1, 30)
    for scale in (1, 2, 3.5):
        with torch.no_grad():
            got, right = (one(ids, scale=scale, use_cache=False).last_hidden_state for one in (model, plain))
        assert_close(f"scaled by {scale}", got, right, EXACT)
