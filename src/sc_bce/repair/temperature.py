"""The parametric repair: a line through the logits, from which the flip is removed first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _errors
from .._torch import has_values, tracing
from ..measure.line import Cells, affine
from .fit import Fits, Repair, mean_loss
from .flip import best_pair, flip_rates, without_flip

__all__ = ["TemperatureScaling"]

_FEW = 20  # elements of the rarer class below which labels are too few to be believed
_CLIP = 1e-3  # share of the rarer class's base rate: the least probability after a removed flip
_SLOPES = (1e-3, 1e3)  # limits of 1 / temperature, for logits of standard deviation 1
_HALF = 1 / (4 * math.e)  # of the precision: a float just below 1 is half of it away
_BACKWARDS = "upper limit: the logits rank the labels backwards, if at all. Check sign and number"
_APART = "lower limit: a threshold all but separates the classes. Fit to more data"
_BUFFERS = ("flip_rates", "clip", "temperature", "bias", "ends")


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
        ends: the logits for which probabilities of 0 and 1 stand, if the fit had any; they bound
            the others. Otherwise infinite. A buffer of the shape of ``flip_rates``.
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

        *Exact 0 and 1* were rounded. The fit takes them for the logits that
        :class:`CalibrationHistogram` derives, which have no say in the slope unless too many are
        wrong, and so does the repair (see ``ends``). A 0 or 1 of which the fit had none is that of
        the input's precision, of at least float32: 1 stands for 1 - eps/(4e).

        Raw logits are fitted as they are, more than 10,000 of a label in some 40,000 cells, whose
        width follows the spread of the logits. nan stays nan; float16 answers end at 65504.
        Computed in at least float32. Works under compile, export and ONNX.

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
    _by_element = True
    _if_worse = "is its flip rate that of this network's training?"

    def __init__(
        self, flip_rate: float | Tensor | Sequence[float | Tensor] | None = 0.0, *,
        bias: bool = False, num_labels: int | None = None,
    ) -> None:  # fmt: skip
        labels = () if num_labels is None else (num_labels,)
        sizes = ((2, *labels), labels, labels, labels, (2, *labels))
        super().__init__(num_labels, **dict(zip(_BUFFERS, sizes, strict=True)))
        self.fit_flip_rates = flip_rate is None
        self.fit_bias = bool(bias)
        self._first = flip_rates(0.0 if flip_rate is None else flip_rate, self.num_labels)
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
        one = torch.ones(self.bias.shape, device="cpu")
        line = torch.tensor(self._first, device="cpu"), _CLIP * one, one, 0 * one
        ends = math.inf * torch.stack((-one, one))
        buffers = dict(zip(_BUFFERS, (*line, ends), strict=True))
        self.store(from_logits=True, fitted=False, **buffers)

    def _fit(self, cells: list[Cells], sure: Tensor) -> Fits:
        rates = self.flip_rates.detach().cpu().double().reshape(2, -1).unbind(1)
        aims, each = [_aim(one, self.fit_bias) for one in cells], []
        for aim, pair in zip(aims, rates, strict=True):
            each.append(_best_line(aim, None if self.fit_flip_rates else pair, self.fit_bias))
        lines, limits = zip(*each, strict=True)
        for limit in sorted(set(limits) - {""}):
            _errors.warn(f"The temperature is at its {limit}")
        ends = torch.stack([torch.stack(one.logit[one.count > 0].aminmax()) for one in cells])
        ends = torch.where(sure, ends, ends.new_tensor([-math.inf, math.inf])).T
        columns = (torch.stack(column, -1) for column in zip(*lines, strict=True))
        answers = [
            without_flip(aim.logit, rates[0], rates[1], clip) / temperature + bias
            for aim, (rates, clip, temperature, bias) in zip(aims, lines, strict=True)
        ]
        return answers, aims, dict(zip(_BUFFERS, (*columns, ends), strict=True))

    def _map(self, x: Tensor, most: float) -> Tensor:
        ones = () if self.num_labels is None else (1,) * (x.dim() - 2)
        buffers: list[Tensor] = [getattr(self, name).to(x.dtype) for name in _BUFFERS]
        shaped = (part.reshape((*part.shape, *ones)) for part in buffers)
        rates, clip, temperature, bias, ends = shaped
        if not self.takes_logits:
            info = torch.finfo(x.dtype)
            low, high = x.clamp(min=info.tiny), (1 - x).clamp(min=info.eps * _HALF)
            x = torch.log(low) - torch.log(high)
            x = torch.minimum(torch.maximum(x, ends[0]), ends[1])
        if self.removes_flip or not (torch.compiler.is_compiling() or tracing()):
            x = without_flip(x, rates[0], rates[1], clip)
        return x / temperature + bias

    def store(self, from_logits: bool, fitted: bool, **values: Tensor) -> None:
        super().store(from_logits, fitted, **values)
        # A graph can't look, and without a flip is a line: 8 bits would round exp(14) to nothing.
        known = has_values(self.flip_rates) and not self.fit_flip_rates
        self.removes_flip = not known or bool(self.flip_rates.any())

    def extra_repr(self) -> str:
        if self.temperature.is_meta:
            return ""
        up, down = self.flip_rates
        rate = _shown(up) if torch.equal(up, down) else f"({_shown(up)}, {_shown(down)})"
        parts = [f"flip_rate={rate}", f"temperature={_shown(self.temperature)}"]
        if self.fit_bias or bool(self.bias.any()):
            parts.append(f"bias={_shown(self.bias)}")
        return ", ".join(filter(None, (*parts, super().extra_repr())))


def _aim(cells: Cells, bias: bool) -> Cells:
    """The cells; with Platt's targets instead of 0 and 1 if these are few, or separable.

    Of logits that are all alike, whose slope is nan, any number is enough.
    """
    positive, total = cells.positive.sum(), cells.count.sum()
    slope, rarer = affine(cells, bias=bias)[0], min(float(positive), float(total - positive))
    if math.isnan(slope) or (rarer >= _FEW and not math.isinf(slope)):
        return cells
    low, high = 1 / (total - positive + 2), (positive + 1) / (positive + 2)
    return cells._replace(positive=low * (cells.count - cells.positive) + high * cells.positive)


def _best_line(aim: Cells, rates: Tensor | None, bias: bool) -> tuple[list[Tensor], str]:
    """Flip rates, clip, temperature and bias that minimise the loss; why it is at a limit."""
    rate = float(aim.positive.sum() / aim.count.sum())
    clip = aim.count.new_tensor(_CLIP * min(rate, 1 - rate))

    def best(rates: Tensor) -> tuple[float, float, float, str]:
        u = without_flip(aim.logit, rates[0], rates[1], clip)
        a, b, limit = _limited(aim._replace(logit=u), bias)
        return mean_loss([aim], [a * u + b]), a, b, limit

    rates = best_pair(lambda pair: best(pair)[0]) if rates is None else rates
    _, a, b, limit = best(rates)
    return [rates, clip, *aim.count.new_tensor([1 / a, b])], limit


def _limited(cells: Cells, bias: bool) -> tuple[float, float, str]:
    """Slope and intercept of the best line, within limits relative to the spread of the logits."""
    a, b = affine(cells, bias=bias)
    if math.isnan(a):
        return 1.0, affine(cells, slope=1.0, bias=bias)[1], ""
    share = cells.count / cells.count.sum()
    z = cells.logit - (share * cells.logit).sum() * bias
    low, high = (one / float((share * z**2).sum().sqrt()) for one in _SLOPES)
    if low <= a <= high:
        return a, b, ""
    end, limit = (low, _BACKWARDS) if a < low else (high, _APART)
    return end, affine(cells, slope=end, bias=bias)[1], limit


def _shown(value: Tensor) -> str:
    each = [f"{one:.4g}" for one in value.reshape(-1).tolist()]
    if value.dim() == 0:
        return each[0]
    return f"[{', '.join(each if len(each) < 5 else (*each[:2], '...', each[-1]))}]"
