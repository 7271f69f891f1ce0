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
from triton_targets import usage

from simba_fx import ops
from simba_fx.ops import backends, cuda, inline
from simba_fx.ops.triton import conv, scan, score, select

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # Triton 3.9 announces a default of 3.10
OPS = torch.ops.simba_fx

CAPABILITIES = (80, 90, 100)
POINTERS = dict.fromkeys(("A", "bias", "D", "score", "last", "boundaries", "steps", "sums", "behind", "weights",
                          "starts", "dlast", "du", "ddelta", "dz", "dA", "dB", "dC", "dD"), "*fp32")  # fmt: skip
OPERANDS = ("u", "delta", "z", "B", "C", "x", "dt", "y", "dy", "weight")
LAYOUTS = {
    "time contiguous": ("u_token", "delta_token", "z_token", "dy_token", "B_token", "C_token"),
    "channels contiguous": ("u_channel", "delta_channel", "z_channel", "dy_channel", "B_state", "C_state"),
}


def arguments(kernel: Any) -> set[str]:
    return set(kernel.arg_names)


def typed(kernel: Any, dtype: str, **more: str) -> dict[str, str]:
    named = {**POINTERS, **dict.fromkeys(OPERANDS, f"*{dtype}"), **more}
    return {name: kind for name, kind in named.items() if name in arguments(kernel)}


WARPS = {
    scan.selective_scan_kernel: 1,
    score.selective_score_kernel: 1,
    score.suffix_kernel: 1,
    select.select_kernel: 8,
}
"""Of those that are launched with another number than Triton's default."""


def ones(kernel: Any, names: tuple[str, ...]) -> dict[str, int]:
    return {name: 1 for name in names if name in arguments(kernel)}


def check(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> None:
    for config in getattr(kernel, "configs", [triton.Config({}, num_warps=WARPS.get(kernel, 4))]):
        used = usage(kernel, config, types, constants, capability)
        assert (used.stack, used.local) == (0, 0), f"{config}: {used}"
        assert used.shared <= 48 * 1024, f"{config}: {used}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_selective_score(layout: str, capability: int) -> None:
    """mamba-130m … 2.8b: N = 16."""
    kernel = score.selective_score_kernel
    switches = {"states": 16, "SOFTPLUS": True, "BIAS": True, "REAL": True, "ABSOLUTE": False, "groups": 1,
                "FEW": score.FEW, "BLOCK_D": scan.TILE}  # fmt: skip
    unit = ones(kernel, (*LAYOUTS[layout], "A_state"))
    check(kernel, typed(kernel, "bf16", real="*i1"), switches | unit, capability)


LIMITS = {"dt_min": "fp64", "dt_max": "fp64"}
"""What a graph that Inductor compiled hands over for a Python number."""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_steps_behind_a_chunk(capability: int) -> None:
    kernel = score.step_sums_kernel
    switches = {"SOFTPLUS": True, "BIAS": True, "CLAMP": True, "REAL": True, "CHUNK": score.CHUNK, "BLOCK_D": 64}
    check(kernel, typed(kernel, "bf16", real="*i1", **LIMITS), switches | {"dt_channel": 1}, capability)
    check(score.suffix_kernel, typed(score.suffix_kernel, "bf16"), {"AHEAD": 16, "BLOCK_D": 32}, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_ssd_score(capability: int) -> None:
    """mamba2-130m … 2.7b: P = 64."""
    kernel = score.ssd_score_kernel
    switches = {"BLOCK_T": score.SSD_CHUNK, "BLOCK_P": 64, "SOFTPLUS": True, "BIAS": True, "REAL": True,
                "ABSOLUTE": False, "DECAY": True}  # fmt: skip
    unit = ones(kernel, ("groups", "x_channel", "dt_head", "A_head"))
    check(kernel, typed(kernel, "bf16", real="*i1", weights="*fp32", **LIMITS), switches | unit, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_convolution(capability: int) -> None:
    kernel = conv.causal_conv1d_kernel
    switches = {"TAPS": 4, "BIAS": True, "SILU": True, "BLOCK_T": 32, "BLOCK_D": 128, "x_channel": 1, "weight_tap": 1}
    check(kernel, typed(kernel, "bf16"), switches, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_selection(padded: bool, capability: int) -> None:
    kernel = select.select_kernel
    lists = dict.fromkeys(("positions", "lengths", "kept", "dropped", "kept_positions", "dropped_positions"), "*i64")
    types = {"score": "*fp32", **lists, "real": "*i1", "kept_real": "*i1"}
    if not padded:
        types |= dict.fromkeys(("real", "lengths", "kept_real"), "*fp32")
    check(kernel, types, {"REAL": padded, "position_slot": 1, "BLOCK": 2048}, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output", [False, True])
def test_the_selective_scan(output: bool, layout: str, capability: int) -> None:
    kernel = scan.selective_scan_kernel
    switches = {"states": 16, "SOFTPLUS": True, "BIAS": True, "SKIP": True, "GATE": True, "OUTPUT": output,
                "groups": 1, "BLOCK_D": scan.TILE}  # fmt: skip
    unit = ones(kernel, (*LAYOUTS[layout], "A_state"))
    check(kernel, typed(kernel, "bf16"), switches | unit, capability)
    chain = {"states": 16, "AHEAD": 8, "BLOCK_D": 128, "A_state": 1}
    check(scan.chain_kernel, typed(scan.chain_kernel, "bf16"), chain, capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backward_pass_of_the_selective_scan(layout: str, capability: int) -> None:
    kernel = scan.selective_scan_backward_kernel
    switches = {"BLOCK_N": 16, "BLOCK_T": scan.BLOCK_T, "BLOCK_D": scan.BLOCK_D, "SOFTPLUS": True, "BIAS": True,
                "SKIP": True, "GATE": True, "groups": 1}  # fmt: skip
    check(kernel, typed(kernel, "bf16"), switches | ones(kernel, LAYOUTS[layout]), capability)


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
        "ssd scan": (lambda *a: ops.ssd_scan(*a, True), list(ssd.values()), 0),
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
    clip = traced(lambda *a: ops.selective_token_score(*a, True, None, 1, "clip"), *scored)
    assert [node.target for node in clip] == [OPS.selective_token_score.default]  # not a kernel: stays one call


def found_in_the_cache() -> bool:
    """Whether AOTAutograd's cache holds the graph of a scan when a process compiles it anew."""
    torch._dynamo.reset()
    counters.clear()
    torch.compile(lambda *operands: ops.selective_scan(*operands, True))(*selective_operands().values())
    hits, misses = (counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss"))
    assert hits + misses == 1
    return bool(hits)


def test_no_cached_graph_outlives_what_it_was_traced_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that appears, or another version of one, or of this one: the graph is traced anew, once."""
    versions = {"mamba_ssm": "2.3.2", "simba_fx": "0.1.0"}
    monkeypatch.setattr(backends, "version", versions.__getitem__)
    assert inline._digest() != hashlib.sha256().hexdigest()  # it has found sources

    def changes(name: str) -> None:
        assert not found_in_the_cache(), name
        assert found_in_the_cache(), name

    with fresh_cache():
        changes("the first time")
        assert cuda.ssd_scan_fn() is None
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "ssd_scan_fn", lambda: object)
            changes("mamba_ssm appears")
            patch.setitem(versions, "mamba_ssm", "9")
            changes("another mamba_ssm")
        assert found_in_the_cache()
        monkeypatch.setitem(versions, "simba_fx", "9")
        changes("another simba_fx")
        monkeypatch.setattr(inline, "_digest", lambda: "another")
        changes("other sources")
