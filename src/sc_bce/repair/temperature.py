"""The parametric repair: a line through the logits, from which the flip is removed first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _errors
from ..measure.scores import Cells, affine
from .fit import Fitted, Repair, Sample, mean_loss, store, took
from .flip import best_pair, flip_rates, without_flip

__all__ = ["TemperatureScaling"]

_MANY = 10_000  # elements above which raw logits are first gathered into cells
_KEPT = 13  # bits of float32 that a cell leaves out: its logits differ by 0.1 % of the largest
_FEW = 20  # elements of the rarer class below which labels are too few to be believed
_CLIP = 1e-3  # share of the rarer class's base rate: the least probability after a removed flip
_SLOPES = (1e-3, 1e3)  # limits of 1 / temperature, for logits of standard deviation 1
_HALF = 1 / (4 * math.e)  # of the precision: a float just below 1 is half of it away
_BACKWARDS = (
    "The temperature is at its upper limit: the logits rank the labels backwards or say nothing "
    "about them. Check the labels, and the sign of the logits"
)
_APART = (
    "The temperature is at its lower limit: a threshold all but separates the classes. Fit to more "
    "data"
)
_SURE = math.log(2 * math.e)  # how far beyond the surest other logit an exact 0 or 1 lies


class TemperatureScaling(Repair):
    r"""Temperature and Platt scaling: calibrate a network after training, flip removed first.

    A network trained at flip rates :math:`(g_0, g_1)` predicts
    :math:`\sigma(z) \approx (1 - g_0 - g_1) P + g_0`, with :math:`P` the true probability: at
    least :math:`g_0`, at most :math:`1 - g_1`. With temperature :math:`T` and bias :math:`b`
    fitted on validation data by negative log-likelihood,

    .. math::
        P = \mathrm{clip}\Big(\frac{\sigma(z) - g_0}{1 - g_0 - g_1},\, c,\, 1 - c\Big), \qquad
        \mathrm{calibrated\ logit} = \mathrm{logit}(P) / T + b

    Special cases: at ``flip_rate=0``, the default, nothing is removed or clipped, and this is
    ordinary temperature scaling, :math:`z / T`. With ``bias=True`` as well it is Platt scaling.
    Before :meth:`fit` the temperature is 1 and the bias 0. A rate of 0 on one side leaves that
    side unclipped. Fitted to probabilities, the module takes and returns probabilities.

    Args:
        flip_rate: flip rate of the training: a number or 0-d tensor in [0, 1/2), the same for
            both labels; a pair (g0, g1) for negatives and positives, such as ``flip_rates`` of
            either loss, with g0 + g1 below 1, each a number or of shape (num_labels,); None fits
            the pair, for levels that still moved at the end, or if the training is not known.
            Default: 0.
        bias: whether to fit a shift of the logits too, for a base rate that training changed
            (``pos_weight``, smoothing towards 1/2 on rare positives). Default: False.
        num_labels: number of labels in dimension 1, each with its own map. Default: None.

    Attributes:
        flip_rates: the pair that is removed, a buffer of shape (2,) or (2, num_labels); 0 before
            a fitted pair is known.
        temperature: the fitted temperature, a buffer, 0-d or (num_labels,).
        bias: the fitted shift, a buffer of the same shape.
        clip: the least probability :math:`c` after a removed flip, a buffer of the same shape:
            0.001 of the rarer class's base rate after the fit, 0.001 before.
        ends: calibrated logits of the probabilities 0 and 1, if the fit had them, which bound the
            others; otherwise infinite. A buffer of the shape of ``flip_rates``.
        from_logits: whether it takes logits and not probabilities, a buffer; True before a fit.
        nll: mean negative log-likelihood of the fitted data before and after; None before a fit
            and after loading a state.

    Shape:
        - input: any; (N, num_labels, ...) with ``num_labels``. A Tensor or a NumPy array.
        - Returns: the same, in the same dtype (float32 for uint8 maps).

    Raises:
        ValueError: ``flip_rate`` is outside [0, 1/2), or a pair sums to 1 or more.
        TypeError: ``flip_rate`` has another type.

    Note:
        A temperature and equal flip rates never change the decision at 1/2. Unequal flip rates
        and a bias move it to where the repaired probability is 1/2. With ``bias=True``, logits
        that are all alike determine no temperature: it stays 1, and only the bias is fitted.

        *Few data*: if a threshold separates the classes, or the rarer one has fewer than 20
        elements, the fit aims at Platt's targets :math:`(N_+ + 1)/(N_+ + 2)` and
        :math:`1/(N_- + 2)` instead of 1 and 0. The temperature stays within a factor of 1000 of
        the standard deviation of the logits (without a bias: of their root mean square), and a
        fit that ends there warns.

        *Exact 0 and 1*: a probability rounded to one of them says only that its logit lies beyond
        the others. So the line is fitted to the others, which doesn't bias it, and 0 and 1 are
        repaired to their shares of positives, (k + 1/2)/(n + 1), or to the answer of the surest
        other probability if that is surer. If the others alone are *few data*, a 1 counts as
        1 - d/(2e), with d the distance of the nearest other probability: that has the mean logit
        of a uniform variable in (1 - d/2, 1). A 0 or 1 that the fit did not have is float32's.

        More than 10,000 elements are first gathered into cells 0.1 % wide. nan stays nan; float16
        answers end at 65504. Computed in at least float32. Works under compile, export and ONNX.

    References:
        Guo et al., ICML 2017 (temperature scaling); Platt 1999 (with a bias; targets).

    Example:
        >>> import torch
        >>> from sc_bce import CalibrationHistogram, TemperatureScaling
        >>> _ = torch.manual_seed(0)
        >>> truth = torch.randn(20000)
        >>> target = torch.rand(20000) < torch.sigmoid(truth)
        >>> scaling = TemperatureScaling().fit(3 * truth, target)  # logits three times too large
        >>> round(float(scaling.temperature), 1)
        3.0
        >>> scaling(torch.tensor([-6.0, 3.0])).sign()
        tensor([-1.,  1.])
        >>> histogram = CalibrationHistogram()
        >>> histogram.update(3 * truth + 1, target)
        >>> platt = TemperatureScaling(bias=True).fit(histogram)
        >>> round(float(platt.temperature), 1), round(float(platt.bias), 1)
        (3.0, -0.3)
    """

    flip_rates: Tensor
    temperature: Tensor
    bias: Tensor
    clip: Tensor
    ends: Tensor
    _if_worse = "is its flip rate that of this network's training?"

    def __init__(
        self,
        flip_rate: float | Tensor | Sequence[float | Tensor] | None = 0.0,
        *,
        bias: bool = False,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(num_labels)
        self.fit_flip_rates = flip_rate is None
        self.fit_bias = bool(bias)
        self._first = flip_rates(0.0 if flip_rate is None else flip_rate, self.num_labels)
        shape = () if self.num_labels is None else (self.num_labels,)
        with torch.inference_mode(False):
            for name in ("flip_rates", "temperature", "bias", "clip", "ends"):
                size = (2, *shape) if name in ("flip_rates", "ends") else shape
                self.register_buffer(name, torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget the fit. Also call it after ``to_empty``, which leaves the buffers unfilled.

        Example:
            >>> import torch
            >>> from sc_bce import TemperatureScaling
            >>> logits, target = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1, 0, 0])
            >>> scaling = TemperatureScaling().fit(logits, target)
            >>> scaling.reset_parameters()
            >>> scaling.temperature
            tensor(1.)
        """
        first = torch.tensor(self._first, device="cpu").view(self.flip_rates.shape)
        ends = torch.tensor([-math.inf, math.inf], device="cpu").view(2, *self.bias.dim() * (1,))
        one = torch.ones((), device="cpu")
        store(self, flip_rates=first, temperature=one, bias=0 * one, clip=_CLIP * one, ends=ends)
        self.nll = None
        took(self, from_logits=True, fitted=False)

    def _gather(self, sample: Sample) -> Cells:
        """Each element, or of many count, positives and mean logit of those that are alike.

        Alike are the float32 numbers that differ in their last bits, so that logits of any scale
        stay apart; with a bias, of any size too, since their median is taken off first.
        """
        z, y, w = sample.logit.double(), sample.target, sample.weight
        if len(z) <= _MANY:
            return Cells(z, w, w * y)
        finite = z[z.isfinite()]
        middle = finite.median() if self.fit_bias and len(finite) else 0.0
        z = z - middle
        scale = float((finite - middle).abs().max()) if len(finite) else 1.0
        code = (z / (scale or 1.0)).float().view(torch.int32).bitwise_right_shift(_KEPT)
        code += 1 << (31 - _KEPT)
        sums = torch.zeros(3, 1 << (32 - _KEPT), dtype=torch.float64, device="cpu")
        for row, values in zip(sums, (w * z, w, w * y), strict=True):
            row.index_add_(0, code, values)
        logit, count, positive = sums[:, sums[1] > 0].unbind()
        return Cells(logit / count + middle, count, positive)

    def _fit(self, cells: list[Cells]) -> list[Fitted]:
        rates = self.flip_rates.detach().cpu().double().reshape(2, -1).unbind(1)
        fits = [
            _best_map(one, None if self.fit_flip_rates else pair, self.fit_bias)
            for one, pair in zip(cells, rates, strict=True)
        ]
        names = ("flip_rates", "clip", "temperature", "bias", "ends")
        for name, column in zip(
            names, zip(*(parts for _, parts, _ in fits), strict=True), strict=True
        ):
            store(self, **{name: torch.stack(column, -1).reshape(getattr(self, name).shape)})
        for limit in sorted({limit for _, _, limit in fits if limit}):
            _errors.warn(limit)
        return [fit for fit, _, _ in fits]

    def _map(self, x: Tensor) -> Tensor:
        ones = () if self.num_labels is None else (1,) * (x.dim() - 2)
        *line, ends = (
            part.to(x.dtype).reshape((*part.shape, *ones))
            for part in (self.flip_rates, self.clip, self.temperature, self.bias, self.ends)
        )
        if self.takes_logits:
            return _line(x, line)
        info = torch.finfo(x.dtype)
        high = (1 - x).clamp(min=info.eps * _HALF)
        return _line(torch.log(x.clamp(min=info.tiny)) - torch.log(high), line, ends)

    def extra_repr(self) -> str:
        if self.temperature.is_meta:
            return ""
        up, down = self.flip_rates
        rate = _shown(up) if torch.equal(up, down) else f"({_shown(up)}, {_shown(down)})"
        parts = [f"flip_rate={rate}", f"temperature={_shown(self.temperature)}"]
        if self.fit_bias or bool(self.bias.any()):
            parts.append(f"bias={_shown(self.bias)}")
        return ", ".join(filter(None, (*parts, super().extra_repr())))


