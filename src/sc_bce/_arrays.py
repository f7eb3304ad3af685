"""NumPy arrays, and what converts itself to one, as tensors; NumPy need not be installed."""

from __future__ import annotations

from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from ._errors import refuse

__all__ = ["Array", "tensor", "unmasked"]


class Array(Protocol):
    """A NumPy array, or an object that converts itself to one."""

    def __array__(self) -> Any: ...


def tensor(value: Any, name: str) -> Any:
    """A NumPy array, scalar or DataFrame column as a Tensor; other values are returned as is."""
    if isinstance(value, Tensor) or not hasattr(value, "__array__"):
        return value
    array = value.__array__()
    # torch accepts neither read-only memory, negative strides nor a foreign byte order.
    if not array.flags.writeable or not array.flags.c_contiguous or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(array) if array.shape else torch.tensor(array.item(), device="cpu")
    except TypeError:
        wanted, got = "be a Tensor, or an array of numbers", f"an array of {array.dtype}"
        refuse(name, wanted, got, "pass `array.astype(float)`", TypeError)


def unmasked(*values: Any) -> Tensor | None:
    """Where none of these is masked, as numpy.ma does it; None if none has a mask."""
    masks = [value.mask for value in values if hasattr(value, "mask") and hasattr(value, "filled")]
    masks = [tensor(mask, "mask") for mask in masks if mask.any()]
    return ~reduce(torch.logical_or, masks) if masks else None
