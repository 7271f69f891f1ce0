"""save and load: the same bits, class, options and kept tokens; a folder that stays the dense model's; every refusal.

The reference is the sparse model before it was saved, and, for the folder read without simba_fx, the dense original.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BY_NAME, CHECKPOINT, PER_FAMILY, REGISTRY, Entry, dense, names, three_rows, tokens
from strategies import seeds, shares
from torch import Tensor, nn
from transformers import MambaForCausalLM, logging

import simba_fx
from simba_fx.errors import CaptureError, ScheduleError, SimbaError
from simba_fx.frontends.files import FILE
from simba_fx.frontends.module.files import WEIGHTS
from simba_fx.options import CRITERIA, Options
from simba_fx.saving import options_from_json, options_to_json

own_model: Any = importlib.import_module("own_model")

OPTIONS: dict[str, Any] = {"criterion": "simba-abs", "floor": 3, "protect": [0, -2], "seed": 5}
every_family = pytest.mark.parametrize(
    "entry",
    [*PER_FAMILY, *(BY_NAME[name] for name in ("mamba-bf16", "jamba", "kimi-linear"))],
    ids=names([*PER_FAMILY, *(BY_NAME[name] for name in ("mamba-bf16", "jamba", "kimi-linear"))]),
)


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def logits(model: Any, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**call)
    return found if isinstance(found, Tensor) else found.logits


def options_of(model: nn.Module) -> Options:
    found: Options = model.__dict__["_simba"].options
    return found


def assert_same(found: Any, expected: Any, call: dict[str, Tensor]) -> None:
    """Bits, classes, kept tokens and options."""
    assert torch.equal(logits(found, call), logits(expected, call))
    assert type(found).__name__ == type(expected).__name__
    assert all(torch.equal(a, b) for a, b in zip(simba_fx.kept(found), simba_fx.kept(expected), strict=True))
    assert options_of(found) == options_of(expected)
    assert [p.dtype for p in found.parameters()] == [p.dtype for p in expected.parameters()]
    assert not found.training


def edited(folder: Path, **changes: Any) -> Path:
    """The folder with other values in its file, by "key" or "key.inner"; None takes a key away."""
    written = json.loads((folder / FILE).read_text())
    for path, held in changes.items():
        *outer, name = path.split("__")
        place = written
        for key in outer:
            place = place[key]
        if held is None:
            del place[name]
        else:
            place[name] = held
    (folder / FILE).write_text(json.dumps(written))
    return folder


# transformers.


@every_family
def test_a_loaded_model_is_the_saved_one_and_the_folder_stays_the_dense_models(entry: Entry, tmp_path: Path) -> None:
    """transformers reads the folder without a word about the file beside its own."""
    model, call = dense(entry.name), three_rows(masked=True)
    sparse = simba_fx.transform(model, simba_fx.Linear(final=0.3), **OPTIONS)
    simba_fx.save(sparse, tmp_path / "saved")

    found = simba_fx.load(tmp_path / "saved")
    assert_same(found, sparse, call)
    assert isinstance(found, type(model))
    assert min(block.shape[1] for block in simba_fx.kept(found)) < 20, "nothing would be pruned"
    assert simba_fx.program(found).shares == simba_fx.program(sparse).shares

    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [type(model).__name__]
    cls = getattr(transformers, type(model).__name__)
    plain = cls.from_pretrained(tmp_path / "saved", dtype=entry.dtype)
    assert type(plain) is type(model)
    assert torch.equal(logits(plain, call), logits(model, call))


def test_the_trained_checkpoint_generates_the_same(tmp_path: Path) -> None:
    model = MambaForCausalLM.from_pretrained(CHECKPOINT).eval()
    sparse = simba_fx.transform(model, "linear")
    simba_fx.save(sparse, tmp_path / "saved")
    prompt = torch.tensor(
        [list(b"import os\n\n\ndef main(arguments: list[str]) -> None:\n    for name in arguments:\n")]
    )
    made = [
        one.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        for one in (sparse, simba_fx.load(tmp_path / "saved"))
    ]
    assert torch.equal(*made)


def test_arguments_of_from_pretrained_are_handed_on(tmp_path: Path) -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear")
    simba_fx.save(sparse, tmp_path)
    for name in ("dtype", "torch_dtype"):
        found = simba_fx.load(tmp_path, **{name: torch.bfloat16})
        assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    with pytest.raises(OSError, match=r"no file named model\.elsewhere"):
        simba_fx.load(tmp_path, variant="elsewhere")  # reached from_pretrained


def test_weights_of_several_dtypes_stay_what_they_were(tmp_path: Path) -> None:
    model = BY_NAME["mamba"].build().to(torch.bfloat16)
    for layer in model.backbone.layers:
        layer.mixer.A_log.data = torch.rand_like(layer.mixer.A_log, dtype=torch.float32)
    sparse = simba_fx.transform(model, "linear")
    simba_fx.save(sparse, tmp_path)
    assert_same(simba_fx.load(tmp_path), sparse, three_rows(masked=True))


def test_a_compiled_wrapper_is_unwrapped(tmp_path: Path) -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear", compile="whole")
    simba_fx.save(torch.compile(sparse), tmp_path)
    assert_same(simba_fx.load(tmp_path), sparse, three_rows(masked=False))


def test_the_stack_of_a_model_is_a_model(tmp_path: Path) -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear").backbone
    simba_fx.save(sparse, tmp_path)
    found, ids = simba_fx.load(tmp_path), tokens(1, 2, 40)
    assert type(found).__name__ == "MambaModel"
    with torch.no_grad():
        assert torch.equal(found(ids).last_hidden_state, sparse(ids).last_hidden_state)


def test_the_file_is_meant_to_be_read(tmp_path: Path) -> None:
    schedule = simba_fx.Linear(final=Fraction(1, 10), start=1)
    simba_fx.save(simba_fx.transform(dense("mamba"), schedule), tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == {
        "format": 1,
        "library": "transformers",
        "class": "MambaForCausalLM",
        "dtype": "float32",
        "implementations": {"attn_implementation": "eager", "experts_implementation": "eager"},  # it has neither
        "options": {
            "schedule": {"kind": "Linear", "final": "1/10", "every": 1, "start": 1},
            "criterion": "simba-l2+write",
            "output": "full",
            "floor": 4,
            "kernels": "auto",
            "compile": "blocks",
            "seed": 0,
            "span": 15,
            "query": None,
            "protect": [],
            "labels": "all",
            "mask": None,
            "mask_marks": "real",
            "tail": "last",
            "pad_token_id": None,
        },
        "shares": ["1", "1", "11/20", "1/10"],
    }


# Schedules and criteria that are code.


@pytest.mark.parametrize(
    "schedule",
    [simba_fx.Budget(0.8, length=64), lambda n: [1 - 0.2 * i for i in range(n)]],
    ids=["a budget", "a function"],
)
def test_what_a_schedule_came_to_is_written(schedule: Any, tmp_path: Path) -> None:
    sparse = simba_fx.transform(dense("mamba"), schedule)
    simba_fx.save(sparse, tmp_path)
    found, came_to = simba_fx.load(tmp_path), simba_fx.program(sparse).shares
    assert simba_fx.program(found).shares == came_to
    assert options_of(found) == dataclasses.replace(options_of(sparse), schedule=simba_fx.schedule.Explicit(came_to))
    assert json.loads((tmp_path / FILE).read_text())["options"]["schedule"]["made_by"] == repr(
        options_of(sparse).schedule
    )
    call = three_rows(masked=False)
    assert torch.equal(logits(found, call), logits(sparse, call))


def late_is_better(operands: Any, query: Tensor) -> Tensor:
    rows, _, length = operands.u.shape
    return torch.arange(length).expand(rows, length).float()


def test_a_criterion_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    sparse = simba_fx.transform(dense("mamba"), "linear", criterion=late_is_better)
    simba_fx.save(sparse, tmp_path)
    refused(
        "The model was saved with a criterion of your own, late_is_better, which a file cannot hold; expected it as an "
        "argument. Write simba_fx.load(directory, criterion=late_is_better).",
        tmp_path,
    )
    assert_same(simba_fx.load(tmp_path, criterion=late_is_better), sparse, three_rows(masked=False))


# Plain modules.


class Tied(nn.Module):
    """The model of the example with one weight at two places, a buffer, and arguments beside the tokens."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(own_model.Block(width, 4) for _ in range(depth))
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.last.weight = self.first.weight
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        hidden = self.first(x) * scale + self.shift
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.last(hidden)
        return out


