"""The gated delta rule against float64 loops: values, gradients, and what each token adds to the output at a query."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ops import OPS, assert_close, check_gradients, selective_operands
from torch import Tensor
from torch.library import opcheck

from simba_fx import ops
from simba_fx.errors import CriterionError
from simba_fx.ops import backends, reference
from simba_fx.ops.cuda import packages

SHAPES = [
    {"length": 1, "heads": 1, "groups": 1, "width": 1, "size": 1},
    {"length": 9, "heads": 4, "groups": 2},
    {"length": 64, "heads": 2, "groups": 2, "decay": 0.01},
    {"length": 70, "heads": 6, "groups": 2, "width": 5, "decay": 30.0, "rows": 1},
    {"length": 1, "by_channel": True},
    {"length": 37, "heads": 2, "groups": 2, "size": 5, "by_channel": True},
    {"length": 40, "heads": 4, "groups": 1, "decay": 30.0, "by_channel": True, "rows": 1},
]


def delta_operands(
    rows: int = 2, length: int = 9, heads: int = 4, groups: int = 2, width: int = 3, size: int = 8, decay: float = 1.0,
    by_channel: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Normalised keys and queries; v and beta are parts of one tensor each, as models have them."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    q, k = (torch.nn.functional.normalize(normal(rows, length, groups, size), dim=3) for _ in "qk")
    v, _ = normal(rows, length, heads, 2 * width).to(dtype).split(width, dim=3)
    g = -decay * torch.rand(rows, length, heads, *(size,) * by_channel, generator=random)
    return {"v": v, "q": q, "k": k, "g": g, "beta": torch.rand(rows, length, heads, generator=random)}


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: dict[str, Any], chunk_size: int) -> None:
    oracle = lambda *given: reference.delta_scan_ref(*given[:5])  # noqa: E731
    check_gradients(ops.delta_scan, oracle, delta_operands(**shape), (chunk_size,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    operands = delta_operands(length=70, dtype=dtype)
    y, last = ops.delta_scan(*operands.values())
    right, right_last = reference.delta_scan_ref(*operands.values())
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert_close("y", y, right, dtype)
    assert_close("last state", last, right_last)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("criterion", ["simba", "simba-abs", "simba-l2", "no-decay"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(shape: dict[str, Any], criterion: str, side: str) -> None:
    operands = delta_operands(**shape)
    rows, length = operands["v"].shape[:2]
    real = None
    if side != "none":
        counts = torch.tensor([max(1, length - 3), length])[-rows:, None]
        slots = torch.arange(length)
        real = slots < counts if side == "right" else slots >= length - counts
    scored = dict(operands, g=torch.zeros_like(operands["g"])) if criterion == "no-decay" else operands
    for tail in (1, 3):
        query = ops.query_position(real, tail, rows=rows, length=length)
        got = ops.delta_token_score(*operands.values(), 4, real, tail, criterion)
        shares = reference.delta_contributions_ref(*scored.values(), query.clamp(min=0)).flatten(2)
        best = {"simba-abs": shares.abs().amax(2), "simba-l2": shares.pow(2).sum(2).sqrt()}.get(
            criterion, shares.amax(2)
        )
        assert_close("score", got, torch.where(torch.arange(length) <= query[:, None], best, 0.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_removal_is_what_the_output_loses_without_a_tokens_write_and_erase(shape: dict[str, Any]) -> None:
    """In float64, with `beta` 0 for one token after the other; another query in each row."""
    operands = delta_operands(**shape)
    rows, length = operands["v"].shape[:2]
    real = torch.arange(length) < torch.tensor([max(1, length - 3), length])[-rows:, None]
    got = ops.delta_token_score(*operands.values(), 4, real, 1, "removal")
    query = ops.query_position(real, 1, rows=rows, length=length)
    double = {name: operand.double() for name, operand in operands.items()}
    whole, at = reference.delta_scan_ref(*double.values())[0], (torch.arange(rows), query)
    expected = torch.zeros(rows, length, dtype=torch.float64)
    for t in range(length):
        beta = double["beta"].clone()
        beta[:, t] = 0
        lost = (whole - reference.delta_scan_ref(*(double | {"beta": beta}).values())[0])[at]
        expected[:, t] = torch.where(t <= query, lost.flatten(1).amax(1), 0.0)
    assert_close("score", got, expected)


def test_a_token_that_only_erases_counts_by_removal_alone() -> None:
    operands = delta_operands(length=12, heads=1, groups=1, decay=0.01)
    operands["k"][:, 7] = operands["k"][:, 2] = operands["q"][:, 11]
    operands["v"][:, 7], operands["beta"][:, (2, 7)] = 0, 1
    scores = {name: ops.delta_token_score(*operands.values(), 64, None, 1, name) for name in ("simba-abs", "removal")}
    assert scores["simba-abs"][:, 7].abs().max() == 0
    assert (scores["removal"][:, 7] > 0.1 * operands["v"][:, 2].abs().amax((1, 2)) - 1).all()
    assert scores["removal"][:, 7].abs().min() > 0


def test_other_scans_have_no_removal() -> None:
    operands = selective_operands()
    five = [operands[name] for name in ("u", "delta", "A", "B", "C")]
    with pytest.raises(
        CriterionError, match="this scan can be scored by simba, simba-abs, simba-l2, write, no-decay, delta-norm, clip"
    ):
        OPS.selective_token_score(*five, None, True, None, 1, "removal")


def test_contributions_sum_to_the_output_at_two_queries_of_a_batch() -> None:
    operands, query = delta_operands(length=20), torch.tensor([19, 11])
    y, _ = reference.delta_scan_ref(*operands.values())
    total = reference.delta_contributions_ref(*operands.values(), query).sum(1)
    assert_close("sum", total, torch.stack([y[0, 19], y[1, 11]]), torch.float32)


def test_a_needle_survives_and_one_that_was_overwritten_does_not() -> None:
    """Value 7 under a key that no other token has; then the same key written once more."""
    operands = delta_operands(rows=1, length=40, heads=1, groups=1, size=64, decay=0.001, seed=3)
    needle = operands["k"][0, 10, 0].clone()
    operands["q"][0, -1, 0] = needle
    operands["v"][0, 10] = 7.0
    operands["beta"][:] = 0.05
    operands["beta"][0, 10] = 1.0
    score = ops.delta_token_score(*operands.values(), 16, None, 1, "simba")
    assert score.argmax() == 10
    operands["k"][0, 30, 0], operands["beta"][0, 30] = needle, 1.0
    operands["v"][0, 30] = 5.0
    score = ops.delta_token_score(*operands.values(), 16, None, 1, "simba")
    assert score.argmax() == 30
    assert score[0, 10] < 0.02 * score[0, 30]


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flas_scan_is_called_as_it_is_documented(
    dtype: torch.dtype, by_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, in half precision: as many heads of keys as of values, one dtype, float32 gates, no scale."""
    calls = []

    def chunk(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: Any = None, initial_state: Any = None,
        output_final_state: bool = False, **others: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert (scale, initial_state, output_final_state, others) == (1.0, None, True, {})
        assert {q.dtype, k.dtype, v.dtype} == {dtype}
        assert {g.dtype, beta.dtype} == {torch.float32}
        assert q.shape == k.shape == (*v.shape[:3], 8)
        calls.append(g.dim())
        y, state = reference.delta_scan_ref(v, q, k, g, beta)
        return y.to(dtype), state.float()

    monkeypatch.setattr(backends, "on_gpu", lambda operand: True)
    monkeypatch.setattr(backends, "triton_kernels", lambda: None)
    monkeypatch.setattr(packages, "delta_rule_fn", lambda by_channel=False: chunk)
    operands = delta_operands(length=20, dtype=dtype, by_channel=by_channel)
    with torch.no_grad():
        y, last = ops.delta_scan(*operands.values())
    right, right_last = reference.delta_scan_ref(*operands.values())
    assert (y.dtype, last.dtype, calls) == (dtype, torch.float32, [3 + by_channel])
    assert_close("y", y, right, dtype)
    assert_close("last state", last, right_last, dtype)
    leaves = [operand.detach().requires_grad_() for operand in operands.values()]
    results, expected = ops.delta_scan(*leaves), reference.delta_scan_ref(*leaves)
    arriving = [torch.randn(r.shape, generator=torch.Generator().manual_seed(3)).to(r.dtype) for r in results]
    got = torch.autograd.grad(results, leaves, arriving)
    for name, a, b in zip(operands, got, torch.autograd.grad(expected, leaves, [g.double() for g in arriving])):
        assert_close(f"gradient of {name}", a, b, dtype)
    assert len(calls) == 3  # forward and backward
    ops.delta_scan(*delta_operands(length=20, by_channel=by_channel).values())
    assert len(calls) == 3  # float32: PyTorch's


def test_the_operators_are_well_formed() -> None:
    operands = [t.detach().requires_grad_() for t in delta_operands(length=10).values()]
    opcheck(OPS.delta_scan, (*operands, 4))
    opcheck(OPS.delta_token_score, (*[t.detach() for t in operands], 4, None, 1, "simba"))


@torch.inference_mode()
def test_inference_mode() -> None:
    operands = delta_operands(length=10)
    assert ops.delta_scan(*operands.values())[0].shape == (2, 10, 4, 3)
