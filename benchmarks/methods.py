"""The rows of the study: losses, ablations that could refute them, and post-hoc fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import posthoc
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sc_bce import AdaptivePerturbation, SCBCEWithLogitsLoss

PLAIN = "bce"
NOISY_PLAIN = "bce-noise"
FLIP_RATE = 0.05  # of the hand-set methods, so that they differ in nothing but the draw


@dataclass(frozen=True)
class Method:
    """How one row of the study is trained.

    Args:
        title: what tables and figures call it.
        build: the criterion, from the number of training samples and the generator of its draws.
        indexed: whether the criterion is called with the indices of the batch's samples.
        group: the part of the report that it belongs to.
        noisy: whether a tenth of the training masks is replaced by those of other samples.
        base: the row that must be finished first, if any.
        replay: what is made of the levels that the base learned, (epochs, samples), before they
            are given to this row; the criterion then comes from them, and not from ``build``.
    """

    title: str
    build: Callable[[int, Generator], nn.Module]
    indexed: bool = False
    group: str = "fixed"
    noisy: bool = False
    base: str | None = None
    replay: Callable[[Tensor, Generator], Tensor] | None = None

    @property
    def reference(self) -> str:
        """The row that this one is compared with: the same data, plain BCE."""
        return NOISY_PLAIN if self.noisy else PLAIN


@dataclass(frozen=True)
class PostHoc:
    """A row that is fitted on the validation logits of the row ``base``."""

    title: str
    fit: posthoc.Fit
    base: str
    group: str = "posthoc"
    reference: str = PLAIN
    fitted_on: str = "val"  # the part whose answers it is fitted on


class FocalLoss(nn.Module):
    """Focal loss without class weights (Lin et al. 2017): what a user would pick instead."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        miss = torch.sigmoid((1 - 2 * target) * logits)
        return (miss**self.gamma * loss).mean()


# Version 0.1's setting, which the rows named by an objective are; the solver is the proximal one.
V01: dict[str, Any] = {"beta": 2.0, "prior": 0.5, "warmup": 5}


class Carried(AdaptivePerturbation):
    """``feedback`` whose budget carries over below 0 as well, so that it can wind up."""

    def step(self, accuracy: Any, confidence: Any = None, *, group: Any = None) -> None:
        below = self.budget.clamp(max=0)
        super().step(accuracy, confidence, group=group)
        self.hold({"budget": (self.budget + below).clamp(min=-0.45)})


class Replay(AdaptivePerturbation):
    """Levels that another run learned: drawn as there in each epoch, and never moved here.

    The row of ``levels`` that an epoch ended with is what the next one trained with, since a
    sample moves only after its turn. With the levels unchanged this is the other run, bit for bit.
    """

    def __init__(self, levels: Tensor, generator: Generator) -> None:
        super().__init__(levels.shape[1], objective="max_entropy", generator=generator, **V01)
        self.levels = iter(levels)

    def forward(
        self, input: Tensor, target: Tensor, index: Tensor | None = None, *, update: bool = False
    ) -> Tensor:
        return super().forward(input, target, index, update=False)

    def step(self, accuracy: Any, confidence: Any = None, *, group: Any = None) -> None:
        super().step(accuracy, confidence, group=group)
        self.alpha.copy_(next(self.levels))


def _mean(levels: Tensor, generator: Generator) -> Tensor:
    """Every sample gets the mean of its epoch."""
    return levels.mean(1, keepdim=True).expand_as(levels)


def _shuffled(levels: Tensor, generator: Generator) -> Tensor:
    """Every sample gets the levels of another one, the same in all epochs."""
    return levels[:, torch.randperm(levels.shape[1], generator=generator)]


def _fixed(build: Callable[[Generator], nn.Module]) -> Callable[[int, Generator], nn.Module]:
    """A criterion that needs no number of samples."""
    return lambda num_samples, generator: build(generator)


