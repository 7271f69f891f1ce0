"""The operators against naive float64 loops: values, gradients, layouts, scores, selections, and `opcheck` for each."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from simba_fx import ops
from simba_fx.errors import CriterionError
from simba_fx.ops import backends, chunked_ssd, reference
from simba_fx.ops.cpu import native
from simba_fx.ops.cuda import packages as cuda
from simba_fx.ops.operands import SSDScan
from simba_fx.schedule import kept_count

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Largest relative RMS error, by the dtype of the operands: the only tolerances of these tests."""

OPS = torch.ops.simba_fx


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on the C++ kernels and on the PyTorch path."""
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: "switched off by a test")
    elif native.kernels() is None:
        pytest.skip(f"no native kernels: {native.load()}")
    torch.manual_seed(0)
    return str(request.param)


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).pow(2).mean().sqrt()
    scale = expected.double().pow(2).mean().sqrt()
    assert error <= TOLERANCE[dtype] * scale + 1e-30, f"{name}: relative RMS error {error / scale:.2e} in {dtype}"


def selective_operands(
    rows: int = 2,
    channels: int = 5,
    length: int = 9,
    states: int = 4,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    channel_last: bool = True,
    decay: float = 4.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Operands of a selective scan; u and z are halves of one `(B, L, 2D)` tensor when `channel_last`."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    u, z = normal(rows, length, 2 * channels).to(dtype).transpose(1, 2).split(channels, dim=1)
    grouped = (rows, length, states) if groups == 1 else (rows, groups, length, states)
    B, C = (normal(*grouped).to(dtype).transpose(-1, -2) for _ in "BC")
    operands = {
        "u": u,
        "delta": normal(rows, channels, length).to(dtype),
        "A": -decay * torch.rand(channels, states, generator=random),
        "B": B,
        "C": C,
        "D": normal(channels),
        "z": z,
        "delta_bias": normal(channels),
    }
    return operands if channel_last else {name: t.contiguous() for name, t in operands.items()}


def ssd_operands(
    rows: int = 2,
    length: int = 9,
    heads: int = 4,
    width: int = 3,
    groups: int = 2,
    states: int = 4,
    dtype: torch.dtype = torch.float32,
    skip_per_channel: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Operands of an SSD scan; x and z are halves of one tensor."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x, z = normal(rows, length, heads, 2 * width).to(dtype).split(width, dim=3)
    return {
        "x": x,
        "dt": normal(rows, length, heads).to(dtype),
        "A": -4 * torch.rand(heads, generator=random),
        "B": normal(rows, length, groups, states).to(dtype),
        "C": normal(rows, length, groups, states).to(dtype),
        "D": normal(heads, width) if skip_per_channel else normal(heads),
        "z": z,
        "dt_bias": normal(heads),
    }


def check_gradients(
    operator: Callable[..., Any],
    oracle: Callable[..., Any],
    operands: dict[str, Any],
    flags: tuple[Any, ...],
    as_good_as: torch.dtype = torch.float32,
) -> None:
    """Values, to the tolerance of `as_good_as`, and every operand's gradient, with one arriving at each output."""
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items() if t is not None}
    arguments = [leaves.get(name) for name in operands]
    results, expected = operator(*arguments, *flags), oracle(*arguments, *flags)
    results, expected = (r if isinstance(r, tuple) else (r,) for r in (results, expected))
    random = torch.Generator().manual_seed(7)
    arriving = [torch.randn(r.shape, generator=random).to(r.device) for r in results]
    got = torch.autograd.grad(results, list(leaves.values()), [g.to(r.dtype) for g, r in zip(arriving, results)])
    want = torch.autograd.grad(expected, list(leaves.values()), [g.double() for g in arriving])
    for i, (actual, right) in enumerate(zip(results, expected)):
        assert_close(f"output {i}", actual, right, as_good_as)
    for name, actual, right in zip(leaves, got, want):
        assert actual.dtype == leaves[name].dtype
        assert_close(f"gradient of {name}", actual, right)


SELECTIVE_SHAPES = [
    {"length": 1, "states": 1, "channels": 1},
    {"length": 2, "channels": 16, "states": 16, "rows": 1},
    {"length": 31, "channels": 17, "states": 3},
    {"length": 33, "channels": 40, "states": 16, "groups": 2},
    {"length": 70, "channels": 12, "states": 20, "groups": 3, "decay": 60.0},
    {"length": 64, "channels": 6, "states": 4, "decay": 1e-3},
]


@pytest.mark.parametrize("shape", SELECTIVE_SHAPES, ids=str)
@pytest.mark.parametrize("channel_last", [True, False])
def test_selective_scan_and_its_gradients(shape: dict[str, Any], channel_last: bool, backend: str) -> None:
    operands = selective_operands(**shape, channel_last=channel_last)
    check_gradients(ops.selective_scan, reference.selective_scan_ref, operands, (True,))


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias"])
def test_selective_scan_without_an_operand(absent: str, backend: str) -> None:
    operands = {**selective_operands(length=19, channels=18), absent: None}
    operands["delta"] = operands["delta"].abs()
    if operands["delta_bias"] is not None:
        operands["delta_bias"] = operands["delta_bias"].abs()
    check_gradients(ops.selective_scan, reference.selective_scan_ref, operands, (False,))


