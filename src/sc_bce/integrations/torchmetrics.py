"""The histogram as a metric of torchmetrics. Needs `pip install torchmetrics`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _errors
from .._arrays import Array
from ..measure import CalibrationHistogram

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("CalibrationMetric needs: pip install torchmetrics") from error

__all__ = ["CalibrationMetric"]


class CalibrationMetric(Metric):
    """A :class:`CalibrationHistogram` as a ``torchmetrics.Metric``: every measure in one pass.

    The states are the counts and sums of the histogram, which add up over batches and processes:
    fixed memory for any number of elements, and the histogram's numbers to the bit. Everything
    else is torchmetrics: ``reset``, ``forward``, ``MetricCollection``, synchronisation when
    ``compute`` is called.

    Args:
        num_labels: number of labels in dimension 1, each measured separately. Default: None.
        num_cells: cells over [0, 1], an even number. Default: 10,000.
        from_logits: whether ``preds`` are logits and not probabilities. Default: True.
        ignore_index: target value of elements to leave out, nan too. Default: None.
        kwargs: passed on to ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: ``num_cells`` is not even and positive; ``num_labels`` is not positive; in use,
            what :meth:`CalibrationHistogram.update` refuses.
        TypeError: an argument has the wrong type.
        ImportError: at import, if torchmetrics is not installed.

    Note:
        ``compute`` returns the measures of ``CalibrationHistogram.to_dict`` as tensors, float64
        and 0-d, or of shape (num_labels,). In Lightning pass them to ``self.log_dict`` and call
        ``reset``: ``self.log`` takes a metric of one number only.

    Example:
        >>> import torch
        >>> from sc_bce.integrations.torchmetrics import CalibrationMetric
        >>> metric = CalibrationMetric()
        >>> metric.update(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1, 0, 0]))
        >>> metric.compute()["nll"]
        tensor(0.4714, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    counts: Tensor

    def __init__(
        self, num_labels: int | None = None, *, num_cells: int = 10_000, from_logits: bool = True,
        ignore_index: float | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        empty = CalibrationHistogram(num_labels, num_cells=num_cells)
        self.num_labels, self.num_cells = empty.num_labels, empty.num_cells
        self.from_logits, self.ignore_index = from_logits, _errors.ignored(ignore_index)
        for name, part in empty.state_dict().items():
            self.add_state(name, part, dist_reduce_fx="sum")

    def update(self, preds: Tensor | Array, target: Tensor | Array) -> None:
        """Add a batch of predictions.

        Args:
            preds: logits, or probabilities with ``from_logits=False``, of any shape; uint8 is an
                8-bit map of probabilities. With ``num_labels``, dimension 1 holds the labels.
            target: labels of the same size, in [0, 1].

        Example:
            >>> import torch
            >>> metric = CalibrationMetric(from_logits=False, ignore_index=255)
            >>> metric.update(torch.tensor([0.9, 0.2, 0.5]), torch.tensor([1, 0, 255]))
            >>> metric.compute()["count"]
            tensor(2., dtype=torch.float64)
        """
        batch = self._empty()
        batch.update(preds, target, from_logits=self.from_logits, ignore_index=self.ignore_index)
        for name, part in batch.state_dict().items():
            mine = getattr(self, name)
            setattr(self, name, mine + part.to(mine.device))

    def compute(self) -> dict[str, Tensor]:
        """Return every measure by name, over all processes.

        Example:
            >>> import torch
            >>> metric = CalibrationMetric()
            >>> metric.update(torch.tensor([0.0, 0.0]), torch.tensor([1, 0]))
            >>> metric.compute()["nll"]  # log 2
            tensor(0.6931, dtype=torch.float64)
        """
        measures = self.histogram().measures()
        return {name: value.to(self.counts.device) for name, value in measures.items()}

    def histogram(self) -> CalibrationHistogram:
        """Return the histogram of what this process has seen: for a summary, a diagram, a repair.

        Example:
            >>> import torch
            >>> metric = CalibrationMetric()
            >>> metric.update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
            >>> metric.histogram()
            CalibrationHistogram(num_cells=10000, count=2)
        """
        made = self._empty()
        made.load_state_dict({name: getattr(self, name) for name in made.state_dict()})
        return made

    def _empty(self) -> CalibrationHistogram:
        return CalibrationHistogram(self.num_labels, num_cells=self.num_cells)
