"""The common case on a CPU in one sweep: the loss of each sample and its margin, block by block.

Per sample two sums over the elements are enough for every level,

    BCE(x, y) summed and (2y - 1) x summed, since BCE(x, q) = BCE(x, y) + (αβ/2) (2y - 1) x,

so nothing of full size is written but the gradient, and backward keeps the logits and the target
as they came, a mask as its one byte. `functional.py` holds the plain twin, for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

__all__ = ["applies", "plain_values", "sample_sums"]

_BLOCK = 1 << 20  # elements worked on at a time: few enough for a cache, many enough for threads
_LEAST = 1 << 18  # elements from which on this is quicker than the plain path
_EACH = 1 << 10  # elements of a sample, likewise
_RARE = (torch.uint16, torch.uint32, torch.uint64)  # torch can't reduce them
_HALVINGS = 5  # 32 to 64 factors in [1/2, 1] can't underflow in float32


def applies(input: Tensor, target: Tensor, samples: int = 1) -> bool:
    """Whether the sums serve this batch: enough elements for each of `samples`, side by side.

    Under compile, export, vmap, functorch's gradients and forward-mode AD they don't.
    """
    wide = torch.promote_types(input.dtype, torch.float32)
    return (
        input.numel() >= max(_LEAST, _EACH * samples)
        and plain_values(input)
        and plain_values(target)
        and input.is_contiguous()
        and target.is_contiguous()
        and not target.requires_grad
        and target.dtype not in _RARE
        and (not target.is_floating_point() or torch.promote_types(target.dtype, wide) == wide)
        and not (_is_dual(input) or _is_dual(target))
    )


def plain_values(value: Tensor) -> bool:
    """Whether values of a CPU lie there to be read and written, outside all transforms."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, nn.Parameter)
        and not value.is_inference()  # which autograd could not save
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


def sample_sums(
    input: Tensor, target: Tensor, samples: int, drawn: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of BCE(x, y) and of (2y - 1) x over each of `samples` equal parts, (samples,) each.

    The second takes only what is `drawn`, if that is given: one bool for each element. In at
    least float32, differentiable in `input` as often as one likes.
    """
    sums: tuple[Tensor, Tensor] = _SampleSums.apply(input, target, drawn, samples)  # type: ignore[no-untyped-call]
    return sums


def _is_dual(value: Tensor) -> bool:
    tangent = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def _has_values(value: Tensor) -> bool:
    try:
        value.data_ptr()
    except RuntimeError:  # many gradients in one tensor: a wrapper of vmap
        return False
    return True


class _SampleSums(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, drawn: Tensor | None, samples: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input, target, drawn)
        ctx.samples = samples
        x, y, z = _rows(samples, input, target, drawn)
        work = _Work(x, 4)
        loss, margin = (work.sums(samples) for _ in range(2))
        for rows, columns in work.blocks:
            x_block = work.wide(x[rows, columns], 0)
            a, m = work.buffer(x_block, 1), work.buffer(x_block, 2)
            # Half the margin, (y - 1/2) x.
            torch.sub(work.wide(y[rows, columns], 3), 0.5, out=m)
            m.mul_(x_block)
            if z is None:
                margin[rows] += 2 * m.sum(1)
            else:
                margin[rows] += 2 * torch.mul(m, work.wide(z[rows, columns], 3), out=a).sum(1)
            # BCE(x, y) = (|x| - margin)/2 - log sigmoid(|x|): no cancellation, no overflow.
            torch.abs(x_block, out=a)
            loss[rows] -= torch.sub(m, a, alpha=0.5, out=m).sum(1)
            # One logarithm for many elements: that of the product of the sigmoids.
            loss[rows] -= _folded(a.sigmoid_()).log_().sum(1)
        return loss, margin

    @staticmethod
    def backward(ctx: Any, for_loss: Tensor, for_margin: Tensor) -> tuple[Tensor, None, None, None]:
        input, target, drawn = ctx.saved_tensors
        x, y, z = _rows(ctx.samples, input, target, drawn)
        for_loss, for_margin = for_loss[:, None], for_margin[:, None]
        if torch.is_grad_enabled() or not (_has_values(for_loss) and _has_values(for_margin)):
            # To be differentiated again, or for many gradients at once.
            y = y.to(torch.promote_types(x.dtype, torch.float32))
            x = x.to(y.dtype)
            sign = 2 * y - 1 if z is None else (2 * y - 1) * z
            again = for_loss * (torch.sigmoid(x) - y) + for_margin * sign
            return again.to(input.dtype).view_as(input), None, None, None
        grad = torch.empty_like(input, memory_format=torch.contiguous_format)
        out = grad.view(ctx.samples, -1)
        work = _Work(x, 3)
        for rows, columns in work.blocks:
            x_block, g = x[rows, columns], out[rows, columns]
            if g.dtype != work.dtype:
                x_block = g = work.wide(x_block, 0)
            torch.sigmoid(x_block, out=g)
            g.mul_(for_loss[rows])
            y_block = work.wide(y[rows, columns], 1)
            if z is None:
                g.addcmul_(y_block, 2 * for_margin[rows] - for_loss[rows]).sub_(for_margin[rows])
            else:
                g.addcmul_(y_block, -for_loss[rows])
                m = torch.sub(y_block, 0.5, out=work.buffer(x_block, 2))
                m.mul_(work.wide(z[rows, columns], 1))
                g.addcmul_(m, 2 * for_margin[rows])
            if g.dtype != grad.dtype:
                out[rows, columns] = g
        return grad, None, None, None


def _rows(samples: int, *values: Tensor | None) -> list[Any]:
    """Each as a matrix; bools as bytes, which become floats many times faster."""
    rows = [None if value is None else value.view(samples, -1) for value in values]
    return [
        row.view(torch.uint8) if row is not None and row.dtype == torch.bool else row
        for row in rows
    ]


class _Work:
    """The blocks of a matrix, samples by elements, and buffers of one block each."""

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

    def sums(self, samples: int) -> Tensor:
        return torch.zeros(samples, dtype=self.dtype, device="cpu")

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
    for _ in range(_HALVINGS):
        if width < 2:
            break
        if width % 2:
            factors[:, :1] *= factors[:, width - 1 : width]
        width //= 2
        factors[:, :width] *= factors[:, width : 2 * width]
    return factors[:, :width]
