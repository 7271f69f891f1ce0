"""How a call of a transformers stack is bound to a graph: rows, tails, masks, positions; and what runs decode."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.capture.examples import autocast_dtype, named_sizes
from simba_fx.compiling import disable_compile, skip_frame, traced
from simba_fx.errors import InputError
from simba_fx.frontends.transformers.caches import is_warm, new_cache, own_cache, past_length, past_of
from simba_fx.frontends.transformers.decoding import (
    expect_token,
    sparse_layers,
)
from simba_fx.frontends.transformers.refusals import refuse_packed
from simba_fx.runtime.inputs import check_mask, check_positions, check_rows
from simba_fx.runtime.last_call import LastCall
from simba_fx.runtime.rows import (
    Ends,
    check_lengths,
    ends_of,
    lengthened,
    may_be_padded,
    padding_id,
    trailing_lengths,
    warn_of_padding,
)
from simba_fx.runtime.stack import Signature, stack_class

__all__ = [
    "CACHE_NAMES",
    "ModelCall",
    "cache_parameter",
    "inspect_parameters",
    "returns_states",
    "sparse_class",
    "takes_positions",
    "usual_signature",
]

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What the argument is called: `cache` from transformers 5.24 on, one of the others before."""


def usual_signature(stack: nn.Module, weight: Tensor, trailing: bool = False) -> Signature:
    """Of the calls that are captured when a model is transformed."""
    config: Any = stack.config
    cache = bool(config.use_cache and not stack.training)
    hidden = bool(getattr(config, "output_hidden_states", False))
    positions = (("position_ids", (torch.int64, ("B", "L"))),) if takes_positions(type(stack)) else ()
    return Signature(weight.dtype, weight.device, None, cache, stack.training, hidden, extra=positions,
                     autocast=autocast_dtype(weight.device), trailing=trailing)  # fmt: skip


def cache_parameter(parameters: Any) -> str:
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def returns_states(parameters: Any) -> bool:
    """Whether a model takes its states as `state` and returns them among its values, new ones at each call (RWKV)."""
    return "state" in parameters and not any(name in parameters for name in CACHE_NAMES)


