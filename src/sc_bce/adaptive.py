"""The loss that owns one perturbation level per training sample: configuration, forward, step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import _batch, _checks, levels
from ._batch import Batch, Perturbation
from ._checks import sentence
from .functional import mean_slopes, perturbed_loss_and_slopes, sc_bce_with_logits
from .levels import Levels, Rule

__all__ = ["AdaptivePerturbation"]

Criterion = TypeVar("Criterion", bound="AdaptivePerturbation")

_OBJECTIVES = ("feedback", "calibration", "max_entropy")
_FIRST = 4  # training batches of which every floating-point label is looked at, on a CPU
_EQUAL = 1e-6  # how far the ranks' values may lie apart
_PATIENCE = 10_000  # batches without a step before the warning, where no epoch can be counted


class AdaptivePerturbation(Levels):
    r"""Self-calibrating binary cross entropy that learns one perturbation level per sample (ASLP).

    .. math::
        \ell(x_i, y_i) = \mathrm{BCE}\big(x_i, (1 - \alpha_i\beta)\, y_i
        + \tfrac{\alpha_i\beta}{2}\big)

    with :math:`x_i` the logits of training sample :math:`i`, :math:`y_i` its target,
    :math:`\alpha_i` the probability that its labels are perturbed, 0 at the start, and
    :math:`\beta` the strength. The network descends on this loss, each :math:`\alpha_i` climbs:

    .. math::
        \alpha_i \leftarrow \mathrm{clip}\big(\alpha_i + \eta\,(g_i + \lambda R_i),\,
        0,\, \min(1, \tfrac{1}{\beta} - 0.01)\big), \qquad
        g_i = \tfrac{\beta}{2}\, \mathrm{mean}\,[(2y_i - 1)\, x_i]

    with :math:`\eta` the ``lr``, :math:`\lambda` the ``penalty`` and :math:`R_i` the constraint
    of the ``objective``, from the validation accuracy :math:`A` and mean confidence :math:`C`
    given to :meth:`step`:

    - ``"max_entropy"`` (the paper's MEI): :math:`\min(A - A_\mathrm{ref}, 0)`, the most entropy
      that keeps accuracy;
    - ``"calibration"`` (the paper's MC): :math:`\min(r - \beta\alpha_i/2, 0)` with the budget
      :math:`r = 1 - A`, so that the expected confidence of the target equals the accuracy;
    - ``"feedback"`` (ours): the same with a budget :math:`u` that each step moves by half of the
      measured gap :math:`C - A`, so that confidence itself arrives at accuracy.

    Special cases: ``num_samples=None`` learns one level for all samples; during the warm-up, and
    under ``eval()`` or ``no_grad`` at any time, this is
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`, bit for bit.

    Args:
        num_samples: number M of training samples, or None for one shared level, which needs no
            index (streams, or no way to pass one).
        beta: perturbation strength, in (0, 2]. Default: 2.
        objective: ``"calibration"``, ``"max_entropy"`` or ``"feedback"``. Default:
            ``"calibration"``.
        lr: step size of the levels, positive. Default: 0.002.
        penalty: weight of the constraint, not negative. Default: 2000.
        warmup: epochs before the levels move, that is calls of :meth:`step`, of which there is
            at least one. Default: 5.
        solver: ``"proximal"`` is stable for every ``lr`` and ``penalty``; ``"explicit"`` is the
            published rule, with the same fixed point. Both are one for ``"max_entropy"``.
            Default: ``"proximal"``.
        focus: exponent k that shares the budget out by difficulty: sample i gets
            :math:`\min(r w_i, 0.45)`, :math:`w_i` its :math:`(1 - \bar A_i)^k` over the mean of
            all seen, with :math:`\bar A_i` a running mean of its training accuracy. 0 is the
            paper. No effect on ``"max_entropy"``, which has no budget. Default: 0.
        sampling: ``"sample"`` draws once per sample, ``"element"`` once per element,
            ``"expected"`` uses the mean. Default: ``"sample"``.
        reference_accuracy: :math:`A_\mathrm{ref}` of ``"max_entropy"``; None is the best seen so
            far. Default: None.
        weight: as in torch; enters the gradient of the levels too. Default: None.
        pos_weight: as in torch; does not enter it. Default: None.
        ignore_index: elements whose target has this value count for nothing, neither in the loss
            nor for the level. Default: None.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        generator: source of the draws, on the device of the input; its state is saved in
            ``state_dict``. None is torch's global one. Default: None.

    Attributes:
        alpha: the table of levels, shape (M,), float32 whatever the module is cast to.
        flip_rate: mean of ``alpha`` times ``beta / 2``, a 0-d tensor.

    Shape:
        - input: :math:`(N, *)`, floating point.
        - target: the same; bool, integer (0 and 1) or floating point in [0, 1].
        - index: :math:`(N,)`, integer, each in [0, M).
        - Returns: scalar, or the shape of ``input`` for ``reduction="none"``.

    Raises:
        ValueError: at construction, an argument out of its range or an unknown name; in use, a
            missing index, one of another length, and what :func:`sc_bce_with_logits` refuses.
        TypeError: an argument of the wrong type.
        IndexError: an index negative or out of range, where it lies on the CPU.

    Note:
        A training forward returns the loss under the levels held before and then moves those of
        its batch, once per sample: one that stands in the batch more than once takes one step
        with the mean of its gradients. Samples without a valid element, and non-finite logits,
        move nothing. The cost is O(batch), whatever M, and nothing waits for an accelerator. An
        index that lies there is not checked: one out of range fails in the kernel.

        Keep the module with the model: move it with ``to(device)``, save its ``state_dict`` for
        an exact resume. In several processes :meth:`step` merges the tables.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (ASLP: MEI and MC). The defaults are those of its
        official code.

    Example:
        >>> import torch
        >>> from sc_bce import AdaptivePerturbation
        >>> criterion = AdaptivePerturbation(num_samples=4, warmup=1, sampling="expected")
        >>> logits = torch.tensor([[4.0], [-2.0]], requires_grad=True)
        >>> target = torch.tensor([[1], [0]])
        >>> index = torch.tensor([0, 3])
        >>> criterion.step(accuracy=0.9)  # once per epoch, after validation
        >>> criterion(logits, target, index).detach()
        tensor(0.0725)
        >>> criterion.alpha
        tensor([0.0080, 0.0000, 0.0000, 0.0040])
    """

    prior: float | Tensor
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        num_samples: int | None,
        *,
        beta: float | None = None,
        prior: float | Tensor | str = 0.5,
        objective: str = "calibration",
        lr: float = 0.002,
        penalty: float = 2000.0,
        warmup: int = 5,
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
        _require_rule(objective, lr, penalty, warmup, solver, focus, reference_accuracy)
        if num_samples is not None:
            _checks.positive_int("num_samples", num_samples)
        elif focus > 0:
            remedy = "give each sample its own with `num_samples=len(dataset)`"
            raise ValueError(sentence("focus", "be 0 where one level is shared", focus, remedy))
        _checks.sampling(sampling)
        _checks.tensor_or_none("weight", weight, f"pass `torch.tensor({weight})`")
        _checks.tensor_or_none("pos_weight", pos_weight, f"pass `torch.tensor({pos_weight})`")
        _checks.reduction(reduction)
        _checks.generator(generator)
        self._steps = 0  # what the host must know of the epoch's state
        self._past_warmup = False  # and alone what a compiled forward may read of it
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
        self._batches = 0  # of training in this process
        self._trained = 0  # samples since the last step, in this process
        self._warned: set[str] = set()
        self._refresh()

    @classmethod
    def published(
        cls: type[Criterion], num_samples: int | None, objective: str = "calibration", **kwargs: Any
    ) -> Criterion:
        """The paper's setting: strength 2 towards 1/2, explicit solver, no focus, warm-up of 5."""
        own = {"beta": 2.0, "prior": 0.5, "solver": "explicit", "focus": 0.0, "warmup": 5}
        return cls(num_samples, objective=objective, **{**own, **kwargs})

    @property
    def doubt(self) -> Tensor:
        """Mean of kappa alpha over the rows trained so far, 0-d: what the levels cost."""
        return self._kappa * self._mean_level(self.visited != levels.NEVER)

    @property
    def flip_rates(self) -> tuple[Tensor, Tensor]:
        """Mean flip rates (g0, g1) over the rows trained so far: 0-d, or one per label."""
        strength = self.beta * self._mean_level(self.visited != levels.NEVER)
        prior = torch.as_tensor(self.prior, dtype=torch.float32, device=strength.device)
        return strength * prior, strength * (1 - prior)

    @property
    def flip_rate(self) -> Tensor:
        """Both flip rates where they are one, at ``prior=0.5``: 0-d."""
        return _batch.single_flip_rate(self.flip_rates, self.prior)

    def forward(
        self, input: Tensor, target: Tensor, index: Tensor | None = None, *, update: bool = True
    ) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self._plain(input, target)
        rows, batch = self._prepare(input, target, index)
        if not self._past_warmup:
            loss, slopes = self._plain(input, target), None
        else:
            alpha = self.alpha.index_select(0, rows).reshape(input.shape[:1])
            if self.sampling != "expected":
                alpha = _batch.bernoulli(alpha, input, self.sampling, self.generator)
            loss, slopes = perturbed_loss_and_slopes(
                batch, self._towards_prior(alpha, batch), self.weight, self.pos_weight,
                self.reduction,
            )  # fmt: skip
        if update:
            self._observe(rows, batch, slopes)
        return loss

    @torch.no_grad()
    def update(self, input: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Move the levels of a batch and compute no loss; in any mode, with or without gradients.

        For a loss that is computed more than once per batch: call the criterion with
        ``update=False`` there, and this once.

        Args:
            input: logits, as in the forward. Of several heads, pass their mean: a level climbs
                along the slope, which is linear in the logits.
            target: labels, as in the forward.
            index: sample indices, as in the forward.

        Raises:
            ValueError, TypeError, IndexError: as the forward does; the levels are then unchanged.

        Example:
            >>> import torch
            >>> from sc_bce import AdaptivePerturbation
            >>> criterion = AdaptivePerturbation(num_samples=4, warmup=1, prior=0.5)
            >>> criterion.step(0.9, 0.95)
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
        """The row of each sample, on the table's device, and the batch."""
        _batch.logits(input)
        rows = self._rows(input, index)
        eager = not torch.compiler.is_compiling()
        every = eager and self._batches < _FIRST
        batch = _batch.prepare(input, target, self.ignore_index, every)
        if self.num_labels is not None and input.shape[1:2] != (self.num_labels,):
            wanted = f"have num_labels={self.num_labels} along dimension 1"
            raise ValueError(sentence("input", wanted, f"shape {tuple(input.shape)}"))
        if eager:
            self._batches += 1
        return rows, batch

    def _rows(self, input: Tensor, index: Tensor | None) -> Tensor:
        if input.device != self.alpha.device:
            wanted = f"be on the table's device {self.alpha.device}"
            remedy = f"move the criterion with `criterion.to({str(input.device)!r})`"
            raise ValueError(sentence("input", wanted, input.device, remedy))
        samples = input.shape[0] if input.dim() else 1
        if self.num_samples is None:
            if index is not None:
                self._warn_once(
                    "the criterion was built with num_samples=None, one level for all samples, so "
                    "`index` is not used; pass num_samples=len(dataset) to give each its own"
                )
            return torch.zeros(samples, dtype=torch.int64, device=self.alpha.device)
        rows = _require_index(index, input.shape[:1], self.num_samples).reshape(samples)
        # Only towards an accelerator: what comes from one is read on arrival.
        rows = rows.to(self.alpha.device, non_blocking=rows.device.type == "cpu")
        if torch.compiler.is_compiling():
            # Inductor reads a negative index from the end; beyond it, the bounds check finds it.
            rows = torch.where(rows < 0, self.num_samples, rows)
        return rows

    def _towards_prior(self, alpha: Tensor, batch: Batch) -> Perturbation:
        """Levels ready to broadcast; their shapes are known to be right."""
        if alpha.dim() == 1:
            alpha = alpha.reshape(-1, *(1 for _ in batch.input.shape[1:]))
        return Perturbation(alpha, self.beta, self._prior_for(batch.input))

    def _prior_for(self, input: Tensor) -> float | Tensor:
        prior = self.prior
        if isinstance(prior, Tensor) and self.observes and self.num_labels is not None:
            return prior.reshape(1, -1, *(1 for _ in input.shape[2:]))
        return _batch.prior_of(prior, input.size()) if isinstance(prior, Tensor) else prior

    @torch.no_grad()
    def _observe(self, rows: Tensor, batch: Batch, slopes: Tensor | None) -> None:
        """Count the labels, and move the rows; where nothing valid and finite was seen, hold."""
        if not torch.compiler.is_compiling():
            self._trained += len(rows)
            self._warn_without_step()
        if self.observes or isinstance(self.prior, Tensor) or self.prior != 0.5:
            self.fresh += _batch.label_counts(batch, self._labels_like(batch), levels.FRACTION)
        if not self._past_warmup and self.focus == 0:
            self.visited.index_fill_(0, rows, levels.SINCE)
            return
        if slopes is None:
            slopes = mean_slopes(batch, self._prior_for(batch.input), self.weight)
        by_row = levels.mean_by_row(rows, slopes.isfinite())
        moves, rule, budget = by_row.any, self._rule, self.epoch.budget
        if self.focus > 0:
            hits = by_row.mean(_batch.sample_accuracies(batch))
            old = self.sample_accuracy.index_select(0, rows)
            recent = torch.where(moves, levels.remembered(old, hits), old)
            self.sample_accuracy.index_copy_(0, rows, recent)
            budget = levels.shared_out(rule, budget, recent, self.epoch.difficulty)
        if self._past_warmup:
            old, gradient = self.alpha.index_select(0, rows), self.beta * by_row.mean(slopes)
            new = levels.climb(rule, old, gradient, budget, self.epoch, self._kappa, self._cap)
            self.alpha.index_copy_(0, rows, torch.where(moves, new, old))
        before = self.visited.index_select(0, rows)
        self.visited.index_copy_(0, rows, torch.where(moves, levels.SINCE, before))

    def _labels_like(self, batch: Batch) -> tuple[int, ...]:
        """The shape, broadcasting to the batch, of what shares a prior."""
        if self.num_labels is not None:
            return (1, self.num_labels, *(1 for _ in batch.input.shape[2:]))
        prior = self._prior_for(batch.input)
        return tuple(prior.shape) if isinstance(prior, Tensor) else ()

    @property
    def _rule(self) -> Rule:
        return Rule(
            self.objective, self.lr, self.penalty, self.solver, self.focus, self.reference_accuracy
        )

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        super().hold(tensors)
        if "observes" in self.__dict__:  # not while the table is built
            self._refresh()

    def _refresh(self) -> None:
        """What follows from the state, once it has changed."""
        if self.observes:
            rate = levels.base_rate(self.counts)
            self.prior = rate if self.num_labels is not None else rate.reshape(())
        self._kappa = levels.cost(self.beta, self.prior, self.counts)
        self._cap = levels.cap(self.beta, self.prior)
        if type(self.steps) is Tensor and not self.steps.is_meta:  # nor a fake one
            self._steps = int(self.epoch.steps)
            self._past_warmup = self._steps >= max(self.warmup, 1)

    @torch.no_grad()
    def step(
        self,
        accuracy: Any,
        confidence: float | Tensor | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Report validation accuracy and mean confidence, or a histogram of both, once per epoch.

        Ends an epoch of the warm-up, sets the budget of the next epoch and, in several processes,
        merges the tables: each row becomes the mean of its values over the ranks that moved it.
        It is then collective: every rank of ``group`` calls it, with the same, already reduced,
        values. A rank that never calls shows as the group's timeout.

        Args:
            accuracy: share of right predictions, in [0, 1], a number or 0-d tensor; or, in place
                of both, what has the methods ``accuracy()`` and ``confidence()``, as a
                :class:`CalibrationHistogram`, whose labels are pooled.
            confidence: mean top-label confidence, in [0, 1], from the same data. Needed by the
                objective ``"feedback"``.
            group: the processes that train together. Default: all.

        Raises:
            ValueError: a value outside [0, 1] or nan, on any rank; values that differ between
                ranks; ``"feedback"`` without ``confidence``. Nothing has changed then.
            TypeError: not a number or 0-d tensor.

        Example:
            >>> from sc_bce import AdaptivePerturbation, CalibrationHistogram
            >>> criterion = AdaptivePerturbation(num_samples=600, objective="feedback")
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([3.0, -2.0]), torch.tensor([1, 1]))
            >>> criterion.step(histogram)
        """
        measured, confident = _agreed(*_reading(accuracy, confidence, self.objective), group)
        moved = self._merge(group)
        counts = self.counts + levels.reduced(self.fresh, group)
        self.hold({"counts": counts, "fresh": torch.zeros_like(self.fresh)})
        self.hold({"alpha": self.alpha.clamp(max=self._cap)})
        past = self._steps + 1 >= max(self.warmup, 1)
        doubt = None
        if past and bool(moved.any()):
            doubt = float(self._kappa * self._mean_level(moved))
        highest = float(self._kappa * self._cap)
        epoch = levels.next_epoch(self._rule, self.epoch, measured, confident, doubt, highest)
        if self.focus > 0:
            difficulty = levels.mean_difficulty(
                self._rule, self.sample_accuracy, self.visited != levels.NEVER
            )
            epoch = epoch if difficulty is None else epoch._replace(difficulty=difficulty)
        if self.generator is not None:
            levels.reseed(self.generator, self.alpha.device, group)
        self.hold(epoch._asdict())

    def _merge(self, group: dist.ProcessGroup | None) -> Tensor:
        """Merge the tables of the processes; returns the rows that any of them moved."""
        moved = self.visited == levels.SINCE
        trained = int(levels.reduced(torch.tensor(self._trained, device=moved.device), group))
        if levels.world_size(group) > 1:
            columns, moved = levels.merged(
                self.columns, moved, lambda total: dist.all_reduce(total, group=group)
            )
            self.hold(columns)
        touched = int(moved.sum())
        rows = len(self.alpha)
        if self.num_samples is not None and trained >= rows > 2 * touched:
            self._warn_once(
                f"since the last step the criterion saw {trained} samples but only {touched} of "
                f"its {rows} rows; pass the index of each sample in the dataset, as "
                "IndexedDataset yields it, not its position in the batch"
            )
        before = torch.where(self.visited == levels.NEVER, levels.NEVER, levels.BEFORE)
        self.visited = torch.where(moved, levels.BEFORE, before).to(torch.uint8)
        self._trained = 0
        return moved

    def _mean_level(self, rows: Tensor) -> Tensor:
        return torch.where(rows, self.alpha, 0.0).sum() / rows.sum().clamp(min=1)

    def resize(self, num_samples: int) -> None:
        """Grow the table to ``num_samples`` rows; new samples start at level 0.

        Raises:
            ValueError: fewer rows than now, or a module with one shared level.
            TypeError: ``num_samples`` is not an int.
        """
        _checks.positive_int("num_samples", num_samples)
        num_samples = int(num_samples)
        if self.num_samples is None or num_samples < self.num_samples:
            raise ValueError(
                sentence(
                    "num_samples", f"be at least the table's {self.num_samples}", num_samples,
                    "build a new module for other samples",
                )
            )  # fmt: skip
        self.grow(num_samples)
        self.num_samples = num_samples

    def _warn_without_step(self) -> None:
        if self._steps > 0:
            return
        if self.num_samples is None:
            late = self._batches > _PATIENCE
        else:
            share = -(-self.num_samples // levels.world_size(None))  # rounded up, as samplers pad
            late = self._trained > max(self.warmup, 1) * share
        if late:
            self._warn_once(
                "AdaptivePerturbation has trained past its warm-up, but step() was never called, "
                "so the levels don't move and the loss is plain BCE; call "
                "`criterion.step(histogram)` after each epoch"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(message)
            _checks.warn(message)

    def extra_repr(self) -> str:
        prior = "prior='observed'" if self.observes else _batch.shown_prior(self.prior)
        shown = [
            f"num_samples={self.num_samples}, beta={self.beta}, {prior}",
            f"objective={self.objective!r}, lr={self.lr}, penalty={self.penalty}",
            f"warmup={self.warmup}, solver={self.solver!r}, focus={self.focus}",
            f"sampling={self.sampling!r}",
        ]
        for name in ("num_labels", "reference_accuracy", "ignore_index"):
            if getattr(self, name) is not None:
                shown.append(f"{name}={getattr(self, name)}")
        shown.append(f"reduction={self.reduction!r}")
        if not self.alpha.is_meta:
            positive = float(self.alpha.count_nonzero()) / len(self.alpha)
            shown.append(f"mean_alpha={float(self.alpha.mean()):.4g}, above_zero={positive:.0%}")
            if not self._past_warmup:
                shown.append(f"warming up {self._steps}/{max(self.warmup, 1)}")
        return ", ".join(shown)

    def refusal(self, saved: Mapping[str, Tensor]) -> str | None:
        """Why a saved state is not one of this table, in a sentence."""
        alpha, setting = saved.get("alpha"), saved.get("setting")
        if isinstance(alpha, Tensor) and alpha.shape != self.alpha.shape:
            return _loaded(
                f"num_samples={self.num_samples}", f"{alpha.numel()} levels",
                "build the criterion with that number, load, then `resize`",
            )  # fmt: skip
        focused = "sample_accuracy" in saved
        if isinstance(alpha, Tensor) and focused != self.focused:
            other = "focus above 0" if focused else "focus=0"
            return _loaded(f"focus={self.focus:g}", other, "build the criterion with that focus")
        if isinstance(setting, Tensor) and not setting.is_meta:
            objective, focus = (float(value) for value in setting)
            if objective != self._setting[0]:
                other = f"objective={_OBJECTIVES[int(objective)]!r}"
                remedy = "build the criterion with that objective"
                return _loaded(f"objective={self.objective!r}", other, remedy)
            if focus != torch.tensor(self.focus, dtype=torch.float32, device="cpu").item():
                remedy = "build the criterion with that focus"
                return _loaded(f"focus={self.focus:g}", f"focus={focus:g}", remedy)
        buffers = {name: own for name, own in self._buffers.items() if own is not None}
        for name, own in {**self.held(), **buffers}.items():
            value = saved.get(name)
            if isinstance(value, Tensor) and value.shape != own.shape:
                shapes = f"`{name}` of shape {tuple(own.shape)}", f"shape {tuple(value.shape)}"
                return _loaded(*shapes, "build both criteria with the same arguments")
        if self.generator is not None and "generator" in saved:
            size = self.generator.get_state().numel()
            if saved["generator"].shape[-1] not in (size, size + levels.HEAD):
                return _loaded(
                    f"a generator on {self.generator.device}", "the state of one on another device",
                    "give the criterion a generator like the one that it was trained with",
                )  # fmt: skip
        return self._too_high(saved)

    def _too_high(self, saved: Mapping[str, Tensor]) -> str | None:
        alpha = saved.get("alpha")
        if alpha is None or alpha.is_meta or not alpha.numel():
            return None
        high = self._cap
        if self.observes and "counts" in saved:
            rate = levels.base_rate(saved["counts"])
            high = levels.cap(self.beta, rate)
        highest = float(alpha.max())
        if not highest <= float(high) + 1e-6 or float(alpha.min()) < 0:
            return _loaded(
                f"levels in [0, {float(high):.4g}], the cap at beta={self.beta:g}",
                f"a level of {highest:.4g}",
                "build the criterion with the beta and prior that it was trained with",
            )
        return None


def _loaded(own: str, saved: str, remedy: str) -> str:
    return f"Expected the saved table to have {own}, but got {saved}; {remedy}"


def _require_target(
    beta: float | None, prior: float | Tensor | str, num_labels: int | None
) -> tuple[float, int]:
    """Strength, and the number of priors."""
    if num_labels is not None:
        _checks.positive_int("num_labels", num_labels)
    labels, high, own = num_labels or 1, 2.0, 1.0
    if isinstance(prior, Tensor):
        labels = prior.numel()
        if num_labels is not None and labels != num_labels:
            got = f"{labels} values"
            raise ValueError(sentence("prior", f"have num_labels={num_labels} values", got))
        if prior.numel() and _batch.readable(prior) and not prior.is_complex():
            # A drawn label stays in [0, 1].
            high = 1 / float(torch.maximum(prior, 1 - prior).max().clamp(max=1))
    elif isinstance(prior, str):
        _checks.choice("prior", prior, ("observed",))
        high = 1.0
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
    focus: object,
    reference_accuracy: object,
) -> None:
    _checks.choice("objective", objective, _OBJECTIVES)
    _checks.positive("lr", lr)
    _checks.number("penalty", penalty, 0.0, _checks.LARGE)
    _checks.natural("warmup", warmup)
    _checks.choice("solver", solver, ("proximal", "explicit"))
    _checks.number("focus", focus, 0.0, _checks.LARGE)
    if reference_accuracy is not None:
        _checks.number("reference_accuracy", reference_accuracy, 0.0, 1.0)


def _require_index(index: object, shape: torch.Size, num_samples: int) -> Tensor:
    """The index of a training batch; its range is checked where no accelerator would wait."""
    if index is None:
        raise ValueError(
            sentence(
                "index", "be the sample indices of the batch in training", "None",
                "wrap the dataset in IndexedDataset and pass the index that it yields, or build "
                "the module with num_samples=None for one shared level",
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
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= num_samples:
            raise IndexError(
                sentence(
                    "index", f"be in [0, {num_samples - 1}]", low if low < 0 else high,
                    f"num_samples={num_samples} must count every sample of the indexed dataset, "
                    "also where a Subset around it (random_split) is trained on; `resize` makes "
                    "room for new ones",
                )
            )  # fmt: skip
    return index


def _reading(
    accuracy: Any, confidence: Any, objective: str
) -> tuple[float, float | None, Exception | None]:
    """What a step is given, and what is wrong with it."""
    try:
        if hasattr(accuracy, "accuracy") and hasattr(accuracy, "confidence"):
            measured = accuracy.pooled() if hasattr(accuracy, "pooled") else accuracy
            accuracy, confidence = measured.accuracy(), measured.confidence()
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
    except (TypeError, ValueError) as error:
        return 0.0, None, error
    return accuracy, confidence, None


def _agreed(
    accuracy: float,
    confidence: float | None,
    error: Exception | None,
    group: dist.ProcessGroup | None,
) -> tuple[float, float | None]:
    """The values of all ranks, judged by all alike."""
    given: list[Any] = [(accuracy, confidence, error)]
    if levels.world_size(group) > 1:
        given = [None] * levels.world_size(group)
        dist.all_gather_object(given, (accuracy, confidence, error), group=group)
    for _, _, wrong in given:
        if wrong is not None:
            raise wrong
    for name, values in zip(("accuracy", "confidence"), zip(*given, strict=True), strict=False):
        known = [value for value in values if value is not None]
        if known and (len(known) < len(values) or max(known) - min(known) > _EQUAL):
            remedy = "reduce it first, for example `histogram.all_reduce()`"
            raise ValueError(sentence(name, "be the same on every rank", list(values), remedy))
    return given[0][0], given[0][1]
