"""What the compiler says of each Triton kernel, without a GPU: `python benchmarks/kernel_counts.py`.

Needs torch and Triton. In this repository's own environment `make test` has put Triton into .venv/triton:
`PYTHONPATH=.venv/triton .venv/bin/python benchmarks/kernel_counts.py` (without that path it is looked for there, too).

Shapes are those of mamba-2.8b (D = 5120, N = 16), mamba2-2.7b (H = 80, P = 64) and Qwen3.5-9B (H = 32, K = 128), bf16,
channel-last, without padding.
Instructions are those of the loop that computes most, or of a whole kernel without one. From them: the time that
issuing a token's instructions takes an H200, and the time that its MUFU units take: at best, a launch takes the longer
of the two. States that a score leaves out because they have decayed are counted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHANNELS, HEADS, WIDTH = 5120, 80, 64
"""D of mamba-2.8b; H and P of mamba2-2.7b."""
DELTA_HEADS = 32
"""Of values, of Qwen3.5-9B; K = 128. (A walk is bound by its steps, not by what is issued.)"""

MULTIPROCESSORS, CYCLES = 132, 1.98
"""Of an H200; cycles a nanosecond."""
ISSUED, EXPONENTIALS = 4, 0.5
"""Warp instructions a cycle and multiprocessor: of all kinds; of MUFU (16 lanes for the 32 of a warp)."""

COLUMNS = (
    "kernel", "for", "warps", "registers", "spilled bytes", "shared bytes", "instructions", "of these MUFU",
    "tokens x channels", "warp instructions a token", "ns a token to issue", "ns a token of MUFU",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A launch, and what an iteration of its program's hottest loop covers: where there is none, what the program does.

    `channels` may be heads, of which each stands for `each` channels.
    """

    purpose: str
    launch: Any
    tokens: int | None = None
    channels: int = 0
    of: int = CHANNELS
    each: int = 1


def targets(checkout: Path) -> ModuleType:
    """triton_targets.py of a checkout's tests, with that checkout's operators, whatever is installed."""
    package = ModuleType("simba_fx")
    package.__path__ = [str(checkout / "simba_fx")]
    sys.modules["simba_fx"] = package
    folder = next(checkout.glob("tests/**/triton_targets.py")).parent
    sys.path += [str(folder), str(Path(sys.prefix) / "triton")]
    return importlib.import_module("triton_targets")


def catalogue(known: ModuleType) -> list[Row]:
    scan, score = known.scan, known.score
    last = known.CHANNELS
    block, ssd = scan.BLOCK_T, score.SSD_CHUNK
    return [
        Row("scan: chunks' last states", known.selective_scan(last, output=False), 1, scan.TILE),
        Row("scan: chained", known.chain()),
        Row("scan: outputs", known.selective_scan(last, output=True), 1, scan.TILE),
        Row("scan: gradients", known.selective_scan_backward(last), block, scan.BLOCK_D),
        Row("Mamba-1 score: steps", known.step_sums(score.CHUNK, clamp=False, real=False), score.CHUNK, 64),
        Row("Mamba-1 score", known.selective_score(last, real=False), 1, scan.TILE),
        Row("Mamba-2 score: steps", known.step_sums(ssd, clamp=True, real=False), ssd, 64, HEADS),
        Row("Mamba-2 score", known.ssd_score(real=False), ssd, score.SSD_HEADS, HEADS, WIDTH),
        Row("delta rule score", known.delta_reads(by_channel=False), known.delta.AHEAD, 1, DELTA_HEADS, 128),
        Row("Kimi delta score", known.delta_reads(by_channel=True), known.delta.AHEAD, 1, DELTA_HEADS, 128),
        Row("scores: steps behind chunks", known.suffix()),
        Row("convolution", known.convolution(), 32, 128),
        Row("selection", known.selection(padded=False)),
        Row("selection, padded", known.selection(padded=True)),
    ]


def cells(known: ModuleType, row: Row, capability: int) -> list[str]:
    used = known.usage(row.launch, capability, multiples=True)
    resources = (row.launch.warps, used.registers, used.stack, used.shared)
    head = [row.launch.kernel.fn.__name__, row.purpose, *map(str, resources)]
    if row.tokens is None:
        return head + ["–"] * (len(COLUMNS) - len(head))
    body = known.hottest_loop(used.sass)
    count = known.mufu(body)
    warps = row.launch.warps * -(-row.of // row.channels) / row.tokens  # that work on a token
    issue, exponentials = (
        number * warps / (MULTIPROCESSORS * CYCLES * rate)
        for number, rate in ((len(body), ISSUED), (count, EXPONENTIALS))
    )
    covered = f"{row.tokens} x {row.channels * row.each}"
    numbers = (f"{len(body) * warps:,.0f}", f"{issue:.2f}", f"{exponentials:.2f}")
    return [*head, str(len(body)), str(count), covered, *numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[90], help="80: A100, 90: H100, H200")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose kernels; its tests have a triton_targets.py")
    options = parser.parse_args()
    known = targets(options.checkout.resolve())
    for capability in options.capability:
        print(f"\nsm_{capability}, Triton {known.triton.__version__}\n")
        print(f"| {' | '.join(COLUMNS)} |")
        print(f"|{'---|' * 2}{'---:|' * (len(COLUMNS) - 2)}")
        for row in catalogue(known):
            print(f"| {' | '.join(cells(known, row, capability))} |", flush=True)


if __name__ == "__main__":
    main()
