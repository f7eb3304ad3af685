"""Test data made worse in five steps: images by noise, blur, contrast and JPEG, tables by noise."""

import io
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

Pixels = NDArray[np.uint8]

STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # standard deviation, of the range of the pixels
    "blur": (0.4, 0.6, 0.9, 1.3, 1.8),  # radius, for a shorter side of 32 pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of it
    "jpeg": (80, 60, 40, 25, 10),  # quality
}
TABLE = (0.1, 0.2, 0.3, 0.5, 0.8)  # standard deviation of the noise on standardised features


def corrupted(inputs: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Kind, severity from 1 on, and the inputs, made worse; the same every time."""
    rng = np.random.default_rng(0)
    if inputs.dim() == 2:
        for severity, spread in enumerate(TABLE, 1):
            noise = rng.normal(0, spread, inputs.shape)
            yield "noise", severity, inputs + torch.from_numpy(noise).float()
        return
    images = to_pixels(inputs)
    for kind, strengths in STRENGTHS.items():
        for severity, strength in enumerate(strengths, 1):
            worse = np.stack([MAKERS[kind](image, strength, rng) for image in images])
            yield kind, severity, from_pixels(worse)


def to_pixels(inputs: Tensor) -> Pixels:
    """(N, 3, H, W), centred and scaled, as (N, H, W, 3) bytes."""
    pixels = ((inputs * 0.25 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def from_pixels(images: Pixels) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - 0.5) / 0.25


def _noise(image: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    return _bytes(image + rng.normal(0, 255 * strength, image.shape))


def _blur(image: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    radius = strength * min(image.shape[:2]) / 32
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _contrast(image: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    middle = image.mean((0, 1), keepdims=True)
    return _bytes(middle + strength * (image - middle))


def _jpeg(image: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    stored = io.BytesIO()
    Image.fromarray(image).save(stored, "JPEG", quality=int(strength))
    return np.asarray(Image.open(stored).convert("RGB"))


def _bytes(values: NDArray[np.float64]) -> Pixels:
    return np.asarray(values.round().clip(0, 255), dtype=np.uint8)


MAKERS: dict[str, Callable[[Pixels, float, np.random.Generator], Pixels]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
