"""Capture and lift: a user's own scan, names put back as they were, threads, and every message word for word."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from graph_cases import CASES, WIDTH, Block, Mixer, Plain, Unlisted, capture_plain, loop_scan
from models import _mamba
from reference import assert_close
from torch import Tensor, nn

import simba_fx
from simba_fx import SelectiveScan, errors, register_scan
from simba_fx.capture import lift, scan_functions
from simba_fx.capture.export import capture_graph
from simba_fx.graph import runner as pipeline
from simba_fx.graph.marks import region
from simba_fx.ops.recurrences import SCANS

HERE = sys.modules[__name__]
ADVICE = (
    " A model of attention or convolutions alone has no recurrence to score tokens by. If this one runs the scan of "
    "Mamba or Mamba-2 in a function of its own, register it: "
    "simba_fx.register_scan(function, adapter). If another that is "
    "linear in its values: simba_fx.register_recurrence(function, value)."
)


def unregistered_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A scan that simba_fx knows nothing of, without a loop over tokens."""
    weight = torch.exp(torch.cumsum(delta, 2)) * u
    return torch.cumsum(weight, 2) * (B * C).sum(1, keepdim=True) * A.sum()


def looping_scan(u: Tensor, *rest: Tensor) -> Tensor:
    """The same with a Python loop over tokens."""
    return torch.stack([u[:, :, : t + 1].sum(2) for t in range(u.shape[2])], 2)


def confused_scan(*operands: Tensor) -> Tensor:
    return loop_scan(*operands)


def failing_scan(*operands: Tensor) -> Tensor:
    return loop_scan(*operands)


def sized_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    return loop_scan(u, delta, A, B, C)


def fail(*operands: Tensor) -> SelectiveScan:
    raise ZeroDivisionError("the adapter divides by zero")


register_scan(confused_scan, lambda *operands: "nonsense")
register_scan(failing_scan, fail)
register_scan(sized_scan, lambda *operands: SelectiveScan(*operands[:5]))


