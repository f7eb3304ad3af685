"""Small saliency data, built in or from a folder, and the small network that is trained on it.

The built-in scenes need no download: scikit-learn ships 1,797 real handwritten digits and two
real photographs. Digits are the objects, photograph crops the background, strokes and blur make
the edges truly uncertain, and the masks are exact.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor, nn

Pixels = NDArray[np.uint8]

SUFFIXES = {".png", ".jpg", ".jpeg"}
VOID = 255  # in a map of labels: says nothing
SHARES = (0.60, 0.15, 0.25)  # train, validation, test


@dataclass(frozen=True)
class Split:
    """Images (N, H, W, 3) in 0..255 and masks (N, H, W) in 0/1, as bytes: quick to send around."""

    images: Pixels
    masks: Pixels

    def __len__(self) -> int:
        return len(self.images)

    def thin(self, count: int) -> "Split":
        """At most ``count`` samples, evenly spaced, so that a quick run sees the whole range."""
        kept = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return Split(self.images[kept], self.masks[kept])


@dataclass(frozen=True)
class SaliencyData:
    """Train, validation and test samples of one kind, and images without any object (``ood``)."""

    name: str
    train: Split
    val: Split
    test: Split
    ood: Split

    def fingerprint(self) -> str:
        """A short hash of every pixel, so that kept runs are never mixed with other data."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test, self.ood):
            digest.update(str(split.images.shape).encode())
            digest.update(np.ascontiguousarray(split.images).tobytes())
            digest.update(np.ascontiguousarray(split.masks).tobytes())
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------- the built-in scenes


def photographs() -> tuple[Pixels, Pixels]:
    """The two photographs of scikit-learn, (427, 640, 3): a pagoda by a lake, and a dahlia."""
    from sklearn.datasets import load_sample_images

    pagoda, dahlia = load_sample_images().images
    return pagoda, dahlia


def digit_scenes(
    size: int, train: int, val: int, test: int, ood: int, seed: int = 0
) -> SaliencyData:
    """Digits over photograph crops; nothing is shared between train, validation and test.

    Digits are split in their stored order, which keeps most of the 13 writers apart. The pagoda
    photograph is cut into tiles, and each tile belongs to one split. Out of distribution are
    crops of the dahlia, which no training image shows, without any digit.
    """
    from sklearn.datasets import load_digits

    digits = (load_digits().images * (255 / 16)).astype(np.uint8)
    pagoda, dahlia = photographs()
    tiles = _tiles(pagoda)
    rng = np.random.default_rng(seed)
    groups = zip((train, val, test), _cut(digits), _group_tiles(tiles), strict=True)
    splits = [_scenes(count, size, part, group, rng) for count, part, group in groups]
    blossom = dahlia[80:360, 170:450]
    crops = [_random_crop([blossom], size, 40, 80, rng) for _ in range(ood)]
    empty = _empty([_through_lens(crop, rng) for crop in crops])
    return SaliencyData("digits", splits[0], splits[1], splits[2], empty)


def _cut(items: Pixels) -> list[Pixels]:
    """The 60/15/25 split of a sequence in its given order."""
    first, second = (round(len(items) * s) for s in (SHARES[0], SHARES[0] + SHARES[1]))
    return [items[:first], items[first:second], items[second:]]


def _tiles(photo: Pixels, rows: int = 5, columns: int = 8) -> list[list[Pixels]]:
    """The photograph as a grid of about 80 x 80 pixel tiles."""
    return [np.array_split(band, columns, axis=1) for band in np.array_split(photo, rows, axis=0)]


def _group_tiles(grid: list[list[Pixels]]) -> tuple[list[Pixels], list[Pixels], list[Pixels]]:
    """3/5, 1/5 and 1/5 of the tiles, a knight's move apart: every part of the view is in each."""
    groups: tuple[list[Pixels], list[Pixels], list[Pixels]] = ([], [], [])
    for i, row in enumerate(grid):
        for j, tile in enumerate(row):
            groups[(0, 0, 0, 1, 2)[(2 * i + j) % 5]].append(tile)
    return groups


