"""One way of compiling a model, in a process of its own: reads a request from stdin, prints a JSON line per finding.

`simba-fx compile-modes` starts it with an empty compiler cache and stops it when its time is up; what it has printed by
then is kept.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import simba_fx
from simba_fx.bench import measure, models, results
from simba_fx.bench.options import MODES, Mode, parse_schedule
from simba_fx.bench.runner import DTYPES
from simba_fx.bench.variants import Variant, compiler_settings, first_call


def tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def main() -> None:
    asked = json.load(sys.stdin)
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    models.quiet()
    with compiler_settings():
        _measure(asked, torch.device(asked["device"]))


def _measure(asked: dict[str, Any], device: torch.device) -> None:
    model = models.build(asked["model"], device, DTYPES[asked["dtype"]], asked["layers"])
    tell(blocks=model.config.num_hidden_layers)
    begin = time.perf_counter()
    plan = "dense" if asked["dense"] else parse_schedule(asked["schedule"])
    module = simba_fx.transform(model, plan, compile=asked["compile"])
    short, long = ([torch.randint(1, model.config.vocab_size, (1, length)).to(device)] for length in asked["lengths"])
    arguments = {"use_cache": False, "logits_to_keep": 1}
    with torch.no_grad():
        module(*short, **arguments)  # captures what is compiled; counted as transforming
    measure.synchronize(device)
    tell(transform_seconds=time.perf_counter() - begin)
    options: dict[str, Any] = {"dynamic": asked["dynamic"]} | ({"mode": "reduce-overhead"} if asked["graphs"] else {})
    mode = MODES["cuda-graphs" if asked["graphs"] else "compiled"]
    variant = Variant("", "schedule", "", module, torch.compile(module, **options))
    calls = {name: variant.call(ids[0], arguments, mode) for name, ids in (("short", short), ("long", long))}
    for name, call in calls.items():
        first = first_call(call, device, fresh_cache=False)  # the process has an empty cache
        tell(**{f"first_{name}_seconds": first.seconds, f"graphs_{name}": first.graphs})
    for call in calls.values():
        for _ in range(3):
            call()
    _steady(calls, mode, asked["repeats"], device)


def _steady(calls: dict[str, Any], mode: Mode, repeats: int, device: torch.device) -> None:
    """Launches, host time and time per forward, once everything is compiled."""
    tell(host_seconds=results.spread([_host(calls["short"], device) for _ in range(repeats)]))
    tell(launches=_launches(calls["short"], device))
    seconds = measure.in_turns(calls, repeats, measure.stopwatch(device))
    tell(**{f"{name}_seconds": results.spread(times) for name, times in seconds.items()})
    tell(cuda_graphs_skipped=measure.graphs_skipped() if mode.graphs else None)


def _host(call: Any, device: torch.device) -> float:
    """Seconds until a call returns, without waiting for a GPU."""
    measure.synchronize(device)
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    measure.synchronize(device)
    return seconds


def _launches(call: Any, device: torch.device) -> int:
    """CUDA: launches of kernels and of graphs; CPU: operators called, not counting those that operators call."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, acc_events=True) as seen:
        call()
        measure.synchronize(device)
    events: Any = seen.events()
    if device.type == "cuda":
        return sum("LaunchKernel" in event.name or "GraphLaunch" in event.name for event in events)
    return sum(_is_operator(event) and not _inside_operator(event) for event in events)


def _is_operator(event: Any) -> bool:
    name: str = event.name
    return name.startswith(("aten::", "simba_fx::", "mkl::", "mkldnn::"))


def _inside_operator(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent):
            return True
        parent = parent.cpu_parent
    return False


if __name__ == "__main__":
    main()
