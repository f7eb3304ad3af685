"""Streaming, exact and mergeable measurement of calibration for binary and dense predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _batch, _checks
from . import cells as _tally
from . import scores as measures
from .scores import Bins, Cells, Decomposition, Reliability

__all__ = ["CalibrationHistogram"]

_SUSPECT = 1000  # elements from which logits that all lie in [0, 1] are not an accident
_KINDS = ("top_label", "positive_class")
_SCORES = ("log", "brier")


class CalibrationHistogram:
    r"""Measure calibration: expected calibration error (ECE), reliability, NLL, in fixed memory.

    A binary prediction :math:`p` with outcome :math:`y` is read in one of two ways, chosen by
    ``kind``. With ``"top_label"`` (the default, as in the paper) the confidence is
    :math:`\max(p, 1-p)` and the outcome is whether the prediction :math:`p \ge 1/2` is right.
    With ``"positive_class"`` the confidence is :math:`p` and the outcome :math:`y`. If positives
    are rare, read the second: the first hides them. With :math:`n_m` of :math:`n` elements in bin
    :math:`m`,

    .. math::
        \mathrm{ECE} = \sum_m \tfrac{n_m}{n} |\mathrm{acc}_m - \mathrm{conf}_m|, \qquad
        \mathrm{OE} = \sum_m \tfrac{n_m}{n}\, \mathrm{conf}_m
        \max(\mathrm{conf}_m - \mathrm{acc}_m, 0).

    Each element falls into one of many fine cells, which hold int64 counts and float64 sums of
    the doubt :math:`\min(p, 1-p)`. NLL and Brier score are summed separately. Accuracy,
    confidence, NLL and Brier score are therefore exact, and so is every measure on equal-width
    bins whose number divides ``num_cells`` and is at most an eighth of it. With other numbers of
    bins, a cell that a bin edge cuts goes whole into the bin of its centre, which changes the ECE
    by at most twice the share of the elements in such cells. Equal-mass bins
    (:meth:`adaptive_ece`, :meth:`sweep_ece`) hold whole cells: the elements of one cell are ties.
    The outermost cells at either end are even in the logit, so that the predictions of a
    saturated network can still be repaired (:class:`IsotonicCalibration`,
    :class:`TemperatureScaling`).

    Args:
        num_labels: number of labels in dimension 1, each measured separately; every result then
            has shape (num_labels,), and :meth:`pooled` measures them together. None: all elements
            are one label. Default: None.
        num_cells: cells over [0, 1], an even number. Default: 10,000 (0.36 MB per label).

    Raises:
        ValueError: ``num_cells`` is not even and positive; ``num_labels`` is not positive.
        TypeError: one of them is not an int.

    Note:
        The state is kept on the device of the last update's input (on the CPU if that device has
        no float64); updates never make an accelerator wait. A value on an inner bin edge, within
        two units of its precision, belongs to the bin farther from 1/2, so that p = 0.1 and
        p = 0.9 are the same confidence; p = 1 belongs to the last bin. Elements are evaluated in
        the input's precision, at least float32, so that small losses keep their digits, and
        summed in float64. Measures are float64 tensors, 0-d without ``num_labels``, and nan
        before the first update. If 1000 or more logits all lie in [0, 1], spread over it or
        crowded at one end, they look like probabilities: the first measure then warns, once. On
        an accelerator that is the first measure that reads the cells: the slope, the
        decomposition, a report or a repair.

    References:
        Guo et al., ICML 2017 (ECE, MCE); Thulasidasan et al., NeurIPS 2019 (OE); Nixon et al.,
        CVPR Workshops 2019 (adaptive); Roelofs et al., AISTATS 2022 (sweep); Kumar et al.,
        NeurIPS 2019 (debiased); Cox 1958, Van Calster et al. 2019 (slope and intercept);
        Dimitriadis, Gneiting and Jordan, PNAS 2021 (decomposition).

    Example:
        >>> import torch
        >>> from sc_bce import CalibrationHistogram
        >>> histogram = CalibrationHistogram()
        >>> for logits, target in [(torch.tensor([2.0, -2.0]), torch.tensor([1, 1])),
        ...                        (torch.tensor([[3.0]]), torch.tensor([[1]]))]:
        ...     histogram.update(logits, target)
        >>> histogram
        CalibrationHistogram(num_cells=10000, count=3)
        >>> histogram.accuracy()
        tensor(0.6667, dtype=torch.float64)
        >>> histogram.ece(num_bins=10)
        tensor(0.2697, dtype=torch.float64)
    """

    def __init__(self, num_labels: int | None = None, *, num_cells: int = 10_000) -> None:
        _checks.positive_int("num_cells", num_cells)
        if num_cells % 2:
            raise ValueError(
                _checks.sentence(
                    "num_cells",
                    "be even, so that 1/2 is a cell's edge",
                    num_cells,
                    f"pass {num_cells + 1}",
                )
            )
        if num_labels is not None:
            _checks.positive_int("num_labels", num_labels)
        self.num_labels = None if num_labels is None else int(num_labels)
        self.num_cells = int(num_cells)
        self._grid = _tally.grid(self.num_cells)
        self._state = _tally.nothing(self.num_labels or 1, self._grid.size)
        self._only_logits = True  # so far; they may turn out to be probabilities
        self._looked = False

    # --- what is seen -----------------------------------------------------------------------------

    @torch.no_grad()
    def update(
        self,
        input: Tensor | _tally.Array,
        target: Tensor | _tally.Array,
        *,
        from_logits: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        """Add a batch of predictions.

        Args:
            input: logits, or probabilities with ``from_logits=False``; a Tensor of any shape and
                device, or a NumPy array. With ``num_labels``, dimension 1 holds the labels.
            target: 0 and 1 in any dtype, of the same size.
            from_logits: whether ``input`` holds logits. Default: True.
            ignore_index: target value of elements to leave out. Default: None.

        Raises:
            ValueError: sizes differ, or dimension 1 is not ``num_labels``; labels other than 0
                and 1; nan; probabilities outside [0, 1]. The histogram is then unchanged. On an
                accelerator, which would have to wait for the check, illegal elements make the
                measures nan instead.
            TypeError: an argument has the wrong type.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 255]),
            ...                  ignore_index=255)
            >>> histogram.update(torch.tensor([0.9]), torch.tensor([1]), from_logits=False)
            >>> histogram
            CalibrationHistogram(num_cells=10000, count=3)
        """
        pair = _tally.pair(input, target)
        ignore_index = _checks.ignore_index(ignore_index)
        home = _batch.home(pair[0].device)
        x, y = (by_label(part.to(home), self.num_labels, "input") for part in pair)
        new = _tally.count(self.num_cells, x, y, from_logits, ignore_index)
        self._state = self._state.to(home).plus(new)
        self._only_logits, self._looked = self._only_logits and from_logits, False

    def merge(self, other: CalibrationHistogram) -> CalibrationHistogram:
        """Add the elements of another histogram to this one, and return this one.

        ``one + other`` and ``sum(histograms)`` do the same into a new histogram.

        Raises:
            ValueError: the other has a different number of cells or labels.
            TypeError: the other is not a CalibrationHistogram.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> parts = [CalibrationHistogram(), CalibrationHistogram()]
            >>> for part in parts:
            ...     part.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> sum(parts)
            CalibrationHistogram(num_cells=10000, count=4)
            >>> parts[0].merge(parts[1])
            CalibrationHistogram(num_cells=10000, count=4)
        """
        if not isinstance(other, CalibrationHistogram):
            raise TypeError(
                _checks.sentence("other", "be a CalibrationHistogram", type(other).__name__)
            )
        for name in ("num_cells", "num_labels"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    _checks.sentence(
                        "other",
                        f"have {name}={mine}",
                        f"{name}={theirs}",
                        "build both with the same number",
                    )
                )
        self._state = self._state.plus(other._state.to(self._state.counts.device))
        self._only_logits, self._looked = self._only_logits and other._only_logits, False
        return self

    def __add__(self, other: CalibrationHistogram) -> CalibrationHistogram:
        if not isinstance(other, CalibrationHistogram):
            return NotImplemented
        return self._copy().merge(other)

    def __radd__(self, other: object) -> CalibrationHistogram:
        """For ``sum(histograms)``, which begins at 0."""
        return self._copy() if other == 0 else NotImplemented

    def pooled(self) -> CalibrationHistogram:
        """Return a histogram of the elements of all labels together, without ``num_labels``.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram(num_labels=2)
            >>> histogram.update(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]]))
            >>> histogram.accuracy()
            tensor([1., 0.], dtype=torch.float64)
            >>> histogram.pooled().accuracy()
            tensor(0.5000, dtype=torch.float64)
        """
        return self._with(_tally.Counted(*(part.sum(0, keepdim=True) for part in self._state)))

    def label(self, index: int) -> CalibrationHistogram:
        """Return a histogram of the elements of one label, without ``num_labels``.

        Args:
            index: number of the label; a negative one counts from the end.

        Raises:
            IndexError: no such label.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram(num_labels=2)
            >>> histogram.update(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]]))
            >>> histogram.label(1).accuracy()
            tensor(0., dtype=torch.float64)
        """
        labels = self.num_labels or 1
        if not -labels <= index < labels:
            raise IndexError(_checks.sentence("index", f"be in [{-labels}, {labels - 1}]", index))
        place = index % labels
        return self._with(_tally.Counted(*(part[place : place + 1] for part in self._state)))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> CalibrationHistogram:
        """Sum the histograms of the processes of ``group``, in place, and return this histogram.

        Call it once, in every process, after the local updates of an evaluation: a second call
        would count everything again. Without an initialised process group it does nothing.

        Args:
            group: the processes to sum over. Default: all.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> histogram.all_reduce()  # one process
            CalibrationHistogram(num_cells=10000, count=2)
        """
        if dist.is_available() and dist.is_initialized():
            own = self._state.counts.device
            # Copies, since the state may share memory with another histogram's.
            there = _tally.Counted(
                *(part.to(_device_of(group, own), copy=True) for part in self._state)
            )
            for part in there:
                dist.all_reduce(part, group=group)
            self._state = there.to(own)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the counts and sums, to be saved.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> sorted(CalibrationHistogram().state_dict())
            ['counts', 'doubts', 'log_loss', 'squared_error']
        """
        return {name: part.clone() for name, part in self._state._asdict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the content with a copy of a saved state, of this version or of 0.1.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: a key is missing or unexpected, or the number of cells or labels differs;
                the histogram is then unchanged.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram, restored = CalibrationHistogram(), CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> restored.load_state_dict(histogram.state_dict())
            >>> restored
            CalibrationHistogram(num_cells=10000, count=2)
        """
        self._state = restored(_from_first_version(state_dict, self._grid), self._state)

    # --- measures ---------------------------------------------------------------------------------

    def accuracy(self, kind: str = "top_label") -> Tensor:
        """Accuracy, the share of right predictions (``"positive_class"``: the base rate).

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 0]))
            >>> histogram.accuracy()
            tensor(0.6667, dtype=torch.float64)
            >>> histogram.accuracy("positive_class")
            tensor(0.3333, dtype=torch.float64)
        """
        cells = self._bins(kind)
        return self._shaped(cells.outcome.sum(-1) / cells.total)

    def confidence(self, kind: str = "top_label") -> Tensor:
        """Mean confidence of the predicted label (``"positive_class"``: mean probability).

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]), from_logits=False)
            >>> histogram.confidence(), histogram.confidence("positive_class")
            (tensor(0.8500, dtype=torch.float64), tensor(0.5500, dtype=torch.float64))
        """
        cells = self._bins(kind)
        return self._shaped(cells.confidence.sum(-1) / cells.total)

    def ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        r"""Expected calibration error (ECE) over equal-width bins of [0, 1].

        .. math::
            \mathrm{ECE} = \sum_m \tfrac{n_m}{n} |\mathrm{acc}_m - \mathrm{conf}_m|

        Args:
            num_bins: number of bins. Default: 10.
            kind: ``"top_label"`` or ``"positive_class"``. Default: ``"top_label"``.

        References:
            Guo et al., ICML 2017.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()  # predicts 0.9, right 8 times in 10
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.ece()
            tensor(0.1000, dtype=torch.float64)
        """
        return self._shaped(measures.ece(self._equal_width(num_bins, kind)))

    def oe(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        r"""Overconfidence error (OE): the gaps of over-confident bins, weighted by confidence.

        .. math::
            \mathrm{OE} = \sum_m \tfrac{n_m}{n}\, \mathrm{conf}_m
            \max(\mathrm{conf}_m - \mathrm{acc}_m, 0)

        Args:
            num_bins: number of bins. Default: 10.
            kind: ``"top_label"`` or ``"positive_class"``. Default: ``"top_label"``.

        References:
            Thulasidasan et al., NeurIPS 2019.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()  # predicts 0.9, right 8 times in 10
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.oe()
            tensor(0.0900, dtype=torch.float64)
        """
        return self._shaped(measures.oe(self._equal_width(num_bins, kind)))

    def mce(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Maximum calibration error (MCE): the largest gap of any bin that is not empty.

        Args:
            num_bins: number of bins. Default: 10.
            kind: ``"top_label"`` or ``"positive_class"``. Default: ``"top_label"``.

        References:
            Guo et al., ICML 2017.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.update(torch.full((90,), 0.6), torch.arange(90) < 54, from_logits=False)
            >>> histogram.ece(), histogram.mce()  # 10 of 100 elements are off by 0.1
            (tensor(0.0100, dtype=torch.float64), tensor(0.1000, dtype=torch.float64))
        """
        return self._shaped(measures.mce(self._equal_width(num_bins, kind)))

    def adaptive_ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Adaptive expected calibration error (ACE): the ECE over bins of equal mass.

        Args:
            num_bins: number of bins. Default: 10.
            kind: ``"top_label"`` or ``"positive_class"``. Default: ``"top_label"``.

        References:
            Nixon et al., CVPR Workshops 2019.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.adaptive_ece()
            tensor(0.1000, dtype=torch.float64)
        """
        _checks.positive_int("num_bins", num_bins)
        return self._shaped(measures.ece(measures.equal_mass(self._bins(kind), num_bins)))

    def sweep_ece(self, kind: str = "top_label") -> Tensor:
        """Expected calibration error over as many equal-mass bins as keep the accuracy monotone.

        The number of bins grows from one until the accuracy first falls from one bin to the next.

        Args:
            kind: ``"top_label"`` or ``"positive_class"``. Default: ``"top_label"``.

        References:
            Roelofs et al., AISTATS 2022.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.sweep_ece()
            tensor(0.1000, dtype=torch.float64)
        """
        cells = self._bins(kind)
        rows = zip(*(part.cpu().unbind() for part in cells), strict=True)
        each = [measures.sweep(Bins(*row)) for row in rows]
        return self._shaped(torch.stack(each).to(cells.count.device))

    def debiased_ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        r"""Debiased :math:`\ell_2` calibration error over equal-width bins.

        The square root of the mean of :math:`(\mathrm{conf} - \mathrm{acc})^2` less its bias
        :math:`\mathrm{acc} (1 - \mathrm{acc}) / (n_m - 1)`, or 0 if that mean is negative. Bins
        of fewer than two elements count as 0.

        Args:
            num_bins: number of bins. Default: 10.
            kind: ``"top_label"`` or ``"positive_class"``. Default: ``"top_label"``.

        References:
            Kumar et al., NeurIPS 2019.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> few, many = CalibrationHistogram(), CalibrationHistogram()
            >>> few.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> many.update(torch.full((1000,), 0.9), torch.arange(1000) < 800, from_logits=False)
            >>> few.debiased_ece(), many.debiased_ece()  # 8 of 10 can be chance
            (tensor(0., dtype=torch.float64), tensor(0.0992, dtype=torch.float64))
        """
        return self._shaped(measures.debiased(self._equal_width(num_bins, kind)))

    def brier(self, kind: str = "top_label") -> Tensor:
        """Brier score: mean squared error of the probability, the same for both kinds.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]), from_logits=False)
            >>> histogram.brier()  # (0.1 ** 2 + 0.2 ** 2) / 2
            tensor(0.0250, dtype=torch.float64)
        """
        return self._shaped(self._state.squared_error / self._bins(kind).total)

    def nll(self, kind: str = "top_label") -> Tensor:
        """Mean negative log-likelihood (NLL) in nats, which is BCE; the same for both kinds.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))
            >>> histogram.nll()  # log 2
            tensor(0.6931, dtype=torch.float64)
        """
        return self._shaped(self._state.log_loss / self._bins(kind).total)

    def slope(self) -> Tensor:
        r"""Calibration slope: the :math:`a` of the logistic fit :math:`\mathrm{logit} P = az + b`.

        It is 1 if the logits :math:`z` have the right scale. Below 1 the network is over-confident
        (too sure on both sides) and softer labels help; above 1 it is not sure enough and softer
        labels would hurt. It is nan if only one class, or only one logit, was seen, and infinite
        if a threshold on the logits separates the classes.

        References:
            Cox, Biometrika 1958; Van Calster et al., BMC Medicine 2019.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> _ = torch.manual_seed(0)
            >>> truth = torch.randn(20000)
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(2 * truth, torch.rand(20000) < torch.sigmoid(truth))
            >>> round(float(histogram.slope()), 1)  # logits twice too large
            0.5
        """
        return self._each(lambda cells: measures.affine(cells)[0])

    def intercept(self, slope: float | None = None) -> Tensor:
        r"""Calibration intercept: the :math:`b` of the fit :math:`\mathrm{logit} P = az + b`.

        Args:
            slope: the slope :math:`a` of the fit; None fits it too. ``intercept(slope=1.0)`` is
                the shift of the logits that makes the mean probability equal the base rate.
                Default: None.

        Returns:
            The shift, in logits; nan if only one class was seen or the slope has no value.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()  # predicts 0.5 for a base rate of 0.2
            >>> histogram.update(torch.zeros(10), torch.arange(10) < 2)
            >>> histogram.intercept(slope=1.0)  # logit 0.2
            tensor(-1.3863, dtype=torch.float64)
        """
        if slope is not None:
            _checks.number("slope", slope, -_checks.LARGE, _checks.LARGE)
        return self._each(lambda cells: measures.affine(cells, slope=slope)[1])

    def decomposition(self, score: str = "log") -> Decomposition:
        r"""Decompose a score into miscalibration - discrimination + uncertainty (CORP).

        Miscalibration is the part of the score that the best monotone repair (isotonic
        regression) of these predictions removes. Discrimination is what the repaired predictions
        gain over always predicting the base rate. Uncertainty is the score of that prediction.

        Args:
            score: ``"log"`` (NLL) or ``"brier"``. Default: ``"log"``.

        Returns:
            :class:`Decomposition`: three tensors whose sum, with signs, is exactly :meth:`nll` or
            :meth:`brier`.

        Raises:
            ValueError: ``score`` is unknown.

        References:
            Dimitriadis, Gneiting and Jordan, PNAS 2021.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()  # predicts 0.9, right 8 times in 10
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> parts = histogram.decomposition("brier")
            >>> [round(float(part), 3) for part in parts]  # 0.9 for all: no discrimination
            [0.01, 0.0, 0.16]
        """
        refined = self.refinement(score)
        cells = self._bins("positive_class")
        total = cells.total.double()
        ones = cells.outcome.sum(-1, keepdim=True)
        uncertainty = self._shaped(measures.least_score(total[..., None], ones, score))
        value = self.nll() if score == "log" else self.brier()
        return Decomposition(value - refined, uncertainty - refined, uncertainty)

    def refinement(self, score: str = "log") -> Tensor:
        """The score after the best monotone repair (isotonic regression) of these predictions.

        A training loss that lowers it does more than a repair can. It is fitted to the elements
        that it is measured on, so it is too low on small data.

        Args:
            score: ``"log"`` (NLL) or ``"brier"``. Default: ``"log"``.

        Raises:
            ValueError: ``score`` is unknown.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.brier(), histogram.refinement("brier")  # repaired, it predicts 0.8
            (tensor(0.1700, dtype=torch.float64), tensor(0.1600, dtype=torch.float64))
        """
        _checks.choice("score", score, _SCORES)
        return self._each(lambda cells: float(measures.refinement(cells, score)))

    def reliability(self, num_bins: int = 10, kind: str = "top_label") -> Reliability:
        """Return the table of a reliability diagram over equal-width bins of [0, 1].

        Args:
            num_bins: number of bins. Default: 10.
            kind: ``"top_label"`` or ``"positive_class"``. Default: ``"top_label"``.

        Returns:
            :class:`Reliability`: edges, counts, mean confidences and accuracies of the bins.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> table = histogram.reliability(num_bins=4)
            >>> table.count
            tensor([ 0,  0,  0, 10])
            >>> table.accuracy
            tensor([   nan,    nan,    nan, 0.8000], dtype=torch.float64)
        """
        bins = self._equal_width(num_bins, kind)
        device = bins.count.device
        edges = torch.arange(num_bins + 1, dtype=torch.float64, device=device) / num_bins
        table = (bins.count, bins.confidence / bins.count, bins.outcome / bins.count)
        return Reliability(edges, *(self._shaped(part) for part in table))

    def to_dict(self) -> dict[str, Any]:
        """Return every measure by name, as numbers (lists with ``num_labels``), for a log.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 0]))
            >>> measures = histogram.to_dict()
            >>> measures["count"], round(measures["nll"], 3)
            (3, 0.471)
        """
        return {name: value.tolist() for name, value in _all_measures(self).items()}

    def summary(self) -> str:
        """Return a printable table of the main measures, and a line of advice: train or repair.

        With ``num_labels`` the table has a column per label, and there is a line of advice for
        each group of labels that need the same.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> _ = torch.manual_seed(0)
            >>> truth = torch.randn(20000)
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(2 * truth, torch.rand(20000) < torch.sigmoid(truth))
            >>> print(histogram.summary().splitlines()[-1])
            Over-confident (slope below 1): softer labels help, and so does a repair.
        """
        return _summary(self)

    def cells(self) -> Cells | list[Cells]:
        """Return the data that a repair is fitted to: logit, elements, positives of each cell.

        On the CPU, in float64, in order of the logit, with the empty cells; a list of one per
        label with ``num_labels``.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> cells = histogram.cells()
            >>> cells.logit[cells.count > 0].round(decimals=4)
            tensor([-1.,  2.], dtype=torch.float64)
        """
        rows = self.cells_by_label()
        return rows[0] if self.num_labels is None else rows

    def cells_by_label(self) -> list[Cells]:
        """Return :meth:`cells` as a list, which has one entry without ``num_labels``.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> len(CalibrationHistogram().cells_by_label())
            1
        """
        if self._state.counts.is_meta:
            raise ValueError(_checks.sentence("histogram", "hold values", "one on device meta"))
        counts = self._state.counts.cpu()
        self._suspect(counts)
        return _cells_of(counts, self._state.doubts.cpu(), self._grid)

    # --- inside -----------------------------------------------------------------------------------

    def _bins(self, kind: str) -> Bins:
        """Count, outcomes and summed confidence of each cell, in order of confidence."""
        _checks.choice("kind", kind, _KINDS)
        counts, doubts = self._state.counts, self._state.doubts
        self._suspect(counts)
        count = counts.sum(2)
        # nan in a cell's sum makes its outcome nan too.
        positive = torch.where(doubts.isnan(), torch.nan, counts[:, :, 1].double())
        if kind == "top_label":
            right = count[:, 0] - positive[:, 0] + positive[:, 1]
            total = count.sum(1)
            return Bins(total, right, total - doubts.sum(1))
        # Below 1/2 the probability is the doubt, so the order of the cells is reversed.
        columns = (
            (count[:, 0], count[:, 1]),
            (positive[:, 0], positive[:, 1]),
            (doubts[:, 0], count[:, 1] - doubts[:, 1]),
        )
        return Bins(*(torch.cat((low.flip(-1), high), -1) for low, high in columns))

    def _equal_width(self, num_bins: int, kind: str) -> Bins:
        _checks.positive_int("num_bins", num_bins)
        cells = self._bins(kind)
        index = _bin_of_cells(self._grid, num_bins, kind).to(cells.count.device)
        return measures.into_bins(cells, index, num_bins)

    def _each(self, of: Callable[[Cells], float]) -> Tensor:
        values = [of(cells) for cells in self.cells_by_label()]
        device = self._state.counts.device
        return self._shaped(torch.tensor(values, dtype=torch.float64, device=device))

    def _shaped(self, value: Tensor) -> Tensor:
        return value[0] if self.num_labels is None else value

    def _copy(self) -> CalibrationHistogram:
        # Its state is the same one: no part of it is ever changed in place.
        return holding(self._state, self.num_labels, self.num_cells, only_logits=self._only_logits)

    def _with(self, state: _tally.Counted) -> CalibrationHistogram:
        return holding(state, None, self.num_cells, only_logits=self._only_logits)

    def _suspect(self, counts: Tensor) -> None:
        """Warn once if what was passed as logits looks like probabilities.

        Counts on an accelerator are not looked at, since that would wait.
        """
        if self._looked or not self._only_logits or counts.device.type != "cpu":
            return
        self._looked = True
        if _tally.readable(_like_probabilities(counts, self._grid)):
            self._only_logits = False
            _checks.warn(
                "All logits that this histogram has seen lie in [0, 1], as if they were "
                "probabilities; pass these with `update(..., from_logits=False)`"
            )

    def __repr__(self) -> str:
        labels = "" if self.num_labels is None else f"num_labels={self.num_labels}, "
        count = "" if self._state.counts.is_meta else f", count={int(self._state.counts.sum())}"
        return f"{type(self).__name__}({labels}num_cells={self.num_cells}{count})"


def holding(
    state: _tally.Counted, num_labels: int | None, num_cells: int, *, only_logits: bool = False
) -> CalibrationHistogram:
    """A histogram of a state; ``only_logits`` if its logits may turn out to be probabilities."""
    made = CalibrationHistogram(num_labels, num_cells=num_cells)
    made._state, made._only_logits = state, only_logits
    return made


def restored(saved: Mapping[str, Tensor], own: _tally.Counted) -> _tally.Counted:
    """Copies of a saved state on the device of ``own``, whose sizes it must have."""
    if set(saved) != set(own._fields):
        raise ValueError(
            _checks.sentence(
                "state_dict",
                f"have the keys {sorted(own._fields)}",
                sorted(saved),
                "pass what `histogram.state_dict()` returned",
            )
        )
    for name, part in own._asdict().items():
        _check_saved(name, saved[name], part)
    return _tally.Counted(
        *(saved[name].to(part, copy=True) for name, part in own._asdict().items())
    )


def _cells_of(counts: Tensor, doubts: Tensor, grid: _tally.Grid) -> list[Cells]:
    """Logit, elements and positives of each cell, label by label, on the CPU."""
    count = counts.sum(2).double()
    low, middle = grid.logits()
    mean = doubts / count
    size = torch.log1p(-mean) - torch.log(mean)
    # The mean doubt of a cell lies inside it, except for the rounding of doubts below 1e-38.
    above = torch.cat((low[1:], low.new_tensor([torch.inf])))
    good = size.isfinite() & (size >= low - 0.1) & (size <= above + 0.1)
    size = torch.where(good, size, middle)
    positive = counts[:, :, 1].double()
    spoilt = torch.where(doubts.isnan(), torch.nan, 0.0)
    columns = (torch.stack((-size[:, 0], size[:, 1]), 1), count + spoilt, positive + spoilt)
    # From the surest negative to the surest positive.
    rows = (torch.cat((part[:, 0].flip(-1), part[:, 1]), -1).unbind() for part in columns)
    return [Cells(*row) for row in zip(*rows, strict=True)]


def _bin_of_cells(grid: _tally.Grid, num_bins: int, kind: str) -> Tensor:
    """The bin of each cell's centre, by integers for cells that are even in p."""
    cell, num_cells = torch.arange(grid.size, device="cpu"), 2 * grid.half
    outer = cell >= grid.inner
    tail = (torch.sigmoid(-grid.logits()[1]) * num_bins).long()
    high = (2 * (grid.half + cell) + 1) * num_bins // (2 * num_cells)
    high = torch.where(outer, num_bins - 1 - tail, high)
    if kind == "top_label":
        return high
    low = (2 * (grid.half - 1 - cell) + 1) * num_bins // (2 * num_cells)
    return torch.cat((torch.where(outer, tail, low).flip(0), high))


