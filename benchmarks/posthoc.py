"""Calibration after training: the fits that the study puts on top of finished runs.

Each is fitted on the validation logits of a run and costs no training.
"""

from collections.abc import Callable

import numpy as np
import torch
from measures import Answers, Array
from torch.nn import Module

from sc_bce import IsotonicCalibration, TemperatureScaling

Calibrate = Callable[[Array], Array]  # from logits to calibrated logits, of the same shape
Fit = Callable[[Array, Array, float], Calibrate]  # from logits, masks, flip rate of the training

BEND = 1e-3  # how far below 1 a smooth flip removal bends


def temperature(logits: Array, masks: Array, flip_rate: float) -> Calibrate:
    """One temperature, as usual: the flip is left in."""
    return flip_temperature(logits, masks, 0.0)


def flip_temperature(logits: Array, masks: Array, flip_rate: float) -> Calibrate:
    """The flip of the training removed, then one temperature."""
    return _calibrate(_scaling(logits, masks, flip_rate))


def fitted_flip(logits: Array, masks: Array, flip_rate: float) -> Calibrate:
    """The same with the pair of flip rates of least validation loss: is the known one right?"""
    return _calibrate(_scaling(logits, masks, None))


def clipped_flip(clip: float) -> Fit:
    """The same with another clip of what the removed flip leaves, of the rarer class's base rate.

    The class has 0.001.
    """

    def fit(logits: Array, masks: Array, flip_rate: float) -> Calibrate:
        rate = float(masks.mean())
        least = clip * min(rate, 1 - rate)

        def removed(z: Array) -> Array:
            return _signed(z, np.clip(_doubt(z, flip_rate), least, 0.5)) if flip_rate else z

        return _then_temperature(removed, logits, masks)

    return fit


def smooth_flip(logits: Array, masks: Array, flip_rate: float) -> Calibrate:
    """The same with a bend of width ``BEND`` in place of the clip."""

    def removed(z: Array) -> Array:
        bent = BEND * np.logaddexp(0, _doubt(z, flip_rate) / BEND)
        return _signed(z, bent) if flip_rate else z

    return _then_temperature(removed, logits, masks)


def platt(logits: Array, masks: Array, flip_rate: float) -> Calibrate:
    """A line through the logits (Platt 1999)."""
    return _calibrate(_fit(TemperatureScaling(bias=True), logits, masks))


def isotonic(logits: Array, masks: Array, flip_rate: float) -> Calibrate:
    """Any curve that rises (Zadrozny and Elkan 2002)."""
    return _calibrate(_fit(IsotonicCalibration(), logits, masks))


def _doubt(z: Array, flip_rate: float) -> Array:
    """1 - confidence without the flip; below 0 where the network says more than it could."""
    doubt = 1 / (1 + np.exp(np.abs(z.astype(np.float64))))
    return np.asarray((doubt - flip_rate) / (1 - 2 * flip_rate))


def _signed(z: Array, doubt: Array) -> Array:
    """The logits of these doubts, with the decisions of z."""
    return np.asarray(np.sign(z) * (np.log1p(-doubt) - np.log(doubt)))


def _then_temperature(removed: Callable[[Array], Array], logits: Array, masks: Array) -> Calibrate:
    scaled = _calibrate(_scaling(removed(logits), masks, 0.0))
    return lambda z: scaled(removed(z))


def _scaling(logits: Array, masks: Array, flip_rate: float | None) -> Module:
    return _fit(TemperatureScaling(flip_rate), logits, masks)


def _fit(repair: TemperatureScaling | IsotonicCalibration, logits: Array, masks: Array) -> Module:
    return repair.fit(torch.from_numpy(logits), torch.from_numpy(masks))


def _calibrate(repair: Module) -> Calibrate:
    def calibrate(z: Array) -> Array:
        return np.asarray(repair(torch.from_numpy(z)).numpy())

    return calibrate


def recalibrate(fit: Fit, answers: Answers, flip_rate: float, part: str = "val") -> Answers:
    """The answers after a fit on those to the validation images, or to another part."""
    calibrate = fit(*answers[part], flip_rate)
    return {part: (calibrate(logits), masks) for part, (logits, masks) in answers.items()}
