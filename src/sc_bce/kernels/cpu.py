"""The common case on a CPU in one sweep: loss, slopes, labels and hits, block by block.

Two sums over the elements give the loss at every strength s, the sum of BCE(x, y) and the sum of
(y - c) x, since

    BCE(x, q) = BCE(x, y) + s (y - c) x.

So the gradient is the only tensor of full size that is written. Backward keeps the logits and the
target as they were passed, a mask as its one byte. What the sweep does not take, torch's own calls
do: `functional` defines the formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .._inputs import Batch, Perturbation, Seen, Wanted
from .._torch import UNREDUCIBLE, readable

__all__ = ["sweep"]

BLOCK = 1 << 19  # elements worked on at a time, by two threads: few enough for their caches
# Elements for each thread from which this is faster than torch's own calls:
MIN_ELEMENTS = 1 << 18  # if these make many passes, for the levels of samples or ignored elements
MIN_FIXED = 1 << 20  # if they make few
MIN_WEIGHTED = 1 << 21  # the same with a weight: then each element needs its own logarithm
MIN_PER_ROW = 1 << 10  # elements that share a strength and a prior, from which this is faster
MOST_THREADS = 4  # that count: with more, nothing was measured; labels of a block must sum exactly
_FOLDS = 5  # 32 to 64 factors in [1/2, 1] can't underflow in float32
_EXACT = 1 << 24  # integers up to this are exact in float32


def sweep(
    batch: Batch,
    given: Perturbation,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    wanted: Wanted,
) -> tuple[Tensor, Seen] | None:
    """The reduced loss and what the batch shows, or None if the sweep does not apply.

    In at least float32; differentiable any number of times in input, strength and prior.
    """
    # Under compile the checks of sizes would specialise a graph.
    if torch.compiler.is_compiling() or batch.input.numel() < MIN_ELEMENTS:
        return None
    if pos_weight is not None or reduction == "none":
        return None
    if given.nothing() and batch.void is None:  # torch's own call, bit for bit
        return None
    by_sample = wanted.slopes or wanted.hits or wanted.share is not None
    if not _pays(batch, weight, by_sample) or not _takes(batch, given, weight):
        return None
    x, y = batch.input, batch.target
    drawn = _draw_per_element(given.alpha, x)
    if drawn is not None:
        given = given._replace(alpha=1.0)
    # A row is the elements that share a strength, a prior and a weight: all trailing dimensions
    # along which none of them varies. Only what is wanted of samples keeps them apart.
    lead = max((_varying(value) for value in given.tensors), default=0)
    lead = max(lead, int(by_sample))
    factor: Tensor | None = None
    if weight is not None:
        factor = _factor(weight, x, lead)
        if factor is None:
            return None
        lead = max(lead, _varying(factor)) if factor.shape != x.shape else lead
    shape = x.shape[:lead]
    if x.numel() < MIN_PER_ROW * shape.numel():
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    strength = _row_values(torch.as_tensor(given.strength(dtype), dtype=dtype, device="cpu"), shape)
    prior = given.prior
    if isinstance(prior, Tensor):
        prior = _row_values(prior.to(dtype), shape)
    if factor is not None and factor.shape != x.shape:
        factor = _row_values(factor.to(dtype), shape)
    data = _Data(x, y, drawn, factor, _void(batch))
    with torch.no_grad():
        found = _found(data, strength, prior, wanted)
    if not bool(found.loss.isfinite().all()):
        return None  # a logit is inf or nan: an ignored one must be replaced, others are torch's
    total = _Sweep.apply(x, strength, prior, y, drawn, factor, data.void, *found[:2]).sum()  # type: ignore[no-untyped-call]
    if reduction == "mean":
        # If all elements are ignored, 0 / 1.
        count = x.numel() if found.valid is None else found.valid.sum().clamp(min=1)
        total = (total / count).to(total.dtype)
    return total, _seen(found, shape, x.shape, wanted)


def _pays(batch: Batch, weight: Tensor | None, by_sample: bool) -> bool:
    least = MIN_FIXED if weight is None else MIN_WEIGHTED
    if by_sample or batch.void is not None:
        least = MIN_ELEMENTS
    return batch.input.numel() >= least * _threads()


def _takes(batch: Batch, given: Perturbation, weight: Tensor | None) -> bool:
    x, y, void = batch.input, batch.target, batch.void
    if not readable(x) or not _fit(x, y) or (void is not None and not abs(void) <= _EXACT):
        return False
    tensors = given.tensors if weight is None else [*given.tensors, weight]
    # What backward keeps must not be an inference tensor.
    return not any(_is_dual(value) or value.is_inference() for value in (x, y, *tensors))


def _void(batch: Batch) -> float | None:
    """The target to ignore, as rounded by the target's own dtype."""
    if batch.void is None or not batch.target.is_floating_point():
        return None if batch.void is None else float(batch.void)
    return float(torch.tensor(batch.void, dtype=batch.target.dtype, device="cpu"))


