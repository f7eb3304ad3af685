"""The formulas in NumPy float64. Imports nothing of the package."""

from itertools import pairwise
from math import prod

import numpy as np
from scipy.optimize import minimize_scalar


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
    """The adaptive table, one row and one element at a time.

    Labels are kept, not counted; the proximal step is searched for, not solved.
    """

    def __init__(
        self, rows, beta=2.0, prior=0.5, objective="calibration", lr=0.002, penalty=2000.0,
        warmup=5, solver="proximal", focus=0.0, reference_accuracy=None, num_labels=None,
    ):  # fmt: skip
        self.alpha = np.zeros(rows)
        self.recent = np.full(rows, 0.5)
        self.since, self.ever = set(), set()
        self.beta, self.objective, self.lr, self.penalty = beta, objective, lr, penalty
        self.warmup, self.solver, self.focus = max(warmup, 1), solver, focus
        self.reference, self.labels = reference_accuracy, num_labels
        self.observed = isinstance(prior, str)
        self.prior = np.full(num_labels or 1, 0.5) if self.observed else np.asarray(prior, float)
        self.old, self.new = [], []  # (place in prior, label) until the last step, and since
        self.accuracy = self.best = self.budget = 0.0
        self.difficulty = 0.5**focus
        self.steps = 0

    @property
    def kappa(self):
        """what a level of 1 costs in confidence, label by label"""
        if not self.observed and self.prior.ndim == 0 and self.prior == 0.5:
            return self.beta / 2
        priors = self.prior.ravel()
        costs = [1 - priors[place] if y >= 0.5 else priors[place] for place, y in self.old]
        return self.beta * sum(costs) / max(len(costs), 1)

    @property
    def cap(self):
        farther = max(max(c, 1 - c) for c in self.prior.ravel())
        return min(1.0, 1 / (2 * farther * self.beta) - 0.01)

    def places(self, shape):
        """the place in the flat prior of each element, and its value"""
        number = np.arange(self.prior.size)
        if self.observed and self.labels is not None:
            number = number.reshape(1, -1, *(1 for _ in shape[2:]))
        else:
            number = number.reshape(self.prior.shape if not self.observed else ())
        return np.broadcast_to(number, shape)

    def observe(self, index, x, y, valid=None, weight=1.0):
        """One training batch: each row takes one step with the mean of its slopes."""
        valid = np.ones(x.shape, dtype=bool) if valid is None else valid
        place, weight = self.places(x.shape), np.broadcast_to(weight, x.shape)
        c = self.prior.ravel()[place]
        if self.steps < self.warmup and self.focus == 0:
            self.since |= set(index.tolist())  # on sight: nothing is measured yet
        met = {}
        for sample, row in enumerate(index.tolist()):
            slopes, right = [], []
            for element in np.ndindex(x.shape[1:]):
                at = (sample, *element)
                if valid[at]:
                    slopes.append(weight[at] * (y[at] - c[at]) * x[at])
                    right.append((x[at] >= 0) == (y[at] >= 0.5))
                    self.new.append((place[at], y[at]))
            if slopes and np.isfinite(sum(slopes)):
                met.setdefault(row, []).append((np.mean(slopes), np.mean(right)))
        for row, pairs in met.items():
            slope, share = np.mean(pairs, axis=0)
            self.since.add(row)
            self.recent[row] = 0.9 * self.recent[row] + 0.1 * share
            if self.steps >= self.warmup and self.kappa > 0:
                self.alpha[row] = self.climbed(row, self.beta * slope)

    def climbed(self, row, gain):
        alpha, kappa, budget = self.alpha[row], self.kappa, self.budget
        if self.focus > 0 and self.difficulty > 0:
            share = (1 - self.recent[row]) ** self.focus / self.difficulty
            budget = min(budget * share, 0.45)
        elif self.focus > 0:
            budget = min(budget, 0.45)
        reference = self.best if self.reference is None else self.reference
        lost = min(self.accuracy - reference, 0.0)
        if self.solver == "explicit":
            over = min(budget - kappa * alpha, 0.0)
            pull = lost if self.objective == "max_entropy" else over
            new = alpha + self.lr * (gain + self.penalty * pull)
            return min(max(new, 0.0), self.cap)

        def worse(doubt):
            near = (doubt - kappa * alpha) ** 2 / (2 * self.lr)
            if self.objective == "max_entropy":
                return near - (gain + self.penalty * lost) / kappa * doubt
            over = self.penalty / (2 * kappa) * max(doubt - budget, 0.0) ** 2
            return near - gain / kappa * doubt + over

        high = kappa * self.cap
        found = minimize_scalar(worse, bounds=(0, high), method="bounded", options={"xatol": 1e-10})
        return min([0.0, high, found.x], key=worse) / kappa

    @property
    def shown(self):
        """the prior as the module shows it"""
        alone = self.observed and self.labels is None
        return self.prior.reshape(()) if alone else self.prior

    def mean_level(self, rows):
        return sum(self.alpha[row] for row in rows) / max(len(rows), 1)

    @property
    def doubt(self):
        return self.kappa * self.mean_level(self.ever | self.since)

    def step(self, accuracy, confidence=None):
        together([self], accuracy, confidence)

    def end(self, accuracy, confidence, moved):
        """the end of an epoch, the tables of all ranks merged; `moved`: rows, on any of them"""
        self.steps += 1
        if self.observed:
            for place in range(self.prior.size):
                own = [y for where, y in self.old if where == place]
                self.prior[place] = (sum(own) + 0.5) / (len(own) + 1)
        self.alpha = np.minimum(self.alpha, self.cap)
        self.ever |= moved
        self.since = set()
        self.accuracy, self.best = accuracy, max(self.best, accuracy)
        if self.objective == "calibration":
            self.budget = 1 - accuracy
        elif self.objective == "feedback" and self.steps >= self.warmup and moved:
            used = min(max(self.budget, 0.0), self.kappa * self.mean_level(moved))
            high = min(0.45, self.kappa * self.cap)
            self.budget = min(max(used + 0.5 * (confidence - accuracy), -0.45), high)
        if self.focus > 0 and self.ever:
            seen = [(1 - self.recent[row]) ** self.focus for row in self.ever]
            self.difficulty = sum(seen) / len(seen)


def together(tables, accuracy, confidence=None):
    """A step of several ranks: a row becomes its mean over those that moved it."""
    moved = set().union(*(table.since for table in tables))
    fresh = [label for table in tables for label in table.new]
    for row in moved:
        movers = [table for table in tables if row in table.since]
        for name in ("alpha", "recent"):
            mean = sum(getattr(table, name)[row] for table in movers) / len(movers)
            for table in tables:
                getattr(table, name)[row] = mean
    for table in tables:
        table.old, table.new = table.old + fresh, []
        table.end(accuracy, confidence, moved)


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
