"""How this package refuses and warns: one sentence for every error, and the checks of plain values.

"Expected argument `x` to be ..., but got ...", then the remedy.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

# Files whose frames are never the user's: this package and torch.
_INNER = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))

LARGE = 1e15  # limit of a step size or a weight: products stay finite in float32


def sentence(name: str, expected: str, got: object, remedy: str = "") -> str:
    """The message of every refusal; `expected` begins with its verb."""
    if isinstance(got, Tensor) and got.dim() > 0:  # its values could fill a page
        got = f"a tensor of shape {tuple(got.shape)}"
    return f"Expected argument `{name}` to {expected}, but got {got}{remedy and '; ' + remedy}"


def refuse(
    name: str, expected: str, got: object, remedy: str = "", error: type[Exception] = ValueError
) -> NoReturn:
    raise error(sentence(name, expected, got, remedy))


def describe(value: Any) -> str:
    """A value of the wrong type, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if not isinstance(value, (int, float, str, type(None))):
        return type(value).__name__
    return f"{value!r} ({type(value).__name__})"


def exact(value: float) -> str:
    """A number that is not in [0, 1], in as many digits as show it: 1.0000000591 is not 1."""
    short = f"{value:g}"
    return repr(value) if 0 <= float(short) <= 1 else short


def warn(message: str) -> None:
    """Warn at the line of the user's call, behind any hooks and wrappers of torch.

    Python shows a text once for each such line, so the texts hold no figures that change.
    """
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)


def number(name: str, value: object, low: float, high: float, *, remedy: str = "") -> None:
    """Refuse anything but a number in [low, high]; nan is refused.

    `remedy` says how to pass a Tensor, if one is allowed too.
    """
    # The interval is formatted only in an error: compile can't format a symbolic number.
    if not isinstance(value, Real):
        wanted = f"be a number in [{low:g}, {high:g}]{' or a Tensor' if remedy else ''}"
        refuse(name, wanted, describe(value), remedy, TypeError)
    if not low <= value <= high:  # type: ignore[operator]
        refuse(name, f"be in [{low:g}, {high:g}]", value)


def inside(name: str, value: object, low: float, high: float, *, remedy: str = "") -> None:
    """The same for (low, high)."""
    number(name, value, low, high, remedy=remedy)
    if value in (low, high):
        refuse(name, f"be between {low:g} and {high:g}", value)


def positive(name: str, value: object, high: float = LARGE) -> None:
    number(name, value, 0.0, high)
    if value == 0:
        refuse(name, "be above 0", value)


def unit_number(name: str, value: object, high: float = 1.0) -> float:
    """A number or 0-d tensor in [0, high], as a float; waits for a tensor's value."""
    if isinstance(value, Tensor):
        if value.dim() > 0 or value.is_complex():
            wanted = f"be a number or a 0-d tensor in [0, {high:g}]"
            refuse(name, wanted, value, "pass its mean", TypeError)
        value = value.item()
    number(name, value, 0.0, high)
    return float(value)  # type: ignore[arg-type]


def whole(name: str, value: object, low: int = 1) -> int:
    """An int of at least `low`."""
    kind = "a positive int" if low == 1 else f"an int, {low} or more"
    if isinstance(value, bool) or not isinstance(value, Integral):
        refuse(name, f"be {kind}", describe(value), error=TypeError)
    if int(value) < low:
        refuse(name, f"be {kind}", value)
    return int(value)


def choice(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        refuse(name, f"be one of {', '.join(map(repr, allowed))}", repr(value))


def tensor_or_none(name: str, value: object, remedy: str = "pass `torch.tensor({})`") -> None:
    """The ``{}`` of the remedy is the value, which is never formatted if it is a tensor."""
    if value is not None and not isinstance(value, Tensor):
        refuse(name, "be a Tensor or None", describe(value), remedy.format(value), TypeError)


def ignored(value: object) -> float | None:
    """``ignore_index``: an int, nan, or None. An int comes back as one, which compile can trace."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or value in (math.inf, -math.inf):
        refuse("ignore_index", "be an int or None, or `math.nan`", describe(value), error=TypeError)
    if value != value:
        return math.nan
    number = int(value)  # type: ignore[call-overload]
    if number != value or not -(2**63) <= number < 2**63:
        refuse("ignore_index", "be an int of 64 bits or None", value)
    return int(number)