def _seen(found: _Found, shape: torch.Size, size: torch.Size, wanted: Wanted) -> Seen:
    """What the rows show, as means over samples and sums over columns."""
    counts = None
    if wanted.labels is not None and found.labels is not None:
        each = float(math.prod(size[len(shape) :]))
        number = torch.full_like(found.labels, each) if found.valid is None else found.valid
        counts = tuple(_columns(part, shape, wanted) for part in (number, found.labels))
    return Seen(
        _row_means(found.slope, found.valid, size) if wanted.slopes else None,
        None if found.hits is None else _row_means(found.hits, found.valid, size),
        counts,  # type: ignore[arg-type]
    )


def _row_means(total: Tensor, valid: Tensor | None, size: torch.Size) -> Tensor:
    """Sums over rows as means over samples; nan for a sample without a valid element."""
    total = total.view(size[0], -1).sum(1)
    if valid is None:
        return (total * (size[0] / size.numel())).float()
    return (total / valid.view(size[0], -1).sum(1)).float()


def _columns(rows: Tensor, shape: torch.Size, wanted: Wanted) -> Tensor:
    """Sums over rows as sums over columns, one for each element of the shape that is wanted."""
    columns = wanted.labels[: len(shape)] if wanted.labels else (1,) * len(shape)
    rows = rows.view(shape)
    if wanted.share is not None:
        rows = rows * wanted.share.view(-1, *(1 for _ in shape[1:]))
    over = [place for place, have in enumerate(columns) if have == 1]
    return (rows.sum(over) if over else rows).reshape(-1).float()


def _threads() -> int:
    return min(torch.get_num_threads(), MOST_THREADS)


def _fit(x: Tensor, y: Tensor) -> bool:
    """Whether both are contiguous and of dtypes that the sweep takes; `x` is readable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        readable(y)
        and x.is_contiguous()
        and y.is_contiguous()
        and not y.requires_grad
        and y.dtype not in UNREDUCIBLE
        and (not y.is_floating_point() or torch.promote_types(y.dtype, wide) == wide)
    )


def _is_dual(value: Tensor) -> bool:
    tangent = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def _draw_per_element(alpha: float | Tensor, x: Tensor) -> Tensor | None:
    """Alpha itself if it is a readable bool for each element."""
    if not isinstance(alpha, Tensor) or alpha.dtype != torch.bool or alpha.shape != x.shape:
        return None
    return alpha if alpha.is_contiguous() and readable(alpha) else None


def _factor(weight: Tensor, x: Tensor, lead: int) -> Tensor | None:
    """The weight, with the input's dimensions, if it is constant over each row or full-size."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight.requires_grad or not readable(weight) or weight.dim() > x.dim():
        return None
    if not weight.is_floating_point() or torch.promote_types(weight.dtype, wide) != wide:
        return None
    factor = weight.reshape((1,) * (x.dim() - weight.dim()) + tuple(weight.shape))
    if any(have not in (1, want) for have, want in zip(factor.shape, x.shape, strict=True)):
        return None  # the reference path raises torch's error
    rows = x.shape[: max(lead, _varying(factor))].numel()
    if x.numel() >= MIN_PER_ROW * rows:
        return factor
    return factor if factor.shape == x.shape and factor.is_contiguous() else None


def _varying(value: Tensor) -> int:
    """Number of leading dimensions that include every one along which the value varies."""
    return max((place + 1 for place, size in enumerate(value.shape) if size > 1), default=0)


def _row_values(value: Tensor, shape: torch.Size) -> Tensor:
    """One value for each row, as a column."""
    if value.dim():
        value = value.reshape(value.shape[: len(shape)])
    return value.expand(shape).reshape(-1, 1)


class _Data(NamedTuple):
    """The data of each element."""

    input: Tensor
    target: Tensor
    drawn: Tensor | None
    weight: Tensor | None  # of the input's shape, or a column with one value per row
    void: float | None  # the target to ignore


class _Found(NamedTuple):
    """Sums over the valid elements of each row."""

    loss: Tensor  # at the given strength
    slope: Tensor  # of weight (y - c) x, for any draw if there are samples to move
    labels: Tensor | None
    hits: Tensor | None  # number of elements that are right at 1/2
    valid: Tensor | None  # number of valid elements; None if all are


