"""What is written in more than one file is the same in each."""

import re
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
    oldest, newest = found(r'^ +torch: \["([\d.]+)", "([\d.]+)"\]$', ".github/workflows/ci.yml")[0]
    assert found(r'^dependencies = \["torch>=([\d.]+)"\]$', "pyproject.toml") == [oldest]
    assert found(r"^torch==(\d+\.\d+)\.\d+$", "constraints.txt") == [newest]
    pythons = found(r'^ +python: \["([\d.]+)", "([\d.]+)"\]$', ".github/workflows/ci.yml")[0]
    assert found(r'^requires-python = ">=([\d.]+)"$', "pyproject.toml") == [pythons[0]]
    assert tuple(found(r"Programming Language :: Python :: (3\.\d+)", "pyproject.toml")) == pythons


def test_plot_and_integrations_are_reached_from_the_package():
    assert callable(sc_bce.plot.reliability_diagram)
    assert sc_bce.integrations.__name__ == "sc_bce.integrations"
    with pytest.raises(AttributeError, match="module 'sc_bce' has no attribute 'plots'"):
        sc_bce.plots  # noqa: B018
