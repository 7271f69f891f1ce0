"""Several threads at once: captures, dense calls and sparse calls do not disturb each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from models import BY_NAME, Entry, keep_all, logits, n_blocks, schedules, three_rows, tokens
from reference import assert_close
from torch import Tensor, nn

import simba_fx


def at_once(*works: Callable[[threading.Event], Any]) -> list[Any]:
    """Run each in a thread of its own, started together; the event tells endless ones that the others are done.

    What a thread raised is raised here.
    """
    start, done = threading.Barrier(len(works)), threading.Event()
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []
    left = threading.Semaphore(0)

    def run(i: int) -> None:
        try:
            start.wait()
            results[i] = works[i](done)
        except BaseException as error:
            errors.append(error)
        finally:
            left.release()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for _ in works[:2]:  # the first two end by themselves
        left.acquire()
    done.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def functions_of(entry: Entry) -> dict[str, Any]:
    return dict(vars(entry.modeling))


def test_two_transforms_at_once() -> None:
    """Of one modeling file, while a third thread runs a dense model of it and a fourth a sparse one."""
    entry, other = BY_NAME["mamba"], BY_NAME["mamba-residual-in-own-dtype"]
    models = [entry.build(), other.build()]
    shares = [schedules(n_blocks(model))["linear"] for model in models]
    expected = [simba_fx.transform(m, s, kernels="model") for m, s in zip(models, shares)]
    running, sparse = entry.build(), simba_fx.transform(entry.build(), shares[0])
    masked, whole = three_rows(masked=True), {"input_ids": tokens(3, 2, 21)}
    calm = {id(running): logits(running, **whole), id(sparse): logits(sparse, **masked)}
    before = functions_of(entry)

    def transform(i: int) -> Callable[[Any], Any]:
        return lambda _: [simba_fx.transform(models[i], shares[i], kernels="model") for _ in range(2)]

    def run(model: nn.Module, call: dict[str, Tensor]) -> Callable[[threading.Event], int]:
        def work(done: threading.Event) -> int:
            calls = 0
            while not done.is_set():
                # threads share the cores differently: rounding
                assert_close("logits", logits(model, **call), calm[id(model)], 1e-5)
                calls += 1
            return calls

        return work

    made = at_once(transform(0), transform(1), run(running, whole), run(sparse, masked))
    assert functions_of(entry) == before
    assert min(made[2:]) >= 2  # they did run meanwhile
    for several, reference in zip(made[:2], expected):
        for model in several:
            for call in (three_rows(False), masked):
                assert_close("logits", logits(model, **call), logits(reference, **call), 1e-5)
            assert simba_fx.program(model).history[-1].text == simba_fx.program(reference).history[-1].text


def test_a_first_call_of_a_kind_during_another_capture() -> None:
    """torch's flag that something is traced is the process's; a sparse model captures what it needs all the same."""
    entry = BY_NAME["mamba2-two-groups"]
    shares = schedules(n_blocks(entry.build()))["linear"]
    model, other = simba_fx.transform(entry.build(), shares), entry.build()
    expected = logits(simba_fx.transform(entry.build(), shares), **three_rows(masked=True))
    found, _ = at_once(
        lambda _: logits(model, **three_rows(masked=True)),
        lambda _: [simba_fx.transform(other, shares) for _ in range(2)],
    )
    assert_close("logits", found, expected, 1e-5)


def test_one_model_called_for_the_first_time_by_two_threads() -> None:
    entry = BY_NAME["mamba"]
    model = simba_fx.transform(entry.build(), keep_all(4), kernels="model")
    found = at_once(*[lambda _: logits(model, **three_rows(masked=True))] * 2)
    assert_close("logits", found[0], found[1], 1e-5)
    ((_, variants),) = [(k, v) for k, v in model._simba_stack.variants.items() if k.mask is not None]
    assert len(variants) == 1
