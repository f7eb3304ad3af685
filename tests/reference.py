"""The formulas in NumPy float64. Imports nothing of the package."""

from itertools import pairwise
from math import prod

import numpy as np


def sigmoid(x):
    x = np.asarray(x, dtype=np.float64)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def softplus(x):
    """zeta(x) = log(1 + e^x)"""
    return np.logaddexp(0.0, np.asarray(x, dtype=np.float64))


def bce(x, y, pos_weight=1.0):
    """-[w y log sigma(x) + (1 - y) log sigma(-x)]"""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return pos_weight * y * softplus(-x) + (1 - y) * softplus(x)


def perturbed(y, beta):
    """p(y, beta) = (1 - beta) y + beta/2"""
    return (1 - beta) * y + beta / 2


def effective(y, alpha, beta):
    """q = (1 - alpha beta) y + alpha beta / 2"""
    return (1 - alpha * beta) * y + alpha * beta / 2


def sc_bce(x, y, alpha, beta, weight=1.0, pos_weight=1.0, valid=None, reduction="mean"):
    """BCE at the effective target; alpha and beta broadcast to x, invalid elements give 0."""
    valid = np.ones(np.shape(x), dtype=bool) if valid is None else valid
    x, y = np.where(valid, x, 0.0), np.where(valid, y, 0.0)
    loss = np.where(valid, weight * bce(x, effective(y, alpha, beta), pos_weight), 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / max(valid.sum(), 1)


def margin(x, y, weight=1.0, valid=None):
    """mean over the valid elements of weight (2y - 1) x, one per sample; nan without any"""
    x = np.asarray(x, dtype=np.float64).reshape(len(x), prod(np.shape(x)[1:]))
    y = np.asarray(y, dtype=np.float64).reshape(x.shape)
    weight = np.broadcast_to(weight, x.shape) if np.ndim(weight) == 0 else weight.reshape(x.shape)
    valid = np.ones(x.shape, dtype=bool) if valid is None else valid.reshape(x.shape)
    with np.errstate(invalid="ignore"):
        return np.where(valid, weight * (2 * y - 1) * x, 0.0).sum(1) / valid.sum(1)


def hits(x, y, valid=None):
    """share of the valid elements whose decision at 1/2 is right, one per sample"""
    x = np.asarray(x).reshape(len(x), prod(np.shape(x)[1:]))
    y = np.asarray(y).reshape(x.shape)
    valid = np.ones(x.shape, dtype=bool) if valid is None else valid.reshape(x.shape)
    with np.errstate(invalid="ignore"):
        return (((x >= 0) == (y >= 0.5)) & valid).sum(1) / valid.sum(1)


class Table:
    """The adaptive table, one row at a time: DESIGN's rules as loops over plain floats."""

    def __init__(
        self, rows, beta=2.0, objective="calibration", lr=0.002, penalty=2000.0, warmup=5,
        solver="proximal", focus=0.0, reference_accuracy=None,
    ):  # fmt: skip
        self.alpha = np.zeros(rows)
        self.recent = np.full(rows, 0.5)
        self.seen = np.zeros(rows, dtype=bool)
        self.beta, self.objective, self.lr, self.penalty = beta, objective, lr, penalty
        self.warmup, self.solver, self.focus = max(warmup, 1), solver, focus
        self.reference = reference_accuracy
        self.cap = min(1.0, 1 / beta - 0.01)
        self.accuracy = self.best = self.budget = 0.0
        self.difficulty = 0.5**focus
        self.steps = 0

    def observe(self, index, margins, shares):
        """One training batch: each row takes one step with the mean of its gradients."""
        for row in sorted(set(index.tolist())):
            here = [i for i in np.flatnonzero(index == row) if np.isfinite(margins[i])]
            if not here:
                continue
            if self.focus > 0:
                share = np.mean([shares[i] for i in here])
                self.recent[row] = 0.9 * self.recent[row] + 0.1 * share
                self.seen[row] = True
            if self.steps >= self.warmup:
                gradient = self.beta / 2 * np.mean([margins[i] for i in here])
                self.alpha[row] = self.moved(row, gradient)

    def moved(self, row, gradient):
        alpha, half = self.alpha[row], self.beta / 2
        budget = self.budget
        if self.focus > 0:
            share = (1 - self.recent[row]) ** self.focus / self.difficulty
            budget = min(budget * share, 0.45)
        climbed = alpha + self.lr * gradient
        if self.objective == "max_entropy":
            reference = self.best if self.reference is None else self.reference
            new = climbed + self.lr * self.penalty * min(self.accuracy - reference, 0.0)
        elif self.solver == "explicit":
            new = climbed + self.lr * self.penalty * min(budget - half * alpha, 0.0)
        elif half * climbed <= budget:
            new = climbed
        else:
            pull = self.lr * self.penalty
            new = (climbed + pull * budget) / (1 + pull * half)
        return min(max(new, 0.0), self.cap)

    def step(self, accuracy, confidence=None):
        self.steps += 1
        self.accuracy, self.best = accuracy, max(self.best, accuracy)
        if self.objective == "calibration":
            self.budget = 1 - accuracy
        elif self.objective == "feedback" and self.steps >= self.warmup:
            used = min(max(self.budget, 0.0), self.alpha.mean() * self.beta / 2)
            high = min(0.45, self.beta * self.cap / 2)
            self.budget = min(max(used + 0.5 * (confidence - accuracy), -0.45), high)
        if self.focus > 0 and self.seen.any():
            self.difficulty = ((1 - self.recent[self.seen]) ** self.focus).mean()


def readings(p, y, kind):
    """confidence and outcome of each element, as the kind of measure reads them"""
    p, y = np.asarray(p, dtype=np.float64).ravel(), np.asarray(y).ravel()
    if kind == "positive_class":
        return p, y.astype(np.float64)
    return np.maximum(p, 1 - p), ((p >= 0.5) == (y == 1)).astype(np.float64)


def equal_width(conf, outcome, num_bins):
    """(n, accuracy, confidence) of each bin that is not empty; p = 1 in the last"""
    index = np.minimum((conf * num_bins).astype(int), num_bins - 1)
    return _bins(conf, outcome, index, num_bins)


def equal_mass(conf, outcome, num_bins):
    order = np.argsort(conf, kind="stable")
    index = np.arange(len(conf)) * num_bins // len(conf)
    return _bins(conf[order], outcome[order], index, num_bins)


def _bins(conf, outcome, index, num_bins):
    return [
        ((index == m).sum(), outcome[index == m].mean(), conf[index == m].mean())
        for m in range(num_bins)
        if (index == m).any()
    ]


def ece(bins):
    n = sum(b[0] for b in bins)
    return sum(b[0] / n * abs(b[1] - b[2]) for b in bins)


def oe(bins):
    n = sum(b[0] for b in bins)
    return sum(b[0] / n * b[2] * max(b[2] - b[1], 0) for b in bins)


def mce(bins):
    return max(abs(b[1] - b[2]) for b in bins)


def debiased(bins):
    n = sum(b[0] for b in bins)
    terms = [
        b[0] / n * ((b[2] - b[1]) ** 2 - b[1] * (1 - b[1]) / (b[0] - 1)) for b in bins if b[0] > 1
    ]
    return np.sqrt(max(sum(terms), 0))


def sweep(conf, outcome):
    best = equal_mass(conf, outcome, 1)
    for num_bins in range(2, len(conf) + 1):
        bins = equal_mass(conf, outcome, num_bins)
        accuracy = [b[1] for b in bins]
        if any(later < earlier for earlier, later in pairwise(accuracy)):
            break
        best = bins
    return ece(best)


# --- repairs and what they leave ----------------------------------------------------------------


def isotonic(x, y):
    """The rising curve nearest to y, at each x, by its minimax formula; ties share one value"""
    order = np.unique(x)
    n = np.array([(x == one).sum() for one in order], dtype=np.float64)
    k = np.array([np.asarray(y, dtype=np.float64)[x == one].sum() for one in order])
    n, k = np.concatenate(([0], n.cumsum())), np.concatenate(([0], k.cumsum()))
    m = len(order)
    mean = np.array([[(k[j + 1] - k[i]) / (n[j + 1] - n[i]) if j >= i else np.inf
                      for j in range(m)] for i in range(m)])  # fmt: skip
    # At i: the largest, over starts up to i, of the least mean over ends from i on.
    fitted = np.array([mean[: i + 1, i:].min(1).max() for i in range(m)])
    return fitted[np.searchsorted(order, x)]


def log_score(p, y):
    """mean of -[y log p + (1 - y) log(1 - p)], with 0 log 0 = 0"""
    p, y = np.asarray(p, dtype=np.float64), np.asarray(y, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(y == 1, -np.log(p), -np.log(1 - p)).mean()


def brier_score(p, y):
    return ((np.asarray(p, dtype=np.float64) - y) ** 2).mean()


def decomposition(p, y, score):
    """(miscalibration, discrimination, uncertainty) by what each of three forecasts scores"""
    own, repaired = score(p, y), score(isotonic(p, y), y)
    constant = score(np.full(len(y), np.mean(y)), y)
    return own - repaired, constant - repaired, constant


def logistic(x, y, bias=True):
    """The a and b of the least mean of BCE(a x + b, y), by steps that each lower one bound

    The curvature of softplus is at most 1/4, so these steps never overshoot; slow, and sure.
    """
    design = np.stack((x, np.ones_like(x))[: 1 + bias], 1)
    inverse = np.linalg.inv(design.T @ design / 4)
    theta = np.zeros(1 + bias)
    for _ in range(20_000):
        step = inverse @ (design.T @ (sigmoid(design @ theta) - y))
        theta = theta - step
        if np.abs(step).max() < 1e-13:
            break
    return theta[0], (theta[1] if bias else 0.0)
