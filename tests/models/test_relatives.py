"""Families that call the scan functions of others, and MiniMax, whose cache is of a class of its own: what
`test_families` asks of each family, as far as it does not take the usual cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from models import (
    MINIMAX,
    RELATIVES,
    VOCABULARY,
    Entry,
    dense,
    keep_all,
    linear,
    n_blocks,
    names,
    padded,
    sparse,
    three_rows,
    tokens,
)
from reference import assert_close, cache_name, held
from torch import Tensor

import simba_fx
from simba_fx.capture.scan_functions.minimax import lightning_attention
from simba_fx.errors import CaptureError, InputError
from simba_fx.ops import reference as loops

every_relative = pytest.mark.parametrize("entry", RELATIVES, ids=names(RELATIVES))


@every_relative
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.capability("parity")
def test_keeping_everything_gives_the_dense_bits(entry: Entry, masked: bool) -> None:
    model = dense(entry.name)
    pruned = sparse(entry.name, keep_all(n_blocks(model)), kernels="model")
    assert simba_fx.program(pruned).cuts
    with torch.no_grad():
        expected, found = (one(**three_rows(masked), use_cache=True) for one in (model, pruned))
    assert torch.equal(found.logits, expected.logits)
    ours, theirs = (one[cache_name(model)] for one in (found, expected))
    assert type(ours) is type(theirs)
    assert len(held(ours)) >= n_blocks(model)
    assert all(torch.equal(a, b) for a, b in zip(held(ours), held(theirs), strict=True))


@every_relative
@pytest.mark.parametrize("kernels", ["auto", "model"])
@pytest.mark.capability("padding")
def test_a_row_of_a_batch_is_its_own_blocks_on_the_tokens_that_add_most(entry: Entry, kernels: str) -> None:
    model, shares = dense(entry.name), linear(entry)
    pruned, draws = sparse(entry.name, shares, kernels=kernels), reference.Draws()

    def rows(seed: int) -> tuple[Tensor, Tensor]:
        return padded([tokens(10 * seed, 40), tokens(10 * seed + 1, 33)], [0, 7], [0, 0])

    with torch.no_grad():
        ids, mask, expected = draws.first(model, shares, rows, use_cache=True)
        assert mask is not None
        found = pruned(input_ids=ids, attention_mask=mask)
    for block, right in zip(simba_fx.kept(pruned), expected.kept, strict=True):
        assert [row[row >= 0].tolist() for row in block] == right
    assert len({len(block[0]) for block in expected.kept}) > 2
    for b, real in enumerate(mask.bool()):
        assert_close(f"row {b}", found.logits[b, real], expected.logits[b, real], 1e-4)


@every_relative
@pytest.mark.capability("generate")
def test_greedy_generation_equals_the_reference_token_for_token(entry: Entry) -> None:
    reference.Draws().check_generation(sparse(entry.name, linear(entry)), dense(entry.name), linear(entry))


@every_relative
@pytest.mark.capability("train")
def test_it_trains(entry: Entry) -> None:
    """Everything kept: the dense gradients, bit for bit; pruned: the reference's."""
    model = entry.build().train()
    whole = simba_fx.transform(model, keep_all(n_blocks(model)), kernels="model", criterion="simba")
    named, found = dict(model.named_parameters()), []
    for one in (model, whole):
        logits = one(**three_rows(True), use_cache=False).logits
        found.append(torch.autograd.grad(logits.square().mean(), list(named.values()), allow_unused=True))
    for name, own, other in zip(named, *found):
        assert (own is None) == (other is None), name
        assert own is None or torch.equal(own, other), name
    model, shares = dense(entry.name), linear(entry)
    ids, _, expected = reference.Draws().first(model, shares, lambda seed: tokens(seed, 1, 40))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    logits = sparse(entry.name, shares)(input_ids=ids, use_cache=False).logits[0]
    every = [torch.autograd.grad(one.square().mean(), weights, allow_unused=True)
             for one in (logits, expected.rows[0].logits)]  # fmt: skip
    for own, other in zip(*every, strict=True):
        if other is not None and other.abs().max() > 1e-6:
            assert_close("gradient", own, other, reference.GRADIENT_TOLERANCE[torch.float32])


