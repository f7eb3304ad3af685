"""Prepare what a caller passes, once: sizes, legality, valid elements, labels, strength, draw.

The layers below check nothing and raise nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks
from ._checks import sentence

_BYTES_PAY_FROM = 1 << 15  # draws from which bytes are faster than uniform numbers
_DRAWS_PER_LEVEL = 1 << 4  # the same if each sample has its own level
FRACTION = 1 << 20  # parts of a label, so that soft labels are counted in integers too
_FEW = 1 << 12  # elements up to which a check of each costs nothing beside the call
_PART = 1 << 20  # elements checked at a time, so that intermediate results stay in the cache
_WITHOUT_FLOAT64 = ("mps",)
_OWN_KERNELS = ("cpu", "cuda", "meta")  # have every call; XLA lacks aminmax and views as bytes
_ROUNDING = 1e-6  # a float32 prior moves the limit of beta by less
UNREDUCIBLE = (torch.uint16, torch.uint32, torch.uint64)  # torch has no min and max for them


# -- batches


class Batch(NamedTuple):
    """Logits and labels of equal size, as they were passed: a mask keeps its one byte."""

    input: Tensor
    target: Tensor
    legal: bool  # False if the labels could not be read, so that some may be illegal
    void: int | None  # the target to ignore; None if no element can have it
    valid: Tensor | None = None  # the elements that count, if already computed; None: all

    def with_valid(self) -> Batch:
        """The batch with `valid` computed, which costs three times a sweep without it."""
        if self.void is None or self.valid is not None:
            return self
        return self._replace(valid=self.target != self.void)

    def dtype(self) -> torch.dtype:
        """Dtype of the loss by torch's rule: the target's, or the input's for bool and integers."""
        # Not a property: torch 2.6 can't trace a property of a tuple.
        return self.target.dtype if self.target.is_floating_point() else self.input.dtype

    def labels(self, dtype: torch.dtype) -> Tensor:
        """The target in a floating dtype; an illegal label that could not be refused is nan."""
        return as_labels(self.target, dtype, self.valid, self.legal)


def prepare(
    input: Tensor, target: Tensor, ignore_index: int | None, every: bool | None = None
) -> Batch:
    """Check a batch; `every` as in `require_labels`."""
    pair(input, target)
    void = ignore_index if _holds(target, ignore_index) else None
    if void is not None and _are_labels(target, void, every):
        return Batch(input, target, True, void)
    valid = None if void is None else target != void
    return Batch(input, target, require_labels(target, valid, ignore_index, every), void, valid)


def logits(input: object, name: str = "input") -> None:
    if not isinstance(input, Tensor):
        raise TypeError(sentence(name, "be a Tensor", _checks.describe(input)))
    if not input.is_floating_point():
        raise TypeError(
            sentence(
                name, "hold floating-point logits", input.dtype,
                f"pass the raw output of the network, or `{name}.float()`",
            )
        )  # fmt: skip


def label(target: object) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(sentence("target", "be a Tensor", _checks.describe(target)))
    if target.is_complex():
        wanted = "be a bool, integer or floating-point Tensor"
        raise TypeError(sentence("target", wanted, target.dtype, "pass `target.real`"))


def pair(input: Tensor, target: Tensor, name: str = "input") -> None:
    """Check logits and labels, whose sizes must be equal, as in torch."""
    logits(input, name)
    label(target)
    if target.size() != input.size():
        raise ValueError(
            sentence(
                "target", f"have the size of `{name}`, {input.size()}", target.size(),
                "reshape one of them (for example `target.unsqueeze(1)`)",
            )
        )  # fmt: skip


def reducible(target: Tensor) -> Tensor:
    """The labels in a dtype that torch can compare and find the ends of."""
    return target.to(torch.int64) if target.dtype in UNREDUCIBLE else target


def valid_elements(target: Tensor, ignore_index: float) -> Tensor:
    """Mask of targets other than `ignore_index`; a value that the dtype can't hold ignores none."""
    if not _holds(target, ignore_index):
        return torch.ones_like(target, dtype=torch.bool)
    return target != ignore_index


def _holds(target: Tensor, value: float | None) -> bool:
    """Whether an element can have this value."""
    if value is None or target.is_floating_point():
        return value is not None
    if target.dtype == torch.bool:
        return value in (0, 1)
    # A comparison would wrap -1 to 255 and so ignore the foreground of a uint8 mask.
    bounds = torch.iinfo(target.dtype)
    return bounds.min <= value <= bounds.max


