"""torch.export and AOTInductor: the sparse model's own results at other sizes, also in a process without simba_fx's
Python. The reference is the sparse model that was exported, called eagerly."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from models import BY_NAME, FAMILIES, VOCABULARY, Entry, dense, padded, randomise, tokens
from reference import GRADIENT_TOLERANCE, TOLERANCE, assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram

import simba_fx
from simba_fx import ops
from simba_fx.errors import InputError

own_model: Any = importlib.import_module("own_model")

compiles_packages = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
"""AOTInductor does what torch itself deprecates."""
DRAWS = reference.Draws()
SIZES = ((2, 61), (5, 12), (1, 40), (17, 9))  # (rows, tokens): one row, more than torch's own kernels like, short ones
BOTH = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
NO_CACHE: dict[str, Any] = {"use_cache": False, "return_dict": False}


def call(seed: int, rows: int, length: int, masked: bool) -> dict[str, Any]:
    """Ids; masked: row b has 1 + b % 4 pads on its left, so that no row is whole."""
    if not masked:
        return {"input_ids": tokens(seed, rows, length)}
    sizes = [length - 1 - b % 4 for b in range(rows)]
    contents = [tokens(seed + b, size) for b, size in enumerate(sizes)]
    ids, mask = padded(contents, [length - size for size in sizes], [0] * rows)
    return {"input_ids": ids, "attention_mask": mask}


def exported(sparse: nn.Module, masked: bool, *, strict: bool = False) -> ExportedProgram:
    """With dynamic rows and tokens, after one call of that kind."""
    example = call(0, 3, 24, masked) | settings(sparse)
    with torch.no_grad():
        sparse(**example)
        return torch.export.export(sparse, (), example, dynamic_shapes=dynamic(example), strict=strict)


def settings(sparse: nn.Module) -> dict[str, Any]:
    """No cache, and a tuple, where the model names these arguments: torch.export of torch 2.13 fails on what is no
    tensor among `**kwargs`."""
    names = inspect.signature(sparse.forward).parameters
    return {name: held for name, held in NO_CACHE.items() if name in names}


def dynamic(example: dict[str, Any]) -> dict[str, Any]:
    return {name: BOTH if isinstance(held, Tensor) else None for name, held in example.items()}


class Logits(nn.Module):
    """What a process without transformers can take: a function of tensors that returns a tensor."""

    def __init__(self, sparse: nn.Module) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.sparse(input_ids, attention_mask=attention_mask, use_cache=False).logits
        return found


def first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def fakes(*held: Any) -> list[Any]:
    return [tensor for tensor in held if isinstance(tensor, FakeTensor)]


# The exported program.

CASES = (
    ("mamba", False, "blocks"),
    ("mamba-bf16", True, "whole"),
    ("falcon-mamba", True, "blocks"),
    ("mamba2-one-group", False, "whole"),
    ("mamba2-two-groups", True, "blocks"),
    ("bamba", True, "blocks"),
    ("nemotron-h", True, "whole"),
)


@pytest.mark.parametrize(("family", "masked", "mode"), CASES)
def test_an_exported_program_gives_the_models_bits_at_other_sizes(family: str, masked: bool, mode: str) -> None:
    sparse = simba_fx.transform(dense(family), "linear", compile=mode)
    with torch.no_grad():
        sparse(**call(0, 3, 24, masked), **settings(sparse))
    before = simba_fx.kept(sparse)
    program = exported(sparse, masked)
    assert all(torch.equal(a, b) for a, b in zip(before, simba_fx.kept(sparse), strict=True))
    run = program.module()
    with torch.no_grad():
        for rows, length in SIZES:
            inputs = call(rows, rows, length, masked) | settings(sparse)
            assert torch.equal(first(run(**inputs)), first(sparse(**inputs))), f"({rows}, {length})"

    # Weights are parameters of the exported program, under the model's names, and not constants of its graph.
    assert program.state_dict.keys() == sparse.state_dict().keys()
    assert all(torch.equal(program.state_dict[name], held) for name, held in sparse.state_dict().items())
    others = set(program.constants) - {name for name, _ in sparse.named_buffers()}
    assert not [name for name in others if program.constants[name].numel() > 1], "but for a number here and there"


def test_the_cases_are_every_pure_family_and_some_hybrids() -> None:
    modeled = {BY_NAME[family].modeling for family, *_ in CASES}
    assert {entry.modeling for entry in FAMILIES if entry.backbone == "backbone" and is_pure(entry)} <= modeled
    assert len({family for family, *_ in CASES if not is_pure(BY_NAME[family])}) == 2


def is_pure(entry: Entry) -> bool:
    return entry.modeling.__name__.split(".")[-2] in ("mamba", "mamba2", "falcon_mamba")


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_exporting_leaves_the_model_as_it_was(mode: str) -> None:
    """No stand-in of the trace stays anywhere; the model runs, and compiles, as before."""
    sparse = simba_fx.transform(dense("mamba"), "linear", compile=mode)
    inputs = call(1, 2, 40, masked=False) | NO_CACHE
    with torch.no_grad():
        expected = first(sparse(**inputs))
        before = [block.clone() for block in simba_fx.kept(sparse)]
        torch.export.export(sparse, (), inputs, dynamic_shapes=dynamic(inputs))
        assert all(torch.equal(a, b) for a, b in zip(simba_fx.kept(sparse), before, strict=True))
        built = simba_fx.program(sparse)
        assert not fakes(*sparse.state_dict().values(), *built.program.attributes().values())
        assert torch.equal(first(sparse(**inputs)), expected)
        compiled = torch.compile(sparse, backend="eager", fullgraph=mode == "whole")
        assert_close("logits", first(compiled(**inputs)), expected, TOLERANCE[torch.float32])


def test_an_export_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear")
    inputs = call(1, 2, 40, masked=False) | NO_CACHE

    def fails(*_: Any) -> Any:
        raise ValueError("no")

    with torch.no_grad():
        expected = first(sparse(**inputs))
        program = simba_fx.program(sparse).program
        with monkeypatch.context() as patch:
            patch.setattr(type(program), "forward", fails)
            with pytest.raises(ValueError, match="no"):
                torch.export.export(sparse, (), inputs)
        assert not fakes(*sparse.state_dict().values(), *program.attributes().values())
        assert torch.equal(first(sparse(**inputs)), expected)


def test_other_weights_and_gradients_reach_the_exported_program() -> None:
    model, other = BY_NAME["mamba"].build(), BY_NAME["mamba"].build()
    with torch.no_grad():
        for held in other.parameters():
            held.mul_(1.1)
    sparse = simba_fx.transform(model, "linear").train()
    inputs = call(3, 2, 33, masked=False) | NO_CACHE
    first(sparse(**inputs))
    program = torch.export.export(sparse, (), inputs, dynamic_shapes=dynamic(inputs))
    run = program.module()
    inputs = call(4, 3, 47, masked=False) | NO_CACHE

    def gradients(one: Any) -> dict[str, Tensor]:
        one.zero_grad(set_to_none=True)
        first(one(**inputs)).square().mean().backward()
        return {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}

    expected, found = gradients(sparse), gradients(run)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        assert_close(name, found[name], gradient, GRADIENT_TOLERANCE[torch.float32])

    changed = simba_fx.transform(other, "linear").train()
    with torch.no_grad():
        before = first(run(**inputs))
        run.load_state_dict(other.state_dict())
        assert torch.equal(first(run(**inputs)), first(changed(**inputs)))
        assert not torch.equal(first(run(**inputs)), before)


class WithKept(nn.Module):
    """A user's module around a sparse model, which also returns what was kept."""

    def __init__(self, sparse: nn.Module) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, input_ids: Tensor) -> Any:
        return self.sparse(input_ids, **NO_CACHE)[0], simba_fx.kept(self.sparse)


