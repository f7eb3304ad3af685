"""Shared fixtures: fixed seeds, one Hypothesis profile."""

import os

import hypothesis
import pytest
import torch
from paths import fusing

# What runs on any device; the rest is not collected there.
SUITES = (
    "test_adaptive", "test_draws", "test_dropin", "test_fixed", "test_functional", "test_histogram",
    "test_isotonic", "test_mistakes", "test_rules", "test_scores", "test_table", "test_temperature",
)  # fmt: skip

# Not timed: a test must not fail because the machine is busy. Derandomised: nor by luck.
hypothesis.settings.register_profile(
    "fixed",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "few", hypothesis.settings.get_profile("fixed"), max_examples=3
)
hypothesis.settings.load_profile("fixed")


collect_ignore = ["typing"]  # is read by a type checker and not run

# Inductor compiles in this process: its pool of workers costs more than our graphs, and torch 2.4
# can deadlock in it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Small tensors: a second thread only waits, for milliseconds where other tests run beside.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", metavar="NAME", help="run the suites of devices on this one"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_only(reason): is about the CPU alone")
    config.addinivalue_line("markers", "not_on(device, reason): what this device cannot do")
    name = config.getoption("--device")
    if name != "cpu":
        # Before anything is imported: tables of many tests are made of tensors.
        torch.set_default_device(_device(name))
        if name == "xla":  # it compiles anew for each size
            hypothesis.settings.load_profile("few")


def _device(name):
    """The device of this name, asked whether it is there."""
    try:
        if name == "xla":
            import torch_xla

            # Each call at once: a third of the time, and errors where they arise. What XLA makes of
            # whole steps is looked at in test_devices. Nor is it among those that torch seeds.
            torch_xla.experimental.eager_mode(True)
            seed = torch.manual_seed
            torch.manual_seed = lambda value: torch_xla.manual_seed(value) or seed(value)
            return torch_xla.device()
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:
        raise pytest.UsageError(f"--device {name}: {error}") from error
    return device


def pytest_ignore_collect(collection_path, config):
    elsewhere = config.getoption("--device") != "cpu"
    if elsewhere and collection_path.name.startswith("test_"):
        return collection_path.stem not in SUITES or None
    return None


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device").split(":")[0]
    if device != "cpu":  # nor the examples of src: they show what a CPU prints
        config.hook.pytest_deselected(items=[one for one in items if one.path.stem not in SUITES])
        items[:] = [one for one in items if one.path.stem in SUITES]
    for item in items:
        for mark in item.iter_markers("cpu_only"):
            (reason,) = mark.args
            if device != "cpu":
                item.add_marker(pytest.mark.skip(reason=f"CPU only: {reason}"))
        for mark in item.iter_markers("not_on"):
            name, reason = mark.args
            if device == name:
                item.add_marker(pytest.mark.skip(reason=f"not on {name}: {reason}"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["plain", "fused"])
def path(request):
    """Small tensors take torch's calls, or the fused sums in blocks of a few elements."""
    if request.param == "plain":
        yield
        return
    if torch.get_default_device().type != "cpu":
        pytest.skip("CPU only: the fused sweep is for CPUs")
    with fusing(5):
        yield


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    """Compiled code of one test must not count as a recompilation of the next."""
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()
