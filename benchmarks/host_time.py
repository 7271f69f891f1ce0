"""What a prompt costs in Python: a sparse model's call against the operators of its graph alone.

A Mamba of 64 blocks and a width of 16, so that nearly everything is Python and dispatch. Everything is kept, in both:
the same operators run. The difference is the runtime's own: what looks at the call and at the model, the blocks with
their hooks, and under torch.compile the guards. `--backend eager` compiles without a code generator.

    python benchmarks/host_time.py [--blocks 64] [--repeats 40] [--compiled]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import MambaConfig, MambaModel

import simba_fx


def spread(milliseconds: list[float]) -> str:
    low, middle, high = statistics.quantiles(milliseconds, n=4)
    return f"{middle:7.2f} ms ({low:.2f} to {high:.2f})"


def side_by_side(repeats: int, *runs: Callable[[], object]) -> list[list[float]]:
    """Milliseconds of processor time of each, taken in turns after five rounds of warm-up."""
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 5):
        for run, times in zip(runs, found, strict=True):
            begun = time.process_time()
            run()
            if turn >= 5:
                times.append(1000 * (time.process_time() - begun))
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--compiled", action="store_true", help="torch.compile(sparse, backend='eager') as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=options.blocks,
                         time_step_rank=2, use_cache=False)  # fmt: skip
    model = MambaModel(config).eval()
    ids = torch.randint(1, 50, (1, 16))
    begun = time.process_time()
    sparse = simba_fx.transform(model, "dense")
    first = time.process_time() - begun
    others = []
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        begun = time.process_time()
        simba_fx.transform(model, simba_fx.Linear(share))
        others.append(time.process_time() - begun)
    print(f"{options.blocks} blocks, (1, 16) tokens, torch {torch.__version__}, one thread, processor time")
    print(f"first transform     {first:7.2f} s")
    print(f"another schedule    {statistics.median(others):7.2f} s ({min(others):.2f} to {max(others):.2f}, six ramps)")
    flat = simba_fx.transform(model, "dense", compile="whole")
    flat(ids)
    graph, embeds = simba_fx.program(flat).program, model.embeddings(ids)
    runs: dict[str, Callable[[], object]] = {
        "dense model": lambda: model(ids),
        "operators alone": lambda: graph.forward(embeds, 1),
        "sparse model": lambda: sparse(ids),
    }
    if options.compiled:
        compiled = torch.compile(sparse, backend="eager")
        runs["compiled blocks"] = lambda: compiled(ids)
    times = dict(zip(runs, side_by_side(options.repeats, *runs.values()), strict=True))
    for name, found in times.items():
        print(f"{name:20}{spread(found)}")
    for name in ("sparse model", "compiled blocks"):
        if name in times:
            own = statistics.median(times[name]) - statistics.median(times["operators alone"])
            print(f"runtime's own, {name}: {own:.2f} ms, {1000 * own / options.blocks:.0f} µs a block")


if __name__ == "__main__":
    main()
