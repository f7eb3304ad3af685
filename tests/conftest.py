"""Shared fixtures: fixed seeds, one Hypothesis profile."""

import os
from unittest import mock

import hypothesis
import pytest
import torch

from sc_bce import _fused

# Not timed: a test must not fail because the machine is busy. Derandomised: nor by luck.
hypothesis.settings.register_profile(
    "fixed",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


# Inductor compiles in this process: its pool of workers costs more than our graphs, and torch 2.4
# can deadlock in it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Small tensors: a second thread only waits, for milliseconds where other tests run beside.
torch.set_num_threads(1)


def pytest_configure(config):
    # Tables of many tests have one and are stepped with numbers; pytest.warns sees it all the same.
    config.addinivalue_line("filterwarnings", "ignore:pos_weight shifts every probability")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["plain", "fused"])
def path(request):
    """Small tensors take torch's calls, or the fused sums in blocks of a few elements."""
    if request.param == "plain":
        yield
        return
    with mock.patch.multiple(_fused, _MIN_ELEMENTS=1, _MIN_PER_ROW=1, _BLOCK=5):
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    """Compiled code of one test must not count as a recompilation of the next."""
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()
