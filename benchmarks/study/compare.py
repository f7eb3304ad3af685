"""Is the difference real? Two rows on the same seeds and the same test samples."""

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)

ERROR = 0.05  # of calling any difference real, in a family in which none is


class Gap(NamedTuple):
    """The first row's mean minus the second's, with its 95 % interval, and the second's mean.

    ``p`` is 1 minus the level of the interval that just reaches 0: below .05 if and only if the
    95 % interval excludes 0. ``holm`` raises it and leaves the interval alone.
    """

    value: float
    low: float
    high: float
    base: float
    p: float

    @property
    def percent(self) -> "Gap":
        """In per cent of the second row's mean."""
        unit = self.base / 100
        return Gap(self.value / unit, self.low / unit, self.high / unit, 100.0, self.p)

    @property
    def verdict(self) -> str:
        if self.p >= ERROR:
            return "undecided"
        return "lower" if self.value < 0 else "higher"


def holm(family: Mapping[Key, Gap]) -> dict[Key, Gap]:
    """Each p corrected for the number of comparisons (Holm 1979).

    The k-th smallest of m becomes m - k + 1 times itself, at least the one before and at most 1.
    The chance that any verdict of the family is wrong is then at most 5 %, however its members
    depend on each other.
    """
    found: dict[Key, Gap] = {}
    least = 0.0
    for place, (key, gap) in enumerate(sorted(family.items(), key=lambda item: item[1].p)):
        least = max(least, min(1.0, (len(family) - place) * gap.p))
        found[key] = gap._replace(p=least)
    return {key: found[key] for key in family}


def over_seeds(first: ArrayLike, second: ArrayLike, overlap: float = 0.0) -> Gap:
    """Of one value per seed: Student's t.

    ``overlap`` is the ratio of test to training samples where the seeds are splits of one data
    set, whose differences are then not independent (Nadeau and Bengio 2003).
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    return _gap(a - b, float(b.mean()), _error_of(a - b, overlap), 0.0)


def over_both(first: Array, second: Array) -> Gap:
    """Of (seeds, groups of test samples), the same samples for all seeds; their mean counts.

    Half of the interval is the root of the squares of two halves: Student's t over the seeds'
    means, and the normal one over the samples' means. Of a single seed only samples count. Neither
    errs more often than it says, at small p too; one t with Satterthwaite's degrees of freedom does
    with three seeds.
    """
    difference = first - second
    seeds = difference.mean(1)
    return _gap(
        seeds,
        float(second.mean()),
        _error_of(seeds) if len(seeds) > 1 else 0.0,
        _error_of(difference.mean(0)),
    )


def _error_of(each: Array, overlap: float = 0.0) -> float:
    """Standard error of the mean; of a single value it is not known."""
    if len(each) < 2:
        return np.inf
    return float((each.var(ddof=1) * (1 / len(each) + overlap)) ** 0.5)


def _gap(seeds: Array, base: float, seeds_error: float, samples_error: float) -> Gap:
    """The interval from both standard errors, and the p at which it would end at 0."""
    from scipy.optimize import brentq
    from scipy.special import ndtr, ndtri, stdtrit

    value, freedom = float(seeds.mean()), max(len(seeds) - 1, 1)
    if not np.isfinite(seeds_error):
        return Gap(value, -np.inf, np.inf, base, 1.0)

    def half(z: float) -> float:
        """Of the interval whose error is that of the normal quantile z."""
        return float(np.hypot(stdtrit(freedom, ndtr(-z)) * seeds_error, z * samples_error))

    width, most = half(-float(ndtri(ERROR / 2))), 30.0
    if half(most) <= abs(value):
        z = most if value else 0.0
    else:
        z = brentq(lambda z: half(z) - abs(value), 0.0, most, xtol=1e-12)
    return Gap(value, value - width, value + width, base, float(2 * ndtr(-z)))
