"""Models that cannot be traced, and some that look as if they could not: the sentence is true, and its advice works.

Each stands for a kind that people met (a wrapper, images, experts, parametrised weights, other libraries' layers).
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BY_NAME, logits, tokens
from subprocesses import environment
from torch import Tensor, nn

import simba_fx
from simba_fx import versions
from simba_fx.errors import CaptureError, GraphError, ScanNotFoundError

own_model: Any = importlib.import_module("own_model")

IDS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
HALVES = (1, 1, Fraction(1, 2), Fraction(1, 2))


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    simba_fx.register_scan(own_model.scan, own_model.adapter)


class Net(nn.Module):
    """Embedded ids, then `body(x, layers)`."""

    def __init__(self, body: Any, blocks: int = 4, **more: nn.Module) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(own_model.Block(16, 4) for _ in range(blocks))
        self.body = body
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.body(self, self.emb(ids))
        return found


def through(net: Any, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
    return x


def refusal(model: nn.Module, kind: type[Exception] = CaptureError, **options: Any) -> str:
    """What transform says: one line, within seconds."""
    begun = time.process_time()
    with pytest.raises(kind) as caught:
        simba_fx.transform(model.eval(), **options)
    assert time.process_time() - begun < 20
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what fixes a size, branches on values, or fails by itself -------------------------------------------------------


def test_the_batch_size_as_a_number() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        return through(net, x) * len(x)

    told = refusal(Net(body))
    assert told.startswith("Net takes the batch size of its input as a plain number (test_refusals.py, line ")
    assert "`return through(net, x) * len(x)`" in told
    assert "write x.shape[0]" in told

    def advised(net: Any, x: Tensor) -> Tensor:
        return through(net, x) * x.shape[0]

    model = Net(advised).eval()
    assert torch.allclose(simba_fx.transform(model, "dense")(IDS), model(IDS), atol=1e-5)


def route(net: Any, x: Tensor) -> Tensor:
    """Experts as a loop over those that were chosen."""
    x = through(net, x)
    top = net.gate(x).argmax(-1)
    for number, expert in enumerate(net.experts):
        at = (top == number).nonzero(as_tuple=True)
        if len(at[0]):
            x = x.index_put(at, expert(x[at]))
    return x


def experts() -> dict[str, nn.Module]:
    return {"gate": nn.Linear(16, 2), "experts": nn.ModuleList(nn.Linear(16, 16) for _ in range(2))}


def test_a_branch_on_values(capfd: pytest.CaptureFixture[str]) -> None:
    told = refusal(Net(route, **experts()))
    assert told.startswith(
        "Net makes a number, a size or a branch out of the values of its tensors (test_refusals.py, "
    )
    assert "`if len(at[0]):`" in told
    assert "torch.where" in told
    assert "register" not in told
    assert "def forward" not in "".join(capfd.readouterr()), "torch's graph is for who asks for it"

    def advised(net: Any, x: Tensor) -> Tensor:
        x = through(net, x)
        top = net.gate(x).argmax(-1)
        for number, expert in enumerate(net.experts):
            x = torch.where((top == number)[..., None], expert(x), x)
        return x

    model = Net(advised, **experts()).eval()
    assert torch.allclose(simba_fx.transform(model, "dense")(IDS), model(IDS), atol=1e-5)


REFUSED = """
import test_refusals as t
t.simba_fx.register_scan(t.own_model.scan, t.own_model.adapter)
assert "out of the values of its tensors" in t.refusal(t.Net(t.route, **t.experts()))
"""


def test_torchs_graph_is_printed_under_its_switch() -> None:
    variables = environment(Path(__file__).parent, TORCH_LOGS="+simba_fx")
    done = subprocess.run([sys.executable, "-c", REFUSED], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "def forward" in done.stdout + done.stderr


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "version", "how"), [
    ("torch", "2.15.0+cu130", "newer"), ("torch", "3.0.0a0", "newer"), ("torch", "2.10.1", "older"),
    ("transformers", "5.25.0.dev0", "newer"), ("transformers", "4.57.1", "older"),
])  # fmt: skip
def test_untested_versions_are_named_once(monkeypatch: pytest.MonkeyPatch, package: str, version: str,
                                          how: str) -> None:  # fmt: skip
    importlib.import_module("transformers")
    monkeypatch.setattr(versions, "_named", set())
    monkeypatch.setattr(sys.modules[package], "__version__", version)
    model = Net(through).eval()
    with pytest.warns(
        UserWarning, match=re.escape(f"{package} {version} is {how} than what simba_fx was tested with (")
    ):
        sparse = simba_fx.transform(model, "dense")
    assert torch.allclose(sparse(IDS), model(IDS), atol=1e-5), "what the warning says to compare"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simba_fx.transform(model, "dense")


def test_this_version_is_tested() -> None:
    """Or `versions.TESTED`, what README and pyproject.toml say, and the canaries have to follow."""
    assert versions.untested() == []
    told = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for package, (oldest, _) in versions.TESTED.items():
        assert f'"{package}>={oldest[0]}.{oldest[1]}"' in told


def test_a_model_that_fails_on_its_own() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        return torch.einsum("bld,dk->blk", through(net, x), torch.ones(15, 4))

    told = refusal(Net(body))
    assert told.startswith("Net fails on an example of ids (3, 24), traced or not: einsum(): subscript d has size 15")
    assert "register" not in told


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.blocks = Net(through)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return through(self.blocks, x).mean(1)


def test_pictures() -> None:
    told = refusal(Pictures(), example_inputs=(torch.zeros(2, 3, 32, 32),))
    assert told.startswith(
        "Pictures fails on an example of x (3, 24, 32, 32), traced or not: Given groups=1, weight of"
    )
    assert "transform the blocks, from the module on that takes (B, L, width)" in told

    class Blocks(nn.Module):
        def __init__(self, layers: nn.ModuleList) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return through(self, x)

    model = Pictures()
    sparse = simba_fx.transform(Blocks(model.blocks.layers), "linear", example_inputs=(torch.zeros(2, 24, 16),))
    assert sparse(model.patches(torch.randn(2, 3, 32, 32)).flatten(2).transpose(1, 2)).shape == (2, 64, 16)


def test_modules_of_torch_are_no_loops_over_tokens() -> None:
    """A Transformer's layer calls dozens of operators from one line."""
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3)]

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(50, 16)
            self.layers = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            return through(self, self.emb(x))

    assert refusal(Encoder(), ScanNotFoundError).startswith("No scan was found in Encoder")


