"""What the repairs share: data or a histogram in, NLL before and after out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _errors, _inputs
from .._errors import refuse
from .._inputs import Array
from .._torch import UNREDUCIBLE, any_set, has_values, transformed
from ..measure.histogram import CalibrationHistogram
from ..measure.scores import Cells

AnyRepair = TypeVar("AnyRepair", bound="Repair")

_BLOCK = 1 << 16  # elements answered at a time on a CPU, so that intermediate results stay cached
_WORSE = 1e-6  # relative increase of the loss that rounding can cause


class Sample(NamedTuple):
    """The elements of one label that count, flat; exact probabilities have logit inf or -inf."""

    logit: Tensor
    target: Tensor
    weight: Tensor


class Fitted(NamedTuple):
    """The answers to the cells of one label, and what the fit aimed at with its answers."""

    answer: Tensor
    aim: Cells
    aimed: Tensor


class Repair(nn.Module):
    """A map of the logits, fitted label by label to cells: all labels change, or none."""

    fitted: Tensor
    from_logits: Tensor
    nll: tuple[float, float] | None
    num_cells: int | None = None  # of a histogram; None for any
    _if_worse = ""

    def __init__(self, num_labels: int | None) -> None:
        super().__init__()
        self.num_labels = None if num_labels is None else _errors.whole("num_labels", num_labels)
        self.nll = None
        self.takes_logits = True  # `from_logits`, which a graph can't read
        with torch.inference_mode(False):
            self.register_buffer("fitted", torch.tensor(False))
            self.register_buffer("from_logits", torch.tensor(True))

    def fit(
        self: AnyRepair,
        input: Tensor | CalibrationHistogram | Array,
        target: Tensor | Array | None = None,
        *,
        weight: Tensor | Array | None = None,
        from_logits: bool = True,
        ignore_index: float | None = None,
    ) -> AnyRepair:
        """Fit the calibration map to validation data, and return this module.

        Sets ``nll`` to the mean negative log-likelihood of these data before and after, and
        ``from_logits``: a module that is fitted to probabilities takes and returns probabilities.
        If the fit makes the NLL worse, there is a warning.

        Args:
            input: a :class:`CalibrationHistogram` of the validation data; or what the network
                answers to them, a Tensor or NumPy array of any shape (labels in dimension 1 with
                ``num_labels``). uint8 is an 8-bit map of probabilities. Elements that a masked
                array masks are left out.
            target: unless ``input`` is a histogram, the labels: in [0, 1] in any dtype, of the
                same size. Default: None.
            weight: how many elements each one counts for, at least 0; broadcasts to ``input``. If
                the mean is below 1, weights are scaled to mean 1. Default: None.
            from_logits: whether ``input`` holds logits and not probabilities. Default: True.
            ignore_index: target value of elements to leave out, ``math.nan`` too. Default: None.

        Raises:
            ValueError: sizes or numbers of labels differ; labels are illegal; a label has no
                element, or only one class; logits are not finite, probabilities outside [0, 1];
                the histogram holds nan. The module is then unchanged.
            TypeError: an argument has the wrong type.

        Example:
            >>> import torch
            >>> from sc_bce import CalibrationHistogram, IsotonicCalibration, TemperatureScaling
            >>> _ = torch.manual_seed(0)
            >>> truth = torch.randn(20000)
            >>> target = torch.rand(20000) < torch.sigmoid(truth)
            >>> scaling = TemperatureScaling().fit(3 * truth, target)  # from logits
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(3 * truth, target)
            >>> isotonic = IsotonicCalibration().fit(histogram)  # from a histogram
            >>> [[round(nll, 2) for nll in repair.nll] for repair in (scaling, isotonic)]
            [[0.77, 0.6], [0.77, 0.6]]
            >>> p = torch.sigmoid(3 * truth)
            >>> other = TemperatureScaling().fit(p, target, from_logits=False)
            >>> other(torch.tensor([0.1, 0.5, 0.9]))  # takes and returns probabilities
            tensor([0.3245, 0.5000, 0.6755])
        """
        # Tensors of inference mode could not be changed or differentiated through afterwards.
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(input, CalibrationHistogram):
                if target is not None or weight is not None:
                    wanted = (
                        "be None, like `weight`, beside a CalibrationHistogram, which holds both"
                    )
                    refuse("target", wanted, "one of them", "pass `fit(histogram)`", TypeError)
                cells, from_logits = _of_histogram(input, self.num_labels, self.num_cells)
                _both_classes(cells, "histogram", self.num_labels)
                before = _mean(input.nll(), cells)
            else:
                samples, from_logits = _of_data(
                    input, target, weight, self.num_labels, from_logits, ignore_index
                )
                every = [Cells(z.double(), w, w * y) for z, y, w in samples]
                _both_classes(every, "target", self.num_labels)
                before = mean_loss(every, [one.logit for one in every])
                cells = [self._gather(one) for one in samples]
            fits = self._fit(cells)
        took(self, from_logits)
        self.nll = (before, mean_loss(cells, [one.answer for one in fits]))
        aims = [one.aim for one in fits]
        raw = mean_loss(aims, [one.logit for one in aims])
        repaired = mean_loss(aims, [one.aimed for one in fits])
        if repaired > raw * (1 + _WORSE) + 1e-12:
            _errors.warn(
                f"This {type(self).__name__} raises the NLL of the data that it is fitted to (see "
                f"`nll`): {self._if_worse}"
            )
        return self

    def forward(self, input: Tensor | Array) -> Tensor:
        x = _inputs.tensor(input, "input")
        if isinstance(x, Tensor) and x.dtype == torch.uint8 and not self.takes_logits:
            x = x / 255
        _inputs.logits(x)
        valid = _inputs.unmasked(input)
        if valid is not None:
            x = x.masked_fill(~valid, torch.nan)
        rows(x, self.num_labels)
        if not self.takes_logits and any_set((x < 0) | (x > 1)):
            _refuse_probabilities(x, "this module was fitted to probabilities: pass those")
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() <= _BLOCK:
            return self._answer(x)
        if type(x) is not Tensor or transformed() or (x.requires_grad and torch.is_grad_enabled()):
            return self._answer(x)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        whole, some = (x.reshape(-1), result.view(-1)), _BLOCK
        if self.num_labels is not None:  # whole samples
            whole, some = (x, result), max(_BLOCK * len(x) // x.numel(), 1)
        for part, answer in zip(*(torch.split(one, some) for one in whole), strict=True):
            known = bool(part.amax() >= -math.inf)  # no nan
            answer.copy_(self._known(part) if known else self._answer(part))
        return result

    def _answer(self, x: Tensor) -> Tensor:
        # By a comparison, which all runtimes agree on: minima and maxima make anything of nan.
        known = x == x
        return torch.where(known, self._known(torch.where(known, x, 0.0)), x)

    def _known(self, x: Tensor) -> Tensor:
        answer = self._map(x.to(torch.promote_types(x.dtype, torch.float32)))
        if not self.takes_logits:
            answer = torch.sigmoid(answer)
        if x.dtype == torch.float16:  # whose largest number a scale can pass
            answer = answer.clamp(-65504, 65504)
        return answer.to(x.dtype)

    def _gather(self, sample: Sample) -> Cells:
        raise NotImplementedError

    def _fit(self, cells: list[Cells]) -> list[Fitted]:
        raise NotImplementedError

    def _map(self, x: Tensor) -> Tensor:
        """Calibrated logits, of logits or probabilities in at least float32."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = dict(self.named_buffers())
        saved = {name: state_dict.get(prefix + name) for name in own}
        if any(isinstance(part, Tensor) for part in saved.values()) and any(
            not isinstance(part, Tensor) or part.shape != own[name].shape
            for name, part in saved.items()
        ):
            refusal = f"`{prefix[:-1] or type(self).__name__}` is of another version or num_labels"
            args[-1].append(f"The state of {refusal}: fit this module again")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        store(self)
        self.nll = None
        if has_values(self.from_logits):
            self.takes_logits = bool(self.from_logits)

    def extra_repr(self) -> str:
        labels = [] if self.num_labels is None else [f"num_labels={self.num_labels}"]
        if has_values(self.fitted):
            labels += [] if self.takes_logits else ["from_logits=False"]
            labels += [] if bool(self.fitted) else ["not fitted"]
        if self.nll is not None:
            labels.append("nll={:.4f} -> {:.4f}".format(*self.nll))
        return ", ".join(labels)


