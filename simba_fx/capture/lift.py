"""While a model is captured, each scan becomes one canonical operator.

A Python function that runs a scan (a loop over tokens, a CUDA extension) cannot be read from a graph. So while the
model is traced, and only then, every such function is replaced, *in the modules that call it*, by its row of the lift
table: an adapter that names the scan's operands. The call turns into three nodes:

    enter = simba_fx.site_enter(u, [every tensor argument of the call], site)
    y, state = simba_fx.selective_scan(enter, delta, A, B, C, ...)
    result = simba_fx.site_exit(y, site, 0)

The scan is what the passes look for. The two markers are identities that remember the original call, so that
`kernels="model"` can put the model's own function back, argument for argument; otherwise they are erased.
After capture every patched name is back as it was, on errors too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simba_fx.capture import scan_functions
from simba_fx.capture.examples import autocast_dtype
from simba_fx.capture.function_adapter import adapter_of
from simba_fx.capture.rows import Adapter, Finish, Linear, Row, StandIn
from simba_fx.compiling import capturing
from simba_fx.errors import CaptureError, OperandError, SimbaError
from simba_fx.ops.operands import CausalConv, Operands

__all__ = [
    "CallSite",
    "callers",
    "dtypes_of",
    "known_functions",
    "lifted",
    "marked",
    "named_operands",
    "recorder",
    "register_scan",
    "registered",
    "returned",
    "user_rows",
    "when_registered",
    "wrong_operands",
]


@dataclass(eq=False)
class CallSite:
    """One call of a lifted function, remembered while the model was captured."""

    function: Callable[..., Any]
    spec: pytree.TreeSpec
    leaves: list[Any]
    """Flattened (args, kwargs); tensors are None, in the order in which the enter marker lists them."""
    results: int = 0
    scans: bool = True
    """Whether it is a scan, and no convolution."""
    dtypes: tuple[torch.dtype | None, ...] = ()
    """Of its tensors, and what autocast casts to (`dtypes_of`)."""
    own: bool = False
    """Whether it is always called again, for its own backward (`simba_fx.capture.gradients`)."""

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that differ in their tensors only."""
        return (self.function, self.spec, tuple(repr(leaf) for leaf in self.leaves), self.results)

    def call(self, *tensors: Tensor) -> list[Any]:
        """The original function on these tensors; its results as a flat list."""
        remaining = iter(tensors)
        leaves = [leaf.filled(remaining) if isinstance(leaf, _Hole) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return pytree.tree_leaves(self.function(*args, **kwargs))

    @property
    def reads_modules(self) -> bool:
        """Whether a module is among its arguments, as that is whose method it is."""
        return any(isinstance(leaf, _Shell) for leaf in self.leaves)


class _Hole:
    """Where a tensor stood among a call's arguments."""

    def filled(self, tensors: Iterator[Tensor]) -> Any:
        return next(tensors)

    def __repr__(self) -> str:
        return "<tensor>"


class _Shell(_Hole):
    """Where a module stood, whose tensors are arguments of their own: those of whichever block calls."""

    def __init__(self, module: nn.Module) -> None:
        own = list(module.modules())
        places = {id(held): place for place, held in enumerate(own)}
        self.modules = [copy.copy(held) for held in own]
        self.children = [{name: child if child is None else places[id(child)] for name, child in held._modules.items()}
                         for held in own]  # fmt: skip
        for held in self.modules:
            held.__dict__ |= {kind: {name: tensor is not None for name, tensor in held.__dict__[kind].items()}
                              for kind in _TENSORS}  # fmt: skip

    @staticmethod
    def tensors(module: nn.Module) -> list[Tensor]:
        """Those that it has room for, in order."""
        every = (held for own in module.modules() for kind in _TENSORS for held in own.__dict__[kind].values())
        return [tensor for tensor in every if tensor is not None]

    def filled(self, tensors: Iterator[Tensor]) -> Any:
        copies = [copy.copy(held) for held in self.modules]
        for held, children in zip(copies, self.children):
            held.__dict__ |= {kind: {name: next(tensors) if there else None
                                     for name, there in held.__dict__[kind].items()} for kind in _TENSORS}  # fmt: skip
            held.__dict__["_modules"] = {
                name: None if place is None else copies[place] for name, place in children.items()
            }
        return copies[0]

    def __repr__(self) -> str:
        return f"<module {id(self)}>"


_TENSORS = ("_parameters", "_buffers")


# --- markers -----------------------------------------------------------------------------------------------------

_library: Any = torch.library.Library("simba_fx", "FRAGMENT")  # type: ignore[no-untyped-call]  # untyped in torch
_MARKERS = ("site", "own")
for _marker in _MARKERS:
    _library.define(f"{_marker}_enter(Tensor operand, Tensor[] arguments, int site) -> Tensor")
    _library.define(f"{_marker}_exit(Tensor result, int site, int index) -> Tensor")


def _same(tensor: Tensor, *_: Any) -> Tensor:
    fresh = tensor.new_empty_strided(tensor.size(), tensor.stride())
    return fresh if tensor.is_meta else fresh.copy_(tensor)


for _marker in (f"{what}_{edge}" for what in _MARKERS for edge in ("enter", "exit")):
    _library.impl(_marker, _same, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"simba_fx::{_marker}", lambda tensor, *_: tensor.new_empty_strided(tensor.size(), tensor.stride())
    )


# --- the table ---------------------------------------------------------------------------------------------------

_registered: dict[Callable[..., Any], Adapter] = {}
returned: dict[tuple[Callable[..., Any], Adapter, tuple[torch.dtype | None, ...]], list[torch.dtype]] = {}
"""What users' functions were seen to return for tensors of these dtypes, where their adapters said something else."""
_listeners: list[Callable[[], Any]] = []


def register_scan(function: Callable[..., Any], adapter: Adapter) -> None:
    """Make models that call `function` transformable.

    Before: `transform(model)` raises `ScanNotFoundError`. After: each call of `function` is one scan node.

    Args:
        function: the function (or method, through its class: `MyBlock.scan`) that the model calls once per scan.
        adapter: takes the same arguments and returns a `SelectiveScan`, an `SSDScan` or a `DeltaScan`; or a
            pair of that and `(y, last_state) -> result` where `function` returns anything but `y` in the same layout.

    Raises:
        SimbaError: `function` or `adapter` is not callable.
    """
    for name, value in (("function", function), ("adapter", adapter)):
        if not callable(value):
            raise SimbaError(
                f"register_scan expects a callable {name}, found {type(value).__name__}. Pass the function object that "
                "the model calls, and an adapter that takes the same arguments."
            )
    _registered[function] = adapter
    for notify in _listeners:
        notify()


def when_registered(notify: Callable[[], Any]) -> None:
    """Call `notify` whenever a user registers a scan."""
    if notify not in _listeners:
        _listeners.append(notify)


def _row(owner: Any, name: str, value: Any) -> Adapter | StandIn | None:
    row = _found_row(owner, name, value)
    return adapter_of(value, row) if isinstance(row, Linear) else row


def _found_row(owner: Any, name: str, value: Any) -> Row | None:
    """The row that lifts `owner.name`: a user's own before the table's; found by who looks the name up, or, where a
    user's code imports a library's function, by whose function it is."""
    if not callable(value):
        return None
    if (adapter := registered(value)) is not None:
        return adapter
    if inspect.isclass(owner):
        return scan_functions.row_of(owner.__module__, f"{owner.__name__}.{name}")
    if not inspect.ismodule(owner):
        return None
    row = scan_functions.row_of(owner.__name__, name)
    if row is None and inspect.isfunction(value):
        return scan_functions.row_of(value.__module__ or "", value.__name__)
    return row


def _own_row(value: Any) -> Adapter | None:
    return registered(value) if callable(value) else None


def callers(model: nn.Module) -> Iterator[Any]:
    """The Python modules and classes whose names a forward of `model` looks up."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    classes -= {nn.Module, object}
    yield from {id(m): m for cls in classes if (m := sys.modules.get(cls.__module__)) is not None}.values()
    yield from classes
    yield from scan_functions.CALLERS


def _holders(model: nn.Module) -> Iterator[Any]:
    """Whatever else holds a function that a user registered, under whatever name: the module that defines it, helpers
    in other files that import it, modules of the model that keep it as an attribute."""
    wanted = set(map(id, _registered))
    loaded = [module for module in list(sys.modules.values()) if inspect.ismodule(module)] if wanted else []
    for holder in (*loaded, *model.modules()):
        if not wanted.isdisjoint(map(id, list(vars(holder).values()))):  # thousands of modules are asked, in C
            yield holder


def registered(function: Callable[..., Any]) -> Adapter | None:
    """The adapter that a user registered for a function, or for what it wraps."""
    for candidate in (function, inspect.unwrap(function)):
        try:
            if candidate in _registered:
                return _registered[candidate]
        except TypeError:  # an unhashable callable
            continue
    return None


def user_rows() -> Iterator[tuple[Callable[..., Any], Adapter]]:
    """The functions that a user registered, each with its adapter."""
    yield from _registered.items()


def known_functions() -> Iterator[tuple[Callable[..., Any], Row]]:
    """Every function that has a row and whose Python module is loaded; the user's own first."""
    yield from user_rows()
    for module in list(sys.modules.values()):
        if inspect.ismodule(module):
            yield from scan_functions.rows_of(module)


@contextmanager
def lifted(model: nn.Module, record: Recorder | None = None) -> Iterator[list[CallSite]]:
    """Replace the scan functions that `model` calls while the body runs; yield the list of call sites, filled as the
    model is traced. One thread at a time: names are patched for the whole process.

    `record` makes what stands in for a function, from it, its adapter and that list; None: `recorder`.
    """
    record = record or recorder
    scan_functions.refuse_unsupported(model)
    sites: list[CallSite] = []
    with capturing():
        undo: list[tuple[Any, str, Any]] = []
        inside: dict[Callable[..., Any], Callable[..., Any]] = {}
        try:
            lookers = list(callers(model))
            for owner, name, held in _partials(model):
                function = held.func
                row = _row(sys.modules.get(function.__module__), function.__name__, function)
                if row is None:
                    continue
                if function not in inside:  # one for all, so that blocks that are alike stay it
                    inside[function] = _in_this_thread(function, _stands_in(function, row, record, sites))
                undo.append((owner, name, held))
                setattr(owner, name, functools.partial(inside[function], *held.args, **held.keywords))
            for owner in {id(owner): owner for owner in (*lookers, *_holders(model))}.values():
                for name, value in list(vars(owner).items()):
                    row = _row(owner, name, value) if owner in lookers else _own_row(value)
                    if row is None:
                        continue
                    undo.append((owner, name, value))
                    setattr(owner, name, _in_this_thread(value, _stands_in(value, row, record, sites)))
            yield sites
        finally:
            for owner, name, value in reversed(undo):
                setattr(owner, name, value)


def _stands_in(function: Callable[..., Any], row: Adapter | StandIn, record: Recorder,
               sites: list[CallSite]) -> Callable[..., Any]:  # fmt: skip
    return row.stand_in(function) if isinstance(row, StandIn) else record(function, row, sites)


def _partials(model: nn.Module) -> Iterator[tuple[nn.Module, str, functools.partial[Any]]]:
    """Functions that modules hold with some of their arguments: what is looked up when the model runs is that."""
    for module in model.modules():
        for name, held in list(vars(module).items()):
            if isinstance(held, functools.partial) and inspect.isfunction(held.func):
                yield module, name, held


def _in_this_thread(function: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """`stand_in` where the model is traced; other threads, which may run a model meanwhile, call `function`."""
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (stand_in if threading.get_ident() == thread else function)(*args, **kwargs)

    return call


def named_operands(function: Callable[..., Any], adapter: Adapter, args: Sequence[Any],
                   kwargs: Mapping[str, Any]) -> tuple[Operands, Finish] | None:  # fmt: skip
    """What one call of a lifted function is given, and how its result is made; None: the call is left as it is.

    Raises:
        CaptureError: the adapter fails, returned something else, or refuses the call.
    """
    try:
        adapted = adapter(*args, **kwargs)
    except SimbaError:
        raise
    except Exception as error:
        told = (str(error).strip() or "no more is said").splitlines()[0]
        raise CaptureError(
            f"The adapter registered for {function.__qualname__} raised {type(error).__name__}: {told}. It is given "
            "what the function is given; expected the scan's operands in return. Correct the call of "
            "simba_fx.register_scan."
        ) from error
    if adapted is None:
        return None
    operands, finish = adapted if isinstance(adapted, tuple) else (adapted, lambda y, _: y)
    if not isinstance(operands, Operands):
        raise CaptureError(
            f"The adapter registered for {function.__qualname__} returned {type(operands).__name__}; expected a scan's "
            "operands: simba_fx.SelectiveScan, simba_fx.SSDScan or simba_fx.DeltaScan. Correct the call of "
            "simba_fx.register_scan."
        )
    return operands, finish


def wrong_operands(function: Callable[..., Any], error: Exception) -> CaptureError:
    """What is said where our scan cannot run on what an adapter returned."""
    return CaptureError(
        f"The adapter registered for {function.__qualname__} returned operands that do not fit: {error}"
    )


def recorder(function: Callable[..., Any], adapter: Adapter, sites: list[CallSite]) -> Callable[..., Any]:
    """What stands in for a scan `function` while the model is traced."""

    def record(*args: Any, **kwargs: Any) -> Any:
        adapted = named_operands(function, adapter, args, kwargs)
        if adapted is None:
            return function(*args, **kwargs)
        operands, finish = adapted
        leaves, spec = pytree.tree_flatten((args, kwargs))
        seen = returned.get((function, adapter, dtypes_of(leaves)))

        def run(entered: Tensor) -> Any:
            try:
                result = finish(*dataclasses.replace(operands, **{operands.entry: entered}).run())
            except OperandError as error:
                raise wrong_operands(function, error) from error
            if seen is None:
                return result
            dtypes = iter(seen)
            return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(next(dtypes)), result)

        scans = not isinstance(operands, CausalConv)
        return marked(sites, function, leaves, spec, getattr(operands, operands.entry), run, scans=scans)

    return record


def dtypes_of(leaves: Sequence[Any]) -> tuple[torch.dtype | None, ...]:
    """Of the tensors among a call's arguments, and what autocast casts to where they lie."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return *(tensor.dtype for tensor in tensors), autocast_dtype(tensors[0].device) if tensors else None


def marked(sites: list[CallSite], function: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec, entry: Tensor,
           run: Callable[[Tensor], Any], *, scans: bool = False, own: bool = False) -> Any:  # fmt: skip
    """`run(entry)` between two markers, as one more of `sites`: a call of `function`, with these arguments."""
    if any(isinstance(leaf, torch.SymInt) for leaf in leaves):
        raise CaptureError(
            f"{function.__qualname__} was called with a length as a plain number; expected tensors and constants. "
            "Read the length from a tensor inside the function."
        )
    tensors = [held for leaf in leaves for held in _tensors(leaf)]
    holes = [_hole(leaf) for leaf in leaves]
    site, index = CallSite(function, spec, holes, scans=scans, dtypes=dtypes_of(leaves), own=own), len(sites)
    sites.append(site)
    enter, leave = (getattr(torch.ops.simba_fx, f"{_MARKERS[own]}_{edge}") for edge in ("enter", "exit"))
    flat, result_spec = pytree.tree_flatten(run(enter(entry, tensors, index)))
    site.results = len(flat)
    left = [leave(leaf, index, i) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(flat)]
    return pytree.tree_unflatten(left, result_spec)


_HOLE = _Hole()


def _hole(leaf: Any) -> Any:
    if isinstance(leaf, nn.Module) and _Shell.tensors(leaf):
        return _Shell(leaf)
    return _HOLE if isinstance(leaf, Tensor) else leaf


def _tensors(leaf: Any) -> list[Tensor]:
    return _Shell.tensors(leaf) if isinstance(leaf, nn.Module) else [leaf] if isinstance(leaf, Tensor) else []


Recorder = Callable[[Callable[..., Any], Adapter, list[CallSite]], Callable[..., Any]]
