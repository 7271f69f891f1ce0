"""What a model does to its own gradients holds in its sparse copy: regions under `no_grad`, functions with a backward
of their own."""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import own_model
import pytest
import torch
from reference import assert_close, on_survivors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import simba_fx

Touch = Callable[[Tensor], Tensor]


class Rounded(torch.autograd.Function):
    """A straight-through estimator: of the forward alone, the gradient is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: float) -> Tensor:
        return (x * steps).round() / steps

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        return arriving[0], None


class Halves(torch.autograd.Function):
    """Several tensors in and out, and setup_context apart."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, x - y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return arriving[0] * 3, arriving[1] * x


class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return alias(x, 10.0)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        return arriving[0] * 2


class Sized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        return arriving[0] * 5, None


alias = Rounded.apply


def straight_through(x: Tensor) -> Tensor:
    return alias(x, 10.0)


def several(x: Tensor) -> Tensor:
    one, other = Halves.apply(x, x.tanh())
    found: Tensor = one * other.sigmoid()
    return found


def nested(x: Tensor) -> Tensor:
    found: Tensor = Nested.apply(x)
    return found


def region(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.sin() + x.square().mean(-1, keepdim=True)
    return x * scale


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return x.sin()


def in_and_out(x: Tensor) -> Tensor:
    with torch.no_grad():
        stopped = x * 2
        with torch.enable_grad():
            flowing = x.sin()
        stopped = stopped + x.cos()
    with torch.set_grad_enabled(False):
        stopped = stopped + x
    return x * stopped + flowing


def as_functions(x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    stopped = x.sin()
    torch.set_grad_enabled(True)
    return x * stopped + x.cos()


def in_place(x: Tensor) -> Tensor:
    made = x * 1.0
    with torch.no_grad():
        half = x.sin()
        half.mul_(2)
    return made * half


TOUCHES: list[Touch] = [straight_through, several, nested, region, lambda x: x * decorated(x), in_and_out, as_functions,
                        in_place]  # fmt: skip
NAMES = ["straight-through", "several", "nested", "region", "decorated", "in-and-out", "as-functions", "in-place"]
touched = pytest.mark.parametrize("touch", TOUCHES, ids=NAMES)


class Block(own_model.Block):  # type: ignore[misc]  # the example's own
    def __init__(self, touch: Touch) -> None:
        super().__init__(16, 4)
        self.touch = touch

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = super().forward(self.touch(hidden))
        return found


def model(touch: Touch) -> nn.Module:
    torch.manual_seed(1)
    made = own_model.MyMamba(vocabulary=97, width=16, states=4, depth=3)
    made.blocks = nn.ModuleList(Block(touch) for _ in range(3))
    return made


def ids(*shape: int) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(3))


KEEP_ALL = [1, 1 - 1e-6, 1 - 2e-6]


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


@touched
@pytest.mark.parametrize("kernels", ["auto", "model"])
def test_with_every_token_kept_gradients_are_the_dense_models(touch: Touch, kernels: str) -> None:
    dense, x = model(touch), ids(2, 24)
    plain = model(lambda x: touch(x.detach()) - touch(x.detach()) + x)
    everything = simba_fx.transform(dense, KEEP_ALL, kernels=kernels, criterion="simba")
    right, found, other = (gradients(one(x).square().mean(), one) for one in (dense, everything, plain))
    for name, gradient in right.items():
        assert_close(name, found[name], gradient, 1e-5)
    assert not torch.allclose(right["embedding.weight"], other["embedding.weight"], rtol=1e-2)


@touched
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_gradients_of_a_pruned_model_are_those_of_its_own_blocks(touch: Touch, compile: str) -> None:
    dense, x = model(touch), ids(2, 30)
    sparse = simba_fx.transform(dense, [1, 0.5, 0.3], compile=compile, criterion="simba", output="kept")
    out = sparse(x)
    found = gradients(out.square().mean(), sparse)
    hidden = on_survivors(dense.embedding(x), dense.blocks, simba_fx.kept(sparse))
    right = dense.head(dense.norm(hidden))
    assert_close("output", out, right, 1e-5)
    for name, gradient in gradients(right.square().mean(), dense).items():
        assert_close(name, found[name], gradient, 1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does, of autograd functions
@pytest.mark.parametrize("touch", [straight_through, region])
def test_compiled_and_copied(touch: Touch) -> None:
    sparse, x = simba_fx.transform(model(touch), "linear", criterion="simba"), ids(2, 30)
    right = gradients(sparse(x).square().mean(), sparse)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager")
    for found in (gradients(compiled(x).square().mean(), sparse),
                  gradients((twin := copy.deepcopy(sparse))(x).square().mean(), twin)):  # fmt: skip
        for name, gradient in right.items():
            assert_close(name, found[name], gradient, 1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of torch, in a run without gradients
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_part_that_is_recomputed(reentrant: bool) -> None:
    """By torch's own function with a backward of its own, which runs what it is given under `no_grad`."""
    dense, x = model(lambda x: checkpoint(straight_through, region(x), use_reentrant=reentrant)), ids(2, 24)
    everything = simba_fx.transform(dense, KEEP_ALL, criterion="simba")
    everything(x).square().mean().backward()
    found = {name: held.grad.clone() for name, held in dense.named_parameters() if held.grad is not None}
    dense.zero_grad()
    dense(x).square().mean().backward()
    for name, held in dense.named_parameters():
        assert held.grad is not None
        assert_close(name, found[name], held.grad, 1e-5)


def test_a_forward_without_gradients_has_none() -> None:
    class Frozen(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = super().forward(x)
            return found

    dense, x = Frozen(depth=3), ids(2, 30)
    everything = simba_fx.transform(dense, KEEP_ALL, criterion="simba")
    assert torch.allclose(everything(x), dense(x), atol=1e-5)
    assert not everything(x).requires_grad
    graph = simba_fx.program(simba_fx.transform(dense, "linear", criterion="simba")).graph
    assert sum(node.target is torch.ops.aten.detach.default for node in graph.nodes) <= 1, "one is enough"


def test_the_graph_shows_it() -> None:
    explained = str(simba_fx.explain(simba_fx.transform(model(straight_through), "linear", criterion="simba")))
    assert "== RestoreFunctions(): 3 sites" in explained
    detached = simba_fx.transform(model(region), "linear", criterion="simba")
    counted = [node for node in simba_fx.program(detached).graph.nodes if node.target is torch.ops.aten.detach.default]
    assert len(counted) == 3, "of those in a region the one that a gradient meets first"
    plain = simba_fx.transform(own_model.MyMamba(depth=3), "linear", criterion="simba")
    assert "RestoreFunctions" not in str(simba_fx.explain(plain))


def test_gradients_of_gradients_are_refused_not_zero() -> None:
    sparse = simba_fx.transform(model(straight_through), "linear", criterion="simba")
    weights = list(sparse.parameters())
    first = torch.autograd.grad(sparse(ids(2, 24)).square().mean(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"Trying to backward through simba_fx\.\w+_backward"):
        torch.autograd.grad(sum(one.square().sum() for one in first), weights)


def test_what_no_graph_can_keep_is_said() -> None:
    def hooked(x: Tensor) -> Tensor:
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 3)
        return x

    with pytest.warns(
        UserWarning, match=r"MyMamba computes as .* may learn otherwise: test_gradients\.py, line \d+ as"
    ):
        simba_fx.transform(model(hooked), "linear", criterion="simba")
    for asks, told in ((lambda x: x.grad_fn is None, "has a grad_fn"), (lambda x: x.is_leaf, "is a leaf")):
        with pytest.warns(UserWarning, match=rf"test_gradients\.py, line \d+ asks whether a tensor {told}, which"):
            simba_fx.transform(model(lambda x, asks=asks: x * (2 - asks(x))), "linear", criterion="simba")
    told = r"learn otherwise: test_gradients\.py, line \d+ asks whether gradients are enabled, which they are not while"
    with pytest.warns(UserWarning, match=told):
        simba_fx.transform(model(lambda x: x if torch.is_grad_enabled() else x * 1.0), "linear", criterion="simba")
    kept = {"f": Rounded.apply}
    with pytest.warns(UserWarning, match=r"learn otherwise: Rounded\.apply is called by a name that is not the model"):
        simba_fx.transform(model(lambda x: kept["f"](x, 10.0)), "linear", criterion="simba")
    with pytest.warns(UserWarning, match=r"Sized\.apply is given a length, which no graph can hand on\. Gradients"):
        simba_fx.transform(model(lambda x: Sized.apply(x, x.shape[1])), "linear", criterion="simba")


def test_methods_without_a_name_are_left_alone() -> None:
    """A method of a partial has none; torchao gives such ones to the layers that it quantises."""
    made: Any = model(straight_through)
    made.blocks[0].extra_repr = types.MethodType(functools.partial(lambda own, held: "", held=0), made.blocks[0])
    made.blocks[1].held = types.MethodType(functools.partial(lambda own, held: "", held=0), Rounded)
    sparse = simba_fx.transform(made, KEEP_ALL, kernels="model", criterion="simba")
    assert_close("output", sparse(ids(2, 24)), made(ids(2, 24)), 0)


class Elsewhere(Block):
    """Another thread applies a function of its own while this one is traced."""

    def forward(self, hidden: Tensor) -> Tensor:
        x, found = torch.ones(3, requires_grad=True), []

        def run() -> None:
            with torch.no_grad():
                found.append(alias(x, 1.0).requires_grad)
            found.append(alias(x, 1.0).requires_grad)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert found == [False, True]
        return super().forward(hidden)


def test_nothing_stays_patched_and_other_threads_are_left_alone() -> None:
    def fails(x: Tensor) -> Tensor:
        with torch.no_grad():
            raise KeyError("of the model's own")

    regions = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled)
    before = [dict(vars(held)) for held in regions]
    own = dict(vars(torch.autograd.Function))
    asks = torch.is_grad_enabled
    made: Any = model(straight_through)
    made.blocks[1] = Elsewhere(straight_through)
    simba_fx.transform(made, "linear", criterion="simba")
    with pytest.raises(simba_fx.errors.CaptureError):
        simba_fx.transform(model(fails), "linear", criterion="simba")
    assert [dict(vars(held)) for held in regions] == before
    assert torch.is_grad_enabled is asks
    assert dict(vars(torch.autograd.Function)) == own
    assert alias == Rounded.apply
    assert functools.reduce(lambda x, _: alias(x, 10.0), range(2), torch.ones(2, requires_grad=True)).requires_grad
