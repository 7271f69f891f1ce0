"""Checks that need a process of their own: a package that others must not be able to import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
EXAMPLES = SUPPORT.parents[1] / "examples"


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """Of a process that can import what tests share, the examples, and what lies in `folders`."""
    paths = os.pathsep.join(map(str, (*folders, SUPPORT, EXAMPLES)))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}  # tiny tensors: no threads


def run_checks(file: Path, folders: list[Path], least: int, *options: str, **variables: str) -> None:
    """Run a file of checks with what lies in `folders` importable; all of them pass, and there are at least so many.

    `options` are pytest's, `variables` go into the environment.
    """
    command = [sys.executable, "-m", "pytest", "-q", *options, "-p", "no:cacheprovider", file.name]
    variables = environment(*folders, **variables)
    done = subprocess.run(command, cwd=file.parent, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
    counted = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert counted, f"expected passed checks only, found {done.stdout.splitlines()[-1]}"
    assert int(counted.group(1)) >= least
