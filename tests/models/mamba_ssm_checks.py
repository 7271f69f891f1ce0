"""Checks of `mamba_ssm`'s models against the package's own reference functions. Not collected with the other tests:
`test_mamba_ssm.py` runs this file in a process of its own, where the CUDA extensions are stubbed (`mamba_ssm_cpu`)."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import mamba_ssm_cpu as cpu  # first: it imports transformers, then stubs the extensions
import pytest
import reference
import torch
from mamba_ssm_cpu import InferenceParams, build, causal_conv1d_fn, selective_scan_fn
from models import keep_all, schedules
from reference import GRADIENT_TOLERANCE, TOLERANCE, assert_close
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import CaptureError, InputError

FUSED = {"fused_add_norm": True, "rms_norm": True, "residual_in_fp32": True}
UNFUSED = {"fused_add_norm": False, "rms_norm": False, "residual_in_fp32": False}
SLOW = {"use_mem_eff_path": False}


@dataclass(frozen=True)
class Case:
    """One model: which of the package's roads its forward takes."""

    name: str
    options: dict[str, Any] = field(hash=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.options.get("dtype", torch.float32)


CASES = (
    Case("mamba-fused", FUSED),
    Case("mamba-slow-path", {**FUSED, "ssm": {"use_fast_path": False, "bias": True}, "seed": 1}),
    Case("mamba-unfused", {**UNFUSED, "seed": 2}),
    Case("mamba-unfused-rms", {**UNFUSED, "rms_norm": True, "residual_in_fp32": True, "seed": 3}),
    Case("mamba-fused-layer-norm", {**FUSED, "rms_norm": False, "residual_in_fp32": False, "seed": 4}),
    Case("mamba-mlp", {**FUSED, "d_intermediate": 24, "seed": 5}),
    Case("mamba-unfused-mlp", {**UNFUSED, "d_intermediate": 24, "seed": 6}),
    Case("mamba-bf16", {**FUSED, "dtype": torch.bfloat16, "seed": 7}),
    Case("mamba2-fused", {**FUSED, "layer": "Mamba2", "seed": 8}),
    Case("mamba2-slow-path", {**FUSED, "layer": "Mamba2", "ssm": SLOW, "seed": 9}),
    Case(
        "mamba2-two-groups",
        {**UNFUSED, "layer": "Mamba2", "ssm": {"ngroups": 2, "d_ssm": 32}, "d_model": 32, "seed": 10},
    ),
    Case("mamba2-beside", {**FUSED, "layer": "Mamba2", "ssm": {"d_ssm": 16, "norm_before_gate": True}, "seed": 11}),
    Case("mamba2-beside-slow", {**FUSED, "layer": "Mamba2", "ssm": {"d_ssm": 16, **SLOW}, "seed": 12}),
    Case("mamba2-no-norm", {**FUSED, "layer": "Mamba2", "ssm": {"rmsnorm": False}, "seed": 13}),
    Case("mamba2-no-norm-slow", {**FUSED, "layer": "Mamba2", "ssm": {"rmsnorm": False, **SLOW}, "seed": 14}),
    Case(
        "mamba2-limit",
        {**FUSED, "layer": "Mamba2", "ssm": {"D_has_hdim": True, "dt_limit": (0.02, 0.2)}, "seed": 15},
    ),
    Case("mamba2-bf16", {**FUSED, "layer": "Mamba2", "dtype": torch.bfloat16, "seed": 16}),
)
FLOAT32 = tuple(case for case in CASES if case.dtype is torch.float32)
BY_NAME = {case.name: case for case in CASES}
PER_KIND = (BY_NAME["mamba-fused"], BY_NAME["mamba2-fused"])
HALF_PRECISION = tuple(case for case in CASES if case.dtype is not torch.float32)
SOME = (*PER_KIND, BY_NAME["mamba-unfused-rms"], BY_NAME["mamba-mlp"], BY_NAME["mamba2-two-groups"])
DECODING = (*SOME, BY_NAME["mamba2-beside"])
# One of each road through the package; the others differ in what a road computes, not in which functions it calls.
ROADS = tuple(
    case for case in CASES if case.name not in ("mamba-unfused-mlp", "mamba2-beside", "mamba2-no-norm", "mamba2-limit")
)

DRAWS = reference.Draws()


@pytest.fixture(scope="module", autouse=True)
def few_draws_are_discarded() -> Iterator[None]:
    yield
    DRAWS.check()


@pytest.fixture(autouse=True)
def every_name_is_put_back() -> Iterator[None]:
    yield
    for (caller, name), kernel in cpu.PATCHED.items():
        assert getattr(caller, name) is kernel, f"{caller.__name__}.{name}"


def over(cases: tuple[Case, ...]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@functools.cache
def dense(name: str) -> Any:
    return build(**BY_NAME[name].options)


@functools.cache
def sparse(name: str, schedule: str = "linear", **options: Any) -> Any:
    return simba_fx.transform(dense(name), shares(name, schedule), **{"criterion": "simba", **options})


def shares(name: str, schedule: str = "linear") -> Any:
    if schedule == "second half":
        return (Fraction(1), Fraction(1), Fraction(1, 3))
    return keep_all(3) if schedule == "keep all" else schedules(3)[schedule]


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 56, shape, generator=torch.Generator().manual_seed(seed))


def clear_row(name: str, length: int, schedule: str = "linear", **options: Any) -> tuple[Tensor, reference.Row]:
    """Ids `(L,)` and the reference's result on them; draws again where a decision was too close."""
    for seed in range(5):
        ids = tokens(100 * seed + length, length)
        row = cpu.run_row(dense(name), ids, shares(name, schedule), **options)
        if DRAWS.clear(row):
            return ids, row
    raise AssertionError("five draws in a row had near ties")


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


# The reference functions themselves.


def test_the_versions_are_those_that_were_read() -> None:
    assert importlib.metadata.version("mamba-ssm") == "2.3.2.post1"
    assert importlib.metadata.version("causal-conv1d") == "1.7.0"


@pytest.mark.parametrize(
    "name", ["mamba-fused", "mamba2-fused", "mamba2-beside", "mamba2-no-norm", "mamba2-two-groups"]
)
def test_the_fused_references_equal_the_packages_own_unfused_path(name: str) -> None:
    model, ids = copy.deepcopy(dense(name)), tokens(1, 2, 37)
    with torch.no_grad():
        fused = model(ids).logits
        for layer in model.backbone.layers:
            layer.mixer.use_fast_path = layer.mixer.use_mem_eff_path = False
        assert_close("logits", fused, model(ids).logits, 1e-5)


@over(FLOAT32)
def test_the_reference_without_pruning_is_the_model(case: Case) -> None:
    ids = tokens(2, 1, 30)
    with torch.no_grad():
        row = cpu.run_row(dense(case.name), ids[0], shares(case.name, "keep all"))
        assert torch.equal(row.logits, dense(case.name)(ids).logits[0])


# Everything kept: the dense model.


@over(ROADS)
def test_with_every_token_kept_its_own_kernels_give_the_dense_models_bits(case: Case) -> None:
    model, kept = dense(case.name), sparse(case.name, "keep all", kernels="model")
    for ids in (tokens(3, 3, 41), tokens(4, 1, 2)):
        theirs, ours = model(ids).logits, kept(ids).logits
        assert torch.equal(ours, theirs)
        expected, found = gradients(theirs.float().square().sum(), model), gradients(ours.float().square().sum(), kept)
        for parameter, gradient in expected.items():
            assert gradient.any(), f"{parameter}: no gradient to compare"
            assert_close(f"gradient of {parameter}", found[parameter], gradient, GRADIENT_TOLERANCE[case.dtype])
    program = simba_fx.program(kept)
    assert len(program.cuts) == len(model.backbone.layers) - 1, "score, select and gather are there"


@over((*PER_KIND, *HALF_PRECISION))
def test_with_every_token_kept_our_kernels_equal_the_dense_model_to_rounding(case: Case) -> None:
    """In float32 the others follow from their schedules below."""
    model, kept, ids = dense(case.name), sparse(case.name, "keep all"), tokens(5, 3, 41)
    theirs, ours = model(ids).logits, kept(ids).logits
    assert_close("logits", ours, theirs, TOLERANCE[case.dtype])
    expected, found = gradients(theirs.float().square().sum(), model), gradients(ours.float().square().sum(), kept)
    for parameter, gradient in expected.items():
        assert_close(f"gradient of {parameter}", found[parameter], gradient, GRADIENT_TOLERANCE[case.dtype])


# Pruned: the reference.


@over(FLOAT32)
def test_a_schedule_equals_the_reference(case: Case) -> None:
    pruned = sparse(case.name)
    with torch.no_grad():
        for length, tail in ((64, 1), (23, 5)):
            ids, row = clear_row(case.name, length, tail=tail)
            with simba_fx.tail(pruned, tail):
                found = pruned(ids[None]).logits[0]
            assert_close("logits", found, row.logits, TOLERANCE[case.dtype])
            assert [block[0].tolist() for block in simba_fx.kept(pruned)] == row.kept
            assert row.kept[-1] != list(range(length - len(row.kept[-1]), length)), "not simply the last tokens"


@pytest.mark.parametrize(
    ("case", "schedule"),
    [*((case, "linear") for case in SOME), *((case, "second half") for case in PER_KIND)],
    ids=lambda given: getattr(given, "name", given),
)
def test_a_schedule_with_the_models_own_kernels_gives_the_references_bits(case: Case, schedule: str) -> None:
    """One cut after the second block: both streams are results of blocks there; after the first, one is not."""
    pruned = sparse(case.name, schedule, kernels="model")
    with torch.no_grad():
        ids, row = clear_row(case.name, 50, schedule)
        assert torch.equal(pruned(ids[None]).logits[0], row.logits)
    assert [block[0].tolist() for block in simba_fx.kept(pruned)] == row.kept
    assert len(simba_fx.program(pruned).cuts) == (2 if schedule == "linear" else 1)


@over(PER_KIND)
def test_gradients_of_a_schedule_equal_the_references(case: Case) -> None:
    """Through every output position, tokens that left early included."""
    weights = torch.randn(48, 56, generator=torch.Generator().manual_seed(1))
    ids, row = clear_row(case.name, 48)
    expected = gradients((row.logits * weights).sum(), dense(case.name))
    pruned = sparse(case.name)
    found = gradients((pruned(ids[None]).logits[0] * weights).sum(), pruned)
    for parameter, gradient in expected.items():
        assert gradient.any(), f"{parameter}: no gradient to compare"
        assert_close(f"gradient of {parameter}", found[parameter], gradient, GRADIENT_TOLERANCE[case.dtype])


def test_a_token_that_left_has_both_its_streams() -> None:
    """Hidden states of tokens that left early, which only the last norm adds up, are what they left with."""
    with torch.no_grad():
        ids, row = clear_row("mamba-fused", 40)
        found = sparse("mamba-fused").backbone(ids[None])[0]
    early = sorted(set(range(40)) - set(row.kept[-1]))
    assert len(early) > 20
    assert_close("of tokens that left", found[early], row.hidden[early], TOLERANCE[torch.float32])


@over(PER_KIND)
def test_kept_output_is_the_survivors_rows(case: Case) -> None:
    ids = tokens(6, 2, 50)
    full, short = sparse(case.name), sparse(case.name, output="kept")
    with torch.no_grad():
        expected, found = full(ids).logits, short(ids).logits
    last = simba_fx.kept(short)[-1]
    assert found.shape[1] == last.shape[1] < 50
    assert_close("logits", found, expected.gather(1, last[..., None].expand_as(found)), 1e-6)


# Prompts and decoding.


def states(rows: int = 1) -> Any:
    return InferenceParams(max_seqlen=200, max_batch_size=rows)


@over(DECODING)
def test_greedy_decoding_equals_the_reference_token_for_token(case: Case) -> None:
    pruned, new = sparse(case.name), 22
    for length in (60, 3, 1):
        for seed in range(5):
            ids = tokens(10 * seed + length, length)
            with torch.no_grad():
                row = cpu.generate(dense(case.name), ids, shares(case.name), new)
            if clear := DRAWS.clear(row):
                break
        assert clear
        found = pruned.generate(ids[None], max_length=length + new)
        assert found[0].tolist() == ids.tolist() + row.tokens
        assert [block.shape[1] for block in simba_fx.kept(pruned)] == reference.counts(length, shares(case.name))


def test_pruning_changes_what_is_generated() -> None:
    """The test above would pass on a dense model, were this not so."""
    ids, name = tokens(60, 1, 60), "mamba-fused"
    assert not torch.equal(sparse(name).generate(ids, max_length=82), dense(name).generate(ids, max_length=82))


@over((*PER_KIND, BY_NAME["mamba-unfused-rms"]))
@pytest.mark.parametrize("allocated", [False, True])
def test_the_states_of_a_prompt_are_the_blocks_own(case: Case, allocated: bool) -> None:
    """Written in place into the caller's slots where there are some; prompts shorter than the convolution too."""
    pruned = sparse(case.name, kernels="model")
    for length in (2, 40):
        theirs, ours = states(), states()
        with torch.no_grad():
            ids, row = clear_row(case.name, length)
            cpu.run_row(dense(case.name), ids, shares(case.name), states=theirs)
            slots = pruned.allocate_inference_cache(1, 200) if allocated else {}
            for slot in (slot for pair in slots.values() for slot in pair):
                slot.fill_(7.0)  # of an earlier prompt
            ours.key_value_memory_dict.update(slots)
            found = pruned(ids[None], inference_params=ours).logits[0]
            assert_close("logits", found, row.logits, TOLERANCE[case.dtype])
        assert ours.key_value_memory_dict.keys() == theirs.key_value_memory_dict.keys()
        for layer, pair in theirs.key_value_memory_dict.items():
            for mine, other, given in zip(ours.key_value_memory_dict[layer], pair, slots.get(layer, (None, None))):
                assert mine.dtype is other.dtype
                assert torch.equal(mine, other)
                assert given is None or given is mine


@over(PER_KIND)
def test_rows_of_a_batch_decode_as_each_does_alone(case: Case) -> None:
    pruned, ids = sparse(case.name), tokens(8, 3, 40)
    found = pruned.generate(ids, max_length=52)
    for row, alone in zip(found, ids):
        assert torch.equal(row, pruned.generate(alone[None], max_length=52)[0])


def test_several_tokens_at_an_offset_are_refused_and_change_nothing() -> None:
    pruned, params = sparse("mamba-fused"), states()
    with torch.no_grad():
        pruned(tokens(1, 1, 20), inference_params=params)
        params.seqlen_offset = 20
        slots = [slot for pair in params.key_value_memory_dict.values() for slot in pair]
        before = [slot.clone() for slot in slots]
        with pytest.raises(InputError, match="called with 3 new tokens at seqlen_offset=20; expected a whole prompt"):
            pruned(tokens(2, 1, 3), inference_params=params)
        assert all(torch.equal(a, b) for a, b in zip(before, slots))
        assert pruned(tokens(3, 1, 1), inference_params=params).logits.shape == (1, 1, 56)


# The object that comes back.


def test_the_result_is_a_model_of_the_same_class_over_the_same_weights() -> None:
    model, ids = build(**FUSED), tokens(1, 1, 30)
    before = model(ids).logits
    pruned = simba_fx.transform(model, "linear", criterion="simba")
    for held, kind in ((pruned, cpu.MambaLMHeadModel), (pruned.backbone, cpu.MixerModel)):
        assert isinstance(held, kind)
        assert type(held) is not kind
    assert (type(model), type(model.backbone)) == (cpu.MambaLMHeadModel, cpu.MixerModel)
    assert list(pruned.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(pruned.parameters(), model.parameters(), strict=True))
    assert torch.equal(model(ids).logits, before), "the original stays dense"
    assert not torch.equal(pruned(ids).logits, before)
    assert inspect.signature(pruned.forward) == inspect.signature(model.forward)
    assert pruned(tokens(1, 2, 30), position_ids=None, num_last_tokens=3).logits.shape == (2, 3, 56)
    again = simba_fx.transform(pruned, "dense", kernels="model")
    assert torch.equal(again(ids).logits, simba_fx.transform(model, "dense", kernels="model")(ids).logits)
    with pytest.raises(simba_fx.errors.SimbaError, match="expected none for a mamba_ssm MambaLMHeadModel"):
        simba_fx.transform(model, "linear", example_inputs=(tokens(1, 2, 30),), criterion="simba")


def test_the_mixer_alone_is_pruned_too() -> None:
    with torch.no_grad():
        ids, row = clear_row("mamba-fused", 44)
        alone = simba_fx.transform(
            dense("mamba-fused").backbone, shares("mamba-fused"), kernels="model", criterion="simba"
        )
        assert isinstance(alone, cpu.MixerModel)
        assert torch.equal(alone(ids[None])[0], row.hidden)
    assert [block[0].tolist() for block in simba_fx.kept(alone)] == row.kept


def test_a_deep_copy_another_dtype_and_training_take_effect() -> None:
    pruned = simba_fx.transform(build(**FUSED), "linear", criterion="simba")
    twin, ids = copy.deepcopy(pruned), tokens(5, 2, 33)
    with torch.no_grad():
        expected = pruned(ids).logits
        assert torch.equal(twin(ids).logits, expected)
        twin.backbone.layers[0].mixer.out_proj.weight.zero_()
        assert not torch.equal(twin(ids).logits, expected)
        assert torch.equal(pruned(ids).logits, expected)
        assert twin.bfloat16()(ids).logits.dtype is torch.bfloat16
    pruned.train()(ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_questions_are_answered() -> None:
    pruned = simba_fx.transform(dense("mamba-fused"), simba_fx.Budget(0.7, length=64), criterion="simba")
    told = simba_fx.report(pruned, tokens(1, 2, 64))
    assert told.total.share == pytest.approx(0.7, abs=0.05)
    # the head is one matrix product: 2 FLOPs x 2 rows x 64 tokens x 20 channels x 56 words
    assert told.total.dense - told.stack.dense == 2 * 2 * 64 * 20 * 56
    assert [row.path for row in told.blocks] == [f"backbone.layers.{i}" for i in range(3)]
    assert "3 blocks, 3 with a scan, 2 cuts" in simba_fx.explain(pruned)
    exits = [node.name for node in simba_fx.program(pruned).graph.nodes if node.name.startswith("exit")]
    assert sorted(exits) == ["exit_0", "exit_0_1", "exit_1", "exit_1_1"]


@over(PER_KIND)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the package leaves a file open
def test_a_saved_model_is_loaded_as_it_was(case: Case, tmp_path: Any) -> None:
    """The package's own files, which it goes on reading, beside ours; bf16 stays bf16 unless another dtype is given."""
    for dtype in (torch.float32, torch.bfloat16):
        model, ids, folder = build(**case.options | {"dtype": dtype}), tokens(4, 2, 40), tmp_path / str(dtype)
        pruned = simba_fx.transform(model, simba_fx.Linear(0.3), criterion="simba-abs")
        simba_fx.save(pruned, folder)
        found = simba_fx.load(folder)
        assert isinstance(found, cpu.MambaLMHeadModel)
        assert [p.dtype for p in found.parameters()] == [p.dtype for p in model.parameters()]
        with torch.no_grad():
            assert torch.equal(found(ids).logits, pruned(ids).logits)
            assert all(torch.equal(a, b) for a, b in zip(simba_fx.kept(found), simba_fx.kept(pruned), strict=True))
            plain = cpu.MambaLMHeadModel.from_pretrained(str(folder), dtype=dtype).eval().to(dtype)
            assert torch.equal(plain(ids).logits, model(ids).logits)
        assert next(simba_fx.load(folder, dtype=torch.float64).parameters()).dtype is torch.float64


def test_the_mixer_alone_cannot_be_saved(tmp_path: Any) -> None:
    with pytest.raises(simba_fx.errors.SimbaError) as caught:
        simba_fx.save(
            simba_fx.transform(dense("mamba-fused").backbone, "linear", criterion="simba"), tmp_path / "saved"
        )
    assert str(caught.value) == (
        "A MixerModel alone cannot be saved by mamba_ssm; expected the MambaLMHeadModel around it. Use torch.save on "
        "its state_dict(), and simba_fx.transform after loading."
    )
    assert not list(tmp_path.iterdir())


def test_named_tokens_are_protected() -> None:
    pruned = simba_fx.transform(dense("mamba-fused"), "linear", protect=(0, 7), criterion="simba")
    pruned(tokens(1, 2, 64))
    assert all({0, 7} <= set(row.tolist()) for block in simba_fx.kept(pruned) for row in block)
    with pytest.raises(InputError, match="names position 7, but the prompt has 5 tokens"):
        pruned(tokens(1, 2, 5))


def test_equal_blocks_share_one_kind() -> None:
    program = simba_fx.program(simba_fx.transform(build(**FUSED, n_layer=6), "linear", criterion="simba")).program
    assert len({getattr(program, f"block_{i}").kind for i in range(6)}) == 4, "first, second, those between, last"


def test_whole_graphs_and_compiled_blocks_give_the_same() -> None:
    whole, blocks, ids = sparse("mamba2-fused", compile="whole"), sparse("mamba2-fused"), tokens(5, 2, 40)
    with torch.no_grad():
        expected = blocks(ids).logits
        assert_close("whole", whole(ids).logits, expected, 1e-6)
        for model in (whole, blocks):
            torch._dynamo.reset()
            assert_close("compiled", torch.compile(model, backend="eager")(ids).logits, expected, 1e-6)


def test_without_causal_conv1d_the_model_runs_its_own_convolution() -> None:
    for caller, options in ((cpu.mamba_simple, FUSED), (cpu.mamba2, {**FUSED, "layer": "Mamba2", "ssm": SLOW})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caller, "causal_conv1d_fn", None)
            model, ids = build(**options), tokens(5, 2, 40)
            kept = simba_fx.transform(model, keep_all(3), kernels="model", criterion="simba")
            assert torch.equal(kept(ids).logits, model(ids).logits)


# Other models that call the packages' functions.


class Own(nn.Module):
    """A user's model, with scan and convolution imported from the packages into the user's own file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 2 * 12 + 2 * 4) for _ in range(3))
        self.taps = nn.ParameterList(torch.randn(12, 3) for _ in range(3))
        self.A = nn.Parameter(-torch.rand(12, 4) - 0.1)

    def forward(self, x: Tensor) -> Tensor:
        for inward, taps in zip(self.layers, self.taps):
            u, dt, b, c = inward(x).transpose(1, 2).split([12, 12, 4, 4], 1)
            u = causal_conv1d_fn(u, taps, activation="silu")
            x = x + selective_scan_fn(u, dt, self.A, b, c, delta_softplus=True).transpose(1, 2)
        return x


def test_a_users_module_that_imports_the_packages_functions_needs_no_registration() -> None:
    model, x = Own(), torch.randn(2, 30, 12)
    with pytest.MonkeyPatch.context() as patch:  # the real functions, which would fail here if they were called
        patch.setitem(globals(), "selective_scan_fn", cpu.REAL["selective_scan_fn"])
        patch.setitem(globals(), "causal_conv1d_fn", cpu.REAL["causal_conv1d_fn"])
        kept = simba_fx.transform(model, keep_all(3), example_inputs=(x,), criterion="simba")
    assert_close("output", kept(x), model(x), TOLERANCE[torch.float32])


# Mamba-3, which MambaLMHeadModel of this version does not make: its blocks in a module of one's own.


class Mamba3Stack(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(cpu.mamba3.Mamba3(32, d_state=16, headdim=16, **options) for _ in range(4))
        self.norms = nn.ModuleList(nn.RMSNorm(32) for _ in range(4))
        with torch.no_grad():  # as they come, heads are alike
            for name, weight in self.named_parameters():
                if name.endswith((".D", "_bias")):
                    weight.normal_()

    def block(self, number: int, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers[number](self.norms[number](x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        for number in range(4):
            x = self.block(number, x)
        return x


MAMBA3 = [pytest.param(options, id=name) for name, options in
          (("usual", {}), ("groups", {"ngroups": 2}), ("all-turn", {"rope_fraction": 1.0}),
           ("norm", {"is_outproj_norm": True, "A_floor": 0.5}))]  # fmt: skip


@pytest.mark.parametrize("options", MAMBA3)
def test_mamba3_with_every_token_kept_is_the_dense_model(options: dict[str, Any]) -> None:
    """The bits with its own function; to rounding as the scan of Mamba-2, gradients too."""
    model, x = Mamba3Stack(**options), torch.randn(2, 41, 32)
    own = simba_fx.transform(model, keep_all(4), kernels="model", criterion="simba", example_inputs=(x,))
    ours = simba_fx.transform(model, keep_all(4), criterion="simba", example_inputs=(x,))
    with torch.no_grad():
        for length in (41, 7):
            assert torch.equal(own(x[:, :length]), model(x[:, :length]))
            assert_close("output", ours(x[:, :length]), model(x[:, :length]), TOLERANCE[torch.float32])
    right, found = (gradients(one(x).square().mean(), model) for one in (model, ours))
    for name, gradient in right.items():
        assert_close(name, found[name], gradient, GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("options", MAMBA3)
def test_mamba3_is_its_own_blocks_on_the_survivors(options: dict[str, Any]) -> None:
    """Which are those that contribute most to the scan's output at the query, by its own recurrence in float64 on the
    value of one token alone."""
    model, x = Mamba3Stack(**options).eval(), torch.randn(2, 41, 32)
    sparse = simba_fx.transform(model, [1, 0.6, 0.6, 0.2], criterion="simba", example_inputs=(x,))
    scans: list[dict[str, Any]] = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        with simba_fx.tail(sparse, 3):
            found = sparse(x)
        kept = simba_fx.kept(sparse)
        patch.setattr(cpu.mamba3, "mamba3_siso_combined",
                      lambda **given: (scans.append(given), cpu.mamba3_siso_combined(**given))[1])  # fmt: skip
        states = reference.on_survivors(x, [functools.partial(model.block, number) for number in range(4)], kept)
        for cut, scan in ((1, scans[0]), (3, scans[2])):  # block 1 drops nothing
            given = scan | {"D": None, "Z": None, "V": scan["V"].double()}
            length = given["V"].shape[1]
            alone = [given["V"] * (torch.arange(length) == token)[:, None, None] for token in range(length)]
            score = torch.stack([cpu.mamba3_siso_combined(**given | {"V": v})[:, -3].amax((1, 2)) for v in alone], 1)
            for row in range(2):
                best = score[row, : length - 3].topk(kept[cut].shape[1] - 3).indices
                right = torch.cat((best, torch.arange(length - 3, length))).sort().values
                assert torch.equal(kept[cut - 1][row][right], kept[cut][row])
    for row in range(2):
        assert_close("output", found[row, kept[3][row]], states[row], TOLERANCE[torch.float32])


def test_mamba3_compiles_for_every_length() -> None:
    model, x = Mamba3Stack().eval(), torch.randn(2, 50, 32)
    sparse = simba_fx.transform(model, "linear", criterion="simba", example_inputs=(x,))
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager")
    with torch.no_grad():
        for length in (50, 33, 41):
            assert_close("output", compiled(x[:, :length]), sparse(x[:, :length]), TOLERANCE[torch.float32])


# Refusals.


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([inner])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers[0](x)
        return found


def refusal(model: nn.Module, **options: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        simba_fx.transform(model, **options)
    return str(caught.value)


def test_what_mamba3_does_not_do_is_refused() -> None:
    model = Around(cpu.mamba3.Mamba3(32, d_state=16, headdim=16))
    model.layers[0].is_mimo = True  # where TileLang is installed
    assert refusal(model, example_inputs=(torch.zeros(2, 24, 32),)) == (
        "layers.0 is a Mamba-3 block (Mamba3) with is_mimo=True; expected is_mimo=False: its scan with several inputs "
        "is not supported. Leave such a model dense."
    )
    mixed, ids = build(**FUSED), tokens(1, 2, 30)
    mixed.backbone.layers[1].mixer = cpu.mamba3.Mamba3(20, d_state=16, headdim=10, layer_idx=1)
    sparse = simba_fx.transform(mixed, "linear", criterion="simba")
    assert sparse(ids).logits.shape == (2, 30, mixed.config.vocab_size)
    with pytest.raises(InputError, match=r"layers\.1\.mixer is a Mamba-3 layer, whose states this package does not"):
        sparse(ids, inference_params=states(2))
    row = simba_fx.capture.scan_functions.mamba3.ROWS["mamba3_siso_combined"]
    with pytest.raises(CaptureError, match=r"called with return_final_states; .*that nothing is decoded after"):
        row(*[ids] * 9, return_final_states=True)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["seq_idx", "cu_seqlens", "seqlen"])
def test_packed_sequences_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"MixerModel was called with {name}; only whole sequences, one per row"):
        sparse("mamba2-fused")(tokens(1, 1, 30), **{name: torch.zeros(1, 30, dtype=torch.int32)})


def test_attention_layers_prune_without_states_and_are_refused_with_them() -> None:
    model, ids = build(**FUSED, attn_layer_idx=[1], attn_cfg={"num_heads": 4, "causal": True}), tokens(1, 2, 30)
    kept = simba_fx.transform(model, keep_all(3), kernels="model", criterion="simba")
    assert torch.equal(kept(ids).logits, model(ids).logits)
    assert [cut.block for cut in simba_fx.program(kept).cuts] == [0], "attention scores no tokens"
    with pytest.raises(InputError, match=r"layers\.1\.mixer is an attention layer, whose keys"):
        kept(ids, inference_params=states())
    last = build(**FUSED, attn_layer_idx=[2], attn_cfg={"num_heads": 4, "causal": True}, n_layer=3)
    assert simba_fx.transform(last, keep_all(3), kernels="model", criterion="simba")(ids).logits.equal(last(ids).logits)
    model.backbone.layers[1].mixer.rotary_emb_dim = 4  # as it can be where flash_attn is installed
    assert refusal(model).startswith("layers.1.mixer (MHA) turns keys by their place in the sequence")


def test_calls_that_no_operator_stands_for_are_refused() -> None:
    rows: dict[str, Any] = simba_fx.capture.scan_functions.mamba_ssm.ROWS
    token, constant = torch.zeros(2, 4, 24), torch.zeros(12, 4)
    wide, head = torch.zeros(2, 12, 24), torch.zeros(2, 24, 3, 4)
    calls = {
        "a complex A (12, 4)": lambda: rows["selective_scan_fn"](wide, wide, constant.cfloat(), token, token),
        "a B of shape (12, 4) that is the same for every": lambda: rows["selective_scan_fn"](
            wide, wide, constant, constant, token
        ),
        "mamba_chunk_scan_combined was called with seq_idx": lambda: rows["mamba_chunk_scan_combined"](
            head, head[..., 0], head[0, 0, :, 0], head, head, 8, seq_idx=token
        ),
        "mamba_chunk_scan_combined was called with initial_states": lambda: rows["mamba_chunk_scan_combined"](
            head, head[..., 0], head[0, 0, :, 0], head, head, 8, initial_states=head
        ),
        "causal_conv1d_fn was called with initial_states": lambda: rows["causal_conv1d_fn"](
            wide, constant, initial_states=wide
        ),
        "causal_conv1d_fn was called with return_final_states=True": lambda: rows["causal_conv1d_fn"](
            wide, constant, return_final_states=True
        ),
        "layer_norm_fn was called with dropout_p": lambda: rows["layer_norm_fn"](wide, wide, None, dropout_p=0.1),
        "layer_norm_fn was called with x1": lambda: rows["rms_norm_fn"](wide, wide, None, x1=wide),
    }
    for told, call in calls.items():
        with pytest.raises(CaptureError) as caught:
            call()
        assert told in str(caught.value)
