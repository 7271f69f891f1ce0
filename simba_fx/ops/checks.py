"""Before any pointer is taken: whether an operator's operands fit together.

The kernels read as far as sizes say, so every operator of this package looks at all of its operands here first,
whatever runs it: numbers of dimensions, sizes, dtypes, devices. Indices are looked at where the CPU holds them; on a
GPU that would wait for it, and there PyTorch's own gathers stop at an index that is out of range.

A layout is a dtype and letters (`simba_fx.ops`), one for each dimension, and the same letter is the same size in all
operands of a call. `G=1`: no such dimension, which counts as one of size 1. B, L and small letters may be zero.
Symbolic sizes are not compared, which would guard on them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from simba_fx.errors import OperandError

Layouts = Mapping[str, str]

SELECTIVE: Layouts = {
    "u": "float B D L",
    "delta": "float B D L",
    "A": "float D N",
    "B": "float B G N L | G=1 B N L",
    "C": "float B G N L | G=1 B N L",
    "D": "float D",
    "z": "float B D L",
    "delta_bias": "float D",
    "dy": "float B D L",
    "dlast": "float B D N",
    "real": "bool B L",
}
SSD: Layouts = {
    "x": "float B L H P",
    "dt": "float B L H",
    "A": "float H",
    "B": "float B L G N",
    "C": "float B L G N",
    "D": "float H | H P",
    "z": "float B L H P",
    "dt_bias": "float H",
    "dy": "float B L H P",
    "dlast": "float B H P N",
    "real": "bool B L",
}
DELTA: Layouts = {
    "v": "float B L H V",
    "q": "float B L G K",
    "k": "float B L G K",
    "g": "float B L H | B L H K",
    "beta": "float B L H",
    "dy": "float B L H V",
    "dlast": "float B H K V",
    "real": "bool B L",
}
CONV: Layouts = {"x": "float B D L", "weight": "float D W", "bias": "float D", "dy": "float B D L"}
SLOTS: Layouts = {
    "score": "float32 B m",
    "positions": "int64 B m",
    "real": "bool B m",
    "lengths": "int64 B",
    "protected": "int64 B n",
    "square": "any B H L L",
    "hidden": "any B m ...",
    "index": "int64 B d",
    "grad": "any B d ...",
    "piece": "any B d ...",
    "place": "int64 B d",
}
RESTORED: Layouts = {"grad": "any B L ...", "place": "int64 B d"}
_MAY_BE_ZERO = frozenset("BLmndk")
_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


def fit(operator: str, layouts: Layouts, /, **operands: Tensor | None) -> None:
    """Raises: OperandError unless the operands, by their names in `layouts`, have its dtypes and agree in their sizes;
    for scans, unless the channels or heads can be divided evenly among the groups of B and C."""
    sizes: dict[str, Any] = {}
    device = None
    for name, operand in operands.items():
        if operand is None:
            continue
        dtype, alternatives = _parsed(layouts[name])
        shape = operand.shape
        letters = alternatives.get(len(shape))
        if letters is None and None in alternatives and len(shape) >= len(alternatives[None]):
            letters = alternatives[None]
        if letters is None:
            raise _refused(operator, name, layouts, sizes, f"found {_text(shape)}")
        for letter, size in zip(letters, (*shape, 1)):  # a letter more than dimensions: it is `G=1`
            known = sizes.setdefault(letter, size)
            if known is size or type(size) is not int:
                continue
            if type(known) is not int:
                sizes[letter] = size
            elif known != size:
                raise _refused(operator, name, layouts, sizes, f"found {_text(shape)}")
        if not operand.is_floating_point() if dtype == "float" else operand.dtype != _DTYPES.get(dtype, operand.dtype):
            raise _refused(operator, name, layouts, sizes, f"found {str(operand.dtype).removeprefix('torch.')}")
        if device is None:
            device = operand.device
        elif operand.device != device:
            raise _refused(operator, name, layouts, sizes, f"found it on {operand.device}, other operands on {device}")
    for letter, size in sizes.items():
        if type(size) is int and size < 1 and letter not in _MAY_BE_ZERO:
            raise OperandError(
                f"simba_fx::{operator} expected at least one of {letter} (see simba_fx.ops); found none. Leave the "
                "call out where there is nothing to compute."
            )
    sharing, groups = sizes.get("D", sizes.get("H")), sizes.get("G", 1)
    if type(sharing) is int and type(groups) is int and sharing % groups:
        raise OperandError(
            f"simba_fx::{operator}: a scan's channels or heads must be a multiple of the groups of B and C; found "
            f"{sharing} and {groups} groups. Give B and C as many groups as share their channels evenly."
        )


@functools.cache
def _parsed(layout: str) -> tuple[str, dict[int | None, tuple[str, ...]]]:
    """A dtype, and the letters by number of dimensions; None: of the first dimensions, where more follow."""
    dtype, _, rest = layout.partition(" ")
    alternatives: dict[int | None, tuple[str, ...]] = {}
    for words in (part.split() for part in rest.split("|")):
        letters = [word for word in words if len(word) == 1]
        absent = [word[0] for word in words if word.endswith("=1")]
        alternatives[None if "..." in words else len(letters)] = (*letters, *absent)
    return dtype, alternatives


def _refused(operator: str, name: str, layouts: Layouts, sizes: Mapping[str, Any], found: str) -> OperandError:
    dtype, alternatives = _parsed(layouts[name])
    shapes = []
    for dims, letters in alternatives.items():
        letters = letters if dims is None else letters[:dims]
        more = ("...",) if dims is None else ()
        known = [str(sizes[letter]) if type(sizes.get(letter)) is int else letter for letter in letters]
        named = _text((*letters, *more))
        shapes.append(named if known == list(letters) else f"{named} = {_text((*known, *more))}")
    kind = "" if dtype == "any" else f"{'floating-point' if dtype == 'float' else dtype} "
    return OperandError(
        f"simba_fx::{operator} expected {name} to be {kind}{' or '.join(shapes)}, on one device with the other "
        f"operands; {found}. Pass the operands of one call in this layout (letters: simba_fx.ops); after "
        "register_scan, correct what the adapter returns."
    )


def _text(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def at_least(operator: str, bounds: Mapping[str, tuple[Any, int]]) -> None:
    """Raises: OperandError if a number, given with its least value, is below that. Symbolic ones are not compared."""
    for name, (found, bound) in bounds.items():
        if type(found) is int and found < bound:
            raise OperandError(
                f"simba_fx::{operator} expected {name} to be at least {bound}; found {found}. Pass a number that is."
            )


def rule(operator: str, length: Any, tail: Any, share_p: int, share_q: int, floor: Any) -> None:
    """Raises: OperandError unless these are arguments that `kept_count` counts by."""
    at_least(operator, {"length": (length, 0), "tail": (tail, 0), "floor": (floor, 0), "share_p": (share_p, 1),
                     "share_q": (share_q, share_p)})  # fmt: skip


def inside(operator: str, name: str, indices: Tensor, low: int, high: Any) -> None:
    """Raises: OperandError if an index lies outside of `low … high`, both included. Only in memory of the CPU."""
    if indices.device.type != "cpu" or type(indices) is not Tensor or not indices.numel():
        return
    least_index, largest = (int(end) for end in indices.aminmax())
    if least_index < low or largest > high:
        raise OperandError(
            f"simba_fx::{operator} expected {name} between {low} and {high}; found {least_index} to {largest}. Pass "
            "indices of tokens that are there."
        )
