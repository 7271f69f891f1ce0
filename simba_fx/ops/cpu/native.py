"""Builds `kernels.cpp` on first use with the machine's C++ compiler and calls it through ctypes.

The library is kept in a folder of the user's own (`cache.py`) under a name that hashes everything it depends on
(source, flags, processor, torch; compiler), so a stale one is never loaded. Where there is no compiler, or it fails,
one that another compiler built serves as well. Where that folder cannot be used, the library is built in a temporary
one, each process for itself. Where nothing can be built, `load` says why and callers take the PyTorch path.

Environment: `SIMBA_FX_NATIVE=0` switches it off; `SIMBA_FX_CACHE` is the cache's folder (default: `simba_fx` under
`XDG_CACHE_HOME`, else under `~/.cache`); `CXX` names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simba_fx.ops.cpu import cache
from simba_fx.ops.operands import CausalConv, SelectiveScan, SSDScan

_SOURCE = Path(__file__).with_name("kernels.cpp")
_BASE_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC")
_FLAG_SETS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
"""Tried in this order: the first that compiles is used."""

_FUNCTIONS = ("simba_max_states", "simba_max_taps", "simba_selective_scan", "simba_selective_scan_backward",
              "simba_selective_score", "simba_ssd_scan", "simba_causal_conv1d")  # fmt: skip

_BLOCKS = 8
"""Parts that the channels of a (row, group) are shared out over. Fixed, so that sums do not depend on the threads."""
_FLOAT: Any = {"dtype": torch.float32, "device": "cpu"}
"""What the kernels write, whatever torch's defaults are."""


@dataclass(frozen=True)
class Kernels:
    """The loaded library and the words for it."""

    library: ctypes.CDLL
    description: str


class Unavailable(Exception):
    """There are no native kernels here; the message is the reason."""


@functools.cache
def load() -> Kernels | str:
    """The kernels, built if need be, or the reason why there are none. Decided once per process."""
    try:
        return _build()
    except Unavailable as reason:
        return str(reason)


def kernels() -> Kernels | None:
    """The kernels if there are any; `load` knows the reason if not."""
    found = load()
    return found if isinstance(found, Kernels) else None


def _build() -> Kernels:
    if os.environ.get("SIMBA_FX_NATIVE", "1") == "0":
        raise Unavailable("SIMBA_FX_NATIVE=0")
    place: Path | None = None
    reasons: list[str] = []
    try:
        place = cache.folder()
    except cache.Refused as refused:
        reasons.append(str(refused))
    try:
        return _by_compiler(_compiler(), place, reasons)
    except Unavailable as failure:
        found = None if place is None else _by_another_compiler(place, reasons)
        if found is None:
            raise Unavailable("; ".join((str(failure), *reasons[:1]))) from None
        return found


def _by_another_compiler(place: Path, reasons: list[str]) -> Kernels | None:
    """Kernels that are cached, whatever built them; why others are not used goes to `reasons`."""
    for extra in _FLAG_SETS:
        entries, refused = cache.entries(place, _key(extra))
        reasons += refused
        for entry in entries:
            try:
                return _opened(entry, extra)
            except OSError as error:
                reasons.append(str(error))
    return None


def _by_compiler(compiler: str, place: Path | None, reasons: list[str]) -> Kernels:
    """The cached kernels of this compiler, else new ones."""
    version = _run([compiler, "-dumpfullversion", "-dumpversion"]).strip()
    words = f"{Path(compiler).name} {'.'.join(version.split('.')[:2])}"
    identity = hashlib.sha256(f"{os.path.realpath(compiler)}\0{version}".encode()).hexdigest()[:12]
    failure = ""
    for extra in _FLAG_SETS:
        for entry in cache.entries(place, _key(extra), identity)[0] if place is not None else ():
            try:
                return _opened(entry, extra)
            except OSError:  # built anew
                pass
        try:
            if place is not None:
                try:
                    return _compiled(compiler, extra, place, identity, words)
                except OSError as error:  # a full disk, a folder that is read only or whose files may not run
                    reasons.append(f"not cached: {error}")
            with tempfile.TemporaryDirectory(prefix="simba_fx-") as own:  # code that is loaded outlives its file
                found = _compiled(compiler, extra, Path(own), identity, words)
        except (OSError, Unavailable) as error:
            failure = failure or str(error)
            continue
        return replace(found, description=f"{found.description[:-1]}; {reasons[-1]})")
    raise Unavailable(f"{compiler} failed: {failure}")


def _key(extra: tuple[str, ...]) -> str:
    """Of all that a library depends on but its compiler, which may be gone."""
    parts = (*_BASE_FLAGS, *extra, torch.__version__, _processor())
    return hashlib.sha256(_SOURCE.read_bytes() + "\0".join(parts).encode()).hexdigest()[:24]