def _found(data: _Data, strength: Tensor, prior: float | Tensor, wanted: Wanted) -> _Found:
    rows, void = len(strength), data.void
    count, hits = wanted.labels is not None, wanted.hits
    x, y, z, w = _matrices(rows, data)
    soft = y.is_floating_point()
    each = w is not None and w.shape == x.shape
    work = _Work(x)
    # In float64: over many blocks float32 would lose what its sums within one keep.
    loss, slope, size, right, labels, gone_from = (
        torch.zeros(rows, dtype=torch.float64, device="cpu") for _ in range(6)
    )
    for place in work.blocks:
        r = place[0]
        x_block, y_block = work.wide("x", x[place]), work.wide("y", y[place])
        gone = None
        if void is not None:
            # 1 and 0 of the same dtype: a bool result would take many times as long.
            gone = torch.eq(y_block, void, out=work.like("gone", y_block))
            gone_from[r] += gone.sum(1)
            x_block = torch.addcmul(x_block, x_block, gone, value=-1, out=work.like("x", x_block))
            if count or hits:
                out = work.like("y", y_block)
                y_block = torch.addcmul(y_block, y_block, gone, value=-1, out=out)
        other = work.like("other", x_block)
        if count:  # of a block: exact in float32
            labels[r] += y_block.sum(1)
        if hits:  # an ignored element counts as a negative that is called positive
            high = torch.ge(y_block, 0.5, out=work.like("high", y_block)) if soft else y_block
            right[r] += torch.ge(x_block, 0, out=other).eq_(high).sum(1)
        w_block = work.wide("w", w[place]) if each else None
        if z is None or wanted.slopes:
            # (y - 1/2) x, of which (y - c) x and BCE(x, y) follow.
            product = torch.sub(y_block, 0.5, out=work.like("product", y_block)).mul_(x_block)
            weighted = x_block
            if w_block is not None:
                product.mul_(w_block)
                weighted = torch.mul(x_block, w_block, out=other)
            slope[r] += product.sum(1)
            size[r] += weighted.sum(1)
        if z is not None:
            t_block = work.drawn(y_block, z[place], strength[r], _of_rows(prior, r))
            product = t_block.sub_(0.5).mul_(x_block)
            if w_block is not None:
                product.mul_(w_block)
        # BCE(x, y) = |x|/2 - (y - 1/2) x - log sigmoid(|x|): no cancellation, no overflow.
        torch.abs(x_block, out=other)
        if w_block is None:
            product.sub_(other, alpha=0.5)
        else:
            product.addcmul_(other, w_block, value=-0.5)
        loss[r] -= product.sum(1)
        other.sigmoid_()
        if gone is not None:
            torch.maximum(other, gone, out=other)
        # One logarithm for many elements: that of the product of the sigmoids.
        logs = _folded(other).log_() if w_block is None else other.log_().mul_(w_block)
        loss[r] -= logs.sum(1)
    slope += (0.5 - (prior[:, 0] if isinstance(prior, Tensor) else prior)) * size
    if w is not None and not each:
        loss, slope = w[:, 0] * loss, w[:, 0] * slope
    if z is None:
        s = strength[:, 0]
        # In a row of strength 0 a slope that overflows float32 must not make the loss nan.
        loss = torch.where(s == 0, loss, loss + s * slope)
    valid = None if void is None else x.shape[1] - gone_from
    loss, slope = loss.to(work.dtype), slope.to(work.dtype)
    return _Found(loss, slope, labels if count else None, right if hits else None, valid)


def _of_rows(value: float | Tensor, rows: slice) -> float | Tensor:
    return value[rows] if isinstance(value, Tensor) else value


