"""Why a model cannot be traced, in one sentence: what stands in the way, where it stands, and what works instead.

Torch's own report, with the graph so far, is printed where `TORCH_LOGS=+simba_fx` asks for it.
"""

from __future__ import annotations

import collections
import functools
import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from simba_fx.capture.examples import EXAMPLE
from simba_fx.capture.guards import Question, is_foreign, line_of
from simba_fx.capture.lift import CallSite
from simba_fx.capture.surroundings import refuse_generator
from simba_fx.compiling import FakeTensorMode
from simba_fx.errors import CaptureError, ScanNotFoundError, SimbaError

__all__ = ["Watch", "advice", "explained", "refuse_quantised", "told_in_words"]

log = logging.getLogger("simba_fx")
_CAPTURE, _LIFT = (str(Path(__file__).with_name(name)) for name in ("export.py", "lift.py"))
_ROUNDS, _CALLS = EXAMPLE["L"] - 1, 60
"""A place in the code that called so often, in one call of a function with so many operators, loops over the tokens of
the example that is traced. Loops over heads, groups or taps are shorter, as are those that refine something (20 rounds
of Sinkhorn's in GLM-5.3), and a loop over blocks calls modules in between."""
_SCANS = re.compile(
    "scan|delta_rule|segsum|ssd|ssm|kda|gla|lstm|rwkv|wkv|rg_?lru|linear_att|lightning|retention|recurren|chunk_", re.I
)
"""What functions that run recurrences are called, with or without other words around it."""


class Watch(TorchFunctionMode):
    """While a model, called `name` in messages, is traced: notes which of its functions look like scans, and stops
    where one loops over tokens before any scan was met.

    Raises:
        ScanNotFoundError: naming the function that loops, and its line.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.sites: Sequence[CallSite] = ()
        """Grows as the trace meets registered functions; whoever has a scan may loop over what is left."""
        self.questions: Sequence[Question] = ()
        """Grows as the trace asks about sizes."""
        self.called: set[str] = set()
        """Functions that look like scans and ran themselves, as `module.name`."""
        self.frame: int | None = None
        self.places: collections.Counter[tuple[int, int]] = collections.Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own, inside_module = self._look_up(sys._getframe(1))
        if kwargs and isinstance(kwargs.get("generator"), torch.Generator):
            refuse_generator(self.name, own)
        if own is not None and not inside_module and not any(site.scans for site in self.sites):
            self._count(own)
        return function(*args, **(kwargs or {}))

    def _look_up(self, frame: FrameType | None) -> tuple[FrameType | None, bool]:
        """The model's own code that called, and whether it called a module of torch's, which then did."""
        own, inside_module, alike = None, False, None
        while frame is not None and frame.f_code.co_filename != _CAPTURE:
            if frame.f_code.co_filename == _LIFT:  # a registered function: what is below it is its adapter
                alike = None
            if is_foreign(frame):
                inside_module = inside_module or (own is None and frame.f_code.co_name == "_call_impl")
            else:
                own = own or frame
                alike = frame if _looks_like_a_scan(frame.f_code) else alike
            frame = frame.f_back
        if alike is not None:
            self.called.add(_name(alike))
        return own, inside_module

    @property
    def fixed(self) -> bool:
        """Whether a size became a number, as the length does where a loop over tokens begins."""
        return any(question.fixes_a_size for question in self.questions)

    def _count(self, frame: FrameType) -> None:
        if id(frame) != self.frame and not self.fixed:  # or else the loop may call functions in between
            self.places.clear()
        self.frame = id(frame)
        self.places[id(frame), frame.f_lasti] += 1
        if self.places[id(frame), frame.f_lasti] < _ROUNDS or self.places.total() < _CALLS:
            return
        raise ScanNotFoundError(
            f"{self.name} calls {_name(frame)}, which loops over tokens in Python (line {frame.f_lineno}); "
            "expected a registered scan function, found none before it. If it computes the recurrence of Mamba or "
            f"Mamba-2, or a gated delta rule, register it: {_REGISTER}"
        )


@functools.cache  # asked for every frame of every operator
def _looks_like_a_scan(code: CodeType) -> bool:
    """By its name; methods cannot be registered."""
    return _SCANS.search(code.co_name) is not None and code.co_varnames[:1] != ("self",)


def _name(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}"


def advice(called: Collection[str] = ()) -> str:
    """What to do where a scan was missed: the last sentence of a message. `called`: functions that look like one."""
    if called:
        return (
            f" It called {', '.join(sorted(called))}, not registered. If that computes the recurrence of Mamba or "
            f"Mamba-2, or a gated delta rule, register it: {_REGISTER}"
        )
    return (
        " A model of attention or convolutions alone has no recurrence to score tokens by. If this one runs the scan "
        f"of Mamba or Mamba-2 in a function of its own, register it: {_REGISTER}"
    )


_REGISTER = (
    "simba_fx.register_scan(function, adapter). If another that is linear in its values: "
    "simba_fx.register_recurrence(function, value)."
)


def refuse_quantised(model: nn.Module) -> None:
    """Raises: CaptureError: weights that only exist in a library's own functions, which no trace can look into."""
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "bitsandbytes":
            raise CaptureError(
                f"{path or 'The model'} is a {type(module).__name__} of bitsandbytes, whose weights cannot be traced; "
                "expected weights that are tensors, plain or quantised by torchao. Load the model without "
                "load_in_8bit and load_in_4bit, or with quantization_config=TorchAoConfig(...)."
            )
        if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "_packed_params"):
            raise CaptureError(
                f"{path or 'The model'} is a {type(module).__name__} of {type(module).__module__}, whose weights are "
                "packed and cannot be traced; expected weights that are tensors, plain or quantised by torchao. "
                "Leave such a model dense, or quantise by torchao."
            )


