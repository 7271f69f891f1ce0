"""`mamba_ssm`'s own models (2.3.2.post1, with causal-conv1d 1.7.0), in a process of their own.

Both packages are installed as pure Python in a folder that is not on `sys.path` (see the Makefile), because
transformers runs its Mamba through `mamba_ssm` wherever it can be imported. The checks, in `mamba_ssm_checks.py`, stub
the packages' CUDA extensions and let their reference functions run instead (`mamba_ssm_cpu.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(sys.prefix) / "mamba-ssm"
TESTS = Path(__file__).parent


@pytest.mark.capability("parity", "mamba_ssm `MambaLMHeadModel`, `MixerModel`")
@pytest.mark.capability("generate", "mamba_ssm `MambaLMHeadModel`, `MixerModel`")
@pytest.mark.capability("train", "mamba_ssm `MambaLMHeadModel`, `MixerModel`")
@pytest.mark.capability("compile", "mamba_ssm `MambaLMHeadModel`, `MixerModel`")
@pytest.mark.skipif(not PACKAGES.is_dir(), reason=f"no folder {PACKAGES}: make test adds it")
def test_the_checks_of_mamba_ssms_models_pass() -> None:
    paths = os.pathsep.join(map(str, (PACKAGES, TESTS)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}  # tiny tensors: threads only wait
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "mamba_ssm_checks.py"]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
    counted = re.search(r"^(\d+) passed in ", done.stdout, re.MULTILINE)
    assert counted, f"expected passed checks only, found {done.stdout.splitlines()[-1]}"
    assert int(counted.group(1)) >= 80
