"""The Triton kernels on a machine without a GPU, in processes of their own (Triton reads its mode when it is imported).

Triton is installed in a folder that is not on `sys.path` (see the Makefile): where Inductor can import it, it takes
longer to start.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from subprocesses import run_checks

PACKAGES = Path(sys.prefix) / "triton"

pytestmark = pytest.mark.skipif(not PACKAGES.is_dir(), reason=f"no folder {PACKAGES}: make test adds it")


def test_the_kernels_are_right_in_the_interpreter() -> None:
    run_checks(Path(__file__).with_name("triton_checks.py"), [PACKAGES], 106, TRITON_INTERPRET="1")


def test_the_kernels_compile_without_spills_and_can_be_traced(tmp_path: Path) -> None:
    run_checks(Path(__file__).with_name("triton_compiled_checks.py"), [PACKAGES], 62, TRITON_CACHE_DIR=str(tmp_path))
