"""The one sentence of every refusal, and the checks that any room may need.

"Expected argument `x` to be ..., but got ...", then the remedy.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

# Where a frame is never the user's: this package, and torch.
_INNER = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))

LARGE = 1e15  # of a step size or a weight: products stay finite in float32


def sentence(name: str, expected: str, got: object, remedy: str = "") -> str:
    """What every refusal says; `expected` begins with its verb."""
    return f"Expected argument `{name}` to {expected}, but got {got}{remedy and '; ' + remedy}"


def describe(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if not isinstance(value, (int, float, str, type(None))):
        return type(value).__name__
    return f"{value!r} ({type(value).__name__})"


def warn(message: str) -> None:
    """A warning at the caller's line, whatever hooks and wrappers of torch lie between."""
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth - 1)


def number(name: str, value: object, low: float, high: float, *, tensor: str = "") -> None:
    """Refuse what is not a number in [low, high]; nan is in no interval.

    `tensor`: how to pass one, where a Tensor is welcome too.
    """
    # The interval is written only where it is shown: compile can't write a symbolic number.
    if not isinstance(value, Real):
        wanted = f"be a number in [{low:g}, {high:g}]{' or a Tensor' if tensor else ''}"
        raise TypeError(sentence(name, wanted, describe(value), tensor))
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(sentence(name, f"be in [{low:g}, {high:g}]", value))


def inside(name: str, value: object, low: float, high: float, *, tensor: str = "") -> None:
    """The same without the ends."""
    number(name, value, low, high, tensor=tensor)
    if value in (low, high):
        raise ValueError(sentence(name, f"be between {low:g} and {high:g}", value))


def positive(name: str, value: object, high: float = LARGE) -> None:
    number(name, value, 0.0, high)
    if value == 0:
        raise ValueError(sentence(name, "be above 0", value))


def unit_number(name: str, value: object, high: float = 1.0) -> float:
    """A number or 0-d tensor in [0, high], as a float; a tensor is waited for."""
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
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(sentence(name, "be a Tensor or None", describe(value), remedy))


def generator(value: object) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        wanted, remedy = "be a torch.Generator or None", "pass `torch.Generator(device)`"
        raise TypeError(sentence("generator", wanted, describe(value), remedy))


def ignore_index(value: object) -> int | None:
    """The value as Python's own int, which compile can take in."""
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


def flip_rate(value: object) -> float:
    rate = unit_number("flip_rate", value, high=0.5)
    if rate == 0.5:
        raise ValueError(
            "Expected argument `flip_rate` to be below 1/2, where labels still say something, "
            "but got 0.5; it is alpha * beta / 2"
        )
    return rate


def saved_cells(name: str, saved: object, own: Tensor) -> None:
    if not isinstance(saved, Tensor) or saved.dim() != own.dim():
        raise ValueError(
            f"Expected the saved `{name}` to be a Tensor of shape {tuple(own.shape)}, but got "
            f"{tuple(saved.shape) if isinstance(saved, Tensor) else describe(saved)}"
        )
    if saved.shape != own.shape:
        raise ValueError(
            f"Expected argument `state_dict` to have num_cells={2 * own.shape[1]}, but got "
            f"num_cells={2 * saved.shape[1]}; build the histogram with that number"
        )


def histograms(named: Mapping[str, object], kind: type) -> None:
    if not named:
        raise ValueError("Expected argument `histogram` to hold a histogram, but got none")
    for one in named.values():
        if not isinstance(one, kind):
            raise TypeError(
                f"Expected argument `histogram` to be a {kind.__name__} or a mapping of names to "
                f"them, but got {describe(one)}"
            )


def hard_labels(target: Tensor, illegal: Tensor, ignored: float | None) -> bool:
    """Refuse labels other than 0 and 1, marked by `illegal`; False where that can't be read."""
    found = _any(illegal)
    if found:
        void = "" if ignored is None else f" (besides ignore_index={ignored:g})"
        raise ValueError(
            f"Expected argument `target` to hold only 0 and 1{void}, but got the value "
            f"{target[illegal][0].item()}; for a 0/255 mask pass `mask > 0` or `mask / 255`, "
            "and name a void label with `ignore_index`"
        )
    return found is not None


def predictions(
    legal: Tensor, input: Tensor, target: Tensor, from_logits: bool, ignored: float | None
) -> bool:
    """Refuse predictions that can't be measured; False where `legal`, 0-d, can't be read."""
    found = _any(~legal)
    if found:
        illegal = (target != 0) & (target != 1) | input.isnan()
        if not from_logits:
            illegal |= (input < 0) | (input > 1)
        value = input[illegal][0].item()
        if value != value:
            raise ValueError(
                "Expected argument `input` to hold no nan, but got nan; the model has diverged, "
                "or a void element lacks its `ignore_index`"
            )
        if not from_logits and not 0 <= value <= 1:
            raise ValueError(
                f"Expected argument `input` to hold probabilities in [0, 1], but got {value:g}; "
                "pass logits with `from_logits=True`"
            )
        hard_labels(target, illegal, ignored)
    return found is not None


def validation_data(logits: Tensor, target: Tensor) -> None:
    """What a temperature can be fitted to; its values are waited for."""
    if not len(target):
        raise ValueError("Expected argument `target` to hold an element to fit to, but got none")
    if not bool(logits.isfinite().all()):
        raise ValueError(
            "Expected argument `logits` to be finite, but got inf or nan; the model has diverged, "
            "or a void element lacks its `ignore_index`"
        )
    illegal = ~((target >= 0) & (target <= 1))
    if bool(illegal.any()):
        raise ValueError(
            f"Expected argument `target` to be in [0, 1], but got {target[illegal][0].item():g}; "
            "for a 0/255 mask pass `mask > 0` or `mask / 255`, and name a void label with "
            "`ignore_index`"
        )
    if bool((target == target[0]).all()) and float(target[0]) in (0, 1):
        raise ValueError(
            f"Expected argument `target` to hold both classes, but got only "
            f"{float(target[0]):g}; fit to validation data with positives and negatives"
        )


def _any(mask: Tensor) -> bool | None:
    """Whether any element is set; None where a look would wait or break a trace.

    Values are read on the CPU only, and not under compile, export, vmap or fake tensors.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return bool(mask.any())
    except RuntimeError:  # vmap, fake and proxy tensors have no values to branch on
        return None
