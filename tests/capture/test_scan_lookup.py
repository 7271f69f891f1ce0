"""A registered scan is found however a model calls it, and its weights wherever they are kept."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import simba_fx

own_model: Any = importlib.import_module("own_model")


def module(name: str, source: str, **names: Any) -> Any:
    """A Python module made here, as if it were a file of the user's."""
    made = types.ModuleType(name)
    vars(made).update(names)
    exec(compile(source, f"{name}.py", "exec"), vars(made))
    sys.modules[name] = made
    return made


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    """A library with a scan, registered, and a helper in another file that imports it."""
    made = module("users_ops", "def scan(*operands):\n    return own_scan(*operands)\n", own_scan=own_model.scan)
    module("users_helpers", "def helper(*operands):\n    return recurrence(*operands)\n", recurrence=made.scan)
    simba_fx.register_scan(made.scan, own_model.adapter)
    yield made
    for name in ("users_ops", "users_helpers"):
        del sys.modules[name]


class Weights(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(width, 4))


class Block(nn.Module):
    """A block that calls its scan by `way`; the scan's decay is kept in a module of its own."""

    def __init__(self, way: Any, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.selection = nn.Linear(width, width + 8)
        self.weights = Weights(width)
        self.scan = way

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        step, B, C = self.selection(normed).split((x.shape[-1], 4, 4), dim=-1)
        y: Tensor = self.scan(normed, nn.functional.softplus(step), -torch.exp(self.weights.A_log), B, C)
        return x + y


class Net(nn.Module):
    def __init__(self, way: Any, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        block = Block(way)
        self.blocks = nn.ModuleList([block] * 4 if shared else [Block(way) for _ in range(4)])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


def through_the_module(library: Any) -> Any:
    return lambda *operands: library.scan(*operands)


def as_an_attribute(library: Any) -> Any:
    return library.scan


def by_a_helper_in_another_file(library: Any) -> Any:
    return sys.modules["users_helpers"].helper


@pytest.mark.parametrize("way", [through_the_module, as_an_attribute, by_a_helper_in_another_file])
@pytest.mark.parametrize("shared", [False, True], ids=["", "one block, four times"])
def test_a_scan_is_found_however_it_is_called(way: Any, shared: bool, library: Any) -> None:
    model = Net(way(library), shared).eval()
    ids = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(1))
    sparse = simba_fx.transform(model, "dense")
    with torch.no_grad():
        right = model(ids)
        assert torch.allclose(sparse(ids), right, atol=1e-5)
    if not shared:  # calls of one module are one block, of which nothing leaves
        pruned = simba_fx.transform(model, [1, 1, 0.5, 0.5])
        with torch.no_grad():
            pruned(ids)
        assert [block.shape[1] for block in simba_fx.kept(pruned)] == [30, 30, 16, 16]
    assert library.scan.__name__ == sys.modules["users_helpers"].recurrence.__name__ == "scan"
    assert model.blocks[0].scan is way(library) or way is through_the_module


def test_an_empty_prompt_is_refused() -> None:
    sparse = simba_fx.transform(own_model.MyMamba(), "linear")
    with pytest.raises(simba_fx.errors.InputError, match="at least one token, found an empty one"):
        sparse(torch.zeros(2, 0, dtype=torch.int64))
