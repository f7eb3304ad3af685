"""The sentence of every refusal, and the checks that several modules share.

"Expected argument `x` to be ..., but got ...", then the remedy.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

# Files whose frames are never the user's: this package and torch.
_INNER = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))

TRAINED_IN_EVAL = (
    "a backward pass reached a loss that {} computed in evaluation mode, where it is plain BCE; "
    "call `criterion.train()` before training, as you call `model.train()`"
)
LARGE = 1e15  # limit of a step size or a weight: products stay finite in float32


def sentence(name: str, expected: str, got: object, remedy: str = "") -> str:
    """The message of every refusal; `expected` begins with its verb."""
    if isinstance(got, Tensor) and got.dim() > 0:  # its values could fill a page
        got = f"a tensor of shape {tuple(got.shape)}"
    return f"Expected argument `{name}` to {expected}, but got {got}{remedy and '; ' + remedy}"


def describe(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if not isinstance(value, (int, float, str, type(None))):
        return type(value).__name__
    return f"{value!r} ({type(value).__name__})"


def warn(message: str) -> None:
    """Warn at the line of the user's call, behind any hooks and wrappers of torch."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)


def number(name: str, value: object, low: float, high: float, *, tensor: str = "") -> None:
    """Refuse anything but a number in [low, high]; nan is refused.

    `tensor` says how to pass a Tensor, if one is allowed too.
    """
    # The interval is formatted only in an error: compile can't format a symbolic number.
    if not isinstance(value, Real):
        wanted = f"be a number in [{low:g}, {high:g}]{' or a Tensor' if tensor else ''}"
        raise TypeError(sentence(name, wanted, describe(value), tensor))
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(sentence(name, f"be in [{low:g}, {high:g}]", value))


def inside(name: str, value: object, low: float, high: float, *, tensor: str = "") -> None:
    """The same for (low, high)."""
    number(name, value, low, high, tensor=tensor)
    if value in (low, high):
        raise ValueError(sentence(name, f"be between {low:g} and {high:g}", value))


def positive(name: str, value: object, high: float = LARGE) -> None:
    number(name, value, 0.0, high)
    if value == 0:
        raise ValueError(sentence(name, "be above 0", value))


def unit_number(name: str, value: object, high: float = 1.0) -> float:
    """A number or 0-d tensor in [0, high], as a float; waits for a tensor's value."""
    if isinstance(value, Tensor):
        if value.dim() > 0 or value.is_complex():
            wanted = f"be a number or a 0-d tensor in [0, {high:g}]"
            got = f"a tensor of shape {tuple(value.shape)}"
            raise TypeError(sentence(name, wanted, got, "pass its mean"))
        value = value.item()
    number(name, value, 0.0, high)
    return float(value)  # type: ignore[arg-type]


def positive_int(name: str, value: object) -> None:
    _int(name, value, 1, "a positive int")


def natural(name: str, value: object) -> None:
    _int(name, value, 0, "an int, 0 or more")


def _int(name: str, value: object, low: int, kind: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(sentence(name, f"be {kind}", describe(value)))
    if int(value) < low:
        raise ValueError(sentence(name, f"be {kind}", value))


def choice(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        names = ", ".join(repr(option) for option in allowed)
        raise ValueError(sentence(name, f"be one of {names}", repr(value)))


def reduction(value: object) -> None:
    choice("reduction", value, ("none", "mean", "sum"))


def sampling(value: object) -> None:
    choice("sampling", value, ("expected", "sample", "element"))


def tensor_or_none(name: str, value: object, remedy: str) -> None:
    """The ``{}`` of the remedy is the value, which is never formatted if it is a tensor."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(
            sentence(name, "be a Tensor or None", describe(value), remedy.format(value))
        )


def generator(value: object) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        wanted, remedy = "be a torch.Generator or None", "pass `torch.Generator(device)`"
        raise TypeError(sentence("generator", wanted, describe(value), remedy))


def ignore_index(value: object) -> int | None:
    """The value as a Python int, which compile can trace."""
    if value is None:
        return None
    wanted = "be an int or None"
    if isinstance(value, bool) or not isinstance(value, Real) or value in (math.inf, -math.inf):
        raise TypeError(sentence("ignore_index", wanted, describe(value)))
    if value != value:
        got, remedy = "nan, which equals no target", "mark ignored elements by a number"
        raise ValueError(sentence("ignore_index", wanted, got, remedy))
    whole = int(value)  # type: ignore[call-overload]
    if whole != value or not -(2**63) <= whole < 2**63:
        raise ValueError(sentence("ignore_index", "be an int of 64 bits or None", value))
    return int(whole)


def floating_dtype(name: str, dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        wanted = "be a floating-point torch.dtype"
        raise TypeError(sentence(name, wanted, repr(dtype), "pass `torch.float32`"))
