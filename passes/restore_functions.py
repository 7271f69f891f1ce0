"""Pass `restore-functions`: functions with a backward of their own (`torch.autograd.Function`) are called again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from simba_fx.graph.marks import Role
from simba_fx.passes.restore_kernels import RestoreKernels


@dataclass(frozen=True)
class RestoreFunctions(RestoreKernels):
    """Replace what was traced of such a function's forward by a call of it, so that its backward runs.

    Before: `e = own_enter(x, [x], 1); y = round(e); r = own_exit(y, 1, 0)`.
    After: `r = Rounded.apply(x)[0]`. The forward is all that a graph could hold of it (`simba_fx.capture.gradients`).
    """

    name, role = "restore-functions", Role.NONE
    enter, leave = torch.ops.simba_fx.own_enter.default, torch.ops.simba_fx.own_exit.default
