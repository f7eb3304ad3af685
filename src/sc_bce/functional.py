r"""The formula: q = y + s (c - y), its binary cross entropy, and what one batch shows beside it.

The letters are those of Liu et al. 2023: :math:`\alpha` is the perturbation probability (not the
class balance of focal loss) and :math:`\beta` the perturbation strength; s is their product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _errors, _inputs
from ._errors import refuse
from ._inputs import NOTHING, Batch, Perturbation, Seen, Wanted
from ._torch import as_bytes, kept, readable
from .kernels import cpu, one_pass

__all__ = ["perturb_target", "sc_bce_with_logits"]

BLOCK = 1 << 18  # elements for which torch's calls find most of what they make in a CPU's caches


def perturb_target(
    target: Tensor,
    alpha: float | Tensor = 0.0,
    beta: float | Tensor | None = None,
    *,
    prior: float | Tensor = 0.5,
    ignore_index: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Smooth binary labels: the effective target of self-calibrating BCE, for use with any loss.

    .. math::
        q = y + \alpha\beta\,(c - y)

    with :math:`y` the target, :math:`\alpha` the probability that a label is perturbed,
    :math:`\beta` the strength of the perturbation :math:`p(y) = (1-\beta)\,y + \beta c`, and
    :math:`c` the prior that it moves towards. ``q`` is the mean of a random target that is
    :math:`p(y)` with probability :math:`\alpha` and :math:`y` otherwise. It stays inside [0, 1].

    Special cases: ``alpha=1, beta=eps`` is label smoothing as Keras defines it for binary labels;
    a tensor ``alpha`` of zeros and ones is a draw. If ``prior`` is the base rate of the positives,
    the mean of ``q`` is that of ``y``.

    Args:
        target: labels in [0, 1], of dtype bool, integer (0 and 1 only) or floating point.
        alpha: as in :func:`sc_bce_with_logits`, like ``beta`` and ``prior``. Default: 0.
        beta: perturbation strength. Default: None.
        prior: what perturbed labels move towards. Default: 1/2.
        ignore_index: target value that is left unchanged, or ``math.nan``. Default: None.
        dtype: dtype of the result. Default: that of ``target``, or torch's default dtype for
            bool and integer targets, but at least float32.

    Shape:
        :math:`(N, *)` or scalar, and the result the same.

    Raises:
        ValueError, TypeError: as :func:`sc_bce_with_logits`.

    References:
        Szegedy et al., CVPR 2016, Section 7 (label smoothing).
        Pereyra et al., ICLR Workshop 2017, arXiv 1701.06548 (smoothing towards base rates).

    Example:
        >>> import torch
        >>> from sc_bce import perturb_target
        >>> perturb_target(torch.tensor([0.0, 1.0]), alpha=0.1, beta=2.0)
        tensor([0.1000, 0.9000])
        >>> perturb_target(torch.tensor([0.0, 1.0]), alpha=0.1, beta=1.0, prior=0.02)
        tensor([0.0020, 0.9020])
    """
    beta = _inputs.ranges(alpha, beta, prior)
    _inputs.label(target)
    given = _inputs.perturbation(alpha, beta, prior, target.size())
    if dtype is None:
        own = target.dtype if target.is_floating_point() else torch.get_default_dtype()
        dtype = torch.promote_types(own, torch.float32)
    elif not getattr(dtype, "is_floating_point", False):  # torch would cut the result to 0 and 1
        refuse("dtype", "be a floating-point torch.dtype", dtype, error=TypeError)
    void = _inputs.held(target, _errors.ignored(ignore_index))
    legal = _inputs.check_labels(target, void, readable(target))
    # In bfloat16, 1 - 0.001 would round to 1.
    y = _inputs.as_labels(target, torch.promote_types(dtype, torch.float32))
    valid, q = _inputs.valid_elements(target, void), towards_prior(y, given)
    q = _inputs.with_nan(q, target, void, legal)
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
    ignore_index: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute binary cross entropy with label smoothing or perturbation (SC-BCE) from logits.

    .. math::
        \ell(x, y) = \mathrm{BCE}(x, q), \qquad q = y + s\,(c - y), \qquad s = \alpha\beta

    with :math:`x` the logit and the other letters as in :func:`perturb_target`. BCE is affine in
    its target, so this is the expectation of BCE over perturbed labels. Its gradient is
    :math:`\sigma(x) - q`; a perfect fit predicts :math:`s c` for a negative and
    :math:`1 - s (1 - c)` for a positive. Equal forms are
    :math:`(1-s)\,\mathrm{BCE}(x, y) + s\,\mathrm{BCE}(x, c)`; without ``pos_weight``,
    :math:`\mathrm{BCE}(x, y) + s\,(y - c)\,x`, a linear penalty on the slope; and at
    :math:`c = \tfrac12`, :math:`(1-g)\,\mathrm{BCE}(x, y) + g\,\mathrm{BCE}(x, 1-y)`, g = s/2.

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
            values of a tensor are not checked. None takes the largest. Default: None.
        prior: what perturbed labels move towards: 1/2 in the paper, or the base rate of the
            positives if they are rare. A number between 0 and 1, or a tensor that broadcasts
            to ``input`` from the last dimension, as ``pos_weight`` does: (C,) for (N, C),
            (C, 1, 1) for (N, C, H, W). Default: 1/2.
        weight: as in torch, rescales the loss of each element; broadcasts. Default: None.
        pos_weight: as in torch, the weight w of positive examples. It shifts the minimum from
            logit ``q`` to logit ``q`` + log w. At w s c / (1 - s c) >= 1 every negative is
            predicted positive. Default: None.
        ignore_index: elements whose target has this value are left out: they give exactly zero
            loss and gradient, whatever their logit, and do not count in the mean. An int, or
            ``math.nan`` for missing labels. Default: None.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.

    Shape:
        - input: :math:`(N, *)` or scalar.
        - target: the same.
        - Returns: scalar, or the shape of ``input`` for ``reduction="none"``.

    Raises:
        ValueError: a number is out of its range; ``alpha * beta > 1``; ``reduction`` is unknown;
            sizes differ; a tensor does not broadcast, or would lie along the wrong dimension; on
            the CPU, a tensor ``alpha`` or a label is outside [0, 1], or an integer label is
            neither 0 nor 1. At ``alpha=0`` torch raises its own errors.
        TypeError: an argument has the wrong type.

    Note:
        Half and bfloat16 are computed in float32, except at a number ``alpha=0``, which is
        torch's own call; the result has torch's dtype. The loss is differentiable in input,
        target, alpha, beta and prior, and works under compile, export, vmap, forward-mode AD,
        double backward and autocast. On the CPU every label is looked at. Where that would wait
        (on an accelerator, under compile or vmap), an illegal integer gives nan. If every element
        is ignored, the mean is 0; that of an empty batch is nan. As in torch, the gradient is 0 at
        logit 40 and target 1, and an infinite logit that is right has a loss of nan.

        A prior other than 1/2 moves the decision threshold: to decide by P(y = 1) >= 1/2, test
        ``sigmoid(x) >= (1 - s) / 2 + s * c``. A repair after training brings it back to 1/2.

        Large contiguous batches on a CPU, reduced and without ``pos_weight``, take one sweep: the
        same gradient, and a loss within 1.2e-7 per element in float32. Backward reads the target
        mask that you passed; do not modify it in place before calling ``backward()``.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (SC-BCE).

    Example:
        >>> import torch
        >>> from sc_bce import sc_bce_with_logits
        >>> input, target = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])
        >>> sc_bce_with_logits(input, target)
        tensor(0.3048)
        >>> sc_bce_with_logits(input, target, alpha=0.1, beta=2.0)
        tensor(0.4214)
        >>> sc_bce_with_logits(input, target, alpha=0.1, beta=1.0, prior=0.02)
        tensor(0.3871)
    """
    beta = _inputs.ranges(alpha, beta, prior)
    ignore_index = _errors.ignored(ignore_index)
    if ignore_index is None and not isinstance(alpha, Tensor) and alpha == 0:
        return bce_with_logits(input, target, weight, pos_weight, reduction)
    _errors.choice("reduction", reduction, ("none", "mean", "sum"))
    batch = _inputs.batch(input, target, ignore_index)
    given = _inputs.perturbation(alpha, beta, prior, input.size())
    return perturbed_loss(batch, given, weight, pos_weight, reduction)[0]


def bce_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    """Torch's own call, with its errors and its bits, for masks of any dtype."""
    if isinstance(target, Tensor) and not target.is_complex():
        for name, value in (("input", input), ("target", target)):
            if isinstance(value, Tensor):
                _inputs.dense(name, value)
        legal = _inputs.check_labels(target, None, readable(target))
        if not target.is_floating_point():
            _inputs.logits(input)
            target = _inputs.with_nan(_inputs.as_labels(target, input.dtype), target, None, legal)
        _inputs.along_labels(target.size(), weight=weight, pos_weight=pos_weight)
    return F.binary_cross_entropy_with_logits(
        input, target, weight, pos_weight=pos_weight, reduction=reduction
    )


