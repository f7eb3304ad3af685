"""Maps and masks in files, for the command line: found, matched, read, and written."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGES = (".png", ".tif", ".tiff")
ARRAYS = (".npy", ".npz", ".pt")
_MANY = 40  # values that are no label, from which a mask must be a map
IGNORED = 255  # what marks an ignored element of a mask that was read

LAYOUT = """folders, at any depth, of files with equal stems (PNG, TIFF, .npy, .npz, .pt):
  maps/NAME.png    probabilities in 8 or 16 bits, or as floats
  masks/NAME.png   0 and 1, or 0 and 255; with --labels class numbers too
"""

Size = tuple[int, ...]


class Pair(NamedTuple):
    """A prediction and its mask, by the name that they share."""

    name: str
    prediction: Path
    mask: Path


# -- which files


def find(text: str) -> dict[str, Path]:
    """The files of a folder at any depth, of a glob, or a single one, by their paths in it."""
    path = Path(text)
    if path.is_file():
        if path.suffix.lower() not in IMAGES + ARRAYS:
            raise ValueError(f"{path}: is not one of {', '.join(IMAGES + ARRAYS)}")
        return {path.stem: path}
    inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(text, recursive=True))
    found = sorted(one for one in inside if one.suffix.lower() in IMAGES + ARRAYS)
    if not found:
        there = "the folder holds none of" if path.is_dir() else "no such file of"
        raise ValueError(f"{text}: {there} {', '.join(IMAGES + ARRAYS)}")
    root = path if path.is_dir() else os.path.commonpath([one.parent for one in found])
    named: dict[str, Path] = {}
    for one in found:
        name = one.relative_to(root).with_suffix("").as_posix()
        if name in named:
            raise ValueError(f"{one}: {named[name].name} beside it has the same name; keep one")
        named[name] = one
    return named


def pairs(predictions: str, masks: str) -> list[Pair]:
    """Each prediction with its mask."""
    first, other = find(predictions), find(masks)
    if len(first) == len(other) == 1:
        return [Pair(name, path, *other.values()) for name, path in first.items()]
    flat = [{path.stem: path for path in some.values()} for some in (first, other)]
    if all(len(one) == len(some) for one, some in zip(flat, (first, other), strict=True)):
        first, other = flat  # otherwise the folders are part of the name
    for one, two, partner in ((first, other, "mask"), (other, first, "prediction")):
        alone = [path for name, path in one.items() if name not in two]
        if alone:
            raise ValueError(
                f"{alone[0]}: has no {partner} of this name ({len(alone)} such files); names match "
                "without their suffixes, and a glob leaves files out"
            )
    return [Pair(name, first[name], other[name]) for name in sorted(first)]


def check_sizes(some: Sequence[Pair], labels: int | None, resize: bool) -> None:
    """Refuse the first pair whose sizes don't fit, before any pixel is read where that can be."""
    for pair in some:
        size, mask = size_of(pair.prediction), _stripped(size_of(pair.mask), None)
        size = check_labels(pair.prediction, size, labels)
        inner = size if labels is None else size[1:]
        fits = mask in (size, inner)
        if resize:
            fits = len(inner) == 2 and len(mask) in (len(size), 2)
        if not fits:
            many = "; is it a map per label? pass --labels" if inner[1:] == mask else ""
            remedy = "" if resize or many else "; --resize makes maps as large as their masks"
            raise ValueError(
                f"{pair.prediction}: has size {size}, but {pair.mask} has {mask}{many}{remedy}"
            )


def check_labels(path: Path, size: Size, labels: int | None) -> Size:
    """The size of a map, with its labels first."""
    size = _stripped(size, labels)
    if labels is not None and size[:1] != (labels,):
        raise ValueError(f"{path}: has size {size}, whose first dimension is not {labels} labels")
    return size


def _stripped(size: Size, labels: int | None) -> Size:
    """A size without the ones that say nothing."""
    if labels is None:
        return tuple(n for n in size if n != 1) or (1,)
    while len(size) > 1 and size[0] == 1 and size[0] != labels:
        size = size[1:]
    return size


# -- what they hold


def size_of(path: Path) -> Size:
    """The size of a map; of pictures and .npy files from the head of the file."""
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        return tuple(_array(path, head=suffix == ".npy").shape)
    from PIL import Image

    try:
        with Image.open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            return (frames,) * (frames > 1) + (picture.height, picture.width)
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error}){_hint(path)}") from error