def _like_probabilities(counts: Tensor, grid: _tally.Grid) -> Tensor:
    """Whether what was passed as logits looks like probabilities, as a 0-d tensor."""
    negative, positive = counts.sum((0, 2)).unbind()
    low, _ = grid.logits()
    alike = measures.like_probabilities(low.to(counts.device), positive)
    return alike & (negative.sum() == 0) & (positive.sum() >= _SUSPECT)


def by_label(value: Tensor, num_labels: int | None, name: str) -> Tensor:
    """One row per label, as a view if possible."""
    if num_labels is None:
        return value.unsqueeze(0)
    if value.dim() < 2 or value.shape[1] != num_labels:
        raise ValueError(
            _checks.sentence(
                name,
                f"have num_labels={num_labels} labels in dimension 1",
                f"shape {tuple(value.shape)}",
            )
        )
    return value.movedim(1, 0)


def _device_of(group: dist.ProcessGroup | None, own: torch.device) -> torch.device:
    """The device on which the group's backend accepts a tensor that is on ``own``."""
    served = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if own.type in served:
        return own
    return torch.device(served[0], torch.accelerator.current_device_index())


def _check_saved(name: str, saved: object, own: Tensor) -> None:
    if not isinstance(saved, Tensor) or saved.dim() != own.dim():
        raise ValueError(
            f"Expected the saved `{name}` to be a Tensor of shape {tuple(own.shape)}, but got "
            f"{tuple(saved.shape) if isinstance(saved, Tensor) else _checks.describe(saved)}"
        )
    if saved.shape != own.shape:
        what = "labels" if saved.shape[0] != own.shape[0] else "cells"
        have, got = (part.shape[0 if what == "labels" else -1] for part in (own, saved))
        raise ValueError(
            _checks.sentence(
                "state_dict",
                f"be of a histogram with {have} {what} in `{name}`",
                got,
                f"build the histogram with the same num_{what}",
            )
        )


