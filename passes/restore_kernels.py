"""Pass `restore-kernels`: the model's own scan and convolution functions are called again (`kernels="model"`)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from simba_fx.capture.lift import CallSite
from simba_fx.compiling import disable_compile
from simba_fx.graph.facts import Facts, value
from simba_fx.graph.marks import Insert, Role, region

_SIMBA: Any = torch.ops.simba_fx


@dataclass(frozen=True)
class RestoreKernels:
    """Replace each lifted operator by the call it stands for, argument for argument.

    Before: `e = site_enter(u, [u, dt, A, …], 3); y = selective_scan(e, …)[0]; r = site_exit(y, 3, 0)`.
    After: `r = mamba_selective_scan(u, dt, A, …)[0]`, with the arguments that the model gave. Operands that a score
    reads stay. Calls that differ in their tensors only share one function, so that equal blocks stay equal.
    """

    sites: tuple[CallSite, ...] = field(repr=False)

    name, enter, leave, role = "restore-kernels", _SIMBA.site_enter.default, _SIMBA.site_exit.default, Role.KERNEL

    def rewrite(self, graph: fx.Graph, facts: Facts) -> int:
        shared: dict[tuple[Any, ...], Callable[..., Any]] = {}
        enters = {n.args[2]: n for n in graph.nodes if n.target is self.enter}  # read late: calls feed calls
        calls: dict[int, fx.Node] = {}
        for node in list(graph.nodes):
            if node.target is not self.leave:
                continue
            _, index, leaf = node.args
            site = self.sites[index]
            insert = Insert(graph, node, region(node), self.name)
            if index not in calls:
                function = shared.setdefault(site.key, _named(site))
                calls[index] = insert(function, *_tensors(enters[index]), like=node, role=self.role)
            val = value(node)
            calls[index].meta["val"] = [*(calls[index].meta["val"] or ()), val]
            out = insert(operator.getitem, calls[index], leaf, val=val)
            out = insert(torch.ops.aten.to.dtype, out, val.dtype, val=val)
            node.replace_all_uses_with(out)
            graph.erase_node(node)
        for node in list(graph.nodes):
            if node.target is self.enter:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        return len(calls)


def _tensors(enter: fx.Node) -> Any:
    return enter.args[1]


def _named(site: CallSite) -> Callable[..., Any]:
    def call(*tensors: torch.Tensor) -> list[Any]:
        return site.call(*tensors)

    call.__name__ = call.__qualname__ = site.function.__name__
    return disable_compile(call) if site.reads_modules else call  # Dynamo copies no modules
