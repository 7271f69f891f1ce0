"""Transformers models: which part is captured, how a call is bound to a graph, and what comes back.

The result is a copy of the model's module tree over the original's own parameters, in which the block stack
(transformers' backbone, `model.base_model`) has a subclass of its own class: `isinstance`, `state_dict` keys, hooks,
`generate` and `save_pretrained` stay true. Its `forward` chooses between a captured graph
(prompts) and the class's own forward (decoding steps).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from simba_fx.capture.examples import EXAMPLE, autocast_dtype, named_sizes
from simba_fx.capture.export import capture_graph
from simba_fx.capture.normalise import Captured
from simba_fx.compiling import disable_compile, skip_frame, traced
from simba_fx.errors import CaptureError, InputError
from simba_fx.flops import budget_cost
from simba_fx.frontends.transformers.caches import fill, is_warm, new_cache, recording_cache
from simba_fx.frontends.transformers.decoding import (
    attention_modules,
    call_with_own_mask,
    expect_token,
    mark_pruned_kv,
    sparse_layers,
)
from simba_fx.graph.facts import region, returned
from simba_fx.options import Options
from simba_fx.runtime.build import build_program
from simba_fx.runtime.captures import captured, stored_with
from simba_fx.runtime.clone import clone_around, own_forward, subclass
from simba_fx.runtime.fingerprint import Snapshot
from simba_fx.runtime.inputs import check_mask, check_positions, check_rows
from simba_fx.runtime.labels import count_kept_labels
from simba_fx.runtime.last_call import LastCall
from simba_fx.runtime.rows import (
    Ends,
    check_lengths,
    ends_of,
    lead_of,
    lengthened,
    may_be_padded,
    padding_id,
    shortened,
    trailing_lengths,
    warn_of_padding,
    watch_calls,
)
from simba_fx.runtime.stack import Entry, Signature, StackRuntime, Variant, stack_class

__all__ = ["Signature", "SparseStack", "base_of", "capture_stack", "install", "owns", "stack_of"]

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What the argument is called: `cache` from transformers 5.24 on, one of the others before."""
_ROWS, _LENGTH = EXAMPLE.values()


def owns(model: nn.Module) -> bool:
    """Whether `model` is a transformers model, or a PEFT model around one; neither is imported to find out."""
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(base_of(model)).__mro__)


def base_of(model: nn.Module) -> Any:
    """The transformers model that `model` is, or that a PEFT model is wrapped around."""
    is_peft = any(cls.__module__ == "peft.peft_model" for cls in type(model).__mro__)
    return model.get_base_model() if is_peft else model  # type: ignore[operator]


def stack_of(model: nn.Module) -> Any:
    """The backbone of a transformers model, PEFT around it or not: the block stack that is captured."""
    return base_of(model).base_model


def install(model: nn.Module, options: Options, example_inputs: Any = None) -> nn.Module:
    """A sparse copy of `model` over the same parameters; `model` is untouched.

    Args:
        model: a transformers model, or a PEFT model around one.

    Raises:
        CaptureError, ScheduleError, GraphError: from the first capture, which happens here.
    """
    refuse_wrappers(model)
    stack: Any = stack_of(model)
    refuse_eager_experts(base_of(model))
    refuse_other_attention(stack)
    blocks = options.compile == "blocks"
    runtime = SparseStack(stack, options, budget_cost(model, stack, options), store=stored_with(stack))
    clone = clone_around(model, runtime, _stack_class(type(stack), blocks), blocks)
    if options.labels == "kept":
        count_kept_labels(base_of(clone), runtime, blocks)
    if base_of(clone) is not runtime.stack or options.tail == "labels":
        watch_calls(base_of(clone), _runtime_of, _check_call, options.tail == "labels", blocks)
    refuse_generation_without_cache(base_of(clone))
    embeddings = stack.get_input_embeddings().weight
    default = usual_signature(stack, embeddings, runtime.pad is not None)
    runtime.variant(default)
    if not blocks:  # a graph that is traced whole cannot stop to capture another
        runtime.variant(dataclasses.replace(default, mask=torch.int64, trailing=False))
    return clone


def _runtime_of(head: Any) -> SparseStack:
    runtime: SparseStack = head.base_model._simba
    return runtime


