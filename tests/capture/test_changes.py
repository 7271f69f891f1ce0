"""What a forward changes of its model from call to call: buffers, counters, and the noise that it draws."""

from __future__ import annotations

import collections
import copy
import warnings
from collections.abc import Callable
from typing import Any

import own_model
import pytest
import torch
import torch.nn.utils.prune
from reference import assert_close, on_survivors
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import CaptureError

KEEP_ALL = [1, 1 - 1e-6, 1 - 2e-6]


class Block(own_model.Block):  # type: ignore[misc]  # the example's own
    def __init__(self, before: nn.Module) -> None:
        super().__init__(16, 4)
        self.before = before

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = super().forward(self.before(hidden))
        return found


def model(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(1)
    made = own_model.MyMamba(vocabulary=97, width=16, states=4, depth=3)
    made.blocks = nn.ModuleList(Block(make()) for _ in range(3))
    return made


def ids(seed: int = 3) -> Tensor:
    return torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(seed))


class Average(nn.Module):
    """Keeps a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)  # type: ignore[operator]
        return x - self.mean


class Replaced(Average):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return x - self.mean


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.norm(x.transpose(1, 2)).transpose(1, 2))
        return found


@pytest.mark.parametrize("make", [Average, Normed])
def test_buffers_that_are_written_in_place_are_the_dense_models(make: Callable[[], nn.Module]) -> None:
    dense = model(make).train()
    twin = copy.deepcopy(dense)
    everything = simba_fx.transform(twin, KEEP_ALL, criterion="simba")
    for seed in range(3):
        assert_close("output", everything(ids(seed)), dense(ids(seed)), 1e-5)
    for (name, own), right in zip(twin.named_buffers(), dense.buffers(), strict=True):
        assert_close(name, own, right, 1e-5)


def test_another_tensor_in_a_buffers_place_is_refused() -> None:
    made = model(Replaced).train()
    before = made.blocks[0].before.mean
    with pytest.raises(CaptureError, match=r"puts another tensor in the place of its buffer blocks\.0\.before\.mean"):
        simba_fx.transform(made, "linear")
    assert made.blocks[0].before.mean is before
    made.eval()
    assert torch.equal(simba_fx.transform(made, "dense", kernels="model")(ids()), made(ids()))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.started = False
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        self.length = x.shape[1]
        first, self.started = not self.started, True
        return x * 2 if first else x


def test_an_attribute_that_changes_is_named() -> None:
    made = model(Counts)
    told = r"MyMamba's forward changes blocks\.0\.before\.started from False to True \(and 2 others\); its graph"
    with pytest.warns(UserWarning, match=told):
        simba_fx.transform(made, "linear")
    assert not made.blocks[0].before.started
    made(ids())  # as it says
    assert_close("output", simba_fx.transform(made, KEEP_ALL, criterion="simba")(ids()), made(ids()), 1e-5)


class Kept(nn.Module):
    """Leaves tensors for others to read: the loss of a router, what was seen so far."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.last: dict[str, Tensor] = {}
        self.states: tuple[Tensor, ...] = ()
        self.router: Tensor | None = None
        self.history = collections.deque[Tensor](maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.loss = self.router = x.square().mean()
        self.seen.append(x)
        self.last["x"] = x
        self.states = (x, x)
        self.history.append(x)
        return x * 2


def test_tensors_that_a_forward_keeps_are_named_and_the_dense_models_stay() -> None:
    made = model(Kept)
    told = r"^MyMamba's forward keeps tensors in blocks\.0\.before\.seen \(and 17 others\), which a call of its graph"
    with pytest.warns(UserWarning, match=told) as warned:
        everything = simba_fx.transform(made, KEEP_ALL, kernels="model")
    assert warned[0].filename == __file__
    for block in made.blocks:
        assert not block.before.seen
        assert not block.before.last
        assert block.before.states == ()
        assert block.before.router is None
        assert not block.before.history
        assert not hasattr(block.before, "loss")
    found = everything(ids())
    assert_close("output", found, made(ids()), 0)
    held = made.blocks[0].before
    loss, seen, last = held.loss, held.seen, held.last
    with pytest.warns(UserWarning, match=r"keeps tensors in blocks\.0\.before\.\w+ \(and 17 others\)"):
        sparse = simba_fx.transform(made, "linear", criterion="simba")
    with pytest.warns(UserWarning, match="keeps tensors in") as warned:
        sparse.train(False)(ids())
    assert warned[0].filename == __file__
    assert held.loss is loss
    assert held.seen is seen
    assert len(seen) == 1
    assert held.last is last


class Moving(nn.Module):
    """A running mean that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(16)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return x - self.mean


def test_another_tensor_in_the_place_of_one_that_is_read_is_refused() -> None:
    made = model(Moving)
    before = made.blocks[0].before.mean
    told = r"MyMamba's forward reads blocks\.0\.before\.mean, and puts another .* Call self\.register_buffer once, and"
    with pytest.raises(CaptureError, match=told):
        simba_fx.transform(made, "linear")
    assert made.blocks[0].before.mean is before


def weight_norm(layer: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and all over what people have
        nn.utils.weight_norm(layer)


def pruned(layer: nn.Linear) -> None:
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*has forward hooks on what is not called")
@pytest.mark.parametrize("change", [weight_norm, pruned])
def test_weights_that_hooks_make_are_made_at_each_call(change: Callable[[nn.Linear], None]) -> None:
    made = own_model.MyMamba(vocabulary=97, width=16, states=4, depth=3)
    for block in made.blocks:
        change(block.inputs)
    everything = simba_fx.transform(made, KEEP_ALL, criterion="simba")
    optimizer = torch.optim.SGD(everything.parameters(), 0.5)
    for _ in range(3):
        found = everything(ids())
        assert_close("output", found, made(ids()), 1e-5)
        optimizer.zero_grad()
        found.square().mean().backward()
        optimizer.step()


def jitter(x: Tensor) -> Tensor:
    return x * torch.empty_like(x).uniform_(0.9, 1.1)


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "like the tokens": lambda x: x + torch.randn_like(x),
    "of the length": lambda x: x * torch.rand(x.shape[1], 1),
    "in place": jitter,
    "a token at a time": lambda x: x * torch.bernoulli(torch.full(x.shape[:2], 0.5)).unsqueeze(-1),
    "a row at a time": lambda x: x * (torch.rand(x.shape[0], 1, 1) > 0.3),
    "of the tokens": lambda x: nn.functional.rrelu(x, training=True),
}


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x)


@pytest.mark.parametrize("compile", ["blocks", "whole"])
@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_noise_is_drawn_for_the_survivors(noise: Callable[[Tensor], Tensor], compile: str) -> None:
    made, x = model(lambda: Noisy(noise)), ids()
    sparse = simba_fx.transform(made, [1, 0.5, 0.3], criterion="recent", output="kept", compile=compile)
    torch.manual_seed(5)
    found = sparse(x)
    torch.manual_seed(5)
    hidden = on_survivors(made.embedding(x), made.blocks, simba_fx.kept(sparse))
    assert_close("output", found, made.head(made.norm(hidden)), 1e-5)


class InPlace(own_model.Block):  # type: ignore[misc]  # the example's own
    """As people write it to save memory."""

    def forward(self, hidden: Tensor) -> Tensor:
        x, gate = self.inputs(self.norm(hidden)).chunk(2, dim=-1)
        x = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2).sigmoid()
        step, B, C = self.selection(x).split(self.sizes, dim=-1)
        y = own_model.scan(x, nn.functional.softplus(step), -torch.exp(self.A_log), B, C)
        y += self.D * x
        y *= nn.functional.silu(gate)
        out: Tensor = self.output(y)
        out += hidden
        out[..., 0] = 0
        return out


@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_results_may_be_written_into(compile: str) -> None:
    torch.manual_seed(1)
    made, x = own_model.MyMamba(vocabulary=97, width=16, states=4, depth=3), ids()
    made.blocks = nn.ModuleList(InPlace(16, 4) for _ in range(3))
    sparse = simba_fx.transform(made, [1, 0.5, 0.3], criterion="simba", output="kept", compile=compile)
    found = sparse(x)
    hidden = on_survivors(made.embedding(x), made.blocks, simba_fx.kept(sparse))
    right = made.head(made.norm(hidden))
    assert_close("output", found, right, 1e-5)
    gradients = (torch.autograd.grad(one.square().mean(), list(made.parameters())) for one in (found, right))
    for (name, _), mine, own in zip(made.named_parameters(), *gradients, strict=True):
        assert_close(name, mine, own, 1e-5)
