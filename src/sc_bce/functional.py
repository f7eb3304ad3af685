r"""The functional layer: the loss as pure functions, without state and without randomness.

The letters are those of Liu et al. 2023: :math:`\alpha` is the perturbation probability (not the
class balance of focal loss) and :math:`\beta` the perturbation strength.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _batch, _checks
from ._batch import Batch, Perturbation
from .kernels import cpu as _fused

__all__ = ["perturb_target", "sc_bce_with_logits"]


def perturb_target(
    target: Tensor,
    alpha: float | Tensor = 0.0,
    beta: float | Tensor | None = None,
    *,
    prior: float | Tensor = 0.5,
    ignore_index: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Smooth binary labels: the effective target of self-calibrating BCE, for use with any loss.

    .. math::
        q = y + \alpha\beta\,(c - y)

    with :math:`y` the target, :math:`\alpha` the probability that a label is perturbed,
    :math:`\beta` the strength of the perturbation :math:`p(y) = (1-\beta)\,y + \beta c`, and
    :math:`c` the prior that it moves towards. ``q`` is the mean of a random target that is
    :math:`p(y)` with probability :math:`\alpha` and :math:`y` otherwise. It stays inside [0, 1].

    Special cases: ``alpha=0`` leaves the target unchanged; ``alpha=1, beta=eps`` is label
    smoothing as Keras defines it for binary labels; a tensor ``alpha`` of zeros and ones is a
    draw. If ``prior`` is the base rate of the positives, the mean of ``q`` is the mean of ``y``.

    Args:
        target: labels in [0, 1], of dtype bool, integer (0 and 1 only) or floating point.
        alpha: perturbation probability in [0, 1]: a number, a 0-d tensor, an (N,) tensor (one
            value per sample, dimension 0), or a tensor with as many dimensions as ``target`` that
            broadcasts to it. Default: 0.
        beta: perturbation strength in [0, 1 / max(prior, 1 - prior)], in the same forms; the
            values of a tensor are not checked. None takes the largest: 2 at ``prior=0.5``, 1 for
            a prior of 0 or 1. Default: None.
        prior: what perturbed labels move towards: a number between 0 and 1, or a tensor that
            broadcasts to ``target`` from the last dimension, as ``pos_weight`` does: (C,) for
            (N, C), (C, 1, 1) for (N, C, H, W). Default: 1/2.
        ignore_index: target value that is left unchanged. Default: None.
        dtype: dtype of the result. Default: that of ``target``, or torch's default dtype for
            bool and integer targets, but at least float32.

    Shape:
        - target: :math:`(N, *)` or scalar.
        - Returns: the same.

    Raises:
        ValueError: a number is out of its range; ``alpha * beta > 1``, which would reverse the
            labels; a tensor does not broadcast; on the CPU, a tensor ``alpha`` has values outside
            [0, 1], or an integer label is neither 0 nor 1.
        TypeError: an argument has the wrong type; ``dtype`` is not floating point.

    Note:
        ``q`` is computed in at least float32. In bfloat16, 1 - 0.001 rounds to 1 while 0.001
        survives, so only the negatives would be smoothed. Labels are checked on the CPU,
        floating-point ones only in small tensors. If an integer label can't be read without
        waiting (on an accelerator, under compile or vmap), an illegal one gives nan.

        A prior other than 1/2 moves the decision threshold: a network that learned ``q`` predicts
        1/2 where P(y = 1) is (1/2 - s c) / (1 - s), with s = alpha * beta. To decide by
        P(y = 1) >= 1/2, test ``sigmoid(x) >= (1 - s) / 2 + s * c``.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (label perturbation).
        Szegedy et al., CVPR 2016, Section 7 (label smoothing).
        Pereyra et al., ICLR Workshop 2017, arXiv 1701.06548 (smoothing towards base rates).

    Example:
        >>> import torch
        >>> from sc_bce import perturb_target
        >>> perturb_target(torch.tensor([0.0, 1.0]), alpha=0.1, beta=2.0)
        tensor([0.1000, 0.9000])
        >>> perturb_target(torch.tensor([True, False]), alpha=torch.tensor([0.0, 0.2]))
        tensor([1.0000, 0.2000])
        >>> perturb_target(torch.tensor([0.0, 1.0]), alpha=0.1, beta=1.0, prior=0.02)
        tensor([0.0020, 0.9020])
    """
    beta = _batch.require_numbers(alpha, beta, prior)
    _batch.label(target)
    given = _batch.perturbation(alpha, beta, prior, target.size())
    ignore_index = _checks.ignore_index(ignore_index)
    if dtype is None:
        own = target.dtype if target.is_floating_point() else torch.get_default_dtype()
        dtype = torch.promote_types(own, torch.float32)
    _checks.floating_dtype("dtype", dtype)
    valid = None if ignore_index is None else _batch.valid_elements(target, ignore_index)
    legal = _batch.require_labels(target, valid, ignore_index)
    y = _batch.as_labels(target, torch.promote_types(dtype, torch.float32), valid, legal)
    q = given.towards_prior(y)
    return (q if valid is None else torch.where(valid, q, y)).to(dtype)


