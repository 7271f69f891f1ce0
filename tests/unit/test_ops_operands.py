"""Operands that do not fit together: an error that says which, from every operator, before a kernel reads a byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from strategies import seeds
from test_delta import delta_operands
from test_ops import OPS, backend, selective_operands, ssd_operands  # noqa: F401  # a fixture
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, treespec_dumps

from simba_fx.errors import OperandError, SimbaError
from simba_fx.ops import checks
from simba_fx.ops.function_scan import FunctionCall, known_as

INDEX = torch.tensor([[0, 3, 8], [1, 2, 3]])
RULE: dict[str, Any] = {"length": 9, "tail": 1, "share_p": 1, "share_q": 2, "floor": 2}


def _scan(backward: bool) -> dict[str, Any]:
    operands = {**selective_operands(), "delta_softplus": True}
    return {"dy": torch.randn(2, 5, 9), "dlast": torch.randn(2, 5, 4), **operands} if backward else operands


def _ssd(backward: bool) -> dict[str, Any]:
    operands = {**ssd_operands(), "dt_softplus": True, "dt_min": 0.0, "dt_max": 1e3, "chunk_size": 4}
    return {"dy": torch.randn(2, 9, 4, 3), "dlast": torch.randn(2, 4, 3, 4), **operands} if backward else operands


def _score(operands: dict[str, Any]) -> dict[str, Any]:
    scored = {name: held for name, held in operands.items() if name not in ("D", "z", "chunk_size")}
    return scored | {"real": torch.ones(2, 9, dtype=torch.bool), "tail": 2, "criterion": "simba"}


def _delta(backward: bool) -> dict[str, Any]:
    operands = {**delta_operands(), "chunk_size": 4}
    return {"dy": torch.randn(2, 9, 4, 3), "dlast": torch.randn(2, 4, 8, 3), **operands} if backward else operands


def _conv(backward: bool) -> dict[str, Any]:
    operands = {"x": torch.randn(2, 5, 9), "weight": torch.randn(5, 4), "bias": torch.randn(5), "activation": "silu"}
    return {"dy": torch.randn(2, 5, 9), **operands} if backward else operands


def _score_and_positions() -> dict[str, Any]:
    return {"score": torch.randn(2, 9), "positions": torch.arange(9).repeat(2, 1)}


def _without_score(operands: dict[str, Any]) -> dict[str, Any]:
    return {name: held for name, held in operands.items() if name != "score"}


def _slots(real: bool) -> dict[str, Any]:
    slots = _score_and_positions()
    padding = {"real": torch.arange(9) < torch.tensor([[9], [6]]), "lengths": torch.tensor([9, 6])}
    return slots | (padding if real else {}) | RULE


def _pieces() -> dict[str, Any]:
    places = [torch.tensor([[0, 2, 5], [1, 2, 5]]), torch.tensor([[1, 3, 4, 5], [0, 3, 4, 5]])]
    return {"pieces": [torch.randn(2, 3, 4), torch.randn(2, 4, 4)], "places": places, "length": 5}


def decayed(v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """`h_t = a_t h_{t-1} + v_t`; a registered recurrence."""
    state, ys = torch.zeros_like(v[:, 0]), []
    for t in range(v.shape[1]):
        state = a[:, t] * state + v[:, t]
        ys.append(state)
    return torch.stack(ys, 1), state


def _call() -> dict[str, Any]:
    v, a = torch.randn(2, 9, 3), torch.rand(2, 9, 3)
    spec = tree_flatten(((v, a), {}))[1]
    states = ((("B", 3), "float32"),)
    call = FunctionCall(known_as(decayed), treespec_dumps(spec), ([0], [1]), 0, 1, 0, "float32", states)
    return {"value": v, "operands": [a], "call": call.text}


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "selective_scan": lambda: _scan(False),
    "selective_scan_backward": lambda: _scan(True),
    "selective_token_score": lambda: _score(_scan(False)),
    "ssd_scan": lambda: _ssd(False),
    "ssd_scan_backward": lambda: _ssd(True),
    "ssd_token_score": lambda: _score(_ssd(False)),
    "delta_scan": lambda: _delta(False),
    "delta_scan_backward": lambda: _delta(True),
    "delta_token_score": lambda: _delta(False) | {"real": torch.ones(2, 9, dtype=torch.bool), "tail": 2,
                                                  "criterion": "simba"},
    "recurrence": lambda: _call(),
    "recurrence_backward": lambda: {"arriving": [torch.randn(2, 9, 3), torch.randn(2, 3)]} | _call(),
    "recurrence_token_score": lambda: _call() | {"real": None, "tail": 2, "criterion": "simba"},
    "causal_conv1d": lambda: _conv(False),
    "causal_conv1d_backward": lambda: _conv(True),
    "select_tokens": lambda: _slots(False),
    "select_real_tokens": lambda: _slots(True),
    "pool_scores": lambda: {"score": _slots(True)["score"], "real": _slots(True)["real"], "tail": 1, "span": 3},
    "rank_scores": lambda: {"score": _slots(True)["score"], "real": _slots(True)["real"], "tail": 1},
    "position_score": lambda: _without_score(_slots(True)) | {"criterion": "stride", "seed": 0},
    "take_square": lambda: {"square": torch.randn(2, 1, 9, 9), "positions": torch.arange(4).repeat(2, 1), "real": None},
    "protect_tokens": lambda: _score_and_positions() | {"protected": torch.tensor([[0], [3]])},
    "row_positions": lambda: {n: _slots(True)[n] for n in ("positions", "real")} | {"wanted": [0, -1]},
    "take_tokens": lambda: {"hidden": torch.randn(2, 9, 4), "index": INDEX.clone()},
    "take_tokens_backward": lambda: {"grad": torch.randn(2, 3, 4), "index": INDEX.clone(), "slots": 9},
    "restore_tokens": _pieces,
    "restore_tokens_backward": lambda: {"grad": torch.randn(2, 5, 4), "places": _pieces()["places"]},
}  # fmt: skip
"""Arguments with which each operator runs."""


def test_every_operator_is_here() -> None:
    ours = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("simba_fx::")}
    of_captures = {"site_enter", "site_exit", "own_enter", "own_exit", "block_edge", "block_stand_in",
                   "autocast_begins", "autocast_ends"}  # fmt: skip
    assert {name.partition(".")[0] for name in ours} - of_captures == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("backend")
def test_operands_that_fit_run(name: str) -> None:
    getattr(OPS, name)(**CALLS[name]())


@pytest.mark.parametrize("name", [name for name in CALLS if not name.endswith("_backward")])
@pytest.mark.usefixtures("backend")
def test_results_may_be_written_into_while_gradients_are_wanted(name: str) -> None:
    """`y += skip` behind a scan: autograd lets nobody write into what an operator returns as a view."""
    given = tree_map_only(Tensor, lambda held: held.requires_grad_(held.is_floating_point()), CALLS[name]())
    for result in tree_leaves(getattr(OPS, name)(**given)):
        if isinstance(result, Tensor) and result.is_floating_point():
            (result.transpose(0, 1) if result.dim() > 1 else result).add_(1)


def _changes(operand: Tensor) -> list[Callable[[random.Random], Tensor]]:
    """Ways to make another operand of one."""
    dims = operand.dim()

    def resized(rng: random.Random) -> Tensor:
        if not dims:
            return torch.ones(3).to(operand.dtype)
        sizes, dim = list(operand.shape), rng.randrange(dims)
        sizes[dim] = rng.choice([0, 1, max(sizes[dim] - 1, 0), sizes[dim] + 1, 2 * sizes[dim] + 1])
        return torch.ones(sizes).to(operand.dtype)

    def cast(rng: random.Random) -> Tensor:
        others = [torch.int32, torch.bool, torch.float64] + [torch.complex64] * (not operand.is_complex())
        return operand.to(rng.choice(others)) if not operand.is_complex() else operand.real

    def exchanged(rng: random.Random) -> Tensor:
        return operand.transpose(*rng.sample(range(dims), 2)) if dims > 1 else operand[None]

    def shifted(rng: random.Random) -> Tensor:
        return operand + rng.choice([-100, -1, 1, 7, 2**40]) if operand.dtype == torch.int64 else resized(rng)

    return [resized, cast, exchanged, shifted, lambda _: operand[None], lambda _: operand.flatten()[:1].sum()]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("backend")
@settings(max_examples=40)
@given(seed=seeds)
def test_other_operands_run_or_are_refused(name: str, seed: int) -> None:
    """Whatever is changed, the call returns what its fake says it does, or raises one of our errors."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    arguments = CALLS[name]()
    for _ in range(rng.randint(1, 2)):
        key = rng.choice(list(arguments))
        held = arguments[key]
        if isinstance(held, Tensor):
            arguments[key] = rng.choice(_changes(held))(rng)
        elif isinstance(held, list) and held and isinstance(held[0], Tensor):
            at = rng.randrange(len(held))
            held[at : at + 1] = rng.choice([[], [rng.choice(_changes(held[at]))(rng)]])
        elif type(held) is int:
            arguments[key] = rng.choice([-(2**40), -1, 0, 1, 3, 2**40])
    if name.startswith("restore") and isinstance(arguments.get("length"), int):
        arguments["length"] = min(arguments["length"], 50)  # else it is room for so many tokens that is asked for
    arguments["slots"] = min(arguments.get("slots", 0), 50)
    if "slots" not in CALLS[name]():
        del arguments["slots"]
    try:
        found = getattr(OPS, name)(**arguments)
    except SimbaError:
        return
    except Exception:
        assert name.startswith("recurrence")  # the words of the function itself
        return
    with FakeTensorMode() as mode:
        fake = getattr(OPS, name)(**tree_map_only(Tensor, mode.from_tensor, arguments))
    assert [t.shape for t in tree_leaves(found)] == [t.shape for t in tree_leaves(fake)]


