r"""The functional layer: pure, without state or randomness, the only arithmetic on targets.

Letters as in Liu et al. 2023: :math:`\alpha` is the perturbation probability (not the class
balance of focal loss), :math:`\beta` the perturbation strength.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _batch, _checks, _fused
from ._batch import valid_elements

__all__ = ["perturb_target", "sc_bce_with_logits"]


def perturb_target(
    target: Tensor,
    alpha: float | Tensor = 0.0,
    beta: float | Tensor = 2.0,
    *,
    ignore_index: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return the effective target of self-calibrating binary cross entropy, for any loss.

    .. math::
        q = (1 - \alpha\beta)\, y + \tfrac{\alpha\beta}{2}

    with :math:`y` the target, :math:`\alpha` the probability that a label is perturbed and
    :math:`\beta` the strength of the perturbation :math:`p(y, \beta) = (1-\beta) y + \beta/2`.
    ``q`` is the mean of the target that is :math:`p(y, \beta)` with probability :math:`\alpha`,
    else :math:`y`. It stays inside [0, 1].

    Special cases: ``alpha=0`` leaves the target; ``alpha=1, beta=eps`` is label smoothing as
    Keras defines it for binary labels; a tensor ``alpha`` of zeros and ones is a draw.

    Args:
        target: labels in [0, 1], of dtype bool, integer (0 and 1 only) or floating point.
        alpha: perturbation probability in [0, 1]: a number, a 0-d tensor, an (N,) tensor (one
            value per sample, dimension 0), or a tensor of as many dimensions as ``target`` that
            broadcasts to it. The values of tensors are not checked. Default: 0.
        beta: perturbation strength in [0, 2], in the same forms. Default: 2.
        ignore_index: target value that is left as it is. Default: None.
        dtype: dtype of the result. Default: that of ``target``, or torch's default dtype for
            bool and integer targets, but never less than float32.

    Shape:
        - target: :math:`(N, *)` or scalar.
        - Returns: the same.

    Raises:
        ValueError: a number out of its range; ``alpha * beta > 1``, which would reverse the
            labels; a level that doesn't broadcast; an integer label other than 0 and 1.
        TypeError: an argument of the wrong type; a ``dtype`` that is not floating point.

    Note:
        ``q`` is formed in at least float32: bfloat16 would round 1 - 0.001 to 1, keep 0.001, and
        so smooth the negatives only. Integer labels are checked on the CPU; where their values
        can't be read without waiting (an accelerator, compile, vmap), an illegal one gives nan.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (label perturbation).
        Szegedy et al., CVPR 2016, Section 7 (label smoothing).

    Example:
        >>> import torch
        >>> from sc_bce import perturb_target
        >>> perturb_target(torch.tensor([0.0, 1.0]), alpha=0.1, beta=2.0)
        tensor([0.1000, 0.9000])
        >>> perturb_target(torch.tensor([True, False]), alpha=torch.tensor([0.0, 0.2]))
        tensor([1.0000, 0.2000])
    """
    _checks.perturbation(alpha, beta)
    _batch.label(target)
    ignore_index = _checks.ignore_index(ignore_index)
    if dtype is None:
        own = target.dtype if target.is_floating_point() else torch.get_default_dtype()
        dtype = torch.promote_types(own, torch.float32)
    _checks.floating("dtype", dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y = _floating(target, wide, ignore_index)
    strength = _level("alpha", alpha, y) * _level("beta", beta, y)
    # Towards 1/2 instead of (1 - s) y + s/2: both labels round by the same amount.
    if torch.compiler.is_compiling():
        q = y + strength * (0.5 - y)  # fused anyway, and quicker than the cases of lerp
    else:
        q = torch.lerp(y, y.new_full((), 0.5), strength)  # the same in one pass
    if ignore_index is not None:
        q = torch.where(valid_elements(target, ignore_index), q, y)
    return q.to(dtype)


def sc_bce_with_logits(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.0,
    beta: float | Tensor = 2.0,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Self-calibrating binary cross entropy between logits and perturbed targets.

    .. math::
        \ell(x, y) = \mathrm{BCE}(x, q), \qquad q = (1 - \alpha\beta)\, y + \tfrac{\alpha\beta}{2}

    with :math:`x` the logit and :math:`y` the target. It is the expectation of BCE under labels
    that are perturbed with probability :math:`\alpha` and strength :math:`\beta`, since BCE is
    affine in its target. Its gradient is :math:`\sigma(x) - q`; a perfect fit says
    :math:`1 - \alpha\beta/2` for the label instead of 1. Equal forms:
    :math:`\mathrm{BCE}(x, y) + \tfrac{\alpha\beta}{2}(2y - 1)\,x` (a linear penalty on the signed
    logit margin) and :math:`(1-g)\,\mathrm{BCE}(x, y) + g\,\mathrm{BCE}(x, 1-y)` with the flip
    rate :math:`g = \alpha\beta/2`.

    Special cases are data, not modes: ``alpha=0`` is
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`, bit for bit; ``alpha=1,
    beta=eps`` label smoothing; a tensor ``alpha`` of drawn zeros and ones with ``beta=2``
    DisturbLabel, with ``beta=1`` moderation, and so on.

    Args:
        input: logits, floating point.
        target: labels in [0, 1] of the same size: bool, integer (0 and 1 only) or floating point.
        alpha: perturbation probability in [0, 1]: a number, a 0-d tensor, an (N,) tensor (one
            value per sample, dimension 0), or a tensor of as many dimensions as ``input`` that
            broadcasts to it. The values of tensors are not checked. Default: 0.
        beta: perturbation strength in [0, 2], in the same forms. Default: 2.
        weight: as in torch, rescales the loss of each element; broadcasts. Default: None.
        pos_weight: as in torch, the weight of positive examples. The best probability is then
            shifted from ``q`` to logit ``q`` + log ``pos_weight``. Default: None.
        ignore_index: elements whose target has this value give exactly zero loss and gradient,
            whatever their logit, and count in no mean. Default: None.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.

    Shape:
        - input: :math:`(N, *)` or scalar.
        - target: the same.
        - Returns: scalar, or the shape of ``input`` for ``reduction="none"``.

    Raises:
        ValueError: a number out of its range; ``alpha * beta > 1``; an unknown ``reduction``;
            sizes that differ; a level that doesn't broadcast; an integer label other than 0 and
            1. At ``alpha=0`` torch's own errors come through.
        TypeError: an argument of the wrong type.

    Note:
        Half and bfloat16 are computed in float32, but at a number ``alpha=0`` as torch does; the
        result has torch's dtype. Differentiable in input, target, alpha and beta; works under
        compile, export, vmap, forward-mode AD, double backward and autocast. Integer labels are
        checked on the CPU; where their values can't be read without waiting (an accelerator,
        compile, vmap), an illegal one gives nan. With everything ignored the mean is 0; the mean
        of an empty batch is nan, as in torch.

        Large contiguous batches on a CPU, without weights or ignored elements and reduced, take
        one fused sweep: the same gradient, and a loss within 1.2e-7 per element in float32. It
        keeps a mask itself for backward, so that one must not be overwritten before.

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
    """
    _checks.perturbation(alpha, beta)
    ignore_index = _checks.ignore_index(ignore_index)
    plain = not isinstance(alpha, Tensor) and alpha == 0
    special = weight is not None or pos_weight is not None or ignore_index is not None
    if plain and ignore_index is None:
        if isinstance(target, Tensor) and not target.is_floating_point():
            _batch.logits(input)
            target = _floating(target, input.dtype, None)
        return F.binary_cross_entropy_with_logits(
            input, target, weight, pos_weight=pos_weight, reduction=reduction
        )
    _checks.reduction(reduction)
    _batch.pair(input, target)
    if not (plain or special):
        sums = batch_sums(input, target, alpha, beta, reduction)
        if sums is not None:
            return loss_of_sums(sums, input, target, alpha, beta, reduction)
    dtype = _result_dtype(input, target)
    if plain:
        q = _floating(target, dtype, ignore_index)
    else:
        wide = torch.promote_types(dtype, torch.float32)
        q = perturb_target(target, alpha, beta, ignore_index=ignore_index, dtype=wide)
        input = input.to(torch.promote_types(input.dtype, torch.float32))
    if ignore_index is None:
        loss = F.binary_cross_entropy_with_logits(
            input, q, weight, pos_weight=pos_weight, reduction=reduction
        )
    else:
        loss = _masked(
            input, q, weight, pos_weight, valid_elements(target, ignore_index), reduction
        )
    return loss if _autocasts(input.device.type) else loss.to(dtype)


class BatchSums(NamedTuple):
    """What is enough of a batch for every level, one value for each of its parts."""

    loss: Tensor  # of BCE(x, y)
    margin: Tensor  # of (2y - 1) x


def batch_sums(
    input: Tensor, target: Tensor, alpha: float | Tensor, beta: float | Tensor, reduction: str
) -> BatchSums | None:
    """One part per sample where a level differs by sample, else one in all; None where unfit.

    With a draw for each element as `alpha` the margins are those of what it drew.
    """
    parts, drawn = 1, _draw(alpha, input)
    for level in (beta,) if drawn is not None else (alpha, beta):
        if isinstance(level, Tensor) and level.dim():
            if level.shape != input.shape[:1]:
                return None
            parts = len(level)
    if reduction == "none" or not _fused.applies(input, target, parts):
        return None
    if not target.is_floating_point() and target.dtype != torch.bool:
        low, high = target.aminmax()
        if low < 0 or high > 1:
            _checks.hard_labels(target, (target != 0) & (target != 1), None)
    return BatchSums(*_fused.sample_sums(input, target, parts, drawn))


def loss_of_sums(
    sums: BatchSums,
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    reduction: str,
) -> Tensor:
    """The loss of the batch under levels that have one value, or one for each of its parts."""
    if _draw(alpha, input) is not None:
        alpha = 1.0  # the margins are already those of what it drew
    strength = _level("alpha", alpha, sums.loss) * _level("beta", beta, sums.loss)
    loss = (sums.loss + (strength / 2) * sums.margin).sum()
    if reduction == "mean":
        loss = loss / input.numel()
    return loss if _autocasts(input.device.type) else loss.to(_result_dtype(input, target))


def _draw(alpha: float | Tensor, input: Tensor) -> Tensor | None:
    """Alpha itself where it is a draw for each element that the fused sums can read."""
    if not isinstance(alpha, Tensor) or alpha.dtype != torch.bool or alpha.shape != input.shape:
        return None
    return alpha if alpha.is_contiguous() and _fused.plain_values(alpha) else None


def _result_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """torch's rule: that of the target; a bool or integer target has none to give."""
    return target.dtype if target.is_floating_point() else input.dtype


def sample_margins(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None
) -> Tensor:
    """Mean signed margin (2y - 1)x of each sample, (N,) float32; no gradient.

    Weighted as the loss is (torch's ``weight``, divided by the number of valid elements), so that
    beta/2 of it is the derivative of the sample's mean loss by its alpha; nan for a sample
    without a valid element.
    """
    _batch.pair(input, target)
    y = _floating(target, torch.promote_types(input.dtype, torch.float32), ignore_index)
    # Low precision is accumulated in at least float32, as y is.
    margin = (2 * y - 1) * input.detach()
    if weight is not None:
        margin = margin * weight
    return _sample_means(margin, target, ignore_index)


def sample_accuracies(input: Tensor, target: Tensor, ignore_index: int | None) -> Tensor:
    """Share of each sample's valid elements that are right, (N,) float32; nan without any."""
    hits = (input.detach() >= 0) == (target >= 0.5)
    return _sample_means(hits.float(), target, ignore_index)


def _sample_means(value: Tensor, target: Tensor, ignore_index: int | None) -> Tensor:
    if ignore_index is None:
        return _by_sample(value).mean(1).float()
    valid = valid_elements(target, ignore_index)
    total = _by_sample(torch.where(valid, value, 0.0)).sum(1)
    return (total / _by_sample(valid).sum(1)).float()


def _by_sample(value: Tensor) -> Tensor:
    return value.flatten(1) if value.dim() > 1 else value.reshape(-1, 1)


def _autocasts(device_type: str) -> bool:
    """Autocast runs torch's BCE in float32 and leaves the result there; so do we."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _masked(
    input: Tensor,
    q: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    valid: Tensor,
    reduction: str,
) -> Tensor:
    # The logit is replaced before the loss, so that an ignored inf or nan reaches no gradient,
    # and the loss after it, so that whatever stands there instead counts for nothing.
    loss = F.binary_cross_entropy_with_logits(
        torch.where(valid, input, 0.0), q, weight, pos_weight=pos_weight, reduction="none"
    )
    loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum(dtype=torch.promote_types(loss.dtype, torch.float32))
    if reduction == "mean":
        # All ignored is 0 / 1; an empty batch stays torch's 0 / 0.
        total = total / valid.sum().clamp(min=min(1, valid.numel()))
    return total


def _floating(target: Tensor, dtype: torch.dtype, ignore_index: float | None) -> Tensor:
    """The target in a floating dtype; an integer label other than 0 and 1 raises or gives nan."""
    y = target.to(dtype)
    if target.is_floating_point() or target.dtype == torch.bool:
        return y
    illegal = (target != 0) & (target != 1)
    if ignore_index is not None:
        illegal = illegal & valid_elements(target, ignore_index)
    if not _checks.hard_labels(target, illegal, ignore_index):
        y = torch.where(illegal, torch.nan, y)
    return y


def _level(name: str, value: float | Tensor, target: Tensor) -> float | Tensor:
    """Alpha or beta ready to broadcast: (N,) lies along dimension 0, and low precision ends."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float)) else float(value)
    _checks.level_shape(name, value, target.shape)
    if value.dim() == 1:
        value = value.reshape(value.shape[0], *(1 for _ in target.shape[1:]))
    return value.to(target.dtype)
