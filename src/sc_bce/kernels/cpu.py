"""The common case on a CPU in one sweep: loss, slopes, labels and hits, block by block.

Two sums over the elements give the loss at every strength s, the sum of BCE(x, y) and the sum of
(y - c) x, since

    BCE(x, q) = BCE(x, y) + s (y - c) x.

So the gradient is the only tensor of full size that is written. Backward keeps the logits and the
target as they were passed. What the sweep does not take, torch's own calls do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .._inputs import Batch, Perturbation, Seen, Wanted, broadcasts
from .._torch import as_bytes, forward_mode, readable

__all__ = ["sweep"]

BLOCK = 1 << 19  # elements worked on at a time, by two threads: few enough for their caches
# Elements for each thread from which this is faster than torch's own calls:
MIN_ELEMENTS = 1 << 18  # if these make many passes, for the levels of samples
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
    if torch.compiler.is_compiling() or pos_weight is not None or reduction == "none":
        return None
    if given.nothing() and batch.void is None:  # torch's own call, bit for bit
        return None
    by_sample = wanted.slopes or wanted.hits or wanted.share is not None
    if not _takes(batch, given, weight, by_sample):
        return None
    x, alpha, drawn = batch.input, given.alpha, None
    if isinstance(alpha, Tensor) and alpha.dtype == torch.bool and alpha.shape == x.shape:
        drawn, given = alpha.contiguous(), given._replace(alpha=1.0)
    each = weight if weight is not None and weight.shape == x.shape else None
    shared = torch.ones((), device="cpu")  # the weight of a row
    if weight is not None and each is None:
        shared = weight[(None,) * (x.dim() - weight.dim())]
    # A row is the elements that share a strength, a prior and a weight: all trailing dimensions
    # along which none of them varies. Only what is wanted of samples keeps them apart.
    lead = max(int(by_sample), *map(_varying, (*given.tensors(), shared)))
    shape = x.shape[:lead]
    if x.numel() < MIN_PER_ROW * shape.numel():
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    strength = _row_values(given.strength(dtype), shape, dtype)
    prior, factor = (_row_values(value, shape, dtype) for value in (given.prior, shared))
    void = None if batch.void is None else float(batch.target.new_full((), batch.void))
    parts = [_matrix(part, len(strength)) for part in (x, batch.target, drawn, each)]
    data = _Data(*parts, void)  # type: ignore[call-arg,arg-type]
    with torch.no_grad():
        found = _found(data, strength, prior, wanted)
    if not bool((found.loss * factor[:, 0]).isfinite().all()):
        return None  # a logit or a weight is: if ignored it must be replaced, others are torch's
    rows = _Sweep.apply(data.input, strength, prior, data, found)  # type: ignore[no-untyped-call]
    total = (rows * factor[:, 0]).sum()
    if reduction == "mean":  # if all elements are ignored, 0 / 1
        total = (total / found.valid.sum().clamp(min=1)).to(total.dtype)
    found = found._replace(slope=found.slope * factor[:, 0])
    return total, _seen(found, shape, x.shape, wanted)


def _takes(batch: Batch, given: Perturbation, weight: Tensor | None, by_sample: bool) -> bool:
    """Whether the sweep is faster than torch's calls and does what they do."""
    x, void = batch.input, batch.void
    constants = [batch.target] if weight is None else [batch.target, weight]
    least = MIN_FIXED if weight is None else MIN_WEIGHTED
    if by_sample:
        least = MIN_ELEMENTS
    if x.numel() < least * _threads() or (void is not None and not abs(void) <= _EXACT):
        return False
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        not forward_mode()
        and all(
            broadcasts(value.shape, x.shape) for value in constants
        )  # or torch raises its error
        and all(value.is_contiguous() for value in (x, *constants) if value.shape == x.shape)
        and not any(value.requires_grad for value in constants)
        and all(torch.promote_types(value.dtype, wide) == wide for value in constants)
        and all(map(readable, (x, *constants, *given.tensors())))
    )


def _varying(value: Tensor) -> int:
    """Number of leading dimensions that include every one along which the value varies."""
    return max((place + 1 for place, size in enumerate(value.shape) if size > 1), default=0)


