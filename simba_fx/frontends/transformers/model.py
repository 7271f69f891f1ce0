"""Transformers models: which part of one is captured, and what comes back from a call.

The result is a copy of the model's module tree over the original's own parameters, in which the block stack
(transformers' backbone, `model.base_model`) has a subclass of its own class: `isinstance`, `state_dict` keys, hooks,
`generate` and `save_pretrained` stay true. Prefill runs a captured graph, decode the class's own forward (`calls`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from simba_fx.capture.normalise import Captured
from simba_fx.compiling import traced
from simba_fx.errors import CacheError, CaptureError, InputError
from simba_fx.flops import budget_cost
from simba_fx.frontends.transformers.caches import fill, new_cache
from simba_fx.frontends.transformers.calls import (
    ModelCall,
    inspect_parameters,
    sparse_class,
    takes_positions,
    usual_signature,
)
from simba_fx.frontends.transformers.decoding import (
    attention_modules,
    call_with_own_mask,
    describe,
    mark_pruned_kv,
)
from simba_fx.frontends.transformers.refusals import (
    refuse_eager_experts,
    refuse_generation_without_cache,
    refuse_other_attention,
    refuse_packed,
    refuse_pools,
    refuse_rescaling,
    refuse_wrappers,
)
from simba_fx.frontends.transformers.trace import Observed, capture_stack
from simba_fx.graph.facts import returned
from simba_fx.graph.marks import region
from simba_fx.options import Options
from simba_fx.runtime.build import build_program
from simba_fx.runtime.captures import captured, stored_with
from simba_fx.runtime.clone import clone_around
from simba_fx.runtime.fingerprint import Snapshot
from simba_fx.runtime.inputs import check_positions
from simba_fx.runtime.labels import count_kept_labels
from simba_fx.runtime.last_call import LastCall
from simba_fx.runtime.rows import (
    lead_of,
    padding_id,
    shortened,
    watch_calls,
)
from simba_fx.runtime.stack import Entry, Signature, StackRuntime, Variant

__all__ = ["SparseStack", "base_of", "install", "owns", "stack_of"]


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
    refuse_wrappers(model, base_of(model))
    stack: Any = stack_of(model)
    refuse_eager_experts(base_of(model))
    refuse_other_attention(stack)
    refuse_rescaling(stack)
    refuse_pools(stack)
    blocks = options.compile == "blocks"
    runtime = SparseStack(stack, options, budget_cost(model, stack, options), store=stored_with(stack))
    clone = clone_around(model, runtime, sparse_class(type(stack), blocks), blocks)
    if options.labels == "kept":
        count_kept_labels(base_of(clone), runtime, blocks)
    if base_of(clone) is not runtime.stack or options.tail == "labels":
        watch_calls(base_of(clone), _runtime_of, _check_call, options.tail == "labels", blocks)
    refuse_generation_without_cache(base_of(clone))
    embeddings = stack.get_input_embeddings().weight
    default = usual_signature(stack, embeddings, runtime.pad is not None)
    cached = default
    try:
        runtime.variant(default)
    except CaptureError as error:  # what is wrong with the cache is told to whoever asks for one
        if not isinstance(error, CacheError) and "cache" not in str(error):
            raise
        default = dataclasses.replace(default, cache=False)
    if default is not cached:  # outside of the handler: another error here is none of the cache's
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
        cold = dataclasses.replace(signature, warm=False)
        graph, seen = captured(
            self.store, self.stack, now, (cold, kernels, blocks),
            lambda: self._capture_unread(cold) or capture_stack(self.to_trace(), cold, kernels),
        )  # fmt: skip
        if seen.unread:
            kind = dataclasses.replace(signature, constants=())
            self.unread[kind] = self.unread.get(kind, frozenset()) | seen.unread
        built = build_program(graph, self.options, self.cost, trailing=signature.trailing,
                              states=seen.states if signature.warm else ())  # fmt: skip
        keys = self._keys(graph, seen.states)
        self._watch(attention_modules(self.stack, keys.values()))
        before = {layer: sum(cut.block < region(node) for cut in built.cuts) for layer, node in keys.items()}
        values = returned(graph.graph)[: graph.facts.values]
        full = self.options.output == "full"
        whole = tuple(full or not any(cut.block < region(node) for cut in built.cuts) for node in values)
        return ModelVariant(built, seen.states, now, seen.output_type, before, whole)

    def _capture_unread(self, signature: Signature) -> tuple[Captured, Observed] | None:
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
            CacheError: a layer whose past after a pruned prompt this package does not know how to continue.
        """
        nodes = returned(captured.graph)[captured.facts.values :]
        keys = {layer: node for (layer, kind, _), node in zip(states, nodes) if kind == "keys"}
        layers = dict(enumerate(new_cache(self.stack).layers if keys else ()))  # MiniMax's grows as it is filled
        if sliding := [layer for layer in keys if getattr(layers.get(layer), "is_sliding", False)]:
            raise CacheError(
                f"Layers {', '.join(map(str, sliding))} of {type(self.stack).__name__} attend to a sliding window; "
                "expected attention to the whole past, which is what can be decoded after a pruned prompt. Pass "
                "use_cache=False, or generate with the dense model."
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
            before = {layer: describe(call.cache.layers[layer]) if call.signature.warm else (0, None, 0)
                      for layer in variant.attention}  # fmt: skip
            fill(call.cache, variant.states, states, call.length)
            self._describe_attention(variant, call.cache, last, before)
            named[call.cache_name] = call.cache
        output = variant.output_type(**named)
        return output if call.return_dict else output.to_tuple()

    def _describe_attention(
        self, variant: ModelVariant, cache: Any, last: LastCall, before: dict[int, tuple[int, Tensor | None, int]]
    ) -> None:
        """Tell the cache's attention layers which tokens they hold, unless they hold them all; `before` this call."""
        if not variant.attention:
            return
        rows, length, built, positions, real, mask = last
        everything: Any = mask
        masked = built.captured.facts.mask is not None
        if not masked and not built.cuts and all(known[:2] == (0, None) for known in before.values()):
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
            missing, held, past = before[layer]
            if past and (here is not None or held is not None):
                device = cache.layers[layer].keys.device
                parts = ((held, past), (here, slots))
                here = torch.cat([torch.ones(rows, size, dtype=torch.bool, device=device) if part is None else part
                                  for part, size in parts], 1)  # fmt: skip
            mark_pruned_kv(cache.layers[layer], missing + length - slots, here)


def _is_number(held: Any) -> bool:
    return isinstance(held, int | float) and not isinstance(held, bool)


class _Unread:
    """Stands for a number: whoever computes with it, compares it, or hands it to an operator, fails."""

    def __bool__(self) -> bool:
        raise TypeError("this number is looked at")

    def __eq__(self, other: object) -> bool:
        raise TypeError("this number is looked at")

    __hash__ = object.__hash__
