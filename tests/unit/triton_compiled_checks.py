"""The Triton kernels without a GPU: run by test_triton.py.

Each compiles for sm_80, sm_90 and sm_100, and no register spills. And `torch.compile` would see them: in a graph that
is traced on CUDA paths, an operator is no opaque call but its kernel.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import triton
import triton_targets
from test_delta import delta_operands
from test_ops import selective_operands, ssd_operands
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_function
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget
from triton_targets import CHANNELS, LAYOUTS, Launch, hottest_loop, mufu, usage

from simba_fx import ops
from simba_fx.ops import backends, inline
from simba_fx.ops.cuda.triton import scan, score

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # Triton 3.9 announces a default of 3.10
OPS = torch.ops.simba_fx

CAPABILITIES = (80, 90, 100)


def check(launch: Launch, capability: int) -> None:
    """No spills where sizes are multiples of 16, as real models' are, nor (for one GPU: time) where they are not."""
    for multiples in (True, False) if capability == 90 else (True,):
        used = usage(launch, capability, multiples)
        assert (used.stack, used.local) == (0, 0), f"multiples {multiples}: {used}"
        assert used.shared <= 48 * 1024, f"multiples {multiples}: {used}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("squares", [False, True])
def test_the_selective_score(squares: bool, layout: str, capability: int) -> None:
    check(triton_targets.selective_score(LAYOUTS[layout], squares=squares), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_steps_behind_a_chunk(capability: int) -> None:
    check(triton_targets.step_sums(score.CHUNK, clamp=True), capability)
    check(triton_targets.suffix(), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("squares", [False, True])
def test_the_ssd_score(squares: bool, capability: int) -> None:
    check(triton_targets.ssd_score(squares=squares), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("by_channel", [False, True])
def test_the_walk_of_delta_rules(by_channel: bool, capability: int) -> None:
    check(triton_targets.delta_reads(by_channel), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_convolution(capability: int) -> None:
    check(triton_targets.convolution(), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_selection(padded: bool, capability: int) -> None:
    check(triton_targets.selection(padded), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output", [False, True])
def test_the_selective_scan(output: bool, layout: str, capability: int) -> None:
    check(triton_targets.selective_scan(LAYOUTS[layout], output), capability)
    check(triton_targets.chain(), capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_state_costs_one_exponential_a_token(capability: int) -> None:
    """A step takes two more instructions of their kind, a gate likewise; a loop covers one token."""
    channels = scan.TILE // 32  # of a thread
    for launch, others in (
        (triton_targets.selective_scan(CHANNELS, output=False), 2),
        (triton_targets.selective_scan(CHANNELS, output=True), 4),
        (triton_targets.selective_score(CHANNELS), 2),
    ):
        loop = hottest_loop(usage(launch, capability, multiples=True).sass)
        assert mufu(loop) == channels * (16 + others)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backward_pass_of_the_selective_scan(layout: str, capability: int) -> None:
    check(triton_targets.selective_scan_backward(LAYOUTS[layout]), capability)


class Driver:
    """What tracing asks of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def traced_graph(function: Any, *arguments: Any, dynamic: int = -1) -> fx.Graph:
    """The graph that a backend of `torch.compile` would get for CUDA tensors like these.

    `dynamic`: dimensions of this size stand for every size.
    """
    graphs: list[fx.Graph] = []

    def keep(module: fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return module

    mode = FakeTensorMode(shape_env=ShapeEnv())
    kinds = {True: DimDynamic.DYNAMIC, False: DimDynamic.STATIC}
    fakes = [
        mode.from_tensor(
            argument,
            source=ConstantSource(f"argument {i}"),
            symbolic_context=StatelessSymbolicContext([kinds[size == dynamic] for size in argument.shape]),
        )
        for i, argument in enumerate(arguments)
    ]
    with mode, tracing(TracingContext(mode)):
        aot_function(function, fw_compiler=keep)(*fakes)
    return graphs[0]


def traced(function: Any, *arguments: Any, dynamic: int = -1) -> list[fx.Node]:
    """The calls in that graph of kernels and of our operators."""
    graph = traced_graph(function, *arguments, dynamic=dynamic)
    return list(graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional)) + [
        node for node in graph.nodes if str(node.target).startswith("simba_fx")
    ]


@pytest.mark.parametrize("length", [20, 300])
def test_no_buffer_has_a_size_that_some_lengths_make_one(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch guards on whether a size is 1: what was compiled for a short prompt would be compiled again for a long one
    (seen on an H200, with a dimension for the chunks of time)."""
    monkeypatch.setattr(backends, "on_gpu", lambda operand: True)
    triton.runtime.driver.set_active(Driver())
    selective = list(selective_operands(length=length, channels=24).values())
    ssd = [operand for name, operand in ssd_operands(length=length).items() if name not in "Dz"]
    calls: list[tuple[Any, list[Any]]] = [
        (lambda *a: ops.selective_scan(*a, True), selective),
        (lambda *a: ops.selective_token_score(*a, True, None, 1, "simba"), [*selective[:5], selective[7]]),
        (lambda *a: ops.ssd_token_score(*a, True, 0.0, 9.0, None, 1, "simba"), ssd),
    ]
    for function, arguments in calls:
        made = traced_graph(function, *arguments, dynamic=length).find_nodes(
            op="call_function", target=torch.ops.aten.new_empty.default
        )
        symbolic = [size for node in made for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
        assert len(symbolic) >= 2
        for size in symbolic:
            assert size.node.shape_env.bound_sympy(size.node.expr).lower >= 2, size


@pytest.mark.parametrize("dynamic", [-1, 40])
def test_graphs_for_a_gpu_hold_kernels_instead_of_operators(dynamic: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "on_gpu", lambda operand: True)
    triton.runtime.driver.set_active(Driver())
    selective = list(selective_operands(length=40, channels=16).values())
    scored = [*selective[:5], selective[7]]
    ssd = ssd_operands(length=40)
    positions, lengths = torch.arange(40).expand(2, 40), torch.tensor([40, 30])
    real = torch.arange(40) < lengths[:, None]
    y = torch.randn(2, 16, 40)
    calls: dict[str, tuple[Any, list[Any], int]] = {
        "scan": (lambda *a: ops.selective_scan(*a, True), selective, 3),
        "scan backward": (lambda *a: OPS.selective_scan_backward(*a, True), [y, torch.randn(2, 16, 4), *selective], 3),
        "score": (lambda *a: ops.selective_token_score(*a, True, None, 1, "simba"), scored, 3),
        "ssd score": (
            lambda *a: ops.ssd_token_score(*a, True, 0.0, 9.0, None, 1, "simba"),
            [ssd[name] for name in ("x", "dt", "A", "B", "C", "dt_bias")],
            3,
        ),
        "convolution": (lambda x, w: ops.causal_conv1d(x, w, None, "silu"), [y, torch.randn(16, 4)], 1),
        "select": (lambda s, p: ops.select_tokens(s, p, s.shape[1], 1, 1, 2, 4), [y[:, 0], positions], 1),
        "select real": (
            lambda s, p, r, n: ops.select_real_tokens(s, p, r, n, s.shape[1], 1, 1, 2, 4),
            [y[:, 0], positions, real, lengths],
            1,
        ),
    }
    for name, (function, arguments, kernels) in calls.items():
        found = traced(function, *arguments, dynamic=dynamic)
        assert [node.target for node in found] == [triton_kernel_wrapper_functional] * kernels, name
    delta = list(delta_operands(length=40, size=16).values())
    for criterion, kernels in (("simba", 1), ("simba-l2", 1), ("write", 0)):
        found = traced(lambda *a: ops.delta_token_score(*a, 64, None, 1, criterion), *delta, dynamic=dynamic)  # noqa: B023
        assert [node.target for node in found] == [triton_kernel_wrapper_functional] * kernels, criterion
    removal = traced(lambda *a: ops.delta_token_score(*a, 64, None, 1, "removal"), *delta)
    assert [node.target for node in removal] == [OPS.delta_token_score.default]
    clip = traced(lambda *a: ops.selective_token_score(*a, True, None, 1, "clip"), *scored)
    assert [node.target for node in clip] == [OPS.selective_token_score.default]  # not a kernel: stays one call
    heads = traced(lambda *a: ops.ssd_scan(*a, True), *ssd.values(), dynamic=dynamic)
    assert [node.target for node in heads] == [OPS.ssd_scan.default]  # as does the scan of Mamba-2


def found_in_the_cache() -> bool:
    """Whether AOTAutograd's cache holds the graph of a scan when a process compiles it anew."""
    torch._dynamo.reset()
    counters.clear()
    torch.compile(lambda *operands: ops.selective_scan(*operands, True))(*selective_operands().values())
    hits, misses = (counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss"))
    assert hits + misses == 1
    return bool(hits)


def test_no_cached_graph_outlives_what_it_was_traced_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of this package, or other sources: the graph is traced anew, once."""
    versions = {"simba_fx": "0.1.0"}
    monkeypatch.setattr(backends, "version", versions.__getitem__)
    assert inline._digest() != hashlib.sha256().hexdigest()  # it has found sources

    def changes(name: str) -> None:
        assert not found_in_the_cache(), name
        assert found_in_the_cache(), name

    with fresh_cache():
        changes("the first time")
        monkeypatch.setitem(versions, "simba_fx", "9")
        changes("another simba_fx")
        monkeypatch.setattr(inline, "_digest", lambda: "another")
        changes("other sources")
