"""Losses on the tokens that went through every block (`transform(..., labels="kept")`).

With full-length outputs a token that left early is predicted from the hidden state it left with. In evaluation and in
fine-tuning that early exit counts like any other prediction; with `labels="kept"` it does not: the label that such a
token should predict is ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.compiling import disable_compile
from simba_fx.errors import SimbaError
from simba_fx.runtime.clone import subclass
from simba_fx.runtime.last_call import LastCall
from simba_fx.runtime.rows import IGNORED

__all__ = ["count_kept_labels", "reached", "real_at"]


def reached(last: LastCall) -> Tensor:
    """Of the last call: which tokens went through every block, `(B, L)` bool."""
    rows, length, built, positions, _, mask = last
    if built is None or not positions:
        return torch.ones(rows, length, dtype=torch.bool) if mask is None else mask != 0
    survivors, there = positions[-1], real_at(last, -1)
    if there is None:
        there = torch.ones_like(survivors, dtype=torch.bool)
    found = torch.zeros(rows, length + 1, dtype=torch.bool, device=survivors.device)
    return found.scatter_add_(1, survivors.clamp(max=length), there)[:, :length]  # pads add nothing


def real_at(last: LastCall, cut: int) -> Tensor | None:
    """Which of the tokens that are kept at this cut are the caller's, `(B, k)` bool; None: all of them."""
    _, length, _, positions, real, mask = last
    if real is None or mask is None:
        return None if real is None else real[cut]
    inside = nn.functional.pad(mask != 0, (0, 1))  # positions from L on are no tokens of the caller's
    there: Tensor = real[cut] & inside.gather(1, positions[cut].clamp(max=length))
    return there


def count_kept_labels(head: nn.Module, runtime: Any, blocks: bool) -> None:
    """Let a transformers model's own loss ignore labels that dropped tokens should predict; changes its class.

    Raises:
        SimbaError: the model computes no loss from labels.
    """
    cls: Any = type(head)
    if "labels" not in inspect.signature(cls.forward).parameters or not hasattr(cls, "loss_function"):
        raise SimbaError(
            f"labels='kept' is for models that compute a loss from labels; found {cls.__name__}, which does not. Leave "
            "it out, and mask your own loss with simba_fx.reached(sparse)."
        )
    mask: Callable[..., Any] = disable_compile(_without_dropped) if blocks else _without_dropped
    own: property = cls.loss_function

    def loss_function(self: Any) -> Callable[..., Tensor]:
        loss = own.fget(self)  # type: ignore[misc]  # a property of PreTrainedModel has one

        def of_survivors(*args: Any, **kwargs: Any) -> Tensor:
            given = dict(zip(("logits", "labels", "vocab_size"), args)) | kwargs
            result: Tensor = loss(**mask(self._simba_loss, given))
            return result

        return of_survivors

    head.__class__ = subclass(
        cls, f"kept labels, blocks: {blocks}", cls.forward, loss_function=property(loss_function, own.fset)
    )
    head.__dict__["_simba_loss"] = runtime


def _without_dropped(runtime: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a causal loss, with the labels of dropped tokens ignored.

    Labels `(B, L)`: the token at t predicts the label at t + 1. `shift_labels` are in place already. Where the loss is
    a sum over `num_items_in_batch` labels, that number shrinks as the labels of this call do.
    """
    name = "labels" if given.get("shift_labels") is None else "shift_labels"
    labels = given.get(name)
    rows, length = runtime.last[:2]
    if not isinstance(labels, Tensor) or tuple(labels.shape) != (rows, length):
        return given
    survivors = reached(runtime.last).to(labels.device)
    if name == "labels":
        survivors = nn.functional.pad(survivors[:, :-1], (1, 0), value=True)
    counted = labels.masked_fill(~survivors, IGNORED)
    given = given | {name: counted}
    if (items := given.get("num_items_in_batch")) is not None:
        first = 1 if name == "labels" else 0
        here, before = ((held[:, first:] != IGNORED).sum() for held in (counted, labels))
        given["num_items_in_batch"] = items * here.clamp(min=1) / before.clamp(min=1)
    return given
