"""The cells of a histogram: the grid, and counting into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _errors, _inputs
from .._errors import refuse
from .._torch import UNREDUCIBLE, any_set, as_bytes, ends, float64_device, readable

BLOCK = 1 << 17  # elements worked on at a time: half a MiB of float32, inside a CPU's cache
_THREADS = 4  # at most, that count in parallel
_FINEST = 100_000  # number of cells up to which float32 separates neighbours
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
        self, size: Tensor, doubt: Tensor, most: float = math.inf,
        given: torch.dtype | None = None, work: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Place along the cells, in cells, of |logit| and min(p, 1 - p).

        The parts rise one after another, so that their sum does. ``most`` is a bound of ``size``;
        ``given`` the dtype whose rounding counts, if the tensors were made finer; the answer is
        written into the first of ``work``.
        """
        used = [one for one in self.stretches if one.low < most]
        base = sum(one.low * one.density for one in used)
        edge = slack(2 * self.half, given or size.dtype)
        out, part = work or (torch.empty_like(size), torch.empty_like(size))
        place = torch.mul(doubt, -2.0 * self.half, out=out)
        place.add_(self.half + edge - self.first - base)
        place.clamp_(-base, self.last - self.first - base)
        for one in used:
            # The last cell takes what lies beyond.
            high = one.high - 0.5 / one.density * (one is self.stretches[-1])
            place.add_(torch.clamp(size, one.low, high, out=part), alpha=one.density)
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
    """The state of a histogram, all float64; each tensor has a row per label.

    After the cells of the grid comes one for what is sure, probabilities of 0 and 1.
    """

    counts: Tensor
    """(labels, 2, 2, cells + 1) weight of the elements by predicted class, label and cell"""
    doubts: Tensor
    """(labels, 2, cells + 1) sums of min(p, 1 - p)"""
    sizes: Tensor
    """(labels, 2, cells + 1) sums of |logit|; for sure ones the weight of those in 8-bit maps"""
    totals: Tensor
    """(labels, 5) sums of squared error, log loss, logit^2, logit * label; weight of logits"""

    def plus(self, other: Counted) -> Counted:
        return Counted(*(mine + part for mine, part in zip(self, other, strict=True)))

    def to(self, device: torch.device) -> Counted:
        return Counted(*(part.to(device) for part in self))


def nothing(labels: int, cells: Grid, device: torch.device | str = "cpu") -> Counted:
    shapes = ((2, 2, cells.size + 1), (2, cells.size + 1), (2, cells.size + 1), (5,))
    return Counted(
        *(torch.zeros(labels, *size, dtype=torch.float64, device=device) for size in shapes)
    )