@contextmanager
def told_in_words(name: str) -> Iterator[None]:
    """Around a traced model: what depends on values is told at once, before torch prints its graph."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SimbaError) or not _depends_on_values(error) or log.isEnabledFor(logging.DEBUG):
            raise
        raise _branches_on_values(error, name) from error


def explained(error: Exception, owner: nn.Module, module: nn.Module, inputs: Mapping[str, Any],
              questions: Sequence[Question], watch: Watch) -> Exception:  # fmt: skip
    """The error to raise where a trace stopped with `error`. One of our own comes back as it is.

    Args:
        owner: the user's model; `module(**inputs)` is what was traced.
        questions: what the trace asked about sizes; `watch`: what it saw.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SimbaError):
            return type(cause)(*cause.args)
        cause = cause.__cause__ or cause.__context__
    log.debug("torch's report on %s", type(owner).__name__, exc_info=error)
    told = str(error).strip() or type(error).__name__
    name = type(owner).__name__
    if _depends_on_values(error):
        return _branches_on_values(error, name)
    if "Constraints violated" in told or "specialized" in told:
        return _fixes_a_size(name, inputs, questions)
    if (own := _own_failure(module, inputs)) is not None:
        given = ", ".join(f"{key} {tuple(t.shape)}" for key, t in inputs.items() if isinstance(t, Tensor))
        return CaptureError(
            f"{name} fails on an example of {given}, traced or not: {_first_line(own)}{_place(own)}. Expected a model "
            "whose inputs are (B, L, ...), tokens in dimension 1. Pass example_inputs that it runs on with any two "
            "numbers there; of a model of images, transform the blocks, from the module on that takes (B, L, width)."
        )
    rest = " Torch's whole report: TORCH_LOGS=+simba_fx." if any(s.scans for s in watch.sites) else advice(watch.called)
    return CaptureError(
        f"{name} could not be captured as one graph with a symbolic length: {_first_line(error)}{_place(error)}.{rest}"
    )


def _fixes_a_size(name: str, inputs: Mapping[str, Any], questions: Sequence[Question]) -> CaptureError:
    lead = next(t for t in inputs.values() if isinstance(t, Tensor))
    fixed = [q for q in questions if isinstance(q.fact, sympy.Eq) and any(side.is_number for side in q.fact.args)]
    number, line = 0, ""
    if fixed:
        number, line = int(next(side for side in fixed[0].fact.args if side.is_number)), f" ({fixed[0].line})"
    what = {lead.shape[0]: "batch size", lead.shape[1]: "length"}.get(number, "batch size or the length")
    return CaptureError(
        f"{name} takes the {what} of its input as a plain number{line}; expected code for every size, because one "
        "graph serves them all. len(x), int(...), a Python loop over a dimension and a branch on it make such numbers: "
        f"write x.shape[{0 if what == 'batch size' else 1}], and tensor operations for the loop."
    )


def _depends_on_values(error: Exception) -> bool:
    return "data-dependent" in str(error) or "DataDependent" in type(error).__name__


def _branches_on_values(error: Exception, name: str) -> CaptureError:
    return CaptureError(
        f"{name} makes a number, a size or a branch out of the values of its tensors{_place(error)}; expected one way "
        "through the model for all inputs, because a graph holds one. Compute both sides and choose with torch.where; "
        "for a mixture of experts, run each expert on all tokens and weight the results (transformers: "
        "experts_implementation='grouped_mm')."
    )


def _own_failure(module: nn.Module, inputs: Mapping[str, Any]) -> Exception | None:
    """The error that the model raises on the example with sizes that are numbers, if it does. Computes no values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = {key: mode.from_tensor(t) if isinstance(t, Tensor) else t for key, t in inputs.items()}
        try:
            module(**fake)
        except Exception as error:
            return None if "Fake" in str(error) or _depends_on_values(error) else error
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")


def _place(error: Exception) -> str:
    """The line of the model's own code that failed."""
    trace: TracebackType | None = error.__traceback__
    found = ""
    while trace is not None:
        if not is_foreign(trace.tb_frame):
            found = line_of(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return f" ({found})" if found else ""
