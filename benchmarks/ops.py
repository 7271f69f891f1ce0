"""Times the operators against the functions transformers runs without mamba_ssm: `python benchmarks/ops.py`.

Columns: transformers' own function, our PyTorch path, our C++ kernels; rows: forward, forward + backward, score (which
transformers does not have). Runs are interleaved, so that a busy machine slows every column alike; medians in
milliseconds, float32, shapes of mamba-130m and mamba2-130m unless told otherwise.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from simba_fx import ops
from simba_fx.ops.cpu import native

Run = Callable[[], object]

SHORT = 128
"""Tokens at which Mamba-1's backward is compared: transformers' loop indexes `(B, D, L, N)` tensors once per token, and
each index's gradient is a tensor of that size, so its backward is quadratic in L (minutes at 2048 tokens)."""


def unwrapped(function: Callable[..., object]) -> Callable[..., object]:
    """transformers' function beneath the decorator that looks for a kernel."""
    return getattr(function, "__wrapped__", function)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def torch_path() -> AbstractContextManager[object]:
    return mock.patch.object(native, "load", return_value="switched off by the benchmark")


def milliseconds(run: Run, context: AbstractContextManager[object]) -> float:
    """Wall time; on one thread the thread's own processor time, which other processes do not inflate."""
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.process_time
    with context:
        start = clock()
        run()
        return 1e3 * (clock() - start)


def table_row(name: str, theirs: Run | None, ours: Run, repeats: int) -> None:
    """One line: medians of interleaved runs, and how many times faster than transformers the kernels are."""
    columns: dict[str, tuple[Run, Callable[[], AbstractContextManager[object]]]] = {
        "torch": (ours, torch_path),
        "C++": (ours, nullcontext),
    }
    if theirs is not None:
        columns = {"transformers": (theirs, nullcontext), **columns}
    times: dict[str, list[float]] = {column: [] for column in columns}
    for i in range(repeats + 1):
        for column, (run, context) in columns.items():
            elapsed = milliseconds(run, context())
            if i:
                times[column].append(elapsed)
    medians = {column: statistics.median(values) for column, values in times.items()}
    cells = [f"{medians[c]:14.1f}" if c in medians else f"{'':14}" for c in ("transformers", "torch", "C++")]
    gain = f"{medians['transformers'] / medians['C++']:8.1f}x" if theirs is not None else ""
    print(f"{name:28}{''.join(cells)}{gain}", flush=True)


def with_backward(forward: Callable[[], object], leaves: list[Tensor]) -> Run:
    def run() -> None:
        result = forward()
        y = result[0] if isinstance(result, tuple) else result
        assert isinstance(y, Tensor)
        torch.autograd.grad(y.sum(), leaves)

    return run


def mamba1(rows: int, length: int, channels: int, states: int, repeats: int) -> None:
    """Operands laid out as the model lays them out: u and z are halves of one projection, time before channels."""
    u, z = torch.randn(rows, length, 2 * channels).transpose(1, 2).split(channels, dim=1)
    delta = torch.randn(rows, length, channels).transpose(1, 2)
    B, C = (torch.randn(rows, length, states).transpose(1, 2) for _ in "BC")
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    D, bias = torch.randn(channels), torch.randn(channels) - 3
    operands = [u, delta, A, B, C, D, z, bias]
    theirs = unwrapped(mamba_selective_scan)

    def forward(*at: Tensor) -> Run:
        return lambda: ops.selective_scan(*at, True)

    def their_forward(*at: Tensor) -> Run:
        return lambda: theirs(*at, delta_softplus=True)

    with torch.no_grad():
        table_row("selective scan", their_forward(*operands), forward(*operands), repeats)
    leaves = [t.detach().requires_grad_() for t in operands]
    table_row("  forward + backward", None, with_backward(forward(*leaves), leaves), max(3, repeats // 3))
    short = [t[..., :SHORT].detach().requires_grad_() if t.dim() == 3 else t for t in leaves]
    backward = (with_backward(run(*short), short) for run in (their_forward, forward))
    table_row(f"  the same, {SHORT} tokens", *backward, 3)
    with torch.no_grad():
        scan = (u, delta, A, B, C, bias, True)
        table_row("  score", None, lambda: ops.selective_token_score(*scan, None, 1, "simba"), repeats)
    weight = torch.randn(channels, 4)

    def convolution() -> Tensor:
        y = torch.nn.functional.conv1d(u, weight.unsqueeze(1), bias, padding=3, groups=channels)
        return torch.nn.functional.silu(y[..., :length])

    with torch.no_grad():
        table_row("causal conv1d", convolution, lambda: ops.causal_conv1d(u, weight, bias, "silu"), repeats)


def mamba2(rows: int, length: int, heads: int, width: int, states: int, repeats: int) -> None:
    x, dt = torch.randn(rows, length, heads, width), torch.randn(rows, length, heads)
    B, C = torch.randn(rows, length, 1, states), torch.randn(rows, length, 1, states)
    A, D, bias = -torch.arange(1.0, heads + 1), torch.randn(heads), torch.randn(heads) - 3
    operands = [x, dt, A, B, C, D, bias]
    theirs = unwrapped(mamba2_chunk_scan)

    def forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Run:
        return lambda: ops.ssd_scan(x, dt, A, B, C, D, None, bias, True)

    def their_forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Run:
        return lambda: theirs(x, dt, A, B, C, 256, D=D, dt_bias=bias, dt_softplus=True)

    with torch.no_grad():
        table_row("ssd scan", their_forward(*operands), forward(*operands), repeats)
    leaves = [t.detach().requires_grad_() for t in operands]
    backward = (with_backward(run(*leaves), leaves) for run in (their_forward, forward))
    table_row("  forward + backward", *backward, max(3, repeats // 3))
    with torch.no_grad():
        scan = (x, dt, A, B, C, bias, True, 0.0, float("inf"))
        table_row("  score", None, lambda: ops.ssd_token_score(*scan, None, 1, "simba"), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{processor()}, {arguments.threads} threads; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; {ops.kernel_path('cpu')}")
    clock = "wall" if arguments.threads > 1 else "processor"
    print(f"rows {arguments.rows}, tokens {arguments.length}, channels {arguments.channels}; ms, medians, {clock} time")
    print(f"{'':28}{'transformers':>14}{'torch':>14}{'C++':>14}   C++ gain")
    mamba1(arguments.rows, arguments.length, arguments.channels, 16, arguments.repeats)
    mamba2(arguments.rows, arguments.length, arguments.channels // 64, 64, 128, arguments.repeats)


if __name__ == "__main__":
    main()
