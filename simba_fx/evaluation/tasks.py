"""Tasks that need their context: something planted in text, asked for at the end.

A model that is given the end of the context alone cannot know the answer. A search succeeds where every token of the
answer is the model's first choice, which is what greedy decoding would write. Nothing is downloaded: haystacks are cut
from the texts of the evaluation, what is planted is drawn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simba_fx.evaluation.options import EvalError

__all__ = ["Haystacks", "Search"]

_TEMPLATES = {
    "code": ('TOKEN_{key} = "{value}"\n', '\nassert TOKEN_{key} == "', "0123456789abcdef"),
    "prose": (
        "The special magic number for {key} is: {value}.\n",
        "\nWhat is the special magic number for {key}? The special magic number for {key} is: ",
        "0123456789",
    ),
}
"""A planted line, the question, and what a value is made of."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WIDTH = 6
"""Characters of a value."""
_GIVEN, _ASKED = 8, 8
"""Tokens of a string that is to be copied: those that are repeated, and those that follow."""
_SCATTERED = 16
"""Tokens that stand apart and are to be copied, as in the Mamba paper."""
Ids = list[int]


@dataclass(frozen=True)
class Search:
    """One haystack: `ids` `(1, L)` int64, of which the last `answer` tokens are the answer."""

    ids: Tensor
    answer: int
    depth: float


class Planted(NamedTuple):
    """What one search is made of."""

    parts: list[Ids]
    """That which is asked for comes first."""
    question: Ids
    answer: Ids
    noise: Ids | None = None
    """Tokens that the haystack is drawn from; None: it is a piece of text, and parts stand at the ends of lines."""


