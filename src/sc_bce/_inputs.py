"""What a caller passes, looked at once: sizes, labels, ignored elements, alpha, beta, prior.

The rooms below check nothing again. On a CPU every label is looked at, always; under compile, vmap
and on accelerators nothing waits, and an illegal integer gives nan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _errors
from ._errors import refuse
from ._torch import UNREDUCIBLE, any_set, as_bytes, readable

_PART = 1 << 20  # elements looked at a time, so that intermediate results stay in the cache
_FEW = 1 << 12  # elements of a prior up to which a check of each costs nothing beside the call
_ROUNDING = 1e-6  # a float32 prior moves the limit of beta by less
_FROM = 50  # elements from which logits that all lie in [0, 1] are not an accident
_CROWD = 0.01  # share of the elements in the outer tenth of the range: a crowd at an end
_LEVEL = 0.01  # logits within less than this are all alike


# -- logits and labels


class Batch(NamedTuple):
    """Logits and labels of equal size, as they were passed: a mask keeps its one byte."""

    input: Tensor
    target: Tensor
    void: float | None  # the target to ignore; None if no element can have it
    legal: bool  # False if the labels could not be read, so that some may be illegal
    plain: bool  # whether both are ordinary tensors of a CPU, in eager code

    def dtype(self) -> torch.dtype:
        """Dtype of the loss by torch's rule: the target's, or the input's for bool and integers."""
        # Not a property: torch 2.6 can't trace a property of a tuple.
        return self.target.dtype if self.target.is_floating_point() else self.input.dtype

    def labels(self, dtype: torch.dtype) -> Tensor:
        """The target in a floating dtype; an illegal label that could not be refused is nan."""
        return with_nan(as_labels(self.target, dtype), self.target, self.void, self.legal)

    def valid(self) -> Tensor | None:
        """Mask of the elements that count; None if all do."""
        return valid_elements(self.target, self.void)

    def ignored(self) -> Tensor | None:
        """Mask of the other elements."""
        target, void = self.target, self.void
        if void is None:
            return None
        return target.isnan() if void != void else _marked(torch.eq, target, void)


class Wanted(NamedTuple):
    """What to look at in a batch beside its loss."""

    slopes: bool = False
    hits: bool = False
    labels: tuple[int, ...] | None = None  # a shape that broadcasts to the batch, () to pool all
    share: Tensor | None = None  # weight of each sample in the counts, (N,)


NOTHING = Wanted()


class Seen(NamedTuple):
    """What a batch shows; None if it was not wanted."""

    slopes: Tensor | None = None  # mean of weight (y - c) x of each sample, (N,)
    hits: Tensor | None = None  # share of each sample's elements that are right at 1/2, (N,)
    counts: tuple[float | Tensor, Tensor] | None = None  # elements and sum of labels, by label


def batch(input: Tensor, target: Tensor, ignore_index: float | None) -> Batch:
    logits(input)
    label(target)
    same_size(input, target)
    void, plain = held(target, ignore_index), readable(target)
    legal = check_labels(target, void, plain)
    target = target.long() if target.dtype in UNREDUCIBLE else target
    return Batch(input, target, void, legal, plain and readable(input))


def logits(input: object, name: str = "input") -> None:
    if not isinstance(input, Tensor):
        refuse(name, "be a Tensor", _errors.describe(input), error=TypeError)
    if not input.is_floating_point():
        remedy = f"pass the raw output of the network, or `{name}.float()`"
        refuse(name, "hold floating-point logits", input.dtype, remedy, TypeError)
    dense(name, input)


def label(target: object) -> None:
    if not isinstance(target, Tensor):
        refuse("target", "be a Tensor", _errors.describe(target), error=TypeError)
    if target.is_complex():
        wanted = "be a bool, integer or floating-point Tensor"
        refuse("target", wanted, target.dtype, "pass `target.real`", TypeError)
    dense("target", target)