def _check_call(head: Any, given: dict[str, Any]) -> None:
    """Refuse packed rows; some models drop the arguments that say so before their block stack sees them."""
    refuse_packed(type(head).__name__, given)
    lead = lead_of(given)
    if given.get("position_ids") is not None and lead is not None and not takes_positions(type(head.base_model)):
        check_positions(given["position_ids"], lead, given.get("attention_mask"))


def refuse_generation_without_cache(model: nn.Module) -> None:
    """Without a cache each step would run the whole text, and choose anew which of its tokens stay."""
    cls: Any = type(model)
    if not hasattr(cls, "generate"):
        return
    own = cls.generate

    @functools.wraps(own)
    def generate(self: Any, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        config = self.generation_config if generation_config is None else generation_config
        if kwargs.get("use_cache", getattr(config, "use_cache", True)) is False:
            raise InputError(
                f"generate of this {cls.__name__} was called with use_cache=False; expected a cache: without one every "
                "step would run the whole text again and choose anew which of its tokens stay, so that the result "
                "would be another. Leave use_cache out, or generate with the dense model."
            )
        return own(self, inputs, generation_config, *args, **kwargs)

    model.__class__ = subclass(cls, "generation with a cache", cls.forward, generate=generate)


def refuse_wrappers(model: nn.Module) -> None:
    """Models of several inputs (images, speech) hold a language model; that one is what can be transformed.

    Raises:
        CaptureError: names it.
    """
    base = base_of(model)
    text = base.config.get_text_config()
    if text is base.config:
        return
    inside = (p for p, module in model.named_modules() if module is not base and getattr(module, "config", 0) is text)
    path = next(inside, None)
    how = "Transform its language model alone, and put that in its place."
    if path is not None:
        how = f"Write model.{path} = simba_fx.transform(model.{path}, ...)."
    raise CaptureError(
        f"{type(base).__name__} holds a language model beside other parts; expected a model of texts. {how}"
    )


def refuse_eager_experts(model: nn.Module) -> None:
    has_experts = any(type(module).__name__.endswith("Experts") for module in model.modules())
    if has_experts and getattr(model.config, "_experts_implementation", None) == "eager":
        raise CaptureError(
            "experts_implementation='eager' loops over experts in Python and cannot be captured; expected 'grouped_mm' "
            "or 'batched_mm'. Load the model with experts_implementation='grouped_mm'."
        )


def refuse_other_attention(stack: Any) -> None:
    """Masks are made for two implementations of attention, in prompts and in decoding steps."""
    chosen = getattr(stack.config, "_attn_implementation", None)
    if chosen not in (None, "sdpa", "eager") and any(hasattr(module, "is_causal") for module in stack.modules()):
        raise CaptureError(
            f"attn_implementation={chosen!r} of {type(stack).__name__} cannot be captured; expected 'sdpa' or 'eager'. "
            "Call model.set_attn_implementation('sdpa')."
        )


def usual_signature(stack: nn.Module, weight: Tensor, trailing: bool = False) -> Signature:
    """Of the calls that are captured when a model is transformed."""
    config: Any = stack.config
    cache = bool(config.use_cache and not stack.training)
    hidden = bool(getattr(config, "output_hidden_states", False))
    positions = (("position_ids", (torch.int64, ("B", "L"))),) if takes_positions(type(stack)) else ()
    return Signature(weight.dtype, weight.device, None, cache, stack.training, hidden, extra=positions,
                     autocast=autocast_dtype(weight.device), trailing=trailing)  # fmt: skip


@dataclass
class ModelVariant(Variant):
    """A graph of a transformers stack."""

    output_type: type
    attention: Mapping[int, int]
    """For each cache layer with keys, how many cuts are before the block that fills it."""
    whole: tuple[bool, ...]
    """For each of the model's values, whether it has a place for every token of the input."""


@dataclass(eq=False)
class SparseStack(StackRuntime):
    """The runtime of one transformed transformers model."""

    warned: bool = False
    """Of rows that may be padded with tokens that may be text; once is enough."""
    unread: dict[Signature, frozenset[str]] = field(default_factory=dict)
    """For each kind of call, whatever its constants: numbers among its keywords that the model does not look at."""

    def stack_of(self, model: nn.Module) -> nn.Module:
        return stack_of(model)  # type: ignore[no-any-return]

    @property
    def pad(self) -> int | None:
        """The id of trailing padding, where it can be nothing else."""
        pad, ambiguous = padding_id(self.stack.config)
        stated = self.options.pad_token_id
        return (None if ambiguous else pad) if stated is None else stated

    def outside(self) -> set[nn.Module]:
        """Ids are looked up before the graph runs."""
        return {self.stack.get_input_embeddings()}

    def used(self, signature: Signature) -> Signature:
        unread = self.unread.get(dataclasses.replace(signature, constants=()), frozenset())
        used = tuple((name, held) for name, held in signature.constants if name not in unread)
        return signature if len(used) == len(signature.constants) else dataclasses.replace(signature, constants=used)

    def capture(self, signature: Signature, now: Snapshot) -> ModelVariant:
        kernels, blocks = self.options.kernels, self.options.compile == "blocks"
        graph, seen = captured(
            self.store, self.stack, now, (signature, kernels, blocks),
            lambda: self._capture_unread(signature) or capture_stack(self.to_trace(), signature, kernels),
        )  # fmt: skip
        if seen.unread:
            kind = dataclasses.replace(signature, constants=())
            self.unread[kind] = self.unread.get(kind, frozenset()) | seen.unread
        built = build_program(graph, self.options, self.cost, trailing=signature.trailing)
        keys = self._keys(graph, seen.states)
        self._watch(attention_modules(self.stack, keys.values()))
        before = {layer: sum(cut.block < region(node) for cut in built.cuts) for layer, node in keys.items()}
        values = returned(graph.graph)[: graph.facts.values]
        full = self.options.output == "full"
        whole = tuple(full or not any(cut.block < region(node) for cut in built.cuts) for node in values)
        return ModelVariant(built, seen.states, now, seen.output_type, before, whole)

    def _capture_unread(self, signature: Signature) -> tuple[Captured, _Observed] | None:
        """The graph if the numbers that the forward has no parameters for are looked at by nobody; None if they are.

        A trainer hands on numbers to whoever may want them (`num_items_in_batch`), another one at each call.
        """
        own = inspect_parameters(type(self.stack))
        loose = {name for name, held in signature.constants if _is_number(held) and name not in own}
        if not loose:
            return None
        constants = tuple((name, _Unread() if name in loose else held) for name, held in signature.constants)
        try:
            loose_signature = dataclasses.replace(signature, constants=constants)
            captured, seen = capture_stack(self.to_trace(), loose_signature, self.options.kernels)
        except Exception:  # who looks at what is no number fails, in whatever way
            return None
        return captured, dataclasses.replace(seen, unread=frozenset(loose))

    def _keys(self, captured: Captured, states: tuple[Entry, ...]) -> dict[int, fx.Node]:
        """The node of each attention layer's keys.

        Raises:
            CaptureError: a layer whose past after a pruned prompt this package does not know how to continue.
        """
        nodes = returned(captured.graph)[captured.facts.values :]
        keys = {layer: node for (layer, kind, _), node in zip(states, nodes) if kind == "keys"}
        layers = new_cache(self.stack.config).layers if keys else []
        if sliding := [layer for layer in keys if getattr(layers[layer], "is_sliding", False)]:
            raise CaptureError(
                f"Layers {', '.join(map(str, sliding))} of {type(self.stack).__name__} attend to a sliding window; "
                "expected attention to the whole past, which is what can be decoded after a pruned prompt. Pass "
                "use_cache=False."
            )
        return keys

    def _watch(self, paths: list[str]) -> None:
        """Attention modules get the mask of their own cache layer."""
        for path in paths:
            module = self.stack.get_submodule(path)
            if call_with_own_mask not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(call_with_own_mask, with_kwargs=True)

    def finish(self, variant: ModelVariant, call: ModelCall, flat: Any) -> Any:
        """Fill the cache; return the model's values as the model returns them."""
        facts, n_states = variant.built.captured.facts, len(variant.states)
        values, states = flat[: facts.values], flat[facts.values : facts.values + n_states]
        values = shortened(values, variant.whole, call.length, call.ends.more)
        kept, step = flat[facts.values + n_states :], 2 if variant.built.ragged else 1
        real = kept[1::2] if variant.built.ragged else None
        rows = call.tensors["inputs_embeds"].shape[0]
        last = self.last = LastCall(rows, call.length, variant.built, kept[::step], real, call.real)
        named, _ = pytree.tree_unflatten([*values, *states], variant.built.captured.out_spec)
        if call.cache is not None:
            fill(call.cache, variant.states, states)
            self._describe_attention(variant, call.cache, last)
            named[call.cache_name] = call.cache
        output = variant.output_type(**named)
        return output if call.return_dict else output.to_tuple()

    def _describe_attention(self, variant: ModelVariant, cache: Any, last: LastCall) -> None:
        """Tell the cache's attention layers which tokens of the prompt they hold, unless they hold them all."""
        _, length, built, positions, real, mask = last
        everything: Any = mask
        masked = built.captured.facts.mask is not None
        if not variant.attention or (not masked and not built.cuts):
            return
        if traced():
            raise InputError(
                f"The cache of {type(self.stack).__name__} has attention layers, which learn in Python how much they "
                "hold; expected use_cache=False in a graph that is traced whole. Pass that; with torch.compile, "
                "compile='blocks' fills them."
            )
        for layer, cuts in variant.attention.items():
            slots = positions[cuts - 1].shape[1] if cuts else length
            here = None if not masked else real[cuts - 1] if cuts else everything != 0
            mark_pruned_kv(cache.layers[layer], length - slots, here)


def _is_number(held: Any) -> bool:
    return isinstance(held, int | float) and not isinstance(held, bool)


class _Unread:
    """Stands for a number: whoever computes with it, compares it, or hands it to an operator, fails."""

    def __bool__(self) -> bool:
        raise TypeError("this number is looked at")

    def __eq__(self, other: object) -> bool:
        raise TypeError("this number is looked at")

    __hash__ = object.__hash__


@dataclass
class _Observed:
    """What a shell saw while it was traced. Not attributes of the module: export puts those back."""

    output_type: type = dict
    states: tuple[Entry, ...] = ()
    values: int = 0
    unread: frozenset[str] = frozenset()
    """Numbers among the keywords that nobody looked at."""


def capture_stack(stack: Any, signature: Signature, kernels: str = "auto") -> tuple[Captured, _Observed]:
    """The graph of `stack` for calls of this signature."""
    width = stack.get_input_embeddings().weight.shape[1]
    make: dict[str, Any] = {"device": signature.device}
    inputs = {"inputs_embeds": torch.zeros(_ROWS, _LENGTH, width, dtype=signature.dtype, **make)}
    if signature.ids:
        inputs["input_ids"] = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64, **make)
    if signature.mask is not None:
        inputs["attention_mask"] = torch.ones(_ROWS, _LENGTH, dtype=signature.mask, **make)
    for name, (dtype, sizes) in signature.extra:
        inputs[name] = torch.zeros([EXAMPLE.get(size, size) for size in sizes], dtype=dtype, **make)
    shell = _Shell(stack, signature)
    mask = "attention_mask" if signature.mask is not None else None
    captured = capture_graph(shell, stack, inputs, primary="inputs_embeds", prefix="stack", mask=mask,
                       values=lambda: shell.observed.values, spare=("input_ids", "position_ids"),
                       kernels=kernels)  # fmt: skip
    return captured, shell.observed


