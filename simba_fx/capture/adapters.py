"""Whether a user's adapter says what the user's function computes: both run once, on the model's own operands.

An adapter that forgets a transpose, or names B as C, makes another model, and nothing in a graph shows it. So where a
capture meets a function that `register_scan` made known, the module runs on a few random tokens, up to the first call
of each such function: there the function's result is compared with the scan of what the adapter returns. Once for each
function, adapter and dtypes; the library's own rows are never compared. A function whose result has another dtype than
the adapter's (in mixed precision, say) is right: the graph then casts to it (`lift.returned`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simba_fx.capture import lift
from simba_fx.capture.function_adapter import first_line
from simba_fx.capture.rows import Adapter
from simba_fx.capture.writes import NoWrites, undisturbed
from simba_fx.errors import CaptureError, OperandError, warn

__all__ = ["compare_adapters", "run_on_random_tokens", "say_not_compared"]

Compared = tuple[Callable[..., Any], Adapter, tuple[torch.dtype | None, ...]]
"""A function, its adapter, and what it was called with (`lift.dtypes_of`)."""
_agreed: set[Compared] = set()
_told: set[tuple[Callable[..., Any], Adapter]] = set()
"""Those whose comparison was impossible, which has been said."""


class _Enough(BaseException):
    """Ends the run of a module when every function has been compared. No `except Exception` of a model's stops it."""


def compare_adapters(module: nn.Module, owner: nn.Module, inputs: Mapping[str, Any], sites: Sequence[lift.CallSite], *,
                     mask: str | None, kernels: str) -> str:  # fmt: skip
    """Compare the users' functions among `sites` with their adapters; arguments otherwise as in `capture`.

    Returns:
        Why some could not be compared, for `say_not_compared`; empty: all were.

    Raises:
        CaptureError: they differ by more than rounding. With `kernels="model"`, which runs the function itself, other
            values of the right shape are a warning.
    """
    pending = set(_not_compared(sites))
    if not pending:
        return ""
    wanted = {(function, adapter) for function, adapter, _ in pending}

    def compared(function: Callable[..., Any], adapter: Adapter, sites: list[lift.CallSite]) -> Callable[..., Any]:
        if (function, adapter) not in wanted:
            return lift.recorder(function, adapter, sites)

        def call(*args: Any, **kwargs: Any) -> Any:
            own_args, own_kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))  # it may write into them
            result = function(*args, **kwargs)
            asked = function, adapter, lift.dtypes_of(pytree.tree_leaves((own_args, own_kwargs)))
            if asked in pending:
                _compare(asked, own_args, own_kwargs, result, kernels)
                pending.remove(asked)
            if not pending:
                raise _Enough
            return result

        return call

    try:
        with lift.lifted(owner, compared):
            run_on_random_tokens(module, owner, inputs, mask)
    except _Enough:
        return ""
    except CaptureError:
        raise
    except Exception as error:  # whatever a function does that runs on another device, or on other sizes, only
        return first_line(error).rstrip(".")
    return "a run of the model did not call it"


def say_not_compared(functions: Any, why: str) -> None:
    """Warn, once for each function and adapter, of those that have not been compared."""
    compared = {asked[:2] for asked in _agreed} | _told
    for function in functions:
        adapter = lift.registered(function)
        if adapter is None or getattr(adapter, "runs_the_function", False):
            continue
        if (function, adapter) not in compared:
            _told.add((function, adapter))
            compared.add((function, adapter))
            warn(
                f"{function.__qualname__} was not compared with the adapter registered for it: {why}. Compare "
                "transform(model, 'dense') with the model yourself."
            )


def _not_compared(sites: Sequence[lift.CallSite]) -> list[Compared]:
    found = ((site.function, lift.registered(site.function), site.dtypes) for site in sites)
    known = ((f, a, dtypes) for f, a, dtypes in found if a and not getattr(a, "runs_the_function", False))
    return list(dict.fromkeys(asked for asked in known if asked not in _agreed))