def _are_labels(target: Tensor, void: int, every: bool | None) -> bool:
    """Whether a large target is known to hold legal and void labels only; False means unknown.

    The results are of the target's own dtype, which takes a twentieth of the time of bools.
    """
    if not readable(target) or target.numel() < _PART or target.dtype in UNREDUCIBLE:
        return False
    if target.is_floating_point() and not every:
        return True  # large floating-point targets are not checked
    if target.dtype == torch.bool or not target.is_contiguous():
        return False
    for start in range(0, target.numel(), _PART):
        part = target.detach().view(-1)[start : start + _PART]
        low, high = torch.ne(part, void, out=torch.empty_like(part)).mul_(part).aminmax()
        if not (low >= 0 and high <= 1):
            return False
    return True


def require_labels(
    target: Tensor, valid: Tensor | None, ignore_index: int | None, every: bool | None = None
) -> bool:
    """Refuse illegal labels; return False if they can't be read without waiting.

    Integers must be 0 or 1. Floats must be in [0, 1]; they are checked if `every`, or if it is
    None and there are few.
    """
    if target.dtype == torch.bool:
        return True
    if target.is_floating_point():
        # `readable` comes before the size, which would specialise a compiled graph.
        if (
            readable(target)
            and target.numel() > 0
            and (target.numel() <= _FEW if every is None else every)
        ):
            low, high = target.detach().aminmax()  # nan passes, as in torch
            if float(low) < 0 or float(high) > 1:
                illegal = (target < 0) | (target > 1)
                refuse_labels(target, illegal if valid is None else illegal & valid, ignore_index)
        return True
    if valid is None and readable(target) and target.dtype not in UNREDUCIBLE and target.numel():
        low, high = target.aminmax()
        if int(low) >= 0 and int(high) <= 1:
            return True
    illegal = _illegal(target, valid)
    return refuse_labels(target, illegal, ignore_index)


def refuse_labels(target: Tensor, illegal: Tensor, ignore_index: float | None) -> bool:
    """Raise if any element is marked `illegal`; return False if that can't be read."""
    found = seen(illegal)
    if found:
        kind = "be in [0, 1]" if target.is_floating_point() else "hold only 0 and 1"
        void = "" if ignore_index is None else f" (besides ignore_index={ignore_index:g})"
        raise ValueError(
            sentence(
                "target", kind + void, f"the value {target[illegal][0].item():g}",
                "for a 0/255 mask pass `mask > 0` or `mask / 255`, for labels -1 and 1 "
                "`target > 0`, and name a void label with `ignore_index`",
            )
        )  # fmt: skip
    return found is not None


def _illegal(target: Tensor, valid: Tensor | None) -> Tensor:
    illegal = (target != 0) & (target != 1)
    return illegal if valid is None else illegal & valid


def as_labels(target: Tensor, dtype: torch.dtype, valid: Tensor | None, legal: bool) -> Tensor:
    if target.dtype == torch.bool and readable(target):
        target = target.view(torch.uint8)  # bytes become floats many times faster than bools
    y = target.to(dtype)
    return y if legal else torch.where(_illegal(target, valid), torch.nan, y)


# -- what may be read


