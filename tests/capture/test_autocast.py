"""`torch.autocast` around a part of a forward."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import own_model
import pytest
import torch
import torch._dynamo.testing
from reference import assert_close, on_survivors
from torch import Tensor, fx, nn

import simba_fx
from simba_fx.capture.autocast import refuse_graphs_in_blocks
from simba_fx.errors import CaptureError
from simba_fx.graph.marks import REGION

KEEP_ALL = [1, 1 - 1e-6, 1 - 2e-6]
Around = Callable[[], contextlib.AbstractContextManager[Any]]


def bfloat16() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def off() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False)


class Block(own_model.Block):  # type: ignore[misc]  # the example's own
    def __init__(self, around: Around) -> None:
        super().__init__(16, 4)
        self.around, self.first = around, nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        with self.around():
            hidden = self.first(hidden).float()
        found: Tensor = super().forward(hidden)
        return found


def model(around: Around, block: Any = Block) -> Any:
    torch.manual_seed(1)
    made = own_model.MyMamba(vocabulary=97, width=16, states=4, depth=3)
    made.blocks = nn.ModuleList(block(around) for _ in range(3))
    return made


def ids() -> Tensor:
    return torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("inside", "outside"), [(off, contextlib.nullcontext), (bfloat16, bfloat16)],
                         ids=["off in off", "bfloat16 in bfloat16"])  # fmt: skip
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_a_region_that_changes_nothing_is_none(inside: Around, outside: Around, compile: str) -> None:
    dense, x = model(inside), ids()
    plain = model(contextlib.nullcontext)
    with outside(), torch.no_grad():
        graphs = [simba_fx.transform(one, "linear", compile=compile, criterion="simba") for one in (dense, plain)]
        assert torch.equal(graphs[0](x), graphs[1](x))
        everything = simba_fx.transform(dense, KEEP_ALL, compile=compile, criterion="simba")
        assert_close("output", everything(x), dense(x), 1e-2 if outside is not contextlib.nullcontext else 1e-5)


class Scanned(own_model.Block):  # type: ignore[misc]  # the example's own
    """Its scan runs in float32, as people write it who train under autocast."""

    def __init__(self, around: Around) -> None:
        super().__init__(16, 4)
        self.around = around

    def forward(self, hidden: Tensor) -> Tensor:
        x, gate = self.inputs(self.norm(hidden)).chunk(2, dim=-1)
        x = nn.functional.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        with self.around():
            step, B, C = self.selection(x.float()).split(self.sizes, dim=-1)
            with bfloat16():
                mixed = step @ self.output.weight.T
            y = own_model.scan(x.float(), nn.functional.softplus(step), -torch.exp(self.A_log), B, C)
            y = y @ self.output.weight
            y = y + self.D * x + mixed
        found: Tensor = hidden + self.output(y * nn.functional.silu(gate))
        return found


REGIONS = {"bfloat16 in off": (bfloat16, contextlib.nullcontext), "off in bfloat16": (off, bfloat16)}
regions = pytest.mark.parametrize(("inside", "outside"), REGIONS.values(), ids=REGIONS)


@regions
@pytest.mark.parametrize("compile", ["blocks", "whole"])
@pytest.mark.parametrize("block", [Block, Scanned])
def test_a_region_inside_of_a_block_runs_as_in_the_dense_model(block: Any, inside: Around, outside: Around,
                                                               compile: str) -> None:  # fmt: skip
    """Everything kept, and pruned: the model's own blocks on the survivors, and their gradients. Not as without."""
    dense, x = model(inside, block), ids()
    other = model(contextlib.nullcontext, block)
    other.load_state_dict(dense.state_dict())
    with outside():
        right = dense(x)
        everything = simba_fx.transform(dense, KEEP_ALL, compile=compile, criterion="simba", kernels="model")
        assert torch.equal(everything(x), right)
        assert not torch.equal(other(x), right)
        for kernels, tolerance in (("model", 1e-6), ("auto", 3e-2)):
            sparse = simba_fx.transform(dense, [1, 0.5, 0.3], compile=compile, criterion="recent", output="kept",
                                        kernels=kernels)  # fmt: skip
            found = sparse(x)
            hidden = on_survivors(dense.embedding(x), dense.blocks, simba_fx.kept(sparse))
            right = dense.head(dense.norm(hidden))
            assert_close(kernels, found, right, tolerance)
            pairs = (
                torch.autograd.grad(one.float().square().mean(), list(dense.parameters())) for one in (found, right)
            )
            for (name, _), mine, own in zip(dense.named_parameters(), *pairs, strict=True):
                assert_close(f"{kernels}, {name}", mine, own, tolerance)
            without = on_survivors(dense.embedding(x), other.blocks, simba_fx.kept(sparse))
            assert kernels == "auto" or not torch.allclose(without, hidden, rtol=1e-5, atol=1e-5)


class Placed(own_model.Block):  # type: ignore[misc]  # the example's own
    """Adds a table of positions, which bfloat16 has no room for."""

    def __init__(self, around: Around) -> None:
        super().__init__(16, 4)
        self.around = around

    def forward(self, hidden: Tensor) -> Tensor:
        with self.around():
            places = torch.arange(hidden.shape[1], device=hidden.device)[:, None] * 301.0
            table = (places @ torch.linspace(0.1, 1.0, 16)[None]).cos()
        found: Tensor = super().forward(hidden + table)
        return found


