"""Measures image by image, and their confidence intervals: a bootstrap over images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import _errors
from .._arrays import Array
from .._errors import refuse
from . import cells as _cells
from .cells import counted
from .counting import count
from .histogram import CalibrationHistogram, holding, same_kind

__all__ = ["ImageHistograms", "Interval"]

Measure = Callable[[CalibrationHistogram], Tensor]

_ERRORS = (
    "nll", "brier", "ece", "oe", "mce", "average_error", "l2_error", "adaptive_ece", "sweep_ece",
    "debiased_ece", "refinement",
)  # fmt: skip
_MEASURES = (*_ERRORS, "accuracy", "confidence", "slope", "intercept")  # those are 0 at best
TOGETHER = 1 << 24  # numbers of resampled cells that are held at once


class Interval(NamedTuple):
    """A confidence interval of a calibration measure, returned by ``ImageHistograms.interval``.

    Example:
        >>> images = ImageHistograms()
        >>> images.update(torch.randn(50, 16, 16), torch.rand(50, 16, 16) < 0.5)
        >>> value, low, high = images.interval("nll")
        >>> low < value < high
        True
    """

    value: float
    """the measure on the images that were seen"""
    low: float
    """lower end; 0 if an error can't be distinguished from 0"""
    high: float
    """upper end"""