# --- functions that look like scans ----------------------------------------------------------------------------------


def decay(x: Tensor) -> Tensor:
    return torch.cumsum(x, 1)


def fast_segsum(x: Tensor) -> Tensor:
    return decay(x)


def chunk_linear_attention(x: Tensor) -> Tensor:
    return fast_segsum(x)


def another_scan(x: Tensor) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize("kept", ["a global", "an attribute"])
def test_the_functions_that_ran_are_named_by_the_outermost(kept: str) -> None:
    """Not those that were never called, nor what they call in turn."""

    def body(net: Any, x: Tensor) -> Tensor:
        return x + (net.function if kept == "an attribute" else chunk_linear_attention)(x)

    net = Net(body)
    net.function = chunk_linear_attention
    assert refusal(net, ScanNotFoundError) == (
        "No scan was found in Net: expected at least one call of a registered scan function while it was traced, found "
        f"none. It called {__name__}.chunk_linear_attention, not registered. If that computes the recurrence of Mamba "
        "or Mamba-2, or a gated delta rule, register it: simba_fx.register_scan(function, adapter). If another that is "
        "linear in its values: simba_fx.register_recurrence(function, value)."
    )


# --- where blocks begin and end --------------------------------------------------------------------------------------


class Branch(nn.Module):
    """A block without its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.block = own_model.Block(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block(x) - x
        return found


def test_residuals_and_norms_outside_of_the_blocks() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        for norm, branch in zip(net.norms, net.branches):
            x = x + branch(norm(x))
        return net.last(x)

    torch.manual_seed(0)
    model = Net(body, 0, norms=nn.ModuleList(nn.LayerNorm(16) for _ in range(4)),
                branches=nn.ModuleList(Branch() for _ in range(4)), last=nn.LayerNorm(16)).eval()  # fmt: skip
    sparse = simba_fx.transform(model, "linear")
    with torch.no_grad():
        found, kept = sparse(IDS), simba_fx.kept(sparse)
        assert [block.shape[1] for block in kept] == sorted({block.shape[1] for block in kept}, reverse=True)
        for row in range(2):
            x = model.emb(IDS[row : row + 1])
            gone, at = torch.zeros_like(x), torch.arange(40)
            for index, (norm, branch) in enumerate(zip(model.norms, model.branches)):
                here = torch.isin(at, kept[index][row])
                gone[:, at[~here]] = x[:, ~here]
                x, at = x[:, here], at[here]
                x = x + branch(norm(x))
            gone[:, at] = x
            torch.testing.assert_close(found[row : row + 1], model.last(gone), rtol=1e-4, atol=1e-4)


def test_two_lists_of_blocks_whose_halves_are_one_block() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forth, self.back = own_model.Block(16, 4), own_model.Block(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.forth(x) + self.back(x.flip(1)).flip(1)
            return found

    def body(net: Any, x: Tensor) -> Tensor:
        for forth, back in zip(net.forth, net.back):
            x = forth(x) + back(x.flip(1)).flip(1)
        return x

    lists = {name: nn.ModuleList(own_model.Block(16, 4) for _ in range(3)) for name in ("forth", "back")}
    told = refusal(Net(body, 0, **lists), GraphError)
    assert "expected one value per cut that it continues (the residual stream), found " in told
    assert told.endswith("or, if these are halves of one block, make them one module of a ModuleList.")
    assert simba_fx.transform(Net(body, 0, **lists), "linear", output="kept")(IDS).shape[1] < 40
    assert simba_fx.transform(Net(through, 0, layers=nn.ModuleList(Pair() for _ in range(3))), "linear")(IDS).shape == (
        2,
        40,
        16,
    )


def test_tokens_that_the_model_puts_in_front() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(own_model.Block(16, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return through(self, x)

    def body(net: Any, x: Tensor) -> Tensor:
        found: Tensor = net.stack(torch.cat((net.meta.weight.expand(x.shape[0], -1, -1), x), 1))[:, 8:]
        return found

    model = Net(body, 0, stack=Stack(), meta=nn.Embedding(8, 16)).eval()
    told = refusal(model, GraphError)
    assert "has shape (B, L + 8, 16) and crosses a cut" in told
    assert "transform the module inside it that is given all of them, with protect=range(n) for n in front" in told
    expected = model(IDS)
    dense = model.stack
    model.stack = simba_fx.transform(dense, "linear", example_inputs=(torch.zeros(2, 24, 16),), protect=range(8))
    assert model(IDS).shape == expected.shape
    assert all(block[0].tolist()[:8] == [*range(8)] for block in simba_fx.kept(model.stack))


# --- other libraries' parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "mamba"])
def test_parametrised_weights(name: str) -> None:
    """`weight_norm` makes classes that refuse copies."""
    torch.manual_seed(0)
    model: Any = Net(through) if name == "plain" else BY_NAME["mamba"].build()
    blocks = model.layers if name == "plain" else [layer.mixer for layer in model.backbone.layers]
    for block in blocks:
        nn.utils.parametrizations.weight_norm(block.inputs if name == "plain" else block.in_proj)
    model.eval()
    run = (lambda m: m(IDS)) if name == "plain" else (lambda m: logits(m, input_ids=tokens(1, 2, 30)))
    dense, sparse = simba_fx.transform(model, "dense"), simba_fx.transform(model, "linear")
    assert torch.allclose(run(dense), run(model), atol=1e-4)
    assert list(sparse.state_dict()) == list(model.state_dict())
    before = run(sparse)
    with torch.no_grad():
        next(p for path, p in model.named_parameters() if path.endswith("original0")).mul_(2)
    assert not torch.allclose(run(sparse), before)


def test_weights_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By where the class comes from: the package itself is not asked for."""
    package = types.ModuleType("bitsandbytes.nn.modules")
    exec("from torch import nn\nclass Linear8bitLt(nn.Linear): pass", vars(package))
    model: Any = BY_NAME["mamba"].build()
    model.backbone.layers[1].mixer.in_proj.__class__ = package.Linear8bitLt
    told = refusal(model)
    assert told.startswith("layers.1.mixer.in_proj is a Linear8bitLt of bitsandbytes, whose weights cannot be traced")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao itself
