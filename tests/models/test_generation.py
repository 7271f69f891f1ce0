"""Prefill pruned, decoding dense: `generate()` and caches against the original's own blocks, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
from models import CACHE, FLOAT32, REGISTRY, Entry, dense, n_blocks, names, padded, schedules, sparse, tokens
from reference import TOLERANCE, assert_close
from torch import Tensor, nn
from transformers import DynamicCache

import simba_fx

every_entry = pytest.mark.parametrize("entry", REGISTRY, ids=names(REGISTRY))
every_float32 = pytest.mark.parametrize("entry", FLOAT32, ids=names(FLOAT32))
every_kernels = pytest.mark.parametrize("kernels", ["model", "auto"])

DRAWS = reference.Draws()


@pytest.fixture(scope="module", autouse=True)
def few_draws_are_discarded() -> Iterator[None]:
    yield
    DRAWS.check()


def linear(entry: Entry) -> Any:
    return schedules(n_blocks(dense(entry.name)))["linear"]


# Generate.


@every_float32
@every_kernels
def test_greedy_generation_equals_the_reference_token_for_token(entry: Entry, kernels: str) -> None:
    pruned = sparse(entry.name, linear(entry), kernels=kernels)
    for (ids, row), length in zip(
        DRAWS.prompts(dense(entry.name), linear(entry), [64, 7, 2], 25), (64, 7, 2), strict=True
    ):
        found = pruned.generate(ids[None], max_new_tokens=25, do_sample=False)
        assert found[0, :length].tolist() == ids.tolist()
        assert found[0, length:].tolist() == row.tokens
        widths = [block.shape[1] for block in simba_fx.kept(pruned)]
        assert widths == reference.counts(length, linear(entry)), "what was kept is what the prefill kept"


def test_pruning_changes_what_is_generated() -> None:
    """The test above would pass on a dense model, were this not so."""
    entry = FLOAT32[0]
    ((ids, row),) = DRAWS.prompts(dense(entry.name), linear(entry), [64], 25)
    assert dense(entry.name).generate(ids[None], max_new_tokens=25, do_sample=False)[0, 64:].tolist() != row.tokens


@every_float32
def test_left_padded_prompts_generate_what_each_does_alone(entry: Entry) -> None:
    lengths = [50, 12, 49]
    prompts = DRAWS.prompts(dense(entry.name), linear(entry), lengths, 20)
    ids, mask = padded([ids for ids, _ in prompts], [0, 38, 1], [0, 0, 0])
    found = sparse(entry.name, linear(entry)).generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert found[:, 50:].tolist() == [row.tokens for _, row in prompts]


@every_float32
def test_sampling_is_decided_by_torchs_seed(entry: Entry) -> None:
    pruned, ids = sparse(entry.name, linear(entry)), tokens(5, 2, 40)

    def sample(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return pruned.generate(ids, max_new_tokens=12, do_sample=True, temperature=2.0, **options)

    assert sample(0).shape == (2, 52)
    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    several = sample(0, num_return_sequences=3)
    assert several.shape == (6, 52)
    assert torch.equal(several[:, :40], ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in several[:3]}) > 1


@every_float32
def test_beam_search_of_padded_rows_equals_each_row_alone(entry: Entry) -> None:
    pruned = sparse(entry.name, linear(entry))
    rows = [tokens(3, 30), tokens(4, 21)]
    ids, mask = padded(rows, [0, 9], [0, 0])
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    found = pruned.generate(ids, attention_mask=mask, **options)
    for b, row in enumerate(rows):
        assert found[b, 30:].tolist() == pruned.generate(row[None], **options)[0, len(row) :].tolist()
    several = pruned.generate(ids, attention_mask=mask, num_return_sequences=2, **options)
    assert several.shape == (4, 38)
    assert torch.equal(several[::2], found)


def test_one_beam_more_than_greedy_never_scores_worse() -> None:
    """Beams reorder the cache: a wrong state would show as a continuation that the model itself finds unlikely."""
    pruned, ids = sparse("mamba", schedules(4)["linear"]), tokens(8, 1, 40)
    options: dict[str, Any] = {
        "max_new_tokens": 10,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    beams = pruned.generate(ids, num_beams=4, length_penalty=0.0, **options)
    with torch.no_grad():
        states = pruned(input_ids=ids, use_cache=True)
        total = 0.0
        for token in beams.sequences[0, 40:]:
            total += states.logits[0, -1].log_softmax(-1)[token].item()
            states = pruned(input_ids=token[None, None], **{CACHE: getattr(states, CACHE)}, use_cache=True)
    assert beams.sequences_scores[0].item() == pytest.approx(total, abs=1e-3)


# The cache.


@every_entry
@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_the_first_call_returns_the_real_cache_with_each_blocks_own_states(entry: Entry, length: int) -> None:
    """Prompts shorter than the convolution's window included."""
    with torch.no_grad():
        ids, _, batch = DRAWS.first(dense(entry.name), linear(entry), lambda s: tokens(s, 1, length), use_cache=True)
        found = sparse(entry.name, linear(entry), kernels="model")(input_ids=ids, use_cache=True)
    (expected,) = batch.rows
    assert type(getattr(found, CACHE)) is DynamicCache
    assert torch.equal(found.logits[0], expected.logits)
    assert len(getattr(found, CACHE).layers) == n_blocks(dense(entry.name))
    for i, (own, theirs) in enumerate(zip(getattr(found, CACHE).layers, expected.cache.layers, strict=True)):
        assert type(own) is type(theirs)
        for role in ("conv_states", "recurrent_states"):
            mine, other = getattr(own, role)[0], getattr(theirs, role)[0]
            assert mine.dtype is other.dtype, f"{role} of block {i}"
            assert torch.equal(mine, other), f"{role} of block {i}"
        assert own.has_previous_state == theirs.has_previous_state
        assert own.conv_kernel_size == theirs.conv_kernel_size


