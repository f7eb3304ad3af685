"""What is read off a histogram: a line for each measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _errors
from .._errors import refuse
from .._torch import has_values
from . import scores
from .cells import Grid, counted
from .line import Cells, lines
from .scores import Bins, Blocks, Decomposition, Reliability

_KINDS = ("top_label", "positive_class")
_SCORES = ("log", "brier")


class Measures:
    """The measures of :class:`CalibrationHistogram`, which counts."""

    num_labels: int | None
    _state: Tensor
    _grid: Grid
    _looked: bool  # whether the logits can't turn out to be probabilities

    def accuracy(self, kind: str = "top_label") -> Tensor:
        """Accuracy, the share of right predictions (``"positive_class"``: the base rate).

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 0]))
            >>> histogram.accuracy(), histogram.accuracy("positive_class")
            (tensor(0.6667, dtype=torch.float64), tensor(0.3333, dtype=torch.float64))
        """
        cells = self._bins(kind)
        return self._shaped(cells.outcome.sum(-1) / cells.total)

    def confidence(self, kind: str = "top_label") -> Tensor:
        """Mean confidence of the predicted label (``"positive_class"``: mean probability).

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]), from_logits=False)
            >>> histogram.confidence(), histogram.confidence("positive_class")
            (tensor(0.8500, dtype=torch.float64), tensor(0.5500, dtype=torch.float64))
        """
        cells = self._bins(kind)
        return self._shaped(cells.confidence.sum(-1) / cells.total)

    def ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Expected calibration error (ECE): the mean gap, weighted by the elements of the bins.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()  # predicts 0.9, right 8 times in 10
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.ece()
            tensor(0.1000, dtype=torch.float64)
        """
        return self._shaped(scores.ece(self._equal_width(num_bins, kind)))

    def oe(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Overconfidence error (OE): the gaps of over-confident bins, weighted by confidence.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()  # predicts 0.9, right 8 times in 10
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.oe()
            tensor(0.0900, dtype=torch.float64)
        """
        return self._shaped(scores.oe(self._equal_width(num_bins, kind)))

    def mce(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Maximum calibration error (MCE): the largest gap of any bin that is not empty.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.9, 0.6]), torch.ones(2), from_logits=False)
            >>> histogram.mce()
            tensor(0.4000, dtype=torch.float64)
        """
        return self._shaped(scores.mce(self._equal_width(num_bins, kind)))

    def average_error(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Average calibration error: the mean gap of the bins that are not empty, all alike.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> p, y = torch.tensor([0.9, 0.9, 0.9, 0.6]), torch.ones(4)
            >>> histogram.update(p, y, from_logits=False)
            >>> histogram.average_error(), histogram.ece()
            (tensor(0.2500, dtype=torch.float64), tensor(0.1750, dtype=torch.float64))
        """
        return self._shaped(scores.average(self._equal_width(num_bins, kind)))

    def l2_error(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        r""":math:`\ell_2` calibration error: the root of the mean squared gap, not debiased.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.9, 0.6]), torch.ones(2), from_logits=False)
            >>> histogram.l2_error()  # the root of (0.1 ** 2 + 0.4 ** 2) / 2
            tensor(0.2915, dtype=torch.float64)
        """
        return self._shaped(scores.l2(self._equal_width(num_bins, kind)))

    def debiased_ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        r"""Debiased :math:`\ell_2` calibration error.

        The root of the mean of :math:`(\mathrm{conf} - \mathrm{acc})^2` less its bias
        :math:`\mathrm{acc} (1 - \mathrm{acc}) / (n_m - 1)`, or 0 if that mean is negative. Bins
        of fewer than two elements count as 0.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.debiased_ece()  # 8 of 10 can be chance
            tensor(0., dtype=torch.float64)
        """
        return self._shaped(scores.debiased(self._equal_width(num_bins, kind)))

    def adaptive_ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Adaptive calibration error (Nixon's ACE): the ECE over bins of equal mass.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.adaptive_ece()
            tensor(0.1000, dtype=torch.float64)
        """
        cells, _ = self._bins(kind), _errors.whole("num_bins", num_bins)
        return self._shaped(scores.ece(scores.equal_mass(cells, num_bins)))

    def sweep_ece(self, kind: str = "top_label") -> Tensor:
        """ECE over as many equal-mass bins as keep the accuracy rising from bin to bin.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.sweep_ece()
            tensor(0.1000, dtype=torch.float64)
        """
        rows = zip(*(part.cpu().unbind() for part in self._bins(kind)), strict=True)
        return self._values(torch.stack([scores.sweep(Bins(*row)) for row in rows]))

    def brier(self) -> Tensor:
        """Brier score: mean squared error of the probability.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]), from_logits=False)
            >>> histogram.brier()  # (0.1 ** 2 + 0.2 ** 2) / 2
            tensor(0.0250, dtype=torch.float64)
        """
        return self._shaped(counted(self._state).totals[:, 0] / self._bins().total)

    def nll(self) -> Tensor:
        """Mean negative log-likelihood (NLL) in nats, which is BCE.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))
            >>> histogram.nll()  # log 2
            tensor(0.6931, dtype=torch.float64)
        """
        return self._shaped(counted(self._state).totals[:, 1] / self._bins().total)

    def slope(self) -> Tensor:
        r"""Calibration slope: the :math:`a` of the logistic fit :math:`\mathrm{logit} P = az + b`.

        It is 1 if the logits :math:`z` have the right scale. Below 1 the network is over-confident
        (too sure on both sides); above 1 it is not sure enough, and label smoothing would hurt. It
        is nan if only one class, or only one logit, was seen, and infinite if a threshold on the
        logits separates the classes.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram, truth = CalibrationHistogram(), torch.logit(torch.tensor([0.25, 0.75]))
            >>> histogram.update(2 * truth.repeat(4), torch.tensor([0, 1, 0, 1, 0, 1, 1, 0]))
            >>> histogram.slope()  # logits twice too large
            tensor(0.5000, dtype=torch.float64)
        """
        return self._values(lines(self._cells())[0])

    def intercept(self, slope: float | None = None) -> Tensor:
        r"""Calibration intercept: the :math:`b` of the fit :math:`\mathrm{logit} P = az + b`.

        Args:
            slope: the slope :math:`a` of the fit; None fits it too. ``intercept(slope=1.0)`` is
                the shift of the logits that makes the mean probability equal the base rate.
                Default: None.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()  # predicts 0.5 for a base rate of 0.2
            >>> histogram.update(torch.zeros(10), torch.arange(10) < 2)
            >>> histogram.intercept(slope=1.0)  # logit 0.2
            tensor(-1.3863, dtype=torch.float64)
        """
        if slope is not None:
            _errors.number("slope", slope, -_errors.LARGE, _errors.LARGE)
        return self._values(lines(self._cells(), slope=slope)[1])

    def decomposition(self, score: str = "log") -> Decomposition:
        r"""Decompose a score into miscalibration - discrimination + uncertainty (CORP).

        Args:
            score: ``"log"`` (NLL) or ``"brier"``. Default: ``"log"``.

        Returns:
            :class:`Decomposition`: three tensors whose sum, with signs, is exactly :meth:`nll` or
            :meth:`brier`.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()  # predicts 0.9, right 8 times in 10
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> [round(float(part), 3) for part in histogram.decomposition("brier")]
            [0.01, 0.0, 0.16]
        """
        return self._decomposed(self._blocks(), score)

    def refinement(self, score: str = "log") -> Tensor:
        """The score after the best monotone repair (isotonic regression) of these predictions.

        A training loss that lowers it does more than a repair can. It is fitted to the elements
        that it is measured on, so it is too low on small data.

        Args:
            score: ``"log"`` (NLL) or ``"brier"``. Default: ``"log"``.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.refinement("brier")  # repaired, it predicts 0.8
            tensor(0.1600, dtype=torch.float64)
        """
        return self._refined(self._blocks(), score)

    def reliability(
        self, num_bins: int = 10, kind: str = "top_label", *,
        edges: Sequence[float] | Tensor | None = None, equal_mass: bool = False,
    ) -> Reliability:  # fmt: skip
        """Return the table of a reliability diagram.

        Args:
            num_bins: number of bins. Default: 10.
            kind: ``"top_label"`` or ``"positive_class"``. Default: ``"top_label"``.
            edges: increasing edges of the bins, in [0, 1], in place of ``num_bins``; confidences
                outside of them are left out. Default: None, bins of equal width.
            equal_mass: whether the bins hold equally many elements. Default: False.

        Returns:
            :class:`Reliability`: edges, counts, mean confidences and accuracies of the bins.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.full((10,), 0.9), torch.arange(10) < 8, from_logits=False)
            >>> histogram.reliability(edges=[0.5, 0.8, 1.0]).count
            tensor([ 0., 10.], dtype=torch.float64)
        """
        num_bins, cells = _errors.whole("num_bins", num_bins), self._bins(kind)
        if edges is not None:
            ends = torch.as_tensor(edges, dtype=torch.float64, device=cells.count.device)
            if equal_mass or ends.dim() != 1 or len(ends) < 2 or not bool((ends.diff() > 0).all()):
                wanted = "be two or more increasing numbers, without `equal_mass`"
                refuse("edges", wanted, edges)
            bins = scores.between(cells, self._grid.edges(kind), ends)
        elif equal_mass:
            ends, bins = scores.equal_mass_table(cells, self._grid.edges(kind), num_bins)
            ends = self._shaped(ends)
        else:
            ends, bins = self._ends(num_bins), self._equal_width(num_bins, kind)
        table = (bins.count, bins.confidence / bins.count, bins.outcome / bins.count)
        return Reliability(ends, *(self._shaped(part) for part in table))

    def measures(self) -> dict[str, Tensor]:
        """Return every measure of :meth:`to_dict` as a tensor.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> list(CalibrationHistogram().measures())[:4]
            ['count', 'sure', 'sure_wrong', 'accuracy']
        """
        positive, blocks = "positive_class", self._blocks()
        sure = counted(self._state).counts[..., -1]
        values = {
            "count": self._shaped(self._bins().total),
            "sure": self._shaped(sure.sum((1, 2))),
            "sure_wrong": self._shaped(sure[:, 0, 1] + sure[:, 1, 0]),
            "accuracy": self.accuracy(),
            "confidence": self.confidence(),
            "base_rate": self.accuracy(positive),
            "mean_probability": self.confidence(positive),
            "slope": self.slope(),
            "intercept": self.intercept(),
            "ece": self.ece(),
            "ece_positive_class": self.ece(kind=positive),
            "oe": self.oe(),
        }
        for score, name, value in (("log", "nll", self.nll()), ("brier", "brier", self.brier())):
            parts = self._decomposed(blocks, score)._asdict()
            values |= {name: value} | {f"{name}_{part}": one for part, one in parts.items()}
            values[f"{name}_refinement"] = self._refined(blocks, score)
        return values

    def cells(self) -> list[Cells]:
        """Return the data that a repair is fitted to: logit, elements, positives of each cell.

        One entry per label, on the CPU, in float64, in order of the logit, with the empty cells.

        Example:
            >>> from sc_bce import CalibrationHistogram
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> (cells,) = histogram.cells()
            >>> cells.logit[cells.count > 0].round(decimals=4)
            tensor([-1.,  2.], dtype=torch.float64)
        """
        return [Cells(*row) for row in zip(*self._cells(), strict=True)]

    def _cells(self) -> Cells:
        if self._state.is_meta:
            refuse("histogram", "hold values", "one on device meta")
        state = self._state.cpu()
        self._suspect(state)
        return scores.cells_of(counted(state), self._grid)

    def _blocks(self) -> list[Blocks]:
        return [scores.isotonic(one.count, one.positive) for one in self.cells()]

    def _refined(self, blocks: list[Blocks], score: str) -> Tensor:
        _errors.choice("score", score, _SCORES)
        value = self._values(torch.stack([scores.refined(one, score) for one in blocks]))
        # To change nothing is monotone too, and tells logits of one cell apart.
        return torch.minimum(value, self.nll() if score == "log" else self.brier())

    def _decomposed(self, blocks: list[Blocks], score: str) -> Decomposition:
        refined, cells = self._refined(blocks, score), self._bins("positive_class")
        ones = cells.outcome.sum(-1, keepdim=True)
        uncertainty = self._shaped(scores.least_score(cells.total[..., None], ones, score))
        refined = torch.minimum(refined, uncertainty)
        value = self.nll() if score == "log" else self.brier()
        return Decomposition(value - refined, uncertainty - refined, uncertainty)

    def _bins(self, kind: str = "top_label") -> Bins:
        """Count, outcomes and summed confidence of each cell, in order of confidence."""
        _errors.choice("kind", kind, _KINDS)
        self._suspect(self._state)
        return scores.bins_of(counted(self._state), kind)

    def _equal_width(self, num_bins: int, kind: str) -> Bins:
        cells, _ = self._bins(kind), _errors.whole("num_bins", num_bins)
        return scores.between(cells, self._grid.edges(kind), self._ends(num_bins))

    def _ends(self, num_bins: int) -> Tensor:
        ends = torch.arange(num_bins + 1, dtype=torch.float64, device=self._state.device)
        return ends / num_bins

    def _values(self, each: Tensor) -> Tensor:
        return self._shaped(each.to(self._state.device))

    def _shaped(self, value: Tensor) -> Tensor:
        return value[0] if self.num_labels is None else value

    def _suspect(self, state: Tensor) -> None:
        """Warn if what was passed as logits looks like probabilities.

        Counts on an accelerator are not looked at, since that would wait.
        """
        if self._looked or not has_values(state) or state.device.type != "cpu":
            return
        self._looked = True
        together = counted(state.sum(0, keepdim=True))
        if not bool(together.counts.sum() == together.totals[0, 2]):
            return
        (cells,) = zip(*scores.cells_of(together, self._grid), strict=True)
        looks = scores.like_probabilities(Cells(*cells))
        if looks:
            them = "these" if looks == "probabilities" else "their `exp()`"
            text = f"The logits look as if they were {looks}; pass {them} with `from_logits=False`"
            _errors.warn(text)
