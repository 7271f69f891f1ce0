"""Peak memory of a long prompt, whole and in chunks: with chunks it grows with keys and values alone.

A tiny Mamba (no keys) and a tiny Jamba (one layer of attention), pruned to a half behind the first block, on a CPU.
Each figure is the peak of a process of its own, over what that process held before the prompt.

    python benchmarks/chunked_prefill.py [--chunk 8192] [--lengths 16384 65536 131072]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from typing import Any

import torch

WIDTH = 64


def build(name: str) -> Any:
    from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM

    if name == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=WIDTH, num_hidden_layers=6))
    return JambaForCausalLM(JambaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, num_experts=1, num_experts_per_tok=1, attn_layer_offset=2, attn_layer_period=6,
    ))  # fmt: skip


def peak() -> float:
    """MB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def measure(name: str, length: int, chunk: int) -> float:
    """MB that a prompt takes beyond what two small calls, cold and warm, took."""
    from transformers import DynamicCache

    import simba_fx
    from simba_fx.frontends.transformers.calls import cache_parameter, inspect_parameters

    torch.manual_seed(0)
    sparse = simba_fx.transform(build(name).eval())
    argument = cache_parameter(inspect_parameters(type(sparse)))

    def read(ids: torch.Tensor, size: int) -> None:
        cache = DynamicCache(config=sparse.config)
        for piece in ids.split(size, 1):
            sparse(piece, use_cache=True, logits_to_keep=1, **{argument: cache})

    ids = torch.randint(1, 64, (1, length))
    read(ids[:, :64], 32)
    before = peak()
    read(ids, chunk)
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536, 131072])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "LENGTH", "CHUNK"), help="measured in this process")
    options = parser.parse_args()
    if options.one:
        print(measure(options.one[0], *map(int, options.one[1:])))
        return
    print(f"peak memory of a prompt, MB; torch {torch.__version__}, CPU, float32\n")
    print(f"{'model':8}{'tokens':>10}{'in chunks of ' + str(options.chunk):>24}{'whole':>10}")
    for name in ("mamba", "jamba"):
        for length in options.lengths:
            figures = []
            for chunk in (options.chunk, length):
                command = [sys.executable, __file__, "--one", name, str(length), str(chunk)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                figures.append(float(done.stdout.split()[-1]))
            print(f"{name:8}{length:10,}{figures[0]:24.0f}{figures[1]:10.0f}", flush=True)


if __name__ == "__main__":
    main()
