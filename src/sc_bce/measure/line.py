"""A line through the logits of cells: the logistic fit that slope, intercept and repairs use."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS = 200  # at most, of Newton's method; it usually takes a dozen
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
    """The (a, b) that minimise the mean loss of a z + b; ``slope`` fixes a, ``bias=False`` b = 0.

    nan if the cells determine no line: no element, only one class, or, for a slope, only one
    logit. If a threshold separates the classes, the slope is infinite.
    """
    z, n, k = (part[cells.count > 0] for part in cells)
    total, positive = float(n.sum()), float(k.sum())
    if not 0 < positive < total:  # nan comes here too
        return (math.nan if slope is None else slope), math.nan
    if slope is not None:
        return slope, (_shift(slope * z, n, k) if bias else 0.0)
    # Compared, since the rounded mean of equal logits need not be equal to them.
    alike = not bool((z != (z[0] if bias else 0.0)).any())
    # Centred, so that logits that differ little beside their mean can be told apart.
    mean = float((n * z).sum() / total) if bias else 0.0
    scale = 0.0 if alike else float((n * (z - mean) ** 2).sum() / total) ** 0.5
    if scale == 0:
        return math.nan, (math.nan if bias else 0.0)
    a, b = _apart(z, n, k, bias), 0.0
    if not a:
        a, b = _newton((z - mean) / scale, n, k, bias)
        a /= scale
        b -= a * mean
    return a, (b if math.isfinite(a) else math.nan)


def _apart(z: Tensor, n: Tensor, k: Tensor, bias: bool) -> float:
    """An infinite slope if some logit (without a bias: 0) separates the classes, otherwise 0."""
    negative, positive = (z[part].aminmax() for part in (n > k, k > 0))
    for low, high, end in ((negative, positive, math.inf), (positive, negative, -math.inf)):
        between = low.max <= high.min if bias else low.max <= 0 <= high.min
        if bool(between):
            return end
    return 0.0


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


def _newton(z: Tensor, n: Tensor, k: Tensor, bias: bool) -> tuple[float, float]:
    """Newton's method with steps halved until the loss falls, which is safe for a convex loss."""
    n, k = n / n.sum(), k / n.sum()
    x = torch.stack((z, torch.ones_like(z))[: 1 + bias], 1)
    theta = torch.stack((0 * k.sum(), torch.logit(k.sum())))[: 1 + bias]

    def loss(theta: Tensor) -> float:
        line = x @ theta
        # Each class alone: a difference would lose the digits of what is sure and right.
        return float(((n - k) * F.softplus(line) + k * F.softplus(-line)).sum())

    value = loss(theta)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid(x @ theta)
        gradient, hessian = (n * p - k) @ x, (x.T * (n * p * (1 - p))) @ x
        # A little more on the diagonal, in case the Hessian is flat.
        hessian.diagonal().add_(1e-300 + 1e-14 * hessian.trace())
        step = torch.linalg.pinv(hessian, hermitian=True) @ gradient
        promise, size = float(gradient @ step), 1.0
        if not promise > _TINY * max(value, 1e-300):
            break
        while size > 1e-10 and not loss(theta - size * step) <= value - 1e-4 * size * promise:
            size /= 2
        if size <= 1e-10:
            break
        theta = theta - size * step
        value = loss(theta)
    a, b = (*theta.tolist(), 0.0)[:2]
    return a, b
