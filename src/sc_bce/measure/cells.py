"""The counting sweep: what an update adds to a histogram, block by block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _batch, _checks

_BLOCK = 1 << 18  # elements worked on at a time: 1 MiB of float32, inside a CPU's cache
_ROWS = 4  # threads that count in parallel
_EXACT = 1 << 24  # integers below this are exact in float32
_FINEST = 100_000  # number of cells up to which float32 separates neighbours
_SLACK = 4  # units of precision below an edge that count as on it
_COARSE = 1000  # fewer cells get a short tail, so that a histogram per image stays small
# The tails: number of outermost cells that they replace; then cells per unit of the logit and
# their number, up to the bend at about 50, and the same beyond it, up to 746, where the doubt
# underflows float64.
_FINE_TAIL = (8, 20.0, 860, 2.5, 1740)
_ROUGH_TAIL = (1, 1.0, 12, 0.5, 8)


class Grid(NamedTuple):
    """The places of the cells of one predicted class, in order of confidence.

    ``inner`` cells have equal width in the probability. In place of the outermost ones there are
    cells of equal width in the logit: ``near`` fine ones from ``start`` to ``bend``, then ``far``
    wide ones, the last of which is unbounded.
    """

    half: int
    """number of cells from 1/2 to 1 if all had equal width in the probability"""
    inner: int
    start: float
    near: int
    bend: float
    far: int
    fine: float
    """cells per unit of the logit up to the bend; times ``start`` it is a whole number, so that an
    edge stays exact when both parts are added"""
    wide: float
    """cells per unit of the logit beyond the bend"""

    @property
    def size(self) -> int:
        return self.inner + self.near + self.far

    @property
    def end(self) -> float:
        """A logit in the middle of the last cell."""
        return self.bend + (self.far - 0.5) / self.wide

    def coordinate(self, size: Tensor, doubt: Tensor) -> Tensor:
        """Place along the cells, in cells: the sum of three parts that rise one after another."""
        edge = slack(2 * self.half, size.dtype)
        inside = torch.clamp(self.half + edge - 2 * self.half * doubt, max=self.inner)
        near = (size.clamp(self.start, self.bend) - self.start) * self.fine
        return inside + near + (size.clamp(self.bend, self.end) - self.bend) * self.wide

    def logits(self) -> tuple[Tensor, Tensor]:
        """|logit| at the lower edge and at the middle of each cell."""
        cell = torch.arange(self.size, dtype=torch.float64, device="cpu")
        low, middle = (
            torch.where(
                cell < self.inner,
                torch.logit(0.5 + (cell + add).clamp(max=self.inner) / (2 * self.half)),
                self.start
                + (cell + add - self.inner).clamp(max=self.near) / self.fine
                + (cell + add - self.inner - self.near).clamp(min=0) / self.wide,
            )
            for add in (0.0, 0.5)
        )
        return low, middle


def slack(num_cells: int, dtype: torch.dtype) -> float:
    """How far below an edge a value still counts as on it, in cells.

    Rounding leaves values there, such as 0.9 in float32 or 1 - 0.2. Two units of the precision
    are for the input, two for the rounding here.
    """
    return _SLACK * num_cells * torch.finfo(dtype).eps


def grid(num_cells: int) -> Grid:
    half = num_cells // 2
    outer, fine, near, wide, far = _FINE_TAIL if num_cells >= _COARSE else _ROUGH_TAIL
    start = math.log(max(num_cells - outer, outer) / outer)
    if start:
        fine = round(start * fine) / start
    return Grid(half, half - outer, start, near, start + near / fine, far, fine, wide)


class Counted(NamedTuple):
    """The state of a histogram; each tensor has a row per label."""

    counts: Tensor
    """(labels, 2, 2, cells) elements by predicted class, label and cell, int64"""
    doubts: Tensor
    """(labels, 2, cells) sums of min(p, 1 - p), float64"""
    squared_error: Tensor
    """(labels,) float64"""
    log_loss: Tensor
    """(labels,) float64"""

    def plus(self, other: Counted) -> Counted:
        # Not in place: a state created in inference mode can't be changed outside it.
        return Counted(*(mine + part for mine, part in zip(self, other, strict=True)))

    def to(self, device: torch.device) -> Counted:
        return Counted(*(part.to(device) for part in self))


def nothing(labels: int, cells: int, device: torch.device | str = "cpu") -> Counted:
    return Counted(
        torch.zeros(labels, 2, 2, cells, dtype=torch.int64, device=device),
        torch.zeros(labels, 2, cells, dtype=torch.float64, device=device),
        torch.zeros(labels, dtype=torch.float64, device=device),
        torch.zeros(labels, dtype=torch.float64, device=device),
    )


def count(
    num_cells: int, input: Tensor, target: Tensor, from_logits: bool, ignore_index: int | None
) -> Counted:
    """The state of a histogram of these predictions alone; one label per row of dimension 0."""
    cells = grid(num_cells)
    if not input.numel():
        return nothing(len(input), cells.size, input.device)
    sweep = _Sweep(num_cells, cells, input[0], target)
    rows = [
        sweep.row(x, y, from_logits, ignore_index)
        for x, y in zip(input.unbind(), target.unbind(), strict=True)
    ]
    return Counted(*(torch.stack(part) for part in zip(*rows, strict=True)))


class _Sweep:
    """Gathers predictions block by block, in the input's precision, at least float32.

    With doubt d = min(p, 1 - p) and logit x, the log loss of an element is -log(1 - d), plus |x|
    if the prediction is wrong. Its squared error is d^2, plus 1 - 2d if the prediction is wrong.
    All terms are positive, so nothing cancels.
    """

    def __init__(self, num_cells: int, cells: Grid, input: Tensor, target: Tensor) -> None:
        precision = torch.promote_types(input.dtype, torch.float32)
        self._grid = cells
        edge = slack(num_cells, precision)
        # A label must not be rounded to a legal one, nor a cell to its neighbour.
        wider = target.dtype if target.is_floating_point() else precision
        self._dtype = torch.promote_types(
            precision, wider if num_cells <= _FINEST else torch.float64
        )
        device, block = input.device, min(input.numel(), _BLOCK)
        self._one = torch.ones((), dtype=self._dtype, device=device)
        self._top = self._one * (cells.half - cells.start * cells.fine + edge)
        self._last = cells.inner - cells.start * cells.fine + edge
        # Each of these rows is filled by one thread.
        rows = min(_ROWS, torch.get_num_threads()) if input.numel() >= _BLOCK else 1
        self._size = (rows, 4 * cells.size)
        # Half the memory if it can't overflow.
        self._count_dtype = torch.int32 if input.numel() < 2**31 else torch.int64
        # Fresh memory for each block would cost more than the arithmetic does.
        self._work = [torch.empty(block, dtype=self._dtype, device=device) for _ in range(4)]
        self._input = torch.empty(block, dtype=self._dtype, device=device)
        self._wide = torch.empty(block, dtype=torch.float64, device=device)
        self._narrow = torch.empty(block, dtype=torch.int32, device=device)
        self._cell = torch.empty(block, dtype=torch.int64, device=device)
        self._ones = torch.ones(block, dtype=self._count_dtype, device=device)

    def row(
        self, input: Tensor, target: Tensor, from_logits: bool, ignore_index: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = input.device
        self._counts = torch.zeros(self._size, dtype=self._count_dtype, device=device)
        self._doubts = torch.zeros(self._size, dtype=torch.float64, device=device)
        self._ignored = torch.zeros((), dtype=torch.int64, device=device)
        self._squares, self._log_loss = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        blocks = (torch.split(part.reshape(-1), _BLOCK) for part in (input, target))
        for x, y in zip(*blocks, strict=True):
            self._add(x, y, from_logits, ignore_index)
        return self._parts()

    def _add(
        self, input: Tensor, target: Tensor, from_logits: bool, ignore_index: int | None
    ) -> None:
        y, size, doubt, work = (buffer[: len(input)] for buffer in self._work)
        x, label = input, target
        if x.dtype != self._dtype or not x.is_contiguous():
            x = self._input[: len(x)].copy_(x)
        # A byte becomes a float several times faster than a bool does.
        y.copy_(_batch.as_bytes(label) if label.dtype == torch.bool else label)
        if ignore_index is not None:
            x = self._without(ignore_index, x, label, from_logits)
        if from_logits:
            logit = x
            torch.neg(torch.abs(x, out=size), out=doubt).sigmoid_()
        else:
            logit = torch.logit(x)
            torch.abs(logit, out=size)
            torch.minimum(x, 1 - x, out=doubt)
        # Not clamp_(min=0), which on XLA turns infinity into the largest finite number.
        wrong = torch.sub(self._one, y, alpha=2, out=work).mul_(logit).relu_().sum()
        # Outside [0, 1] the logit is nan.
        legal = ~wrong.isnan() & _zeros_and_ones(label, y, work, ignore_index is not None)
        readable = predictions(legal, x, label, from_logits, ignore_index)
        wide = self._wide[: len(x)].copy_(doubt)
        self._squares += torch.dot(wide, wide)
        self._log_loss += wrong - _sum_log_sure(doubt, work)
        y.add_(torch.ge(x, 0 if from_logits else 0.5, out=work), alpha=2)
        self._gather(y, size, doubt, wide, None if readable else legal)

    def _without(self, ignored: int, x: Tensor, label: Tensor, from_logits: bool) -> Tensor:
        """The input with ignored elements made certain and right, which adds 0 to every sum.

        `_parts` takes them off the counts at the end.
        """
        y, keep, _, work = (buffer[: len(x)] for buffer in self._work)
        whole = not label.is_floating_point() and label.dtype != torch.bool
        told_apart = label.dtype in (torch.float32, torch.float64) or whole
        if x.device.type != "cpu" or abs(ignored) >= _EXACT or not told_apart:
            skipped = ~_batch.valid_elements(label, ignored)
            y.masked_fill_(skipped, 0)
            self._ignored += skipped.sum()
            return x.masked_fill(skipped, -torch.inf if from_logits else 0)
        # By floats and bit operations, several times faster than by bool masks.
        valid = torch.ne(y, ignored, out=work)
        self._ignored += len(y) - valid.count_nonzero()
        y.mul_(valid)
        bits, infinity = (
            (torch.int32, -(1 << 23)) if x.dtype == torch.float32 else (torch.int64, -(1 << 52))
        )
        mask = keep.view(bits).copy_(valid).neg_()  # all ones or none: no nan gets through
        held = torch.bitwise_and(x.view(bits), mask, out=self._input[: len(x)].view(bits))
        if from_logits:
            held |= mask.bitwise_not_().bitwise_and_(infinity)
        return held.view(x.dtype)

    def _gather(
        self, code: Tensor, size: Tensor, doubt: Tensor, wide: Tensor, legal: Tensor | None
    ) -> None:
        """Count the elements of a block, and sum their doubts, by code and cell."""
        cells = self._grid
        # Grid.coordinate, in place: the part up to the bend is counted as wide cells first, then
        # corrected to fine ones.
        place = torch.sub(self._top, doubt, alpha=2 * cells.half, out=self._work[3][: len(code)])
        place.clamp_(max=self._last)
        place.add_(size.clamp_(cells.start, cells.end), alpha=cells.wide)
        place.add_(size.clamp_(max=cells.bend), alpha=cells.fine - cells.wide)
        place.add_(code, alpha=cells.size)
        # Through int32, which is several times faster than directly.
        cell = self._cell[: len(code)].copy_(self._narrow[: len(code)].copy_(place))
        if legal is not None:
            cell.clamp_(0, self._size[1] - 1)
            for part in (self._doubts, self._squares, self._log_loss):
                part += torch.where(legal, 0.0, torch.nan)
        rows = self._size[0] if len(code) % self._size[0] == 0 else 1
        for sums, values in ((self._doubts, wide), (self._counts, self._ones[: len(code)])):
            sums[:rows].scatter_add_(1, cell.view(rows, -1), values.view(rows, -1))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = (2, 2, self._grid.size)
        counts = self._counts.sum(0, dtype=torch.int64).view(shape)
        doubts = self._doubts.sum(0).view(shape)
        counts[0, 0, -1] -= self._ignored
        confidences = counts - doubts
        wrong = (confidences - doubts)[[0, 1], [1, 0]].sum()
        return counts, doubts.sum(1), self._squares + wrong, self._log_loss


def _zeros_and_ones(label: Tensor, y: Tensor, work: Tensor, masked: bool) -> Tensor:
    """Whether a block of labels holds only 0 and 1, as a 0-d tensor.

    ``y`` are the labels as floats; if ``masked``, ignored ones are 0 in it.
    """
    if label.dtype == torch.bool:
        return torch.ones((), dtype=torch.bool, device=label.device)
    if masked or label.is_floating_point():
        low, high = _batch.ends(torch.addcmul(y, y, y, value=-1, out=work))
        return (low == 0) & (high == 0)
    low, high = _batch.ends(label)
    return (low >= 0) & (high <= 1)


def _sum_log_sure(values: Tensor, work: Tensor) -> Tensor:
    """Sum of log(1 - v) for v in [0, 1/2], accurate for small v.

    One logarithm for four elements, since (1 - a)(1 - b) = 1 - (a + b - ab).
    """
    if len(values) % 2:
        work.copy_(values)
    else:
        first, other = values.chunk(2)
        work = torch.addcmul(other, other, first, value=-1, out=work[: len(first)]).add_(first)
    if len(work) % 2 == 0:
        work, other = work.chunk(2)
        work.add_(other.addcmul_(other, work, value=-1))
    return work.neg_().log1p_().sum(dtype=torch.float64)


def predictions(
    legal: Tensor, input: Tensor, target: Tensor, from_logits: bool, ignored: int | None
) -> bool:
    """Refuse illegal predictions; return False if `legal`, 0-d, can't be read."""
    known = readable(legal)
    if known is False:
        if ignored is not None:
            target = target.masked_fill(~_batch.valid_elements(target, ignored), 0)
        illegal = (target != 0) & (target != 1) | input.isnan()
        if not from_logits:
            illegal |= (input < 0) | (input > 1)
        value = input[illegal][0].item()
        if value != value:
            raise ValueError(
                _checks.sentence(
                    "input",
                    "hold no nan",
                    "nan",
                    "the model has diverged, or a void element lacks its `ignore_index`",
                )
            )
        if not from_logits and not 0 <= value <= 1:
            raise ValueError(
                _checks.sentence(
                    "input",
                    "hold probabilities in [0, 1]",
                    f"{value:g}",
                    "pass logits with `from_logits=True`",
                )
            )
        void = "" if ignored is None else f" (besides ignore_index={ignored})"
        raise ValueError(
            _checks.sentence(
                "target",
                f"hold only 0 and 1{void}",
                f"the value {target[illegal][0].item()}",
                "for a 0/255 mask pass `mask > 0` or `mask / 255`, and name a void label with "
                "`ignore_index`",
            )
        )
    return known is not None


