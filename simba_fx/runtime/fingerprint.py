"""What a captured graph depends on: the tensors of a module tree by shape, and the plain values of its modules.

A graph stays right as long as the tree that it was captured from looks the same. Tensors may be replaced by others of
their shape (`load_state_dict(assign=True)`, `torch.func.functional_call`, FSDP): a program reads them where they are.
A module that was exchanged (LoRA, quantised weights), an adapter that was switched off, a dropout that went to eval
mode, a hook inside a block change what the model computes, and ask for another graph.
"""

from __future__ import annotations

import enum
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from simba_fx.capture.alike import CONTAINERS, PLAIN, is_plain_object
from simba_fx.compiling import is_compiled_method
from simba_fx.errors import warn
from simba_fx.runtime.fsdp import dense_class, dtype_in_forward, is_hook, is_sharded, state_of

__all__ = ["Fingerprint", "Identity", "Snapshot", "hooks_of", "snapshot"]

_PLAIN = frozenset(PLAIN)
_INTERNAL = frozenset({*nn.Module().__dict__, "gradient_checkpointing"} - {"training"})
"""Attributes that say nothing about what a forward computes."""
_BY_CALL = frozenset({"use_cache", "return_dict", "output_hidden_states", "output_attentions"})
"""Settings of a configuration that are part of each call's signature."""


