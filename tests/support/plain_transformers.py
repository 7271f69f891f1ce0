"""Imported before transformers' modeling files: they run as PyTorch, whatever else is installed.

A modeling file takes the functions of mamba_ssm and causal_conv1d where it can import them, and then calls CUDA kernels
for operands on a CPU too. The tests' references are the plain definitions, so those packages are hidden meanwhile;
simba_fx, which asks later, finds them.
"""

from __future__ import annotations

import importlib
import sys

HIDDEN = ("mamba_ssm", "causal_conv1d")
FAMILIES = ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "mamba", "mamba2",
            "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_next", "zamba", "zamba2")  # fmt: skip


def _import_modeling_files() -> None:
    there = {name: sys.modules.pop(name) for name in HIDDEN if name in sys.modules}
    sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]  # None: importing it fails
    try:
        for family in FAMILIES:
            importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    finally:
        for name in HIDDEN:
            del sys.modules[name]
        sys.modules.update(there)


_import_modeling_files()