@every_relative
@pytest.mark.capability("compile")
def test_it_compiles_for_every_length(entry: Entry) -> None:
    torch._dynamo.reset()
    pruned = sparse(entry.name, linear(entry))
    compiled = torch.compile(pruned, backend="aot_eager")
    with torch.no_grad():
        compiled(tokens(1, 2, 30), use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows, length in ((2, 17), (5, 64), (3, 90)):
                ids = tokens(length, rows, length)
                assert_close("logits", compiled(ids, use_cache=False).logits, pruned(ids, use_cache=False).logits, 1e-5)
    torch._dynamo.reset()


@every_relative
def test_it_is_saved_loaded_and_reported(entry: Entry, tmp_path: Path) -> None:
    pruned, ids = sparse(entry.name, linear(entry)), tokens(4, 1, 40)
    simba_fx.save(pruned, tmp_path)
    loaded = simba_fx.load(tmp_path)
    with torch.no_grad():  # LaraMini's experts themselves round otherwise where their weights were read from a file
        assert_close("logits", loaded(ids).logits, pruned(ids).logits, 1e-5)
    assert all(torch.equal(*held) for held in zip(simba_fx.kept(loaded), simba_fx.kept(pruned), strict=True))
    said = str(simba_fx.report(pruned, ids))
    title = {"ssd": "ssd scan", "delta": "delta rule"}[entry.kind]
    assert said.count(title) >= len(simba_fx.program(pruned).cuts) > 0


# MiniMax alone.


@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_lightning_attention_is_the_scan_of_mamba_2(length: int) -> None:
    """A float64 loop, by the operands that its row gives."""
    attention: Any = dense(MINIMAX.name).get_submodule("model.layers.1.self_attn")
    q, k, v = torch.randn(3, 2, 4, length, 8, generator=torch.Generator().manual_seed(length))
    decays = attention.slope_rate, attention.query_decay, attention.key_decay, attention.diagonal_decay
    y, state = lightning_attention(q, k, v, *decays, attention.block_size)
    x, B, C = (operand.transpose(1, 2) for operand in (v, k, q))
    steps = torch.ones(2, length, 4)
    right, last = loops.ssd_scan_ref(x, steps, -attention.slope_rate.flatten(), B, C, None, None, None, False, 0.0, 9.0)
    assert_close("y", y.transpose(1, 2), right, 1e-5)
    assert_close("state", state.mT, last, 1e-5)


def test_several_tokens_on_a_warm_cache_of_its_own_are_refused() -> None:
    pruned, ids = sparse(MINIMAX.name, linear(MINIMAX)), tokens(4, 1, 40)
    with torch.no_grad():
        warm = pruned(ids, use_cache=True)[cache_name(pruned)]
        with pytest.raises(InputError, match="Several new tokens on a warm MiniMaxCache, whose states this package"):
            pruned(ids[:, :5], use_cache=True, **{cache_name(pruned): warm})


# Refused.


def test_attention_by_pools_of_tokens_is_refused_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLM-5.3: Kimi delta attention, and sparse attention whose pools survivors would make anew."""
    if not hasattr(transformers, "Glm5NextTextModel"):
        pytest.skip(f"transformers {transformers.__version__} has no GLM-5.3")
    config = transformers.Glm5NextTextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=8, v_head_dim=8, qk_nope_head_dim=8, index_topk=16, index_head_dim=8, index_n_heads=2,
        linear_head_dim=8, linear_num_heads=2, index_kpool=4, pad_token_id=0, hc_mult=2,
    )  # fmt: skip
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(
        CaptureError, match=r"\.layers\.3\.self_attn\.indexer \(Glm5NextTextIndexer\) chooses keys by po"
    ):
        simba_fx.transform(transformers.Glm5NextTextModel(config), "linear")
