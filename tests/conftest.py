"""Settings of the whole suite."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    deadline=None,  # a compilation takes as long as it takes
    derandomize=True,  # the same examples on every machine; long random runs are commands in tests/benchmarks
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
torch.set_num_threads(1)  # the networks are small: threads cost more than they bring


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
