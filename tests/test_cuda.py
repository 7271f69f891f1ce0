"""On a GPU: kernels against float64 loops, models against themselves on a CPU, and no synchronisation in a forward.

Skipped where there is no GPU; nothing else needs to be set up there than `make test TORCH=torch`. Whichever kernels can
be imported are used (mamba_ssm's scans, Triton's for the rest), and the Triton ones are tested either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import reference as whole
import torch
from models import BY_NAME, dense, linear, padded, tokens
from test_ops import TOLERANCE, assert_close, check_gradients, selective_operands, ssd_operands
from torch import Tensor, nn
from torch._dynamo.utils import counters

import simba_fx
from simba_fx import ops
from simba_fx.ops import backends, reference

DEVICE = "cuda"
OPS = torch.ops.simba_fx
FAMILIES = ("mamba", "mamba2-one-group", "bamba")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_family = pytest.mark.parametrize("family", FAMILIES)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def there(operands: dict[str, Any]) -> dict[str, Any]:
    return {name: None if t is None else t.to(DEVICE) for name, t in operands.items()}


def right_padding(rows: int, length: int) -> Tensor:
    return torch.arange(length) < (length - 5 * torch.arange(rows))[:, None]


@every_dtype
@pytest.mark.parametrize("channel_last", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_selective_score(dtype: torch.dtype, channel_last: bool, masked: bool) -> None:
    operands = selective_operands(length=700, channels=70, states=16, dtype=dtype, channel_last=channel_last)
    scan = [operands[name] for name in ("u", "delta", "A", "B", "C", "delta_bias")]
    real = right_padding(2, 700) if masked else None
    query = ops.query_position(real, 3, rows=2, length=700)
    got = ops.selective_token_score(*(t.to(DEVICE) for t in scan), True, None if real is None else real.to(DEVICE), 3,
                                    "simba")  # fmt: skip
    best = reference.selective_contributions_ref(*scan, True, query).amax(1)
    assert_close("score", got.cpu(), torch.where(torch.arange(700) <= query[:, None], best, 0.0))


@every_dtype
@pytest.mark.parametrize("masked", [True, False])
def test_the_ssd_score(dtype: torch.dtype, masked: bool) -> None:
    operands = ssd_operands(length=300, heads=6, width=64, groups=2, states=32, dtype=dtype)
    scan = [operands[name] for name in ("x", "dt", "A", "B", "C", "dt_bias")]
    real = right_padding(2, 300) if masked else None
    query = ops.query_position(real, 1, rows=2, length=300)
    got = ops.ssd_token_score(*(t.to(DEVICE) for t in scan), True, 0.0, 9.0, None if real is None else real.to(DEVICE),
                              1, "simba")  # fmt: skip
    best = reference.ssd_contributions_ref(*scan, True, 0.0, 9.0, query).flatten(2).amax(2)
    assert_close("score", got.cpu(), torch.where(torch.arange(300) <= query[:, None], best, 0.0))


@pytest.mark.parametrize("length", [1, 100, 4097, 65536])
def test_the_selection_is_that_of_the_cpu(length: int) -> None:
    score = torch.randn(2, length).mul(8).round()  # many ties
    positions = torch.arange(length).expand(2, length)
    lengths = torch.tensor([length, max(1, length - 3)])
    real = torch.arange(length) < lengths[:, None]
    cases = [
        (OPS.select_tokens, (score, positions)),
        (OPS.select_real_tokens, (score, positions, real, lengths)),
    ]
    for operator, arguments in cases:
        rule = (length, 1, 1, 3, 4)
        for got, right in zip(operator(*(t.to(DEVICE) for t in arguments), *rule), operator(*arguments, *rule)):
            assert torch.equal(got.cpu(), right)


@pytest.mark.parametrize("channel_last", [True, False])
def test_the_scans_and_their_gradients(channel_last: bool) -> None:
    operands = there(selective_operands(length=70, channels=20, states=16, groups=2, channel_last=channel_last))
    check_gradients(ops.selective_scan, reference.selective_scan_ref, operands, (True,))
    heads = there(ssd_operands(length=300, width=8))
    check_gradients(ops.ssd_scan, reference.ssd_scan_ref, heads, (True, 0.1, 1.5))


@every_dtype
def test_the_triton_scan_beside_whatever_the_operator_calls(dtype: torch.dtype) -> None:
    """Where mamba_ssm is installed the operator calls that."""
    operands = there(selective_operands(length=130, channels=40, states=16, dtype=dtype))
    grouped = {name: t.unsqueeze(1) if name in "BC" else t for name, t in operands.items()}
    y, last = backends.triton_kernels().scan.selective_scan(*grouped.values(), True)
    right, right_last = reference.selective_scan_ref(*operands.values(), True)
    assert_close("y", y, right, dtype)
    assert_close("last state", last, right_last)
    assert_close("operator", ops.selective_scan(*operands.values(), True)[0], right, dtype)


def prompt(model: nn.Module, shares: Any, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Ids, and a mask, for which no decision is too close to call."""

    def make(seed: int) -> Any:
        if not masked:
            return tokens(seed, 3, 40)
        rows = [tokens(seed + b, 40 - 6 * b) for b in range(3)]
        return padded(rows, [0, 6, 12], [0, 0, 0])

    ids, mask, _ = whole.Draws().first(model, shares, make)
    return ids, mask