def _line(z: Tensor, line: Sequence[Tensor], ends: Tensor | None = None) -> Tensor:
    rates, clip, temperature, bias = line
    answer = without_flip(z, rates[0], rates[1], clip) / temperature + bias
    return answer if ends is None else torch.minimum(torch.maximum(answer, ends[0]), ends[1])


def _best_map(
    cells: Cells, rates: Tensor | None, bias: bool
) -> tuple[Fitted, tuple[Tensor, ...], str]:
    """Flip rates, clip, temperature, bias and ends that minimise the loss; why it is at a limit."""
    rate = float(cells.positive.sum() / cells.count.sum())
    clip = cells.count.new_tensor(_CLIP * min(rate, 1 - rate))
    some = _part(cells, cells.count > 0)
    inner = _part(some, some.logit.isfinite())
    aim = inner if len(inner.logit) == len(some.logit) or _enough(inner, bias) else _stand_in(some)
    aim = aim if _enough(aim, bias) else _platt(aim)

    def best(rates: Tensor) -> tuple[float, float, float, str]:
        u = without_flip(aim.logit, rates[0], rates[1], clip)
        a, b, limit = _affine(aim._replace(logit=u), bias)
        return mean_loss([aim], [a * u + b]), a, b, limit

    if rates is None:
        rates = best_pair(lambda pair: best(cells.count.new_tensor(pair))[0])
    _, a, b, limit = best(rates)
    temperature, shift = cells.count.new_tensor([1 / a, b]).unbind()
    line = (rates, clip, temperature, shift)
    ends = _ends(some, lambda z: _line(z, line))
    fit = Fitted(_line(cells.logit, line, ends), aim, _line(aim.logit, line))
    return fit, (*line, ends), limit