def _smoothing(eps: float) -> Method:
    return Method(
        f"label smoothing {eps:g}",
        _fixed(lambda g: SCBCEWithLogitsLoss.label_smoothing(eps, generator=g)),
    )


def _adaptive(title: str, objective: str, **options: Any) -> Method:
    """One level per training sample."""
    return Method(
        f"ASLP {title}",
        lambda n, g: AdaptivePerturbation(n, objective=objective, generator=g, **V01, **options),
        indexed=True,
        group="adaptive",
    )


def _shared(title: str, objective: str, **options: Any) -> Method:
    """One level for all training samples together."""
    return Method(
        f"ASLP {title}, one shared level",
        _fixed(
            lambda g: AdaptivePerturbation(None, objective=objective, generator=g, **V01, **options)
        ),
        group="adaptive",
    )


OTHER_FOCUS = ("feedback-focus-1", "feedback-focus-3")
PENALTIES = (10, 50, 200)  # beside the 2000 of the rows that have no penalty in their name

FITS: dict[str, tuple[str, posthoc.Fit]] = {
    "temperature": ("temperature", posthoc.temperature),
    "platt": ("Platt scaling", posthoc.platt),
    "isotonic": ("isotonic regression", posthoc.isotonic),
    "flip-temperature": ("flip removed, temperature", posthoc.flip_temperature),
    "fitted-flip": ("flip fitted and removed, temperature", posthoc.fitted_flip),
}

MENDED = "feedback-focus-2"
FORMS: dict[str, tuple[str, posthoc.Fit]] = {  # of the flip removal, beside its clip of 0.001
    "clip-0.01": ("flip removed with clip 0.01, temperature", posthoc.clipped_flip(1e-2)),
    "clip-0.0001": ("flip removed with clip 0.0001, temperature", posthoc.clipped_flip(1e-4)),
    "smooth": ("flip removed without a clip, temperature", posthoc.smooth_flip),
}

METHODS: dict[str, Method] = {
    PLAIN: Method("plain BCE", _fixed(lambda g: SCBCEWithLogitsLoss(generator=g))),
    "smoothing-0.05": _smoothing(0.05),
    "smoothing-0.1": _smoothing(0.1),
    "smoothing-0.2": _smoothing(0.2),
    "disturb-element": Method(
        "DisturbLabel per element",
        _fixed(lambda g: SCBCEWithLogitsLoss.disturb_label(2 * FLIP_RATE, generator=g)),
    ),
    "hard-inversion": Method(
        "hard inversion (DisturbLabel per sample)",
        _fixed(lambda g: SCBCEWithLogitsLoss.hard_inversion(FLIP_RATE, generator=g)),
    ),
    "soft-inversion": Method(
        "soft inversion",
        _fixed(lambda g: SCBCEWithLogitsLoss.soft_inversion(FLIP_RATE / 0.75, generator=g)),
    ),
    "moderation": Method(
        "moderation", _fixed(lambda g: SCBCEWithLogitsLoss.moderation(2 * FLIP_RATE, generator=g))
    ),
    "dynamic-moderation": Method(
        "dynamic moderation",
        _fixed(lambda g: SCBCEWithLogitsLoss.dynamic_moderation(2 * FLIP_RATE, generator=g)),
    ),
    "focal": Method("focal loss (gamma 2)", _fixed(lambda g: FocalLoss())),
    "max-entropy": _adaptive("max_entropy", "max_entropy"),
    "calibration": _adaptive("calibration", "calibration"),
    "calibration-explicit": _adaptive(
        "calibration, explicit (as published)", "calibration", solver="explicit"
    ),
    "feedback": _adaptive("feedback", "feedback"),
    "max-entropy-expected": _adaptive("max_entropy, expected", "max_entropy", sampling="expected"),
    "calibration-expected": _adaptive("calibration, expected", "calibration", sampling="expected"),
    "feedback-expected": _adaptive("feedback, expected", "feedback", sampling="expected"),
    "calibration-shared": _shared("calibration", "calibration"),
    "feedback-shared": _shared("feedback", "feedback"),
    "feedback-shared-expected": _shared("feedback, expected", "feedback", sampling="expected"),
    "feedback-focus-1": _adaptive("feedback, focus 1", "feedback", focus=1.0),
    "feedback-focus-2": _adaptive("feedback, focus 2", "feedback", focus=2.0),
    "feedback-focus-3": _adaptive("feedback, focus 3", "feedback", focus=3.0),
}


