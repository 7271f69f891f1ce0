"""Triton kernels compiled for a GPU that is not there: what the compiler says that they use.

Registers that do not suffice spill into local memory, which the assembler reports as a stack frame (`STACK`), for each
kernel in its own words (`cuobjdump -res-usage`).
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    """Bytes of a thread's stack frame: spilled registers."""
    local: int
    shared: int
    """Bytes of shared memory of a block."""


def usage(kernel: Any, config: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> Usage:
    """Compile one configuration of a kernel for `sm_<capability>`.

    Args:
        types: by argument; one that is not named is an `i32`.
        constants: arguments known to the compiler: block sizes, switches, strides of 1.
    """
    function = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    constants = {**constants, **config.kwargs}
    names = list(inspect.signature(function.fn).parameters)
    unknown = (types.keys() | constants.keys()) - set(names)
    assert not unknown, f"{function.__name__} has no arguments {unknown}"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(function, signature, constants, aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 announces another default of 3.10
        built = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": config.num_warps}
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr)}
    return Usage(words["REG"], words["STACK"], words["LOCAL"], built.metadata.shared)
