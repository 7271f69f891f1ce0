"""`mamba_ssm` and `causal_conv1d` on a machine without a GPU, and an eager reference of the method for their models.

Importing this module puts empty modules in the place of the two CUDA extensions, then lets the packages' own reference
functions run wherever a kernel would (read in mamba-ssm 2.3.2.post1 and causal-conv1d 1.7.0). It belongs in a process
of its own: transformers, asked in a process where `mamba_ssm` can be imported, would run its Mamba through it.

The reference runs the package's own blocks one by one, hidden states and residual indexed between them, one row at a
time; the scores are the float64 loops of `reference`. No graph, and nothing of simba_fx.
"""

from __future__ import annotations

import math
import sys
import types
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import reference  # imports transformers' modeling files, which must find no mamba_ssm
import torch
import torch.nn.functional as F
from models import randomise
from torch import Tensor, nn

for _extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
    sys.modules[_extension] = types.ModuleType(_extension)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref
    from mamba_ssm.models import mixer_seq_simple
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel  # noqa: F401  # for the checks
    from mamba_ssm.modules import block, mamba2, mamba3, mamba_simple, mha
    from mamba_ssm.ops import selective_scan_interface as interface
    from mamba_ssm.ops.triton import layer_norm, layernorm_gated, selective_state_update
    from mamba_ssm.utils.generation import InferenceParams

SCANS: list[dict[str, Any]] = []
"""What every scan was given since the list was last cleared, as `reference.operands` wants it."""


# --- the packages' reference functions under the names of their kernels ----------------------------------------------


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any, **kwargs: Any) -> Any:
    names = ("D", "z", "delta_bias", "delta_softplus", "return_last_state")
    given = dict.fromkeys(names) | dict(zip(names, args)) | kwargs
    SCANS.append({"function": "mamba_selective_scan", "hidden_states": u, "dt": delta, "A": A, "B": B, "C": C, **given})
    return interface.selective_scan_ref(u, delta, A, B, C, *args, **kwargs)


def mamba_chunk_scan_combined(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
                              D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
                              seq_idx: None = None, cu_seqlens: None = None, dt_softplus: bool = False,
                              dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False,
                              return_varlen_states: bool = False) -> Any:  # fmt: skip
    """As `ssd_selective_scan` of the package has it: a Mamba-1 scan whose channels share decays, and its last state."""
    SCANS.append({"function": "mamba2_chunk_scan", "hidden_states": x, "dt": dt, "A": A, "B": B, "C": C,
                  "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit})  # fmt: skip
    assert seq_idx is None
    assert cu_seqlens is None
    _, _, heads, width = x.shape
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)

    def channels(per_head: Tensor) -> Tensor:
        return per_head.repeat_interleave(width, -1)

    skip = None if D is None else (D.flatten() if D.dim() == 2 else channels(D)).float()
    y, state = interface.selective_scan_ref(
        x.flatten(2).transpose(1, 2), channels(step).transpose(1, 2),
        channels(A)[:, None].expand(-1, B.shape[3]).float(), B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), skip,
        z=None if z is None else z.flatten(2).transpose(1, 2), return_last_state=True,
    )  # fmt: skip
    y, state = y.transpose(1, 2).unflatten(2, (heads, width)), state.unflatten(1, (heads, width))
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None,
                                     dt_bias: Tensor, A: Tensor, D: Tensor, chunk_size: int, seq_idx: None = None,
                                     dt_limit: tuple[float, float] = (0.0, float("inf")), activation: str = "silu",
                                     rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6,
                                     outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None,
                                     headdim: int | None = None, ngroups: int = 1,
                                     norm_before_gate: bool = True) -> Tensor:  # fmt: skip
    """The steps of MambaSplitConv1dScanCombinedFn.forward, each with the package's reference of its kernel.

    The package's own `mamba_split_conv1d_scan_ref` leaves out the groups of the norm and the gated MLP.
    """
    heads, width = (len(D), headdim) if D.dim() == 1 else D.shape
    dim = heads * width
    states = (len(conv1d_weight) - dim) // ngroups // 2
    beside = (zxbcdt.shape[-1] - 2 * dim - 2 * ngroups * states - heads) // 2
    zx0, z, xbc, dt = torch.split(zxbcdt, [2 * beside, dim, dim + 2 * ngroups * states, heads], -1)
    xbc = causal_conv1d_ref(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation).transpose(1, 2)
    x, B, C = torch.split(xbc, [dim, ngroups * states, ngroups * states], -1)
    gate = z.unflatten(-1, (heads, width)) if rmsnorm_weight is None else None
    B, C = B.unflatten(-1, (ngroups, states)), C.unflatten(-1, (ngroups, states))
    out = mamba_chunk_scan_combined(x.unflatten(-1, (heads, width)), dt, A, B, C, chunk_size, D, gate, dt_bias,
                                    dt_softplus=True, dt_limit=dt_limit).flatten(2)  # fmt: skip
    if rmsnorm_weight is not None:
        out = layernorm_gated.rms_norm_ref(out, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if beside:
        z0, x0 = zx0.chunk(2, -1)
        out = torch.cat([F.silu(z0) * x0, out], -1)
    return out if outproj_weight is None else F.linear(out, outproj_weight, outproj_bias)


def layer_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, eps: float = 1e-6,
                  prenorm: bool = False, residual_in_fp32: bool = False, is_rms_norm: bool = False,
                  dropout_p: float = 0.0) -> Any:  # fmt: skip
    """The package's references upcast and return the sum in float32; the kernel stores it in the residual's dtype."""
    assert dropout_p == 0
    norm = layer_norm.rms_norm_ref if is_rms_norm else layer_norm.layer_norm_ref
    out, total = norm(x, weight, bias, residual=residual, eps=eps, prenorm=True, upcast=True)
    stored = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    return (out, total.to(stored)) if prenorm else out


