"""The loop of `simba-fx bench`: models, modes, batches, lengths; every point is on disk as soon as it is measured."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import simba_fx
from simba_fx.bench import measure, models, parts, results
from simba_fx.bench.decoding import decode
from simba_fx.bench.options import MODES, Mode, Options
from simba_fx.bench.peers import dense_flops, measured_flops
from simba_fx.bench.variants import FirstCall, Variant, compiler_settings, first_call, variants_of, wake_compiler

__all__ = ["DTYPES", "Run"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass
class Run:
    """One run: what was asked, and what has been measured so far."""

    options: Options
    found: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)
    point: int = 0

    def __post_init__(self) -> None:
        self.device = torch.device(self.options.device)
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        o = self.options
        self.points = len(o.models) * len(o.modes) * len(o.batches) * len(o.lengths)

    def __call__(self) -> dict[str, Any]:
        models.quiet()
        self.found = {
            "environment": measure.environment(self.device),
            "options": self.options.to_dict(),
            "models": {},
            "rows": [],
            "decode": [],
            "crossover": [],
        }
        with compiler_settings():
            for name in self.options.models:
                self._model(name)
        self.save()
        return self.found

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begun:6.1f} s] {text}", file=sys.stderr, flush=True)

    def save(self) -> None:
        self.found["crossover"] = results.crossovers(self.found["rows"])
        results.save(self.found, self.options.out / "results.json")

    def _model(self, name: str) -> None:
        o = self.options
        self.say(f"{name}: making the model ({o.dtype}, {o.device})")
        model = models.build(name, self.device, DTYPES[o.dtype], o.layers)
        name = models.title(name)
        self.found["models"][name] = {
            "class": type(model).__name__,
            "blocks": model.config.num_hidden_layers,
            "parameters": models.weights(model),
        }
        if any(MODES[mode].compiled for mode in o.modes):
            wake_compiler(self.device)
        for mode in o.modes:
            torch._dynamo.reset()
            self._mode(model, name, MODES[mode])
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if o.decode:
            self.say(f"{name}: decoding {o.decode} tokens after {o.lengths[-1]}")
            self.found["decode"] += decode(model, name, self._ids(model, o.batches[0], o.lengths[-1]), o)
            self.save()

    def _ids(self, model: Any, rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(1, model.config.vocab_size, (rows, length), generator=generator).to(self.device)

    def _mode(self, model: Any, name: str, mode: Mode) -> None:
        self.say(f"{name}, {mode.name}: transforming")
        variants = variants_of(model, mode, self.options)
        seen: set[str] = set()
        for rows in self.options.batches:
            for length in self.options.lengths:
                self.point += 1
                title = f"point {self.point} of {self.points}: {name}, {mode.name}, {rows} x {length} tokens"
                self.say(title)
                point = {"model": name, "mode": mode.name, "batch": rows, "length": length}
                try:
                    measured = self._point(variants, self._ids(model, rows, length), mode, seen)
                    self.found["rows"] += [point | row for row in measured]
                except torch.OutOfMemoryError as error:
                    self.say(f"  out of memory: {str(error).splitlines()[0]}")
                    self.found["rows"].append(point | {"name": "all", "kind": "error", "error": "out of memory"})
                    torch.cuda.empty_cache()
                self.save()

    def _point(self, variants: list[Variant], ids: Tensor, mode: Mode, seen: set[str]) -> list[results.Row]:
        """One row per variant: counted, compiled where that is new, then timed in turns."""
        arguments = {"use_cache": False, "logits_to_keep": 1 if self.options.head == "last" else 0}
        if mode.static:
            torch._dynamo.reset()
        rows = {variant.name: self._counted(variant, variants, ids, arguments, mode) for variant in variants}
        self._aim(variants, rows, ids, arguments, mode)
        calls = {variant.name: variant.call(ids, arguments, mode) for variant in variants}
        for variant in variants:
            self.say(f"  {variant.name}: first call")
            call = calls[variant.name]
            known = variant.name in seen
            first = first_call(call, self.device, self.options.fresh_cache and (mode.static or not known))
            rows[variant.name] |= _compilation(first, mode, known)
            seen.add(variant.name)
            for _ in range(self.options.warmup):
                call()
        measure.synchronize(self.device)
        before = measure.graphs_compiled()
        watch = measure.stopwatch(self.device, self.options.flush_l2)
        seconds = measure.in_turns(calls, self.options.repeats, watch, self._round)
        print(file=sys.stderr)
        late = measure.graphs_compiled() - before
        for variant in variants:
            row, call = rows[variant.name], calls[variant.name]
            row |= {"seconds": seconds[variant.name], "time": results.spread(seconds[variant.name])}
            row["graphs_while_timed"] = late
            row["peak_bytes"] = None if mode.graphs else measure.peak_memory(call, self.device)
            if variant.kind in ("dense", "schedule"):
                row["shares"] = parts.shares(call, self.device)
        dense = rows["dense"]
        for row in rows.values():
            row |= results.speeds(row, dense)
        return list(rows.values())

    def _round(self, turn: int) -> None:
        print(f"\r{'':11}round {turn} of {self.options.repeats}", end="", file=sys.stderr, flush=True)

    def _counted(self, variant: Variant, variants: list[Variant], ids: Tensor, arguments: dict[str, Any],
                 mode: Mode) -> results.Row:  # fmt: skip
        """The row's beginning: what it is, and its FLOPs. Peers are counted after they are aimed."""
        row: results.Row = {"name": variant.name, "kind": variant.kind, "says": variant.says}
        if variant.kind in ("dense", "schedule"):
            report = simba_fx.report(variant.module, ids, **arguments)
            row["flops"] = {
                "total": report.total.sparse,
                "scorer": report.total.scorer,
                "without_head": report.stack.sparse,
            }
            row["mean_share"] = report.mean_share
        elif variant.kind == "original":
            dense = simba_fx.report(variants[0].module, ids, **arguments)
            row["flops"] = {"total": dense.total.dense, "scorer": 0, "without_head": dense.stack.dense}
        return row

    def _aim(self, variants: list[Variant], rows: dict[str, results.Row], ids: Tensor, arguments: dict[str, Any],
             mode: Mode) -> None:  # fmt: skip
        """Every peer gets the FLOPs of the first schedule, scorer included."""
        peers = [variant for variant in variants if variant.peer is not None]
        if not peers:
            return
        flops = dense_flops(variants[0].module, ids, arguments)
        first = rows[next(variant.name for variant in variants if variant.kind == "schedule")]
        target = first["flops"]["total"] + first["flops"]["scorer"]
        for variant in peers:
            assert variant.peer is not None
            rows[variant.name]["aim"] = variant.peer.aim(flops, ids, target)
            rows[variant.name]["target_flops"] = target
            variant.renew(mode)
            given = variant.peer.input(ids)
            if variant.name == "delta-norm":
                total = simba_fx.report(variant.module, given, **arguments).total
                rows[variant.name]["flops"] = {"total": total.sparse, "scorer": total.scorer}
            else:
                counted = measured_flops(lambda module=variant.module, given=given: module(given, **arguments))  # type: ignore[misc]
                rows[variant.name]["flops"] = {"total": counted, "scorer": 0}


def _compilation(first: FirstCall, mode: Mode, known: bool) -> dict[str, Any]:
    """`recompiles`: graphs compiled at this point by a variant that had been called before, where one compilation
    should serve every length; None where each length is compiled by design, and at a variant's first point."""
    return {
        "first_call_seconds": first.seconds,
        "graphs": first.graphs,
        "recompiles": first.graphs if mode.compiled and not mode.static and known else None,
        "cuda_graphs_skipped": first.skipped if mode.graphs else None,
    }