def test_kept_positions_can_be_exported_and_a_tail_is_part_of_the_program() -> None:
    sparse = simba_fx.transform(dense("mamba2-two-groups"), "linear")
    with torch.no_grad(), simba_fx.tail(sparse, 6):
        sparse(tokens(0, 3, 24), **NO_CACHE)
        program = torch.export.export(WithKept(sparse), (tokens(0, 3, 24),), dynamic_shapes=(BOTH,))
        run = program.module()
        for rows, length in SIZES:
            ids = tokens(rows, rows, length)
            found, kept = run(ids)
            assert torch.equal(found, sparse(ids, **NO_CACHE)[0])
            assert [block.shape[1] for block in kept] == [
                simba_fx.schedule.kept_count(length, share, 6) for share in simba_fx.program(sparse).shares
            ]
            assert all(torch.equal(a, b) for a, b in zip(kept, simba_fx.kept(sparse), strict=True))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # `kept` remembers
def test_strict_export_traces_a_whole_program_and_is_told_about_blocks() -> None:
    whole = simba_fx.transform(two_blocks("mamba"), 0.5, compile="whole")
    run = exported(whole, masked=True, strict=True).module()
    inputs = call(5, 4, 31, masked=True) | NO_CACHE
    with torch.no_grad():
        assert torch.equal(first(run(**inputs)), first(whole(**inputs)))
    with pytest.raises(Exception, match=r"need simba_fx\.transform\(\.\.\., compile='whole'\)"):
        exported(simba_fx.transform(dense("mamba"), "linear"), masked=False, strict=True)


