"""What is timed is what it is called, beside what it is compared with."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference as ref
import torch

from benchmarks.speed import maps, measure, table

ROOT = Path(__file__).parents[2]


def test_the_published_step_follows_its_formulas():
    """beta = 2, the explicit rule at a budget of 0.1, from a level of 0.01."""
    published = measure.PublishedStep(lr=0.002, penalty=2000.0, budget=0.1)
    x, y = 3 * torch.randn(4, 30), torch.rand(4, 30) > 0.3
    index = torch.tensor([7, 3, 9, 1])
    published.alpha.update({7: 0.12, 3: 0.2})
    before = np.array([0.12, 0.2, 0.01, 0.01])
    published(x, y, index)
    gradient = ref.margin(x.numpy(), y.numpy())
    want = np.clip(before + 0.002 * (gradient + 2000 * np.minimum(0.1 - before, 0)), 0, 0.49)
    np.testing.assert_allclose([published.alpha[int(i)] for i in index], want, atol=1e-6)


def tiny(case, shape):
    return dataclasses.replace(case, shape=shape)


def test_speed_is_measured_side_by_side(monkeypatch):
    monkeypatch.setattr(measure, "LABELS", (2, 11, 4, 5))
    for case in measure.CASES:
        if case.compiled:
            continue
        small = case if case.name == "table" else tiny(case, (2, case.shape[1], 4, 5))
        records = measure.time_case(small, threads=1, seconds=0.003)
        assert [r["contender"] for r in records] == [measure.BASELINE, *case.losses]
        assert records[0]["ratio"] == 1
        assert all(record["median_ms"] > 0 for record in records)
        assert not any("of_before" in record for record in records)


def test_another_checkout_takes_its_turns_in_the_same_rounds(tmp_path):
    other = tmp_path / "sc_bce"
    shutil.copytree(ROOT / "src" / "sc_bce", other)
    package = measure.package_of(other)
    assert package.__file__.startswith(str(tmp_path))
    assert package.CalibrationHistogram is not measure.sc_bce.CalibrationHistogram
    case = tiny(measure.CASES[-1], (8,))
    records = measure.time_case(case, threads=1, seconds=0.003, before=other)
    assert [r["contender"] for r in records] == [measure.BASELINE, *case.losses]
    assert all(record["of_before"] > 0 for record in records[1:])
    with pytest.raises(ValueError, match="Expected --before to be a folder src/sc_bce"):
        measure.package_of(tmp_path)


def test_what_is_kept_and_allocated_is_counted_beyond_inputs_and_gradient(monkeypatch):
    cases = [tiny(case, (8, 1, 512, 1024)) for case in measure.CASES[1:2]]
    monkeypatch.setattr(measure, "CASES", cases)
    monkeypatch.setattr(measure, "SEGMENTATION", (8, 1, 512, 1024))
    memory = {row["contender"]: row for row in measure.measure_memory()}
    assert memory["bce"]["saved_bytes_per_element"] == pytest.approx(8, abs=0.01)
    assert memory["bce"]["peak_bytes_per_element"] >= 8
    assert memory["sample"]["saved_bytes_per_element"] == pytest.approx(5, abs=0.01)
    assert memory["adaptive"]["saved_bytes_per_element"] == pytest.approx(5, abs=0.01)


def test_all_sizes_are_timed_beside_bce(monkeypatch):
    monkeypatch.setattr(measure, "SIZES", (64, 1 << 14))
    records = measure.time_sizes(threads=1, seconds=0.003)
    assert [record["elements"] for record in records] == [64] * 5 + [1 << 14] * 5
    for record in records:
        assert record["of_bce"] == pytest.approx(record["own_ms"] / record["bce_ms"])


def test_the_histogram_is_timed_beside_torchmetrics(monkeypatch):
    monkeypatch.setattr(measure, "PIXELS", 10_000)
    monkeypatch.setattr(measure, "STREAM", 3)
    found = measure.time_histogram(threads=1, seconds=0.01)
    assert found["stream"]["pixels"] == 30_000
    assert found["torchmetrics"]["state_bytes"] == 5 * 10_000
    assert found["ours"]["state_bytes"] == found["stream"]["state_bytes"]


def test_datasets_and_repairs_are_timed_beside_what_they_replace(monkeypatch):
    monkeypatch.setattr(measure, "PIXELS", 10_000)
    monkeypatch.setattr(measure, "ROWS", 600)
    records = measure.time_others(threads=1, seconds=0.003)
    assert [record["case"] for record in records] == [
        "IndexedDataset, TensorDataset",
        "IndexedDataset, list of tuples",
        *(f"isotonic repair, {name}" for name in measure.BYTES),
    ]
    for record in records:
        assert record["ratio"] == pytest.approx(record["median_ms"] / record["base_ms"])


def test_the_cost_of_a_large_table_is_written(tmp_path):
    out = tmp_path / "scale.json"
    table.main(["--rows=5000", "--steps=20", "--threads=1", "--no-merge", f"--out={out}"])
    found = json.loads(out.read_text())
    assert [case["ratio"] > 0 for case in found["steps"]] == [True] * 4
    assert all(4 <= case["bytes_per_row"] < 20 for case in found["epoch"])


def test_the_command_is_timed_beside_decoding(tmp_path):
    out = tmp_path / "maps.json"
    maps.main(["--maps=3", "--rounds=1", f"--out={out}"])
    found = json.loads(out.read_text())
    assert found["seconds"].keys() == {"decode", *maps.COMMANDS}
    assert all(ratio > 1 for ratio in found["times decoding"].values())
    assert list(found["peak MiB"]) == ["3", "6", "24"]
    assert all(peak > 50 for peak in found["peak MiB"].values())
