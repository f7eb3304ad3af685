"""A line through the logits of cells: the logistic fit that slope, intercept and repairs use."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS = 200  # at most, of Newton's method; it usually takes a dozen
_HALVINGS = 33  # of such a step, which is then 1e-10 of itself
_TINY = 1e-15  # share of the mean loss: stop if a step promises a smaller gain


class Cells(NamedTuple):
    """The data that a repair is fitted to: all cells, in order of their logit."""

    logit: Tensor
    """(cells,) the logit that represents each cell, float64"""
    count: Tensor  # type: ignore[assignment]
    """(cells,) elements in each cell, float64"""
    positive: Tensor
    """(cells,) positives in each cell, float64"""


def affine(cells: Cells, *, slope: float | None = None, bias: bool = True) -> tuple[float, float]:
    """As :func:`lines`, of one row."""
    a, b = lines(Cells(*(part[None] for part in cells)), slope=slope, bias=bias)
    return float(a), float(b)


def lines(cells: Cells, *, slope: float | None = None, bias: bool = True) -> tuple[Tensor, Tensor]:
    """The (a, b) of each row that minimise the mean loss of a z + b.

    ``slope`` fixes a, ``bias=False`` b = 0. nan if the cells of a row determine no line: no
    element, only one class, or, for a slope, only one logit. If a threshold separates the
    classes, the slope is infinite.
    """
    # The cells of a row that hold anything, side by side: those of other rows can be elsewhere.
    seen = cells.count > 0
    place = seen.cumsum(1) - 1
    at, width = (seen.nonzero()[:, 0], place[seen]), int(place.max().clamp(min=0)) + 1
    z, n, k = (part.new_zeros(len(part), width).index_put_(at, part[seen]) for part in cells)
    total, positive = n.sum(-1), k.sum(-1)
    both = (positive > 0) & (positive < total)  # nan is not
    a, b = torch.full_like(total, math.nan), torch.full_like(total, math.nan)
    if slope is not None:
        a[:], b[both] = slope, _shift(slope * z[both], n[both], k[both]) if bias else 0.0
        return a, b
    b[both] = math.nan if bias else 0.0
    # Whether some logit (without a bias: 0) separates the classes; both ways if all are alike,
    # which the scale does not tell: the rounded mean of equal logits need not be equal to them.
    (low, high), (least, most) = _ends(z, n > k), _ends(z, k > 0)
    up = high <= least if bias else (high <= 0) & (least >= 0)
    down = most <= low if bias else (most <= 0) & (low >= 0)
    # Centred, so that logits that differ little beside their mean can be told apart.
    mean = (n * z).sum(-1) / total if bias else torch.zeros_like(total)
    scale = ((n * (z - mean[:, None]) ** 2).sum(-1) / total).sqrt()
    known = both & (scale > 0)
    a[known & down & ~up], a[known & up & ~down] = -math.inf, math.inf
    b[known & (up | down)] = math.nan
    fit = known & ~up & ~down
    mean, scale = mean[fit], scale[fit]
    a[fit], b[fit] = _newton((z[fit] - mean[:, None]) / scale[:, None], n[fit], k[fit], bias)
    a[fit] /= scale
    b[fit] -= a[fit] * mean
    return a, b


def _ends(z: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest of the marked ones of each row; inf and -inf if there are none."""
    return z.where(where, math.inf).amin(-1), z.where(where, -math.inf).amax(-1)


def _shift(z: Tensor, n: Tensor, k: Tensor) -> Tensor:
    """The b that minimises the mean loss of z + b, at which the mean probability is the base rate.

    By bisection, since Newton's method gets nowhere from where all probabilities are 0 or 1.
    """
    least, most = _ends(z, n > 0)
    total = n.sum(-1, keepdim=True)
    n, k = n / total, k / total
    middle = torch.logit(k.sum(-1))
    low, high = middle - most, middle - least
    while True:
        b = (low + high) / 2
        # Each class alone: a difference would lose the digits of what is sure and right.
        over = ((n - k) * torch.sigmoid(z + b[:, None])).sum(-1)
        under = (k * torch.sigmoid(-z - b[:, None])).sum(-1)
        going = (high - low >= 1e-12 * b.abs().clamp(min=1.0)) & (over != under)
        if not bool(going.any()):
            return b
        low, high = torch.where(over < under, b, low), torch.where(over > under, b, high)


def _newton(z: Tensor, n: Tensor, k: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Newton's method with steps halved until the loss falls, which is safe for a convex loss."""
    total = n.sum(-1, keepdim=True)
    n, k = n / total, k / total
    x = torch.stack((z, torch.ones_like(z))[: 1 + bias], -1)
    rate = k.sum(-1)
    theta = torch.stack((0 * rate, torch.logit(rate))[: 1 + bias], -1)

    def loss(theta: Tensor) -> Tensor:
        line = (x @ theta[..., None])[..., 0]
        # Each class alone: a difference would lose the digits of what is sure and right.
        return ((n - k) * F.softplus(line) + k * F.softplus(-line)).sum(-1)

    value, going = loss(theta), torch.ones_like(rate, dtype=torch.bool)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid((x @ theta[..., None])[..., 0])
        gradient = ((n * p - k)[:, None] @ x)[:, 0]
        hessian = (x.mT * (n * p * (1 - p))[:, None]) @ x
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        # A little more on the diagonal, in case the Hessian is flat.
        diagonal += 1e-300 + 1e-14 * diagonal.sum(-1, keepdim=True)
        step = (torch.linalg.pinv(hessian, hermitian=True) @ gradient[..., None])[..., 0]
        promise = (gradient * step).sum(-1)
        going = going & (promise > _TINY * value.clamp(min=1e-300))
        if not bool(going.any()):
            break
        size = torch.ones_like(value)
        for _ in range(_HALVINGS):
            fell = loss(theta - size[:, None] * step) <= value - 1e-4 * size * promise
            if bool((fell | ~going).all()):
                break
            size = torch.where(fell, size, size / 2)
        going = going & fell
        theta = torch.where(going[:, None], theta - size[:, None] * step, theta)
        value = loss(theta)
    return theta[:, 0], theta[:, 1] if bias else torch.zeros_like(rate)
