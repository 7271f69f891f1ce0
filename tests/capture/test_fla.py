"""A user's own model that calls functions of flash-linear-attention: loops with their signatures stand for them here.

(The package needs a GPU. What stands here for its functions is not imported from it, but named as in it.)
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import recurrences as known
import torch
import torch.nn.functional as F
from reference import assert_close
from torch import Tensor, nn

import simba_fx
from simba_fx.errors import CaptureError

WIDTH, HEADS, SIZE = 12, 2, 3
EXAMPLE = (torch.zeros(2, 13, WIDTH),)


def delta_loop(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """`decay` `(B, L, H, K or 1)`, not its logarithm."""

    def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        state = decay.unsqueeze(-1) * state
        state = state + known.outer(k, beta.unsqueeze(-1) * (v - known.read(state, k)))
        return state, known.read(state, q)

    return known.loop(step, known.matrix(v, k), q, k, v, decay, beta)


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if use_qk_l2norm_in_kernel:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if kwargs.get("use_gate_in_kernel"):
        rate, shift = kwargs["A_log"].exp(), kwargs["dt_bias"]
        if g.dim() == 4:
            rate, shift = rate[:, None], shift.view(g.shape[2:])
        g = -rate * F.softplus(g + shift)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    decay = g.exp() if g.dim() == 4 else g.exp().unsqueeze(3)
    y, state = delta_loop(q * (k.shape[-1] ** -0.5 if scale is None else scale), k, v, decay, beta)
    return y, state if output_final_state else None


def chunk_kda(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return chunk_gated_delta_rule(*args, **kwargs)


def chunk_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float | None = None,
                     initial_state: Tensor | None = None, output_final_state: bool = False,
                     use_qk_l2norm_in_kernel: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return chunk_gated_delta_rule(q, k, v, torch.zeros_like(beta), beta, scale, initial_state, output_final_state,
                                  use_qk_l2norm_in_kernel)  # fmt: skip


def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None,
              initial_state: Tensor | None = None, output_final_state: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
    y, state = known.gla(q * (k.shape[-1] ** -0.5 if scale is None else scale), k, v, g)
    return y, state if output_final_state else None


def chunk_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, **_: Any
) -> tuple[Tensor, None]:  # fmt: skip
    return known.rwkv7(r * scale, w, k, v, a, b), None


def chunk_hgrn(x: Tensor, g: Tensor, initial_state: Tensor | None = None,
               output_final_state: bool = False) -> tuple[Tensor, None]:  # fmt: skip
    return known.loop(lambda h, x, g: (g.exp() * h + x,) * 2, torch.zeros_like(x[:, 0]), x, g)[0], None


PLACES = {"chunk_gated_delta_rule": "gated_delta_rule", "chunk_kda": "kda", "chunk_delta_rule": "delta_rule",
          "chunk_gla": "gla", "chunk_rwkv7": "rwkv7", "chunk_hgrn": "hgrn"}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in PLACES.items():
        function = globals()[name]
        place = types.ModuleType(f"fla.ops.{folder}.chunk")
        setattr(place, name, function)
        monkeypatch.setattr(function, "__module__", place.__name__)
        monkeypatch.setitem(sys.modules, place.__name__, place)


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v and gates for each key, `(B, L, H, K)`, of a block's projection."""
    return x.unflatten(2, (HEADS, -1)).chunk(5, 3)


def gated(x: Tensor, **how: Any) -> Tensor:
    q, k, v, g, b = pieces(x)
    return chunk_gated_delta_rule(q, F.normalize(k, dim=3), v, -F.softplus(g[..., 0]), b[..., 0].sigmoid(), **how)[0]


def gated_inside(x: Tensor) -> Tensor:
    q, k, v, g, b = pieces(x)
    y, state = chunk_gated_delta_rule(
        q, k, v, g[..., 0], beta=b[..., 0], scale=0.4, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        A_log=torch.tensor([0.1, -0.4]), dt_bias=torch.tensor([0.3, 0.2]), use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True, output_final_state=True,
    )  # fmt: skip
    assert state is not None
    return y


def by_channel(x: Tensor) -> Tensor:
    q, k, v, g, b = pieces(x)
    return chunk_kda(q=q, k=F.normalize(k, dim=3), v=v, g=-F.softplus(g), beta=b[..., 0].sigmoid())[0]


