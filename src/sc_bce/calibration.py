"""Streaming, exact, mergeable measurement of calibration for binary and dense predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _batch, _checks
from ._batch import valid_elements

__all__ = ["CalibrationHistogram", "Reliability"]

_BLOCK = 1 << 18  # elements worked on at a time: 1 MiB of float32, inside a CPU's cache
_ROWS = 4  # threads that count at once
_HALVINGS = 4  # one logarithm for 16 elements
_FINEST = 100_000  # cells that float32 can tell apart


class Reliability(NamedTuple):
    """The table behind a reliability diagram; empty bins have nan in the last two columns."""

    edges: Tensor
    """(num_bins + 1,) edges of the confidence bins"""
    count: Tensor  # type: ignore[assignment]
    """(num_bins,) elements in each bin, int64"""
    confidence: Tensor
    """(num_bins,) mean confidence in each bin"""
    accuracy: Tensor
    """(num_bins,) accuracy (top label) or share of positives (positive class) in each bin"""


class CalibrationHistogram:
    r"""Accumulates predictions in fixed memory and derives every calibration measure from them.

    Two readings of a binary prediction :math:`p` with outcome :math:`y`, chosen by ``kind``:
    ``"top_label"`` (the default, the paper's): confidence :math:`\max(p, 1-p)`, outcome "the
    prediction :math:`p \ge 1/2` is right"; ``"positive_class"``: confidence :math:`p`, outcome
    :math:`y`. With bins :math:`m` of :math:`n_m` among :math:`n` elements,

    .. math::
        \mathrm{ECE} = \sum_m \tfrac{n_m}{n} |\mathrm{acc}_m - \mathrm{conf}_m|, \qquad
        \mathrm{OE} = \sum_m \tfrac{n_m}{n}\, \mathrm{conf}_m
        \max(\mathrm{conf}_m - \mathrm{acc}_m, 0).

    Each element falls into one of ``num_cells`` fine cells over :math:`p`, which keep int64
    counts and float64 sums of the confidence; NLL and Brier score are summed beside them. So
    accuracy, confidence, NLL and Brier score are exact, and so is every measure on equal-width
    bins whose number divides ``num_cells``. Otherwise a cell that a bin edge cuts goes whole into
    the bin of its centre, which changes the ECE by at most twice the share of the elements in
    such cells. Equal-mass bins (:meth:`adaptive_ece`, :meth:`sweep_ece`) take cells whole: the
    elements of one cell, alike within 1 / ``num_cells``, are ties.

    Args:
        num_cells: cells over [0, 1], an even number. Default: 10,000 (240 kB).

    Raises:
        ValueError: ``num_cells`` not even and positive.

    Note:
        The state lives where the last update's input lived; updates never make an accelerator
        wait. A value on an inner bin edge, to two units of its precision, belongs to the bin
        farther from 1/2, so that p = 0.1 and p = 0.9 are the same confidence; p = 1 belongs to
        the last bin. Each element is worked out in the input's precision, float32 at least, so
        that small losses keep their digits, and summed in float64. Measures are 0-d float64
        tensors, nan before the first update.

    References:
        Guo et al., ICML 2017 (ECE, MCE); Thulasidasan et al., NeurIPS 2019 (OE); Nixon et al.,
        CVPR Workshops 2019 (adaptive); Roelofs et al., AISTATS 2022 (sweep); Kumar et al.,
        NeurIPS 2019 (debiased).

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

    def __init__(self, num_cells: int = 10_000) -> None:
        _checks.positive_int("num_cells", num_cells)
        if num_cells % 2:
            raise ValueError(
                f"Expected argument `num_cells` to be even, so that 1/2 is a cell's edge, but got "
                f"{num_cells}"
            )
        self.num_cells = int(num_cells)
        half = num_cells // 2
        # Cells are kept by (predicted class, confidence); counts also by label.
        self._counts = torch.zeros(2, half, 2, dtype=torch.int64)
        self._confidences = torch.zeros(2, half, dtype=torch.float64)
        self._squared_error = torch.zeros((), dtype=torch.float64)
        self._log_loss = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        input: Tensor,
        target: Tensor,
        *,
        from_logits: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        """Add predictions.

        Args:
            input: logits, or probabilities with ``from_logits=False``; any shape and device.
            target: 0 and 1 in any dtype, of the same size.
            from_logits: whether ``input`` holds logits. Default: True.
            ignore_index: target value of elements to leave out. Default: None.

        Raises:
            ValueError: sizes that differ; labels other than 0 and 1; nan; probabilities outside
                [0, 1]. The histogram is then unchanged. On an accelerator, where a look would
                wait, such elements make the measures nan instead.
            TypeError: an argument of the wrong type.
        """
        _batch.pair(input, target)
        ignore_index = _checks.ignore_index(ignore_index)
        tally = _Tally(self.num_cells, input, target)
        if input.numel():
            blocks = (torch.split(part.reshape(-1), _BLOCK) for part in (input, target))
            for x, y in zip(*blocks, strict=True):
                tally.add(x, y, from_logits, ignore_index)
        self._move(input.device)
        self._add(tally.parts())

    def merge(self, other: CalibrationHistogram) -> CalibrationHistogram:
        """Add another histogram's elements to this one, and return this one.

        Raises:
            ValueError: the other has another number of cells.
            TypeError: the other is no histogram.
        """
        if not isinstance(other, CalibrationHistogram):
            raise TypeError(
                "Expected argument `other` to be a CalibrationHistogram, but got "
                f"{type(other).__name__}"
            )
        if other.num_cells != self.num_cells:
            raise ValueError(
                f"Expected argument `other` to have num_cells={self.num_cells}, but got "
                f"num_cells={other.num_cells}; build both with the same number"
            )
        self._add(tuple(part.to(self._counts.device) for part in other._state()))
        return self

    def __add__(self, other: CalibrationHistogram) -> CalibrationHistogram:
        if not isinstance(other, CalibrationHistogram):
            return NotImplemented
        return CalibrationHistogram(self.num_cells).merge(self).merge(other)

    def __radd__(self, other: object) -> CalibrationHistogram:
        """For ``sum(histograms)``, which begins at 0."""
        return self + CalibrationHistogram(self.num_cells) if other == 0 else NotImplemented

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> CalibrationHistogram:
        """Sum over the processes of ``group``, in place, and return this histogram.

        A collective call, once the local updates of an evaluation are done: a second call would
        count everything again. Without an initialised process group it does nothing.
        """
        if dist.is_available() and dist.is_initialized():
            if dist.get_backend(group) == "nccl":
                self._move(torch.device("cuda", torch.cuda.current_device()))
            for part in self._state():
                dist.all_reduce(part, group=group)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the counts and sums, to be saved."""
        return {
            "counts": self._counts.clone(),
            "confidences": self._confidences.clone(),
            "squared_error": self._squared_error.clone(),
            "log_loss": self._log_loss.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the content by a saved one.

        Raises:
            ValueError: a key is missing or too many, or the number of cells differs; the
                histogram is then unchanged.
        """
        own = self.state_dict()
        if set(state_dict) != set(own):
            raise ValueError(
                f"Expected argument `state_dict` to have the keys {sorted(own)}, but got "
                f"{sorted(state_dict)}"
            )
        for name, value in own.items():
            _checks.saved_cells(name, state_dict[name], value)
        self._set(tuple(state_dict[name].to(part) for name, part in own.items()))

    def accuracy(self, kind: str = "top_label") -> Tensor:
        """Share of right predictions (``"positive_class"``: share of positives)."""
        count, outcome, _ = self._cells(kind)
        return outcome.sum() / count.sum()

    def confidence(self, kind: str = "top_label") -> Tensor:
        """Mean confidence of the predicted label (``"positive_class"``: mean probability)."""
        count, _, confidence = self._cells(kind)
        return confidence.sum() / count.sum()

    def ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Expected calibration error over ``num_bins`` equal-width bins of [0, 1]."""
        return _ece(*self._equal_width(num_bins, kind))

    def oe(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Overconfidence error: gaps above the accuracy only, weighted by confidence."""
        count, outcome, confidence = self._equal_width(num_bins, kind)
        over = (confidence - outcome).clamp(min=0)
        weighted = torch.where(count > 0, confidence / count * over, 0.0)
        return weighted.sum() / count.sum()

    def mce(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Maximum calibration error: the largest gap of any bin that is not empty."""
        count, outcome, confidence = self._equal_width(num_bins, kind)
        gap = torch.where(count > 0, (outcome - confidence).abs() / count, 0.0).max()
        return torch.where(count.sum() > 0, gap, torch.nan)

    def adaptive_ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        """Expected calibration error over ``num_bins`` bins of equal mass."""
        _checks.positive_int("num_bins", num_bins)
        cells = self._cells(kind)
        return _ece(*_equal_mass(cells, num_bins))

    def sweep_ece(self, kind: str = "top_label") -> Tensor:
        """Expected calibration error over the most equal-mass bins with monotone accuracy.

        The number of bins grows from one until the accuracy first falls from a bin to the next.
        """
        cells = tuple(part.cpu() for part in self._cells(kind))
        filled = cells[0] > 0
        count, outcome, confidence = (part[filled] for part in cells)
        best = _ece(count.sum()[None], outcome.sum()[None], confidence.sum()[None])
        for num_bins in range(2, len(count) + 1):
            bins = _equal_mass((count, outcome, confidence), num_bins)
            accuracy = (bins[1] / bins[0])[bins[0] > 0]
            if bool((accuracy.diff() < 0).any()):
                break
            best = _ece(*bins)
        return best.to(self._counts.device)

    def debiased_ece(self, num_bins: int = 10, kind: str = "top_label") -> Tensor:
        r"""Debiased :math:`\ell_2` calibration error over equal-width bins.

        The square root of the mean of :math:`(\mathrm{conf} - \mathrm{acc})^2` less its bias
        :math:`\mathrm{acc} (1 - \mathrm{acc}) / (n_m - 1)`, or 0 where that is negative; bins of
        fewer than two elements give 0.
        """
        count, outcome, confidence = self._equal_width(num_bins, kind)
        accuracy = outcome / count
        squared = (confidence / count - accuracy) ** 2 - accuracy * (1 - accuracy) / (count - 1)
        mean = torch.where(count > 1, count * squared, 0.0).sum() / count.sum()
        return mean.clamp(min=0).sqrt()

    def brier(self, kind: str = "top_label") -> Tensor:
        """Mean squared error of the probability; the same for both kinds."""
        count, _, _ = self._cells(kind)
        return self._squared_error / count.sum()

    def nll(self, kind: str = "top_label") -> Tensor:
        """Mean negative log-likelihood, in nats; the same for both kinds."""
        count, _, _ = self._cells(kind)
        return self._log_loss / count.sum()

    def reliability(self, num_bins: int = 10, kind: str = "top_label") -> Reliability:
        """Return the table of a reliability diagram over equal-width bins of [0, 1]."""
        count, outcome, confidence = self._equal_width(num_bins, kind)
        edges = torch.arange(num_bins + 1, dtype=torch.float64, device=count.device) / num_bins
        return Reliability(edges, count, confidence / count, outcome / count)

    def _cells(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Count, outcomes and summed confidence of each cell, in order of confidence."""
        _checks.choice("kind", kind, ("top_label", "positive_class"))
        count = self._counts.sum(-1)
        # A cell that nan has spoilt has no outcome either.
        positive = self._counts[..., 1] + 0 * self._confidences
        if kind == "top_label":
            right = count[0] - positive[0] + positive[1]
            return (count.sum(0), right, self._confidences.sum(0))
        # Below 1/2 the probability is the doubt, and the order of confidence turns round.
        doubt = (count[0] - self._confidences[0]).flip(0)
        return (
            torch.cat((count[0].flip(0), count[1])),
            torch.cat((positive[0].flip(0), positive[1])),
            torch.cat((doubt, self._confidences[1])),
        )

    def _equal_width(self, num_bins: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        _checks.positive_int("num_bins", num_bins)
        cells = self._cells(kind)
        first = self.num_cells - len(cells[0])
        cell = torch.arange(first, self.num_cells, device=cells[0].device)
        # The bin of a cell's centre, in integers.
        return _gather(cells, (2 * cell + 1) * num_bins // (2 * self.num_cells), num_bins)

    def _state(self) -> tuple[Tensor, ...]:
        return (self._counts, self._confidences, self._squared_error, self._log_loss)

    def _add(self, parts: tuple[Tensor, ...]) -> None:
        # Not in place: a state made in inference mode could not be changed outside it.
        self._set(tuple(mine + part for mine, part in zip(self._state(), parts, strict=True)))

    def _set(self, parts: tuple[Tensor, ...]) -> None:
        self._counts, self._confidences, self._squared_error, self._log_loss = parts

    def _move(self, device: torch.device) -> None:
        self._set(tuple(part.to(device) for part in self._state()))

    def __repr__(self) -> str:
        count = int(self._counts.sum())
        return f"{type(self).__name__}(num_cells={self.num_cells}, count={count})"


class _Tally:
    """What one update adds, gathered block by block in the input's precision, float32 at least.

    With doubt d = min(p, 1 - p), odds e = d / (1 - d) = exp(-|x|) and logit x, an element's log
    loss is log(1 + e), and |x| more where the prediction is wrong; its squared error is d^2, and
    1 - 2d more where the prediction is wrong. All are sums of positive terms: nothing cancels.
    """

    def __init__(self, num_cells: int, input: Tensor, target: Tensor) -> None:
        precision = torch.promote_types(input.dtype, torch.float32)
        self._half = num_cells // 2
        # What rounding left just below an edge is on it: 0.9 in float32, or 1 - 0.2. Two units of
        # the input's precision, and a third for what is rounded here.
        slack = 3 * num_cells * torch.finfo(precision).eps
        # A label must not be rounded to a legal one, nor a cell to its neighbour.
        wider = target.dtype if target.is_floating_point() else precision
        self._dtype = torch.promote_types(
            precision, wider if num_cells <= _FINEST else torch.float64
        )
        device, block = input.device, min(input.numel(), _BLOCK)
        self._one = torch.ones((), dtype=self._dtype, device=device)
        self._top = self._one * (self._half + slack)
        # By (predicted class, label, confidence), with one cell more for p = 1. Each row is filled
        # by one thread.
        rows = min(_ROWS, torch.get_num_threads()) if input.numel() >= _BLOCK else 1
        size = (rows, 4 * (self._half + 1))
        self._counts = torch.zeros(size, dtype=torch.int64, device=device)
        self._doubts = torch.zeros(size, dtype=torch.float64, device=device)
        self._ignored = torch.zeros((), dtype=torch.int64, device=device)
        self._squares, self._log_loss = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        # Fresh memory for each block would cost more than the arithmetic does.
        self._work = [torch.empty(block, dtype=self._dtype, device=device) for _ in range(3)]
        self._wide = torch.empty(block, dtype=torch.float64, device=device)
        self._narrow = torch.empty(block, dtype=torch.int32, device=device)
        self._cell = torch.empty(block, dtype=torch.int64, device=device)
        self._ones = torch.ones(block, dtype=torch.int64, device=device)

    def add(
        self, input: Tensor, target: Tensor, from_logits: bool, ignore_index: int | None
    ) -> None:
        x, label = input, target
        if ignore_index is not None:
            # As if certain and right, which adds nothing to any sum, and uncounted at the end.
            ignored = ~valid_elements(target, ignore_index)
            x = x.masked_fill(ignored, -torch.inf if from_logits else 0)
            label = label.masked_fill(ignored, 0)
            self._ignored += ignored.sum()
        x = x.to(self._dtype)
        y, doubt, work = (buffer[: len(x)] for buffer in self._work)
        # A byte becomes a float several times faster than a bool does.
        y.copy_(label.view(torch.uint8) if label.dtype == torch.bool else label)
        if from_logits:
            logit = x
            torch.abs(x, out=doubt).neg_().sigmoid_()
        else:
            logit = torch.logit(x)
            torch.minimum(x, 1 - x, out=doubt)
        log_loss = torch.sub(self._one, y, alpha=2, out=work).mul_(logit).clamp_(min=0).sum()
        # There is no logit beyond [0, 1].
        legal = ~log_loss.isnan()
        if label.dtype != torch.bool:
            legal &= torch.mul(y, y, out=work).sub_(y).abs_().sum() == 0
        readable = _checks.predictions(legal, x, label, from_logits, ignore_index)
        self._squares += torch.mul(doubt, doubt, out=work).sum()
        torch.sub(self._one, doubt, out=work)
        self._log_loss += log_loss + _sum_log1p(torch.div(doubt, work, out=work))
        y.add_(torch.ge(x, 0 if from_logits else 0.5, out=work), alpha=2)
        torch.sub(self._top, doubt, alpha=2 * self._half, out=work).add_(y, alpha=self._half + 1)
        # By way of int32, several times faster than at once.
        cell = self._cell[: len(x)].copy_(self._narrow[: len(x)].copy_(work))
        if not readable:
            cell.clamp_(0, self._counts.shape[1] - 1)
            for part in (self._doubts, self._squares, self._log_loss):
                part += torch.where(legal, 0.0, torch.nan)
        rows = len(self._counts) if len(x) % len(self._counts) == 0 else 1
        for sums, values in (
            (self._doubts, self._wide[: len(x)].copy_(doubt)),
            (self._counts, self._ones[: len(x)]),
        ):
            sums[:rows].scatter_add_(1, cell.view(rows, -1), values.view(rows, -1))

    def parts(self) -> tuple[Tensor, ...]:
        """The state of a histogram that saw this update alone."""
        counts, doubts = (
            part.sum(0).view(2, 2, self._half + 1) for part in (self._counts, self._doubts)
        )
        counts[0, 0, -1] -= self._ignored
        # p = 1 belongs to the last cell.
        for part in (counts, doubts):
            part[..., -2] += part[..., -1]
        counts, doubts = counts[..., :-1], doubts[..., :-1]
        confidences = counts - doubts
        wrong = sum((confidences[i, 1 - i] - doubts[i, 1 - i]).sum() for i in (0, 1))
        return counts.transpose(1, 2), confidences.sum(1), self._squares + wrong, self._log_loss


def _sum_log1p(values: Tensor) -> Tensor:
    """Sum of log(1 + v) for v in [0, 1], which are overwritten; small ones keep every digit.

    With few logarithms, since (1 + a)(1 + b) = 1 + (a + b + ab).
    """
    for _ in range(_HALVINGS):
        if len(values) % 2:
            break
        values, other = values.chunk(2)
        values.add_(other.addcmul_(other, values))
    return values.log1p_().sum(dtype=torch.float64)


def _gather(
    cells: tuple[Tensor, Tensor, Tensor], index: Tensor, num_bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    count, outcome, confidence = (
        torch.zeros(num_bins, dtype=part.dtype, device=part.device).index_add_(0, index, part)
        for part in cells
    )
    return count, outcome, confidence


def _equal_mass(
    cells: tuple[Tensor, Tensor, Tensor], num_bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    count = cells[0]
    # A cell goes where its middle element would go if each element could be moved alone. In
    # float64, since the product of a count and num_bins may pass int64's end.
    middle = (count.cumsum(0) - count).double() + (count - 1).double() / 2
    index = (middle * num_bins / count.sum()).floor().nan_to_num(0).clamp(0, num_bins - 1)
    return _gather(cells, index.to(torch.int64), num_bins)


def _ece(count: Tensor, outcome: Tensor, confidence: Tensor) -> Tensor:
    return (outcome - confidence).abs().sum() / count.sum()
