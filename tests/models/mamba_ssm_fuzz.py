"""`test_fuzz_models.py` for `mamba_ssm`'s models: one drawn setting, and drawn calls, in the process that is told the
setting's number by `SIMBA_FX_FUZZ_SETTING`. These models take whole rows of one length, and no mask."""

from __future__ import annotations

import contextlib
import os
import random
from fractions import Fraction
from typing import Any

import mamba_ssm_cpu as cpu  # first: it imports transformers, then stubs the extensions
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from mamba_ssm_checks import CASES, GRADIENT_TOLERANCE, TOLERANCE, assert_close, gradients, states, tokens
from strategies import examples
from test_fuzz_models import by_strength, draw_schedule, strength

import simba_fx
from simba_fx.errors import InputError


class Subject:
    """A dense model, its sparse copy, and the options in the reference's words."""

    def __init__(self, number: int) -> None:
        rng = random.Random(number)
        case = rng.choice([case for case in CASES if case.dtype is torch.float32])
        layers = rng.choice((1, 2, 3, 4, 4))
        self.no_decode = case.options.get("ssm", {}).get("D_has_hdim", False)
        self.dense = cpu.build(**case.options | {"n_layer": layers})
        criterion = rng.choice(["simba"] * 4 + [*reference.CRITERIA, "random", "stride", by_strength])
        options: dict[str, Any] = {"floor": rng.choice((0, 1, 4, 9)), "seed": rng.choice((0, 7))}
        if rng.random() < 0.3:
            options["query"] = -1
        if rng.random() < 0.3:
            options["protect"] = tuple(rng.sample((0, 1, 4, -1, -2), 2))
        schedule, shares = draw_schedule(rng, layers)
        self.output = rng.choice(("full", "full", "kept"))
        self.title = f"{case.name}, {layers} layers: {schedule}, {criterion}, {options}, {self.output}"
        self.sparse = simba_fx.transform(
            self.dense, schedule, criterion=criterion, output=self.output, kernels=rng.choice(("auto", "model")),
            compile=rng.choice(("blocks", "whole")), **options)  # fmt: skip
        self.shares: tuple[Fraction, ...] = shares or simba_fx.program(self.sparse).shares
        self.options = options | {"criterion": criterion if isinstance(criterion, str) else strength}
        self.least_tail = 0 if "query" in options else 1
        query = options.get("query")
        named = (*options.get("protect", ()), *(() if query is None else (query,)))
        self.least = max([1, *(p + 1 if p >= 0 else -p for p in named)])


NUMBER = int(os.environ.get("SIMBA_FX_FUZZ_SETTING", "0"))


@st.composite
def calls(draw: st.DrawFn, least: int) -> dict[str, Any]:
    length = draw(st.one_of(st.integers(least, least + 9), st.integers(least, 50)))
    return {
        "what": draw(st.sampled_from(("plain", "states", "gradients", "generate", "a tail longer than a row"))),
        "ids": tokens(draw(st.integers(0, 2**20)), draw(st.integers(1, 3)), length),
        "tail": draw(st.one_of(st.none(), st.integers(1, length))),
        "new": draw(st.integers(1, 4)),
    }


def check(one: Subject, what: str, ids: torch.Tensor, tail: int | None, new: int) -> None:
    length = ids.shape[1]
    if what == "a tail longer than a row":
        with pytest.raises(InputError, match="protects the last"), simba_fx.tail(one.sparse, length + new):
            one.sparse(ids)
        return
    if what == "generate" and new > 1 and one.no_decode:
        with pytest.raises(AssertionError):  # D (H P,) does not fit mamba_ssm's own step
            one.dense.generate(ids, max_length=length + new)
        return
    ours = states(len(ids)) if what == "states" else None
    protected = contextlib.nullcontext() if tail is None else simba_fx.tail(one.sparse, tail)
    with torch.set_grad_enabled(what == "gradients"), protected:
        if what == "generate":
            found = one.sparse.generate(ids, max_length=length + new, output_scores=True, return_dict_in_generate=True)
        else:
            found = one.sparse(ids, **({} if ours is None else {"inference_params": ours})).logits
    kept, losses = simba_fx.kept(one.sparse), [torch.zeros(())] * 2
    weights = torch.randn(*ids.shape, 56, generator=torch.Generator().manual_seed(length))
    for b, row in enumerate(ids):
        options = one.options | {"chosen": reference.chosen_of(kept, b, torch.arange(length)),
                                 "tail": one.least_tail if tail is None else tail}  # fmt: skip
        if what == "generate":
            with torch.no_grad():
                expected = cpu.generate(
                    one.dense, row, one.shares, new, found.sequences[b, length:].tolist(), **options
                )
            for step, scores in enumerate(found.scores):
                assert_close(f"step {step}, row {b}", scores[b], expected.steps[step], TOLERANCE[torch.float32])
        else:
            theirs = None if ours is None else states()
            with torch.set_grad_enabled(what == "gradients"):
                expected = cpu.run_row(one.dense, row, one.shares, states=theirs, **options)
            places = kept[-1][b] if one.output == "kept" else torch.arange(length)
            wanted = expected.logits[places]
            assert_close(f"row {b}", found[b], wanted, TOLERANCE[torch.float32])
            losses = [loss + (x * weights[b, places]).sum() for loss, x in zip(losses, (found[b], wanted))]
            for layer, pair in ({} if theirs is None else theirs.key_value_memory_dict).items():
                for mine, other in zip(ours.key_value_memory_dict[layer], pair):
                    assert_close(f"state of block {layer}, row {b}", mine[b], other[0], TOLERANCE[torch.float32])
        assert expected.margin > -reference.CLEAR_MARGIN
    if what == "gradients":
        found_by_name, wanted_by_name = (gradients(loss, one.dense) for loss in losses)
        scale = max(float(g.norm()) for g in wanted_by_name.values())
        for name, gradient in wanted_by_name.items():
            if float(gradient.norm()) > 1e-5 * scale:
                assert_close(name, found_by_name[name], gradient, GRADIENT_TOLERANCE[torch.float32])


def test_any_sequence_of_calls_equals_the_reference() -> None:
    one = Subject(NUMBER)
    print(one.title)  # shown where the test fails

    @examples(100)
    @given(sequence=st.lists(calls(one.least), min_size=1, max_size=4))
    def run(sequence: list[dict[str, Any]]) -> None:
        for call in sequence:
            check(one, **call)

    run()
