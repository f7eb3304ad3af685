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
