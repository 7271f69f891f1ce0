"""lm-eval-harness with sparse models.

    simba-fx lm-eval --model simba --model_args pretrained=FOLDER,schedule=0.4,criterion=simba-l2/31 --tasks …

`SimbaLM` is lm-eval's own wrapper of transformers models around a sparse one, told for each row of a batch where it
ends and how many of its last tokens are the continuation that is scored: so no continuation chooses what is kept of its
context, and a row scores as it does alone. lm-eval is imported with this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

import simba_fx
from simba_fx.bench.options import Criterion, parse_schedule
from simba_fx.evaluation.texts import byte_tokenizer, has_tokenizer

__all__ = ["SimbaLM"]

_HARDLY = 0.95
"""Mean share of the tokens above which hardly anything was pruned."""


@register_model("simba")
class SimbaLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """A sparse model for lm-eval.

    Args:
        pretrained: as in `HFLM`: a name, a folder, or a model. A folder without a tokenizer reads bytes.
        schedule, criterion: as in `simba-fx eval`: "linear", "0.4", "Linear(0.1; every=4)"; "simba",
            "simba-l2/31". Semicolons stand for commas, at which `--model_args` splits.
        options: the others of `HFLM`; `batch_size="auto"` works.
    """

    def __init__(
        self, pretrained: Any, schedule: str = "0.5", criterion: str = "simba-l2+write", **options: Any
    ) -> None:
        if isinstance(pretrained, str) and Path(pretrained).is_dir() and not has_tokenizer(pretrained):
            options.setdefault("tokenizer", byte_tokenizer(end=0))
        super().__init__(pretrained, backend="causal", **options)
        scored = Criterion.parse(criterion)
        plan = parse_schedule(str(schedule).replace(";", ","))
        self._model: Any = simba_fx.transform(self.model, plan, criterion=scored.name, span=scored.span)
        self._continuations: dict[tuple[int, ...], int] = {}
        self.entered, self.computed = 0, 0
        """Tokens that entered blocks, and that would have entered those of the dense model."""

    @property
    def delivered(self) -> float:
        """Mean share of the tokens that entered a block, over all calls so far."""
        return self.entered / self.computed if self.computed else 1.0

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results."""
        info: dict[str, Any] = super().get_model_info()
        return info | {"simba_fx_mean_share": self.delivered}

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for _, context, continuation in requests:
            given = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            scored = min(len(continuation), len(given))
            self._continuations[given] = max(scored, self._continuations.get(given, 0))
        before = self.entered, self.computed
        try:
            found = super()._loglikelihood_tokens(requests, *args, **kwargs)
        finally:
            self._continuations.clear()
        entered, computed = self.entered - before[0], self.computed - before[1]
        if computed and entered / computed > _HARDLY:
            warnings.warn(
                f"These prompts are too short to prune: on average {100 * entered / computed:.0f} % of the tokens "
                "entered a block (continuations, floor and rounding keep them). Scores are nearly the dense model's.",
                stacklevel=2,
            )
        return found

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = [found for row in inps.tolist() if (found := self._row(row)) is not None]
        if len(known) < len(inps):  # a batch that only measures how much memory one takes
            logits: Tensor = super()._model_call(inps, *args, **kwargs)
            return logits
        lengths, tails = (torch.tensor(numbers, device=inps.device) for numbers in zip(*known))
        with simba_fx.lengths(self._model, lengths), simba_fx.tail(self._model, tails):
            logits = super()._model_call(inps, *args, **kwargs)
        self._count(lengths)
        return logits

    def _row(self, row: Sequence[int]) -> tuple[int, int] | None:
        """How long a row is without its padding, and how many of its logits are read."""
        least = len(row)
        while least > 1 and row[least - 1] == 0:  # what lm-eval pads with
            least -= 1
        for length in range(least, len(row) + 1):  # a request may end with such a token
            if (scored := self._continuations.get(tuple(row[:length]))) is not None:
                return length, scored
        return None

    def _count(self, lengths: Tensor) -> None:
        blocks = simba_fx.kept(self._model)
        self.entered += sum(int((entered >= 0).sum()) for entered in blocks)
        self.computed += len(blocks) * int(lengths.sum())
