"""The commands `simba-fx bench` and `simba-fx compile-modes`. Nothing heavy is imported to parse or to help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from simba_fx.bench.options import MODES, PEERS, BenchError, Options

__all__ = ["add_commands", "bench_options", "device_of"]

_MODES = "\n".join(f"  {mode.name:18} {mode.says}" for mode in MODES.values())
_EPILOG = f"""
modes
{_MODES}

defaults   CUDA: mamba-130m, 4096 16384 65536 tokens, eager compiled cuda-graphs, bfloat16, 30 repeats
           CPU:  mamba-130m cut to 6 blocks (--layers 6), 512 2048 tokens, compiled, float32, 7 repeats

schedules are written as in Python: linear, 0.5, "Linear(0.1, every=4)", "Budget(0.6)"
"""


def add_commands(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="dense against sparse against peers: time, memory, FLOPs, parts",
        description="Time a model dense, sparse and as its peers, in turns, in one process.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _common(bench)
    add = bench.add_argument
    add("--batches", type=int, nargs="+", default=[1], metavar="B", help="rows per call (1)")
    add("--schedules", nargs="*", default=["0.5", "linear"], metavar="S", help="(0.5 linear)")
    add("--modes", nargs="+", choices=list(MODES), metavar="M", help=f"of {', '.join(MODES)}")
    add("--peers", nargs="*", choices=PEERS, metavar="P", default=[], help=f"of {', '.join(PEERS)}, at the FLOPs of "
        "the first schedule")  # fmt: skip
    add("--repeats", type=int, help="timed calls of each variant")
    add("--warmup", type=int, default=3, help="untimed calls before them (3)")
    add("--head", choices=("last", "all"), default="last", help="logits of the last token, as a prompt needs them (the "
        "default), or of all tokens")  # fmt: skip
    add("--criterion", default="simba-l2+write", metavar="C",
        help="what tokens are scored by, a span behind a slash: simba-l2/31 (simba-l2+write/15)")  # fmt: skip
    add("--original", action="store_true", help="time the model as transformers runs it as well (slow on a CPU)")
    add("--decode", type=int, default=0, metavar="N", help="generate N tokens and time each")
    add("--fresh-cache", action="store_true", help="every first call compiles with an empty cache")
    add("--flush-l2", action="store_true", help="CUDA: overwrite 256 MiB before each timed call")
    modes = commands.add_parser(
        "compile-modes", help="compile='blocks' against 'whole': seconds to compile, launches, host time",
        description="Compile a model in each way, each in a process of its own with an empty cache.",
    )  # fmt: skip
    _common(modes)
    modes.add_argument("--limit", type=float, default=600, metavar="S", help="seconds per combination (600)")
    modes.add_argument("--schedule", default="linear")
    modes.add_argument("--repeats", type=int, default=10)
    modes.add_argument("--ways", nargs="+", metavar="W", help="a selection, by the names in the table")
    for command, run in ((bench, _bench), (modes, _compile_modes)):
        command.set_defaults(run=run)


def _common(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", nargs="+", metavar="NAME", help="names (see --list), or folders with a checkpoint")
    add("--list", action="store_true", help="print the names of models, and stop")
    add("--layers", type=int, metavar="N", help="only the first N blocks of each model")
    add("--lengths", type=int, nargs="+", metavar="L", help="tokens per row")
    add("--device", help="cpu or cuda; cuda where there is one")
    add("--dtype", choices=("bfloat16", "float32", "float16"))
    add("--threads", type=int, help="threads on a CPU")
    add("--out", type=Path, default=Path("bench-out"), metavar="FOLDER", help="where results go (bench-out)")


def _list() -> int:
    from simba_fx.bench.models import NAMED

    print("\n".join(f"{name:14} {kind}, {blocks} blocks" for name, (kind, blocks, _) in NAMED.items()))
    return 0


def _bench(given: argparse.Namespace) -> int:
    if given.list:
        return _list()
    options = bench_options(given)
    options.check()
    from simba_fx.bench.plots import draw
    from simba_fx.bench.runner import Run
    from simba_fx.bench.tables import markdown

    options.out.mkdir(parents=True, exist_ok=True)
    run, status = Run(options), 0
    try:
        run()
    except KeyboardInterrupt:
        print("\nstopped: what follows is what was measured until now", file=sys.stderr)
        status = 130
    text = markdown(run.found)
    (options.out / "table.md").write_text(text)
    print(text)
    pictures = draw(run.found, options.out)
    print(f"written to {options.out}: {', '.join(('results.json', 'table.md', *pictures))}", file=sys.stderr)
    return status


def bench_options(given: argparse.Namespace) -> Options:
    """The options with the defaults of the device."""
    device = device_of(given.device)
    gpu = device == "cuda"
    models = given.model or ["mamba-130m"]
    layers = given.layers if given.model or gpu else given.layers or 6
    return Options(
        models=tuple(models),
        lengths=tuple(sorted(set(given.lengths or ((4096, 16384, 65536) if gpu else (512, 2048))))),
        batches=tuple(sorted(set(given.batches))),
        schedules=tuple(given.schedules),
        modes=tuple(given.modes or (("eager", "compiled", "cuda-graphs") if gpu else ("compiled",))),
        peers=tuple(given.peers),
        device=device,
        dtype=given.dtype or ("bfloat16" if gpu else "float32"),
        repeats=(30 if gpu else 7) if given.repeats is None else given.repeats,
        warmup=given.warmup,
        head=given.head,
        layers=layers,
        criterion=given.criterion,
        original=given.original,
        decode=given.decode,
        fresh_cache=given.fresh_cache,
        flush_l2=given.flush_l2,
        threads=given.threads,
        out=given.out,
    )


def device_of(asked: str | None) -> str:
    """Raises: BenchError where CUDA is asked for and there is none."""
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise BenchError(
            "--device cuda expects a CUDA device that torch can use; found none. Leave it out to run on the CPU."
        )
    return asked or ("cuda" if there else "cpu")


def _compile_modes(given: argparse.Namespace) -> int:
    if given.list:
        return _list()
    from simba_fx.bench import compile_modes

    return compile_modes.run(given, device_of(given.device))
