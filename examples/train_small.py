"""Train a small Mamba on Python source, byte by byte, on a CPU: a smaller sibling of the example checkpoint.

    python examples/train_small.py --width 112 --out mamba-py-1m
    simba-fx eval examples/mamba-py-3m --text $(python examples/real_text.py) --against mamba-py-1m

The second line asks what pruning is for: is a large model that reads fewer tokens better than a small one that reads
them all, at the same FLOPs? Training resumes from `--out` when it is started again; `--family mamba2` trains that. The
text is the source of installed packages, the example checkpoint's own, and stays there.

    python examples/train_small.py --start examples/mamba-py-3m --schedule linear --last 100 --bytes 1.2e6 --rate 3e-4 \
        --out tuned

fine-tunes a model that is pruned while it is trained, on the last bytes of each window, which the tail protects.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from real_text import sources
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, Qwen3_5TextConfig

import simba_fx

TRAINING = ("torch", "transformers", "numpy", "sympy", "networkx")
"""Packages whose source is read: those of the example checkpoint."""
Turn = Callable[[nn.Module, dict[str, Any], random.Random], tuple[Tensor, int, dict[str, Any]]]
"""`(model, what is remembered, random)`: the loss of a new batch, its bytes, and what the log says of it."""


def options_for(parser: argparse.ArgumentParser, rate: float) -> argparse.ArgumentParser:
    """What `train` reads."""
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many, of this run")
    parser.add_argument("--tokens", type=int, default=4096, help="bytes per step")
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def train(options: argparse.Namespace, model: Any, turn: Turn, memory: dict[str, Any],
          progress: Callable[[int], float], schedule: Any = "dense") -> None:  # fmt: skip
    """AdamW until `progress(step)` is 1; the rate falls to a tenth in the last fifth. Everything is in `options.out`.

    `model` is new, or what `AutoModelForCausalLM.from_pretrained(options.out)` read: then it goes on.
    """
    torch.set_num_threads(options.threads)
    state_file = options.out / "training.pt"
    sparse = simba_fx.transform(model.train(), schedule)  # "dense": the same model, with kernels that train faster
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.01)
    step = 0
    if state_file.is_file():
        held = torch.load(state_file)
        optimizer.load_state_dict(held["optimizer"])
        step = held["step"]
        memory |= held["memory"]
    draw = random.Random(step)
    options.out.mkdir(parents=True, exist_ok=True)
    last, known, until = time.perf_counter(), memory.setdefault("bytes", 0), step + options.steps
    over = progress(step) >= 1
    while not over:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1, (step + 1) / 50) * min(1, 0.1 + 4.5 * (1 - progress(step)))
        loss, count, says = turn(sparse, memory, draw)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        memory["bytes"] += count
        over = step == until or progress(step) >= 1
        if step % 50 == 0 or over:
            now = time.perf_counter()
            speed = round((memory["bytes"] - known) / (now - last))
            last, known = now, memory["bytes"]
            line = {"step": step, "loss": round(loss.item(), 3), **says, "bytes": known, "bytes_per_second": speed}
            print(json.dumps(line), flush=True)
            with (options.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if step % 200 == 0 or over:
            model.save_pretrained(options.out)
            torch.save({"optimizer": optimizer.state_dict(), "step": step, "memory": memory}, state_file)


def build(family: str, width: int, blocks: int) -> nn.Module:
    """A model over bytes with random weights."""
    shared = {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": blocks, "tie_word_embeddings": True,
              "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    if family == "mamba2":
        heads = {"num_heads": 2 * width // 32, "head_dim": 32, "n_groups": 1, "state_size": 32, "chunk_size": 128}
        config: Any = Mamba2Config(**shared, **heads)
    elif family == "qwen3.5":  # gated delta rules, every fourth block attention
        heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32,
                 "linear_value_head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "head_dim": 48}  # fmt: skip
        config = Qwen3_5TextConfig(**shared, **heads, intermediate_size=2 * width)
    else:
        config = MambaConfig(**shared, state_size=16)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("mamba", "mamba2", "qwen3.5"), default="mamba")
    parser.add_argument("--width", type=int, default=112)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--bytes", type=float, default=12e6, help="of text that is read")
    parser.add_argument("--packages", nargs="+", default=TRAINING, help="whose source is read")
    parser.add_argument("--length", type=int, default=1024, help="bytes of a window")
    parser.add_argument("--start", type=Path, help="a folder whose model is trained on; else weights are random")
    parser.add_argument("--schedule", default="dense", help="linear, or a share: by which it is pruned meanwhile")
    parser.add_argument("--last", type=int, help="bytes at the end of a window whose loss counts (all)")
    parser.add_argument("--out", type=Path, default=Path("small"))
    options = options_for(parser, rate=3e-3).parse_args()
    resumed = (options.out / "training.pt").is_file()
    folder = options.out if resumed else options.start
    read: Any = AutoModelForCausalLM.from_pretrained
    model = read(folder) if folder else build(options.family, options.width, options.blocks)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    read_only = (text for text in sources(options.packages) if len(text) > options.length + 1)
    texts = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in read_only]
    sizes = [len(text) for text in texts]

    def turn(sparse: nn.Module, memory: dict[str, Any], draw: random.Random) -> tuple[Tensor, int, dict[str, Any]]:
        rows = []
        for text in draw.choices(texts, sizes, k=max(1, options.tokens // options.length)):
            start = draw.randrange(len(text) - options.length - 1)
            rows.append(text[start : start + options.length + 1])
        ids = torch.stack(rows).long()
        last = options.last or options.length
        with simba_fx.tail(sparse, last):
            logits = sparse(ids[:, :-1], use_cache=False, logits_to_keep=last).logits
        return cross_entropy(logits.transpose(1, 2), ids[:, -last:]), ids.numel(), {}

    memory: dict[str, Any] = {"bytes": 0}
    schedule = float(options.schedule) if options.schedule[0].isdigit() else options.schedule
    train(options, model, turn, memory, lambda step: memory["bytes"] / options.bytes, schedule)


if __name__ == "__main__":
    main()
