"""README, docs and docstrings say what is true: their code runs, their names exist."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sc_bce.plot
from benchmarks import calibration
from benchmarks.study import answers as study_answers
from benchmarks.study import kept as study_runs
from benchmarks.study import page as study_page
from benchmarks.study.run import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.M)


def steps(page):
    """Each Python block, and the block of text that follows it at once: what it prints."""
    text = page.read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", text, re.DOTALL | re.M)


def assert_printed(printed, shown):
    """The same words; numbers as near as trainings on two machines are."""
    number = r"-?\d+(?:\.\d+)?"
    assert re.sub(number, "#", printed).split() == re.sub(number, "#", shown).split()
    values, wanted = ([float(x) for x in re.findall(number, text)] for text in (printed, shown))
    assert values == pytest.approx(wanted, rel=0.1, abs=0.02)


# These run in test_integrations.py and test_recipes.py, which also look at what they leave behind.
ELSEWHERE = {"frameworks.md", "skorch.md"}
RUN_HERE = [p for p in PAGES if blocks(p, "python") and p.name not in ELSEWHERE]


def at_hand():
    """What the reader of README has: a network and data."""
    torch.manual_seed(0)
    inputs = torch.randn(200, 10)
    data = TensorDataset(inputs, torch.rand(200, 1) < torch.sigmoid(inputs[:, :1]))
    loader = DataLoader(data, batch_size=50)
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = {"model": model, "optimizer": optimizer, "training_data": data}
    return names | {"validation_loader": loader}


def run(page, capsys, optional=()):
    """The steps of a page in one namespace, without those that name a package to be left out."""
    namespace = {"__name__": "page"} | (at_hand() if page.name == "README.md" else {})
    for number, (block, shown) in enumerate(steps(page)):
        if any(name in block for name in optional):
            continue
        capsys.readouterr()
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
        if shown:
            assert_printed(capsys.readouterr().out, shown)


@pytest.mark.parametrize("page", RUN_HERE, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore:AdaptivePerturbation has trained past its warm-up")
def test_code_of_the_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(page, capsys, optional=["onnxruntime"])


# What torch's exporter uses, and torch deprecates.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", ["repair", "networks-in-use"])
def test_the_export_to_onnx_runs(name, tmp_path, monkeypatch, capsys):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "guide" / f"{name}.md"
    assert any("onnxruntime" in block for block in blocks(page, "python"))
    run(page, capsys)


def test_the_api_pages_show_every_public_name():
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    public = {
        *(f"sc_bce.{name}" for name in sc_bce.__all__),
        *(f"sc_bce.plot.{name}" for name in sc_bce.plot.__all__),
        "sc_bce.integrations.lightning.AdaptivePerturbationCallback",
        "sc_bce.integrations.onnx.append",
        "sc_bce.integrations.onnx.check",
        "sc_bce.integrations.torchmetrics.CalibrationMetric",
    }
    shown = re.findall(r"^::: (\S+)$", pages, re.M)
    assert sorted(shown) == sorted(public)


def test_public_names_and_their_docstrings():
    for name in sc_bce.__all__:
        doc = getattr(sc_bce, name).__doc__
        if hasattr(getattr(sc_bce, name), "_fields"):  # what a method returns
            continue
        for part in ("Args:", "Raises:", "Example:"):
            assert part in doc, (name, part)
    assert sc_bce.__all__ == sorted(sc_bce.__all__)


def test_every_public_method_has_an_example():
    for name in sc_bce.__all__:
        public = getattr(sc_bce, name)
        assert ">>>" in public.__doc__, name
        if not isinstance(public, type) or hasattr(public, "_fields"):
            continue
        for owner in public.__mro__:
            if not re.fullmatch(r"sc_bce(\.[a-z]\w*)+", owner.__module__):
                continue  # neither ours nor shown
            for member, value in vars(owner).items():
                if not member.startswith("_") and value.__doc__:  # as the API pages show them
                    assert ">>>" in value.__doc__, (name, member)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        text = page.read_text("utf-8")
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
        for link in links + re.findall(r'src="([^"]+)"', text):
            if "://" not in link:
                assert (page.parent / link).exists(), (page.name, link)


@pytest.mark.skipif(
    tuple(map(int, matplotlib.__version__.split(".")[:2])) < (3, 11),
    reason="older releases of matplotlib, as on Python 3.10, place text differently",
)
def test_the_theorys_picture_is_what_its_script_draws(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "theory.py"))["figure"]().savefig(tmp_path / "drawn.png")
    with (
        Image.open(ROOT / "docs" / "theory.png") as kept,
        Image.open(tmp_path / "drawn.png") as new,
    ):
        assert kept.size == new.size
        difference = ImageChops.difference(kept.convert("L"), new.convert("L"))
        assert ImageStat.Stat(difference).mean[0] < 1  # of 255: fonts differ between versions


def test_the_table_of_the_first_command_is_the_committed_result():
    results = ROOT / "benchmarks" / "results" / "quick" / "calibration.json"
    kept = json.loads(results.read_text("utf-8"))
    printed = blocks(ROOT / "benchmarks" / "README.md", "text")[0]
    for title, found in kept["lines"].items():
        values = [f"{found[key]:.{digits}f}" for _, key, digits in calibration.COLUMNS]
        assert re.search(rf"^{re.escape(title)} +{' +'.join(values)}$", printed, re.M)
    assert kept["sentence"] in printed.replace("\n", " ")


def test_the_readmes_summary_is_the_committed_result():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert study_page.readme(study_runs.load(RESULTS)) in readme


def test_what_the_guide_says_of_wrong_masks_is_the_committed_result():
    guide = (ROOT / "docs" / "guide" / "noisy.md").read_text("utf-8")
    assert study_answers.noisy(study_runs.load(RESULTS)) in guide


def test_the_guides_timings_are_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/scale.json").read_text("utf-8"))
    guide = " ".join((ROOT / "docs" / "guide" / "scale.md").read_text("utf-8").split())
    ratios = [record["ratio"] for record in result["steps"]]
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} times as long" in guide
    seconds = result["merge"]["seconds"]
    assert f"the merge of `step` between two processes {seconds:.0f} seconds" in guide


def test_importing_brings_nothing_but_torch():
    script = (
        "import sys, torch; before = set(sys.modules); import sc_bce;"
        "print([m for m in sorted(set(sys.modules) - before) if not m.startswith('sc_bce')])"
    )
    run = [sys.executable, "-W", "ignore", "-c", script]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_the_reference_imports_nothing_of_ours():
    assert "sc_bce" not in re.findall(
        r"^(?:import|from) (\w+)", (ROOT / "tests" / "reference.py").read_text("utf-8"), re.M
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_the_tutorial_is_that_of_every_seed(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(blocks(ROOT / "docs" / "start.md", "python"))
    inner = "    torch.manual_seed(0)\n"
    assert text.count(inner) == 1
    names = {"__name__": "page"}
    exec(text.replace(inner, inner.replace("0", str(seed))), names)

    def nll(model):
        return float(names["measure"](model, names["test"]).nll())

    stopped = max(nll(names["stopped"]), nll(names["adaptive_stopped"]))
    assert stopped < nll(names["adaptive_last"]) < nll(names["last"])