class _Shell(nn.Module):
    """The stack as a function of tensors: returns its values by name and what a cache would store."""

    def __init__(self, stack: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.stack = stack
        self.training = stack.training
        self.signature = signature
        self.observed = _Observed()

    def forward(self, **tensors: Tensor) -> Any:
        options: dict[str, Any] = {"return_dict": True, "use_cache": self.signature.cache}
        options |= dict(self.signature.constants)
        parameters = inspect.signature(own_forward(self.stack)).parameters
        if "output_hidden_states" in parameters or self.signature.hidden_states:
            options["output_hidden_states"] = self.signature.hidden_states
        cache_name = cache_parameter(parameters)
        cache = recording_cache(self.stack.config) if self.signature.cache else None
        if cache is not None:
            options[cache_name] = cache
        if self.signature.ids:  # the embeddings are looked up outside of the graph; what follows is the model's own
            embeds = tensors.pop("inputs_embeds")
            stack: Any = self.stack
            embedding = stack.get_input_embeddings()
            with _forward_is(embedding, lambda _: embeds):
                output = own_forward(self.stack)(input_ids=tensors.pop("input_ids"), **tensors, **options)
        else:
            output = own_forward(self.stack)(**tensors, **options)
        named = {name: value for name, value in output.items() if name != cache_name}
        stored = cache.stored() if cache is not None else {}
        observed = self.observed
        observed.output_type, observed.states = type(output), tuple(stored)
        observed.values = len(pytree.tree_leaves(named))
        return named, list(stored.values())


@contextmanager
def _forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of `module` run `forward` inside, its hooks included."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def cache_parameter(parameters: Any) -> str:
    return next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[-1])


