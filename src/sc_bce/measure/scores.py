"""From cells to measures: pure functions over the last dimension; labels come before it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Cells", "Decomposition", "Reliability"]

_ITERATIONS = 200  # at most, of Newton's method; it usually takes a dozen
_CROWD = 0.01  # share of the elements in the outer tenth of the range: a crowd at an end
_LEVEL = 0.01  # logits within less than this are all alike
_TINY = 1e-15  # share of the mean loss: stop if a step promises a smaller gain


class Reliability(NamedTuple):
    """The table behind a reliability diagram, returned by ``CalibrationHistogram.reliability``.

    Empty bins have nan as confidence and accuracy. With ``num_labels`` every tensor except the
    edges has a row per label.

    Example:
        >>> import torch
        >>> from sc_bce import CalibrationHistogram
        >>> histogram = CalibrationHistogram()  # predicts 0.9, right 8 times in 10
        >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
        >>> edges, count, confidence, accuracy = histogram.reliability(num_bins=2)
        >>> edges
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
        >>> count, confidence[1], accuracy[1]
        (tensor([ 0, 10]), tensor(0.9000, dtype=torch.float64), tensor(0.8000, dtype=torch.float64))
    """

    edges: Tensor
    """(num_bins + 1,) edges of the confidence bins"""
    count: Tensor  # type: ignore[assignment]
    """(num_bins,) elements in each bin, int64"""
    confidence: Tensor
    """(num_bins,) mean confidence in each bin"""
    accuracy: Tensor
    """(num_bins,) accuracy (top label) or share of positives (positive class) in each bin"""


class Cells(NamedTuple):
    """The data that a repair is fitted to: all cells, in order of their logit."""

    logit: Tensor
    """(cells,) the logit that represents each cell, float64"""
    count: Tensor  # type: ignore[assignment]
    """(cells,) elements in each cell, float64"""
    positive: Tensor
    """(cells,) positives in each cell, float64"""


class Decomposition(NamedTuple):
    """A score split into miscalibration - discrimination + uncertainty (CORP).

    Returned by ``CalibrationHistogram.decomposition``.

    Example:
        >>> import torch
        >>> from sc_bce import CalibrationHistogram
        >>> histogram = CalibrationHistogram()
        >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
        >>> parts = histogram.decomposition("brier")
        >>> score = parts.miscalibration - parts.discrimination + parts.uncertainty
        >>> score, histogram.brier()
        (tensor(0.1700, dtype=torch.float64), tensor(0.1700, dtype=torch.float64))
    """

    miscalibration: Tensor
    """the part of the score that the best monotone repair removes"""
    discrimination: Tensor
    """what the repaired predictions gain over always predicting the base rate"""
    uncertainty: Tensor
    """the score of always predicting the base rate"""


class Bins(NamedTuple):
    """Elements, right outcomes and summed confidences; the last dimension counts the bins."""

    count: Tensor  # type: ignore[assignment]
    outcome: Tensor
    confidence: Tensor

    @property
    def total(self) -> Tensor:
        return self.count.sum(-1)


# --- bins -----------------------------------------------------------------------------------------


def into_bins(cells: Bins, index: Tensor, num_bins: int) -> Bins:
    """Cells summed into the bins that ``index`` names; it has the shape of a row or of all."""
    index = index.expand(cells.count.shape)
    return Bins(
        *(
            part.new_zeros(*part.shape[:-1], num_bins).scatter_add_(-1, index, part)
            for part in cells
        )
    )


def equal_mass(cells: Bins, num_bins: int) -> Bins:
    count = cells.count
    # A cell goes to the bin of its middle element. In float64, since the product of a count and
    # num_bins can overflow int64.
    middle = (count.cumsum(-1) - count).double() + (count - 1).double() / 2
    index = (middle * num_bins / cells.total[..., None]).floor().nan_to_num(0)
    return into_bins(cells, index.clamp(0, num_bins - 1).to(torch.int64), num_bins)


def ece(bins: Bins) -> Tensor:
    return (bins.outcome - bins.confidence).abs().sum(-1) / bins.total


def oe(bins: Bins) -> Tensor:
    over = (bins.confidence - bins.outcome).clamp(min=0)
    weighted = torch.where(bins.count > 0, bins.confidence / bins.count * over, 0.0)
    return weighted.sum(-1) / bins.total


def mce(bins: Bins) -> Tensor:
    gap = (bins.outcome - bins.confidence).abs() / bins.count
    gap = torch.where(bins.count > 0, gap, 0.0).amax(-1)
    return torch.where(bins.total > 0, gap, torch.nan)


def debiased(bins: Bins) -> Tensor:
    accuracy = bins.outcome / bins.count
    gap = bins.confidence / bins.count - accuracy
    squared = gap**2 - accuracy * (1 - accuracy) / (bins.count - 1)
    mean = torch.where(bins.count > 1, bins.count * squared, 0.0).sum(-1) / bins.total
    return mean.clamp(min=0).sqrt()


def sweep(cells: Bins) -> Tensor:
    """ECE of one label over the most equal-mass bins whose accuracy does not fall."""
    filled = cells.count > 0
    cells = Bins(*(part[filled] for part in cells))
    best = ece(equal_mass(cells, 1))
    for num_bins in range(2, len(cells.count) + 1):
        bins = equal_mass(cells, num_bins)
        accuracy = (bins.outcome / bins.count)[bins.count > 0]
        if bool((accuracy.diff() < 0).any()):
            break
        best = ece(bins)
    return best


# --- a line through the logits --------------------------------------------------------------------


def affine(
    cells: Cells, *, slope: float | None = None, bias: bool = True,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, float]:  # fmt: skip
    """The (a, b) that minimise the mean loss of a z + b; ``slope`` fixes a, ``bias=False`` b = 0.

    nan if the cells determine no line: no element, only one class, or, for a slope, only one
    logit. If a threshold separates the classes, the slope is infinite, or the end of ``limits``.
    """
    z, n, k = (part[cells.count > 0] for part in cells)
    total, positive = float(n.sum()), float(k.sum())
    if not 0 < positive < total:  # nan comes here too
        return (math.nan if slope is None else slope), math.nan
    if slope is not None:
        return slope, (_shift(slope * z, n, k) if bias else 0.0)
    # Compared, since the rounded mean of equal logits need not be equal to them.
    alike = not bool((z != (z[0] if bias else 0.0)).any())
    scale = 0.0 if alike else _spread(z, n, bias)
    if scale == 0:
        return math.nan, (math.nan if bias else 0.0)
    a, b = _apart(z, n, k, bias), 0.0
    if not a:
        a, b = _newton(z / scale, n, k, bias)
        a /= scale
    low, high = limits
    if low <= a <= high:
        return a, (b if math.isfinite(a) else math.nan)
    # The loss is convex, so that within the limits it is least at the nearer end.
    end = min(max(a, low), high)
    return end, (_shift(end * z, n, k) if bias else 0.0)


def _apart(z: Tensor, n: Tensor, k: Tensor, bias: bool) -> float:
    """An infinite slope if some logit (without a bias: 0) separates the classes, otherwise 0."""
    negative, positive = (z[part].aminmax() for part in (n > k, k > 0))
    for low, high, end in ((negative, positive, math.inf), (positive, negative, -math.inf)):
        between = low.max <= high.min if bias else low.max <= 0 <= high.min
        if bool(between):
            return end
    return 0.0


def _spread(z: Tensor, n: Tensor, centred: bool) -> float:
    mean = (n * z).sum() / n.sum() if centred else 0.0
    return float(((n * (z - mean) ** 2).sum() / n.sum()).sqrt())


def _shift(z: Tensor, n: Tensor, k: Tensor) -> float:
    """The b that minimises the mean loss of z + b, at which the mean probability is the base rate.

    By bisection, since Newton's method gets nowhere from where all probabilities are 0 or 1.
    """
    n, k = n / n.sum(), k / n.sum()
    rate = float(k.sum())
    middle = math.log(rate / (1 - rate))
    low, high = middle - float(z.max()), middle - float(z.min())
    while True:
        b = (low + high) / 2
        # Each class alone: a difference would lose the digits of what is sure and right.
        over = float(((n - k) * torch.sigmoid(z + b)).sum())
        under = float((k * torch.sigmoid(-z - b)).sum())
        done = not low < b < high or high - low < 1e-12 * max(1.0, abs(b))
        if done or over == under:
            return b
        low, high = (b, high) if over < under else (low, b)


def _newton(z: Tensor, n: Tensor, k: Tensor, fit_bias: bool) -> tuple[float, float]:
    """Newton's method with steps halved until the loss falls, which is safe for a convex loss."""
    n, k = n / n.sum(), k / n.sum()
    rate = float(k.sum())
    a, b = 0.0, (math.log(rate / (1 - rate)) if fit_bias else 0.0)

    def loss(a: float, b: float) -> float:
        line = a * z + b
        # Each class alone: a difference would lose the digits of what is sure and right.
        return float(((n - k) * F.softplus(line) + k * F.softplus(-line)).sum())

    value = loss(a, b)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(a * z + b)
        miss, weight = n * p - k, n * p * (1 - p)
        g_a, g_b = float((miss * z).sum()), float(miss.sum())
        h_aa, h_ab, h_bb = (float((weight * z**i).sum()) for i in (2, 1, 0))
        step_a, step_b = _step((g_a, g_b), (h_aa, h_ab, h_bb), fit_bias)
        promise = g_a * step_a + g_b * step_b
        if not promise > _TINY * max(value, 1e-300):
            break
        size = 1.0
        while size > 1e-10:
            new = loss(a - size * step_a, b - size * step_b)
            if new <= value - 1e-4 * size * promise:
                break
            size /= 2
        else:
            break
        a, b, value = a - size * step_a, b - size * step_b, new
    return a, b


