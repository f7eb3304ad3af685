"""The flip of the training: checked, removed from logits, or searched for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import _errors
from .._errors import refuse

_COARSE = (0.0, 0.002, 0.01, 0.03, 0.08, 0.17, 0.3)  # flip rates at which a search starts
_FINEST = 1e-3  # last step of the search, in the root of a flip rate


def flip_rates(value: object, num_labels: int | None) -> list[list[float]]:
    """Check `flip_rate`; return a row of rates for the negatives and one for the positives."""
    pair = isinstance(value, (tuple, list))
    rates: list[Any] = list(value) if pair else [value, value]  # type: ignore[call-overload]
    if len(rates) != 2:
        remedy = "pass the rate of the negatives, then that of the positives"
        refuse("flip_rate", "be a number or a pair (g0, g1)", f"{len(rates)} values", remedy)
    rows = []
    for rate in rates:
        several = isinstance(rate, Tensor) and rate.dim() > 0
        if several and rate.shape != (num_labels,):
            wanted = f"hold numbers, or with `num_labels` tensors of shape ({num_labels},)"
            remedy = "pass `num_labels` for a rate of each label, and a pair as a tuple (g0, g1)"
            refuse("flip_rate", wanted, f"a tensor of shape {tuple(rate.shape)}", remedy, TypeError)
        each = list(rate) if several else [rate] * (num_labels or 1)
        rows.append([_errors.unit_number("flip_rate", one, 1.0 if pair else 0.5) for one in each])
    for up, down in zip(*rows, strict=True):
        if up + down >= 1:
            wanted = "sum to less than 1" if pair else "be below 1/2"
            got, remedy = (up, down) if pair else up, "it is `criterion.flip_rates` of the training"
            refuse("flip_rate", f"{wanted}, so that labels carry information", got, remedy)
    return rows


def without_flip(z: Tensor, up: Tensor, down: Tensor, clip: Tensor) -> Tensor:
    """logit((s - up) / (1 - up - down)) with s = sigmoid(z), between the logits of the clip.

    With r = g / (1 - g), that is z + log(1 - up) - log(1 - down) + log(1 - r_up e^-z)
    - log(1 - r_down e^z). The last two are one logarithm, computed for |z| on the side of z. So
    the result is exact if no flip is removed; at equal rates 0 stays 0 and no logit shrinks.
    """
    # A side without a flip is unchanged.
    removed = 1 - up - down
    low = _logit(up + removed * clip).masked_fill(up <= 0, -torch.inf)
    high = (-_logit(down + removed * clip)).masked_fill(down <= 0, torch.inf)
    z = torch.minimum(torch.maximum(z, low), high)
    right = z > 0
    near, far = torch.where(right, down, up), torch.where(right, up, down)
    near_odds, far_odds = near / (1 - near), far / (1 - far)
    size = torch.where(right, z, -z)  # abs has no gradient at 0
    # If a flip is removed, no logit is beyond this; otherwise the term is 0 anyway.
    up_e = torch.exp(size.clamp(max=60.0))
    gain = near_odds * (up_e - 1 / up_e) + (near_odds - far_odds) / up_e
    rest = 1 - near_odds * up_e
    wide = size + ((torch.log1p(-far) - torch.log1p(-near)) + torch.log1p(gain / rest))
    u = torch.where(right, wide, -wide)
    bound = -_logit(clip)
    u = torch.maximum(u, (-bound).masked_fill(up <= 0, -torch.inf))
    return torch.minimum(u, bound.masked_fill(down <= 0, torch.inf))


def _logit(p: Tensor) -> Tensor:
    """torch.logit, which ONNX does not have."""
    return torch.log(p) - torch.log1p(-p)


def best_pair(loss: Callable[[Tensor], float]) -> Tensor:
    """The pair of flip rates with the lowest loss: from a coarse grid, in ever smaller steps.

    The steps are in the roots of the rates, since 0.001 matters as much as 0.1.
    """

    @cache
    def at(roots: tuple[float, ...]) -> float:
        return loss(_held(roots))

    starts = product([rate**0.5 for rate in _COARSE], repeat=2)
    best, step = min(starts, key=at), 0.05
    while step > _FINEST:
        sides = [[min(max(root + i * step, 0.0), 0.7) for i in (-1, 0, 1)] for root in best]
        new = min(product(*sides), key=at)
        step, best = (step / 2, best) if at(new) >= at(best) else (step, new)
    return _held(best)


def _held(roots: tuple[float, ...]) -> Tensor:
    """Rates, rounded to float32 as the module holds them."""
    return torch.tensor([root**2 for root in roots], dtype=torch.float32, device="cpu").double()
