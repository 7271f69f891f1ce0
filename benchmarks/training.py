"""Memory and time of a training step, dense and sparse: `python benchmarks/training.py`.

Memory is what autograd keeps for backward, in bytes, each storage counted once and the weights left out: exact and the
same in every run. Time is that of forward and backward, in turns, medians after a warm-up. The dense side runs the
same operators as the sparse one (`schedule="dense"`); transformers' own scan on a CPU is a loop over tokens.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MambaForCausalLM

import simba_fx

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from real_text import windows  # noqa: E402  # a script beside the other examples, not a package


def kept_for_backward(model: nn.Module, step: Callable[[], Tensor]) -> int:
    """Bytes that autograd holds when the forward is over."""
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


def recomputing(model: nn.Module) -> nn.Module:
    for block in model.base_model.layers:
        block.gradient_checkpointing = True
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = MambaForCausalLM.from_pretrained(EXAMPLES / "mamba-py-3m").train()
    ids = windows(options.rows, options.length)
    variants = {
        "dense": simba_fx.transform(model, "dense"),
        "linear to 10 %": simba_fx.transform(model, "linear", criterion="simba"),
        "dense, recomputed": recomputing(simba_fx.transform(model, "dense")),
        "linear to 10 %, recomputed": recomputing(simba_fx.transform(model, "linear", criterion="simba")),
    }

    def step(variant: nn.Module) -> Callable[[], Tensor]:
        return lambda: variant(input_ids=ids, labels=ids).loss

    memory, seconds = {}, {name: [] for name in variants}
    for name, variant in variants.items():
        memory[name] = kept_for_backward(variant, step(variant))
    for repeat in range(options.repeats + 1):
        print(f"\rround {repeat} of {options.repeats}", end="", file=sys.stderr)
        for name, variant in variants.items():
            start = time.perf_counter()
            step(variant)().backward()
            variant.zero_grad(set_to_none=True)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    print(file=sys.stderr)
    print(f"{options.rows} rows of {options.length} tokens, float32; {platform.processor() or platform.machine()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, eager, kernels='auto'\n")  # fmt: skip
    print("| | kept for backward, MiB | of dense | forward and backward, ms (min … max) | of dense |")
    print("|---|---|---|---|---|")
    dense_time = statistics.median(seconds["dense"])
    for name in variants:
        times = [1000 * second for second in seconds[name]]
        median = statistics.median(times)
        print(f"| {name} | {memory[name] / 2**20:.1f} | {memory[name] / memory['dense']:.2f} "
              f"| {median:.0f} ({min(times):.0f} … {max(times):.0f}) | {median / 1000 / dense_time:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