def _from_first_version(state: Mapping[str, Tensor], grid: _tally.Grid) -> Mapping[str, Tensor]:
    """A state of version 0.1, which had no tail cells: its outer cells move by their mean doubt."""
    keys = {"counts", "confidences", "squared_error", "log_loss"}
    if set(state) != keys or state["confidences"].shape != (2, grid.half):
        return state
    counts = state["counts"].cpu().transpose(1, 2)
    count = counts.sum(1)
    doubts = count - state["confidences"].cpu()
    mean = (doubts / count.clamp(min=1)).clamp(1e-12, 0.5)
    cell = torch.arange(grid.half, device="cpu")
    outer = cell >= grid.inner
    place = torch.where(
        outer,
        grid.coordinate(-torch.logit(mean), mean).long().clamp(grid.inner, grid.size - 1),
        cell,
    )
    new = _tally.nothing(1, grid.size)
    new.counts[0].scatter_add_(-1, place[:, None].expand(counts.shape), counts.contiguous())
    new.doubts[0].scatter_add_(-1, place, doubts)
    sums = {key: state[key].reshape(1) for key in ("squared_error", "log_loss")}
    return {"counts": new.counts, "doubts": new.doubts, **sums}


# --- reports --------------------------------------------------------------------------------------


def _all_measures(histogram: CalibrationHistogram) -> dict[str, Tensor]:
    top, positive = _KINDS
    values = {
        "count": histogram.reliability(1).count[..., 0],
        "accuracy": histogram.accuracy(),
        "confidence": histogram.confidence(),
        "base_rate": histogram.accuracy(positive),
        "mean_probability": histogram.confidence(positive),
        "slope": histogram.slope(),
        "intercept": histogram.intercept(),
        "ece": histogram.ece(),
        "ece_positive_class": histogram.ece(kind=positive),
        "oe": histogram.oe(kind=top),
    }
    for score, name in (("log", "nll"), ("brier", "brier")):
        values[name] = histogram.nll() if score == "log" else histogram.brier()
        parts = histogram.decomposition(score)
        values |= {f"{name}_{part}": value for part, value in parts._asdict().items()}
        values[f"{name}_refinement"] = histogram.refinement(score)
    return values


