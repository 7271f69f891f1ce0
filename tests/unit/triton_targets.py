"""Triton kernels compiled for a GPU that is not there: what the compiler says that they use.

Registers that do not suffice spill into local memory, which the assembler reports as a stack frame (`STACK`), for each
kernel in its own words (`cuobjdump -res-usage`); `cuobjdump -sass` writes the instructions down.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simba_fx.ops.cuda.triton import conv, delta, scan, score, select

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = dict.fromkeys(("A", "bias", "D", "score", "last", "boundaries", "steps", "sums", "behind", "weights",
                          "starts", "dlast", "du", "ddelta", "dz", "dA", "dB", "dC", "dD"), "*fp32")  # fmt: skip
OPERANDS = dict.fromkeys(("u", "delta", "z", "B", "C", "x", "dt", "y", "dy", "weight"), "*bf16")
LIMITS = {"dt_min": "fp64", "dt_max": "fp64"}
"""What a graph that Inductor compiled hands over for a Python number."""
TIME = ("u_token", "delta_token", "z_token", "dy_token", "B_token", "C_token")
CHANNELS = ("u_channel", "delta_channel", "z_channel", "dy_channel", "B_state", "C_state")
LAYOUTS = {"time contiguous": TIME, "channels contiguous": CHANNELS}
"""By name: the strides that are 1."""


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    """Bytes of a thread's stack frame: spilled registers."""
    local: int
    shared: int
    """Bytes of shared memory of a block."""
    sass: str = field(repr=False)
    """The instructions as `cuobjdump` prints them."""