def seen(mask: Tensor) -> bool | None:
    """Whether any element is set; None if reading it would wait or break a trace."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return bool(mask.any())
    except RuntimeError:  # vmap, fake and proxy tensors have no values to branch on
        return None


def readable(value: Tensor) -> bool:
    """Whether `value` is an ordinary CPU tensor whose data may be read and written now.

    Not if it is traced, compiled, vmapped or a subclass, nor if it is a tensor of inference mode,
    which autograd can't save.
    """
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, nn.Parameter)
        and not value.is_inference()
        and not _transformed()
    )


def _transformed() -> bool:
    """Whether tracing, a functorch transform or a dispatch mode is active.

    The only use of torch's private names. Without them everything counts as transformed, which
    only costs speed.
    """
    try:
        return (
            torch._C._get_tracing_state() is not None
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack() > 0
        )
    except AttributeError:
        return True


def on_backward(loss: Tensor, call: Callable[[], None]) -> Tensor:
    """The loss, with `call` run when a backward pass reaches it; eager code only."""
    if loss.requires_grad and not torch.compiler.is_compiling() and not _transformed():
        loss.register_hook(lambda gradient: call())  # type: ignore[no-untyped-call]
    return loss


# -- perturbation


class Perturbation(NamedTuple):
    """Probability, strength and prior: numbers, or tensors that broadcast to the input."""

    alpha: float | Tensor
    beta: float | Tensor
    prior: float | Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [value for value in self if isinstance(value, Tensor)]

    def strength(self, dtype: torch.dtype) -> float | Tensor:
        """alpha * beta, in a dtype of at least float32."""
        alpha, beta = self.alpha, self.beta
        if isinstance(alpha, Tensor):
            if alpha.dtype == torch.bool and readable(alpha):
                alpha = alpha.view(torch.uint8)
            alpha = alpha.to(dtype)
        if isinstance(beta, Tensor):
            beta = beta.to(dtype)
        # A multiplication by 1 would only cost the call.
        return alpha if not isinstance(beta, Tensor) and beta == 1 else alpha * beta

    def towards_prior(self, y: Tensor) -> Tensor:
        """y + s (c - y)."""
        c = self.prior.to(y.dtype) if isinstance(self.prior, Tensor) else self.prior
        s = self.strength(y.dtype)
        # In this form, not as (1 - s) y + s c, both labels round by the same amount.
        if torch.compiler.is_compiling():
            return y + s * (c - y)  # lerp branches at s >= 1/2, and inductor would emit both
        end = c if isinstance(c, Tensor) else y.new_full((), c)
        return torch.lerp(y, end, s)  # one pass over memory


def perturbation(
    alpha: float | Tensor, beta: float | Tensor | None, prior: float | Tensor, size: torch.Size
) -> Perturbation:
    """Check shapes, and a tensor alpha on a CPU; (N,) tensors then broadcast along dimension 0.

    Numbers have passed `require_numbers`, which leaves beta None only for a tensor prior.
    """
    if isinstance(alpha, Tensor):
        remedy = "the third argument is alpha; pass a weight as `weight=`"
        _require_probabilities("alpha", alpha, remedy)
    if isinstance(prior, Tensor):
        prior = prior_of(prior, size)
    if beta is None:
        assert isinstance(prior, Tensor)
        beta = 1 / torch.maximum(prior, 1 - prior)
    else:
        beta = _level_of("beta", beta, size)
    return Perturbation(_level_of("alpha", alpha, size), beta, prior)


def _require_probabilities(name: str, value: Tensor, remedy: str = "") -> tuple[float, float]:
    """Refuse values outside [0, 1] and nan, if they can be read; return the ends of the others."""
    # `readable` comes before the size, which would specialise a compiled graph.
    if value.dtype == torch.bool or value.is_complex() or not readable(value):
        return 0.5, 0.5
    if not value.numel():
        return 0.5, 0.5
    low, high = (end.item() for end in value.detach().aminmax())
    if not (low >= 0 and high <= 1):
        got = f"the value {high if high > 1 else low:g}"
        raise ValueError(sentence(name, "be in [0, 1]", got, remedy))
    return low, high


def require_numbers(
    alpha: float | Tensor,
    beta: float | Tensor | None,
    prior: float | Tensor,
    every: bool = False,
) -> float | Tensor | None:
    """Check the ranges of numbers. Returns beta, which is None only for a tensor prior.

    Two numbers must also keep the order of the labels, alpha * beta <= 1. A tensor may hold drawn
    zeros and ones, at which single labels are flipped. A prior of the batch's size is like
    labels: unless `every`, it is checked if that costs nothing.
    """
    limit = 2.0
    if isinstance(prior, Tensor):
        if every or (readable(prior) and prior.numel() <= _FEW):
            low, high = _require_probabilities("prior", prior)
            limit = (1 + _ROUNDING) / max(high, 1 - low)
    else:
        _checks.inside("prior", prior, 0.0, 1.0, tensor="pass `torch.as_tensor(prior)`")
        limit = 1 / max(prior, 1 - prior)
        beta = limit if beta is None else beta
    if not isinstance(alpha, Tensor):
        _checks.number("alpha", alpha, 0.0, 1.0, tensor="pass `torch.as_tensor(alpha)`")
    if beta is not None and not isinstance(beta, Tensor):
        _checks.number("beta", beta, 0.0, limit, tensor="pass `torch.as_tensor(beta)`")
        if not isinstance(alpha, Tensor) and alpha * beta > 1:
            raise ValueError(
                sentence(
                    "alpha", "be at most 1 / beta, so that the labels keep their order",
                    f"alpha * beta = {alpha} * {beta} > 1", "lower one of them",
                )
            )  # fmt: skip
    return beta


def hold_prior(module: nn.Module, prior: float | Tensor) -> None:
    """Set `module.prior`: a number, or a buffer that moves with the module but is not saved."""
    if not isinstance(prior, Tensor):
        module.prior = float(prior)  # type: ignore[assignment]
        return
    if prior.is_complex():
        raise TypeError(sentence("prior", "be a real Tensor", prior.dtype))
    _require_probabilities("prior", prior)
    module.register_buffer("prior", prior.detach().clone().float(), persistent=False)


def named(name: str, value: float | Tensor | None) -> str:
    """A number, or the shape of a tensor that may be large, for an error message."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"{name} of shape {tuple(value.shape)}"
    return f"{name}={value.item() if isinstance(value, Tensor) else value}"


