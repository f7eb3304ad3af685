"""Confidence intervals of calibration measures: a bootstrap over images, not over pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import _batch, _checks
from . import cells as _tally
from .histogram import CalibrationHistogram, holding, restored

__all__ = ["ImageHistograms", "Interval"]

Measure = Callable[[CalibrationHistogram], Tensor]

_MEASURES = (
    "nll", "brier", "ece", "oe", "mce", "adaptive_ece", "sweep_ece", "debiased_ece", "accuracy",
    "confidence", "slope", "intercept", "refinement",
)  # fmt: skip
_ERRORS = frozenset(_MEASURES) - {"accuracy", "confidence", "slope", "intercept"}  # 0 at best
_TOGETHER = 1 << 24  # numbers of resampled cells that are held at once


class Interval(NamedTuple):
    """A confidence interval of a calibration measure, returned by ``ImageHistograms.interval``.

    Example:
        >>> import torch
        >>> from sc_bce import ImageHistograms
        >>> _ = torch.manual_seed(0)
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
    r"""Bootstrap confidence intervals over images for any calibration measure (ECE, NLL, ...).

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
        num_cells: cells over [0, 1] of each image's histogram, an even number: equal-width bins
            whose number divides it are exact. Default: 100 (3.3 kB per image).

    Raises:
        ValueError: ``num_cells`` is not even and positive.
        TypeError: ``num_cells`` is not an int.

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

    def __init__(self, *, num_cells: int = 100) -> None:
        self.num_cells = CalibrationHistogram(num_cells=num_cells).num_cells
        self._state = _tally.nothing(0, _tally.grid(self.num_cells).size)
        self._only_logits = True  # so far; they may turn out to be probabilities

    @torch.no_grad()
    def update(
        self,
        input: Tensor | _tally.Array,
        target: Tensor | _tally.Array,
        *,
        from_logits: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        """Add the predictions of a batch; dimension 0 holds its images.

        Args:
            input: logits, or probabilities with ``from_logits=False``, (N, ...).
            target: 0 and 1 in any dtype, of the same size.
            from_logits: whether ``input`` holds logits. Default: True.
            ignore_index: target value of elements to leave out. Default: None.

        Raises:
            ValueError: as ``CalibrationHistogram.update``, and if the input has no dimension.
                Nothing is then added.
            TypeError: an argument has the wrong type.

        Example:
            >>> import torch
            >>> from sc_bce import ImageHistograms
            >>> images = ImageHistograms()
            >>> images.update(torch.randn(8, 1, 4, 4), torch.rand(8, 1, 4, 4) < 0.5)
            >>> images
            ImageHistograms(num_cells=100, images=8)
        """
        x, y = _tally.pair(input, target)
        if x.dim() == 0:
            raise ValueError(
                _checks.sentence("input", "have its images in dimension 0", "no dimension")
            )
        ignore_index = _checks.ignore_index(ignore_index)
        home = _batch.home(x.device)
        new = _tally.count(self.num_cells, x.to(home), y.to(home), from_logits, ignore_index)
        self._append(new)
        self._only_logits = self._only_logits and from_logits

    def merge(self, other: ImageHistograms) -> ImageHistograms:
        """Append the images of another object, and return this one.

        Raises:
            ValueError: the other has a different number of cells.
            TypeError: the other is not an ImageHistograms.

        Example:
            >>> import torch
            >>> from sc_bce import ImageHistograms
            >>> one, two = ImageHistograms(), ImageHistograms()
            >>> one.update(torch.randn(8, 4), torch.rand(8, 4) < 0.5)
            >>> two.update(torch.randn(3, 4), torch.rand(3, 4) < 0.5)
            >>> one.merge(two)
            ImageHistograms(num_cells=100, images=11)
        """
        self._check(other)
        self._append(other._state)
        self._only_logits = self._only_logits and other._only_logits
        return self

    def histogram(self) -> CalibrationHistogram:
        """Return the :class:`CalibrationHistogram` of all images together.

        Example:
            >>> import torch
            >>> from sc_bce import ImageHistograms
            >>> images = ImageHistograms()
            >>> logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
            >>> images.update(logits, torch.tensor([[1, 0], [0, 1]]))
            >>> images.histogram().accuracy()
            tensor(0.7500, dtype=torch.float64)
        """
        weights = torch.ones(1, len(self), dtype=torch.float64, device="cpu")
        state = self._drawn(weights, self._flat())
        return holding(state, None, self.num_cells, only_logits=self._only_logits)

    def interval(
        self,
        measure: str | Measure = "nll",
        *,
        other: ImageHistograms | None = None,
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Interval:
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
            :class:`Interval`, of floats; its ends are nan if a draw has no value, such as the
            slope of a draw without positives.

        Raises:
            ValueError: there are fewer than two images; the other has a different number of
                images or cells; the measure is unknown; ``level`` is outside (0, 1).
            TypeError: an argument has the wrong type.

        Example:
            >>> import torch
            >>> from sc_bce import ImageHistograms
            >>> _ = torch.manual_seed(0)
            >>> truth = torch.randn(50, 16, 16)
            >>> images = ImageHistograms()
            >>> images.update(3 * truth, torch.rand(50, 16, 16) < torch.sigmoid(truth))
            >>> value, low, high = images.interval("slope")
            >>> low < value < high < 1  # over-confident beyond doubt
            True
        """
        of = self._measure(measure)
        _checks.number("level", level, 0.0, 1.0)
        if level in (0, 1):
            raise ValueError(_checks.sentence("level", "be inside (0, 1)", level))
        _checks.positive_int("resamples", resamples)
        if len(self) < 2:
            raise ValueError(
                _checks.sentence("self", "hold two images or more", len(self), "update it first")
            )
        both = [self]
        if other is not None:
            self._check(other)
            if len(other) != len(self):
                raise ValueError(
                    _checks.sentence(
                        "other", f"hold the same {len(self)} images", f"{len(other)} images"
                    )
                )
            both.append(other)
        draws = [one._resampled(of, resamples, seed) for one in both]
        values = [float(of(one.histogram())) for one in both]
        if other is not None:
            difference = draws[0] - draws[1]
            return _interval(values[0] - values[1], difference, level)
        may_be_0 = measure in _ERRORS or not isinstance(measure, str)
        return _interval(values[0], draws[0], level, may_be_0)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the counts and sums, one row per image, to be saved.

        Example:
            >>> from sc_bce import ImageHistograms
            >>> sorted(ImageHistograms().state_dict())
            ['counts', 'doubts', 'log_loss', 'squared_error']
        """
        return {name: part.clone() for name, part in self._state._asdict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the content with a copy of a saved state, of any number of images.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: a key is missing or unexpected, or the number of cells differs.

        Example:
            >>> import torch
            >>> from sc_bce import ImageHistograms
            >>> images, restored = ImageHistograms(), ImageHistograms()
            >>> images.update(torch.randn(8, 4), torch.rand(8, 4) < 0.5)
            >>> restored.load_state_dict(images.state_dict())
            >>> restored
            ImageHistograms(num_cells=100, images=8)
        """
        counts = state_dict.get("counts")
        images = len(counts) if isinstance(counts, Tensor) and counts.dim() else 0
        self._state = restored(state_dict, _tally.nothing(images, _tally.grid(self.num_cells).size))

    def _append(self, new: _tally.Counted) -> None:
        parts = zip(self._state.to(new.counts.device), new, strict=True)
        self._state = _tally.Counted(*(torch.cat(pair) for pair in parts))

    def _flat(self) -> Tensor:
        """All numbers of each image in one row, float64, on the CPU."""
        return torch.cat([part.cpu().double().flatten(1) for part in self._columns()], 1)

    def _columns(self) -> _tally.Counted:
        state = self._state
        return state._replace(
            squared_error=state.squared_error[:, None], log_loss=state.log_loss[:, None]
        )

    def _drawn(self, weights: Tensor, flat: Tensor) -> _tally.Counted:
        """The sums of all images, with one label for each row of weights over them."""
        shapes = [part.shape[1:] for part in self._state]
        sizes = [shape.numel() for shape in shapes]
        parts = [
            part.reshape(len(weights), *shape)
            for part, shape in zip(torch.split(weights @ flat, sizes, 1), shapes, strict=True)
        ]
        return _tally.Counted(parts[0].round().to(torch.int64), *parts[1:])

    def _resampled(self, of: Measure, resamples: int, seed: int) -> Tensor:
        flat = self._flat()
        # The same seed draws the same images for both networks.
        generator = torch.Generator("cpu").manual_seed(seed)
        images, values = len(self), []
        together = max(1, min(resamples, _TOGETHER // max(images, flat.shape[1])))
        for first in range(0, resamples, together):
            rows = min(together, resamples - first)
            chosen = torch.randint(images, (rows, images), generator=generator, device="cpu")
            weights = torch.zeros(rows, images, dtype=torch.float64, device="cpu")
            weights.scatter_add_(1, chosen, torch.ones_like(weights))
            drawn: object = of(holding(self._drawn(weights, flat), rows, self.num_cells))
            if not isinstance(drawn, Tensor) or drawn.shape != (rows,):
                raise TypeError(
                    _checks.sentence(
                        "measure",
                        f"return a Tensor of shape ({rows},) for a histogram of {rows} labels",
                        _checks.describe(drawn),
                        "leave out `float` and `item`",
                    )
                )
            values.append(drawn.double())
        return torch.cat(values)

    def _check(self, other: object) -> None:
        if not isinstance(other, ImageHistograms):
            raise TypeError(
                _checks.sentence("other", "be ImageHistograms", _checks.describe(other))
            )
        if other.num_cells != self.num_cells:
            raise ValueError(
                _checks.sentence(
                    "other", f"have num_cells={self.num_cells}", f"num_cells={other.num_cells}"
                )
            )

    @staticmethod
    def _measure(measure: object) -> Measure:
        if isinstance(measure, str):
            _checks.choice("measure", measure, _MEASURES)
            return cast(Measure, getattr(CalibrationHistogram, measure))
        if not callable(measure):
            raise TypeError(
                _checks.sentence(
                    "measure",
                    "be a name, or a function of a histogram",
                    _checks.describe(measure),
                )
            )
        return cast(Measure, measure)

    def __len__(self) -> int:
        return len(self._state.counts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_cells={self.num_cells}, images={len(self)})"


def _interval(value: float, draws: Tensor, level: float, may_be_0: bool = False) -> Interval:
    low, high = (float(draws.quantile((1 + sign * level) / 2)) for sign in (-1, 1))
    unlifted = 2 * value - float(draws.mean())
    near_0 = bool((draws >= 0).all()) and unlifted <= 3 * float(draws.std())
    return Interval(value, 0.0 if near_0 and may_be_0 else low, high)
