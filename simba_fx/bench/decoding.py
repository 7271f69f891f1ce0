"""Milliseconds per generated token after a dense and after a pruned prompt: decoding must not get slower."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import simba_fx
from simba_fx.bench.measure import synchronize
from simba_fx.bench.options import Options, parse_schedule
from simba_fx.bench.results import Row, spread


class _Times:
    """A streamer of `generate`: when each token came."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        synchronize(self.device)
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        """Seconds between tokens: the prompt itself comes first, then the token that it yields, then the steps."""
        return [b - a for a, b in zip(self.at[1:], self.at[2:])]


def decode(model: Any, name: str, ids: Tensor, options: Options) -> list[Row]:
    """Time greedy `generate`, uncompiled, dense and with the first schedule in turns; the first round warms up."""
    schedules: dict[str, Any] = {"dense": "dense"} | {text: parse_schedule(text) for text in options.schedules[:1]}
    scored = options.scored()
    models = {text: simba_fx.transform(model, plan, **scored) for text, plan in schedules.items()}
    seconds: dict[str, list[float]] = {text: [] for text in models}
    for round_ in range(3):
        for text, one in models.items():
            times = _Times(ids.device)
            one.generate(ids, max_new_tokens=options.decode, min_new_tokens=options.decode, do_sample=False,
                         eos_token_id=None, pad_token_id=0, use_cache=True, streamer=times)  # fmt: skip
            if round_:
                seconds[text] += times.steps()
    return [
        {"model": name, "batch": ids.shape[0], "length": ids.shape[1], "name": text, "seconds": found,
         "time": spread(found)}
        for text, found in seconds.items()
    ]  # fmt: skip
