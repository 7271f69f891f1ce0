"""What is known of a call's rows: how long each is, and how many of its last tokens are read as answers.

Lengths of trailing padding are found in the graph of a call, or stated (`simba_fx.lengths`). Tails are stated
(`simba_fx.tail`, `simba_fx.answer`) or follow from labels (`transform(..., tail="labels")`).

Rows whose tails differ become rows of one tail: a row whose tail is shorter by d tokens gets d more tokens of padding
at its end, which count as its tail. Its query stays where it was, and so does how many earlier tokens it keeps; behind
everything that is read, in a causal model, padding changes nothing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from simba_fx.compiling import assert_on_device, exported, skip_frame, traced, vary
from simba_fx.errors import InputError, SimbaError
from simba_fx.runtime.clone import subclass

__all__ = [
    "IGNORED",
    "Asked",
    "Ends",
    "ends_of",
    "first_labels",
    "lead_of",
    "padding_id",
    "trailing_lengths",
    "watch_calls",
]

IGNORED = -100
"""The label that losses of torch and transformers leave out."""

_FAR = 1 << 20
"""Added to numbers that travel as sizes of a tensor."""


@dataclass(frozen=True)
class Asked:
    """What the contexts around a call say of its rows."""

    tail: int
    """Real tokens at each row's end that are kept, scored at the first of them."""
    answer: bool = False
    """The tail is an answer and the token that predicts it, which a row that is nothing but answer does not have."""
    tails: Tensor | None = None
    """The same for each row, `(B,)` int64; `tail` counts for nothing then."""
    first: Tensor | None = None
    """Instead: each row's first position with a label that is read, `(B,)` int64; L where there is none."""
    lengths: Tensor | None = None
    """Tokens of each row that are no trailing padding, `(B,)` int64."""

    sizes: Tensor = field(init=False, repr=False, compare=False)
    """`tail` and `shortest_row` once more, as sizes: of a number Dynamo compiles each value on its own, of a tensor all
    sizes at once. It also takes equal sizes for one, so these are far from those of any call. No memory is behind."""

    def __post_init__(self) -> None:
        if torch.compiler.is_dynamo_compiling():  # it is made inside of a traced call, for that call
            return
        sizes = torch.empty(1, 1, dtype=torch.bool, device="cpu").expand(_FAR + self.tail, 2 * _FAR + self.shortest_row)
        vary(sizes, 0, 1)
        object.__setattr__(self, "sizes", sizes)

    @property
    def context(self) -> str:
        """Which context said how long tails are."""
        return "answer" if self.answer else "tail"

    @property
    def shortest_row(self) -> int:
        """Real tokens that every row must have for the tail that all share; tails of their own are looked at apart."""
        return self.tail - self.answer if self.tails is None and self.first is None else 1

    def in_graph(self) -> tuple[int, int]:
        """`tail` and `shortest_row`, which are symbols where Dynamo traces a whole model."""
        if torch.compiler.is_dynamo_compiling() and not exported() and hasattr(self, "sizes"):
            return self.sizes.shape[0] - _FAR, self.sizes.shape[1] - 2 * _FAR
        return self.tail, self.shortest_row


@dataclass(frozen=True)
class Ends:
    """Where the rows of a call end, as its program is told."""

    tail: int
    lengths: Tensor | None
    """Of what counts as real, `(B,)`; None: the padding mask says it, or nothing is padded."""
    mask: Tensor | None = None
    """`(B, L + more)`, where the model is given a mask."""
    more: int = 0
    """Tokens of padding that every row gets at its end."""
    apart: bool = False
    """Whether tails differed: padding counts as real then, and states have seen it."""


def padding_id(config: Any) -> tuple[int | None, bool]:
    """A configuration's id of padding, and whether it may be text as well: an end of sequence."""
    pad, ends = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    return pad, pad is not None and pad in (ends if isinstance(ends, list | tuple) else [ends])


def trailing_lengths(ids: Tensor, pad: int) -> Tensor:
    """Tokens of each row before its trailing padding, `(B,)` int64; all of a row that is nothing but padding."""
    length = ids.shape[1]
    counted = ((ids != pad) * torch.arange(1, length + 1, device=ids.device)).amax(1)
    return torch.where(counted == 0, length, counted)


