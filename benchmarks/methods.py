"""The losses that the study compares, as one table from name to criterion."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sc_bce import AdaptivePerturbation, SCBCEWithLogitsLoss

PLAIN = "bce"
FLIP_RATE = 0.05  # of the hand-set methods, so that they differ in nothing but the draw


@dataclass(frozen=True)
class Method:
    """How one row of the study is trained.

    Args:
        title: what tables and figures call it.
        build: the criterion, from the number of training samples and the generator of its draws.
        indexed: whether the criterion is called with the indices of the batch's samples.
    """

    title: str
    build: Callable[[int, Generator], nn.Module]
    indexed: bool = False


class FocalLoss(nn.Module):
    """Focal loss without class weights (Lin et al. 2017): what a user would pick instead."""

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        miss = torch.sigmoid((1 - 2 * target) * logits)
        return (miss**self.gamma * loss).mean()


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
        lambda n, g: AdaptivePerturbation(n, objective=objective, generator=g, **options),
        indexed=True,
    )


def _shared(title: str, objective: str, **options: Any) -> Method:
    """One level for all training samples together."""
    return Method(
        f"ASLP {title}, one shared level",
        _fixed(lambda g: AdaptivePerturbation(None, objective=objective, generator=g, **options)),
    )


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

QUICK = (
    PLAIN,
    "smoothing-0.1",
    "smoothing-0.2",
    "max-entropy",
    "calibration",
    "feedback",
    "feedback-focus-2",
)
