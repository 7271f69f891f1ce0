"""What a run is asked to do, checked before anything heavy starts. Nothing here imports torch."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simba_fx.errors import SimbaError

__all__ = ["MODES", "PEERS", "BenchError", "Criterion", "Mode", "Options", "at_least", "parse_schedule"]


class BenchError(SimbaError, ValueError):
    """Options of a benchmark that cannot be run."""


@dataclass(frozen=True)
class Criterion:
    """A criterion as it is written on a command line: `simba`, or `simba-l2/31` with a span.

    Without one the span is that of `transform(model, criterion=name)`.
    """

    name: str
    span: int

    @staticmethod
    def parse(text: str) -> Criterion:
        """Raises: BenchError, CriterionError, SimbaError for what `transform` refuses."""
        from simba_fx.options import Options as Transformed
        from simba_fx.schedule import Dense

        name, slash, span = text.partition("/")
        if slash and not span.isdecimal():
            raise BenchError(
                "A criterion is a name, with a span behind a slash where scores are pooled; found "
                f"{text!r}. Write for example simba-l2/31."
            )
        options = Transformed(Dense(), name, span=int(span) if slash else None)
        return Criterion(name, options.pooled)

    def __str__(self) -> str:
        pooled = self.span != 1 or Criterion.parse(self.name) != self
        return f"{self.name}/{self.span}" if pooled else self.name


@dataclass(frozen=True)
class Mode:
    """How a model is executed."""

    name: str
    compile: str
    """`compile=` of `simba_fx.transform`: "blocks" or "whole"."""
    compiled: bool
    graphs: bool
    """Whether `torch.compile(mode="reduce-overhead")` is asked for CUDA graphs."""
    says: str

    @property
    def static(self) -> bool:
        """Compiled anew for each shape, by design."""
        return self.compile == "whole"


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("eager", "blocks", False, False, "no torch.compile"),
        Mode("compiled", "blocks", True, False, "torch.compile, compile='blocks', every length by one compilation"),
        Mode("cuda-graphs", "blocks", True, True, "torch.compile(mode='reduce-overhead'), compile='blocks'"),
        Mode("whole", "whole", True, False, "torch.compile(dynamic=False), compile='whole', compiled per length"),
        Mode("whole-cuda-graphs", "whole", True, True,
             "torch.compile(mode='reduce-overhead', dynamic=False), compile='whole', compiled per length"),
    )
}  # fmt: skip

PEERS = ("delta-norm", "utrc", "left-truncation", "layer-drop")
_SCHEDULES = ("Linear", "Cosine", "Constant", "Stages", "Budget")


@dataclass(frozen=True)
class Options:
    """One run of `simba-fx bench`."""

    models: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens per row, ascending."""
    batches: tuple[int, ...]
    schedules: tuple[str, ...]
    modes: tuple[str, ...]
    peers: tuple[str, ...]
    device: str
    dtype: str
    repeats: int
    """Timed calls of each variant."""
    warmup: int
    """Untimed calls of each variant after the first, which compiles."""
    head: str
    """"last": logits of the last token, as a prompt needs them; "all": of every token."""
    layers: int | None
    criterion: str
    original: bool
    """Whether the model as transformers runs it is timed as well."""
    decode: int
    """Tokens that are generated to time decoding; 0: none."""
    fresh_cache: bool
    flush_l2: bool
    threads: int | None
    out: Path

    def scored(self) -> dict[str, Any]:
        """How tokens are scored, as options of `transform`."""
        criterion = Criterion.parse(self.criterion)
        return {"criterion": criterion.name, "span": criterion.span}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": self.out.name}

    def check(self) -> None:
        """Raises: BenchError for what cannot be run, in a sentence."""
        from simba_fx.bench.models import PURE, check_model

        for name in self.models:
            kind = check_model(name, self.layers)
            if kind not in PURE and (pure := [peer for peer in self.peers if peer in ("utrc", "layer-drop")]):
                raise BenchError(
                    f"--peers {pure[0]} is measured on models whose blocks are all alike ({', '.join(PURE)}); found "
                    f"{name}, a {kind}. Leave it out."
                )
        Criterion.parse(self.criterion)
        for text in self.schedules:
            parse_schedule(text)
        if importlib.util.find_spec("transformers") is None:
            raise BenchError("The benchmark's models are transformers models; install them: pip install simba-fx[hf].")
        at_least("--lengths", self.lengths, 2)
        at_least("--batches", self.batches, 1)
        at_least("--repeats", (self.repeats,), 2)
        at_least("--warmup", (self.warmup,), 0)
        at_least("--decode", (self.decode,), 0)
        if self.decode in (1, 2):
            raise BenchError(f"--decode expects 0 (none) or at least 3 tokens to time; found {self.decode}.")
        if self.device not in ("cpu", "cuda"):
            raise BenchError(f"--device expects cpu or cuda; found {self.device!r}.")
        graphs = [name for name in self.modes if MODES[name].graphs]
        if graphs and self.device != "cuda":
            raise BenchError(
                f"--modes {graphs[0]} needs a CUDA device; found --device {self.device}, which has no CUDA graphs. "
                "Leave the mode out."
            )
        if self.flush_l2 and self.device != "cuda":
            raise BenchError(f"--flush-l2 empties a GPU's cache; found --device {self.device}. Leave it out.")
        if self.fresh_cache and not any(MODES[name].compiled for name in self.modes):
            raise BenchError(
                f"--fresh-cache empties the compiler's cache; found only uncompiled modes ({', '.join(self.modes)}). "
                "Leave it out, or add --modes compiled."
            )
        if self.peers and not self.schedules:
            raise BenchError("--peers are given the FLOPs of the first schedule; found no schedule. Name one.")


def at_least(name: str, values: Sequence[int], least: int) -> None:
    """Raises: BenchError for a smaller number of a command's option."""
    if wrong := [value for value in values if value < least]:
        raise BenchError(f"{name} expects whole numbers of at least {least}; found {wrong[0]}.")


def parse_schedule(text: str) -> Any:
    """A schedule as it is written in Python: `linear`, `0.5`, `Linear(0.1, every=4)`, `{8: 0.5, 16: 0.2}`.

    Raises:
        BenchError: it is none of these; ScheduleError: it is one that cannot be.
    """
    from simba_fx import schedule

    if text in ("linear", "cosine", "constant"):
        return schedule.as_schedule(text)
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SCHEDULES:
            given = [ast.literal_eval(argument) for argument in node.args]
            named = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg is not None}
            return getattr(schedule, node.func.id)(*given, **named)
        return schedule.as_schedule(ast.literal_eval(node))
    except (SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, SimbaError):
            raise
        raise BenchError(
            f"--schedules expects linear, cosine, constant, a share such as 0.5, or one of {', '.join(_SCHEDULES)} "
            f"with its arguments, as in 'Linear(0.1, every=4)'; found {text!r}. Dense is always measured."
        ) from error
