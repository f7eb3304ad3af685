"""Counting into the cells: a sweep over the elements of each label."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _errors, _inputs
from .._errors import refuse
from .._torch import any_set, as_bytes, ends, readable
from .cells import Batch, Grid

BLOCK = 1 << 17  # elements worked on at a time: half a MiB of float32, inside a CPU's cache
_THREADS = 4  # at most, that count in parallel
_FINEST = 100_000  # number of cells up to which float32 separates neighbours
# Logits of a block that lie within the first number, over a range of at least the second, are
# tame: the mean of their doubts tells that of the logits in a cell.
TAME, _RANGE = 30.0, 0.1


def count(cells: Grid, rows: list[Batch]) -> Tensor:
    """The state of a histogram of these rows, one label each."""
    counter = _Counter(cells, rows[0])
    parts = [part.flatten() for row in rows for part in counter.counted(row)]
    return torch.cat(parts).view(len(rows), -1)


class _Counter:
    """Counts the elements of one label, block by block, in the input's precision.

    With doubt d = min(p, 1 - p) and logit x, the log loss of an element is -log(1 - d), plus |x|
    if the prediction is wrong. Its squared error is d^2, plus 1 - 2d if the prediction is wrong.
    All terms are positive, so nothing cancels.
    """

    def __init__(self, cells: Grid, row: Batch) -> None:
        self.grid, x = cells, row.input
        self.precision = torch.promote_types(x.dtype, torch.float32)
        self.dtype = self.precision if 2 * cells.half <= _FINEST else torch.float64
        # Each of these rows is filled by one thread.
        self.threads = min(_THREADS, torch.get_num_threads()) if x.numel() >= BLOCK else 1
        # Fresh memory for each block would cost more than the arithmetic does.
        size, wide = min(x.numel(), BLOCK), torch.float64
        dtypes = (*[self.dtype] * 7, wide, wide, wide, torch.int64, torch.int32)
        self.buffers = [x.new_empty(size, dtype=dtype) for dtype in dtypes]
        self.buffers.append(x.new_ones(size, dtype=wide))

    def counted(self, row: Batch) -> tuple[Tensor, ...]:
        self.row, x = row, row.input
        self.sums = x.new_zeros(3, self.threads, 4 * (self.grid.size + 1), dtype=torch.float64)
        self.totals = x.new_zeros(4, dtype=torch.float64)
        parts = [None if one is None else one.reshape(-1) for one in row[:3]]
        for first in range(0, x.numel(), BLOCK):
            blocks: Any = (None if one is None else one[first : first + BLOCK] for one in parts)
            self._block(*blocks)
        sums = self.sums[:, 0] if self.threads == 1 else self.sums.sum(1)
        counts, doubts, sizes = sums.view(3, 2, 2, -1)
        wrong = sum((counts[i, 1 - i].sum() - 2 * doubts[i, 1 - i].sum()) for i in (0, 1))
        self.totals[0] += wrong
        self.totals[2] = counts.sum() * row.from_logits
        return counts, doubts.sum(1), sizes.sum(1), self.totals

    def _block(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Look at a block, and leave out what is ignored."""
        row, soft, number = self.row, False, len(x)
        whole = number == len(self.buffers[0])
        self.work = self.buffers if whole else [one[:number] for one in self.buffers]
        label = self.work[4].copy_(as_bytes(y) if y.dtype == torch.bool else y)
        label = _inputs.with_nan(label, y, row.void, row.legal)
        x = x / 255.0 if x.dtype == torch.uint8 else x.to(self.dtype)
        keep = self._kept(y, weight)
        if keep is not None:
            label, x = _only(keep, label, self.work[4]), _only(keep, x, self.work[6])
            # What is ignored goes to the mean, so that it widens no range.
            mean = (x.sum() / keep.sum()).nan_to_num(0.5, 0.5, 0.5)
            if not row.from_logits:  # of sure ones alone it would have a logit of infinity
                mean = mean.clamp(torch.finfo(self.dtype).tiny, 1 - torch.finfo(self.dtype).eps)
            x.addcmul_(torch.sub(1, keep, out=self.work[3]), mean)
        low, high = ends(x) if row.from_logits else torch.logit(torch.stack(ends(x)))
        good = low <= high  # nan is not
        if y.is_floating_point() or not row.legal:
            # Below 0 out of [0, 1], above 0 inside of it.
            first, last = ends(torch.addcmul(label, label, label, value=-1, out=self.work[0]))
            good, soft = good & (first >= 0), any_set(last != 0) is not False
        bad = any_set(~good)
        if bad:
            self._refuse(x, label)
        self.poison = None if bad is False else torch.where(good, 0.0, torch.nan)
        self.limits = (-math.inf, math.inf) if bad is None else (float(low), float(high))
        if not soft:
            self._add(x, label, weight, keep)
            return
        some = 1.0 if keep is None else keep.double()
        one, share = some if weight is None else weight, label.double()
        self._add(x, torch.ones_like(label), one * share, None)
        self._add(x, torch.zeros_like(label), one * (1 - share), None)

    def _kept(self, y: Tensor, weight: Tensor | None) -> Tensor | None:
        """1 for what counts, 0 for what is left out; None if all counts."""
        void = self.row.void
        if weight is None and void is not None and y.dtype == torch.uint8 and readable(y):
            mask = torch.ne(y, void, out=torch.empty_like(y))  # faster than as a bool
        else:
            valid = _inputs.valid_elements(y, void) if weight is None else weight != 0
            if valid is None:
                return None
            mask = as_bytes(valid)
        return self.work[5].copy_(mask)

    def _refuse(self, x: Tensor, label: Tensor) -> None:
        if bool(x.isnan().any()):
            remedy = "the model has diverged, or an ignored element lacks its `ignore_index`"
            refuse("input", "hold no nan", "nan", remedy)
        outside = (x < 0) | (x > 1)
        if not self.row.from_logits and bool(outside.any()):
            value = x[outside][0].item()
            remedy = "pass logits with `from_logits=True`"
            if -1e-6 < value < 1 + 1e-6:
                remedy = "if only rounding is beyond the limits, pass `input.clamp(0, 1)`"
            refuse("input", "hold probabilities in [0, 1]", _errors.exact(value), remedy)
        illegal = (label < 0) | (label > 1)
        if bool(illegal.any()):
            _inputs.refuse_labels(label, illegal, self.row.void)
        refuse("target", "hold no nan", "nan", "leave it out with `ignore_index=math.nan`")

    def _add(self, x: Tensor, y: Tensor, weight: Tensor | None, keep: Tensor | None) -> None:
        """Add hard labels to the cells and to the totals."""
        size, doubt, place, part = self.work[:4]
        wide, far, kept, cell, narrow, ones = self.work[7:]
        if self.row.from_logits:
            logit = x
            torch.neg(torch.abs(x, out=size), out=doubt).sigmoid_()
        else:
            logit = torch.logit(x)
            torch.abs(logit, out=size)
            torch.minimum(x, torch.sub(1, x, out=part), out=doubt)
        low, high = self.limits
        most, whole = max(-low, high), keep is None and weight is None
        self.grid.coordinate(size, doubt, most, self.precision, place, part)
        if keep is not None:
            doubt.mul_(keep)
        wide.copy_(doubt)
        values = [ones if keep is None else kept.copy_(keep), wide]
        if weight is not None:
            values = [weight, wide * weight]
        if most < TAME and high - low > _RANGE:
            self.totals[3] += len(x) if whole else values[0].sum()
        else:
            far.copy_(size)
            if most == math.inf:
                sure = far.isinf()
                place.add_(sure)
                # What is sure has no size; those of 8-bit maps are counted in its cell instead.
                far.masked_fill_(sure, float(self.row.input.dtype == torch.uint8))
            values.append(far if whole else far * values[0])
        place.add_(torch.ge(logit, 0, out=part), alpha=2 * (self.grid.size + 1))
        place.add_(y, alpha=self.grid.size + 1)
        # Through int32, which is several times faster than directly.
        cell.copy_(narrow.copy_(place))
        # Not clamp_(min=0), which on XLA turns infinity into the largest finite number.
        wrong = torch.sub(1 if keep is None else keep, y, alpha=2, out=part).mul_(logit)
        wrong.relu_()
        if weight is None:
            loss = wrong.sum() - _sum_log_sure(doubt, place)
        else:
            loss = torch.dot(wrong.double(), weight) - (weight * torch.log1p(doubt.neg_())).sum()
        self.totals[0] += torch.dot(values[1], wide)
        self.totals[1] += loss
        if self.poison is not None:
            cell.clamp_(0, self.sums.shape[2] - 1)
            self.totals += self.poison
            self.sums += self.poison
        threads = self.threads if len(x) % self.threads == 0 else 1
        for sums, each in zip(self.sums, values, strict=False):
            sums[:threads].scatter_add_(1, cell.view(threads, -1), each.view(threads, -1))


def _only(keep: Tensor, value: Tensor, out: Tensor) -> Tensor:
    """The value where ``keep`` is 1, and 0 where it is 0, even of nan."""
    low, high = ends(value)
    if any_set((low > -math.inf) & (high < math.inf)):
        return torch.mul(value, keep, out=out)  # several times faster
    return torch.where(keep != 0, value, 0.0)


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