def _step(
    gradient: tuple[float, float], hessian: tuple[float, float, float], fit_bias: bool
) -> tuple[float, float]:
    """Solve H s = g, a little added to the diagonal in case H is flat; 0 for a fixed bias."""
    (g_a, g_b), (h_aa, h_ab, h_bb) = gradient, hessian
    little = 1e-300 + 1e-14 * (h_aa + h_bb * fit_bias)
    h_aa, h_bb = h_aa + little, h_bb + little
    if not fit_bias:
        return g_a / h_aa, 0.0
    determinant = h_aa * h_bb - h_ab * h_ab
    if not determinant > 0:
        return g_a / h_aa, g_b / h_bb
    return (g_a * h_bb - g_b * h_ab) / determinant, (g_b * h_aa - g_a * h_ab) / determinant


# --- isotonic regression --------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Blocks of isotonic regression: pooled neighbours whose share of positives did not rise."""

    first: list[int]
    """index of the first cell of each block"""
    count: list[float]  # type: ignore[assignment]
    positive: list[float]


def isotonic(count: Tensor, positive: Tensor) -> Blocks:
    """Pool adjacent violators over the cells that are not empty."""
    first: list[int] = []
    n: list[float] = []
    k: list[float] = []
    for cell, (one, ones) in enumerate(zip(count.tolist(), positive.tolist(), strict=True)):
        if not one > 0:
            continue
        first.append(cell)
        n.append(one)
        k.append(ones)
        # Compared as products of whole numbers, exact up to 2^53.
        while len(n) > 1 and k[-2] * n[-1] >= k[-1] * n[-2]:
            first.pop()
            last_n, last_k = n.pop(), k.pop()
            n[-1] += last_n
            k[-1] += last_k
    return Blocks(first, n, k)


