"""What a step is given: the measured calibration, on which all ranks must agree."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist

from .. import _errors
from .._errors import refuse
from .._torch import world_size

_EQUAL = 1e-6  # how far the values of the ranks may differ


class Reading(NamedTuple):
    """What one rank passed to a step and did since the last one, and the error in it."""

    accuracy: float = 0.0
    slope: float = 0.0
    elements: int = 0  # measured
    trained: bool = False  # whether any sample was
    samples: int = 0  # trained since the last step
    batch: int = 0  # the largest of them
    error: Exception | None = None


def read(measured: Any, follows_slope: bool) -> Reading:
    """The values of a histogram or of an object like it; of the published rule also a number."""
    try:
        accuracy, slope, elements = measured, 0.0, 0
        if callable(getattr(measured, "accuracy", None)):
            measured = measured.pooled() if hasattr(measured, "pooled") else measured
            accuracy = measured.accuracy()
            if accuracy != accuracy:
                remedy = "call `histogram.update(logits, target)`"
                refuse("measured", "have seen an element", "an empty histogram", remedy)
            if hasattr(measured, "reliability"):
                elements = int(measured.reliability(1).count.sum())
        if follows_slope:
            if not callable(getattr(measured, "slope", None)):
                refuse(
                    "measured", "have the methods `accuracy()` and `slope()`",
                    _errors.describe(measured),
                    "pass the CalibrationHistogram of the validation data, or use "
                    "`AdaptivePerturbation.published`, which takes an accuracy", TypeError,
                )  # fmt: skip
            slope = float(measured.slope())
        accuracy = _errors.unit_number("accuracy", accuracy)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        return Reading(error=error)
    return Reading(accuracy, slope, elements)


def agreed(own: Reading, group: dist.ProcessGroup | None) -> Reading:
    """The reading that all ranks share; every rank raises if any rank's is wrong."""
    if world_size(group) == 1:
        if own.error is not None:
            raise own.error
        return own
    error = own.error
    if error is not None and type(error) not in (TypeError, ValueError):
        error = ValueError(repr(error))  # which every process can receive
    readings: list[Any] = [None] * world_size(group)
    dist.all_gather_object(readings, own._replace(error=error), group=group)
    for reading in readings:  # of several errors the same one on each rank
        if reading.error is not None:
            raise reading.error from own.error
    for name in ("accuracy", "slope"):
        values = [getattr(reading, name) for reading in readings]
        if max(values) - min(values) > _EQUAL or len({value != value for value in values}) > 1:
            remedy = "reduce it first, for example `histogram.all_reduce()`"
            refuse(name, "be the same on every rank", values, remedy)
    # All ranks use the first one's slope, so that the levels agree bit for bit.
    return readings[0]._replace(  # type: ignore[no-any-return]
        trained=any(reading.trained for reading in readings),
        samples=sum(reading.samples for reading in readings),
        batch=max(reading.batch for reading in readings),
    )
