"""Stage g: which kernel takes what, how many are launched, and what a call costs in Python. Tables: profile.txt.

"original" is the transformers model itself under torch.compile, without simba_fx, compiled for each length. It is left
out where it has no kernels of mamba_ssm: its scan is then a loop over tokens, which a compiler unrolls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from common import DEVICE, DRY, OUT, add_mamba, attempt, host_us, synchronize, time_us
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import simba_fx
from simba_fx.bench import models, options

MODELS = {"mamba-tiny": (24, 12)} if DRY else {"mamba-2.8b": (8192, 2048), "mamba2-2.7b": (8192, 2048)}
SCHEDULES = ("dense", "linear", "Linear(0.1, every=4)")
LISTED = 28
"""Kernels in a table."""


def forward(run: Callable[..., object], ids: Tensor) -> object:
    with torch.no_grad():
        return run(ids, use_cache=False, logits_to_keep=1)


def measured(name: str, length: int, variant: str, blocks: int, call: Callable[[], object]) -> dict[str, Any]:
    for _ in range(3):
        call()
    synchronize()
    us, host = time_us(call), host_us(call, 8)
    activities = [ProfilerActivity.CPU] if DRY else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled:
        call()
        synchronize()
    key = "self_cpu_time_total" if DRY else "self_device_time_total"
    events = [(getattr(event, key), event) for event in profiled.key_averages()]
    kernels = [(took, event) for took, event in events if took > 0 and (DRY or event.device_type.name == "CUDA")]
    kernels.sort(key=lambda found: -found[0])
    busy, launches = sum(took for took, _ in kernels), sum(event.count for _, event in kernels)
    with (OUT / "profile.txt").open("a") as table:
        print(f"\n== {name}, {length} tokens, {variant}: {us:.0f} us by events, {busy:.0f} us in {launches} kernels, "
              f"Python {host:.0f} us", file=table)  # fmt: skip
        for took, event in kernels[:LISTED]:
            share = 100 * took / busy
            print(f"{took:10.0f} us {share:5.1f} %  x{event.count:<4d} {event.key[:150]}", file=table)
    return {"blocks": blocks, "us": us, "host_us": host, "kernels_us": busy, "launches": launches, "busy": busy / us}


def main() -> None:
    if not DRY:
        add_mamba()
    variants = SCHEDULES if find_spec("mamba_ssm") is None and not DRY else (*SCHEDULES, "original")
    for name, lengths in MODELS.items():
        model = models.build(name, DEVICE, torch.float32 if DRY else torch.bfloat16, 6 if DRY else 8)
        blocks = model.config.num_hidden_layers
        for variant in variants:
            torch._dynamo.reset()
            if variant == "original":
                run = torch.compile(model, dynamic=False)
            else:
                schedule = variant if variant == "dense" else options.parse_schedule(variant)
                run = torch.compile(simba_fx.transform(model, schedule, criterion="simba"))
            for length in lengths:
                ids = torch.randint(1, model.config.vocab_size, (1, length), device=DEVICE)
                check = partial(measured, name, length, variant, blocks, partial(forward, run, ids))
                attempt(f"profile {name}", check, need=12, L=length, schedule=variant)


if __name__ == "__main__":
    main()
