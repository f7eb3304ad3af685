"""Adaptive losses whose every argument is named, whatever the defaults are."""

import torch
from devices import random

from sc_bce import AdaptivePerturbation

SETTING = dict(
    beta=2.0, prior=0.5, objective="calibration", lr=0.002, penalty=2000.0, warmup=5,
    solver="proximal", focus=0.0, sampling="sample", num_labels=None, reference_accuracy=None,
    reduction="mean",
)  # fmt: skip


def build(num_samples, **options):
    return AdaptivePerturbation(num_samples, **{**SETTING, **options})


def moving(num_samples=6, accuracy=0.9, confidence=0.95, **options):
    """A table past its warm-up."""
    criterion = build(num_samples, **{"warmup": 1, **options})
    criterion.step(accuracy, confidence)
    return criterion


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