class _Seen(NamedTuple):
    """One module of a tree. (A tuple: made once per module and prompt, sooner than a frozen dataclass.)"""

    name: str
    parent: int
    """Of the parent, its place in the list."""
    cls: type
    tensors: tuple[Any, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Snapshot:
    """A module tree at a moment. While snapshots are equal, one graph serves."""

    modules: tuple[_Seen, ...]
    config: tuple[Any, ...]
    hooks: tuple[tuple[int, Any], ...]
    """Of modules that are not called while a program runs: (place of the module, hook)."""
    forwards: tuple[tuple[int, Any], ...]
    """Where a method was put on a module in place of its class's forward."""

    def difference(self, other: Snapshot) -> str:
        """Where two snapshots first differ, in words."""
        for mine, theirs in zip(self.modules, other.modules):
            if mine != theirs:
                changed = dict(set(mine.values) ^ set(theirs.values))
                what = ", ".join(changed) or ("class" if mine.cls is not theirs.cls else "tensors")
                return f"{what} of {other._path(theirs) or 'the stack'} ({theirs.cls.__name__})"
        if self.config != other.config:
            return "config"
        return "hooks or forwards" if len(self.modules) == len(other.modules) else "the list of modules"

    def hooked(self) -> list[str]:
        """The paths of the modules whose hooks are part of a graph."""
        return list(dict.fromkeys(self._path(self.modules[place]) for place, _ in self.hooks))

    def _path(self, module: _Seen) -> str:
        parent = self._path(self.modules[module.parent]) if module.parent >= 0 else ""
        return f"{parent}.{module.name}" if parent else module.name


def snapshot(root: nn.Module, live: Collection[nn.Module] = ()) -> Snapshot:
    """Look at every module of a tree. Reads no tensor's values.

    Args:
        live: modules that are called while a program runs, so that their hooks are not part of a graph.
    """
    seen: list[_Seen] = []
    hooks: list[tuple[int, Any]] = []
    forwards: list[tuple[int, Any]] = []
    config = getattr(root, "config", None)
    looks: dict[int, Any] = {id(config): None}  # it comes apart
    left: list[tuple[str, int, nn.Module, Any]] = [("", -1, root, None)]
    while left:
        name, parent, module, state = left.pop()
        attributes = module.__dict__
        state = state_of(module) or state
        tensors = [(key, *_described(t, state)) for key, t in attributes["_parameters"].items() if t is not None]
        if attributes["_buffers"]:
            tensors += [(key, *_described(t, state)) for key, t in attributes["_buffers"].items() if t is not None]
        place = len(seen)
        seen.append(_Seen(name, parent, dense_class(module), tuple(tensors), _values(attributes, looks)))
        if module not in live:
            hooks += [(place, hook) for hook in hooks_of(module)]
        if "forward" in attributes:
            forwards.append((place, attributes["forward"]))
        left += [(key, place, child, state) for key, child in attributes["_modules"].items() if child is not None]
    settings = {} if config is None else {k: v for k, v in vars(config).items() if k not in _BY_CALL}
    return Snapshot(tuple(seen), _values(settings, looks), tuple(hooks), tuple(forwards))


class Fingerprint:
    """Snapshots of one module tree, taken anew where anything that its modules hold is another object than before.

    That is asked at every prompt: by identity, in C, in the modules' own containers, and without a glance at what a
    snapshot leaves out. To touch an object takes longer than to compare it. (What was held then is kept alive until it
    is asked again.)
    """

    def __init__(self, root: nn.Module, blocks: bool, around: Callable[[], set[nn.Module]] = set) -> None:
        """`blocks`: whether blocks are called as modules (`compile="blocks"`); `around`: modules in `root` that are
        called outside of the graph."""
        self.root, self.blocks, self.around = root, blocks, around
        self.called: Collection[str] | None = None
        """The paths of the blocks that are called as modules; None: not known before the first capture."""
        self._named: set[str] = set()
        self._modules: list[nn.Module] = []
        self._classes: list[type] = []
        self._sized: list[Collection[Any]] = []
        """Everything that can gain or lose members."""
        self._sizes: list[int] = []
        self._attributes: list[dict[str, Any]] = []
        self._read: list[Callable[[dict[str, Any]], tuple[Any, ...]]] = []
        """For each module, what of its attributes counts."""
        self._views: list[Iterable[Any]] = []
        self._held: list[Any] = []
        self._tensors: list[Tensor] = []
        self._looks: list[Any] = []
        self._last: Snapshot | None = None

    def live(self) -> set[nn.Module]:
        """The modules that are called while a program runs, or around it: their hooks are no part of a graph. Among
        them the blocks: before these are known, the members of outermost lists of modules."""
        live = {self.root, *self.around()}
        if self.called is not None:
            paths = dict(self.root.named_modules(remove_duplicate=False))
            return live | {paths[path] for path in self.called if path in paths}  # a block may have been taken out
        inside: list[nn.Module] = [self.root] if self.blocks else []
        while inside:
            module = inside.pop()
            children = [child for child in module._modules.values() if child is not None]
            if isinstance(module, nn.ModuleList | nn.Sequential):
                live |= set(children)
            else:
                inside += children
        return live

    def snapshot(self) -> Snapshot:
        if self._last is None or not self._is_the_same():
            self._last = snapshot(self.root, self.live())
            self._name_hooked(self._last)
            self._watch()
        return self._last

    def _is_the_same(self) -> bool:
        """Whether the tree holds what it held when it was last looked at."""
        try:
            return (
                [*map(len, self._sized)] == self._sizes
                and all(map(operator.is_, self._now(), self._held))
                and [*map(type, self._modules)] == self._classes
                and [*map(_look, self._tensors)] == self._looks
            )
        except KeyError:  # one attribute went, another came
            return False

    def _now(self) -> Iterator[Any]:
        attributes = itertools.chain.from_iterable(map(operator.call, self._read, self._attributes))
        return itertools.chain(attributes, itertools.chain.from_iterable(self._views))

    def _watch(self) -> None:
        """Note what the tree holds."""
        self._modules = list(self.root.modules())
        self._classes = [*map(type, self._modules)]
        self._attributes = [module.__dict__ for module in self._modules]
        names = [[*_WATCHED, *(name for name in held if name not in _INTERNAL)] for held in self._attributes]
        self._read = [operator.itemgetter(*watched) for watched in names]
        config = getattr(self.root, "config", None)
        objects = {} if config is None else {id(config): vars(config)}
        containers: list[Any] = []
        for held, watched in zip(self._attributes, names):
            for name in watched:
                if name in _WATCHED:
                    containers.append(held[name])
                elif type(held[name]) not in _PLAIN:  # configurations are many modules'
                    objects[id(held[name])] = held[name]
        inside = [*containers, *itertools.chain.from_iterable(map(_containers_in, objects.values()))]
        self._sized = [*self._attributes, *inside]
        self._sizes = [*map(len, self._sized)]
        self._views = [held.values() if isinstance(held, dict) else held for held in inside if held]
        self._held = [*self._now()]
        self._tensors = [tensor for module in self._modules for held in (module._parameters, module._buffers)
                         for tensor in held.values() if tensor is not None]  # fmt: skip
        self._looks = [*map(_look, self._tensors)]

    def captured(self, called: Collection[str]) -> None:
        """A graph was captured, in which the blocks at these paths are called as modules."""
        if self.called is None or set(self.called) != set(called):
            self.called, self._last = called, None

    def _name_hooked(self, now: Snapshot) -> None:
        """Warn once of hooks that a graph takes in."""
        hooked = [path for path in now.hooked() if path not in self._named]
        if hooked:
            self._named.update(hooked)
            warn(
                f"{type(self.root).__name__} has forward hooks on what is not called while a prompt runs "
                f"({hooked[0]}): what they compute is part of the graph, and nothing else that they do happens at a "
                "call. Hooks of the embedding and, with compile='blocks', of whole blocks run as usual."
            )


_look = operator.attrgetter("shape", "dtype", "device")
_WATCHED = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def _containers_in(held: Any) -> Iterator[Any]:
    """A container, and those that it holds; of an object that holds plain values alone, what it holds them in."""
    if not isinstance(held, CONTAINERS):
        if not is_plain_object(held):
            return
        held = vars(held)
    yield held
    for inner in held.values() if isinstance(held, dict) else held:
        if type(inner) not in _PLAIN:
            yield from _containers_in(inner)


def hooks_of(module: nn.Module) -> list[Any]:
    """A module's forward hooks, but for those of FSDP, of transformers' recorders and of this package."""
    found = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in found if not is_hook(hook) and not _is_known(hook)]


