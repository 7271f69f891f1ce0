"""What stands in the lift table for a function that runs as it is, and how it is made sure that it may.

Nothing in a graph shows that a function is not linear in its values. So before a model that calls one is traced, it
runs on a few random tokens, and each call of the function has to keep the contract, on the operands that the model gave
it:

    (a) what the tokens contribute adds up to the output:    sum_t c_t v_t = y_q
    (b) a token's value alone gives its contribution:        y_q of v_t alone = c_t v_t
    (c) the coefficients do not depend on the values:        c of other values = c

where c is one backward pass with ones at q. Gates, keys and queries may enter in any way.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simba_fx.capture.rows import Finish, Linear
from simba_fx.errors import CaptureError
from simba_fx.ops.function_scan import FunctionCall, known_as
from simba_fx.ops.operands import FunctionScan, Operands

__all__ = ["Contract", "FunctionAdapter", "adapter_of", "contract", "first_line"]

_PLAIN = (bool, int, float, str, type(None))


class _Result(NamedTuple):
    """What a call of a function returns."""

    spec: pytree.TreeSpec
    y: int
    """Which of its tensors."""
    nothing: tuple[bool, ...]
    """Where it returns None."""
    dtype: torch.dtype
    states: tuple[tuple[tuple[int | str, ...], str], ...]


class FunctionAdapter:
    """Stands in the lift table for a function that runs as it is."""

    runs_the_function = True
    """It says nothing that could be wrong (`simba_fx.capture.adapters`)."""

    def __init__(self, function: Callable[..., Any], signature: inspect.Signature, value: str, shared: bool) -> None:
        self.function, self.signature, self.value, self.shared = function, signature, value, shared
        self.results: dict[Any, _Result] = {}
        """Of the calls that kept the contract, by what their arguments look like."""
        self.trouble = ""
        """What stopped the last run of a model on random tokens."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Operands, Finish]:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        place = self._place_of_values(leaves, spec)
        value = leaves[place]
        result = self.results.get(_looks(leaves, spec))
        if result is None:
            raise CaptureError(
                f"{self.name} was not called with such arguments when the model ran on a few random tokens, to see "
                f"whether it is linear in {self.value}{self.trouble}; expected the same calls as while it is traced. "
                "Write the model so that it runs on any device, and calls it the same way every time."
            )
        symbolic = [d for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
        if len(symbolic) != 2 or symbolic[0] != 0:
            raise CaptureError(
                f"{self.name} was called with {self.value} of sizes {tuple(value.shape)}; expected the rows first and "
                "the tokens in one other dimension, neither put together with anything else. Register a function that "
                "takes such values."
            )
        dim = symbolic[1]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        at = sum(isinstance(leaf, Tensor) for leaf in leaves[:place])
        number = iter(range(len(tensors)))
        template = tuple([next(number)] if isinstance(leaf, Tensor) else self._constant(leaf) for leaf in leaves)
        call = FunctionCall(known_as(self.function), pytree.treespec_dumps(spec), template, at, dim, result.y,
                            _name(result.dtype), result.states, self.shared)  # fmt: skip

        def finish(y: Tensor, states: list[Tensor]) -> Any:
            found = [*states[: result.y], y.movedim(1, dim), *states[result.y :]]
            remaining = iter(found)
            return pytree.tree_unflatten([None if none else next(remaining) for none in result.nothing], result.spec)

        return FunctionScan(value.movedim(dim, 1), [*tensors[:at], *tensors[at + 1 :]], call.text), finish

    @property
    def name(self) -> str:
        return str(self.function.__qualname__)

    def _place_of_values(self, leaves: list[Any], spec: pytree.TreeSpec) -> int:
        """Which of a call's arguments the values are. (Not by identity: one tensor may be given for two of them.)

        Raises:
            CaptureError: they are no tensor.
        """
        args, kwargs = pytree.tree_unflatten(range(len(leaves)), spec)
        place = self.signature.bind(*args, **kwargs).arguments.get(self.value)
        if type(place) is not int or not isinstance(leaves[place], Tensor):
            found = type(leaves[place] if type(place) is int else place).__name__
            raise CaptureError(
                f"{self.name} was called with {self.value}: {found}; expected a tensor, the values that its result is "
                "linear in. Name another parameter to simba_fx.register_recurrence."
            )
        return place

    def _constant(self, leaf: Any) -> Any:
        if isinstance(leaf, nn.Module):  # `self` of a method, which does not look at it (`examine`)
            return None
        if isinstance(leaf, torch.dtype):
            return ["dtype", _name(leaf)]
        if isinstance(leaf, _PLAIN):
            return leaf
        if isinstance(leaf, types.FunctionType) and leaf.__closure__ is None:
            return ["function", known_as(leaf)]
        if isinstance(leaf, functools.partial):
            named = {name: self._constant(held) for name, held in leaf.keywords.items()}
            return ["partial", self._constant(leaf.func), [*map(self._constant, leaf.args)], named]
        raise CaptureError(
            f"{self.name} was called with {leaf!r} ({type(leaf).__name__}); a graph can hold tensors, numbers, flags, "
            "words, dtypes and functions without a closure among the arguments of a registered recurrence. Register a "
            "function without it."
        )

    def examine(self, args: Any, kwargs: Any) -> Any:
        """Run a call with values, and keep it for graphs if it keeps the contract. Returns: its result."""
        leaves, own_spec = pytree.tree_flatten(pytree.tree_map(_own, (args, kwargs)))
        place = self._place_of_values(leaves, own_spec)
        value = leaves[place]
        result = self.function(*args, **kwargs)
        flat, spec = pytree.tree_flatten(result)
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        at = next((i for i, leaf in enumerate(tensors) if leaf.shape == value.shape), None)
        others = sorted({type(leaf).__name__ for leaf in flat if not isinstance(leaf, Tensor) and leaf is not None})
        if at is None or others:
            found = ", ".join([*(str(tuple(leaf.shape)) for leaf in tensors), *others])
            raise CaptureError(
                f"{self.name} returned {found}; expected y, of the sizes of {self.value} {tuple(value.shape)}, and "
                "perhaps other tensors. Register a function that returns those."
            )
        key = _looks(leaves, own_spec)
        if key not in self.results:
            self._keep(leaves, own_spec, place, at)
            rows = value.shape[0]
            states = tuple((_named(leaf, rows), _name(leaf.dtype)) for i, leaf in enumerate(tensors) if i != at)
            nothing = tuple(leaf is None for leaf in flat)
            self.results[key] = _Result(spec, at, nothing, tensors[at].dtype, states)
        return result

    def _keep(self, leaves: list[Any], spec: pytree.TreeSpec, place: int, y: int) -> None:
        """Raises: CaptureError: a call does not keep the contract."""

        def run(held: Tensor) -> Tensor:
            args, kwargs = pytree.tree_unflatten([*given[:place], held, *given[place + 1 :]], spec)
            found = [leaf for leaf in pytree.tree_leaves(self.function(*args, **kwargs)) if leaf is not None]
            result: Tensor = found[y]
            return result

        wide = [_widened(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for given in (wide, leaves):  # in its own dtype, if it does not run in float64
            try:
                found = contract(run, given[place], self.shared)
                break
            except Exception as error:
                if given is leaves:
                    raise CaptureError(
                        f"{self.name} cannot be differentiated, or not be run on other values and without the module "
                        "that it is a method of, which scores need: "
                        f"{first_line(error)} Register a function of "
                        "tensors that PyTorch's operators compute, or that has a backward pass."
                    ) from error
        if not found.kept(given[place].dtype):
            raise CaptureError(f"{self.name} is not linear in {self.value}: {found} {_ADVICE}")


_ADVICE = (
    "Tokens of such a function have no exact score. Register the parameter that its result is linear in, of a function "
    "that starts from a zero state, without skip connection and norm."
)


_adapters: dict[Callable[..., Any], FunctionAdapter] = {}


def adapter_of(function: Callable[..., Any], row: Linear) -> FunctionAdapter:
    """The one adapter of a function of the lift table."""
    if function not in _adapters:
        _adapters[function] = FunctionAdapter(function, inspect.signature(function), row.value, row.shared)
    return _adapters[function]


class Contract(NamedTuple):
    """By how much a function breaks it, relative to the largest number of its output (of its coefficients)."""

    total: float
    alone: float
    coefficients: float

    def kept(self, dtype: torch.dtype) -> bool:
        """Whether rounding explains the numbers: many functions compute in float32 whatever they are given."""
        return self.worst <= max(1e-4, 8 * torch.finfo(dtype).eps)

    @property
    def worst(self) -> float:
        return max(number if number == number else float("inf") for number in self)

    def __str__(self) -> str:
        return (
            f"on a few random tokens the contributions of all add up to the output but for {self.total:.1g} of it, one "
            f"token's value alone gives its contribution but for {self.alone:.1g}, and other values, or another number "
            f"of channels, change the coefficients by {self.coefficients:.1g}; expected rounding in all three."
        )


def contract(run: Callable[[Tensor], Tensor], value: Tensor, shared: bool = False) -> Contract:
    """The three numbers of a function of its values `(B, ..., L, ...)`; the dimension of the tokens is the one in which
    they are smallest. `shared`: the coefficients of all channels are those of one."""
    found = [_contract(run, value, dim, shared) for dim in range(1, value.dim() - shared)]
    return min(found, key=lambda numbers: numbers.worst)


def _contract(run: Callable[[Tensor], Tensor], own: Tensor, dim: int, shared: bool) -> Contract:
    """On random values (a model's `own` may be zeros), whose coefficients are compared with those of its own."""
    length, worst = own.shape[dim], Contract(0.0, 0.0, 0.0)
    value = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(own)
    tokens = torch.arange(length, device=own.device).view([-1 if d == dim else 1 for d in range(own.dim())])
    first_row = (torch.arange(len(own), device=own.device) == 0).view(-1, *[1] * (own.dim() - 1))

    def coefficients(held: Tensor, query: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            held = held.detach().requires_grad_()
            y = run(held).select(dim, query)
            (c,) = torch.autograd.grad(y.sum(), held)
        return y.detach(), c

    for query in (length - 1, length // 2):
        y, c = coefficients(value, query)
        parts, alone = c * value, 0.0
        for token in (0, query // 2, query):
            mask = (tokens == token) & first_row
            lone = run(value * mask).select(dim, query)
            alone = _larger(alone, _off(lone, (parts * mask).sum(dim), y))
        _, changed = coefficients(own[..., :1] if shared else own, query)
        worst = Contract(*map(_larger, worst, (_off(parts.sum(dim), y, y), alone, _off(changed, c, c))))
    return worst


def _larger(a: float, b: float) -> float:
    """NaN is larger than anything."""
    return b if b > a or b != b else a


def _off(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    return float((found - expected).abs().max() / scale.abs().max().clamp(min=torch.finfo(scale.dtype).tiny))


def _own(leaf: Any) -> Any:
    """Of an argument: a function may write into tensors, and a graph holds no module that a method belongs to."""
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return None if isinstance(leaf, nn.Module) else leaf


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _looks(leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    plain = (None if isinstance(leaf, nn.Module) else leaf for leaf in leaves)
    looks = [(leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else repr(leaf) for leaf in plain]
    return pytree.treespec_dumps(spec), tuple(looks)


def _named(state: Tensor, rows: int) -> tuple[int | str, ...]:
    return tuple("B" if dim == 0 and size == rows else size for dim, size in enumerate(state.shape))


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
