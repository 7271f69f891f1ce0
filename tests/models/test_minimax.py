"""MiniMax: lightning attention between the projections of a forward, its states in a cache of the model's own.

What `test_families` asks of each family, where that does not take a cache of the usual class: static caches, beams and
several tokens on a warm cache are not for this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import MINIMAX, dense, keep_all, linear, padded, sparse, three_rows, tokens
from reference import assert_close, cache_name
from torch import Tensor
from transformers.models.minimax.modeling_minimax import MiniMaxCache

import simba_fx
from simba_fx.capture.scan_functions.minimax import lightning_attention
from simba_fx.errors import InputError
from simba_fx.ops import reference as loops

NAME = MINIMAX.name
SHARES = linear(MINIMAX)


def states(cache: Any) -> list[Tensor]:
    held = [state for state in cache.linear_cache if isinstance(state, Tensor)]
    return held + [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]


@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_lightning_attention_is_the_scan_of_mamba_2(length: int) -> None:
    """A float64 loop, by the operands that its row gives."""
    attention: Any = dense(NAME).get_submodule("model.layers.1.self_attn")
    q, k, v = torch.randn(3, 2, 4, length, 8, generator=torch.Generator().manual_seed(length))
    decays = attention.slope_rate, attention.query_decay, attention.key_decay, attention.diagonal_decay
    y, state = lightning_attention(q, k, v, *decays, attention.block_size)
    x, B, C = (operand.transpose(1, 2) for operand in (v, k, q))
    steps = torch.ones(2, length, 4)
    right, last = loops.ssd_scan_ref(x, steps, -attention.slope_rate.flatten(), B, C, None, None, None, False, 0.0, 9.0)
    assert_close("y", y.transpose(1, 2), right, 1e-5)
    assert_close("state", state.mT, last, 1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_keeping_everything_gives_the_dense_bits(masked: bool) -> None:
    model = dense(NAME)
    pruned = sparse(NAME, keep_all(5), kernels="model")
    assert simba_fx.program(pruned).cuts
    with torch.no_grad():
        expected, found = (one(**three_rows(masked), use_cache=True) for one in (model, pruned))
    assert torch.equal(found.logits, expected.logits)
    ours, theirs = (one[cache_name(model)] for one in (found, expected))
    assert type(ours) is type(theirs) is MiniMaxCache
    assert len(states(ours)) == 7
    assert all(torch.equal(a, b) for a, b in zip(states(ours), states(theirs), strict=True))


@pytest.mark.parametrize("kernels", ["auto", "model"])
@pytest.mark.parametrize("seed", range(3))
def test_pruned_it_is_its_own_blocks_on_the_tokens_that_add_most(kernels: str, seed: int) -> None:
    model = dense(NAME)
    pruned = sparse(NAME, SHARES, kernels=kernels)
    rows = [tokens(10 * seed, 40), tokens(10 * seed + 1, 33)]
    ids, mask = padded(rows, [0, 7], [0, 0])
    with torch.no_grad():
        expected = reference.run(model, ids, SHARES, mask, use_cache=True)
        found = pruned(input_ids=ids, attention_mask=mask)
    assert expected.margin > 1e-5
    for block, right in zip(simba_fx.kept(pruned), expected.kept, strict=True):
        assert [row[row >= 0].tolist() for row in block] == right
    assert len({len(row) for row in (block[0] for block in expected.kept)}) > 2
    for b, real in enumerate(mask.bool()):
        assert_close(f"row {b}", found.logits[b, real], expected.logits[b, real], 1e-4)


def test_greedy_generation_equals_the_reference_token_for_token() -> None:
    """50 tokens, the rows alone and as one batch padded on the left."""
    pruned, draws = sparse(NAME, SHARES), reference.Draws()
    lengths = [44, 13, 43]
    prompts = draws.prompts(dense(NAME), SHARES, lengths, 50)
    for (ids, row), length in zip(prompts, lengths, strict=True):
        found = pruned.generate(ids[None], max_new_tokens=50, do_sample=False)
        assert found[0, length:].tolist() == row.tokens
    ids, mask = padded([ids for ids, _ in prompts], [0, 31, 1], [0, 0, 0])
    found = pruned.generate(ids, attention_mask=mask, max_new_tokens=50, do_sample=False)
    assert found[:, 44:].tolist() == [row.tokens for _, row in prompts]


def test_it_trains() -> None:
    """Everything kept: the dense gradients; pruned: a gradient for every weight that is used."""
    model = MINIMAX.build().train()
    whole = simba_fx.transform(model, keep_all(5), kernels="model", criterion="simba")
    pruned = simba_fx.transform(model, SHARES)
    ids = tokens(2, 2, 40)
    found = []
    for one in (model, whole, pruned):
        loss = one(input_ids=ids, labels=ids, use_cache=False).loss
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for name, own, other, cut in zip(dict(model.named_parameters()), *found):
        assert (own is None) == (other is None) == (cut is None), name
        if own is not None:
            assert torch.equal(own, other), name
            assert cut.isfinite().all()


def test_it_compiles_for_every_length() -> None:
    torch._dynamo.reset()
    pruned = sparse(NAME, SHARES)
    compiled = torch.compile(pruned, backend="aot_eager")
    with torch.no_grad():
        compiled(tokens(1, 2, 30), use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (17, 64, 90):
                ids = tokens(length, 2, length)
                assert_close("logits", compiled(ids, use_cache=False).logits, pruned(ids, use_cache=False).logits, 1e-5)
    torch._dynamo.reset()


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    pruned, ids = sparse(NAME, SHARES), tokens(4, 1, 40)
    simba_fx.save(pruned, tmp_path)
    with torch.no_grad():
        assert torch.equal(simba_fx.load(tmp_path)(ids).logits, pruned(ids).logits)


def test_report_and_flops() -> None:
    said = str(simba_fx.report(sparse(NAME, SHARES), tokens(4, 1, 40)))
    assert said.count("ssd scan") == 3
    assert "model.layers.4" in said


def test_several_tokens_on_a_warm_cache_are_refused() -> None:
    pruned, ids = sparse(NAME, SHARES), tokens(4, 1, 40)
    with torch.no_grad():
        warm = pruned(ids, use_cache=True)
        with pytest.raises(InputError, match="Several new tokens on a warm MiniMaxCache, whose states this package"):
            pruned(ids[:, :5], use_cache=True, **{cache_name(pruned): warm[cache_name(pruned)]})
