"""A user's adapter is compared with the user's function when a model is captured: what is refused, and what is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import own_model
import pytest
import torch
from models import BY_NAME, keep_all
from reference import assert_close
from torch import Tensor, nn

import simba_fx
from simba_fx.capture import adapters as comparison
from simba_fx.capture import export, lift
from simba_fx.errors import CaptureError

IDS = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lift, "_registered", dict(lift._registered))
    monkeypatch.setattr(comparison, "_agreed", set())
    monkeypatch.setattr(comparison, "_told", set())
    monkeypatch.setattr(lift, "returned", {})


def model(**sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return own_model.MyMamba(**({"depth": 2} | sizes)).eval()


def back(y: Tensor, _: Tensor) -> Tensor:
    return y.transpose(1, 2)


def turned(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def right(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
    x, step, B, C = turned(x, step, B, C)
    return simba_fx.SelectiveScan(x, step, A, B, C), back


def untransposed(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
    return simba_fx.SelectiveScan(x, step, A, B, C)


def untransposed_result(*operands: Tensor) -> Any:
    return right(*operands)[0]


def exchanged(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
    return right(x, step, A, C, B)


def softplus_twice(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
    x, step, B, C = turned(x, step, B, C)
    return simba_fx.SelectiveScan(x, step, A, B, C, delta_softplus=True), back


def growing(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
    return right(x, step, -100 * A, B, C)


def refusal(adapter: Callable[..., Any], module: nn.Module | None = None, **options: Any) -> str:
    simba_fx.register_scan(own_model.scan, adapter)
    with pytest.raises(CaptureError) as refused:
        simba_fx.transform(module or model(), **options)
    return str(refused.value)


ADVICE = (
    " Correct the adapter; what is often wrong: a transpose is missing (fields and shapes: simba_fx.SelectiveScan, "
    "simba_fx.SSDScan, simba_fx.DeltaScan), B and C are exchanged, softplus is applied twice, a skip or gate is left "
    "out."
)
INEXACT = (
    " If scan is meant to differ from an exact SelectiveScan (it clamps, say), transform(model, kernels='model') runs "
    "it as it is, and the adapter serves for scores alone."
)


@pytest.mark.parametrize("kernels", ["auto", "model"])
@pytest.mark.parametrize("adapter", [untransposed, untransposed_result])
def test_shapes_that_do_not_fit_are_refused(adapter: Callable[..., Any], kernels: str) -> None:
    said = refusal(adapter, kernels=kernels)
    if adapter is untransposed:
        assert said.startswith(
            "The adapter registered for scan returned operands that do not fit: simba_fx::selective_scan expected "
        )
        assert "after register_scan, correct what the adapter returns" in said
    else:
        assert said == (
            "scan and the scan of what its adapter returns differ: on a few random tokens their results have the "
            f"shapes (3, 24, 32) and (3, 32, 24).{ADVICE}"
        )


@pytest.mark.parametrize("adapter", [exchanged, softplus_twice])
def test_other_values_are_refused_with_the_measured_difference(adapter: Callable[..., Any]) -> None:
    module = model()
    said = refusal(adapter, module)
    head, _, rest = said.partition(", where the largest number is ")
    begun, _, off = head.rpartition(" by up to ")
    assert begun == "scan and the scan of what its adapter returns differ: on a few random tokens"
    assert rest.endswith(f".{ADVICE}{INEXACT}")
    assert float(off) > 1e-3
    simba_fx.register_scan(own_model.scan, right)  # corrected, and compared anew
    simba_fx.transform(module, "linear", criterion="simba")


def test_numbers_that_are_none_are_refused() -> None:
    assert "numbers are NaN or infinite in one of them alone." in refusal(growing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_adapter_is_compared_once_and_leaves_no_trace(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(*operands: Tensor) -> Any:
        calls.append(type(operands[0]))
        return right(*operands)

    calls: list[type] = []
    # once a test of this process has registered a recurrence, every model is run once more before its trace
    monkeypatch.setattr(export, "keep_contract", lambda *_, **__: None)
    simba_fx.register_scan(own_model.scan, counted)
    module = model().to(dtype)
    before, state = {n: t.clone() for n, t in module.state_dict().items()}, torch.get_rng_state()
    simba_fx.transform(module, "linear", criterion="simba")
    assert calls.count(Tensor) == 1  # on values, beside one while the kind of the blocks was traced
    assert len(calls) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    simba_fx.transform(module, "linear", criterion="simba")
    assert calls.count(Tensor) == 1
    assert own_model.scan.__name__ == "scan"  # put back where it was


def test_statistics_of_a_module_in_training_stay_as_they_are() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(97, 32), nn.BatchNorm1d(32)
            self.blocks = nn.ModuleList(own_model.Block(32, 4) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.norm(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    torch.manual_seed(0)
    module = Counting().train()
    simba_fx.transform(module, "linear", criterion="simba")
    assert int(module.norm.num_batches_tracked) == 0
    assert not module.norm.running_mean.any()


def test_the_librarys_own_rows_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("compared")

    monkeypatch.setattr(comparison, "_compare", never)
    simba_fx.transform(BY_NAME["mamba"].build(), "linear", criterion="simba")


# --- a scan that is no exact one -------------------------------------------------------------------------------------


def clamping(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return own_model_scan(x, step, A, B, C).clamp(-0.02, 0.02)


own_model_scan = own_model.scan


def test_a_clamping_scan_is_refused_and_the_advice_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `kernels="model"`: the dense model's bits where everything is kept, scores by the adapter's operands."""
    monkeypatch.setattr(own_model, "scan", clamping)
    simba_fx.register_scan(clamping, right)
    module = model(depth=4)
    with pytest.raises(
        CaptureError, match=r"clamping is meant to differ .* transform\(model, kernels='model'\) runs it"
    ):
        simba_fx.transform(module, keep_all(4), criterion="simba")
    with pytest.warns(
        UserWarning, match="With kernels='model' clamping itself runs, and tokens are scored by the exact"
    ):
        whole = simba_fx.transform(module, keep_all(4), kernels="model", criterion="simba")
    seen: list[Any] = []

    def watching(operands: Any, query: Tensor) -> Tensor:
        seen.append(operands)
        return torch.ops.simba_fx.selective_token_score(
            operands.u, operands.delta, operands.A, operands.B, operands.C, None, False, None, 1, "simba"
        )

    shares = (1, Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))
    pruned = simba_fx.transform(module, shares, kernels="model", criterion="simba")
    watched = simba_fx.transform(module, shares, kernels="model", criterion=watching)
    with torch.no_grad():
        assert torch.equal(whole(IDS), module(IDS))
        assert torch.equal(pruned(IDS), watched(IDS))
    assert torch.equal(simba_fx.kept(pruned)[-1], simba_fx.kept(watched)[-1])
    assert isinstance(seen[0], simba_fx.SelectiveScan)
    assert seen[0].u.shape == (2, 32, 40)


