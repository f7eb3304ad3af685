"""From cells to measures: pure functions over the last dimension; labels come before it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Counted, Grid
from .counting import TAME
from .line import Cells, lines

__all__ = ["Cells", "Decomposition", "Reliability"]

_FROM = 50  # elements from which numbers that look like probabilities are not an accident
_CROWD = 0.08  # share of the elements in the outer tenths of the range: no heap around 1/2
_MANY = 1000  # elements from which a quarter of that is a crowd
_LEVEL = 0.01  # logits within less than this are all alike
_INSIDE = 0.99  # share of the elements in [0, 1] from which the labels are asked
_NEAR = 0.1  # log-probabilities come as near to 0, at least one in a hundred
_NATS = 6.0  # by which the better reading must predict the labels better
_WIDE = 0.08  # their least standard deviation: those of a network that says little are nearer


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
        >>> count, round(float(confidence[1]), 4), round(float(accuracy[1]), 4)
        (tensor([ 0., 10.], dtype=torch.float64), 0.9, 0.8)
    """

    edges: Tensor
    """(num_bins + 1,) edges of the bins; those of equal mass have a row per label"""
    count: Tensor  # type: ignore[assignment]
    """(num_bins,) elements in each bin, or their weight, float64"""
    confidence: Tensor
    """(num_bins,) mean confidence in each bin"""
    accuracy: Tensor
    """(num_bins,) accuracy (top label) or share of positives (positive class) in each bin"""


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


# --- reading the counts ---------------------------------------------------------------------------


def cells_of(state: Counted, grid: Grid) -> Cells:
    """Mean logit, elements and positives of the cells, a row per label; the state is on the CPU."""
    count, positive = state.counts.sum(2), state.counts[:, :, 1]
    low, middle = grid.logits()
    seen, mean = count[..., :-1], state.doubts[..., :-1] / count[..., :-1]
    tame = (state.totals[:, 3] > 0)[:, None, None] & (low < TAME)
    size = torch.where(tame, torch.log1p(-mean) - mean.log(), state.sizes[..., :-1] / seen)
    # Rounding must not move a cell's mean across its neighbour's.
    size = size.maximum(low - 1e-3 * (1 + low))
    size = torch.where(seen > 0, size, middle)
    signed = torch.stack((-size[:, 0], size[:, 1]), 1)
    cells = Cells(*_in_order(signed, count[..., :-1], positive[..., :-1]))
    if bool((count[..., -1] > 0).any()):
        _place_sure(cells, low, count[..., -1], positive[..., -1], state.sizes[..., -1])
    return cells


def _in_order(*columns: Tensor) -> list[Tensor]:
    """Both predicted classes in a row, from the surest negative to the surest positive."""
    return [torch.cat((part[:, 0].flip(-1), part[:, 1]), -1) for part in columns]


def _place_sure(cells: Cells, low: Tensor, count: Tensor, positive: Tensor, bytes: Tensor) -> None:
    """Count the probabilities of 0 and 1 where the logits for which they stand lie.

    The next probability seen, or 8 bits, says how they were rounded: 1 stands for whatever is
    nearer to 1 than to that. Among the logits beyond this edge it is the one at which the line
    through all others predicts the share of positives: so they have no say in the slope, unless
    too many are wrong. Without such a line it is the mean logit, if all of [1 - h, 1] are alike
    likely: the entropy of h over h.
    """
    slope, bias = lines(cells)
    line, far = (slope > 0) & (slope < math.inf), cells.logit.new_tensor(-math.inf)
    seen = [torch.where(cells.count > 0, sign * cells.logit, far).amax(-1) for sign in (-1, 1)]
    for side, sign in enumerate((-1, 1)):
        nearest, share = seen[side], (positive[:, side] + 0.5) / (count[:, side] + 1)
        half = 0.5 / (1 + nearest.clamp(max=700.0).exp())
        half = torch.where(bytes[:, side] > 0, half.clamp(max=0.5 / 255), half)
        size = torch.maximum(-torch.logit(half), nearest)
        on_line = torch.maximum(size, sign * (torch.logit(share) - bias) / slope)
        size = torch.where(line, on_line, size - torch.log1p(-half) / half)
        place = len(low) - 1 + sign * (low <= size[:, None]).sum(-1) + (side == 0)
        rows = (count[:, side] > 0).nonzero()[:, 0]
        at, new = (rows, place[rows]), count[rows, side]
        total = cells.count[at] + new
        cells.logit[at] = (cells.count[at] * cells.logit[at] + new * sign * size[rows]) / total
        cells.count[at] = total
        cells.positive[at] += positive[rows, side]


