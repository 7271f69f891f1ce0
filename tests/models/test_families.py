"""Every family of models, pure and hybrid, through one road: parity, reference, padding, caches, decoding, training.

One registry (`models.FAMILIES`) drives everything; a family added there is tested here. The oracle is reference.py: the
model's own blocks, one row at a time, with arguments indexed by name. `make table` prints from these tests what each
family can do; `capability` says which column a test stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import strategies as domain
import torch
import torch._dynamo.testing
from hypothesis import assume, given
from hypothesis import strategies as st
from models import (
    DELTA_RULES,
    FAMILIES,
    HYBRIDS,
    RELATIVES,
    SPREAD,
    VOCABULARY,
    Entry,
    _bamba,
    _granite,
    _jamba,
    _nemotron_h,
    dense,
    keep_all,
    n_blocks,
    names,
    padded,
    randomise,
    schedules,
    sparse,
    three_rows,
    tokens,
)
from reference import TOLERANCE, assert_close, cache_name
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    DynamicCache,
    PreTrainedTokenizerFast,
    pipeline,
    xLSTMConfig,
    xLSTMForCausalLM,
)

import simba_fx
from simba_fx.capture.scan_functions import transformers as scan_functions

every_family = pytest.mark.parametrize("entry", FAMILIES, ids=names(FAMILIES))
WITH_ATTENTION = (*HYBRIDS, *DELTA_RULES)
MIXTURES = [entry for entry in SPREAD if entry in WITH_ATTENTION]
"""For what does not depend on a family's own code."""
every_hybrid = pytest.mark.parametrize("entry", WITH_ATTENTION, ids=names(WITH_ATTENTION))
every_mixture = pytest.mark.parametrize("entry", MIXTURES, ids=names(MIXTURES))
every_masking = pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])

DRAWS = reference.Draws()


@pytest.fixture(scope="module", autouse=True)
def few_draws_are_discarded() -> Iterator[None]:
    yield
    DRAWS.check()


def shares_of(entry: Entry) -> Any:
    return schedules(n_blocks(dense(entry.name)))["linear"]


def states(cache: Any) -> dict[str, Tensor]:
    """Everything that a cache holds, by name."""
    found = {}
    for i, layer in enumerate(cache.layers):
        for kind in ("keys", "values"):
            if isinstance(held := getattr(layer, kind, None), Tensor):
                found[f"{kind} of layer {i}"] = held
        for kind in ("conv_states", "recurrent_states"):
            for j, held in (getattr(layer, kind, None) or {}).items():
                if held is not None:  # of a layer that nobody fills
                    found[f"{kind} {j} of layer {i}"] = held
    return found


def assert_kept_equal(model: nn.Module, expected: reference.Batch) -> None:
    for i, (block, rows) in enumerate(zip(simba_fx.kept(model), expected.kept, strict=True)):
        for b, row in enumerate(rows):
            assert block[b][block[b] >= 0].tolist() == row, f"block {i}, row {b}"


# Everything kept, with the machinery in the graph: the dense model's bits.