def _with_own_names(parameters: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The cache under the name that this version of the model has for it (transformers renames old ones likewise)."""
    own = cache_parameter(parameters)
    return {own if name in CACHE_NAMES else name: held for name, held in given.items()}


@dataclass
class ModelCall:
    """One call of a sparse stack that runs a program."""

    signature: Signature
    tensors: dict[str, Tensor]
    cache: Any
    cache_name: str
    return_dict: bool
    length: int
    """Tokens of each row, as the caller gave them."""
    ends: Ends
    real: Tensor | None
    """`(B, L)`, not 0 where the caller's tokens are real; None: everywhere."""

    @property
    def sizes(self) -> tuple[Any, Any, int]:
        return *self.tensors["inputs_embeds"].shape[:2], self.ends.tail

    def inputs(self, variant: Any) -> list[Any]:
        lengths = [self.ends.lengths] if self.signature.trailing else []
        past = past_of(self.cache, variant.states) if self.signature.warm else []
        return [*(self.tensors[name] for name in variant.built.captured.arguments), self.ends.tail, *lengths, *past]


def sparse_class(cls: type[nn.Module], blocks: bool) -> type:
    own, names = cls.forward, tuple(inspect_parameters(cls))
    decoding = disable_compile(_decoding) if blocks else _decoding
    remember = disable_compile(_expected_tokens)

    def guarded(self: Any, given: dict[str, Any]) -> Any:
        """If it fails, the cache's sparse layers expect no token any more."""
        put_back = remember(given)
        try:
            return own(self, **decoding(given))
        except BaseException:
            put_back()
            raise

    decode = skip_frame(guarded) if blocks else lambda self, given: own(self, **decoding(given))
    made: Any = stack_class(cls, blocks, prepare, decode, functools.partial(_with_own_names, names))
    made.simba_cache_class = own_cache(cls)
    return made  # type: ignore[no-any-return]


def prepare(stack: Any, given: dict[str, Any]) -> ModelCall | None:
    """What to run for a call; None: the class's own forward (a decoding step, a prompt of one token)."""
    runtime: Any = stack._simba
    cache_name = cache_parameter(inspect_parameters(type(stack)))
    cache = given.get(cache_name)
    ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    if (ids is None) == (embeds is None):
        return None  # the model's own message
    lead: Any = embeds if ids is None else ids
    rows, length = lead.shape[:2]
    warm = cache is not None and is_warm(cache)
    if warm and length == 1:
        return None
    if isinstance(mask, dict):  # `generate` with a static cache has made masks already; among them the padding's own
        mask = mask.get("linear_attention")
    if warm and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        text = mask if mask.shape[1] > length else nn.functional.pad(mask, (1, 0), value=1)
        check_mask(text, rows, text.shape[1], 1)  # no padding between the turns, which would change the states
        mask = mask[:, -length:]
    asked, stated = runtime.asked, mask is not None
    mask = check_mask(mask, rows, length, runtime.shortest_row, runtime.options.named)
    if length == 1:
        runtime.last = LastCall(rows, length, None, (), None, mask)
        return None
    lengths = _lengths(stack, runtime, ids, lead, mask, stated)
    if lengths is not None and not traced():
        check_rows(lengths, runtime.shortest_row, runtime.options.named)
    ends = ends_of(asked, rows, length, mask, lengths)
    use_cache = True if warm else given.get("use_cache")
    if ends.apart:
        if from_end := [position for position in runtime.options.named if position < 0]:
            raise InputError(
                f"{type(stack).__name__} was called with rows whose tails differ, and query or protect names position "
                f"{from_end[0]}; expected positions from the start of the row there, since such rows get padding that "
                "counts as theirs at their ends. Give all rows one tail, or call them one by one."
            )
        if use_cache:
            raise InputError(
                f"{type(stack).__name__} was called with use_cache=True and rows whose tails differ, which get padding "
                "at their ends; expected no cache, since its states would have seen that padding. Pass "
                "use_cache=False, or call the rows one by one."
            )
        use_cache = False
    if use_cache is None:
        use_cache = stack.config.use_cache and not stack.training
    if stack.training and getattr(stack, "gradient_checkpointing", False):
        if warm:
            raise InputError(
                f"{type(stack).__name__} was called on a warm cache while gradient_checkpointing, which runs without "
                "one; expected an empty cache. Call gradient_checkpointing_disable(), or pass the whole text."
            )
        use_cache = False
        if runtime.options.compile == "whole":
            raise InputError(
                f"gradient_checkpointing of {type(stack).__name__} recomputes block by block, but with compile='whole' "
                "there are no blocks; expected compile='blocks' (the default of simba_fx.transform). Use that, or call "
                "gradient_checkpointing_disable()."
            )
    if embeds is None:
        embeds = stack.get_input_embeddings()(ids)
    hidden = given.get("output_hidden_states")
    hidden = stack.config.output_hidden_states if hidden is None else hidden
    if not isinstance(hidden, bool):
        raise InputError(
            f"{type(stack).__name__} was called with output_hidden_states={hidden!r}; expected True or False. Ask for "
            "all of them and pick what you need."
        )
    known = ("input_ids", "inputs_embeds", "attention_mask", "use_cache", "output_hidden_states", "return_dict")
    more = {k: v for k, v in given.items() if k not in (*known, cache_name) and v is not None}
    refuse_packed(type(stack).__name__, more)
    if takes_positions(type(stack)):
        more["position_ids"] = check_positions(
            more.get("position_ids"), embeds, mask, past_length(cache) if warm else 0
        )
    if ends.more:
        if unknown := [name for name in more if name != "position_ids" and isinstance(more[name], Tensor)]:
            raise InputError(
                f"{type(stack).__name__} was called with {unknown[0]} and rows whose tails differ, which get padding "
                "at their ends; expected ids or embeddings, a mask and position_ids alone. Call the rows one by one."
            )
        if "position_ids" in more:
            more["position_ids"] = lengthened(more["position_ids"], ends.more, True)
        ids = None if ids is None else lengthened(ids, ends.more)
        embeds = lengthened(embeds, ends.more)
    real = mask
    if mask is None and ends.lengths is not None:
        line = torch.arange(length, device=ends.lengths.device)
        real = line < (ends.lengths if lengths is None else lengths)[:, None]
    mask = ends.mask
    constants = {name: held for name, held in more.items() if isinstance(held, bool | int | float | str)}
    more = {name: held for name, held in more.items() if name not in constants}
    extra = refuse_or_describe(stack, more, embeds)
    given_ids = {} if ids is None else {"input_ids": ids}
    tensors = {"inputs_embeds": embeds, **given_ids, **({} if mask is None else {"attention_mask": mask}), **more}
    signature = Signature(embeds.dtype, embeds.device, None if mask is None else mask.dtype, bool(use_cache),
                          stack.training, bool(hidden), ids is not None, extra,
                          tuple((name, constants[name]) for name in sorted(constants)),
                          autocast_dtype(embeds.device), ends.lengths is not None, bool(warm))  # fmt: skip
    if use_cache and cache is None and not returns_states(inspect_parameters(type(stack))):
        cache = new_cache(stack, embeds)
    return_dict = given.get("return_dict")
    return_dict = bool(stack.config.return_dict if return_dict is None else return_dict)
    return ModelCall(signature, tensors, cache if use_cache else None, cache_name, return_dict, length, ends, real)


def _lengths(stack: Any, runtime: Any, ids: Any, lead: Tensor, mask: Tensor | None,
             stated: bool) -> Tensor | None:  # fmt: skip
    """Tokens of each row before its trailing padding, `(B,)`, for calls that give the model no mask; None: unknown.

    On a CPU a mask of ones is no mask, but says what there is to say (`stated`).
    """
    rows, length = lead.shape[:2]
    asked = runtime.asked
    if asked.lengths is not None:
        if stated:
            raise InputError(
                f"{type(stack).__name__} was called with an attention_mask inside simba_fx.lengths; expected one of "
                "them to say how long the rows are. Leave one out."
            )
        check_lengths(asked.lengths, rows, length)
        return asked.lengths.to(lead.device, torch.int64)  # type: ignore[no-any-return]
    if mask is not None:
        return None
    pad = runtime.pad
    if pad is not None and ids is not None and not stated:
        return trailing_lengths(ids, pad)
    if pad is not None:
        return torch.full((rows,), length, device=lead.device)
    if ids is not None and not stated and not runtime.warned and not traced():
        ambiguous = padding_id(stack.config)[0]
        if ambiguous is not None and may_be_padded(ids, ambiguous):
            runtime.warned = True
            warn_of_padding(type(stack).__name__, ambiguous)
    return None


def _expected_tokens(given: dict[str, Any]) -> Callable[[], None]:
    """Puts back what the sparse layers of a call's cache expect now."""
    before = [(layer, layer.real) for layer in sparse_layers(_cache_of(given))]

    def put_back() -> None:
        for layer, real in before:
            layer.real = real

    return put_back


def _cache_of(given: dict[str, Any]) -> Any:
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def _decoding(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoding step; sparse layers (`decoding`) have masks of their own."""
    if not (layers := sparse_layers(_cache_of(given))):
        return given
    mask = given.get("attention_mask")
    expect_token(layers, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    return given | {"attention_mask": None}


def takes_positions(cls: type[nn.Module]) -> bool:
    return "position_ids" in inspect_parameters(cls)


def inspect_parameters(cls: type[nn.Module]) -> Any:
    return inspect.signature(cls.forward).parameters


def refuse_or_describe(stack: Any, more: dict[str, Any], embeds: Tensor) -> tuple[tuple[str, Any], ...]:
    """Further tensor arguments become inputs of the graph; anything else is refused."""
    rows, length = embeds.shape[:2]
    described = []
    for name in sorted(more):
        value = more[name]
        if not isinstance(value, Tensor):
            if name == "state" and isinstance(value, list):
                raise InputError(
                    f"{type(stack).__name__} was called with several tokens and the state of an earlier call, which "
                    "this package does not continue; expected one token, or the whole text and no state. Pass the "
                    "tokens one by one."
                )
            raise InputError(
                f"{type(stack).__name__} was called with {name}={value!r}, which a captured graph cannot take; "
                "expected tensors, numbers, flags and words. Leave the argument out."
            )
        described.append((name, (value.dtype, named_sizes(value, rows, length))))
    return tuple(described)
