"""Post-hoc calibration: maps of the logits, fitted to validation data or to their histogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import _batch, _checks
from ..measure import cells as _tally
from ..measure import scores as measures
from ..measure.histogram import CalibrationHistogram, by_label, holding
from ..measure.scores import Blocks, Cells

__all__ = ["IsotonicCalibration", "TemperatureScaling"]

Repair = TypeVar("Repair", bound="_Repair")

_CELLS = 10_000  # of the histogram that a repair is fitted to
_MANY = 1_000_000  # elements above which raw logits are first gathered into cells
_MANY_TIMES = 10_000  # the same if flip rates are searched for, which takes many passes
_CLIP = 1e-3  # share of the rarer class's base rate: the least probability after a removed flip
_SLOPES = (1e-3, 1e3)  # limits of 1 / temperature, which would be infinite on separable data
_COARSE = (0.0, 0.002, 0.01, 0.03, 0.08, 0.17, 0.3)  # flip rates at which a search starts
_FINEST = 1e-3  # last step of the search, in the root of a flip rate
_WORSE = 1e-6  # relative increase of the loss that rounding can cause
_BLOCK = 1 << 17  # logits that a curve is applied to at a time
_FEW = 1 << 12  # logits up to which it is applied in one pass
_CODES = 1 << 16  # values of a 16-bit floating-point type
_SUSPECT = 1000  # as in the histogram


class _Repair(nn.Module):
    """What the repairs share: a fit to cells, label by label, that changes all labels or none."""

    def __init__(self, num_labels: int | None) -> None:
        super().__init__()
        if num_labels is not None:
            _checks.positive_int("num_labels", num_labels)
        self.num_labels = None if num_labels is None else int(num_labels)
        self.nll: tuple[float, float] | None = None

    @torch.no_grad()
    def fit(
        self: Repair,
        logits: Tensor | CalibrationHistogram | _tally.Array,
        target: Tensor | _tally.Array | None = None,
        *,
        ignore_index: int | None = None,
    ) -> Repair:
        """Fit the calibration map to validation data, and return this module.

        Sets ``nll`` to the mean negative log-likelihood of these data before and after. If the
        fit makes it worse, there is a warning.

        Args:
            logits: a :class:`CalibrationHistogram` of the validation data; or the raw output of
                the network on them, of any shape (labels in dimension 1 with ``num_labels``).
            target: if logits are given, their labels: 0 and 1 in any dtype, of the same size.
                TemperatureScaling takes soft ones too. Default: None.
            ignore_index: target value of elements to leave out. Default: None.

        Raises:
            ValueError: sizes or numbers of labels differ; labels are illegal; a label has no
                element, or only one class; logits are not finite; the histogram holds nan. The
                module is then unchanged.
            TypeError: an argument has the wrong type.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram, IsotonicCalibration, TemperatureScaling
            >>> _ = torch.manual_seed(0)
            >>> truth = torch.randn(20000)
            >>> target = torch.rand(20000) < torch.sigmoid(truth)
            >>> scaling = TemperatureScaling().fit(3 * truth, target)  # from logits
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(3 * truth, target)
            >>> isotonic = IsotonicCalibration().fit(histogram)  # from a histogram
            >>> [[round(nll, 2) for nll in repair.nll] for repair in (scaling, isotonic)]
            [[0.77, 0.6], [0.77, 0.6]]
        """
        cells = self._evidence(logits, target, ignore_index)
        self._fit(cells)
        before = _mean_loss(cells, [one.logit for one in cells])
        after = _mean_loss(cells, self._answers(cells))
        self.nll = (before, after)
        if after > before * (1 + _WORSE) + 1e-12:
            _checks.warn(
                f"This {type(self).__name__} raises the NLL of the data that it is fitted to: "
                f"{after:.4g} instead of {before:.4g}; {self._if_worse}"
            )
        return self

    _if_worse = ""
    _gather_from = _MANY

    def _fit(self, cells: list[Cells]) -> None:
        raise NotImplementedError

    def _answers(self, cells: list[Cells]) -> list[Tensor]:
        # The cells are on the CPU, in float64, which the module's device may not have.
        buffers = {name: part.cpu() for name, part in self.named_buffers()}

        def answer(z: Tensor) -> Tensor:
            calibrated: Tensor = torch.func.functional_call(self, buffers, (z,))
            return calibrated

        if self.num_labels is None:
            return [answer(cells[0].logit)]
        return [
            answer(one.logit.new_zeros(1, self.num_labels, len(one.logit)).copy_(one.logit))[0, i]
            for i, one in enumerate(cells)
        ]

    def _evidence(self, logits: object, target: object, ignore_index: int | None) -> list[Cells]:
        if isinstance(logits, CalibrationHistogram):
            cells, name = self._of_histogram(logits, target), "histogram"
        else:
            cells, name = self._of_pair(logits, target, ignore_index), "target"
        for label, one in enumerate(cells):
            both_classes(one, name, None if self.num_labels is None else label)
        return cells

    def _of_pair(self, logits: object, target: object, ignore_index: int | None) -> list[Cells]:
        if target is None and not isinstance(_tally.tensor(logits, "logits"), Tensor):
            raise TypeError(
                _checks.sentence(
                    "logits",
                    "be a CalibrationHistogram, or a Tensor beside its `target`",
                    _checks.describe(logits),
                    "update a histogram with each batch and pass it",
                )
            )
        if target is None:
            raise TypeError(
                _checks.sentence(
                    "target",
                    "be the labels of the logits",
                    "None",
                    "pass `fit(logits, target)`, or a CalibrationHistogram alone",
                )
            )
        z, y = _tally.pair(logits, target, "logits")
        ignore_index = _checks.ignore_index(ignore_index)
        rows = (by_label(part, self.num_labels, "logits").unbind() for part in (z, y))
        return [self._of_logits(x, label, ignore_index) for x, label in zip(*rows, strict=True)]

    def _of_histogram(self, histogram: CalibrationHistogram, target: object) -> list[Cells]:
        if target is not None:
            raise TypeError(
                _checks.sentence(
                    "target",
                    "be None beside a CalibrationHistogram, which holds the labels",
                    _checks.describe(target),
                    "pass `fit(histogram)`",
                )
            )
        if histogram.num_labels != self.num_labels:
            raise ValueError(
                _checks.sentence(
                    "histogram",
                    f"have num_labels={self.num_labels}",
                    f"num_labels={histogram.num_labels}",
                    "build both with the same number, or pass `histogram.pooled()`",
                )
            )
        rows = histogram.cells_by_label()
        for one in rows:
            if bool(one.count.isnan().any()):
                raise ValueError(
                    _checks.sentence(
                        "histogram",
                        "hold finite counts and sums",
                        "nan",
                        "it has seen nan, or labels other than 0 and 1, on an accelerator",
                    )
                )
        return rows

    def _valid(self, z: Tensor, y: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
        """The elements that count, checked, where sums can be formed."""
        z, y = z.reshape(-1), y.reshape(-1)
        if ignore_index is not None:
            valid = _batch.valid_elements(y, ignore_index)
            z, y = z[valid], y[valid]
        home = _batch.home(z.device)
        z, y = z.to(home), y.to(home)
        validation_data(z, y)
        return z, y

    def _of_logits(self, z: Tensor, y: Tensor, ignore_index: int | None) -> Cells:
        z, y = self._valid(z, y, ignore_index)
        cells = (
            _gathered(z, y)
            if len(z) > self._gather_from
            else Cells(z.double(), torch.ones_like(z, dtype=torch.float64), y.double())
        )
        cells = Cells(*(part.cpu() for part in cells))
        suspect(cells)
        return cells


class TemperatureScaling(_Repair):
    r"""Temperature scaling and Platt scaling: calibrate logits after training, flip removed first.

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
    side unclipped.

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
        nll: mean negative log-likelihood of the fitted data before and after; None before a fit.

    Shape:
        - logits: any; (N, num_labels, ...) with ``num_labels``.
        - Returns: the same, in the same dtype.

    Raises:
        ValueError: ``flip_rate`` is outside [0, 1/2), or a pair sums to 1 or more.
        TypeError: ``flip_rate`` has another type.

    Note:
        A temperature and equal flip rates never change the decision at 1/2. Unequal flip rates
        and a bias move it to where the repaired probability is 1/2. With ``bias=True``, logits
        that are all alike determine no temperature: it stays 1, and only the bias is fitted. The
        temperature stays in [0.001, 1000]. The fit gathers more than a million raw logits into
        the cells of a histogram first. nan stays nan. Computed in at least float32. The module
        works under compile, export and ONNX, so that it can be shipped with the model.

    References:
        Guo et al., ICML 2017 (temperature scaling); Platt 1999 (with a bias).

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
        # A search takes a hundred passes or so over the data.
        self._gather_from = _MANY_TIMES if self.fit_flip_rates else _MANY
        self._given = _flip_rates(0.0 if flip_rate is None else flip_rate, self.num_labels)
        shape = () if self.num_labels is None else (self.num_labels,)
        self.register_buffer("flip_rates", torch.empty(2, *shape))
        for name in ("temperature", "bias", "clip"):
            self.register_buffer(name, torch.empty(shape))
        self.reset_parameters()

    @property
    def flip_rate(self) -> Tensor:
        """The flip rate that is removed, if it is the same for both labels.

        Raises:
            ValueError: the two rates differ.

        Example:
            >>> from sc_bce import SCBCEWithLogitsLoss, TemperatureScaling
            >>> criterion = SCBCEWithLogitsLoss.label_smoothing(0.1)
            >>> TemperatureScaling(criterion.flip_rates).flip_rate
            tensor(0.0500)
        """
        up, down = self.flip_rates.unbind()
        if not torch.equal(up, down):
            raise ValueError("The flip rates of the two labels differ: read `flip_rates`")
        return up

    @torch.no_grad()
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
        given = torch.tensor(self._given, device="cpu")
        self.flip_rates.copy_(given.view_as(self.flip_rates))
        self.temperature.fill_(1.0)
        self.bias.fill_(0.0)
        self.clip.fill_(_CLIP)
        self.nll = None

    def _fit(self, cells: list[Cells]) -> None:
        rates = self.flip_rates.detach().cpu().double().reshape(2, -1)
        fitted = [
            _best_map(one, None if self.fit_flip_rates else rates[:, i], self.fit_bias)
            for i, one in enumerate(cells)
        ]
        for name, column in zip(
            ("flip_rates", "clip", "temperature", "bias"), zip(*fitted, strict=True), strict=True
        ):
            buffer = getattr(self, name)
            buffer.copy_(torch.stack(column, -1).reshape(buffer.shape))

    def forward(self, logits: Tensor) -> Tensor:
        _batch.logits(logits, "logits")
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        (up, down), clip, temperature, bias = (
            part.to(z.dtype)
            if self.num_labels is None
            else part.to(z.dtype).reshape(*part.shape, *(1 for _ in z.shape[2:]))
            for part in (self.flip_rates, self.clip, self.temperature, self.bias)
        )
        if self.num_labels is not None:
            by_label(z, self.num_labels, "logits")
        return (_without_flip(z, up, down, clip) / temperature + bias).to(logits.dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Version 0.1 had one flip rate, no bias, and this clip.
        rate = state_dict.pop(prefix + "flip_rate", None)
        if isinstance(rate, Tensor):
            state_dict[prefix + "flip_rates"] = rate.expand(self.flip_rates.shape).clone()
            for name, value in (("bias", 0.0), ("clip", _CLIP)):
                state_dict[prefix + name] = rate.new_full(self.bias.shape, value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        if self.temperature.is_meta:
            return ""
        up, down = self.flip_rates
        rate = _shown(up) if torch.equal(up, down) else f"({_shown(up)}, {_shown(down)})"
        parts = [f"flip_rate={rate}", f"temperature={_shown(self.temperature)}"]
        if self.fit_bias or bool(self.bias.any()):
            parts.append(f"bias={_shown(self.bias)}")
        return ", ".join(parts + _repr_of(self))


class IsotonicCalibration(_Repair):
    r"""Isotonic regression: calibrate logits after training by the best monotone curve.

    Pool-adjacent-violators on the cells of a :class:`CalibrationHistogram`, for any number of
    pixels and processes at constant memory. Neighbouring cells whose share of positives would
    fall are pooled into blocks. Each cell gets the logit of its block's share; an empty cell gets
    a value on the straight line between its neighbours. Applying the curve is a look-up in this
    table of one value per cell:

    .. math::
        \mathrm{calibrated\ logit} = v_{\mathrm{cell}(z)}, \qquad
        v_i = \mathrm{logit}\,\frac{\text{positives in the block of } i}
        {\text{elements in the block of } i}

    Special cases: before :meth:`fit` it returns logits unchanged to within the width of a cell,
    up to where the cells end. Logits outside the fitted range get the value of the nearest block.

    Args:
        num_labels: number of labels in dimension 1, each with its own curve. Default: None.

    Attributes:
        table: calibrated logit of each cell, a buffer of shape (cells,) or (num_labels, cells).
        nll: mean negative log-likelihood of the fitted data before and after; None before a fit.

    Shape:
        - logits: any; (N, num_labels, ...) with ``num_labels``.
        - Returns: the same, in the same dtype.

    Raises:
        ValueError: ``num_labels`` is not positive.
        TypeError: ``num_labels`` is not an int or None.

    Note:
        The result is finite for every logit except nan, which stays nan: a first block of n
        elements without a positive counts as half a positive in n + 1, and a last one without a
        negative as half a negative. The decision at 1/2 moves to where the repaired probability
        is 1/2. The curve is made of steps, so the order within a block is lost and no gradient
        passes. It needs more data than a line: with few images take :class:`TemperatureScaling`
        with ``bias=True``. Computed in at least float32. The module works under compile, export
        and ONNX.

    References:
        Zadrozny and Elkan, KDD 2002 (isotonic); Ayer et al. 1955 (the algorithm).

    Example:
        >>> import torch
        >>> from sc_bce import CalibrationHistogram, IsotonicCalibration
        >>> _ = torch.manual_seed(0)
        >>> truth = torch.randn(20000)
        >>> target = torch.rand(20000) < torch.sigmoid(truth)
        >>> histogram = CalibrationHistogram()
        >>> histogram.update(3 * truth, target)  # logits three times too large
        >>> repair = IsotonicCalibration().fit(histogram)
        >>> after = CalibrationHistogram()
        >>> after.update(repair(3 * truth), target)
        >>> round(float(histogram.ece()), 2), round(float(after.ece()), 2)
        (0.16, 0.0)
    """

    table: Tensor
    _if_worse = "the data are too few for a curve; take TemperatureScaling(bias=True)"

    def __init__(self, num_labels: int | None = None) -> None:
        super().__init__(num_labels)
        self._grid = _tally.grid(_CELLS)
        labels = () if self.num_labels is None else (self.num_labels,)
        self.register_buffer("table", torch.empty(*labels, 2 * self._grid.size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget the fit. Also call it after ``to_empty``, which leaves the table unfilled.

        Example:
            >>> from sc_bce import IsotonicCalibration
            >>> isotonic = IsotonicCalibration()
            >>> isotonic.reset_parameters()
            >>> isotonic.nll is None
            True
        """
        # Expanded here: XLA's copy_ would take the smaller shape over instead of filling its own.
        self.table.copy_(_centres(self._grid).expand_as(self.table))
        self.nll = None

    def _of_logits(self, z: Tensor, y: Tensor, ignore_index: int | None) -> Cells:
        z, y = self._valid(z, y, ignore_index)
        counted = _tally.count(_CELLS, z[None], y[None], True, None)
        (cells,) = holding(counted, None, _CELLS).cells_by_label()
        suspect(cells)
        return cells

    def _of_histogram(self, histogram: CalibrationHistogram, target: object) -> list[Cells]:
        if histogram.num_cells != _CELLS:
            raise ValueError(
                _checks.sentence(
                    "histogram",
                    f"have num_cells={_CELLS}",
                    f"num_cells={histogram.num_cells}",
                    "build it without `num_cells`",
                )
            )
        return super()._of_histogram(histogram, target)

    def _fit(self, cells: list[Cells]) -> None:
        self.table.copy_(torch.stack([_curve(one) for one in cells]).reshape(self.table.shape))

    def forward(self, logits: Tensor) -> Tensor:
        _batch.logits(logits, "logits")
        if self.num_labels is not None:
            by_label(logits, self.num_labels, "logits")
        if _in_blocks(logits, self.table):
            many = logits.numel() > 4 * _CODES * (self.num_labels or 1)
            return (self._look_up if many and logits.itemsize == 2 else self._read)(logits)
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        size = z.abs()
        place = self._grid.coordinate(size, torch.sigmoid(-size))
        # nan has no cell: any will do, since its value is replaced below.
        half = self.table.shape[-1] // 2
        cell = place.nan_to_num(0.0).to(torch.int64).clamp(0, half - 1)
        index = torch.where(z >= 0, half + cell, half - 1 - cell)
        if self.num_labels is not None:
            first = torch.arange(self.num_labels, device=z.device) * (2 * half)
            index = index + first.reshape(-1, *(1 for _ in z.shape[2:]))
        answer = self.table.to(z.dtype).reshape(-1)[index]
        return torch.where(z.isnan(), z, answer).to(logits.dtype)

    def _look_up(self, logits: Tensor) -> Tensor:
        """The same values for 16-bit logits: calibrate all 65,536 of them once, then look up."""
        labels = self.num_labels or 1
        first = torch.arange(labels, dtype=torch.int32, device="cpu").mul_(_CODES).add_(_CODES // 2)
        codes = torch.arange(_CODES, dtype=torch.int32, device="cpu").sub_(_CODES // 2)
        every = codes.to(torch.int16).view(logits.dtype)
        if self.num_labels is not None:
            every = every.view(-1, 1).expand(-1, labels)
        table = self._read(every).view(_CODES, labels).t().reshape(-1)
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        shape = (-1, 1, 1) if self.num_labels is None else (len(logits), labels, -1)
        samples, results = logits.detach().view(torch.int16).reshape(shape), result.view(shape)
        rows = max(_BLOCK * len(samples) // logits.numel(), 1)
        work = torch.empty(samples[:rows].numel(), dtype=torch.int32, device="cpu")
        for some, answer in zip(
            torch.split(samples, rows), torch.split(results, rows), strict=True
        ):
            index = work[: some.numel()].view(some.shape).copy_(some).add_(first.view(-1, 1))
            torch.index_select(table, 0, index.view(-1), out=answer.view(-1))
        return result

    def _read(self, logits: Tensor) -> Tensor:
        """The same values by the same arithmetic, block by block in a few buffers."""
        labels = self.num_labels or 1
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)
        # With num_labels, blocks of whole samples.
        shape = (-1,) if self.num_labels is None else (len(logits), labels, -1)
        samples, results = logits.detach().reshape(shape), result.view(shape)
        rows = max(_BLOCK * len(samples) // max(logits.numel(), 1), 1)
        half, table = self.table.shape[-1] // 2, self.table.detach().reshape(-1)
        first = (
            torch.arange(labels, dtype=torch.int32, device="cpu")
            .mul_(2 * half)
            .add_(half)
            .view(-1, 1)
        )
        buffers = [torch.empty(samples[:rows].numel(), device="cpu") for _ in range(4)]
        for some, answer in zip(
            torch.split(samples, rows), torch.split(results, rows), strict=True
        ):
            z, size, place, work = (one[: some.numel()].view(some.shape) for one in buffers)
            torch.abs(z.copy_(some), out=size)
            _place(self._grid, size, place, work)
            # Through int32 to an index, counted from the middle to the right or to the left.
            cell = work.view(torch.int32).copy_(place).clamp_(0, half - 1)
            negative = z.add_(0.0).view(torch.int32)  # -0.0 becomes 0.0, which is not negative
            cell ^= negative.bitwise_right_shift_(31)
            cell.add_(first if labels > 1 else half)
            index = cell.view(-1)
            values = torch.index_select(table, 0, index, out=place.view(-1)).view(some.shape)
            if not bool(size.amax() >= 0):
                values = torch.where(some.isnan(), some, values)
            answer.copy_(values)
        return result

    def extra_repr(self) -> str:
        labels = [] if self.num_labels is None else [f"num_labels={self.num_labels}"]
        return ", ".join(labels + _repr_of(self))


def _in_blocks(logits: Tensor, table: Tensor) -> bool:
    """Whether these are ordinary CPU tensors of which no derivative is needed."""
    return (
        not torch.compiler.is_compiling()
        and type(logits) is Tensor
        and logits.device.type == table.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and table.dtype == torch.float32
        and logits.numel() > _FEW
        and not (torch.is_grad_enabled() and (logits.requires_grad or table.requires_grad))
        and forward_ad.unpack_dual(logits).tangent is None  # type: ignore[no-untyped-call]
        and not _batch._transformed()
    )


def _place(cells: _tally.Grid, size: Tensor, place: Tensor, work: Tensor) -> None:
    """`Grid.coordinate` in place, with the same rounding."""
    torch.neg(size, out=place).sigmoid_().mul_(-2 * cells.half)
    place.add_(cells.half + _tally.slack(2 * cells.half, size.dtype)).clamp_(max=cells.inner)
    torch.clamp(size, cells.start, cells.bend, out=work)
    place.add_(work.sub_(cells.start).mul_(cells.fine))
    if not bool(size.amax() <= cells.bend):
        torch.clamp(size, cells.bend, cells.end, out=work)
        place.add_(work.sub_(cells.bend).mul_(cells.wide))


# --- data of a fit --------------------------------------------------------------------------------


def validation_data(logits: Tensor, target: Tensor) -> None:
    """Refuse logits and labels that no repair can be fitted to; waits for their values."""
    if not len(target):
        raise ValueError(
            _checks.sentence(
                "target",
                "hold an element to fit to",
                "none",
                "drop a void label that is not one, or pass more data",
            )
        )
    if not bool(logits.isfinite().all()):
        raise ValueError(
            _checks.sentence(
                "logits",
                "be finite",
                "inf or nan",
                "the model has diverged, or a void element lacks its `ignore_index`",
            )
        )
    illegal = ~((target >= 0) & (target <= 1))
    if bool(illegal.any()):
        raise ValueError(
            _checks.sentence(
                "target",
                "be in [0, 1]",
                f"{target[illegal][0].item():g}",
                "for a 0/255 mask pass `mask > 0` or `mask / 255`, and name a void label with "
                "`ignore_index`",
            )
        )


def suspect(cells: Cells) -> None:
    """Warn if the logits look like probabilities."""
    if cells.count.sum() >= _SUSPECT and measures.like_probabilities(cells.logit, cells.count):
        _checks.warn(
            "All logits of this fit lie in [0, 1], as if they were probabilities; pass the output "
            "of the network before the sigmoid, or `torch.logit(probabilities)`"
        )


def both_classes(cells: Cells, name: str, label: int | None) -> None:
    of = "" if label is None else f" of label {label}"
    total, positive = float(cells.count.sum()), float(cells.positive.sum())
    if total == 0:
        raise ValueError(
            _checks.sentence(name, f"hold an element{of} to fit to", "none", "update it first")
        )
    if not 0 < positive < total:
        raise ValueError(
            _checks.sentence(
                name,
                f"hold both classes{of}",
                f"only {positive / total:g}",
                "fit to validation data with positives and negatives",
            )
        )


def _mean_loss(cells: list[Cells], answers: list[Tensor]) -> float:
    total = loss = 0.0
    for one, z in zip(cells, answers, strict=True):
        total += float(one.count.sum())
        loss += float((one.count * F.softplus(z) - one.positive * z).sum())
    return loss / total


def _gathered(z: Tensor, y: Tensor) -> Cells:
    """Count, sum of labels and mean logit in each cell of a histogram, block by block."""
    cells = _tally.grid(_CELLS)
    count, positive, logit = z.new_zeros(3, 2 * cells.size, dtype=torch.float64).unbind()
    blocks = (torch.split(part, _tally._BLOCK) for part in (z, y))
    for some, labels in zip(*blocks, strict=True):
        x = some.double()
        place = cells.coordinate(x.abs(), torch.sigmoid(-x.abs())).to(torch.int64)
        index = torch.where(x >= 0, cells.size + place, cells.size - 1 - place)
        for sums, values in ((count, torch.ones_like(x)), (positive, labels.double()), (logit, x)):
            sums.index_add_(0, index, values)
    return Cells(torch.where(count > 0, logit / count, 0.0), count, positive)


# --- the parametric map ---------------------------------------------------------------------------


def _flip_rates(value: object, num_labels: int | None) -> list[list[float]]:
    """Check `flip_rate`; return a row of rates for the negatives and one for the positives."""
    pair = isinstance(value, (tuple, list))
    rates: list[object] = list(value) if pair else [value, value]  # type: ignore[call-overload]
    if len(rates) != 2:
        raise ValueError(
            _checks.sentence(
                "flip_rate",
                "be a number or a pair (g0, g1)",
                f"{len(rates)} values",
                "pass the rate of the negatives, then that of the positives",
            )
        )
    labels = num_labels or 1
    rows = []
    for rate in rates:
        several = num_labels is not None and isinstance(rate, Tensor) and rate.shape == (labels,)
        if isinstance(rate, Tensor) and rate.dim() and not several:
            raise TypeError(
                _checks.sentence(
                    "flip_rate",
                    "hold numbers" + (f", or tensors of shape ({labels},)" if num_labels else ""),
                    f"a tensor of shape {tuple(rate.shape)}",
                    "pass `num_labels` for a rate of each label, and a pair as a tuple (g0, g1)",
                )
            )
        each: list[object] = list(rate) if several else [rate] * labels  # type: ignore[call-overload]
        rows.append([_checks.unit_number("flip_rate", one, 1.0 if pair else 0.5) for one in each])
    for up, down in zip(*rows, strict=True):
        if up + down >= 1:
            raise ValueError(
                _checks.sentence(
                    "flip_rate",
                    "be below 1/2, so that labels carry information"
                    if not pair
                    else "sum to less than 1, so that labels carry information",
                    up if not pair else (up, down),
                    "it is `criterion.flip_rates` of the training",
                )
            )
    return rows


def _without_flip(z: Tensor, up: Tensor, down: Tensor, clip: Tensor) -> Tensor:
    """logit((s - up) / (1 - up - down)) with s = sigmoid(z), between the logits of the clip.

    With r = g / (1 - g), that is z + log(1 - up) - log(1 - down) + log(1 - r_up e^-z)
    - log(1 - r_down e^z). The last two are one logarithm, computed for |z| on the side of z. So
    the result is exact if no flip is removed; at equal rates 0 stays 0 and no logit shrinks.
    """
    # A side without a flip is unchanged.
    removed = 1 - up - down
    low = torch.where(up > 0, _logit(up + removed * clip), -torch.inf)
    high = torch.where(down > 0, -_logit(down + removed * clip), torch.inf)
    z = torch.minimum(torch.maximum(z, low), high)
    right = z >= 0
    near, far = torch.where(right, down, up), torch.where(right, up, down)
    near_odds, far_odds = near / (1 - near), far / (1 - far)
    size = torch.where(right, z, -z)  # abs has no gradient at 0
    # If a flip is removed, no logit is beyond this; otherwise the term is 0 anyway.
    up_e = torch.exp(size.clamp(max=60.0))
    gain = near_odds * (up_e - 1 / up_e) + (near_odds - far_odds) / up_e
    rest = 1 - near_odds * up_e
    wide = size + ((torch.log1p(-far) - torch.log1p(-near)) + torch.log1p(gain / rest))
    u = torch.where(right, wide, -wide)
    bound = -_logit(clip)
    u = torch.maximum(u, torch.where(up > 0, -bound, -torch.inf))
    return torch.minimum(u, torch.where(down > 0, bound, torch.inf))


def _logit(p: Tensor) -> Tensor:
    """torch.logit, which ONNX does not have."""
    return torch.log(p) - torch.log1p(-p)


def _best_map(cells: Cells, rates: Tensor | None, bias: bool) -> tuple[Tensor, ...]:
    """Flip rates, clip, temperature and bias that minimise the loss."""
    filled = cells.count > 0
    cells = Cells(*(part[filled] for part in cells))
    rate = float(cells.positive.sum() / cells.count.sum())
    clip = cells.count.new_tensor(_CLIP * min(rate, 1 - rate))

    def line(rates: Tensor) -> tuple[float, float, float]:
        u = _without_flip(cells.logit, rates[0], rates[1], clip)
        a, b = measures.affine(cells._replace(logit=u), bias=bias, limits=_SLOPES)
        if a != a:  # all logits alike
            a, b = measures.affine(cells._replace(logit=u), slope=1.0, bias=bias)
        z = a * u + b
        loss = (cells.count * F.softplus(z) - cells.positive * z).sum() / cells.count.sum()
        return float(loss), a, b

    if rates is None:
        rates = _search(lambda pair: line(cells.count.new_tensor(pair))[0])
    _, a, b = line(rates)
    return rates, clip, cells.count.new_tensor(1 / a), cells.count.new_tensor(b)


def _search(loss: Any) -> Tensor:
    """The pair of flip rates with the lowest loss: from a coarse grid, in ever smaller steps.

    The steps are in the roots of the rates, since 0.001 matters as much as 0.1.
    """
    tried: dict[tuple[float, float], float] = {}

    def at(roots: tuple[float, float]) -> float:
        if roots not in tried:
            # Rounded to float32, as the module will hold them.
            pair = torch.tensor([root**2 for root in roots], device="cpu").double().tolist()
            tried[roots] = loss(pair)
        return tried[roots]

    starts = [(up**0.5, down**0.5) for up in _COARSE for down in _COARSE]
    best, step = min(starts, key=at), 0.05
    while step > _FINEST:
        around = [
            (min(max(best[0] + i * step, 0.0), 0.7), min(max(best[1] + j * step, 0.0), 0.7))
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
        new = min(around, key=at)
        step, best = (step / 2, best) if at(new) >= at(best) else (step, new)
    return torch.tensor([root**2 for root in best], dtype=torch.float32, device="cpu").double()


# --- the isotonic curve ---------------------------------------------------------------------------


def _centres(cells: _tally.Grid) -> Tensor:
    """The logit at the centre of each cell, from the surest negative to the surest positive."""
    _, middle = cells.logits()
    return torch.cat((-middle.flip(0), middle))


def _curve(cells: Cells) -> Tensor:
    blocks = measures.isotonic(cells.count, cells.positive)
    return steps(cells, blocks, torch.logit(shares(blocks)))


def steps(cells: Cells, blocks: Blocks, values: Tensor) -> Tensor:
    """One value per cell: that of its block, with straight lines across empty cells."""
    filled = torch.nonzero(cells.count > 0).flatten()
    owner = torch.searchsorted(torch.tensor(blocks.first, device="cpu"), filled, right=True) - 1
    return _through(
        filled.double(), values[owner], torch.arange(len(cells.count), device="cpu").double()
    )


def _through(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Straight lines through points in order of x, constant beyond the first and the last."""
    if len(x) == 1:
        return y.expand(at.shape)
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    rest = ((at - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    return torch.lerp(y[right - 1], y[right], rest)


def shares(blocks: Blocks) -> Tensor:
    """Share of positives in each block; never 0 or 1, for which one miss costs an infinite NLL."""
    n, k = (
        torch.tensor(part, dtype=torch.float64, device="cpu")
        for part in (blocks.count, blocks.positive)
    )
    share = k / n
    if len(share) == 1:
        return (k + 0.5) / (n + 1)
    if share[0] == 0:
        share[0] = torch.minimum(0.5 / (n[0] + 1), share[1])
    if share[-1] == 1:
        share[-1] = torch.maximum((n[-1] + 0.5) / (n[-1] + 1), share[-2])
    return share


# --- text -----------------------------------------------------------------------------------------


def _shown(value: Tensor) -> str:
    each = [f"{one:.4g}" for one in value.reshape(-1).tolist()]
    if value.dim() == 0:
        return each[0]
    return f"[{', '.join(each if len(each) < 5 else (*each[:2], '...', each[-1]))}]"


def _repr_of(module: _Repair) -> list[str]:
    if module.nll is None:
        return []
    return ["nll={:.4f} -> {:.4f}".format(*module.nll)]
