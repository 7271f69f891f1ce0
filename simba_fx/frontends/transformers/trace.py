"""What is captured of a transformers model: its block stack, as a function of tensors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simba_fx.capture.examples import EXAMPLE
from simba_fx.capture.export import capture_graph
from simba_fx.capture.normalise import Captured
from simba_fx.errors import CacheError
from simba_fx.frontends.transformers.caches import recording_cache
from simba_fx.frontends.transformers.calls import CACHE_NAMES, cache_parameter, returns_states
from simba_fx.frontends.transformers.refusals import refuse_half_precision
from simba_fx.runtime.clone import own_forward
from simba_fx.runtime.stack import Entry, Signature

__all__ = ["Observed", "capture_stack"]

_ROWS, _LENGTH = EXAMPLE.values()


@dataclass
class Observed:
    """What a shell saw while it was traced. Not attributes of the module: export puts those back."""

    output_type: type = dict
    states: tuple[Entry, ...] = ()
    values: int = 0
    unread: frozenset[str] = frozenset()
    """Numbers among the keywords that nobody looked at."""


def capture_stack(stack: Any, signature: Signature, kernels: str = "auto") -> tuple[Captured, Observed]:
    """The graph of `stack` for calls of this signature."""
    refuse_half_precision(stack, signature.dtype)
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
        self.observed = Observed()

    def forward(self, **tensors: Tensor) -> Any:
        options: dict[str, Any] = {"return_dict": True, "use_cache": self.signature.cache}
        options |= dict(self.signature.constants)
        parameters = inspect.signature(own_forward(self.stack)).parameters
        if "output_hidden_states" in parameters or self.signature.hidden_states:
            options["output_hidden_states"] = self.signature.hidden_states
        cache_name = cache_parameter(parameters)
        if self.signature.cache and cache_name not in parameters and not returns_states(parameters):
            raise CacheError(
                f"{type(self.stack).__name__}.forward takes no cache by a name that transformers' others have "
                f"({', '.join(CACHE_NAMES)}), so that what a prompt leaves behind cannot be put there. Pass "
                "use_cache=False, or generate with the dense model."
            )
        cache = None
        if self.signature.cache and cache_name in parameters:
            cache = options[cache_name] = recording_cache(self.stack)
        stack: Any = self.stack
        with _in_one_piece(stack.config):
            if self.signature.ids:  # embeddings are looked up outside of the graph; what follows is the model's own
                embeds = tensors.pop("inputs_embeds")
                with _forward_is(stack.get_input_embeddings(), lambda _: embeds):
                    output = own_forward(stack)(input_ids=tensors.pop("input_ids"), **tensors, **options)
            else:
                output = own_forward(stack)(**tensors, **options)
        named = {name: value for name, value in output.items() if name != cache_name}
        stored = cache.entries() if cache is not None else {}
        observed = self.observed
        observed.output_type, observed.states = type(output), tuple(stored)
        observed.values = len(pytree.tree_leaves(named))
        return named, list(stored.values())


@contextmanager
def _in_one_piece(config: Any) -> Iterator[None]:
    """xLSTM runs a long prompt piece by piece, from state to state, to save memory; a graph is for any length."""
    usual = getattr(config, "max_inference_chunksize", None)
    if usual is not None:
        config.max_inference_chunksize = sys.maxsize
    try:
        yield
    finally:
        if usual is not None:
            config.max_inference_chunksize = usual


@contextmanager
def _forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of `module` run `forward` inside, its hooks included."""
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
