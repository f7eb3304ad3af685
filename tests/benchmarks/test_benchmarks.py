"""The main job as its users meet it: its data, its errors, its files."""

import dataclasses
import json
from importlib import metadata
from pathlib import Path

import defaults
import gallery
import numpy as np
import pytest
import reference as ref
import repair
import scale
import speed
import tasks
import torch
from calibration import LINES, main
from performance import main as performance_page
from PIL import Image
from saliency import SmallUNet, digit_scenes, folder_data
from study import main as study_page

from sc_bce.measures import Blocks, Cells

COUNTS = dict(train=12, val=6, test=8, ood=5)

ROOT = Path(__file__).parents[1]


def test_scenes_are_real_exact_and_repeatable():
    data = digit_scenes(32, **COUNTS)
    assert [len(getattr(data, part)) for part in COUNTS] == list(COUNTS.values())
    assert data.train.images.shape == (12, 32, 32, 3)
    assert set(np.unique(data.train.masks)) == {0, 1}
    assert (data.train.masks.mean((1, 2)) > 0.01).all()
    assert not data.ood.masks.any()
    assert digit_scenes(32, **COUNTS).fingerprint() == data.fingerprint()
    assert digit_scenes(32, **COUNTS, seed=1).fingerprint() != data.fingerprint()


def test_the_network_is_small():
    net = SmallUNet(16)
    assert sum(p.numel() for p in net.parameters()) < 200_000
    assert net(torch.zeros(2, 3, 48, 48)).shape == (2, 1, 48, 48)