def test_a_refusal_names_the_operand_and_both_shapes() -> None:
    operands = selective_operands()
    with pytest.raises(OperandError) as refused:
        OPS.selective_scan(**(operands | {"delta": operands["delta"].transpose(1, 2)}))
    assert str(refused.value) == (
        "simba_fx::selective_scan expected delta to be floating-point (B, D, L) = (2, 5, 9), on one device with the "
        "other operands; found (2, 9, 5). Pass the operands of one call in this layout (letters: simba_fx.ops); after "
        "register_scan, correct what the adapter returns."
    )
    with pytest.raises(
        OperandError, match=r"expected B to be .* \(2, G, 4, 9\) or \(B, N, L\) = \(2, 4, 9\).*; found "
    ):
        OPS.selective_scan(**(operands | {"B": operands["B"][:, :3]}))
    with pytest.raises(OperandError, match="must be a multiple of the groups of B and C; found 5 and 2 groups"):
        OPS.selective_scan(**(operands | {name: torch.randn(2, 2, 4, 9) for name in "BC"}))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("take_tokens", {"index": torch.tensor([[0], [9]])}, "expected index between 0 and 8; found 0 to 9"),
        ("take_tokens", {"index": torch.tensor([[-1], [0]])}, "expected index between 0 and 8; found -1 to 0"),
        ("restore_tokens", {"length": 6}, "once in each row; found 5 2 times in row 0"),
        ("restore_tokens", {"length": 4}, "expected places between 0 and 4; found 0 to 5"),
        (
            "row_positions",
            {"wanted": [6]},
            r"expected rows that have the positions \[6\]; found a row of 6 real tokens",
        ),
        ("row_positions", {"wanted": [-10]}, "for position -10, to be at least 10; found 9"),
        ("select_real_tokens", {"lengths": torch.tensor([9, 10])}, "expected lengths between 0 and 9; found 9 to 10"),
        ("select_tokens", {"share_q": 0}, "expected share_q to be at least 1; found 0"),
        ("selective_token_score", {"tail": 0}, "expected tail to be at least 1; found 0"),
    ],
)
def test_indices_of_tokens_that_are_not_there(name: str, changes: dict[str, Any], words: str) -> None:
    """Of another row's memory, and of none."""
    with pytest.raises(OperandError, match=words):
        getattr(OPS, name)(**(CALLS[name]() | changes))


def test_sizes_that_are_no_numbers_are_not_looked_at() -> None:
    """A comparison of symbolic sizes would fix them in the graph."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    length = env.create_unbacked_symint()

    class Symbolic:
        shape = (2, 5, length)
        dtype, device = torch.float32, torch.device("cpu")

        def is_floating_point(self) -> bool:
            return True

    operand: Any = Symbolic()
    checks.fit("selective_scan", checks.SELECTIVE, u=operand, delta=torch.ones(2, 5, 9), z=operand)
    with pytest.raises(OperandError, match=r"\(B, D, L\) = \(2, 5, L\).*found \(2, 6, 9\)"):
        checks.fit("selective_scan", checks.SELECTIVE, u=operand, delta=torch.ones(2, 6, 9))
    assert not env.guards