def _random_crop(
    sources: Sequence[Pixels], size: int, low: int, high: int, rng: np.random.Generator
) -> Image.Image:
    """A square window of ``low`` to ``high`` pixels of one source, maybe mirrored, resized."""
    source = sources[int(rng.integers(len(sources)))]
    side = int(min(rng.integers(low, high + 1), *source.shape[:2]))
    top, left = (int(rng.integers(0, length - side + 1)) for length in source.shape[:2])
    window = Image.fromarray(source[top : top + side, left : left + side])
    window = window.resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(window) if rng.random() < 0.5 else window


def _empty(images: Sequence[Pixels]) -> Split:
    """Images without any object: their true mask is all background."""
    stack = np.stack(images)
    return Split(stack, np.zeros(stack.shape[:3], np.uint8))


def _scenes(
    count: int, size: int, digits: Pixels, tiles: list[Pixels], rng: np.random.Generator
) -> Split:
    """``count`` scenes with one to three digits each."""
    pairs = [_scene(size, digits, tiles, rng) for _ in range(count)]
    return Split(np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs]))


def _scene(
    size: int, digits: Pixels, tiles: list[Pixels], rng: np.random.Generator
) -> tuple[Pixels, Pixels]:
    """One scene: crop, strokes that resemble digits, digits, then blur and noise over all of it."""
    canvas = _random_crop(tiles, size, 40, 80, rng)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(2, 5)):
        _paint(canvas, _stroke(size, rng), rng)
    for _ in range(rng.integers(1, 4)):
        shape = _digit(size, digits, rng)
        _paint(canvas, shape, rng)
        mask |= (np.asarray(shape) >= 128).astype(np.uint8)
    return _through_lens(canvas, rng), mask


def _through_lens(canvas: Image.Image, rng: np.random.Generator) -> Pixels:
    """Blur and noise as of a small camera, the same for scenes and for crops without a digit."""
    scale = canvas.width / 32
    blurred = canvas.filter(ImageFilter.GaussianBlur(scale * rng.uniform(0.4, 1.2)))
    noise = rng.normal(0, 6, (canvas.height, canvas.width, 3))
    seen: Pixels = (np.asarray(blurred) + noise).round().clip(0, 255).astype(np.uint8)
    return seen


def _paint(canvas: Image.Image, shape: Image.Image, rng: np.random.Generator) -> None:
    """Paint one random colour through ``shape``, half to fully opaque."""
    colour = tuple(int(v) for v in rng.integers(0, 256, 3))
    opacity = float(rng.uniform(0.4, 1.0))
    canvas.paste(colour, (0, 0), shape.point(lambda v: round(v * opacity)))


def _digit(size: int, digits: Pixels, rng: np.random.Generator) -> Image.Image:
    """One digit, enlarged from 8 x 8 pixels, turned a little, somewhere on an empty plane."""
    side = int(size * rng.uniform(0.4, 0.7))
    glyph = Image.fromarray(digits[rng.integers(len(digits))])
    glyph = glyph.resize((side, side), Image.Resampling.BICUBIC)
    glyph = glyph.rotate(float(rng.uniform(-25, 25)), Image.Resampling.BICUBIC, expand=True)
    plane = Image.new("L", (size, size))
    left, top = (int(rng.integers(0, max(size - length, 0) + 1)) for length in glyph.size)
    plane.paste(glyph, (left, top))
    return plane


def _stroke(size: int, rng: np.random.Generator) -> Image.Image:
    """An arc or a line about as wide as the digits' own strokes."""
    plane = Image.new("L", (size, size))
    draw = ImageDraw.Draw(plane)
    width = max(1, round(size * rng.uniform(0.04, 0.09)))
    box = rng.uniform(0, size, 2)
    reach = size * rng.uniform(0.2, 0.5, 2)
    start = float(rng.uniform(0, 360))
    if rng.random() < 0.5:
        corners = [*map(float, box - reach / 2), *map(float, box + reach / 2)]
        draw.arc(corners, start, start + float(rng.uniform(90, 300)), fill=255, width=width)
    else:
        turn = np.deg2rad(start)
        step = reach[0] * np.array([np.cos(turn), np.sin(turn)])
        draw.line([*map(float, box - step / 2), *map(float, box + step / 2)], 255, width)
    return plane