def tied(seed: int, **sizes: int) -> Tied:
    torch.manual_seed(seed)
    return Tied(**sizes).eval()


def test_a_plain_module_is_loaded_into_an_instance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocabulary": 53, "width": 16, "states": 4, "depth": 4}
    sparse = simba_fx.transform(own_model.MyMamba(**sizes).eval(), simba_fx.Stages({1: 0.7, 3: Fraction(2, 7)}))
    simba_fx.save(sparse, tmp_path / "saved")
    assert sorted(os.listdir(tmp_path / "saved")) == [FILE, WEIGHTS]
    other = own_model.MyMamba(**sizes).eval()
    found = simba_fx.load(tmp_path / "saved", other)
    assert_same(found, sparse, {"ids": tokens(1, 3, 40)})
    assert all(a is b for a, b in zip(found.parameters(), other.parameters(), strict=True)), "shared with the instance"
    assert list(found.state_dict()) == list(sparse.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_examples_and_dtypes_of_a_plain_module_are_remembered(dtype: torch.dtype, tmp_path: Path) -> None:
    examples = {"x": torch.zeros(2, 24, 16, dtype=dtype), "attention_mask": torch.ones(2, 24), "scale": 0.5}
    sparse = simba_fx.transform(tied(0).to(dtype), "linear", mask="attention_mask", example_inputs=examples)
    simba_fx.save(sparse, tmp_path)
    other = tied(1)
    found = simba_fx.load(tmp_path, other)
    mask = torch.ones(2, 40)
    mask[0, :9] = 0
    assert_same(found, sparse, {"x": torch.randn(2, 40, 16).to(dtype), "attention_mask": mask})
    assert other.last.weight is other.first.weight, "still one weight at two places"


def test_what_cannot_be_loaded_into_the_module_changes_nothing(tmp_path: Path) -> None:
    simba_fx.save(simba_fx.transform(tied(0), "linear", example_inputs=(torch.zeros(2, 24, 16),)), tmp_path)
    module = tied(1, depth=4)
    before = {name: held.clone() for name, held in module.state_dict().items()}
    refused(
        f"{tmp_path / WEIGHTS} does not hold the weights of this Tied: blocks.3.A_log is missing (and 8 more). Make "
        "the module with the sizes that it was saved with.",
        tmp_path,
        module,
    )
    module.blocks = module.blocks[:2]
    with pytest.raises(SimbaError, match=re.escape("blocks.2.A_log is unknown (and 8 more)")):
        simba_fx.load(tmp_path, module)
    assert all(torch.equal(held, before[name]) for name, held in module.state_dict().items())
    with pytest.raises(SimbaError, match=re.escape("shift has shape (16,), expected (20,) (and")):
        simba_fx.load(tmp_path, tied(1, width=20))


# Options.

fractions = st.fractions(min_value=Fraction(1, 1000), max_value=1, max_denominator=1000)
floats = st.floats(min_value=0.001, max_value=1)
one_share = st.one_of(fractions, floats, floats.map(np.float32), st.just(1))
counts = st.integers(0, 9)
ramps = st.builds(
    lambda cls, final, every, start: cls(final, every, start),
    st.sampled_from([simba_fx.Linear, simba_fx.Cosine]),
    one_share,
    st.integers(1, 9),
    counts,
)
schedules = st.one_of(
    ramps,
    st.builds(simba_fx.Constant, one_share, counts),
    st.just(simba_fx.Dense()),
    st.dictionaries(counts, one_share).map(simba_fx.Stages),
    st.lists(one_share).map(simba_fx.schedule.Explicit),
)
positions = st.integers(-20, 20)
options = st.builds(
    Options,
    schedules,
    criterion=st.sampled_from(CRITERIA),
    output=st.sampled_from(["full", "kept"]),
    floor=counts,
    kernels=st.sampled_from(["auto", "model"]),
    compile=st.sampled_from(["blocks", "whole"]),
    seed=seeds,
    query=st.one_of(st.none(), positions),
    protect=st.lists(positions, max_size=4),
    labels=st.sampled_from(["all", "kept"]),
)


@settings(max_examples=300)
@given(options)
def test_options_survive_the_file(chosen: Options) -> None:
    found = options_from_json(json.loads(json.dumps(options_to_json(chosen, ()))))
    assert found == chosen
    assert {field.name for field in dataclasses.fields(Options)} == set(options_to_json(chosen, ()))


@settings(max_examples=50)
@given(shares(5))
def test_shares_survive_the_file_whatever_made_them(drawn: tuple[Fraction, ...]) -> None:
    chosen = Options(simba_fx.schedule.as_schedule(lambda n: drawn))
    found = options_from_json(json.loads(json.dumps(options_to_json(chosen, drawn))))
    assert simba_fx.schedule.resolve_shares(found.schedule, 5) == drawn


def test_a_schedule_may_be_changed_in_the_file(tmp_path: Path) -> None:
    simba_fx.save(simba_fx.transform(dense("mamba"), "linear"), tmp_path)
    edited(tmp_path, options__schedule__final="1/2")
    with pytest.raises(ScheduleError) as caught:
        simba_fx.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / FILE} lists shares for 4 blocks, and its schedule comes to others here, for 4: 1, 5/6, 2/3, 1/2. "
        "Expected the same, so that the loaded model keeps what the saved one kept. If you changed the schedule on "
        'purpose, delete "shares" from the file.'
    )
    edited(tmp_path, shares=None)
    expected = simba_fx.transform(dense("mamba"), simba_fx.Linear(final=0.5))
    call = three_rows(masked=False)
    assert torch.equal(logits(simba_fx.load(tmp_path), call), logits(expected, call))