def by_channel_inside(x: Tensor) -> Tensor:
    q, k, v, g, b = pieces(x)
    return chunk_kda(q, k, v, g, b[..., 0].sigmoid(), use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                     A_log=torch.tensor([0.1, -0.4]), dt_bias=torch.linspace(-1, 1, HEADS * SIZE))[0]  # fmt: skip


def plain(x: Tensor) -> Tensor:
    q, k, v, _, b = pieces(x)
    return chunk_delta_rule(q, k, v, b[..., 0].sigmoid(), use_qk_l2norm_in_kernel=True)[0]


def linear_attention(x: Tensor) -> Tensor:
    q, k, v, g, _ = pieces(x)
    return chunk_gla(q, k, v, -F.softplus(g))[0]


def rwkv(x: Tensor) -> Tensor:
    r, k, v, w, a = pieces(x)
    k = F.normalize(k, dim=3)
    return chunk_rwkv7(r, -F.softplus(w), k, v, -k, k * a.sigmoid())[0]


def hgrn(x: Tensor) -> Tensor:
    value, gate, *_ = x.chunk(5, 2)
    return chunk_hgrn(value, F.logsigmoid(gate))[0].unflatten(2, (HEADS, -1))


DELTA = [gated, gated_inside, by_channel, by_channel_inside, plain]
OTHERS = [linear_attention, rwkv, hgrn]


class Block(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix.__name__
        self.norm, self.into = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5 * HEADS * SIZE)
        self.out = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = globals()[self.mix](self.into(self.norm(x)))
        out: Tensor = x + self.out(y.flatten(2))
        return out


def model(mix: Callable[[Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(Block(mix) for _ in range(3))).eval()


@pytest.mark.parametrize("mix", [*DELTA, *OTHERS])
def test_with_everything_kept_it_is_the_dense_model(mix: Callable[[Tensor], Tensor]) -> None:
    module, x = model(mix), torch.randn(2, 17, WIDTH)
    right = module(x)
    for kernels, bits in (("model", True), ("auto", mix in OTHERS)):
        sparse = simba_fx.transform(module, [1, 1, 1], example_inputs=EXAMPLE, kernels=kernels)
        if bits:
            assert torch.equal(sparse(x), right)
        else:
            assert_close("output", sparse(x), right, 1e-5)


@pytest.mark.parametrize("mix", [*DELTA, *OTHERS])
def test_pruned_it_is_its_own_blocks_on_the_tokens_that_add_most(mix: Callable[[Tensor], Tensor]) -> None:
    """What a token adds: the output at the query with its value, and with nothing in its place."""
    module, x = model(mix).double(), torch.randn(1, 30, WIDTH, dtype=torch.float64)
    sparse = simba_fx.transform(module, [1, 0.5, 0.5], example_inputs=(EXAMPLE[0].double(),), criterion="simba-l2")
    with torch.no_grad():
        found, (_, now, _) = sparse(x), simba_fx.kept(sparse)
        projected = module[0].into(module[0].norm(x))
        whole, lost = globals()[mix.__name__](projected)[0, -1], []
        place = {rwkv: 2, hgrn: 0}.get(mix, 2)
        for t in range(29):
            without = projected.clone()
            part = without[:, t] if mix is hgrn else without[:, t].unflatten(1, (HEADS, -1))
            part.chunk(5, -1)[place].zero_()
            lost.append((whole - globals()[mix.__name__](without)[0, -1]).norm())
        best = torch.stack(lost).topk(now.shape[1] - 1).indices
        assert now[0].tolist() == sorted([*best.tolist(), 29])
        right = module[0](x)
        right[:, now[0]] = module[2](module[1](right[:, now[0]]))
    assert_close("output", found, right, 1e-5)


@pytest.mark.parametrize(
    "how", [{"initial_state": torch.zeros(2, HEADS, SIZE, SIZE)}, {"cu_seqlens": torch.tensor([0, 13])},
            {"lower_bound": -5.0}, {"state_v_first": True}], ids=lambda how: next(iter(how)),
)  # fmt: skip
def test_what_no_operator_of_ours_does_is_refused(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = gated
    monkeypatch.setitem(globals(), "gated", lambda x: real(x, **how))
    module = model(real)
    with pytest.raises(CaptureError, match=f"fla's delta rule was called with {next(iter(how))}; only whole sequences"):
        simba_fx.transform(module, "linear", example_inputs=EXAMPLE)
