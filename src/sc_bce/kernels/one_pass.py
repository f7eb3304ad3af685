"""Loss and gradient in one pass, on accelerators and in half precision.

torch's BCE launches eleven kernels on an accelerator, and keeps q in float32 until backward. Here
the loss is softplus(x) - q x and the gradient sigma(x) - q, both while q is at hand: backward
scales what the forward kept, which has the dtype of the logits.

In float32 the loss is within max(|x|, 1) 2^-22 of the exact one per element, the gradient within
2^-22. Torch's form, (1 - q) x + softplus(-x), has a small relative error for confident right
answers too, and takes two launches more. An infinite logit gives inf or nan, not always torch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .._torch import forward_mode, functional_transform

__all__ = ["applies", "reduced_loss"]

_LINEAR = 40.0  # from here on softplus(x) is x in float64 as well; torch's 20 is 2e-9 off


def applies(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether this is eager code for which it pays, and only the first tensor needs a gradient."""
    if torch.compiler.is_compiling() or (x.is_cpu and x.dtype.itemsize >= 4):
        return False
    return (
        type(x) in (Tensor, nn.Parameter)
        and not (functional_transform() or forward_mode())
        and not any(value is not None and value.requires_grad for value in tensors)
    )


def reduced_loss(
    x: Tensor, q: Tensor, weight: Tensor | None, ignored: Tensor | None, mean: bool
) -> Tensor:
    """Sum or mean of weight BCE(x, q) over the elements that are not ignored, in float32."""
    count: float | Tensor = x.numel()
    if ignored is not None:
        # If all elements are ignored, 0 / 1; an empty batch stays torch's 0 / 0.
        count = (x.numel() - ignored.sum()).clamp(min=min(1, x.numel()))
    return _Loss.apply(x, q, weight, ignored, count if mean else None)  # type: ignore[no-any-return,no-untyped-call]


class _Loss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: Tensor,
        weight: Tensor | None,
        ignored: Tensor | None,
        count: float | Tensor | None,
    ) -> Tensor:
        wide = x.to(q.dtype)
        found = [F.softplus(wide, threshold=_LINEAR).addcmul_(wide, q, value=-1)]
        if ctx.needs_input_grad[0]:
            found.append(torch.sigmoid(wide).sub_(q))
        for value in found:
            if weight is not None:
                value.mul_(weight)
            if ignored is not None:  # last, since all before may be inf or nan there
                value.masked_fill_(ignored, 0.0)
        loss, kept = found[0], found[1].to(x.dtype) if len(found) > 1 else None
        ctx.save_for_backward(
            x, kept, weight, ignored, count if isinstance(count, Tensor) else None
        )
        ctx.count = count
        if count is None:
            return loss.sum()
        return loss.sum() / count if isinstance(count, Tensor) else loss.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, weight, ignored, count = ctx.saved_tensors
        count = ctx.count if count is None else count
        scale = grad if count is None else grad / count
        if torch.is_grad_enabled():  # to be differentiated again, by x as well
            if ignored is not None:
                x = x.masked_fill(ignored, 0.0)
                weight = None if weight is None else weight.masked_fill(ignored, 0.0)
            change = torch.sigmoid(x) - torch.sigmoid(x.detach())
            kept = kept + (change if weight is None else change * weight)
        return (kept * scale).to(x.dtype), None, None, None, None
