"""Prompts that continue: several new tokens on a warm cache.

The reference runs each of the model's own blocks on everything that it has seen, from the beginning, and lets the new
tokens compete among themselves (`reference.run_row(past=...)`). At keep 1.0 a text in pieces is the text.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import (
    BY_NAME,
    CHECKPOINT,
    FAMILIES,
    MINIMAX,
    PER_KIND,
    RELATIVES,
    SPREAD,
    Entry,
    dense,
    keep_all,
    linear,
    n_blocks,
    names,
    padded,
    schedules,
    sparse,
    tokens,
)
from reference import cache_name, held, run_row
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, MambaForCausalLM

import simba_fx
from simba_fx.errors import CacheError, InputError
from simba_fx.frontends.transformers.calls import takes_positions
from simba_fx.ops import continued

CONTINUING = (*FAMILIES, *(entry for entry in RELATIVES if entry is not MINIMAX))
every_family = pytest.mark.parametrize("entry", CONTINUING, ids=names(CONTINUING))
every_build = pytest.mark.parametrize("entry", SPREAD, ids=names(SPREAD))


def call(model: Any, ids: Tensor, cache: Any = None, **more: Any) -> Any:
    """Logits, and the cache."""
    name = cache_name(getattr(model, "_orig_mod", model))
    cache = DynamicCache(config=model.config) if cache is None else cache
    output = model(ids, use_cache=True, **{name: cache}, **more)
    return output.logits, output[name]


def pieces(model: Any, ids: Tensor, *ends: int, **more: Any) -> tuple[Tensor, Any]:
    """Logits of a text that is passed piece by piece, and the cache."""
    found, cache = [], None
    for begin, end in itertools.pairwise((0, *ends, ids.shape[1])):
        logits, cache = call(model, ids[:, begin:end], cache, **more)
        found.append(logits)
    return torch.cat(found, 1), cache


def assert_same_caches(one: Any, other: Any, rows: slice = slice(None), atol: float = 1e-4) -> None:
    assert len(held(one)) == len(held(other)) > 0
    for mine, theirs in zip(held(one), held(other)):
        torch.testing.assert_close(mine[rows], theirs, atol=atol, rtol=1e-4)


# --- operators ----------------------------------------------------------------------------------------------------


def selective(rows: int, length: int, groups: int | None) -> tuple[Any, ...]:
    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes)

    between = () if groups is None else (groups,)
    return (draw(rows, 6, length), draw(rows, 6, length), -torch.rand(6, 3) * 4, draw(rows, *between, 3, length),
            draw(rows, *between, 3, length), draw(6), draw(rows, 6, length), draw(6), True)  # fmt: skip


def ssd(rows: int, length: int, groups: int | None) -> tuple[Any, ...]:
    draw, g = torch.randn, groups or 1
    return (draw(rows, length, 4, 5), draw(rows, length, 4), -torch.rand(4) * 4, draw(rows, length, g, 3),
            draw(rows, length, g, 3), draw(4, 5), draw(rows, length, 4, 5), draw(4), True, 1e-3, 4.0, 8)  # fmt: skip


def delta(rows: int, length: int, groups: int | None) -> tuple[Any, ...]:
    draw, g = torch.randn, groups or 4
    keys = torch.nn.functional.normalize(draw(rows, length, g, 3), dim=3)
    decay = -torch.rand(rows, length, 4) if groups else -torch.rand(rows, length, 4, 3)
    return draw(rows, length, 4, 5), draw(rows, length, g, 3), keys, decay, torch.rand(rows, length, 4), 8


KINDS = {"selective_scan": (selective, 2), "ssd_scan": (ssd, 1), "delta_scan": (delta, 1)}


def split(arguments: tuple[Any, ...], dim: int, length: int, at: int) -> list[list[Any]]:
    """The arguments for the tokens before and from a place on."""
    lead = arguments[0]
    both = []
    for part in (slice(0, at), slice(at, length)):
        taken = []
        for value in arguments:
            by_token = isinstance(value, Tensor) and value.dim() > 2 and value.shape[0] == lead.shape[0]
            axis = (value.dim() - 1 if dim == 2 else 1) if by_token else None
            taken.append(value if axis is None else value[(slice(None),) * axis + (part,)])
        both.append(taken)
    return both


@pytest.mark.parametrize("at", [1, 5, 17])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_in_two_parts_is_the_scan(kind: str, groups: int | None, at: int) -> None:
    """Values, last states and gradients, those that go through the state among them."""
    torch.manual_seed(at)
    (make, dim), length = KINDS[kind], 18
    arguments = tuple(
        value.requires_grad_() if isinstance(value, Tensor) else value for value in make(2, length, groups)
    )
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    scan = getattr(torch.ops.simba_fx, kind)
    whole, last = scan(*arguments)
    one, two = split(arguments, dim, length, at)
    first, state = scan(*one)
    second, end = getattr(continued, kind)(state, *two)
    torch.testing.assert_close(torch.cat((first, second), dim), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(end, last, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(whole), torch.randn_like(last)
    expected = torch.autograd.grad([whole, last], tensors, weights)
    parts = torch.cat((first, second), dim), end
    for mine, theirs in zip(torch.autograd.grad(parts, tensors, weights), expected):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_in_low_precision_keeps_its_state_whole(kind: str) -> None:
    """The state is float32 and is not rounded to the dtype of the tokens."""
    torch.manual_seed(0)
    make, dim = KINDS[kind]
    one, two = split(make(2, 18, 2), dim, 18, 9)
    _, state = getattr(torch.ops.simba_fx, kind)(*one)
    low = [v.bfloat16() if isinstance(v, Tensor) and v.dim() > 2 else v for v in two]
    high = [v.float() if isinstance(v, Tensor) and v.dim() > 2 else v for v in low]
    (y, last), (expected, end) = (getattr(continued, kind)(state, *given) for given in (low, high))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(last, end, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(y.float(), expected, atol=2e-2, rtol=2e-2)


# --- everything kept ------------------------------------------------------------------------------------------------


@pytest.mark.capability("continue")
@every_family
def test_a_text_in_pieces_is_the_text(entry: Entry) -> None:
    model, ids = sparse(entry.name, keep_all(n_blocks(dense(entry.name)))), tokens(1, 2, 61)
    with torch.no_grad():
        whole, cache = call(model, ids)
        found, other = pieces(model, ids, 23, 40, 42)
        torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-4)
        assert_same_caches(other, cache)
        steps = [call(model, ids[:, :1], one)[0] for one in (cache, other)]
    torch.testing.assert_close(*steps, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("entry", PER_KIND, ids=names(PER_KIND))
def test_the_models_own_functions_may_begin(entry: Entry) -> None:
    """With kernels="model" a prompt runs those; what goes on from it is ours, and says so."""
    blocks = n_blocks(dense(entry.name))
    model, ids = sparse(entry.name, keep_all(blocks), kernels="model"), tokens(1, 2, 61)
    with torch.no_grad():
        found, _ = pieces(model, ids, 30)
        torch.testing.assert_close(found, dense(entry.name)(ids).logits, atol=2e-4, rtol=1e-4)
    assert "continue-states" in simba_fx.explain(model)


@pytest.mark.parametrize("name", ["falcon-mamba", "bamba", "qwen3-next"])
def test_a_cache_that_the_dense_model_filled_goes_on_pruned(name: str) -> None:
    model, pruned, ids = dense(name), sparse(name, linear(BY_NAME[name])), tokens(1, 2, 50)
    with torch.no_grad():
        _, cache = call(model, ids[:, :30])
        _, other = call(sparse(name, keep_all(n_blocks(model))), ids[:, :30])
        one, two = (call(pruned, ids[:, 30:], held)[0] for held in (cache, other))
    torch.testing.assert_close(one, two, atol=3e-4, rtol=1e-4)
    assert simba_fx.kept(pruned)[0].shape[1] == 20


# --- pruned ---------------------------------------------------------------------------------------------------------


@pytest.mark.capability("continue")
@every_family
def test_a_continuation_is_that_of_the_models_own_blocks(entry: Entry) -> None:
    model, pruned, shares = dense(entry.name), sparse(entry.name, linear(entry)), linear(entry)
    for seed, length, end in ((3, 47, 29), (4, 40, 33)):
        ids = tokens(seed, length)
        with torch.no_grad():
            _, cache = call(pruned, ids[None, :end])
            first = [entered[0].tolist() for entered in simba_fx.kept(pruned)]
            logits, cache = call(pruned, ids[None, end:], cache)
            second = [(entered[0] + end).tolist() for entered in simba_fx.kept(pruned)]
            row = run_row(model, ids, shares, past=first, use_cache=True)
        assert row.margin > 1e-5, "no close call: take another seed"
        assert [entered[len(before) :] for entered, before in zip(row.kept, first)] == second
        torch.testing.assert_close(logits[0], row.logits[end:], atol=2e-4, rtol=1e-4)
        assert_same_caches(cache, row.cache)


@settings(max_examples=12)
@given(data=st.data())
@pytest.mark.parametrize("entry", [BY_NAME[name] for name in ("falcon-mamba", "bamba", "olmo-hybrid")],
                         ids=lambda entry: entry.name)  # fmt: skip
def test_any_continuation_is_that_of_the_models_own_blocks(entry: Entry, data: st.DataObject) -> None:
    model = dense(entry.name)
    shares = data.draw(st.sampled_from(sorted(schedules(n_blocks(model)).items())))[1]
    length = data.draw(st.integers(8, 48))
    end = data.draw(st.integers(2, length - 2))
    tail = data.draw(st.integers(1, min(6, length - end)))
    ids, pruned = tokens(data.draw(st.integers(0, 2**20)), length), sparse(entry.name, shares)
    with torch.no_grad():
        _, cache = call(pruned, ids[None, :end])
        first = [entered[0].tolist() for entered in simba_fx.kept(pruned)]
        with simba_fx.tail(pruned, tail):
            logits, cache = call(pruned, ids[None, end:], cache)
        second = [(entered[0] + end).tolist() for entered in simba_fx.kept(pruned)]
        row = run_row(model, ids, shares, past=first, tail=tail, use_cache=True)
    assume(row.margin > 1e-4)
    assert [entered[len(before) :] for entered, before in zip(row.kept, first)] == second
    torch.testing.assert_close(logits[0], row.logits[end:], atol=3e-4, rtol=1e-4)
    assert_same_caches(cache, row.cache)


@every_build
def test_three_turns_and_the_tokens_that_follow(entry: Entry) -> None:
    """Turn by turn with decoded tokens between, against the blocks run on all of it."""
    model, pruned, shares = dense(entry.name), sparse(entry.name, linear(entry)), linear(entry)
    ids, cache, past = tokens(5, 52), None, [[]] * len(shares)
    with torch.no_grad():
        for begin, end in ((0, 21), (21, 24), (24, 52)):
            logits, cache = call(pruned, ids[None, begin:end], cache)
            kept = [entered[0] + begin for entered in simba_fx.kept(pruned)]
            expected = run_row(model, ids[:end], shares, past=past if begin else (), use_cache=True)
            torch.testing.assert_close(logits[0], expected.logits[begin:], atol=2e-4, rtol=1e-4)
            past = [[*before, *now.tolist()] for before, now in zip(past, kept)]
            assert past == expected.kept
        for _ in range(50 if entry.name.startswith("mamba") else 6):  # a token is a turn in which nothing competes
            token = logits[0, -1].argmax()
            assert int(token) == int(expected.logits[-1].argmax())
            ids, past = torch.cat((ids, token[None])), expected.kept
            logits, cache = call(pruned, token[None, None], cache)
            expected = run_row(model, ids, shares, past=past, use_cache=True)
            torch.testing.assert_close(logits[0, -1], expected.logits[-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("output", ["full", "kept"])
def test_the_counts_and_the_tail_are_those_of_the_new_tokens(output: str) -> None:
    pruned = simba_fx.transform(dense("mamba"), 0.5, output=output)
    with torch.no_grad():
        _, cache = call(pruned, tokens(1, 2, 40))
        with simba_fx.tail(pruned, 8):
            logits, _ = call(pruned, tokens(2, 2, 30), cache)
    blocks = [entered.shape[1] for entered in simba_fx.kept(pruned)]
    assert blocks == [30] + [8 + 11] * (len(blocks) - 1)
    assert all(torch.equal(entered[:, -8:], torch.arange(22, 30).expand(2, 8)) for entered in simba_fx.kept(pruned))
    assert logits.shape[1] == (30 if output == "full" else 19)
    assert simba_fx.reached(pruned).sum() == 2 * 19


# --- batches --------------------------------------------------------------------------------------------------------


@every_build
def test_rows_of_a_batch_are_the_rows_alone(entry: Entry) -> None:
    """The first turn is padded in front, as generation pads it; a later one behind, where nothing is read."""
    pruned = sparse(entry.name, linear(entry))
    texts = [tokens(6, 31), tokens(7, 22)], [tokens(8, 17), tokens(9, 24)]
    first, mask = padded(texts[0], [0, 9], [0, 0])
    second, more = padded(texts[1], [0, 0], [7, 0])
    place = (torch.cat((mask, more), 1).cumsum(1) - 1).clamp(min=0)
    one, two = ({"position_ids": part} if takes_positions(type(pruned.base_model)) else {}
                for part in (place[:, : first.shape[1]], place[:, first.shape[1] :]))  # fmt: skip
    with torch.no_grad():
        _, cache = call(pruned, first, attention_mask=mask)
        both, _ = call(pruned, second, cache, attention_mask=torch.cat((mask, more), 1))
        kept = simba_fx.kept(pruned)
        _, again = call(pruned, first, attention_mask=mask, **one)
        same, _ = call(pruned, second, again, attention_mask=more, **two)
        for row, length in ((0, 17), (1, 24)):
            _, alone = call(pruned, texts[0][row][None])
            logits, alone = call(pruned, texts[1][row][None], alone)
            torch.testing.assert_close(both[row, :length], logits[0], atol=3e-4, rtol=1e-4)
            torch.testing.assert_close(same[row, :length], logits[0], atol=3e-4, rtol=1e-4)
            assert [[p for p in entered[row].tolist() if p >= 0] for entered in kept] == [
                entered[0].tolist() for entered in simba_fx.kept(pruned)
            ]


@pytest.mark.parametrize("name", ["jamba", "kimi-linear"])
def test_long_turns_make_their_mask_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal and padded: the same numbers, with never more than so many pairs of tokens at once."""
    pruned = sparse(name, linear(BY_NAME[name]))
    ids, mask = padded([tokens(8, 30), tokens(9, 41)], [0, 0], [11, 0])
    for told in ({}, {"attention_mask": mask}):
        found = []
        for pairs in (2**24, 300):
            monkeypatch.setattr(continued, "_PAIRS", pairs)
            with torch.no_grad():
                _, cache = call(pruned, tokens(1, 2, 35))
                found.append(call(pruned, ids, cache, **told)[0])
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


