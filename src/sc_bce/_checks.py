"""Every argument check and every error sentence of the package.

One sentence everywhere: "Expected argument `x` to be ..., but got ...", then the remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


def number(name: str, value: object, low: float, high: float) -> None:
    """Refuse what is not a number in [low, high]; nan is in no interval."""
    if not isinstance(value, Real):
        raise TypeError(
            f"Expected argument `{name}` to be a number in [{low:g}, {high:g}], "
            f"but got {_describe(value)}"
        )
    if not low <= float(value) <= high:
        raise ValueError(
            f"Expected argument `{name}` to be in [{low:g}, {high:g}], but got {value}"
        )


def positive(name: str, value: object, high: float = torch.finfo(torch.float32).max) -> None:
    number(name, value, 0.0, high)
    if value == 0:
        raise ValueError(f"Expected argument `{name}` to be above 0, but got {value}")


def share(name: str, value: object) -> float:
    """A number or 0-d tensor in [0, 1], as a float; a tensor is waited for."""
    if isinstance(value, Tensor):
        if value.dim() > 0 or value.is_complex():
            raise TypeError(
                f"Expected argument `{name}` to be a number or a 0-d tensor in [0, 1], but got a "
                f"tensor of shape {tuple(value.shape)}; pass its mean"
            )
        value = value.item()
    number(name, value, 0.0, 1.0)
    return float(value)  # type: ignore[arg-type]


def flip_rate(value: object) -> float:
    rate = share("flip_rate", value)
    if rate >= 0.5:
        raise ValueError(
            f"Expected argument `flip_rate` to be below 1/2, where labels still say something, "
            f"but got {rate:g}; it is alpha * beta / 2"
        )
    return rate


def warmup(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"Expected argument `warmup` to be an int, 0 or more, but got {_describe(value)}"
        )
    if value < 0:
        raise ValueError(f"Expected argument `warmup` to be an int, 0 or more, but got {value}")


def perturbation(alpha: object, beta: object) -> None:
    """Ranges of alpha and beta where they are numbers; tensors are taken as they are.

    Two numbers must also keep the label order, alpha * beta <= 1. A tensor of drawn zeros and
    ones is free of that: a single flipped label is what sampling is.
    """
    for name, value, high in (("alpha", alpha, 1.0), ("beta", beta, 2.0)):
        if not isinstance(value, Tensor):
            number(name, value, 0.0, high)
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        return
    if alpha * beta > 1:  # type: ignore[operator]
        raise ValueError(
            "Expected argument `alpha` to be at most 1 / beta, so that the labels keep their "
            f"order, but got alpha * beta = {alpha} * {beta} > 1; lower one of them"
        )


def positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"Expected argument `{name}` to be a positive int, but got {_describe(value)}"
        )
    if value < 1:
        raise ValueError(f"Expected argument `{name}` to be a positive int, but got {value}")


def choice(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        names = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"Expected argument `{name}` to be one of {names}, but got {value!r}")


def reduction(value: object) -> None:
    choice("reduction", value, ("none", "mean", "sum"))


def sampling(value: object) -> None:
    choice("sampling", value, ("expected", "sample", "element"))


def noise(value: object, beta: float, sampling: str) -> None:
    number("noise", value, 0.0, min(beta, 2.0 - beta) / 2)
    if value != 0 and sampling == "expected":
        raise ValueError(
            "Expected argument `sampling` to be 'sample' or 'element' where noise is drawn, but "
            "got 'expected'; the expectation has no noise, so drop `noise` or choose to draw"
        )


def generator(value: object) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            "Expected argument `generator` to be a torch.Generator or None, but got "
            f"{_describe(value)}; pass `torch.Generator(device).manual_seed(seed)`"
        )


def ignore_index(value: object) -> None:
    if value is None:
        return
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, Real)):
        raise TypeError(
            f"Expected argument `ignore_index` to be an int or None, but got {_describe(value)}"
        )
    if value != value:
        raise ValueError(
            "Expected argument `ignore_index` to be an int or None, but got nan, which equals "
            "no target; mark ignored elements by a number"
        )


def logits(input: object) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"Expected argument `input` to be a Tensor, but got {_describe(input)}")
    if not input.is_floating_point():
        raise TypeError(
            f"Expected argument `input` to hold floating-point logits, but got {input.dtype}; "
            "pass the raw output of the network, or `input.float()`"
        )


def label(target: object) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"Expected argument `target` to be a Tensor, but got {_describe(target)}")
    if target.is_complex():
        raise TypeError(
            f"Expected argument `target` to be a bool, integer or floating-point Tensor, "
            f"but got {target.dtype}; pass `target.real`"
        )


def same_size(input: Tensor, target: Tensor) -> None:
    if target.size() != input.size():
        raise ValueError(
            f"Expected argument `target` to have the size of `input`, {input.size()}, "
            f"but got {target.size()}; reshape one of them (for example `target.unsqueeze(1)`)"
        )


def level_shape(name: str, value: Tensor, size: torch.Size) -> None:
    """A level is 0-d, (N,) along dimension 0, or of as many dimensions and broadcasting."""
    if value.dim() == 0:
        return
    if value.dim() == 1 and len(size) > 0 and value.shape[0] == size[0]:
        return
    if value.dim() == len(size) > 1 and all(
        have in (1, want) for have, want in zip(value.shape, size, strict=True)
    ):
        return
    samples = f"{size[0]} values, one per sample (dimension 0)" if size else "no dimension"
    raise ValueError(
        f"Expected argument `{name}` to be a number, a 0-d tensor, {samples}, or a tensor of "
        f"{len(size)} dimensions that broadcasts to {tuple(size)}, but got shape "
        f"{tuple(value.shape)}"
    )


def valid(target: Tensor, ignore_index: float) -> Tensor:
    """Where the target is not `ignore_index`; a value that its dtype can't hold is nowhere."""
    if not target.is_floating_point() and target.dtype != torch.bool:
        bounds = torch.iinfo(target.dtype)
        if not bounds.min <= ignore_index <= bounds.max:
            # A comparison would wrap -1 to 255 and so ignore the foreground of a uint8 mask.
            return torch.ones_like(target, dtype=torch.bool)
    return target != ignore_index


