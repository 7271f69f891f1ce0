"""Blocks that carry two values of one width, as `mamba_ssm`'s do: each comes back as itself, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_cases import WIDTH, Mixer
from reference import TOLERANCE, assert_close
from torch import Tensor, nn

import simba_fx

LENGTH = 40


class Adding(nn.Module):
    """A block that adds what the one before made to the sum so far, and hands both on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), Mixer()

    def forward(self, hidden: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
        total = hidden if total is None else hidden + total
        return self.mixer(self.norm(total)), total


class Thinking(Adding):
    """Likewise without a scan: what it makes comes from another operator at another place."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(WIDTH, WIDTH)  # type: ignore[assignment]


class Doubled(Adding):
    """Likewise, the sum in float64."""

    def forward(self, hidden: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
        total = hidden.double() if total is None else hidden.double() + total
        return self.mixer(self.norm(total.float())), total


class Two(nn.Module):
    """Blocks in a list; only behind the last are the two streams added up."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    def forward(self, x: Tensor) -> Tensor:
        hidden, total = x, None
        for block in self.layers:
            hidden, total = block(hidden, total)
        return self.last(hidden, total)

    def last(self, hidden: Tensor, total: Any) -> Tensor:
        out: Tensor = self.norm((hidden * 2 + total).float())  # not symmetric: swapped streams would show
        return out


def eager(model: Two, x: Tensor, kept: list[Tensor]) -> Tensor:
    """The model block by block on the tokens that were kept, each token with the last values of both streams."""
    streams: list[Any] = [x, None]
    for block, positions in zip(model.layers, kept):
        index = positions[..., None].expand(-1, -1, WIDTH)
        now = block(*(None if stream is None else stream.gather(1, index) for stream in streams))
        for i, value in enumerate(now):
            base = value.new_zeros(x.shape) if streams[i] is None else streams[i]
            streams[i] = base.scatter(1, index, value)
    return model.last(*streams)


def prune(model: nn.Module, shares: Any, **options: Any) -> Any:
    return simba_fx.transform(model, shares, example_inputs=(torch.zeros(2, 9, WIDTH),), **options)


LINEAR, FIRST, SECOND = (1, 0.7, 0.4, 0.2), (1, 0.4, 0.4, 0.4), (1, 1, 0.4, 0.4)
MODELS = {
    "equal blocks": lambda: Two(*(Adding() for _ in range(4))),
    "the last block of another kind": lambda: Two(Adding(), Adding(), Adding(), Thinking()),
    "kinds in turn": lambda: Two(Adding(), Thinking(), Adding(), Thinking()),
    "the sum in another dtype": lambda: Two(*(Doubled() for _ in range(4))),
}


@pytest.mark.parametrize("shares", [LINEAR, FIRST, SECOND], ids=["every cut", "after the first", "after the second"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_each_token_comes_back_with_both_values_that_it_left_with(name: str, shares: Any, mode: str) -> None:
    model, x = MODELS[name](), torch.randn(3, LENGTH, WIDTH)
    if shares is FIRST and "kind" in name:  # nothing at this cut tells which is the sum
        with pytest.raises(simba_fx.errors.GraphError, match="expected one value per cut"):
            prune(model, shares, compile=mode)
        return
    pruned = prune(model, shares, compile=mode)
    with torch.no_grad():
        found = pruned(x)
        kept = simba_fx.kept(pruned)
        assert kept[-1].shape[1] < 20
        assert_close("output", found, eager(model, x, kept), TOLERANCE[torch.float32])


def test_kept_output_holds_the_survivors() -> None:
    model, x = MODELS["equal blocks"](), torch.randn(3, LENGTH, WIDTH)
    full, short = prune(model, LINEAR), prune(model, LINEAR, output="kept")
    with torch.no_grad():
        expected, found = full(x), short(x)
    index = simba_fx.kept(short)[-1][..., None].expand(-1, -1, WIDTH)
    assert_close("output", found, expected.gather(1, index), TOLERANCE[torch.float32])


class Swapping(Adding):
    """A reversible block: what was second comes first."""

    def forward(self, hidden: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
        total = hidden if total is None else total
        return total, hidden + self.mixer(self.norm(total))


class Recalling(Two):
    """Every block reads the input again, which the sum also starts from."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, total = x, None
        for block in self.layers:
            hidden, total = block(hidden, total)
            hidden = hidden * x
        return self.last(hidden, total)


@pytest.mark.parametrize(
    "model",
    [Two(*(Swapping() for _ in range(4))), Recalling(*(Adding() for _ in range(4)))],
    ids=["streams that change places", "the first sum is also something else"],
)
def test_what_cannot_be_told_apart_is_refused(model: Two) -> None:
    with pytest.raises(
        simba_fx.errors.GraphError, match=r"expected one value per cut that it continues .*output='kept'"
    ):
        prune(model, LINEAR)
    assert prune(model, LINEAR, output="kept")(torch.randn(3, LENGTH, WIDTH)).shape[1] < 20
