"""`torch.autocast` around a part of a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import own_model
import pytest
import torch
from reference import assert_close
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import CaptureError

KEEP_ALL = [1, 1 - 1e-6, 1 - 2e-6]
Around = Callable[[], contextlib.AbstractContextManager[Any]]


def bfloat16() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def off() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False)


class Block(own_model.Block):  # type: ignore[misc]  # the example's own
    def __init__(self, around: Around) -> None:
        super().__init__(16, 4)
        self.around, self.first = around, nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        with self.around():
            hidden = self.first(hidden).float()
        found: Tensor = super().forward(hidden)
        return found


def model(around: Around) -> Any:
    torch.manual_seed(1)
    made = own_model.MyMamba(vocabulary=97, width=16, states=4, depth=3)
    made.blocks = nn.ModuleList(Block(around) for _ in range(3))
    return made


def ids() -> Tensor:
    return torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("inside", "outside"), [(off, contextlib.nullcontext), (bfloat16, bfloat16)],
                         ids=["off in off", "bfloat16 in bfloat16"])  # fmt: skip
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_a_region_that_changes_nothing_is_none(inside: Around, outside: Around, compile: str) -> None:
    dense, x = model(inside), ids()
    plain = model(contextlib.nullcontext)
    with outside(), torch.no_grad():
        graphs = [simba_fx.transform(one, "linear", compile=compile, criterion="simba") for one in (dense, plain)]
        assert torch.equal(graphs[0](x), graphs[1](x))
        everything = simba_fx.transform(dense, KEEP_ALL, compile=compile, criterion="simba")
        assert_close("output", everything(x), dense(x), 1e-2 if outside is not contextlib.nullcontext else 1e-5)


@pytest.mark.parametrize(("inside", "outside"), [(bfloat16, contextlib.nullcontext), (off, bfloat16)],
                         ids=["bfloat16 in off", "off in bfloat16"])  # fmt: skip
def test_a_region_inside_of_a_block_is_refused(inside: Around, outside: Around) -> None:
    told = r"blocks\.0 runs wrap_with_autocast on a graph of its own, .*Write the casts out there \(x\.float\(\)"
    with outside(), pytest.raises(CaptureError, match=told):
        simba_fx.transform(model(inside), "linear")
    assert not torch.is_autocast_enabled("cpu")


def test_a_region_outside_of_the_blocks_works() -> None:
    class Around(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.embedding(x) * self.norm.weight.sum()
            for block in self.blocks:
                hidden = block(hidden)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found: Tensor = self.head(self.norm(hidden))
            return found

    dense, x = Around(depth=3), ids()
    with torch.no_grad():
        found = simba_fx.transform(dense, KEEP_ALL, criterion="simba")(x)
        assert found.dtype == dense(x).dtype == torch.bfloat16
        assert_close("output", found, dense(x), 1e-2)
