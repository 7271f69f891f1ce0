"""simba_fx: a compiler pass that makes a pretrained state-space model do less work per token, without training.

    sparse = simba_fx.transform(model, schedule="linear")
    sparse = torch.compile(sparse)

Importing this package patches nothing, touches no device and imports neither transformers nor mamba_ssm. Its names are
imported when they are first asked for: a process that only runs an exported program needs `import simba_fx.ops`, the
operators, and loads nothing that transforms models.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simba_fx import errors
    from simba_fx.api import answer, explain, kept, lengths, program, reached, tail, transform
    from simba_fx.capture.lift import register_scan
    from simba_fx.capture.recurrences import LinearRecurrence, register_recurrence
    from simba_fx.evaluation.calibration import calibrate
    from simba_fx.ops.operands import DeltaScan, SelectiveScan, SSDScan
    from simba_fx.reporting import report
    from simba_fx.saving import load, save
    from simba_fx.schedule import Budget, Constant, Cosine, Dense, Linear, Stages

__all__ = [
    "Budget",
    "Constant",
    "Cosine",
    "DeltaScan",
    "Dense",
    "Linear",
    "LinearRecurrence",
    "SSDScan",
    "SelectiveScan",
    "Stages",
    "answer",
    "calibrate",
    "errors",
    "explain",
    "kept",
    "lengths",
    "load",
    "program",
    "reached",
    "register_recurrence",
    "register_scan",
    "report",
    "save",
    "tail",
    "transform",
]

_HOMES = {
    "api": ("answer", "explain", "kept", "lengths", "program", "reached", "tail", "transform"),
    "capture.lift": ("register_scan",),
    "capture.recurrences": ("LinearRecurrence", "register_recurrence"),
    "evaluation.calibration": ("calibrate",),
    "ops.operands": ("DeltaScan", "SSDScan", "SelectiveScan"),
    "reporting": ("report",),
    "saving": ("load", "save"),
    "schedule": ("Budget", "Constant", "Cosine", "Dense", "Linear", "Stages"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
"""In which module each name is defined; the others of `__all__` are modules themselves."""


if not TYPE_CHECKING:  # type checkers know the names from above, and that there are no others

    def __getattr__(name: str) -> Any:
        if (home := _HOME_OF.get(name)) is not None:
            found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            return found
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


class _BesideThisFolder:
    """Finds `simba_fx.passes` where a clone is imported and not an installation, as in `python` at its top: there the
    passes are a folder of their own, beside this one."""

    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "passes")

    @classmethod
    def find_spec(cls, name: str, *_: Any) -> Any:
        if name != f"{__name__}.passes":
            return None
        file = os.path.join(cls.folder, "__init__.py")
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[cls.folder])


if not os.path.isdir(os.path.join(os.path.dirname(__file__), "passes")):
    sys.meta_path.insert(0, _BesideThisFolder)  # first: an installation may be of other sources
