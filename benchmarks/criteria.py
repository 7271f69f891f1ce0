"""Loss of the last 100 bytes on real text, by criterion, at equal counts: `python benchmarks/criteria.py`.

The checkpoint is examples/mamba-py-3m, the text Python source that it was not trained on, the protected tail the 100
bytes whose loss is read. Beside pruning inside the model stands plain left truncation to the same mean share.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MambaForCausalLM

import simba_fx

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from real_text import windows  # noqa: E402  # a script beside the other examples, not a package

CRITERIA = ("simba", "simba-abs", "no-decay", "delta-norm", "clip", "random", "stride", "recent")
SCORED = 100


def last_losses(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Mean loss in nats of each row's last `SCORED` bytes."""
    with torch.no_grad():
        logits = model(rows[:, :-1], use_cache=False).logits[:, -SCORED:]
    return cross_entropy(logits.transpose(1, 2), rows[:, -SCORED:], reduction="none").mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--finals", type=float, nargs="+", default=[0.1, 0.3])
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MambaForCausalLM.from_pretrained(EXAMPLES / "mamba-py-3m").eval()
    rows = windows(options.windows, options.length + 1)
    dense = last_losses(simba_fx.transform(model, "dense"), rows)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}; {options.windows} windows of ",
        end="",
    )
    print(f"{options.length} bytes; dense loss {dense.mean():.4f} nats per byte; differences ± standard error\n")
    print("| final share (mean) | " + " | ".join(CRITERIA) + " | left truncation |")
    print("|---" * (len(CRITERIA) + 2) + "|")
    for final in options.finals:
        cells = []
        for criterion in CRITERIA:
            sparse = simba_fx.transform(model, simba_fx.Linear(final), criterion=criterion)
            with simba_fx.tail(sparse, SCORED):
                cells.append(last_losses(sparse, rows) - dense)
        mean = sum(map(float, simba_fx.program(sparse).shares)) / 12
        cells.append(last_losses(simba_fx.transform(model, "dense"), rows[:, -int(mean * options.length) :]) - dense)
        text = (f"{cell.mean():+.3f} ± {cell.std() / len(cell) ** 0.5:.3f}" for cell in cells)
        print(f"| {final:.2f} ({mean:.2f}) | " + " | ".join(text) + " |", flush=True)


if __name__ == "__main__":
    main()
