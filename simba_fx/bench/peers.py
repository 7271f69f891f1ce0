"""What a sparse model is compared with at the same FLOPs: other criteria, merging, shorter inputs, fewer blocks.

Every peer is aimed, at each batch and length, at the FLOPs of the first schedule, scorer included; what it then costs
is counted on the peer itself. Where blocks are few, layer-drop cannot come close: its row shows by how much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import simba_fx
from simba_fx import ops
from simba_fx.api import _runtime
from simba_fx.bench import utrc
from simba_fx.bench.options import BenchError, Mode, Options, parse_schedule
from simba_fx.flops import ModelFlops, model_flops, surroundings_of

__all__ = [
    "Peer", "blocks_for", "dense_flops", "expect_equal_blocks", "fewer_blocks", "measured_flops", "peers_of",
    "tokens_for",
]  # fmt: skip

Arguments = dict[str, Any]


def measured_flops(call: Callable[[], object]) -> int:
    """FLOPs of one uncompiled call, by torch's counter with the formulas of simba_fx."""
    with FlopCounterMode(display=False, custom_mapping=ops.flops.missing()) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())


def dense_flops(dense: nn.Module, ids: Tensor, arguments: Arguments) -> ModelFlops:
    """FLOPs of every part of the dense model as functions of the number of tokens; `dense` has been called so."""
    runtime = _runtime(dense)
    rows, length = ids.shape
    around = surroundings_of(dense, runtime.stack, (ids,), arguments, length)
    return model_flops(runtime.any_built().captured, rows=rows, length=length, surroundings=around)


@dataclass
class Peer:
    """A rival, ready to be aimed at a number of FLOPs."""

    name: str
    says: str
    module: Any
    """Called uncompiled; what is timed may be compiled."""
    aim: Callable[[ModelFlops, Tensor, int], str]
    """`(the dense model's FLOPs, ids, target)`: sets the peer up and says how."""
    tokens: int | None = None
    """How many of the last tokens it is given; None: all."""

    def input(self, ids: Tensor) -> Tensor:
        return ids if self.tokens is None else ids[:, -self.tokens :]


def peers_of(model: Any, dense: Any, mode: Mode, options: Options) -> list[Peer]:
    """The peers that are asked for, for one mode. Raises: BenchError where one cannot run this model."""
    known = {"delta-norm": _delta_norm, "utrc": _utrc, "left-truncation": _left, "layer-drop": _layers}
    return [known[name](model, dense, mode, options) for name in options.peers]


def _delta_norm(model: Any, dense: Any, mode: Mode, options: Options) -> Peer:
    schedule = parse_schedule(options.schedules[0])
    sparse = simba_fx.transform(model, schedule, criterion="delta-norm", compile=mode.compile)  # type: ignore[arg-type]
    return Peer("delta-norm", "the same schedule, tokens scored by the norm of their steps (DeciMamba)", sparse,
                lambda *_: f"schedule {options.schedules[0]}")  # fmt: skip


def _utrc(model: Any, dense: Any, mode: Mode, options: Options) -> Peer:
    found = utrc.UTRC(model)

    def aim(flops: ModelFlops, ids: Tensor, target: int) -> str:
        rows, length = ids.shape
        return found.aim(flops, rows, length, target, options.head == "last")

    how = "eager" if not mode.compiled else "blocks and the reduction compiled one by one, the loop in Python"
    return Peer("utrc", f"UTRC as described, on the dense model's own blocks ({how})", found, aim)


def _left(model: Any, dense: Any, mode: Mode, options: Options) -> Peer:
    def aim(flops: ModelFlops, ids: Tensor, target: int) -> str:
        peer.tokens = tokens_for(flops, ids.shape[1], target, options.head == "last")
        return f"the last {peer.tokens} tokens"

    peer = Peer("left-truncation", "the dense model on the last tokens alone", dense, aim)
    return peer


def _layers(model: Any, dense: Any, mode: Mode, options: Options) -> Peer:
    expect_equal_blocks(model)

    def aim(flops: ModelFlops, ids: Tensor, target: int) -> str:
        blocks = len(flops.blocks)
        count = blocks_for(flops, ids.shape[1], target)
        if count != len(peer.module.base_model.layers):
            peer.module = simba_fx.transform(fewer_blocks(model, count), "dense", compile=mode.compile)  # type: ignore[arg-type]
        return f"{count} of {blocks} blocks"

    peer = Peer("layer-drop", "the dense model with fewer blocks, evenly spaced", dense, aim)
    return peer


def tokens_for(flops: ModelFlops, length: int, target: int, head_is_fixed: bool) -> int:
    """How many tokens the dense model can read for so many FLOPs; `head_is_fixed`: its head costs what it costs."""
    blocks = len(flops.blocks)

    def cost(tokens: int) -> int:
        return flops.stack([tokens] * blocks) + flops.head(length if head_is_fixed else tokens)

    low, high = 2, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return min((low, high), key=lambda tokens: abs(cost(tokens) - target))


def blocks_for(flops: ModelFlops, length: int, target: int) -> int:
    """How many equal blocks can be run for so many FLOPs."""
    rest = flops.before(length) + flops.head(length)
    return min(len(flops.blocks), max(2, round((target - rest) / max(1, flops.blocks[0](length)))))


def expect_equal_blocks(model: Any) -> None:
    """Raises: BenchError for a hybrid."""
    layers = model.base_model.layers
    kinds = {tuple((name, *p.shape) for name, p in layer.named_parameters()) for layer in layers}
    if len(kinds) > 1 or not hasattr(model.base_model, "norm_f"):
        raise BenchError(
            f"layer-drop is measured on models whose blocks are all alike; found {type(model).__name__}, a hybrid. "
            "Leave it out."
        )


def fewer_blocks(model: Any, count: int) -> Any:
    """A model over the same weights with `count` of the blocks, evenly spaced from the first to the last."""
    stack = model.base_model
    path = next(name for name, module in model.named_modules() if module is stack)
    chosen = [round(i * (len(stack.layers) - 1) / (count - 1)) for i in range(count)]
    clone = _apart(model)
    shorter = clone._modules[path] = _apart(stack)
    shorter._modules["layers"] = nn.ModuleList(stack.layers[index] for index in chosen)
    for module in (clone, shorter):
        module.config = copy.deepcopy(model.config)
        module.config.num_hidden_layers = count
    return clone


def _apart(module: Any) -> Any:
    """A copy whose submodules can be replaced without touching `module`'s."""
    clone = copy.copy(module)
    clone.__dict__["_modules"] = dict(module._modules)
    return clone
