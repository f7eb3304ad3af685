"""Streaming, exact and mergeable measurement of calibration for binary and dense predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _errors
from .._arrays import Array
from .._errors import refuse
from .._torch import reduced, served, world_size
from . import cells as _cells
from . import report
from .cells import by_label, counted
from .counting import count
from .measures import Measures
from .scores import isotonic

__all__ = ["CalibrationHistogram"]


class CalibrationHistogram(Measures):
    r"""Measure calibration: expected calibration error (ECE), reliability, NLL, in fixed memory.

    A binary prediction :math:`p` with outcome :math:`y` is read in one of two ways, chosen by
    ``kind``. With ``"top_label"`` (the default, as in the paper) the confidence is
    :math:`\max(p, 1-p)` and the outcome is whether the prediction :math:`p \ge 1/2` is right.
    With ``"positive_class"`` the confidence is :math:`p` and the outcome :math:`y`; read it if
    positives are rare, which the first hides. Binned measures sort the elements by confidence
    into ``num_bins`` bins :math:`m`, of equal width over [0, 1] unless they say otherwise. With
    :math:`n_m` of :math:`n` elements in a bin,

    .. math::
        \mathrm{ECE} = \sum_m \tfrac{n_m}{n} |\mathrm{acc}_m - \mathrm{conf}_m|, \qquad
        \mathrm{OE} = \sum_m \tfrac{n_m}{n}\, \mathrm{conf}_m
        \max(\mathrm{conf}_m - \mathrm{acc}_m, 0).

    Each element falls into one of many fine cells, which sum its weight (1), its doubt
    :math:`\min(p, 1-p)` and, where that does not tell it, its logit in float64. Accuracy,
    confidence, NLL and Brier score are exact, and so is every measure on equal-width bins whose
    number divides ``num_cells`` and is at most an eighth of it. Otherwise a cell that a bin edge
    cuts goes whole into the bin of its centre. Equal-mass bins hold whole cells. A soft label
    :math:`y` counts as a positive of weight :math:`y` and a negative of weight :math:`1 - y`.

    **A probability of exactly 0 or 1 was rounded.** NLL and ECE take it as it is: one wrong 1
    makes the NLL infinite. Slope, intercept and repairs need a logit. If :math:`1 - 2h` is the
    nearest probability seen (or :math:`h = 1/510`, of an 8-bit map), 1 stands for
    :math:`[1-h, 1]`. Among its logits the one is taken that makes the observed share of positives
    likeliest under the line :math:`az + b` through all other elements, :math:`(\mathrm{logit}
    \tfrac{n_+ + 1/2}{n + 1} - b)/a`, but none below the edge :math:`\mathrm{logit}(1-h)`: so
    what is sure does not move the slope unless too much of it is wrong. Without such a line it is
    the mean logit of the interval, :math:`H(h)/h` with the entropy :math:`H`. Infinite logits are
    read alike.

    **C exclusive classes** are measured one by one, each against the rest:
    ``CalibrationHistogram(num_labels=C).update(logits.softmax(1), F.one_hot(y, C).movedim(-1, 1),
    from_logits=False)``. Of two classes pass ``logits[:, 1] - logits[:, 0]``.

    Args:
        num_labels: number of labels in dimension 1, each measured separately; every result then
            has shape (num_labels,), and :meth:`pooled` measures them together. None: all elements
            are one label. Default: None.
        num_cells: cells over [0, 1], an even number. Default: 10,000 (0.50 MB per label).

    Raises:
        ValueError: ``num_cells`` is not even and positive; ``num_labels`` is not positive; a
            ``kind`` or ``score`` is unknown; ``num_bins`` is not positive.
        TypeError: an argument has the wrong type.

    Note:
        The state is kept on the device of the last update's input (on the CPU if that device has
        no float64); updates never make an accelerator wait. A value on an inner bin edge, within
        two units of its precision, belongs to the bin farther from 1/2, so that p = 0.1 and
        p = 0.9 are the same confidence. Elements are evaluated in the input's precision, at least
        float32, and summed in float64: counts are exact up to 2^53. Measures are float64 tensors,
        0-d without ``num_labels``, and nan before the first update. If 50 or more logits look
        like probabilities, the first measure that reads the cells on a CPU warns.

    References:
        Guo et al., ICML 2017 (ECE, MCE); Thulasidasan et al., NeurIPS 2019 (OE); Nixon et al.,
        CVPR Workshops 2019 (adaptive); Roelofs et al., AISTATS 2022 (sweep); Kumar et al.,
        NeurIPS 2019 (debiased); Neumann et al., 2018 (average); Cox 1958, Van Calster et al. 2019
        (slope and intercept); Dimitriadis, Gneiting and Jordan, PNAS 2021 (decomposition).

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
    """

    def __init__(self, num_labels: int | None = None, *, num_cells: int = 10_000) -> None:
        self.num_cells = _errors.whole("num_cells", num_cells)
        if num_cells % 2:
            wanted = "be even, so that 1/2 is a cell's edge"
            refuse("num_cells", wanted, num_cells, f"pass {num_cells + 1}")
        self.num_labels = None if num_labels is None else _errors.whole("num_labels", num_labels)
        self._grid = _cells.grid(self.num_cells)
        self._looked = True  # whether the logits can't turn out to be probabilities
        self._state = _cells.nothing(self.num_labels or 1, self._grid)

    # --- what is seen -----------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, input: Tensor | Array, target: Tensor | Array, *,
        weight: Tensor | Array | None = None, from_logits: bool = True,
        ignore_index: float | None = None,
    ) -> None:  # fmt: skip
        """Add a batch of predictions.

        Args:
            input: logits, or probabilities with ``from_logits=False``; a Tensor of any shape and
                device, or a NumPy array, masked ones too. With ``num_labels``, dimension 1 holds
                the labels. uint8 is an 8-bit map of probabilities, 0 to 255, whatever
                ``from_logits`` says.
            target: labels of the same size: 0 and 1 in any dtype, or soft ones in [0, 1].
            weight: weight of each element, 0 or more, of a shape that broadcasts to the input's.
                Default: None, all 1.
            from_logits: whether ``input`` holds logits. Default: True.
            ignore_index: target value of elements to leave out, nan too. Default: None.

        Raises:
            ValueError: sizes differ, or dimension 1 is not ``num_labels``; labels outside [0, 1];
                nan; probabilities outside [0, 1]. The histogram is then unchanged. On an
                accelerator, which would have to wait for the check, illegal elements make the
                measures nan instead.
            TypeError: an argument has the wrong type.

        Example:
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 255]),
            ...                  ignore_index=255)
            >>> histogram
            CalibrationHistogram(num_cells=10000, count=2)
        """
        batch = _cells.batch(input, target, weight, from_logits, ignore_index)
        rows = batch.rows(lambda part: by_label(part, self.num_labels))
        new = count(self._grid, rows)
        self._state, self._looked = new.add_(self._state.to(new.device)), False

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget all elements.

        Example:
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> histogram.reset()
            >>> histogram
            CalibrationHistogram(num_cells=10000, count=0)
        """
        self._state, self._looked = torch.zeros_like(self._state), True

    @torch.inference_mode(False)
    def merge(self, other: CalibrationHistogram) -> CalibrationHistogram:
        """Add the elements of another histogram to this one, and return this one.

        ``one + other`` and ``sum(histograms)`` do the same into a new histogram.

        Example:
            >>> part = CalibrationHistogram()
            >>> part.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> sum([part, part, part])
            CalibrationHistogram(num_cells=10000, count=6)
        """
        same_kind(self, other)
        self._state = self._state + other._state.to(self._state.device)
        self._looked = self._looked and other._looked
        return self

    def __add__(self, other: CalibrationHistogram) -> CalibrationHistogram:
        if not isinstance(other, CalibrationHistogram):
            return NotImplemented
        return holding(self._state, self.num_labels, self.num_cells, self._looked).merge(other)

    def __radd__(self, other: object) -> CalibrationHistogram:
        """For ``sum(histograms)``, which begins at 0."""
        if other != 0:
            return NotImplemented
        return holding(self._state, self.num_labels, self.num_cells, self._looked)

    def pooled(self) -> CalibrationHistogram:
        """Return a histogram of the elements of all labels together, without ``num_labels``.

        Example:
            >>> histogram = CalibrationHistogram(num_labels=2)
            >>> histogram.update(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]]))
            >>> histogram.accuracy(), histogram.pooled().accuracy()
            (tensor([1., 0.], dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
        """
        return holding(self._state.sum(0, keepdim=True), None, self.num_cells, self._looked)

    def label(self, index: int) -> CalibrationHistogram:
        """Return a histogram of the elements of one label, without ``num_labels``.

        Args:
            index: number of the label; a negative one counts from the end.

        Example:
            >>> histogram = CalibrationHistogram(num_labels=2)
            >>> histogram.update(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]]))
            >>> histogram.label(1).accuracy()
            tensor(0., dtype=torch.float64)
        """
        labels = self.num_labels or 1
        if not -labels <= index < labels:
            refuse("index", f"be in [{-labels}, {labels - 1}]", index, error=IndexError)
        one = self._state.narrow(0, index % labels, 1)
        return holding(one, None, self.num_cells, self._looked)

    @torch.inference_mode(False)
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> CalibrationHistogram:
        """Sum the histograms of the processes of ``group``, in place, and return this histogram.

        Call it once, in every process, after the local updates of an evaluation: a second call
        would count everything again. Without an initialised process group it does nothing.

        Example:
            >>> CalibrationHistogram().all_reduce()  # one process
            CalibrationHistogram(num_cells=10000, count=0)
        """
        if world_size(group) != 1:
            own = self._state.device
            there = reduced(self._state.to(served(group, own)), group)
            self._state, self._looked = there.to(own), False
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the counts and sums, to be saved.

        Example:
            >>> sorted(CalibrationHistogram().state_dict())
            ['counts', 'doubts', 'sizes', 'totals']
        """
        return {name: part.clone() for name, part in counted(self._state)._asdict().items()}

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the content with a copy of what :meth:`state_dict` returned.

        Example:
            >>> one, other = CalibrationHistogram(), CalibrationHistogram()
            >>> one.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> other.load_state_dict(one.state_dict())
            >>> other
            CalibrationHistogram(num_cells=10000, count=2)
        """
        self._state, self._looked = _cells.restored(state_dict, self._state), False

    @property
    def from_logits(self) -> bool:
        """Whether logits were seen: False if it holds elements and all were probabilities.

        Example:
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([0.9]), torch.tensor([1]), from_logits=False)
            >>> histogram.from_logits
            False
        """
        state = counted(self._state)
        return bool((state.totals[:, 2].sum() > 0) | (state.counts.sum() == 0))

    def to_dict(self) -> dict[str, Any]:
        """Return every measure by name, as numbers (lists with ``num_labels``), for a log.

        Example:
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 0]))
            >>> round(histogram.to_dict()["nll"], 3)
            0.471
        """
        return {name: value.tolist() for name, value in self.measures().items()}

    def summary(self) -> str:
        """Return a printable table of the main measures, and a line of advice: train or repair.

        With ``num_labels`` the table has a column per label, and there is a line of advice for
        each group of labels that need the same.

        Example:
            >>> histogram, truth = CalibrationHistogram(), torch.logit(torch.tensor([0.25, 0.75]))
            >>> histogram.update(2 * truth.repeat(4), torch.tensor([0, 1, 0, 1, 0, 1, 1, 0]))
            >>> print(histogram.summary().splitlines()[-1])
            Over-confident (slope below 1): repair it or stop earlier; smoothing may help too.
        """
        values = {name: value.reshape(-1).tolist() for name, value in self.measures().items()}
        values["blocks"] = [len(isotonic(one.count, one.positive).count) for one in self.cells()]
        return report.summary(values, self.num_labels is not None)

    def __repr__(self) -> str:
        labels = "" if self.num_labels is None else f"num_labels={self.num_labels}, "
        counts = counted(self._state).counts
        count = "" if counts.is_meta else f", count={float(counts.sum()):.15g}"
        return f"{type(self).__name__}({labels}num_cells={self.num_cells}{count})"


def same_kind(one: Any, other: Any) -> None:
    """Refuse another type than the first one's, and other cells or labels."""
    if not isinstance(other, type(one)):
        wanted = f"be {type(one).__name__}"
        refuse("other", wanted, _errors.describe(other), error=TypeError)
    for name in ("num_cells", "num_labels"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            remedy = "build both with the same number"
            refuse("other", f"have {name}={mine}", f"{name}={theirs}", remedy)


def holding(
    state: Tensor, num_labels: int | None, num_cells: int, looked: bool = True
) -> CalibrationHistogram:
    """A histogram of a state; ``looked`` if its logits can't turn out to be probabilities."""
    made = CalibrationHistogram(num_labels, num_cells=num_cells)
    made._state, made._looked = state, looked
    return made