def sc_bce_with_logits(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.0,
    beta: float | Tensor | None = None,
    *,
    prior: float | Tensor = 0.5,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute binary cross entropy with label smoothing or perturbation (SC-BCE) from logits.

    .. math::
        \ell(x, y) = \mathrm{BCE}(x, q), \qquad q = y + s\,(c - y), \qquad s = \alpha\beta

    with :math:`x` the logit, :math:`y` the target, :math:`c` the prior, :math:`\alpha` the
    probability that a label is perturbed and :math:`\beta` the strength of the perturbation.
    BCE is affine in its target, so this is the expectation of BCE over perturbed labels. Its
    gradient is :math:`\sigma(x) - q`; a perfect fit predicts :math:`s c` for a negative and
    :math:`1 - s (1 - c)` for a positive. Equal forms are
    :math:`(1-s)\,\mathrm{BCE}(x, y) + s\,\mathrm{BCE}(x, c)`; without ``pos_weight``,
    :math:`\mathrm{BCE}(x, y) + s\,(y - c)\,x`, a linear penalty on the slope; and at
    :math:`c = \tfrac12`, :math:`(1-g)\,\mathrm{BCE}(x, y) + g\,\mathrm{BCE}(x, 1-y)` with the
    flip rate :math:`g = s/2`.

    Special cases are values of the arguments: ``alpha=0`` is
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`, bit for bit; ``alpha=1,
    beta=eps`` is label smoothing; a tensor ``alpha`` of drawn zeros and ones is DisturbLabel with
    ``beta=2`` and moderation with ``beta=1``.

    Args:
        input: logits, floating point.
        target: labels in [0, 1] of the same size: bool, integer (0 and 1 only) or floating point.
        alpha: perturbation probability in [0, 1]: a number, a 0-d tensor, an (N,) tensor (one
            value per sample, dimension 0), or a tensor with as many dimensions as ``input`` that
            broadcasts to it. Default: 0.
        beta: perturbation strength in [0, 1 / max(prior, 1 - prior)], in the same forms; the
            values of a tensor are not checked. None takes the largest: 2 at ``prior=0.5``.
            Default: None.
        prior: what perturbed labels move towards: 1/2 in the paper, or the base rate of the
            positives if they are rare. A number between 0 and 1, or a tensor that broadcasts
            to ``input`` from the last dimension, as ``pos_weight`` does: (C,) for (N, C),
            (C, 1, 1) for (N, C, H, W). Default: 1/2.
        weight: as in torch, rescales the loss of each element; broadcasts. Default: None.
        pos_weight: as in torch, the weight w of positive examples. It shifts the minimum from
            logit ``q`` to logit ``q`` + log w. At w s c / (1 - s c) >= 1 every negative is
            predicted positive. Default: None.
        ignore_index: elements whose target has this value give exactly zero loss and gradient,
            whatever their logit, and are not counted in the mean. Default: None.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.

    Shape:
        - input: :math:`(N, *)` or scalar.
        - target: the same.
        - Returns: scalar, or the shape of ``input`` for ``reduction="none"``.

    Raises:
        ValueError: a number is out of its range; ``alpha * beta > 1``; ``reduction`` is unknown;
            sizes differ; a tensor does not broadcast; on the CPU, a tensor ``alpha`` has values
            outside [0, 1], or an integer label is neither 0 nor 1. At ``alpha=0`` torch raises
            its own errors.
        TypeError: an argument has the wrong type.

    Note:
        Half and bfloat16 are computed in float32, except at a number ``alpha=0``, which is
        torch's own call; the result has torch's dtype. The loss is differentiable in input,
        target, alpha, beta and prior, and works under compile, export, vmap, forward-mode AD,
        double backward and autocast. Integer labels are checked on the CPU. If they can't be read
        without waiting (on an accelerator, under compile or vmap), an illegal one gives nan.
        Floating-point labels are checked if that costs no extra pass: in small batches and in the
        fused sweep. If every element is ignored, the mean is 0; the mean of an empty batch is
        nan, as in torch.

        A prior other than 1/2 moves the decision threshold: P(y = 1) >= 1/2 becomes
        ``sigmoid(x) >= (1 - s) / 2 + s * c``. A repair after training brings it back to 1/2.

        Large contiguous batches on a CPU, reduced and without ``pos_weight``, take one fused
        sweep: the same gradient, and a loss within 1.2e-7 per element in float32. Backward reads
        the target mask that you passed; do not modify it in place before calling ``backward()``.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (SC-BCE).

    Example:
        >>> import torch
        >>> from sc_bce import sc_bce_with_logits
        >>> input = torch.tensor([2.0, -1.0, 0.5])
        >>> target = torch.tensor([1.0, 0.0, 1.0])
        >>> sc_bce_with_logits(input, target)
        tensor(0.3048)
        >>> sc_bce_with_logits(input, target, alpha=0.1, beta=2.0)
        tensor(0.4214)
        >>> sc_bce_with_logits(input, target, alpha=torch.tensor([0.0, 0.1, 0.2]))
        tensor(0.3714)
        >>> sc_bce_with_logits(input, target, alpha=0.1, beta=1.0, prior=0.02)
        tensor(0.3871)
    """
    beta = _batch.require_numbers(alpha, beta, prior)
    ignore_index = _checks.ignore_index(ignore_index)
    if ignore_index is None and not isinstance(alpha, Tensor) and alpha == 0:
        return bce_with_logits(input, target, weight, pos_weight, reduction)
    _checks.reduction(reduction)
    batch = _batch.prepare(input, target, ignore_index)
    given = _batch.perturbation(alpha, beta, prior, input.size())
    return perturbed_loss(batch, given, weight, pos_weight, reduction)


def bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Torch's own call, with its errors and its bits, for masks of any dtype."""
    if isinstance(target, Tensor) and not target.is_floating_point():
        _batch.logits(input)
        legal = _batch.require_labels(target, None, None)
        target = _batch.as_labels(target, input.dtype, None, legal)
    return F.binary_cross_entropy_with_logits(
        input, target, weight, pos_weight=pos_weight, reduction=reduction
    )


def perturbed_loss(
    batch: Batch,
    given: Perturbation,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The loss of a prepared batch."""
    if pos_weight is None and reduction != "none":
        found = _fused.sums(batch, given, weight=weight)
        if found is not None:
            return _reduced(found, batch, reduction)
    batch = batch.with_valid()
    input, dtype = batch.input, batch.dtype()
    if isinstance(given.alpha, Tensor) or given.alpha != 0:
        wide = torch.promote_types(dtype, torch.float32)
        q = given.towards_prior(batch.labels(wide))
        input = input.to(torch.promote_types(input.dtype, torch.float32))
    else:
        q = batch.labels(dtype)
    if batch.valid is None:
        loss = F.binary_cross_entropy_with_logits(
            input, q, weight, pos_weight=pos_weight, reduction=reduction
        )
    else:
        loss = _masked(input, q, weight, pos_weight, batch.valid, reduction)
    return _cast(loss, batch)


class Observed(NamedTuple):
    """What moves the levels and the observed prior; None if it was not requested."""

    slopes: Tensor | None = None  # mean (y - c) x of each sample, (N,)
    labels: Tensor | None = None  # as returned by `label_counts`
    hits: Tensor | None = None  # share of each sample's elements that are right at 1/2, (N,)


class Wanted(NamedTuple):
    """What to observe; `labels` is the shape of the counts, which broadcasts to the batch."""

    slopes: bool = False
    labels: tuple[int, ...] | None = None
    hits: bool = False


def perturbed_loss_and_observed(
    batch: Batch,
    given: Perturbation,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    wanted: Wanted,
) -> tuple[Tensor, Observed]:
    """The loss, and what one pass over the batch sees beside it, whatever alpha was drawn."""
    found = None
    counted = wanted.labels is not None
    if pos_weight is None and reduction != "none":
        by_sample = wanted.slopes or wanted.hits
        found = _fused.sums(batch, given, by_sample, counted, wanted.hits, weight)
    if found is None:
        batch = batch.with_valid()
        loss = perturbed_loss(batch, given, weight, pos_weight, reduction)
        return loss, observed(batch, given.prior, weight, wanted)
    shape, size = found.shape, batch.input.shape
    seen = Observed()
    if wanted.slopes:
        seen = seen._replace(slopes=_row_means(found.slope, found.valid, size))
    if found.hits is not None:
        seen = seen._replace(hits=_row_means(found.hits, found.valid, size))
    if wanted.labels is not None and found.labels is not None:
        labels = _batch.row_counts(found.labels, found.valid, shape, size, wanted.labels)
        seen = seen._replace(labels=labels)
    return _reduced(found, batch, reduction), seen


def observed(
    batch: Batch, prior: float | Tensor, weight: Tensor | None, wanted: Wanted
) -> Observed:
    """What `wanted` names, without computing the loss."""
    batch = batch.with_valid()
    return Observed(
        mean_slopes(batch, prior, weight) if wanted.slopes else None,
        None if wanted.labels is None else _batch.label_counts(batch, wanted.labels),
        _batch.sample_accuracies(batch) if wanted.hits else None,
    )


def _row_means(total: Tensor, valid: Tensor | None, size: torch.Size) -> Tensor:
    """Sums over rows as means over samples; nan for a sample without a valid element."""
    total = total.view(size[0], -1).sum(1)
    if valid is None:
        return (total * (size[0] / size.numel())).float()
    return (total / valid.view(size[0], -1).sum(1)).float()


def _reduced(found: _fused.Sums, batch: Batch, reduction: str) -> Tensor:
    total = found.loss
    if reduction == "mean":
        # If all elements are void, 0 / 1.
        count = batch.input.numel() if found.valid is None else found.valid.sum().clamp(min=1)
        total = (total / count).to(total.dtype)
    return _cast(total, batch)


def mean_slopes(batch: Batch, prior: float | Tensor, weight: Tensor | None) -> Tensor:
    """Mean slope (y - c) x of each sample, (N,) float32; no gradient.

    Weighted as the loss is (torch's ``weight``, divided by the number of valid elements), so that
    beta times it is the derivative of the sample's mean loss with respect to its alpha. nan for a
    sample without a valid element.
    """
    # Low precision is accumulated in at least float32, like the labels.
    y = batch.labels(torch.promote_types(batch.input.dtype, torch.float32)).detach()
    slope = (y - prior) * batch.input.detach()
    if weight is not None:
        slope = slope * weight
    return _batch.sample_means(slope, batch.valid)


def _cast(loss: Tensor, batch: Batch) -> Tensor:
    """Return the loss in torch's dtype; under autocast torch leaves BCE in float32."""
    dtype = batch.dtype()
    if loss.dtype == dtype:
        return loss
    device = batch.input.device.type
    # Some devices have no autocast and raise if queried; compiled code runs on one that has it.
    has = device != "meta" and (
        torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    )
    if has and torch.is_autocast_enabled(device):
        return loss
    return loss.to(dtype)


def _masked(
    input: Tensor,
    q: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    valid: Tensor,
    reduction: str,
) -> Tensor:
    # The logit is replaced before the loss, so that an ignored inf or nan reaches no gradient.
    # The loss is replaced after it, so that an ignored element adds exactly zero.
    loss = F.binary_cross_entropy_with_logits(
        torch.where(valid, input, 0.0), q, weight, pos_weight=pos_weight, reduction="none"
    )
    loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.promote_types(loss.dtype, torch.float32))
    if reduction == "mean":
        # If all elements are ignored, 0 / 1; an empty batch stays torch's 0 / 0.
        total = total / valid.sum().clamp(min=min(1, valid.numel()))
    return total
