"""Who is compared: the dense model, sparse ones by schedule and criterion, and plain ways to spend as many FLOPs.

A baseline is aimed, for each length, at the FLOPs of a schedule with the first criterion, scorer included. What each
rival costs is counted on itself.
"""

from __future__ import annotations

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
from simba_fx.evaluation.options import EvalError, Options

__all__ = ["Rival", "rivals_of"]

_CALL = {"use_cache": False}


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
    aim: Callable[[Rival, Tensor, int, int], str] | None = None
    """`(rival, ids, last, target)`: sets it up for so many FLOPs, and says how."""
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
            logits = self.module(given, **_CALL, logits_to_keep=last).logits.float()
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
            aim = {"left-truncation": _truncate, "layer-drop": _drop_layers}[name]
            if name == "layer-drop":
                expect_equal_blocks(model)
            found.append(
                Rival(f"{name} at the cost of {text}", "baseline", dense, text, name, _with_model(aim, model, dense))
            )
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


Aim = Callable[[Rival, Tensor, int, int, Any, nn.Module], str]


def _with_model(aim: Aim, model: Any, dense: nn.Module) -> Callable[[Rival, Tensor, int, int], str]:
    return lambda rival, ids, last, target: aim(rival, ids, last, target, model, dense)


def _arguments(last: int) -> dict[str, Any]:
    return {**_CALL, "logits_to_keep": last}


def _truncate(rival: Rival, ids: Tensor, last: int, target: int, model: Any, dense: nn.Module) -> str:
    given = ids[:1, :-1]
    with torch.no_grad():
        dense(given, **_arguments(last))
    flops = dense_flops(dense, given, _arguments(last))
    rival.tokens = max(last, tokens_for(flops, given.shape[1], target, True))
    return f"the dense model on the last {rival.tokens} tokens"


def _drop_layers(rival: Rival, ids: Tensor, last: int, target: int, model: Any, dense: nn.Module) -> str:
    given = ids[:1, :-1]
    with torch.no_grad():
        dense(given, **_arguments(last))
    count = blocks_for(dense_flops(dense, given, _arguments(last)), given.shape[1], target)
    rival.module = simba_fx.transform(fewer_blocks(model, count), "dense")
    return f"{count} blocks, evenly spaced"