_ROWS = {
    "count": "elements",
    "accuracy": "accuracy",
    "confidence": "mean confidence",
    "base_rate": "base rate",
    "mean_probability": "mean probability",
    "slope": "slope",
    "intercept": "intercept",
    "ece": "ECE, top label",
    "ece_positive_class": "ECE, positive class",
    "nll": "NLL",
    "nll_miscalibration": "  miscalibration",
    "nll_discrimination": "- discrimination",
    "nll_uncertainty": "+ uncertainty",
    "brier": "Brier score",
    "brier_miscalibration": "  miscalibration",
    "brier_discrimination": "- discrimination",
    "brier_uncertainty": "+ uncertainty",
}


def _summary(histogram: CalibrationHistogram) -> str:
    values = {name: value.reshape(-1).tolist() for name, value in _all_measures(histogram).items()}
    lines = []
    if histogram.num_labels is not None:
        labels = [f"label {i}" for i in range(histogram.num_labels)]
        lines.append(" " * 20 + "".join(f"{name:>12}" for name in labels))
    for key, title in _ROWS.items():
        cells = (f"{v:>12d}" if key == "count" else f"{v:>12.4f}" for v in values[key])
        lines.append(f"{title:<20}{''.join(cells)}")
    return "\n".join((*lines, _advice(histogram)))


