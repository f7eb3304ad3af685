"""README, docs and docstrings say what is true: their code runs, their names exist."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import sc_bce

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.M)


# frameworks.md runs in test_integrations.py, which also looks at what it leaves behind.
RUN_HERE = [p for p in PAGES if blocks(p, "python") and p.name != "frameworks.md"]


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore:AdaptivePerturbation has trained past its warm-up")
def test_code_of_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python")):
        code = compile(block, f"{page.name}, block {number}", "exec")
        exec(code, namespace)


def test_api_page_shows_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert set(re.findall(r"^::: sc_bce\.(\w+)$", page, re.M)) == set(sc_bce.__all__)


def test_public_names_and_their_docstrings():
    for name in sc_bce.__all__:
        doc = getattr(sc_bce, name).__doc__
        for part in ("Args:", "Raises:", "Example:"):
            assert part in doc, (name, part)
    assert sc_bce.__all__ == sorted(sc_bce.__all__)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), (page.name, link)


def test_changelog_speaks_of_this_version():
    version = metadata.version("sc-bce").split(".dev")[0]
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{version}]" in text or "## [Unreleased]" in text


def test_the_readmes_table_is_the_committed_result():
    results = ROOT / "benchmarks" / "results" / "quick" / "calibration.json"
    methods = json.loads(results.read_text("utf-8"))["methods"]
    printed = blocks(ROOT / "README.md", "text")[0]
    columns = [
        ("accuracy", "test", 4), ("nll", "test", 3), ("brier", "test", 4), ("ece", "test", 4),
        ("oe", "test", 4), ("confidence", "test", 3), ("confidence", "ood", 3), ("ece", "ood", 4),
        ("oe", "ood", 4), ("auroc_pixel", "shift", 3),
    ]  # fmt: skip
    assert len(printed.splitlines()) == 2 + len(methods)
    for method in methods.values():
        values = [
            f"{method['measures'][part][key]['mean']:.{digits}f}" for key, part, digits in columns
        ]
        assert re.search(rf"^{re.escape(method['title'])} +{' +'.join(values)}$", printed, re.M)


def test_the_guides_timings_are_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/table.json").read_text("utf-8"))
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    for step, merge in zip(result["step"], result["merge"], strict=True):
        row = f"{step['median_ms']:.1f} ms | {step['iqr_ms']:.1f} ms | {merge['median_s']:.3f} s |"
        assert row in guide


def test_importing_brings_nothing_but_torch():
    script = (
        "import sys, torch; before = set(sys.modules); import sc_bce;"
        "print([m for m in sorted(set(sys.modules) - before) if not m.startswith('sc_bce')])"
    )
    run = [sys.executable, "-W", "ignore", "-c", script]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_imports_go_downward():
    order = [
        "_checks",
        "functional",
        "loss",
        "adaptive",
        "calibration",
        "data",
        "temperature",
        "plot",
        "integrations/lightning",
    ]
    for place, room in enumerate(order):
        text = (ROOT / "src" / "sc_bce" / f"{room}.py").read_text("utf-8")
        ours = r"^from \.+ import (.+)$|^from \.+(\w+) import"
        for names, single in re.findall(ours, text, re.M):
            for used in filter(None, [*names.split(", "), single]):
                assert order.index(used) < place, (room, used)


def test_the_reference_imports_nothing_of_ours():
    assert "sc_bce" not in re.findall(
        r"^(?:import|from) (\w+)", (ROOT / "tests" / "reference.py").read_text("utf-8"), re.M
    )
