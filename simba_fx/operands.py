"""What a scan (and the convolution before it) is given, by name: what the adapters of the lift table return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from simba_fx.ops.scan import NO_LIMIT

__all__ = ["Adapter", "CausalConv", "Finish", "Operands", "SSDScan", "SelectiveScan", "StandIn"]


@dataclass(frozen=True)
class Operands:
    """What one lifted call is given: base of a frozen dataclass with the call's tensors, and how to run it.

    A fused function, which holds a scan among other operators, has a class of its own beside its rows
    (`simba_fx.capture.scan_functions.mamba_ssm`): its `run` is the same computation as ordinary operators and a scan.
    """

    entry: ClassVar[str]
    """The field that the call's enter marker stands before."""

    def run(self) -> tuple[Any, Any]:
        """What is computed, as operators of the graph: `(y, last_state)`; a fused function: `(its result, None)`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it runs")


@dataclass(frozen=True)
class SelectiveScan(Operands):
    """The operands of one Mamba-1 scan, in the layout of `simba_fx::selective_scan` (glossary: `simba_fx.ops`).

    `u`, `delta`, `z` are `(B, D, L)`; `A` is `(D, N)`, negative; `B`, `C` are `(B, N, L)` or `(B, G, N, L)`; `D` and
    `delta_bias` are `(D,)`. `delta` is the raw step; `delta_softplus` says whether softplus is still to come.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_softplus: bool = False

    entry = "u"

    def run(self) -> tuple[Tensor, Tensor]:
        """`y (B, D, L)` in u's dtype and the last state `(B, D, N)` in float32."""
        arguments = [getattr(self, f.name) for f in dataclasses.fields(self)]
        y, state = torch.ops.simba_fx.selective_scan(*arguments)
        return y, state


@dataclass(frozen=True)
class SSDScan(Operands):
    """The operands of one Mamba-2 scan, in the layout of `simba_fx::ssd_scan`.

    `x`, `z` are `(B, L, H, P)`; `dt` is `(B, L, H)`; `A` is `(H,)`, negative; `B`, `C` are `(B, L, G, N)`; `D` is
    `(H,)` or `(H, P)`; `dt_bias` is `(H,)`. The step is `clamp(softplus(dt + dt_bias), dt_min, dt_max)`.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_softplus: bool = False
    dt_min: float = 0.0
    dt_max: float = float("inf")
    chunk_size: int = 256

    entry = "x"

    def run(self) -> tuple[Tensor, Tensor]:
        """`y (B, L, H, P)` in x's dtype and the last state `(B, H, P, N)` in float32."""
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # no infinity in a graph: files of exported programs hold it as a word, which AOTInductor's loader cannot read
        arguments |= {name: min(max(arguments[name], -NO_LIMIT), NO_LIMIT) for name in ("dt_min", "dt_max")}
        y, state = torch.ops.simba_fx.ssd_scan(*arguments.values())
        return y, state


@dataclass(frozen=True)
class CausalConv(Operands):
    """The operands of a depthwise causal convolution: `x (B, D, L)`, `weight (D, W)`, `bias (D,)`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str = "none"

    entry = "x"

    def run(self) -> tuple[Tensor, None]:
        return torch.ops.simba_fx.causal_conv1d(self.x, self.weight, self.bias, self.activation), None


Finish = Callable[[Any, Any], Any]
Adapter = Callable[..., "Operands | tuple[Operands, Finish] | None"]
"""Takes the arguments of the function it stands for. Returns the scan's operands, and, unless the function returns `y`
alone, a second function `(y, last_state) -> what the function returns`. None: this call is left as it is."""


@dataclass(frozen=True)
class StandIn:
    """A row of the lift table for a function that runs no scan: while a model is captured, `stand_in(original)` is
    called in its place."""

    stand_in: Callable[[Callable[..., Any]], Callable[..., Any]]
    dynamo: bool = True
    """Whether it is called in the function's place under `torch.compile(backend="simba_fx")` too."""


Row = Adapter | StandIn