# --- generation -----------------------------------------------------------------------------------------------------


def test_a_conversation_by_generate() -> None:
    model = MambaForCausalLM.from_pretrained(CHECKPOINT).eval()
    pruned, how = simba_fx.transform(model, 0.5), {"do_sample": False, "max_new_tokens": 5}
    one, two = (torch.tensor([list(text)]) for text in (b"def area(width, height):\n    return", b"\n\n\nprint(area("))
    name = cache_name(model)
    answer = pruned.generate(one, return_dict_in_generate=True, **how)
    cache = answer[name if name in answer else "past_key_values"]
    new = torch.cat((answer.sequences[:, -1:], two), 1)  # the last token has been chosen, and not been read
    found = pruned.generate(new, **{name: cache}, **how)
    _, expected = call(pruned, one)
    with torch.no_grad():
        for token in answer.sequences[0, one.shape[1] : -1]:
            call(pruned, token[None, None], expected)
        logits, expected = call(pruned, new, expected)
        for token in found[0, new.shape[1] :]:
            assert int(logits[0, -1].argmax()) == int(token)
            logits, expected = call(pruned, token[None, None], expected)


@pytest.mark.parametrize("name", ["jamba", "zamba2", "qwen3-next"])
def test_generate_takes_a_long_prompt_in_pieces(name: str) -> None:
    """Not of a pure Mamba: transformers then asks the cache for a length that it has not, also of a dense model."""
    ids, how = tokens(1, 2, 41), {"do_sample": False, "max_new_tokens": 6}
    model = sparse(name, keep_all(n_blocks(dense(name))))
    cut = model.generate(ids, prefill_chunk_size=16, **how)
    assert torch.equal(cut, model.generate(ids, **how))