def test_what_cannot_be_exported_says_so() -> None:
    pure, hybrid = (
        simba_fx.transform(dense("mamba"), "linear"),
        simba_fx.transform(dense("bamba"), "linear"),
    )
    ids = tokens(0, 3, 24)
    with pytest.raises(InputError) as caught:
        torch.export.export(pure, (ids,), {"use_cache": False})
    assert str(caught.value).startswith("MambaModel has no graph yet for Signature(dtype=torch.float32")
    assert str(caught.value).endswith(
        "Call the model once with such arguments before it is traced, by torch.compile with compile='whole' or by "
        "torch.export."
    )
    with pytest.raises(InputError) as caught:
        torch.export.export(hybrid, (ids,))
    assert str(caught.value) == (
        "The cache of BambaModel has attention layers, which learn in Python how much they hold; expected "
        "use_cache=False in a graph that is traced whole. Pass that; with torch.compile, compile='blocks' fills them."
    )
    with pytest.raises(RuntimeError, match=r"DynamicCache.* in output, which is not a known type"):
        torch.export.export(pure, (ids,))  # as the dense model


# AOTInductor, and a process of its own.

RELOAD = """
import sys
import torch
import simba_fx.ops

folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))  # as where the results are compared: products are summed in other orders
names = ("simba_fx.api", "simba_fx.passes", "simba_fx.capture.export", "transformers", "torch._dynamo")
assert not [name for name in names if name in sys.modules], "import simba_fx.ops is light"
run = {
    "mamba2": torch._inductor.aoti_load_package(folder + "/mamba2.pt2"),
    "falcon": torch.export.load(folder + "/falcon.pt2").module(),
    "bamba": torch.export.load(folder + "/bamba.pt2").module(),
    "plain": torch.export.load(folder + "/plain.pt2").module(),
}
found = {}
with torch.no_grad():
    for name, calls in torch.load(folder + "/calls.pt").items():
        outputs = [run[name](**call) for call in calls]
        found[name] = [out if isinstance(out, torch.Tensor) else out[0] for out in outputs]
assert "simba_fx.passes" not in sys.modules and "transformers" not in sys.modules
torch.save(found, folder + "/found.pt")
"""


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocabulary": VOCABULARY, "width": 16, "states": 4, "depth": 4}
    sparse: nn.Module = simba_fx.transform(own_model.MyMamba(**sizes).eval(), "linear")
    return sparse


