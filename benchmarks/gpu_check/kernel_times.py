"""Stage e: kernels at the shapes of mamba-2.8b (e1), mamba2-2.7b (e2) and Qwen3.5-9B (e3) against what they cannot be
faster than.

A floor is the time to move the operands and results once, at the rate that stage a measured (COPY_RATE, 1e12 bytes per
second), or to compute the exponentials (EXP_RATE, 1e12 per second), whichever is longer. simba_fx's kernels come first,
at every length; the packages that they are compared with follow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from common import DEVICE, DRY, STAGE, add_mamba, attempt, host_us, record, replayed_us, time_us
from torch import Tensor
from torch.nn.functional import normalize

from simba_fx.ops import backends, chunked_ssd
from simba_fx.ops.cuda import packages
from simba_fx.ops.operands import SSDScan

OPS = torch.ops.simba_fx
COPY_RATE = float(os.environ.get("COPY_RATE", "4.3"))
EXP_RATE = float(os.environ.get("EXP_RATE", "4.2"))
LENGTHS = (48,) if DRY else (2048, 16384, 65536)
ODD = 17 if DRY else 197
"""Tokens that the odd length is shorter."""
NO_LIMIT = 3e38


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def step_bias(size: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """Whose softplus is log-uniform, as Mamba is initialised."""
    step = torch.exp(torch.rand(size, device=DEVICE) * math.log(high / low) + math.log(low))
    return step + torch.log(-torch.expm1(-step))


def other(module: str, name: str) -> Any:
    """A function of another package, or None where it cannot be imported."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, OSError, AttributeError):
        return None


def line(name: str, tokens: int, run: Callable[[], object], moved: int, exponentials: int = 0) -> None:
    """One kernel. `us`: in a CUDA graph where it can be in one; `called_us`: called from Python."""

    def measured() -> dict[str, Any]:
        called = time_us(run, most=0.3)
        us = replayed_us(run, called) or called
        floor = max(moved / COPY_RATE, exponentials / EXP_RATE) / 1e6
        return {
            "us": us,
            "called_us": called,
            "ns_per_token": us * 1e3 / tokens,
            "floor_us": floor,
            "times_floor": us / floor if floor else None,
        }

    attempt(name, measured, L=tokens)


def each_length() -> Iterator[tuple[int, str]]:
    for length in LENGTHS:
        yield length, ""
        yield length - ODD, " (odd length)"


class Selective:
    """Operands of Mamba-1's scan as a block of mamba-2.8b has them: channel-last, the gate beside its input."""

    D, N, R = (16, 16, 8) if DRY else (5120, 16, 160)

    def __init__(self, length: int) -> None:
        self.u = random(1, length, self.D).transpose(1, 2)
        self.delta = random(1, length, self.D).transpose(1, 2) * 0.1
        projected = random(1, length, self.R + 2 * self.N)[..., self.R :].transpose(1, 2)
        self.B, self.C = projected.split(self.N, dim=1)
        self.x, self.z = random(1, length, 2 * self.D).transpose(1, 2).split(self.D, dim=1)
        self.A = -torch.arange(1, self.N + 1, device=DEVICE).float().expand(self.D, self.N).contiguous()
        self.skip, self.bias = torch.ones(self.D, device=DEVICE), step_bias(self.D)
        self.weight, self.conv_bias = random(self.D, 4), random(self.D)
        self.moved, self.exponentials = length * self.D, length * self.D * self.N

    def ours(self, length: int, tag: str) -> None:
        for name, A in (("mamba init", self.A), ("nothing decays", self.A * 1e-5)):
            operands = self.u, self.delta, A, self.B, self.C, self.bias, True, None, 1, "simba"
            score = partial(OPS.selective_token_score, *operands)
            line(f"score, {name}{tag}", length, score, self.moved * 4, self.exponentials)
        scan = partial(OPS.selective_scan, *self.scanned(), self.z, self.bias, True)
        line(f"scan{tag}", length, scan, self.moved * 8, self.exponentials)
        conv = partial(OPS.causal_conv1d, self.x, self.weight, self.conv_bias, "silu")
        line(f"conv{tag}", length, conv, self.moved * 4)
        line(f"transposing copy{tag}", length, self.z.contiguous, self.moved * 4)

    def theirs(self, length: int, tag: str, scan: Any, conv: Any) -> None:
        """Their scan with time-contiguous operands, which it is quickest with, and the gate in either layout."""
        if scan is not None:
            operands = tuple(t.contiguous() for t in self.scanned())
            for layout, z in (("time-contiguous", self.z.contiguous()), ("channel-last", self.z)):
                run = partial(scan, *operands, z, self.bias, True)
                line(f"scan, mamba_ssm, gate {layout}{tag}", length, run, self.moved * 8, self.exponentials)
        if conv is not None:
            for layout, x in (("time-contiguous", self.x.contiguous()), ("channel-last", self.x)):
                run = partial(conv, x, self.weight, self.conv_bias, activation="silu")
                line(f"conv, causal_conv1d, {layout}{tag}", length, run, self.moved * 4)

    def scanned(self) -> tuple[Tensor, ...]:
        return self.u, self.delta, self.A, self.B, self.C, self.skip


