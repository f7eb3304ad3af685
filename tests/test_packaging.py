"""What is written in more than one file is the same in each."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sc_bce

ROOT = Path(__file__).parents[1]


def found(pattern, file):
    """The groups of every match; a pattern that has gone blind is a failure."""
    matches = re.findall(pattern, (ROOT / file).read_text("utf-8"), re.M)
    assert matches, (pattern, file)
    return matches


def test_one_version_and_one_date():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sc_bce.__version__)
    cited = found(r"^version: (.+)\ndate-released: (.+)$", "CITATION.cff")
    head, *releases = found(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", "CHANGELOG.md")
    assert head == ("Unreleased", "")
    assert releases[0] == cited[0]
    assert releases[0][0] == sc_bce.__version__


def test_one_ruff():
    pinned = found(r"^ruff==([\d.]+);", "constraints.txt")
    assert set(found(r"ruff==([\d.]+)", ".pre-commit-config.yaml")) == set(pinned)


def test_the_workflow_tests_what_the_package_supports():
    torches = (
        found(r"^ +torch: \[(.+)\]$", ".github/workflows/ci.yml")[0].replace('"', "").split(", ")
    )
    assert found(r'^dependencies = \["torch>=([\d.]+)"\]$', "pyproject.toml") == torches[:1]
    assert found(r"^torch==(\d+\.\d+)\.\d+$", "constraints.txt")[0] in torches
    assert found(r"set -- (.+) newest$", ".ci/torches")[0].split() == torches[:3]
    pythons = found(r'^ +python: \["([\d.]+)", "([\d.]+)"\]$', ".github/workflows/ci.yml")[0]
    assert found(r'^requires-python = ">=([\d.]+)"$', "pyproject.toml") == [pythons[0]]
    assert tuple(found(r"Programming Language :: Python :: (3\.\d+)", "pyproject.toml")) == pythons


def test_plot_and_integrations_are_reached_from_the_package():
    assert callable(sc_bce.plot.reliability_diagram)
    assert sc_bce.integrations.__name__ == "sc_bce.integrations"
    with pytest.raises(AttributeError, match="module 'sc_bce' has no attribute 'plots'"):
        sc_bce.plots  # noqa: B018


WITHOUT_NUMPY = """
import sys, warnings
sys.modules["numpy"] = None  # as if it were not installed
import torch  # which says so once
warnings.simplefilter("error")
from sc_bce import *

x, index = torch.randn(4, 3, requires_grad=True), torch.arange(4)
adaptive, histogram = AdaptivePerturbation(4), CalibrationHistogram()
for _ in range(2):
    adaptive(x, x > 0, index).backward()
    histogram.update(4 * torch.linspace(-1, 1, 60), torch.linspace(-1, 1, 60).roll(5) > 0)
    adaptive.step(histogram)
SCBCEWithLogitsLoss(alpha=0.1, sampling="sample")(x, (x > 0).float()).backward()
for repair in (TemperatureScaling(bias=True), IsotonicCalibration()):
    assert repair.fit(histogram)(x).isfinite().all()
print(adaptive, histogram, float(histogram.ece()))
assert sys.modules["numpy"] is None
"""


def test_it_trains_and_measures_without_numpy():
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMPY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
