"""The adaptive loss, one perturbation level per training sample: configuration, forward, step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _batch, _checks
from .._batch import Batch, Perturbation
from .._checks import sentence
from ..functional import (
    Observed,
    Wanted,
    observed,
    perturbed_loss_and_observed,
    sc_bce_with_logits,
)
from . import levels
from .levels import Levels, Rule

__all__ = ["AdaptivePerturbation"]

Criterion = TypeVar("Criterion", bound="AdaptivePerturbation")

_OBJECTIVES = ("feedback", "calibration", "max_entropy")
_FIRST = 4  # training batches whose floating-point labels are all checked, on a CPU
_EQUAL = 1e-6  # how far the values of the ranks may differ
_PATIENCE = 10_000  # batches without a step before the warning, if no epoch can be counted


class _Seen:
    """What this process has seen; kept outside the module, whose attributes are slow to set."""

    batches = 0  # in training
    samples = 0  # since the last step
    void: int | Tensor = 0  # samples of these without a valid element


class AdaptivePerturbation(Levels):
    r"""Binary cross entropy whose label smoothing is set by measured calibration (adaptive, ASLP).

    .. math::
        \ell(x_i, y_i) = \mathrm{BCE}\big(x_i,\; y_i + \alpha_i\beta\,(c - y_i)\big)

    with :math:`x_i` the logits of training sample :math:`i`, :math:`y_i` its target,
    :math:`\alpha_i` its level (the probability that its labels are perturbed, 0 at the start),
    :math:`\beta` the strength and :math:`c` the prior that perturbed labels move towards. The
    ``objective`` says how the levels follow the validation data given to :meth:`step`:

    - ``"feedback"`` (ours) raises the level while the validation logits are too large.
      ``step(histogram)`` sets one level for all samples,

      .. math::
          \alpha \leftarrow \mathrm{clip}\big(\alpha + \tfrac{0.1}{\beta}\,
          \mathrm{clip}(1 - a, -1, 1),\, 0,\, \mathrm{cap}\big),

      with :math:`a` the calibration slope of the validation logits (below 1: over-confident). If
      :meth:`step` gets numbers instead of a histogram, or ``focus`` is above 0, the levels climb
      as below, under a budget :math:`u` in place of :math:`r`, which each step moves by half of
      the gap between confidence and accuracy.
    - ``"calibration"`` (the paper's MC): each level climbs on the loss that the network descends
      on, under the constraint :math:`R_i = \min(r - \kappa\alpha_i, 0)` with the budget
      :math:`r = 1 - A`, :math:`A` the validation accuracy. The expected confidence of the target
      then equals the accuracy.
    - ``"max_entropy"`` (the paper's MEI): the same with :math:`R = \min(A - A_\mathrm{ref}, 0)`,
      the most entropy that keeps accuracy.

    The published step, solver ``"explicit"``, is

    .. math::
        \alpha_i \leftarrow \mathrm{clip}\big(\alpha_i + \eta\,(\bar s_i + \lambda R_i),\,
        0,\, \mathrm{cap}\big), \qquad \bar s_i = \mathrm{mean}\,[\beta\,(y_i - c)\, x_i]

    with :math:`\eta` the ``lr`` and :math:`\lambda` the ``penalty``. The solver ``"proximal"``
    has the same fixed point. It takes the constraint at the new level and climbs in doubt,
    :math:`\kappa\alpha`, with :math:`\kappa` the confidence that a level of 1 costs: the mean of
    :math:`\beta\,(1 - c)` over positives and :math:`\beta c` over negatives. The cap keeps both
    labels on their side of 1/2: :math:`\min(1,\, 1/(2\max(c, 1-c)\,\beta) - 0.01)`.

    Special cases: :meth:`published` is the paper's setting. ``num_samples=None`` learns one level
    for all samples. During the warm-up, and under ``eval()`` or ``no_grad`` at any time, the loss
    is :func:`torch.nn.functional.binary_cross_entropy_with_logits`, bit for bit.

    Args:
        num_samples: number M of training samples, or None for one shared level, which needs no
            index (for streams, or if the index can't be passed).
        beta: perturbation strength, in (0, 1 / max(prior, 1 - prior)]. None takes the largest if
            ``prior`` is a number, and 1 otherwise: the label is replaced by the prior. Default:
            None.
        prior: what perturbed labels move towards: a number between 0 and 1; a tensor that
            broadcasts to ``input`` from the last dimension, as ``pos_weight`` does; or
            ``"observed"``, the base rate :math:`(N_+ + \tfrac12)/(N + 1)` of the labels seen in
            training, counted in each forward and used from the next :meth:`step` on. A number or
            tensor is read once: build a new module for another. Default: ``"observed"``.
        objective: ``"feedback"``, ``"calibration"`` or ``"max_entropy"``. Default:
            ``"feedback"``.
        lr: step size of levels that climb, positive. Default: 0.002.
        penalty: weight of the constraint on levels that climb, not negative. Default: 2000.
        warmup: number of epochs (calls of :meth:`step`) before the levels start to move; 0 is
            treated as 1. Default: 1.
        solver: ``"proximal"`` is stable for every ``lr`` and ``penalty``; ``"explicit"`` is the
            published rule. Default: ``"proximal"``.
        focus: exponent k that shares out the budget by difficulty: sample i gets
            :math:`\min(r w_i, 0.45)` with :math:`w_i` its :math:`(1 - \bar A_i)^k` divided by the
            mean over the samples seen, :math:`\bar A_i` a running mean of its training accuracy.
            Levels then climb. No effect on ``"max_entropy"``, which has no budget. Default: 0.
        sampling: ``"sample"`` draws once per sample, ``"element"`` once per element,
            ``"expected"`` uses the mean. Default: ``"sample"``.
        num_labels: with the observed prior, the number C of labels in dimension 1, each of which
            gets its own base rate; None pools them. Default: None.
        reference_accuracy: :math:`A_\mathrm{ref}` of ``"max_entropy"``; None takes the best seen
            so far. Default: None.
        weight: as in torch; also weights the slopes that move the levels. Default: None.
        pos_weight: as in torch; not part of the slopes. Default: None.
        ignore_index: elements whose target has this value are left out of the loss and of the
            levels. Default: None.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        generator: source of the draws, on the device of the input; its state is part of
            ``state_dict``. None is torch's global one. Default: None.

    Attributes:
        alpha: the table of levels, shape (M,), float32 even if the module is cast.
        prior: a number or a tensor; with ``"observed"`` 0-d, or (C,) with ``num_labels``.
        doubt: mean of kappa times alpha over the rows trained so far, 0-d.
        flip_rates: the pair (g0, g1) of mean flip rates, for :class:`TemperatureScaling`.

    Shape:
        - input: :math:`(N, *)`, floating point.
        - target: the same; bool, integer (0 and 1) or floating point in [0, 1].
        - index: :math:`(N,)`, integer, each in [0, M).
        - Returns: scalar, or the shape of ``input`` for ``reduction="none"``.

    Raises:
        ValueError: at construction, an argument is out of its range or a name is unknown; in use,
            the index is missing or has another length, and as :func:`sc_bce_with_logits`.
        TypeError: an argument has the wrong type.
        IndexError: an index on the CPU is negative or out of range.

    Note:
        Pass the index of each sample in training: :class:`IndexedDataset` yields it. Call
        :meth:`step` after each validation. A training forward returns the loss under the levels
        held so far and then moves those of its batch, unless it is called with ``update=False``;
        :meth:`update` moves the levels alone. A sample that occurs in a batch more than once
        takes one step with the mean of its slopes. Samples without a valid element and
        non-finite logits move nothing. The cost is O(batch), independent of M, and nothing waits
        for an accelerator. An index on an accelerator is not checked: one out of range fails in
        the kernel.

        Keep the module with the model: move it with ``to(device)`` and save its ``state_dict``
        for an exact resume. In several processes :meth:`step` merges the tables.

        A prior other than 1/2 moves the decision threshold: P(y = 1) >= 1/2 becomes
        ``sigmoid(x) >= (1 - s) / 2 + s * c`` with s the mean of alpha times beta. A repair after
        training brings it back to 1/2.

        Likely mistakes give a warning, once each: training without :meth:`step`, an index that
        leaves most rows untouched, a :meth:`step` after every batch, levels at which
        ``pos_weight`` makes every prediction positive, and a backward pass through a loss that
        was computed in evaluation mode.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (ASLP: MEI and MC; ``lr`` and ``penalty`` are
        those of its official code). Cox, Biometrika 1958 (the calibration slope).

    Example:
        >>> import torch
        >>> from sc_bce import AdaptivePerturbation, CalibrationHistogram
        >>> criterion = AdaptivePerturbation(num_samples=4)
        >>> logits = torch.tensor([[4.0], [-2.0]], requires_grad=True)
        >>> target = torch.tensor([[1], [0]])
        >>> criterion(logits, target, index=torch.tensor([0, 3])).backward()  # in training
        >>> validation = torch.tensor([3.0] * 100 + [-3.0] * 100)  # confidence 0.95
        >>> labels = (validation > 0) == (torch.arange(200) % 100 < 80)  # accuracy 0.8
        >>> histogram = CalibrationHistogram()
        >>> histogram.update(validation, labels)
        >>> criterion.step(histogram)  # after each epoch
        >>> criterion.alpha  # over-confident, so the level rises
        tensor([0.0538, 0.0538, 0.0538, 0.0538])
    """

    prior: float | Tensor
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        num_samples: int | None,
        *,
        beta: float | None = None,
        prior: float | Tensor | str = "observed",
        objective: str = "feedback",
        lr: float = 0.002,
        penalty: float = 2000.0,
        warmup: int = 1,
        solver: str = "proximal",
        focus: float = 0.0,
        sampling: str = "sample",
        num_labels: int | None = None,
        reference_accuracy: float | None = None,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        beta, labels = _require_target(beta, prior, num_labels)
        _require_rule(objective, lr, penalty, warmup, solver, reference_accuracy)
        _require_rows(num_samples, focus)
        _checks.sampling(sampling)
        _checks.tensor_or_none("weight", weight, "pass `torch.tensor({})`")
        _checks.tensor_or_none("pos_weight", pos_weight, "pass `torch.tensor({})`")
        _checks.reduction(reduction)
        _checks.generator(generator)
        # What the host must know of the state, and alone a compiled forward may read of it.
        self._steps, self._past_warmup, self._climbs, self._follows = 0, False, False, False
        self._kappa: float | Tensor = 0.0
        self._cap: float | Tensor = 1.0
        super().__init__(int(num_samples or 1), focus, labels, _OBJECTIVES.index(objective))
        self.num_samples = None if num_samples is None else int(num_samples)
        self.num_labels = None if num_labels is None else int(num_labels)
        self.beta = beta
        self.objective = objective
        self.lr = float(lr)
        self.penalty = float(penalty)
        self.warmup = int(warmup)
        self.solver = solver
        self.focus = float(focus)
        self.sampling = sampling
        self.reference_accuracy = reference_accuracy
        self.ignore_index = _checks.ignore_index(ignore_index)
        self.reduction = reduction
        self.generator = generator
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.observes = isinstance(prior, str)
        if not isinstance(prior, str):
            _batch.hold_prior(self, prior)
        self._given = prior.detach().clone().float() if isinstance(prior, Tensor) else None
        self._warned: set[str] = set()
        self._refresh()

    @classmethod
    def published(
        cls: type[Criterion], num_samples: int | None, objective: str = "calibration", **kwargs: Any
    ) -> Criterion:
        """The paper's setting (ASLP): strength 2 towards 1/2, explicit solver, warm-up of 5.

        Args:
            num_samples: as in the constructor.
            objective: ``"calibration"`` (the paper's MC) or ``"max_entropy"`` (MEI). Default:
                ``"calibration"``.
            **kwargs: other arguments of the constructor, which override the setting.

        References:
            Liu et al., ICCV 2023, arXiv 2307.13539.

        Example:
            >>> import torch
            >>> from sc_bce import AdaptivePerturbation
            >>> setting = {"warmup": 1, "sampling": "expected"}
            >>> criterion = AdaptivePerturbation.published(num_samples=4, **setting)
            >>> criterion.step(accuracy=0.9)  # after each epoch
            >>> logits = torch.tensor([[4.0], [-2.0]], requires_grad=True)
            >>> target = torch.tensor([[1], [0]])
            >>> criterion(logits, target, index=torch.tensor([0, 3])).detach()
            tensor(0.0725)
            >>> criterion.alpha  # the forward moves the levels of its batch
            tensor([0.0080, 0.0000, 0.0000, 0.0040])
        """
        own = {"beta": 2.0, "prior": 0.5, "solver": "explicit", "focus": 0.0, "warmup": 5}
        return cls(num_samples, objective=objective, **{**own, **kwargs})

    @property
    def doubt(self) -> Tensor:
        """Mean of kappa alpha over the rows trained so far: the confidence that the levels cost.

        If no row was trained yet, the mean over all rows.

        Example:
            >>> import torch
            >>> from sc_bce import AdaptivePerturbation
            >>> criterion = AdaptivePerturbation(num_samples=4, prior=0.5)  # kappa is beta / 2 = 1
            >>> _ = criterion.alpha.fill_(0.1)
            >>> criterion.doubt
            tensor(0.1000)
        """
        return self._kappa * self.mean_level(self.trained)

    @property
    def flip_rates(self) -> tuple[Tensor, Tensor]:
        """Mean flip rates (g0, g1) over the rows trained so far: 0-d, or (C,), one per label.

        Pass it to :class:`TemperatureScaling` to remove the flip after training.

        Example:
            >>> import torch
            >>> from sc_bce import AdaptivePerturbation
            >>> criterion = AdaptivePerturbation(num_samples=4, prior=0.02, beta=1.0)
            >>> _ = criterion.alpha.fill_(0.2)
            >>> criterion.flip_rates
            (tensor(0.0040), tensor(0.1960))
        """
        strength = self.beta * self.mean_level(self.trained)
        prior = _batch.flat(self.prior).to(strength.device)
        return strength * prior, strength * (1 - prior)

    @property
    def flip_rate(self) -> Tensor:
        """The mean flip rate that both labels share at ``prior=0.5``, 0-d.

        Raises:
            ValueError: another prior, whose two rates differ.

        Example:
            >>> from sc_bce import AdaptivePerturbation
            >>> AdaptivePerturbation(num_samples=4, prior=0.5).flip_rate
            tensor(0.)
        """
        return _batch.single_flip_rate(self.flip_rates, self.prior)

    def forward(
        self, input: Tensor, target: Tensor, index: Tensor | None = None, *, update: bool = True
    ) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            loss = self._plain(input, target)
            misplaced = not self.training and "eval" not in self._warned
            return _batch.on_backward(loss, partial(self._warn, "eval")) if misplaced else loss
        rows, batch = self._prepare(input, target, index)
        seen = None
        if not self._past_warmup:
            loss = self._plain(input, target)
        else:
            prior = self._prior_for(input)
            alpha = self.alpha.index_select(0, rows)
            if not input.dim():
                alpha = alpha.reshape(())
            if self.sampling != "expected":
                alpha = _batch.bernoulli(alpha, input, self.sampling, self.generator)
            if torch.compiler.is_compiling():
                alpha = _batch.once(alpha)
            if alpha.dim() == 1:
                alpha = alpha.reshape(-1, *(1 for _ in input.shape[1:]))
            loss, seen = perturbed_loss_and_observed(
                batch, Perturbation(alpha, self.beta, prior), self.weight, self.pos_weight,
                self.reduction, self._wanted(prior) if update else Wanted(),
            )  # fmt: skip
        if update:
            self._observe(rows, batch, seen)
        return loss

    @torch.no_grad()
    def update(self, input: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Move the levels of a batch without computing a loss.

        For a loss that is computed more than once per batch (several heads, checkpointing): call
        the criterion with ``update=False``, and this method once per batch. It works in any mode,
        with or without gradients.

        Args:
            input: logits, as in the forward. For several heads, pass the mean of their logits: a
                level climbs along the slope, which is linear in the logits.
            target: labels, as in the forward.
            index: sample indices, as in the forward.

        Raises:
            ValueError, TypeError, IndexError: as in the forward; the levels are then unchanged.

        Example:
            >>> import torch
            >>> from sc_bce import AdaptivePerturbation
            >>> criterion = AdaptivePerturbation.published(num_samples=4, warmup=1)
            >>> criterion.step(0.9)
            >>> criterion.update(torch.tensor([[4.0]]), torch.tensor([[1.0]]), torch.tensor([2]))
            >>> bool(criterion.alpha[2] > 0)
            True
        """
        rows, batch = self._prepare(input, target, index)
        self._observe(rows, batch, None)

    def _plain(self, input: Tensor, target: Tensor) -> Tensor:
        return sc_bce_with_logits(
            input,
            target,
            weight=self.weight,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def _prepare(self, input: Tensor, target: Tensor, index: Tensor | None) -> tuple[Tensor, Batch]:
        """Check a batch; return the row of each sample, on the table's device, and the batch."""
        _batch.logits(input)
        shared = self.num_samples is None
        if shared and index is not None:
            self._warn("index")
        rows = _rows_of(index, input, self.alpha, shared)
        eager = not torch.compiler.is_compiling()
        every = eager and self._seen.batches < _FIRST
        batch = _batch.prepare(input, target, self.ignore_index, every)
        if self.num_labels is not None and input.shape[1:2] != (self.num_labels,):
            wanted = f"have num_labels={self.num_labels} along dimension 1"
            raise ValueError(sentence("input", wanted, f"shape {tuple(input.shape)}"))
        if eager:
            self._seen.batches += 1
        return rows, batch

    def _prior_for(self, input: Tensor) -> float | Tensor:
        """The prior, broadcasting to the batch."""
        prior = self.prior
        if not isinstance(prior, Tensor) or not self.observes:
            return _batch.prior_of(prior, input.size()) if isinstance(prior, Tensor) else prior
        return prior.reshape(1, -1, *(1 for _ in input.shape[2:])) if prior.dim() else prior

    @torch.no_grad()
    def _observe(self, rows: Tensor, batch: Batch, seen: Observed | None) -> None:
        """Count the labels of a batch, and move its rows."""
        if not torch.compiler.is_compiling():
            self._seen.samples += len(rows)
            if self._steps == 0 and _is_late(self._seen, self):
                self._warn("step")
        if seen is None:
            prior = self._prior_for(batch.input)
            seen = observed(batch, prior, self.weight, self._wanted(prior))
        if seen.labels is not None:
            self.fresh += seen.labels
        if seen.slopes is None:
            self.mark(rows)
            return
        climb = self._climb if self._climbs else None
        void = self.observe(rows, seen.slopes, seen.hits, self.focus, climb)
        if void is not None and not torch.compiler.is_compiling():
            self._seen.void = self._seen.void + void

    def _wanted(self, prior: float | Tensor) -> Wanted:
        return Wanted(self._follows, _counted(prior), self.focus > 0)

    def reset_parameters(self) -> None:
        """Start again from level 0, as after construction.

        Example:
            >>> from sc_bce import AdaptivePerturbation
            >>> criterion = AdaptivePerturbation(num_samples=2)
            >>> _ = criterion.alpha.fill_(0.1)
            >>> criterion.reset_parameters()
            >>> criterion.alpha
            tensor([0., 0.])
        """
        super().reset_parameters()
        self._seen = _Seen()

    @property
    def _rule(self) -> Rule:
        return Rule(self.objective, self.lr, self.penalty, self.solver, self.reference_accuracy)

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        super().hold(tensors)
        if "observes" in self.__dict__:  # not while the table is built
            self._refresh()

    def _refresh(self) -> None:
        """Recompute what depends on the state, after each change of it."""
        if self.observes:
            rate = levels.base_rate(self.counts)
            self.prior = rate if self.num_labels is not None else rate.reshape(())
        elif self._given is not None:  # the buffer may have been cast, or never filled
            self.prior = self._given.to(self.alpha.device)
        self._kappa = levels.cost(self.beta, self.prior, self.counts)
        self._cap = levels.cap(self.beta, self.prior)
        self._climb = levels.climb(self._rule, self.beta, self._kappa, self._cap)
        if _has_values(self.steps):
            self._steps = int(self.epoch.steps)
            self._past_warmup = self._steps >= max(self.warmup, 1)
            self._climbs = self._past_warmup and bool(self.epoch.climbs)
            # Whether the slopes of a batch are needed, if only to see which samples are finite.
            self._follows = self._climbs or self.focus > 0

    @torch.no_grad()
    def step(
        self,
        accuracy: Any,
        confidence: float | Tensor | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Report the measured calibration of the validation data, once per epoch.

        Ends an epoch of the warm-up, sets the level or the budget of the next epoch and, in
        several processes, merges the tables: each row becomes the mean of its values over the
        ranks that moved it. The call is then collective: every rank of ``group`` must call it
        with the same, already reduced values. If a rank never calls it, the group times out.

        Args:
            accuracy: a :class:`CalibrationHistogram` of the validation data, whose labels are
                pooled, or any object with the methods ``accuracy()`` and ``confidence()``; or
                the validation accuracy in [0, 1], as a number or 0-d tensor.
            confidence: mean top-label confidence, in [0, 1], of the same data, if ``accuracy`` is
                a number. Required by the objective ``"feedback"``. Default: None.
            group: the processes that train together. Default: all.

        Raises:
            ValueError: a value is nan or outside [0, 1] on any rank; the ranks' values differ;
                the histogram is empty; ``confidence`` is missing for ``"feedback"``. Nothing is
                changed then.
            TypeError: ``accuracy`` or ``confidence`` has the wrong type.

        Example:
            >>> import torch
            >>> from sc_bce import AdaptivePerturbation, CalibrationHistogram
            >>> _ = torch.manual_seed(0)
            >>> truth = torch.randn(1000)
            >>> target = torch.rand(1000) < torch.sigmoid(truth)
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(3 * truth, target)  # over-confident: slope 1/3
            >>> criterion = AdaptivePerturbation(num_samples=600)
            >>> criterion.step(histogram)
            >>> round(float(criterion.alpha.mean()), 2)
            0.07
        """
        reading = _agreed(_reading(accuracy, confidence, self.objective), group)
        moved, trained = self._merge(group)
        counts = self.counts + levels.reduced(self.fresh, group)
        self.hold({"counts": counts, "fresh": torch.zeros_like(self.fresh)})
        self.hold({"alpha": self.alpha.clamp(max=self._cap)})
        # With a calibration slope, one level for all samples is set here.
        slope = reading.slope if self.objective == "feedback" and self.focus == 0 else None
        doubt = None
        if self._steps + 1 >= max(self.warmup, 1):
            if slope is not None:
                level = float(self.mean_level(self.trained))
                level = levels.shared_level(level, slope, self.beta, float(self._cap))
                self.hold({"alpha": torch.full_like(self.alpha, level)})
            elif bool(moved.any()):
                doubt = float(self._kappa * self.mean_level(moved))
        highest = float(self._kappa * self._cap)
        epoch = levels.next_epoch(
            self._rule, self.epoch, reading.accuracy, reading.confidence, doubt, highest
        )
        epoch = epoch._replace(climbs=torch.full_like(epoch.climbs, slope is None))
        if self.focus > 0 and bool(self.trained.any()):
            mean = levels.mean_difficulty(self.focus, self.sample_accuracy, self.trained)
            epoch = epoch._replace(difficulty=mean)
        if self.generator is not None:
            levels.reseed(self.generator, self.alpha.device, group)
        self.hold(epoch._asdict())
        # Last, since a warning can be turned into an error.
        gap = self.objective == "feedback" and slope is None
        facts = {"trained": trained, "touched": int(moved.sum()), "rows": len(moved)}
        facts["known"] = int(self.trained.sum())
        for name in _mistakes(self, gap=gap, **facts):
            self._warn(name, **facts)

    def _merge(self, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
        """Merge the tables; return the rows that any rank moved, and the ranks' sample count."""
        trained = torch.tensor(self._seen.samples, device=self.alpha.device) - self._seen.void
        self._seen.samples, self._seen.void = 0, 0
        # Columns that no batch has moved are the same on all ranks.
        moved = self.merge(self.columns if self._follows else {}, group)
        return moved, int(levels.reduced(trained, group))

    def _warn(self, name: str, **facts: object) -> None:
        """Warn of a likely mistake, once."""
        if name not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(name)
            _checks.warn(_WARNINGS[name].format(**facts))

    def extra_repr(self) -> str:
        return ", ".join(_shown(self))

    def refusal(self, saved: Mapping[str, Tensor]) -> str | None:
        return _refusal(self, saved)


def _has_values(tensor: Tensor) -> bool:
    """Whether the tensor has data: it is neither on the meta device nor fake."""
    return type(tensor) is Tensor and not tensor.is_meta


def _counted(prior: float | Tensor) -> tuple[int, ...] | None:
    """The shape of the label counts, which broadcasts to the batch; None at 1/2, if not needed."""
    if isinstance(prior, Tensor):
        return tuple(prior.shape)
    return () if prior != 0.5 else None


_WARNINGS = {
    "step": "AdaptivePerturbation has trained past its warm-up, but step() was never called, so "
    "the levels don't move and the loss is plain BCE; call `criterion.step(histogram)` after each "
    "epoch",
    "index": "the criterion was built with num_samples=None, one level for all samples, so `index` "
    "is not used; pass num_samples=len(dataset) to give each sample its own",
    "position": "since the last step the criterion saw {trained} samples but only {touched} of its "
    "{rows} rows; pass the index of each sample in the dataset, as IndexedDataset yields it, not "
    "its position in the batch",
    "often": "step() was called again after {trained} samples, of {known} trained so far; call it "
    "once per epoch, not per batch",
    "pos_weight": "pos_weight shifts every probability, and the gap between confidence and "
    "accuracy with it, so the levels move against the shift; pass `step(histogram)` with focus=0, "
    "whose calibration slope does not see it",
    "one side": "at the levels reached, pos_weight moves the prediction for a sure negative or a "
    "sure positive across 1/2; lower pos_weight, or set `prior` to the base rate of the positives",
    "eval": _checks.TRAINED_IN_EVAL.format("AdaptivePerturbation"),
}


def _mistakes(
    own: AdaptivePerturbation, trained: int, touched: int, known: int, rows: int, gap: bool
) -> Iterator[str]:
    """Names of the likely mistakes that a step sees in the samples and rows since the last one."""
    if own.num_samples is not None and trained >= rows > 2 * touched:
        yield "position"
    # A process that resumed within an epoch has seen fewer samples than were touched.
    if int(own.steps) > 1 and 0 < 10 * max(trained, touched) < known:
        yield "often"
    if gap and own.pos_weight is not None:
        yield "pos_weight"
    if own.pos_weight is not None and _one_sided(own.pos_weight, *own.flip_rates):
        yield "one side"


def _one_sided(pos_weight: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether a perfect fit at these flip rates, one above 0, puts a label across 1/2."""
    w, up, down = (value.double().reshape(-1) for value in (pos_weight, up, down))
    if len(w) != len(up) and 1 not in (len(w), len(up)):
        return False  # they belong to different dimensions
    return bool(((up + down > 0) & ((w * up >= 1 - up) | (w * (1 - down) <= down))).any())


def _is_late(seen: _Seen, own: AdaptivePerturbation) -> bool:
    """Whether a step should have been called by now."""
    if own.num_samples is None:
        return seen.batches > _PATIENCE
    share = -(-own.num_samples // levels.world_size(None))  # rounded up, as samplers pad
    return seen.samples > max(own.warmup, 1) * share


def _shown(own: AdaptivePerturbation) -> list[str]:
    """Configuration and state, for repr."""
    prior = "prior='observed'" if own.observes else _batch.shown_prior(own.prior)
    shown = [
        f"num_samples={own.num_samples}, beta={own.beta}, {prior}",
        f"objective={own.objective!r}, lr={own.lr}, penalty={own.penalty}",
        f"warmup={own.warmup}, solver={own.solver!r}, focus={own.focus}",
        f"sampling={own.sampling!r}",
    ]
    for name in ("num_labels", "reference_accuracy", "ignore_index"):
        if getattr(own, name) is not None:
            shown.append(f"{name}={getattr(own, name)}")
    shown.append(f"reduction={own.reduction!r}")
    if not own.alpha.is_meta:
        positive = float(own.alpha.count_nonzero()) / len(own.alpha)
        shown.append(f"mean_alpha={float(own.alpha.mean()):.4g}, above_zero={positive:.0%}")
        if not own._past_warmup:
            shown.append(f"warming up {own._steps}/{max(own.warmup, 1)}")
    return shown


def _refusal(own: AdaptivePerturbation, saved: Mapping[str, Tensor]) -> str | None:
    """Why a saved state does not fit this table, in a sentence; None if it does."""
    alpha, setting = saved.get("alpha"), saved.get("setting")
    if isinstance(alpha, Tensor) and alpha.shape != own.alpha.shape:
        return _loaded(
            f"num_samples={own.num_samples}", f"{alpha.numel()} levels",
            "build the criterion with that number, load, then `resize`",
        )  # fmt: skip
    focused = "sample_accuracy" in saved
    if isinstance(alpha, Tensor) and focused != own.focused:
        other = "focus above 0" if focused else "focus=0"
        return _loaded(f"focus={own.focus:g}", other, "build the criterion with that focus")
    if isinstance(setting, Tensor) and not setting.is_meta:
        objective, focus = (float(value) for value in setting)
        if objective != own._setting[0]:
            other = f"objective={_OBJECTIVES[int(objective)]!r}"
            remedy = "build the criterion with that objective"
            return _loaded(f"objective={own.objective!r}", other, remedy)
        if focus != torch.tensor(own.focus, dtype=torch.float32, device="cpu").item():
            remedy = "build the criterion with that focus"
            return _loaded(f"focus={own.focus:g}", f"focus={focus:g}", remedy)
    buffers = {name: buffer for name, buffer in own._buffers.items() if buffer is not None}
    for name, tensor in {**own.held(), **buffers}.items():
        value = saved.get(name)
        if isinstance(value, Tensor) and value.shape != tensor.shape:
            shapes = f"`{name}` of shape {tuple(tensor.shape)}", f"shape {tuple(value.shape)}"
            return _loaded(*shapes, "build both criteria with the same arguments")
    if own.generator is not None and "generator" in saved:
        size = own.generator.get_state().numel()
        if saved["generator"].shape[-1] not in (size, size + levels.HEAD):
            return _loaded(
                f"a generator on {own.generator.device}", "the state of one on another device",
                "give the criterion a generator like the one that it was trained with",
            )  # fmt: skip
    return _too_high(own, saved)


def _too_high(own: AdaptivePerturbation, saved: Mapping[str, Tensor]) -> str | None:
    alpha = saved.get("alpha")
    if alpha is None or alpha.is_meta or not alpha.numel():
        return None
    high = own._cap
    if own.observes and "counts" in saved:
        rate = levels.base_rate(saved["counts"])
        high = levels.cap(own.beta, rate)
    highest = float(alpha.max())
    if not highest <= float(high) + 1e-6 or float(alpha.min()) < 0:
        return _loaded(
            f"levels in [0, {float(high):.4g}], the cap at beta={own.beta:g}",
            f"a level of {highest:.4g}",
            "build the criterion with the beta and prior that it was trained with",
        )
    return None


def _loaded(own: str, saved: str, remedy: str) -> str:
    return f"Expected the saved table to have {own}, but got {saved}; {remedy}"


def _require_target(
    beta: float | None, prior: float | Tensor | str, num_labels: int | None
) -> tuple[float, int]:
    """Check the target's arguments; return the strength and the number of priors."""
    if num_labels is not None:
        _checks.positive_int("num_labels", num_labels)
    labels, high, own = num_labels or 1, 2.0, 1.0
    if isinstance(prior, Tensor):
        labels = prior.numel()
        if num_labels is not None and labels != num_labels:
            got = f"{labels} values"
            raise ValueError(sentence("prior", f"have num_labels={num_labels} values", got))
        if prior.numel() and _batch.readable(prior) and not prior.is_complex():
            # So that a drawn label stays in [0, 1].
            c = prior.detach().float()
            high = 1 / float(torch.maximum(c, 1 - c).max().clamp(max=1))
    elif isinstance(prior, str):
        _checks.choice("prior", prior, ("observed",))
        high = 1.0
        if isinstance(beta, (int, float)) and 1 < beta <= 2:
            remedy = "a strength of 2, the paper's, needs `prior=0.5`"
            raise ValueError(sentence("beta", "be at most 1 with the observed prior", beta, remedy))
    else:
        _checks.inside("prior", prior, 0.0, 1.0, tensor="pass `torch.as_tensor(prior)`")
        high = own = 1 / max(prior, 1 - prior)
    if beta is None:
        return own, labels
    _checks.positive("beta", beta, high)
    return float(beta), labels


def _require_rule(
    objective: object,
    lr: object,
    penalty: object,
    warmup: object,
    solver: object,
    reference_accuracy: object,
) -> None:
    _checks.choice("objective", objective, _OBJECTIVES)
    _checks.positive("lr", lr)
    _checks.number("penalty", penalty, 0.0, _checks.LARGE)
    _checks.natural("warmup", warmup)
    _checks.choice("solver", solver, ("proximal", "explicit"))
    if reference_accuracy is not None:
        _checks.number("reference_accuracy", reference_accuracy, 0.0, 1.0)


def _require_rows(num_samples: int | None, focus: float) -> None:
    _checks.number("focus", focus, 0.0, _checks.LARGE)
    if num_samples is not None:
        _checks.positive_int("num_samples", num_samples)
    elif focus > 0:
        remedy = "give each sample its own with `num_samples=len(dataset)`"
        raise ValueError(sentence("focus", "be 0 if all samples share one level", focus, remedy))


def _rows_of(index: Tensor | None, input: Tensor, table: Tensor, shared: bool) -> Tensor:
    """The row of each sample, on the table's device."""
    if input.device != table.device:
        wanted = f"be on the table's device {table.device}"
        remedy = f"move the criterion with `criterion.to({str(input.device)!r})`"
        raise ValueError(sentence("input", wanted, input.device, remedy))
    samples = input.shape[0] if input.dim() else 1
    if shared:
        return torch.zeros(samples, dtype=torch.int64, device=table.device)
    rows = _require_index(index, input.shape[:1], len(table)).reshape(samples)
    if rows.device != table.device:
        # Non-blocking only towards an accelerator: what comes from one is read on arrival.
        rows = rows.to(table.device, non_blocking=rows.device.type == "cpu")
    if torch.compiler.is_compiling():
        # Inductor reads a negative index from the end; past the end, its bounds check catches it.
        rows = torch.where(rows < 0, len(table), rows)
    return rows


def _require_index(index: object, shape: torch.Size, num_samples: int) -> Tensor:
    """Check the index of a training batch; its range only where no accelerator would wait."""
    if index is None:
        raise ValueError(
            sentence(
                "index", "be the sample indices of the batch in training", "None",
                "wrap the dataset in IndexedDataset and pass the index that it yields (the Hugging "
                "Face Trainer drops it without `remove_unused_columns=False`), or build the module "
                "with num_samples=None for one shared level",
            )
        )  # fmt: skip
    wanted = "be an integer Tensor"
    if not isinstance(index, Tensor):
        got = _checks.describe(index)
        raise TypeError(sentence("index", wanted, got, "pass `torch.as_tensor(index)`"))
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(sentence("index", wanted, index.dtype, "pass `index.long()`"))
    if index.shape != shape:
        wanted = f"have one entry per sample, shape {tuple(shape)}"
        raise ValueError(sentence("index", wanted, f"shape {tuple(index.shape)}"))
    index = index.to(torch.int64)
    if _batch.readable(index) and index.numel():
        least, most = index.aminmax()
        low, high = int(least), int(most)
        if low < 0 or high >= num_samples:
            raise IndexError(
                sentence(
                    "index", f"be in [0, {num_samples - 1}]", low if low < 0 else high,
                    f"num_samples={num_samples} must count every sample of the indexed dataset, "
                    "even if you train on a Subset of it (random_split); `resize` makes room for "
                    "new ones",
                )
            )  # fmt: skip
    return index


class _Reading(NamedTuple):
    """What one rank passed to a step, and the error in it."""

    accuracy: float = 0.0
    confidence: float | None = None
    slope: float | None = None
    error: Exception | None = None

    def portable(self) -> _Reading:
        """The same with an error that every process can receive."""
        if self.error is None or type(self.error) in (TypeError, ValueError, RuntimeError):
            return self
        return self._replace(error=RuntimeError(repr(self.error)))


def _reading(accuracy: Any, confidence: Any, objective: str) -> _Reading:
    slope = None
    try:
        if hasattr(accuracy, "accuracy") and hasattr(accuracy, "confidence"):
            if confidence is not None:
                got = "a value beside the histogram, which has its own"
                raise ValueError(sentence("confidence", "be None", got))
            measured = accuracy.pooled() if hasattr(accuracy, "pooled") else accuracy
            accuracy, confidence = measured.accuracy(), measured.confidence()
            if accuracy != accuracy:
                wanted, remedy = "have seen an element", "call `histogram.update(logits, target)`"
                raise ValueError(sentence("histogram", wanted, "an empty one", remedy))
            slope = float(measured.slope()) if hasattr(measured, "slope") else None
        accuracy = _checks.unit_number("accuracy", accuracy)
        if confidence is not None:
            confidence = _checks.unit_number("confidence", confidence)
        elif objective == "feedback":
            raise ValueError(
                sentence(
                    "confidence", "be given for objective 'feedback'", "None",
                    "pass the validation's histogram, `step(histogram)`, or its mean confidence",
                )
            )  # fmt: skip
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        return _Reading(error=error)
    return _Reading(accuracy, confidence, slope)


def _agreed(own: _Reading, group: dist.ProcessGroup | None) -> _Reading:
    """The reading that all ranks share; every rank raises if any rank's is wrong."""
    given: list[Any] = [own]
    if levels.world_size(group) > 1:
        given = [None] * levels.world_size(group)
        dist.all_gather_object(given, own.portable(), group=group)
    for reading in (own, *given):
        if reading.error is not None:
            raise reading.error
    for name in ("accuracy", "confidence"):
        values = [getattr(reading, name) for reading in given]
        known = [value for value in values if value is not None]
        if known and (len(known) < len(values) or max(known) - min(known) > _EQUAL):
            remedy = "reduce it first, for example `histogram.all_reduce()`"
            raise ValueError(sentence(name, "be the same on every rank", values, remedy))
    first: _Reading = given[0]  # all ranks use its slope, so that the levels agree bit for bit
    return first
