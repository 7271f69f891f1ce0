"""DDP and FSDP2: the checks of distributed_checks.py under torchrun, two processes on CPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from subprocesses import environment

NAMES = ("mamba", "mamba2-two-groups", "bamba", "plain")


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """One launch for all of them: to start two processes takes longer than most checks."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(Path(__file__).with_name("distributed_checks.py")), *NAMES]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name: str, done: subprocess.CompletedProcess[str]) -> None:
    """Checks that do not pass end the launch, so that those of later names do not pass either."""
    assert done.stdout.count(f"checks of {name} passed") == 2, f"{done.stdout[-4_000:]}\n{done.stderr[-12_000:]}"


def test_both_processes_end_well(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout[-4_000:]}\n{done.stderr[-12_000:]}"
