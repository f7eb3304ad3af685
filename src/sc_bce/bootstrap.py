"""Is the difference real? A bootstrap over images: pixels of one image err together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import _batch, _checks, _tally
from .histogram import CalibrationHistogram, holding, restored

__all__ = ["ImageHistograms", "Interval"]

Measure = Callable[[CalibrationHistogram], Tensor]

_MEASURES = (
    "nll", "brier", "ece", "oe", "mce", "adaptive_ece", "sweep_ece", "debiased_ece", "accuracy",
    "confidence", "slope", "intercept", "refinement",
)  # fmt: skip
_TOGETHER = 1 << 24  # numbers of the resampled cells that are held at once


class Interval(NamedTuple):
    """A measure and where it lies with a confidence of ``level``."""

    value: float
    """of the images that were seen"""
    low: float
    """lower end; 0 of a measure that can't be told from 0"""
    high: float
    """upper end"""


class ImageHistograms:
    r"""One coarse histogram per image, and from them an interval for any calibration measure.

    Pixels of one image err together, so that a standard error over pixels is far too small. The
    bootstrap draws the :math:`M` images again and again, with replacement, and measures each draw
    :math:`\theta^*`:

    .. math::
        \mathrm{interval} = [\,q_a(\theta^*),\; q_{1-a}(\theta^*)\,], \qquad
        a = (1 - \mathrm{level}) / 2,

    with the quantiles :math:`q` of the draws. Special case: an error that is 0 at best (ECE and its
    kin) has no lower end near 0, since noise alone lifts it. Where thrice the draws' standard
    deviation, their lift taken off, reaches 0, the lower end is 0, and only the upper one says
    something.

    Args:
        num_cells: cells over [0, 1] of each image's histogram, an even number: equal-width bins
            whose number divides it are exact. Default: 100 (3.3 kB per image).

    Raises:
        ValueError: ``num_cells`` not even and positive.
        TypeError: ``num_cells`` not an int.

    Note:
        It needs some dozens of images; see the coverage in the tests (100 images). Two networks
        are compared on the same images in the same order: their difference is far better known
        than either. NLL, Brier score, accuracy and confidence are exact, whatever ``num_cells``.

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

    @torch.no_grad()
    def update(
        self,
        input: Tensor | _tally.Array,
        target: Tensor | _tally.Array,
        *,
        from_logits: bool = True,
        ignore_index: int | None = None,
    ) -> None:
        """Add the predictions of a batch; dimension 0 counts its images.

        Args:
            input: logits, or probabilities with ``from_logits=False``, (N, ...).
            target: 0 and 1 in any dtype, of the same size.
            from_logits: whether ``input`` holds logits. Default: True.
            ignore_index: target value of elements to leave out. Default: None.

        Raises:
            ValueError: as :meth:`CalibrationHistogram.update`, and for an input without
                dimensions. Nothing is then added.
            TypeError: an argument of the wrong type.
        """
        x, y = _tally.tensor(input, "input"), _tally.tensor(target, "target")
        _batch.pair(x, y)
        if x.dim() == 0:
            raise ValueError(
                _checks.sentence("input", "have its images in dimension 0", "no dimension")
            )
        ignore_index = _checks.ignore_index(ignore_index)
        home = _batch.home(x.device)
        new = _tally.count(self.num_cells, x.to(home), y.to(home), from_logits, ignore_index)
        self._append(new)

    def merge(self, other: ImageHistograms) -> ImageHistograms:
        """Append another one's images to these, and return this object.

        Raises:
            ValueError: the other has another number of cells.
            TypeError: the other is none of its kind.
        """
        self._check(other)
        self._append(other._state)
        return self

    def histogram(self) -> CalibrationHistogram:
        """All images together."""
        weights = torch.ones(1, len(self), dtype=torch.float64, device="cpu")
        return self._drawn(weights, self._flat()).label(0)

    def interval(
        self,
        measure: str | Measure = "nll",
        *,
        other: ImageHistograms | None = None,
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Interval:
        """Interval of a measure, or of its difference from another network on the same images.

        Args:
            measure: name of a measure of :class:`CalibrationHistogram`, at its defaults, or a
                function of a histogram, such as ``lambda h: h.ece(15, "positive_class")``. It is
                given a histogram with ``num_labels``, one label per draw. Default: ``"nll"``.
            other: the other network's images, in the same order; the interval is then that of
                this one's measure minus the other's. Default: None.
            level: confidence, in (0, 1). Default: 0.95.
            resamples: number of draws. Default: 1000.
            seed: of the draws. Default: 0.

        Returns:
            :class:`Interval`, of floats; its ends are nan where a draw has no value, as a slope
            without positives.

        Raises:
            ValueError: fewer than two images; the other has another number of images or cells;
                an unknown measure; ``level`` outside (0, 1).
            TypeError: an argument of the wrong type.
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
            return _interval(values[0] - values[1], difference, level, paired=True)
        return _interval(values[0], draws[0], level, paired=False)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the counts and sums, one row per image, to be saved."""
        return {name: part.clone() for name, part in self._state._asdict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the content by a copy of a saved one, of any number of images.

        Raises:
            ValueError: a key is missing or too many, or the number of cells differs.
        """
        images = len(state_dict["counts"]) if "counts" in state_dict else 0
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

    def _drawn(self, weights: Tensor, flat: Tensor) -> CalibrationHistogram:
        """A histogram of as many labels as there are rows of weights over the images."""
        shapes = [part.shape[1:] for part in self._state]
        sizes = [shape.numel() for shape in shapes]
        parts = [
            part.reshape(len(weights), *shape)
            for part, shape in zip(torch.split(weights @ flat, sizes, 1), shapes, strict=True)
        ]
        state = _tally.Counted(parts[0].round().to(torch.int64), *parts[1:])
        return holding(state, len(weights), self.num_cells)

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
            drawn: object = of(self._drawn(weights, flat))
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


def _interval(value: float, draws: Tensor, level: float, paired: bool) -> Interval:
    low, high = (float(draws.quantile((1 + sign * level) / 2)) for sign in (-1, 1))
    unlifted = 2 * value - float(draws.mean())
    near_zero = bool((draws >= 0).all()) and unlifted <= 3 * float(draws.std())
    return Interval(value, 0.0 if near_zero and not paired else low, high)
