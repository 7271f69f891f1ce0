"""What an evaluation is asked to do, checked before anything heavy starts. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simba_fx.bench.options import Criterion, at_least, parse_schedule
from simba_fx.errors import SimbaError

__all__ = ["BASELINES", "STYLES", "TASKS", "EvalError", "Options"]

BASELINES = ("left-truncation", "layer-drop", "utrc")
TASKS = ("needles", "lookup", "copying", "selective", "recall")
STYLES = ("code", "prose")


class EvalError(SimbaError, ValueError):
    """Options of an evaluation that cannot be run."""


@dataclass(frozen=True)
class Options:
    """One run of `simba-fx eval`."""

    model: str
    texts: tuple[str, ...]
    """Files, and folders whose files are read."""
    lengths: tuple[int, ...]
    """Tokens of context, ascending."""
    last: int
    """Tokens at the end of each window whose loss is read; they choose nothing of what is kept."""
    windows: int
    schedules: tuple[str, ...]
    criteria: tuple[str, ...]
    baselines: tuple[str, ...]
    against: tuple[str, ...]
    """Other models, dense."""
    near: int
    """Tokens of context that a token which needs a longer one has to do without."""
    gain: float
    """Nats by which the longer context helps such a token."""
    tasks: tuple[str, ...]
    """Of `TASKS`."""
    searches: int
    """Of each task, at each length and depth."""
    depths: tuple[float, ...]
    pairs: int
    """Keys and values in a haystack of needles or recall, of which one is asked for."""
    style: str
    device: str
    dtype: str
    batch: int
    """Tokens of a call, over all of its rows."""
    seed: int
    threads: int | None
    out: Path

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": self.out.name, "texts": len(self.texts)}

    def check(self) -> None:
        """Raises: EvalError, BenchError, ScheduleError, CriterionError for what cannot be run, in a sentence."""
        if importlib.util.find_spec("transformers") is None:
            raise EvalError("Models are read with transformers; install it: pip install simba-fx[hf].")
        if not self.texts:
            raise EvalError("--text expects files, or folders, to read; found none. Name what your model is used on.")
        for text in self.schedules:
            parse_schedule(text)
        for text in self.criteria:
            Criterion.parse(text)
        at_least("--lengths", self.lengths, 8)
        at_least("--last", (self.last,), 1)
        at_least("--windows", (self.windows,), 2)
        at_least("--near", (self.near,), 1)
        at_least("--searches", (self.searches,), 1)
        at_least("--pairs", (self.pairs,), 1)
        if short := [length for length in self.lengths if length <= self.last]:
            raise EvalError(
                f"--lengths are tokens of context and scored ones together: expected more than --last {self.last}, "
                f"found {short[0]}."
            )
        if wrong := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise EvalError(f"--depths expects shares of the context, from 0 (its beginning) to 1; found {wrong[0]}.")
        if self.baselines and not self.schedules:
            raise EvalError("--baselines are given the FLOPs of each schedule; found no schedule. Name one.")
