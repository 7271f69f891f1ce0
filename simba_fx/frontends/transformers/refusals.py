"""Transformers models, and calls of them, that cannot be pruned: refused with what works instead."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from simba_fx.errors import CaptureError, InputError
from simba_fx.runtime.clone import subclass

__all__ = [
    "refuse_eager_experts",
    "refuse_generation_without_cache",
    "refuse_half_precision",
    "refuse_other_attention",
    "refuse_packed",
    "refuse_pools",
    "refuse_rescaling",
    "refuse_wrappers",
]

_PACKING = ("seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments that say where the sequences of a packed row begin."""


def refuse_packed(name: str, given: Mapping[str, Any]) -> None:
    if found := [argument for argument in _PACKING if given.get(argument) is not None]:
        raise InputError(
            f"{name} was called with {found[0]}, which says that rows pack several sequences; expected one sequence "
            "per row, because tokens are scored at the end of their row. Pass one sequence per row, padded, with an "
            "attention_mask."
        )


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


def refuse_wrappers(model: nn.Module, base: Any) -> None:
    """Models of several inputs (images, speech) hold a language model; that one is what can be transformed.

    Raises:
        CaptureError: names it.
    """
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


def refuse_pools(stack: Any) -> None:
    """GLM-5.3's sparse attention reads keys by pools of tokens that stand side by side; survivors would make others."""
    for path, module in stack.named_modules():
        if getattr(module, "index_kpool", 1) > 1:
            raise CaptureError(
                f"{type(stack).__name__}.{path} ({type(module).__name__}) chooses keys by pools of "
                f"{module.index_kpool} neighbouring tokens; expected attention that reads tokens one by one, since "
                "survivors would make other pools. Leave such a model dense."
            )


def refuse_rescaling(stack: Any) -> None:
    """RWKV divides the weights of later blocks in place when it is first called, and multiplies them when it trains."""
    every = getattr(stack.config, "rescale_every", 0)
    if hasattr(stack, "layers_are_rescaled") and 0 < every <= stack.config.num_hidden_layers:
        raise CaptureError(
            f"{type(stack).__name__} rescales its weights in place when it is called (rescale_every={every}), and the "
            "sparse model shares them; expected weights that a call leaves as they are. Load the model with "
            "rescale_every=0: the rescaling is for float16, where sums may overflow."
        )


def refuse_half_precision(stack: Any, dtype: torch.dtype) -> None:
    """xLSTM's scan of transformers makes states of float32 where it is given none, and multiplies them by others."""
    if type(stack).__name__ == "xLSTMModel" and dtype in (torch.float16, torch.bfloat16):
        raise CaptureError(
            f"{type(stack).__name__} has weights of {dtype}, on which transformers' own scan fails unless it is given "
            "states of that dtype; expected torch.float32. Load the model with dtype=torch.float32."
        )


def refuse_other_attention(stack: Any) -> None:
    """Masks are made for two implementations of attention, in prompts and in decoding steps."""
    chosen = getattr(stack.config, "_attn_implementation", None)
    if chosen not in (None, "sdpa", "eager") and any(hasattr(module, "is_causal") for module in stack.modules()):
        raise CaptureError(
            f"attn_implementation={chosen!r} of {type(stack).__name__} cannot be captured; expected 'sdpa' or 'eager'. "
            "Call model.set_attn_implementation('sdpa')."
        )