@every_family
@every_masking
@pytest.mark.capability("parity")
def test_keeping_everything_gives_the_dense_bits(entry: Entry, masked: bool) -> None:
    model = dense(entry.name)
    pruned = sparse(entry.name, keep_all(n_blocks(model)), kernels="model")
    with torch.no_grad():
        expected, found = (one(**three_rows(masked), use_cache=True) for one in (model, pruned))
    assert simba_fx.program(pruned).cuts, "the machinery must not be elided"
    assert type(found) is type(expected)
    assert torch.equal(found.logits, expected.logits)
    ours, theirs = (states(one[cache_name(model)]) for one in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, own in ours.items():
        assert own.dtype is theirs[name].dtype, name
        assert torch.equal(own, theirs[name]), name


@every_family
@pytest.mark.capability("train")
def test_keeping_everything_gives_the_dense_gradients_bits_in_training(entry: Entry) -> None:
    model = entry.build().train()
    pruned = simba_fx.transform(model, keep_all(n_blocks(model)), kernels="model", criterion="simba")
    weights = torch.randn(3, 37, model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    ours, theirs = (one(**three_rows(True), use_cache=False).logits for one in (pruned, model))
    assert torch.equal(ours, theirs)
    found, expected = (
        torch.autograd.grad((logits * weights).sum(), list(parameters.values()), allow_unused=True)
        for logits in (ours, theirs)
    )
    used = 0
    for name, own, other in zip(parameters, found, expected, strict=True):
        assert (own is None) == (other is None), name
        if other is not None:
            used += 1
            assert torch.equal(own, other), name
    assert used > len(parameters) // 2


@every_family
@pytest.mark.capability("train")
def test_a_pruned_models_gradients_equal_the_references(entry: Entry) -> None:
    model, shares = dense(entry.name), shares_of(entry)
    pruned = sparse(entry.name, shares)
    weights = torch.randn(40, model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ids, _, expected = DRAWS.first(model, shares, lambda seed: tokens(seed, 1, 40))
    found = pruned(input_ids=ids, use_cache=False).logits[0]
    every = [
        torch.autograd.grad((logits * weights).sum(), list(parameters.values()), allow_unused=True)
        for logits in (found, expected.rows[0].logits)
    ]
    for name, own, other in zip(parameters, *every, strict=True):
        if other is not None and other.abs().max() > 1e-6:
            assert_close(name, own, other, reference.GRADIENT_TOLERANCE[entry.dtype])


# Pruned, against the reference.


@every_family
@domain.examples(5)
@given(data=st.data())
def test_the_whole_model_equals_the_reference(entry: Entry, data: st.DataObject) -> None:
    model, shares = dense(entry.name), shares_of(entry)
    length = data.draw(domain.lengths)
    tail = data.draw(domain.tails(length))
    ids = tokens(data.draw(domain.seeds), data.draw(st.integers(1, 2)), length)
    with torch.no_grad():
        expected = reference.run(model, ids, shares, tail=tail, use_cache=True)
    assume(DRAWS.clear(expected))
    pruned = sparse(entry.name, shares)
    with torch.no_grad(), simba_fx.tail(pruned, tail):
        found = pruned(input_ids=ids)
    assert_kept_equal(pruned, expected)
    assert_close("logits", found.logits, expected.logits, TOLERANCE[entry.dtype])


@every_hybrid
@pytest.mark.parametrize("name", ["steep", "stairs"])
def test_other_schedules_equal_the_reference(entry: Entry, name: str) -> None:
    """With the model's own kernels: bit for bit. Blocks without a scan wait for the next that has one."""
    model = dense(entry.name)
    shares = schedules(n_blocks(model))[name]
    with torch.no_grad():
        ids, _, expected = DRAWS.first(model, shares, lambda seed: tokens(seed, 1, 61), use_cache=True)
        pruned = sparse(entry.name, shares, kernels="model")
        found = pruned(input_ids=ids, use_cache=True)
    assert_kept_equal(pruned, expected)
    assert torch.equal(found.logits, expected.logits)
    ours, theirs = states(found[cache_name(model)]), states(expected.rows[0].cache)
    assert ours.keys() == theirs.keys()
    for key, own in ours.items():
        assert torch.equal(own, theirs[key]), f"{key}: each layer caches what it saw"


@every_hybrid
@domain.examples(2)
@given(data=st.data())
def test_any_schedule_equals_the_reference(entry: Entry, data: st.DataObject) -> None:
    """Schedules drawn anew: each example is a capture."""
    model = dense(entry.name)
    shares = data.draw(domain.shares(n_blocks(model)))
    ids = tokens(data.draw(domain.seeds), 1, data.draw(domain.lengths))
    with torch.no_grad():
        expected = reference.run(model, ids, shares)
    assume(DRAWS.clear(expected))
    pruned = simba_fx.transform(model, shares, criterion="simba")
    with torch.no_grad():
        found = pruned(input_ids=ids)
    assert_kept_equal(pruned, expected)
    assert_close("logits", found.logits, expected.logits, TOLERANCE[entry.dtype])


@every_mixture
def test_in_bfloat16_keeping_everything_gives_the_dense_bits(entry: Entry) -> None:
    model = entry.build().to(torch.bfloat16)
    pruned = simba_fx.transform(model, keep_all(n_blocks(model)), kernels="model", criterion="simba")
    with torch.no_grad():
        expected, found = (one(**three_rows(True), use_cache=True) for one in (model, pruned))
    assert found.logits.dtype is expected.logits.dtype
    assert torch.equal(found.logits, expected.logits)
    ours, theirs = (states(one[cache_name(model)]) for one in (found, expected))
    for name, own in ours.items():
        assert own.dtype is theirs[name].dtype, name
        assert torch.equal(own, theirs[name]), name


@every_family
@domain.examples(5)
@given(data=st.data())
@pytest.mark.capability("padding")
def test_a_row_in_a_batch_equals_the_row_alone(entry: Entry, data: st.DataObject) -> None:
    model, shares = dense(entry.name), shares_of(entry)
    batch = data.draw(domain.padded_batches(max_rows=3))
    tail = data.draw(st.one_of(st.just(1), st.integers(1, min(batch.lengths))))
    with torch.no_grad():
        expected = reference.run(model, batch.ids, shares, batch.mask, tail=tail)
    assume(DRAWS.clear(expected))
    pruned = sparse(entry.name, shares)
    with torch.no_grad(), simba_fx.tail(pruned, tail):
        found = pruned(input_ids=batch.ids, attention_mask=batch.mask)
    assert_kept_equal(pruned, expected)
    for b, real in enumerate(batch.mask.bool()):
        assert_close(f"row {b}", found.logits[b, real], expected.logits[b, real], TOLERANCE[entry.dtype])


# Decoding.


@every_family
@pytest.mark.capability("generate")
def test_greedy_generation_equals_the_reference_token_for_token(entry: Entry) -> None:
    DRAWS.check_generation(sparse(entry.name, shares_of(entry)), dense(entry.name), shares_of(entry))


@every_hybrid
def test_steps_without_positions_or_mask_continue_where_the_prompt_ended(entry: Entry) -> None:
    """A loop of the user's own, which passes ids and the cache alone."""
    pruned = sparse(entry.name, shares_of(entry))
    if entry.name == "bamba":
        pytest.skip("Bamba itself counts positions of a step without position_ids from 0")
    ((ids, row),) = DRAWS.prompts(dense(entry.name), shares_of(entry), [30], 12)
    name = cache_name(pruned)
    with torch.no_grad():
        out = pruned(input_ids=ids[None], use_cache=True)
        found = [int(out.logits[0, -1].argmax())]
        while len(found) < 12:
            out = pruned(input_ids=torch.tensor([found[-1:]]), use_cache=True, **{name: out[name]})
            found.append(int(out.logits[0, -1].argmax()))
    assert found == row.tokens


@every_family
@pytest.mark.capability("generate")
def test_beams_and_samples_of_padded_rows_equal_each_row_alone(entry: Entry) -> None:
    pruned = sparse(entry.name, shares_of(entry))
    rows = [tokens(3, 30), tokens(4, 21)]
    ids, mask = padded(rows, [0, 9], [0, 0])
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    found = pruned.generate(ids, attention_mask=mask, num_return_sequences=2, **options)
    for b, row in enumerate(rows):
        alone = pruned.generate(row[None], num_return_sequences=2, **options)
        assert found[2 * b : 2 * b + 2, 30:].tolist() == alone[:, len(row) :].tolist()

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return pruned.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, num_return_sequences=3)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0)[:, :30], ids.repeat_interleave(3, 0))