def _compiled(compiler: str, extra: tuple[str, ...], place: Path, identity: str, words: str) -> Kernels:
    with tempfile.TemporaryDirectory(dir=place, prefix=".simba_fx-") as beside:
        built = Path(beside) / "built.so"
        _run([compiler, *_BASE_FLAGS, *extra, str(_SOURCE), "-o", str(built)])
        return _opened(cache.keep(place, _key(extra), identity, words, built), extra)


def _opened(entry: cache.Entry, extra: tuple[str, ...]) -> Kernels:
    """Raises: OSError: it cannot be loaded, or is another library."""
    library = ctypes.CDLL(str(entry.library))
    missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise OSError(f"{entry.library} has no {missing[0]}")
    words = [entry.compiler]
    words += ["OpenMP"] if "-fopenmp" in extra else []
    words += [torch.backends.cpu.get_cpu_capability()] if "-march=native" in extra else []
    return Kernels(library, f"C++ ({', '.join(words)})")


def _compiler() -> str:
    """On the path. Inductor is not asked: its answer sets variables and makes folders."""
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, (named,) if named else ("g++", "clang++", "c++"))), None)
    if found is None:
        raise Unavailable("no C++ compiler found" + (f": CXX={named} is not on the path" if named else ""))
    return found


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    except subprocess.CalledProcessError as error:
        raise Unavailable(str(error.stderr).strip()[-500:]) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from None


def _processor() -> str:
    """Words that change when `-march=native` would mean other instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    wanted = ("model name", "flags", "Features")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


# --- Operands --------------------------------------------------------------------------------------------------------


class _Tokens(ctypes.Structure):
    """`Tokens` of kernels.cpp: a float32 operand over (row, channel, token), any strides."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


class _Selective(ctypes.Structure):
    """`Selective` of kernels.cpp."""

    _fields_ = (
        *((name, _Tokens) for name in ("u", "delta", "z")),
        *((name, ctypes.c_void_p) for name in ("A", "B", "C", "D", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "channels", "length", "states", "groups", "softplus")),
    )


class _Ssd(ctypes.Structure):
    """`Ssd` of kernels.cpp."""

    _fields_ = (
        *((name, _Tokens) for name in ("x", "z")),
        *((name, ctypes.c_void_p) for name in ("dt", "decay", "B", "C", "D")),
        *((name, ctypes.c_int64) for name in ("rows", "length", "heads", "width", "states", "groups")),
    )


class _Call:
    """Keeps the float32 copies that pointers refer to alive until the call is over."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []

    def tokens(self, operand: Tensor | None, channel: int = 1, token: int = 2) -> _Tokens:
        """An operand in any dtype and strides, as float32; `channel` and `token` name those dims."""
        if operand is None:
            return _Tokens(None, 0, 0, 0)
        operand = operand.float()
        self._alive.append(operand)
        return _Tokens(operand.data_ptr(), operand.stride(0), operand.stride(channel), operand.stride(token))

    def dense(self, operand: Tensor | None) -> int | None:
        """The address of an operand as contiguous float32."""
        if operand is None:
            return None
        operand = operand.float().contiguous()
        self._alive.append(operand)
        return operand.data_ptr()


def _selective(call: _Call, scan: SelectiveScan, reads: bool = True) -> _Selective:
    """`reads`: whether C, skip and gate are read; a score does not."""
    rows, channels, length, groups, states = scan.sizes
    return _Selective(
        call.tokens(scan.u),
        call.tokens(scan.delta),
        call.tokens(scan.z if reads else None),
        call.dense(scan.A),
        call.dense(scan.B.transpose(2, 3)),
        call.dense(scan.C.transpose(2, 3) if reads else None),
        call.dense(scan.D if reads else None),
        call.dense(scan.delta_bias),
        rows,
        channels,
        length,
        states,
        groups,
        int(scan.delta_softplus),
    )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _blocks(channels: int, groups: int) -> int:
    return max(1, min(_BLOCKS, -(-channels // groups // 16)))


# --- Kernels ---------------------------------------------------------------------------------------------------------


def supports(states: int) -> bool:
    """Whether the kernels exist here and take that many states."""
    found = kernels()
    return found is not None and states <= int(found.library.simba_max_states())


def _library() -> ctypes.CDLL:
    found = load()
    if isinstance(found, str):
        raise Unavailable(found)
    return found.library


def selective_scan(scan: SelectiveScan) -> tuple[Tensor, Tensor]:
    """As `chunked.selective_scan`."""
    rows, channels, length, groups, states = scan.sizes
    call = _Call()
    operands = _selective(call, scan)
    y = torch.empty(rows, length, channels, **_FLOAT)
    last = torch.empty(rows, channels, states, **_FLOAT)
    _library().simba_selective_scan(
        ctypes.byref(operands),
        _pointer(y),
        _pointer(last),
        ctypes.c_int64(-(-channels // groups // 16)),
        torch.get_num_threads(),
    )
    return y.to(scan.u.dtype), last


def selective_scan_backward(
    dy: Tensor, dlast: Tensor, scan: SelectiveScan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `chunked.selective_scan_backward`."""
    z = scan.z
    rows, channels, length, groups, states = scan.sizes
    blocks = _blocks(channels, groups)
    call = _Call()
    operands = _selective(call, scan)
    du, ddelta = torch.empty(rows, length, channels, **_FLOAT), torch.empty(rows, length, channels, **_FLOAT)
    dz = torch.empty(0, **_FLOAT) if z is None else torch.empty(rows, length, channels, **_FLOAT)
    dA, dD = torch.empty(rows, channels, states, **_FLOAT), torch.empty(rows, channels, **_FLOAT)
    dB, dC = (torch.zeros(rows, groups, blocks, length, states, **_FLOAT) for _ in range(2))
    out = (ctypes.c_void_p * 7)(*(t.data_ptr() for t in (du, ddelta, dz, dA, dD, dB, dC)))
    _library().simba_selective_scan_backward(
        ctypes.byref(operands),
        ctypes.byref(call.tokens(dy)),
        ctypes.c_void_p(call.dense(dlast)),
        out,
        ctypes.c_int64(blocks),
        torch.get_num_threads(),
    )
    return (
        du.transpose(1, 2),
        ddelta.transpose(1, 2),
        dA.sum(0),
        dB.sum(2).transpose(2, 3),
        dC.sum(2).transpose(2, 3),
        dD.sum(0),
        dz if z is None else dz.transpose(1, 2),
        ddelta.sum((0, 1)),
    )