def _part(cells: Cells, mask: Tensor) -> Cells:
    return Cells(*(part[mask] for part in cells))


def _enough(cells: Cells, bias: bool) -> bool:
    """Whether both classes have elements enough, and no threshold separates them.

    Of logits that are all alike, whose slope is nan, any number is enough.
    """
    positive, total = float(cells.positive.sum()), float(cells.count.sum())
    rarer, slope = min(positive, total - positive), affine(cells, bias=bias)[0]
    return rarer > 0 and (math.isnan(slope) or (rarer >= _FEW and not math.isinf(slope)))


def _platt(cells: Cells) -> Cells:
    """The same elements with Platt's targets instead of 0 and 1."""
    positive, total = cells.positive.sum(), cells.count.sum()
    low, high = 1 / (total - positive + 2), (positive + 1) / (positive + 2)
    return cells._replace(positive=low * (cells.count - cells.positive) + high * cells.positive)


def _surest(cells: Cells) -> tuple[float, float]:
    """The least and the largest finite logit; 0 if there is none."""
    finite = cells.logit[cells.logit.isfinite()]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def _stand_in(cells: Cells) -> Cells:
    """Infinite logits replaced: beyond the surest other one by the mean of what they can be."""
    low, high = _surest(cells)
    return cells._replace(logit=cells.logit.clamp(min(low, 0.0) - _SURE, max(high, 0.0) + _SURE))