@every_family
def test_a_static_cache_decodes_like_a_dynamic_one(entry: Entry) -> None:
    pruned = sparse(entry.name, shares_of(entry))
    prompts = DRAWS.prompts(dense(entry.name), shares_of(entry), [30, 17], 10)
    ids, mask = padded([ids for ids, _ in prompts], [0, 13], [0, 0])
    for inputs in ({"inputs": prompts[0][0][None]}, {"inputs": ids, "attention_mask": mask}):
        found = pruned.generate(**inputs, max_new_tokens=10, do_sample=False, cache_implementation="static")
        assert found[:, 30:].tolist() == [row.tokens for _, row in prompts[: len(found)]]


@every_hybrid
def test_rows_of_a_padded_cache_can_be_selected_repeated_and_reordered(entry: Entry) -> None:
    """What decoding continues with after the rows were moved is what each row continues with in its old place."""
    pruned = sparse(entry.name, shares_of(entry))
    name = cache_name(pruned)
    ids, mask = padded([tokens(3, 30), tokens(4, 21)], [0, 9], [0, 0])
    new, positions = tokens(5, 2, 1), torch.tensor([[30], [21]])
    order = torch.tensor([1, 0, 1])

    def step(move: Any, rows: Tensor) -> Tensor:
        cache = pruned(input_ids=ids, attention_mask=mask, use_cache=True)[name]
        move(cache)
        longer = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)[rows]
        given = {"input_ids": new[rows], "attention_mask": longer, "position_ids": positions[rows], name: cache}
        return pruned(**given, use_cache=True).logits

    with torch.no_grad():
        expected = step(lambda cache: None, torch.arange(2))
        found = step(lambda cache: cache.reorder_cache(order), order)
    assert_close("logits", found, expected[order], TOLERANCE[entry.dtype])
    assert reference.relative_rms(expected[0], expected[1]) > 0.1, "rows that are alike would prove nothing"


