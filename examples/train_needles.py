"""Teach the example checkpoint to look back: Python source in which constants are planted, and asked for later.

    python examples/train_needles.py --out needles --minutes 60

A window is source text with a few lines `TOKEN_K = "3fa94c"` planted in it, K a letter; later in the window stands
`assert TOKEN_K == "3fa94c"`. What comes after the quotation mark cannot be known without the planted line, however far
back that is. The loss is the usual one on every byte, with the answers counted more. Windows grow (`--lengths`) as soon
as the answers of the present length are known.

Training resumes from `--out` when it is started again. The text is the source of installed packages, and stays there.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from real_text import sources
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import MambaForCausalLM

import simba_fx

TRAINING = ("torch", "transformers", "numpy", "sympy", "networkx")
"""Packages whose source is read: those of the example checkpoint."""
KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789abcdef"
ANSWER = 6
"""Hexadecimal digits of a planted value."""
EMPHASIS = 8.0
"""How much more the loss of an answer's byte counts."""


def window(texts: list[bytes], length: int, needles: int, draw: random.Random) -> tuple[list[int], list[int]]:
    """`length + 1` bytes, and the places of the answers' bytes in them.

    Args:
        needles: constants that are planted anywhere, each asked for once, anywhere behind.
    """
    text = draw.choice([text for text in texts if len(text) > length + 1])
    start = draw.randrange(len(text) - length - 1)
    keys = draw.sample(KEYS, needles)
    values = ["".join(draw.choices(DIGITS, k=ANSWER)) for _ in keys]
    planted = [f'TOKEN_{key} = "{value}"\n'.encode() for key, value in zip(keys, values)]
    asked = [f'assert TOKEN_{key} == "{value}"\n'.encode() for key, value in zip(keys, values)]
    room = length + 1 - sum(map(len, planted + asked))
    body = text[start : start + room]
    ends = [0, *(i + 1 for i, byte in enumerate(body) if byte == 10)]
    events: list[tuple[int, int, bytes, bool]] = []
    for order, (plant, ask) in enumerate(zip(planted, asked)):
        first = draw.choice(ends)
        last = draw.choice([end for end in ends if end >= first])
        events += [(first, order, plant, False), (last, order + needles, ask, True)]
    found = bytearray()
    answers: list[int] = []
    at = 0
    for place, _, line, is_question in sorted(events):
        found += body[at:place]
        at = place
        if is_question:
            begin = len(found) + line.index(b'"') + 1
            answers += range(begin, begin + ANSWER)
        found += line
    found += body[at:]
    return list(found), answers


def batch(texts: list[bytes], rows: int, length: int, needles: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Bytes `(rows, length + 1)` int64, and which of them are answers, bool."""
    drawn = [window(texts, length, needles, draw) for _ in range(rows)]
    answers = torch.zeros(rows, length + 1, dtype=torch.bool)
    for row, (_, places) in enumerate(drawn):
        answers[row, places] = True
    return torch.tensor([found for found, _ in drawn]), answers


def loss_of(model: torch.nn.Module, ids: Tensor, answers: Tensor) -> tuple[Tensor, float]:
    """The weighted loss; the share of answers' bytes that are right."""
    logits = model(ids[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    weight = 1 + (EMPHASIS - 1) * answers[:, 1:]
    right = (logits.argmax(2) == ids[:, 1:])[answers[:, 1:]].float().mean()
    return (losses * weight).sum() / weight.sum(), float(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=Path(__file__).parent / "mamba-py-3m")
    parser.add_argument("--out", type=Path, default=Path("needles"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many, of this run")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 192, 256, 384, 512, 768, 1024, 1536, 2048])
    parser.add_argument("--tokens", type=int, default=4096, help="bytes per step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--grow", type=float, default=0.9, help="share of right answers at which windows grow")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    state_file, notes = options.out / "training.pt", options.out / "log.jsonl"
    resumed = state_file.is_file()
    model = MambaForCausalLM.from_pretrained(options.out if resumed else options.start)
    sparse = simba_fx.transform(model.train(), "dense")  # the same model, with kernels that train faster
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.01)
    step, stage, recent, known = 0, 0, 0.0, 0
    if resumed:
        held = torch.load(state_file)
        optimizer.load_state_dict(held["optimizer"])
        step, stage, recent, known = held["step"], held["stage"], held["recent"], held["bytes"]
    texts = sources(TRAINING)
    draw = random.Random(step)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = last = time.perf_counter()
    until = step + options.steps
    while (spent := time.perf_counter() - begin) < 60 * options.minutes and step < until:
        length = options.lengths[stage]
        for group in optimizer.param_groups:  # a short warm-up, and down to a tenth in the last fifth of the time
            left = 1 - spent / (60 * options.minutes)
            group["lr"] = options.rate * min(1, (step + 1) / 50) * min(1, 0.1 + 4.5 * left)
        ids, answers = batch(texts, max(2, options.tokens // length), length, min(4, 1 + length // 200), draw)
        loss, right = loss_of(sparse, ids, answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, known, recent = step + 1, known + ids.numel(), 0.97 * recent + 0.03 * right
        if recent > options.grow and stage + 1 < len(options.lengths):
            stage, recent = stage + 1, 0.5
        over = step == until or time.perf_counter() - begin >= 60 * options.minutes
        if step % 50 == 0 or over:
            now = time.perf_counter()
            line = {"step": step, "length": length, "loss": round(loss.item(), 3), "right": round(recent, 3)}
            line |= {"bytes": known, "bytes_per_second": round(50 * ids.numel() / (now - last))}
            last = now
            print(json.dumps(line), flush=True)
            with notes.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if step % 200 == 0 or over:
            model.save_pretrained(options.out)
            held = {"optimizer": optimizer.state_dict(), "step": step, "stage": stage, "recent": recent, "bytes": known}
            torch.save(held, state_file)


if __name__ == "__main__":
    main()