class _Sweep(Function):
    """Gives the sums their gradients with respect to logits, strength and prior."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        strength: Tensor,
        prior: float | Tensor,
        target: Tensor,
        drawn: Tensor | None,
        weight: Tensor | None,
        void: float | None,
        loss: Tensor,
        slope: Tensor,
    ) -> Tensor:
        tensor = prior if isinstance(prior, Tensor) else None
        ctx.save_for_backward(input, strength, tensor, target, drawn, weight, slope)
        ctx.prior, ctx.void = prior, void
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, strength, tensor, target, drawn, weight, slope = ctx.saved_tensors
        prior = ctx.prior if tensor is None else tensor
        data = _Data(input, target, drawn, weight, ctx.void)
        rest = (None,) * 6
        if torch.is_grad_enabled() or not _has_values(grad):
            # To be differentiated again, or for many gradients at once.
            return (*_by_formula(grad, data, strength, prior), *rest)
        for_strength = for_prior = None
        if ctx.needs_input_grad[2] or (ctx.needs_input_grad[1] and drawn is not None):
            for_strength, for_prior = _by_formula(grad, data, strength, prior)[1:]
        elif ctx.needs_input_grad[1]:
            for_strength = (grad * slope)[:, None]
        return _gradient(grad[:, None], data, strength, prior), for_strength, for_prior, *rest


def _gradient(grad: Tensor, data: _Data, strength: Tensor, prior: float | Tensor) -> Tensor:
    """grad weight (sigmoid(x) - q)."""
    x, y, z, w = _matrices(len(strength), data)
    each = w is not None and w.shape == x.shape
    if w is not None and not each:
        grad = grad * w
    result = torch.empty_like(data.input, memory_format=torch.contiguous_format)
    out = result.view(x.shape)
    work = _Work(x)
    for place in work.blocks:
        r = place[0]
        x_block, y_block, g = x[place], work.wide("y", y[place]), out[place]
        if g.dtype != work.dtype:
            x_block = g = work.wide("x", x_block)
        torch.sigmoid(x_block, out=g)
        c, s = _of_rows(prior, r), strength[r]
        if z is None:
            g.mul_(grad[r]).addcmul_(y_block, (s - 1) * grad[r]).sub_(s * c * grad[r])
        else:
            g.sub_(work.drawn(y_block, z[place], s, c)).mul_(grad[r])
        if each:
            g.mul_(work.wide("w", w[place]))
        if data.void is not None:
            g.mul_(torch.ne(y_block, data.void, out=work.like("other", y_block)))
        if g.dtype != out.dtype:
            out[place] = g
    return result


def _by_formula(
    grad: Tensor, data: _Data, strength: Tensor, prior: float | Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients by torch's own operations, which can be differentiated again."""
    x, y, z, w = _matrices(len(strength), data)
    x, y = x.to(strength.dtype), y.to(strength.dtype)
    grad = grad[..., None]
    share = torch.ones((), dtype=x.dtype, device="cpu")
    if w is not None:
        share = share * w.to(x.dtype)
    if data.void is not None:
        share = share * (y != data.void)
        y = torch.where(y == data.void, 0.5, y)
    drawn = share if z is None else share * z.to(x.dtype)
    towards = (y - prior) * drawn
    for_input = (grad * (share * (torch.sigmoid(x) - y) + strength * towards)).to(data.input.dtype)
    for_strength = grad * (towards * x).sum(-1, keepdim=True)
    for_prior = None
    if isinstance(prior, Tensor):
        for_prior = -grad * strength * (drawn * x).sum(-1, keepdim=True)
    return for_input.view_as(data.input), for_strength, for_prior


def _has_values(value: Tensor) -> bool:
    try:
        value.data_ptr()
    except RuntimeError:  # many gradients in one tensor: a wrapper of vmap
        return False
    return True


def _matrices(rows: int, data: _Data) -> list[Any]:
    """The data with a row per strength; bools as bytes, which become floats many times faster."""
    values = (data.input, data.target, data.drawn, data.weight)
    views = [None if value is None else value.view(rows, -1) for value in values]
    return [
        view.view(torch.uint8) if view is not None and view.dtype == torch.bool else view
        for view in views
    ]


class _Work:
    """The blocks of a matrix, and buffers of one block each, by name."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self._shape = x.shape
        block = BLOCK * max(1, _threads() // 2)
        self._rows, self._columns = max(1, block // x.shape[1]), min(x.shape[1], block)
        self._buffers: dict[str, Tensor] = {}

    @property
    def blocks(self) -> Iterator[tuple[slice, slice]]:
        for row in range(0, self._shape[0], self._rows):
            for column in range(0, self._shape[1], self._columns):
                yield slice(row, row + self._rows), slice(column, column + self._columns)

    def like(self, name: str, block: Tensor) -> Tensor:
        """The buffer of this name, in the shape of the block."""
        if name not in self._buffers:
            size = min(self._rows, self._shape[0]) * self._columns
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device="cpu")
        return self._buffers[name][: block.numel()].view(block.shape)

    def wide(self, name: str, block: Tensor) -> Tensor:
        """The block in at least float32; without a copy if it is already."""
        return block if block.dtype == self.dtype else self.like(name, block).copy_(block)

    def drawn(self, y: Tensor, z: Tensor, s: Tensor, c: float | Tensor) -> Tensor:
        """y + s (c - y) where drawn, y elsewhere."""
        share = self.like("z", z).copy_(z).mul_(s)
        return torch.lerp(y, torch.as_tensor(c, dtype=self.dtype, device="cpu"), share, out=share)


def _folded(factors: Tensor) -> Tensor:
    """Products of the columns, a few dozen at a time; the factors are overwritten."""
    width = factors.shape[1]
    for _ in range(_FOLDS):
        if width < 2:
            break
        if width % 2:
            factors[:, :1].mul_(factors[:, width - 1 : width])
        width //= 2
        factors[:, :width].mul_(factors[:, width : 2 * width])
    return factors[:, :width]
