"""Every argument check and every error sentence of the package.

One sentence everywhere: "Expected argument `x` to be ..., but got ...", then the remedy.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

Module = TypeVar("Module", bound=nn.Module)

LARGE = 1e15  # of a step size or a weight: products stay finite in float32


def sentence(name: str, expected: str, got: object, remedy: str = "") -> str:
    """The one sentence that every refusal says; `expected` begins with its verb."""
    return f"Expected argument `{name}` to {expected}, but got {got}{remedy and '; ' + remedy}"


def number(name: str, value: object, low: float, high: float, remedy: str = "") -> None:
    """Refuse what is not a number in [low, high]; nan is in no interval."""
    if not isinstance(value, Real):
        raise TypeError(
            f"Expected argument `{name}` to be a number in [{low:g}, {high:g}]"
            f"{' or a Tensor' if remedy else ''}, but got {describe(value)}{remedy}"
        )
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(
            f"Expected argument `{name}` to be in [{low:g}, {high:g}], but got {value}"
        )


def positive(name: str, value: object, high: float = LARGE) -> None:
    number(name, value, 0.0, high)
    if value == 0:
        raise ValueError(f"Expected argument `{name}` to be above 0, but got {value}")


def unit_number(name: str, value: object, high: float = 1.0) -> float:
    """A number or 0-d tensor in [0, high], as a float; a tensor is waited for."""
    if isinstance(value, Tensor):
        if value.dim() > 0 or value.is_complex():
            raise TypeError(
                f"Expected argument `{name}` to be a number or a 0-d tensor in [0, {high:g}], but "
                f"got a tensor of shape {tuple(value.shape)}; pass its mean"
            )
        value = value.item()
    number(name, value, 0.0, high)
    return float(value)  # type: ignore[arg-type]


def warmup(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"Expected argument `warmup` to be an int, 0 or more, but got {describe(value)}"
        )
    if int(value) < 0:
        raise ValueError(f"Expected argument `warmup` to be an int, 0 or more, but got {value}")


def perturbation(alpha: object, beta: object) -> None:
    """Ranges of alpha and beta where they are numbers; tensors are taken as they are.

    Two numbers must also keep the label order, alpha * beta <= 1. A tensor of drawn zeros and
    ones is free of that: a single flipped label is what sampling is.
    """
    for name, value, high in (("alpha", alpha, 1.0), ("beta", beta, 2.0)):
        if not isinstance(value, Tensor):
            number(name, value, 0.0, high, f"; pass `torch.as_tensor({name})`")
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        return
    if alpha * beta > 1:  # type: ignore[operator]
        raise ValueError(
            "Expected argument `alpha` to be at most 1 / beta, so that the labels keep their "
            f"order, but got alpha * beta = {alpha} * {beta} > 1; lower one of them"
        )


def positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"Expected argument `{name}` to be a positive int, but got {describe(value)}"
        )
    if int(value) < 1:
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
            f"{describe(value)}; pass `torch.Generator(device).manual_seed(seed)`"
        )


def ignore_index(value: object) -> int | None:
    """The value as Python's own int, which compile can take in."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or value in (math.inf, -math.inf):
        raise TypeError(
            f"Expected argument `ignore_index` to be an int or None, but got {describe(value)}"
        )
    if value != value:
        raise ValueError(
            "Expected argument `ignore_index` to be an int or None, but got nan, which equals "
            "no target; mark ignored elements by a number"
        )
    whole = int(value)  # type: ignore[call-overload]
    if whole != value or not -(2**63) <= whole < 2**63:
        raise ValueError(
            f"Expected argument `ignore_index` to be an int of 64 bits or None, but got {value}"
        )
    return int(whole)


def floating(name: str, dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"Expected argument `{name}` to be a floating-point torch.dtype, but got {dtype!r}; "
            "pass `torch.float32`"
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
            f"Expected argument `index` to be an integer Tensor, but got {describe(index)}; "
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
    index = index.to(torch.int64)
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= num_samples:
            raise IndexError(
                f"Expected argument `index` to be in [0, {num_samples - 1}], but got "
                f"{low if low < 0 else high}; num_samples={num_samples} must count every "
                "training sample, and `resize` makes room for new ones"
            )
    return index


def saved_shape(name: str, saved: object, own: Tensor) -> None:
    if not isinstance(saved, Tensor) or saved.shape == own.shape:
        return
    if own.dim() == 0:
        raise ValueError(
            f"Expected the saved `{name}` to be a 0-d tensor, but got shape {tuple(saved.shape)}"
        )
    raise ValueError(
        f"Expected the saved `{name}` to have num_samples={len(own)}, but got "
        f"num_samples={saved.numel()}; build the module with that number, load, then `resize`"
    )


def position(index: object, size: int) -> int:
    """The index of a data set, negative ones counted from the end."""
    if not isinstance(index, SupportsIndex):
        raise TypeError(
            f"Expected argument `index` to be an int, but got {describe(index)}; a sampler of "
            "batches belongs into DataLoader's `batch_sampler`"
        )
    place = operator.index(index)
    if not -size <= place < size:
        raise IndexError(
            f"Expected argument `index` to be in [{-size}, {size - 1}], but got {place}"
        )
    return place % size


def fetched(items: object, count: int) -> None:
    if not isinstance(items, (list, tuple)) or len(items) != count:
        raise TypeError(
            f"Expected the data set's `__getitems__` to return a list of {count} items, but got "
            f"{describe(items)}; a data set of columns has no item to put an index into"
        )


def map_style(dataset: object) -> None:
    complete = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not complete or isinstance(dataset, (IterableDataset, type)):
        raise TypeError(
            "Expected argument `dataset` to be a map-style data set, with __getitem__ and "
            f"__len__, but got {describe(dataset)}; samples of a stream have no index: use "
            "AdaptivePerturbation(num_samples=None) there"
        )


def unused_key(key: str, names: Collection[str], field: bool = False) -> None:
    if field and (not key.isidentifier() or keyword.iskeyword(key) or key.startswith("_")):
        raise ValueError(
            f"Expected argument `key` to be a field name of the items' namedtuple, but got "
            f"{key!r}; choose an identifier without a leading underscore"
        )
    if key in names:
        raise ValueError(
            f"Expected argument `key` to be a new name in the items, but got {key!r}, which is "
            "there already; choose another"
        )


def named_module(parent: nn.Module, name: str, kind: type[Module]) -> Module:
    """The submodule of that name, dots allowed."""
    modules = dict(parent.named_modules(remove_duplicate=False))
    found = modules.get(name)
    if not isinstance(found, kind):
        others = [repr(key) for key, module in modules.items() if isinstance(module, kind)]
        got = "of which there is none" if found is None else f"a {type(found).__name__}"
        remedy = f"choose {', '.join(others)}" if others else "assign one in its __init__"
        raise ValueError(
            f"Expected argument `criterion` to be the name of an {kind.__name__} in the "
            f"{type(parent).__name__}, but got {name!r}, {got}; {remedy}"
        )
    return found


def logits_and_target(outputs: object) -> tuple[Any, Any]:
    """What a validation step hands to the callback."""
    if not isinstance(outputs, Mapping) or not {"logits", "target"} <= set(outputs):
        held = f" with {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
        raise ValueError(
            "Expected `validation_step` to return a mapping with 'logits' and 'target', but got "
            f"{'None' if outputs is None else type(outputs).__name__ + held}; "
            'return {"logits": logits, "target": target}'
        )
    return outputs["logits"], outputs["target"]


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


def describe(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if not isinstance(value, (int, float, str, type(None))):
        return type(value).__name__
    return f"{value!r} ({type(value).__name__})"