def test_beams_after_a_continuation() -> None:
    """Everything kept: as of the whole text."""
    model, ids, how = (
        sparse("mamba", keep_all(n_blocks(dense("mamba")))),
        tokens(1, 2, 40),
        {"num_beams": 2, "max_new_tokens": 5},
    )
    with torch.no_grad():
        _, cache = call(model, ids[:, :25])
    cache.reorder_cache(torch.arange(2).repeat_interleave(2))
    found = model.generate(ids[:, 25:], do_sample=False, **{cache_name(model): cache}, **how)
    assert torch.equal(found, model.generate(ids, do_sample=False, **how)[:, 25:])


@settings(max_examples=20)
@given(ends=st.sets(st.integers(1, 47), min_size=1, max_size=6), rows=st.integers(1, 3))
@pytest.mark.parametrize("name", ["mamba2-two-groups", "jamba"])
def test_pieces_of_any_sizes_are_the_text(name: str, ends: set[int], rows: int) -> None:
    model, ids = sparse(name, keep_all(n_blocks(dense(name)))), tokens(rows, rows, 48)
    with torch.no_grad():
        whole, cache = call(model, ids)
        found, other = pieces(model, ids, *sorted(ends))
    torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-4)
    assert_same_caches(other, cache)


def test_one_prefix_branches_into_many_questions() -> None:
    pruned = sparse("bamba", linear(BY_NAME["bamba"]))
    with torch.no_grad():
        _, prefix = call(pruned, tokens(1, 1, 40))
        for seed in (2, 3):
            copies = [copy.deepcopy(prefix), pickle.loads(pickle.dumps(prefix))]
            found = [call(pruned, tokens(seed, 1, 15), one) for one in copies]
            _, fresh = call(pruned, tokens(1, 1, 40))
            expected, cache = call(pruned, tokens(seed, 1, 15), fresh)
            for logits, one in found:
                assert torch.equal(logits, expected)
                assert_same_caches(one, cache, atol=0)