def selective_score(scan: SelectiveScan, C_query: Tensor, query: Tensor, criterion: str) -> Tensor:
    """As `chunked.selective_score`."""
    rows, channels, length, groups, _ = scan.sizes
    blocks = _blocks(channels, groups)
    call = _Call()
    operands = _selective(call, scan, reads=False)
    squares = criterion == "simba-l2"
    score = torch.full((rows, groups * blocks, length), 0.0 if squares else -torch.inf, **_FLOAT)
    query = query.clamp(max=length - 1).contiguous()
    _library().simba_selective_score(
        ctypes.byref(operands),
        ctypes.c_void_p(call.dense(C_query)),
        _pointer(query),
        ctypes.c_int64(("simba", "simba-abs", "simba-l2").index(criterion)),
        _pointer(score),
        ctypes.c_int64(blocks),
        torch.get_num_threads(),
    )
    return score.sum(1).sqrt() if squares else score.amax(1)


def ssd_scan(scan: SSDScan) -> tuple[Tensor, Tensor]:
    """As `chunked_ssd.ssd_scan`, token by token: no chunks."""
    rows, length, heads, width, groups, states = scan.sizes
    call, D, dt = _Call(), scan.D, scan.steps()
    x, z = (t if t is None or t.float().stride(3) == 1 else t.contiguous() for t in (scan.x, scan.z))
    skip = D if D is None or D.dim() == 2 else D.unsqueeze(1).expand(heads, width)
    operands = _Ssd(
        call.tokens(x, 2, 1),
        call.tokens(z, 2, 1),
        call.dense(dt),
        call.dense(torch.exp(dt * scan.A.float())),
        call.dense(scan.B.transpose(1, 2)),
        call.dense(scan.C.transpose(1, 2)),
        call.dense(skip),
        rows,
        length,
        heads,
        width,
        states,
        groups,
    )
    y, last = torch.empty(rows, length, heads, width, **_FLOAT), torch.empty(rows, heads, width, states, **_FLOAT)
    _library().simba_ssd_scan(ctypes.byref(operands), _pointer(y), _pointer(last), torch.get_num_threads())
    return y.to(scan.x.dtype), last


def supports_taps(taps: int) -> bool:
    """Whether the kernels exist here and take a convolution that wide."""
    found = kernels()
    return found is not None and taps <= int(found.library.simba_max_taps())


def causal_conv1d(conv: CausalConv) -> Tensor:
    """Convolution and activation, `(B, L, D)` in x's dtype."""
    rows, channels, length = conv.x.shape
    call, silu = _Call(), conv.activation == "silu"
    y = torch.empty(rows, length, channels, **_FLOAT)
    _library().simba_causal_conv1d(
        ctypes.byref(call.tokens(conv.x)),
        ctypes.c_void_p(call.dense(conv.weight.t())),
        ctypes.c_void_p(call.dense(conv.bias)),
        *(ctypes.c_int64(size) for size in (rows, channels, length, conv.weight.shape[1], int(silu))),
        _pointer(y),
        torch.get_num_threads(),
    )
    return y.to(conv.x.dtype)