def _with_own_names(parameters: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The cache under the name that this version of the model has for it (transformers renames old ones likewise)."""
    own = cache_parameter(parameters)
    return {own if name in _CACHE_NAMES else name: held for name, held in given.items()}


# --- the sparse class --------------------------------------------------------------------------------------------


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

    def inputs(self, names: Sequence[str]) -> list[Any]:
        lengths = [self.ends.lengths] if self.signature.trailing else []
        return [*(self.tensors[name] for name in names), self.ends.tail, *lengths]


def _stack_class(cls: type[nn.Module], blocks: bool) -> type:
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
    return stack_class(cls, blocks, _prepare, decode, functools.partial(_with_own_names, names))


def _prepare(stack: Any, given: dict[str, Any]) -> ModelCall | None:
    """What to run for a call; None: the class's own forward (a decoding step, a prompt of one token)."""
    runtime: SparseStack = stack._simba
    cache_name = cache_parameter(inspect_parameters(type(stack)))
    cache = given.get(cache_name)
    ids, embeds, mask = given.get("input_ids"), given.get("inputs_embeds"), given.get("attention_mask")
    if (ids is None) == (embeds is None):
        return None  # the model's own message
    lead: Any = embeds if ids is None else ids
    rows, length = lead.shape[:2]
    if cache is not None and is_warm(cache):
        if length == 1:
            return None
        raise InputError(
            f"{type(stack).__name__} was called with {length} new tokens on a warm cache; expected a whole prompt with "
            "an empty cache, or one new token. Pass the tokens one at a time, or start with an empty cache."
        )
    if isinstance(mask, dict):  # `generate` with a static cache has made masks already; among them the padding's own
        mask = mask.get("linear_attention")
    asked, stated = runtime.asked, mask is not None
    mask = check_mask(mask, rows, length, runtime.least, runtime.options.named)
    if length == 1:
        runtime.last = LastCall(rows, length, None, (), None, mask)
        return None
    lengths = _lengths(stack, runtime, ids, lead, mask, stated)
    if lengths is not None and not traced():
        check_rows(lengths, runtime.least, runtime.options.named)
    ends = ends_of(asked, rows, length, mask, lengths)
    use_cache = given.get("use_cache")
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
        more["position_ids"] = check_positions(more.get("position_ids"), embeds, mask)
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
                          autocast_dtype(embeds.device), ends.lengths is not None)  # fmt: skip
    if use_cache and cache is None:
        cache = new_cache(stack.config)
    return_dict = given.get("return_dict")
    return_dict = bool(stack.config.return_dict if return_dict is None else return_dict)
    return ModelCall(signature, tensors, cache if use_cache else None, cache_name, return_dict, length, ends, real)