def plain_program(sparse: nn.Module, by_name: bool) -> ExportedProgram:
    ids, shapes = tokens(0, 3, 24), {"ids": BOTH}
    with torch.no_grad():
        if by_name:
            return torch.export.export(sparse, (), {"ids": ids}, dynamic_shapes=shapes)
        return torch.export.export(sparse, (ids,), dynamic_shapes=shapes)


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_a_plain_module_is_exported(mode: str) -> None:
    torch.manual_seed(0)
    model = own_model.MyMamba(vocabulary=VOCABULARY, width=16, states=4, depth=3).eval()
    sparse = simba_fx.transform(model, "linear", compile=mode)
    program = plain_program(sparse, by_name=mode == "blocks")
    assert list(program.state_dict) == list(sparse.state_dict())
    assert not program.constants
    with torch.no_grad():
        for rows, length in SIZES:
            if rows <= 15:  # this model calls nn.Conv1d, whose CPU kernel guards on 2 <= B <= 15
                ids = tokens(rows, rows, length)
                found = program.module()(ids=ids) if mode == "blocks" else program.module()(ids)
                assert torch.equal(found, sparse(ids))


@compiles_packages
def test_programs_are_reloaded_in_a_process_without_the_passes(plain: nn.Module, tmp_path: Path) -> None:
    """With `import simba_fx.ops` alone: exported programs to the bit, a compiled package to rounding."""
    model = two_blocks("mamba2-two-groups")
    sparse = {
        "mamba2": simba_fx.transform(model, simba_fx.Constant(0.5), compile="whole"),
        "falcon": simba_fx.transform(dense("falcon-mamba"), "linear"),
        "bamba": Logits(simba_fx.transform(dense("bamba"), "linear")),
    }
    package = torch._inductor.aoti_compile_and_package(
        exported(sparse["mamba2"], masked=True), package_path=str(tmp_path / "mamba2.pt2")
    )
    assert Path(package).stat().st_size > 10_000
    torch.export.save(exported(sparse["falcon"], masked=False), tmp_path / "falcon.pt2")
    sparse["bamba"](**call(0, 3, 24, True))
    torch.export.save(
        torch.export.export(sparse["bamba"], (), call(0, 3, 24, True), dynamic_shapes=dynamic(call(0, 3, 24, True))),
        tmp_path / "bamba.pt2",
    )
    torch.export.save(plain_program(plain, by_name=True), tmp_path / "plain.pt2")
    shares = simba_fx.program(sparse["mamba2"]).shares
    calls = {
        "mamba2": [clear(model, shares, rows, length) | NO_CACHE for rows, length in SIZES],
        "falcon": [call(rows, rows, length, False) | NO_CACHE for rows, length in SIZES],
        "bamba": [call(rows, rows, length, True) for rows, length in SIZES],
        "plain": [{"ids": tokens(rows, rows, length)} for rows, length in SIZES if rows <= 15],
    }
    torch.save(calls, tmp_path / "calls.pt")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path), str(torch.get_num_threads())],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        for name, one in {**sparse, "plain": plain}.items():
            for inputs, output in zip(calls[name], found[name], strict=True):
                expected = first(one(**inputs))
                if name == "mamba2":
                    assert_close("logits", output, expected, TOLERANCE[torch.float32])
                else:
                    assert torch.equal(output, expected), name


def two_blocks(family: str) -> nn.Module:
    """A model with one cut: what compiles takes its time for each."""
    model = BY_NAME[family].make(num_hidden_layers=2)  # type: ignore[call-arg]
    randomise(model, seed=7)
    return model.eval()