def inputs(ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    given = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    return {name: t.to(DEVICE) for name, t in given.items()} | {"use_cache": False}


@every_family
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiled", ["eager", "blocks", "whole", "blocks with CUDA graphs", "whole with CUDA graphs"])
def test_a_sparse_model_is_what_it_is_on_a_cpu(family: str, masked: bool, compiled: str) -> None:
    entry = BY_NAME[family]
    model, shares = dense(family), linear(entry)
    ids, mask = prompt(model, shares, masked)
    right = whole.run(model, ids, shares, mask)
    way, *graphs = compiled.split(" with ")
    built = entry.build().to(DEVICE)
    sparse: Any = simba_fx.transform(built, shares, **({} if way == "eager" else {"compile": way}))
    with torch.no_grad():
        sparse(**inputs(ids, mask))  # "whole" is traced from a graph that is there
    run = sparse if way == "eager" else torch.compile(sparse, mode="reduce-overhead" if graphs else None)
    for _ in range(4 if graphs else 2):  # recorded, then replayed
        with torch.no_grad():
            logits = run(**inputs(ids, mask)).logits.clone()
        real = right.real
        whole.assert_close("logits", logits.cpu()[real], right.logits[real], 1e-3)
    torch._dynamo.reset()


@every_family
def test_with_everything_kept_the_bits_are_the_dense_models(family: str) -> None:
    model = BY_NAME[family].build().to(DEVICE)
    sparse = simba_fx.transform(model, [1.0] * len(list(simba_fx.program(simba_fx.transform(model)).shares)),
                                kernels="model")  # fmt: skip
    ids = tokens(3, 2, 50).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(sparse(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@every_family
@pytest.mark.parametrize("masked", [False, True])
def test_a_forward_does_not_wait_for_the_gpu(family: str, masked: bool) -> None:
    model = dense(family)
    ids, mask = prompt(model, linear(BY_NAME[family]), masked)
    sparse = simba_fx.transform(BY_NAME[family].build().to(DEVICE))
    given = inputs(ids, mask)
    with torch.no_grad():
        sparse(**given)
        with no_synchronisation():
            sparse(**given)


@every_family
def test_one_compilation_serves_every_length(family: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    sparse = torch.compile(simba_fx.transform(BY_NAME[family].build().to(DEVICE)))
    with torch.no_grad():
        sparse(tokens(0, 3, 20).to(DEVICE), use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True), no_synchronisation():
            for length in (9, 64, 333, 1000):
                sparse(tokens(1, 2, length).to(DEVICE), use_cache=False)
    torch._dynamo.reset()