def dense(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided:
        refuse(name, "be dense", value.layout, f"pass `{name}.to_dense()`", TypeError)
    if value.dtype.itemsize == 1 and value.is_floating_point():  # torch computes nothing in float8
        wanted = "have a floating-point dtype of at least 16 bits"
        refuse(name, wanted, value.dtype, f"pass `{name}.float()`", TypeError)


def same_size(input: Tensor, target: Tensor, name: str = "input") -> None:
    """Logits and labels have equal sizes, as in torch."""
    if target.size() == input.size():
        return
    remedy = "reshape one of them"
    x, y = input.shape, target.shape
    if len(x) == len(y) + 1 and x[:1] + x[2:] == y:
        if x[1] == 1:
            remedy = "pass `target.unsqueeze(1)`"
        elif x[1] == 2:
            logit = f"{name}[:, 1] - {name}[:, 0]"
            remedy = f"of a softmax over two classes pass `{logit}`, which is the logit of class 1"
        else:
            remedy = (
                "sc-bce is for binary labels, one logit each; a CalibrationHistogram measures "
                f"{x[1]} exclusive classes one by one, from `{name}.softmax(1)` and one-hot "
                f"targets with `num_labels={x[1]}` and `from_logits=False`"
            )
    refuse("target", f"have the size of `{name}`, {tuple(x)}", tuple(y), remedy)


def held(target: Tensor, ignore_index: float | None) -> float | None:
    """The value to ignore, or None if no element of this dtype can have it."""
    if ignore_index is None or target.is_floating_point():
        return ignore_index
    if target.dtype == torch.bool:
        return ignore_index if ignore_index in (0, 1) else None
    # A comparison would wrap -1 to 255 and so ignore the foreground of a uint8 mask.
    bounds = torch.iinfo(target.dtype)
    return ignore_index if bounds.min <= ignore_index <= bounds.max else None


def valid_elements(target: Tensor, void: float | None) -> Tensor | None:
    """Mask of targets other than `void`; None if all are."""
    if void is None:
        return None
    return ~target.isnan() if void != void else _marked(torch.ne, target, void)


def _marked(compare: Callable[..., Tensor], target: Tensor, void: float) -> Tensor:
    if target.dtype == torch.uint8 and readable(target):  # by bytes: bools take many times as long
        return compare(target, void, out=torch.empty_like(target)).view(torch.bool)
    return compare(target, void)


def check_labels(target: Tensor, void: float | None, plain: bool) -> bool:
    """Refuse a label outside [0, 1], and an integer other than 0 and 1, on any CPU.

    nan passes, as in torch. Returns False if integers could not be looked at without waiting.
    """
    if target.dtype == torch.bool:
        return True
    floating = target.is_floating_point()
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return floating  # nothing waits
    if plain and target.numel() and target.dtype not in UNREDUCIBLE:
        ends = map(torch.aminmax, _parts(target, void))
        if not any(low.item() < 0 or high.item() > 1 for low, high in ends):
            return True
    illegal = (target < 0) | (target > 1) if floating else _not_binary(target)
    valid = valid_elements(target, void)
    found = any_set(illegal if valid is None else illegal & valid)
    if found:
        refuse_labels(target, illegal, void)
    return found is not None or floating


def _parts(target: Tensor, void: float | None) -> Iterator[Tensor]:
    """The labels, ignored ones as 0, a part at a time."""
    if void is None:
        yield target
        return
    for part in torch.split(target.detach().reshape(-1), _PART):
        # As numbers of its own dtype, since a bool result takes twenty times as long.
        if void != void:
            yield part.nan_to_num(0.0, torch.inf, -torch.inf)
        else:
            yield torch.ne(part, void, out=torch.empty_like(part)).mul_(part)


def refuse_labels(target: Tensor, illegal: Tensor, void: float | None) -> None:
    """Refuse what is marked `illegal`; the void elements among it are legal."""
    kind = "be in [0, 1]" if target.is_floating_point() else "hold only 0 and 1"
    valid = valid_elements(target, void)
    if valid is not None:
        kind += f" (besides ignore_index={void:g})"
        illegal = illegal & valid
    value = target[illegal][0].item()
    remedy = "name a void label with `ignore_index`"
    if value < 0 or value >= 2:  # not what a division by 255 left
        remedy = f"for labels -1 and 1 `target > 0`, and {remedy}"
        remedy = f"for a 0/255 mask pass `mask > 0` or `mask / 255`, {remedy}"
    refuse("target", kind, f"the value {_errors.exact(value)}", remedy)


def _not_binary(target: Tensor) -> Tensor:
    return (target != 0) & (target != 1)


def as_labels(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Labels, or a draw, in a floating dtype."""
    if target.dtype == torch.bool and readable(target):
        target = as_bytes(target)
    return target.to(dtype)


def with_nan(values: Tensor, target: Tensor, void: float | None, legal: bool) -> Tensor:
    """The values; in place nan where a label is illegal, if these could not be looked at."""
    if legal:
        return values
    illegal = target > 1 if target.dtype == torch.uint8 else _not_binary(target)
    valid = valid_elements(target, void)
    return values.masked_fill_(illegal if valid is None else illegal & valid, torch.nan)


def like_probabilities(input: Tensor) -> str:
    """What these logits look like, "probabilities" or "log-probabilities", or "" for logits.

    Probabilities: all in [0, 1], spread over it or crowded at one end; the logits of an untrained
    network can be in [0, 1] too, but in a heap clear of both ends. Log-probabilities: those of a
    softmax over dimension 1.
    """
    if not readable(input) or input.numel() < _FROM:
        return ""
    x = input.detach()
    low, high = (float(end) for end in x.aminmax())
    softmax = high <= 0 and x.dim() > 1 and x.shape[1] > 1
    if softmax and float(x.logsumexp(1).abs().max()) < 1e-2:
        return "log-probabilities"
    if not (low >= 0 and high <= 1 and high - low >= _LEVEL):
        return ""
    crowd = max(int((x <= high / 10).sum()), int((1 - x <= (1 - low) / 10).sum()))
    spread = low <= 0.25 and high >= 0.75
    return "probabilities" if spread or crowd >= _CROWD * x.numel() else ""


# -- weights


def along_labels(size: torch.Size, **weights: Tensor | None) -> None:
    """Refuse one weight per label where it would lie along the last dimension."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.dim() == 1 and len(value) > 1 and len(size) > 2:
            ones = ", 1" * (len(size) - 2)
            got = f"shape {tuple(value.shape)}, which would lie along the last dimension"
            wanted = f"have one value per label, shape ({size[1]}{ones})"
            refuse(name, wanted, got, f"pass `{name}.reshape(-1{ones})`")


# -- perturbation


class Perturbation(NamedTuple):
    """Probability, strength and prior: numbers, or tensors that broadcast to the input."""

    alpha: float | Tensor
    beta: float | Tensor
    prior: float | Tensor

    def nothing(self) -> bool:
        """Whether no label is perturbed, as the host knows."""
        return not isinstance(self.alpha, Tensor) and self.alpha == 0

    def tensors(self) -> list[Tensor]:
        return [value for value in self if isinstance(value, Tensor)]

    def draw(self) -> Tensor | None:
        """Alpha, if it says which labels become the prior itself."""
        alpha, whole = self.alpha, not isinstance(self.beta, Tensor) and self.beta == 1
        return alpha if whole and isinstance(alpha, Tensor) and alpha.dtype == torch.bool else None

    def strength(self, dtype: torch.dtype) -> float | Tensor:
        """alpha * beta, in a dtype of at least float32."""
        alpha, beta = self.alpha, self.beta
        if isinstance(alpha, Tensor):
            alpha = as_labels(alpha, dtype)
        if isinstance(beta, Tensor):
            return alpha * beta.to(dtype)
        return alpha if beta == 1 else alpha * beta  # a multiplication by 1 only costs the call


def perturbation(
    alpha: float | Tensor, beta: float | Tensor | None, prior: float | Tensor, size: torch.Size
) -> Perturbation:
    """Check shapes; (N,) tensors then broadcast along dimension 0.

    The values have passed `ranges`, which leaves beta None only for a tensor prior.
    """
    if isinstance(prior, Tensor):
        prior = prior_of(prior, size)
    if beta is None:
        assert isinstance(prior, Tensor)
        beta = 1 / torch.maximum(prior, 1 - prior)
    else:
        beta = _by_sample("beta", beta, size)
    return Perturbation(_by_sample("alpha", alpha, size), beta, prior)


def ranges(
    alpha: float | Tensor, beta: float | Tensor | None, prior: float | Tensor, every: bool = False
) -> float | Tensor | None:
    """Check the ranges of what is passed. Returns beta, which is None only for a tensor prior.

    Two numbers must also keep the order of the labels, alpha * beta <= 1. A tensor may hold drawn
    zeros and ones, at which single labels are flipped. A prior of the batch's size is like
    labels: unless `every`, it is checked if that costs nothing.
    """
    limit = 2.0
    if isinstance(prior, Tensor):
        if every or (readable(prior) and prior.numel() <= _FEW):
            low, high = _in_unit("prior", prior)
            limit = (1 + _ROUNDING) / max(high, 1 - low)
    else:
        _errors.inside("prior", prior, 0.0, 1.0, remedy="pass `torch.as_tensor(prior)`")
        limit = 1 / max(prior, 1 - prior)
        beta = limit if beta is None else beta
    if isinstance(alpha, Tensor):
        _in_unit("alpha", alpha, "the third argument is alpha; pass a weight as `weight=`")
    else:
        _errors.number("alpha", alpha, 0.0, 1.0, remedy="pass `torch.as_tensor(alpha)`")
    if beta is not None and not isinstance(beta, Tensor):
        _errors.number("beta", beta, 0.0, limit, remedy="pass `torch.as_tensor(beta)`")
        if not isinstance(alpha, Tensor) and alpha * beta > 1:
            wanted = "be at most 1 / beta, so that the labels keep their order"
            refuse("alpha", wanted, f"alpha * beta = {alpha} * {beta} > 1", "lower one of them")
    return beta


def prior_of(value: Tensor, size: torch.Size) -> Tensor:
    """A tensor prior in at least float32, broadcasting from the last dimension, as pos_weight."""
    along_labels(size, prior=value)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if broadcasts(value.shape, size):
        return value[(None,) * (len(size) - value.dim())]
    wanted = f"be a number or a tensor that broadcasts to {tuple(size)} from the last dimension"
    refuse("prior", wanted, f"shape {tuple(value.shape)}")


def prior_buffer(prior: Tensor) -> Tensor:
    """A tensor prior as a module keeps it: a checked float32 copy."""
    _in_unit("prior", prior)
    with torch.inference_mode(False):
        return prior.detach().clone().float()


def flat_prior(prior: float | Tensor) -> Tensor:
    """A prior as a float32 tensor of at most one dimension."""
    if not isinstance(prior, Tensor):  # on the CPU, also under another default device
        return torch.tensor(prior, dtype=torch.float32, device="cpu")
    return prior.float().reshape(-1) if prior.dim() else prior.float()


def _in_unit(name: str, value: Tensor, remedy: str = "") -> tuple[float, float]:
    """Refuse values outside [0, 1] and nan, if they can be read; return the ends of the others."""
    if value.is_complex():
        refuse(name, "be a real Tensor", value.dtype, error=TypeError)
    # `readable` comes before the size, which would specialise a compiled graph.
    if value.dtype == torch.bool or not readable(value) or not value.numel():
        return 0.5, 0.5
    low, high = (end.item() for end in value.detach().aminmax())
    if not (low >= 0 and high <= 1):
        wrong = _errors.exact(high if high > 1 else low)
        refuse(name, "be in [0, 1]", f"the value {wrong}", remedy)
    return low, high


def _by_sample(name: str, value: float | Tensor, size: torch.Size) -> float | Tensor:
    """Check the shape of alpha or beta; reshape (N,) so that it broadcasts along dimension 0."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float)) else float(value)
    if value.dim() == 1 and value.shape == size[:1]:
        return value.reshape(value.shape[0], *(1 for _ in size[1:]))
    if value.dim() == 0 or (value.dim() == len(size) > 1 and broadcasts(value.shape, size)):
        return value
    samples = f"{size[0]} values, one per sample (dimension 0)" if size else "no dimension"
    wanted = f"be a number, a 0-d tensor, {samples}, or a tensor of {len(size)} dimensions"
    refuse(name, f"{wanted} that broadcasts to {tuple(size)}", f"shape {tuple(value.shape)}")


def broadcasts(shape: torch.Size, size: torch.Size) -> bool:
    """Whether a tensor of this shape broadcasts to the size."""
    pairs = zip(reversed(shape), reversed(size), strict=False)
    return len(shape) <= len(size) and all(have in (1, want) for have, want in pairs)
