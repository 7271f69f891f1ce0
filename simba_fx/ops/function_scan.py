"""Any function that is linear in one of its arguments, as a scan: it runs as it is, and its tokens have exact scores.

y is linear in the values while everything else is held, so a token's contribution to y_q is `c_t v_t`, where c is one
backward pass of the function with ones at the query (gradient times input, which is exact here). Whether a function is
like that is found out before it is used (`simba_fx.capture.recurrences`). Letters: see `simba_fx.ops`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from simba_fx.errors import OperandError, SimbaError
from simba_fx.ops.contributions import CONTRIBUTIONS, over_channels, reduced
from simba_fx.ops.inline import differentiated, inline_on_gpu, never
from simba_fx.ops.score import checked, never_differentiable, no_gradients, query_position, until

__all__ = ["FUNCTION_CRITERIA", "FunctionCall", "coefficients", "known_as", "recurrence", "recurrence_token_score"]

FUNCTION_CRITERIA = (*CONTRIBUTIONS, "clip")
"""The others read decays and steps, and nobody knows which of a function's arguments those are."""
_functions: dict[str, Callable[..., Any]] = {}


def known_as(function: Callable[..., Any]) -> str:
    """The name under which graphs call a function: where it can be imported from. Others of that name (closures, what
    was defined again) get a number behind it: a graph that calls one of them goes on calling that one."""
    name = f"{function.__module__}:{function.__qualname__}"
    names = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
    free = next(name for name in names if _functions.get(name, function) is function)
    _functions[free] = function
    return free


@dataclass(frozen=True)
class FunctionCall:
    """How a function is called, and what it returns. Text in a graph: an exported program says it again."""

    function: str
    spec: str
    """Of its arguments and keywords, as `torch.utils._pytree` writes it."""
    leaves: tuple[Any, ...]
    """Flat: `[i]` stands for the tensor i, `["dtype", name]` for a dtype, `["function", name]` for a function,
    `["partial", function, arguments, keywords]` for one with some arguments given; everything else for itself."""
    value: int
    """Which of the tensors is the values."""
    dim: int
    """Of the tokens, in the values and in y."""
    y: int
    """Which of the results is y; it has the values' sizes."""
    dtype: str
    """Of y."""
    states: tuple[tuple[tuple[int | str, ...], str], ...] = ()
    """Sizes and dtypes of the other results."""
    shared: bool = False
    """Whether the channels of the values' last dimension have one coefficient, however many there are."""

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> FunctionCall:
        return _call_of(text)

    def run(self, value: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        """y `(B, L, ...)`, and the other results."""
        tensors = [*operands[: self.value], value.movedim(1, self.dim), *operands[self.value :]]
        args, kwargs = pytree.tree_unflatten([_leaf(leaf, tensors) for leaf in self.leaves], _spec_of(self.spec))
        results = [leaf for leaf in pytree.tree_leaves(_function(self.function)(*args, **kwargs)) if leaf is not None]
        return [results[self.y].movedim(self.dim, 1), *results[: self.y], *results[self.y + 1 :]]

    def like(self, value: Tensor) -> list[Tensor]:
        """Results without values, of the sizes that a run has."""
        dtypes = [self.dtype, *(dtype for _, dtype in self.states)]
        return [value.new_empty(shape, dtype=_dtype(dtype)) for shape, dtype in zip(self.sizes(value), dtypes)]

    def sizes(self, value: Tensor) -> list[tuple[Any, ...]]:
        """Of the results of a run."""
        rows = value.shape[0]
        states = (tuple(rows if size == "B" else size for size in sizes) for sizes, _ in self.states)
        return [tuple(value.shape), *states]


@functools.lru_cache(1024)
def _call_of(text: str) -> FunctionCall:
    return FunctionCall(**json.loads(text))


_spec_of = functools.lru_cache(1024)(pytree.treespec_loads)


def _leaf(leaf: Any, tensors: Sequence[Tensor]) -> Any:
    match leaf:
        case [int(number)]:
            return tensors[number]
        case ["dtype", name]:
            return _dtype(name)
        case ["function", name]:
            return _function(name)
        case ["partial", function, arguments, keywords]:
            given = (_leaf(held, ()) for held in arguments)
            return functools.partial(_leaf(function, ()), *given, **{k: _leaf(v, ()) for k, v in keywords.items()})
    return leaf


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _function(name: str) -> Callable[..., Any]:
    if (known := _functions.get(name)) is not None:
        return known
    module, _, path = name.partition(":")
    try:
        found = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise SimbaError(
            f"A graph calls {path} of {module}, which cannot be imported here ({error}); expected the function that "
            "was registered where the graph was made. Define it at the top of a module that both processes can import."
        ) from error
    _functions[name] = found  # type: ignore[assignment]
    return found  # type: ignore[return-value]


def _told(sizes: list[tuple[Any, ...]]) -> str:
    return ", ".join(map(str, sizes))


@torch.library.custom_op("simba_fx::recurrence", mutates_args=())
def recurrence(value: Tensor, operands: list[Tensor], call: str) -> list[Tensor]:
    """Run a registered function.

    Args:
        value: `(B, L, ...)`, what the function is linear in; `operands`: its other tensors, as it takes them.
        call: a `FunctionCall`.

    Returns:
        y, of value's sizes; the function's other results.
    """
    own = FunctionCall.of(call)
    y, *states = own.run(value, operands)
    found, expected = [tuple(result.shape) for result in (y, *states)], own.sizes(value)
    if found != expected:
        raise OperandError(
            f"{own.function} returned {_told(found)}; expected {_told(expected)}, the sizes of its values first, as it "
            "did when the model was captured. Write it so that they do not depend on other things."
        )
    return [y.contiguous().clone(), *(state.clone() for state in states)]  # results of operators share no memory


@recurrence.register_fake
def _(value: Tensor, operands: list[Tensor], call: str) -> list[Tensor]:
    return FunctionCall.of(call).like(value)


@torch.library.custom_op("simba_fx::recurrence_backward", mutates_args=())
def recurrence_backward(arriving: list[Tensor], value: Tensor, operands: list[Tensor], call: str) -> list[Tensor]:
    """Gradients of value and operands (zeros for whole numbers), autograd's own, of the function run once more."""
    own = FunctionCall.of(call)
    inputs = [value, *operands]
    places = [i for i, tensor in enumerate(inputs) if tensor.is_floating_point()]

    def run(*floats: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, floats))
        first, *rest = (given.get(i, tensor) for i, tensor in enumerate(inputs))
        return tuple(result for result in own.run(first, rest) if result.is_floating_point())

    float_arriving = [grad for grad in arriving if grad.is_floating_point()]
    found = dict(zip(places, differentiated(run, [inputs[i] for i in places], float_arriving)))
    return [found[i].contiguous() if i in found else torch.zeros_like(tensor) for i, tensor in enumerate(inputs)]


