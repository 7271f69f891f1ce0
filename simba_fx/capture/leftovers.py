"""What torch keeps for good of every trace and graph module, and a process that transforms many models must not: the
source text of graph modules (for tracebacks)."""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import CodeType

from simba_fx.compiling import source_texts

__all__ = ["free_with", "none_left"]


def free_with(cls: type, code: CodeType) -> None:
    """Let the text of `code`, which torch generated, go with the graph module's own class `cls`."""
    weakref.finalize(cls, _forget, (code.co_filename,)).atexit = False


@contextmanager
def none_left() -> Iterator[None]:
    """Around a trace, of whose graph modules none lives on. (What other threads make meanwhile goes too: its text is
    missed in tracebacks alone.)"""
    before = set(source_texts.eval_cache)
    try:
        yield
    finally:
        _forget(set(source_texts.eval_cache) - before)


def _forget(keys: Collection[str]) -> None:
    for key in keys:
        source_texts.eval_cache.pop(key, None)
        linecache.cache.pop(key, None)
