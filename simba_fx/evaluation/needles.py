"""Needles in haystacks: keys and values planted in text, one of which is asked for at the end.

A model that is given the end of the context alone cannot know the answer. A search succeeds where every token of the
answer is the model's first choice, which is what greedy decoding would write.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simba_fx.evaluation.options import EvalError

__all__ = ["Search", "searches"]

_TEMPLATES = {
    "code": ('TOKEN_{key} = "{value}"\n', '\nassert TOKEN_{key} == "', "0123456789abcdef"),
    "prose": (
        "The special magic number for {key} is: {value}.\n",
        "\nWhat is the special magic number for {key}? The special magic number for {key} is: ",
        "0123456789",
    ),
}
"""A planted line, the question, and what a value is made of."""
_KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WIDTH = 6


@dataclass(frozen=True)
class Search:
    """One haystack: `ids` `(1, L)` int64, of which the last `answer` tokens are the answer."""

    ids: Tensor
    answer: int
    depth: float


def searches(texts: Sequence[Tensor], encode: Callable[[str], list[int]], length: int, depths: Sequence[float],
             count: int, pairs: int, style: str, seed: int) -> Iterator[Search]:  # fmt: skip
    """`count` searches at each depth, haystacks of `length` tokens and the answer.

    Args:
        depths: where the line that is asked for stands, from 0 (the beginning) to 1; the others stand anywhere.

    Raises:
        EvalError: no text is as long.
    """
    plant, ask, letters = _TEMPLATES[style]
    texts = [text for text in texts if len(text) >= length]
    if not texts:
        raise EvalError(f"--needles expects texts of at least {length} tokens; found none. Name longer texts.")
    newline = encode("\n")
    for number in range(count):
        for depth in depths:
            draw = random.Random(f"{seed} {length} {depth} {number}")
            keys = draw.sample(_KEYS, pairs)
            values = ["".join(draw.choices(letters, k=_WIDTH)) for _ in keys]
            lines = [encode(plant.format(key=key, value=value)) for key, value in zip(keys, values)]
            question = encode(ask.format(key=keys[0]))
            answer = encode(ask.format(key=keys[0]) + values[0])[len(question) :]
            room = length - len(question) - sum(map(len, lines))
            if room < 1:
                raise EvalError(f"--lengths {length} have no room for {pairs} --pairs. Ask for fewer.")
            text = draw.choice(texts)
            start = draw.randrange(len(text) - room + 1)
            body = text[start : start + room].tolist()
            ends = [0, *(i + 1 for i, token in enumerate(body) if [token] == newline), len(body)]
            places = [min(ends, key=lambda end: abs(end - depth * len(body)))]
            places += [draw.choice(ends) for _ in lines[1:]]
            found: list[int] = []
            at = 0
            for place, line in sorted(zip(places, lines)):
                found += body[at:place] + line
                at = place
            ids = torch.tensor([found + body[at:] + question + answer])
            yield Search(ids, len(answer), depth)
