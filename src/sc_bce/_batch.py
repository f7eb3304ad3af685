"""What a caller passes, made ready once: sizes, legality, valid elements, labels, strength."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks


def logits(input: object, name: str = "input") -> None:
    if not isinstance(input, Tensor):
        raise TypeError(
            f"Expected argument `{name}` to be a Tensor, but got {_checks.describe(input)}"
        )
    if not input.is_floating_point():
        raise TypeError(
            f"Expected argument `{name}` to hold floating-point logits, but got {input.dtype}; "
            f"pass the raw output of the network, or `{name}.float()`"
        )


def label(target: object) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(
            f"Expected argument `target` to be a Tensor, but got {_checks.describe(target)}"
        )
    if target.is_complex():
        raise TypeError(
            f"Expected argument `target` to be a bool, integer or floating-point Tensor, "
            f"but got {target.dtype}; pass `target.real`"
        )


def pair(input: Tensor, target: Tensor, name: str = "input") -> None:
    """Logits, labels, and torch's rule: their sizes are equal."""
    logits(input, name)
    label(target)
    if target.size() != input.size():
        raise ValueError(
            f"Expected argument `target` to have the size of `{name}`, {input.size()}, "
            f"but got {target.size()}; reshape one of them (for example `target.unsqueeze(1)`)"
        )


def valid_elements(target: Tensor, ignore_index: float) -> Tensor:
    """Where the target is not `ignore_index`; a value that its dtype can't hold is nowhere."""
    if not target.is_floating_point() and target.dtype != torch.bool:
        bounds = torch.iinfo(target.dtype)
        if not bounds.min <= ignore_index <= bounds.max:
            # A comparison would wrap -1 to 255 and so ignore the foreground of a uint8 mask.
            return torch.ones_like(target, dtype=torch.bool)
    return target != ignore_index
