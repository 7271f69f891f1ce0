"""What a forward draws, sets and asks of its process: refused, said, or answered as in an eager call."""

from __future__ import annotations

import random
import re
import tempfile
import threading
from collections.abc import Callable
from random import random as number
from typing import Any

import numpy as np
import own_model
import pytest
import torch
from reference import assert_close
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel

import simba_fx
from simba_fx.capture.surroundings import Surroundings
from simba_fx.errors import CaptureError

Touch = Callable[[nn.Module, Tensor], Tensor]
OWN, NUMPYS, TORCHS = random.Random(0), np.random.default_rng(0), torch.Generator()
KEEP_ALL = [1, 1 - 1e-6, 1 - 2e-6]


class Block(own_model.Block):  # type: ignore[misc]  # the example's own
    def __init__(self, touch: Touch) -> None:
        super().__init__(16, 4)
        self.touch = touch

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = super().forward(self.touch(self, hidden))
        return found


def model(touch: Touch) -> Any:
    torch.manual_seed(1)
    made = own_model.MyMamba(vocabulary=97, width=16, states=4, depth=3)
    made.blocks = nn.ModuleList(Block(touch) for _ in range(3))
    return made


def transformed(touch: Touch) -> Any:
    return simba_fx.transform(model(touch), KEEP_ALL, kernels="model", criterion="simba")


def ids() -> Tensor:
    return torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))


# --- asked ---------------------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[], bool]] = {
    "compiler": lambda: torch.compiler.is_compiling(),
    "imported": lambda: is_compiling(),
    "dynamo": lambda: torch._dynamo.is_compiling(),
    "exporting": lambda: torch.compiler.is_exporting(),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_a_graph_is_the_model_as_it_runs_eagerly(question: Callable[[], bool]) -> None:
    def touch(block: nn.Module, x: Tensor) -> Tensor:
        return x * 2 if question() else x

    assert_close("output", transformed(touch)(ids()), model(touch)(ids()), 0)
    assert not torch.equal(model(touch)(ids()), model(lambda block, x: x * 2)(ids()))


# --- drawn ---------------------------------------------------------------------------------------------------------

DRAWS: dict[str, tuple[Callable[[], float], str]] = {
    "random": (lambda: random.random(), r"random\.random \(test_surroundings\.py, line \d+"),
    "imported": (lambda: number(), r"random\.random \(test_surroundings\.py, line \d+"),
    "uniform": (lambda: random.uniform(1, 2), r"Random\.random \(test_surroundings\.py, line \d+"),
    "choice": (lambda: random.choice([1.0, 2.0]), r"Random\.getrandbits \(test_surroundings\.py, line \d+"),
    "own": (lambda: OWN.gauss(), r"Random\.random \(test_surroundings\.py, line \d+"),
    "numpy": (lambda: float(np.random.rand()), r"numpy\.random\.rand \(test_surroundings\.py, line \d+"),
    "numpy-own": (lambda: float(NUMPYS.random()), r"a generator of numpy\.random while"),
}


@pytest.mark.parametrize(("draw", "told"), DRAWS.values(), ids=DRAWS)
def test_numbers_that_torch_does_not_draw_are_refused(draw: Callable[[], float], told: str) -> None:
    expected = rf"^MyMamba draws from {told}.* expected numbers that are drawn by torch, .* leave it in \.eval\(\)\.$"
    with pytest.raises(CaptureError, match=expected):
        transformed(lambda block, x: x * draw())


def test_what_draws_in_training_alone_works_in_eval() -> None:
    def layer_drop(block: nn.Module, x: Tensor) -> Tensor:
        return x if block.training and random.random() < 0.1 else x * 2

    dense = model(layer_drop).eval()
    sparse = simba_fx.transform(dense, KEEP_ALL, kernels="model", criterion="simba")
    assert_close("output", sparse(ids()), dense(ids()), 0)
    with pytest.raises(CaptureError, match=r"MyMamba draws from random\.random"):
        sparse.train()(ids())
    assert_close("output", sparse.eval()(ids()), dense(ids()), 0)