# ---------------------------------------------------------------- a folder of images and masks

LAYOUTS = """\
layouts of a folder, PNG or JPEG files of equal names:

  one label, split 60/15/25 in the order of names:
    FOLDER/images/NAME.jpg
    FOLDER/masks/NAME.png          0 and 255, or 0 and 1

  several labels, split by you:
    FOLDER/train/images/NAME.jpg   and the same in val and test
    FOLDER/train/labels/NAME.png   0 to LABELS - 1; LABELS or 255 is void

  A map has the size of its image. Of a palette image the indices count, not the colours;
  transparency is refused. Each part needs pixels of both classes.
"""


def folder_data(folder: Path, size: int, ood: int, seed: int = 0) -> SaliencyData:
    """``folder/images`` and ``folder/masks``, equal stems, split 60/15/25 in the order of names.

    Out of distribution are close crops of scikit-learn's photographs: foliage, roof tiles, water
    and petals without any whole object.
    """
    images, masks = files_of(folder / "images"), files_of(folder / "masks")
    _check_stems(folder, images, masks)
    pairs = [_load_pair(images[stem], masks[stem], size) for stem in sorted(images)]
    parts = [_cut(np.stack(arrays)) for arrays in zip(*pairs, strict=True)]
    splits = [Split(x, y) for x, y in zip(*parts, strict=True)]
    rng, photos = np.random.default_rng(seed), photographs()
    crops = [np.asarray(_random_crop(photos, size, 48, 96, rng)) for _ in range(ood)]
    return SaliencyData(folder.resolve().name, splits[0], splits[1], splits[2], _empty(crops))


def files_of(folder: Path) -> dict[str, Path]:
    """The PNG and JPEG files of a folder by stem."""
    if not folder.is_dir():
        raise ValueError(f"Expected a folder {folder}, but there is none: fix the path")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in files:
            raise ValueError(f"{files[path.stem]} and {path} share one stem: keep one of the two")
        files[path.stem] = path
    if not files:
        raise ValueError(f"Expected PNG or JPEG files in {folder}, but there are none")
    return files


def _check_stems(folder: Path, images: dict[str, Path], masks: dict[str, Path]) -> None:
    """One mask per image and one image per mask, and enough of them to split."""
    for stem in sorted(images.keys() - masks.keys()):
        raise ValueError(f"{images[stem]} has no mask: add {folder / 'masks' / stem}.png")
    for stem in sorted(masks.keys() - images.keys()):
        raise ValueError(f"{masks[stem]} has no image: add {folder / 'images' / stem}.png")
    if len(images) < 20:
        raise ValueError(f"Expected at least 20 images in {folder / 'images'}, got {len(images)}")