def _lengths(stack: Any, runtime: SparseStack, ids: Any, lead: Tensor, mask: Tensor | None,
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
        return asked.lengths.to(lead.device, torch.int64)
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


_PACKING = ("seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments that say where the sequences of a packed row begin."""


def refuse_packed(name: str, given: Mapping[str, Any]) -> None:
    if found := [argument for argument in _PACKING if given.get(argument) is not None]:
        raise InputError(
            f"{name} was called with {found[0]}, which says that rows pack several sequences; expected one sequence "
            "per row, because tokens are scored at the end of their row. Pass one sequence per row, padded, with an "
            "attention_mask."
        )


def _expected_tokens(given: dict[str, Any]) -> Callable[[], None]:
    """Puts back what the sparse layers of a call's cache expect now."""
    before = [(layer, layer.real) for layer in sparse_layers(_cache_of(given))]

    def put_back() -> None:
        for layer, real in before:
            layer.real = real

    return put_back


def _cache_of(given: dict[str, Any]) -> Any:
    return next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)


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
            raise InputError(
                f"{type(stack).__name__} was called with {name}={value!r}, which a captured graph cannot take; "
                "expected tensors, numbers, flags and words. Leave the argument out."
            )
        described.append((name, (value.dtype, named_sizes(value, rows, length))))
    return tuple(described)
