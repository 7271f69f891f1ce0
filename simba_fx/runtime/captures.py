"""Graphs that were captured, kept with the model they came from: another schedule or criterion needs no other trace.

A graph serves again while its model looks as it did (`fingerprint`) and runs the same code. Nothing here keeps a model
alive, and what is kept goes with it.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from simba_fx.capture import lift
from simba_fx.capture.alike import PLAIN, is_plain_object
from simba_fx.capture.normalise import Captured
from simba_fx.graph.facts import tensor_paths
from simba_fx.runtime.fingerprint import Identity, Snapshot
from simba_fx.runtime.fsdp import dense_class, without_memory

__all__ = ["captured", "share", "stored_with"]

MOST = 16
"""Of one model; the oldest goes first."""
Store = dict[Hashable, tuple[Captured, Any]]
_stores: weakref.WeakKeyDictionary[nn.Module, Store] = weakref.WeakKeyDictionary()


def stored_with(model: nn.Module) -> Store:
    """The captures of a model, by what they depend on."""
    return _stores.setdefault(model, {})


def share(model: nn.Module, store: Store) -> None:
    """Let a model that looks the same use another's captures."""
    _stores[model] = store


def captured(store: Store, root: nn.Module, now: Snapshot, rest: Iterable[Hashable],
             trace: Callable[[], tuple[Captured, Any]]) -> tuple[Captured, Any]:  # fmt: skip
    """The capture of `root` for calls that `rest` describes: one of the store, or a new one, which is kept there.

    Args:
        now: what `root` looks like.
        trace: captures it; returns the capture and what else the trace told.

    Returns:
        Both. Of the model's own tensors the capture holds only what they look like.
    """
    key = _key_of(root, now, *rest)
    if key not in store:
        found, seen = trace()
        own = tensor_paths(root)
        looks = {path: without_memory(held) if path in own else held for path, held in found.attributes.items()}
        store[key] = replace(found, attributes=looks), seen
        for oldest in list(store)[:-MOST]:
            del store[oldest]
    else:
        store[key] = store.pop(key)  # the last one used comes last
    return store[key]


def _key_of(root: nn.Module, now: Snapshot, *rest: Hashable) -> Hashable:
    """What a capture of `root` depends on: the looks of its modules, the code that they run, and `rest`."""
    looks = replace(now, hooks=tuple((place, None) for place, _ in now.hooks), forwards=())  # they are among the code
    return (looks, _code(root), torch.get_default_dtype(), *rest)


def _code(root: nn.Module) -> Hashable:
    """The Python that a forward of `root` may run: methods of its modules' classes, functions of the files that these
    stand in, hooks, functions and objects that hang on modules, registered scans.

    By identity, and weakly: what was put in another's place differs from it, and nothing is kept alive.
    """
    classes: dict[type, None] = {}
    hung: list[Any] = []
    for module in root.modules():
        classes.update(dict.fromkeys(dense_class(module).__mro__))
        for name, held in vars(module).items():
            if name not in _TREE and not name.startswith("_simba"):
                hung += _objects(held)
    files = {cls.__module__ for cls in classes} - {"builtins"}
    names = [vars(cls) for cls in classes] + [vars(sys.modules[file]) for file in files if file in sys.modules]
    code: list[Any] = [held for held_by in names for name, held in held_by.items()
                       if isinstance(held, _CODE) and not name.startswith(_OF_DYNAMO)]  # fmt: skip
    code += [held for row in lift.user_rows() for held in row]
    return tuple(map(Identity, (*code, *(held for held in hung if not is_plain_object(held)))))


_OF_DYNAMO = ("___", "__compiled_fn_", "__resume_at_", "__init__", "__setstate__")
"""What it puts into the files whose frames it has compiled, and what it changes of every module: a forward
runs none of that."""
_TREE = ("_parameters", "_buffers", "_modules")
_CODE = (types.FunctionType, property, staticmethod, classmethod, bool, int, float, str)


def _objects(held: Any) -> Iterator[Any]:
    """What an attribute of a module holds; plain values are in the snapshot, and hooks of ours change no graph."""
    if isinstance(held, dict):
        for value in held.values():
            yield from _objects(value)
    elif isinstance(held, list | tuple | set | frozenset):
        for value in held:
            yield from _objects(value)
    elif isinstance(held, types.MethodType):  # of a clone it is bound to the clone
        yield held.__func__
    elif type(held).__name__ == "_WrappedHook":  # of torch.nn
        yield from _objects(held.hook)
    elif not isinstance(held, PLAIN) and not str(getattr(held, "__module__", "")).startswith("simba_fx."):
        yield held
