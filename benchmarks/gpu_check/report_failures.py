"""A pytest plugin: failures are printed as they happen. A run that is cut short never reaches pytest's own report."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n---- {report.nodeid} failed in {report.when}\n{report.longreprtext[-4000:]}", flush=True)