def store(module: nn.Module, **values: Tensor) -> None:
    """Fill buffers, all of them with ordinary tensors, in inference mode too."""
    with torch.inference_mode(False), torch.no_grad():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_inference():
                setattr(module, name, buffer.clone())
        for name, value in values.items():
            buffer = getattr(module, name)
            # Expanded here: XLA's copy_ would take the smaller shape over.
            buffer.copy_(value.expand_as(buffer))


def took(repair: Repair, from_logits: bool, fitted: bool = True) -> None:
    """Note what a module was fitted to, if it was."""
    repair.takes_logits = from_logits
    flags = {"fitted": fitted, "from_logits": from_logits}
    store(repair, **{name: torch.tensor(flag, device="cpu") for name, flag in flags.items()})


def rows(value: Tensor, num_labels: int | None) -> list[Tensor]:
    """The elements of each label."""
    if num_labels is None:
        return [value]
    if value.dim() < 2 or value.shape[1] != num_labels:
        wanted = f"have num_labels={num_labels} labels in dimension 1"
        refuse("input", wanted, f"shape {tuple(value.shape)}")
    return list(value.unbind(1))


def mean_loss(cells: list[Cells], answers: list[Tensor]) -> float:
    """Mean NLL, each class alone: infinite logits that are right cost nothing."""
    losses = []
    for one, z in zip(cells, answers, strict=True):
        parts = ((one.positive, -z), (one.count - one.positive, z))
        losses.append(sum(torch.where(n > 0, n * F.softplus(x), 0.0).sum() for n, x in parts))
    counts = [one.count.sum() for one in cells]
    return float(sum(losses)) / float(sum(counts))