def _hint(path: Path) -> str:
    return "; a TIFF may hold 8 or 16 bits, or float32" if ".tif" in path.suffix.lower() else ""


def _array(path: Path, head: bool = False) -> Any:
    """The numbers of a file, as they are, in an array."""
    import numpy as np

    try:
        if path.suffix.lower() == ".pt":
            value = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(value, Tensor):
                raise ValueError(f"it holds a {type(value).__name__}, not a tensor")
            value = value.detach()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r" if head else None, allow_pickle=False)
        with np.load(path, allow_pickle=False) as several:
            if len(several.files) != 1:
                raise ValueError(f"it holds {len(several.files)} arrays; save one")
            return several[several.files[0]]
    except ImportError:
        raise
    except Exception as error:  # each reader has its own
        raise ValueError(f"{path}: can't be read ({error})") from error


def _picture(path: Path, mask: bool) -> Any:
    """The pixels of a picture; of colours that are all grey, one channel."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            frames, pages = getattr(picture, "n_frames", 1), []
            for frame in range(frames):
                if frames > 1:
                    picture.seek(frame)
                pages.append(np.asarray(picture))
            mode, inverted = picture.mode, getattr(picture, "tag_v2", {}).get(262) == 0
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({error}){_hint(path)}") from error
    if inverted:
        remedy = "of which some readers exchange black and white; save it as uint8"
        raise ValueError(f"{path}: is a TIFF whose zeros are white, {remedy}")
    if mode in ("1", "P") and not mask:
        kind = "1-bit decisions" if mode == "1" else "a colour map"
        raise ValueError(f"{path}: holds {kind}, not probabilities; save grey values")
    pixels = np.stack(pages) if len(pages) > 1 else pages[0]
    if mode in ("LA", "RGB", "RGBA"):
        colours = pixels[..., : 1 if mode == "LA" else 3]
        if (colours != colours[..., :1]).any():
            raise ValueError(f"{path}: is in colour; save grey values, or a palette for a mask")
        pixels = colours[..., 0]
    if mode == "I" and pixels.min() >= 0 and pixels.max() <= 65535:  # 16-bit PNG, older Pillow
        return pixels.astype(np.uint16)
    return pixels.astype(np.uint8) if mode == "1" else pixels


def read_map(path: Path, labels: int | None = None, logits: bool = False) -> Tensor:
    """A prediction: uint8 of an 8-bit map, otherwise probabilities or logits, without ones."""
    pixels = _picture(path, False) if path.suffix.lower() in IMAGES else _array(path)
    pixels = pixels.reshape(_stripped(pixels.shape, labels))
    kind = pixels.dtype.name
    if kind in ("uint8", "uint16") and logits:
        raise ValueError(f"{path}: holds {kind}, which are probabilities; leave out --logits")
    if kind == "uint16":
        return torch.from_numpy(pixels.astype("float32") / 65535)
    if pixels.dtype.kind != "f" and kind != "uint8":
        raise ValueError(f"{path}: holds {kind}; save floats, or 8 or 16 bits without a sign")
    # In an order and of a dtype that torch reads, and a copy: a picture's can't be written to.
    dtype = kind if kind in ("uint8", "float64") else "float32"
    x = torch.from_numpy(pixels.astype(dtype, order="C"))
    if kind != "uint8" and x.numel():
        low, high = (float(end) for end in x.aminmax())
        if not logits and not (low >= 0 and high <= 1):
            scale = "save it as uint8" if low >= 0 and 1 < high <= 255 else "pass --logits"
            raise ValueError(
                f"{path}: holds values from {low:g} to {high:g}, which are not probabilities; if "
                f"these are {'0 to 255' if 'uint8' in scale else 'logits'}, {scale}"
            )
        if low != low or high != high:
            raise ValueError(f"{path}: holds nan; the network has diverged")
    return x


class Masks:
    """Reads masks: 0, 1 and 255 for ignored. Of all masks together 255 has one meaning."""

    def __init__(self, ignore: float | None, labels: int | None) -> None:
        self.ignore, self.labels = ignore, labels
        self._first: dict[int, Path] = {}
        self.classes = [0, 0]

    def read(self, path: Path, size: Size) -> Tensor:
        """The mask of a map of this size."""
        import numpy as np

        pixels = _picture(path, True) if path.suffix.lower() in IMAGES else _array(path)
        pixels = pixels.reshape(_stripped(pixels.shape, None))
        if pixels.dtype.kind not in "buif":
            raise ValueError(f"{path}: holds {pixels.dtype}; save 0 and 1")
        void = None
        if self.ignore is not None:
            nan = self.ignore != self.ignore
            void = np.isnan(pixels) if nan else pixels == self.ignore
            void = void if void.any() else None
        by_class = self.labels is not None and pixels.ndim < len(size)
        label = (self._classes if by_class else self._binary)(path, pixels, void)
        return torch.from_numpy(label)

    def _values(self, pixels: Any, void: Any) -> list[float]:
        import numpy as np

        kept = pixels if void is None else pixels[~void]
        if kept.dtype == np.uint8:
            return list(np.flatnonzero(np.bincount(kept.ravel(), minlength=256)).tolist())
        return list(np.unique(kept).tolist())

    def _binary(self, path: Path, pixels: Any, void: Any) -> Any:
        import numpy as np

        values = self._values(pixels, void)
        other = [value for value in values if value not in (0, 1, 255)]
        if other:
            soft = "; labels are 0 and 1, or 0 and 255" if self.ignore is None else ""
            remedy = f"--ignore {other[0]:g} leaves it out"
            if len(other) > _MANY:
                remedy = "so many values are a map, whose folder comes first, or class numbers, "
                remedy += "which take --labels"
            raise ValueError(f"{path}: holds {other[0]:g}{soft}; {remedy}")
        for value in (1, 255):
            if value in values:
                self._first.setdefault(value, path)
        if len(self._first) == 2:
            where = f"{self._first[1]} holds 1" if self._first[1] != path else "and 1"
            raise ValueError(
                f"{self._first[255]}: holds 255, and {where}: one of them is no label; if 255 is "
                "ignored, pass --ignore 255"
            )
        label = (pixels != 0).astype(np.uint8)
        if void is not None:
            label[void] = IGNORED
        return self._count(label, void)

    def _classes(self, path: Path, pixels: Any, void: Any) -> Any:
        """Index of the class to one label per class."""
        import numpy as np

        number = self.labels or 1
        high = [value for value in self._values(pixels, void) if not 0 <= value < number]
        if high:
            raise ValueError(
                f"{path}: holds class {high[0]:g}, but --labels {number} has 0 to "
                f"{number - 1}; --ignore {high[0]:g} leaves it out"
            )
        label = np.stack([pixels == one for one in range(number)]).astype(np.uint8)
        if void is not None:
            label[:, void] = IGNORED
        return self._count(label, void)

    def _count(self, label: Any, void: Any) -> Any:
        import numpy as np

        ones = int(np.count_nonzero(label == 1))
        self.classes[1] += ones
        ignored = 0 if void is None else int(np.count_nonzero(label == IGNORED))
        self.classes[0] += label.size - ones - ignored
        return label


def resized(x: Tensor, size: Size) -> Tensor:
    """A map, (H, W) or (C, H, W), as large as a mask: bilinear, of an 8-bit map probabilities."""
    x = x / 255 if x.dtype == torch.uint8 else x
    planes = x.reshape(1, -1, *x.shape[-2:])
    made = F.interpolate(planes, size=size[-2:], mode="bilinear", antialias=True)
    return made.reshape(*x.shape[:-2], *size[-2:])


def write_map(path: Path, x: Tensor, picture: bool) -> Path:
    """A repaired map: 16-bit PNG of probabilities, none of them 0 or 1, or .npy."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    if not picture or x.dim() != 2:
        path = path.with_name(path.name + ".npy")
        np.save(path, x.numpy())
        return path
    from PIL import Image

    path = path.with_name(path.name + ".png")
    grey = (x.double() * 65535).round().clamp(1, 65534).numpy().astype(np.uint16)
    Image.fromarray(grey).save(path)
    return path


def read_all(
    some: Sequence[Pair], masks: Masks, logits: bool, resize: bool
) -> Iterator[tuple[Pair, Tensor, Tensor]]:
    """Each pair in turn: the map, and its mask of 0, 1 and 255."""
    for pair in some:
        x = read_map(pair.prediction, masks.labels, logits)
        y = masks.read(pair.mask, tuple(x.shape))
        if resize and x.shape[-2:] != y.shape[-2:]:
            x = resized(x, tuple(y.shape))
        yield pair, x, y