def readable(flag: Tensor) -> bool | None:
    """The value of a 0-d bool tensor; None if reading it would wait or break a trace.

    Values are read on the CPU only, and not under compile, export, vmap or fake tensors.
    """
    if flag.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return bool(flag)
    except RuntimeError:  # vmap, fake and proxy tensors have no values to branch on
        return None


class Array(Protocol):
    """A NumPy array, or an object that converts itself to one."""

    def __array__(self) -> Any: ...


def pair(input: Any, target: Any, name: str = "input") -> tuple[Tensor, Tensor]:
    """Check predictions and labels of equal size, and return both as Tensors."""
    x, y = tensor(input, name), tensor(target, "target")
    _batch.pair(x, y, name)
    return x, _batch.reducible(y)


def tensor(value: Any, name: str) -> Any:
    """A NumPy array, scalar or DataFrame column as a Tensor; other values are returned as is."""
    if isinstance(value, Tensor) or not hasattr(value, "__array__"):
        return value
    array = value.__array__()
    # torch accepts neither read-only memory, negative strides nor a foreign byte order.
    if not array.flags.writeable or not array.flags.c_contiguous or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(array) if array.shape else torch.tensor(array.item(), device="cpu")
    except TypeError:
        raise TypeError(
            _checks.sentence(
                name,
                "be a Tensor, or an array of numbers",
                f"an array of {array.dtype}",
                "pass `array.astype(float)`",
            )
        ) from None
