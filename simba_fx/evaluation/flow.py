"""What happens between the blocks: how alike neighbouring tokens are, and from how far back a scan reads.

The two things by which the paper argues (its figures 2 and 5): neighbours become alike from block to block, so that
upper blocks can do without most of them; and a scan that meets fewer tokens forgets less on the way, so that what it
reads at the query comes from further back. The second is measured here by the exact contributions to the scan's output
(method.md section 2): the mean distance of a token to the query, each weighted by the norm of its contribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import simba_fx
from simba_fx.bench.plots import figures
from simba_fx.compiling import TorchDispatchMode
from simba_fx.ops.recurrences import SCANS, recurrence_of

__all__ = ["Flow", "draw", "flow"]


@dataclass
class Flow:
    """Of each block, and of each row: `(n_blocks, B)` float32; NaN where a block has no scan."""

    similarity: Tensor
    """Mean cosine of the hidden states of neighbours behind the block, in [-1, 1]."""
    distance: Tensor
    """Tokens of the input between the query, the last token, and what its scan reads; the mean over contributions."""


@dataclass
class _Seen:
    """What one call shows, block by block."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, list[Tensor]] = field(default_factory=dict)
    block: int = 0


class _Scored(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whoever runs a scan has its tokens scored as well."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in SCANS:
            recurrence = recurrence_of(func)
            named = recurrence.named(args, kwargs or {})
            operands = [named[name] for name in recurrence.scored]
            self.seen.scores.setdefault(self.seen.block, []).append(recurrence.score(*operands, None, 1, "simba-l2"))
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(layers: nn.ModuleList) -> Iterator[_Seen]:
    seen = _Seen()

    def before(block: int) -> Any:
        return lambda *_: setattr(seen, "block", block)

    def behind(block: int) -> Any:
        return lambda _, __, out: seen.hidden.update({block: (out if isinstance(out, Tensor) else out[0]).float()})

    with ExitStack() as stack:
        for block, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(before(block)).remove)
            stack.callback(layer.register_forward_hook(behind(block)).remove)
        stack.enter_context(_Scored(seen))
        yield seen


@torch.no_grad()
def flow(sparse: nn.Module, input_ids: Tensor) -> Flow:
    """Run a model of `transform` (`"dense"` for the dense one) on `input_ids` `(B, L)`, and look between its blocks.

    A causal language model of transformers, its ids without padding, uncompiled.
    """
    layers: Any = sparse.base_model.layers  # type: ignore[union-attr]
    sparse(input_ids[:1], use_cache=False)  # what traces the model is not to be watched
    with _watched(layers) as seen:
        sparse(input_ids, use_cache=False)
    similarity, distance = torch.full((2, len(layers), len(input_ids)), torch.nan)
    for block, entered in enumerate(simba_fx.kept(sparse)):
        hidden = seen.hidden[block]
        similarity[block] = cosine_similarity(hidden[:, 1:], hidden[:, :-1], dim=2).mean(1)
        if block in seen.scores:  # of several scans in a block, all together
            weight = torch.stack(seen.scores[block]).sum(0)
            distance[block] = ((input_ids.shape[1] - 1 - entered) * weight).sum(1) / weight.sum(1)
    return Flow(similarity, distance)


def draw(flows: Mapping[str, Flow], file: Path) -> None:
    """A picture of both measures, block by block, a line for each model. Raises: SimbaError without matplotlib."""
    figure = figures("flow")(11, 4.2)
    named = (
        ("similarity", "cosine of neighbouring tokens behind a block"),
        ("distance", "tokens back that a scan reads"),
    )
    for axes, (what, title) in zip(figure.subplots(1, 2), named):
        for name, one in flows.items():
            values = getattr(one, what)
            error = values.std(1, correction=1) / values.shape[1] ** 0.5
            axes.errorbar(range(len(values)), values.mean(1), error, label=name, marker="o", markersize=4, capsize=2)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("block")
        axes.grid(axis="y", color="#EEEEEE")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
