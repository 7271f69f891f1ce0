"""Whose model it is: one front end per library, a module with the functions of `Frontend`.

`transform` asks the first that owns a model to install what runs it, `save` and `load` ask it for the model's own
files. What captures, rewrites, runs and reports knows no library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from simba_fx.errors import SimbaError
from simba_fx.frontends import mamba_ssm, module, transformers
from simba_fx.options import Options

__all__ = ["FRONTENDS", "Frontend", "frontend_of", "refuse_foreign_options"]


class Frontend(Protocol):
    """What this package asks of a library."""

    LIBRARY: str
    """Its name in saved files."""
    TAKES: frozenset[str]
    """Options of `transform` that not every model has."""
    KEYS: frozenset[str]
    """What `describe` tells; beside it there may be `other_dtypes`."""

    def owns(self, model: nn.Module) -> bool:
        """Whether it knows how such a model is called; the library is not imported to find out."""
        ...

    def install(self, model: nn.Module, options: Options, example_inputs: Any) -> nn.Module:
        """A sparse copy of `model` over the same parameters; `model` is untouched.

        Raises:
            CaptureError, ScheduleError, GraphError: from the first captures, which happen here.
        """
        ...

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """What `read` needs of a sparse model beside its options, as JSON holds it.

        Raises:
            SimbaError: the model could not be read again.
        """
        ...

    def write(self, model: nn.Module, folder: Path) -> None:
        """The dense model's own files."""
        ...

    def read(self, folder: Path, written: Mapping[str, Any], model: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The dense model of a folder, and the `example_inputs` to transform it with; arguments as of `simba_fx.load`.

        Raises:
            SimbaError: what is in the folder cannot be read, or does not fit.
        """
        ...


FRONTENDS: tuple[Frontend, ...] = (transformers, mamba_ssm, module)
"""The first that owns a model has it; the last owns every module."""


def frontend_of(model: nn.Module) -> Frontend:
    return next(frontend for frontend in FRONTENDS if frontend.owns(model))


_OF_IDS_AND_LABELS = (
    "{option}={held!r} is for transformers models; expected none for a {name}, which is not called with ids and labels "
    "in ways that are known. Leave it out, and call the model inside simba_fx.answer(sparse, n)."
)
_MASKS = (
    "mask and mask_marks are for plain modules; expected none for a {name}, whose attention_mask marks real tokens, if "
    "it takes one. Leave the arguments out."
)
_FOREIGN = {
    "labels": "labels={held!r} changes the loss of a transformers model; expected 'all' for a {name}, whose loss is "
    "outside of it. Leave it out, and mask your own loss with simba_fx.reached(sparse).",
    "tail": _OF_IDS_AND_LABELS,
    "pad_token_id": _OF_IDS_AND_LABELS,
    "mask": _MASKS,
    "mask_marks": _MASKS,
    "example_inputs": "example_inputs are for plain modules; expected none for a {library} {name}, whose inputs are "
    "known. Leave the argument out.",
}


def refuse_foreign_options(frontend: Frontend, model: nn.Module, options: Options, example_inputs: Any) -> None:
    """Raises: SimbaError: an option that models of this front end do not have."""
    for option, told in _FOREIGN.items():
        held = getattr(options, option, example_inputs)
        if option not in frontend.TAKES and held != getattr(Options, option, None):
            name = type(model).__name__
            raise SimbaError(told.format(option=option, held=held, name=name, library=frontend.LIBRARY))