def bins_of(state: Counted, kind: str) -> Bins:
    """Count, outcomes and summed confidence of each cell, in order of confidence."""
    counts, doubts = state.counts, state.doubts
    count, positive = counts.sum(2), counts[:, :, 1]
    if kind == "top_label":
        right, total = counts[:, 0, 0] + counts[:, 1, 1], count.sum(1)
        return Bins(total, right, total - doubts.sum(1))
    probability = torch.stack((doubts[:, 0], count[:, 1] - doubts[:, 1]), 1)
    return Bins(*_in_order(count, positive, probability))


# --- bins -----------------------------------------------------------------------------------------


def into_bins(cells: Bins, index: Tensor, num_bins: int) -> Bins:
    """Cells summed into the bins that ``index`` names; it has the shape of a row or of all."""
    index = index.expand(cells.count.shape)
    size = (*index.shape[:-1], num_bins)
    return Bins(*(part.new_zeros(size).scatter_add_(-1, index, part) for part in cells))


def mass_index(cells: Bins, num_bins: int) -> Tensor:
    """The bin of equal mass to which each cell goes: that of its middle element."""
    middle = cells.count.cumsum(-1) - (cells.count + cells.count.clamp(max=1)) / 2
    index = (middle * num_bins / cells.total[..., None]).floor().nan_to_num(0)
    return index.clamp(0, num_bins - 1).to(torch.int64)


def equal_mass(cells: Bins, num_bins: int) -> Bins:
    return into_bins(cells, mass_index(cells, num_bins), num_bins)


def equal_mass_table(cells: Bins, places: Tensor, num_bins: int) -> tuple[Tensor, Bins]:
    """Bins of equal mass, and the edges of the cells where they meet, with a row per label."""
    index = mass_index(cells, num_bins)
    first = index[:, None] < torch.arange(num_bins + 1, device=index.device)[:, None]
    return places.to(cells.count)[first.sum(-1)], into_bins(cells, index, num_bins)


def between(cells: Bins, places: Tensor, edges: Tensor) -> Bins:
    """Bins between these edges; ``places`` are those of the cells, which go where their centre is.

    The last bin has both its edges.
    """
    places = places.to(cells.count)
    centre = (places[1:] + places[:-1]) / 2
    # What lies outside goes into a bin before the first and one after the last.
    index = torch.bucketize(centre, edges.contiguous(), right=True) - (centre == edges[-1]).long()
    bins = into_bins(cells, index, len(edges) + 1)
    return Bins(*(part[..., 1:-1] for part in bins))


def gaps(bins: Bins) -> Tensor:
    """|accuracy - confidence| of each bin, 0 in empty ones."""
    gap = (bins.outcome - bins.confidence).abs() / bins.count
    return torch.where(bins.count == 0, 0.0, gap)


def ece(bins: Bins) -> Tensor:
    return (bins.outcome - bins.confidence).abs().sum(-1) / bins.total


def oe(bins: Bins) -> Tensor:
    over = (bins.confidence - bins.outcome).clamp(min=0)
    weighted = torch.where(bins.count == 0, 0.0, bins.confidence / bins.count * over)
    return weighted.sum(-1) / bins.total


def mce(bins: Bins) -> Tensor:
    return torch.where(bins.total == 0, torch.nan, gaps(bins).amax(-1))