# --- compiled, trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2-two-groups", "jamba"])
def test_one_compilation_serves_every_length(name: str) -> None:
    torch._dynamo.reset()
    pruned, counter = sparse(name, linear(BY_NAME[name])), CompileCounter()
    compiled = torch.compile(pruned, backend=counter)
    frames = []
    with torch.no_grad():
        for first, second in ((30, 20), (41, 33), (57, 64)):
            _, cache = call(compiled, tokens(1, 3, first))
            found, _ = call(compiled, tokens(2, 3, second), cache)
            _, eager = call(pruned, tokens(1, 3, first))
            torch.testing.assert_close(found, call(pruned, tokens(2, 3, second), eager)[0], atol=1e-5, rtol=1e-5)
            frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2], frames


def test_gradients_are_those_of_the_text_whose_beginning_is_fixed() -> None:
    model = BY_NAME["mamba2-two-groups"].build().train()
    pruned, ids = simba_fx.transform(model, keep_all(n_blocks(model))), tokens(1, 2, 40)
    with torch.no_grad():
        _, cache = call(pruned, ids[:, :25])
    call(pruned, ids[:, 25:], cache)[0].square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        _, cache = call(model, ids[:, :25])  # Mamba-2 of transformers goes on by itself
    for layer in cache.layers:
        layer.recurrent_states = {i: s.clone() for i, s in layer.recurrent_states.items()}
        layer.conv_states = {i: s.clone() for i, s in layer.conv_states.items()}
    call(model, ids[:, 25:], cache)[0].square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=2e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