@every_float32
def test_our_kernels_leave_the_same_states_to_rounding(entry: Entry) -> None:
    with torch.no_grad():
        ids, _, batch = DRAWS.first(dense(entry.name), linear(entry), lambda s: tokens(s, 1, 50), use_cache=True)
        found = sparse(entry.name, linear(entry))(input_ids=ids, use_cache=True).cache_params
    (expected,) = batch.rows
    for i, (own, theirs) in enumerate(zip(found.layers, expected.cache.layers, strict=True)):
        for role in ("conv_states", "recurrent_states"):
            assert_close(
                f"{role} of block {i}", getattr(own, role)[0], getattr(theirs, role)[0], TOLERANCE[entry.dtype]
            )


@every_entry
def test_a_decoding_step_is_the_dense_models(entry: Entry) -> None:
    """From equal states, one new token: the same bits as the original's step, and states advanced in place."""
    model, pruned = dense(entry.name), sparse(entry.name, linear(entry), kernels="model")
    ids, new = tokens(81, 2, 33), tokens(82, 2, 1)
    with torch.no_grad():
        ours, theirs = (getattr(pruned(input_ids=ids, use_cache=True), CACHE) for _ in range(2))
        for _ in range(3):
            found = pruned(input_ids=new, **{CACHE: ours}, use_cache=True)
            expected = model(input_ids=new, **{CACHE: theirs}, use_cache=True)
            assert torch.equal(found.logits, expected.logits)
            assert getattr(found, CACHE) is ours
            for own, other in zip(ours.layers, theirs.layers, strict=True):
                assert torch.equal(own.conv_states[0], other.conv_states[0])
                assert torch.equal(own.recurrent_states[0], other.recurrent_states[0])
            new = found.logits[:, -1:].argmax(-1)


@every_float32
def test_an_empty_cache_from_the_caller_is_filled(entry: Entry) -> None:
    model, pruned, ids = dense(entry.name), sparse(entry.name, linear(entry)), tokens(3, 1, 28)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        given = pruned(input_ids=ids, **{CACHE: cache}, use_cache=True)
        own = pruned(input_ids=ids, use_cache=True)
    assert getattr(given, CACHE) is cache
    assert torch.equal(given.logits, own.logits)
    for mine, other in zip(cache.layers, getattr(own, CACHE).layers, strict=True):
        assert torch.equal(mine.recurrent_states[0], other.recurrent_states[0])
        assert torch.equal(mine.conv_states[0], other.conv_states[0])