@dataclass(frozen=True)
class Launch:
    """A kernel and what the compiler knows of its arguments.

    Args:
        types: by argument; one that is not named is an `i32`.
        constants: block sizes, switches, strides of 1.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4


def _launch(kernel: Any, constants: dict[str, Any], unit: tuple[str, ...] = (), warps: int = 4, **more: str) -> Launch:
    """bf16 operands; `unit` strides are 1, `more` are types."""
    names = set(kernel.arg_names)
    types = {name: kind for name, kind in {**POINTERS, **OPERANDS, **LIMITS, **more}.items() if name in names}
    return Launch(kernel, types, constants | {name: 1 for name in unit if name in names}, warps)


def selective_score(layout: tuple[str, ...], real: bool = True, squares: bool = False) -> Launch:
    """mamba-130m … 2.8b: N = 16."""
    switches = {"states": 16, "SOFTPLUS": True, "BIAS": True, "REAL": real, "ABSOLUTE": False, "groups": 1,
                "SQUARES": squares, "FEW": score.FEW, "BLOCK_D": scan.TILE}  # fmt: skip
    return _launch(score.selective_score_kernel, switches, (*layout, "A_state"), 1, real="*i1")


def step_sums(chunk: int, clamp: bool, real: bool = True) -> Launch:
    """With `clamp` as the score of Mamba-2 launches it."""
    switches = {"SOFTPLUS": True, "BIAS": True, "CLAMP": clamp, "REAL": real, "CHUNK": chunk, "BLOCK_D": 64}
    return _launch(score.step_sums_kernel, switches, ("dt_channel",), real="*i1")


def suffix() -> Launch:
    return _launch(score.suffix_kernel, {"AHEAD": 16, "BLOCK_D": 32}, warps=1)


def ssd_score(real: bool = True, squares: bool = False) -> Launch:
    """mamba2-130m … 2.7b: P = 64."""
    switches = {"BLOCK_T": score.SSD_CHUNK, "BLOCK_P": 64, "SOFTPLUS": True, "BIAS": True, "REAL": real,
                "ABSOLUTE": False, "SQUARES": squares, "DECAY": True, "BLOCK_H": score.SSD_HEADS}  # fmt: skip
    return _launch(score.ssd_score_kernel, switches, ("groups", "x_channel", "dt_head", "A_head"), real="*i1")


def delta_reads(by_channel: bool) -> Launch:
    """Qwen3-Next, Kimi Linear: K = 128."""
    switches = {"DECAY": True, "BY_CHANNEL": by_channel, "AHEAD": delta.AHEAD, "BLOCK_K": 128}
    unit = ("k_channel", "q_channel", "beta_head", "g_channel" if by_channel else "g_head")
    pointers = dict.fromkeys(("q_query", "k", "g", "beta", "reads"), "*fp32")
    return _launch(delta.delta_reads_kernel, switches, unit, 1, query="*i64", **pointers)


def convolution() -> Launch:
    switches = {"TAPS": 4, "BIAS": True, "SILU": True, "BLOCK_T": 32, "BLOCK_D": 128}
    return _launch(conv.causal_conv1d_kernel, switches, ("x_channel", "weight_tap"))


def selection(padded: bool) -> Launch:
    kinds = dict.fromkeys(("positions", "lengths", "kept", "dropped", "kept_positions", "dropped_positions"), "*i64")
    kinds |= {"real": "*i1", "kept_real": "*i1"}
    if not padded:
        kinds |= dict.fromkeys(("real", "lengths", "kept_real"), "*fp32")
    return _launch(select.select_kernel, {"REAL": padded, "BLOCK": 2048}, ("position_slot",), 8, **kinds)


def selective_scan(layout: tuple[str, ...], output: bool) -> Launch:
    switches = {"states": 16, "SOFTPLUS": True, "BIAS": True, "SKIP": True, "GATE": True, "OUTPUT": output,
                "groups": 1, "BLOCK_D": scan.TILE}  # fmt: skip
    return _launch(scan.selective_scan_kernel, switches, (*layout, "A_state"), 1)


def chain() -> Launch:
    return _launch(scan.chain_kernel, {"states": 16, "AHEAD": 8, "BLOCK_D": 128}, ("A_state",))


def selective_scan_backward(layout: tuple[str, ...]) -> Launch:
    switches = {"BLOCK_N": 16, "BLOCK_T": scan.BLOCK_T, "BLOCK_D": scan.BLOCK_D, "SOFTPLUS": True, "BIAS": True,
                "SKIP": True, "GATE": True, "groups": 1}  # fmt: skip
    return _launch(scan.selective_scan_backward_kernel, switches, layout)


def usage(launch: Launch, capability: int, multiples: bool = False) -> Usage:
    """Compile a kernel for `sm_<capability>`.

    Args:
        multiples: sizes and strides are multiples of 16, so that loads are vectors (what is `do_not_specialize` stays
            unknown).
    """
    function, constants = launch.kernel, launch.constants
    unknown = (launch.types.keys() | constants.keys()) - set(function.arg_names)
    assert not unknown, f"{function.__name__} has no arguments {unknown}"
    signature = {
        name: "constexpr" if name in constants else launch.types.get(name, "i32") for name in function.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (parameter, kind) in enumerate(zip(function.params, signature.values()))
        if kind.startswith("*") or (multiples and kind == "i32" and not parameter.do_not_specialize)
    }
    source = ASTSource(function, signature, constants, aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces another default of 3.10
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
    resources, sass = (_dump(built.asm["cubin"], option) for option in ("-res-usage", "-sass"))
    words = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    return Usage(words["REG"], words["STACK"], words["LOCAL"], built.metadata.shared, sass)


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def hottest_loop(sass: str) -> list[str]:
    """The instructions of the loop that computes most: of the innermost ones, that with the most MUFU (exponentials,
    reciprocals). The whole kernel if no loop holds any. Branches inside of it count in full, taken or not."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.MULTILINE)
    end = max(i for i, (_, text) in enumerate(found) if "EXIT" in text)  # behind it: padding, detours of split warps
    instructions = [(int(address, 16), text) for address, text in found[: end + 1]]
    jumps = [(at, re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)) for at, text in instructions]
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= start and stop <= last and (start, stop) != (first, last) for start, stop in loops)
    ]
    bodies = [[text for at, text in instructions if first <= at <= last] for first, last in inner]
    hottest = max(bodies, key=mufu, default=[])
    return hottest if mufu(hottest) else [text for _, text in instructions]


def mufu(instructions: list[str]) -> int:
    return sum("MUFU" in text for text in instructions)
