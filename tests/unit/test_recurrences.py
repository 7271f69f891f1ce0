"""The table of recurrences: what passes read off it is what the operators' schemas say."""

from __future__ import annotations

import dataclasses

import pytest

from simba_fx.ops.recurrences import RECURRENCES, Recurrence, recurrence_of


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=lambda r: r.title)
def test_a_record_names_the_operands_of_its_operators(recurrence: Recurrence) -> None:
    fields = [field.name for field in dataclasses.fields(recurrence.operands)]
    assert [argument.name for argument in recurrence.scan._schema.arguments] == fields
    assert [argument.name for argument in recurrence.score._schema.arguments][-3:] == ["real", "tail", "criterion"]
    assert set(recurrence.scored) <= set(fields)
    assert recurrence.scored[0] == fields[0] == recurrence.operands.entry
    assert recurrence_of(recurrence.scan) is recurrence_of(recurrence.scan._opname) is recurrence


def test_arguments_by_name() -> None:
    recurrence = recurrence_of("selective_scan")
    named = recurrence.named(("u", "delta", "A", "B", "C"), {"z": "z"})
    assert named == {"u": "u", "delta": "delta", "A": "A", "B": "B", "C": "C", "D": None, "z": "z", "delta_bias": None,
                     "delta_softplus": False}  # fmt: skip
    assert [named[name] for name in recurrence.scored] == ["u", "delta", "A", "B", "C", None, False]
