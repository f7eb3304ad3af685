"""The tasks: scenes that are made, folders that are read, and what is refused."""

import numpy as np
import pytest
import torch
from folders import paint, pave
from PIL import Image

from benchmarks.data import tasks
from benchmarks.data.scenes import SmallUNet, digit_scenes, folder_data

COUNTS = dict(train=12, val=6, test=8, ood=5)


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
