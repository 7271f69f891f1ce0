"""What the parts of gpu_check.sh share: where they run, how they record what they find, and how they time.

Their environment, set by the script: STAGE names the part's results, LIMIT is its seconds, WORK a folder for what the
parts leave one another, SITE one with mamba_ssm and causal_conv1d (it may be empty). DRY=1: no GPU, tiny sizes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # before torch, and for all that follows: only results are read

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

DRY = os.environ.get("DRY") == "1"
STAGE = os.environ["STAGE"]
LIMIT = float(os.environ["LIMIT"])
WORK, SITE, OUT = (Path(os.environ[name]) for name in ("WORK", "SITE", "OUT"))
DEVICE = torch.device("cpu" if DRY else "cuda")
BEGUN = time.time()
BROKEN = ("illegal memory access", "misaligned address", "launch failure", "device-side assert")
"""Errors after which no call of this process reaches the GPU any more."""

if DRY:
    torch.set_num_threads(1)


def add_mamba() -> None:
    """From here on mamba_ssm can be imported. What must not find it has been imported before."""
    sys.path.insert(0, str(SITE))


def left() -> float:
    """Seconds until this part should have ended."""
    return LIMIT - (time.time() - BEGUN)


def record(name: str, **found: Any) -> None:
    """A line of results. `ok`: True, False, or None for what was left out."""
    line = json.dumps({"stage": STAGE, "name": name, "at": round(time.time() - BEGUN, 1), **found}, default=str)
    with (WORK / "results" / f"{STAGE}.jsonl").open("a") as results:
        results.write(line + "\n")
    print(line, flush=True)


def attempt(name: str, check: Callable[[], dict[str, Any]], need: float = 3.0, **about: Any) -> bool:
    """Record what `check` returns, or its error, or that fewer than `need` seconds are left; whether it returned."""
    if left() < need:
        record(name, ok=None, error="left out: no time", **about)
        return False
    begun = time.time()
    try:
        found = check()
    except Exception as error:
        lines = [line.strip()[:300] for line in str(error).splitlines() if line.strip()]
        where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        record(
            name,
            ok=False,
            error=f"{type(error).__name__}: {' | '.join(lines[:4])}",
            end=lines[4:][-12:],  # a compiler's true cause comes last
            where=where[-5:],
            seconds=round(time.time() - begun, 1),
            **about,
        )
        if any(text in str(error) for text in BROKEN):
            record("the CUDA context", ok=False, error="it is broken; the process ends")
            os._exit(3)
        return False
    record(name, **about, **found)
    return True


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def time_us(run: Callable[[], object], most: float = 0.6, repeats: int = 15) -> float:
    """Median microseconds of a call between two events, after warming up; about `most` seconds in all."""
    if DRY:
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e6
    run()
    synchronize()
    begun = time.perf_counter()
    run()
    synchronize()
    once = time.perf_counter() - begun
    found = []
    for _ in range(max(3, min(repeats, int(most / max(once, 1e-6))))):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) * 1e3)
    return statistics.median(found)


def replayed_us(run: Callable[[], object], called_us: float) -> float | None:
    """Microseconds of a call as part of a CUDA graph, where launching costs nothing; None where it cannot be one."""
    if DRY:
        return None
    calls = max(1, min(20, int(2000 / called_us)))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    except Exception:
        synchronize()
        return None
    return time_us(graph.replay, most=0.3) / calls


def host_us(run: Callable[[], object], repeats: int = 30) -> float:
    """Least microseconds that a call takes in Python, without waiting for the device."""
    run()
    synchronize()
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
        synchronize()
    return best * 1e6


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    actual, expected = (t.detach().double().cpu() for t in (actual, expected))
    return ((actual - expected).pow(2).sum() / expected.pow(2).sum().clamp(min=1e-60)).sqrt().item()