@every_float32
def test_caches_of_two_calls_are_not_the_same_memory(entry: Entry) -> None:
    pruned, ids = sparse(entry.name, linear(entry)), tokens(3, 1, 28)
    with torch.no_grad():
        one = getattr(pruned(input_ids=ids, use_cache=True), CACHE)
        before = [layer.recurrent_states[0].clone() for layer in one.layers]
        two = getattr(pruned(input_ids=tokens(4, 1, 28), use_cache=True), CACHE)
        pruned(input_ids=tokens(5, 1, 1), **{CACHE: two}, use_cache=True)
    assert all(torch.equal(a, layer.recurrent_states[0]) for a, layer in zip(before, one.layers))


# The other options of a call.


@every_float32
def test_without_a_cache_none_is_returned(entry: Entry) -> None:
    pruned, ids = sparse(entry.name, linear(entry)), tokens(9, 1, 30)
    with torch.no_grad():
        found = pruned(input_ids=ids, use_cache=False)
        assert getattr(found, CACHE) is None
        assert torch.equal(found.logits, pruned(input_ids=ids, use_cache=True).logits)


@every_float32
@pytest.mark.parametrize("use_cache", [False, True])
def test_tuples_have_the_dense_models_form(entry: Entry, use_cache: bool) -> None:
    pruned, ids = sparse(entry.name, linear(entry)), tokens(9, 1, 30)
    for labels in (None, ids):
        with torch.no_grad():
            options = {"input_ids": ids, "use_cache": use_cache, "labels": labels}
            theirs = dense(entry.name)(**options, return_dict=False)
            found = pruned(**options, return_dict=False)
            named = pruned(**options)
        assert [type(x) for x in found] == [type(x) for x in theirs]
        assert [getattr(x, "shape", None) for x in found] == [getattr(x, "shape", None) for x in theirs]
        assert torch.equal(found[0 if labels is None else 1], named.logits)
        if labels is not None:
            assert torch.equal(found[0], named.loss)


@every_float32
@pytest.mark.parametrize("logits_to_keep", [1, 5])
def test_logits_to_keep_are_the_last(entry: Entry, logits_to_keep: int) -> None:
    pruned, ids = sparse(entry.name, linear(entry)), tokens(9, 2, 30)
    with torch.no_grad():
        every = pruned(input_ids=ids).logits
        some = pruned(input_ids=ids, logits_to_keep=logits_to_keep).logits
    assert_close("logits", some, every[:, -logits_to_keep:], 1e-6)


@every_float32
def test_hidden_states_are_of_full_length_or_refused(entry: Entry) -> None:
    pruned, ids = sparse(entry.name, linear(entry)), tokens(9, 1, 30)
    with torch.no_grad():
        try:
            found = pruned(input_ids=ids, output_hidden_states=True).hidden_states
        except simba_fx.errors.SimbaError:
            with pytest.raises(simba_fx.errors.InputError, match="output_hidden_states"):
                pruned(input_ids=ids, output_hidden_states=True)
            return
        theirs = dense(entry.name)(input_ids=ids, output_hidden_states=True).hidden_states
    assert [x.shape for x in found] == [x.shape for x in theirs]
    assert_close("after the first block", found[0], theirs[0], TOLERANCE[entry.dtype])  # which is dense
    with torch.no_grad():
        assert_close("after the norm", found[-1], pruned.backbone(input_ids=ids).last_hidden_state, 1e-6)


def test_the_backbone_alone_is_pruned_too() -> None:
    """`transform` of the model without its head, as feature extraction uses it."""
    entry = FLOAT32[0]
    backbone: nn.Module = entry.build().backbone
    with torch.no_grad():
        ids, _, expected = DRAWS.first(dense(entry.name), linear(entry), lambda seed: tokens(seed, 1, 44))
        found = simba_fx.transform(backbone, linear(entry), kernels="model", criterion="simba")(input_ids=ids)
    assert torch.equal(found.last_hidden_state[0], expected.rows[0].hidden)
