"""Columns of the table, one row per training sample: look up, write, mean by row, merge."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _errors
from .._errors import refuse
from .._torch import any_set, readable, reduced

_FEW = 1 << 20  # rows up to which a pass over all costs less than picking some
CHUNK = 1 << 24  # rows that are merged at a time: bounds the extra memory


def look_up(column: Tensor, rows: Tensor) -> Tensor:
    try:
        return column.index_select(0, rows)
    except IndexError:  # on a CPU torch looks at each
        _refuse_outside(rows, len(column))
        raise


def write(
    column: Tensor, rows: Tensor, values: Tensor, limits: tuple[Tensor, Tensor] | None = None
) -> None:
    """Write into a column; a row that occurs more than once gets the mean of its values."""
    if readable(rows):
        new = values if limits is None else values.clamp(*limits)
        column.scatter_(0, rows, new)
        if torch.equal(column.index_select(0, rows), new):
            return  # no row occurs again with another value
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        column.index_copy_(0, rows, mean_by_row(rows, values))
    else:
        column.scatter_reduce_(0, rows, values, "mean", include_self=False)
    if limits is None:
        return
    if len(column) <= _FEW:  # after the mean; all other rows are within them
        column.clamp_(*limits)
    else:
        column.index_copy_(0, rows, column.index_select(0, rows).clamp_(*limits))


def merged(
    columns: dict[str, Tensor], moved: Tensor, group: dist.ProcessGroup | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The merged columns, and the rows that any process of the group moved.

    A row becomes the mean of its values over the processes that moved it. The result is a copy,
    so that this process keeps a whole table if another dies during the merge.
    """
    new, anywhere = {name: column.clone() for name, column in columns.items()}, moved.clone()
    for start in range(0, len(moved), CHUNK):
        rows = slice(start, start + CHUNK)
        own = moved[rows].float()
        sums = torch.stack((own, *(column[rows] * own for column in columns.values())))
        movers, *totals = reduced(sums, group)
        anywhere[rows] = movers > 0
        for column, total in zip(new.values(), totals, strict=True):
            column[rows] = torch.where(movers > 0, total / movers, column[rows])
    return new, anywhere


def mean_by_row(rows: Tensor, values: Tensor) -> Tensor:
    """The mean over the places of a batch that share a row, at each of these places.

    By sorting, since torch.unique would wait for its size: the places of a row share the first
    one that it has in the order.
    """
    first = torch.searchsorted(rows.sort().values, rows.contiguous())
    total, count = (
        torch.zeros_like(values).index_add_(0, first, part)
        for part in (values, torch.ones_like(values))
    )
    return (total / count)[first]


def rows_of(index: Tensor | None, input: Tensor, column: Tensor, shared: bool) -> Tensor:
    """The row of each sample of a batch, on the table's device; row 0 if all share it."""
    device = column.device
    if input.device != device:
        remedy = f"move the criterion with `criterion.to({str(input.device)!r})`"
        refuse("input", f"be on the table's device {device}", input.device, remedy)
    if shared:
        samples = input.shape[0] if input.dim() else 1
        return torch.zeros(samples, dtype=torch.int64, device=device)
    rows = _checked(index, input.shape[:1])
    if rows.device != device:
        _refuse_outside(rows, len(column))
        # Non-blocking only towards an accelerator: what comes from one is read on arrival.
        rows = rows.to(device, non_blocking=rows.device.type == "cpu")
    if torch.compiler.is_compiling():
        # Inductor reads a negative index from the end; past the end, its bounds check catches it.
        rows = torch.where(rows < 0, len(column), rows)
    return rows


def _checked(index: object, shape: torch.Size) -> Tensor:
    """The index of a training batch, one-dimensional, of which the range is not looked at."""
    if index is None:
        refuse(
            "index", "be the sample indices of the batch in training", "None",
            "wrap the dataset in IndexedDataset and pass the index that it yields (the Hugging "
            "Face Trainer drops it without `remove_unused_columns=False`), or build the module "
            "with num_samples=None for one shared level",
        )  # fmt: skip
    wanted = "be an integer Tensor"
    if not isinstance(index, Tensor):
        got, remedy = _errors.describe(index), "pass `torch.as_tensor(index)`"
        refuse("index", wanted, got, remedy, TypeError)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        refuse("index", wanted, index.dtype, "pass `index.long()`", TypeError)
    if index.shape != shape:
        wanted = f"have one entry per sample, shape {tuple(shape)}"
        refuse("index", wanted, f"shape {tuple(index.shape)}")
    return index.to(torch.int64).reshape(-1)


def _refuse_outside(rows: Tensor, num_samples: int) -> None:
    """Refuse rows that the table does not have; where they can be read."""
    outside = (rows < 0) | (rows >= num_samples)
    if any_set(outside):
        refuse(
            "index", f"be in [0, {num_samples - 1}]", rows[outside][0].item(),
            f"num_samples={num_samples} must count every sample of the indexed dataset, even "
            "if you train on a Subset of it (random_split); `resize` makes room for new ones",
            IndexError,
        )  # fmt: skip