def perturbed_loss(
    batch: Batch,
    given: Perturbation,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    wanted: Wanted = NOTHING,
) -> tuple[Tensor, Seen]:
    """The loss of a batch, and what it shows beside it, whatever alpha was drawn."""
    _inputs.along_labels(batch.input.size(), weight=weight, pos_weight=pos_weight)
    loss, seen = cpu.sweep(batch, given, weight, pos_weight, reduction, wanted) or (
        _by_torch(batch, given, weight, pos_weight, reduction),
        look(batch, given.prior, weight, wanted),
    )
    return _in_torchs_dtype(loss, batch), seen


def towards_prior(y: Tensor, given: Perturbation) -> Tensor:
    """q = y + s (c - y)"""
    c = given.prior.to(y.dtype) if isinstance(given.prior, Tensor) else given.prior
    compiled, drawn = torch.compiler.is_compiling(), given.draw()
    if drawn is not None and (compiled or not y.is_cpu):  # on a CPU lerp is several times faster
        return torch.where(drawn, c, y) if isinstance(c, Tensor) else y.masked_fill(drawn, c)
    s = given.strength(y.dtype)
    # In this form, not as (1 - s) y + s c, both labels round by the same amount.
    if compiled:
        return y + s * (c - y)  # lerp branches at s >= 1/2, and inductor would emit both
    end = c if isinstance(c, Tensor) else y.new_full((), c)
    return torch.lerp(y, end, s)  # one pass over memory


