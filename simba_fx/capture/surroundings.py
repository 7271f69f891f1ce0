"""What a forward draws, sets and asks of the process that it runs in, which no graph does at its calls.

random, numpy.random                      refused: a graph would repeat what was drawn while it was captured
torch.manual_seed, torch.Generator …      refused: a graph draws from torch's random state, and leaves it at that
sdpa_kernel, cudnn.flags …                a warning: a graph computes as without
torch.compiler.is_compiling …             answered as in an eager call, since that is what a graph stands for
"""

from __future__ import annotations

import functools
import inspect
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
import torch.nn.attention
from torch import nn

from simba_fx.capture.guards import line_of
from simba_fx.capture.lift import callers
from simba_fx.compiling import questions_about_compiling
from simba_fx.errors import CaptureError, warn

__all__ = ["Surroundings", "refuse_generator"]

_SETTINGS: tuple[tuple[Any, str], ...] = (
    (torch, "set_float32_matmul_precision"),
    (torch, "use_deterministic_algorithms"),
    (torch.nn.attention, "sdpa_kernel"),
    (torch.backends.cuda, "sdp_kernel"),
    (torch.backends.cudnn, "flags"),
    (torch.backends.mkldnn, "flags"),
)
_SEEDS = ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "set_rng_state_all", "fork_rng")
_DRAWS = ("random", "getrandbits", "seed", "setstate")
"""Methods of `random.Random` that the others draw by."""
_LIBRARIES = {*sys.stdlib_module_names, "numpy", "simba_fx", "sympy", "torch"} - {"test"}
Asked = Callable[[str, FrameType], Any]
"""Called with the name of what a model's own code calls, and with the frame that does; returns the answer, or None:
the function itself is called."""


class Surroundings:
    """Around a forward of `model` while it is traced; `name` is what messages call it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        self.settings: dict[str, None] = {}
        """What the forward sets, and where."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """
        Raises:
            CaptureError: the model's own code draws outside of torch, or sets torch's random state.
        """
        numpy: Any = sys.modules.get("numpy.random")
        files = [held for name, held in list(sys.modules.items()) if _library(name) not in _LIBRARIES]
        classes = filter(inspect.isclass, callers(self.model))
        holders = [*filter(inspect.ismodule, files), *classes, *self.model.modules()]
        before = {id(held): (held, pickle.dumps(held)) for held in _generators(holders, numpy)}
        stand_ins: dict[int, Any] = {}
        with ExitStack() as undo:
            for owner, name, asked in self._asked(numpy):
                function = getattr(owner, name)
                stand_ins[id(function)] = _stand_in(f"{owner.__name__}.{name}", function, asked)
                inherited = isinstance(owner, type) and name not in vars(owner)
                undo.callback(*(delattr, owner, name) if inherited else (setattr, owner, name, function))
                setattr(owner, name, stand_ins[id(function)])
            for holder in holders:
                if stand_ins.keys().isdisjoint(map(id, list(vars(holder).values()))):  # asked in C
                    continue
                for name, held in list(vars(holder).items()):
                    if id(held) in stand_ins:
                        undo.callback(setattr, holder, name, held)
                        setattr(holder, name, stand_ins[id(held)])
            yield
        if any(pickle.dumps(held) != state for held, state in before.values()):
            self._refuse_draw("a generator of numpy.random", None)

    def _asked(self, numpy: Any) -> Iterator[tuple[Any, str, Asked]]:
        """Functions by their owner and name."""
        for owner in (random, random.Random):
            yield from ((owner, name, self._refuse_draw) for name in _DRAWS)
        if numpy is not None:
            yield numpy, "seed", self._refuse_draw
            for name, held in list(vars(numpy).items()):
                if isinstance(getattr(held, "__self__", None), numpy.RandomState) and name != "get_state":
                    yield numpy, name, self._refuse_draw
        for owner in (torch, torch.random, torch.cuda, torch.cuda.random):
            yield from ((owner, name, self._refuse_seed) for name in _SEEDS if hasattr(owner, name))
        yield from ((owner, name, self._note_setting) for owner, name in _SETTINGS)
        yield from ((owner, name, _answer) for owner, name in questions_about_compiling())

    def _refuse_draw(self, told: str, frame: FrameType | None) -> None:
        raise CaptureError(
            f"{self.name} draws from {told}{_place(frame)} while it runs; expected numbers that are drawn by torch, "
            "since a graph would repeat what was drawn when it was captured. Use nn.Dropout, or torch.rand and "
            "torch.where; if it draws in training alone, leave it in .eval()."
        )

    def _refuse_seed(self, told: str, frame: FrameType | None) -> None:
        raise CaptureError(
            f"{self.name} calls {told}{_place(frame)} while it runs; expected a forward that only draws from torch's "
            "random state, since that is all that a graph does. Set it outside of the model, or make such numbers once "
            "and keep them in a buffer."
        )

    def _note_setting(self, told: str, frame: FrameType | None) -> None:
        self.settings[f"{told}{_place(frame)}"] = None

    def warn(self) -> None:
        """Say what the graph does without."""
        if self.settings:
            warn(
                f"{self.name} calls {', '.join(self.settings)} while it runs, and its graph does not. Call it before "
                "the model, or around its calls."
            )


def refuse_generator(name: str, frame: FrameType | None) -> None:
    """Raises: CaptureError: `frame` draws from a `torch.Generator`, in a model called `name`."""
    raise CaptureError(
        f"{name} draws from a torch.Generator{_place(frame)}; expected numbers that are drawn from torch's own random "
        "state, since a graph holds no generator. Leave out generator=."
    )


def _stand_in(told: str, function: Callable[..., Any], asked: Asked) -> Callable[..., Any]:
    thread = threading.get_ident()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while _library(frame.f_globals.get("__name__", "")) == "random" and frame.f_back is not None:
            frame = frame.f_back  # its functions call each other
        own = threading.get_ident() == thread and _library(frame.f_globals.get("__name__", "")) not in _LIBRARIES
        answer = asked(told, frame) if own else None
        return function(*args, **kwargs) if answer is None else answer

    return call


def _answer(told: str, frame: FrameType) -> bool | None:
    """transformers asks so before it calls kernels that no trace can follow."""
    return None if _library(frame.f_globals["__name__"]) == "transformers" else False


def _generators(holders: list[Any], numpy: Any) -> Iterator[Any]:
    kinds = set() if numpy is None else {numpy.Generator, numpy.RandomState}
    for holder in holders:
        if not kinds.isdisjoint(map(type, list(vars(holder).values()))):
            yield from (held for held in vars(holder).values() if type(held) in kinds)


def _library(name: str) -> str:
    return name.partition(".")[0]


def _place(frame: FrameType | None) -> str:
    return "" if frame is None else f" ({line_of(frame.f_code.co_filename, frame.f_lineno)})"