def shown_prior(prior: float | Tensor) -> str:
    return f"prior={tuple(prior.shape) if isinstance(prior, Tensor) else prior}"


def flat(prior: float | Tensor) -> Tensor:
    """A prior as a float32 tensor of at most one dimension."""
    if not isinstance(prior, Tensor):  # on the CPU, also under another default device
        return torch.tensor(prior, dtype=torch.float32, device="cpu")
    return prior.float().reshape(-1) if prior.dim() else prior.float()


def single_flip_rate(rates: tuple[Tensor, Tensor], prior: float | Tensor) -> Tensor:
    if isinstance(prior, Tensor) or prior != 0.5:
        wanted = "be 1/2, given as a number, for both labels to share one flip rate"
        got = "a tensor, as an observed prior is" if isinstance(prior, Tensor) else prior
        raise ValueError(sentence("prior", wanted, got, "read `flip_rates`, a pair"))
    return rates[0]


def _level_of(name: str, value: float | Tensor, size: torch.Size) -> float | Tensor:
    """Check the shape of alpha or beta; reshape (N,) so that it broadcasts along dimension 0."""
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float)) else float(value)
    if value.dim() == 0:
        return value
    if value.dim() == 1 and len(size) > 0 and value.shape[0] == size[0]:
        return value.reshape(value.shape[0], *(1 for _ in size[1:]))
    if value.dim() == len(size) > 1 and _broadcasts(value.shape, size):
        return value
    samples = f"{size[0]} values, one per sample (dimension 0)" if size else "no dimension"
    wanted = f"be a number, a 0-d tensor, {samples}, or a tensor of {len(size)} dimensions"
    got = f"shape {tuple(value.shape)}"
    raise ValueError(sentence(name, f"{wanted} that broadcasts to {tuple(size)}", got))


def prior_of(value: Tensor, size: torch.Size) -> Tensor:
    """A tensor prior in at least float32, broadcasting from the last dimension, as pos_weight."""
    if value.is_complex():
        raise TypeError(sentence("prior", "be a real Tensor", value.dtype))
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if value.dim() == 1 and len(size) > 2:
        ones = ", 1" * (len(size) - 2)
        raise ValueError(
            sentence(
                "prior", f"have one value per label, shape ({size[1]}{ones})",
                f"shape {tuple(value.shape)}, which would lie along the last dimension",
                f"pass `prior.reshape(-1{ones})`",
            )
        )  # fmt: skip
    if value.dim() <= len(size) and _broadcasts(value.shape, size[len(size) - value.dim() :]):
        return value.reshape((1,) * (len(size) - value.dim()) + tuple(value.shape))
    raise ValueError(
        sentence(
            "prior", f"be a number or a tensor that broadcasts to {tuple(size)} from the last "
            "dimension", f"shape {tuple(value.shape)}",
        )
    )  # fmt: skip


def _broadcasts(shape: torch.Size, size: torch.Size) -> bool:
    return all(have in (1, want) for have, want in zip(shape, size, strict=True))


def as_bytes(mask: Tensor) -> Tensor:
    """The bytes of a bool tensor, as a view if the device has one."""
    if mask.device.type in _OWN_KERNELS and not torch.compiler.is_compiling():
        return mask.view(torch.uint8)
    return mask.to(torch.uint8)