def run_on_random_tokens(module: nn.Module, owner: nn.Module, inputs: Mapping[str, Any], mask: str | None) -> None:
    """Run `module`, the user's `owner` inside, on inputs like these, with values. Weights, buffers and attributes stay
    what they are, and torch's random state."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        few = {name: _random(held, name == mask) for name, held in inputs.items()}
        buffers = {name: held.clone() for name, held in module.named_buffers()}
        with NoWrites(owner), undisturbed(module):
            torch.func.functional_call(module, buffers, kwargs=few)


def _random(held: Any, mask: bool) -> Any:
    """An input with values: the examples of a capture are zeros. Integers are 0 or 1, ids of every vocabulary."""
    if not isinstance(held, Tensor) or held.is_complex():
        return held
    if held.is_floating_point() and not mask:
        return torch.randn_like(held)
    return torch.ones_like(held) if mask or held.dtype == torch.bool else torch.randint_like(held, 2)


def _compare(asked: Compared, args: Any, kwargs: Any, result: Any, kernels: str) -> None:
    function, adapter, _ = asked
    adapted = lift.named_operands(function, adapter, args, kwargs)
    if adapted is None:
        return
    operands, finish = adapted
    try:
        ours = finish(*operands.run())
    except OperandError as error:
        raise lift.wrong_operands(function, error) from error
    pairs = [pytree.tree_leaves(part) for part in (result, ours)]
    expected, found = ([leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in pairs)
    if any(leaf.is_meta for leaf in expected):
        raise ValueError("its weights are on the meta device")
    if [leaf.shape for leaf in expected] != [leaf.shape for leaf in found]:
        shapes = " and ".join(", ".join(str(tuple(leaf.shape)) for leaf in leaves) for leaves in (expected, found))
        raise CaptureError(_told_apart(function, f"their results have the shapes {shapes}") + _FAULTS)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    difference = next(filter(None, map(_difference, expected, found, [_tolerance(tensors)] * len(expected))), None)
    if difference is None:
        _agreed.add(asked)
        if [leaf.dtype for leaf in expected] != [leaf.dtype for leaf in found]:
            lift.returned[asked] = [leaf.dtype for leaf in expected]
        return
    told = _told_apart(function, difference)
    name, scan = function.__qualname__, type(operands).__name__
    if kernels != "model":
        raise CaptureError(
            f"{told}{_FAULTS} If {name} is meant to differ from an exact {scan} (it clamps, say), "
            "transform(model, kernels='model') runs it as it is, and the adapter serves for scores alone."
        )
    warn(
        f"{told} With kernels='model' {name} itself runs, and tokens are scored by the exact {scan} of the adapter's "
        f"operands.{_FAULTS}"
    )


_FAULTS = (
    " Correct the adapter; what is often wrong: a transpose is missing (fields and shapes: simba_fx.SelectiveScan, "
    "simba_fx.SSDScan, simba_fx.DeltaScan), B and C are exchanged, softplus is applied twice, a skip or gate is left "
    "out."
)


def _told_apart(function: Callable[..., Any], difference: str) -> str:
    return (
        f"{function.__qualname__} and the scan of what its adapter returns differ: on a few random tokens {difference}."
    )


def _tolerance(tensors: Sequence[Tensor]) -> float:
    """Relative to the largest value: some roundings of the coarsest dtype that the function may compute in."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    device = tensors[0].device.type if tensors else "cpu"
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(1e-4, *(8 * torch.finfo(dtype).eps for dtype in dtypes))


def _difference(expected: Tensor, found: Tensor, tolerance: float) -> str | None:
    """In words; None: rounding."""
    a, b = expected.double(), found.double()
    finite = a.isfinite() & b.isfinite()
    strange = int((~finite & ~((a == b) | (a.isnan() & b.isnan()))).sum())
    if strange:
        return f"{strange} of {a.numel()} numbers are NaN or infinite in one of them alone"
    a, b = a[finite], b[finite]
    if not a.numel():
        return None
    largest, off = float(a.abs().max()), float((a - b).abs().max())
    if off <= tolerance * largest:
        return None
    return (
        f"by up to {off:.2g}, where the largest number is {largest:.2g} and rounding explains {tolerance * largest:.1g}"
    )
