"""The page of a network in use: which images, what they become, and the tables of the results."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from benchmarks.study import in_use


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(200):
        (tmp_path / "images" / f"{i:04}.jpg").touch()
    return tmp_path


def test_fewer_images_are_among_the_more_and_halves_stay_apart(folder):
    sizes = (10, 20, 40, 200)
    picked = [in_use.chosen(folder, size) for size in sizes]
    for size, (fitted, shown, worse) in zip(sizes, picked, strict=True):
        assert len(fitted) == len(shown) == size / 2
        assert not set(fitted) & set(shown)
        assert set(worse) <= set(shown)
    for few, many in pairwise(picked):
        assert all(set(one) <= set(other) for one, other in zip(few, many, strict=True))
    with pytest.raises(ValueError, match=r"Expected one of .10, 20, 40, 50, 100, 200. images, but"):
        in_use.chosen(folder, 60)


def test_a_model_is_put_together_from_its_chunks(tmp_path):
    (tmp_path / "dist").mkdir()
    for name in ("a", "b"):
        (tmp_path / "dist" / name).write_bytes(name.encode() * 3)
    chunks = [{"hash": "b"}, {"hash": "a"}]
    resources = {"/models/small": {"chunks": chunks, "size": 6}}
    (tmp_path / "dist" / "resources.json").write_text(json.dumps(resources))
    assert in_use.assembled(tmp_path, "quantised") == b"bbbaaa"
    resources["/models/small"]["size"] = 7
    (tmp_path / "dist" / "resources.json").write_text(json.dumps(resources))
    with pytest.raises(ValueError, match="Expected 7 bytes of quantised, but got 6"):
        in_use.assembled(tmp_path, "quantised")


def test_images_are_made_worse_the_same_every_time():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert in_use.condition("clean", image, "0007") is image
    for kind in in_use.KINDS:
        first, again = (in_use.condition(kind, image, "0007") for _ in range(2))
        assert (first == again).all()
        assert (first != image).any()
    assert in_use.condition("darkness", image, "0007").max() <= 64


def test_maps_shrink_to_their_masks_after_a_repair_inside_and_before_one_after(tmp_path):
    for part in ("masks", "one/clean"):
        (tmp_path / part).mkdir(parents=True)
    Image.fromarray(np.uint8([[0, 255]])).save(tmp_path / "masks" / "a.png")
    large = np.float32([[0.0, 0.2, 1.0, 1.0], [0.2, 0.0, 1.0, 1.0]])
    np.save(tmp_path / "one" / "clean" / "a.npy", large)
    maps = in_use.Maps(tmp_path, tmp_path, "one")
    ((x, y),) = maps(["a"])
    assert y.tolist() == [[False, True]]
    assert x.shape == (1, 2)
    assert x[0, 0] < 0.3
    ((after, _),) = maps(["a"], after=lambda p: p**2)
    np.testing.assert_allclose(after, x**2)
    ((inside, _),) = maps(["a"], inside=lambda p: p**2)
    assert inside[0, 0] != pytest.approx(float(after[0, 0]))


def test_the_tables_of_the_page_are_the_committed_results():
    page = in_use.PAGE.read_text("utf-8")
    assert page.count("<!-- end -->") == 3
    assert in_use.filled(page, in_use.load()) == page
    spoilt = page.replace("| affine |", "| affin |")
    assert in_use.filled(spoilt, in_use.load()) == page != spoilt


def test_numbers_are_written_as_the_page_has_them():
    assert in_use.cell([0.1234, -0.05, 1.5], 2) == ".12 [-.05, 1.50]"
    assert in_use.cell(["inf", "nan", "nan"]) == "∞"
