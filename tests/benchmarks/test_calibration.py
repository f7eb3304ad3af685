"""README's first command as its users meet it: its data, its errors, its files."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from folders import paint
from PIL import Image

from benchmarks.calibration import LINES, main
from benchmarks.study import run

ROOT = Path(__file__).parents[2]


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
    if what == "one class":
        for path in (folder / "masks").iterdir():
            Image.new("L", (40, 30), 255).save(path)
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
        ("one class", r"Expected both classes in the train part of squares, .* are all 1: check"),
        ("few", r"at least 20 images"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line(tmp_path, what, text):
    folder = spoil(what, paint(tmp_path / "squares"))
    with pytest.raises(SystemExit, match=text) as refused:
        main(["--data", str(folder), "--quick", "--out", str(tmp_path / "out")])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [main, run.main], ids=["calibration", "study"])
def test_help_shows_how_a_folder_is_laid_out(command, capsys):
    with pytest.raises(SystemExit):
        command(["--help"])
    told = capsys.readouterr().out
    for line in ("FOLDER/masks/NAME.png", "FOLDER/train/labels/NAME.png", "or 255 is void"):
        assert line in told


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
    printed, bars = capsys.readouterr()
    assert " 76/76 " in bars.split("\r")[-1]  # epochs, evaluation of both, pictures
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


def test_it_runs_as_a_file_from_any_folder(tmp_path):
    script = str(ROOT / "benchmarks" / "calibration.py")
    line = [sys.executable, script, "--data", str(paint(tmp_path / "squares")), "--size", "16"]
    line += ["--epochs", "1", "--jobs", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Seen on 5 test images and one seed" in done.stdout
