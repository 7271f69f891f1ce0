"""Scans that are methods of modules, and read their weights: each block's own, wherever the sparse model has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import assert_close, on_survivors
from torch import Tensor, nn
from torch.nn import functional as F

import simba_fx

KEEP_ALL = [1, 1 - 1e-6, 1 - 2e-6]
every_mode = pytest.mark.parametrize("compile", ["blocks", "whole"])


class Mixer(nn.Module):
    """Its forward is the scan, as in many a model to learn from."""

    def __init__(self, width: int, states: int, power: int) -> None:
        super().__init__()
        self.power = power
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.randn(width))
        self.register_buffer("scale", torch.rand(width) + 0.5)
        self.selections = nn.ModuleDict({"step": nn.Linear(width, width), "B": nn.Linear(width, states),
                                         "C": nn.Linear(width, states)})  # fmt: skip
        self.nothing = nn.ModuleList()  # false, and yet a module

    def operands(self, x: Tensor) -> tuple[Tensor, ...]:
        step = F.softplus(self.selections["step"](x)) * self.scale
        B, C = (self.selections[name](x) for name in ("B", "C"))
        return step, -torch.exp(self.A_log), B, C**self.power

    def forward(self, x: Tensor) -> Tensor:
        step, A, B, C = self.operands(x)
        state, outputs = x.new_zeros(len(x), *A.shape), []
        for t in range(x.shape[1]):
            state = torch.exp(step[:, t, :, None] * A) * state + (step[:, t] * x[:, t])[..., None] * B[:, t, None]
            outputs.append((state * C[:, t, None]).sum(-1) + self.D * x[:, t])
        return torch.stack(outputs, 1)


class Block(nn.Module):
    def __init__(self, width: int, power: int) -> None:
        super().__init__()
        self.norm, self.mixer, self.out = nn.RMSNorm(width), Mixer(width, 4, power), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.mixer(self.norm(x)))


class Model(nn.Module):
    def __init__(self, powers: tuple[int, ...] = (1, 1, 1)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 16)
        self.blocks = nn.ModuleList(Block(16, power) for power in powers)
        self.head = nn.Linear(16, 97)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


def adapter(self: Mixer, x: Tensor) -> Any:
    step, A, B, C = self.operands(x)
    u, step, B, C = (tensor.transpose(1, 2) for tensor in (x, step, B, C))
    return simba_fx.SelectiveScan(u=u, delta=step, A=A, B=B, C=C, D=self.D), lambda y, _: y.transpose(1, 2)


simba_fx.register_scan(Mixer.forward, adapter)


def model(powers: tuple[int, ...] = (1, 1, 1)) -> Any:
    torch.manual_seed(0)
    return Model(powers)


def ids() -> Tensor:
    return torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


@every_mode
@pytest.mark.parametrize("powers", [(1, 1, 1), (1, 2, 1)], ids=["alike", "not alike"])
def test_each_blocks_own_method_runs(powers: tuple[int, ...], compile: str) -> None:
    dense, x = model(powers), ids()
    for kernels, tolerance in (("model", 0.0), ("auto", 1e-5)):
        everything = simba_fx.transform(dense, KEEP_ALL, criterion="simba", kernels=kernels, compile=compile)
        found, right = everything(x), dense(x)
        assert_close(kernels, found, right, tolerance)
        for mine, own in zip(gradients(found.square().mean(), dense), gradients(right.square().mean(), dense)):
            assert_close(kernels, mine, own, 1e-5)
        sparse = simba_fx.transform(dense, [1, 0.5, 0.3], criterion="simba", kernels=kernels, compile=compile,
                                    output="kept")  # fmt: skip
        found = sparse(x)
        hidden = on_survivors(dense.embedding(x), dense.blocks, simba_fx.kept(sparse))
        assert_close(kernels, found, dense.head(hidden), 1e-5)


@every_mode
@pytest.mark.parametrize("kernels", ["auto", "model"])
def test_copies_and_other_weights_are_read(kernels: str, compile: str) -> None:
    dense, other, x = model(), model(), ids()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.mul_(1.1)
    sparse, right = (simba_fx.transform(one, "linear", criterion="simba", kernels=kernels, compile=compile)
                     for one in (dense, other))  # fmt: skip
    found = sparse(x)
    copied = copy.deepcopy(sparse)
    copied.load_state_dict(other.state_dict())
    assert_close("a copy", copied(x), right(x), 1e-6)
    assert_close("the original", sparse(x), found, 0)
    sparse.load_state_dict(other.state_dict(), assign=True)
    assert_close("other weights", sparse(x), right(x), 1e-6)
    assert_close("another dtype", sparse.double()(x), right.double()(x), 1e-12)


@every_mode
def test_methods_compile_and_export(compile: str) -> None:
    sparse, x = simba_fx.transform(model(), "linear", criterion="simba", kernels="model", compile=compile), ids()
    torch._dynamo.reset()
    with torch.no_grad():
        found = sparse(x)
        assert_close("compiled", torch.compile(sparse, backend="aot_eager")(x), found, 1e-6)
        program = torch.export.export(sparse, (x,), strict=False)  # the model's loop has one length
        assert_close("exported", program.module()(x), found, 1e-6)
