"""After training: the known flip removed, then one temperature."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _batch, _checks
from ._batch import valid_elements

__all__ = ["TemperatureScaling"]

Scaling = TypeVar("Scaling", bound="TemperatureScaling")

_SUBSET = 1_000_000  # elements that a fit looks at
_COARSE, _FINE, _END = 0.02, 0.005, 0.3  # steps and end of the search for a flip rate
_CLIP = 1e-3  # of the probability without the flip
_SLOPES = (1e-3, 1e3)  # of 1 / temperature: separable data would ask for an infinite one


class TemperatureScaling(nn.Module):
    r"""Calibrates logits after training: removes a known flip rate, then divides by a temperature.

    A network trained at flip rate :math:`g` answers :math:`\sigma(z) \approx (1 - 2g) P + g`, so
    that it can't say more than :math:`1 - g`. With :math:`T` fitted on validation data by
    negative log-likelihood,

    .. math::
        P = \mathrm{clip}\Big(\frac{\sigma(z) - g}{1 - 2g},\, 0.001,\, 0.999\Big), \qquad
        \mathrm{calibrated\ logit} = \mathrm{logit}(P) / T

    Special cases: at ``flip_rate=0`` nothing is removed or clipped, and this is ordinary
    temperature scaling, :math:`z / T`. Before :meth:`fit` the temperature is 1.

    Args:
        flip_rate: flip rate of the training, in [0, 1/2): ``criterion.flip_rate`` of
            :class:`AdaptivePerturbation`, or ``alpha * beta / 2`` of a fixed perturbation; a
            number or 0-d tensor. None fits it too, among multiples of 0.005 up to 0.3: for levels
            that still moved at the end, or a network of unknown training. Default: 0.

    Attributes:
        flip_rate: the flip rate that is removed, a 0-d buffer; 0 until it is fitted.
        temperature: the fitted temperature, a 0-d buffer.

    Shape:
        - logits: any.
        - Returns: the same, in the same dtype.

    Raises:
        ValueError: ``flip_rate`` outside [0, 1/2).
        TypeError: ``flip_rate`` not a number, 0-d tensor or None.

    Note:
        The decision at 1/2 never changes. Computed in at least float32; works under compile and
        export, so that it can be shipped with the model.

    References:
        Guo et al., ICML 2017 (temperature scaling).

    Example:
        >>> import torch
        >>> from sc_bce import TemperatureScaling
        >>> _ = torch.manual_seed(0)
        >>> truth = torch.randn(20000)
        >>> target = torch.rand(20000) < torch.sigmoid(truth)
        >>> scaling = TemperatureScaling().fit(3 * truth, target)  # logits three times too large
        >>> round(float(scaling.temperature), 1)
        3.0
        >>> scaling(torch.tensor([-6.0, 3.0])).sign()
        tensor([-1.,  1.])
    """

    flip_rate: Tensor
    temperature: Tensor

    def __init__(self, flip_rate: float | Tensor | None = 0.0) -> None:
        super().__init__()
        self.fit_flip_rate = flip_rate is None
        rate = 0.0 if flip_rate is None else _checks.flip_rate(flip_rate)
        self.register_buffer("flip_rate", torch.tensor(rate))
        self.register_buffer("temperature", torch.tensor(1.0))

    @torch.no_grad()
    def fit(
        self: Scaling, logits: Tensor, target: Tensor, *, ignore_index: int | None = None
    ) -> Scaling:
        """Fit the temperature, and a flip rate of None, to validation data; return this module.

        Newton's method in float64 on 1 / temperature, in which the negative log-likelihood is
        convex, inside a bracket of [0.001, 1000]. Above a million elements it looks at a million,
        drawn with a fixed seed.

        Args:
            logits: what the network answers on validation data; any shape.
            target: its labels in [0, 1], of the same size and any dtype.
            ignore_index: target value of elements to leave out. Default: None.

        Raises:
            ValueError: sizes that differ; labels outside [0, 1]; nothing left; labels of one
                class only; logits that are not finite. The module is then unchanged.
            TypeError: an argument of the wrong type.
        """
        _batch.pair(logits, target, "logits")
        ignore_index = _checks.ignore_index(ignore_index)
        z, target = logits.reshape(-1), target.reshape(-1)
        if ignore_index is not None:
            valid = valid_elements(target, ignore_index)
            z, target = z[valid], target[valid]
        if len(z) > _SUBSET:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randint(len(z), (_SUBSET,), generator=generator).to(z.device)
            z, target = z[chosen], target[chosen]
        y = target.double()
        _checks.validation_data(z, y)
        z = z.double()
        if self.fit_flip_rate:
            self.flip_rate.fill_(self._best_flip_rate(z, y))
        self.temperature.fill_(1 / _best_slope(self._without_flip(z, self.flip_rate), y))
        return self

    def _best_flip_rate(self, z: Tensor, y: Tensor) -> float:
        """That of the least loss under its best temperature: a coarse search, then a fine one."""
        slope = 1.0

        def loss(step: int) -> float:
            nonlocal slope
            u = self._without_flip(z, z.new_tensor(step * _FINE))
            slope = _best_slope(u, y, start=slope)
            return float(F.binary_cross_entropy_with_logits(slope * u, y))

        stride, end = round(_COARSE / _FINE), round(_END / _FINE)
        near = min(range(0, end + 1, stride), key=loss)
        return min(range(max(0, near - stride), min(end, near + stride) + 1), key=loss) * _FINE

    def forward(self, logits: Tensor) -> Tensor:
        _batch.logits(logits, "logits")
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        u = self._without_flip(z, self.flip_rate)
        return (u / self.temperature.to(z.dtype)).to(logits.dtype)

    @staticmethod
    def _without_flip(z: Tensor, flip_rate: Tensor) -> Tensor:
        # logit((s - g) / (1 - 2g)) with s = sigmoid(z) is z + log(1 - r e^-z) - log(1 - r e^z),
        # r = g / (1 - g): exact at g = 0, and no difference of nearly equal probabilities.
        g = flip_rate.to(z.dtype)
        bound = math.log((1 - _CLIP) / _CLIP)
        end = torch.logit((1 - 2 * g) * (1 - _CLIP) + g)
        size = torch.minimum(z.abs(), torch.where(g > 0, end, torch.inf))
        r = torch.log(g) - torch.log1p(-g)
        wide = size + torch.log1p(-torch.exp(r - size)) - torch.log1p(-torch.exp(r + size))
        # Removing the flip never shrinks a logit: where rounding says otherwise, keep its size,
        # and so its sign.
        wide = torch.fmin(torch.fmax(wide, size), torch.where(g > 0, bound, torch.inf))
        return torch.copysign(wide, z)

    def extra_repr(self) -> str:
        if self.temperature.is_meta:
            return ""
        return f"flip_rate={float(self.flip_rate):.4g}, temperature={float(self.temperature):.4g}"


def _best_slope(u: Tensor, y: Tensor, start: float = 1.0) -> float:
    """The a > 0 that minimises the mean of BCE(a u, y): a bracketed Newton iteration."""
    low, high = _SLOPES
    slope = start
    for _ in range(200):
        p = torch.sigmoid(slope * u)
        gradient = float((u * (p - y)).mean())
        if gradient == 0:
            break
        curvature = float((u * u * p * (1 - p)).mean())
        if gradient > 0:
            high = slope
        else:
            low = slope
        step = slope - gradient / curvature if curvature > 0 else high
        # Outside the bracket, halve it, in the logarithm: temperatures are ratios.
        new = step if low < step < high else (low * high) ** 0.5
        if abs(new - slope) <= 1e-12 * slope:
            break
        slope = new
    return slope