def _mean(values: Tensor, cells: list[Cells]) -> float:
    counts = torch.stack([one.count.sum() for one in cells])
    return float((values.cpu().reshape(-1) * counts).sum() / counts.sum())


def _refuse_probabilities(x: Tensor, remedy: str) -> None:
    value = x[(x < 0) | (x > 1)][0].item()
    refuse("input", "hold probabilities in [0, 1]", _errors.exact(value), remedy)


# --- what a fit is made of ------------------------------------------------------------------------


def _of_histogram(
    histogram: CalibrationHistogram, num_labels: int | None, num_cells: int | None
) -> tuple[list[Cells], bool]:
    if num_cells is not None and histogram.num_cells != num_cells:
        wanted, got = f"have num_cells={num_cells}", f"num_cells={histogram.num_cells}"
        refuse("histogram", wanted, got, "build it without `num_cells`")
    if histogram.num_labels != num_labels:
        wanted, got = f"have num_labels={num_labels}", f"num_labels={histogram.num_labels}"
        remedy = "build both with the same number, or pass `histogram.pooled()`"
        refuse("histogram", wanted, got, remedy)
    cells = histogram.cells()
    if any(bool(one.count.isnan().any()) for one in cells):
        remedy = "it has seen nan, or illegal labels, on an accelerator"
        refuse("histogram", "hold finite counts and sums", "nan", remedy)
    return cells, histogram.from_logits


