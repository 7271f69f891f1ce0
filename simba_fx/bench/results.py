"""Numbers from times: spread, figure of merit, crossover. Plain Python over plain lists."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["crossover", "crossovers", "merit", "save", "speeds", "spread"]

Row = dict[str, Any]
"""One variant at one point: model, mode, batch, length, name, seconds, FLOPs."""


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and most, in seconds (linear interpolation between the sorted times)."""
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "median": statistics.median(seconds),
        "q1": first,
        "q3": third,
        "min": min(seconds),
        "max": max(seconds),
    }


def merit(dense_time: float, time: float, dense_flops: int, flops: int) -> float:
    """(dense time / time) / (dense FLOPs / FLOPs): 1 where a call is as much faster as its FLOPs promise."""
    return (dense_time / time) / (dense_flops / flops)


def speeds(row: Row, dense: Row) -> dict[str, float]:
    """What a row is against the dense row of the same point.

    Returns:
        `speedup`: the ratio of the medians; `speedup_low`, `speedup_high`: dense's quartiles over the opposite ones of
        this row; `promise`: dense FLOPs over this one's, without the scorer; `promise_with_scorer`; `merit` and
        `merit_with_scorer`: speed-up over either promise. FLOPs include the head as the call computes it.
    """
    times = dense["time"]["median"], row["time"]["median"]
    whole, flops = dense["flops"]["total"], row["flops"]
    scored = flops["total"] + flops["scorer"]
    return {
        "speedup": times[0] / times[1],
        "speedup_low": dense["time"]["q1"] / row["time"]["q3"],
        "speedup_high": dense["time"]["q3"] / row["time"]["q1"],
        "promise": whole / flops["total"],
        "promise_with_scorer": whole / scored,
        "merit": merit(*times, whole, flops["total"]),
        "merit_with_scorer": merit(*times, whole, scored),
    }


def crossover(speedups: Mapping[int, float]) -> int | None:
    """The shortest measured length from which on every measured length is faster than dense; None: there is none."""
    found = None
    for length in sorted(speedups, reverse=True):
        if speedups[length] <= 1:
            break
        found = length
    return found


def crossovers(rows: Iterable[Row]) -> list[Row]:
    """For each variant of each model, mode and batch its crossover length."""
    groups: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if "speedup" in row:
            key = row["model"], row["mode"], row["batch"], row["name"]
            groups.setdefault(key, {})[row["length"]] = row["speedup"]
    names = ("model", "mode", "batch", "name")
    return [
        {**dict(zip(names, key)), "length": crossover(found), "measured": sorted(found)}
        for key, found in groups.items()
    ]


def save(results: Mapping[str, Any], path: Path) -> None:
    """Written beside its place and moved there: an interrupted run leaves the file before or the file after."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    os.replace(part, path)