def clear(model: nn.Module, shares: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Ids and mask for which no decision is too close to call: rounding cannot change what is kept."""

    def make(seed: int) -> Any:
        found = call(seed, rows, length, masked=True)
        return found["input_ids"], found["attention_mask"]

    ids, mask, _ = DRAWS.first(model, shares, make)
    return {"input_ids": ids, "attention_mask": mask}


class EveryOperator(nn.Module):
    """Each operator of a transformed graph once, with optional arguments there and not, lists, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.taps, self.A, self.heads = nn.Parameter(torch.randn(8, 4)), torch.rand(8, 3), torch.rand(4)

    def forward(self, x: Tensor, heads: Tensor, mask: Tensor) -> Any:
        rows, width, length = x.shape
        real = mask != 0
        positions = torch.arange(length).expand(rows, length)
        u = ops.causal_conv1d(x, self.taps, None, "silu")
        scan = (u, u * 0.1, -self.A, u[:, :3], u[:, 3:6])
        y, last = ops.selective_scan(*scan, None, u, None, True)
        score = ops.selective_token_score(*scan, None, True, None, 2, "simba")
        named = ops.row_positions(positions, real, [0, -1])
        score = ops.rank_scores(ops.pool_scores(score, None, 2, 3), None, 2)
        score = ops.protect_tokens(score, positions, named)
        kept, dropped, kept_at, dropped_at = ops.select_tokens(score, positions, length, 2, 1, 2, 4)
        tokens = y.transpose(1, 2)
        stays, leaves = tokens.gather(1, kept[:, :, None].expand(-1, -1, width)), ops.take_tokens(tokens, dropped)
        full = ops.restore_tokens([leaves, stays], [dropped_at, kept_at], length)

        ssd = (heads, heads[..., 0], -self.heads, heads[:, :, :1, :3], heads[:, :, :1, 3:6])
        z, final = ops.ssd_scan(*ssd, None, None, None, True)
        scores = ops.ssd_token_score(*ssd, None, True, 0.0, 10.0, real, 2, "simba")
        keys = 0.3 * heads
        rule = (heads, keys[:, :, :2], keys[:, :, 2:], -heads[..., 0].abs(), heads[..., 1].sigmoid(), 16)
        w, state = ops.delta_scan(*rule)
        scores = scores + ops.delta_token_score(*rule, real, 2, "simba")
        counted = real.sum(1)
        draw = ops.position_score(positions, real, counted, length, 2, 1, 2, 4, "random", 7)
        chosen = ops.select_real_tokens(scores + draw, positions, real, counted, length, 2, 1, 2, 4)
        square = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(rows, 1, length, length)
        masks = ops.take_square(square, chosen[2], chosen[4])
        return full, last, z, final, w, state, draw, kept, *chosen, masks


@compiles_packages
def test_every_operator_runs_in_a_compiled_package(tmp_path: Path) -> None:
    """AOTInductor calls them through its proxy executor: symbolic sizes, options, lists and tuples, to the bit."""
    torch.manual_seed(0)
    model = EveryOperator().eval()

    def inputs(rows: int, length: int) -> tuple[Tensor, ...]:
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, :3] = 0
        return torch.randn(rows, 8, length), torch.randn(rows, length, 4, 6), mask

    with torch.no_grad():
        program = torch.export.export(
            model, inputs(3, 24), dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC}, BOTH, BOTH)
        )
        called = {str(node.target).split(".")[1] for node in program.graph.nodes if "simba_fx" in str(node.target)}
        plain_functions = {"query_position", "kernel_path", "flops", "CRITERIA", "POSITION_CRITERIA"}
        assert called == set(ops.__all__) - plain_functions
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "operators.pt2"))
        run = torch._inductor.aoti_load_package(package)
        for rows, length in ((2, 40), (5, 13), (1, 30), (17, 9)):
            given = inputs(rows, length)
            for found, expected in zip(run(*given), model(*given), strict=True):
                assert found.dtype is expected.dtype
                assert torch.equal(found, expected), f"({rows}, {length})"