def test_what_torch_draws_is_drawn_at_each_call() -> None:
    def choose(block: nn.Module, x: Tensor) -> Tensor:
        return torch.where(torch.rand(1) < 0.5, x, x * 2)

    dense, sparse, results = model(choose), transformed(choose), []
    for seed in range(4):
        torch.manual_seed(seed)
        results.append(dense(ids()))
        torch.manual_seed(seed)
        assert_close("output", sparse(ids()), results[-1], 0)
    assert any(not torch.equal(results[0], other) for other in results[1:])


def test_what_libraries_draw_for_themselves_is_left_alone() -> None:
    def noted(block: nn.Module, x: Tensor) -> Tensor:
        with tempfile.TemporaryDirectory():  # its name is drawn by `random`
            return x * 2

    assert_close("output", transformed(noted)(ids()), model(noted)(ids()), 0)


# --- set -----------------------------------------------------------------------------------------------------------


def seeded(block: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return x + torch.randn_like(x)


def forked(block: nn.Module, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        return x + torch.randn_like(x)


def put_back(block: nn.Module, x: Tensor) -> Tensor:
    state = torch.get_rng_state()
    x = x + torch.randn_like(x)
    torch.set_rng_state(state)
    return x


@pytest.mark.parametrize(("touch", "told"), [(seeded, "torch.manual_seed"), (forked, "torch.random.fork_rng"),
                                             (put_back, "torch.set_rng_state")])  # fmt: skip
def test_forwards_that_set_the_random_state_are_refused(touch: Touch, told: str) -> None:
    dense, state = model(touch), torch.get_rng_state()
    expected = rf"^MyMamba calls {re.escape(told)} \(test_surroundings\.py, line \d+: .* keep them in a buffer\.$"
    with pytest.raises(CaptureError, match=expected):
        simba_fx.transform(dense, KEEP_ALL, criterion="simba")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("touch", [lambda block, x: x + torch.randn(x.shape, generator=TORCHS),
                                   lambda block, x: x * x.sigmoid().bernoulli(generator=TORCHS)])  # fmt: skip
def test_generators_are_refused(touch: Touch) -> None:
    expected = r"^MyMamba draws from a torch\.Generator \(test_surroundings\.py, line \d+: .* Leave out generator=\.$"
    with pytest.raises(CaptureError, match=expected):
        transformed(touch)


def test_settings_that_a_graph_does_without_are_said() -> None:
    def attends(block: nn.Module, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return (
                x + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
            )

    told = r"^MyMamba calls torch\.nn\.attention\.sdpa_kernel \(test_surroundings\.py, line \d+: .* around its calls\.$"
    with pytest.warns(UserWarning, match=told):
        sparse = transformed(attends)
    with sdpa_kernel(SDPBackend.MATH):  # the advice
        assert_close("output", sparse(ids()), model(attends)(ids()), 0)


# --- afterwards ----------------------------------------------------------------------------------------------------


def test_nothing_stays_patched_and_other_threads_are_left_alone() -> None:
    drawn: list[float] = []

    def elsewhere(block: nn.Module, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: drawn.extend((number(), random.uniform(1, 2), np.random.rand())))
        thread.start()
        thread.join()
        return x

    watched = [torch, torch.random, torch.compiler, torch.nn.attention, random, random.Random, np.random]
    before = [dict(vars(held)) for held in watched]
    names = number, is_compiling, sdpa_kernel
    transformed(elsewhere)
    assert len(drawn) >= 3
    with pytest.raises(CaptureError):
        transformed(lambda block, x: x * number())
    for held, was in zip(watched, before):
        assert dict(vars(held)) == was
    assert names == (number, is_compiling, sdpa_kernel)
    with Surroundings(model(seeded), "MyMamba").watched():
        assert names != (number, is_compiling, sdpa_kernel)
