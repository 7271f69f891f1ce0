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
import random
import time
from pathlib import Path
from typing import Any

import torch
from real_text import sources
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train_small import TRAINING, options_for, train
from transformers import AutoModelForCausalLM

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
    parser.add_argument(
        "--start", type=Path, default=Path(__file__).parent / "mamba-py-3m", help="the model to begin with"
    )
    parser.add_argument("--out", type=Path, default=Path("needles"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 192, 256, 384, 512, 768, 1024, 1536, 2048])
    parser.add_argument("--grow", type=float, default=0.9, help="share of right answers at which windows grow")
    options = options_for(parser, rate=1e-3).parse_args()
    resumed = (options.out / "training.pt").is_file()
    read: Any = AutoModelForCausalLM.from_pretrained
    model = read(options.out if resumed else options.start)
    texts = sources(TRAINING)

    def turn(sparse: nn.Module, memory: dict[str, Any], draw: random.Random) -> tuple[Tensor, int, dict[str, Any]]:
        length = options.lengths[memory["stage"]]
        ids, answers = batch(texts, max(2, options.tokens // length), length, min(4, 1 + length // 200), draw)
        loss, right = loss_of(sparse, ids, answers)
        recent = 0.97 * memory["recent"] + 0.03 * right
        memory |= {"recent": recent}
        if recent > options.grow and memory["stage"] + 1 < len(options.lengths):
            memory |= {"stage": memory["stage"] + 1, "recent": 0.5}
        return loss, ids.numel(), {"length": length, "right": round(recent, 3)}

    begin = time.perf_counter()
    train(options, model, turn, {"stage": 0, "recent": 0.0},
          lambda step: (time.perf_counter() - begin) / (60 * options.minutes))  # fmt: skip


if __name__ == "__main__":
    main()
