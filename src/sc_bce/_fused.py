"""The common case on a CPU in one sweep: loss and slope, block by block.

Two sums over the elements are enough for every strength s,

    BCE(x, y) summed and (y - c) x summed, since BCE(x, q) = BCE(x, y) + s (y - c) x,

so nothing of full size is written but the gradient, and backward keeps the logits and the target
as they came, a mask as its one byte. `functional` holds the reference path, for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ._batch import Batch, Perturbation, readable, refuse_labels

__all__ = ["Sums", "sums"]

_BLOCK = 1 << 20  # elements worked on at a time: few enough for a cache, many enough for threads
_MIN_ELEMENTS = 1 << 18  # from which on this is quicker than the reference path
_MIN_PER_ROW = 1 << 10  # elements that share a strength and a prior, likewise
_UNFIT = (torch.uint16, torch.uint32, torch.uint64)  # whose minimum torch can't find
_LOOK = 1 << 16  # floating-point labels looked at: all would cost a twentieth of the sweep
_FOLDS = 5  # 32 to 64 factors in [1/2, 1] can't underflow in float32


class Sums(NamedTuple):
    """What one sweep finds."""

    loss: Tensor  # of the batch at the given strength, 0-d
    slope: Tensor  # of (y - c) x over each row, whatever was drawn; no gradient
    labels: Tensor  # of y, and of labels of at least 1/2, over each row: (2, rows), if counted
    shape: torch.Size  # leading dimensions of the batch, whose product is the rows


def sums(
    batch: Batch, given: Perturbation, by_sample: bool = False, count: bool = False
) -> Sums | None:
    """Sums over the batch, or None where the sweep does not apply.

    A row is what shares a strength and a prior: all trailing dimensions along which neither
    varies. With `by_sample` no row holds elements of two samples, and slopes are found whatever
    is drawn; with `count` labels are counted. In at least float32, differentiable as often as
    one likes.
    """
    x, y = batch.input, batch.target
    if batch.valid is not None or torch.compiler.is_compiling():  # a graph is bound to no size
        return None
    if x.numel() < _MIN_ELEMENTS or not readable(x) or not _fit(x, y):
        return None
    if any(_is_dual(value) for value in (x, y, *given.tensors)):
        return None
    drawn = _draw_per_element(given.alpha, x)
    if drawn is not None:
        given = given._replace(alpha=1.0)
    lead = max((_varying(value) for value in given.tensors), default=0)
    lead = max(lead, int(by_sample))
    shape = x.shape[:lead]
    if x.numel() < _MIN_PER_ROW * shape.numel():
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    strength = _row_values(torch.as_tensor(given.strength(dtype), dtype=dtype, device="cpu"), shape)
    prior = given.prior
    if isinstance(prior, Tensor):
        prior = _row_values(prior.to(dtype), shape)
    if y.is_floating_point():
        low, high = y.view(-1)[:_LOOK].aminmax()
        if low < 0 or high > 1:
            refuse_labels(y, (y < 0) | (y > 1), None)
    loss, slope, labels = _Sweep.apply(x, y, strength, prior, drawn, by_sample, count)  # type: ignore[no-untyped-call]
    return Sums(loss.sum(), slope, labels, shape)


def _fit(x: Tensor, y: Tensor) -> bool:
    """Contiguous and of dtypes that the sweep computes in; `x` is known to be readable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        readable(y)
        and x.is_contiguous()
        and y.is_contiguous()
        and not y.requires_grad
        and y.dtype not in _UNFIT
        and (not y.is_floating_point() or torch.promote_types(y.dtype, wide) == wide)
    )


def _is_dual(value: Tensor) -> bool:
    tangent = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def _draw_per_element(alpha: float | Tensor, x: Tensor) -> Tensor | None:
    """Alpha itself where it is a bool for each element that the sweep can read."""
    if not isinstance(alpha, Tensor) or alpha.dtype != torch.bool or alpha.shape != x.shape:
        return None
    return alpha if alpha.is_contiguous() and readable(alpha) else None