def same_device(input: Tensor, table: Tensor) -> None:
    if input.device != table.device:
        raise ValueError(
            f"Expected argument `input` to be on the table's device {table.device}, but got "
            f"{input.device}; move the criterion with `criterion.to({str(input.device)!r})`"
        )


def sample_index(index: object, shape: torch.Size, num_samples: int) -> Tensor:
    """The index of a training batch; its range is checked where no accelerator would wait."""
    if index is None:
        raise ValueError(
            "Expected argument `index` to be the sample indices of the batch in training, but "
            "got None; wrap the data set in IndexedDataset and pass the index that it yields, or "
            "build the module with num_samples=None for one shared level"
        )
    if not isinstance(index, Tensor):
        raise TypeError(
            f"Expected argument `index` to be an integer Tensor, but got {_describe(index)}; "
            "pass `torch.as_tensor(index)`"
        )
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(
            f"Expected argument `index` to be an integer Tensor, but got {index.dtype}; pass "
            "`index.long()`"
        )
    if index.shape != shape:
        raise ValueError(
            f"Expected argument `index` to have one entry per sample, shape {tuple(shape)}, but "
            f"got shape {tuple(index.shape)}"
        )
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= num_samples:
            raise IndexError(
                f"Expected argument `index` to be in [0, {num_samples - 1}], but got "
                f"{low if low < 0 else high}; num_samples={num_samples} must count every "
                "training sample, and `resize` makes room for new ones"
            )
    return index


def saved_samples(saved: object, table: Tensor) -> None:
    if isinstance(saved, Tensor) and saved.shape != table.shape:
        raise ValueError(
            f"Expected the saved table to have num_samples={len(table)}, but got "
            f"num_samples={saved.numel()}; build the module with that number, load, then `resize`"
        )


def map_style(dataset: object) -> None:
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or isinstance(
        dataset, IterableDataset
    ):
        raise TypeError(
            "Expected argument `dataset` to be a map-style data set, with __getitem__ and "
            f"__len__, but got {type(dataset).__name__}; samples of a stream have no index: use "
            "AdaptivePerturbation(num_samples=None) there"
        )


def unused_key(key: str, names: Collection[str]) -> None:
    if key in names:
        raise ValueError(
            f"Expected argument `key` to be a new name in the items, but got {key!r}, which is "
            "there already; choose another"
        )


def histograms(named: Mapping[str, object], kind: type) -> None:
    if not named:
        raise ValueError("Expected argument `histogram` to hold a histogram, but got none")
    for one in named.values():
        if not isinstance(one, kind):
            raise TypeError(
                f"Expected argument `histogram` to be a {kind.__name__} or a mapping of names to "
                f"them, but got {_describe(one)}"
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
    input: Tensor, target: Tensor, illegal: Tensor, from_logits: bool, ignored: float | None
) -> bool:
    """Refuse predictions that can't be measured; False where `illegal` can't be read."""
    found = _any(illegal)
    if found:
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


def _describe(value: Any) -> str:
    if isinstance(value, (Tensor, Collection)) and not isinstance(value, str):
        return type(value).__name__
    return f"{value!r} ({type(value).__name__})"
