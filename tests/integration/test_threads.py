"""Several threads at once: captures, dense calls and sparse calls do not disturb each other."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import BY_NAME, Entry, keep_all, logits, n_blocks, schedules, three_rows, tokens
from reference import assert_close, cache_name
from torch import Tensor, nn

import simba_fx
from simba_fx.frontends.transformers import model as frontend


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
    ((_, variants),) = [(k, v) for k, v in model._simba.variants.items() if k.mask is not None]
    assert len(variants) == 1


# --- one model, several callers ---------------------------------------------------------------------------------------


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def kept_with(model: nn.Module, tail: int, ids: Tensor) -> list[list[int]]:
    with simba_fx.tail(model, tail), torch.no_grad():
        model(ids, use_cache=False)
        return [block[0].tolist() for block in simba_fx.kept(model)]


@pytest.mark.usefixtures("switching")
def test_what_a_thread_asks_for_and_what_its_call_kept_are_its_own() -> None:
    model = simba_fx.transform(BY_NAME["mamba"].build(), "linear")
    calls = [(tail, tokens(tail, 1, 40 + tail)) for tail in (1, 5, 9)]
    expected = [kept_with(model, *call) for call in calls]
    assert len({str(found) for found in expected}) == 3
    found = at_once(*[lambda _, call=call: [kept_with(model, *call) for _ in range(25)] for call in calls[:2]],
                    lambda done: [kept_with(model, *calls[2]) for _ in range(25)])  # fmt: skip
    for mine, reference in zip(found, expected, strict=True):
        assert all(each == reference for each in mine)


def in_another_thread(work: Callable[[], Any]) -> Callable[..., None]:
    """Runs it there the first time, from begin to end."""
    once = [threading.Thread(target=work)]

    def run(*_: Any) -> None:
        if once and threading.current_thread() is threading.main_thread():
            thread = once.pop()
            thread.start()
            thread.join()

    return run


def test_losses_of_survivors_are_those_of_ones_own_call() -> None:
    model = simba_fx.transform(BY_NAME["mamba"].build(), "linear", labels="kept")
    mine, other = (
        {"input_ids": ids, "labels": ids, "use_cache": False} for ids in (tokens(1, 2, 30), tokens(2, 2, 30))
    )

    def loss(call: dict[str, Any]) -> float:
        with torch.no_grad():
            return float(model(**call).loss)

    expected, others = loss(mine), []
    between = model.lm_head.register_forward_hook(in_another_thread(lambda: others.append(loss(other))))
    assert loss(mine) == expected
    between.remove()
    assert others == [loss(other)]


def test_hybrids_decode_with_their_own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = simba_fx.transform(BY_NAME["bamba"].build(), "linear")
    mine, other = ({"input_ids": tokens(seed, 2, 30), "attention_mask": padded(2, 30, pads)}
                   for seed, pads in ((1, 3), (2, 11)))  # fmt: skip

    name = cache_name(model)

    @torch.no_grad()
    def second(call: dict[str, Any]) -> Tensor:
        """The logits of the token behind the prompt."""
        cache = {name: model(**call, use_cache=True)[name]}
        mask = torch.cat((call["attention_mask"], torch.ones(2, 1, dtype=torch.int64)), 1)
        found: Tensor = model(tokens(5, 2, 1), attention_mask=mask, use_cache=True, **cache).logits
        return found

    expected, others = second(mine), []
    run, fill = in_another_thread(lambda: others.append(second(other))), frontend.fill
    with monkeypatch.context() as patch:
        patch.setattr(frontend, "fill", lambda *args: (run(), fill(*args)))
        assert torch.equal(second(mine), expected)
    assert torch.equal(others[0], second(other))


def padded(rows: int, length: int, pads: int) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, :pads] = 0
    return mask


def test_tasks_that_overlap_leave_nothing_behind() -> None:
    """Two tasks of one thread, each inside a context of its own while the other runs."""
    model = simba_fx.transform(BY_NAME["mamba"].build(), "linear")
    ids = tokens(1, 1, 40)
    expected = {tail: kept_with(model, tail, ids) for tail in (1, 4, 8)}

    async def work(tail: int) -> list[list[int]]:
        with simba_fx.tail(model, tail):
            await asyncio.sleep(0.01 * tail)
            model(ids, use_cache=False)
            await asyncio.sleep(0.05)
            return [block[0].tolist() for block in simba_fx.kept(model)]

    async def both() -> list[Any]:
        return await asyncio.gather(work(4), work(8))

    with torch.no_grad():  # around both: torch's grad mode is the thread's
        assert asyncio.run(both()) == [expected[4], expected[8]]
        model(ids, use_cache=False)
    assert torch.is_grad_enabled()
    assert [block[0].tolist() for block in simba_fx.kept(model)] == expected[1]