def mixer(scan: Callable[..., Tensor]) -> type[Mixer]:
    """A mixer of this module that calls one of the functions above by its name."""

    class Calling(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            extra = (x.shape[1],) if scan.__name__ == "sized_scan" else ()
            return getattr(HERE, scan.__name__)(*self.operands(x), *extra).transpose(1, 2)

    return Calling


def model(*scans: Callable[..., Tensor]) -> Plain:
    """One block per scan function. (Tests of this file avoid the word: their names would be suggested as scans.)"""
    torch.manual_seed(0)
    blocks = []
    for scan in scans:
        block = Block(0)
        block.mixers.append(mixer(scan)())
        blocks.append(block)
    return Plain(*blocks)


def message(error: type[Exception], module: nn.Module, **options: Any) -> str:
    with pytest.raises(error) as caught:
        capture_plain(module, **options)
    assert type(caught.value) is error
    return str(caught.value)


# --- a function of the user's own ------------------------------------------------------------------------------------


def contributions(operands: tuple[Tensor, ...], query: int) -> Tensor:
    """`(B, L)`: the largest output at `query` that each token causes alone; the scan is linear in u."""
    u, *rest = operands
    tokens = []
    for t in range(u.shape[2]):
        alone = torch.zeros_like(u)
        alone[:, :, t] = u[:, :, t]
        tokens.append(loop_scan(alone, *rest)[:, :, query].amax(1))
    return torch.stack(tokens, 1)


def eager(module: Unlisted, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`Unlisted` with k of its tokens kept after the first mixer, in plain words."""
    normed = module.norm(x)
    h = x + module.first(normed)
    score = contributions(module.first.operands(normed), x.shape[1] - 1)
    score[:, -1] = torch.inf
    kept = score.topk(k, 1).indices.sort(1).values
    index = kept[..., None].expand(-1, -1, x.shape[2])
    few = h.gather(1, index)
    few = few + module.second(module.norm(few))
    return module.head(module.norm(h.scatter(1, index, few))), kept


@pytest.mark.parametrize("compile", ["blocks", "whole"])
@pytest.mark.parametrize("kernels", ["auto", "model"])
def test_a_module_without_a_list_of_blocks_equals_the_eager_reference(kernels: str, compile: str) -> None:
    torch.manual_seed(1)
    module = Unlisted()
    x = torch.randn(3, 21, WIDTH)
    sparse = simba_fx.transform(
        module,
        (1, Fraction(1, 2)),
        kernels=kernels,
        compile=compile,
        example_inputs=(torch.zeros(2, 9, WIDTH),),
        criterion="simba",
    )
    with torch.no_grad():
        result, (expected, kept) = sparse(x), eager(module, x, 1 + 10)
    assert torch.equal(simba_fx.kept(sparse)[1], kept)
    assert_close("head", result, expected, 1e-5)


def test_without_a_list_of_blocks_the_cut_is_behind_the_residual_addition() -> None:
    """There one tensor is alive; everywhere else two are."""
    captured = capture_plain(Unlisted())
    assert captured.facts.blocks == ("first", "second")
    starts = [next(node for node in captured.graph.nodes if region(node) == block) for block in (1, 2)]
    assert [node.prev.target for node in starts] == [torch.ops.aten.add.Tensor] * 2


@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_the_users_list_may_be_called_blocks(compile: str) -> None:
    """A program keeps things of its own beside the user's parameters; the names must not collide."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(2)
    module, x = Named(), torch.randn(2, 15, WIDTH)
    example = (torch.zeros(2, 9, WIDTH),)
    sparse = simba_fx.transform(
        module, (1, Fraction(10**6 - 1, 10**6)), compile=compile, example_inputs=example, criterion="simba"
    )
    with torch.no_grad():
        assert_close("output", sparse(x), module(x), 1e-5)


def test_a_width_may_equal_the_examples_length() -> None:
    """Only dimension 1 of the first tensor is the length, whatever the other sizes are."""
    torch.manual_seed(3)
    module = Plain(Block(), Block())
    sparse = simba_fx.transform(
        module, (1, Fraction(1, 2)), example_inputs=(torch.zeros(2, WIDTH, WIDTH),), criterion="simba"
    )
    with torch.no_grad():
        assert sparse(torch.randn(2, 15, WIDTH)).shape == (2, 15, 4)


def test_a_models_width_may_equal_the_examples_length() -> None:
    """Transformers models are traced on inputs of a size of our own choice: no model's width may be excluded by it."""
    simba_fx.transform(_mamba(hidden_size=24, num_hidden_layers=2).eval(), "linear", criterion="simba")


def test_registering_takes_callables_only() -> None:
    for arguments, name in ((("loop_scan", SelectiveScan), "function"), ((loop_scan, "adapter"), "adapter")):
        with pytest.raises(errors.SimbaError) as caught:
            register_scan(*arguments)
        assert str(caught.value) == (
            f"register_scan expects a callable {name}, found str. Pass the function object that the model calls, and an"
            " adapter that takes the same arguments."
        )


# --- nothing stays patched ---------------------------------------------------------------------------------------


def names_of(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Every name that a forward of `module` can look up in its code's modules and classes."""
    return {
        (repr(owner), name): value for owner in lift.callers(module) for name, value in list(vars(owner).items())
    }  # fmt: skip


def assert_same_names(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> None:
    assert before.keys() <= after.keys()
    assert [key for key in before if before[key] is not after[key]] == []


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=str)
def test_names_are_put_back_after_success(case: Any) -> None:
    before = names_of(case.module)
    with lift.lifted(case.module):
        during = names_of(case.module)
    assert any(before[key] is not during[key] for key in before)  # this test can fail
    assert_same_names(before, names_of(case.module))
    type(case)(**{field: getattr(case, field) for field in case.__dataclass_fields__}).captured  # noqa: B018
    assert_same_names(before, names_of(case.module))


@pytest.mark.parametrize("scan", [failing_scan, confused_scan, looping_scan], ids=lambda scan: scan.__name__)
def test_names_are_put_back_after_a_failure(scan: Callable[..., Tensor]) -> None:
    module = model(loop_scan, scan)
    before = names_of(module)
    with pytest.raises(errors.CaptureError):
        capture_plain(module)
    assert_same_names(before, names_of(module))


def test_names_are_put_back_after_an_interruption() -> None:
    module = model(loop_scan)
    before = names_of(module)
    with pytest.raises(KeyboardInterrupt), lift.lifted(module):
        raise KeyboardInterrupt
    assert_same_names(before, names_of(module))


def test_two_threads_capture_the_same_code_without_disturbing_each_other() -> None:
    modules = [Plain(Block(), Block()), Plain(Block(2), Block())]
    expected = [pipeline.text(capture_plain(module).graph) for module in modules]
    before = names_of(modules[0])
    found: dict[int, Any] = {}
    together = threading.Barrier(2)

    def work(index: int) -> None:
        together.wait()
        try:
            captured = capture_plain(modules[index])
            found[index] = (pipeline.text(captured.graph), len(captured.sites))
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: (expected[0], 2), 1: (expected[1], 3)}
    assert_same_names(before, names_of(modules[0]))


def test_a_module_runs_in_another_thread_while_one_is_captured() -> None:
    """Names are patched for the whole process: a call from elsewhere must neither fail nor become a call site."""
    module = model(loop_scan)
    other, x = model(loop_scan), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        expected, found = other(x), []
        with lift.lifted(module) as sites:
            thread = threading.Thread(target=lambda: found.append(other(x)))
            thread.start()
            thread.join()
    assert len(found) == 1
    assert torch.equal(found[0], expected)
    assert sites == []


# --- what is said when it fails ----------------------------------------------------------------------------------


def named(*names: str) -> str:
    return (
        f" It called {', '.join(names)}, not registered. If that computes the recurrence of Mamba or Mamba-2, or a "
        "gated delta rule, register it: simba_fx.register_scan(function, adapter). If another that is "
        "linear in its values: simba_fx.register_recurrence(function, value)."
    )


UNREGISTERED = named(f"{__name__}.unregistered_scan")


def test_nothing_to_find() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    Other.__module__ = "nowhere"
    assert message(errors.ScanNotFoundError, Other()) == (
        "No scan was found in Other: expected at least one call of a registered scan function while it was traced, "
        f"found none.{ADVICE}"
    )


def test_a_function_that_is_not_registered() -> None:
    assert message(errors.ScanNotFoundError, model(unregistered_scan)) == (
        "No scan was found in Plain: expected at least one call of a registered scan function while it was traced, "
        f"found none.{UNREGISTERED}"
    )


def test_a_mixer_whose_function_is_not_registered_beside_one_that_is() -> None:
    assert message(errors.CaptureError, model(loop_scan, unregistered_scan)) == (
        "layers.1.mixers.0 (Calling) holds the weights of a scan (A_log) but called no registered scan function while "
        f"it was traced.{UNREGISTERED}"
    )


def test_a_python_loop_over_tokens() -> None:
    assert message(errors.CaptureError, model(loop_scan, looping_scan)) == (
        "Plain takes the length of its input as a plain number (test_capture.py, line 43: "
        "`return torch.stack([u[:, :, : t + 1].sum(2) for t in range(u.shape[2])], 2)`); expected code for every size, "
        "because one graph serves them all. len(x), int(...), a Python loop over a dimension and a branch on it make "
        "such numbers: write x.shape[1], and tensor operations for the loop."
    )


def test_an_adapter_that_returns_nonsense() -> None:
    assert message(errors.CaptureError, model(confused_scan)) == (
        "The adapter registered for confused_scan returned str; expected a scan's "
        "operands: simba_fx.SelectiveScan, simba_fx.SSDScan or simba_fx.DeltaScan. Correct the call of "
        "simba_fx.register_scan."
    )


def test_an_adapter_that_fails() -> None:
    assert message(errors.CaptureError, model(failing_scan)) == (
        "The adapter registered for failing_scan raised ZeroDivisionError: the adapter divides by zero. It is given "
        "what the function is given; expected the scan's operands in return. Correct the call of "
        "simba_fx.register_scan."
    )


def test_a_length_as_a_plain_number() -> None:
    assert message(errors.CaptureError, model(sized_scan)) == (
        "sized_scan was called with a length as a plain number; expected tensors and constants. Read the length from a "
        "tensor inside the function."
    )


@pytest.mark.parametrize("shape", [(1, 5, WIDTH), (5, 1, WIDTH), (5, 5, WIDTH), (5,)])
def test_an_example_whose_sizes_say_too_little(shape: tuple[int, ...]) -> None:
    module = Plain(Block())
    with pytest.raises(errors.CaptureError) as caught:
        capture_graph(module, module, {"x": torch.zeros(shape)}, primary="x")
    assert str(caught.value) == (
        f"Capture expects an example x of shape (B, L, ...), B ≠ L, both > 1; found {shape}."
    )  # fmt: skip


def test_packed_sequences() -> None:
    x = torch.zeros(1, 2, 1, 1)
    for name in ("initial_states", "seq_idx"):
        with pytest.raises(errors.CaptureError) as caught:
            scan_functions.transformers.ROWS["mamba2_chunk_scan"](x, x, x, x, x, 8, **{name: x})
        assert str(caught.value) == (
            f"mamba2_chunk_scan was called with {name}; only whole sequences that start from a zero state can be "
            "pruned. Call the model without packed sequences and without a warm cache."
        )


# --- what cannot be cut ------------------------------------------------------------------------------------------


class Reading(Block):
    """A block that reads a second value, made before the first block."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        return super().forward(x + self.read(side))


class Carrying(nn.Module):
    """Two blocks, both read `side`."""

    def __init__(self, start: Callable[[Tensor], Tensor], read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Reading(read), Reading(read)])
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        side = self.start(x)
        for layer in self.layers:
            x = layer(x, side)
        return x


def refusal(module: nn.Module) -> str:
    with pytest.raises(errors.GraphError) as caught:
        simba_fx.transform(module, (1, Fraction(1, 2)), example_inputs=(torch.zeros(2, 9, WIDTH),), criterion="simba")
    return str(caught.value)


def test_a_value_of_twice_the_length_crosses_a_cut() -> None:
    doubled = Carrying(lambda x: torch.cat([x, x], 1), lambda side: side.sum(1, keepdim=True))
    assert refusal(doubled) == (
        "Node cat in the model's own forward has shape (B, 2*L, 6) and crosses a cut; dimension 1 is computed from the "
        "sequence length L but not equal to it, so survivors cannot be gathered along it. Keep that block whole (give "
        "the next block the same share)."
    )


def test_a_value_with_the_length_in_another_dimension_crosses_a_cut() -> None:
    turned = Carrying(lambda x: x.transpose(1, 2) * 2, lambda side: side.transpose(1, 2))
    assert refusal(turned) == (
        "Node mul in the model's own forward has shape (B, 6, L) and crosses a cut; expected (B, L, ...) with L in "
        "dimension 1 alone, or (B, H, L, L), found it in (2,). This layout cannot be gathered; keep the blocks around "
        "it whole (give them the same share)."
    )


def test_two_residual_streams_of_one_width() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Forked(), Forked()])

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            for layer in self.layers:
                x, y = layer(x, y)
            return x

    class Forked(Block):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x + y), y + x

    assert refusal(Two()) == (
        "Node add_4 in layers.1 is read after the last block; expected one value per cut that it continues (the "
        "residual stream), found add_1, add_2 between layers.0 and layers.1. Use output='kept', or, if these are "
        "halves of one block, make them one module of a ModuleList."
    )


def test_experts_in_a_python_loop() -> None:
    from transformers import JambaConfig, JambaModel

    config = JambaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_experts=2,
        num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, experts_implementation="eager",
    )  # fmt: skip
    with pytest.raises(errors.CaptureError) as caught:
        simba_fx.transform(JambaModel(config), "linear", criterion="simba")
    assert str(caught.value) == (
        "experts_implementation='eager' loops over experts in Python and cannot be captured; expected 'grouped_mm' or "
        "'batched_mm'. Load the model with experts_implementation='grouped_mm'."
    )


def test_each_call_of_a_registered_function_is_one_node() -> None:
    for case in CASES[:4]:
        captured = case.captured
        assert len([node for node in captured.graph.nodes if node.target in SCANS]) == len(captured.sites)
