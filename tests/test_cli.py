"""The command line, end to end, on small files of every format."""

import csv
import json
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from sc_bce import CalibrationHistogram, ImageHistograms, IsotonicCalibration, TemperatureScaling
from sc_bce.__main__ import Tally, main

SIZE = (12, 10)


def data(number=6, size=SIZE, seed=0):
    """Probabilities of an over-confident network and labels."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(number, *size)) + generator.normal(
        size=(number, *(1 for _ in size))
    )
    labels = generator.random(truth.shape) < 1 / (1 + np.exp(-truth))
    return 1 / (1 + np.exp(-2 * truth)), labels


def save(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".npz":
        np.savez_compressed(path, x)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(np.ascontiguousarray(x)), path)
    else:
        Image.fromarray(x).save(path)


def bytes_of(p):
    return (255 * p).round().astype(np.uint8)


WRITERS = {
    "8-bit.png": lambda p: bytes_of(p),
    "16-bit.png": lambda p: (65535 * p).round().astype(np.uint16),
    "colour.png": lambda p: np.stack([bytes_of(p)] * 3, -1),
    "8-bit.tif": lambda p: bytes_of(p),
    "16-bit.tif": lambda p: (65535 * p).round().astype(np.uint16),
    "float.tif": lambda p: p.astype(np.float32),
    "float.tiff": lambda p: p.astype(np.float32),
    "float.npy": lambda p: p.astype(np.float16),
    "reversed.npy": lambda p: p.astype(">f4"),
    "double.npy": lambda p: p[None],
    "8-bit.npy": lambda p: bytes_of(p),
    "float.npz": lambda p: p.astype(np.float32),
    "float.pt": lambda p: p.astype(np.float32)[None, None],
}


def palette(y):
    made = Image.fromarray(y.astype(np.uint8))
    made.putpalette([0, 0, 0, 200, 0, 0])
    assert made.mode == "P"
    return made


MASKS = {
    "1-bit.png": lambda y: Image.fromarray(y),
    "grey.png": lambda y: Image.fromarray(255 * y.astype(np.uint8)),
    "indices.png": lambda y: Image.fromarray(y.astype(np.uint8)),
    "palette.png": palette,
    "colour.png": lambda y: Image.fromarray(np.stack([255 * y.astype(np.uint8)] * 3, -1)),
    "grey.tif": lambda y: Image.fromarray(255 * y.astype(np.uint8)),
}


@pytest.fixture
def folders(tmp_path):
    """Six 8-bit maps and their masks; the place of both."""
    p, y = data()
    for i, (one, label) in enumerate(zip(p, y, strict=True)):
        save(tmp_path / "maps" / f"{i}.png", bytes_of(one))
        save(tmp_path / "masks" / f"{i}.png", 255 * label.astype(np.uint8))
    return tmp_path


def call(*arguments):
    return main([str(one) for one in arguments])


def measured(tmp_path, *more, maps="maps", masks="masks"):
    assert (
        call("measure", tmp_path / maps, tmp_path / masks, "--json", tmp_path / "o.json", *more)
        == 0
    )
    return json.loads((tmp_path / "o.json").read_text("utf-8"))


def refused(capsys, *arguments):
    """The reason of a refusal."""
    capsys.readouterr()
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("sc-bce: error: ")]
    return line.removeprefix("sc-bce: error: ")


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_map_is_the_histogram_of_its_values(kind, tmp_path):
    p, y = data()
    histogram = CalibrationHistogram()
    for i, (one, label) in enumerate(zip(p, y, strict=True)):
        written = WRITERS[kind](one)
        save(tmp_path / "maps" / f"{i}.{kind}", written)
        save(tmp_path / "masks" / f"{i}.{kind.split('.')[0]}.npy", label)
        if kind == "colour.png":
            written = written[..., 0]
        if written.dtype == np.uint16:
            written = np.float32(written / 65535)
        x = written if written.dtype == np.uint8 else written.astype(np.float64)
        histogram.update(x.reshape(label.shape), label, from_logits=False)
    values = measured(tmp_path)["measures"]
    for name, value in histogram.to_dict().items():
        assert values[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask_is_read_alike(kind, folders):
    wanted = measured(folders)
    for i, label in enumerate(data()[1]):
        path = folders / "others" / f"{i}.{kind.split('.')[1]}"
        path.parent.mkdir(exist_ok=True)
        MASKS[kind](label).save(path)
    assert measured(folders, masks="others") == wanted


def test_the_answers(folders, capsys):
    files = [folders / name for name in ("o.csv", "o.png")]
    values = measured(folders, "--csv", files[0], "--plot", files[1])
    printed = capsys.readouterr().out
    p, y = data()
    images = ImageHistograms()
    images.update(torch.from_numpy(bytes_of(p))[:, None], torch.from_numpy(y)[:, None])
    histogram = images.histogram()
    assert "6 maps" in printed
    assert f"slope               {values['measures']['slope']:12.4f}" in printed
    assert "Over-confident" in printed
    assert "95 % intervals" in printed
    value, low, high = values["intervals"]["slope"]
    assert low < value < high
    # The histogram of an image has a hundred cells, whose mean logit is told in two ways.
    assert value == pytest.approx(float(histogram.slope()), rel=2e-3)
    rows = list(csv.DictReader(files[0].read_text("utf-8").splitlines()))
    assert [row["name"] for row in rows] == [str(i) for i in range(6)]
    for name, column in images.per_image().items():
        lines = name in ("slope", "intercept")
        near = {"rel": 1e-2, "abs": 5e-3} if lines else {"rel": 1e-6, "abs": 1e-9}
        assert [float(row[name]) for row in rows] == pytest.approx(
            column.tolist(), nan_ok=True, **near
        ), name
    with Image.open(files[1]) as picture:
        assert picture.size[0] > 300


def test_ignored_pixels_and_many_maps(tmp_path):
    p, y = data(130)  # more than are counted together
    histogram = CalibrationHistogram()
    for i, (one, label) in enumerate(zip(p, y, strict=True)):
        label = label.astype(np.uint8)
        label[:3] = 255
        save(tmp_path / "maps" / f"{i:03}.png", bytes_of(one))
        save(tmp_path / "masks" / f"{i:03}.png", label)
        histogram.update(bytes_of(one), label, ignore_index=255)
    values = measured(tmp_path, "--ignore", 255)
    assert values["measures"]["count"] == 130 * 9 * 10
    for name, value in histogram.to_dict().items():
        assert float(values["measures"][name]) == pytest.approx(value), name


@pytest.mark.parametrize(("labels", "bytes"), [(None, True), (2, True), (None, False)])
def test_memory_does_not_grow_with_the_maps(labels, bytes):
    """Neighbours become one image of the intervals; the rows of a table stay those of each map."""
    given = Namespace(labels=labels, logits=False, csv="rows.csv")
    groups = [Tally(number, given, True).group for number in (3, 1000, 1001, 2000, 10**6)]
    assert groups == [1, 1, 2, 2, 1024]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (70, labels or 1, 30), generator=generator, dtype=torch.uint8)
    y = (torch.rand(x.shape, generator=generator) < x / 255).to(torch.uint8)
    x = x if bytes else x / 255
    tally = Tally(70, given, True)
    tally.group = 2
    for one, label in zip(x, y, strict=True):
        tally.add(one, label)
    tally.flush()
    tally.gather()
    pairs, each = ImageHistograms(labels), ImageHistograms(labels)
    each.update(x, y, from_logits=False)
    two = (one.reshape(35, 2, -1, 30).transpose(1, 2).flatten(2) for one in (x, y))
    pairs.update(*two, from_logits=False)
    for name in ("count", "nll", "ece"):
        got, wanted = tally.images.per_image()[name], pairs.per_image()[name]
        torch.testing.assert_close(got, wanted)
        rows = [row[name] for row in tally.rows]
        assert rows == pytest.approx(each.per_image()[name].flatten().tolist())


@pytest.mark.parametrize("indices", [True, False])
def test_labels(indices, tmp_path, capsys):
    p, _ = data(12, (3, *SIZE))
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 3, (12, *SIZE))
    target = np.stack([classes == i for i in range(3)], 1)
    for i in range(12):
        save(tmp_path / "maps" / f"{i:02}.npy", p[i].astype(np.float32))
        mask = classes[i].astype(np.uint8) if indices else target[i]
        save(tmp_path / "masks" / (f"{i:02}.png" if indices else f"{i:02}.npy"), mask)
    table = tmp_path / "o.csv"
    values = measured(tmp_path, "--labels", 3, "--csv", table, "--plot", tmp_path / "o.png")
    histogram = CalibrationHistogram(3)
    histogram.update(p.astype(np.float32), target, from_logits=False)
    assert values["measures"]["nll"] == pytest.approx(histogram.nll().tolist())
    assert len(values["intervals"]) == 3
    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    assert [(row["name"], row["label"]) for row in rows[2:4]] == [("00", "2"), ("01", "0")]
    save(tmp_path / "masks" / ("03.png" if indices else "03.npy"), np.full(SIZE, 7, np.uint8))
    said = refused(capsys, "measure", tmp_path / "maps", tmp_path / "masks", "--labels", 3)
    assert "03." in said
    assert "holds class 7, but --labels 3 has 0 to 2" in said


def test_folders_inside_folders_and_globs(folders):
    wanted = measured(folders)
    (folders / "maps" / "deep").mkdir()
    (folders / "maps" / "3.png").rename(folders / "maps" / "deep" / "3.png")
    assert measured(folders) == wanted
    # A stem that occurs twice: the folders are part of the name, on both sides.
    for side in ("maps", "masks"):
        for folder, taken in (("one", "0.png"), ("two", "1.png")):
            (folders / f"deep {side}" / folder).mkdir(parents=True)
            (folders / side / taken).rename(folders / f"deep {side}" / folder / "same.png")
    deep = measured(folders, maps="deep maps", masks="deep masks")
    assert deep["maps"] == 2
    globs = ("measure", f"{folders}/deep maps/*/*.png", f"{folders}/deep masks/**/*.png")
    assert call(*globs, "--json", folders / "o.json") == 0
    assert json.loads((folders / "o.json").read_text("utf-8")) == deep
    single = measured(folders, maps="maps/2.png", masks="masks/4.png")  # one each: no name needed
    assert single["maps"] == 1
    assert single["intervals"] == {}


def test_stretched_maps_are_named(folders, capsys):
    assert not measured(folders)["stretched"]
    assert capsys.readouterr().err == ""
    for i, p in enumerate(data()[0]):
        save(folders / "maps" / f"{i}.png", bytes_of((p - p.min()) / (p.max() - p.min())))
    assert measured(folders)["stretched"]
    assert "stretched to [0, 1] image by image" in capsys.readouterr().err


def test_resize_only_if_asked(folders, capsys):
    save(folders / "maps" / "2.png", bytes_of(data(1, (24, 20))[0][0]))
    said = refused(capsys, "measure", folders / "maps", folders / "masks")
    assert "2.png: has size (24, 20), but" in said
    assert "has (12, 10); --resize" in said
    assert measured(folders, "--resize")["measures"]["count"] == 6 * 120


def test_what_is_wrong_is_named(folders, capsys):
    def said(*more):
        return refused(capsys, "measure", folders / "maps", folders / "masks", *more)

    extra = folders / "maps" / "7.png"
    save(extra, np.zeros(SIZE, np.uint8))
    assert said().startswith(f"{extra}: has no mask of this name (1 such files)")
    extra.rename(folders / "masks" / "8.png")
    assert "8.png: has no prediction of this name" in said()
    (folders / "masks" / "8.png").unlink()

    save(folders / "maps" / "1.npy", np.zeros(SIZE))
    assert "1.npy beside it has the same name" in said()
    (folders / "maps" / "1.png").unlink()
    for value, words in (
        (np.full(SIZE, 3.5), "1.npy: holds values from 3.5 to 3.5.*save it as uint8"),
        (np.full(SIZE, -3.5), "1.npy: holds values from -3.5 to -3.5.*logits, pass --logits"),
        (np.full(SIZE, np.nan), "1.npy: holds"),
        (np.zeros(SIZE, bool), "1.npy: holds bool"),
        (np.zeros((3, *SIZE)), r"has size \(3, 12, 10\).*is it a map per label\? pass --labels"),
    ):
        save(folders / "maps" / "1.npy", value)
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(said())
    (folders / "maps" / "1.npy").write_bytes(b"nothing")
    assert "1.npy: can't be read" in said()


def test_masks_that_are_no_labels_are_refused(folders, capsys):
    def said(value, *more):
        save(folders / "masks" / "1.png", value)
        return refused(capsys, "measure", folders / "maps", folders / "masks", *more)

    mask = np.zeros(SIZE, np.uint8)
    mask[0] = 37
    assert "1.png: holds 37; labels are 0 and 1, or 0 and 255; --ignore 37" in said(mask)
    shades = np.arange(mask.size, dtype=np.uint8).reshape(SIZE)
    assert "so many values are a map, whose folder comes first, or class numbers" in said(shades)
    mask[0], mask[1] = 1, 255
    text = said(mask)
    assert "holds 255, and" in text
    assert "if 255 is ignored, pass --ignore 255" in text
    for i in range(6):
        save(folders / "masks" / f"{i}.png", np.full(SIZE, 255, np.uint8))
    assert "the masks hold no pixel of class 0" in said(np.full(SIZE, 255, np.uint8))
    assert "is it what --ignore leaves out?" in said(mask * 0, "--ignore", 255)
    # As tifffile writes bools, and as Pillow reads them with black and white exchanged.
    path = folders / "masks" / "1.tif"
    Image.fromarray(mask > 0).save(path, tiffinfo={262: 0})
    (folders / "masks" / "1.png").unlink()
    text = refused(capsys, "measure", folders / "maps", folders / "masks")
    assert "1.tif: is a TIFF whose zeros are white" in text
    path.write_bytes(b"II*\0nothing")
    text = refused(capsys, "measure", folders / "maps", folders / "masks")
    assert "1.tif: can't be read" in text
    assert "a TIFF may hold 8 or 16 bits, or float32" in text
    path.unlink()
    colour = np.zeros((*SIZE, 3), np.uint8)
    colour[..., 0] = 9
    assert "1.png: is in colour" in said(colour)


def test_arguments_that_lead_nowhere(folders, capsys):
    maps, masks = folders / "maps", folders / "masks"
    assert "nothing: no such file" in refused(capsys, "measure", folders / "nothing", masks)
    (folders / "empty").mkdir()
    assert "empty: the folder holds none of .png" in refused(
        capsys, "measure", folders / "empty", masks
    )
    away = folders / "away" / "o.json"
    assert f"{away}: its folder does not exist" in refused(
        capsys, "measure", maps, masks, "--json", away
    )
    assert "leave out --logits" in refused(capsys, "measure", maps, masks, "--logits")
    with pytest.raises(SystemExit) as left:
        main(["measure"])
    assert left.value.code == 2


@pytest.mark.parametrize("kind", ["isotonic", "affine", "temperature"])
def test_repair_and_apply(kind, folders):
    file, out = folders / "repair.pt", folders / "out"
    assert call("repair", folders / "maps", folders / "masks", "-o", file, "--kind", kind) == 0
    kept = torch.load(file, weights_only=True)
    build = {"IsotonicCalibration": IsotonicCalibration, "TemperatureScaling": TemperatureScaling}
    loaded = build[kept["repair"]](**kept["settings"])
    loaded.load_state_dict(kept["state"])
    p, y = data()
    wanted = build[kept["repair"]](**kept["settings"])
    histogram = CalibrationHistogram()
    histogram.update(bytes_of(p), y)
    wanted.fit(histogram)
    x = torch.from_numpy(bytes_of(p))
    torch.testing.assert_close(loaded(x), wanted(x), rtol=1e-6, atol=1e-7)
    assert call("apply", file, folders / "maps", "-o", out) == 0
    for i in range(6):
        with Image.open(out / f"{i}.png") as picture:
            got = np.asarray(picture).astype(np.float64) / 65535
        assert np.abs(got - loaded(x[i]).numpy()).max() < 2e-5
        assert got.min() > 0
        assert got.max() < 1
    assert abs(measured(folders, maps="out")["measures"]["slope"] - 1) < 0.05


def test_repair_of_logits_and_labels(tmp_path, capsys):
    p, y = data(20, (2, *SIZE))
    z = np.log(p / (1 - p)).astype(np.float32)
    for i in range(20):
        save(tmp_path / "maps" / "a" / f"{i:02}.npy", z[i])
        save(tmp_path / "masks" / f"{i:02}.npy", y[i])
    file, both = tmp_path / "repair.pt", (tmp_path / "maps", tmp_path / "masks")
    more = ("--logits", "--labels", 2, "--kind", "affine")
    assert call("repair", *both, *more, "-o", file) == 0
    assert "temperature=[" in capsys.readouterr().out
    assert call("apply", file, tmp_path / "maps", "-o", tmp_path / "out") == 0
    got = np.load(tmp_path / "out" / "a" / "03.npy")
    scaling = TemperatureScaling(bias=True, num_labels=2)
    histogram = CalibrationHistogram(2)
    histogram.update(z, y)
    scaling.fit(histogram)
    np.testing.assert_allclose(got, scaling(torch.from_numpy(z[3:4]))[0], rtol=1e-4, atol=1e-4)
    save(tmp_path / "three.npy", np.zeros((3, *SIZE)))
    said = refused(capsys, "apply", file, tmp_path / "three.npy", "-o", tmp_path / "x")
    assert "three.npy: has size (3, 12, 10), whose first dimension is not 2 labels" in said
    said = refused(capsys, "apply", both[0] / "a" / "00.npy", both[0], "-o", tmp_path / "x")
    assert "00.npy: is no repair that `sc-bce repair` of this version wrote" in said


def test_onnx(folders, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    shape = ["batch", 1, "height", "width"]
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("image", "map")]
    graph = helper.make_graph(
        [helper.make_node("Sigmoid", ["image"], ["map"])], "g", values[:1], values[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, folders / "model.onnx")
    file, made = folders / "repair.pt", folders / "made.onnx"
    assert call("repair", folders / "maps", folders / "masks", "-o", file) == 0
    assert call("onnx", folders / "model.onnx", file, "-o", made) == 0
    assert "onnxruntime answers as torch does" in capsys.readouterr().out
    assert onnx.load(made).graph.output == model.graph.output
    arguments = ("onnx", folders / "model.onnx", file, "-o", made, "--output", "other")
    assert "be one of 'map', but got 'other'" in refused(capsys, *arguments)
    said = refused(capsys, "onnx", folders / "maps" / "0.png", file, "-o", made)
    assert "0.png: is no ONNX file" in said


def test_it_runs_as_a_module_and_without_what_it_needs(folders):
    command = [sys.executable, "-m", "sc_bce", "measure", folders / "maps", folders / "masks"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 maps" in done.stdout
    hidden = (
        "import sys; sys.modules['PIL'] = None; from sc_bce.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden, *command[3:]], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install numpy pillow tqdm" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["measure", "repair", "apply", "onnx"])
def test_help_has_two_examples(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert out.count(f"  sc-bce {command} ") >= 2
    assert ("  masks/NAME.png   0 and 1" in out) == (command in ("measure", "repair"))
