"""The lift table: which functions stand for scans while a model is captured, one file per library.

A row is found by the module that looks the function up and by the function's name there. A user's own functions are
registered one by one (`simba_fx.register_scan`).
"""

from __future__ import annotations

from simba_fx.lifts import transformers
from simba_fx.operands import Row

__all__ = ["row_of"]

LIBRARIES = (transformers,)


def row_of(module: str, name: str) -> Row | None:
    """The row of `name` as the Python module called `module` looks it up, if there is one."""
    return next((lib.ROWS[name] for lib in LIBRARIES if module.startswith(lib.OWNERS) and name in lib.ROWS), None)
