"""Gated delta rules on a CPU: our scan and its score beside the PyTorch function that transformers runs.

One thread, processor time, in turns after one round of warm-up: medians and quartiles. transformers' kernels from the
hub or fla are not asked for.

    python benchmarks/delta_rule.py [--length 2048] [--heads 8] [--size 128] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from simba_fx import ops


def in_turns(repeats: int, runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            if turn:
                found[name].append(1000 * (time.process_time() - begun))
    return found


@torch.no_grad()
def compare(title: str, theirs: Callable[..., object], operands: list[Tensor], repeats: int) -> None:
    v, q, k, g, beta = operands
    times = in_turns(repeats, {
        "transformers": lambda: theirs(q, k, v, g=g, beta=beta, output_final_state=True),
        "delta_scan": lambda: ops.delta_scan(*operands),
        "delta_token_score": lambda: ops.delta_token_score(*operands, 64, None, 1, "simba"),
    })  # fmt: skip
    whole = statistics.median(times["transformers"])
    print(f"{title}: v {tuple(v.shape)}, k {tuple(k.shape)}")
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        print(f"  {name:18} {middle:8.1f} ms ({low:.1f} to {high:.1f}), {middle / whole:.2f} of transformers'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="of a head's keys and values")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (1, given.length, given.heads, given.size)
    q, k = (torch.nn.functional.normalize(torch.randn(shape), dim=3) for _ in "qk")
    v, beta = torch.randn(shape), torch.rand(shape[:3])
    print(f"torch {torch.__version__}, one thread, processor time")
    compare("gated delta rule", torch_chunk_gated_delta_rule, [v, q, k, -0.1 * torch.rand(shape[:3]), beta],
            given.repeats)  # fmt: skip
    few = [operand[:, : given.length // 4, :2] for operand in (v, q, k, -0.1 * torch.rand(shape), beta)]
    compare("Kimi delta attention", chunk_kimi_delta_attention, few, given.repeats)


if __name__ == "__main__":
    main()
