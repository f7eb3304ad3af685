"""What a repair from a histogram loses: the benchmark, and what it found."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study import repair

ROOT = Path(__file__).parents[2]


def test_a_repair_from_cells_is_that_from_raw_values(capsys):
    torch.manual_seed(0)
    z = 2 * torch.randn(40, 1, 16, 16)
    y = torch.rand(z.shape) < torch.sigmoid(z / 2)
    answers = {"val": (2 * z[:20], y[:20]), "test": (2 * z[20:], y[20:])}
    rows = repair.bounds(0, answers)
    assert [row["logits"] for row in rows] == [
        "x 1",
        "x 2",
        "x 4",
        "x 8",
        "x 32",
        "bfloat16",
        "float16",
    ]
    for row in rows:
        for kind in ("affine val", "affine test", "temperature"):
            assert row[kind][0] == pytest.approx(row[kind][1], rel=1e-3)
        assert row["isotonic val"][0] == pytest.approx(row["isotonic val"][1], rel=0.01)
    repair.show_bounds(rows)
    rows = [repair.cost(1000, raw) for raw in (False, True)]
    assert [row["pixels"] for row in rows] == [1000, 1000]
    repair.show_costs(rows)
    assert "worst relative difference, temperature" in capsys.readouterr().out


BLOCKS = repair.curve(
    torch.tensor([3.0, 0.0, 1.0, 2.0, 5.0, 4.0, 4.0]), torch.tensor([0, 0, 1, 0, 1, 1, 1]).bool()
)


def test_blocks_are_the_pooled_adjacent_violators():
    """In order of the logits 0, 1, 2, 3, 4, 4, 5 the labels are 0, 1, 0, 0, 1, 1, 1."""
    assert BLOCKS.first.tolist() == [0, 1, 4]
    assert BLOCKS.middle.tolist() == pytest.approx([0, 2, 13 / 3])
    assert BLOCKS.size.tolist() == [1, 3, 3]
    assert BLOCKS.positive.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("ends", "want"),
    [
        ("half a count", [1 / 4, 1 / 3, 7 / 8]),
        ("clip at 0.001", [0.001, 1 / 3, 0.999]),
        ("end block pooled with its neighbour", [1 / 4, 4 / 6, 4 / 6]),
    ],
)
def test_no_block_is_sure(ends, want):
    assert repair.shares(BLOCKS, ends).tolist() == pytest.approx(want)


def test_a_curve_is_of_steps_or_of_lines_between_mean_logits():
    z, values = np.array([-1, 0.5, 1, 3.9, 4, 9]), np.array([1.0, 2.0, 4.0])
    assert repair.steps(BLOCKS, values, z).tolist() == [1, 1, 2, 2, 4, 4]
    between = 2 + 2 * (3.9 - 2) / (13 / 3 - 2)
    want = [1, 1.25, 1.5, between, 2 + 2 * 2 / (13 / 3 - 2), 4]
    assert repair.lines(BLOCKS, values, z).tolist() == pytest.approx(want)


def test_the_choices_are_judged_by_the_number_of_images(monkeypatch, capsys):
    monkeypatch.setattr(repair, "IMAGES", (5, 20))
    rng = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(40, 1, 16, 16, generator=rng)
    y = torch.rand(z.shape, generator=rng) < torch.sigmoid(z / 2)
    rows = repair.choices(0, {"val": (2 * z[:20], y[:20]), "test": (2 * z[20:], y[20:])})
    assert [row["images"] for row in rows] == [5, 20]
    last = rows[-1]["nll"]
    assert len(last) == 3 + len(repair.FORMS) * len(repair.ENDS)
    assert last["steps, half a count"] == pytest.approx(last["affine"], rel=0.02)
    assert last["steps, half a count"] < last["none"] - 0.05
    repair.show_choices(rows)
    assert "lines, clip at 0.001" in capsys.readouterr().out


def test_the_kept_bounds_are_met_and_told():
    kept = json.loads((ROOT / "benchmarks/results/repair.json").read_text("utf-8"))
    for row in kept["bounds"]:
        for kind, limit in (("isotonic", 1e-3), ("affine", 1e-3)):
            for part in ("val", "test"):
                ours, raw = row[f"{kind} {part}"]
                assert abs(ours / raw - 1) < limit
        ours, raw = row["temperature"]
        assert abs(ours / raw - 1) < 0.01
    page = (ROOT / "docs" / "guide" / "repair.md").read_text("utf-8")
    for name, title in (
        ("temperature", "temperature"),
        ("affine", "temperature and bias"),
        ("steps, half a count", "isotonic"),
    ):
        means = []
        for images in (2, 5, 10, 20, 40, 640):
            each = [row["nll"][name] for row in kept["choices"] if row["images"] == images]
            means.append(f"{np.mean(each):.4f}".lstrip("0"))
        assert f"| {title} | {' | '.join(means)} |" in page
