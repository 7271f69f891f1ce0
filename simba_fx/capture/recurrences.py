"""Recurrences that a user registers: any function that is linear in one of its arguments (`function_adapter`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.capture import lift
from simba_fx.capture.adapters import run_on_random_tokens
from simba_fx.capture.function_adapter import FunctionAdapter, first_line
from simba_fx.errors import SimbaError

__all__ = ["LinearRecurrence", "keep_contract", "register_recurrence"]


def register_recurrence(function: Callable[..., Any], value: str, *, shared: bool = False) -> None:
    """Make models that call `function`, whatever recurrence it runs, transformable.

    Before: `transform(model)` raises `ScanNotFoundError`. After: each call of `function` is one scan node, which runs
    the function; tokens are scored exactly, by one backward pass of it. (`register_scan` is for functions that compute
    the recurrence of Mamba, Mamba-2 or a gated delta rule: those have kernels.)

    Args:
        function: `(..., value, ...) -> y` or a tuple of y and last states, linear in `value` while everything else is
            held, from a zero state, and differentiable. `value` and y have the same sizes, the rows first and the
            tokens in one other dimension: `(B, L, ...)` or `(B, H, L, ...)`, say.
        value: the name of that parameter.
        shared: whether the channels in the last dimension of `value` share one coefficient, as those of a head do that
            has a matrix for its state, and the function takes any number of them. Scores then cost less.

    Raises:
        SimbaError: `function` is not callable, or has no parameter called `value`.

    That the function is linear is made sure when a model that calls it is captured: `CaptureError` says by how much it
    is not.
    """
    if not callable(function):
        raise SimbaError(
            f"register_recurrence expects a function, found {type(function).__name__}. Pass the function object that "
            "the model calls."
        )
    signature = inspect.signature(function)
    if value not in signature.parameters:
        raise SimbaError(
            f"{getattr(function, '__qualname__', function)} has no parameter {value!r}; expected the one that its "
            f"result is linear in, of {', '.join(signature.parameters)}. Pass its name as value."
        )
    lift.register_scan(function, FunctionAdapter(function, signature, value, shared))


class LinearRecurrence:
    """A recurrence made of one step of it, registered: a loop over tokens, slow and exact. May be used as a decorator.

        @simba_fx.LinearRecurrence
        def scan(state, v, k, g):
            state = state * g.exp() + k * v
            return state, state

        y = scan(v, k, g)           # (B, L, ...) each

    Args:
        step: `(state, value, ...) -> (state, y)` for one token of each row, `(B, ...)`; linear in `value`, whose
            sizes y has. The first state is the number 0, as a tensor.
        shared: as in `register_recurrence`.
    """

    def __init__(self, step: Callable[..., tuple[Any, Tensor]], *, shared: bool = False) -> None:
        functools.update_wrapper(self, step)
        parameters = [*inspect.signature(step).parameters.values()][1:]
        if not parameters:
            name = getattr(step, "__qualname__", step)
            raise SimbaError(
                f"LinearRecurrence expects a step (state, value, ...), found {name} with fewer than two parameters. "
                "Let it take the state first, and then what one token brings."
            )
        self.__signature__ = inspect.Signature(parameters)
        self.step = step
        register_recurrence(self, parameters[0].name, shared=shared)

    def __call__(self, *operands: Tensor, **named: Tensor) -> Tensor:
        given = inspect.signature(self).bind(*operands, **named).arguments
        value = next(iter(given.values()))
        state: Any = value.new_zeros(())
        ys = []
        for t in range(value.shape[1]):
            state, y = self.step(state, **{name: operand[:, t] for name, operand in given.items()})
            ys.append(y)
        return torch.stack(ys, 1)


# --- before a trace --------------------------------------------------------------------------------------------------


def keep_contract(module: nn.Module, owner: nn.Module, inputs: Mapping[str, Any], *, mask: str | None) -> None:
    """Run `module` on a few random tokens, if it calls functions that users registered as recurrences; arguments
    otherwise as in `capture_graph`.

    Raises:
        CaptureError: one of them is not linear in its values.
    """
    met: list[FunctionAdapter] = []

    def examined(function: Callable[..., Any], adapter: Any, sites: list[lift.CallSite]) -> Callable[..., Any]:
        if not isinstance(adapter, FunctionAdapter):
            return lift.recorder(function, adapter, sites)
        met.append(adapter)
        adapter.trouble = ""
        return lambda *args, **kwargs: adapter.examine(args, kwargs)

    with lift.lifted(owner, examined):
        if not met:
            return
        try:
            run_on_random_tokens(module, owner, inputs, mask)
        except SimbaError:
            raise
        except Exception as error:  # the trace meets it as well, or a call that was not examined
            for adapter in met:
                adapter.trouble = f" ({first_line(error)})"
