"""DDP and FSDP2: the checks of distributed_checks.py under torchrun, two processes on CPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from subprocesses import environment


@pytest.mark.parametrize("name", ["mamba", "mamba2-two-groups", "bamba", "plain"])
def test_two_processes_equal_one(name: str) -> None:
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(Path(__file__).with_name("distributed_checks.py")), name]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4_000:]}\n{done.stderr[-12_000:]}"
    assert done.stdout.count(f"checks of {name} passed") == 2
