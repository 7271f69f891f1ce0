"""`transform` and what can be asked of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simba_fx.errors import SimbaError
from simba_fx.frontends import frontend_of, refuse_foreign_options
from simba_fx.graph.plan import reasons
from simba_fx.graph.runner import diff
from simba_fx.options import CRITERION, SCHEDULE, Criterion, Options
from simba_fx.runtime import labels as kept_labels
from simba_fx.runtime.build import Built
from simba_fx.runtime.fsdp import is_sharded
from simba_fx.runtime.last_call import LastCall
from simba_fx.schedule import Schedule, as_schedule
from simba_fx.versions import name_untested

__all__ = ["answer", "explain", "kept", "lengths", "program", "reached", "tail", "transform"]

ScheduleLike = str | float | Fraction | Sequence[Any] | Mapping[int, Any] | Callable[[int], Any] | Schedule


def transform(model: nn.Module, schedule: ScheduleLike = SCHEDULE, *, criterion: str | Criterion = CRITERION,
              output: Literal["full", "kept"] = "full", floor: int = 4, kernels: Literal["auto", "model"] = "auto",
              compile: Literal["blocks", "whole"] = "blocks", seed: int = 0, span: int | None = None,
              query: int | None = None, protect: Sequence[int] = (), labels: Literal["all", "kept"] = "all",
              tail: Literal["last", "labels"] = "last", pad_token_id: int | None = None,
              mask: str | Literal[False] | None = None, mask_marks: Literal["real", "padding"] = "real",
              example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None) -> Any:  # fmt: skip
    """A sparse copy of `model` over the same weights; `model` itself is untouched and stays dense.

    Before: every block of `model` sees all L tokens. After: block i sees `kept_count(L, r_i)` of them, those that
    matter most to the scans below it. Unless told otherwise, half of the tokens leave after the first block that has a
    scan, the setting that won what we measured (docs/findings.md). The setting of Simba (TMLR 2025), a ramp to a tenth
    by the contribution to the scan's output at the query, is `transform(model, "linear", criterion="simba")`.

    Args:
        model: a transformers Mamba-style model, a PEFT model around one, a `MambaLMHeadModel` or `MixerModel` of
            mamba_ssm, or any `nn.Module` that calls a registered scan function. Or what `transform` made of one: the
            same weights under other options, those not named here being the usual ones.
        schedule: share of the tokens that enters each block: a name ("linear", "cosine", "constant", "dense"), a share
            for all blocks, one share per block, a mapping block → share, a callable `n_blocks -> shares`, or an object
            such as `Linear(final=0.1, every=1, start=0)` or `Budget(0.5)`.
        criterion: "simba", "simba-abs", "simba-l2", "write", "no-decay", "delta-norm", "clip", "random", "stride" or
            "recent"; several, of which a token has its best rank: "simba-l2+write" (those among them that a recurrence
            has: a registered one has no "write"); or a callable `(scan operands, query (B,)) -> (B, L)`, higher = keep.
        output: "full": results of the input's length, a dropped token with the hidden state it left with; "kept":
            survivors only, see `kept`.
        floor: least number of tokens kept before the tail; raised to the number of positions named below.
        kernels: "auto": the fastest scan there is for the device; "model": the model's own scan functions.
        compile: how `torch.compile(result)` works: "blocks" compiles each kind of block once; "whole" gives one graph.
        seed: of criterion "random".
        span: an odd number of neighbours: a token is worth as much as the best of the `span` tokens around it that are
            still there, so that what stays are spans. 1: by itself. Of every criterion but those by position. None: 15
            for "simba-l2+write", 1 for others.
        query: the position at which every scan is scored, for models that read a class token or run both ways: an int
            that counts a row's real tokens, 0 the first, -1 the last. It is kept in every block, and there is no tail
            (`tail` may still protect one; it does not move the query). A token is scored by the scans that carry it to
            the query, forward ones before it, reversed ones behind it; tokens leave only after blocks whose scans
            reach it from all sides. None: the first token of the tail, and for a reversed scan the row's first token.
        protect: positions, counted likewise, that are kept in every block.
        labels: of a transformers model's own loss: "all" counts every label, also those predicted by tokens that left
            early; "kept" ignores the labels that such tokens should predict.
        tail: where each row's tail begins, unless `answer` or `tail` around a call say it: "last": at its last token;
            "labels": of a transformers model that is called with labels, at the token that predicts the first label
            that is not -100, so that no answer chooses what is kept and the token that predicts it is. Losses of texts
            whose every token is labelled are those of the dense model then, at its cost. Where the tails of a batch
            differ, the host waits once for their sizes.
        pad_token_id: of a transformers model: the id that pads rows at their end where no attention_mask is passed.
            None: the config's, where that is no end of sequence as well.
        mask: of a plain `nn.Module` with arguments that may be padding masks `(B, L)`: the name of the one that is, or
            False where none is.
        mask_marks: what that mask's values other than 0 mark: "real" tokens (transformers' convention), or "padding"
            (torch's `key_padding_mask`).
        example_inputs: for a plain `nn.Module`: its arguments, tensors `(B, L, ...)`, B ≠ L. Only shapes and dtypes are
            read. A module that takes token ids needs none.

    Returns:
        For a transformers or mamba_ssm model a model of the same class; for a plain module a `torch.fx.GraphModule`.

    Raises:
        ScanNotFoundError: no registered scan was called; `register_scan` makes one known.
        CaptureError: the model cannot be one graph with a symbolic length.
        ScheduleError, CriterionError: an unknown name, shares that increase or lie outside (0, 1], a wrong count.
        GraphError: a value crosses a cut that cannot be gathered; a scan's tokens were reordered on the way to it by
            anything but `torch.flip`; no block's scans reach the query.

    Warns:
        UserWarning: once of each package, torch or transformers, in a version that this one was not tested with.
    """
    if not isinstance(model, nn.Module):
        raise SimbaError(
            f"transform expects a torch.nn.Module, found {type(model).__name__}. Pass the model object itself."
        )
    name_untested()
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if (runtime := runtime_of(model)) is not None:
        model = runtime.dense(model)
        example_inputs, mask, mask_marks = runtime.arguments(example_inputs, mask, mask_marks)
    if any(runtime_of(module) is not None for module in model.modules()):
        raise SimbaError(
            f"This {type(model).__name__} holds a result of simba_fx.transform; expected a dense model, or that result "
            "itself. Transform what is inside."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise SimbaError(
            f"transform expects a model of one process, found one wrapped in {type(model).__name__}. Transform the "
            "model inside it (model.module), and wrap the result in DistributedDataParallel."
        )
    if sharded := [path for path, tensor in model.named_parameters() if is_sharded(tensor)]:
        raise SimbaError(
            f"transform expects a whole model; {sharded[0]} is a DTensor, of which each process holds a part. "
            "Transform the model first, and apply fully_shard to the blocks and to the model around them afterwards."
        )
    named: Any = protect  # checked, and made a tuple, in Options
    options = Options(as_schedule(schedule), criterion, output, floor, kernels, compile, seed, span, query, named,
                      labels, tail, pad_token_id, mask, mask_marks)  # fmt: skip
    frontend = frontend_of(model)
    refuse_foreign_options(frontend, model, options, example_inputs)
    return frontend.install(model, options, example_inputs)


def runtime_of(model: nn.Module) -> Any:
    """What `transform` made of a model, if it is a result of it or the block stack of one."""
    return model.__dict__.get("_simba")


def _runtime(model: nn.Module) -> Any:
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    runtime = runtime_of(inner) or next((r for m in inner.modules() if (r := runtime_of(m)) is not None), None)
    if runtime is None:
        name = type(model).__name__
        raise SimbaError(
            f"Expected a model returned by simba_fx.transform, found a {name}. Call simba_fx.transform(model) and pass "
            "its result."
        )
    return runtime


@contextmanager
def tail(sparse: nn.Module, tokens: int | Tensor) -> Iterator[None]:
    """Protect each row's last `tokens` real tokens inside the `with` block, and score at the first of them.

    Counted are the *inputs whose logits are read* (method.md section 5), the first of which chooses what is kept. An
    answer of n tokens at the end of the input is read from n + 1 of them, since the token before it predicts its first
    one: `tail(sparse, n + 1)`, or `answer(sparse, n)`. With `tail(sparse, n)` the answer chooses its own context.

    Args:
        tokens: one number for all rows, or a tensor `(B,)` of whole numbers, as in `answer`. At least 1.

    Raises:
        SimbaError: not such a number. In a call: InputError, a row of fewer tokens.
    """
    if isinstance(tokens, Tensor) and _are_counts(tokens) and not bool((tokens < 1).any()):
        with _asking(sparse, answer=False, tails=tokens.to(torch.int64)):
            yield
        return
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise SimbaError(
            f"tail expects a whole number of tokens, at least 1, or one for each row; found {tokens!r}. Write for "
            "example simba_fx.tail(sparse, 100)."
        )
    with _asking(sparse, tail=tokens, answer=False, tails=None):
        yield


@contextmanager
def answer(sparse: nn.Module, tokens: int | Tensor) -> Iterator[None]:
    """Each row ends with an answer of `tokens` tokens, which is read but must not choose what is kept of the prompt.

    Inside the `with` block the answer and the token that predicts its first one are kept, and scores are taken at the
    latter: what is kept does not depend on the answer, and the logits of the answer are those of a model that has not
    seen it. Padding behind the answer does not count.

    Args:
        tokens: one number for all rows, or an int64 tensor `(B,)` (transformers models; where the numbers differ, the
            host waits once for them, and no cache is filled). At least 1.

    Raises:
        SimbaError: not such a number. In a call: InputError, a row of fewer tokens.
    """
    if isinstance(tokens, Tensor):
        if not _are_counts(tokens) or bool((tokens < 1).any()):
            raise SimbaError(
                f"answer expects a whole number of tokens for each row, (B,), at least 1; found {tokens!r}. Write for "
                "example simba_fx.answer(sparse, torch.tensor([3, 7]))."
            )
        with _asking(sparse, answer=True, tails=tokens.to(torch.int64) + 1):
            yield
        return
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise SimbaError(
            f"answer expects a whole number of tokens, at least 1, or one for each row; found {tokens!r}. Write for "
            "example simba_fx.answer(sparse, 7)."
        )
    with _asking(sparse, tail=tokens + 1, answer=True, tails=None):
        yield


@contextmanager
def lengths(sparse: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Rows of a transformers model that are padded at their end, and called without a mask inside the `with` block.

    A causal model's result does not depend on what follows a token, so that evaluation code leaves the mask out. A
    pruned one scores each row at its last real token, which it finds by itself only where the config's `pad_token_id`
    is no end of sequence.

    Args:
        tokens: how many tokens of each row are no padding, `(B,)`.

    Raises:
        SimbaError: not a tensor of whole numbers. In a call: InputError, lengths that the rows cannot have.
    """
    if not isinstance(tokens, Tensor) or not _are_counts(tokens):
        raise SimbaError(
            f"lengths expects a tensor of whole numbers, one for each row, (B,); found {tokens!r}. Write for example "
            "simba_fx.lengths(sparse, torch.tensor([30, 21]))."
        )
    with _asking(sparse, lengths=tokens):
        yield


def _are_counts(tokens: Tensor) -> bool:
    return tokens.dim() == 1 and tokens.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@contextmanager
def _asking(sparse: nn.Module, **more: Any) -> Iterator[None]:
    runtime = _runtime(sparse)
    before = runtime.asked
    runtime.asked = replace(before, first=None, **more) if "lengths" not in more else replace(before, **more)
    try:
        yield
    finally:
        runtime.asked = before


def kept(sparse: nn.Module) -> list[Tensor]:
    """For each block, the original positions of the tokens that entered it in the last call.

    Returns:
        One `(B, k_i)` int64 tensor per block: slot by slot what entered it, −1 where that is no token of the row (rows
        that keep fewer than the rectangle); the others ascend. The slots of `output="kept"` are those of the last one.

    Raises:
        SimbaError: the model has not been called yet.
    """
    rows, length, built, positions, _, mask = last = _last(sparse, "kept")
    device = positions[0].device if positions else None if mask is None else mask.device
    current = torch.arange(length, device=device).expand(rows, length)
    if mask is not None:
        current = torch.where(mask != 0, current, -1)
    if built is None:
        return [current] * program(sparse).captured.facts.n_blocks
    blocks, after = [], {cut.block + 1: i for i, cut in enumerate(built.cuts)}
    for block in range(built.captured.facts.n_blocks):
        if (i := after.get(block)) is not None:
            there = kept_labels.real_at(last, i)
            current = positions[i] if there is None else torch.where(there, positions[i], -1)
        blocks.append(current)
    return blocks


def reached(sparse: nn.Module) -> Tensor:
    """Which tokens of the last call went through every block; the others left early.

    Returns:
        `(B, L)` bool, False for padding as well. To mask a loss of your own: the token at t predicts the label at t+1.

    Raises:
        SimbaError: the model has not been called yet.
    """
    return kept_labels.reached(_last(sparse, "reached"))


def _last(sparse: nn.Module, name: str) -> LastCall:
    """What the runtime remembers of the last call."""
    last: LastCall | None = _runtime(sparse).last
    if last is None:
        raise SimbaError(
            f"{name}() tells what the last call kept; expected a call of the model before it, found none. Call the "
            "model first."
        )
    return last


def program(sparse: nn.Module) -> Built:
    """The program of the last call (of the first capture, before any): its graphs, cuts, shares and history."""
    built: Built = _runtime(sparse).any_built()
    return built


def explain(sparse: nn.Module) -> str:
    """What each pass did to the graph, and why tokens do not leave where they do not."""
    built = program(sparse)
    facts, lines = built.captured.facts, []
    lines.append(f"{facts.n_blocks} blocks, {sum(built.has_scan)} with a scan, {len(built.cuts)} cuts")
    for before, after in zip(built.history, built.history[1:]):
        lines += ["", f"== {after.by}: {after.changed} sites", diff(before, after)]
    lines += ["", "== blocks after which no token leaves"]
    lines += [f"{facts.blocks[block]}: {why}" for block, why in reasons(built.shares, built.has_scan).items()]
    return "\n".join(lines)
