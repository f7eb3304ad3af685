"""The free repair: a curve through the cells of a histogram that rises."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..measure.cells import grid
from ..measure.scores import Blocks, Cells, isotonic
from .fit import CELLS, Fits, Repair, place

__all__ = ["IsotonicCalibration"]


class IsotonicCalibration(Repair):
    r"""Isotonic regression: calibrate a network after training by the best monotone curve.

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
    Fitted to probabilities, it takes and returns probabilities; an exact 0 or 1 lies in the
    outermost cell.

    Args:
        num_labels: number of labels in dimension 1, each with its own curve. Default: None.

    Attributes:
        table: calibrated logit of each cell, a buffer of shape (cells,) or (num_labels, cells).
        from_logits: whether it takes logits and not probabilities, a buffer; True before a fit.
        nll: mean negative log-likelihood of the fitted data before and after; None before a fit
            and after loading a state.

    Shape:
        - input: any; (N, num_labels, ...) with ``num_labels``. A Tensor or a NumPy array.
        - Returns: the same, in the same dtype (float32 for uint8 maps).

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
    num_cells = CELLS
    _if_worse = "the data are too few for a curve; take TemperatureScaling(bias=True)"

    def __init__(self, num_labels: int | None = None) -> None:
        cells, labels = grid(self.num_cells), () if num_labels is None else (num_labels,)
        super().__init__(num_labels, table=(*labels, 2 * cells.size))
        self._grid = cells
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget the fit. Also call it after ``to_empty``, which leaves the table unfilled.

        Example:
            >>> from sc_bce import IsotonicCalibration
            >>> isotonic = IsotonicCalibration()
            >>> isotonic.reset_parameters()
            >>> isotonic
            IsotonicCalibration(not fitted)
        """
        _, middle = self._grid.logits()
        first = torch.cat((-middle.flip(0), middle)).expand(self.table.shape)
        self.store(from_logits=True, fitted=False, table=first)

    def _fit(self, cells: list[Cells], sure: Tensor) -> Fits:
        tables = [_curve(one) for one in cells]
        return tables, cells, {"table": torch.stack(tables)}

    def _map(self, x: Tensor, most: float) -> Tensor:
        z = x
        if not self.takes_logits:
            z, most = torch.log(x) - torch.log(1 - x), math.inf
        index = place(self._grid, z, most)
        if self.num_labels is not None:
            first = torch.arange(self.num_labels, dtype=index.dtype, device=z.device)
            index = index + (first * self.table.shape[-1]).reshape(-1, *(1 for _ in z.shape[2:]))
        values = self.table.to(z.dtype).reshape(-1).index_select(0, index.reshape(-1))
        return values.reshape(z.shape)


def _curve(cells: Cells) -> Tensor:
    """One value per cell: that of its block, with straight lines across empty cells."""
    blocks = isotonic(cells.count, cells.positive)
    filled = torch.nonzero(cells.count > 0).flatten()
    owner = torch.searchsorted(torch.tensor(blocks.first, device="cpu"), filled, right=True) - 1
    values, filled = torch.logit(_shares(blocks))[owner], filled.double()
    if len(filled) == 1:
        return values.expand(cells.count.shape)
    at = torch.arange(len(cells.count), dtype=torch.float64, device="cpu")
    right = torch.searchsorted(filled, at).clamp(1, len(filled) - 1)
    rest = ((at - filled[right - 1]) / (filled[right] - filled[right - 1])).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], rest)


def _shares(blocks: Blocks) -> Tensor:
    """Share of positives in each block; never 0 or 1, for which one miss costs an infinite NLL."""
    n, k = (torch.tensor(part, dtype=torch.float64, device="cpu") for part in blocks[1:])
    share, safe = k / n, (k + 0.5) / (n + 1)
    if len(share) == 1:
        return safe
    if share[0] == 0:
        share[0] = torch.minimum(safe[0], share[1])
    if share[-1] == 1:
        share[-1] = torch.maximum(safe[-1], share[-2])
    return share