def _advice(histogram: CalibrationHistogram) -> str:
    """A line of advice, or one for each group of labels that share it."""
    if histogram.num_labels is None:
        return _advice_of(histogram)
    who: dict[str, list[str]] = {}
    for label in range(histogram.num_labels):
        who.setdefault(_advice_of(histogram.label(label)), []).append(str(label))
    if len(who) == 1:
        return next(iter(who))
    return "\n".join(f"label {', '.join(labels)}: {text}" for text, labels in who.items())


def _advice_of(histogram: CalibrationHistogram) -> str:
    slope, nll = float(histogram.slope()), float(histogram.nll())
    rate = float(histogram.accuracy("positive_class"))
    mean = float(histogram.confidence("positive_class"))
    if slope != slope:
        return "No advice yet: measure data with both classes and more than one logit."
    if nll == math.inf:
        return "A probability of 0 or 1 is wrong: the NLL is infinite. Repair or bound the logits."
    if slope == math.inf:
        return "A threshold separates the classes, up to ties: the slope is infinite. Measure more."
    if slope <= 0:
        return "The logits rank the labels backwards (slope below 0): check the data first."
    (cells,) = histogram.cells_by_label()
    elements = float(cells.count.sum())
    # What luck gives, on data that are calibrated: about one nat for each block of the curve, and
    # a base rate within two standard errors.
    lucky = len(measures.isotonic(cells.count, cells.positive).count) / elements
    gain = (float(histogram.decomposition().miscalibration) - lucky) / nll
    error = math.sqrt(float(histogram.brier()) / elements)
    shift = abs(mean - rate) > max(0.05 * min(rate, 1 - rate), 2 * error)
    if slope < 0.9:
        text = "Over-confident (slope below 1): softer labels help, and so does a repair."
    elif slope > 1.1:
        text = "Not confident enough (slope above 1): softer labels would hurt; repair it instead."
    elif gain > 0.01 or shift:
        text = "The slope is right: softer labels would not help; a repair does."
    else:
        return "Well calibrated: nothing to repair."
    return text + (" The mean probability is not the base rate." if shift else "")
