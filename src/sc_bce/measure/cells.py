"""The cells of a histogram: the grid, its counts, and what is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _arrays, _errors, _inputs
from .._errors import refuse
from .._torch import UNREDUCIBLE, any_set, float64_device, readable

_SLACK = 4  # units of precision below an edge that count as on it
_COARSE = 1000  # fewer cells get a short tail, so that a histogram per image stays small
# The outermost cells, of which the first number tells how many, give way to cells of equal width
# in the logit: so many to a unit, so many in all, stretch after stretch. The last one has no end.
_FINE_TAIL = (8, (20.0, 860), (2.5, 1740), (0.002, 40), (1e-4, 98))  # to 50, 746, 2e4, 1e6
_ROUGH_TAIL = (1, (1.0, 12), (0.5, 8))
_SPLIT = 64  # cells in place of the innermost one, for logits that are all small


# -- the grid


class Stretch(NamedTuple):
    """Cells of equal width in the logit, from ``low`` to ``high``, ``density`` to a unit."""

    low: float
    high: float
    density: float


class Grid(NamedTuple):
    """The places of the cells of one predicted class, in order of confidence.

    From ``first`` to ``last`` they have equal width in the probability, 1 / (2 half); inside and
    outside of that there are stretches that are even in the logit.
    """

    half: int
    first: int
    last: int
    stretches: tuple[Stretch, ...]

    @property
    def size(self) -> int:
        even = sum(round((one.high - one.low) * one.density) for one in self.stretches)
        return self.last - self.first + even

    def coordinate(
        self, size: Tensor, doubt: Tensor, most: float, precision: torch.dtype,
        out: Tensor, work: Tensor,
    ) -> Tensor:  # fmt: skip
        """Place along the cells, in cells, of |logit| up to ``most`` and min(p, 1 - p).

        The parts rise one after another, so that their sum does. ``precision`` is that of the
        input, if the tensors were made finer; ``work`` is written over.
        """
        used = [one for one in self.stretches if one.low < most]
        base = sum(one.low * one.density for one in used)
        top = self.half + slack(2 * self.half, precision) - self.first - base
        place = torch.add(size.new_full((), top), doubt, alpha=-2.0 * self.half, out=out)
        place.clamp_(-base, self.last - self.first - base)
        for one in used:
            # The last cell takes what lies beyond.
            high = one.high - 0.5 / one.density * (one is self.stretches[-1])
            place.add_(torch.clamp(size, one.low, high, out=work), alpha=one.density)
        return place

    def logits(self) -> tuple[Tensor, Tensor]:
        """|logit| at the lower edge and at the middle of each cell."""
        even = torch.arange(self.first, self.last, dtype=torch.float64, device="cpu")
        parts = [torch.logit(0.5 + even / (2 * self.half))]
        for one in self.stretches:
            cell = torch.arange(round((one.high - one.low) * one.density), device="cpu")
            parts.insert(len(parts) if one.low else 0, one.low + cell.double() / one.density)
        low = torch.cat(parts)
        return low, (low + torch.cat((low[1:], low.new_tensor([self.stretches[-1].high])))) / 2

    def edges(self, kind: str) -> Tensor:
        """The confidences between which the cells lie, in order, that of sure ones too."""
        low, _ = self.logits()
        high = torch.cat((torch.sigmoid(low), low.new_ones(2)))
        return high if kind == "top_label" else torch.cat(((1 - high).flip(0)[:-1], high))


def slack(num_cells: int, dtype: torch.dtype) -> float:
    """How far below an edge a value still counts as on it, in cells, such as 0.9 in float32.

    Two units of the precision are for the input, two for the rounding here.
    """
    return _SLACK * num_cells * torch.finfo(dtype).eps


def grid(num_cells: int) -> Grid:
    half, split = num_cells // 2, num_cells >= _COARSE
    outer, *tail = _FINE_TAIL if split else _ROUGH_TAIL
    stretches = []
    if split:
        innermost = math.log((half + 1) / (half - 1))
        stretches.append(Stretch(0.0, innermost, _SPLIT / innermost))
    low = math.log(max(num_cells - outer, outer) / outer)
    for density, number in tail:
        if low and len(stretches) == split:  # so that an edge stays exact in the sum
            density = round(low * density) / low
        stretches.append(Stretch(low, low + number / density, density))
        low = stretches[-1].high
    return Grid(half, int(split), half - outer, tuple(stretches))


# -- counting


class Counted(NamedTuple):
    """The parts of a histogram's state, which is one float64 tensor with a row per label.

    After the cells of the grid comes one for what is sure, probabilities of 0 and 1.
    """

    counts: Tensor
    """(labels, 2, 2, cells + 1) weight of the elements by predicted class, label and cell"""
    doubts: Tensor
    """(labels, 2, cells + 1) sums of min(p, 1 - p)"""
    sizes: Tensor
    """(labels, 2, cells + 1) sums of |logit|; for sure ones the weight of those in 8-bit maps"""
    totals: Tensor
    """(labels, 4) sums of squared error and log loss; the weight of logits; the weight of tame
    logits, which are not in the sums of |logit|"""


def nothing(labels: int, cells: Grid) -> Tensor:
    return torch.zeros(labels, 8 * (cells.size + 1) + 4, dtype=torch.float64, device="cpu")


def counted(state: Tensor) -> Counted:
    """The parts of a state, as views."""
    rows, size = len(state), state.shape[1] // 8
    counts, doubts, sizes, totals = torch.split(state, [4 * size, 2 * size, 2 * size, 4], 1)
    counts, doubts = counts.view(rows, 2, 2, size), doubts.view(rows, 2, size)
    return Counted(counts, doubts, sizes.view(rows, 2, size), totals)


class Batch(NamedTuple):
    """What a caller passes to a histogram, types and sizes looked at."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    """0 where an element is left out; None if all count for 1 but those that `void` marks"""
    void: float | None
    from_logits: bool
    legal: bool
    """False if the labels could not be looked at"""

    def rows(self, view: Callable[[Tensor], Tensor]) -> list[Batch]:
        """One batch per label or image; `view` turns each tensor into these rows."""
        number = len(view(self.input))
        parts: list[Any] = [[None] * number if one is None else view(one) for one in self[:3]]
        return [Batch(*each, *self[3:]) for each in zip(*parts, strict=True)]  # type: ignore[call-arg]


def batch(input: Any, target: Any, weight: Any, from_logits: bool, ignore_index: object) -> Batch:
    valid = _arrays.unmasked(input, target, weight)
    x, y = _arrays.tensor(input, "input"), _arrays.tensor(target, "target")
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        _inputs.logits(x)
    _inputs.label(y)
    _inputs.same_size(x, y)
    if y.dtype in UNREDUCIBLE:
        y = y.long()
    if valid is not None:
        y = y.masked_fill(~valid.to(y.device), 0)
    void = _inputs.held(y, _errors.ignored(ignore_index))
    # Floats are looked at block by block, unless that would round them.
    floating = y.is_floating_point() and y.dtype != torch.float64
    legal = floating or _inputs.check_labels(y, void, readable(y))
    home = float64_device(x.device)
    x, y = x.to(home), y.to(home)
    w = None if weight is None else _weights(_arrays.tensor(weight, "weight"), x)
    if valid is not None:
        shown = valid.to(home, torch.float64)
        w = shown if w is None else w * shown
    if w is not None and void is not None:
        w = w * _inputs.valid_elements(y, void)  # type: ignore[operator]
    return Batch(x, y, w, void, from_logits and x.dtype != torch.uint8, legal)


def _weights(weight: Any, like: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        refuse("weight", "be a Tensor", _errors.describe(weight), error=TypeError)
    _inputs.along_labels(like.shape, weight=weight)
    weight = weight.to(like.device).double()
    illegal = ~((weight >= 0) & weight.isfinite())
    if any_set(illegal):
        value = _errors.exact(weight[illegal][0].item())
        refuse("weight", "be 0 or more, and finite", f"the value {value}")
    return torch.broadcast_to(weight, like.shape)


def by_label(value: Tensor, num_labels: int | None) -> Tensor:
    """One row per label, as a view if possible."""
    if num_labels is None:
        return value.unsqueeze(0)
    if value.dim() < 2 or value.shape[1] != num_labels:
        wanted = f"have num_labels={num_labels} labels in dimension 1"
        refuse("input", wanted, f"shape {tuple(value.shape)}")
    return value.movedim(1, 0)


def restored(saved: Mapping[str, Tensor], own: Tensor) -> Tensor:
    """A copy of a saved state on the device of ``own``, whose sizes it must have."""
    if set(saved) != set(Counted._fields):
        remedy = "pass what `state_dict()` of this version returned; older states don't load"
        refuse("state_dict", f"have the keys {sorted(Counted._fields)}", sorted(saved), remedy)
    for name, part in counted(own)._asdict().items():
        shape = getattr(saved[name], "shape", None)
        if shape != part.shape:
            remedy = "build the histogram with the same num_labels and num_cells"
            wanted = f"hold `{name}` of shape {tuple(part.shape)}"
            refuse("state_dict", wanted, "no tensor" if shape is None else tuple(shape), remedy)
    return torch.cat([saved[name].to(own).flatten(1) for name in Counted._fields], 1)
