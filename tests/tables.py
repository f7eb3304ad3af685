"""Adaptive losses whose every argument is named, whatever the defaults are."""

from typing import NamedTuple

import torch
from devices import random

from sc_bce import AdaptivePerturbation

SETTING = dict(
    level=0.2, focus=2.0, beta=1.0, prior="observed", warmup=1, sampling="expected",
    num_labels=None, reduction="mean",
)  # fmt: skip
PUBLISHED = dict(
    objective="calibration", lr=0.002, penalty=2000.0, beta=2.0, prior=0.5, warmup=5,
    sampling="expected", num_labels=None, reduction="mean",
)  # fmt: skip


class Measured(NamedTuple):
    """What a step needs of a histogram."""

    found: float = 0.9
    fitted: float = 0.7

    def accuracy(self):
        return self.found

    def slope(self):
        return self.fitted


def build(num_samples, **options):
    return AdaptivePerturbation(num_samples, **{**SETTING, **options})


def published(num_samples, **options):
    return AdaptivePerturbation.published(num_samples, **{**PUBLISHED, **options})


def put(criterion, **values):
    """The module with these values in its state."""
    state = criterion.state_dict()
    for name, value in values.items():
        value = torch.as_tensor(value, device=state[name].device)
        state[name] = value.to(state[name].dtype).expand_as(state[name]).clone()
    criterion.load_state_dict(state)
    return criterion


def moving(num_samples=6, level=0.2, **options):
    """The default rule past its warm-up."""
    criterion = build(num_samples, level=level, **options)
    return put(criterion, steps=max(criterion.warmup, 1), alpha=level, mean_level=level)


def climbing(num_samples=6, accuracy=0.9, **options):
    """The published rule past its warm-up."""
    criterion = published(num_samples, **{"warmup": 1, **options})
    return put(criterion, steps=1, accuracy=accuracy, best_accuracy=accuracy)


def trained(criterion, batches=1, labels=3, seed=0):
    """After some batches of over-confident logits, ones and zeros."""
    rows = len(criterion.alpha)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        x = random(torch.randn, generator, 4, labels)
        y = (x + 0.5 * random(torch.randn, generator, 4, labels) > 0).to(x.dtype)
        index = random(torch.randperm, generator, rows)[:4]
        criterion(6 * x[: len(index)], y[: len(index)], index)
    return criterion


def saved(criterion):
    """A copy of the state."""
    return {name: value.clone() for name, value in criterion.state_dict().items()}


def assert_same(criterion, state, but=()):
    now = criterion.state_dict() if isinstance(criterion, torch.nn.Module) else criterion
    assert list(now) == list(state)
    for name, value in state.items():
        if name not in but:
            assert torch.equal(now[name], value), name
            assert now[name].dtype == value.dtype, name