def open_image(path: Path) -> Image.Image:
    """The decoded image, turned upright as its camera says."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} can't be read as an image ({error}): replace or remove it"
        ) from error


def open_pair(image_path: Path, map_path: Path) -> tuple[Image.Image, NDArray[Any]]:
    """A photograph and the numbers of its map, which cover the same pixels."""
    image, numbers = open_image(image_path), _numbers(map_path)
    if image.size != numbers.shape[::-1]:
        turned = _orientation(image_path) > 1 and image.size == numbers.shape
        raise ValueError(
            f"{image_path} has {image.width} x {image.height} pixels but {map_path} has "
            f"{numbers.shape[1]} x {numbers.shape[0]}: the two must be equal"
            + (" (the photograph is turned by its EXIF orientation)" if turned else "")
        )
    with Image.open(image_path) as stored:
        if _orientation(image_path) != _orientation(map_path) and stored.size == image.size:
            raise ValueError(
                f"{image_path} is turned by its EXIF orientation and {map_path} fits it turned and "
                "unturned: save the photograph upright, without the orientation"
            )
    return image.convert("RGB"), numbers


def _orientation(path: Path) -> int:
    """1 is upright."""
    with Image.open(path) as image:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _numbers(path: Path) -> NDArray[Any]:
    """(H, W): the grey values of a map, or the indices of a palette, never its colours."""
    image = open_image(path)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        raise ValueError(
            f"{path} has transparent pixels (mode {image.mode}), which may be the object or what "
            "surrounds it: save it as grey values without transparency"
        )
    palette = image.getpalette() if image.mode == "P" else None
    if palette is not None and palette[:6] == [255, 255, 255, 0, 0, 0]:
        raise ValueError(f"Index 0 of {path} is white and 1 is black: save it as grey values")
    if path.suffix.lower() != ".png" and image.mode == "RGB":  # a JPEG of grey values
        image = image.convert("L")
    numbers = np.asarray(image)
    if numbers.ndim == 3 and (numbers == numbers[..., :1]).all():
        numbers = numbers[..., 0]
    if numbers.ndim != 2:
        raise ValueError(f"{path} holds colours (mode {image.mode}): save it as numbers of classes")
    return numbers


def _resized(image: Image.Image, size: int) -> Pixels:
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _load_pair(image_path: Path, mask_path: Path, size: int) -> tuple[Pixels, Pixels]:
    image, numbers = open_pair(image_path, mask_path)
    levels = Image.fromarray(_two_levels(numbers, mask_path) * 255)
    # the mean over each new pixel's area: a pixel is object where at least half of it is
    small = np.asarray(levels.resize((size, size), Image.Resampling.BOX))
    return _resized(image, size), (small >= 128).astype(np.uint8)


def _two_levels(mask: NDArray[Any], path: Path) -> Pixels:
    """0/255 or 0/1 as 0/1; JPEG blurs edges, so there a twentieth of the pixels may lie between."""
    if mask.max() <= 1:
        return mask.astype(np.uint8)
    lossy = path.suffix.lower() != ".png"
    slack, share = (16, 0.05) if lossy else (0, 0.0)
    between = ((mask > slack) & (mask < 255 - slack)) | (mask > 255)
    if between.mean() > share:
        levels = np.unique(mask)
        found = ", ".join(str(level) for level in levels[:5])
        void = levels[-1] == VOID and not lossy
        raise ValueError(
            f"Expected {path} to hold only 0 and 255, or only 0 and 1, but got {found}, ...: "
            + (
                f"{VOID} beside other numbers is void, which only the layout of train, val and "
                "test has"
                if void
                else "threshold it first"
            )
        )
    return (mask >= 128).astype(np.uint8)


# ---------------------------------------------------------------- tensors and the network


def to_tensors(split: Split) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), centred and scaled, and masks (N, 1, H, W), both float32."""
    images = torch.from_numpy(np.ascontiguousarray(split.images)).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.ascontiguousarray(split.masks)).unsqueeze(1)
    return (images.float() / 255 - 0.5) / 0.25, masks.float()


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each normalised and rectified."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class SmallUNet(nn.Module):
    """A U-Net of three scales, under 200,000 parameters at width 16."""

    def __init__(self, width: int, labels: int = 1) -> None:
        super().__init__()
        self.fine = _block(3, width)
        self.middle = _block(width, 2 * width)
        self.coarse = _block(2 * width, 4 * width)
        self.up_middle = _block(6 * width, 2 * width)
        self.up_fine = _block(3 * width, width)
        self.head = nn.Conv2d(width, labels, 1)
        self.down = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, labels, H, W); H and W must be multiples of 4."""
        fine = self.fine(images.contiguous(memory_format=torch.channels_last))  # quicker on a CPU
        middle = self.middle(self.down(fine))
        coarse = self.coarse(self.down(middle))
        middle = self.up_middle(torch.cat([self.up(coarse), middle], 1))
        logits: Tensor = self.head(self.up_fine(torch.cat([self.up(middle), fine], 1)))
        return logits
