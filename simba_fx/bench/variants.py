"""What is timed beside what: the dense model, its schedules and its peers, in one mode of execution."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import simba_fx
from simba_fx.bench.measure import graphs_compiled, graphs_skipped, synchronize
from simba_fx.bench.options import BenchError, Mode, Options, parse_schedule
from simba_fx.bench.peers import Peer, peers_of

__all__ = ["FirstCall", "Variant", "compiled", "compiler_settings", "first_call", "variants_of", "wake_compiler"]


@dataclass
class Variant:
    """One row of the tables at each point."""

    name: str
    kind: str
    """"dense", "schedule", "peer" or "original"."""
    says: str
    module: Any
    """Called uncompiled: FLOPs are counted on it."""
    run: Any
    """What is timed: `module`, compiled or not."""
    peer: Peer | None = None

    def call(self, ids: Tensor, arguments: dict[str, Any], mode: Mode) -> Callable[[], object]:
        """A forward pass without gradients, of the part of `ids` that the variant is given."""
        given = ids if self.peer is None else self.peer.input(ids).contiguous()
        run = self.run

        def forward() -> object:
            with torch.no_grad():
                return run(given, **arguments)

        def replayed() -> object:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return forward()

        return replayed if mode.graphs and mode.compiled else forward

    def renew(self, mode: Mode) -> None:
        """Time the peer's module as it is now: aiming may have made another."""
        if self.peer is not None and self.peer.module is not self.module:
            self.module, self.run = self.peer.module, compiled(self.peer.module, mode)


def wake_compiler(device: torch.device) -> None:
    """Compile next to nothing: else the first variant's first call would pay for starting the compiler as well."""
    torch.compile(lambda x: x + 1)(torch.ones(8, device=device))


def compiled(module: Any, mode: Mode) -> Any:
    """`module` as the mode runs it."""
    if not mode.compiled:
        return module
    options: dict[str, Any] = {"mode": "reduce-overhead"} if mode.graphs else {}
    if mode.static:
        options["dynamic"] = False
    return torch.compile(module, **options)


def variants_of(model: Any, mode: Mode, options: Options) -> list[Variant]:
    """The dense model first; everything is over the same weights."""
    dense = simba_fx.transform(model, "dense", compile=mode.compile)  # type: ignore[arg-type]
    found = [Variant("dense", "dense", "every token enters every block", dense, compiled(dense, mode))]
    for text in options.schedules:
        schedule = parse_schedule(text)
        sparse = simba_fx.transform(model, schedule, **options.scored(), compile=mode.compile)  # type: ignore[arg-type]
        found.append(Variant(text, "schedule", repr(schedule), sparse, compiled(sparse, mode)))
    if options.original:
        says = "the model as transformers runs it, without simba_fx"
        found.append(Variant("original", "original", says, model, compiled(model, mode)))
    for peer in peers_of(model, dense, mode, options):
        run = found[0].run if peer.module is dense else compiled(peer.module, mode)
        found.append(Variant(peer.name, "peer", peer.says, peer.module, run, peer))
    if len({variant.name for variant in found}) < len(found):
        raise BenchError(f"--schedules expects each schedule once; found {', '.join(options.schedules)}.")
    return found


@dataclass(frozen=True)
class FirstCall:
    """What a first call at a point came to."""

    seconds: float
    graphs: int
    """Graphs that it compiled."""
    skipped: int
    """Times that CUDA graphs were asked for and not made."""


def first_call(call: Callable[[], object], device: torch.device, fresh_cache: bool) -> FirstCall:
    """Call once. `fresh_cache`: with a compiler cache of its own that is empty."""
    before, skipped = graphs_compiled(), graphs_skipped()
    with _fresh() if fresh_cache else nullcontext():
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        seconds = time.perf_counter() - begin
    return FirstCall(seconds, graphs_compiled() - before, graphs_skipped() - skipped)


@contextmanager
def _fresh() -> Iterator[None]:
    from torch._inductor.utils import fresh_cache

    with fresh_cache(dir=_caches(), delete=False):
        yield


@functools.cache
def _caches() -> str:
    """A folder for caches that stays until the process ends: compiled code may be loaded again."""
    folder = tempfile.mkdtemp(prefix="simba-fx-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def compiler_settings() -> Iterator[None]:
    """Many models in one process share code that Dynamo compiles once for each: none may run uncompiled unnoticed."""
    import torch._dynamo

    settings: Any = torch._dynamo.config
    limits = {"recompile_limit": 512, "accumulated_recompile_limit": 4096, "fail_on_recompile_limit_hit": True}
    with settings.patch(**limits):
        yield
