"""On a GPU: kernels against float64 loops, models against themselves on a CPU, and no synchronisation in a forward.

Skipped where there is no GPU; nothing else needs to be set up there than `make test TORCH=torch`. Whichever kernels can
be imported are used (mamba_ssm's SSD scan, Triton's for the rest), and the Triton ones are tested either way. What is
quick comes first: a run that is cut short has seen the kernels and the uncompiled models.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import reference as whole
import torch
from models import BY_NAME, dense, linear, padded, tokens
from test_delta import delta_operands
from test_ops import TOLERANCE, assert_close, check_gradients, selective_operands, ssd_operands
from torch import Tensor, nn
from torch._dynamo.utils import counters

import simba_fx
from simba_fx import ops
from simba_fx.ops import backends, reference
from simba_fx.ops.cuda import packages as cuda
from simba_fx.ops.operands import SelectiveScan

DEVICE = "cuda"
OPS = torch.ops.simba_fx
FAMILIES = ("mamba", "mamba2-one-group", "bamba")
WAYS = ("blocks", "blocks with CUDA graphs", "whole", "whole with CUDA graphs")

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# Inductor recommends TF32, which would be too coarse for these comparisons.
pytestmark = [no_gpu, pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")]
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """In PyTorch's products and convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def in_tf32(kind: str) -> bool:
    """mamba_ssm's SSD scan multiplies float32 in TF32 (10 bits), whatever PyTorch is told: the result is off by about
    1e-3, and float32's tolerances do not hold."""
    return DEVICE == "cuda" and kind == "ssd" and cuda.ssd_scan_fn() is not None


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


@pytest.mark.parametrize(
    ("dtype", "channel_last", "masked"),
    [
        (torch.float32, True, False),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float16, True, True),
    ],
    ids=str,
)
def test_the_selective_score(dtype: torch.dtype, channel_last: bool, masked: bool) -> None:
    operands = selective_operands(length=700, channels=70, states=16, dtype=dtype, channel_last=channel_last)
    scan = [operands[name] for name in ("u", "delta", "A", "B", "C", "delta_bias")]
    real = right_padding(2, 700) if masked else None
    query = ops.query_position(real, 3, rows=2, length=700)
    got = ops.selective_token_score(*(t.to(DEVICE) for t in scan), True, None if real is None else real.to(DEVICE), 3,
                                    "simba")  # fmt: skip
    best = reference.selective_contributions_ref(*scan, True, query).amax(1)
    assert_close("score", got.cpu(), torch.where(torch.arange(700) <= query[:, None], best, 0.0))


