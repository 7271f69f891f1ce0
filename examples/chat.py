"""A conversation in two turns: the second goes on from the cache of the first, instead of reading everything again.

    python examples/chat.py [--first 4096] [--second 512]

The first turn is source text that the checkpoint has not seen, the second some more of it. The new tokens are pruned
among themselves; what the first turn kept lives in the states. Beside the times stand the losses of the last 100 bytes:
of the dense model on the whole conversation, of the pruned one on the whole, and of the pruned one turn by turn.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from demo import in_turns
from real_text import windows
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, MambaForCausalLM

import simba_fx

HERE = Path(__file__).parent
LAST = 100
CACHE = next(name for name in ("cache", "cache_params") if name in signature(MambaForCausalLM.forward).parameters)
"""What this version of transformers calls it."""


def call(model: Any, ids: Tensor, cache: Any) -> Any:
    """Logits of the last bytes; the cache is filled in place."""
    with torch.no_grad(), simba_fx.tail(model, LAST):
        return model(ids, use_cache=True, logits_to_keep=LAST, **{CACHE: cache}).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=4096, help="bytes of the first turn")
    parser.add_argument("--second", type=int, default=512, help="bytes of the second")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--windows", type=int, default=8, help="conversations whose loss is read")
    options = parser.parse_args()
    model = MambaForCausalLM.from_pretrained(HERE / "mamba-py-3m").eval()
    dense, sparse = simba_fx.transform(model, "dense"), simba_fx.transform(model)

    def new() -> Any:
        return DynamicCache(config=model.config)

    def loss(logits: Tensor, ids: Tensor) -> float:
        return float(cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, -LAST + 1 :]))

    rows = windows(options.windows, options.first + options.second)
    losses: dict[str, list[float]] = {"dense, whole": [], "pruned, whole": [], "pruned, in turns": []}
    for row in rows:
        ids = row[None]
        losses["dense, whole"].append(loss(call(dense, ids, new()), ids))
        losses["pruned, whole"].append(loss(call(sparse, ids, new()), ids))
        cache = new()
        call(sparse, ids[:, : options.first], cache)
        losses["pruned, in turns"].append(loss(call(sparse, ids[:, options.first :], cache), ids))
    ids, cache = rows[:1], new()
    call(sparse, ids[:, : options.first], cache)
    times = in_turns({
        "dense, whole": lambda: call(dense, ids, new()),
        "pruned, whole": lambda: call(sparse, ids, new()),
        "pruned, in turns": lambda: call(sparse, ids[:, options.first :], copy.deepcopy(cache)),
    }, options.repeats)  # fmt: skip
    print(f"a second turn of {options.second} bytes after {options.first}; {options.repeats} calls in turns, eager, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; loss over {len(rows)} texts\n")  # fmt: skip
    base = torch.tensor(losses["dense, whole"])
    for name, values in times.items():
        more = torch.tensor(losses[name]) - base
        error = more.std() / len(more) ** 0.5
        middle, least, most = (1e3 * of(values) for of in (statistics.median, min, max))
        print(f"{name:18}{middle:8.1f} ms ({least:.1f} to {most:.1f})   "
              f"loss - dense {more.mean():+.4f} ± {error:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