def _carried(focus: float) -> Method:
    """The rule of ``feedback`` before it was mended."""
    row = METHODS[f"feedback-focus-{focus:g}" if focus else "feedback"]
    return replace(
        row,
        title=f"{row.title}, budget carried below 0",
        group="variant",
        build=lambda n, g: Carried(n, objective="feedback", focus=focus, generator=g, **V01),
    )


def _variants() -> dict[str, Method]:
    """What was tried where a target was missed."""
    rows = {"feedback-carried": _carried(0.0), "feedback-focus-2-carried": _carried(2.0)}
    for sampling in ("expected", "element"):
        row = _adaptive(f"feedback, focus 2, {sampling}", "feedback", focus=2.0, sampling=sampling)
        rows[f"feedback-focus-2-{sampling}"] = replace(row, group="variant")
    return rows


def _ablations() -> dict[str, Method]:
    """What could show that the levels of the samples, or their penalty, do not matter."""
    rows = {}
    for name in ("feedback", "feedback-focus-2"):
        for kind, title, replay in (
            ("mean", "the mean level for all", _mean),
            ("shuffled", "levels shuffled across samples", _shuffled),
        ):
            rows[f"{name}-{kind}"] = replace(
                METHODS[name],
                title=f"{METHODS[name].title}: {title}",
                group="ablation",
                base=name,
                replay=replay,
            )
    for name in ("calibration", "feedback"):
        for penalty in PENALTIES:
            row = _adaptive(f"{name}, penalty {penalty}", name, penalty=float(penalty))
            rows[f"{name}-penalty-{penalty}"] = replace(row, group="penalty")
    for name in (PLAIN, "feedback", "feedback-focus-2"):
        row = METHODS[name]
        title = f"{row.title}, a tenth of the masks wrong"
        rows[f"{name}-noise"] = replace(row, title=title, group="noise", noisy=True)
    return rows


def _posthoc() -> dict[str, PostHoc]:
    """Every fit on top of four rows; where no flip was trained in, none is removed."""
    rows = {}
    for name in (PLAIN, "smoothing-0.1", "feedback", "feedback-focus-2"):
        for kind, (title, fit) in FITS.items():
            if name != PLAIN or kind != "flip-temperature":
                rows[f"{name}+{kind}"] = PostHoc(f"{METHODS[name].title} + {title}", fit, name)
    title, fit = FITS["flip-temperature"]
    for name in (*(n for n, row in METHODS.items() if row.group == "variant"), *OTHER_FOCUS):
        whole = f"{METHODS[name].title} + {title}"
        rows[f"{name}+flip-temperature"] = PostHoc(whole, fit, name, group="variant")
    mended = METHODS[MENDED].title
    for kind, (title, fit) in FORMS.items():
        rows[f"{MENDED}+{kind}"] = PostHoc(f"{mended} + {title}", fit, MENDED, group="form")
    for name, kind in ((PLAIN, "temperature"), (PLAIN, "isotonic"), (MENDED, "flip-temperature")):
        rows[f"{name}+{kind}-bound"] = replace(
            rows[f"{name}+{kind}"],
            title=f"{rows[f'{name}+{kind}'].title}, fitted on the test images",
            group="bound",
            fitted_on="test",
        )
    return rows


METHODS |= _variants()
METHODS |= _ablations()
ROWS: dict[str, Method | PostHoc] = {**METHODS, **_posthoc()}

QUICK = (
    PLAIN,
    "smoothing-0.1",
    "smoothing-0.2",
    "max-entropy",
    "calibration",
    "feedback",
    "feedback-focus-2",
)
