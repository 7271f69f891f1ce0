"""What belongs to a call of a sparse model and not to the model: what was asked of it, and what it kept.

Both are of the context that calls (`contextvars`): threads and tasks that use one model do not see each other's. A
model with `compile="whole"` is traced, contexts and all, and has one memory for everyone.
"""

from __future__ import annotations

import itertools
import weakref
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from simba_fx.compiling import exported
from simba_fx.runtime.rows import Asked

__all__ = ["LastCall", "Memory"]


class LastCall(NamedTuple):
    """What `kept`, `reached` and `report` tell of."""

    rows: int
    length: int
    built: Any
    """The `Built` that ran; None: the dense class's own forward."""
    positions: Any
    """For each cut, where the tokens that went on stand in their row `(B, k)`."""
    real: Any
    """For each cut, which of them are no padding `(B, k)`; None: all."""
    mask: Tensor | None
    """`(B, L)`, not 0 where a token of the input is real; None: everywhere."""


class _Place:
    """Where a context's share of a memory lies. The share itself is with the memory: a call leads to its model, and
    contexts, which live as long as their thread, keep no model alive."""

    __slots__ = ("__weakref__",)


_Places = weakref.WeakKeyDictionary["Memory", _Place]
_asked: ContextVar[_Places] = ContextVar("simba_fx asked")
_last: ContextVar[_Places] = ContextVar("simba_fx last")
_nowhere: _Places = weakref.WeakKeyDictionary()

_numbers = itertools.count()
_asked_of_all: dict[int, Asked] = {}
"""By runtime. Of tensors that a module leads to, Dynamo takes each size for a constant."""


class Memory:
    """A runtime's `asked`, what the contexts around its calls ask for, and `last`, what its last call kept.

    What a call under `torch.export` leaves is symbolic: it is seen by what runs later in the same trace (a loss, a
    wrapper that asks `kept`) and by nobody else.
    """

    options: Any
    _whole: LastCall | None = None
    _traced: LastCall | None = None
    _shares: weakref.WeakKeyDictionary[_Place, Any]

    def __post_init__(self) -> None:
        self._shares = weakref.WeakKeyDictionary()
        self._number = next(_numbers)
        weakref.finalize(self, _asked_of_all.pop, self._number, None).atexit = False
        _asked_of_all[self._number] = Asked(self.options.least_tail)

    @property
    def asked(self) -> Asked:
        usual = _asked_of_all[self._number]
        if self.options.compile == "whole":
            return usual
        return self._here(_asked) or usual

    @asked.setter
    def asked(self, asked: Asked) -> None:
        if self.options.compile == "whole":
            _asked_of_all[self._number] = asked
        else:
            self._put(_asked, asked)

    @property
    def tail(self) -> int:
        return self.asked.in_graph()[0]

    @property
    def shortest_row(self) -> int:
        """Real tokens that every row of a call must have."""
        return self.asked.in_graph()[1]

    @property
    def last(self) -> LastCall | None:
        if exported():
            return self._traced
        return self._whole if self.options.compile == "whole" else self._here(_last)

    @last.setter
    def last(self, call: LastCall) -> None:
        if exported():
            self._traced = call
            return
        self._traced = None
        if self.options.compile == "whole":
            self._whole = call
        else:
            self._put(_last, call)

    def _here(self, variable: ContextVar[_Places]) -> Any:
        place = variable.get(_nowhere).get(self)
        return None if place is None else self._shares.get(place)

    def _put(self, variable: ContextVar[_Places], share: Any) -> None:
        """At a new place: contexts that were copied from this one keep theirs."""
        place = _Place()
        self._shares[place] = share
        places: _Places = weakref.WeakKeyDictionary(variable.get(_nowhere))
        places[self] = place
        variable.set(places)
