"""The rows of the study: how each network is trained, and which rows are tried where."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.data.tasks import IGNORED, Task
from benchmarks.study import rivals
from sc_bce import AdaptivePerturbation, SCBCEWithLogitsLoss


@dataclass(frozen=True)
class Setting:
    """What a criterion is built from.

    Args:
        prior: the base rate of the training labels, (N+ + 1/2) / (N + 1): a number, or one per
            label in the shape that broadcasts.
        draws: source of the criterion's random numbers.
    """

    task: Task
    prior: float | Tensor
    draws: Generator

    @property
    def labels(self) -> int | None:
        return self.task.labels if self.task.labels > 1 else None


@dataclass(frozen=True)
class Row:
    """How one row of the study is trained.

    Args:
        title: what tables and figures call it.
        build: the criterion.
        indexed: whether the criterion is called with the indices of the batch's samples.
        decay: weight decay; AdamW then, Adam otherwise.
        dropout: probability, before the last layer.
        mixup: concentration of the Beta distribution; 0 for none.
        members: how many networks are trained, whose probabilities are averaged.
    """

    title: str
    build: Callable[[Setting], nn.Module]
    indexed: bool = False
    decay: float = 0.0
    dropout: float = 0.0
    mixup: float = 0.0
    members: int = 1


def base_rate(target: Tensor, labels: int) -> float | Tensor:
    """(N+ + 1/2) / (N + 1) over what is not ignored; per label in the shape that broadcasts."""
    valid = target != IGNORED
    others = [d for d in range(target.dim()) if d != 1 or labels == 1]
    count = valid.sum(others, dtype=torch.float64)
    rate = ((target * valid).sum(others, dtype=torch.float64) + 0.5) / (count + 1)
    if labels == 1:
        return float(rate)
    return rate.float().reshape(-1, *(1 for _ in target.shape[2:]))


def _plain(s: Setting) -> nn.Module:
    return SCBCEWithLogitsLoss(ignore_index=IGNORED)


def _smoothing(eps: float, half: bool) -> Callable[[Setting], nn.Module]:
    return lambda s: SCBCEWithLogitsLoss.label_smoothing(
        eps, prior=0.5 if half else s.prior, ignore_index=IGNORED
    )


def _moderation(
    level: float, half: bool = False, sampling: str = "sample"
) -> Callable[[Setting], nn.Module]:
    return lambda s: SCBCEWithLogitsLoss.moderation(
        level,
        prior=0.5 if half else s.prior,
        sampling=sampling,
        ignore_index=IGNORED,
        generator=s.draws,
    )


def _adaptive(**settings: Any) -> Callable[[Setting], nn.Module]:
    return lambda s: AdaptivePerturbation(
        len(s.task.train), num_labels=s.labels, ignore_index=IGNORED, generator=s.draws, **settings
    )


def _published(objective: str) -> Callable[[Setting], nn.Module]:
    return lambda s: AdaptivePerturbation.published(
        len(s.task.train), objective, ignore_index=IGNORED, generator=s.draws
    )


def _rival(make: Callable[[], nn.Module]) -> Callable[[Setting], nn.Module]:
    return lambda s: make()


def _number(prior: float | Tensor) -> float:
    if isinstance(prior, Tensor):
        raise ValueError("Expected a task of one label")
    return prior


PLAIN, DEFAULT, SHARED = "bce", "adaptive", "adaptive-focus-0"
BEST_FIXED = "moderation-base-0.2"

ROWS: dict[str, Row] = {
    PLAIN: Row("plain BCE", _plain),
    **{
        f"decay-{decay:g}": Row(f"plain BCE, weight decay {decay:g}", _plain, decay=decay)
        for decay in (0.1, 0.3, 1.0)
    },
    "smoothing-half-0.1": Row("smoothing .1 to ½", _smoothing(0.1, half=True)),
    "smoothing-base-0.2": Row("smoothing .2 to base rate", _smoothing(0.2, half=False)),
    "moderation-half-0.1": Row("moderation .1 to ½, drawn", _moderation(0.1, half=True)),
    **{
        f"moderation-base-{level:g}": Row(
            f"moderation {level:g} to base rate, drawn".replace("0.", "."), _moderation(level)
        )
        for level in (0.1, 0.2, 0.3, 0.4)
    },
    DEFAULT: Row("adaptive (default)", _adaptive(), indexed=True),
    "published": Row("adaptive as published (MC)", _published("calibration"), indexed=True),
    # other rows
    "moderation-element-0.2": Row(
        "moderation .2 to base rate, drawn per element", _moderation(0.2, sampling="element")
    ),
    "moderation-share-0.2": Row(
        "moderation .2 to the sample's own share", lambda s: rivals.OwnShare(0.2, s.draws)
    ),
    "svls": Row("SVLS", _rival(rivals.SpatiallyVarying)),
    **{
        f"inversion-{level:g}": Row(
            f"hard inversion {level:g}",
            lambda s, level=level: SCBCEWithLogitsLoss.hard_inversion(  # type: ignore[misc]
                level, generator=s.draws
            ),
        )
        for level in (0.025, 0.05, 0.1)
    },
    "max-entropy": Row("adaptive as published (MEI)", _published("max_entropy"), indexed=True),
    "adaptive-focus-2": Row("adaptive, focus 2", _adaptive(focus=2.0), indexed=True),
    SHARED: Row("adaptive, one level for all", _adaptive(focus=0.0), indexed=True),
    **{f"dropout-{p:g}": Row(f"dropout {p:g}", _plain, dropout=p) for p in (0.1, 0.3, 0.5)},
    **{
        f"focal-{gamma}": Row(f"focal {gamma}", _rival(lambda gamma=gamma: rivals.Focal(gamma)))  # type: ignore[misc]
        for gamma in (1, 2, 3)
    },
    "flsd-53": Row("FLSD-53", _rival(rivals.SampleFocal)),
    "adafocal": Row("AdaFocal", _rival(rivals.AdaFocal)),
    "brier": Row("Brier", _rival(rivals.Brier)),
    **{
        f"mmce-{w}": Row(
            f"MMCE {w}",
            lambda s, w=w: rivals.MMCE(w, s.draws),  # type: ignore[misc]
        )
        for w in (1, 4, 16)
    },
    **{
        f"mbls-{m}": Row(f"MbLS, margin {m}", _rival(lambda m=m: rivals.Margin(m)))  # type: ignore[misc]
        for m in (3, 6, 10)
    },
    **{
        f"nacl-{w:g}": Row(f"NACL {w:g}", _rival(lambda w=w: rivals.Neighbours(w)))  # type: ignore[misc]
        for w in (0.03, 0.1, 0.3)
    },
    "hl1-ace": Row("hL1-ACE", _rival(rivals.HardACE)),
    **{
        f"penalty-{w:g}": Row(
            f"confidence penalty {w:g}",
            _rival(lambda w=w: rivals.ConfidencePenalty(w)),  # type: ignore[misc]
        )
        for w in (0.1, 0.3, 0.5)
    },
    "dice": Row("Dice + BCE", _rival(rivals.DiceBCE)),
    "dice-moderation": Row(
        "Dice + BCE, moderation .2 to base rate",
        lambda s: rivals.DiceBCE(0.2, _number(s.prior), s.draws),
    ),
    **{f"mixup-{a:g}": Row(f"mixup {a:g}", _plain, mixup=a) for a in (0.1, 0.3, 1.0)},
    "mixup-moderation": Row("mixup .3 and moderation .2 to base rate", _moderation(0.2), mixup=0.3),
    "ensemble": Row("ensemble of 3", _plain, members=3),
}

# Tuned: of each family the member with the least validation NLL of any epoch, with the first seed.
FAMILIES: dict[str, tuple[str, ...]] = {
    "decay": tuple(name for name in ROWS if name.startswith("decay-")),
    "inversion": tuple(name for name in ROWS if name.startswith("inversion-")),
    "dropout": tuple(name for name in ROWS if name.startswith("dropout-")),
    "focal": tuple(name for name in ROWS if name.startswith("focal-")),
    "mmce": tuple(name for name in ROWS if name.startswith("mmce-")),
    "mbls": tuple(name for name in ROWS if name.startswith("mbls-")),
    "nacl": tuple(name for name in ROWS if name.startswith("nacl-")),
    "penalty": tuple(name for name in ROWS if name.startswith("penalty-")),
    "mixup": ("mixup-0.1", "mixup-0.3", "mixup-1"),
}
FIRST = (PLAIN, DEFAULT, BEST_FIXED)
CORE = (
    *FIRST,
    "smoothing-base-0.2",
    "moderation-half-0.1",
    "smoothing-half-0.1",
    "published",
    "decay",
)
LEVELS = ("moderation-base-0.1", "moderation-base-0.3", "moderation-base-0.4")
OTHERS = (
    *LEVELS,
    SHARED,
    "adaptive-focus-2",
    "svls",
    "mixup",
    "mixup-moderation",
    "moderation-share-0.2",
    "moderation-element-0.2",
    "ensemble",
    "penalty",
    "focal",
    "brier",
    "mbls",
    "dice",
    "dice-moderation",
    "mmce",
    "hl1-ace",
    "nacl",
    "flsd-53",
    "adafocal",
    "dropout",
    "inversion",
    "max-entropy",
)
