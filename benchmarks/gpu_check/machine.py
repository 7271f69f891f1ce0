"""Stage a: what this machine is, what it can import, how fast it copies and multiplies.

The products are those of a block of mamba-2.8b, for lengths that are and are not multiples of 8, as kept counts come.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata
from typing import Any

import torch
from common import DEVICE, DRY, SITE, WORK, add_mamba, attempt, time_us
from torch import Tensor

from simba_fx.ops import kernel_path

PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis",
            "einops", "accelerate", "peft")  # fmt: skip
QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"

D, M, R, S = (64, 32, 8, 4) if DRY else (5120, 2560, 160, 16)
"""Channels of the scan, width of the model, ranks of the step, states."""
LENGTHS = (33, 40) if DRY else (8192, 7376, 7373, 1434, 1432, 1433)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {name: version(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "cpus": os.cpu_count()}
    if DRY:
        return found
    gpu = torch.cuda.get_device_properties(0)
    found |= {
        "gpu": gpu.name,
        "sms": gpu.multi_processor_count,
        "memory_GiB": round(gpu.total_memory / 2**30, 1),
        "cc": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        found["smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found


def mamba_imports() -> dict[str, Any]:
    """The packages that were given, extensions included."""
    if DRY or not any(SITE.iterdir()):
        return {"ok": None, "path": kernel_path("cuda")}
    add_mamba()
    for module in ("selective_scan_cuda", "causal_conv1d_cuda", "mamba_ssm.ops.triton.ssd_combined"):
        import_module(module)
    return {"ok": True, "path": kernel_path("cuda")}


def copy() -> dict[str, Any]:
    """Bytes read and written per second; left in a file for the floors of stage e."""
    size = 2**20 if DRY else 2**31
    source = torch.randint(255, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    us = time_us(lambda: target.copy_(source))
    rate = 2 * size / us / 1e6
    (WORK / "copy-rate").write_text(f"{rate:.4g}")
    return {"TBps": rate, "us": us}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def square_product() -> dict[str, Any]:
    size = 128 if DRY else 8192
    a, b = random(size, size), random(size, size)
    us = time_us(lambda: a @ b)
    return {"TFLOPs": 2 * size**3 / us / 1e6}


def products(length: int) -> Iterator[tuple[str, Callable[[], tuple[Tensor, Tensor]], int]]:
    """Name, operands and FLOPs per token of each product as Inductor calls it, in either layout."""
    bc = R + 2 * S
    yield "in_proj (L,M)@(M,2D)", lambda: (random(length, M), random(2 * D, M).t()), 4 * M * D
    yield "x_proj, A time-contiguous, ld=L", lambda: (random(D, length).t(), random(bc, D).t()), 2 * D * bc
    yield "x_proj, A channel-last", lambda: (random(length, D), random(bc, D).t()), 2 * D * bc
    yield "dt_proj, out (D,L), ld=L", lambda: (random(D, R), random(length, bc)[:, :R].t()), 2 * D * R
    yield "dt_proj, out (L,D)", lambda: (random(length, bc)[:, :R], random(D, R).t()), 2 * D * R
    yield "out_proj, A time-contiguous, ld=L (B>1)", lambda: (random(D, length).t(), random(M, D).t()), 2 * D * M
    yield "out_proj, A channel-last", lambda: (random(length, D), random(M, D).t()), 2 * D * M


def product(make: Callable[[], tuple[Tensor, Tensor]], length: int, flops: int) -> dict[str, Any]:
    a, b = make()
    us = time_us(lambda: torch.mm(a, b), most=0.05)
    return {"us": us, "ns_per_token": us * 1e3 / length, "TFLOPs": flops * length / us / 1e6}


def main() -> None:
    attempt("environment", environment)
    attempt("mamba imports", mamba_imports)
    attempt("copy", copy)
    attempt("gemm 8192", square_product)
    for length in LENGTHS:
        for name, make, flops in products(length):
            attempt(f"gemm {name}", partial(product, make, length, flops), need=1, L=length)


if __name__ == "__main__":
    main()