def may_be_padded(ids: Tensor, pad: int) -> bool:
    """Whether a batch without a mask looks padded with an id that may be text. On a GPU nothing is looked at."""
    rows, length = ids.shape
    if ids.is_cuda:
        return rows > 1
    ending = (ids[:, -1] == pad) & (ids != pad).any(1)  # a row of nothing else is text, or nobody's
    twice = ending & (ids[:, -2] == pad) if length > 1 else torch.zeros_like(ending)
    return bool(twice.any() or (ending.any() and not ending.all()))


def warn_of_padding(name: str, pad: int) -> None:
    warnings.warn(
        f"{name} was called without an attention_mask, and rows end with the id {pad}, which its config calls padding "
        "and end of sequence alike: those tokens are taken for text, so that a padded row keeps other tokens than the "
        "row alone. If they are padding, pass attention_mask, call it inside simba_fx.lengths(sparse, lengths), or "
        f"transform with pad_token_id={pad}.",
        stacklevel=2,
    )


def check_lengths(lengths: Tensor, rows: int, length: int) -> None:
    """Raises: InputError: not one length for each row, or one that no row can have (asserted on a GPU itself)."""
    if tuple(lengths.shape) != (rows,):
        raise InputError(
            f"simba_fx.lengths expects one length for each of the {rows} rows; found shape {tuple(lengths.shape)}. "
            "Pass the number of tokens before each row's trailing padding, (B,)."
        )
    if traced():
        return
    wrong = (lengths < 1) | (lengths > length)
    if lengths.is_cuda:
        assert_on_device(~wrong.any(), "simba_fx.lengths: a length that no row has")
    elif bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InputError(
            f"simba_fx.lengths says that row {row} has {int(lengths[row])} tokens; expected at least 1 and at most "
            f"{length}, the width of the batch. Pass the number of tokens before each row's trailing padding."
        )


def refuse_ragged(name: str, asked: Asked) -> None:
    """For models that are given neither lengths nor tails of their rows."""
    if asked.lengths is not None or asked.tails is not None:
        context = "lengths" if asked.lengths is not None else asked.context
        raise InputError(
            f"simba_fx.{context} was given a number for each row, but {name} is not a transformers model; expected "
            "rows of one length and one tail. Call the rows one by one, or state the padding mask of a plain module "
            "(transform(..., mask=...))."
        )


# --- tails that differ ------------------------------------------------------------------------------------------------


def ends_of(asked: Asked, rows: int, length: int, mask: Tensor | None, lengths: Tensor | None) -> Ends:
    """Where rows end. Rows of one tail: as they are. Else they get padding, for which the sizes are read on the host.

    Raises:
        InputError: not one tail for each row, or one that its row is too short for; a trace, which cannot read sizes.
    """
    if asked.tails is None and asked.first is None:
        return Ends(asked.in_graph()[0], lengths, mask)
    if traced():
        raise InputError(
            "Tails that differ from row to row are read on the host to size the call; expected one tail for all rows "
            "where a call is traced whole, by torch.export or torch.compile with compile='whole'. Use "
            "simba_fx.answer(sparse, n) with an int, or compile='blocks'."
        )
    stated: Any = asked.first if asked.tails is None else asked.tails
    if tuple(stated.shape) != (rows,):
        raise InputError(
            f"simba_fx.{asked.context} expects one number of tokens for each of the {rows} rows; found "
            f"{tuple(stated.shape)}. Pass an int for all of them, or a tensor (B,)."
        )
    device = (stated if lengths is None else lengths).device if mask is None else mask.device
    stated = stated.to(device)
    line = torch.arange(length, device=device)
    if mask is not None:
        ends = ((mask != 0) * (line + 1)).amax(1)
        starts = ends - (mask != 0).sum(1)
    else:
        ends = torch.full((rows,), length, device=device) if lengths is None else lengths
        starts = torch.zeros_like(ends)
    tails = stated
    if asked.tails is None:  # the query is the token that predicts the first label
        tails = torch.minimum((ends - (stated - 1)).clamp(min=1), ends - starts)
    told = torch.stack((tails, ends, ends - starts)).tolist()
    for row, (wanted, _, own) in enumerate(zip(*told)):
        if wanted - asked.answer > own:
            if not asked.answer:
                raise InputError(
                    f"simba_fx.tail protects the last {wanted} tokens of row {row}, but it has {own}; expected at most "
                    "those. Pass the number of inputs of each row whose logits are read."
                )
            raise InputError(
                f"simba_fx.answer says that row {row} ends with {wanted - 1} tokens of answer, but it has {own}; "
                "expected at most those. Pass the number of answer tokens of each row."
            )
    tail = max(told[0])
    if len(set(told[0])) == 1:
        return Ends(tail, lengths, mask)
    more = max(0, max(end + tail - own for own, end in zip(told[0], told[1])) - length)
    ends = ends + tail - tails
    if mask is None:
        return Ends(tail, ends, None, more, apart=True)
    line = torch.arange(length + more, device=device)
    real = (line >= starts[:, None]) & (line < ends[:, None])
    return Ends(tail, None, real.to(mask.dtype), more, apart=True)


