"""`mamba_ssm`'s own models (2.3.2.post1, with causal-conv1d 1.7.0), in a process of their own.

Both packages are installed as pure Python in a folder that is not on `sys.path` (see the Makefile), because
transformers runs its Mamba through `mamba_ssm` wherever it can be imported. The checks, in `mamba_ssm_checks.py`, stub
the packages' CUDA extensions and let their reference functions run instead (`mamba_ssm_cpu.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from subprocesses import run_checks

PACKAGES = Path(sys.prefix) / "mamba-ssm"
TRITON = Path(sys.prefix) / "triton"


@pytest.mark.capability("parity", "mamba_ssm `MambaLMHeadModel`, `MixerModel`")
@pytest.mark.capability("generate", "mamba_ssm `MambaLMHeadModel`, `MixerModel`")
@pytest.mark.capability("train", "mamba_ssm `MambaLMHeadModel`, `MixerModel`")
@pytest.mark.capability("compile", "mamba_ssm `MambaLMHeadModel`, `MixerModel`")
@pytest.mark.capability("parity", "mamba_ssm `Mamba3` in your own model")
@pytest.mark.capability("train", "mamba_ssm `Mamba3` in your own model")
@pytest.mark.capability("compile", "mamba_ssm `Mamba3` in your own model")
@pytest.mark.skipif(not (PACKAGES.is_dir() and TRITON.is_dir()), reason=f"no folder {PACKAGES}: make test adds it")
def test_the_checks_of_mamba_ssms_models_pass() -> None:
    run_checks(Path(__file__).with_name("mamba_ssm_checks.py"), [PACKAGES, TRITON], 89)