def _varying(value: Tensor) -> int:
    """How many leading dimensions it takes to hold all along which the value varies."""
    return max((place + 1 for place, size in enumerate(value.shape) if size > 1), default=0)


def _row_values(value: Tensor, shape: torch.Size) -> Tensor:
    """One value for each row, as a column."""
    if value.dim():
        value = value.reshape(value.shape[: len(shape)])
    return value.expand(shape).reshape(-1, 1)


class _Sweep(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        strength: Tensor,
        prior: float | Tensor,
        drawn: Tensor | None,
        by_sample: bool,
        count: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(strength)
        x, y, z = _matrices(rows, input, target, drawn)
        work = _Work(x, 4)
        loss, slope, drawn_slope, size, drawn_size = (work.sums(rows) for _ in range(5))
        labels = torch.zeros(2, rows if count else 0, dtype=torch.float64, device="cpu")
        centred = not isinstance(prior, Tensor) and prior == 0.5
        for place in work.blocks:
            r = place[0]
            x_block = work.wide(x[place], 0)
            y_block = work.wide(y[place], 3)
            product, other = work.buffer(x_block, 2), work.buffer(x_block, 1)
            if count:  # at most 2**20 at a time: exact in float32
                labels[0, r] += y_block.sum(1)
                if y.is_floating_point():
                    labels[1, r] += torch.ge(y_block, 0.5, out=other).sum(1)
            # (y - 1/2) x, of which (y - c) x and BCE(x, y) follow.
            torch.sub(y_block, 0.5, out=product).mul_(x_block)
            if z is None or by_sample:
                slope[r] += product.sum(1)
                if not centred:
                    size[r] += x_block.sum(1)
            if z is not None:
                z_block = work.wide(z[place], 3)
                drawn_slope[r] += torch.mul(product, z_block, out=other).sum(1)
                if not centred:
                    drawn_size[r] += torch.mul(x_block, z_block, out=other).sum(1)
            # BCE(x, y) = |x|/2 - (y - 1/2) x - log sigmoid(|x|): no cancellation, no overflow.
            torch.abs(x_block, out=other)
            loss[r] -= torch.sub(product, other, alpha=0.5, out=product).sum(1)
            # One logarithm for many elements: that of the product of the sigmoids.
            loss[r] -= _folded(other.sigmoid_()).log_().sum(1)
        off = 0.5 - (prior[:, 0] if isinstance(prior, Tensor) else prior)
        slope += off * size
        used = slope if z is None else drawn_slope + off * drawn_size
        if count and not y.is_floating_point():
            labels[1] = labels[0]
        s = strength[:, 0]
        # A slope beyond the end of float32 counts for nothing in a row of strength 0.
        total = torch.where(s == 0, loss, loss + s * used)
        tensors = prior if isinstance(prior, Tensor) else None
        ctx.save_for_backward(input, target, strength, tensors, drawn, used)
        ctx.prior = prior
        ctx.mark_non_differentiable(slope, labels)
        return total, slope, labels

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, target, strength, tensor, drawn, slope = ctx.saved_tensors
        prior = ctx.prior if tensor is None else tensor
        if torch.is_grad_enabled() or not _has_values(grad):
            # To be differentiated again, or for many gradients at once.
            return (*_by_formula(grad, input, target, strength, prior, drawn), None, None)
        for_strength = for_prior = None
        if ctx.needs_input_grad[2]:
            for_strength = (grad * slope)[:, None]
        if ctx.needs_input_grad[3]:
            for_prior = _by_formula(grad, input, target, strength, prior, drawn)[3]
        x, y, z = _matrices(len(strength), input, target, drawn)
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
        _fill_gradient(out.view(x.shape), x, y, z, grad[:, None], strength, prior)
        return out, None, for_strength, for_prior, None, None, None


def _fill_gradient(
    out: Tensor,
    x: Tensor,
    y: Tensor,
    z: Tensor | None,
    grad: Tensor,
    strength: Tensor,
    prior: float | Tensor,
) -> None:
    # grad (sigmoid(x) - y) + grad s (y - c), the second only where drawn
    pull = grad * strength
    work = _Work(x, 3)
    for place in work.blocks:
        rows = place[0]
        x_block, g = x[place], out[place]
        if g.dtype != work.dtype:
            x_block = g = work.wide(x_block, 0)
        torch.sigmoid(x_block, out=g)
        g.mul_(grad[rows])
        y_block = work.wide(y[place], 1)
        c = prior[rows] if isinstance(prior, Tensor) else prior
        if z is None:
            g.addcmul_(y_block, pull[rows] - grad[rows]).sub_(pull[rows] * c)
        else:
            g.addcmul_(y_block, -grad[rows])
            towards = torch.sub(y_block, c, out=work.buffer(x_block, 2))
            towards.mul_(work.wide(z[place], 1))
            g.addcmul_(towards, pull[rows])
        if g.dtype != out.dtype:
            out[place] = g


def _by_formula(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    strength: Tensor,
    prior: float | Tensor,
    drawn: Tensor | None,
) -> tuple[Tensor, None, Tensor, Tensor | None, None]:
    """The gradients as torch's own operations, which can be differentiated again."""
    x, y, z = _matrices(len(strength), input, target, drawn)
    x, y = x.to(strength.dtype), y.to(strength.dtype)
    share = 1.0 if z is None else z.to(x.dtype)
    towards = (y - prior) * share
    grad = grad[..., None]
    for_input = (grad * (torch.sigmoid(x) - y + strength * towards)).to(input.dtype)
    for_strength = grad * (towards * x).sum(-1, keepdim=True)
    for_prior = None
    if isinstance(prior, Tensor):
        for_prior = -grad * strength * (share * x).sum(-1, keepdim=True)
    return for_input.view_as(input), None, for_strength, for_prior, None


def _has_values(value: Tensor) -> bool:
    try:
        value.data_ptr()
    except RuntimeError:  # many gradients in one tensor: a wrapper of vmap
        return False
    return True


def _matrices(rows: int, *values: Tensor | None) -> list[Any]:
    """Each with a row for each strength; bools as bytes, which become floats many times faster."""
    views = [None if value is None else value.view(rows, -1) for value in values]
    return [
        view.view(torch.uint8) if view is not None and view.dtype == torch.bool else view
        for view in views
    ]


class _Work:
    """The blocks of a matrix, and buffers of one block each."""

    def __init__(self, x: Tensor, buffers: int) -> None:
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self._shape = x.shape
        self._rows, self._columns = max(1, _BLOCK // x.shape[1]), min(x.shape[1], _BLOCK)
        self._buffers: list[Tensor | None] = [None] * buffers

    @property
    def blocks(self) -> Iterator[tuple[slice, slice]]:
        for row in range(0, self._shape[0], self._rows):
            for column in range(0, self._shape[1], self._columns):
                yield slice(row, row + self._rows), slice(column, column + self._columns)

    def sums(self, rows: int) -> Tensor:
        return torch.zeros(rows, dtype=self.dtype, device="cpu")

    def buffer(self, like: Tensor, place: int) -> Tensor:
        kept = self._buffers[place]
        if kept is None:
            size = min(self._rows, self._shape[0]) * self._columns
            kept = torch.empty(size, dtype=self.dtype, device="cpu")
            self._buffers[place] = kept
        return kept[: like.numel()].view(like.shape)

    def wide(self, block: Tensor, place: int) -> Tensor:
        """The block in at least float32, itself where it is."""
        return block if block.dtype == self.dtype else self.buffer(block, place).copy_(block)


def _folded(factors: Tensor) -> Tensor:
    """Products of the columns, a few dozen at a time; the factors are overwritten."""
    width = factors.shape[1]
    for _ in range(_FOLDS):
        if width < 2:
            break
        if width % 2:
            factors[:, :1] *= factors[:, width - 1 : width]
        width //= 2
        factors[:, :width] *= factors[:, width : 2 * width]
    return factors[:, :width]
