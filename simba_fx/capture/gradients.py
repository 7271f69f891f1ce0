"""What a model's forward says of its own gradients, kept in a graph that is traced without any.

A trace runs under `no_grad`, where two things would be lost, and the sparse model would learn otherwise than the dense
one, with no word:

    torch.no_grad(), set_grad_enabled(False)    the graph detaches what is computed inside
    torch.autograd.Function                     the graph calls the function again (pass `restore-functions`), so that
                                                its own backward runs; meanwhile its forward is traced between markers,
                                                `own_enter` and `own_exit`, which are identities as those of a scan
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from simba_fx.capture.guards import is_foreign
from simba_fx.capture.lift import CallSite, callers, marked
from simba_fx.compiling import sets_grad_enabled
from simba_fx.errors import warn
from simba_fx.graph.facts import value

__all__ = ["OwnGradients", "drop_idle_detaches"]

_FUNCTION: Any = torch.autograd.Function
_METHODS = (types.MethodType, types.BuiltinMethodType)  # of torch 2.14 on in C
_DETACH = torch.ops.aten.detach.default
_ATTRIBUTES: Any = Tensor
_ASKED = {
    _ATTRIBUTES.requires_grad.__get__: "a tensor requires a gradient, which none does",
    _ATTRIBUTES.grad_fn.__get__: "a tensor has a grad_fn, which none has",
    _ATTRIBUTES.is_leaf.__get__: "a tensor is a leaf, which all are",
}


class OwnGradients(TorchFunctionMode):
    """Around a model's forward while it is traced; `watched` patches what it has to know of."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = True
        """Whether gradients flow where the forward is now."""
        self.inside = False
        """Whether it is in a function with a backward of its own."""
        self.forwards: dict[Any, Any] = {}
        """The functions with a backward of their own, by the code of their forwards."""
        self.lost: set[str] = set()
        """What a graph cannot keep of it."""

    def __enter__(self) -> Any:
        self.flow, self.inside = True, False  # whoever traces does so without gradients
        return super().__enter__()  # type: ignore[no-untyped-call]  # untyped in torch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is sets_grad_enabled:
            return None  # the trace goes on without, in one graph
        asking = sys._getframe(1).f_back  # behind `Watch`
        if (asked := _ASKED.get(function)) is not None and not isinstance(args[0], nn.Parameter):
            self._asked(asking, asked)
        if not self.inside and (missed := self.forwards.get(asking.f_code) if asking is not None else None) is not None:
            self.lost.add(f"{missed.__qualname__}.apply is called by a name that is not the model's own")
        result = function(*args, **(kwargs or {}))
        if self.flow:
            return result
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}  # what was written in place is still itself
        return pytree.tree_map_only(Tensor, lambda made: made if id(made) in given else made.detach(), result)

    def _is_enabled(self, own: Callable[[], bool], thread: int) -> bool:
        if threading.get_ident() == thread:
            self._asked(sys._getframe(1), "gradients are enabled, which they are not")
        return own()

    def _asked(self, asker: types.FrameType | None, what: str) -> None:
        if asker is not None and not is_foreign(asker):
            place = f"{os.path.basename(asker.f_code.co_filename)}, line {asker.f_lineno}"
            self.lost.add(f"{place} asks whether {what} while it is captured")

    def warn(self, name: str) -> None:
        """Say what the graph of the model called `name` has not."""
        if self.lost:
            warn(
                f"{name} computes as the dense model does without gradients, but may learn otherwise: "
                f"{'; '.join(sorted(self.lost))}. "
                "Gradients that the model makes itself there (hooks on tensors, a backward of its own) are missing."
            )

    @contextmanager
    def watched(self, model: nn.Module, sites: list[CallSite]) -> Iterator[None]:
        """While the body runs, in this thread: regions without gradients, and functions of their own, which become
        call sites."""
        with ExitStack() as undo:
            for region, flow in ((torch.no_grad, False), (torch.enable_grad, True), (torch.set_grad_enabled, None)):
                self._follow(region, flow, undo)
            self._stand_in_for_functions(model, sites, undo)
            undo.callback(setattr, torch, "is_grad_enabled", torch.is_grad_enabled)
            torch.is_grad_enabled = functools.partial(self._is_enabled, torch.is_grad_enabled, threading.get_ident())
            yield

    def _follow(self, region: Any, flow: bool | None, undo: ExitStack) -> None:
        """`flow` inside of such a region; None: as it was made (and, as a function, from then on)."""
        thread = threading.get_ident()
        before: dict[int, bool] = {}

        def init(held: Any, own: Any, mode: bool) -> None:
            own(held, mode)
            if threading.get_ident() == thread:
                before[id(held)], self.flow = self.flow, mode

        def enter(held: Any, own: Any) -> Any:
            outside, result = self.flow, own(held)
            if threading.get_ident() == thread:
                before.setdefault(id(held), outside)
                self.flow = held.mode if flow is None else flow
            return result

        def leave(held: Any, own: Any, *raised: Any) -> Any:
            result = own(held, *raised)
            if threading.get_ident() == thread and id(held) in before:
                self.flow = before.pop(id(held))
            return result

        replaced = {"__enter__": enter, "__exit__": leave} | ({"__init__": init} if flow is None else {})
        for name, wrapper in replaced.items():
            own = vars(region)[name]
            setattr(region, name, functools.partialmethod(wrapper, own))
            undo.callback(setattr, region, name, own)

    def _stand_in_for_functions(self, model: nn.Module, sites: list[CallSite], undo: ExitStack) -> None:
        """Under the name `apply`, and under those that the model's files and modules have for one (`f = F.apply`)."""
        own, base, thread = inspect.getattr_static(_FUNCTION, "apply"), _FUNCTION, threading.get_ident()

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            function = own.__get__(None, cls)
            if threading.get_ident() != thread:
                return function(*args, **kwargs)
            return self._apply(sites, function, cls, args, kwargs)

        restore = functools.partial(setattr, base, "apply", own) if "apply" in vars(base) else None
        undo.callback(restore or functools.partial(delattr, base, "apply"))
        for owner in {id(owner): owner for owner in (*callers(model), *model.modules())}.values():
            for name, held in list(vars(owner).items()):
                if type(held) in _METHODS and _is_function(held.__self__) and getattr(held, "__name__", "") == "apply":
                    undo.callback(setattr, owner, name, held)
                    setattr(owner, name, functools.partial(apply, held.__self__))
        base.apply = classmethod(apply)
        self.forwards = {cls.forward.__code__: cls for cls in _subclasses(base)
                         if hasattr(cls.forward, "__code__") and not _is_torchs(cls)}  # fmt: skip

    def _apply(self, sites: list[CallSite], own: Callable[..., Any], cls: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        floats = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if cls is CheckpointFunction:  # runs the function under `no_grad`, and again for its gradients
            function, _, *given = args
            return function(*given)
        if _is_torchs(cls):
            return own(*args, **kwargs)
        if self.inside or not self.flow or not floats:
            return self._run_inside(own, args, kwargs)
        if any(isinstance(leaf, torch.SymInt) for leaf in leaves):
            self.lost.add(f"{cls.__qualname__}.apply is given a length, which no graph can hand on")
            return self._run_inside(own, args, kwargs)

        def run(entered: Tensor) -> Any:
            given = [*leaves[: floats[0]], entered, *leaves[floats[0] + 1 :]]
            return self._run_inside(own, *pytree.tree_unflatten(given, spec))

        return marked(sites, _applied(cls), leaves, spec, leaves[floats[0]], run, own=True)

    def _run_inside(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outside, self.inside = self.inside, True
        try:
            return own(*args, **kwargs)
        finally:
            self.inside = outside


def _is_function(held: Any) -> bool:
    return isinstance(held, type) and issubclass(held, _FUNCTION)


def _is_torchs(cls: Any) -> bool:
    return str(cls.__module__).partition(".")[0] == "torch"


def _subclasses(cls: Any) -> Iterator[Any]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


@functools.cache
def _applied(cls: Any) -> Callable[..., Any]:
    def apply(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    apply.__module__, apply.__name__, apply.__qualname__ = cls.__module__, cls.__name__, f"{cls.__qualname__}.apply"
    return apply


def drop_idle_detaches(graph: fx.Graph, attributes: dict[str, Any]) -> None:
    """Remove `detach` where it stops nothing: no gradient gets there (tables and masks, which many models make under
    `no_grad`), or none arrives that another one does not stop.

    `attributes`: what `get_attr` nodes name.
    """
    learns: set[fx.Node] = set()
    for node in graph.nodes:
        held = attributes.get(node.target) if node.op == "get_attr" else value(node)
        given = isinstance(held, nn.Parameter) if node.op == "get_attr" else node.op == "placeholder"
        floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(held))
        if floats and (given or not learns.isdisjoint(node.all_input_nodes)):
            learns.add(node)
    arrives: set[fx.Node] = set()
    """Nodes whose results a gradient comes back to."""
    for node in reversed(graph.nodes):
        needed = node.op == "output" or _writes(node) or not arrives.isdisjoint(node.users)
        if node.target is not _DETACH:
            arrives |= {node} if needed else set()
        elif not needed or learns.isdisjoint(node.all_input_nodes):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