class Batch(NamedTuple):
    """What a caller passes to a histogram, types and sizes looked at."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    valid: Tensor | None
    """elements that are not masked; those that `void` marks are among them"""
    void: float | None
    from_logits: bool
    legal: bool
    """False if the labels could not be looked at"""

    def rows(self, view: Callable[[Tensor], Tensor]) -> list[Batch]:
        """One batch per label or image; `view` turns each tensor into these rows."""
        number = len(view(self.input))
        parts: list[Any] = [[None] * number if one is None else view(one) for one in self[:4]]
        return [Batch(*each, *self[4:]) for each in zip(*parts, strict=True)]  # type: ignore[call-arg]


def batch(input: Any, target: Any, weight: Any, from_logits: bool, ignore_index: object) -> Batch:
    valid = _inputs.unmasked(input, target, weight)
    x, y = _inputs.tensor(input, "input"), _inputs.tensor(target, "target")
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        _inputs.logits(x)
    _inputs.label(y)
    _inputs.same_size(x, y)
    void = _errors.ignored(ignore_index)
    if y.dtype in UNREDUCIBLE:
        y = y.long()
    if valid is not None:
        valid = valid.to(y.device).expand(y.shape)
        y = y.masked_fill(~valid, 0)
    void = _inputs.held(y, void)
    legal = _inputs.check_labels(y, void)
    home = float64_device(x.device)
    x, y, valid = x.to(home), y.to(home), None if valid is None else valid.to(home)
    w = None if weight is None else _weights(_inputs.tensor(weight, "weight"), x)
    return Batch(x, y, w, valid, void, from_logits and x.dtype != torch.uint8, legal)


def _weights(weight: Any, like: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        refuse("weight", "be a Tensor", _errors.describe(weight), error=TypeError)
    _inputs.along_labels("weight", weight, like.shape)
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


def count(cells: Grid, rows: list[Batch]) -> Counted:
    """The state of a histogram of these rows alone, one label each."""
    counter = _Counter(cells, rows[0])
    each = [counter.counted(row) for row in rows]
    return Counted(
        *(torch.stack(part) if len(each) > 1 else part[0][None] for part in zip(*each, strict=True))
    )


def restored(saved: Mapping[str, Tensor], own: Counted) -> Counted:
    """Copies of a saved state on the device of ``own``, whose sizes it must have."""
    if set(saved) != set(own._fields):
        remedy = "pass what `state_dict()` of this version returned; older states don't load"
        refuse("state_dict", f"have the keys {sorted(own._fields)}", sorted(saved), remedy)
    for name, part in own._asdict().items():
        shape = getattr(saved[name], "shape", "no tensor")
        if shape != part.shape:
            remedy = "build the histogram with the same num_labels and num_cells"
            wanted = f"hold `{name}` of shape {tuple(part.shape)}"
            refuse(
                "state_dict", wanted, f"{shape if shape == 'no tensor' else tuple(shape)}", remedy
            )
    return Counted(*(saved[name].to(part, copy=True) for name, part in own._asdict().items()))


class _Counter:
    """Counts the elements of one label, block by block, in the input's precision.

    With doubt d = min(p, 1 - p) and logit x, the log loss of an element is -log(1 - d), plus |x|
    if the prediction is wrong. Its squared error is d^2, plus 1 - 2d if the prediction is wrong.
    All terms are positive, so nothing cancels.
    """

    def __init__(self, cells: Grid, row: Batch) -> None:
        self.grid, x = cells, row.input
        self.given = torch.promote_types(x.dtype, torch.float32)
        self.dtype = self.given if 2 * cells.half <= _FINEST else torch.float64
        # Each of these rows is filled by one thread.
        self.threads = min(_THREADS, torch.get_num_threads()) if x.numel() >= BLOCK else 1
        # Fresh memory for each block would cost more than the arithmetic does.
        size = min(x.numel(), BLOCK)
        self.work = x.new_empty(5, size, dtype=self.dtype)
        self.wide = x.new_empty(3, size, dtype=torch.float64)
        self.cell = x.new_empty(size, dtype=torch.int64), x.new_empty(size, dtype=torch.int32)
        self.ones = x.new_ones(size, dtype=torch.float64)

    def counted(self, row: Batch) -> tuple[Tensor, ...]:
        self.row, x = row, row.input
        self.sums = x.new_zeros(3, self.threads, 4 * (self.grid.size + 1), dtype=torch.float64)
        self.totals = x.new_zeros(3, dtype=torch.float64)
        parts = [None if one is None else one.reshape(-1) for one in row[:4]]
        for first in range(0, x.numel(), BLOCK):
            blocks: Any = (None if one is None else one[first : first + BLOCK] for one in parts)
            self._block(*blocks)
        sums = self.sums[:, 0] if self.threads == 1 else self.sums.sum(1)
        counts, doubts, sizes = sums.view(3, 2, 2, -1)
        wrong = sum((counts[i, 1 - i].sum() - 2 * doubts[i, 1 - i].sum()) for i in (0, 1))
        squares, loss, spread = self.totals
        positive = (sizes[1, 1, :-1] - sizes[0, 1, :-1]).sum()
        given = counts.sum() if row.from_logits else torch.zeros_like(loss)
        totals = torch.stack((squares + wrong, loss, spread, positive, given))
        return counts, doubts.sum(1), sizes.sum(1), totals

    def _block(self, x: Tensor, y: Tensor, weight: Tensor | None, valid: Tensor | None) -> None:
        """Look at a block, and leave out what is ignored: of weight 0, at a logit of 0."""
        row, soft = self.row, None
        ignored = None if row.void is None else _valid(y, row.void)
        valid = ignored if valid is None else valid if ignored is None else valid & ignored
        if weight is not None:
            valid = weight != 0 if valid is None else valid & (weight != 0)
        label = self.work[4, : len(x)].copy_(as_bytes(y) if y.dtype == torch.bool else y)
        if not row.legal:
            label = _inputs.as_labels(y, self.dtype, row.void, row.legal)
        x = x / 255.0 if x.dtype == torch.uint8 else x.to(self.dtype)
        if valid is not None:
            x = torch.where(valid, x, 0.0 if row.from_logits else 0.5)
            label = torch.where(valid, label, 0.0)
            weight = None if weight is None else weight * valid
        least, most = (-math.inf, math.inf) if row.from_logits else (0.0, 1.0)
        low, high = ends(x)
        good = (low >= least) & (high <= most)  # nan is not
        if y.is_floating_point():
            first, last = ends(label)
            good = good & (first >= 0) & (last <= 1)
            soft = any_set(ends(label - label * label)[1] != 0)
        elif not row.legal:
            good = good & ~label.isnan().any()
        bad = any_set(~good)
        if bad:
            self._refuse(x, label, least, most)
        self.poison = None if bad is False else torch.where(good, 0.0, torch.nan)
        sure = any_set((low <= least) | (high >= most)) is not False
        # Of what is not sure, probabilities are within 746.
        far = math.inf if sure else max(-float(low), float(high)) if row.from_logits else 746.0
        if soft is False or not y.is_floating_point():
            self._add(x, label, weight, valid, sure, far)
            return
        one = self.ones[: len(x)] if weight is None else weight
        one = one if valid is None else one * valid
        share = label.double()
        self._add(x, torch.ones_like(label), one * share, None, sure, far)
        self._add(x, torch.zeros_like(label), one * (1 - share), None, sure, far)

    def _refuse(self, x: Tensor, label: Tensor, least: float, most: float) -> None:
        if bool(x.isnan().any()):
            remedy = "the model has diverged, or an ignored element lacks its `ignore_index`"
            refuse("input", "hold no nan", "nan", remedy)
        outside = (x < least) | (x > most)
        if bool(outside.any()):
            value = x[outside][0].item()
            remedy = "pass logits with `from_logits=True`"
            if -1e-6 < value < 1 + 1e-6:
                remedy = "if only rounding is beyond the limits, pass `input.clamp(0, 1)`"
            refuse("input", "hold probabilities in [0, 1]", _errors.exact(value), remedy)
        refuse("target", "hold no nan", "nan", "leave it out with `ignore_index=math.nan`")

    def _add(
        self, x: Tensor, y: Tensor, weight: Tensor | None, valid: Tensor | None, sure: bool,
        most: float,
    ) -> None:  # fmt: skip
        """Add hard labels: what each cell counts, and the sums over all cells."""
        cells, number = self.grid, len(x)
        size, doubt, place, part = (one[:number] for one in self.work[:4])
        wide, far = (one[:number] for one in self.wide[:2])
        cell, narrow = (one[:number] for one in self.cell)
        if self.row.from_logits:
            logit = x
            torch.neg(torch.abs(x, out=size), out=doubt).sigmoid_()
        else:
            logit = torch.logit(x)
            torch.abs(logit, out=size)
            torch.minimum(x, torch.sub(1, x, out=part), out=doubt)
        ones = self.ones[:number] if weight is None else weight
        if valid is not None and weight is None:  # the logits of the others are 0
            ones = self.wide[2, :number].copy_(as_bytes(valid))
            doubt.mul_(part.copy_(as_bytes(valid)))
        wide.copy_(doubt)
        far.copy_(size)
        cells.coordinate(size, doubt, most, self.given, (place, part))
        if sure:
            ended = far.isinf()
            far.masked_fill_(ended, 0.0)
            place.add_(ended)
        code = torch.ge(logit, 0, out=part).mul_(2).add_(y)
        place.add_(code, alpha=cells.size + 1)
        # Through int32, which is several times faster than directly.
        cell.copy_(narrow.copy_(place))
        # Not clamp_(min=0), which on XLA turns infinity into the largest finite number.
        wrong = torch.mul(y, -2.0, out=part).add_(1.0).mul_(logit).relu_()
        if weight is None:
            loss, some = wrong.sum() - _sum_log_sure(doubt, place), (wide, far)
        else:
            some = (wide * weight, far * weight)
            loss = torch.dot(wrong.double(), weight) - (weight * torch.log1p(doubt.neg_())).sum()
        self.totals += torch.stack((torch.dot(some[0], wide), loss, torch.dot(some[1], far)))
        if sure and self.row.input.dtype == torch.uint8:
            known = ended.double()
            some = (some[0], some[1] + (known if weight is None else known * weight))
        if self.poison is not None:
            cell.clamp_(0, self.sums.shape[2] - 1)
            self.totals += self.poison
            self.sums += self.poison
        threads = self.threads if number % self.threads == 0 else 1
        for sums, values in zip(self.sums, (ones, *some), strict=True):
            sums[:threads].scatter_add_(1, cell.view(threads, -1), values.view(threads, -1))


def _valid(label: Tensor, void: float) -> Tensor:
    """`_inputs.valid_elements`, by bytes where that is several times faster."""
    if label.dtype == torch.uint8 and readable(label):
        return torch.ne(label, void, out=torch.empty_like(label)).view(torch.bool)
    return _inputs.valid_elements(label, void)  # type: ignore[return-value]


def _sum_log_sure(doubt: Tensor, work: Tensor) -> Tensor:
    """Sum of log(1 - d) for d in [0, 1/2], accurate for small d; writes over both.

    One logarithm for four elements, since (1 - a)(1 - b) = 1 - (a + b - ab).
    """
    for _ in range(2):
        if len(doubt) % 2 == 0:
            first, other = doubt.chunk(2)
            out = work[: len(first)]
            doubt, work = torch.addcmul(other, other, first, value=-1, out=out).add_(first), doubt
    return doubt.neg_().log1p_().sum(dtype=torch.float64)