SSD_SHAPES = [
    {"length": 1, "heads": 1, "width": 1, "groups": 1, "states": 1},
    {"length": 37, "heads": 4, "width": 5, "groups": 2, "states": 3, "skip_per_channel": True},
    {"length": 70, "heads": 2, "width": 33, "groups": 1, "states": 16, "rows": 1},
    {"length": 16, "heads": 6, "width": 17, "groups": 3, "states": 8},
]


@pytest.mark.parametrize("shape", SSD_SHAPES, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 16, 256])
def test_ssd_scan_and_its_gradients(shape: dict[str, Any], chunk_size: int, backend: str) -> None:
    def oracle(*arguments: Any) -> Any:
        return reference.ssd_scan_ref(*arguments[:-1])

    check_gradients(ops.ssd_scan, oracle, ssd_operands(**shape), (True, 0.1, 1.5, chunk_size))


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias"])
def test_ssd_scan_without_an_operand(absent: str, backend: str) -> None:
    operands = {**ssd_operands(length=19), absent: None}
    operands["dt"] = operands["dt"].abs()
    check_gradients(ops.ssd_scan, reference.ssd_scan_ref, operands, (False, 0.0, float("inf")))


@pytest.mark.parametrize(("length", "channels", "width"), [(1, 1, 4), (2, 16, 4), (70, 35, 4), (9, 5, 1), (65, 18, 7)])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_causal_conv1d_and_its_gradients(
    length: int, channels: int, width: int, activation: str, with_bias: bool, backend: str
) -> None:
    operands = {
        "x": torch.randn(2, length, 2 * channels)[..., :channels].transpose(1, 2),
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels) if with_bias else None,
    }
    check_gradients(ops.causal_conv1d, reference.causal_conv1d_ref, operands, (activation,))


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="'none' or 'silu', got 'gelu'"):
        ops.causal_conv1d(torch.ones(1, 1, 1), torch.ones(1, 1), None, "gelu")


@contextmanager
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_torchs_defaults_change_nothing(backend: str) -> None:
    """As while a large model is built: another default dtype, another default device."""
    selective = selective_operands(length=33, channels=20)
    ssd = ssd_operands(length=70)
    leaves = [t.detach().requires_grad_() for t in selective.values()]
    heads = [t.detach().requires_grad_() for t in ssd.values()]
    scored = [selective[name] for name in ("u", "delta", "A", "B", "C", "delta_bias")]
    scored_heads = [ssd[name] for name in ("x", "dt", "A", "B", "C", "dt_bias")]
    ones = torch.ones(2, 20, 33), torch.ones(2, 70, 4, 3)
    weight = torch.ones(20, 4).requires_grad_()

    def everything() -> list[Tensor]:
        y, last = ops.selective_scan(*leaves, True)
        heads_y, heads_last = ops.ssd_scan(*heads, True)
        conv = ops.causal_conv1d(leaves[0], weight)
        score = ops.selective_token_score(*scored, True, None, 1, "simba")
        heads_score = ops.ssd_token_score(*scored_heads, True, 0.0, 9.0, None, 1, "simba")
        kept = ops.select_tokens(score, torch.arange(33, device="cpu").expand(2, 33), 33, 1, 1, 2, 4)
        gradients = torch.autograd.grad((y, conv), [*leaves, weight], (ones[0], ones[0]))
        return [y, last, heads_y, heads_last, conv, score, heads_score, *kept, *gradients,
                *torch.autograd.grad(heads_y, heads, ones[1])]  # fmt: skip

    expected = everything()
    with other_defaults():
        found = everything()
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_low_precision_operands_are_computed_in_float32(dtype: torch.dtype, backend: str) -> None:
    selective = selective_operands(length=33, channels=20, dtype=dtype)
    y, last = ops.selective_scan(*selective.values(), True)
    right, right_last = reference.selective_scan_ref(*selective.values(), True)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert_close("y", y, right, dtype)
    assert_close("last_state", last, right_last)  # never rounded to dtype: the float32 tolerance holds
    ssd = ssd_operands(length=33, width=20, dtype=dtype)
    y, last = ops.ssd_scan(*ssd.values(), True)
    right, right_last = reference.ssd_scan_ref(*ssd.values(), True)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert_close("y", y, right, dtype)
    assert_close("last_state", last, right_last)
    x, weight = selective["u"], torch.randn(20, 4).to(dtype)
    conv = ops.causal_conv1d(x, weight)
    assert conv.dtype == dtype
    assert_close("conv", conv, reference.causal_conv1d_ref(x, weight), dtype)


def test_decay_of_any_strength_stays_exact(backend: str) -> None:
    """Cumulative products underflow here at once; a path that divided by one would give NaN."""
    operands = selective_operands(length=70, channels=3, decay=1e4)
    y, last = ops.selective_scan(*operands.values(), True)
    right, right_last = reference.selective_scan_ref(*operands.values(), True)
    assert_close("y", y, right)
    assert_close("last_state", last, right_last)
    heads = ssd_operands(length=70)
    heads["A"] = heads["A"] * 1e4
    assert_close("y", ops.ssd_scan(*heads.values(), True)[0], reference.ssd_scan_ref(*heads.values(), True)[0])


def test_channel_outputs_are_channel_last_on_cpu(backend: str) -> None:
    operands = selective_operands(rows=2, channels=5, length=9)
    y, _ = ops.selective_scan(*operands.values(), True)
    assert y.stride() == (45, 1, 5)
    assert ops.causal_conv1d(operands["u"], torch.ones(5, 4)).stride() == (45, 1, 5)
    assert ops.ssd_scan(*ssd_operands().values(), True)[0].is_contiguous()