class Ssd:
    """Operands of Mamba-2's scan as a block of mamba2-2.7b has them, or with the convolution's output transposed."""

    H, P, N = (2, 16, 16) if DRY else (80, 64, 128)
    LAYOUTS = ("channel-last", "time-contiguous")

    def __init__(self, length: int, layout: str) -> None:
        inner = self.H * self.P
        self.dt = random(1, length, 2 * inner + 2 * self.N + self.H)[..., -self.H :]
        mixed = random(1, length, inner + 2 * self.N)
        if layout == "time-contiguous":
            mixed = mixed.transpose(1, 2).contiguous().transpose(1, 2)
        x, B, C = mixed.split((inner, self.N, self.N), dim=2)
        self.x, self.B, self.C = x.unflatten(-1, (self.H, self.P)), B.unsqueeze(2), C.unsqueeze(2)
        self.A = -torch.rand(self.H, device=DEVICE) * 15 - 1
        self.skip, self.bias = torch.ones(self.H, device=DEVICE), step_bias(self.H)
        self.moved, self.projected, self.exponentials = length * inner, length * self.N, length * self.H

    def ours(self, length: int, layout: str, tag: str) -> None:
        moved = 2 * (self.moved + self.projected)
        for name, A in (("mamba2 init", self.A), ("nothing decays", self.A * 1e-6)):
            operands = self.x, self.dt, A, self.B, self.C, self.bias, True, 0.0, NO_LIMIT, None, 1, "simba"
            score = partial(OPS.ssd_token_score, *operands)
            line(f"ssd score, {name}, {layout}{tag}", length, score, moved, self.exponentials)
        if not tag and length <= 16384:
            scan = SSDScan(self.x, self.dt, self.A, self.B, self.C, self.skip, None, self.bias, True)
            run = partial(chunked_ssd.ssd_scan_at_once, scan)
            line(f"ssd scan, PyTorch, {layout}", length, run, self.moved * 4)

    def theirs(self, length: int, layout: str, tag: str, scan: Any) -> None:
        """Alone, and as the operator calls it."""
        operands = self.x, self.dt, self.A, self.B, self.C
        alone = partial(scan, *operands, 256, D=self.skip, dt_bias=self.bias, dt_softplus=True)
        line(f"ssd scan, mamba_ssm, {layout}{tag}", length, alone, self.moved * 4)
        if not tag:
            called = partial(OPS.ssd_scan, *operands, self.skip, None, self.bias, True, 0.0, NO_LIMIT, 256)
            line(f"ssd scan, operator, {layout}", length, called, self.moved * 4)


class Delta:
    """Operands of a gated delta rule as a block of Qwen3.5-9B has them, or of Kimi delta attention."""

    G, H, K = (1, 2, 16) if DRY else (16, 32, 128)

    def __init__(self, length: int, by_channel: bool) -> None:
        mixed = random(1, length, (2 * self.G + self.H) * self.K)
        q, k, v = mixed.split((self.G * self.K, self.G * self.K, self.H * self.K), dim=2)
        self.v = v.unflatten(2, (self.H, self.K))
        self.q, self.k = (normalize(x.unflatten(2, (self.G, self.K)).float(), dim=3) for x in (q, k))
        steps = torch.rand(1, length, self.H, *(self.K,) * by_channel, device=DEVICE)
        self.g, self.beta = -0.1 * steps, torch.rand(1, length, self.H, device=DEVICE)

    def timed(self, length: int, name: str, tag: str) -> None:
        """The scan is fla's where that can be imported; PyTorch's takes a chunk at a time, so only short ones."""
        operands = self.v, self.q, self.k, self.g, self.beta, 64
        moved = length * self.H * self.K * 2
        for criterion in ("simba-l2", "write"):
            score = partial(OPS.delta_token_score, *operands, None, 1, criterion)
            line(f"{name} score, {criterion}{tag}", length, score, moved + 4 * self.k.numel())
        if DRY or (not tag and (packages.delta_rule_fn() is not None or length <= 2048)):
            line(f"{name} scan{tag}", length, partial(OPS.delta_scan, *operands), 2 * moved + 8 * self.k.numel())


