"""The tasks: data, network and length of training, each small enough for one thread.

Only photographs and street scenes need a folder; the others are made of what scikit-learn ships,
or drawn.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn

from benchmarks.data.backbone import FineTuned
from benchmarks.data.scenes import (
    VOID,
    Pixels,
    SaliencyData,
    SmallUNet,
    Split,
    digit_scenes,
    files_of,
    folder_data,
    open_pair,
    to_tensors,
)

IGNORED = 255  # target of the elements that count for nothing
STREET_LABELS = 11
STREET_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Part:
    """Inputs (N, *), float32, and targets, bytes: 0, 1 and ``IGNORED``."""

    inputs: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Task:
    """Data, network and training of one task; only the loss is left to choose.

    Args:
        labels: how many labels dimension 1 holds that have base rates of their own.
        mirror: whether training samples are mirrored at random.
        crop: the least share of its area that a training sample is cropped to; 1 for no crops.
        fine_tuned: whether training is AdamW and a one-cycle schedule; Adam and a cosine else.
        ood: inputs out of distribution, whose labels are all 0.
        chance: the true probabilities of the test data, where they are known.
        wrong: the training samples whose labels were spoilt.
    """

    name: str
    train: Part
    val: Part
    test: Part
    build: Callable[[], nn.Module]
    epochs: int
    batch: int
    lr: float
    labels: int = 1
    mirror: bool = False
    crop: float = 1.0
    fine_tuned: bool = False
    ood: Part | None = None
    chance: Tensor | None = None
    wrong: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            found = getattr(self, name).target.unique().tolist()
            if not {0, 1} <= set(found):
                raise ValueError(
                    f"Expected both classes in the {name} part of {self.name}, but its labels are "
                    f"all {found[0] if found[0] in (0, 1) else 'void'}: check the masks, or add "
                    "images"
                )

    def fingerprint(self) -> str:
        """A short hash of all data, so that kept runs are never mixed with those of others."""
        digest = hashlib.sha256()
        for part in (self.train, self.val, self.test, self.ood):
            if part is not None:
                for tensor in (part.inputs, part.target):
                    digest.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------- one label


def _parts(data: SaliencyData) -> tuple[Part, Part, Part]:
    return part_of(data.train), part_of(data.val), part_of(data.test)


def part_of(split: Split) -> Part:
    images, masks = to_tensors(split)
    return Part(images, masks.to(torch.uint8))


def digits() -> Task:
    """Digits over photographs, the quick setting of the study."""
    data = digit_scenes(32, train=40, val=40, test=120, ood=1)
    return Task("digits", *_parts(data), lambda: SmallUNet(8), 120, batch=10, lr=5e-3)


# ---------------------------------------------------------------- several labels


def streets(folder: Path, width: int = 80, height: int = 60, labels: int = STREET_LABELS) -> Task:
    """Street scenes (CamVid): ``folder/PART/images/NAME.jpg`` and ``folder/PART/labels/NAME.png``.

    PART is train, val or test. A label image holds 0 to 10, and 11 or 255 where it says nothing.
    Each label is a yes or no of its own, so the target is (N, 11, H, W).
    """
    train, val, test = (street_part(folder / part, width, height, labels) for part in STREET_PARTS)
    return Task(
        "streets",
        train,
        val,
        test,
        lambda: SmallUNet(8, labels),
        epochs=40,
        batch=16,
        lr=2e-3,
        labels=labels,
        mirror=True,
    )


def street_part(folder: Path, width: int, height: int, count: int = STREET_LABELS) -> Part:
    """One part of the street scenes at ``width`` x ``height`` pixels."""
    images, labels = files_of(folder / "images"), files_of(folder / "labels")
    for stem in sorted(images.keys() ^ labels.keys()):
        raise ValueError(f"{folder} has not both an image and a label image {stem}: add or remove")
    pictures, maps = [], []
    for stem in sorted(images):
        picture, numbers = open_pair(images[stem], labels[stem])
        # Colours are averaged; of a map each new pixel takes the label in its middle.
        pictures.append(np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)))
        small = Image.fromarray(_labels(numbers, labels[stem], count))
        maps.append(np.asarray(small.resize((width, height), Image.Resampling.NEAREST)))
    seen = Split(np.stack(pictures), np.stack(maps))
    return Part(to_tensors(seen)[0], label_planes(torch.from_numpy(seen.masks), count))


def _labels(numbers: NDArray[Any], path: Path, count: int) -> Pixels:
    """0 to ``count`` - 1, and whatever says nothing as ``VOID``."""
    void = (numbers == count) | (numbers == VOID)
    legal = (numbers >= 0) & (numbers < count)
    if not (legal | void).all():
        raise ValueError(
            f"Expected {path} to hold one label of 0 to {count - 1} per pixel, or {count} or "
            f"{VOID} for void, but got {numbers[~(legal | void)].max()}; check --labels"
        )
    return np.where(void, VOID, numbers).astype(np.uint8)


def label_planes(maps: Tensor, count: int = STREET_LABELS) -> Tensor:
    """(N, H, W) labels as (N, count, H, W) of 0 and 1, ``IGNORED`` where nothing is said."""
    planes = (maps[:, None] == torch.arange(count).view(-1, 1, 1)).to(torch.uint8)
    return planes.masked_fill_(maps[:, None] >= count, IGNORED)


# ---------------------------------------------------------------- the tasks of the study

SCENES = {"train": 40, "val": 150, "test": 250, "ood": 200}
WRONG = 0.1  # share of the training masks that are spoilt
RATES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)


def scenes() -> Task:
    """Digits over photographs, as many and as large as version 0.1 had them."""
    data = digit_scenes(32, **SCENES)
    return Task(
        "digits",
        *_parts(data),
        lambda: SmallUNet(12),
        epochs=100,
        batch=10,
        lr=5e-3,
        ood=part_of(data.ood),
    )


def fewer_scenes(share: float) -> Task:
    """The first part of the training scenes alone."""
    task = scenes()
    kept = round(share * len(task.train))
    train = Part(task.train.inputs[:kept], task.train.target[:kept])
    return replace(task, name=f"digits-{round(100 * share)}", train=train)


def replaced_scenes() -> Task:
    """A tenth of the training masks, drawn at random, passed round among themselves."""
    task, rng = scenes(), Generator().manual_seed(0)
    wrong = torch.randperm(len(task.train), generator=rng)[: round(WRONG * len(task.train))]
    target = task.train.target.clone()
    target[wrong] = target[wrong.roll(1)]
    train = Part(task.train.inputs, target)
    return replace(task, name="digits-replaced", train=train, wrong=wrong)


def careless_scenes() -> Task:
    """A tenth of the training masks with their borders moved: out by two pixels, or in by one."""
    task, rng = scenes(), Generator().manual_seed(0)
    wrong = torch.randperm(len(task.train), generator=rng)[: round(WRONG * len(task.train))]
    target = task.train.target.float()
    wide, narrow = wrong[::2], wrong[1::2]
    target[wide] = nn.functional.max_pool2d(target[wide], 5, 1, 2)
    target[narrow] = -nn.functional.max_pool2d(-target[narrow], 3, 1, 1)
    train = Part(task.train.inputs, target.to(torch.uint8))
    return replace(task, name="digits-borders", train=train, wrong=wrong)


def objects(folder: Path) -> Task:
    """Photographs with salient objects, as large as version 0.1 had them."""
    data = folder_data(folder, 48, ood=200)
    return Task(
        "photographs",
        *_parts(data),
        lambda: SmallUNet(12),
        epochs=40,
        batch=16,
        lr=2e-3,
        mirror=True,
        ood=part_of(data.ood),
    )


def pretrained(folder: Path) -> Task:
    """The same photographs at 160 pixels, on which a network trained on ImageNet is fine-tuned.

    Rates and epochs were set beforehand, by plain BCE's validation NLL with seed 0: one rate of
    1e-3 for all layers came to .260 in eight epochs; 1e-4 for the pretrained layers and 2e-3 for
    the others to .246 in six, and was still falling by 1 % per epoch. So these rates, ten epochs.
    """
    data = folder_data(folder, 160, ood=200)
    return Task(
        "pretrained",
        *_parts(data),
        FineTuned,
        epochs=10,
        batch=8,
        lr=2e-3,
        mirror=True,
        crop=0.5,
        fine_tuned=True,
        ood=part_of(data.ood),
    )


def cancer(seed: int) -> Task:
    """Benign or malignant from ten mean measures of cells; each seed is another split."""
    from sklearn.datasets import load_breast_cancer

    features, label = load_breast_cancer(return_X_y=True)
    features = features[:, :10]  # with all thirty, whole validation sets are told apart
    order = np.random.default_rng(seed).permutation(len(label))
    train, val, test = np.split(order, [200, 350])
    middle, spread = features[train].mean(0), features[train].std(0)
    inputs = torch.from_numpy((features - middle) / spread).float()
    # malignant, the rarer one, is what is looked for
    target = torch.from_numpy(1 - label).to(torch.uint8)[:, None]
    one, two, three = (Part(inputs[i], target[i]) for i in (train, val, test))
    return Task("cancer", one, two, three, lambda: _mlp(10, 1), epochs=60, batch=20, lr=2e-3)


def rates(seed: int) -> Task:
    """Seven labels of a table, whose base rates fall from .5 to .01 and whose chances are known."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(10, len(RATES)))
    weights *= 2 / np.linalg.norm(weights, axis=0)
    shift = np.array([_shift(rate, 2.0) for rate in RATES])
    parts, chances = [], []
    for count in (1000, 2000, 4000):
        features = rng.normal(size=(count, len(weights)))
        chance = 1 / (1 + np.exp(-(features @ weights + shift)))
        target = torch.from_numpy(rng.random(chance.shape) < chance).to(torch.uint8)
        parts.append(Part(torch.from_numpy(features).float(), target))
        chances.append(torch.from_numpy(chance))
    train, val, test = parts
    return Task(
        "rates",
        train,
        val,
        test,
        lambda: _mlp(10, len(RATES)),
        epochs=80,
        batch=32,
        lr=2e-3,
        labels=len(RATES),
        chance=chances[2],
    )


def _shift(rate: float, spread: float) -> float:
    """What must be added to a normal score of this spread for a mean chance of ``rate``."""
    score = spread * np.sqrt(2) * np.polynomial.hermite.hermgauss(60)[0]
    weight = np.polynomial.hermite.hermgauss(60)[1] / np.sqrt(np.pi)
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = float((weight / (1 + np.exp(-(score + middle)))).sum())
        low, high = (middle, high) if mean < rate else (low, middle)
    return middle


def _mlp(inputs: int, labels: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, labels)
    )
