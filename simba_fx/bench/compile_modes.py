"""`simba-fx compile-modes`: what each way of compiling costs, and what it runs like afterwards."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simba_fx.bench.models import check_model, title
from simba_fx.bench.options import BenchError, parse_schedule
from simba_fx.bench.results import save
from simba_fx.bench.tables import in_ms, table

__all__ = ["WAYS", "Way", "run"]


@dataclass(frozen=True)
class Way:
    """One way of compiling."""

    name: str
    dense: bool
    compile: str
    dynamic: bool | None
    """`torch.compile(dynamic=...)`; None as torch chooses: compile='blocks' marks lengths as dynamic by itself."""
    graphs: bool


def _ways() -> dict[str, Way]:
    plain = [
        Way(f"{side}-{name}", side == "dense", name.split("-")[0], dynamic, False)
        for side in ("dense", "sparse")
        for name, dynamic in (("blocks", None), ("whole-static", False), ("whole-dynamic", True))
    ]
    graphs = [Way(f"{w.name}-cuda-graphs", w.dense, w.compile, w.dynamic, True) for w in plain if not w.dynamic]
    return {way.name: way for way in (*plain, *graphs)}


WAYS = _ways()


def run(given: argparse.Namespace, device: str) -> int:
    """Measure every way that is asked for; a row is on disk as soon as it is there."""
    import torch

    from simba_fx.bench.measure import environment

    asked, ways = request(given, device)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"environment": environment(torch.device(device)), "options": asked, "rows": []}
    for number, way in enumerate(ways, 1):
        print(f"{number} of {len(ways)}: {way.name}, at most {given.limit:g} s", file=sys.stderr, flush=True)
        found["rows"].append({"way": way.name, **measure_way(asked | asdict(way), given.limit)})
        save(found, given.out / "compile-modes.json")
    text = markdown(found)
    (given.out / "compile-modes.md").write_text(text)
    print(text)
    return 0


def request(given: argparse.Namespace, device: str) -> tuple[dict[str, Any], list[Way]]:
    """What a child is asked, less the way. Raises: BenchError for options that cannot be."""
    gpu = device == "cuda"
    models = given.model or ["mamba-2.8b" if gpu else "mamba-130m"]
    lengths = given.lengths or ([1024, 16384] if gpu else [32, 512])
    if len(models) != 1:
        raise BenchError(f"compile-modes measures one model; found {', '.join(models)}. Name one.")
    if len(lengths) != 2 or not 2 <= lengths[0] < lengths[1]:
        raise BenchError(f"compile-modes expects --lengths SHORT LONG; found {' '.join(map(str, lengths))}.")
    if given.limit <= 0 or given.repeats < 2:
        raise BenchError("compile-modes expects a --limit above 0 seconds and at least 2 --repeats.")
    if unknown := [name for name in given.ways or () if name not in WAYS]:
        raise BenchError(f"--ways expects some of {', '.join(WAYS)}; found {unknown[0]!r}.")
    if not gpu and (graphs := [name for name in given.ways or () if WAYS[name].graphs]):
        raise BenchError(f"--ways {graphs[0]} needs a CUDA device; found {device}. Leave it out.")
    check_model(models[0], given.layers)
    parse_schedule(given.schedule)
    asked = {
        "model": models[0],
        "layers": given.layers if given.model or gpu else given.layers or 6,
        "lengths": lengths,
        "device": device,
        "dtype": given.dtype or ("bfloat16" if gpu else "float32"),
        "schedule": given.schedule,
        "repeats": given.repeats,
        "threads": given.threads,
        "limit": given.limit,
    }
    return asked, [way for way in WAYS.values() if (way.name in given.ways if given.ways else gpu or not way.graphs)]


def measure_way(asked: dict[str, Any], limit: float) -> dict[str, Any]:
    """What a child with an empty cache found within `limit` seconds; `stopped` says that it was not done."""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as told:
        places = {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "inductor"),
            "TRITON_CACHE_DIR": str(Path(cache) / "triton"),
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "simba_fx.bench.compile_child"], stdin=subprocess.PIPE, stdout=told, text=True,
            env=os.environ | places, start_new_session=True,
        )  # fmt: skip
        stopped = False
        try:
            child.communicate(json.dumps(asked), timeout=limit)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            if child.poll() is None:  # its compile workers with it: the session is its own
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        told.seek(0)
        found: dict[str, Any] = {"stopped": stopped, "exit": child.returncode}
        for line in told.read().splitlines():
            if line.startswith("{") and line.endswith("}"):
                found |= json.loads(line)
    return found


_COLUMNS = ("way", "transform, s", "first result, s", "graphs", "first call at the long length, s", "graphs",
            "launches", "host ms", "ms, short", "ms, long")  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    options, where = found["options"], found["environment"]
    launches = "kernel and graph launches" if where["device"] == "cuda" else "operators called"
    host = (
        "until the call returns, at the short length" if where["device"] == "cuda" else "of a call at the short length"
    )
    blocks = next((row["blocks"] for row in found["rows"] if "blocks" in row), "?")
    return "\n".join([
        "# simba-fx compile-modes", "",
        f"* machine: {where['machine']}; {where['date']}; torch {where['versions']['torch']}; {options['dtype']}",
        f"* {title(options['model'])}, {blocks} blocks, batch 1, lengths {options['lengths'][0]:,} (short) and "
        f"{options['lengths'][1]:,} (long), schedule {options['schedule']}, logits of the last token",
        "* every row in a process of its own with an empty compiler cache; medians (quartiles; min … max)",
        "* rows ran one after the other, not in turns: to compare speeds, use simba-fx bench",
        f"* launches: {launches} per forward at the short length; host ms: {host}", "",
        *table(_COLUMNS, [_cells(row, options["limit"]) for row in found["rows"]], left=1), "",
    ])  # fmt: skip


def _cells(row: dict[str, Any], limit: float) -> list[str]:
    late = f"> {limit:g}" if row["stopped"] else f"failed ({row['exit']})" if row["exit"] else "–"
    told: list[str] = [row["way"]]
    for name in ("transform_seconds", "first_short_seconds", "graphs_short", "first_long_seconds", "graphs_long",
                 "launches", "host_seconds", "short_seconds", "long_seconds"):  # fmt: skip
        if name not in row:
            told.append(late)
            late = ""
        elif isinstance(row[name], dict):
            told.append(in_ms(row[name]))
        else:
            told.append(str(row[name]) if isinstance(row[name], int) else f"{row[name]:.1f}")
    return told