def test_packed_weights() -> None:
    packed = torch.ao.quantization.quantize_dynamic(BY_NAME["mamba"].build(), {nn.Linear}, dtype=torch.qint8)
    assert refusal(packed).startswith(
        "layers.0.mixer.in_proj is a Linear of torch.ao.nn.quantized.dynamic.modules.linear, whose weights are packed"
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_export_to_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way its exporters trace; they tell it as what stopped them."""
    sparse = simba_fx.transform(Net(through), "linear", compile="whole")
    whole = simba_fx.transform(BY_NAME["mamba"].build(), "linear", compile="whole")
    ids = tokens(1, 2, 30)
    logits(whole, input_ids=ids, use_cache=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for strict in (False, True):
        with pytest.raises(Exception, match=r"no counterpart in ONNX\. Export the dense model to ONNX, or"):
            torch.export.export(whole, (), {"input_ids": ids, "use_cache": False}, strict=strict)
    with pytest.raises(CaptureError, match="no counterpart in ONNX"):
        torch.export.export(sparse, (IDS,), strict=False)
    with pytest.raises(CaptureError, match="no counterpart in ONNX"):
        torch.jit.trace(sparse, (IDS,))


def test_a_model_of_pictures_and_text_is_transformed_by_its_language_model() -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=8, patch_size=4)  # fmt: skip
    text: Any = BY_NAME["bamba"].build().config
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=4)
    ).eval()
    assert refusal(model) == (
        "LlavaForConditionalGeneration holds a language model beside other parts; expected a model of texts. Write "
        "model.model.language_model = simba_fx.transform(model.model.language_model, ...)."
    )
    ids = torch.cat((torch.full((2, 4), 5), tokens(3, 2, 30).clamp(min=6)), 1)
    given: Any = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    decode: Any = {**given, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected, continued = model(**given).logits, model.generate(**decode)
        dense = model.model.language_model
        model.model.language_model = simba_fx.transform(dense, "dense")
        assert torch.allclose(model(**given).logits, expected, atol=1e-5)
        assert torch.equal(model.generate(**decode), continued)
        model.model.language_model = simba_fx.transform(dense, "linear")
        assert model(**given).logits.shape == expected.shape
        assert simba_fx.kept(model.model.language_model)[-1].shape[1] < 34
        assert model.generate(**decode).shape == continued.shape


# --- what is left of a transform -------------------------------------------------------------------------------------


def test_transforms_leave_nothing_behind() -> None:
    """Neither modules nor the text of their code, nor what torch remembers of fake tensors."""
    import gc
    import linecache

    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.graph_module import _loader

    from simba_fx.runtime.program import Block, Program

    def there() -> tuple[int, ...]:
        gc.collect()
        classes = sum(type(held) is type and issubclass(held, Program | Block) for held in gc.get_objects())
        texts = len([key for key in linecache.cache if "eval_with_key" in key])
        return len(_loader.eval_cache), texts, classes, FakeTensorMode.cache_info().size

    model = Net(through, 2)
    simba_fx.report(simba_fx.transform(model, "linear"), IDS)
    before = there()
    for length in (20, 30, 40, 50):
        simba_fx.report(simba_fx.transform(model, "linear"), IDS[:, :1].repeat(1, length))
    assert there() == before


@contextlib.contextmanager
def _whatever_dynamo_warns_of() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):
        yield


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["mamba", "zamba2"])
def test_a_model_that_was_called_goes_when_its_user_lets_it_go(name: str, compiled: bool) -> None:
    """What it remembers of the thread's last call, and was asked for, leads to it and must not keep it.

    (torch 2.11 itself keeps the class of a model that was compiled, a dense one's too.)
    """
    import gc
    import weakref

    def user(sparse: bool) -> tuple[Any, ...]:
        model: Any = BY_NAME[name].build()
        model.__class__ = type("Own", (type(model),), {})  # other tests' models keep the classes of theirs
        model = simba_fx.transform(model, "linear") if sparse else model
        run = torch.compile(model, backend="eager") if compiled else model
        with torch.no_grad(), simba_fx.tail(model, 3) if sparse else _whatever_dynamo_warns_of():
            run(tokens(0, 2, 40))
        assert not sparse or simba_fx.kept(model)
        return weakref.ref(type(model)), *map(weakref.ref, model.parameters())

    def left(*refs: Any) -> list[Any]:
        torch.compiler.reset()
        gc.collect()
        return [type(held) for ref in refs if (held := ref()) is not None]

    assert left(*user(True)) in ([], left(*user(False)))