# --- refused --------------------------------------------------------------------------------------------------------


def warm(model: nn.Module, rows: int = 2) -> Any:
    with torch.no_grad():
        return call(model, tokens(1, rows, 20))[1]


def test_padding_between_two_turns_is_refused() -> None:
    pruned = sparse("mamba", "linear")
    ids, mask = padded([tokens(8, 17), tokens(9, 24)], [7, 0], [0, 0])
    for told in (mask, torch.cat((torch.ones(2, 20, dtype=torch.int64), mask), 1)):
        with pytest.raises(InputError, match="Row 0 of attention_mask has padding between its tokens"):
            call(pruned, ids, warm(pruned), attention_mask=told)


def test_answers_that_differ_on_a_warm_cache_are_refused() -> None:
    pruned = sparse("mamba", "linear")
    with (
        simba_fx.answer(pruned, torch.tensor([3, 5])),
        pytest.raises(InputError, match="use_cache=True and rows whose tails differ"),
    ):
        call(pruned, tokens(2, 2, 12), warm(pruned))


def test_attention_of_another_kind_is_refused() -> None:
    model = BY_NAME["jamba"].build()
    model.set_attn_implementation("eager")
    pruned = simba_fx.transform(model)
    with pytest.raises(CacheError, match="which is not the keys of scaled_dot_product_attention as it is"):
        call(pruned, tokens(2, 2, 12), warm(pruned))
    with torch.no_grad():
        call(pruned, tokens(2, 2, 1), warm(pruned))  # a token at a time, as the message says


def test_caches_that_record_their_past_are_refused() -> None:
    pruned = sparse("mamba", "linear")
    cache = warm(pruned)
    for layer in cache.layers:
        layer.record_past = True
    with pytest.raises(InputError, match="records its past, as assisted decoding asks for"):
        call(pruned, tokens(2, 2, 12), cache)


def test_static_caches_are_refused() -> None:
    from transformers import StaticCache

    pruned = sparse("jamba", "linear")
    cache = StaticCache(config=pruned.config, max_cache_len=64)
    with torch.no_grad():
        call(pruned, tokens(1, 2, 20), cache)
        with pytest.raises(InputError, match="has a static size; expected a DynamicCache"):
            call(pruned, tokens(2, 2, 12), cache)
