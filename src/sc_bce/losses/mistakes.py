"""Likely mistakes in training, and what is said about them."""

from __future__ import annotations

from torch import Tensor

from .. import _errors, _inputs
from .._torch import world_size
from .levels import Levels
from .measured import Reading

LOOKS = 4  # training batches whose logits are looked at, in case they are probabilities
PATIENCE = 10_000  # batches without a step before the warning, if no epoch can be counted
_GROWN = 5  # steps after which a histogram of all epochs has so many times the first's elements
_COPIES = 3  # times that a sampler may repeat each sample in an epoch
_OFTEN = 10  # a step that follows one batch, so many times in a row, is one per batch


class History:
    """What this process has seen; not part of the state."""

    def __init__(self) -> None:
        self.looks, self.named = LOOKS, False  # whether probabilities were
        # short: steps in a row that followed a single batch; measured: elements of the first one
        self.steps = self.short = self.measured = 0
        self.batches = self.epochs = self.evaluated = 0  # evaluated: forwards since the last batch
        self.samples = self.elements = self.largest = self.since = 0  # since the last step

    def batch(self, input: Tensor, levels: Levels, shared: bool) -> None:
        """Note a training batch; nothing waits for it."""
        if self.looks:
            self.looks -= 1
            self.named |= warn_of_probabilities(input)
        if self.evaluated > 1 and self.batches:
            self.epochs += 1
        self.evaluated = 0
        count = input.shape[0] if input.dim() else 1
        self.batches, self.since = self.batches + 1, self.since + 1
        self.samples, self.elements = self.samples + count, self.elements + input.numel()
        self.largest = max(self.largest, count)
        if levels.steps or self.steps:
            return
        late = self.epochs > levels.warmup or self.batches > PATIENCE
        if late if shared else self._passed(self.samples - count, levels):
            _errors.warn(
                "AdaptivePerturbation has trained past its warm-up, but step() was never called, "
                "so the levels don't move and the loss is plain BCE; call "
                "`criterion.step(histogram)` after each epoch"
            )

    def _passed(self, before: int, levels: Levels) -> bool:
        """Whether this batch begins another pass over the rows, after the warm-up's."""
        share = -(-len(levels.alpha) // world_size())  # rounded up, as samplers pad
        passes, first = (self.samples - 1) // share, levels.warmup
        if passes == (before - 1) // share or passes not in (first, _COPIES * first):
            return False
        # A sampler that repeats samples has not met all rows after as many samples.
        met = levels.alpha.device.type == "cpu" and int(levels.trained.sum()) >= share
        return met == (passes == first)

    def step(self, reading: Reading, moved: Tensor, levels: Levels, shared: bool) -> None:
        """Look for mistakes in what was trained since the last step."""
        self.steps += 1
        # Once an epoch, until it is said: what an untrained sigmoid answers looks like logits.
        self.looks = max(self.looks, int(not self.named))
        self.measured = self.measured or reading.elements
        if self.steps == _GROWN and reading.elements == _GROWN * self.measured > 0:
            _errors.warn(
                "the histogram that step() gets grows from epoch to epoch; call "
                "`histogram.reset()` before each validation, or make a new one"
            )
        self.short = self.short + 1 if self.since == 1 else 0
        elements, touched = self.elements, int(moved.sum())
        self.samples = self.elements = self.largest = self.since = 0
        # A process that resumed within an epoch has seen fewer samples than were touched.
        known = int(levels.trained.sum())
        often = self.steps > 1 and 0 < 10 * max(reading.samples, touched) < known
        if shared:  # more is measured than trained, each time
            often = self.short >= _OFTEN and reading.elements > 10 * elements
        if often:
            _errors.warn(
                "step() was called again after few samples; call it once per epoch, not per batch"
            )
        # Positions in a batch touch the first rows and no other.
        highest = int(moved.nonzero().max()) if touched else 0
        if not shared and reading.samples >= len(moved) > 2 * touched and highest < reading.batch:
            _errors.warn(
                "since the last step only the first rows of the criterion's table were trained; "
                "pass the index of each sample in the dataset, as IndexedDataset yields it, not "
                "its position in the batch"
            )


def warn_of_eval() -> None:
    _errors.warn(
        "a backward pass reached a loss of sc_bce that was computed in evaluation mode, where it "
        "is plain BCE; call `criterion.train()` before training, as you call `model.train()`"
    )


def warn_of_idle_step() -> None:
    _errors.warn(
        "step() was called without a training batch since the last step, so it moved nothing; a "
        "sanity check before training needs no step, and training needs `criterion.train()`"
    )


def warn_of_index() -> None:
    _errors.warn(
        "the criterion was built with num_samples=None, one level for all samples, so `index` is "
        "not used; pass num_samples=len(dataset) to give each sample its own"
    )


def warn_of_pos_weight(pos_weight: Tensor | None, rates: tuple[Tensor, Tensor]) -> None:
    """Warn if a perfect fit at these flip rates, one above 0, puts a label across 1/2."""
    if pos_weight is None:
        return
    w, up, down = (value.cpu().double().reshape(-1) for value in (pos_weight, *rates))
    if len(w) != len(up) and 1 not in (len(w), len(up)):
        return  # they belong to different dimensions
    if bool(((up + down > 0) & ((w * up >= 1 - up) | (w * (1 - down) <= down))).any()):
        _errors.warn(
            "at the levels reached, pos_weight moves the prediction for a sure negative or a "
            "sure positive across 1/2; lower pos_weight, or set `prior` to the base rate of the "
            "positives"
        )


def warn_of_probabilities(input: object) -> bool:
    """Whether what is passed as logits looks like something else, which is said."""
    like = _inputs.like_probabilities(input) if isinstance(input, Tensor) else ""
    if like:
        _errors.warn(
            f"all logits of a training batch look like {like}; pass the raw output of the network, "
            "without a sigmoid or softmax"
        )
    return bool(like)