def selection(length: int) -> None:
    """Choosing tokens, taking them, and putting those that left early back."""
    width = 8 if DRY else 2560
    for rows in (1, 8):
        score = torch.randn(rows, length, device=DEVICE)
        positions = torch.arange(length, device=DEVICE).expand(rows, length)
        select = partial(OPS.select_tokens, score, positions, length, 1, 19, 20, 4)
        line(f"select, {rows} rows" if rows > 1 else "select", length, select, rows * length * 4 * 5)
    for count in (16, 64):
        at = [chunk[None] for chunk in torch.randperm(length, device=DEVICE).chunk(count)]
        pieces = [random(1, chunk.shape[1], width, dtype=torch.float32) for chunk in at]
        restore = partial(OPS.restore_tokens, pieces, at, length)
        line(f"restore_tokens, {count} pieces", length, restore, length * width * 8)
    hidden = random(1, length, width, dtype=torch.float32)
    kept = torch.arange(0, length, 10, device=DEVICE)[None]
    line("take_tokens, a tenth", length, partial(OPS.take_tokens, hidden, kept), length * width * 8 // 10)


def in_python(length: int = 2048) -> None:
    score, positions = torch.randn(1, length, device=DEVICE), torch.arange(length, device=DEVICE)[None]
    kept = positions[:, ::10].contiguous()
    calls: dict[str, Callable[[], object]] = {
        "select_tokens": partial(OPS.select_tokens, score, positions, length, 1, 19, 20, 4),
        "take_tokens": partial(OPS.take_tokens, score[..., None], kept),
    }

    def microseconds(run: Callable[[], object]) -> dict[str, Any]:
        return {"us": host_us(run, 3 if DRY else 30)}

    for name, run in calls.items():
        attempt(f"host: {name}", partial(microseconds, run))


def autotuned(kernels: ModuleType) -> None:
    """What each of our kernels that are autotuned runs with."""
    for module in [value for value in vars(kernels).values() if isinstance(value, ModuleType)]:
        for name, kernel in vars(module).items():
            if type(kernel).__name__ == "Autotuner" and (found := kernel.cache):
                record(f"autotuned: {name}", best={str(key)[:60]: str(config) for key, config in found.items()})


def selective() -> None:
    for length, tag in each_length():
        Selective(length).ours(length, tag)
    for length in LENGTHS:
        selection(length)
    in_python(64 if DRY else 2048)
    scan = other("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    conv = other("causal_conv1d", "causal_conv1d_fn")
    for length, tag in each_length():
        Selective(length).theirs(length, tag, scan, conv)


def ssd() -> None:
    places = [(length, tag, layout) for length, tag in each_length() for layout in Ssd.LAYOUTS]
    for length, tag, layout in places:
        Ssd(length, layout).ours(length, layout, tag)
    if (scan := other("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")) is None:
        return
    for length, tag, layout in places:
        Ssd(length, layout).theirs(length, layout, tag, scan)


def delta() -> None:
    for length, tag in each_length():
        for name in ("delta rule", "Kimi delta"):
            Delta(length, name == "Kimi delta").timed(length, name, tag)


def main() -> None:
    if (kernels := backends.triton_kernels()) is None:
        record("kernels", ok=False, error="Triton cannot be imported")
        return
    add_mamba()
    if DRY:  # Triton's interpreter runs the kernels on tensors of a CPU
        backends.on_gpu = lambda operand: True
    with torch.no_grad():
        {"e1": selective, "e2": ssd, "e3": delta}[STAGE]()
    autotuned(kernels)
    record("end", ok=True)


if __name__ == "__main__":
    main()
