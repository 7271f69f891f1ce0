"""The Triton kernels in Triton's interpreter, on CPU tensors that take the CUDA paths: run by test_triton.py.

The same oracles as for the other paths (float64 loops), through the public operators. Selections must be equal bit for
bit to the sorting path of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._functorch.config
from test_delta import delta_operands
from test_ops import assert_close, check_gradients, selective_operands, ssd_operands
from torch import Tensor
from torch.library import opcheck
from triton.runtime.interpreter import InterpretedFunction

from simba_fx import ops
from simba_fx.ops import backends, reference
from simba_fx.ops.cuda import packages as cuda
from simba_fx.ops.cuda.triton.common import INTERPRETED, launch

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
"""The interpreter of Triton 3.6 does that."""

OPS = torch.ops.simba_fx
SELECTIVE = ("u", "delta", "A", "B", "C", "delta_bias")
CRITERIA = ("simba", "simba-abs", "simba-l2")
SIDES = ("none", "right", "left")
SSD = ("x", "dt", "A", "B", "C", "dt_bias")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert INTERPRETED
    assert cuda.ssd_scan_fn() is None
    monkeypatch.setattr(backends, "on_gpu", lambda operand: True)
    # a launch prepares the language, and each call of a function in a kernel does so anew, which takes long
    own = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = self.fn.__module__.startswith("simba_fx.")
        return self.rewrite()(*args, **kwargs) if ours else own(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)


def padding(rows: int, length: int, side: str) -> Tensor:
    """Row b has 3 b + 1 pads on that side, but at least one token."""
    count = (length - 1 - 3 * torch.arange(rows)).clamp(min=1).unsqueeze(1)
    slots = torch.arange(length)
    return slots < count if side == "right" else slots >= length - count


def expected_score(contributions: Tensor, query: Tensor, criterion: str) -> Tensor:
    """`(B, D, L)` float64 contributions to `(B, L)`."""
    if criterion == "simba-l2":
        best = contributions.pow(2).sum(1).sqrt()
    else:
        best = (contributions.abs() if criterion == "simba-abs" else contributions).amax(1)
    return torch.where(torch.arange(best.shape[1]) <= query.unsqueeze(1), best, 0.0)


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1, "channels": 1, "states": 1},
        {"length": 67, "dtype": torch.bfloat16},
        {"length": 150, "channels": 33, "states": 5, "rows": 1, "decay": 8.0, "channel_last": False},
        {"length": 70, "channels": 6, "states": 9, "groups": 3, "rows": 1, "decay": 60.0, "dtype": torch.float16},
        {"length": 90, "channels": 16, "decay": 1e4},
    ],
    ids=str,
)
@pytest.mark.parametrize("turn", range(3))
def test_the_selective_score(shape: dict[str, Any], turn: int, gpu: None) -> None:
    """In three turns each tail meets each criterion and each side of padding once, and these two each other."""
    operands = selective_operands(**shape)
    scan = [operands[name] for name in SELECTIVE]
    rows, _, length = scan[0].shape
    for i, tail in enumerate((1, 3, 40)):
        criterion, side = CRITERIA[(i + turn) % 3], SIDES[(i - turn) % 3]
        real = None if side == "none" else padding(rows, length, side)
        query = ops.query_position(real, tail, rows=rows, length=length)
        got = ops.selective_token_score(*scan, True, real, tail, criterion)
        contributions = reference.selective_contributions_ref(*scan, True, query)
        assert_close(f"{tail}, {criterion}, {side}", got, expected_score(contributions, query, criterion))
        assert got.dtype == torch.float32


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1, "heads": 1, "width": 1, "groups": 1, "states": 1},
        {"length": 70, "heads": 2, "width": 33, "groups": 1, "states": 16, "rows": 1},
        {"length": 100, "heads": 6, "width": 17, "groups": 3, "states": 8, "dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("criterion", [*CRITERIA, "no-decay"])
@pytest.mark.parametrize("side", SIDES)
def test_the_ssd_score(shape: dict[str, Any], criterion: str, side: str, gpu: None) -> None:
    operands = ssd_operands(**shape)
    scan = [operands[name] for name in SSD]
    if criterion == "no-decay":
        scan[2] = torch.zeros_like(scan[2])
    rows, length = scan[0].shape[:2]
    real = None if side == "none" else padding(rows, length, side)
    for tail in (1, 20):
        query = ops.query_position(real, tail, rows=rows, length=length)
        got = ops.ssd_token_score(*scan, True, 0.01, 1.5, real, tail, criterion)
        contributions = reference.ssd_contributions_ref(*scan, True, 0.01, 1.5, query).flatten(2).transpose(1, 2)
        assert_close(f"tail {tail}", got, expected_score(contributions, query, criterion))


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1, "heads": 1, "groups": 1, "width": 1, "size": 1},
        {"length": 43, "heads": 6, "groups": 2, "size": 5, "dtype": torch.bfloat16},
        {"length": 30, "heads": 2, "groups": 2, "size": 17, "decay": 30.0, "by_channel": True, "rows": 1},
        {"length": 19, "heads": 4, "groups": 1, "by_channel": True, "decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", SIDES)
def test_the_walk_of_delta_rules(shape: dict[str, Any], side: str, gpu: None) -> None:
    operands = delta_operands(**shape)
    rows, length = operands["v"].shape[:2]
    real = None if side == "none" else padding(rows, length, side)
    for tail, criterion in zip((1, 3, 20, 2), (*CRITERIA, "no-decay")):
        query = ops.query_position(real, tail, rows=rows, length=length)
        got = ops.delta_token_score(*operands.values(), 8, real, tail, criterion)
        scored = dict(operands, g=torch.zeros_like(operands["g"])) if criterion == "no-decay" else operands
        contributions = reference.delta_contributions_ref(*scored.values(), query.clamp(min=0)).flatten(2).mT
        assert_close(f"{tail}, {criterion}", got, expected_score(contributions, query, criterion))


SCORES: dict[str, Callable[..., Tensor]] = {
    "normal": torch.randn,
    "ties": lambda *shape: torch.randn(*shape).round(),
    "signed zeros": lambda *shape: torch.tensor([0.0, -0.0, 1.0])[torch.randint(3, shape)],
    "not finite": lambda *shape: torch.tensor([0.5, torch.nan, torch.inf, -torch.inf])[torch.randint(4, shape)],
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("length", [1, 2, 17, 40, 1100])
def test_the_selection_is_that_of_the_cpu_bit_for_bit(kind: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind an earlier cut, where rows hold masked tokens, and where one comes of rows that have no pad left."""
    torch.manual_seed(length)
    positions = torch.arange(length).expand(3, length)
    lengths = torch.tensor([length, max(1, length // 2), max(1, length - 1)])
    slots = torch.arange(length)
    shares = [(1, 2, 3, 4), (1, 10, 1, 0)] if length < 1000 else [(1, 3, 1, 4)]
    for p, q, tail, floor in shares:
        rule = (length, tail, p, q, floor)
        score = SCORES[kind](3, length)
        cases: list[tuple[Any, tuple[Any, ...]]] = [(OPS.select_tokens, (score, positions, *rule))]
        for real in (slots < lengths[:, None], slots >= length - lengths[:, None]):
            cases.append((OPS.select_real_tokens, (score, positions, real, lengths, *rule)))
            first = OPS.select_real_tokens(score, positions, real, lengths, length, tail, 9, 10, 4)
            kept, _, kept_at, _, kept_real = first
            cases.append((OPS.select_real_tokens, (score.gather(1, kept), kept_at, kept_real, lengths, *rule)))
        if length > 1:  # rows of one token less, whose padding at the end is used up
            less = (
                score[:, 1:],
                positions[:, :-1],
                torch.ones(3, length - 1, dtype=torch.bool),
                lengths * 0 + length - 1,
            )
            cases.append((OPS.select_real_tokens, (*less, *rule)))
        for operator, arguments in cases:
            right = operator(*arguments)
            with monkeypatch.context() as patch:
                patch.setattr(backends, "on_gpu", lambda operand: True)
                got = operator(*arguments)
            for name, a, b in zip(("kept", "dropped", "kept positions", "dropped positions", "kept real"), got, right):
                assert torch.equal(a, b), f"{name} of {operator} under {rule}: {a}, expected {b}"


@pytest.mark.parametrize("absent", [None, "D", "z", "delta_bias"])
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1, "states": 1, "channels": 1},
        {"length": 33, "channels": 10, "states": 3, "groups": 2, "rows": 1, "channel_last": False},
        {"length": 18, "channels": 9, "states": 2, "decay": 60.0, "rows": 1},
    ],
    ids=str,
)
def test_the_selective_scan_and_its_gradients(shape: dict[str, Any], absent: str | None, gpu: None) -> None:
    operands = selective_operands(**shape)
    if absent is not None:
        operands[absent] = None
    check_gradients(ops.selective_scan, reference.selective_scan_ref, operands, (True,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_selective_scan_in_low_precision(dtype: torch.dtype, gpu: None) -> None:
    operands = selective_operands(length=70, channels=6, states=2, dtype=dtype)
    y, last = ops.selective_scan(*operands.values(), True)
    right, right_last = reference.selective_scan_ref(*operands.values(), True)
    assert (y.dtype, last.dtype, y.mT.is_contiguous()) == (dtype, torch.float32, True)
    assert_close("y", y, right, dtype)
    assert_close("last state", last, right_last)


@pytest.mark.parametrize("length", [1, 9, 300])
@pytest.mark.parametrize("chunk_size", [4, 256])
def test_the_ssd_scan_with_all_chunks_at_once(length: int, chunk_size: int, gpu: None) -> None:
    operands = ssd_operands(length=length, skip_per_channel=chunk_size == 4)
    operands["A"] = operands["A"] * 10
    y, last = ops.ssd_scan(*operands.values(), True, 0.01, 1.5, chunk_size)
    right, right_last = reference.ssd_scan_ref(*operands.values(), True, 0.01, 1.5)
    assert_close("y", y, right)
    assert_close("last state", last, right_last)


@torch._functorch.config.patch(decompose_custom_triton_ops=False)  # an interpreted kernel cannot be traced
def test_the_operators_are_well_formed(gpu: None) -> None:
    """`opcheck`: schema, fake kernel, autograd and tracing agree with what the kernels return."""
    selective = {k: t.contiguous() for k, t in selective_operands(length=12, channels=3, states=2, rows=1).items()}
    leaves = {name: t.requires_grad_() for name, t in selective.items()}
    opcheck(OPS.selective_scan, (*leaves.values(), True))
    opcheck(OPS.selective_token_score, (*(leaves[name] for name in SELECTIVE), True, None, 1, "simba"))
    ssd = ssd_operands(length=12, rows=1)
    opcheck(OPS.ssd_token_score, (*(ssd[name] for name in SSD), True, 0.0, 9.0, None, 1, "simba"))
    opcheck(OPS.delta_token_score, (*delta_operands(length=12).values(), 4, None, 1, "simba"))
    score, positions = torch.randn(2, 12), torch.arange(12).expand(2, 12)
    opcheck(OPS.select_tokens, (score, positions, 12, 1, 1, 2, 4))
    lengths = torch.tensor([12, 7])
    real = torch.arange(12) < lengths[:, None]
    opcheck(OPS.select_real_tokens, (score, positions, real, lengths, 12, 1, 1, 2, 4))


def test_a_kernel_runs_on_the_gpu_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, which is where Triton launches."""
    current: list[torch.device] = []

    @contextmanager
    def use(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[[int], None]:
            return lambda argument: launched.append((grid, argument, list(current)))

    class Operand:
        device = torch.device("cuda", 1)

    launched: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", use)
    launch(Kernel(), Operand())[7, 2](3)  # type: ignore[arg-type]
    assert launched == [((7, 2), 3, [torch.device("cuda", 1)])]
    assert not current


def test_operands_may_be_longer_than_an_int32_counts(gpu: None) -> None:
    """Channels, and heads, 2^30 elements apart: an int32, and twice that is none. (No memory between is touched.)"""
    far = 2**30
    room = torch.empty(3 * far + 4096, dtype=torch.bfloat16)

    def spread(operand: Tensor, dim: int) -> Tensor:
        strides = [8 * (size > 1) for size in operand.shape]
        strides[dim] = far
        view = room.as_strided(operand.shape, strides)
        view.copy_(operand)
        return view

    ssd = ssd_operands(rows=1, length=20, heads=4, width=1, groups=1, states=2, dtype=torch.bfloat16)
    scan = [ssd[name] for name in SSD]
    right = ops.ssd_token_score(*scan, True, 0.01, 1.5, None, 1, "simba")
    assert torch.equal(ops.ssd_token_score(spread(scan[0], 2), *scan[1:], True, 0.01, 1.5, None, 1, "simba"), right)
    selective = selective_operands(rows=1, length=20, channels=4, states=2, dtype=torch.bfloat16)
    operands = [selective[name] for name in SELECTIVE]
    right, (y, _) = ops.selective_token_score(*operands, True, None, 1, "simba"), ops.selective_scan(*operands[:5])
    apart = spread(operands[0], 1)
    assert torch.equal(ops.selective_token_score(apart, *operands[1:], True, None, 1, "simba"), right)
    assert torch.equal(ops.selective_scan(apart, *operands[1:5])[0], y)