def _row_values(value: float | Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """One value for each row, as a column."""
    value = torch.as_tensor(value, dtype=dtype, device="cpu")
    if value.dim():
        value = value.reshape(value.shape[: len(shape)])
    return value.expand(shape).reshape(-1, 1)


def _matrix(value: Tensor | None, rows: int) -> Tensor | None:
    """The rows as a view; bools as bytes, which become floats many times faster."""
    if value is None:
        return None
    value = value.view(rows, -1)
    return as_bytes(value) if value.dtype == torch.bool else value


def _threads() -> int:
    return min(torch.get_num_threads(), MOST_THREADS)


class _Data(NamedTuple):
    """The data of each element, in rows."""

    input: Tensor
    target: Tensor
    drawn: Tensor | None
    weight: Tensor | None
    void: float | None  # the target to ignore


class _Found(NamedTuple):
    """Sums over the valid elements of each row."""

    loss: Tensor  # at the given strength
    slope: Tensor  # of weight (y - c) x; under a draw only if slopes are wanted
    labels: Tensor
    hits: Tensor  # number of elements that are right at 1/2
    valid: Tensor  # number of valid elements


def _seen(found: _Found, shape: torch.Size, size: torch.Size, wanted: Wanted) -> Seen:
    """What the rows show, as means over samples and sums over columns."""

    def means(total: Tensor) -> Tensor:  # nan for a sample without a valid element
        each, number = (value.view(size[0], -1).sum(1) for value in (total, found.valid))
        return (each / number).float()

    labels = wanted.labels or (1,) * len(shape)
    over = [place for place in range(len(shape)) if labels[place] == 1]

    def sums(rows: Tensor) -> Tensor:  # one for each element of the shape that is wanted
        rows = rows.view(shape)
        if wanted.share is not None:
            rows = rows * wanted.share.view(-1, *(1 for _ in shape[1:]))
        return (rows.sum(over) if over else rows).reshape(-1).float()

    return Seen(
        means(found.slope) if wanted.slopes else None,
        means(found.hits) if wanted.hits else None,
        None if wanted.labels is None else (sums(found.valid), sums(found.labels)),
    )


def _found(data: _Data, strength: Tensor, prior: Tensor, wanted: Wanted) -> _Found:
    x, y, z, w, void = data
    work = _Work(x)
    # In float64: over many blocks float32 would lose what its sums within one keep.
    loss, slope, size, labels, hits, valid = torch.zeros(
        6, len(strength), dtype=torch.float64, device="cpu"
    )
    valid += x.shape[1]
    for place in work.blocks:
        r = place[0]
        x_block, y_block, gone = work.wide("x", x[place]), work.wide("y", y[place]), None
        if void is not None:
            gone, x_block, y_block = work.without(void, x_block, y_block, wanted)
            valid[r] -= gone.sum(1)
        if wanted.labels is not None:  # of a block: exact in float32
            labels[r] += y_block.sum(1)
        if wanted.hits:  # an ignored element counts as a negative that is called positive
            hits[r] += work.hits(x_block, y_block, y.is_floating_point()).sum(1)
        w_block, weighted = None, x_block
        if w is not None:
            w_block = work.wide("w", w[place])
            weighted = torch.mul(x_block, w_block, out=work.like("weighted", x_block))
        if z is None or wanted.slopes:
            # (y - 1/2) x, of which (y - c) x and BCE(x, y) follow.
            product = torch.sub(y_block, 0.5, out=work.like("product", y_block)).mul_(weighted)
            slope[r] += product.sum(1)
            size[r] += weighted.sum(1)
        if z is not None:
            product = work.drawn(y_block, z[place], strength[r], prior[r]).sub_(0.5).mul_(weighted)
        loss[r] += _cross_entropy(x_block, product, w_block, gone, work)
    slope += (0.5 - prior[:, 0].double()) * size
    if z is None:
        s = strength[:, 0]
        # In a row of strength 0 a slope that overflows float32 must not make the loss nan.
        loss = torch.where(s == 0, loss, loss + s * slope)
    return _Found(loss.to(work.dtype), slope, labels, hits, valid)


def _cross_entropy(
    x: Tensor, product: Tensor, w: Tensor | None, gone: Tensor | None, work: _Work
) -> Tensor:
    """Sums of w BCE(x, y) over rows, in float64, from w (y - 1/2) x, which is overwritten."""
    # BCE(x, y) = |x|/2 - (y - 1/2) x - log sigmoid(|x|): no cancellation, no overflow.
    size = torch.abs(x, out=work.like("size", x))
    if w is None:
        product.sub_(size, alpha=0.5)
    else:
        product.addcmul_(size, w, value=-0.5)
    loss = product.sum(1).double()
    size.sigmoid_()
    if gone is not None:
        torch.maximum(size, gone, out=size)
    # One logarithm for many elements: that of the product of the sigmoids.
    logs = _folded(size).log_() if w is None else size.log_().mul_(w)
    return -(loss + logs.sum(1))


class _Sweep(Function):
    """Gives the sums their gradients with respect to logits, strength and prior."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, strength: Tensor, prior: Tensor, data: _Data, found: _Found
    ) -> Tensor:
        ctx.save_for_backward(input, *data[1:4], strength, prior, found.slope)
        ctx.void = data.void
        return found.loss.view_as(found.loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *parts, strength, prior, slope = ctx.saved_tensors
        data, others = _Data(*parts, ctx.void), (None, None)  # type: ignore[call-arg]
        if torch.is_grad_enabled() or not _has_values(grad):
            # To be differentiated again, or for many gradients at once.
            return (*_by_formula(grad, data, strength, prior), None, None)
        if ctx.needs_input_grad[1] and not ctx.needs_input_grad[2] and data.drawn is None:
            others = ((grad * slope)[:, None], None)
        elif any(ctx.needs_input_grad[1:3]):
            others = _by_formula(grad, data, strength, prior)[1:]  # type: ignore[assignment]
        return _gradient(grad[:, None], data, strength, prior), *others, None, None


def _has_values(value: Tensor) -> bool:
    try:
        value.data_ptr()
    except RuntimeError:  # many gradients in one tensor: a wrapper of vmap
        return False
    return True


def _gradient(grad: Tensor, data: _Data, strength: Tensor, prior: Tensor) -> Tensor:
    """grad weight (sigmoid(x) - q)."""
    x, y, z, w, void = data
    result, work = torch.empty_like(x), _Work(x)
    for place in work.blocks:
        r = place[0]
        x_block, y_block, g = x[place], work.wide("y", y[place]), result[place]
        if g.dtype != work.dtype:
            x_block = g = work.wide("x", x_block)
        torch.sigmoid(x_block, out=g)
        c, s = prior[r], strength[r]
        if z is None:
            g.mul_(grad[r]).addcmul_(y_block, (s - 1) * grad[r]).sub_(s * c * grad[r])
        else:
            g.sub_(work.drawn(y_block, z[place], s, c)).mul_(grad[r])
        if w is not None:
            g.mul_(work.wide("w", w[place]))
        if void is not None:
            g.mul_(torch.ne(y_block, void, out=work.like("other", y_block)))
        if g.dtype != result.dtype:
            result[place] = g
    return result


def _by_formula(
    grad: Tensor, data: _Data, strength: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by torch's own operations, which can be differentiated again."""
    x, y = data.input.to(strength.dtype), data.target.to(strength.dtype)
    grad, share = grad[..., None], torch.ones_like(prior) if data.weight is None else data.weight
    if data.void is not None:
        share = share * (y != data.void)
        y = torch.where(y == data.void, 0.5, y)
    drawn = share if data.drawn is None else share * data.drawn
    towards = (y - prior) * drawn
    for_input = (grad * (share * (torch.sigmoid(x) - y) + strength * towards)).to(data.input.dtype)
    for_strength = grad * (towards * x).sum(-1, keepdim=True)
    for_prior = -grad * strength * (drawn * x).sum(-1, keepdim=True)
    return for_input, for_strength, for_prior


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

    def without(self, void: float, x: Tensor, y: Tensor, wanted: Wanted) -> list[Tensor]:
        """Where the label is void, as 1 and 0, and the logits and labels with 0 there."""
        # Not bools, which would take many times as long. The loss alone needs no other labels.
        gone = torch.eq(y, void, out=self.like("gone", y))
        x = torch.addcmul(x, x, gone, value=-1, out=self.like("x", x))
        if wanted.hits or wanted.labels is not None:
            y = torch.addcmul(y, y, gone, value=-1, out=self.like("y", y))
        return [gone, x, y]

    def hits(self, x: Tensor, y: Tensor, soft: bool) -> Tensor:
        high = torch.ge(y, 0.5, out=self.like("high", y)) if soft else y
        return torch.ge(x, 0, out=self.like("size", x)).eq_(high)

    def drawn(self, y: Tensor, z: Tensor, s: Tensor, c: Tensor) -> Tensor:
        """y + s (c - y) where drawn, y elsewhere."""
        share = self.like("z", z).copy_(z).mul_(s)
        return torch.lerp(y, c, share, out=share)


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
