"""Which part of a forward pass takes which share of its time: scores, selection, gathers, scans, convolutions, GEMMs.

CPU: the self time of every operator goes to the nearest operator around it that has a part of its own (a sort inside
`simba_fx::select_tokens` is selection). CUDA: the time of every kernel goes by its name, else by the operator that
launched it. What Inductor fused cannot be taken apart: the gather of the survivors is read inside the next norm's
kernel and is then part of "fused and other".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from simba_fx.bench.measure import Call, synchronize

PARTS = ("GEMM", "scan", "convolution", "score", "select", "gather, restore", "fused and other")
"""In the order of the picture, from the bottom up."""

_PATTERNS = (  # the first that is found; names of operators and of kernels
    ("score", r"token_score|position_score|protect_tokens|[_:]score|step_sums|suffix_kernel"),
    ("select", r"simba_fx::select_|select_tokens|select_real_tokens|radix|bitonic|topk|select_kernel"),
    ("gather, restore", r"take_tokens|restore_tokens|take_square|row_positions|aten::index\b|aten::index_put|gather"
                        r"|scatter|index_elementwise|index_kernel"),
    ("convolution", r"causal_conv1d|aten::_?conv"),
    ("scan", r"selective_scan|ssd_scan|chunk_scan|chunk_state|chunk_cumsum|state_passing|bmm_chunk|ssd_|chain_kernel"),
    ("GEMM", r"aten::(addmm|mm|bmm|baddbmm|_grouped_mm)\b|mkl_linear|linear_pointwise|gemm|cutlass|xmma|nvjet|cublas"
             r"|_scaled_dot_product|flash_fwd|fmha|extern_kernels"),
)  # fmt: skip


def part_of(name: str) -> str | None:
    """The part that an operator or a kernel of this name belongs to; None: its surroundings decide."""
    return next((part for part, pattern in _PATTERNS if re.search(pattern, name)), None)


def shares(call: Call, device: torch.device) -> dict[str, float]:
    """Share of each part in one call of `call`, adding to 1: of operators' time (CPU) or of kernels' (CUDA)."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as seen:
        call()
        synchronize(device)
    events: Any = seen.events()
    found = _kernels(events) if device.type == "cuda" else _operators(events)
    total = sum(found.values())
    return {part: found.get(part, 0.0) / total for part in PARTS} if total else {}


def _around(event: FunctionEvent | None) -> str:
    """The part of an operator, or of the nearest one around it that has one."""
    while event is not None:
        if (part := part_of(event.name)) is not None:
            return part
        event = event.cpu_parent
    return PARTS[-1]


def _operators(events: Iterable[Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for event in events:
        if event.device_type.name == "CPU":
            part = _around(event)
            found[part] = found.get(part, 0.0) + event.self_cpu_time_total
    return found


def _kernels(events: Iterable[Any]) -> dict[str, float]:
    """Kernels by name; those without a part by the operator that launched them, where the profiler knows it."""
    found: dict[str, float] = {}
    unnamed: dict[str, float] = {}
    launched: list[tuple[str, str, float]] = []
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:  # those span kernels
            part = part_of(event.name)
            books, key = (unnamed, event.name) if part is None else (found, part)
            books[key] = books.get(key, 0.0) + event.self_device_time_total
        elif event.device_type.name == "CPU":
            launched += [(_around(event), kernel.name, kernel.duration) for kernel in event.kernels]
    for part, name, duration in launched:
        if name in unnamed:
            unnamed[name] -= duration
            found[part] = found.get(part, 0.0) + duration
    left = max(0.0, sum(unnamed.values()))  # replayed by a CUDA graph: nobody launched them
    found[PARTS[-1]] = found.get(PARTS[-1], 0.0) + left
    return found
