"""Settings every test shares. Warnings are errors: the policy and its exceptions stand in pyproject.toml."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# Two pytest-xdist workers with a thread pool each, on two cores, spend their time waiting for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# No deadline: an example that compiles, or the first that builds an operator, takes seconds. In CI the examples are the
# same every time, so a failure there is a failure of the change under test.
settings.register_profile("simba_fx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("simba_fx-ci", settings.get_profile("simba_fx"), derandomize=True, print_blob=True)
settings.load_profile("simba_fx-ci" if os.environ.get("CI") else "simba_fx")
