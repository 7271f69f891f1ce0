"""Checks that need a process of their own: a package that others must not be able to import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_checks(file: str, folders: list[Path], least: int, *options: str, **variables: str) -> None:
    """Run a file of checks with what lies in `folders` importable; all of them pass, and there are at least so many.

    `options` are pytest's, `variables` go into the environment.
    """
    paths = os.pathsep.join(map(str, (*folders, TESTS)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}  # tiny tensors: no threads
    command = [sys.executable, "-m", "pytest", "-q", *options, "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
    counted = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert counted, f"expected passed checks only, found {done.stdout.splitlines()[-1]}"
    assert int(counted.group(1)) >= least
