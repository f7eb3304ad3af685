"""Streaming, exact, mergeable measurement of calibration for binary and dense predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _batch, _checks, _tally, measures
from .measures import Bins, Cells, Decomposition, Reliability

__all__ = ["CalibrationHistogram"]

_SUSPECT = 1000  # elements from which logits that all lie in [0, 1] are no accident
_KINDS = ("top_label", "positive_class")
_SCORES = ("log", "brier")


class CalibrationHistogram:
    r"""Accumulates predictions in fixed memory and derives every calibration measure from them.

    Two readings of a binary prediction :math:`p` with outcome :math:`y`, chosen by ``kind``:
    ``"top_label"`` (the default, the paper's): confidence :math:`\max(p, 1-p)`, outcome "the
    prediction :math:`p \ge 1/2` is right"; ``"positive_class"``: confidence :math:`p`, outcome
    :math:`y`. Where positives are rare, read the second: the first hides them. With bins
    :math:`m` of :math:`n_m` among :math:`n` elements,

    .. math::
        \mathrm{ECE} = \sum_m \tfrac{n_m}{n} |\mathrm{acc}_m - \mathrm{conf}_m|, \qquad
        \mathrm{OE} = \sum_m \tfrac{n_m}{n}\, \mathrm{conf}_m
        \max(\mathrm{conf}_m - \mathrm{acc}_m, 0).

    Each element falls into one of the fine cells, which keep int64 counts and float64 sums of the
    doubt :math:`\min(p, 1-p)`; NLL and Brier score are summed beside them. So accuracy,
    confidence, NLL and Brier score are exact, and so is every measure on equal-width bins whose
    number divides ``num_cells`` and is at most an eighth of it. Otherwise a cell that a bin edge
    cuts goes whole into the bin of its centre, which changes the ECE by at most twice the share of
    the elements in such cells.
    Equal-mass bins (:meth:`adaptive_ece`, :meth:`sweep_ece`) take cells whole: the elements of
    one cell are ties. The outermost cells at either end are divided evenly in the logit, so that
    what a saturated network says can still be repaired (:class:`IsotonicCalibration`,
    :class:`TemperatureScaling`).

    Args:
        num_labels: number of labels in dimension 1, measured apart; every result then has shape
            (num_labels,), and :meth:`pooled` measures them together. None: all elements are one
            label. Default: None.
        num_cells: cells over [0, 1], an even number. Default: 10,000 (0.36 MB per label).

    Raises:
        ValueError: ``num_cells`` not even and positive; ``num_labels`` not positive.
        TypeError: one of them not an int.

    Note:
        The state lives where the last update's input lived (on the CPU if that device has no
        float64); updates never make an accelerator wait. A value on an inner bin edge, to two
        units of its precision, belongs to the bin farther from 1/2, so that p = 0.1 and p = 0.9
        are the same confidence; p = 1 belongs to the last bin. Each element is worked out in the
        input's precision, float32 at least, so that small losses keep their digits, and summed
        in float64. Measures are float64 tensors, 0-d without ``num_labels``, nan before the first
        update. Logits that lie in [0, 1] alone, all over it or crowded at an end, look like
        probabilities: the first measure of 1000 or more such elements warns once. On an
        accelerator that is the first measure that reads the cells: the slope, the decomposition,
        a report or a repair.

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
        self._only_logits = True  # which may turn out to be probabilities
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
        """Add predictions.

        Args:
            input: logits, or probabilities with ``from_logits=False``; a Tensor of any shape and
                device, or a NumPy array. With ``num_labels``, dimension 1 holds the labels.
            target: 0 and 1 in any dtype, of the same size.
            from_logits: whether ``input`` holds logits. Default: True.
            ignore_index: target value of elements to leave out. Default: None.

        Raises:
            ValueError: sizes that differ, or dimension 1 not ``num_labels``; labels other than 0
                and 1; nan; probabilities outside [0, 1]. The histogram is then unchanged. On an
                accelerator, where a look would wait, such elements make the measures nan instead.
            TypeError: an argument of the wrong type.
        """
        pair = _tally.tensor(input, "input"), _tally.tensor(target, "target")
        _batch.pair(*pair)
        ignore_index = _checks.ignore_index(ignore_index)
        home = _batch.home(pair[0].device)
        x, y = (by_label(part.to(home), self.num_labels, "input") for part in pair)
        new = _tally.count(self.num_cells, x, y, from_logits, ignore_index)
        self._state = self._state.to(home).plus(new)
        self._only_logits, self._looked = self._only_logits and from_logits, False

    def merge(self, other: CalibrationHistogram) -> CalibrationHistogram:
        """Add another histogram's elements to this one, and return this one.

        Raises:
            ValueError: the other has another number of cells or labels.
            TypeError: the other is no histogram.
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
        """A histogram of all labels' elements together, without ``num_labels``."""
        return self._with(_tally.Counted(*(part.sum(0, keepdim=True) for part in self._state)))

    def label(self, index: int) -> CalibrationHistogram:
        """A histogram of one label's elements, without ``num_labels``."""
        labels = self.num_labels or 1
        if not -labels <= index < labels:
            raise IndexError(_checks.sentence("index", f"be in [{-labels}, {labels - 1}]", index))
        place = index % labels
        return self._with(_tally.Counted(*(part[place : place + 1] for part in self._state)))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> CalibrationHistogram:
        """Sum over the processes of ``group``, in place, and return this histogram.

        A collective call, once the local updates of an evaluation are done: a second call would
        count everything again. Without an initialised process group it does nothing.
        """
        if dist.is_available() and dist.is_initialized():
            own = self._state.counts.device
            # Copies, since a part of a state may be part of another's.
            there = _tally.Counted(
                *(part.to(_device_of(group, own), copy=True) for part in self._state)
            )
            for part in there:
                dist.all_reduce(part, group=group)
            self._state = there.to(own)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the counts and sums, to be saved."""
        return {name: part.clone() for name, part in self._state._asdict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the content by a copy of a saved one, also one saved by version 0.1.

        Raises:
            ValueError: a key is missing or too many, or the number of cells or labels differs;
                the histogram is then unchanged.
        """
        self._state = restored(_from_first_version(state_dict, self._grid), self._state)

    # --- measures ---------------------------------------------------------------------------------

    def accuracy(self, kind: str = "top_label") -> Tensor:
        """Share of right predictions (``"positive_class"``: share of positives)."""
        cells = self._bins(kind)
        return self._shaped(cells.outcome.sum(-1) / cells.total)

    def confidence(self, kind: str = "top_label") -> Tensor:
        """Mean confidence of the predicted label (``"positive_class"``: mean probability)."""
        cells = self._bins(kind)
        return self._shaped(cells.confidence.sum(-1) / cells.total)

    def ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Expected calibration error over ``num_bins`` equal-width bins of [0, 1]."""
        return self._shaped(measures.ece(self._equal_width(num_bins, kind)))

    def oe(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Overconfidence error: gaps above the accuracy only, weighted by confidence."""
        return self._shaped(measures.oe(self._equal_width(num_bins, kind)))

    def mce(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Maximum calibration error: the largest gap of any bin that is not empty."""
        return self._shaped(measures.mce(self._equal_width(num_bins, kind)))

    def adaptive_ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Expected calibration error over ``num_bins`` bins of equal mass."""
        _checks.positive_int("num_bins", num_bins)
        return self._shaped(measures.ece(measures.equal_mass(self._bins(kind), num_bins)))

    def sweep_ece(self, kind: str = "top_label") -> Tensor:
        """Expected calibration error over the most equal-mass bins with monotone accuracy.

        The number of bins grows from one until the accuracy first falls from a bin to the next.
        """
        cells = self._bins(kind)
        rows = zip(*(part.cpu().unbind() for part in cells), strict=True)
        each = [measures.sweep(Bins(*row)) for row in rows]
        return self._shaped(torch.stack(each).to(cells.count.device))

    def debiased_ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        r"""Debiased :math:`\ell_2` calibration error over equal-width bins.

        The square root of the mean of :math:`(\mathrm{conf} - \mathrm{acc})^2` less its bias
        :math:`\mathrm{acc} (1 - \mathrm{acc}) / (n_m - 1)`, or 0 where that is negative; bins of
        fewer than two elements give 0.
        """
        return self._shaped(measures.debiased(self._equal_width(num_bins, kind)))

    def brier(self, kind: str = "top_label") -> Tensor:
        """Mean squared error of the probability; the same for both kinds."""
        return self._shaped(self._state.squared_error / self._bins(kind).total)

    def nll(self, kind: str = "top_label") -> Tensor:
        """Mean negative log-likelihood, in nats; the same for both kinds."""
        return self._shaped(self._state.log_loss / self._bins(kind).total)

    def slope(self) -> Tensor:
        r"""Calibration slope: the :math:`a` of the logistic fit :math:`\mathrm{logit} P = az + b`.

        1 where the logits :math:`z` have the right size. Below 1 the network is over-fitted (too
        sure on both sides), where softer labels help; above 1 it is not sure enough, and softer
        labels would hurt. nan where one class only was seen, or one logit; infinite where the
        logits tell the classes apart without error.
        """
        return self._each(lambda cells: measures.affine(cells)[0])

    def intercept(self, slope: float | None = None) -> Tensor:
        r"""Calibration intercept: the :math:`b` of the logistic fit.

        Args:
            slope: of the fit; None fits it too. ``intercept(slope=1.0)`` is what must be added to
                the logits so that the mean probability equals the base rate. Default: None.

        Returns:
            The shift, in logits; nan where one class only was seen or the slope has no value.
        """
        if slope is not None:
            _checks.number("slope", slope, -_checks.LARGE, _checks.LARGE)
        return self._each(lambda cells: measures.affine(cells, slope=slope)[1])

    def decomposition(self, score: str = "log") -> Decomposition:
        r"""What is wrong: score = miscalibration - discrimination + uncertainty (CORP).

        Miscalibration is what the best monotone repair (isotonic regression) of these very
        predictions would take off the score; discrimination, what the repaired network gains
        over always answering the base rate; uncertainty, the score of doing that.

        Args:
            score: ``"log"`` (NLL) or ``"brier"``. Default: ``"log"``.

        Returns:
            Three tensors whose sum, with signs, is exactly :meth:`nll` or :meth:`brier`.
        """
        refined = self.refinement(score)
        cells = self._bins("positive_class")
        total = cells.total.double()
        ones = cells.outcome.sum(-1, keepdim=True)
        uncertainty = self._shaped(measures.least_score(total[..., None], ones, score))
        value = self.nll() if score == "log" else self.brier()
        return Decomposition(value - refined, uncertainty - refined, uncertainty)

    def refinement(self, score: str = "log") -> Tensor:
        """The score after the best monotone repair: how good this network could be.

        A loss must improve it to be better than a repair. Fitted to the elements that it is
        measured on, so that small data flatter it.
        """
        _checks.choice("score", score, _SCORES)
        return self._each(lambda cells: float(measures.refinement(cells, score)))

    def reliability(self, num_bins: int = 10, kind: str = "top_label") -> Reliability:
        """Return the table of a reliability diagram over equal-width bins of [0, 1]."""
        bins = self._equal_width(num_bins, kind)
        device = bins.count.device
        edges = torch.arange(num_bins + 1, dtype=torch.float64, device=device) / num_bins
        table = (bins.count, bins.confidence / bins.count, bins.outcome / bins.count)
        return Reliability(edges, *(self._shaped(part) for part in table))

    def to_dict(self) -> dict[str, Any]:
        """Every measure by name, as numbers (lists of them with ``num_labels``), for a log."""
        return {name: value.tolist() for name, value in _all_measures(self).items()}

    def summary(self) -> str:
        """A printable table of what matters, and one line of advice that follows from it.

        With ``num_labels``, one line for each group of labels that need the same.
        """
        return _summary(self)

    def cells(self) -> Cells | list[Cells]:
        """What a repair is fitted to: logit, elements and positives of each cell, on the CPU.

        In order of the logit, float64, empty cells too; a list with ``num_labels``.
        """
        rows = self.cells_by_label()
        return rows[0] if self.num_labels is None else rows

    def cells_by_label(self) -> list[Cells]:
        """:meth:`cells` as a list, of one without ``num_labels``."""
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
        # A cell that nan has spoilt has no outcome either.
        positive = torch.where(doubts.isnan(), torch.nan, counts[:, :, 1].double())
        if kind == "top_label":
            right = count[:, 0] - positive[:, 0] + positive[:, 1]
            total = count.sum(1)
            return Bins(total, right, total - doubts.sum(1))
        # Below 1/2 the probability is the doubt, and the order of confidence turns round.
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
        """Warn once if what came as logits lies in [0, 1] as probabilities do.

        Not of counts on an accelerator, which would wait for the look.
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
    """A histogram of what was counted; ``only_logits`` if that may turn out to be probabilities."""
    made = CalibrationHistogram(num_labels, num_cells=num_cells)
    made._state, made._only_logits = state, only_logits
    return made


def restored(saved: Mapping[str, Tensor], own: _tally.Counted) -> _tally.Counted:
    """Copies of what was saved, which must have the sizes of ``own`` and goes to its device."""
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
    # The mean doubt of a cell lies inside it, but for the rounding of doubts below 1e-38.
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
    """The bin that each cell's centre lies in: in integers where cells are even in p."""
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
    """Whether what came as logits looks like probabilities, as a 0-d tensor."""
    negative, positive = counts.sum((0, 2)).unbind()
    low, _ = grid.logits()
    alike = measures.like_probabilities(low.to(counts.device), positive)
    return alike & (negative.sum() == 0) & (positive.sum() >= _SUSPECT)


def by_label(value: Tensor, num_labels: int | None, name: str) -> Tensor:
    """One row per label, a view where that can be."""
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
    """Where the group's backend wants a tensor that lies on ``own``."""
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
    """Version 0.1 had no pieces: its outermost cells go whole where their mean doubts say."""
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
    """What the numbers say to do: a line of text, or one for the labels that share an advice."""
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
        return "Nothing to advise: both classes, and more than one logit, must be seen."
    if slope == math.inf:
        return "A threshold tells the classes apart: the slope has no end. Measure more data."
    if slope <= 0:
        return "The logits speak against the labels: look at the data first."
    gain = float(histogram.decomposition().miscalibration) / nll
    shift = abs(mean - rate) > 0.05 * min(rate, 1 - rate)
    if slope < 0.9:
        text = "Over-confident (slope below 1): softer labels help, and so does a repair."
    elif slope > 1.1:
        text = "Not confident enough (slope above 1): softer labels would hurt; repair it instead."
    elif gain > 0.01 or shift:
        text = "The slope is right: softer labels would not help; a repair does."
    else:
        return "Well calibrated: nothing to repair."
    return text + (" The mean probability is not the base rate." if shift else "")