@recurrence_backward.register_fake
def _(arriving: list[Tensor], value: Tensor, operands: list[Tensor], call: str) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (value, *operands)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    value, operands, ctx.call = inputs
    ctx.save_for_backward(value, *operands)


def _differentiate(ctx: Any, arriving: list[Tensor]) -> tuple[Any, ...]:
    value, *operands = ctx.saved_tensors
    dvalue, *rest = recurrence_backward(list(arriving), value, operands, ctx.call)
    floats = [grad if tensor.is_floating_point() else None for grad, tensor in zip(rest, operands)]
    return dvalue, floats, None


recurrence.register_autograd(_differentiate, setup_context=_save)


def coefficients(call: FunctionCall, value: Tensor, operands: Sequence[Tensor], query: Tensor) -> Tensor:
    """c of every token for the queries `(B,)`, of value's sizes; where channels share it `(B, L, ..., 1)`."""
    one = torch.ones_like(value[..., :1]) if call.shared else value
    seed = torch.zeros_like(one)
    seed[torch.arange(value.shape[0], device=value.device), query.clamp(min=0)] = 1
    (c,) = differentiated(lambda v: (call.run(v, operands)[0],), [one], [seed.to(_dtype(call.dtype))])
    return c


@torch.library.custom_op("simba_fx::recurrence_token_score", mutates_args=())
def recurrence_token_score(
    value: Tensor, operands: list[Tensor], call: str, real: Tensor | None, tail: int, criterion: str
) -> Tensor:
    """Scores the tokens of a `recurrence` with the same operands: `(B, L)` float32, zero after the query.

    `real`, `tail`, `criterion` as in `selective_token_score`.

    Raises:
        CriterionError: a criterion that reads other operands than the values.
    """
    checked("recurrence_token_score", tail, criterion, FUNCTION_CRITERIA)
    own = FunctionCall.of(call)
    rows, length = value.shape[:2]
    query = query_position(real, tail, rows=rows, length=length, device=value.device)
    counted, channels = until(query, length), value.reshape(rows, length, -1)
    if criterion == "clip":
        y = own.run(value, operands)[0].reshape(rows, length, -1)
        return torch.where(counted, y.float().clamp(min=0).mean(2), 0.0)
    c = coefficients(own, value, operands, query).float()
    if own.shared:
        heads = value.reshape(rows, length, -1, value.shape[-1])
        score = over_channels(c.reshape(rows, length, -1), heads, criterion)
    else:
        score = reduced(c.reshape(rows, length, -1) * channels.float(), criterion)
    return torch.where(counted, score, 0.0)


@recurrence_token_score.register_fake
def _(value: Tensor, operands: list[Tensor], call: str, real: Tensor | None, tail: int, criterion: str) -> Tensor:
    checked("recurrence_token_score", tail, criterion, FUNCTION_CRITERIA)
    return value.new_empty(value.shape[0], value.shape[1], dtype=torch.float32)


recurrence_token_score.register_autograd(no_gradients, setup_context=never_differentiable)

for _operator in (recurrence, recurrence_backward, recurrence_token_score):
    inline_on_gpu(_operator, never)
