"""What the repairs share: data or a histogram in, NLL before and after out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _arrays, _errors, _inputs
from .._arrays import Array
from .._errors import refuse
from .._torch import any_set, has_values, transformed
from ..measure.cells import Batch, Grid, batch, by_label, grid, slack
from ..measure.counting import count
from ..measure.histogram import CalibrationHistogram, holding
from ..measure.scores import Cells

AnyRepair = TypeVar("AnyRepair", bound="Repair")
# The answers to the cells of each label, cells with the labels that they aim at, and the buffers.
Fits = tuple[list[Tensor], list[Cells], dict[str, Tensor]]

_BLOCK = 1 << 16  # elements answered at a time on a CPU, so that intermediate results stay cached
_MANY = 10_000  # elements of a label above which raw logits are gathered into cells
_WORSE = 1e-6  # relative increase of the loss that rounding can cause
CELLS = 10_000  # of the histogram that raw values are counted into
_GRID = grid(40_000)  # whose cells are narrow enough for six digits of a slope
_INFINITE = "it is that of a probability of exactly 0 or 1; pass those with `from_logits=False`"
_SOFTMAX = (
    "All logits of this fit are at most 0, as if they were log-probabilities; of a softmax over "
    "two classes pass `x[:, 1] - x[:, 0]`"
)


class Repair(nn.Module):
    """A map of the logits, fitted label by label to cells: all labels change, or none."""

    fitted: Tensor
    from_logits: Tensor
    nll: tuple[float, float] | None
    num_cells: int | None = None  # of a histogram; None for any
    _by_element = False  # whether raw logits are fitted as they are, and not by a histogram
    _if_worse = ""
    # Of the cells of each label, and whether they hold probabilities of 0 and 1, (labels, 2).
    _fit: Callable[[list[Cells], Tensor], Fits]
    # Calibrated logits, of logits (none beyond the number) or probabilities, in at least float32.
    _map: Callable[[Tensor, float], Tensor]

    def __init__(self, num_labels: int | None, **sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.num_labels = None if num_labels is None else _errors.whole("num_labels", num_labels)
        self.nll = None
        self.takes_logits = True  # `from_logits`, which a graph can't read
        with torch.inference_mode(False):
            self.register_buffer("fitted", torch.tensor(False))
            self.register_buffer("from_logits", torch.tensor(True))
            for name, size in sizes.items():
                self.register_buffer(name, torch.empty(size))

    def fit(
        self: AnyRepair, input: Tensor | CalibrationHistogram | Array,
        target: Tensor | Array | None = None, *, weight: Tensor | Array | None = None,
        from_logits: bool = True, ignore_index: float | None = None,
    ) -> AnyRepair:  # fmt: skip
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
                all are below 1, they are scaled so that the largest is 1. Default: None.
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
            elements: list[Cells] = []
            if isinstance(input, CalibrationHistogram):
                name, histogram = "histogram", input
                self._check(input, target, weight)
            else:
                seen = _looked_at((input, target, weight), from_logits, ignore_index)
                rows = seen.rows(lambda part: by_label(part, self.num_labels))
                state = count(grid(CELLS), rows)
                name, histogram = "target", holding(state, self.num_labels, CELLS, looked=False)
                if self._by_element and seen.from_logits:
                    elements = [_elements(row) for row in rows]
            cells, before = histogram.cells(), float(histogram.pooled().nll())
            _usable(name, cells, self.num_labels)
            sure = histogram.state_dict()["counts"].cpu()[..., -1].sum(-1) > 0
            if name == "target" and histogram.from_logits and bool(sure.any()):
                refuse("input", "hold finite logits", "an infinite one", _INFINITE)
            cells = elements or cells
            answers, aims, buffers = self._fit(cells, sure)
        self.store(histogram.from_logits, fitted=True, **buffers)
        self.nll = (before, mean_loss(cells, answers))
        raw = mean_loss(aims, [one.logit for one in aims])
        if mean_loss(aims, answers) > raw * (1 + _WORSE) + 1e-12:
            loss = "raises the NLL of the data that it is fitted to (see `nll`)"
            _errors.warn(f"This {type(self).__name__} {loss}: {self._if_worse}")
        return self

    def _check(self, histogram: CalibrationHistogram, *others: object) -> None:
        if any(one is not None for one in others):
            wanted = "be None, like `weight`, beside a CalibrationHistogram, which holds both"
            refuse("target", wanted, "one of them", "pass `fit(histogram)`", TypeError)
        mine = self.num_labels, self.num_cells or histogram.num_cells
        theirs, text = (histogram.num_labels, histogram.num_cells), "num_labels={} and num_cells={}"
        if mine != theirs:
            remedy = "build it with these, or pass `histogram.pooled()`, which has no labels"
            refuse("histogram", f"have {text.format(*mine)}", text.format(*theirs), remedy)

    def forward(self, input: Tensor | Array) -> Tensor:
        x = _arrays.tensor(input, "input")
        if isinstance(x, Tensor) and x.dtype == torch.uint8 and not self.takes_logits:
            x = x / 255
        _inputs.logits(x)
        valid = _arrays.unmasked(input)
        if valid is not None:
            x = x.masked_fill(~valid, torch.nan)
        by_label(x, self.num_labels)
        if not self.takes_logits and any_set(outside := (x < 0) | (x > 1)):
            value, remedy = _errors.exact(x[outside][0].item()), "this module was fitted to them"
            refuse("input", "hold probabilities in [0, 1]", value, remedy)
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() <= _BLOCK:
            return self._answer(x)
        if type(x) is not Tensor or transformed() or (x.requires_grad and torch.is_grad_enabled()):
            return self._answer(x)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        pair = (x, result) if self.num_labels else (x.reshape(-1), result.view(-1))
        if x.dtype.itemsize == 2 and self.takes_logits and self.num_labels is None:
            # There are fewer values than elements: each is answered once, and looked up.
            bits = torch.arange(-(1 << 15), 1 << 15, device="cpu").to(torch.int16)
            every, bits = self._answer(bits.view(x.dtype)), pair[0].view(torch.int16)
            blocks = (torch.split(one, _BLOCK) for one in (bits, pair[1]))
            for part, answer in zip(*blocks, strict=True):
                torch.index_select(every, 0, part.long().add_(1 << 15), out=answer)
            return result
        size = max(_BLOCK * len(pair[0]) // x.numel(), 1)  # with labels, whole samples
        for part, answer in zip(*(torch.split(one, size) for one in pair), strict=True):
            most = float(torch.stack(part.aminmax()).abs().amax())
            answer.copy_(self._answer(part) if math.isnan(most) else self._known(part, most))
        return result

    def _answer(self, x: Tensor) -> Tensor:
        # By the comparison that all runtimes agree on: nan == nan in MNN, nan >= nan in OpenVINO,
        # and minima and maxima make anything of nan.
        known = x <= x
        return torch.where(known, self._known(x.masked_fill(~known, 0.0)), x)

    def _known(self, x: Tensor, most: float = math.inf) -> Tensor:
        answer = self._map(x.to(torch.promote_types(x.dtype, torch.float32)), most)
        if not self.takes_logits:
            # Not sigmoid, which is 0 from -18 on in onnxruntime, and never below 4e-7 in tract.
            low = math.log(torch.finfo(answer.dtype).tiny)  # beyond it the gradient would be nan
            answer = 1 / (1 + torch.exp(-answer.clamp(min=low)))
        if x.dtype == torch.float16:  # whose largest number a scale can pass
            answer = answer.clamp(-65504, 65504)
        return answer.to(x.dtype)

    def store(self, from_logits: bool, fitted: bool, **values: Tensor) -> None:
        # Fill buffers, all of them with ordinary tensors, in inference mode too.
        self.takes_logits, self.nll = from_logits, None
        with torch.inference_mode(False), torch.no_grad():
            for name, buffer in list(self.named_buffers()):
                if buffer.is_inference():
                    setattr(self, name, buffer.clone())
            self.fitted.fill_(fitted)
            self.from_logits.fill_(from_logits)
            for name, value in values.items():
                buffer = getattr(self, name)
                buffer.copy_(value.reshape(buffer.shape))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {prefix + name: part.shape for name, part in self.named_buffers()}
        found = {name: getattr(state_dict[name], "shape", None) for name in own.keys() & state_dict}
        if found and found != own:
            refusal = f"`{prefix[:-1] or type(self).__name__}` is of another version or num_labels"
            args[-1].append(f"The state of {refusal}: fit this module again")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if has_values(self.from_logits):
            self.store(bool(self.from_logits), bool(self.fitted))

    def extra_repr(self) -> str:
        parts = [
            "" if self.num_labels is None else f"num_labels={self.num_labels}",
            "" if self.takes_logits else "from_logits=False",
            "not fitted" if has_values(self.fitted) and not self.fitted else "",
            "" if self.nll is None else "nll={:.4f} -> {:.4f}".format(*self.nll),
        ]
        return ", ".join(filter(None, parts))


def place(cells: Grid, z: Tensor, most: float) -> Tensor:
    """The cell of each logit up to `most`, from the surest negative to the surest positive, int32.

    Along |z| it is the sum of cells even in the probability, then of fine and of wide ones even in
    the logit. Without masks, which take a CPU longer than arithmetic, and with one clamp of each
    tensor, since exporters merge two.
    """
    tail = z.abs()
    top = cells.half + slack(2 * cells.half, z.dtype) - cells.first
    at = (-tail).sigmoid().mul(-2 * cells.half).add(top).clamp(0, cells.last - cells.first)
    for one in reversed([one for one in cells.stretches if one.low < most]):
        high = one.high - 0.5 / one.density * (one is cells.stretches[-1])
        tail = tail.clamp(max=high)
        at = at + (tail - one.low).relu() * one.density
    side = z.clamp(-1, 0).floor()  # -1 for negative logits, else 0
    return (at.floor() * (2 * side + 1) + side + cells.size).to(torch.int32)


def mean_loss(cells: Sequence[Cells], answers: Sequence[Tensor]) -> float:
    """Mean NLL, each class alone: a difference would lose the digits of what is sure and right."""
    rows = zip(cells, answers, strict=True)
    loss = sum(float(((n - k) * F.softplus(z) + k * F.softplus(-z)).sum()) for (_, n, k), z in rows)
    return loss / sum(float(one.count.sum()) for one in cells)


# --- what a fit is made of ------------------------------------------------------------------------


def _looked_at(data: Sequence[Any], from_logits: bool, ignore_index: float | None) -> Batch:
    """The data on the CPU, where everything is looked at; the largest weight is at least 1."""
    x, y, w = [one.detach().cpu() if isinstance(one, Tensor) else one for one in data]
    seen = batch(x, y, w, from_logits, ignore_index)
    if seen.from_logits and _inputs.like_probabilities(seen.input) == "log-probabilities":
        _errors.warn(_SOFTMAX)
    if seen.weight is not None and seen.weight.numel():
        largest = float(seen.weight.max()) or 1.0
        seen = seen._replace(weight=seen.weight / min(largest, 1.0))
    return seen


def _elements(row: Batch) -> Cells:
    """The elements of one label, a cell for each; of many, those that are alike share one.

    Shared cells are those of a histogram of the logits less their median, over their median size,
    so that logits of any offset and scale stay apart.
    """
    z, y = row.input.reshape(-1), row.target.reshape(-1)
    w = z.new_ones((), dtype=torch.float64) if row.weight is None else row.weight.reshape(-1)
    w, valid = w.expand(z.shape), _inputs.valid_elements(y, row.void)
    keep = w > 0 if valid is None else valid & (w > 0)
    z, y, w = (one.double() if bool(keep.all()) else one[keep].double() for one in (z, y, w))
    if len(z) <= _MANY:
        return Cells(z, w, w * y)
    middle = z.median()
    size = (z - middle).abs()
    scale = float(size.median()) or float(size.mean()) or 1.0
    index = place(_GRID, (z - middle) / scale, math.inf)
    logit, count, positive = (torch.bincount(index, part) for part in (w * z, w, w * y))
    some = count > 0
    return Cells((logit / count)[some], count[some], positive[some])


def _usable(name: str, cells: list[Cells], num_labels: int | None) -> None:
    for label, one in enumerate(cells):
        of = "" if num_labels is None else f" of label {label}"
        total, positive = float(one.count.sum()), float(one.positive.sum())
        if not 0 < positive < total:
            got, remedy = "no element", "fit to validation data with positives and negatives"
            if math.isnan(total):
                got, remedy = "nan", "it has seen nan, or illegal labels, on an accelerator"
            elif total > 0:
                got = f"only {positive / total:g}"
            refuse(name, f"hold both classes{of}", got, remedy)
