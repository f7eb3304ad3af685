"""The drop-in loss: a configuration and the draw; its forward is one call to the functional."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _batch, _checks
from ._fused import plain_values
from .functional import sc_bce_with_logits

__all__ = ["SCBCEWithLogitsLoss"]

_MANY = 1 << 12  # draws, from which on bytes are quicker than uniform numbers

Loss = TypeVar("Loss", bound="SCBCEWithLogitsLoss")


class SCBCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    r"""Self-calibrating binary cross entropy in place of :class:`torch.nn.BCEWithLogitsLoss`.

    .. math::
        \ell(x, y) = \mathrm{BCE}(x, q), \qquad q = (1 - \alpha\beta)\, y + \tfrac{\alpha\beta}{2}

    with :math:`x` the logit, :math:`y` the target, :math:`\alpha` the probability that a label is
    perturbed and :math:`\beta` the strength of the perturbation
    :math:`p(y, \beta) = (1-\beta) y + \beta/2`. This is the expectation; with ``sampling`` the
    labels are drawn: each is :math:`p(y, \beta)` with probability :math:`\alpha`, else :math:`y`.

    Special cases: ``alpha=0`` (the default) is :class:`torch.nn.BCEWithLogitsLoss`, bit for bit.
    :meth:`label_smoothing`, :meth:`disturb_label`, :meth:`hard_inversion`,
    :meth:`soft_inversion`, :meth:`moderation` and :meth:`dynamic_moderation` name the others.

    Args:
        weight: as in torch, rescales the loss of each element. Default: None.
        size_average: deprecated, as in torch. Default: None.
        reduce: deprecated, as in torch. Default: None.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        pos_weight: as in torch, the weight of positive examples. Default: None.
        alpha: perturbation probability, in [0, 1]. Default: 0.
        beta: perturbation strength, in [0, 2]; ``alpha * beta`` at most 1. Default: 2.
        sampling: ``"expected"`` uses the effective target ``q``; ``"sample"`` draws once per
            sample (dimension 0), ``"element"`` once per element. Default: ``"expected"``.
        noise: bound of the noise n of dynamic moderation, a standard normal truncated to
            [-noise, noise] that makes the strength of each drawn element beta + 2n. Needs
            drawing; at most ``min(beta, 2 - beta) / 2``. Default: 0.
        ignore_index: elements whose target has this value count for nothing. Default: None.
        generator: source of the draws, on the device of the input; None is torch's global one.
            It is the caller's to save. Default: None.

    Shape:
        - input: :math:`(N, *)` or scalar, floating point.
        - target: the same; bool, integer (0 and 1) or floating point in [0, 1].
        - Returns: scalar, or the shape of ``input`` for ``reduction="none"``.

    Raises:
        ValueError: at construction, a number out of its range, ``alpha * beta > 1``, an unknown
            ``reduction`` or ``sampling``, noise without drawing. In use, those of
            :func:`sc_bce_with_logits`.
        TypeError: an argument of the wrong type.

    Note:
        Draws happen in training mode with gradients enabled, nowhere else: under ``eval()`` or
        ``no_grad`` the loss is its expectation. ``state_dict`` has torch's keys and nothing else.
        A ``generator`` excludes ``torch.compile(fullgraph=True)``; several processes need
        different seeds.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (SC-BCE and its special cases).
        Xie et al., CVPR 2016, arXiv 1605.00055 (DisturbLabel).

    Example:
        >>> import torch
        >>> from sc_bce import SCBCEWithLogitsLoss
        >>> criterion = SCBCEWithLogitsLoss(alpha=0.05)
        >>> criterion
        SCBCEWithLogitsLoss(alpha=0.05, beta=2.0, sampling='expected', reduction='mean')
        >>> criterion(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
        tensor(0.2951)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        alpha: float = 0.0,
        beta: float = 2.0,
        sampling: str = "expected",
        noise: float = 0.0,
        ignore_index: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        _checks.reduction(self.reduction)
        _checks.number("alpha", alpha, 0.0, 1.0)
        _checks.number("beta", beta, 0.0, 2.0)
        _checks.perturbation(alpha, beta)
        _checks.sampling(sampling)
        _checks.noise(noise, beta, sampling)
        _checks.generator(generator)
        self.alpha = float(alpha)
        self.beta = float(beta)
        self.sampling = sampling
        self.noise = float(noise)
        self.ignore_index = _checks.ignore_index(ignore_index)
        self.generator = generator

    @classmethod
    def label_smoothing(cls: type[Loss], eps: float, **kwargs: Any) -> Loss:
        """Smoothing ``eps`` in [0, 1] as Keras defines it: a positive's target is 1 - eps/2."""
        _checks.number("eps", eps, 0.0, 1.0)
        return cls(alpha=1.0, beta=eps, **kwargs)

    @classmethod
    def disturb_label(
        cls: type[Loss], rate: float, sampling: str = "element", **kwargs: Any
    ) -> Loss:
        """DisturbLabel: with probability ``rate`` in [0, 1] the label is drawn anew, uniformly."""
        _checks.number("rate", rate, 0.0, 1.0)
        return cls(alpha=rate / 2, beta=2.0, sampling=sampling, **kwargs)

    @classmethod
    def hard_inversion(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Flip all labels of a sample with probability ``alpha`` in [0, 1/2]."""
        return cls(alpha=alpha, beta=2.0, **{"sampling": "sample", **kwargs})

    @classmethod
    def soft_inversion(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Turn 1 into 1/4 and 0 into 3/4, a sample at a time, with probability ``alpha`` to 2/3."""
        return cls(alpha=alpha, beta=1.5, **{"sampling": "sample", **kwargs})

    @classmethod
    def moderation(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Set all labels of a sample to 1/2 with probability ``alpha`` in [0, 1]."""
        return cls(alpha=alpha, beta=1.0, **{"sampling": "sample", **kwargs})

    @classmethod
    def dynamic_moderation(cls: type[Loss], alpha: float, **kwargs: Any) -> Loss:
        """Moderation whose labels are 1/2 plus truncated normal noise within 1/4."""
        return cls(alpha=alpha, beta=1.0, **{"sampling": "sample", "noise": 0.25, **kwargs})

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        alpha: float | Tensor = self.alpha
        beta: float | Tensor = self.beta
        drawn = self.sampling != "expected" and self.training and torch.is_grad_enabled()
        if drawn and self.alpha > 0:
            _batch.pair(input, target)  # before the draw
            alpha = draw(self.alpha, input, self.sampling, self.generator)
            if self.noise > 0:
                beta = self.beta + 2 * _truncated_normal(input, self.noise, self.generator)
        return sc_bce_with_logits(
            input,
            target,
            alpha,
            beta,
            weight=self.weight,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        shown = [f"alpha={self.alpha}", f"beta={self.beta}", f"sampling={self.sampling!r}"]
        if self.noise:
            shown.append(f"noise={self.noise}")
        if self.ignore_index is not None:
            shown.append(f"ignore_index={self.ignore_index}")
        return ", ".join([*shown, f"reduction={self.reduction!r}"])


def draw(
    alpha: float | Tensor, input: Tensor, sampling: str, generator: torch.Generator | None
) -> Tensor:
    """Zeros and ones, Bernoulli(alpha), one per sample (dimension 0) or one per element.

    A tensor alpha holds one probability per sample.
    """
    shape = input.shape if sampling == "element" else input.shape[:1]
    if isinstance(alpha, Tensor) and alpha.dim() == 1:
        alpha = alpha.reshape(alpha.shape[0], *(1 for _ in shape[1:]))
    if shape.numel() < _MANY or not plain_values(input):
        return _uniform(shape, input.device, generator) < alpha
    return _by_bytes(alpha, shape, generator)


def _by_bytes(
    alpha: float | Tensor, shape: torch.Size, generator: torch.Generator | None
) -> Tensor:
    # A CPU makes its random numbers one by one. One byte decides for an element, unless it ties
    # with the first eight bits of alpha: then a uniform number is compared with the bits left.
    count = shape.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64, device="cpu")
    byte = words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:count].view(shape)
    level = torch.as_tensor(alpha, dtype=torch.float32, device="cpu") * 256
    first = level.floor().clamp(max=255)  # at alpha = 1 all bits left say yes
    drawn = byte < first.to(torch.uint8)
    ties = (byte == first.to(torch.uint8)).nonzero(as_tuple=True)
    left = (level - first).expand(shape)[ties]
    drawn[ties] = _uniform(left.shape, left.device, generator) < left
    return drawn


def _truncated_normal(input: Tensor, bound: float, generator: torch.Generator | None) -> Tensor:
    # By inverting the distribution function: no rejection, hence no data-dependent loop.
    reach = math.erf(bound / math.sqrt(2))
    uniform = _uniform(input.shape, input.device, generator)
    return math.sqrt(2) * torch.erfinv(reach * (2 * uniform - 1))


def _uniform(shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    # float32 whatever the input: a bfloat16 uniform has 256 values and would draw 0.001 as 0.004.
    if generator is None:  # compile can't trace the keyword with a dynamic shape, even as None
        return torch.rand(shape, device=device, dtype=torch.float32)
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