def paint(folder, count=20, size=(40, 30), white=255, suffix="png"):
    """A folder of squares and their masks."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i in range(count):
        mask = np.zeros(size[::-1], np.uint8)
        mask[5:20, i : i + 15] = 1
        shade = np.stack([mask * 180 + 20] * 3, -1).astype(np.uint8)
        Image.fromarray(shade).save(folder / "images" / f"{i:03}.{suffix}")
        Image.fromarray(mask * white).save(folder / "masks" / f"{i:03}.png")
    return folder


@pytest.mark.parametrize("white", [1, 255])
@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
def test_a_folder_is_read_and_split_in_the_order_of_names(tmp_path, white, suffix):
    data = folder_data(paint(tmp_path / "squares", white=white, suffix=suffix), 16, ood=3)
    assert data.name == "squares"
    assert [len(part) for part in (data.train, data.val, data.test, data.ood)] == [12, 3, 5, 3]
    # Sample 0 is a square of 15 in 40 x 30; a quarter of that area, but for whole pixels.
    assert data.train.masks[0].mean() == pytest.approx(15 * 15 / 1200, abs=0.05)
    assert data.train.masks[0, 8, 1] == 1
    assert data.train.images[0, 8, 1].min() > 150


def spoil(what, folder):
    if what == "no folder":
        return folder / "nowhere"
    if what == "missing mask":
        (folder / "masks" / "003.png").unlink()
    if what == "missing image":
        (folder / "images" / "003.png").unlink()
    if what == "unequal sizes":
        Image.new("L", (7, 9)).save(folder / "masks" / "003.png")
    if what == "unreadable":
        (folder / "images" / "003.png").write_bytes(b"no image")
    if what == "grey mask":
        Image.fromarray(np.full((30, 40), 100, np.uint8)).save(folder / "masks" / "003.png")
    if what == "empty":
        for path in (folder / "images").iterdir():
            path.unlink()
    if what == "twice":
        Image.new("RGB", (40, 30)).save(folder / "images" / "003.jpg")
    if what == "few":
        for i in range(10):
            (folder / "images" / f"{i:03}.png").unlink()
            (folder / "masks" / f"{i:03}.png").unlink()
    return folder


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("no folder", r"Expected a folder .*nowhere.images, but there is none"),
        ("missing mask", r"003.png has no mask: add .*masks.003.png"),
        ("missing image", r"003.png has no image: add"),
        ("unequal sizes", r"images.003.png has 40 x 30 pixels but .* has 7 x 9"),
        ("unreadable", r"images.003.png can't be read as an image"),
        ("grey mask", r"masks.003.png to hold only 0 and 255, .* but got 100"),
        ("empty", r"Expected PNG or JPEG files in"),
        ("twice", r"share one stem"),
        ("few", r"at least 20 images"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line(tmp_path, what, text):
    folder = spoil(what, paint(tmp_path / "squares"))
    with pytest.raises(SystemExit, match=text) as refused:
        main(["--data", str(folder), "--quick", "--out", str(tmp_path / "out")])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size", "30"], "multiple of 4 from 16 on, but got 30"),
        (["--epochs", "0"], "above 0, but got 0"),
    ],
)
def test_bad_options_are_refused(arguments, text, tmp_path):
    with pytest.raises(SystemExit, match=text):
        main([*arguments, "--out", str(tmp_path)])


def test_a_small_study_writes_its_files_and_goes_on_where_it_stopped(tmp_path, capsys):
    folder = paint(tmp_path / "squares")
    line = ["--data", str(folder), "--size", "16", "--epochs", "2", "--jobs", "1"]
    line += ["--out", str(tmp_path / "out")]
    main([*line, "--seeds", "0"])
    runs = tmp_path / "out" / "runs"
    kept = {path.name: path.stat().st_mtime_ns for path in runs.glob("*--0.json")}
    assert len(kept) == 3
    main([*line, "--seeds", "0", "1"])
    assert {name: (runs / name).stat().st_mtime_ns for name in kept} == kept
    summary = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert summary["seeds"] == [0, 1]
    assert summary["versions"]["torch"] == metadata.version("torch")
    assert list(summary["lines"]) == [one.title for one in LINES]
    for measures in summary["lines"].values():
        assert np.isfinite(measures["nll"])
        assert measures["nll_refined"] <= measures["nll"]
    with Image.open(tmp_path / "out" / "calibration.png") as image:
        assert min(image.size) > 200
    printed = capsys.readouterr().out
    assert printed.count("stopped early, repaired") == 4
    assert summary["sentence"] in printed.replace("\n", " ")
    with pytest.raises(SystemExit, match="holds runs of other settings"):
        main([*line, "--seeds", "0", "--size", "20"])


def test_several_labels_are_studied_alike(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part, count in {"train": 4, "val": 4, "test": 4}.items():
        for kind in ("images", "labels"):
            (tmp_path / "town" / part / kind).mkdir(parents=True)
        for i in range(count):
            labels = rng.integers(0, 3, (12, 16)).astype(np.uint8)  # 2 says nothing
            shade = np.stack([labels * 80] * 3, -1)
            Image.fromarray(shade).save(tmp_path / "town" / part / "images" / f"{i}.png")
            Image.fromarray(labels).save(tmp_path / "town" / part / "labels" / f"{i}.png")
    line = ["--data", str(tmp_path / "town"), "--labels", "2", "--size", "16", "--epochs", "1"]
    main([*line, "--jobs", "1", "--out", str(tmp_path / "out")])
    assert "Seen on 4 test images and one seed" in capsys.readouterr().out


# --- repair ------------------------------------------------------------------------------------


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


def test_a_curve_of_lines_joins_the_mean_places_of_its_blocks():
    count = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 1.0]).double()
    # Two blocks: cells 0 to 2 around 0.5, and cells 3 to 5 around 3.75.
    blocks = Blocks([0, 3], [2.0, 4.0], [1.0, 3.0])
    got = repair.lines(Cells(torch.arange(6).double(), count, count / 2), blocks, torch.ones(2))
    assert got.tolist() == [1.0] * 6
    got = repair.lines(
        Cells(torch.arange(6).double(), count, count / 2), blocks, torch.tensor([0.0, 13.0])
    )
    assert got.tolist() == pytest.approx([0, 2, 6, 10, 13, 13])


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


# --- speed -------------------------------------------------------------------------------------


def test_the_published_step_follows_its_formulas():
    """beta = 2, the explicit rule at a budget of 0.1, from a level of 0.01."""
    published = speed.PublishedStep(lr=0.002, penalty=2000.0, budget=0.1)
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
    monkeypatch.setattr(speed, "LABELS", (2, 11, 4, 5))
    for case in speed.CASES:
        if case.compiled:
            continue
        small = case if case.name == "table" else tiny(case, (2, case.shape[1], 4, 5))
        records = speed.time_case(small, threads=1, seconds=0.003)
        assert [r["contender"] for r in records] == [speed.BASELINE, *case.losses]
        assert records[0]["ratio"] == 1
        assert records[0]["asked"] is None
        assert all(record["median_ms"] > 0 for record in records)
        if case.name != "rivals":
            assert all(record["asked"] for record in records[1:] if case.name != "labels")


def test_what_is_kept_and_allocated_is_counted_beyond_inputs_and_gradient(monkeypatch):
    cases = [tiny(case, (8, 1, 512, 1024)) for case in speed.CASES[1:2]]
    monkeypatch.setattr(speed, "CASES", cases)
    monkeypatch.setattr(speed, "SEGMENTATION", (8, 1, 512, 1024))
    memory = {row["contender"]: row for row in speed.measure_memory()}
    assert memory["bce"]["saved_bytes_per_element"] == pytest.approx(8, abs=0.01)
    assert memory["bce"]["peak_bytes_per_element"] >= 8
    assert memory["sample"]["saved_bytes_per_element"] == pytest.approx(5, abs=0.01)
    assert memory["adaptive"]["saved_bytes_per_element"] == pytest.approx(5, abs=0.01)


def test_the_path_that_is_taken_is_timed_beside_the_plain_one(monkeypatch):
    monkeypatch.setattr(speed, "SIZES", (64, 1 << 18))
    records = speed.compare_paths(threads=1, seconds=0.003)
    assert [record["elements"] for record in records] == [64] * 5 + [1 << 18] * 5
    for record in records:
        assert record["of_plain"] == pytest.approx(record["own_ms"] / record["plain_ms"])
        assert record["of_bce"] == pytest.approx(record["own_ms"] / record["bce_ms"])


def test_the_histogram_is_timed_beside_torchmetrics(monkeypatch):
    monkeypatch.setattr(speed, "PIXELS", 10_000)
    monkeypatch.setattr(speed, "STREAM", 3)
    found = speed.time_histogram(threads=1, seconds=0.01)
    assert found["stream"]["pixels"] == 30_000
    assert found["torchmetrics"]["state_bytes"] == 5 * 10_000
    assert found["ours"]["state_bytes"] == found["stream"]["state_bytes"]


def test_datasets_and_repairs_are_timed_beside_what_they_replace(monkeypatch):
    monkeypatch.setattr(speed, "PIXELS", 10_000)
    monkeypatch.setattr(speed, "ROWS", 600)
    records = speed.time_others(threads=1, seconds=0.003)
    assert [record["case"] for record in records] == [
        "IndexedDataset, TensorDataset",
        "IndexedDataset, list of tuples",
        *(f"isotonic repair, {name}" for name in speed.BYTES),
    ]
    for record in records:
        assert record["ratio"] == pytest.approx(record["median_ms"] / record["base_ms"])


@pytest.mark.parametrize(
    ("page", "make"), [("performance", performance_page), ("study", study_page)]
)
def test_the_committed_page_is_the_one_made_from_the_committed_results(page, make, tmp_path):
    make(["--out", str(tmp_path)])
    committed = Path(__file__).parents[1] / "docs"
    assert (tmp_path / f"{page}.md").read_text("utf-8") == (committed / f"{page}.md").read_text(
        "utf-8"
    )
    pictures = sorted(path.name for path in (tmp_path / page).iterdir())
    assert pictures == sorted(path.name for path in (committed / page).iterdir())


def test_the_gallery_is_drawn(tmp_path, monkeypatch):
    page, out = tmp_path / "start.md", tmp_path / "out"
    page.write_text("""```python
from PIL import Image

Image.new("L", (300, 300)).save("reliability.png")
```
""")
    monkeypatch.setattr(gallery, "TUTORIAL", page)
    gallery.main(["--epochs", "1", "--out", str(out)])
    committed = ROOT / "docs" / "gallery"
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in committed.iterdir())
    for path in out.iterdir():
        with Image.open(path) as image:
            assert min(image.size) >= 300


# ---------------------------------------------------------------- the tasks of the defaults


def pave(folder, counts, size=(16, 12)):
    """Street scenes: three bands of labels 0, 3 and void, and a spot of label 10."""
    for part, count in counts.items():
        (folder / part / "images").mkdir(parents=True)
        (folder / part / "labels").mkdir()
        for i in range(count):
            labels = np.repeat(np.array([0, 3, 11], np.uint8), size[1] // 3)[:, None]
            labels = np.tile(labels, (1, size[0]))
            labels[0, 0] = 10
            shade = np.stack([labels * 20] * 3, -1)
            Image.fromarray(shade).save(folder / part / "images" / f"{i:03}.jpg")
            Image.fromarray(labels).save(folder / part / "labels" / f"{i:03}.png")
    return folder


STREETS = dict(train=3, val=2, test=2)


def test_street_scenes_become_eleven_labels_with_void_ignored(tmp_path):
    task = tasks.streets(pave(tmp_path, STREETS), width=16, height=12)
    assert [len(part) for part in (task.train, task.val, task.test)] == [3, 2, 2]
    target = task.train.target
    assert task.train.inputs.shape == (3, 3, 12, 16)
    assert target.shape == (3, 11, 12, 16)
    void = target == tasks.IGNORED
    assert void[:, :, 8:].all()
    assert not void[:, :, :8].any()
    assert (target[:, :, :8].sum(1) == 1).all()  # one label each
    assert (target[:, 10].flatten(1)[:, 0] == 1).all()
    assert (target[:, 3, 4:8] == 1).all()
    assert task.build()(task.train.inputs).shape == (3, 11, 12, 16)


def test_street_scenes_shrink_to_labels_not_to_means(tmp_path):
    part = tasks.street_part(pave(tmp_path, STREETS) / "val", 8, 4)
    assert set(part.target.unique().tolist()) == {0, 1, tasks.IGNORED}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("pair", "has not both an image and a label image 001"),
        ("label", "to hold one label of 0 to 11 per pixel"),
        ("colours", "to hold one label of 0 to 11 per pixel"),
        ("unreadable", "can't be read as an image"),
        ("folder", "there is none"),
    ],
)
def test_spoilt_street_scenes_are_refused(tmp_path, what, text):
    folder = pave(tmp_path, STREETS)
    label = folder / "val" / "labels" / "001.png"
    if what == "pair":
        label.unlink()
    if what == "label":
        Image.new("L", (16, 12), 12).save(label)
    if what == "colours":
        Image.new("RGB", (16, 12)).save(label)
    if what == "unreadable":
        label.write_bytes(b"no image")
    if what == "folder":
        folder = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=text):
        tasks.streets(folder, 16, 12)


def test_the_table_has_rare_labels_and_the_start_has_its_parts():
    rates = tasks.rare().train.target.float().mean(0)
    assert 0.01 <= rates.mean() <= 0.03
    start = tasks.start()
    assert [len(part) for part in (start.train, start.val, start.test)] == [300, 400, 1097]
    assert start.build()(start.val.inputs[:2]).shape == (2, 1, 8, 8)


# ---------------------------------------------------------------- the choice of the defaults


def test_counted_logits_give_the_measures_of_the_logits():
    rng = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(20_000, generator=rng)
    target = (torch.rand(20_000, generator=rng) < torch.sigmoid(0.5 * logits - 1)).to(torch.uint8)
    logits, target = torch.cat([logits, torch.zeros(5)]), torch.cat([target, target[:5] * 0 + 255])
    seen = defaults.Seen.of(logits, target)
    x, y = logits[:-5], target[:-5].float()
    want = torch.nn.functional.binary_cross_entropy_with_logits(x, y)
    assert seen.nll == pytest.approx(float(want), rel=1e-6)
    slope, intercept = seen.recalibration(free_slope=True)
    assert slope == pytest.approx(0.5, abs=0.05)
    assert intercept == pytest.approx(-1, abs=0.05)
    shift = seen.recalibration(free_slope=False)[1]
    assert float(torch.sigmoid(x + shift).mean()) == pytest.approx(float(y.mean()), abs=1e-3)
    summary = seen.summary()
    assert summary["accuracy"] == pytest.approx(
        float(((x >= 0) == (y > 0)).float().mean()), abs=5e-3
    )
    sure = torch.sigmoid(x.abs())
    assert summary["gap"] == pytest.approx(float(sure.mean()) - summary["accuracy"], abs=1e-3)


def levels(**options):
    inputs = torch.zeros(4, 1, 2, 2)
    target = torch.tensor([1, 0, 0, 0], dtype=torch.uint8).repeat(4, 1).reshape(4, 1, 2, 2)
    setting = defaults.Setting(signal="slope", gain=0.1, **options)
    return defaults.Levels(setting, tasks.Part(inputs, target), 1)


def test_the_slope_moves_the_shared_level_within_bounds():
    held = levels()
    assert float(held.prior) == pytest.approx(4.5 / 17)
    for slope, want in [(1.5, 0.0), (0.5, 0.05), (-7.0, 0.15), (1.2, 0.13), (40.0, 0.03)]:
        held.step({"slope": slope, "nll": 1.0})
        assert held.alpha.tolist() == pytest.approx([want] * 4, abs=1e-6)
    held.step({"slope": float("nan"), "nll": 1.0})
    assert float(held.alpha.mean()) == pytest.approx(0.03, abs=1e-6)
    for _ in range(99):
        held.step({"slope": 0.0, "nll": 1.0})
    assert float(held.alpha.max()) == pytest.approx(1 / (2 * 12.5 / 17) - 0.01, abs=1e-6)


def test_runs_of_the_defaults_are_kept_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "RESULTS", tmp_path / "kept" / "runs.json")
    line = ["--tasks", "rare", "--settings", "bce", "slope-0.1", "--seeds", "0"]
    line += ["--out", str(tmp_path / "out")]
    defaults.main(line)
    assert "slope-0.1" in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(stamps) == 2
    defaults.main([*line, "--keep"])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    printed = capsys.readouterr().out
    defaults.main(["--print"])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="needs a folder"):
        defaults.main(["--tasks", "streets"])


def test_the_cost_of_a_large_table_is_written(tmp_path):
    out = tmp_path / "scale.json"
    scale.main(["--rows=5000", "--steps=20", "--threads=1", "--no-merge", f"--out={out}"])
    found = json.loads(out.read_text())
    assert [case["ratio"] > 0 for case in found["steps"]] == [True] * 4
    assert [case["bytes_per_row"] for case in found["epoch"]] == [5, 9]