# --- probabilities passed as logits ---------------------------------------------------------------


def like_probabilities(logit: Tensor, count: Tensor) -> Tensor:
    """Whether all logits are in [0, 1], spread over it or crowded at one end; a 0-d tensor.

    The logits of an untrained network can be in [0, 1] too, but in a heap clear of both ends.
    """
    seen = count > 0  # not amin and amax: without a dimension XLA reduces nothing
    low = torch.where(seen, logit, torch.inf).min()
    high = torch.where(seen, logit, -torch.inf).max()
    ends = (logit <= high / 10, 1 - logit <= (1 - low) / 10)
    crowd = torch.stack([torch.where(end, count, 0).sum() for end in ends]).max()
    spread = (low <= 0.25) & (high >= 0.75) | (crowd >= _CROWD * count.sum())
    return (low >= 0) & (high <= 1) & (high - low >= _LEVEL) & spread


# --- scores ---------------------------------------------------------------------------------------


def entropy(p: Tensor) -> Tensor:
    """Entropy of a share of positives, in nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


def least_score(count: Tensor, positive: Tensor, score: str) -> Tensor:
    """The mean score if each cell, or block, predicts its own share of positives."""
    share = torch.where(count > 0, positive / count, 0.5)
    each = entropy(share) if score == "log" else share * (1 - share)
    return (count * each).sum(-1) / count.sum(-1)


def refinement(cells: Cells, score: str) -> Tensor:
    """The mean score of one label after the best monotone repair."""
    if not bool(cells.count.sum() > 0):
        return cells.count.new_full((), math.nan)
    blocks = isotonic(cells.count, cells.positive)
    return least_score(
        cells.count.new_tensor(blocks.count), cells.count.new_tensor(blocks.positive), score
    )