# Folders.


def test_a_folder_may_be_written_again_and_keeps_what_else_it_holds(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for schedule in ("linear", 0.5):
        sparse = simba_fx.transform(dense("mamba"), schedule)
        simba_fx.save(sparse, str(tmp_path))
        assert_same(simba_fx.load(str(tmp_path)), sparse, three_rows(masked=False))
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_save_leaves_no_sparse_model(
    existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sparse = tmp_path / "a" / "b", simba_fx.transform(dense("mamba"), "linear")
    if existing:
        simba_fx.save(sparse, folder)

    def fails(self: nn.Module, directory: str) -> None:
        (Path(directory) / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(MambaForCausalLM, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        simba_fx.save(sparse, folder)
    assert folder.exists() is existing
    assert os.listdir(tmp_path / "a") == (["b"] if existing else [])
    if existing:
        with pytest.raises(SimbaError, match="holds no sparse model"):
            simba_fx.load(folder)


# Refusals of save: nothing is written.


class Ours(MambaForCausalLM):  # type: ignore[misc]
    """A class that transformers does not know."""


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(BY_NAME["mamba"].build(), peft.LoraConfig(target_modules=["x_proj"], r=2))


def around(inner: nn.Module) -> nn.Module:
    outer = nn.Module()
    outer.inner = inner
    return outer


class Odd(nn.Module):
    """A plain module with an argument that is no tensor, number, flag or word."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tied(0)

    def forward(self, x: Tensor, sizes: tuple[int, ...] = ()) -> Tensor:
        out: Tensor = self.inner(x)
        return out


UNSAVED = {
    "a dense model": (
        lambda: dense("mamba"),
        "save expects what simba_fx.transform returned; found a MambaForCausalLM. Transform the model first.",
    ),
    "a model around": (
        lambda: around(simba_fx.transform(dense("mamba"), "linear")),
        "save expects what simba_fx.transform returned; found a Module that has a sparse model inside. Save that one.",
    ),
    "adapters": (
        lambda: simba_fx.transform(adapted(), "linear"),
        "save writes whole models; found adapters of PEFT on a PeftModel. Save them with save_pretrained, and "
        "transform again after loading; or merge them first (merge_and_unload).",
    ),
    "a class of one's own": (
        lambda: simba_fx.transform(Ours(dense("mamba").config).eval(), "linear"),
        "Ours is no class that transformers exports, so load could not find it; expected one of its own. Use the "
        "model's save_pretrained, and simba_fx.transform after loading.",
    ),
    "an example that is no value": (
        lambda: simba_fx.transform(Odd(), "linear", example_inputs=(torch.zeros(2, 24, 16), (1, 2))),
        "The module was transformed with sizes=(1, 2) among its example_inputs, which simba_fx.json cannot hold; "
        "expected tensors, numbers, flags and words. Save its state_dict(), and simba_fx.transform after loading.",
    ),
}


@pytest.mark.parametrize("case", UNSAVED)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # asked by PEFT
def test_what_cannot_be_saved_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    make, message = UNSAVED[case]
    model = make()
    with pytest.raises(SimbaError) as caught:
        simba_fx.save(model, tmp_path / "saved")
    assert str(caught.value) == message
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_folders_place_is_disable_compile(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SimbaError) as caught:
        simba_fx.save(simba_fx.transform(dense("mamba"), "linear"), tmp_path / "file")
    assert str(caught.value) == f"save expects a folder; found the file {tmp_path / 'file'}. Name another place."
    assert (tmp_path / "file").read_text() == "mine"


# Refusals of load.


def refused(message: str, folder: Path, *args: Any, error: type[Exception] = SimbaError, **kwargs: Any) -> None:
    with pytest.raises(SimbaError) as caught:
        simba_fx.load(folder, *args, **kwargs)
    assert str(caught.value) == message
    assert type(caught.value) is error


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    simba_fx.save(simba_fx.transform(dense("mamba"), simba_fx.Linear(0.2)), folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """Of the folder, to be spoilt."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


KEYS = "class, dtype, format, implementations, library, options"
INNER = (
    "compile, criterion, floor, kernels, labels, mask, mask_marks, output, pad_token_id, protect, query, schedule, "
    "seed, span, tail"
)
FIX = "Correct the file, or use the version of simba_fx that wrote it."
SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "another format": (
        {"format": 2},
        "{file} has format 2; this version of simba_fx reads format 1. Use the version that wrote it, or transform the "
        "dense model.",
    ),
    "no format": (
        {"format": None},
        "{file} has format None; this version of simba_fx reads format 1. Use the version that wrote it, or transform "
        "the dense model.",
    ),
    "another library": (
        {"library": "jax"},
        "simba_fx.json: expected a library among transformers, mamba_ssm, torch; found 'jax'. Correct it, or transform "
        "the dense model.",
    ),
    "an unknown key": (
        {"colour": "red"},
        f"simba_fx.json, file: expected the keys {KEYS}, shares; unknown: colour. {FIX}",
    ),
    "no class": (
        {"class": None, "shares": None},
        f"simba_fx.json, file: expected the keys {KEYS}; missing: class. {FIX}",
    ),
    "another dtype": (
        {"dtype": "float33"},
        "simba_fx.json: expected a dtype among float32, bfloat16, float16, float64; found 'float33'. Correct it, or "
        "transform the dense model.",
    ),
    "an unknown option": (
        {"options__colour": "red", "options__floor": None},
        f"simba_fx.json, options: expected the keys {INNER}; unknown: colour; missing: floor. {FIX}",
    ),
    "no options": ({"options": 3}, f"simba_fx.json, options: expected the keys {INNER}; missing: {INNER}. {FIX}"),
    "an unknown schedule": (
        {"options__schedule__kind": "Log"},
        "simba_fx.json: expected a schedule of kind Linear, Cosine, Constant, Dense, Stages, Explicit; found 'Log'. "
        "Correct it, or transform the dense model.",
    ),
    "a schedule that is no object": (
        {"options__schedule": "linear"},
        "simba_fx.json: expected a schedule of kind Linear, Cosine, Constant, Dense, Stages, Explicit; found None. "
        "Correct it, or transform the dense model.",
    ),
    "a schedule's field": (
        {"options__schedule__every": None},
        f"simba_fx.json, schedule Linear: expected the keys every, final, start; missing: every. {FIX}",
    ),
    "a share": (
        {"options__schedule__final": "a tenth"},
        "simba_fx.json: expected a share, a number or a fraction as \"1/10\"; found 'a tenth'.",
    ),
    "a block": (
        {"options__schedule": {"kind": "Stages", "stages": {"two": 0.5}}},
        "simba_fx.json: expected the number of a block in a schedule Stages; found 'two'.",
    ),
    "a list of shares": (
        {"options__schedule": {"kind": "Explicit", "values": 3}},
        "simba_fx.json: {{'kind': 'Explicit', 'values': 3}} is no schedule Explicit: 'int' object is not iterable. "
        "Correct it, or transform the dense model.",
    ),
    "an option": (
        {"options__output": "some"},
        "Unknown output='some': expected 'full' or 'kept'. Write transform(model, output='full').",
    ),
    "a function where there was none": (
        {"options__criterion": {"function": "mine"}},
        "The model was saved with a criterion of your own, mine, which a file cannot hold; expected it as an argument. "
        "Write simba_fx.load(directory, criterion=mine).",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_cannot_be_used_is_refused(case: str, copy: Path) -> None:
    changes, message = SPOILT[case]
    refused(message.format(file=copy / FILE), edited(copy, **changes))


def test_shares_for_another_number_of_blocks_are_refused(copy: Path) -> None:
    values = ["1", "1/2", "1/3"]
    edited(copy, options__schedule={"kind": "Explicit", "values": values})
    schedule = simba_fx.schedule.Explicit([Fraction(value) for value in values])
    refused(
        f"{schedule}: expected 4 shares, one per block, found 3; write 4 shares or a mapping block -> share.",
        copy,
        error=ScheduleError,
    )


def test_folders_that_hold_no_sparse_model_are_refused(copy: Path) -> None:
    refused(
        f"load expects a folder that simba_fx.save wrote; found nothing at {copy / 'nowhere'}. Check the path.",
        copy / "nowhere",
    )
    refused(
        f"load expects a folder that simba_fx.save wrote; found a file at {copy / FILE}. Check the path.", copy / FILE
    )
    (copy / FILE).write_text("{")
    with pytest.raises(SimbaError, match=re.escape(f"{copy / FILE} is no JSON: Expecting property name")):
        simba_fx.load(copy)
    (copy / FILE).unlink()
    refused(
        f"{copy} has no simba_fx.json, so it holds no sparse model; expected a folder that simba_fx.save wrote. Load "
        "the dense model with its own library and pass it to simba_fx.transform.",
        copy,
    )


def test_arguments_that_do_not_belong_are_refused(saved: Path, copy: Path, tmp_path: Path) -> None:
    refused(
        f"{saved} holds a MambaForCausalLM of transformers, which load builds itself; expected no model, found a "
        "MambaForCausalLM. Leave it out.",
        saved,
        dense("mamba"),
    )
    refused(
        "The model was saved with criterion='simba-l2+write', and load was given another; expected none. Leave it out, "
        "or transform the dense model with it.",
        saved,
        criterion=late_is_better,
    )
    config = json.loads((copy / "config.json").read_text()) | {"architectures": ["MambaOfTomorrow"]}
    (copy / "config.json").write_text(json.dumps(config))
    refused(
        f"{copy / 'config.json'} names the class 'MambaOfTomorrow', which transformers {transformers.__version__} does "
        "not have; expected MambaForCausalLM. Install a version that has it.",
        copy,
    )
    plain = tmp_path / "plain"
    simba_fx.save(simba_fx.transform(tied(0), "linear", example_inputs=(torch.zeros(2, 24, 16),)), plain)
    refused(
        f"{plain} holds a plain module (Tied), and load was given none to put its weights into; expected a dense "
        "instance. Write simba_fx.load(directory, Tied(...)).",
        plain,
    )
    refused(
        "load passes dtype on to from_pretrained, which a plain module does not have; expected no further arguments. "
        "Call .to() on the result.",
        plain,
        tied(1),
        dtype=torch.bfloat16,
    )
    edited(plain, example_inputs={"x": {"shape": [3, 24, 16], "dtype": "float33"}})
    refused(
        'simba_fx.json, example_inputs: expected {"dtype": ..., "shape": [...]} or {"value": ...} for each argument; '
        "found {'x': {'shape': [3, 24, 16], 'dtype': 'float33'}}. Correct it, or transform the dense module.",
        plain,
        tied(1),
    )
    edited(plain, example_inputs={"y": {"shape": [3, 24, 16], "dtype": "float32"}})
    with pytest.raises(CaptureError, match="example_inputs do not fit Tied"):
        simba_fx.load(plain, tied(1))
    (plain / WEIGHTS).unlink()
    edited(plain, example_inputs={"x": {"shape": [3, 24, 16], "dtype": "float32"}})
    refused(
        f"{plain / WEIGHTS} is missing; expected the weights that simba_fx.save wrote. Save the model again.",
        plain,
        tied(1),
    )


def test_the_registry_covers_every_pure_family() -> None:
    assert {entry.modeling for entry in PER_FAMILY} == {entry.modeling for entry in REGISTRY}


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "bamba"])
@pytest.mark.parametrize(
    "options", [{}, {"criterion": "recent", "labels": "kept", "tail": "labels"}], ids=["plain", "labels"]
)
def test_a_sparse_model_may_be_pickled(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """As the dense model and its options: same class, bits and kept tokens, also through `torch.save`."""
    model, ids = BY_NAME[name].build(), tokens(1, 2, 37)
    one = simba_fx.transform(model, simba_fx.Linear(0.3), **options)
    torch.save(one, tmp_path / "whole.pt")
    for two in (pickle.loads(pickle.dumps(one)), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert type(two) is type(one)
        assert two.state_dict().keys() == one.state_dict().keys()
        assert torch.equal(logits(two, {"input_ids": ids}), logits(one, {"input_ids": ids}))
        assert all(torch.equal(a, b) for a, b in zip(simba_fx.kept(two), simba_fx.kept(one)))
    dense_again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(dense_again, {"input_ids": ids}), logits(model, {"input_ids": ids}))


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_a_sparse_model_that_has_shown_its_hidden_states_may_be_pickled(name: str) -> None:
    """transformers' own recorders, which it leaves on the modules, cannot be."""
    one = simba_fx.transform(BY_NAME[name].build(), "linear")
    ids = tokens(1, 2, 37)
    for model in (one, two := pickle.loads(pickle.dumps(one)), pickle.loads(pickle.dumps(two))):
        found = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = one(input_ids=ids, output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == one.config.num_hidden_layers + 1
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def _kept_elsewhere(model: nn.Module, ids: Tensor, found: Any) -> None:
    torch.set_num_threads(1)
    logits(model, {"input_ids": ids})
    found.put([block.tolist() for block in simba_fx.kept(model)])


def test_a_sparse_model_goes_to_a_spawned_process() -> None:
    import torch.multiprocessing as processes

    one, ids = simba_fx.transform(dense("mamba"), "linear"), tokens(1, 1, 37)
    context = processes.get_context("spawn")
    found = context.SimpleQueue()
    worker = context.Process(target=_kept_elsewhere, args=(one, ids, found))
    worker.start()
    kept = found.get()
    worker.join()
    logits(one, {"input_ids": ids})
    assert kept == [block.tolist() for block in simba_fx.kept(one)]


def test_the_program_of_a_plain_module_is_not_pickled(tmp_path: Path) -> None:
    sparse = simba_fx.transform(own_model.MyMamba(), "linear")
    with pytest.raises(simba_fx.errors.SimbaError, match=r"cannot be pickled.*simba_fx\.save"):
        torch.save(sparse, tmp_path / "whole.pt")
    with pytest.raises(simba_fx.errors.SimbaError, match="cannot be pickled"):
        pickle.dumps(sparse)
