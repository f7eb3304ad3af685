"""Is the difference real? Two rows on the same seeds and the same test samples."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Gap(NamedTuple):
    """The first row's mean minus the second's, with its 95 % interval, and the second's mean."""

    value: float
    low: float
    high: float
    base: float

    @property
    def percent(self) -> "Gap":
        """In per cent of the second row's mean."""
        unit = self.base / 100
        return Gap(self.value / unit, self.low / unit, self.high / unit, 100.0)

    @property
    def verdict(self) -> str:
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "undecided"


def over_seeds(first: ArrayLike, second: ArrayLike, overlap: float = 0.0) -> Gap:
    """Of one value per seed: Student's t.

    ``overlap`` is the ratio of test to training samples where the seeds are splits of one data
    set, whose differences are then not independent (Nadeau and Bengio 2003).
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    each, base = a - b, float(b.mean())
    half = _of_seeds(each, overlap) if len(each) > 1 else np.inf
    return Gap(float(each.mean()), float(each.mean() - half), float(each.mean() + half), base)


def over_both(first: Array, second: Array) -> Gap:
    """Of (seeds, groups of test samples), the same samples for all seeds; their mean counts.

    Half of the interval is the root of the squares of two halves: Student's t over the seeds'
    means, and the normal one over the samples' means.
    """
    difference = first - second
    samples = difference.mean(0)
    half = 1.96 * float(samples.std(ddof=1)) / len(samples) ** 0.5
    if len(difference) > 1:
        half = float(np.hypot(half, _of_seeds(difference.mean(1), 0.0)))
    value = float(difference.mean())
    return Gap(value, value - half, value + half, float(second.mean()))


def _of_seeds(each: Array, overlap: float) -> float:
    from scipy.stats import t

    variance = float(each.var(ddof=1)) * (1 / len(each) + overlap)
    return float(t.ppf(0.975, len(each) - 1) * variance**0.5)