@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_what_is_hoisted_runs_in_its_region(compile: str) -> None:
    dense, other, x = model(off, Placed), model(contextlib.nullcontext, Placed), ids()
    with torch.no_grad(), bfloat16():
        everything = simba_fx.transform(dense, KEEP_ALL, criterion="simba", kernels="model", compile=compile)
        assert torch.equal(everything(x), dense(x))
        assert (other(x) - dense(x)).abs().max() > 0.1


def test_operators_with_graphs_of_their_own_are_refused_in_blocks() -> None:
    """None that torch.export traces today makes one inside of a block; a torch to come may."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    inner = graph.create_node("get_attr", "inner")
    graph.output(graph.call_function(torch.cond, (x, inner, inner, x)))
    run = inner.next
    run.meta |= {REGION: 0, "nn_module_stack": {"": ("blocks.0", Block)}}
    inside = fx.GraphModule({}, fx.Graph())
    with pytest.raises(CaptureError, match=r"blocks\.0 runs .*cond.* on a graph of its own; .* without it"):
        refuse_graphs_in_blocks(graph, {"inner": inside}, 3)
    refuse_graphs_in_blocks(graph, {"inner": inside}, 0)


def test_a_region_is_exported() -> None:
    dense = model(bfloat16, Scanned)
    sparse = simba_fx.transform(dense, "linear", criterion="simba", compile="whole")
    with torch.no_grad():
        sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        program = torch.export.export(sparse, (ids(),), dynamic_shapes=(sizes,), strict=False)
        for size in (24, 31):
            x = torch.randint(97, (2, size), generator=torch.Generator().manual_seed(size))
            assert_close("output", program.module()(x), sparse(x), 1e-6)
            other = simba_fx.transform(model(contextlib.nullcontext, Scanned), "linear", criterion="simba")
            assert not torch.allclose(other(x), sparse(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_copies_keep_regions(compile: str) -> None:
    dense, x = model(bfloat16, Scanned), ids()
    sparse: Any = simba_fx.transform(dense, "linear", criterion="simba", compile=compile)
    plain = simba_fx.transform(model(contextlib.nullcontext, Scanned), "linear", criterion="simba", compile=compile)
    with torch.no_grad():
        found = sparse(x)
        assert torch.equal(copy.deepcopy(sparse)(x), found)
        again = simba_fx.transform(simba_fx.transform(sparse, 0.5), "linear", criterion="simba", compile=compile)
        assert torch.equal(again(x), found)
        assert not torch.equal(plain(x), found)


def test_the_code_shows_it_and_blocks_share_it() -> None:
    dense = model(bfloat16, Scanned)
    sparse: Any = simba_fx.transform(dense, "linear", criterion="simba", compile="whole")
    assert sparse.code.count("    with torch.autocast('cpu', torch.bfloat16, True):\n        ") == 5
    assert "autocast" not in sparse.code.replace("torch.autocast", "")
    assert "block" in str(simba_fx.report(sparse, ids()))


@regions
def test_a_region_compiles_once_for_every_length(inside: Around, outside: Around) -> None:
    dense = model(inside, Scanned)
    torch._dynamo.reset()
    with outside(), torch.no_grad():
        sparse = simba_fx.transform(dense, "linear", criterion="simba")
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled, frames = torch.compile(sparse, backend=counter), list[int]()
        for length in (24, 31, 40):
            x = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(length))
            found = compiled(x)
            frames.append(counter.frame_count)
            assert_close("output", found, sparse(x), 1e-2)
    assert frames[0] == frames[-1] > 0


@regions
@pytest.mark.parametrize("block", [Block, Scanned])
def test_the_backend_runs_regions_too(block: Any, inside: Around, outside: Around) -> None:
    dense, x = model(inside, block), ids()
    other = model(contextlib.nullcontext, block)
    other.load_state_dict(dense.state_dict())
    torch._dynamo.reset()
    options = {"schedule": KEEP_ALL, "criterion": "simba", "backend": "aot_eager"}
    with outside(), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was not compared with the adapter")
        found = torch.compile(dense, backend="simba_fx", options=options)(x)
        right, wrong = dense(x).float(), other(x).float()
    assert float((found - right).norm() / (wrong - right).norm()) < 0.5


def test_a_region_ends_where_a_block_fails() -> None:
    sparse = simba_fx.transform(model(bfloat16), "linear", criterion="simba", compile="whole")
    with pytest.raises(Exception, match="out of range"):
        sparse(torch.full((2, 24), 1000))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("ends", [1, 2])
def test_blocks_inside_and_outside_of_a_region_are_not_alike(ends: int) -> None:
    class Around(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.embedding(x)
            with bfloat16():
                for block in self.blocks[:ends]:
                    hidden = block(hidden)
            for block in self.blocks[ends:]:
                hidden = block(hidden.float())
            found: Tensor = self.head(self.norm(hidden))
            return found

    torch.manual_seed(2)
    dense, x = Around(width=16, states=4, depth=3), ids()
    with torch.no_grad():
        for compile in ("blocks", "whole"):
            everything = simba_fx.transform(dense, KEEP_ALL, criterion="simba", kernels="model", compile=compile)
            assert torch.equal(everything(x), dense(x))


def test_a_region_outside_of_the_blocks_works() -> None:
    class Around(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.embedding(x) * self.norm.weight.sum()
            for block in self.blocks:
                hidden = block(hidden)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found: Tensor = self.head(self.norm(hidden))
            return found

    dense, x = Around(depth=3), ids()
    with torch.no_grad():
        found = simba_fx.transform(dense, KEEP_ALL, criterion="simba")(x)
        assert found.dtype == dense(x).dtype == torch.bfloat16
        assert_close("output", found, dense(x), 1e-2)