class ImageHistograms:
    r"""Calibration measures (ECE, NLL, ...) of each image, and bootstrap confidence intervals.

    Pixels of one image err together, so a standard error over pixels is far too small. The
    bootstrap draws the :math:`M` images with replacement, many times, and measures each draw
    :math:`\theta^*`:

    .. math::
        \mathrm{interval} = [\,q_a(\theta^*),\; q_{1-a}(\theta^*)\,], \qquad
        a = (1 - \mathrm{level}) / 2,

    with the quantiles :math:`q` of the draws. Each image is kept as one coarse histogram.

    Special case: an error that is 0 at best, such as the ECE, has no lower end near 0, because
    noise alone raises it. If the value, less the lift that resampling adds, is within three
    standard deviations of 0, the lower end is 0 and only the upper end is informative. A function
    that is never negative counts as an error; accuracy, confidence, slope and intercept do not.

    Args:
        num_labels: number of labels in dimension 1, each measured separately. Default: None.
        num_cells: cells over [0, 1] of each image's histogram, an even number: equal-width bins
            whose number divides it are exact. Default: 100 (4.5 kB per image and label).

    Raises:
        ValueError: ``num_cells`` is not even and positive; ``num_labels`` is not positive.
        TypeError: one of them is not an int.

    Note:
        It needs some dozens of images; its coverage was measured with 100. To compare two
        networks, use the same images in the same order: their difference is known far better
        than either value. NLL, Brier score, accuracy and confidence do not depend on
        ``num_cells``.

    References:
        Davison and Hinkley, *Bootstrap Methods and their Application*, 1997 (section 5.3).

    Example:
        >>> import torch
        >>> from sc_bce import ImageHistograms
        >>> _ = torch.manual_seed(0)
        >>> truth = torch.randn(50, 1, 16, 16) + torch.randn(50, 1, 1, 1)
        >>> masks = torch.rand(50, 1, 16, 16) < torch.sigmoid(truth)
        >>> one, two = ImageHistograms(), ImageHistograms()
        >>> one.update(2 * truth, masks)
        >>> two.update(3 * truth, masks)
        >>> gain = one.interval("nll", other=two)  # below 0: the first is better
        >>> gain.low < gain.value < gain.high < 0
        True
    """

    def __init__(self, num_labels: int | None = None, *, num_cells: int = 100) -> None:
        like = CalibrationHistogram(num_labels, num_cells=num_cells)
        self.num_labels, self.num_cells = like.num_labels, like.num_cells
        self._grid = _cells.grid(self.num_cells)
        self._state = _cells.nothing(0, self._grid)  # a row per image and label

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, input: Tensor | Array, target: Tensor | Array, *,
        weight: Tensor | Array | None = None, from_logits: bool = True,
        ignore_index: float | None = None,
    ) -> None:  # fmt: skip
        """Add the predictions of a batch; dimension 0 holds its images.

        Args:
            input: logits, or probabilities with ``from_logits=False``, (N, C, ...) or (N, H, W);
                with ``num_labels``, dimension 1 holds the labels, as in (N, C). Without, one or
                two dimensions are refused: (H, W) would be H images.
            target: labels of the same size, as for :class:`CalibrationHistogram`.
            weight: weight of each element, likewise. Default: None.
            from_logits: whether ``input`` holds logits. Default: True.
            ignore_index: target value of elements to leave out. Default: None.

        Example:
            >>> images = ImageHistograms()
            >>> images.update(torch.randn(8, 1, 4, 4), torch.rand(8, 1, 4, 4) < 0.5)
            >>> images
            ImageHistograms(num_cells=100, images=8)
        """
        batch = _cells.batch(input, target, weight, from_logits, ignore_index)
        if batch.input.dim() < (3 if self.num_labels is None else 2):
            wanted, got = "be a batch of images, (N, C, H, W) or (N, H, W)", batch.input.shape
            remedy = "pass one image as `input[None]`, flattened ones as `input[:, None]`"
            refuse("input", wanted, f"shape {tuple(got)}", f"{remedy}, and targets likewise")
        _cells.by_label(batch.input, self.num_labels)
        if len(batch.input):
            last = 0 if self.num_labels is None else 1
            self._append(count(self._grid, batch.rows(lambda part: part.flatten(0, last))))

    @torch.inference_mode(False)
    def merge(self, other: ImageHistograms) -> ImageHistograms:
        """Append the images of another object, and return this one.

        Example:
            >>> one, two = ImageHistograms(), ImageHistograms()
            >>> one.update(torch.randn(8, 1, 4), torch.rand(8, 1, 4) < 0.5)
            >>> two.update(torch.randn(3, 1, 4), torch.rand(3, 1, 4) < 0.5)
            >>> one.merge(two)
            ImageHistograms(num_cells=100, images=11)
        """
        same_kind(self, other)
        self._append(other._state)
        return self

    def histogram(self) -> CalibrationHistogram:
        """Return the :class:`CalibrationHistogram` of all images together.

        Example:
            >>> images = ImageHistograms()
            >>> images.update(torch.tensor([[[2.0, -1.0]], [[0.5, 3.0]]]), torch.ones(2, 1, 2))
            >>> images.histogram().accuracy()
            tensor(0.7500, dtype=torch.float64)
        """
        each = self._state.view(len(self), self.num_labels or 1, self._state.shape[1])
        return holding(each.sum(0), self.num_labels, self.num_cells, looked=False)

    def label(self, index: int) -> ImageHistograms:
        """Return the images of one label, without ``num_labels``.

        Example:
            >>> images = ImageHistograms(2)
            >>> images.update(torch.randn(8, 2), torch.rand(8, 2) < 0.5)
            >>> images.label(1)
            ImageHistograms(num_cells=100, images=8)
        """
        labels, made = range(self.num_labels or 1), ImageHistograms(num_cells=self.num_cells)
        made._state = self._state[labels[index] :: len(labels)]
        return made

    def per_image(self) -> dict[str, Tensor]:
        """Return every measure of ``CalibrationHistogram.to_dict`` for each image.

        Returns:
            Tensors of shape (images,), or (images, labels), in the order of the images. What an
            image does not have is nan, such as the slope where one class is missing.

        Example:
            >>> images = ImageHistograms()
            >>> images.update(torch.tensor([[[2.0, -1.0]], [[0.5, 3.0]]]), torch.ones(2, 1, 2))
            >>> images.per_image()["accuracy"]
            tensor([0.5000, 1.0000], dtype=torch.float64)
        """
        size = (len(self),) if self.num_labels is None else (len(self), self.num_labels)
        if not len(self):
            return {name: one.new_zeros(size) for name, one in self.histogram().measures().items()}
        each = holding(self._state, len(self._state), self.num_cells)
        return {name: value.reshape(size) for name, value in each.measures().items()}

    def interval(
        self, measure: str | Measure = "nll", *, other: ImageHistograms | None = None,
        level: float = 0.95, resamples: int = 1000, seed: int = 0,
    ) -> Interval:  # fmt: skip
        """Return a bootstrap confidence interval of a measure, or of its difference to a network.

        Args:
            measure: name of a measure of :class:`CalibrationHistogram`, at its defaults, or a
                function of a histogram, such as ``lambda h: h.ece(15, "positive_class")``. The
                histogram that it gets has ``num_labels``, one label per draw. Default: ``"nll"``.
            other: the predictions of another network for the same images in the same order; the
                interval is then that of this measure minus the other's. Default: None.
            level: confidence level, in (0, 1). Default: 0.95.
            resamples: number of draws. Default: 1000.
            seed: seed of the draws. Default: 0.

        Returns:
            :class:`Interval`; its ends are nan if a draw has no value, such as a slope.

        Raises:
            ValueError: there are fewer than two images; those of the other differ in number,
                elements or positives; the measure is unknown; ``level`` is outside (0, 1).

        Example:
            >>> _ = torch.manual_seed(0)
            >>> truth, images = torch.randn(50, 16, 16), ImageHistograms()
            >>> images.update(3 * truth, torch.rand(50, 16, 16) < torch.sigmoid(truth))
            >>> value, low, high = images.interval("slope")
            >>> low < value < high < 1  # over-confident beyond doubt
            True
        """
        if isinstance(measure, str):
            _errors.choice("measure", measure, _MEASURES)
        of = cast(Measure, getattr(CalibrationHistogram, str(measure), measure))
        _errors.inside("level", level, 0.0, 1.0)
        _errors.whole("resamples", resamples)
        if self.num_labels is not None:
            wanted, got = "have one label", f"num_labels={self.num_labels}"
            refuse("self", wanted, got, "pass `images.label(i).interval(...)`")
        if len(self) < 2:
            refuse("self", "hold two images or more", len(self), "update it first")
        if other is not None:
            self._check(other)
        draws = self._resampled(of, resamples, seed)
        value = float(of(self.histogram()))
        may_be_0 = other is None and (measure in _ERRORS or not isinstance(measure, str))
        if other is not None:
            value -= float(of(other.histogram()))
            draws = draws - other._resampled(of, resamples, seed)
        low, high = (float(draws.quantile((1 + sign * level) / 2)) for sign in (-1, 1))
        unlifted = 2 * value - float(draws.mean())
        near_0 = bool((draws >= 0).all()) and unlifted <= 3 * float(draws.std())
        return Interval(value, 0.0 if near_0 and may_be_0 else low, high)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the counts and sums, one row per image and label, to be saved.

        Example:
            >>> sorted(ImageHistograms().state_dict())
            ['counts', 'doubts', 'sizes', 'totals']
        """
        return {name: part.clone() for name, part in counted(self._state)._asdict().items()}

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the content with a copy of a saved state, of any number of images.

        Example:
            >>> one, other = ImageHistograms(), ImageHistograms()
            >>> one.update(torch.randn(8, 1, 4), torch.rand(8, 1, 4) < 0.5)
            >>> other.load_state_dict(one.state_dict())
            >>> other
            ImageHistograms(num_cells=100, images=8)
        """
        counts = state_dict.get("counts")
        rows = len(counts) if isinstance(counts, Tensor) and counts.dim() else 0
        rows -= rows % (self.num_labels or 1)
        self._state = _cells.restored(state_dict, _cells.nothing(rows, self._grid))

    def _append(self, new: Tensor) -> None:
        self._state = torch.cat((self._state.to(new.device), new))

    def _resampled(self, of: Measure, resamples: int, seed: int) -> Tensor:
        state = self._state.cpu()
        # The same seed draws the same images for both networks.
        generator = torch.Generator("cpu").manual_seed(seed)
        images, values = len(self), []
        together = max(1, min(resamples, TOGETHER // max(images, state.shape[1])))
        for first in range(0, resamples, together):
            rows = min(together, resamples - first)
            chosen = torch.randint(images, (rows, images), generator=generator, device="cpu")
            weights = torch.zeros(rows, images, dtype=torch.float64, device="cpu")
            weights.scatter_add_(1, chosen, torch.ones_like(weights))
            drawn: object = of(holding(weights @ state, rows, self.num_cells))
            if not isinstance(drawn, Tensor) or drawn.shape != (rows,):
                wanted = f"return a Tensor of shape ({rows},) for a histogram of {rows} labels"
                remedy = "leave out `float` and `item`"
                refuse("measure", wanted, _errors.describe(drawn), remedy, TypeError)
            values.append(drawn.double())
        return torch.cat(values)

    def _check(self, other: ImageHistograms) -> None:
        """Refuse predictions for other images."""
        same_kind(self, other)
        if len(other) != len(self):
            refuse("other", f"hold the same {len(self)} images", f"{len(other)} images")
        mine, theirs = (counted(one._state).counts.sum((1, 3)).cpu() for one in (self, other))
        differ = ((mine - theirs).abs() > 1e-6 * (1 + mine)).any(1)
        if bool(differ.any()):
            first = int(differ.nonzero()[0, 0])
            wanted, remedy = "hold the same images in the same order", "don't shuffle the loader"
            refuse("other", wanted, f"other labels for image {first}", remedy)

    def __len__(self) -> int:
        return len(self._state) // (self.num_labels or 1)

    def __repr__(self) -> str:
        labels = "" if self.num_labels is None else f"num_labels={self.num_labels}, "
        return f"{type(self).__name__}({labels}num_cells={self.num_cells}, images={len(self)})"