@dataclass(frozen=True)
class Haystacks:
    """Where searches come from."""

    texts: Sequence[Tensor]
    """Documents, each `(n,)` int64."""
    encode: Callable[[str], Ids]
    pairs: int
    """Keys and values that are planted, of which one is asked for."""
    style: str
    """Of planted lines: a key of `_TEMPLATES`."""
    seed: int

    def searches(self, task: str, length: int, depths: Sequence[float], count: int) -> Iterator[Search]:
        """`count` searches at each depth, haystacks of `length` tokens and the answer.

        Args:
            task: "needles": lines with a key and a value anywhere in a text, one key is asked for. "lookup": the same,
                but lines all through. "copying": a string of tokens in a text; its first half is repeated at the end,
                its second half is the answer. "selective": tokens scattered over half of a haystack of one other
                token; all of them, in their order, are the answer (selective copying of the Mamba paper). "recall":
                pairs of tokens among random ones, with no key among those; the key of one pair is repeated, its value
                is the answer (multi-query associative recall of Zoology; with one pair, the Mamba paper's induction).
            depths: where what is asked for stands, from 0 (the beginning) to 1; other pairs stand anywhere.

        Raises:
            EvalError: no text is as long; too little room, or too few different tokens.
        """
        texts = [text for text in self.texts if len(text) >= length]
        if not texts:
            raise EvalError(f"--tasks expects texts of at least {length} tokens; found none. Name longer texts.")
        make = {"needles": self._needles, "lookup": self._lookup, "copying": self._copying,
                "selective": self._selective, "recall": self._recall}[task]  # fmt: skip
        for number in range(count):
            for depth in depths:
                draw = random.Random(f"{self.seed} {length} {depth} {number}")
                planted = make(draw, length, depth)
                ids = self._hidden(draw, draw.choice(texts), length, depth, planted)
                yield Search(ids, len(planted.answer), depth)

    # --- what is planted, what is asked, and what the answer is -------------------------------------------------------

    def _needles(self, draw: random.Random, length: int, depth: float) -> Planted:
        return self._lines(draw, draw.sample(_LETTERS, self.pairs), 0)

    def _lookup(self, draw: random.Random, length: int, depth: float) -> Planted:
        plant, ask, letters = _TEMPLATES[self.style]
        keys = draw.sample(["".join(three) for three in itertools.product(_LETTERS, repeat=3)], length // 8)
        width = max(len(self.encode(plant.format(key=key, value=letters[0] * _WIDTH))) for key in keys)
        count = (length - len(self.encode(ask.format(key=keys[0])))) // (width + 2)  # tokens of a value may differ
        if count < 2:
            raise EvalError(f"--lengths {length} have no room for a table to look things up in. Name longer ones.")
        asked = round(depth * (count - 1))
        table = self._lines(draw, keys[:count], asked)
        return table._replace(parts=[list(itertools.chain.from_iterable(table.parts))])

    def _lines(self, draw: random.Random, keys: Sequence[str], asked: int) -> Planted:
        plant, ask, letters = _TEMPLATES[self.style]
        values = ["".join(draw.choices(letters, k=_WIDTH)) for _ in keys]
        lines = [self.encode(plant.format(key=key, value=value)) for key, value in zip(keys, values)]
        question = self.encode(ask.format(key=keys[asked]))
        answer = self.encode(ask.format(key=keys[asked]) + values[asked])[len(question) :]
        return Planted(lines, question, answer)

    def _copying(self, draw: random.Random, length: int, depth: float) -> Planted:
        string = draw.choices(self._tokens(), k=_GIVEN + _ASKED)
        return Planted([string], string[:_GIVEN], string[_GIVEN:])

    def _selective(self, draw: random.Random, length: int, depth: float) -> Planted:
        known, room = self._tokens(), length - 1
        if len(known) < 3 or room // 2 < _SCATTERED:
            raise EvalError(
                f"Task selective needs 3 different tokens and --lengths of {2 * _SCATTERED + 1} and more; found "
                f"{len(known)} and {length}. Name other texts, or longer lengths."
            )
        noise, asked = draw.sample(known, 2)
        answer = draw.choices([token for token in known if token not in (noise, asked)], k=_SCATTERED)
        first = round(depth * (room - room // 2))
        haystack = [noise] * room
        for place, token in zip(sorted(draw.sample(range(first, first + room // 2), _SCATTERED)), answer):
            haystack[place] = token
        return Planted([haystack], [asked], answer)

    def _recall(self, draw: random.Random, length: int, depth: float) -> Planted:
        known = self._tokens()
        if len(known) <= self.pairs:
            raise EvalError(
                f"Task recall with {self.pairs} --pairs needs more than {self.pairs} different tokens; the texts hold "
                f"{len(known)}. Ask for fewer pairs."
            )
        keys = draw.sample(known, self.pairs)
        noise = sorted({*known} - {*keys})
        pairs = [[key, draw.choice(noise)] for key in keys]
        return Planted(pairs, pairs[0][:1], pairs[0][1:], noise)

    def _tokens(self) -> Ids:
        """Those that occur in the texts, so that the model has met them."""
        return sorted({token for text in self.texts for token in text.tolist()})

    def _hidden(self, draw: random.Random, text: Tensor, length: int, depth: float, planted: Planted) -> Tensor:
        """The haystack, the first of the parts at the depth, the others anywhere; the question; the answer."""
        room = length - len(planted.question) - sum(map(len, planted.parts))
        if room < 0:
            raise EvalError(f"--lengths {length} have no room for {self.pairs} --pairs. Ask for fewer.")
        if planted.noise is not None:
            body = draw.choices(planted.noise, k=room)
            ends = list(range(room + 1))
        else:
            start = draw.randrange(len(text) - room + 1)
            body = text[start : start + room].tolist()
            newline = self.encode("\n")
            ends = [0, *(i + 1 for i, token in enumerate(body) if [token] == newline), len(body)]
        places = [min(ends, key=lambda end: abs(end - depth * len(body)))]
        places += [draw.choice(ends) for _ in planted.parts[1:]]
        found: Ids = []
        at = 0
        for place, part in sorted(zip(places, planted.parts)):
            found += body[at:place] + part
            at = place
        return torch.tensor([found + body[at:] + planted.question + planted.answer])
