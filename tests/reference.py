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


def largest(prior):
    """beta of None: the strength at which the label farther from the prior reaches the other"""
    return 1 / np.maximum(prior, 1 - np.asarray(prior, dtype=np.float64))


def perturbed(y, beta, prior=0.5):
    """p(y) = (1 - beta) y + beta c"""
    return (1 - beta) * y + beta * prior


def effective(y, alpha, beta, prior=0.5):
    """q, the mean of a target that is p(y) with probability alpha, else y"""
    return alpha * perturbed(y, beta, prior) + (1 - alpha) * y


def sc_bce(
    x, y, alpha, beta, weight=1.0, pos_weight=1.0, valid=None, reduction="mean", prior=0.5
):  # fmt: skip
    """Mean BCE of the drawn targets; alpha, beta, prior broadcast to x, invalid elements give 0."""
    valid = np.ones(np.shape(x), dtype=bool) if valid is None else valid
    x, y = np.where(valid, x, 0.0), np.where(valid, y, 0.0)
    drawn, kept = bce(x, perturbed(y, beta, prior), pos_weight), bce(x, y, pos_weight)
    loss = np.where(valid, weight * (alpha * drawn + (1 - alpha) * kept), 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / max(valid.sum(), 1)


def slope(x, y, prior=0.5, weight=1.0):
    """mean of weight (y - c) x over each sample"""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return (weight * (y - prior) * x).reshape(len(x), -1).mean(1)


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
    """The adaptive table by either rule, one row and one element at a time; labels are kept.

    With an ``objective`` it is the paper's rule, otherwise the slope's.
    """

    def __init__(
        self, rows, level=0.2, focus=2.0, beta=1.0, prior="observed", warmup=1, num_labels=None,
        objective=None, lr=0.002, penalty=2000.0,
    ):  # fmt: skip
        self.alpha, self.recent = np.zeros(rows), np.full(rows, 0.5)
        self.since, self.ever = set(), set()
        self.level, self.focus, self.beta, self.warmup = level, focus, beta, max(warmup, 1)
        self.objective, self.lr, self.penalty, self.labels = objective, lr, penalty, num_labels
        self.counted = prior if isinstance(prior, str) else None
        self.prior = np.full(num_labels or 1, 0.5) if self.counted else np.asarray(prior, float)
        self.old, self.new = (
            [],
            [],
        )  # (place in prior, label, weight) until the last step, and since
        self.mean = self.accuracy = self.best = 0.0
        self.steps = 0

    @property
    def moving(self):
        return self.steps >= self.warmup

    @property
    def weighted(self):
        return self.counted == "level_weighted" and self.objective is None and self.focus > 0

    @property
    def kappa(self):
        """what a level of 1 costs in confidence"""
        if not self.counted and self.prior.ndim == 0 and self.prior == 0.5:
            return self.beta / 2
        priors = self.prior.ravel()
        costs = [y * (1 - priors[place]) + (1 - y) * priors[place] for place, y, _ in self.old]
        return self.beta * sum(costs) / max(len(costs), 1)

    @property
    def cap(self):
        farther = max(max(c, 1 - c) for c in self.prior.ravel())
        return min(1.0, 1 / (2 * farther * self.beta) - 0.01)

    def places(self, shape):
        """the place in the flat prior of each element"""
        number = np.arange(self.prior.size)
        if self.counted and self.labels is not None:
            number = number.reshape(1, -1, *(1 for _ in shape[2:]))
        else:
            number = number.reshape(() if self.counted else self.prior.shape)
        return np.broadcast_to(number, shape)

    def observe(self, index, x, y, valid=None, weight=1.0):
        """One training batch: a row that occurs more than once takes the mean of its changes."""
        valid = np.ones(x.shape, dtype=bool) if valid is None else valid
        place, weight = self.places(x.shape), np.broadcast_to(weight, x.shape)
        c = self.prior.ravel()[place]
        alpha, recent = self.alpha.copy(), self.recent.copy()
        met = {}
        for sample, row in enumerate(index.tolist()):
            own = 1.0
            if self.weighted:
                own = alpha[row] if self.moving else (1 - recent[row]) ** self.focus
            slopes, right = [], []
            for element in np.ndindex(x.shape[1:]):
                at = (sample, *element)
                if valid[at]:
                    slopes.append(weight[at] * (y[at] - c[at]) * x[at])
                    right.append((x[at] >= 0) == (y[at] >= 0.5))
                    self.new.append((place[at], y[at], own))
            step = self.climb(alpha[row], self.beta * np.mean(slopes)) if slopes else 0.0
            share = np.mean(right) if right else recent[row]
            met.setdefault(row, []).append((step, 0.1 * (share - recent[row])))
        for row, changes in met.items():
            step, change = np.mean(changes, axis=0)
            self.recent[row] += change
            if self.objective and self.moving:
                self.alpha[row] = min(max(alpha[row] + step, 0.0), self.cap)
        self.since |= met.keys()

    def climb(self, alpha, slope):
        if not np.isfinite(slope) or self.kappa == 0:
            return 0.0
        over = 1 - self.accuracy - self.kappa * alpha
        if self.objective == "max_entropy":
            over = self.accuracy - self.best
        return self.lr * (slope + self.penalty * min(over, 0.0))

    @property
    def shown(self):
        """the prior as the module shows it"""
        return self.prior.reshape(()) if self.counted and self.labels is None else self.prior

    @property
    def mean_level(self):
        rows = sorted(self.ever | self.since) or range(len(self.alpha))
        return np.mean(self.alpha[rows])

    def step(self, accuracy, slope=None):
        together([self], accuracy, slope)

    def count(self, fresh):
        """the labels of an epoch, on any rank"""
        if not self.weighted:
            self.old = self.old + fresh
        else:
            hard = (1 - self.recent) ** self.focus
            unit = np.mean(self.alpha if self.moving else hard)
            fresh = [(place, y, own / unit) for place, y, own in fresh] if unit else []
            sums = [sum(own for at, _, own in fresh if at == p) for p in range(self.prior.size)]
            self.old = fresh if min(sums) > 0 else self.old
        if self.counted:
            for place in range(self.prior.size):
                own = [(y, share) for at, y, share in self.old if at == place]
                positive = sum(y * share for y, share in own)
                self.prior[place] = (positive + 0.5) / (sum(share for _, share in own) + 1)

    def end(self, accuracy, slope, fresh, moved):
        """the end of an epoch, the tables of all ranks merged; `moved`: rows, on any of them"""
        self.count(fresh)
        self.steps += 1
        self.ever |= moved
        self.since = set()
        if self.objective:
            self.accuracy, self.best = accuracy, max(self.best, accuracy)
            self.alpha = np.minimum(self.alpha, self.cap)
        elif self.moving:
            mean = self.level if self.steps == self.warmup else self.mean
            mean += 0.1 / self.beta * (0 if np.isnan(slope) else min(max(1 - slope, -1), 1))
            self.mean = min(max(mean, 0.0), self.cap)
            hard = (1 - self.recent) ** self.focus
            usual = np.mean(hard[sorted(self.ever)])
            for row in range(len(self.alpha)):
                share = hard[row] / usual if row in self.ever and usual > 0 else 1.0
                self.alpha[row] = min(self.mean * share, self.cap)


def together(tables, accuracy, slope=None):
    """A step of several ranks: a row becomes its mean over those that trained it."""
    moved = set().union(*(table.since for table in tables))
    if not moved:
        return
    fresh = [label for table in tables for label in table.new]
    for row in moved:
        movers = [table for table in tables if row in table.since]
        for name in ("alpha", "recent"):
            mean = sum(getattr(table, name)[row] for table in movers) / len(movers)
            for table in tables:
                getattr(table, name)[row] = mean
    for table in tables:
        table.new = []
        table.end(accuracy, slope, fresh, moved)


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
