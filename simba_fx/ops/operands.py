"""What a scan, and the convolution before it, is given: by name, once.

An adapter of the lift table returns such a record, an operator makes one of its arguments (its schema lists the same
names in the same order), and the code that runs the operator on a device takes it. Letters: see `simba_fx.ops`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_fx.ops import checks

__all__ = ["NO_LIMIT", "CausalConv", "DeltaScan", "FunctionScan", "Operands", "SSDScan", "SelectiveScan", "step_size"]

NO_LIMIT = torch.finfo(torch.float32).max
"""The default of `dt_max`: no step is that long. (An operator's schema has no literal for infinity.)"""


def step_size(raw: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """float32 `softplus(raw + bias)` (or the plain sum), `bias` broadcast along the last dim of `raw`."""
    step = raw.float() if bias is None else raw.float() + bias.float()
    return F.softplus(step) if softplus else step


@dataclass(frozen=True)
class Operands:
    """What one lifted call is given: base of a frozen dataclass with the call's tensors, and how to run it.

    A fused function, which holds a scan among other operators, has a class of its own beside its rows
    (`simba_fx.capture.scan_functions.mamba_ssm`): its `run` is the same computation as ordinary operators and a scan.
    """

    entry: ClassVar[str]
    """The field that the call's enter marker stands before."""
    layouts: ClassVar[checks.Layouts]
    """Of an operator's operands, and of what its gradients and scores are given beside them."""
    counted: ClassVar[tuple[str, ...]] = ()
    """The fields that are numbers, at least 1."""

    def run(self) -> tuple[Any, Any]:
        """What is computed, as operators of the graph: `(y, last_state)`; a fused function: `(its result, None)`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it runs")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        named = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: given for name, given in named if isinstance(given, Tensor)}

    def checked(self, operator: str, **others: Tensor | None) -> Self:
        """Raises: OperandError: the operands, or `others` of the operator, do not fit together."""
        checks.fit(operator, self.layouts, **self.tensors, **others)
        checks.at_least(operator, {name: (getattr(self, name), 1) for name in self.counted})
        return self

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The fields in order: the arguments of the operator that they belong to."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


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

    entry, layouts = "u", checks.SELECTIVE

    def run(self) -> tuple[Tensor, Tensor]:
        """`y (B, D, L)` in u's dtype and the last state `(B, D, N)` in float32."""
        y, state = torch.ops.simba_fx.selective_scan(*self.arguments)
        return y, state

    def checked(self, operator: str, **others: Tensor | None) -> Self:
        """The same with B and C `(B, G, N, L)`, as the code behind the operators takes them.

        Raises:
            OperandError: the operands, or `others` of the operator, do not fit together.
        """
        super().checked(operator, **others)
        if self.B.dim() == self.C.dim() == 4:
            return self
        B, C = (operand.unsqueeze(1) if operand.dim() == 3 else operand for operand in (self.B, self.C))
        return dataclasses.replace(self, B=B, C=C)

    def ungated(self) -> Self:
        """What the recurrence alone gives: without skip and gate."""
        return dataclasses.replace(self, D=None, z=None)

    @property
    def sizes(self) -> tuple[Any, Any, Any, Any, Any]:
        """B, D, L, G, N; of operands that were `checked`."""
        return *self.u.shape, self.B.shape[1], self.A.shape[1]

    def steps(self) -> Tensor:
        """The step that each token takes: float32 `(B, L, D)`."""
        return step_size(self.delta.transpose(1, 2), self.delta_bias, self.delta_softplus)


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

    entry, layouts, counted = "x", checks.SSD, ("chunk_size",)

    def run(self) -> tuple[Tensor, Tensor]:
        """`y (B, L, H, P)` in x's dtype and the last state `(B, H, P, N)` in float32."""
        # no infinity in a graph: files of exported programs hold it as a word, which AOTInductor's loader cannot read
        low, high = (min(max(limit, -NO_LIMIT), NO_LIMIT) for limit in (self.dt_min, self.dt_max))
        y, state = torch.ops.simba_fx.ssd_scan(*dataclasses.replace(self, dt_min=low, dt_max=high).arguments)
        return y, state

    @property
    def sizes(self) -> tuple[Any, Any, Any, Any, Any, Any]:
        """B, L, H, P, G, N."""
        return *self.x.shape, *self.B.shape[2:]

    def steps(self) -> Tensor:
        """The step that each token takes: `clamp(softplus(dt + dt_bias), dt_min, dt_max)`, float32 `(B, L, H)`."""
        return step_size(self.dt, self.dt_bias, self.dt_softplus).clamp(self.dt_min, self.dt_max)


@dataclass(frozen=True)
class DeltaScan(Operands):
    """The operands of one gated delta rule, in the layout of `simba_fx::delta_scan`.

    `v` is `(B, L, H, V)`; `q`, `k` are `(B, L, G, K)`, normalised and scaled; `beta` is `(B, L, H)`; `g` (log decay)
    likewise, or `(B, L, H, K)` (Kimi delta attention).
    """

    v: Tensor
    q: Tensor
    k: Tensor
    g: Tensor
    beta: Tensor
    chunk_size: int = 64

    entry, layouts, counted = "v", checks.DELTA, ("chunk_size",)

    def run(self) -> tuple[Tensor, Tensor]:
        """`y (B, L, H, V)` in v's dtype and the last state `(B, H, K, V)` in float32."""
        y, state = torch.ops.simba_fx.delta_scan(*self.arguments)
        return y, state


@dataclass(frozen=True)
class FunctionScan(Operands):
    """One call of a function that is linear in `value` `(B, L, ...)`; `operands` are its other tensors, as it takes
    them, and `call` says how it is called (`simba_fx.ops.function_scan`)."""

    value: Tensor
    operands: list[Tensor]
    call: str

    entry, layouts = "value", {}

    def run(self) -> tuple[Tensor, list[Tensor]]:
        """y, of value's sizes, and the function's other results."""
        y, *states = torch.ops.simba_fx.recurrence(*self.arguments)
        return y, states


@dataclass(frozen=True)
class CausalConv(Operands):
    """The operands of a depthwise causal convolution: `x (B, D, L)`, `weight (D, W)`, `bias (D,)`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str = "none"

    entry, layouts = "x", checks.CONV

    def run(self) -> tuple[Tensor, None]:
        return torch.ops.simba_fx.causal_conv1d(*self.arguments), None
