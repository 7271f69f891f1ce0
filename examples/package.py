"""A sparse model as one file that runs without its Python: `python examples/package.py`.

The 3M-parameter checkpoint in examples/mamba-py-3m is made sparse, exported with any batch and length, and compiled by
AOTInductor into a package. A fresh process, which imports torch and the operators alone, loads the package and the
exported program and runs both on other sizes; here the results are compared with the sparse model's own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import MambaForCausalLM, logging

import simba_fx

HERE = Path(__file__).resolve().parent
SIZES = ((1, 700), (4, 150), (3, 64))  # rows and bytes, none of them the example's
TEXT = (HERE / "own_model.py").read_bytes()

RELOAD = """
import sys
import torch
import simba_fx.ops  # the operators; nothing of what made the model sparse

folder = sys.argv[1]
compiled = torch._inductor.aoti_load_package(folder + "/sparse.pt2")
exported = torch.export.load(folder + "/exported.pt2").module()
with torch.no_grad():
    found = [(exported(ids), compiled(ids)) for ids in torch.load(folder + "/ids.pt")]
torch.save(found, folder + "/found.pt")
print(*(name for name in ("simba_fx.passes", "transformers") if name in sys.modules))
"""


class Logits(nn.Module):
    """What is exported: a function of tensors that returns a tensor, without a cache."""

    def __init__(self, sparse: nn.Module) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.sparse(input_ids, use_cache=False).logits
        return logits


def rows_of_text(rows: int, length: int) -> Tensor:
    return torch.tensor([list(TEXT[200 * row : 200 * row + length]) for row in range(rows)])


def timed(what: str, step: Callable[[], Any]) -> Any:
    begin = time.perf_counter()
    result = step()
    print(f"{what:34}{time.perf_counter() - begin:7.1f} s", flush=True)
    return result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--final", type=float, default=0.1, help="share of the tokens that enters the last block")
    parser.add_argument("--every", type=int, default=6, help="blocks between two cuts: each takes its time to compile")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    model = MambaForCausalLM.from_pretrained(HERE / "mamba-py-3m").eval()
    sparse = timed("transformed", lambda: simba_fx.transform(model, simba_fx.Linear(options.final, options.every)))
    logits = Logits(sparse)
    example = rows_of_text(2, 100)
    logits(example)  # once eagerly: calls of this kind, without mask and cache, are captured
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    program = timed("exported", lambda: torch.export.export(logits, (example,), dynamic_shapes=shapes))

    with tempfile.TemporaryDirectory() as folder:
        package, saved = Path(folder) / "sparse.pt2", Path(folder) / "exported.pt2"
        torch.export.save(program, saved)
        compile_package = torch._inductor.aoti_compile_and_package
        timed("compiled by AOTInductor", lambda: compile_package(program, package_path=str(package)))
        print(f"exported.pt2: {saved.stat().st_size / 1e6:.1f} MB, sparse.pt2: {package.stat().st_size / 1e6:.1f} MB")

        inputs = [rows_of_text(rows, length) for rows, length in SIZES]
        torch.save(inputs, Path(folder) / "ids.pt")
        command = [sys.executable, "-W", "ignore", "-c", RELOAD, folder]
        done = timed(
            "loaded and run in a fresh process",
            lambda: subprocess.run(command, capture_output=True, text=True, check=True),
        )
        print(f"imported there besides torch and the operators: {done.stdout.strip() or 'nothing'}")
        for ids, (exported, compiled) in zip(inputs, torch.load(Path(folder) / "found.pt")):
            expected = logits(ids)
            rows, length = ids.shape
            print(
                f"{rows} x {length} bytes, {simba_fx.kept(sparse)[-1].shape[1]} in the last block: largest difference "
                f"exported {(exported - expected).abs().max():.1e}, compiled {(compiled - expected).abs().max():.1e}"
            )


if __name__ == "__main__":
    main()