def _ends(cells: Cells, answer: Callable[[Tensor], Tensor]) -> Tensor:
    """Calibrated logits of the exact probabilities 0 and 1: their shares of positives.

    They are no less sure than the surest other probability; infinite if there is no exact one.
    """
    bottom, top = answer(cells.logit.new_tensor(_surest(cells))).tolist()
    found = []
    for end, other, more in ((-math.inf, bottom, min), (math.inf, top, max)):
        n, k = (float(part[cells.logit == end].sum()) for part in (cells.count, cells.positive))
        found.append(more(math.log((k + 0.5) / (n - k + 0.5)), other) if n else end)
    return cells.logit.new_tensor(found)


def _affine(cells: Cells, bias: bool) -> tuple[float, float, str]:
    """Slope and intercept of the best line, for logits of any size and scale."""
    z, n = cells.logit, cells.count
    middle = float((n * z).sum() / n.sum()) if bias else 0.0
    # Compared, since the rounded mean of equal logits need not be equal to them.
    alike = not bool((z != (z[0] if bias else 0.0)).any())
    z = z - middle
    scale = 0.0 if alike else float(((n * z**2).sum() / n.sum()).sqrt())
    if scale == 0:
        return 1.0, affine(cells, slope=1.0, bias=bias)[1], ""
    a, b = affine(cells._replace(logit=z / scale), bias=bias)
    limit = ""
    if not _SLOPES[0] <= a <= _SLOPES[1]:
        limit = _BACKWARDS if a < 1 else _APART
        a = min(max(a, _SLOPES[0]), _SLOPES[1])
        b = affine(cells._replace(logit=z / scale), slope=a, bias=bias)[1]
    return a / scale, b - a * middle / scale, limit


def _shown(value: Tensor) -> str:
    each = [f"{one:.4g}" for one in value.reshape(-1).tolist()]
    if value.dim() == 0:
        return each[0]
    return f"[{', '.join(each if len(each) < 5 else (*each[:2], '...', each[-1]))}]"