def rms_norm_fn(*args: Any, **kwargs: Any) -> Any:
    return layer_norm_fn(*args, **kwargs, is_rms_norm=True)


def mamba3_siso_combined(Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor,
                         K_bias: Tensor, Angles: Tensor, D: Tensor | None = None, Z: Tensor | None = None,
                         Input_States: None = None, chunk_size: int = 64, return_final_states: bool = False,
                         cu_seqlens: None = None) -> Tensor:  # fmt: skip
    """The recurrence of Mamba-3's paper, token by token in float64; the kernel needs a GPU and casts to bfloat16.

    Angles add up; keys and queries turn by them, pair by pair; a step writes the token before and its own.
    """
    assert Input_States is None
    assert cu_seqlens is None
    assert not return_final_states
    rows, length, heads, _ = V.shape
    per_head = heads // Q.shape[2]
    q, k = (x.double().repeat_interleave(per_head, 2) + bias.double() for x, bias in ((Q, Q_bias), (K, K_bias)))
    v, adt, dt = V.double(), ADT.double(), DT.double()
    share = torch.sigmoid(Trap.double())
    angle = torch.zeros(rows, heads, Angles.shape[3], dtype=torch.float64)
    state = torch.zeros(rows, heads, V.shape[3], Q.shape[3], dtype=torch.float64)
    key, value, found = torch.zeros_like(state[:, :, 0]), torch.zeros_like(v[:, 0]), []
    for t in range(length):
        angle = angle + math.pi * torch.tanh(Angles[:, t].double()) * dt[:, :, t, None]
        before = torch.einsum("bhp,bhn->bhpn", value, key)
        key, query, value = _turned(k[:, t], angle), _turned(q[:, t], angle), v[:, t]
        decay, step, own = (part[..., None, None] for part in (adt[..., t].exp(), dt[..., t], share[..., t]))
        state = decay * state + decay * (1 - own) * step * before
        state = state + own * step * torch.einsum("bhp,bhn->bhpn", value, key)
        found.append(torch.einsum("bhpn,bhn->bhp", state, query))
    y = torch.stack(found, 1)
    y = y if D is None else y + D.double()[:, None] * v
    return (y if Z is None else y * F.silu(Z.double())).to(V.dtype)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 of `x (B, H, N)` as a complex number, times e^(i angle)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs.clone()
    turned[..., : angle.shape[-1]] *= torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


causal_conv1d_fn = causal_conv1d_ref

_KERNELS: dict[str, Any] = {
    "selective_scan_fn": selective_scan_fn,
    "mamba_inner_fn": interface.mamba_inner_ref,
    "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    "causal_conv1d_fn": causal_conv1d_ref,
    "causal_conv1d_update": causal_conv1d_update_ref,
    "selective_state_update": selective_state_update.selective_state_update_ref,
    "layer_norm_fn": layer_norm_fn,
    "rms_norm_fn": rms_norm_fn,
    "rmsnorm_fn": layernorm_gated.rms_norm_ref,
    "mamba3_siso_combined": mamba3_siso_combined,
}
_CALLERS = (mixer_seq_simple, block, mamba_simple, mamba2, mamba3, mha, interface, layer_norm, layernorm_gated)
REAL = {name: getattr(interface, name) for name in ("selective_scan_fn", "causal_conv1d_fn")}
"""The packages' own functions, which need a GPU."""
PATCHED: dict[tuple[types.ModuleType, str], Any] = {
    (caller, name): kernel for caller in _CALLERS for name, kernel in _KERNELS.items() if hasattr(caller, name)
}
for (_caller, _name), _kernel in PATCHED.items():
    setattr(_caller, _name, _kernel)