def grad(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def sample_arguments() -> dict[str, tuple[Any, ...]]:
    """One call of every operator, gradients wanted wherever there can be some."""
    s = {name: grad(t) for name, t in selective_operands().items()}
    h = {name: grad(t) for name, t in ssd_operands().items()}
    rows, length = 2, 9
    real = torch.ones(rows, length, dtype=torch.bool)
    real[0, :2] = False
    positions = torch.arange(length).repeat(rows, 1)
    score = torch.randn(rows, length)
    dy, dlast = torch.randn(2, 5, 9), torch.randn(2, 5, 4)
    dyh, dlasth = torch.randn(2, 9, 4, 3), torch.randn(2, 4, 3, 4)
    plain = [t.detach() for t in s.values()]
    heads = [t.detach() for t in h.values()]
    scan = [s[name] for name in ("u", "delta", "A", "B", "C", "delta_bias")]
    ssd = [h[name] for name in ("x", "dt", "A", "B", "C", "dt_bias")]
    weight, bias = torch.randn(5, 4), torch.randn(5)
    count = (length, 1, 1, 2, 1)
    return {
        "selective_scan": (*s.values(), True),
        "selective_scan_backward": (dy, dlast, *plain, True),
        "ssd_scan": (*h.values(), True, 0.1, 1.5, 4),
        "ssd_scan_backward": (dyh, dlasth, *heads, True, 0.1, 1.5, 4),
        "causal_conv1d": (s["u"], grad(weight), grad(bias), "silu"),
        "causal_conv1d_backward": (dy, plain[0], weight, bias, "silu"),
        "selective_token_score": (*scan, True, real, 1, "simba"),
        "ssd_token_score": (*ssd, True, 0.0, 2.0, real, 1, "simba"),
        "pool_scores": (score, real, 1, 3),
        "rank_scores": (score, real, 1),
        "select_tokens": (score, positions, *count),
        "select_real_tokens": (score, positions, real, real.sum(1), *count),
        "position_score": (positions, real, real.sum(1), *count, "random", 3),
        "take_square": (
            torch.randn(rows, 3, length, length),
            positions[:, ::2].contiguous(),
            real[:, ::2].contiguous(),
        ),
    }


@pytest.mark.filterwarnings("ignore")  # torch's own test utilities warn about their internals
@pytest.mark.parametrize("name", sample_arguments())
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fake kernel and AOT dispatch with dynamic shapes."""
    opcheck(getattr(OPS, name), sample_arguments()[name])


def test_opcheck_of_absent_operands() -> None:
    s, h = selective_operands(), ssd_operands()
    opcheck(OPS.selective_scan, tuple(grad(s[name]) for name in ("u", "delta", "A", "B", "C")))
    opcheck(OPS.ssd_scan, tuple(grad(h[name]) for name in ("x", "dt", "A", "B", "C")))
    opcheck(OPS.causal_conv1d, (grad(s["u"]), grad(torch.randn(5, 4))))


def test_every_operator_is_checked_and_documented() -> None:
    modules = (ops.scan, ops.score, ops.pool, ops.select)
    defined = {op._name for module in modules for op in vars(module).values() if isinstance(op, CustomOpDef)}
    assert defined == set(sample_arguments())
    for name in ops.__all__:
        assert inspect.getdoc(getattr(ops, name)), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_mask_over_pairs_is_taken_at_the_survivors_places(dtype: torch.dtype, heads: int) -> None:
    """Against indexing in a loop; position 9, outside the input, is a masked token's and no key for anyone."""
    square = (
        (torch.randn(2, heads, 9, 9) > 0).to(dtype) if dtype == torch.bool else torch.randn(2, heads, 9, 9).to(dtype)
    )
    positions = torch.tensor([[1, 4, 8, 9], [0, 2, 3, 7]])
    real = torch.tensor([[True, True, True, False], [False, True, True, True]])
    masked = torch.tensor(False) if dtype == torch.bool else torch.tensor(torch.finfo(dtype).min, dtype=dtype)
    found, unpadded = (
        ops.take_square(square, positions, real),
        ops.take_square(square, positions[1:].repeat(2, 1), None),
    )
    for b, row in enumerate(positions.tolist()):
        for i, j in itertools.product(range(4), range(4)):
            query, key = min(row[i], 8), min(row[j], 8)
            wanted = square[b, :, query, key] if real[b, j] else masked.expand(heads)
            assert torch.equal(found[b, :, i, j], wanted)
            assert torch.equal(unpadded[b, :, i, j], square[b, :, positions[1, i], positions[1, j]])


def ungated(operands: dict[str, Any]) -> list[Any]:
    """A scan's operands without skip and gate."""
    return [None if name in ("D", "z") else operand for name, operand in operands.items()]


def contributions(operands: dict[str, Any], query: Tensor) -> Tensor:
    names = ("u", "delta", "A", "B", "C", "delta_bias")
    return reference.selective_contributions_ref(*(operands[name] for name in names), True, query)


def ssd_contributions(operands: dict[str, Any], query: Tensor) -> Tensor:
    names = ("x", "dt", "A", "B", "C", "dt_bias")
    return reference.ssd_contributions_ref(*(operands[name] for name in names), True, 0.1, 1.5, query)


@pytest.mark.parametrize("length", [1, 7, 40])
def test_contributions_sum_to_the_output(length: int) -> None:
    """The sum rule of method.md section 2, before skip and gate, for both families."""
    query = torch.full((2,), length - 1)
    s, h = selective_operands(length=length), ssd_operands(length=length)
    y, _ = reference.selective_scan_ref(*ungated(s), True)
    assert_close("y_q", contributions(s, query).sum(-1), y[..., -1])
    y, _ = reference.ssd_scan_ref(*ungated(h), True, 0.1, 1.5)
    assert_close("y_q", ssd_contributions(h, query).sum(1), y[:, -1])


def selective_score(operands: dict[str, Any], real: Tensor | None, tail: int, criterion: str) -> Tensor:
    names = ("u", "delta", "A", "B", "C", "delta_bias")
    return ops.selective_token_score(*(operands[name] for name in names), True, real, tail, criterion)


def ssd_score(operands: dict[str, Any], real: Tensor | None, tail: int, criterion: str) -> Tensor:
    names = ("x", "dt", "A", "B", "C", "dt_bias")
    return ops.ssd_token_score(*(operands[name] for name in names), True, 0.1, 1.5, real, tail, criterion)


@pytest.mark.parametrize("tail", [1, 3])
def test_score_is_the_largest_jacobian_product(tail: int, backend: str) -> None:
    """No formula here: forward-mode differentiation of the reference scan along one token's input at a time."""
    length = 12
    q = length - tail
    s, h = selective_operands(length=length), ssd_operands(length=length)

    def output(u: Tensor) -> Tensor:
        arguments = (s[n].double() for n in ("delta", "A", "B", "C"))
        return reference.selective_scan_ref(u, *arguments, None, None, s["delta_bias"], True)[0][..., q]

    def ssd_output(x: Tensor) -> Tensor:
        arguments = (h[n].double() for n in ("dt", "A", "B", "C"))
        return reference.ssd_scan_ref(x, *arguments, None, None, h["dt_bias"], True, 0.1, 1.5)[0][:, q]

    u, x = s["u"].double(), h["x"].double()
    expected, ssd_expected = torch.zeros(2, length), torch.zeros(2, length)
    for t in range(q + 1):
        alone = torch.zeros_like(u)
        alone[..., t] = u[..., t]
        expected[:, t] = torch.func.jvp(output, (u,), (alone,))[1].amax(1)
        alone = torch.zeros_like(x)
        alone[:, t] = x[:, t]
        ssd_expected[:, t] = torch.func.jvp(ssd_output, (x,), (alone,))[1].amax((1, 2))
    assert_close("score", selective_score(s, None, tail, "simba"), expected)
    assert_close("score", ssd_score(h, None, tail, "simba"), ssd_expected)


def expected_score(
    criterion: str, contribution: Tensor, step: Tensor, y: Tensor, undecayed: Tensor, writes: Tensor
) -> Tensor:
    """By definition, from contributions `(B, D, L)`, steps, ungated outputs, contributions without decay, and what each
    token writes into each state `(B, D, N, L)`."""
    return {
        "simba": contribution.amax(1),
        "simba-abs": contribution.abs().amax(1),
        "simba-l2": contribution.pow(2).sum(1).sqrt(),
        "no-decay": undecayed.amax(1),
        "write": writes.pow(2).sum((1, 2)).sqrt(),
        "delta-norm": step.pow(2).sum(1).sqrt(),
        "clip": y.clamp(min=0).mean(1),
    }[criterion]


@pytest.mark.parametrize("criterion", ops.CRITERIA)
@pytest.mark.parametrize(("length", "tail", "groups"), [(1, 1, 1), (37, 1, 2), (40, 5, 1)])
def test_every_criterion(criterion: str, length: int, tail: int, groups: int, backend: str) -> None:
    query = torch.full((2,), length - tail)
    until = torch.arange(length) <= length - tail
    s = selective_operands(length=length, channels=36, states=5, groups=groups)
    y, _ = reference.selective_scan_ref(*ungated(s), True)
    step = torch.nn.functional.softplus(s["delta"].double() + s["delta_bias"][:, None])
    undecayed = contributions({**s, "A": torch.zeros_like(s["A"])}, query)
    wide = s["B"].double().repeat_interleave(36 // groups, 1) if s["B"].dim() == 4 else s["B"].double().unsqueeze(1)
    writes = (step * s["u"].double()).unsqueeze(2) * wide
    expected = expected_score(criterion, contributions(s, query), step, y, undecayed, writes) * until
    score = selective_score(s, None, tail, criterion)
    assert not score.requires_grad
    assert_close("score", score, expected)
    assert (score[:, length - tail + 1 :] == 0).all()

    h = ssd_operands(length=length, groups=groups)
    y, _ = reference.ssd_scan_ref(*ungated(h), True, 0.1, 1.5)
    step = torch.nn.functional.softplus(h["dt"].double() + h["dt_bias"]).clamp(0.1, 1.5).transpose(1, 2)
    undecayed = ssd_contributions({**h, "A": torch.zeros_like(h["A"])}, query)
    flat = [t.flatten(2).transpose(1, 2) for t in (ssd_contributions(h, query), y, undecayed)]
    heads = h["x"].shape[2]
    keys = h["B"].double().repeat_interleave(heads // h["B"].shape[2], 2)  # (B, L, H, N)
    writes = torch.einsum("bhl,blhp,blhn->bhpnl", step, h["x"].double(), keys).flatten(1, 2)
    expected = expected_score(criterion, flat[0], step, flat[1], flat[2], writes) * until
    assert_close("score", ssd_score(h, None, tail, criterion), expected)


def test_fully_decayed_tokens_score_exactly_zero(backend: str) -> None:
    operands = selective_operands(length=200, channels=20)
    operands["A"] = torch.full_like(operands["A"], -50.0)
    operands["delta"] = torch.full_like(operands["delta"], 2.0)
    score = selective_score(operands, None, 1, "simba-abs")
    assert (score[:, :190] == 0).all()
    assert (score[:, -1] > 0).all()


def test_suffix_sums_keep_the_digits_near_the_query(backend: str) -> None:
    """A prefix of steps near 1e4 in sum would round away steps of 1e-4 before the query; a suffix sum does not."""
    operands = selective_operands(length=64, channels=16, states=1)
    operands["delta"] = torch.full_like(operands["delta"], 1e4)
    operands["delta"][..., -32:] = 1e-4
    operands["A"] = torch.full_like(operands["A"], -1e3)
    operands["delta_bias"] = None
    names = ("u", "delta", "A", "B", "C", "delta_bias")
    arguments = [operands[name] for name in names]
    expected = reference.selective_contributions_ref(*arguments, False, torch.tensor([63, 63])).amax(1)
    assert_close("score", ops.selective_token_score(*arguments, False, None, 1, "simba"), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("criterion", ops.CRITERIA)
def test_a_padded_row_scores_as_it_does_alone(side: str, criterion: str, backend: str) -> None:
    length, own, tail = 24, 15, 2
    at = slice(length - own, length) if side == "left" else slice(0, own)
    real = torch.zeros(2, length, dtype=torch.bool)
    real[0], real[1, at] = True, True
    s, h = selective_operands(length=length, channels=18), ssd_operands(length=length)
    if criterion == "clip":  # the one criterion that reads states: a model's pads leave none
        s["u"], h["x"] = s["u"] * real[:, None], h["x"] * real[..., None, None]
    alone = {name: t[1:, ..., at] if name in ("u", "delta", "B", "C", "z") else t for name, t in s.items()}
    assert_close(
        "score", selective_score(s, real, tail, criterion)[1:, at], selective_score(alone, None, tail, criterion)
    )
    alone = {name: t[1:, at] if name in ("x", "dt", "B", "C", "z") else t for name, t in h.items()}
    assert_close("score", ssd_score(h, real, tail, criterion)[1:, at], ssd_score(alone, None, tail, criterion))


@pytest.mark.parametrize("span", [1, 3, 7, 99])
@pytest.mark.parametrize("tail", [1, 4])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_token_is_worth_the_best_around_it(span: int, tail: int, side: str) -> None:
    score = torch.randn(3, 20, generator=torch.Generator().manual_seed(span))
    score[0, 5], score[1, 9], score[2, 11] = torch.nan, torch.inf, -torch.inf
    at = {"none": slice(None), "left": slice(6, None), "right": slice(0, 14)}[side]
    real = torch.zeros(3, 20, dtype=torch.bool)
    real[:, at] = True
    found = ops.pool_scores(score, None if side == "none" else real, tail, span)
    finite = torch.finfo(torch.float32)
    for row, own in zip(found, score[:, at]):
        before = len(own) - tail + 1
        worth = [-torch.inf if x != x else x for x in own[:before].tolist()]
        best = [max(worth[max(0, t - span // 2) : t + span // 2 + 1]) for t in range(before)]
        assert torch.equal(
            row[at][:before].clamp(finite.min, finite.max), torch.tensor(best).clamp(finite.min, finite.max)
        )
        assert (row[at][before:] == 0).all()
        assert (row[~real[0]] == 0).all()


@pytest.mark.parametrize("tail", [1, 4])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_rank_counts_the_better_tokens(tail: int, side: str) -> None:
    score = torch.randint(-3, 4, (3, 20), generator=torch.Generator().manual_seed(tail)).float()
    score[0, 8], score[1, 9], score[2, 11] = torch.nan, torch.inf, -torch.inf
    at = {"none": slice(None), "left": slice(6, None), "right": slice(0, 14)}[side]
    real = torch.zeros(3, 20, dtype=torch.bool)
    real[:, at] = True
    found = ops.rank_scores(score, None if side == "none" else real, tail)
    for row, own in zip(found, score[:, at]):
        before = len(own) - tail + 1
        worth = [(-torch.inf if x != x else x, t) for t, x in enumerate(own[:before].tolist())]
        assert row[at][:before].tolist() == [-sum(other > one for other in worth) for one in worth]
        assert (row[at][before:] == 0).all()
        assert (row[~real[0]] == 0).all()


def test_scores_let_gradients_of_the_rest_pass() -> None:
    operands = selective_operands()
    u = grad(operands["u"])
    score = selective_score({**operands, "u": u}, None, 1, "simba")
    (u.sum() + score.sum()).backward()
    assert u.grad is not None
    assert (u.grad == 1).all()


def test_unknown_criteria_are_refused_with_the_known_ones() -> None:
    with pytest.raises(CriterionError, match="simba, simba-abs, simba-l2, write, no-decay, delta-norm, clip"):
        selective_score(selective_operands(), None, 1, "best")
    with pytest.raises(CriterionError, match="recent, random, stride"):
        ops.position_score(torch.zeros(1, 1, dtype=torch.int64), None, None, 1, 1, 1, 2, 1, "best", 0)


def test_query_position_counts_real_tokens() -> None:
    real = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    assert ops.query_position(real, 2, rows=3, length=5).tolist() == [3, 1, 3]
    assert ops.query_position(real, 3, rows=3, length=5).tolist() == [2, 0, 2]
    assert ops.query_position(None, 2, rows=2, length=5).tolist() == [3, 3]


def test_flops_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        for name, arguments in sample_arguments().items():
            if not name.startswith(("select_", "position")):
                getattr(OPS, name)(*arguments)
    counted = {str(op).removeprefix("simba_fx."): n for op, n in counter.get_flop_counts()["Global"].items()}
    size, ssd_size, tokens = 2 * 5 * 9 * 4, 2 * 9 * 4 * 3 * 4, 2 * 9
    assert counted == {
        "selective_scan": 6 * size,
        "selective_scan_backward": 19 * size,
        "ssd_scan": 5 * ssd_size,
        "ssd_scan_backward": 14 * ssd_size,
        "causal_conv1d": 2 * 4 * 5 * tokens,
        "causal_conv1d_backward": 4 * 4 * 5 * tokens,
        "selective_token_score": 3 * size,
        "ssd_token_score": 2 * tokens * (2 * 4 + 4 * 3),
    }


@pytest.mark.parametrize(
    ("criterion", "selective", "ssd"),
    [
        ("simba-abs", 3 * 16, 2 * (3 * 6 + 12)),
        ("simba-l2", 3 * 16, 2 * (3 * 6 + 12)),
        ("no-decay", 2 * (4 + 4), 2 * (3 * 6 + 12)),
        ("write", 2 * (4 + 4), 2 * (3 * 6 + 12)),
        ("delta-norm", 2 * 4, 2 * 3),
        ("clip", 6 * 16 + 2 * 4, 5 * 72 + 2 * 12),
    ],
)
def test_flops_of_a_score_are_those_of_its_criterion(criterion: str, selective: int, ssd: int) -> None:
    """Per token: 4 channels of 4 states; and 3 heads of 4 channels, each its own group of 6 states."""
    operands = selective_operands(rows=1, channels=4, states=4, length=10)
    heads = ssd_operands(rows=1, length=10, heads=3, width=4, groups=3, states=6)
    scan = [operands[name] for name in ("u", "delta", "A", "B", "C", "delta_bias")]
    ssd_scan = [heads[name] for name in ("x", "dt", "A", "B", "C", "dt_bias")]
    with FlopCounterMode(display=False) as counter:
        ops.selective_token_score(*scan, True, None, 1, criterion)
        ops.ssd_token_score(*ssd_scan, True, 0.0, 9.0, None, 1, criterion)
    counted = {str(op).removeprefix("simba_fx."): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert (counted["selective_token_score"], counted["ssd_token_score"]) == (10 * selective, 10 * ssd)


# --- Selection -------------------------------------------------------------------------------------------------------

SHARES = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda pq: Fraction(min(pq), max(pq)))
TIED_SCORES = st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf"), float("-inf"), float("nan")])


def order_by_definition(scores: list[float], slots: list[int]) -> list[int]:
    """Best first; of equal scores the later slot; NaN counts as the lowest score."""
    return sorted(slots, key=lambda i: (-float("inf") if scores[i] != scores[i] else scores[i], i), reverse=True)


@given(data=st.data(), slots=st.integers(1, 16), share=SHARES, tail=st.integers(1, 18), floor=st.integers(0, 5))
def test_select_tokens_by_brute_force(data: st.DataObject, slots: int, share: Fraction, tail: int, floor: int) -> None:
    length = data.draw(st.integers(slots, slots + 4))
    scores = data.draw(st.lists(TIED_SCORES, min_size=slots, max_size=slots))
    positions = torch.tensor([sorted(data.draw(st.permutations(range(length)))[:slots])])
    count = (length, tail, share.numerator, share.denominator, floor)
    kept, dropped, kept_at, dropped_at = ops.select_tokens(torch.tensor([scores]), positions, *count)

    k = min(slots, kept_count(length, share, tail, floor))
    protected = list(range(max(0, slots - tail), slots))
    earlier = order_by_definition(scores, list(range(max(0, slots - tail))))
    expected = sorted(protected + earlier[: k - len(protected)]) if tail <= slots else list(range(slots))
    assert kept[0].tolist() == expected
    assert dropped[0].tolist() == [*sorted(set(range(slots)) - set(expected)), 0, 0]
    assert (kept_at[0].tolist(), dropped_at[0].tolist()) == (
        positions[0, kept[0]].tolist(),
        [*positions[0, dropped[0, :-2]].tolist(), length, length],
    )


@pytest.mark.parametrize("slots", range(1, 17))
def test_the_kept_count_for_every_length(slots: int) -> None:
    for share, tail, floor in itertools.product((Fraction(1, 10), Fraction(2, 3), Fraction(1)), (1, 3), (0, 4)):
        count = (slots, tail, share.numerator, share.denominator, floor)
        kept, dropped, _, _ = ops.select_tokens(torch.rand(2, slots), torch.arange(slots).repeat(2, 1), *count)
        assert kept.shape[1] == kept_count(slots, share, tail, floor)
        assert kept.shape[1] + dropped.shape[1] == slots + 2


@given(order=st.permutations(range(12)), share=SHARES)
def test_permuted_scores_keep_the_permuted_tokens(order: list[int], share: Fraction) -> None:
    """Without ties and away from the tail, what a token's rank is decides, not where it stands."""
    scores = torch.arange(12.0)
    positions = torch.arange(13)[None]
    count = (13, 1, share.numerator, share.denominator, 0)
    plain = ops.select_tokens(torch.cat((scores, torch.zeros(1)))[None], positions, *count)[0][0, :-1]
    permuted = ops.select_tokens(torch.cat((scores[order], torch.zeros(1)))[None], positions, *count)[0][0, :-1]
    assert sorted(order[i] for i in permuted.tolist()) == plain.tolist()


@dataclass(frozen=True)
class Chain:
    """Rows of unequal lengths, padded on either side, that go through cuts with non-increasing shares."""

    lengths: list[int]
    left: list[bool]
    shares: list[Fraction]
    tail: int
    floor: int
    scores: Tensor


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    lengths = draw(st.lists(st.integers(1, 18), min_size=1, max_size=4))
    shares = sorted(draw(st.lists(SHARES, min_size=1, max_size=4)), reverse=True)
    values = st.lists(st.sampled_from([-2.0, 0.0, 1.0, 3.0]), min_size=max(lengths), max_size=max(lengths))
    return Chain(
        lengths=lengths,
        left=[draw(st.booleans()) for _ in lengths],
        shares=shares,
        tail=draw(st.integers(1, 6)),
        floor=draw(st.integers(0, 5)),
        scores=torch.tensor([draw(values) for _ in lengths]),
    )


def follow(chain: Chain) -> int:
    """Each row keeps what it keeps alone; order and counts hold; every input position is written exactly once.

    Returns how many masked tokens were met.
    """
    met = 0
    rows, length = len(chain.lengths), max(chain.lengths)
    lengths = torch.tensor(chain.lengths)
    slot = torch.arange(length).expand(rows, -1)
    left = torch.tensor(chain.left)[:, None]
    real = torch.where(left, slot >= length - lengths[:, None], slot < lengths[:, None])
    start = torch.where(left[:, 0], length - lengths, 0)
    positions = slot.clone()
    written: list[list[int]] = [[] for _ in range(rows)]
    alone = [torch.arange(n)[None] for n in chain.lengths]
    for share in chain.shares:
        slots = positions.shape[1]
        count = (length, chain.tail, share.numerator, share.denominator, chain.floor)
        score = chain.scores.gather(1, positions.clamp(max=length - 1))
        score = torch.where(real, score, 100.0)  # a pad may not win, whatever its score
        kept, dropped, kept_at, dropped_at, kept_real = ops.select_real_tokens(score, positions, real, lengths, *count)
        k = min(slots, kept_count(length, share, chain.tail, chain.floor))
        assert kept.shape == kept_real.shape == (rows, k)
        assert dropped.shape == dropped_at.shape == (rows, slots - k + 2)
        for b in range(rows):
            own = chain.lengths[b]
            at = alone[b] + int(start[b])
            row_count = (own, chain.tail, share.numerator, share.denominator, chain.floor)
            alone[b] = ops.select_tokens(chain.scores[b][at], alone[b], *row_count)[2]
            assert kept_at[b][kept_real[b]].tolist() == (alone[b][0] + int(start[b])).tolist()
            extra = [i for i in range(k) if real[b, kept[b, i]] and not kept_real[b, i]]
            # at the end that was padded, also where no pad is left
            assert extra in ([], [0] if chain.left[b] or own == length else [k - 1])
            in_order = [int(i) for j, i in enumerate(kept[b]) if j not in extra]
            assert in_order == sorted(in_order)
            assert (int(dropped[b, -1]), int(dropped_at[b, -1])) == (0, length)
            assert dropped[b, :-2].tolist() == sorted(set(range(slots)) - set(kept[b].tolist()))
            met += len(extra)
            if extra:
                masked = int(kept[b, extra[0]])
                assert (int(kept_at[b, extra[0]]), int(dropped[b, -2])) == (length, masked)
                assert int(dropped_at[b, -2]) == int(positions[b, masked])
            else:
                assert (int(dropped[b, -2]), int(dropped_at[b, -2])) == (0, length)
            written[b] += dropped_at[b].tolist()
        if k == slots and not any(len(alone[b][0]) < int(real[b].sum()) for b in range(rows)):
            assert kept.tolist() == torch.arange(slots).expand(rows, -1).tolist()
        positions, real = kept_at, kept_real
    for b in range(rows):
        everything = [p for p in written[b] + positions[b].tolist() if p != length]
        assert sorted(everything) == list(range(length))
    return met


@given(chain=chains())
def test_a_chain_of_padded_cuts(chain: Chain) -> None:
    follow(chain)


@given(chain=chains(), seed=st.integers(0, 2**40))
def test_position_scores_do_not_depend_on_the_batch(chain: Chain, seed: int) -> None:
    rows, length, share = len(chain.lengths), max(chain.lengths), chain.shares[0]
    lengths, slot = torch.tensor(chain.lengths), torch.arange(length).expand(len(chain.lengths), -1)
    left = torch.tensor(chain.left)[:, None]
    real = torch.where(left, slot >= length - lengths[:, None], slot < lengths[:, None])
    count = (chain.tail, share.numerator, share.denominator, chain.floor)
    for criterion in ops.POSITION_CRITERIA:
        score = ops.position_score(slot.contiguous(), real, lengths, length, *count, criterion, seed)
        for b in range(rows):
            own = chain.lengths[b]
            alone = ops.position_score(torch.arange(own)[None], None, None, own, *count, criterion, seed)[0]
            mine = score[b][real[b]]
            if criterion == "recent":  # slot indices: only their order means anything
                mine, alone = mine - mine[0], alone - alone[0]
            assert mine.tolist() == alone.tolist()
            if criterion == "stride" and own > chain.tail:
                wanted = kept_count(own, share, chain.tail, chain.floor) - chain.tail
                assert mine[: own - chain.tail].sum() == wanted


def test_rows_with_a_pad_too_few_keep_a_masked_token() -> None:
    """Rounding makes some rows drop one token more than a longer one: every pair of lengths up to 16, both sides."""
    shares = [Fraction(5, 6), Fraction(2, 3), Fraction(1, 2), Fraction(1, 3)]
    scores = torch.zeros(2, 16)
    pairs = itertools.combinations(range(1, 17), 2)
    assert sum(follow(Chain([b, a], [False, a % 2 == 0], shares, 1, 1, scores[:, :b])) for a, b in pairs) > 3


def test_random_scores_are_uniform_and_seeded() -> None:
    positions = torch.arange(20000)[None]
    first, again, other = (
        ops.position_score(positions, None, None, 20000, 1, 1, 2, 4, "random", seed)[0] for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert torch.corrcoef(torch.stack((first, other)))[0, 1].abs() < 0.03
    assert torch.corrcoef(torch.stack((first[1:], first[:-1])))[0, 1].abs() < 0.03
    assert torch.histc(first, bins=10, min=0, max=1).sub(2000).abs().max() < 250
    assert 0 <= float(first.min()) <= float(first.max()) < 1


@pytest.mark.parametrize("skip_per_channel", [False, True])
def test_mamba_ssms_ssd_scan_is_called_as_it_is_documented(
    skip_per_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with the raw step; whatever strides its results have, the operator's are those of the fake kernel (a
    compiled graph dies of others)."""

    def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Any = None, z: Any = None,
        dt_bias: Any = None, initial_states: Any = None, seq_idx: Any = None, cu_seqlens: Any = None,
        dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert (initial_states, seq_idx, cu_seqlens, chunk_size, return_final_states) == (None, None, None, 8, True)
        y, last = reference.ssd_scan_ref(x, dt, A, B, C, D, z, dt_bias, dt_softplus, *dt_limit)
        spread = torch.empty(*y.shape, 2, dtype=x.dtype)[..., 1].copy_(y)
        return spread, torch.empty(*last.shape, 2)[..., 0].copy_(last)

    monkeypatch.setattr(backends, "on_gpu", lambda operand: True)
    monkeypatch.setattr(cuda, "ssd_scan_fn", lambda: mamba_chunk_scan_combined)
    operands = ssd_operands(skip_per_channel=skip_per_channel)
    arguments = (*operands.values(), True, 0.1, 1.5, 8)
    y, last = ops.ssd_scan(*arguments)
    right, right_last = reference.ssd_scan_ref(*operands.values(), True, 0.1, 1.5)
    assert_close("y", y, right)
    assert_close("last state", last, right_last)
    assert y.is_contiguous()
    assert last.is_contiguous()
    opcheck(OPS.ssd_scan, arguments)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [5, 300])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_ssd_scans_results_have_the_strides_that_were_promised(
    groups: int, length: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of PyTorch's paths: a state of one group was a view into the states of all chunks, of which a compiled graph of
    a GPU died."""
    monkeypatch.setattr(backends, "on_gpu", lambda operand: on_gpu)
    monkeypatch.setattr(backends, "triton_kernels", lambda: None)
    monkeypatch.setattr(backends, "_native_scan", lambda scan: False)
    monkeypatch.setattr(cuda, "ssd_scan_fn", lambda: None)
    y, last = ops.ssd_scan(*ssd_operands(length=length, groups=groups).values(), True)
    assert y.is_contiguous()
    assert last.is_contiguous()


@pytest.mark.parametrize("operand", ["A", "delta", "delta_bias", "u", "B"])
@pytest.mark.parametrize("softplus", [False, True])
def test_nan_in_nan_out(operand: str, softplus: bool, backend: str) -> None:
    """Also one whose lowest bits are set: an exponential that shifts bits made numbers of it (case 10)."""
    operands = selective_operands(rows=1, channels=20, length=12, states=3)
    odd = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    broken = operands[operand] = operands[operand].clone()
    broken[(0,) * broken.dim()] = odd
    y, last = ops.selective_scan(*operands.values(), softplus)
    affected = slice(None) if operand == "B" else slice(1)
    assert y[0, affected].isnan().all()
    assert last[0, affected, 0].isnan().all()
    assert y[0].isnan().any(1).sum() == (20 if operand == "B" else 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("chunk_size", [4, 256])
def test_the_ssd_scan_with_all_chunks_at_once(dtype: torch.dtype, chunk_size: int) -> None:
    """What a GPU without mamba_ssm runs."""
    operands = ssd_operands(length=300, heads=4, width=16, states=16, dtype=dtype)
    y, last = chunked_ssd.ssd_scan_at_once(SSDScan(*operands.values(), True, 0.01, 1.5, chunk_size))
    right, right_last = reference.ssd_scan_ref(*operands.values(), True, 0.01, 1.5)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert_close("y", y, right, dtype)
    assert_close("last state", last, right_last, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