def _by_torch(
    batch: Batch,
    given: Perturbation,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    dtype, x, bce = batch.dtype(), batch.input, F.binary_cross_entropy_with_logits
    if given.nothing() and batch.void is None:  # torch's own call, in the dtypes that were passed
        return bce(x, batch.labels(dtype), weight, pos_weight=pos_weight, reduction=reduction)
    y = _inputs.as_labels(batch.target, torch.promote_types(dtype, torch.float32))
    if batch.void != batch.void:
        y = y.nan_to_num(0.0, torch.inf, -torch.inf)  # nan times a weight of 0 is nan
    q = y if given.nothing() else towards_prior(y, given)
    whole, tensors = reduction != "none", (batch.target, weight, *given.tensors())
    if whole and pos_weight is None and one_pass.applies(x, *tensors):
        # An ignored label may become nan here: what comes of it is replaced.
        q = _inputs.with_nan(q, batch.target, None, batch.legal)
        return one_pass.reduced_loss(x, q, weight, batch.ignored(), reduction == "mean")
    x, valid = x.to(torch.promote_types(x.dtype, torch.float32)), batch.valid()
    q = _inputs.with_nan(q, batch.target, batch.void, batch.legal)  # whether drawn or not
    if valid is None and (not whole or not torch.compiler.is_compiling()):
        return bce(x, q, weight, pos_weight=pos_weight, reduction=reduction)
    if valid is not None and whole and readable(x):
        # The mask as torch's weight: a fifth of the time. Ignored logits must then be finite.
        keep = as_bytes(valid).to(x.dtype)
        total = _summed(x, q, keep if weight is None else keep * weight, pos_weight)
        if bool(total.isfinite()):
            return total if reduction == "sum" else total / _number(keep)
    # The logit is replaced before the loss, so that an ignored inf or nan reaches no gradient.
    # The loss is replaced after it, so that an ignored element adds exactly zero.
    x = x if valid is None else torch.where(valid, x, 0.0)
    loss = bce(x, q, weight, pos_weight=pos_weight, reduction="none")
    loss = loss if valid is None else torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    # By sample first: inductor then sums the loss, the hits and the labels in one loop.
    total = _by_sample(loss).sum(1).sum() if torch.compiler.is_compiling() else loss.sum()
    count = loss.numel() if valid is None else _number(valid)
    return total if reduction == "sum" else total / count


def _summed(x: Tensor, q: Tensor, weight: Tensor, pos_weight: Tensor | None) -> Tensor:
    """The sum, some samples at a time, so that what torch makes stays in a CPU's caches."""
    bce, number = F.binary_cross_entropy_with_logits, x.numel() // BLOCK
    whole = pos_weight is not None and pos_weight.dim() >= x.dim()
    if number < 2 or whole or weight.shape != x.shape:
        return bce(x, q, weight, pos_weight=pos_weight, reduction="sum")
    parts = zip(x.chunk(number), q.chunk(number), weight.chunk(number), strict=True)
    return torch.stack([bce(*part, None, None, "sum", pos_weight) for part in parts]).sum()


def _number(valid: Tensor) -> Tensor:
    """Number of valid elements, 1 if there are none; an empty batch stays torch's 0 / 0."""
    return valid.sum().clamp(min=min(1, valid.numel()))


def _in_torchs_dtype(loss: Tensor, batch: Batch) -> Tensor:
    """The loss in torch's dtype; under autocast torch leaves BCE in float32."""
    dtype = batch.dtype()
    if loss.dtype == dtype:
        return loss
    device = batch.input.device.type
    # Some devices have no autocast and raise if queried; compiled code runs on one that has it.
    has = device != "meta" and (
        torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    )
    return loss if has and torch.is_autocast_enabled(device) else loss.to(dtype)


# -- what one batch shows


def look(batch: Batch, prior: float | Tensor, weight: Tensor | None, wanted: Wanted) -> Seen:
    """What is wanted of a batch, without its loss."""
    if wanted == NOTHING:
        return Seen()
    with torch.no_grad():
        valid = batch.valid()
        return Seen(
            _slopes(batch, prior, weight, valid) if wanted.slopes else None,
            _hits(batch, valid) if wanted.hits else None,
            None if wanted.labels is None else _counts(batch, valid, wanted.labels, wanted.share),
        )


def _slopes(
    batch: Batch, prior: float | Tensor, weight: Tensor | None, valid: Tensor | None
) -> Tensor:
    """Mean of (y - c) x over each sample, weighted as the loss is.

    beta times it is the derivative of the sample's mean loss with respect to its alpha.
    """
    # Low precision is accumulated in at least float32, like the labels.
    y = batch.labels(torch.promote_types(batch.input.dtype, torch.float32))
    slope = (y - prior) * batch.input
    return _sample_means(slope if weight is None else slope * weight, valid)


def _hits(batch: Batch, valid: Tensor | None) -> Tensor:
    """Share of each sample's elements that are right at 1/2."""
    x, y = batch.input, batch.target
    if not batch.plain:
        return _sample_means((x >= 0) == (y if y.dtype == torch.bool else y >= 0.5), valid)
    # As numbers: bools take many times as long.
    if y.is_floating_point():
        y = torch.ge(y, 0.5, out=torch.empty_like(y))
    y = as_bytes(y) if y.dtype == torch.bool else y
    return _sample_means(torch.ge(x, 0, out=torch.empty_like(x)).eq_(y), valid)


def _sample_means(value: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid elements of each sample, (N,) float32; nan for a sample without any."""
    value = value if valid is None else kept(value, valid)
    value, wide = _by_sample(value), torch.promote_types(value.dtype, torch.float32)
    if valid is not None:
        return (value.sum(1, dtype=wide) / _by_sample(as_bytes(valid)).sum(1)).float()
    if readable(value) and value.shape[1] == 1:
        return value[:, 0].float()
    return value.mean(1, dtype=wide).float()


def _by_sample(value: Tensor) -> Tensor:
    return value.flatten(1) if value.dim() > 1 else value.reshape(-1, 1)


def _counts(
    batch: Batch, valid: Tensor | None, shape: tuple[int, ...], share: Tensor | None
) -> tuple[float | Tensor, Tensor]:
    """Number of valid elements and sum of their labels, a column for each element of `shape`."""
    target = batch.target
    if torch.compiler.is_compiling():
        target = batch.labels(torch.float32)  # as the loss reads them
    if valid is not None:
        target = kept(target, valid)
    elif target.dtype == torch.bool:
        target = as_bytes(target)
    if target.dtype in (torch.bfloat16, torch.float16):
        target = target.float()
    positive = _column_sums(target, shape, share)
    if valid is not None:
        return _column_sums(as_bytes(valid), shape, share), positive
    each = target.numel() / max(positive.numel(), 1)
    return (each if share is None else each * share.mean().nan_to_num()), positive  # of no sample


def _column_sums(value: Tensor, shape: tuple[int, ...], share: Tensor | None) -> Tensor:
    over = [place for place in range(value.dim()) if not shape or shape[place] == 1]
    if share is None:
        if not shape and torch.compiler.is_compiling():  # as the loss is summed
            value, over = _by_sample(value).sum(1), [0]
        total = value.sum(over) if over else value
        return total if total.dim() < 2 else total.reshape(-1)
    rest = [place for place in over if place > 0]
    each = _by_sample(value.sum(rest) if rest else value).float()
    return share @ each  # dimension 0 counts the samples, which no prior varies over
