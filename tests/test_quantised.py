"""int8 weights of torchao: the checks of quantised_checks.py in a process that can import it.

transformers imports torchao wherever it is installed, which takes seconds and prints warnings; so `make test` puts it
in a folder that is not on sys.path.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(sys.prefix) / "torchao"
TESTS = Path(__file__).parent


@pytest.mark.skipif(not PACKAGE.is_dir(), reason=f"no folder {PACKAGE}: make test adds it")
def test_the_checks_of_quantised_models_pass() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (PACKAGE, TESTS))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "quantised_checks.py"]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
    counted = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert counted, f"expected passed checks only, found {done.stdout.splitlines()[-1]}"
    assert int(counted.group(1)) >= 13
