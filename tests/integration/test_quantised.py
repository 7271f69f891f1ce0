"""int8 weights of torchao: the checks of quantised_checks.py in a process that can import it.

transformers imports torchao wherever it is installed, which takes seconds and prints warnings; so `make test` puts it
in a folder that is not on sys.path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from subprocesses import run_checks

PACKAGE = Path(sys.prefix) / "torchao"


@pytest.mark.skipif(not PACKAGE.is_dir(), reason=f"no folder {PACKAGE}: make test adds it")
def test_the_checks_of_quantised_models_pass() -> None:
    run_checks(Path(__file__).with_name("quantised_checks.py"), [PACKAGE], 13, "-W", "ignore")