def _is_known(hook: Any) -> bool:
    owner = getattr(hook, "__module__", None) or ""
    return owner == "transformers.utils.output_capturing" or owner.startswith("simba_fx.")


def _described(tensor: Tensor, state: Any) -> tuple[Any, ...]:
    """Shape, dtype and device that a forward sees, and a subclass's type."""
    kind = type(tensor)
    if kind is nn.Parameter or kind is Tensor:
        return tensor.shape, tensor.dtype, tensor.device, None
    if is_sharded(tensor):
        return tensor.shape, dtype_in_forward(tensor, state), tensor.device, None
    return tensor.shape, tensor.dtype, tensor.device, kind


def _values(attributes: Mapping[str, Any], looks: dict[int, Any]) -> tuple[tuple[str, Any], ...]:
    """What decides what a forward computes; `looks`: of objects that were looked at before, by their ids."""
    found = []
    for name in attributes:
        if name in _INTERNAL:  # most are
            continue
        value = attributes[name]
        kind = type(value)
        if kind in _PLAIN:
            if "fsdp" not in name:  # FSDP's own notes
                found.append((name, value))
        elif isinstance(value, CONTAINERS):
            found.append((name, _frozen(value)))
        elif name == "_hf_hook":  # of accelerate: weights may be elsewhere
            found.append((name, kind))
        elif name not in _NOT_COMPUTED and not name.startswith("_simba"):
            if id(value) not in looks:
                looks[id(value)] = _look_of(value)
            if looks[id(value)] is not None:
                found.append((name, looks[id(value)]))
    return tuple(found)


_NOT_COMPUTED = ("forward", "_gradient_checkpointing_func")
"""The first is looked at apart; the second does not change what is computed."""


def _look_of(value: Any) -> Any:
    """Of what is neither plain nor a container: members of enumerations, objects that hold plain values alone by those,
    anything else by identity. None for tensors, which may be states that a forward leaves there; for modules, which
    stand elsewhere; and for a module's own method once more, compiled."""
    if isinstance(value, enum.Enum):
        return value
    if isinstance(value, Tensor | nn.Module) or is_compiled_method(value):
        return None
    if isinstance(value, types.MethodType):  # of a clone it is bound to the clone
        return Identity(value.__func__)
    return (type(value), _frozen(vars(value))) if is_plain_object(value) else Identity(value)


def _frozen(value: Any) -> Any:
    """Containers as tuples; of tensors and modules in them only the type."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, dict):
        return kind, tuple((key if type(key) in _PLAIN else type(key), _frozen(held)) for key, held in value.items())
    if isinstance(value, set | frozenset):
        return kind, tuple(sorted(map(repr, value)))
    if isinstance(value, CONTAINERS):
        return kind, tuple(map(_frozen, value))
    look = _look_of(value)
    return kind if look is None else look


class Identity:
    """Equal to another of the same object while that lives, or of an equal plain value."""

    __slots__ = ("held", "number", "ref")

    def __init__(self, held: Any) -> None:
        self.ref: Any = None
        self.held: Any = None
        self.number = id(held)
        if isinstance(held, PLAIN):
            self.held, self.number = held, hash(held)
            return
        try:
            self.ref = weakref.ref(held)
        except TypeError:  # of builtins and properties, which are small
            self.held = held

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity) or self.number != other.number or (self.ref is None) != (other.ref is None):
            return False
        if self.ref is not None:
            return self.ref() is not None and self.ref() is other.ref()
        return self.held is other.held or (isinstance(self.held, PLAIN) and bool(self.held == other.held))
