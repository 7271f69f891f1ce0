"""Plain modules drawn from a grammar: each call equals the module's own blocks on the survivors, or is refused.

A case is a drawn module under a drawn plan (schedule and options), and two to four calls. A module is captured once
for all its plans, so a large budget draws ten of them for each. `SIMBA_FX_FUZZ=10000` (or `make fuzz`) draws that many.
"""

from __future__ import annotations

import os
from fractions import Fraction
from typing import Any

import pytest
import torch
from grammar import LONGEST, PLACES, ROW_BY_ROW, SIZES, Drawn, Spec, Step
from graph_cases import WIDTH
from hypothesis import event, given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor

import simba_fx
from simba_fx.errors import SimbaError

FUZZ = int(os.environ.get("SIMBA_FX_FUZZ", "0"))
PLANS = 10 if FUZZ else 2
MODULES = max(1, FUZZ // PLANS) if FUZZ else 6


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    blocks = draw(st.lists(st.sampled_from(("one", "one", "two", "none")), min_size=2, max_size=4).filter(
        lambda kinds: any(kind != "none" for kind in kinds)))  # fmt: skip
    mask = draw(st.sampled_from((None, None, torch.bool, torch.int64, torch.float32)))
    steps = st.sampled_from(ROW_BY_ROW if mask is not None else (*SIZES, *PLACES, *PLACES))
    return Spec(
        tuple(blocks),
        tuple(draw(st.lists(steps, max_size=2))),
        outside=draw(st.integers(0, 7)) == 0,
        lists=draw(st.sampled_from((1, 1, 1, 2))),
        mask=mask,
        marks=draw(st.sampled_from(("real", "padding"))),
        early=draw(st.booleans()),
    )


def schedules(blocks: int) -> st.SearchStrategy[Any]:
    share = st.integers(3, 9).map(lambda p: Fraction(p, 10))
    falling = st.lists(share, min_size=blocks - 1, max_size=blocks - 1).map(lambda s: (1, *sorted(s, reverse=True)))
    return st.one_of(st.just("dense"), falling, falling, falling)


sizes = st.tuples(st.sampled_from((1, 2, 3, 5)), st.one_of(st.integers(1, 48), st.sampled_from((1, 2, 24, 30, 31))))


def transformed(module: Drawn, schedule: Any, **options: Any) -> Any:
    spec = module.spec
    inputs = [torch.zeros(2, 24, WIDTH)]
    if spec.mask is not None:
        inputs.append(torch.ones(2, 24).to(spec.mask))
        options |= {"mask": "hide", "mask_marks": spec.marks}
    return simba_fx.transform(module, schedule, example_inputs=tuple(inputs), **options)


class NothingToCompare(Exception):
    """The library does not tell which tokens each of the module's blocks saw."""


def check(module: Drawn, sparse: Any, rows: int, length: int, seed: int) -> None:
    """One call against the module's own blocks, row by row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, WIDTH, generator=generator)
    spec, real = module.spec, torch.ones(rows, length, dtype=torch.bool)
    if spec.mask is None:
        found, kept = sparse(x), kept_by(module, sparse)
        grid = torch.arange(length).expand(rows, length)
        return near(found, module.expected(x, kept, grid, length))
    for row in range(rows):
        pads = int(torch.randint(0, length, (), generator=generator)) if row else 0
        real[row, slice(length - pads, length) if row % 2 else slice(0, pads)] = False
    mask = real if spec.marks == "real" else ~real
    found, kept = sparse(x, mask.to(spec.mask)), kept_by(module, sparse)
    for row in range(rows):
        at = real[row].nonzero().T
        stays = {path: block[row][block[row] >= 0][None] for path, block in kept.items()}
        near(found[row : row + 1, at[0]], module.expected(x[row : row + 1, at[0]], stays, at, length))
    return None


def kept_by(module: Drawn, sparse: Any) -> dict[str, Tensor]:
    """By block, where the tokens that entered it stand. Two lists with scans have no blocks of their own: everything
    must be kept there for a comparison."""
    paths, kept = simba_fx.program(sparse).captured.facts.blocks, simba_fx.kept(sparse)
    if set(paths) <= set(module.blocks()):
        return dict(zip(paths, kept))
    if simba_fx.program(sparse).cuts:
        raise NothingToCompare
    return {}


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * (1 + float(expected.detach().abs().max())))


@given(st.data())
@examples(MODULES)
def test_a_drawn_module_equals_its_own_blocks_or_is_refused(data: st.DataObject) -> None:
    spec = data.draw(specs())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    module = Drawn(spec).eval()
    for _ in range(PLANS):
        check_plan(module, data)


@torch.no_grad()
def check_plan(module: Drawn, data: st.DataObject) -> None:
    schedule = data.draw(schedules(len(module.spec.blocks)))
    options = {"compile": data.draw(st.sampled_from(("blocks", "whole"))),
               "kernels": data.draw(st.sampled_from(("auto", "auto", "model")))}  # fmt: skip
    calls = data.draw(st.lists(sizes, min_size=2, max_size=4))
    try:
        sparse = transformed(module, schedule, **options)
    except SimbaError as error:
        event(f"refused by transform: {type(error).__name__}")
        return
    for seed, (rows, length) in enumerate(calls):
        try:
            check(module, sparse, rows, length, seed)
            event("compared")
        except SimbaError as error:
            event(f"refused at the call: {type(error).__name__}")
        except NothingToCompare:
            event("two lists, tokens dropped: not compared")


FOLLOWED = (*SIZES[:5], *PLACES[:11])
"""What must not be refused."""


@pytest.mark.parametrize("step", FOLLOWED, ids=lambda step: step.__name__)
def test_sizes_and_places_in_blocks_are_followed(step: Step) -> None:
    torch.manual_seed(1)
    module = Drawn(Spec(("one", "one", "one"), (step,))).eval()
    sparse = transformed(module, (1, Fraction(7, 10), Fraction(2, 5)))
    for rows, length in ((2, 20), (1, 33)):
        check(module, sparse, rows, length, seed=rows)
    assert LONGEST > 33