class _NoEvent:
    """`decode` makes two CUDA events whether or not it times anything."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...


torch.cuda.Event = _NoEvent  # type: ignore[assignment,misc]


# --- models ----------------------------------------------------------------------------------------------------------


def build(layer: str = "Mamba1", seed: int = 0, dtype: torch.dtype = torch.float32, ssm: Any = None,
          **changes: Any) -> Any:  # fmt: skip
    """A tiny random `MambaLMHeadModel` in eval mode, its weights drawn so that scores and greedy choices are clear."""
    sizes = {"d_state": 4, "dt_rank": 3} if layer == "Mamba1" else {"d_state": 6, "headdim": 8, "chunk_size": 16}
    config = {"d_model": 20, "n_layer": 3, "vocab_size": 56, "tie_embeddings": False, **changes}
    model = MambaLMHeadModel(MambaConfig(**config, ssm_cfg={"layer": layer, **sizes, **(ssm or {})}))
    randomise(model, seed)
    with torch.no_grad():
        model.backbone.embedding.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


# --- the reference ---------------------------------------------------------------------------------------------------


def final_norm(mixer: Any, hidden: Tensor, residual: Tensor) -> Tensor:
    """What MixerModel.forward does behind its last block."""
    if not mixer.fused_add_norm:
        return mixer.norm_f((hidden + residual).to(mixer.norm_f.weight.dtype))
    norm = mixer.norm_f
    return layer_norm_fn(hidden, norm.weight, norm.bias, residual=residual, eps=norm.eps,
                         residual_in_fp32=mixer.residual_in_fp32,
                         is_rms_norm=isinstance(norm, layer_norm.RMSNorm))  # fmt: skip


def run_row(model: Any, ids: Tensor, shares: Sequence[Fraction], *, states: Any = None,
            **options: Any) -> reference.Row:  # fmt: skip
    """The method on one row of ids `(L,)`; `states` (InferenceParams) takes what each block saw.

    `options`: of `reference.Pruning.start`.
    """
    mixer: nn.Module = model.backbone
    layers: Any = mixer.layers
    hidden, residual = mixer.embedding(ids[None]), None  # type: ignore[operator]
    result = reference.Row(logits=hidden, hidden=hidden, kept=[], cache=states, margin=float("inf"))
    row = reference.Pruning.start(SCANS, result, len(ids), shares, **options)
    left: list[Any] = [None, None]  # (1, L, M): the hidden state and the residual that each token last had
    for i, layer in enumerate(layers):
        result.kept.append(list(row.positions))
        SCANS.clear()
        hidden, residual = layer(hidden, residual, inference_params=states)
        for stream, now in enumerate((hidden, residual)):
            old = left[stream]
            left[stream] = now if old is None else old.index_copy(1, torch.tensor(row.positions), now)
        if i + 1 < len(layers):
            stay = row.decide(i)
            hidden, residual = hidden[:, stay], residual[:, stay]
    result.hidden = final_norm(mixer, *left)[0]
    result.logits = model.lm_head(result.hidden)
    return result


def generate(model: Any, ids: Tensor, shares: Sequence[Fraction], new: int, follow: Sequence[int] | None = None,
             **options: Any) -> reference.Row:  # fmt: skip
    """Greedy decoding of one row by the dense model's own steps, from the states of the pruned prompt.

    With `follow` the tokens are given. `options`: of `run_row`.
    """
    states = InferenceParams(max_seqlen=len(ids) + new, max_batch_size=1)
    row = run_row(model, ids, shares, states=states, **options)
    logits = row.logits[-1]
    states.seqlen_offset = len(ids)
    while True:
        row.steps.append(logits)
        if follow is None:
            first, second = torch.topk(logits.float(), 2).values.tolist()
            row.margin = min(row.margin, (first - second) / max(abs(first), abs(second), 1e-30))
        row.tokens.append(int(logits.argmax()) if follow is None else follow[len(row.tokens)])
        if len(row.tokens) == new:
            return row
        logits = model(torch.tensor([row.tokens[-1:]]), inference_params=states).logits[0, -1]
        states.seqlen_offset += 1
