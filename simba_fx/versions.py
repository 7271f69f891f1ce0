"""The versions of torch and transformers that this package was tested with; another one is named, once.

The package reads more of both than they promise to keep. The names that it takes are tested on both ends of these
ranges (tests/unit/test_canary.py); what changes its meaning under an old name in a later release, no such test sees.
"""

from __future__ import annotations

import re
import sys

from simba_fx.errors import warn

__all__ = ["TESTED", "name_untested", "untested"]

TESTED = {"torch": ((2, 11), (2, 14)), "transformers": ((5, 17), (5, 24))}
"""By package the oldest and the newest (major, minor)."""

_named: set[str] = set()


def untested() -> list[str]:
    """A line for each package that is loaded in another version than was tested. Imports nothing."""
    lines = []
    for package, (oldest, newest) in TESTED.items():
        version = str(getattr(sys.modules.get(package), "__version__", ""))
        if (numbers := re.match(r"(\d+)\.(\d+)", version)) is None:
            continue
        found = (int(numbers[1]), int(numbers[2]))
        if not oldest <= found <= newest:
            known = " to ".join(".".join(map(str, end)) for end in (oldest, newest))
            lines.append(f"{package} {version} is {'older' if found < oldest else 'newer'} than what simba_fx was "
                         f"tested with ({known})")  # fmt: skip
    return lines


def name_untested() -> None:
    """Warn of each such package once in a process."""
    for line in untested():
        if line not in _named:
            _named.add(line)
            warn(
                f"{line}. To see whether a model is computed rightly, compare simba_fx.transform(model, 'dense') with "
                "it on inputs of yours: their results should differ by rounding alone."
            )
