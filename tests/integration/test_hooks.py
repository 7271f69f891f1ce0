"""What a user hangs on a sparse model's modules: hooks run as often as the dense model's, and see what its hooks see.

Hooks of whole blocks and of what surrounds them run at every call; those inside a block become part of the graph.
"""

from __future__ import annotations

import importlib
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from graph_cases import WIDTH, Block, Plain
from models import BY_NAME, logits, tokens
from reference import TOLERANCE, assert_close
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import CaptureError

own_model: Any = importlib.import_module("own_model")

SHAPES = ((1, 20), (2, 33))
FAMILIES = ("mamba", "zamba2", "jamba")
PLAIN = (torch.zeros(2, 24, WIDTH),)


class Counter:
    """A forward hook that notes the shape of the first result."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        assert type(first) is Tensor
        self.seen.append(tuple(first.shape))


TIMES = (("mamba", "before", False), ("mamba", "after", True), ("zamba2", "after", False),
         ("zamba2", "after a call", True), ("jamba", "after a call", False), ("jamba", "before", True))  # fmt: skip
"""Each family, and each time, in two of them: compiled and not."""


def places(model: Any) -> list[nn.Module]:
    """Where hooks run at each call."""
    return [model, model.base_model, model.get_input_embeddings(), *model.base_model.layers]


@pytest.mark.parametrize(("name", "when", "compiled"), TIMES)
def test_hooks_run_as_often_as_in_the_dense_model(name: str, when: str, compiled: bool) -> None:
    model = BY_NAME[name].build()
    counters = [Counter() for _ in places(model)]
    expected = []
    for rows, length in SHAPES:
        expected.append(logits(model, input_ids=tokens(1, rows, length)))
    if when == "before":
        for place, counter in zip(places(model), counters, strict=True):
            place.register_forward_hook(counter)
    sparse = simba_fx.transform(model, "dense")
    assert not any(counter.seen for counter in counters), "nothing runs while a model is transformed"
    if when == "after a call":
        logits(sparse, input_ids=tokens(3, 2, 30))
    if when != "before":
        for place, counter in zip(places(sparse), counters, strict=True):
            place.register_forward_hook(counter)
    runs = torch.compile(sparse, backend="eager") if compiled else sparse
    for (rows, length), dense in zip(SHAPES, expected, strict=True):
        found = logits(runs, input_ids=tokens(1, rows, length))
        assert_close("logits", found, dense, TOLERANCE[torch.float32])
    for counter in counters[1:] if compiled else counters:  # Dynamo compiles the hooks of the outermost module
        assert [seen[:2] for seen in counter.seen] == list(SHAPES)
    sparse.generate(tokens(1, 1, 10), max_new_tokens=3, do_sample=False)
    assert all(len(counter.seen) == len(SHAPES) + 3 for counter in counters[1:])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_hook_of_a_block_may_change_what_it_gives(compiled: bool) -> None:
    """Steering: a vector is added to the hidden states that leave a block."""
    model = BY_NAME["mamba"].build()
    vector = torch.randn(model.config.hidden_size)

    def steer(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    sparse = simba_fx.transform(model, "dense")
    before = logits(sparse)
    runs: Any = torch.compile(sparse, backend="eager") if compiled else sparse
    handles = [m.base_model.layers[1].register_forward_hook(steer) for m in (model, sparse)]
    assert_close("logits", logits(runs), logits(model), TOLERANCE[torch.float32])
    assert not torch.equal(logits(sparse), before)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(sparse), before)


def test_backward_hooks_of_blocks_run() -> None:
    model = BY_NAME["mamba"].build()
    found: dict[str, list[Tensor]] = {"dense": [], "sparse": []}
    for key, m in (("dense", model), ("sparse", simba_fx.transform(model, "dense", kernels="model"))):
        for layer in m.base_model.layers:
            layer.register_full_backward_hook(lambda _, gi, go, key=key: found[key].append(gi[0]))
        m(tokens(1, 2, 20), use_cache=False).logits.square().mean().backward()
    assert len(found["dense"]) == len(model.base_model.layers)
    torch.testing.assert_close(found["sparse"], found["dense"])


def test_noise_on_embeddings() -> None:
    """NEFTune: transformers' Trainer puts such a hook on the embedding."""
    model = BY_NAME["mamba"].build()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 2)
    sparse = simba_fx.transform(model, "dense", kernels="model")
    assert torch.equal(logits(sparse), logits(model))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_inside_a_block_becomes_part_of_the_graph(when: str) -> None:
    model = BY_NAME["mamba"].build()
    sparse = simba_fx.transform(model, "dense", kernels="model")
    logits(sparse)

    def louder(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2

    targets = [model] if when == "before" else [model, sparse]
    handles = [m.base_model.layers[2].mixer.register_forward_hook(louder) for m in targets]
    with pytest.warns(UserWarning, match=r"what is not called while a prompt runs \(layers\.2\.mixer\)"):
        found = logits(sparse if when == "after" else simba_fx.transform(model, "dense", kernels="model"))
    assert torch.equal(found, logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(sparse)
    handles[-1].remove()
    if when == "after":
        assert not torch.equal(logits(sparse), logits(model))


def test_a_forward_that_is_replaced_inside_a_block_is_refused_and_a_subclass_works() -> None:
    model = BY_NAME["mamba"].build()
    sparse = simba_fx.transform(model, "dense", kernels="model")
    before, mixer = logits(sparse), sparse.base_model.layers[1].mixer
    own = mixer.forward
    mixer.forward = lambda *args, **kwargs: own(*args, **kwargs) * 2
    with pytest.raises(
        CaptureError, match=r"The forward of layers\.1\.mixer \(MambaMixer\) was replaced on the object"
    ):
        logits(sparse)
    del mixer.forward
    assert torch.equal(logits(sparse), before)

    class Louder(type(mixer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 2

    for m in (model, sparse):
        m.base_model.layers[1].mixer.__class__ = Louder
    assert torch.equal(logits(sparse), logits(model))


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(self.drop(x))
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_a_plain_module_follows_its_mode(compile: str) -> None:
    module = WithDropout().eval()
    sparse = simba_fx.transform(module, "dense", example_inputs=PLAIN, kernels="model", compile=compile)
    x = torch.randn(3, 30, WIDTH)
    for mode in (False, True, False, True):
        module.train(mode)
        sparse.train(mode)
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        torch.testing.assert_close(sparse(x), expected)
        assert sparse.training == mode
        again = [sparse(x), sparse(x)]
        assert torch.equal(*again) == (not mode)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_a_plain_module(when: str) -> None:
    module = Plain(Block(), Block(), Block()).eval()
    counters = [Counter() for _ in range(4)]
    sparse = simba_fx.transform(module, (1, 1, Fraction(1, 2)), example_inputs=PLAIN) if when == "after" else None
    target: Any = module if sparse is None else sparse
    for place, counter in zip((target, *target.layers), counters, strict=True):
        place.register_forward_hook(counter)
    if sparse is None:
        sparse = simba_fx.transform(module, (1, 1, Fraction(1, 2)), example_inputs=PLAIN)
    kept = []
    for rows, length in ((1, 20), (2, 40)):
        sparse(torch.randn(rows, length, WIDTH))
        kept.append(simba_fx.kept(sparse)[-1].shape[1])
    assert [seen[:2] for seen in counters[0].seen] == [(1, 20), (2, 40)]
    assert all([seen[:2] for seen in c.seen] == [(1, 20), (2, 40)] for c in counters[1:3])
    assert [seen[1] for seen in counters[3].seen] == kept
    assert kept[0] < 20


class Around(nn.Module):
    """Residuals around the members of the list: a block is more than its module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x * 0.5 + layer(x)
        return x


@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_hooks_of_what_is_not_called_are_taken_in_and_named(compile: str) -> None:
    module = Around() if compile == "blocks" else Plain(Block(), Block(), Block())
    module.eval().layers[1].register_forward_hook(lambda module, args, output: output * 2)  # type: ignore[operator]
    x = torch.randn(2, 30, WIDTH)
    make = lambda: simba_fx.transform(module, "dense", example_inputs=PLAIN, kernels="model", compile=compile)  # noqa: E731
    with pytest.warns(UserWarning, match=r"what is not called while a prompt runs \(layers\.1\)"):
        found = make()(x)
    torch.testing.assert_close(found, module(x))


def test_a_mode_that_changes_under_another_autocast() -> None:
    module = WithDropout().eval()
    x = torch.randn(2, 30, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        sparse = simba_fx.transform(module, "dense", example_inputs=PLAIN, kernels="model")
    sparse.train()
    module.train()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        assert torch.equal(sparse(x), expected)