# --- where nothing can be compared -----------------------------------------------------------------------------------


def elsewhere(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    raise RuntimeError("no kernel for a CPU.\nMore lines.")


def test_a_function_that_does_not_run_here_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_model, "scan", elsewhere)
    simba_fx.register_scan(elsewhere, right)
    module = model()
    with pytest.warns(UserWarning, match="was not compared") as caught:
        sparse = simba_fx.transform(module, "dense")
    assert [str(one.message) for one in caught] == [
        "elsewhere was not compared with the adapter registered for it: no kernel for a CPU. Compare transform(model, "
        "'dense') with the model yourself."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simba_fx.transform(module, "dense")
    monkeypatch.setattr(own_model, "scan", own_model_scan)
    with torch.no_grad():
        assert_close("logits", sparse(IDS), module(IDS), 1e-5)


def test_as_a_backend_it_is_said_that_nothing_was_compared() -> None:
    torch._dynamo.reset()
    simba_fx.register_scan(own_model.scan, right)
    compiled = torch.compile(model(), backend="simba_fx", options={"backend": "eager"})
    with pytest.warns(
        UserWarning, match=r"torch.compile traces it without values; simba_fx.transform\(model\) compares"
    ):
        compiled(IDS)


def test_a_result_of_another_dtype_is_that_of_the_function() -> None:
    """In mixed precision: the function's decays are float32, so its result is; the operator's is of x's dtype."""
    module = model()
    for wanted in (torch.float32, torch.bfloat16, torch.float32):
        mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted is torch.bfloat16)
        with mixed, torch.no_grad():
            dense = module(IDS)
            own = simba_fx.transform(module, keep_all(2), kernels="model", criterion="simba")
            ours = simba_fx.transform(module, keep_all(2), criterion="simba")
            assert torch.equal(own(IDS), dense), "bit for bit, as without"
            assert_close("output", ours(IDS), dense, 2e-2 if wanted is torch.bfloat16 else 1e-5)
        scans = [node for node in simba_fx.program(own).graph.nodes if node.name.startswith("scan")]
        assert len(scans) == 2
    assert {tuple(found) for found in lift.returned.values()} == {(torch.float32,)}


def test_the_run_for_the_comparison_leaves_no_trace_on_the_model() -> None:
    class Remembers(own_model.MyMamba):  # type: ignore[misc]  # the example's own
        def __init__(self) -> None:
            super().__init__(depth=2)
            self.seen: Any = None

        def forward(self, ids: Tensor) -> Tensor:
            self.seen = ids
            found: Tensor = super().forward(ids)
            return found

    module = Remembers().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's, of what was assigned
        simba_fx.transform(module, "linear")
    assert module.seen is None