def ends(value: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum, in one pass unless that would move the tensor to the CPU and back."""
    if value.device.type in _OWN_KERNELS:
        low, high = value.aminmax()
        return low, high
    return value.min(), value.max()


def home(device: torch.device) -> torch.device:
    """The device itself if it has float64, otherwise the CPU."""
    return device if has_float64(device) else torch.device("cpu")


def has_float64(device: torch.device) -> bool:
    return device.type not in _WITHOUT_FLOAT64


# -- means over a sample


def sample_means(value: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid elements of each sample, (N,) float32; nan for a sample without any."""
    if valid is None:
        if value.dim() == 1 or (readable(value) and value.shape[1:].numel() == 1):
            return value.reshape(-1).float()
        return _by_sample(value).mean(1).float()
    total = _by_sample(torch.where(valid, value, 0.0)).sum(1)
    return (total / _by_sample(valid).sum(1)).float()


def sample_accuracies(batch: Batch) -> Tensor:
    """Share of each sample's valid elements that are right at 1/2, (N,) float32."""
    said, true = at_least(batch.input.detach(), 0), at_least(batch.target.detach(), 0.5)
    if said.dtype == true.dtype:
        hits = said.eq_(true) if readable(said) else said == true
    else:
        hits = (said > 0) == (true > 0)
    return sample_means(hits.float(), batch.valid)


def at_least(value: Tensor, bound: float) -> Tensor:
    """1 and 0, in the value's own dtype if possible: bools take many times as long."""
    if value.dtype == torch.bool:
        return value
    if value.dtype in UNREDUCIBLE:  # torch can't compare them either
        value = value.float()
    if readable(value):
        return torch.ge(value, bound, out=torch.empty_like(value))
    return value >= bound


def label_counts(batch: Batch, shape: tuple[int, ...]) -> Tensor:
    """Number of valid elements, sum of labels in parts of 1 / FRACTION, number of labels >= 1/2.

    One column for each element of `shape`, which broadcasts to the batch; () pools all.
    """
    target, valid = batch.target, batch.valid
    if valid is None and math.prod(shape) == 1 and readable(target):
        return _label_counts_read(target)
    over = [place for place in range(target.dim()) if not shape or shape[place] == 1]

    def number(marked: Tensor) -> Tensor:
        # torch sums bytes many times faster than bools, and into int32 faster than into int64;
        # inductor sums bools many times faster than bytes.
        wide = torch.int32 if marked.numel() < 2**31 else torch.int64
        summed = marked if torch.compiler.is_compiling() else as_bytes(marked)
        count = summed.sum(over, dtype=wide) if over else marked
        return count.to(torch.int64).reshape(-1)

    high = target if target.dtype == torch.bool else target >= 0.5
    high = high if valid is None else high & valid
    if valid is None:
        columns = math.prod(shape)
        each = target.numel() // max(columns, 1)
        count = torch.full((columns,), each, dtype=torch.int64, device=target.device)
    else:
        count = number(valid)
    positives = number(high)
    if not target.is_floating_point():
        return torch.stack((count, positives * FRACTION, positives))
    label = target.detach() if valid is None else torch.where(valid, target.detach(), 0)
    if has_float64(target.device):
        total = label.sum(over, dtype=torch.float64) if over else label.double()
        parts = _in_fractions(total.reshape(-1), count, positives)
    else:  # without float64, each label in whole parts: a copy to the CPU would wait
        ones = torch.ones((), dtype=torch.int64, device=target.device)
        whole = _in_fractions(label.float(), ones, (label >= 0.5).to(torch.int64))
        parts = (whole.sum(over) if over else whole).reshape(-1)
    return torch.stack((count, parts, positives))


def _label_counts_read(target: Tensor) -> Tensor:
    """The same for one column, computed by the host in a third of the calls."""
    count = target.numel()
    if not target.is_floating_point():
        positives = int(as_bytes(target).sum() if target.dtype == torch.bool else target.sum())
        parts = positives * FRACTION
    else:
        label = target.detach()
        positives = int(at_least(label, 0.5).sum(dtype=torch.float64))
        total = float(label.sum(dtype=torch.float64))
        # As in `_in_fractions`.
        parts = round(total * FRACTION) if 0 <= total <= count else positives * FRACTION
    return torch.tensor([[count], [parts], [positives]], device="cpu")


def row_counts(
    labels: Tensor, valid: Tensor | None, rows: torch.Size, size: torch.Size, shape: tuple[int, ...]
) -> Tensor:
    """The same from the sums over rows, (2, rows), and the number of valid elements in each."""
    columns = math.prod(shape)
    every = size.numel() // max(rows.numel(), 1)
    count = torch.full_like(labels[0], every) if valid is None else valid.double()
    sums = torch.cat((labels, count[None]))
    if shape:
        lead = shape[: len(rows)]
        over = [place + 1 for place, have in enumerate(lead) if have == 1]
        sums = sums.view(3, *rows)
        sums = sums.sum(over) if over else sums
    total, positives, count = sums.reshape(3, columns, -1).sum(2)
    return torch.stack((count, _in_fractions(total, count, positives), positives)).to(torch.int64)


def _in_fractions(total: Tensor, count: Tensor, positives: Tensor) -> Tensor:
    """A sum of labels in parts of 1 / FRACTION.

    Legal labels can't sum to nan or to a value outside [0, count]. If unchecked labels do, they
    are rounded at 1/2; otherwise they would spoil the base rate for good.
    """
    total = torch.where((total >= 0) & (total <= count), total, positives.to(total.dtype))
    return (total * FRACTION).round().to(torch.int64)


def _by_sample(value: Tensor) -> Tensor:
    return value.flatten(1) if value.dim() > 1 else value.reshape(-1, 1)


# -- draws


def bernoulli(
    alpha: float | Tensor, input: Tensor, sampling: str, generator: torch.Generator | None
) -> Tensor:
    """Zeros and ones, 1 with probability alpha, one per sample (dimension 0) or per element.

    A tensor alpha holds one probability per sample.
    """
    shape = input.shape if sampling == "element" else input.shape[:1]
    if isinstance(alpha, Tensor) and alpha.dim() == 1:
        alpha = alpha.reshape(alpha.shape[0], *(1 for _ in shape[1:]))
    # `readable` comes before the size, which would specialise a compiled graph.
    if not readable(input) or shape.numel() < _BYTES_PAY_FROM:
        return _uniform(input, shape, generator) < alpha
    if isinstance(alpha, Tensor) and shape.numel() < _DRAWS_PER_LEVEL * alpha.numel():
        return _uniform(input, shape, generator) < alpha
    return _by_bytes(alpha, input, shape, generator)


def once(alpha: Tensor) -> Tensor:
    """The same levels, materialised: inductor would otherwise look them up for each element."""
    flat = alpha.reshape(-1).float()
    place = torch.arange(flat.shape[0], device=flat.device)  # `len` would specialise the graph
    return torch.zeros_like(flat).index_copy(0, place, flat).reshape(alpha.shape)


def truncated_normal(input: Tensor, bound: float, generator: torch.Generator | None) -> Tensor:
    """A standard normal within [-bound, bound] for each element."""
    # By inverting the distribution function: rejection would need a data-dependent loop.
    reach = math.erf(bound / math.sqrt(2))
    uniform = _uniform(input, input.shape, generator)
    return math.sqrt(2) * torch.erfinv(reach * (2 * uniform - 1))


def _by_bytes(
    alpha: float | Tensor, input: Tensor, shape: torch.Size, generator: torch.Generator | None
) -> Tensor:
    # A CPU makes random numbers one by one, so one byte decides for an element. If it ties with
    # the first eight bits of alpha, a uniform number is compared with the remaining bits.
    count = shape.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64, device="cpu")
    words.random_(-(2**63), None, generator=generator)
    byte = words.view(torch.uint8)[:count].view(shape)
    level = torch.as_tensor(alpha, dtype=torch.float32, device="cpu") * 256
    first = level.floor().clamp(max=255)  # at alpha = 1 every tie is then drawn
    bits = first.to(torch.uint8)
    drawn = torch.empty(shape, dtype=torch.bool, device="cpu")
    # Results as bytes too, since bools take many times as long.
    torch.lt(byte, bits, out=drawn.view(torch.uint8))
    torch.eq(byte, bits, out=byte)
    words.view(torch.uint8)[count:] = 0
    found = words.nonzero()  # eight at a time
    within = words[found[:, 0]].view(torch.uint8).view(-1, 8) != 0
    ties = (8 * found + torch.arange(8, device="cpu"))[within]
    left = level - first
    if left.dim():
        left = left.reshape(-1)[ties // (count // left.numel())]
    drawn.view(-1)[ties] = _uniform(input, ties.shape, generator) < left
    return drawn


def _uniform(like: Tensor, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    # Always float32: a bfloat16 uniform has 256 values and would draw 0.001 as 0.004.
    # compile can't trace the keyword `generator` with a dynamic shape, not even as None.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    uniform: Tensor
    if type(like) in (Tensor, nn.Parameter):
        uniform = torch.rand(shape, device=like.device, dtype=torch.float32, **source)
    else:  # a fake or distributed tensor creates one of its own kind
        uniform = like.detach().new_empty(shape, dtype=torch.float32).uniform_(**source)
    return uniform