def _of_data(
    input: Any, target: Any, weight: Any, num_labels: int | None, from_logits: bool,
    ignore_index: float | None,
) -> tuple[list[Sample], bool]:  # fmt: skip
    x, y = _inputs.tensor(input, "input"), _inputs.tensor(target, "target")
    if not isinstance(x, Tensor):
        wanted = "be a CalibrationHistogram, or a Tensor or array beside its `target`"
        remedy = "update a histogram with each batch and pass it"
        refuse("input", wanted, _errors.describe(x), remedy, TypeError)
    if target is None:
        remedy = "pass `fit(input, target)`, or a CalibrationHistogram alone"
        refuse("target", "be the labels of the input", "None", remedy, TypeError)
    if x.dtype == torch.uint8:
        x, from_logits = x / 255, False
    _inputs.logits(x)
    _inputs.label(y)
    _inputs.same_size(x, y)
    x, w = x.detach().cpu(), _weight(weight, x.shape)
    void = _inputs.held(y, _errors.ignored(ignore_index))
    y = y.detach().cpu()
    y = y.to(torch.int64) if y.dtype in UNREDUCIBLE else y
    masks = [_inputs.unmasked(input, target, weight), _inputs.valid_elements(y, void)]
    keep = torch.ones_like(x, dtype=torch.bool)
    for mask in masks:
        keep = keep if mask is None else keep & mask
    if from_logits:
        _suspect(x[keep] if not bool(keep.all()) else x)
    parts = (rows(part, num_labels) for part in (x, y, w, keep & (w != 0)))
    return [_sample(list(one), from_logits) for one in zip(*parts, strict=True)], from_logits


def _weight(weight: Any, size: torch.Size) -> Tensor:
    w = torch.ones((), device="cpu") if weight is None else _inputs.tensor(weight, "weight")
    if not isinstance(w, Tensor):
        refuse("weight", "be a Tensor, an array or None", _errors.describe(w), error=TypeError)
    _inputs.along_labels("weight", w, size)
    return w.detach().cpu().double().expand(size)


def _sample(parts: list[Tensor], from_logits: bool) -> Sample:
    """The elements of one label to keep, checked."""
    *values, keep = parts
    x, y, w = (one.reshape(-1) if bool(keep.all()) else one[keep] for one in values)
    _inputs.check_labels(y, None)
    y = y.double()
    if bool(y.isnan().any()):
        refuse("target", "hold no nan", "nan", "for missing labels pass `ignore_index=math.nan`")
    if not bool(((w >= 0) & w.isfinite()).all()):
        bad = w[~((w >= 0) & w.isfinite())][0].item()
        refuse("weight", "be finite and at least 0", _errors.exact(bad))
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if bool(z.isnan().any()):
        remedy = "the model has diverged, or an ignored element lacks its `ignore_index`"
        refuse("input", "hold no nan", "nan", remedy)
    if from_logits and bool(z.isinf().any()):
        remedy = "it says that a probability is exactly 0 or 1; pass those with `from_logits=False`"
        refuse("input", "hold finite logits", "an infinite one", remedy)
    if not from_logits:
        if bool(((z < 0) | (z > 1)).any()):
            _refuse_probabilities(z, "pass logits with `from_logits=True`")
        z = torch.logit(z)
    if len(w):
        w = w * max(1.0, len(w) / float(w.sum()))
    return Sample(z, y, w)


def _suspect(x: Tensor) -> None:
    kind = _inputs.like_probabilities(x)
    if kind == "probabilities":
        remedy = "pass `from_logits=False`, or the output of the network before the sigmoid"
        _errors.warn(f"All logits of this fit lie in [0, 1], as if they were {kind}; {remedy}")
    elif kind:
        remedy = "of a softmax over two classes pass `x[:, 1] - x[:, 0]`"
        _errors.warn(f"All logits of this fit are at most 0, as if they were {kind}; {remedy}")


def _both_classes(cells: list[Cells], name: str, num_labels: int | None) -> None:
    for label, one in enumerate(cells):
        of = "" if num_labels is None else f" of label {label}"
        total, positive = float(one.count.sum()), float(one.positive.sum())
        if total == 0:
            refuse(name, f"hold an element{of} to fit to", "none", "drop a label that has none")
        if not 0 < positive < total:
            remedy = "fit to validation data with positives and negatives"
            refuse(name, f"hold both classes{of}", f"only {positive / total:g}", remedy)