@every_hybrid
def test_new_tokens_that_are_masked_are_not_attended_to(entry: Entry) -> None:
    """As in the dense model: a step whose mask ends in 0 leaves its token out of what later tokens see."""
    model, whole = dense(entry.name), sparse(entry.name, keep_all(n_blocks(dense(entry.name))), kernels="model")
    name = cache_name(model)

    def two_steps(one: nn.Module) -> Tensor:
        mask = torch.ones(2, 20, dtype=torch.int64)
        out = one(input_ids=tokens(6, 2, 20), attention_mask=mask, use_cache=True)
        for t, real in enumerate(([1, 0], [1, 1])):
            mask = torch.cat((mask, torch.tensor(real)[:, None]), 1)
            given = {"attention_mask": mask, "position_ids": torch.full((2, 1), 20 + t), name: out[name]}
            out = one(input_ids=tokens(7 + t, 2, 1), use_cache=True, **given)
        return out.logits

    with torch.no_grad():
        assert torch.equal(two_steps(whole), two_steps(model))


@every_hybrid
def test_an_emptied_cache_serves_another_prompt(entry: Entry) -> None:
    pruned = sparse(entry.name, shares_of(entry))
    name = cache_name(pruned)
    cache = DynamicCache(config=pruned.config)
    with torch.no_grad():
        pruned(input_ids=tokens(1, 2, 20), use_cache=True, **{name: cache})
        kinds = [type(layer).__name__ for layer in cache.layers]
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("transformers 5.17's reset leaves as many keys of zeros")
        again = pruned(input_ids=tokens(2, 2, 24), use_cache=True, **{name: cache})
        fresh = pruned(input_ids=tokens(2, 2, 24), use_cache=True)
    assert [type(layer).__name__ for layer in cache.layers] == kinds
    assert torch.equal(again.logits, fresh.logits)
    for key, held in states(cache).items():
        assert torch.equal(held, states(fresh[name])[key]), key