@pytest.mark.parametrize(
    ("dtype", "masked"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
    ids=str,
)
def test_the_ssd_score(dtype: torch.dtype, masked: bool) -> None:
    operands = ssd_operands(length=300, heads=6, width=64, groups=2, states=32, dtype=dtype)
    scan = [operands[name] for name in ("x", "dt", "A", "B", "C", "dt_bias")]
    real = right_padding(2, 300) if masked else None
    query = ops.query_position(real, 1, rows=2, length=300)
    got = ops.ssd_token_score(*(t.to(DEVICE) for t in scan), True, 0.0, 9.0, None if real is None else real.to(DEVICE),
                              1, "simba")  # fmt: skip
    best = reference.ssd_contributions_ref(*scan, True, 0.0, 9.0, query).flatten(2).amax(2)
    assert_close("score", got.cpu(), torch.where(torch.arange(300) <= query[:, None], best, 0.0))


@pytest.mark.parametrize("by_channel", [False, True])
@every_dtype
def test_delta_rules(dtype: torch.dtype, by_channel: bool) -> None:
    """The scan is fla's in half precision, where that is installed; the walk of a score is Triton's."""
    sizes = {"heads": 4, "groups": 2, "size": 128, "width": 64}
    operands = delta_operands(length=130, dtype=dtype, by_channel=by_channel, decay=0.1, **sizes)
    moved = there(operands)
    y, last = ops.delta_scan(*moved.values())
    right, right_last = reference.delta_scan_ref(*operands.values())
    assert_close("y", y.cpu(), right, dtype)
    assert_close("last state", last.cpu(), right_last, dtype)
    real = right_padding(2, 130)
    query = ops.query_position(real, 3, rows=2, length=130)
    got = ops.delta_token_score(*moved.values(), 64, real.to(DEVICE), 3, "simba-l2")
    norms = reference.delta_contributions_ref(*operands.values(), query).flatten(2).norm(dim=2)
    assert_close("score", got.cpu(), torch.where(torch.arange(130) <= query[:, None], norms, 0.0))


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
    as_good_as = torch.bfloat16 if in_tf32("ssd") else torch.float32
    check_gradients(ops.ssd_scan, reference.ssd_scan_ref, heads, (True, 0.1, 1.5), as_good_as)


@every_dtype
def test_the_triton_scan_beside_whatever_the_operator_calls(dtype: torch.dtype) -> None:
    """Where mamba_ssm is installed the operator calls that."""
    operands = there(selective_operands(length=130, channels=40, states=16, dtype=dtype))
    scan = SelectiveScan(*operands.values(), True).checked("selective_scan")
    y, last = backends.triton_kernels().scan.selective_scan(scan)
    right, right_last = reference.selective_scan_ref(*operands.values(), True)
    assert_close("y", y, right, dtype)
    assert_close("last state", last, right_last)
    assert_close("operator", ops.selective_scan(*operands.values(), True)[0], right, dtype)


@functools.cache
def prompt(family: str, masked: bool) -> tuple[Tensor, Tensor | None, whole.Batch]:
    """Ids, a mask and the reference's result. Of twenty draws the one with the clearest decisions: where the closest is
    closer than rounding, another selection would be as right."""
    model, shares = dense(family), linear(BY_NAME[family])

    def made(seed: int) -> tuple[Tensor, Tensor | None]:
        if not masked:
            return tokens(seed, 3, 40), None
        return padded([tokens(seed + b, 40 - 6 * b) for b in range(3)], [0, 6, 12], [0, 0, 0])

    with torch.no_grad():
        drawn = [(ids, mask, whole.run(model, ids, shares, mask)) for ids, mask in map(made, range(20))]
    clearest = max(drawn, key=lambda case: case[2].margin)
    assert clearest[2].margin >= 5e-3
    return clearest


@functools.cache
def on_device(family: str) -> nn.Module:
    return BY_NAME[family].build().to(DEVICE)


@functools.cache
def sparse_on_device(family: str, way: Any = "blocks") -> nn.Module:
    return simba_fx.transform(on_device(family), linear(BY_NAME[family]), compile=way)


def inputs(ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
    given = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    return {name: t.to(DEVICE) for name, t in given.items()} | {"use_cache": False}


@every_family
def test_with_everything_kept_the_bits_are_the_dense_models(family: str) -> None:
    model = on_device(family)
    sparse = simba_fx.transform(model, [1.0] * len(list(simba_fx.program(simba_fx.transform(model, "linear")).shares)),
                                kernels="model")  # fmt: skip
    ids = tokens(3, 2, 50).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(sparse(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@every_family
@pytest.mark.parametrize("masked", [False, True])
def test_a_sparse_model_is_what_it_is_on_a_cpu(family: str, masked: bool) -> None:
    sparse = sparse_on_device(family)
    check_against_the_reference(sparse, family, masked, 1, sparse)


@every_family
@pytest.mark.parametrize("masked", [False, True])
def test_a_forward_does_not_wait_for_the_gpu(family: str, masked: bool) -> None:
    sparse = sparse_on_device(family)
    ids, mask, _ = prompt(family, masked)
    given = inputs(ids, mask)
    with torch.no_grad():
        sparse(**given)
        with no_synchronisation():
            sparse(**given)


@every_family
def test_one_compilation_serves_every_length(family: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    sparse = torch.compile(sparse_on_device(family))
    first, *others = [tokens(1, 2, length).to(DEVICE) for length in (20, 9, 64, 333, 1000)]
    with torch.no_grad():
        sparse(first, use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True), no_synchronisation():
            for ids in others:
                sparse(ids, use_cache=False)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("way", "family", "masked"),
    [(way, family, (i + j) % 2 == 1) for i, way in enumerate(WAYS) for j, family in enumerate(FAMILIES)],
)
def test_a_compiled_model_is_what_it_is_on_a_cpu(way: str, family: str, masked: bool) -> None:
    how, *graphs = way.split(" with ")
    sparse = sparse_on_device(family, how)
    ids, mask, _ = prompt(family, masked)
    with torch.no_grad():
        sparse(**inputs(ids, mask))  # "whole" is traced from a graph that is there
    run = torch.compile(sparse, mode="reduce-overhead" if graphs else None)
    check_against_the_reference(run, family, masked, 4 if graphs else 2, sparse)  # recorded, then replayed
    torch._dynamo.reset()


def check_against_the_reference(run: Any, family: str, masked: bool, calls: int, sparse: nn.Module) -> None:
    """Logits of `run`, and the tokens that its model, `sparse`, kept."""
    ids, mask, right = prompt(family, masked)
    for _ in range(calls):
        with torch.no_grad():
            logits = run(**inputs(ids, mask)).logits.clone()
        kept = [[[t for t in row if t >= 0] for row in block.tolist()] for block in simba_fx.kept(sparse)]
        assert kept == right.kept
        tolerance = 1e-2 if in_tf32(BY_NAME[family].kind) else 1e-3
        whole.assert_close("logits", logits.cpu()[right.real], right.logits[right.real], tolerance)