def lengthened(tensor: Tensor, more: int, positions: bool = False) -> Tensor:
    """`(B, L, ...)` to `(B, L + more, ...)`: zeros at the end; positions `(..., L)` go on counting."""
    if not more:
        return tensor
    if positions:
        return torch.cat((tensor, tensor[..., -1:] + torch.arange(1, more + 1, device=tensor.device)), -1)
    return torch.cat((tensor, tensor.new_zeros(tensor.shape[0], more, *tensor.shape[2:])), 1)


def shortened(values: Iterable[Any], whole: Iterable[bool], length: int, more: int) -> list[Any]:
    """Results of the lengthened call, of which `whole` ones have a place for every token, as long as the call was."""

    def is_longer(held: Any) -> bool:
        return isinstance(held, Tensor) and held.dim() > 1 and held.shape[1] == length + more

    return [held[:, :length] if more and full and is_longer(held) else held for held, full in zip(values, whole)]


# --- tails from labels ------------------------------------------------------------------------------------------------


def first_labels(labels: Tensor, shifted: bool) -> Tensor:
    """Each row's first position whose label is read by a causal loss, `(B,)`; L where there is none.

    Args:
        labels: `(B, L)`, -100 where nothing is read. The label at t is predicted by the token at t - 1, so that none is
            read at 0; `shifted`: by the token at t.
    """
    read, length = labels != IGNORED, labels.shape[1]
    at = torch.arange(length, device=labels.device) + int(shifted)
    return torch.where(read & (at > 0), at, length).amin(1)


def watch_calls(head: nn.Module, runtime: Any, check: Callable[[Any, dict[str, Any]], None], labels: bool,
                blocks: bool) -> None:  # fmt: skip
    """Look at the arguments of a transformers model that its block stack does not see; changes its class.

    Args:
        check: raises where a call's arguments, by name, cannot be right.
        labels: whether each row's tail follows from the labels of a call.
        blocks: whether the model is compiled block by block, and this frame left to Python.

    Raises:
        SimbaError: `labels`, and the model takes none.
    """
    cls: Any = type(head)
    names = list(inspect.signature(cls.forward).parameters)[1:]
    if labels and "labels" not in names:
        raise SimbaError(
            f"tail='labels' is for models that are called with labels; found {cls.__name__}, which is not. Leave it "
            "out, and call the model inside simba_fx.answer(sparse, n)."
        )
    own = cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args)) | kwargs
        check(self, given)
        shifted = given.get("shift_labels") is not None
        found = given["shift_labels"] if shifted else given.get("labels")
        if not labels or found is None:
            return own(self, *args, **kwargs)
        before = runtime(self).asked
        runtime(self).asked = _asked_by(found, shifted, given, before, cls.__name__)
        try:
            return own(self, *args, **kwargs)
        finally:
            runtime(self).asked = before

    kind = f"watched, labels: {labels}, blocks: {blocks}"
    head.__class__ = subclass(cls, kind, skip_frame(forward) if blocks else forward)


def lead_of(given: dict[str, Any]) -> Any:
    """The embeddings `(B, L, ...)` of a transformers model's call, or its ids `(B, L)`; None: neither was given."""
    return given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]


def _asked_by(labels: Any, shifted: bool, given: dict[str, Any], before: Asked, name: str) -> Asked:
    lead = lead_of(given)
    if not isinstance(labels, Tensor) or not isinstance(lead, Tensor) or labels.shape != lead.shape[:2]:
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(
            f"tail='labels' of this {name} reads where each row's labels begin; expected labels (B, L), as many as "
            f"there are tokens, found {found}. Transform without it, and call the model in simba_fx.answer(sparse, n)."
        )
    return Asked(before.tail, False, None, first_labels(labels, shifted), before.lengths)
