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

import dataclasses
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simba_fx.errors import CaptureError, SimbaError

__all__ = ["Adapter", "CallSite", "CausalConv", "SSDScan", "SelectiveScan", "lifted", "register_scan"]


@dataclass(frozen=True)
class SelectiveScan:
    """The operands of one Mamba-1 scan, in the layout of `simba_fx::selective_scan` (glossary: `simba_fx.ops`).

    `u`, `delta`, `z` are `(B, D, L)`; `A` is `(D, N)`, negative; `B`, `C` are `(B, N, L)` or `(B, G, N, L)`; `D` and
    `delta_bias` are `(D,)`. `delta` is the raw step; `delta_softplus` says whether softplus is still to come.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_softplus: bool = False

    entry = "u"

    def run(self) -> tuple[Tensor, Tensor]:
        """`y (B, D, L)` in u's dtype and the last state `(B, D, N)` in float32."""
        arguments = [getattr(self, f.name) for f in dataclasses.fields(self)]
        y, state = torch.ops.simba_fx.selective_scan(*arguments)
        return y, state


@dataclass(frozen=True)
class SSDScan:
    """The operands of one Mamba-2 scan, in the layout of `simba_fx::ssd_scan`.

    `x`, `z` are `(B, L, H, P)`; `dt` is `(B, L, H)`; `A` is `(H,)`, negative; `B`, `C` are `(B, L, G, N)`; `D` is
    `(H,)` or `(H, P)`; `dt_bias` is `(H,)`. The step is `clamp(softplus(dt + dt_bias), dt_min, dt_max)`.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float = float("inf")
    chunk_size: int = 256

    entry = "x"

    def run(self) -> tuple[Tensor, Tensor]:
        """`y (B, L, H, P)` in x's dtype and the last state `(B, H, P, N)` in float32."""
        arguments = [getattr(self, f.name) for f in dataclasses.fields(self)]
        y, state = torch.ops.simba_fx.ssd_scan(*arguments)
        return y, state


@dataclass(frozen=True)
class CausalConv:
    """The operands of a depthwise causal convolution: `x (B, D, L)`, `weight (D, W)`, `bias (D,)`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str = "none"

    entry = "x"

    def run(self) -> tuple[Tensor, None]:
        return torch.ops.simba_fx.causal_conv1d(self.x, self.weight, self.bias, self.activation), None


Operands = SelectiveScan | SSDScan | CausalConv
Finish = Callable[[Tensor, Any], Any]
Adapter = Callable[..., "Operands | tuple[Operands, Finish] | None"]
"""Takes the arguments of the function it stands for. Returns the scan's operands, and, unless the function returns `y`
alone, a second function `(y, last_state) -> what the function returns`. None: this call is left as it is."""


@dataclass(eq=False)
class CallSite:
    """One call of a lifted function, remembered while the model was captured."""

    function: Callable[..., Any]
    spec: pytree.TreeSpec
    leaves: list[Any]
    """Flattened (args, kwargs); tensors are None, in the order in which the enter marker lists them."""
    results: int = 0

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
        leaves = [next(remaining) if isinstance(leaf, _Hole) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return pytree.tree_leaves(self.function(*args, **kwargs))


class _Hole:
    """Where a tensor stood among a call's arguments."""

    def __repr__(self) -> str:
        return "<tensor>"


# --- markers -----------------------------------------------------------------------------------------------------

_library: Any = torch.library.Library("simba_fx", "FRAGMENT")  # type: ignore[no-untyped-call]  # untyped in torch
_library.define("site_enter(Tensor operand, Tensor[] arguments, int site) -> Tensor")
_library.define("site_exit(Tensor result, int site, int index) -> Tensor")


def _same(tensor: Tensor, *_: Any) -> Tensor:
    fresh = tensor.new_empty_strided(tensor.size(), tensor.stride())
    return fresh if tensor.is_meta else fresh.copy_(tensor)


for _marker in ("site_enter", "site_exit"):
    _library.impl(_marker, _same, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"simba_fx::{_marker}", lambda tensor, *_: tensor.new_empty_strided(tensor.size(), tensor.stride())
    )


# --- the table ---------------------------------------------------------------------------------------------------

_registered: dict[Callable[..., Any], Adapter] = {}
_patching = threading.RLock()


