"""Who is compared: the dense model, sparse ones by schedule and criterion, and plain ways to spend as many FLOPs.

A baseline is aimed, for each length, at the FLOPs of a schedule with the first criterion, scorer included. What each
rival costs is counted on itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import simba_fx
from simba_fx.bench import models
from simba_fx.bench.options import Criterion, parse_schedule
from simba_fx.bench.peers import (
    blocks_for,
    dense_flops,
    expect_equal_blocks,
    fewer_blocks,
    measured_flops,
    tokens_for,
)
from simba_fx.bench.utrc import UTRC
from simba_fx.evaluation.options import EvalError, Options
from simba_fx.flops import ModelFlops

__all__ = ["Rival", "flops_of", "rivals_of"]

_CALL = {"use_cache": False}


Aim = Callable[["Rival", ModelFlops, int, int, int], str]
"""`(rival, the dense model's FLOPs, length, last, target)`: sets a baseline up for so many FLOPs, and says how."""


@dataclass
class Rival:
    """A model, and how many of the last tokens it is given."""

    name: str
    kind: str
    """"dense", "sparse", "baseline" or "other model"."""
    module: Any
    schedule: str = ""
    """The one that it follows, or whose FLOPs it has."""
    criterion: str = ""
    aim: Aim | None = None
    tokens: int | None = None
    says: str = ""
    flops: dict[tuple[int, int], int] = field(default_factory=dict)
    """Of one row, by its length and the tokens whose logits are read."""

    def scores(self, ids: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Of the last tokens of `ids` `(B, L + 1)`, which choose nothing of what is kept.

        Returns:
            Their losses in nats, and whether each is the model's first choice: both `(B, last)`.
        """
        given = ids[:, :-1] if self.tokens is None else ids[:, -self.tokens - 1 : -1]
        protected = simba_fx.tail(self.module, last) if self.kind == "sparse" else nullcontext()
        with torch.no_grad(), protected:
            found = self.module(given, **_CALL, logits_to_keep=last)
            logits = (found if isinstance(found, Tensor) else found.logits).float()
        targets = ids[:, -last:]
        losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return losses, logits.argmax(2) == targets

    def cost(self, ids: Tensor, last: int) -> int:
        """FLOPs of one row."""
        key = ids.shape[1], last
        if key not in self.flops:
            self.flops[key] = measured_flops(lambda: self.scores(ids[:1], last))
        return self.flops[key]


def rivals_of(model: Any, options: Options) -> list[Rival]:
    """The dense model first.

    Raises:
        BenchError, EvalError: a rival that this model cannot have.
    """
    dense = simba_fx.transform(model, "dense")
    found = [Rival("dense", "dense", dense, says="every token in every block")]
    for text in options.schedules:
        schedule = parse_schedule(text)
        for criterion in map(Criterion.parse, options.criteria):
            sparse = simba_fx.transform(
                model, schedule, criterion=criterion.name, span=criterion.span, seed=options.seed
            )
            found.append(Rival(f"{text}, {criterion}", "sparse", sparse, text, str(criterion)))
        for name in options.baselines:
            aim: Aim = _truncate
            module: Any = dense
            if name == "layer-drop":
                expect_equal_blocks(model)
                aim = functools.partial(_drop_layers, model)
            elif name == "utrc":
                module, aim = UTRC(model), _merge
            found.append(Rival(f"{name} at the cost of {text}", "baseline", module, text, name, aim))
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    for name in options.against:
        other = models.build(name, device, dtype)
        if other.config.vocab_size != model.config.vocab_size:
            raise EvalError(
                f"--against {name} has a vocabulary of {other.config.vocab_size}, the model one of "
                f"{model.config.vocab_size}; expected models that read the same tokens. Leave it out."
            )
        found.append(Rival(models.title(name), "other model", simba_fx.transform(other, "dense"), says="dense"))
    return found


def flops_of(dense: nn.Module, ids: Tensor, last: int) -> ModelFlops:
    """Of the dense model on one row of `ids` `(B, L + 1)`, of whose last tokens logits are read."""
    arguments = {**_CALL, "logits_to_keep": last}
    with torch.no_grad():  # the graph without a cache
        dense(ids[:1, :-1], **arguments)
    return dense_flops(dense, ids[:1, :-1], arguments)


def _truncate(rival: Rival, flops: ModelFlops, length: int, last: int, target: int) -> str:
    rival.tokens = max(last, tokens_for(flops, length, target, True))
    return f"the dense model on the last {rival.tokens} tokens"


def _merge(rival: Rival, flops: ModelFlops, length: int, last: int, target: int) -> str:
    rival.module.tail = last
    return str(rival.module.aim(flops, 1, length, target, True))


def _drop_layers(model: Any, rival: Rival, flops: ModelFlops, length: int, last: int, target: int) -> str:
    count = blocks_for(flops, length, target)
    rival.module = simba_fx.transform(fewer_blocks(model, count), "dense")
    return f"{count} blocks, evenly spaced"