def average(bins: Bins) -> Tensor:
    return gaps(bins).sum(-1) / (bins.count != 0).sum(-1)


def l2(bins: Bins) -> Tensor:
    return ((bins.count * gaps(bins) ** 2).sum(-1) / bins.total).sqrt()


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


# --- isotonic regression --------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Blocks of isotonic regression: pooled neighbours whose share of positives did not rise."""

    first: list[int]
    """index of the first cell of each block"""
    count: list[float]  # type: ignore[assignment]
    positive: list[float]


def isotonic(count: Tensor, positive: Tensor) -> Blocks:
    """Pool adjacent violators over the cells that are not empty."""
    blocks: list[tuple[int, float, float]] = []
    for first, (n, k) in enumerate(zip(count.tolist(), positive.tolist(), strict=True)):
        if not n > 0:
            continue
        # Compared as products of whole numbers, exact up to 2^53.
        while blocks and blocks[-1][2] * n >= k * blocks[-1][1]:
            first, before, ones = blocks.pop()
            n, k = before + n, ones + k
        blocks.append((first, n, k))
    return Blocks([b[0] for b in blocks], [b[1] for b in blocks], [b[2] for b in blocks])


# --- probabilities passed as logits ---------------------------------------------------------------


def like_probabilities(cells: Cells) -> str:
    """Whether the logits of one label look like "probabilities" or "log-probabilities", or "".

    Probabilities are all in [0, 1], and many of them near an end or both; the logits of an
    untrained network can be in [0, 1] too, but in a heap clear of both. Or the labels say so, and
    a few may lie outside: read as probabilities, the numbers predict them far better than as
    logits, and than the base rate does. Log-probabilities reach up to 0 but not beyond, and are
    told by the labels alone.
    """
    z, n, k = (part[cells.count > 0] for part in cells)
    total = float(n.sum())
    if not total >= _FROM:
        return ""
    low, high = float(z.min()), float(z.max())
    if low >= 0 and high <= 1 and high - low >= _LEVEL:
        crowd = float(n[(z <= high / 10) | (1 - z <= (1 - low) / 10)].sum())
        spread = 2 * min(float(n[z <= 0.25].sum()), float(n[z >= 0.75].sum()))
        enough = _CROWD * total
        if spread >= enough or crowd >= (enough if total < _MANY else enough / 4):
            return "probabilities"
    rate = k.sum() / total
    best = min(_loss(torch.sigmoid(z), n, k), _loss(rate.expand_as(z), n, k)) - _NATS
    inside, near = (float(n[part].sum()) for part in ((z >= 0) & (z <= 1), z > -_NEAR))
    wide = float((n * (z - (n * z).sum() / total) ** 2).sum() / total) >= _WIDE**2
    if inside >= _INSIDE * total and wide and _loss(z, n, k) < best:
        return "probabilities"
    if high <= 0 and near >= 0.01 * total and _loss(z.exp(), n, k) < best:
        return "log-probabilities"
    return ""


def _loss(p: Tensor, n: Tensor, k: Tensor) -> float:
    p = p.clamp(1e-4, 1 - 1e-4)
    return float(-(k * torch.log(p) + (n - k) * torch.log1p(-p)).sum())


# --- scores ---------------------------------------------------------------------------------------


def least_score(count: Tensor, positive: Tensor, score: str) -> Tensor:
    """The mean score if each cell, or block, predicts its own share of positives."""
    share = torch.where(count > 0, positive / count, 0.5)
    each = share * (1 - share)
    if score == "log":
        each = torch.special.entr(share) + torch.special.entr(1 - share)
    return (count * each).sum(-1) / count.sum(-1)


def refined(blocks: Blocks, score: str) -> Tensor:
    """The mean score of one label if each block of the isotonic curve predicts its own share."""
    count, positive = (torch.tensor(one, dtype=torch.float64, device="cpu") for one in blocks[1:])
    return least_score(count, positive, score)