@every_hybrid
def test_the_originals_modules_are_not_hooked(entry: Entry) -> None:
    model = entry.build()
    before = {name: id(module) for name, module in model.named_modules()}
    functions = dict(vars(entry.modeling))
    pruned = simba_fx.transform(model, shares_of(entry), criterion="simba")
    with torch.no_grad():
        pruned(input_ids=tokens(1, 1, 20), use_cache=True)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert dict(vars(entry.modeling)) == functions, "a patched name was not put back"
    assert pruned.state_dict().keys() == model.state_dict().keys()
    assert {id(p) for p in pruned.parameters()} == {id(p) for p in model.parameters()}


# Attention.


@every_mixture
def test_the_eager_attention_of_transformers_gives_the_same(entry: Entry) -> None:
    """Masks are additive there, and never left out."""
    model = entry.make()
    randomise(model, entry.seed)
    model.set_attn_implementation("eager")
    pruned = simba_fx.transform(model.eval(), shares_of(entry), criterion="simba")
    other = sparse(entry.name, shares_of(entry))
    for masked in (False, True):
        with torch.no_grad():
            ours, theirs = (one(**three_rows(masked)).logits for one in (pruned, other))
        real = three_rows(True)["attention_mask"].bool() if masked else slice(None)
        assert_close("logits", ours[real], theirs[real], TOLERANCE[entry.dtype])
    ids, mask = padded([tokens(3, 30), tokens(4, 21)], [0, 9], [0, 0])
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(pruned.generate(ids, **options), other.generate(ids, **options))


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_attention_without_padding_makes_no_mask_over_pairs() -> None:
    """One attention layer at L = 32k: nothing is as large as one row of an (L, L) mask would make it."""
    length = 32_768
    model = _jamba(num_hidden_layers=2, num_experts=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=8)
    randomise(model, 0)
    pruned = simba_fx.transform(model.eval(), [1, 0.999], criterion="simba")
    with torch.no_grad(), Largest() as largest:
        pruned(input_ids=tokens(0, 1, length), use_cache=False, logits_to_keep=1)
    assert simba_fx.kept(pruned)[1].shape == (1, 32_736), "the attention layer sees nearly all"
    assert length * 8 <= largest.elements < length * length // 100


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("make", [_jamba, _granite, _nemotron_h], ids=["jamba", "granite-hybrid", "nemotron-h"])
def test_experts(make: Any, experts: str) -> None:
    model = make(experts=experts)
    randomise(model, 5)
    model.eval()
    shares = schedules(n_blocks(model))["linear"]
    pruned = simba_fx.transform(model, shares, criterion="simba")
    with torch.no_grad():
        ids, _, expected = DRAWS.first(model, shares, lambda seed: tokens(seed, 2, 40))
        found = pruned(input_ids=ids)
    assert_kept_equal(pruned, expected)
    assert_close("logits", found.logits, expected.logits, TOLERANCE[torch.float32])


def test_packed_rows_are_refused() -> None:
    pruned = sparse("bamba", schedules(4)["linear"])
    positions = torch.cat((torch.arange(9), torch.arange(11)))[None]
    with pytest.raises(simba_fx.errors.InputError, match=r"position_ids do not rise by one from token to token"):
        pruned(input_ids=tokens(0, 1, 20), position_ids=positions)


def test_embeddings_from_the_caller_are_not_scaled_by_the_model() -> None:
    """Falcon-H1 scales what it looks up itself, and only that: both ways of calling keep their meaning."""
    model, pruned = dense("falcon-h1"), sparse("falcon-h1", keep_all(4), kernels="model")
    ids = tokens(0, 2, 30)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        by_ids, by_embeds = (pruned(**given).logits for given in ({"input_ids": ids}, {"inputs_embeds": embeds}))
        assert torch.equal(by_ids, model(input_ids=ids).logits)
        assert torch.equal(by_embeds, model(inputs_embeds=embeds).logits)
    assert reference.relative_rms(by_ids, by_embeds) > 0.01


# Compiled.


