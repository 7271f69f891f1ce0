"""The lift table: which functions stand for scans while a model is captured, one file per library.

A row is found by the module that looks the function up and by the function's name there. A user's own functions are
registered one by one (`simba_fx.register_scan`).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from simba_fx.capture.rows import Row
from simba_fx.capture.scan_functions import fla, mamba3, mamba_ssm, minimax, transformers

__all__ = ["CALLERS", "SCANNING", "refuse_unsupported", "row_of", "rows_of"]

SCANNING = frozenset(name.partition(".")[0] for name in (*transformers.SCANS, *minimax.ROWS))
"""A file of transformers that holds one of these has models that can be transformed."""
CALLERS = (minimax,)
"""Files here whose stand-ins call functions that have rows themselves."""
LIBRARIES = (minimax, transformers, mamba_ssm, fla)


def row_of(module: str, name: str) -> Row | None:
    """The row of `name` as the Python module called `module` looks it up, if there is one."""
    return next((lib.ROWS[name] for lib in LIBRARIES if module.startswith(lib.OWNERS) and name in lib.ROWS), None)


def rows_of(module: types.ModuleType) -> Iterator[tuple[Any, Row]]:
    """The functions that a loaded Python module looks up under names that have a row, each with its row."""
    for library in LIBRARIES:
        if module.__name__.startswith(library.OWNERS):
            yield from ((vars(module)[name], row) for name, row in library.ROWS.items() if name in vars(module))


def refuse_unsupported(model: nn.Module) -> None:
    """Stop before tracing where a module's recurrence is none that can be pruned.

    Raises:
        CaptureError: names the module and what it is.
    """
    for path, module in model.named_modules():
        mamba3.refuse_mimo(path, module)
