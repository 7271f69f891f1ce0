"""Times, peak memory and compilations of calls, and the machine they ran on."""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
Stopwatch = Callable[[Call], float]
"""Runs a call and returns its seconds."""

_FLUSH = 256 * 2**20  # bytes, more than any L2 cache holds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stopwatch(device: torch.device, flush_l2: bool = False) -> Stopwatch:
    """CUDA: events around everything that the call enqueues, from an idle device; else wall time."""
    if device.type != "cuda":
        return _wall
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device=device) if flush_l2 else None

    def events(call: Call) -> float:
        make: Any = torch.cuda.Event
        begin, end = make(enable_timing=True), make(enable_timing=True)
        if flush is not None:
            flush.zero_()
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1e3

    return events


def _wall(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def in_turns(calls: Mapping[str, Call], repeats: int, watch: Stopwatch,
             progress: Callable[[int], None] = lambda _: None) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each call, one call of each after the other, `repeats` times: a machine's moods reach all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            progress(turn + 1)
            for name, call in calls.items():
                seconds[name].append(watch(call))
    finally:
        if collecting:
            gc.enable()
    return seconds


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes of tensors that a call holds at most beyond what stood before it, as torch's allocator counts them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call()
    events = [event for event in _kineto(seen) if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _kineto(seen: Any) -> Any:
    return seen.profiler.kineto_results.events()


def graphs_compiled() -> int:
    """How many graphs Dynamo has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def graphs_skipped() -> int:
    """How many times Inductor has gone without CUDA graphs although it was asked for them."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def environment(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, the date."""
    from simba_fx import ops
    from simba_fx.reporting import _machine

    found: dict[str, Any] = {
        "machine": _machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "kernels": ops.kernel_path(device.type),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, **{name: version(name) for name in _PACKAGES}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability(device)}
        found |= {"memory": torch.cuda.get_device_properties(device).total_memory, "clocks": clocks()}
    return found


_PACKAGES = ("transformers", "triton", "mamba_ssm", "causal_conv1d", "simba-fx")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def clocks() -> str | None:
    """What nvidia-smi says of the clocks now; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    done = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], capture_output=True, text=True)
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else None