@every_family
@pytest.mark.capability("compile")
def test_compiled_equals_eager_and_compiles_once(entry: Entry) -> None:
    """The default mode over batches and lengths; every second family with padding (a compilation takes seconds)."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    pruned = sparse(entry.name, shares_of(entry))
    compiled = torch.compile(pruned, backend=counter)
    masked = FAMILIES.index(entry) % 2 == 0
    batch = three_rows(masked)
    with torch.no_grad():
        eager, found = (one(**batch, use_cache=False).logits for one in (pruned, compiled))
    real = batch.get("attention_mask", torch.ones(3, 37)).bool()
    assert_close("logits", found[real], eager[real], TOLERANCE[entry.dtype])
    graphs = counter.frame_count
    for rows, length in ((2, 50), (5, 23), (4, 61)):
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, :3] = 0
        with torch.no_grad():
            compiled(input_ids=tokens(rows, rows, length), attention_mask=mask if masked else None, use_cache=False)
    assert counter.frame_count == graphs, "another batch or length was compiled anew"


@pytest.mark.parametrize("name", ["bamba", "zamba2"])
def test_a_hybrid_is_one_graph_without_a_cache_and_refused_with_one(name: str) -> None:
    torch._dynamo.reset()
    whole = simba_fx.transform(dense(name), schedules(4)["linear"], compile="whole", criterion="simba")
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    for masked in (False, True):
        with torch.no_grad():
            eager, found = (one(**three_rows(masked), use_cache=False).logits for one in (whole, compiled))
        assert torch.equal(found, eager)
    with torch.no_grad():
        whole(**three_rows(False), use_cache=True)
        with pytest.raises(Exception, match=r"expected use_cache=False in a graph that is traced whole"):
            compiled(**three_rows(False), use_cache=True)


# What `transform` does unless it is told.


@every_family
def test_the_default_keeps_half_and_a_row_in_a_batch_is_the_row_alone(entry: Entry) -> None:
    pruned = simba_fx.transform(dense(entry.name))
    rows = tokens(21, 40), tokens(22, 33)
    ids, mask = padded(rows, [0, 7], [0, 0])
    with torch.no_grad():
        both = pruned(input_ids=ids, attention_mask=mask, use_cache=False).logits
        kept = simba_fx.kept(pruned)
        for b, row in enumerate(rows):
            alone = pruned(input_ids=row[None], use_cache=False).logits[0]
            here = mask[b] != 0
            assert_close("logits", both[b, here], alone, TOLERANCE[entry.dtype])
            place = torch.cumsum(mask[b], 0) - 1
            assert [place[block[b][block[b] >= 0]].tolist() for block in kept] == [
                block[0].tolist() for block in simba_fx.kept(pruned)
            ]
    assert kept[-1].shape[1] == 1 + 20


# Families that nobody listed.


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """xLSTM as it would be if nobody had listed what it calls."""
    monkeypatch.delitem(scan_functions.ROWS, "wrap_chunkwise_arbitrary_sequence_length")


@pytest.mark.usefixtures("unlisted")
def test_another_recurrence_is_refused_naming_its_function() -> None:
    """Its scan is put together of functions that a module holds."""
    config = xLSTMConfig(vocab_size=53, hidden_size=32, embedding_dim=32, num_blocks=3, num_heads=2, chunk_size=8)
    with pytest.raises(simba_fx.errors.ScanNotFoundError) as caught:
        simba_fx.transform(xLSTMForCausalLM(config).eval(), "linear", criterion="simba")
    assert "transformers.models.xlstm.modeling_xlstm.mlstm_chunkwise" in str(caught.value)
    assert "simba_fx.register_recurrence(function, value)" in str(caught.value)


@pytest.mark.usefixtures("unlisted")
def test_what_fails_without_a_cache_as_well_is_not_laid_to_the_cache() -> None:
    """By default xLSTM loops over the tokens, in a function that calls another for each; and it has a cache of its
    own, of which the first trace speaks."""
    config = xLSTMConfig(vocab_size=53, hidden_size=32, embedding_dim=32, num_blocks=2, num_heads=2)
    with pytest.raises(simba_fx.errors.CaptureError, match=r"mlstm_recurrent_sequence_native, which loops over tok"):
        simba_fx.transform(xLSTMForCausalLM(config).eval())


def test_attention_that_cannot_be_masked_is_refused() -> None:
    model = _bamba()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(simba_fx.errors.CaptureError, match="expected 'sdpa' or 'eager'"):
        simba_fx.transform(model, "linear", criterion="simba")


def test_the_readme_has_a_row_for_every_family() -> None:
    """`make table` prints it anew; a family that was added here is missing there until someone did that."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [line.split("|")[1].strip() for line in readme.splitlines() if line.startswith("| transformers `")]
    others = {f"transformers `{name}`" for name in ("recurrent_gemma", "rwkv", "xlstm")}  # test_registered_recurrences
    there = {entry.title for entry in (*FAMILIES, *RELATIVES)} | others
    assert rows == sorted(set(rows))
    assert there <= set(rows)
    assert len(rows) == len(there) or len(RELATIVES) < 4, "this transformers has not all of them"


# As people use them.


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of one word per token id, made here."""
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", padding_side="left")


@pytest.mark.parametrize("name", ["mamba2-two-groups", "zamba2"])
def test_the_text_generation_pipeline(name: str) -> None:
    pruned, tokenizer = sparse(name, schedules(n_blocks(dense(name)))["linear"]), words()
    prompts = [" ".join(f"w{i}" for i in tokens(seed, length).tolist()) for seed, length in ((1, 30), (2, 19))]
    generator = pipeline("text-generation", model=pruned, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    found = [each[0]["generated_text"] for each in generator(prompts, batch_size=2, **options)]
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = pruned.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert text.split() == tokenizer.decode(alone, skip_special_tokens=True).split()


@pytest.mark.parametrize("name", ["mamba2-two-groups", "jamba"])
def test_assisted_decoding_is_refused_by_transformers(name: str) -> None:
    """It needs to take tokens back, which no recurrent state can."""
    pruned = sparse(name, schedules(n_blocks(dense(name)))["linear"])
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        pruned.generate(tokens(0, 1, 20), assistant_model=dense(name), max_new_tokens=4)


@pytest.mark.parametrize("name", ["mamba2-two-groups", "falcon-h1", "nemotron-h"])
def test_feature_extraction_with_the_model_without_its_head(name: str) -> None:
    """As `AutoModel` builds it: every token of the input has a feature, at the length of the input."""
    model, shares = dense(name), schedules(n_blocks(dense(name)))["linear"]
    backbone = AutoModel.from_config(model.config)
    backbone.load_state_dict(model.base_model.state_dict())
    pruned = simba_fx.transform(backbone.eval(), shares, kernels="model", criterion="simba")
    with torch.no_grad():
        ids, _, expected = DRAWS.first(model, shares, lambda seed: tokens(seed, 1, 44), use_cache=True)
        found = pruned(input_ids=ids)
    assert type(found) is type(backbone(input_ids=ids))
    assert torch.equal(found.last_hidden_state[0], expected.rows[0].hidden)


@every_mixture
def test_hidden_states_are_of_full_length(entry: Entry) -> None:
    model, pruned = dense(entry.name), sparse(entry.name, shares_of(entry), kernels="model")
    with torch.no_grad():
        ours, theirs = (one(input_ids=tokens(9, 1, 30), output_hidden_states=True) for one in (pruned, model))
    assert [x.shape for x in ours.hidden_states] == [x.shape for x in theirs.hidden_states]
    assert torch.equal(ours.hidden_states[0], theirs.hidden_states[0]), "the embeddings"
    assert torch.equal(ours.hidden_states[1], theirs.hidden_states[1]), "the first block is dense"
    assert not torch.equal(ours.hidden_states[-1], theirs.hidden_states[-1])
    with torch.no_grad():  # transformers hooks modules for this: the sparse model's hooks are not the dense one's
        again = model(input_ids=tokens(9, 1, 30), output_hidden_states=True)
    assert len(again.hidden_states) == len(theirs.hidden_states)
