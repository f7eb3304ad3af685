"""The loss that owns one perturbation level per training sample: table, update, merge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _batch, _checks
from .functional import (
    BatchSums,
    batch_sums,
    loss_of_sums,
    sample_accuracies,
    sample_margins,
    sc_bce_with_logits,
)
from .loss import draw

__all__ = ["AdaptivePerturbation"]

Criterion = TypeVar("Criterion", bound="AdaptivePerturbation")

_CHUNK = 1 << 24  # rows that a step works on at a time: bounds its extra memory
_PATIENCE = 10_000  # batches without a step before the warning, where no epoch can be counted


class AdaptivePerturbation(nn.Module):
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

    alpha: Tensor

    def __init__(
        self,
        num_samples: int | None,
        *,
        beta: float = 2.0,
        objective: str = "calibration",
        lr: float = 0.002,
        penalty: float = 2000.0,
        warmup: int = 5,
        solver: str = "proximal",
        focus: float = 0.0,
        sampling: str = "sample",
        reference_accuracy: float | None = None,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_samples is not None:
            _checks.positive_int("num_samples", num_samples)
        _checks.positive("beta", beta, 2.0)
        _checks.choice("objective", objective, ("calibration", "max_entropy", "feedback"))
        _checks.positive("lr", lr)
        _checks.number("penalty", penalty, 0.0, _checks.LARGE)
        _checks.warmup(warmup)
        _checks.choice("solver", solver, ("proximal", "explicit"))
        _checks.number("focus", focus, 0.0, _checks.LARGE)
        _checks.sampling(sampling)
        if reference_accuracy is not None:
            _checks.number("reference_accuracy", reference_accuracy, 0.0, 1.0)
        _checks.reduction(reduction)
        _checks.generator(generator)
        self.num_samples = None if num_samples is None else int(num_samples)
        self.beta = float(beta)
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
        self.weight: Tensor | None
        self.pos_weight: Tensor | None
        # Plain attributes, carried by _apply and the state_dict methods below: a registered
        # buffer would be overwritten by DistributedDataParallel at each forward, and cast by half.
        rows = self.num_samples or 1
        single = torch.float32  # whatever torch's default is
        self.alpha = torch.zeros(rows, dtype=single)
        self.moved = torch.zeros(rows, dtype=torch.bool)  # since the last merge
        if focus > 0:
            self.sample_accuracy = torch.full((rows,), 0.5, dtype=single)
            self.seen = torch.zeros(rows, dtype=torch.bool)
        # State of the epoch: tensors, so that a new value recompiles nothing.
        self.steps = torch.zeros((), dtype=torch.int64)
        self.accuracy = torch.zeros((), dtype=single)
        self.best_accuracy = torch.zeros((), dtype=single)
        self.budget = torch.zeros((), dtype=single)
        # Mean of (1 - sample accuracy)^focus among the samples seen.
        self.difficulty = torch.full((), 0.5**focus, dtype=single)
        self._moving = False  # the warm-up is over
        self._unstepped = 0  # samples trained on before the first step; -1 where none is awaited
        self._generators: Tensor | None = None  # every rank's generator state at the last step

    @property
    def flip_rate(self) -> Tensor:
        """Mean flip rate, ``alpha.mean() * beta / 2``: 0-d, for :class:`TemperatureScaling`."""
        return self.alpha.mean() * (self.beta / 2)

    @property
    def _cap(self) -> float:
        return min(1.0, 1 / self.beta - 0.01)

    def forward(self, input: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self._loss(input, target, 0.0)
        rows = self._rows(input, index)
        if not self._moving:
            loss = self._loss(input, target, 0.0)
            if self.focus > 0:
                self._move(rows, input, target, self._margins(input, target))
            if not torch.compiler.is_compiling():
                self._warn_without_step(len(rows))
            return loss
        alpha = self.alpha.index_select(0, rows).reshape(input.shape[:1])
        # Before the draw: a batch that is refused leaves the generator where it was.
        sums = self._sums(input, target, alpha)
        if sums is None:
            margin = self._margins(input, target)
        else:
            margin = (sums.margin.detach() * (len(rows) / input.numel())).float()
        if self.sampling != "expected":
            alpha = draw(alpha, input, self.sampling, self.generator)
        if sums is None:
            loss = self._loss(input, target, alpha)
        else:
            loss = loss_of_sums(sums, input, target, alpha, self.beta, self.reduction)
        self._move(rows, input, target, margin)
        return loss

    def _sums(self, input: Tensor, target: Tensor, alpha: Tensor) -> BatchSums | None:
        special = (self.weight, self.pos_weight, self.ignore_index)
        if self.sampling == "element" or special != (None, None, None):
            return None
        _batch.pair(input, target)
        return batch_sums(input, target, alpha, self.beta, self.reduction)

    @torch.no_grad()
    def _margins(self, input: Tensor, target: Tensor) -> Tensor:
        return sample_margins(input, target, self.weight, self.ignore_index)

    def _loss(self, input: Tensor, target: Tensor, alpha: float | Tensor) -> Tensor:
        return sc_bce_with_logits(
            input,
            target,
            alpha,
            self.beta,
            weight=self.weight,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def _rows(self, input: Tensor, index: Tensor | None) -> Tensor:
        """The row of each sample of the batch, on the device of the table."""
        _batch.logits(input)
        _checks.same_device(input, self.alpha)
        samples = input.shape[0] if input.dim() else 1
        if self.num_samples is None:
            return torch.zeros(samples, dtype=torch.int64, device=self.alpha.device)
        rows = _checks.sample_index(index, input.shape[:1], self.num_samples).reshape(samples)
        # Only towards an accelerator: what comes from one is read on arrival.
        rows = rows.to(self.alpha.device, non_blocking=rows.device.type == "cpu")
        if torch.compiler.is_compiling():
            # Inductor reads a negative index from the end; beyond it, the bounds check finds it.
            rows = torch.where(rows < 0, self.num_samples, rows)
        return rows

    @torch.no_grad()
    def _move(self, rows: Tensor, input: Tensor, target: Tensor, margin: Tensor) -> None:
        """Move the rows of a batch; where nothing valid and finite was seen, hold them."""
        merge = _RepeatedRows(rows, margin.isfinite())
        moves = merge.any
        if self.focus > 0:
            hits = sample_accuracies(input, target, self.ignore_index)
            old = self.sample_accuracy.index_select(0, rows)
            recent = torch.where(moves, 0.9 * old + 0.1 * merge.mean(hits), old)
            self.sample_accuracy.index_copy_(0, rows, recent)
            self.seen.index_copy_(0, rows, self.seen.index_select(0, rows) | moves)
        if self._moving:
            alpha = self.alpha.index_select(0, rows)
            gradient = (self.beta / 2) * merge.mean(margin)
            new = self._solve(alpha, gradient, self._budget_of(rows))
            self.alpha.index_copy_(0, rows, torch.where(moves, new, alpha))
        self.moved.index_copy_(0, rows, self.moved.index_select(0, rows) | moves)

    def _budget_of(self, rows: Tensor) -> Tensor:
        if self.focus == 0:
            return self.budget
        hardness = (1 - self.sample_accuracy.index_select(0, rows)) ** self.focus
        # Where every sample seen is perfect, all are alike.
        share = torch.where(self.difficulty > 0, hardness / self.difficulty, 1.0)
        return (self.budget * share).clamp(max=0.45)

    def _solve(self, alpha: Tensor, gradient: Tensor, budget: Tensor) -> Tensor:
        step = alpha + self.lr * gradient
        half, pull = self.beta / 2, self.lr * self.penalty
        if self.objective == "max_entropy":
            reference = self.best_accuracy
            if self.reference_accuracy is not None:
                reference = torch.full_like(reference, self.reference_accuracy)
            step = step + pull * (self.accuracy - reference).clamp(max=0)
        elif self.solver == "explicit":
            step = step + pull * (budget - half * alpha).clamp(max=0)
        else:
            # The penalty at the new level instead of the old one: a contraction for every pull.
            rest = budget / half
            step = torch.where(step <= rest, step, rest + (step - rest) / (1 + pull * half))
        return step.clamp(0.0, self._cap)

    def step(self, accuracy: float | Tensor, confidence: float | Tensor | None = None) -> None:
        """Tell the accuracy, and mean confidence, of the validation data: once per epoch.

        Ends an epoch of the warm-up, sets the budget of the next epoch and, in several processes,
        merges the tables: each row becomes the mean of its values over the ranks that moved it.
        It is then collective: every rank calls it, with the same, already reduced, values. A call
        on one rank alone waits for the others, until the process group's timeout.

        Args:
            accuracy: share of right predictions, in [0, 1]; a number or 0-d tensor.
            confidence: mean top-label confidence, in [0, 1], from the same data. Needed by the
                objective ``"feedback"``.

        Raises:
            ValueError: a value outside [0, 1] or nan; ``"feedback"`` without ``confidence``.
            TypeError: not a number or 0-d tensor.

        Example:
            >>> from sc_bce import AdaptivePerturbation, CalibrationHistogram
            >>> criterion = AdaptivePerturbation(num_samples=600, objective="feedback")
            >>> histogram = CalibrationHistogram()
            >>> histogram.update(torch.tensor([3.0, -2.0]), torch.tensor([1, 1]))
            >>> criterion.step(histogram.accuracy(), histogram.confidence())
        """
        accuracy = _checks.unit_number("accuracy", accuracy)
        if confidence is not None:
            confidence = _checks.unit_number("confidence", confidence)
        elif self.objective == "feedback":
            raise ValueError(
                "Expected argument `confidence` to be given for objective 'feedback', but got "
                "None; pass the validation's mean confidence, `step(h.accuracy(), h.confidence())`"
            )
        everyone = None if self.generator is None else _gather(self.generator, self.alpha.device)
        self._merge()
        self._generators = everyone
        self.steps += 1
        self._count_steps()
        self.accuracy.fill_(accuracy)
        self.best_accuracy.clamp_(min=accuracy)
        if self.objective == "calibration":
            self.budget.fill_(1 - accuracy)
        elif self.objective == "feedback" and self._moving and confidence is not None:
            # From what the levels have followed: the budget must neither run ahead while they still
            # climb nor pile up below 0, where they can't go, and hold them there long after.
            used = min(max(float(self.budget), 0.0), float(self.flip_rate))
            high = min(0.45, self.beta * self._cap / 2)
            self.budget.fill_(min(max(used + (confidence - accuracy) / 2, -0.45), high))
        if self.focus > 0 and bool(self.seen.any()):
            total = 0.0
            for start in range(0, len(self.seen), _CHUNK):
                rows = slice(start, start + _CHUNK)
                hardness = (1 - self.sample_accuracy[rows]) ** self.focus
                hardness = torch.where(self.seen[rows], hardness, 0.0)
                total += float(hardness.sum(dtype=torch.float64))
            self.difficulty.fill_(total / int(self.seen.sum()))

    def _count_steps(self) -> None:
        """What the host must know of the steps: two facts, each of which changes once."""
        steps = int(self.steps)
        self._moving = steps >= max(self.warmup, 1)
        if steps > 0:
            self._unstepped = -1

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
                f"Expected argument `num_samples` to be at least the table's {self.num_samples}, "
                f"but got {num_samples}; build a new module for other samples"
            )
        for name in self._tables():
            old = getattr(self, name)
            start = 0.5 if name == "sample_accuracy" else 0
            setattr(self, name, torch.cat((old, old.new_full((num_samples - len(old),), start))))
        self.num_samples = num_samples

    def _merge(self) -> None:
        if _world_size() > 1:
            # Into copies: if a rank dies on the way, this one's table is whole.
            merged = {name: getattr(self, name).clone() for name in self._tables()}
            for start in range(0, len(self.alpha), _CHUNK):
                rows = slice(start, start + _CHUNK)
                movers = self.moved[rows].float()
                own = movers.clone()
                dist.all_reduce(movers)
                for name in self._tables():
                    table = merged[name][rows]
                    if table.dtype == torch.bool:  # `seen`; `moved` starts again below
                        table |= movers > 0
                        continue
                    total = table * own
                    dist.all_reduce(total)
                    mean = (total / movers).clamp(0.0, self._cap if name == "alpha" else 1.0)
                    table.copy_(torch.where(movers > 0, mean, table))
            for name, table in merged.items():
                getattr(self, name).copy_(table)
        self.moved.zero_()

    def _warn_without_step(self, samples: int) -> None:
        if self._unstepped < 0:
            return
        if self.num_samples is None:
            self._unstepped += 1
            limit = _PATIENCE
        else:
            self._unstepped += samples
            share = -(-self.num_samples // _world_size())  # rounded up, as a sampler pads
            limit = max(self.warmup, 1) * share
        if self._unstepped > limit:
            self._unstepped = -1
            warnings.warn(
                "AdaptivePerturbation has trained past its warm-up, but step() was never called, "
                "so the levels don't move and the loss is plain BCE; call "
                "`criterion.step(accuracy)` after each epoch",
                stacklevel=5,  # past forward and the two frames of Module.__call__
            )

    def _tables(self) -> tuple[str, ...]:
        return ("alpha", "moved", "sample_accuracy", "seen")[: 4 if self.focus > 0 else 2]

    def _state(self) -> tuple[str, ...]:
        epoch = ("steps", "accuracy", "best_accuracy", "budget", "difficulty")
        return (*self._tables(), *epoch)

    def _apply(self: Criterion, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Criterion:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._state():
            old = getattr(self, name)
            new = fn(old)
            # The device is followed, a dtype is not: bfloat16 would lose steps below 1/256.
            setattr(self, name, new if new.dtype == old.dtype else old.to(new.device))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._state():
            destination[prefix + name] = getattr(self, name)
        if self.generator is not None:
            state, everyone = self.generator.get_state(), self._generators
            # Right after a step any rank's checkpoint serves all ranks: it has all their states.
            fresh = everyone is not None and torch.equal(everyone[_rank()], state)
            destination[prefix + "generator"] = everyone if fresh else state

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = (*self._state(), *(("generator",) if self.generator else ()))
        for name in self._state():
            _checks.saved_shape(name, state_dict.get(prefix + name), getattr(self, name))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in names if name not in own)
        unexpected_keys[:] = [k for k in unexpected_keys if k[len(prefix) :] not in own]
        for name in own.keys() - {"generator"}:
            if local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, own[name].to(getattr(self, name).dtype))
            else:
                getattr(self, name).copy_(own[name])
        if not self.steps.is_meta:
            self._count_steps()
        if self.generator is not None and "generator" in own:
            self._restore(self.generator, own["generator"].cpu())

    def _restore(self, generator: torch.Generator, saved: Tensor) -> None:
        self._generators = None
        if saved.dim() == 2:  # every rank's; a rank that was not there keeps its own
            self._generators = saved if len(saved) == _world_size() else None
            saved = saved[_rank()] if _rank() < len(saved) else generator.get_state()
        # A copy, since set_state reads a view from the start of its storage.
        generator.set_state(saved.clone())

    def extra_repr(self) -> str:
        shown = [
            f"num_samples={self.num_samples}, beta={self.beta}, objective={self.objective!r}",
            f"lr={self.lr}, penalty={self.penalty}, warmup={self.warmup}",
            f"solver={self.solver!r}, focus={self.focus}, sampling={self.sampling!r}",
        ]
        if self.reference_accuracy is not None:
            shown.append(f"reference_accuracy={self.reference_accuracy}")
        if self.ignore_index is not None:
            shown.append(f"ignore_index={self.ignore_index}")
        shown.append(f"reduction={self.reduction!r}")
        if not self.alpha.is_meta:
            positive = float(self.alpha.count_nonzero()) / len(self.alpha)
            shown.append(f"mean_alpha={float(self.alpha.mean()):.4g}, above_zero={positive:.0%}")
        return ", ".join(shown)


class _RepeatedRows:
    """Means over the places of a batch that share a row, given back to each such place.

    By sorting, at O(batch): torch.unique would make an accelerator wait for its size.
    """

    def __init__(self, rows: Tensor, counts: Tensor) -> None:
        ordered, order = rows.sort(stable=True)
        self._counts = counts
        starts = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
        self._group = torch.empty_like(order).scatter_(0, order, starts)
        self._total = self._sum(counts.float())
        self.any = self._total > 0

    def mean(self, value: Tensor) -> Tensor:
        return self._sum(torch.where(self._counts, value, 0.0)) / self._total.clamp(min=1)

    def _sum(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value).index_add_(0, self._group, value)[self._group]


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def _world_size() -> int:
    return dist.get_world_size() if _connected() else 1


def _rank() -> int:
    return dist.get_rank() if _connected() else 0


def _gather(generator: torch.Generator, device: torch.device) -> Tensor:
    """The state of every rank's generator, (world size, bytes); collective."""
    state = generator.get_state()
    states = [torch.empty_like(state, device=device) for _ in range(_world_size())]
    if len(states) == 1:
        return state[None]
    dist.all_gather(states, state.to(device))
    return torch.stack(states).cpu()
