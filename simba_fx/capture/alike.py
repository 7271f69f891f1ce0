"""Which blocks of a model are of one kind: nothing that a forward can see tells them apart but the block's number."""

from __future__ import annotations

import functools
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CALLABLE", "CONTAINERS", "PLAIN", "Alike", "Member", "alike_blocks", "contents", "is_plain_object"]

PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, dict, deque)
CALLABLE = (types.FunctionType, types.BuiltinFunctionType, functools.partial, type)


class Member(NamedTuple):
    """One block of a list."""

    path: str
    module: nn.Module
    number: int


@dataclass(eq=False)
class Alike:
    """The blocks of a list that are of one kind."""

    members: list[Member]
    numbers: list[tuple[str, str]]
    """Where a block holds its number, or one that counts with it: the path of a module in it, and an attribute."""

    @property
    def path(self) -> str:
        """Of the first one."""
        return self.members[0].path


def alike_blocks(owner: nn.Module) -> list[Alike]:
    """The kinds that more than one block of `owner` is of."""
    named = (*owner.named_parameters(remove_duplicate=False), *owner.named_buffers(remove_duplicate=False))
    count = Counter(id(tensor) for _, tensor in named)
    found: list[Alike] = []
    for parent, modules in _lists(owner):
        kinds: list[Alike] = []
        for number, module in enumerate(modules):
            if any(count[id(tensor)] > 1 for tensor in (*module.parameters(), *module.buffers())):
                continue  # paths of weights name one block alone
            member = Member(f"{parent}.{number}".lstrip("."), module, number)
            for kind in kinds:
                numbers = _compared(kind.members[0], member)
                if numbers is None or (len(kind.members) > 1 and numbers != kind.numbers):  # 0, 1, 0 does not count
                    continue
                kind.members.append(member)
                kind.numbers = numbers
                break
            else:
                kinds.append(Alike([member], []))
        found += [kind for kind in kinds if len(kind.members) > 1]
    return found


def _lists(owner: nn.Module) -> Iterator[tuple[str, Sequence[nn.Module]]]:
    """The outermost lists of modules, by their paths."""
    left: list[tuple[str, nn.Module]] = [("", owner)]
    while left:
        path, module = left.pop()
        if isinstance(module, nn.ModuleList | nn.Sequential):
            yield path, list(module)
        else:
            left += [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]


def _compared(first: Member, other: Member) -> list[tuple[str, str]] | None:
    """Where two blocks hold their numbers; None: something else differs as well."""
    numbers: list[tuple[str, str]] = []
    left = [("", first.module, other.module)]
    while left:
        path, a, b = left.pop()
        mine, theirs = vars(a), vars(b)
        if type(a) is not type(b) or mine.keys() != theirs.keys():
            return None
        for name, held in mine.items():
            known = theirs[name]
            if name in ("_parameters", "_buffers"):
                same = held.keys() == known.keys() and all(map(_look_alike, held.values(), known.values()))
            elif name == "_modules":
                same = [*held] == [*known] and all((held[key] is None) == (known[key] is None) for key in held)
                left += [
                    (f"{path}.{key}".lstrip("."), held[key], known[key])
                    for key in held
                    if same and held[key] is not None
                ]
            elif type(held) is int and type(known) is int and held != known:
                same = known - held == other.number - first.number
                numbers.append((path, name))
            else:
                same = _same(held, known)
            if not same:
                return None
    return numbers


def _look_alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    mine, theirs = [(type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in (a, b)]
    return mine == theirs


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same to whatever reads them."""
    kind = type(a)
    if a is b:
        return True
    if kind is not type(b):
        return False
    if kind in PLAIN:
        return bool(a == b)
    if kind is functools.partial:
        return all(map(_same, (a.func, a.args, a.keywords), (b.func, b.args, b.keywords)))
    if kind in (list, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if kind in (dict, OrderedDict):
        return [*a] == [*b] and all(map(_same, a.values(), b.values()))
    if kind is set:
        return a == b and all(isinstance(held, PLAIN) for held in a)
    holds_more = isinstance(a, CONTAINERS)  # than its attributes
    return not holds_more and is_plain_object(a) and _same(vars(a), vars(b))


def is_plain_object(value: Any, depth: int = 4) -> bool:
    """Whether an object holds plain values alone, as configurations do, or others of its kind."""
    state = getattr(value, "__dict__", None)
    other = isinstance(value, (nn.Module, Tensor, types.MethodType, *CALLABLE, *CONTAINERS))
    return bool(state) and depth > 0 and not other and _is_plain(state, depth)


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, CONTAINERS):
        held = (*value, *value.values()) if isinstance(value, dict) else value
        return all(_is_plain(one, depth) for one in held)
    return type(value) in PLAIN or is_plain_object(value, depth - 1)


def contents(held: Any, known: dict[int, Any], depth: int = 4) -> Any:
    """What is equal as long as nobody writes into `held`, a value, a container or an object that holds such; of
    anything else, which object it is. `known`: by identity, what was looked at before."""
    if type(held) in PLAIN:
        return type(held), repr(held)
    if id(held) in known or depth == 0:
        return known.get(id(held), id(held))
    known[id(held)] = id(held)  # it may hold itself
    inside: Any = None
    if isinstance(held, CONTAINERS):
        inside = [*held, *held.values()] if isinstance(held, dict) else held
    elif is_plain_object(held):
        inside = [*vars(held), *vars(held).values()]
    if inside is not None:
        known[id(held)] = tuple(contents(one, known, depth - 1) for one in inside)
    return known[id(held)]
