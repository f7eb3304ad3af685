"""The adaptive loss, one perturbation level per training sample: arguments, forward, step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _errors, _inputs
from .._errors import refuse, whole
from .._inputs import NOTHING, Batch, Perturbation, Seen
from .._state import Stateful, reseed
from .._torch import on_backward
from ..functional import look, perturbed_loss, sc_bce_with_logits
from . import mistakes
from .draws import bernoulli, materialized
from .levels import Levels, Rule, strength_of
from .measured import agreed, read
from .rules import Climb, FollowSlope
from .table import look_up, rows_of

__all__ = ["AdaptivePerturbation"]

Criterion = TypeVar("Criterion", bound="AdaptivePerturbation")
Prepared = tuple[Tensor, Tensor, float | Tensor, Batch]


class AdaptivePerturbation(Stateful):
    r"""Binary cross entropy whose label smoothing follows measured calibration (adaptive, ASLP).

    .. math::
        \ell(x_i, y_i) = \mathrm{BCE}\big(x_i,\; y_i + \alpha_i\beta\,(c - y_i)\big)

    with :math:`x_i` the logits of training sample :math:`i`, :math:`y_i` its target,
    :math:`\alpha_i` its level (the probability that its labels are perturbed), :math:`\beta` the
    strength and :math:`c` the prior that perturbed labels move towards. After each epoch,
    ``step(histogram)`` moves the mean level :math:`a` with the calibration slope :math:`b` of the
    validation logits (below 1: over-confident), and shares it out by difficulty:

    .. math::
        a \leftarrow \mathrm{clip}\big(a + \tfrac{0.1}{\beta}\,\mathrm{clip}(1 - b, -1, 1),\,
        0,\, \mathrm{cap}\big), \qquad
        \alpha_i = \min\Big(a\,\frac{(1 - \bar A_i)^k}{\mathrm{mean}_j (1 - \bar A_j)^k},\,
        \mathrm{cap}\Big)

    with :math:`\bar A_i` the running mean of the accuracy on sample :math:`i` in training,
    :math:`k` the ``focus`` and :math:`\mathrm{cap} = \min(1,\, 1/(2\max(c, 1-c)\,\beta) - 0.01)`,
    below which both labels stay on their side of 1/2. Nothing else moves a level.

    :meth:`published` is the paper's rule. During the warm-up, and under ``eval()`` or ``no_grad``
    at any time, the loss is :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        num_samples: number M of training samples, or None for one shared level without an index.
        level: mean level right after the warm-up, in [0, 1]; the cap bounds it. Default: 0.2.
        focus: exponent k, not negative: how much of the mean level goes to samples that the
            network gets wrong. 0 shares it out equally. Default: 1.
        beta: perturbation strength, in (0, 1 / max(prior, 1 - prior)]. None takes the largest if
            ``prior`` is a number, and 1 otherwise. Default: None.
        prior: a number between 0 and 1; a tensor that broadcasts to ``input`` from the last
            dimension, as ``pos_weight`` does; ``"observed"``, the base rate
            :math:`(N_+ + \tfrac12)/(N + 1)` of the valid training labels up to the last step; or
            ``"level_weighted"``, that of the last epoch with each sample weighted by its level,
            which keeps the mean probability. Default: ``"observed"``.
        warmup: number of epochs (calls of :meth:`step`) before the levels start; 0 is treated as
            1. Default: 1.
        sampling: ``"sample"``, ``"element"`` or ``"expected"``, as in
            :class:`SCBCEWithLogitsLoss`. Default: ``"sample"``.
        num_labels: number of labels in dimension 1, each with a counted prior of its own; None
            pools them. Default: None.
        weight: as in torch. Default: None.
        pos_weight: as in torch. Default: None.
        ignore_index: target value that is left out of the loss and of all that is counted, an
            int or ``math.nan``. Default: None.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"mean"``.
        generator: source of the draws, on the input's device, saved in ``state_dict``; None is
            torch's global one. Default: None.

    Attributes:
        alpha: the levels, (M,), float32, read-only.
        prior: a number or a tensor; if counted, 0-d, or (C,) with ``num_labels``.

    Shape:
        - input: :math:`(N, *)`, floating point.
        - target: the same; bool, integer (0 and 1) or floating point in [0, 1].
        - index: :math:`(N,)`, integer in [0, M).
        - Returns: scalar, or the shape of ``input`` for ``reduction="none"``.

    Raises:
        ValueError, TypeError: as :func:`sc_bce_with_logits`; in training, without an index.
        IndexError: an index on the CPU is out of range.

    Note:
        :class:`IndexedDataset` yields the index. A forward with ``update=False`` notes nothing.
        Nothing waits for an accelerator, where an index is not checked. Keep the module with the
        model: it moves with ``to(device)``, and its ``state_dict`` resumes exactly.

        A prior other than 1/2 moves the decision threshold, as in :func:`sc_bce_with_logits`.
        Likely mistakes give a warning, such as a forgotten :meth:`step`.

    References:
        Liu et al., ICCV 2023, arXiv 2307.13539 (a level per sample).
        Cox, Biometrika 1958 (the calibration slope).

    Example:
        >>> import torch
        >>> from sc_bce import AdaptivePerturbation, CalibrationHistogram
        >>> criterion = AdaptivePerturbation(num_samples=4)
        >>> logits = torch.tensor([[4.0], [-2.0], [3.0], [-1.0]], requires_grad=True)
        >>> target = torch.tensor([[1], [0], [0], [0]])
        >>> criterion(logits, target, index=torch.arange(4)).backward()  # in training
        >>> validation = torch.tensor([3.0] * 100 + [-3.0] * 100)  # confidence 0.95
        >>> histogram = CalibrationHistogram()
        >>> histogram.update(validation, (validation > 0) == (torch.arange(200) % 100 < 80))
        >>> criterion.step(histogram)  # after each epoch
        >>> criterion.alpha  # over-confident, so more than 0.2 on average; most for what was wrong
        tensor([0.2404, 0.2404, 0.2939, 0.2404])
    """

    prior: float | Tensor
    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        num_samples: int | None,
        *,
        level: float = 0.2,
        focus: float = 1.0,
        beta: float | None = None,
        prior: float | Tensor | str = "observed",
        warmup: int = 1,
        sampling: str = "sample",
        num_labels: int | None = None,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        ignore_index: float | None = None,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_samples = None if num_samples is None else whole("num_samples", num_samples)
        self.num_labels = None if num_labels is None else whole("num_labels", num_labels)
        _errors.choice("sampling", sampling, ("expected", "sample", "element"))
        _errors.choice("reduction", reduction, ("none", "mean", "sum"))
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            _errors.tensor_or_none(name, value)
            self.register_buffer(name, value)
        # Samples that share a level have no difficulties to tell apart.
        self.rule: Rule = FollowSlope(level, 0.0 if num_samples is None else focus)
        self.warmup = whole("warmup", warmup, 0)
        self.sampling, self.reduction, self.generator = sampling, reduction, generator
        self.ignore_index = _errors.ignored(ignore_index)
        if isinstance(prior, Tensor):
            prior = _inputs.prior_buffer(prior)
            self.register_buffer("prior", prior.clone(), persistent=False)
        self._prior, self.beta = prior, strength_of(beta, prior, self.num_labels)
        self.reset_parameters()

    @classmethod
    def published(
        cls: type[Criterion],
        num_samples: int | None,
        objective: str = "calibration",
        *,
        lr: float = 0.002,
        penalty: float = 2000.0,
        **kwargs: Any,
    ) -> Criterion:
        r"""The paper's rule (ASLP): levels climb in each batch, strength 2 towards 1/2.

        .. math::
            \alpha_i \leftarrow \mathrm{clip}\big(\alpha_i + \eta\,(\bar s_i +
            \lambda R_i),\, 0,\, \mathrm{cap}\big), \qquad
            \bar s_i = \mathrm{mean}\,[\beta\,(y_i - c)\, x_i]

        with :math:`A` the accuracy that :meth:`step` was given. A sample that occurs in a batch
        more than once takes the mean of its steps.

        Args:
            num_samples: as in the constructor.
            objective: ``"calibration"`` (MC), :math:`R_i = \min(1 - A - \kappa\alpha_i, 0)` with
                :math:`\kappa` the confidence that a level of 1 costs, or ``"max_entropy"`` (MEI),
                :math:`R = \min(A - A_\mathrm{best}, 0)`. Default: ``"calibration"``.
            lr: the step size :math:`\eta`, positive. Default: 0.002, as in the official code.
            penalty: the weight :math:`\lambda`, not negative. Default: 2000, likewise.
            **kwargs: the constructor's; ``beta=2``, ``prior=0.5``, ``warmup=5`` by default.

        Example:
            >>> from sc_bce import AdaptivePerturbation
            >>> AdaptivePerturbation.published(num_samples=4).rule
            Climb(objective='calibration', lr=0.002, penalty=2000.0)
        """
        for name in ("level", "focus"):
            if name in kwargs:
                refuse(name, "be left out: the published rule has none", kwargs[name])
        made = cls(num_samples, **{"beta": 2.0, "prior": 0.5, "warmup": 5, **kwargs})
        made.rule = Climb(objective, lr, penalty)  # before the state, which depends on it
        made.reset_parameters()
        return made

    @property
    def alpha(self) -> Tensor:
        return self._levels.alpha

    @alpha.setter
    def alpha(self, value: object) -> None:
        way = "set where they start with `level`, or load a state_dict"
        raise AttributeError(f"`alpha` is read-only: `step` moves the levels; {way}")

    @property
    def flip_rates(self) -> tuple[Tensor, Tensor]:
        """Mean flip rates (g0, g1) over the rows trained so far: 0-d, or (C,), one per label.

        Example:
            >>> AdaptivePerturbation(num_samples=4).flip_rates  # before any training
            (tensor(0.), tensor(0.))
        """
        strength = self.beta * self._levels.mean()
        prior = _inputs.flat_prior(self.prior).to(strength.device)
        return strength * prior, strength * (1 - prior)

    def forward(
        self, input: Tensor, target: Tensor, index: Tensor | None = None, *, update: bool = True
    ) -> Tensor:
        # Not by attribute: what is no attribute of an object is looked for among the levels too.
        weights: dict[str, Any] = {name: self._buffers[name] for name in ("weight", "pos_weight")}
        weights["reduction"] = self.reduction
        if not (self.training and torch.is_grad_enabled()):
            if not torch.compiler.is_compiling():
                self._history.evaluated += 1 if self.training else 2
            loss = sc_bce_with_logits(input, target, ignore_index=self.ignore_index, **weights)
            return loss if self.training else on_backward(loss, mistakes.warn_of_eval)
        rows, alpha, prior, batch = self._prepare(input, target, index)
        drawn = self._drawn(alpha, input) if self._levels.past_warmup else 0.0
        wanted = self._levels.wanted(rows, alpha, prior) if update else NOTHING
        given = Perturbation(drawn, self.beta, prior)
        loss, seen = perturbed_loss(batch, given, wanted=wanted, **weights)
        if update:
            self._note(rows, alpha, seen, batch)
        return loss

    @torch.no_grad()
    def update(self, input: Tensor, target: Tensor, index: Tensor | None = None) -> None:
        """Note a batch without a loss, in any mode; for what computes several losses per batch.

        Call the criterion with ``update=False`` (several heads, checkpointing), and this once.

        Example:
            >>> criterion = AdaptivePerturbation(num_samples=4)
            >>> criterion.update(torch.tensor([[4.0]]), torch.tensor([[1.0]]), torch.tensor([2]))
        """
        rows, alpha, prior, batch = self._prepare(input, target, index)
        seen = look(batch, prior, self.weight, self._levels.wanted(rows, alpha, prior))
        self._note(rows, alpha, seen, batch)

    def _prepare(self, input: Tensor, target: Tensor, index: Tensor | None) -> Prepared:
        """Check a batch; return the row of each sample, its level, the prior, and the batch."""
        batch = _inputs.batch(input, target, self.ignore_index)
        shared = self.num_samples is None
        if shared and index is not None and not torch.compiler.is_compiling():
            mistakes.warn_of_index()
        rows = rows_of(index, input, self.alpha, shared)
        alpha = look_up(self.alpha, rows)
        if self.num_labels is not None and input.shape[1:2] != (self.num_labels,):
            wanted = f"have num_labels={self.num_labels} along dimension 1"
            refuse("input", wanted, f"shape {tuple(input.shape)}")
        prior = self.prior
        if isinstance(prior, Tensor) and self._levels.counted is None:
            prior = _inputs.prior_of(prior, input.size())
        elif isinstance(prior, Tensor) and prior.dim():
            prior = prior.reshape(1, -1, *(1 for _ in input.shape[2:]))
        return rows, alpha, prior, batch

    def _note(self, rows: Tensor, alpha: Tensor, seen: Seen, batch: Batch) -> None:
        self._levels.note(rows, alpha, seen, batch.void is not None or not batch.input.numel())
        if not torch.compiler.is_compiling():  # last, since a warning can be turned into an error
            self._history.batch(batch.input, self._levels, self.num_samples is None)

    def _drawn(self, alpha: Tensor, input: Tensor) -> Tensor:
        """The level of each sample, or zeros and ones drawn with it."""
        alpha = alpha if input.dim() else alpha.reshape(())
        if self.sampling != "expected":
            alpha = bernoulli(alpha, input, self.sampling, self.generator)
        if torch.compiler.is_compiling():
            alpha = materialized(alpha)
        return alpha.reshape(-1, *(1 for _ in input.shape[1:])) if alpha.dim() == 1 else alpha

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, measured: Any, *, group: dist.ProcessGroup | None = None) -> None:
        """Report the measured calibration of the validation data, once per epoch.

        Without a training batch since the last step it changes nothing. In several processes each
        row first becomes its mean over the ranks that trained it. The call is then collective:
        every rank of ``group`` makes it, with the same, already reduced values.

        Args:
            measured: a :class:`CalibrationHistogram` of the validation data, whose labels are
                pooled, or any object with the methods ``accuracy()`` and ``slope()``. After
                :meth:`published` the accuracy alone will do, as a number or ``accuracy()``.
            group: the processes that train together. Default: all.

        Raises:
            ValueError, TypeError: ``measured`` is empty, nan, outside [0, 1] or of the wrong type
                on any rank, or differs between them. Nothing is changed then.

        Example:
            >>> criterion = AdaptivePerturbation.published(None)
            >>> criterion.update(torch.tensor([4.0]), torch.tensor([1.0]))
            >>> criterion.step(0.9)
        """
        history, levels = self._history, self._levels
        own = read(measured, isinstance(self.rule, FollowSlope))._replace(
            trained=bool(levels.moved.any()), samples=history.samples, batch=history.largest
        )
        reading = agreed(own, group)
        if not reading.trained:
            mistakes.warn_of_idle_step()
            return
        moved = levels.step(reading, group)
        self.hold({})
        if self.generator is not None:
            reseed(self.generator, self.alpha.device, group)
        # Last, since a warning can be turned into an error.
        history.step(reading, moved, levels, self.num_samples is None)
        mistakes.warn_of_pos_weight(self.pos_weight, self.flip_rates)

    @torch.inference_mode(False)
    def resize(self, num_samples: int) -> None:
        """Grow the table to ``num_samples`` rows for new training data; they start as untrained.

        Example:
            >>> criterion = AdaptivePerturbation(num_samples=2)
            >>> criterion.resize(3)
        """
        whole("num_samples", num_samples)
        if self.num_samples is None or num_samples < self.num_samples:
            wanted, remedy = f"be at least the table's {self.num_samples}", "build a new module"
            refuse("num_samples", wanted, num_samples, remedy)
        self._levels.grow(num_samples)
        self.num_samples = int(num_samples)

    @torch.inference_mode(False)
    def reset_parameters(self) -> None:
        """Start again, as after construction.

        Example:
            >>> AdaptivePerturbation(num_samples=2).reset_parameters()
        """
        device = self.alpha.device if hasattr(self, "_levels") else None
        setting = self.beta, self._prior, self.num_labels, self.warmup
        self._levels = Levels(self.rule, self.num_samples or 1, *setting, device)
        self._history = mistakes.History()
        self.hold({})

    def held(self) -> dict[str, Tensor]:
        return self._levels.tensors

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        self._levels.hold(tensors)
        # The prior that follows; a buffer may have been cast, or never filled.
        prior = self._levels.prior
        self.prior = prior.to(self.alpha.device) if isinstance(prior, Tensor) else float(prior)

    def refusal(self, saved: Mapping[str, Any]) -> str | None:
        return self._levels.refusal(saved)

    def extra_repr(self) -> str:
        prior = tuple(self._prior.shape) if isinstance(self._prior, Tensor) else self._prior
        shown = [f"num_samples={self.num_samples}, {self.rule}, beta={self.beta}, prior={prior!r}"]
        shown.append(f"warmup={self.warmup}, sampling={self.sampling!r}")
        options = ((name, getattr(self, name)) for name in ("num_labels", "ignore_index"))
        shown.extend(f"{name}={value}" for name, value in options if value is not None)
        shown.append(f"reduction={self.reduction!r}")
        if not self.alpha.is_meta:
            shown.append(f"mean_alpha={float(self._levels.mean()):.4g}")
            if not self._levels.past_warmup:
                shown.append(f"warming up {self._levels.steps}/{max(self.warmup, 1)}")
        return ", ".join(shown)