def register_scan(function: Callable[..., Any], adapter: Adapter) -> None:
    """Make models that call `function` transformable.

    Before: `transform(model)` raises `ScanNotFoundError`. After: each call of `function` is one scan node.

    Args:
        function: the function (or method, through its class: `MyBlock.scan`) that the model calls once per scan.
        adapter: takes the same arguments and returns a `SelectiveScan` or an `SSDScan` that names the operands; or a
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


def _hf_selective(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                  z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                  return_last_state: bool = False, **_: Any) -> tuple[Operands, Finish]:  # fmt: skip
    dtype = u.dtype  # the torch path of transformers computes the skip and the gate in the promoted dtype
    for other in (D, z):
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)

    def finish(y: Tensor, state: Tensor) -> Any:
        return (y.to(dtype), state) if return_last_state else y.to(dtype)

    return SelectiveScan(u, dt, A, B, C, D, z, delta_bias, delta_softplus), finish


def _hf_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
            dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
            dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
            z: Tensor | None = None, seq_idx: Tensor | None = None, **_: Any) -> tuple[Operands, Finish]:  # fmt: skip
    if initial_states is not None or seq_idx is not None:
        given = "initial_states" if initial_states is not None else "seq_idx"
        raise CaptureError(
            f"mamba2_chunk_scan was called with {given}; only whole sequences that start from a zero state can be "
            "pruned. Call the model without packed sequences and without a warm cache."
        )

    def finish(y: Tensor, state: Tensor) -> Any:
        return (y.float(), state) if return_final_states else y.float()

    dt_min, dt_max = map(float, dt_limit)
    return SSDScan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, chunk_size), finish


def _hf_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
             seq_idx: Tensor | None = None, **_: Any) -> tuple[Operands, Finish] | None:  # fmt: skip
    if seq_idx is not None or activation not in (None, "silu", "swish"):
        return None
    return CausalConv(x, weight, bias, "none" if activation is None else "silu"), lambda y, _: y


def _unfused(*_: Any, **__: Any) -> None:
    """The fused entry points return None where no fused kernel exists: the model then takes its unfused path."""
    return None


_TRANSFORMERS: dict[str, Adapter | None] = {
    "mamba_selective_scan": _hf_selective,
    "mamba2_chunk_scan": _hf_ssd,
    "causal_conv1d_fn": _hf_conv,
    "mamba_inner_fn": None,
    "mamba2_split_conv1d_scan_combined": None,
}
"""By name in `transformers.models.*`: its modeling files hold twins of these functions. None: see `_unfused`."""


def _row(owner: Any, name: str, value: Any) -> tuple[bool, Adapter | None]:
    """Whether `owner.name` is lifted, and by which adapter."""
    if not callable(value):
        return False, None
    for candidate in (value, inspect.unwrap(value)):
        try:
            if candidate in _registered:
                return True, _registered[candidate]
        except TypeError:  # an unhashable callable
            continue
    module = getattr(owner, "__name__", "")
    if inspect.ismodule(owner) and module.startswith("transformers.models.") and name in _TRANSFORMERS:
        return True, _TRANSFORMERS[name]
    return False, None


def _callers(model: nn.Module) -> Iterator[Any]:
    """The Python modules and classes whose names a forward of `model` looks up."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    classes -= {nn.Module, object}
    yield from {id(m): m for cls in classes if (m := sys.modules.get(cls.__module__)) is not None}.values()
    yield from classes


def suggestions(model: nn.Module) -> list[str]:
    """Names of functions in the model's own code that look like scans and are not registered."""
    found = []
    for owner in _callers(model):
        prefix = owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"
        if prefix.startswith(("torch.", "simba_fx.", "builtins")):
            continue
        for name, value in vars(owner).items():
            ours = getattr(value, "__module__", "").startswith("simba_fx.")
            if inspect.isfunction(value) and not ours and "scan" in name.lower() and not _row(owner, name, value)[0]:
                found.append(f"{prefix}.{name}")
    return sorted(found)


@contextmanager
def lifted(model: nn.Module) -> Iterator[list[CallSite]]:
    """Replace the scan functions that `model` calls while the body runs; yield the list of call sites, filled as the
    model is traced. One thread at a time: names are patched for the whole process."""
    sites: list[CallSite] = []
    with _patching:
        undo: list[tuple[Any, str, Any]] = []
        try:
            for owner in _callers(model):
                for name, value in list(vars(owner).items()):
                    is_lifted, adapter = _row(owner, name, value)
                    if is_lifted:
                        undo.append((owner, name, value))
                        setattr(owner, name, _unfused if adapter is None else _recorder(value, adapter, sites))
            yield sites
        finally:
            for owner, name, value in reversed(undo):
                setattr(owner, name, value)


def _recorder(function: Callable[..., Any], adapter: Adapter, sites: list[CallSite]) -> Callable[..., Any]:
    """What stands in for `function` while the model is traced."""

    thread = threading.get_ident()

    def record(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:  # another thread runs a model while this one traces
            return function(*args, **kwargs)
        adapted = adapter(*args, **kwargs)
        if adapted is None:
            return function(*args, **kwargs)
        operands, finish = adapted if isinstance(adapted, tuple) else (adapted, lambda y, _: y)
        if not isinstance(operands, Operands):
            raise CaptureError(
                f"The adapter registered for {function.__qualname__} returned {type(operands).__name__}; expected a "
                "simba_fx.SelectiveScan or a simba_fx.SSDScan. Correct the call of simba_fx.register_scan."
            )
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, torch.SymInt) for leaf in leaves):
            raise CaptureError(
                f"{function.__qualname__} was called with a length as a plain number; expected tensors and constants. "
                "Read the length from a tensor inside the function."
            )
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        site = CallSite(function, spec, [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        sites.append(site)
        index = len(sites) - 1
        entered = torch.ops.simba_fx.site_enter(getattr(operands, operands.entry), tensors, index)
        result = finish(*dataclasses.replace(operands, **{operands.entry: entered}).run())
        flat, result_spec = pytree.tree_flatten(result)
        site.results = len(flat)
        marked = [torch.ops.simba_fx.site_exit(leaf, index, i) for i, leaf in enumerate(flat)]
        return pytree.tree_unflatten(marked, result_spec)

    return record


_HOLE = _Hole()
