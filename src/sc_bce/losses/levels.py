"""The state of the levels: what a batch notes in it, and how an epoch changes it by the rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _errors, _inputs
from .._errors import refuse
from .._inputs import Seen, Wanted
from .._torch import has_values, reduced, world_size
from .measured import Reading
from .rules import Climb, FollowSlope, base_rate, cap
from .table import merged, write

Rule = FollowSlope | Climb

NEVER, BEFORE, SINCE = 0, 1, 2  # when a row was last trained, relative to the last step


class Levels:
    """One level per row, or one for all, and the rest of the state that training depends on."""

    # What the host knows of the state.
    steps, past_warmup, cap = 0, False, 1.0
    cost: float | Tensor = 0.0

    def __init__(
        self,
        rule: Rule,
        rows: int,
        beta: float,
        prior: float | Tensor | str,
        num_labels: int | None,
        warmup: int,
        device: torch.device | None,
    ) -> None:
        self.rule, self.beta, self.warmup = rule, beta, max(warmup, 1)
        self.counted = prior if isinstance(prior, str) else None
        self.prior: float | Tensor = 0.5 if isinstance(prior, str) else prior
        self.num_labels = num_labels
        self.remembers = isinstance(rule, FollowSlope) and rule.focus > 0
        # Whether the prior is the base rate of samples weighted by their levels.
        self.weighted = self.counted == "level_weighted" and self.remembers
        labels = prior.numel() if isinstance(prior, Tensor) else num_labels or 1
        scalars = ("accuracy", "best_accuracy") if isinstance(rule, Climb) else ("mean_level",)

        def new(*shape: int, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        known = {"sample_accuracy": new(rows, value=FollowSlope.unknown)} if self.remembers else {}
        self.tensors = {
            "alpha": new(rows),
            **known,
            "visited": new(rows, value=NEVER, dtype=torch.uint8),
            "steps": new(dtype=torch.int64),
            # Numbers of elements and positives up to the last step; since then, in this process.
            "counts": new(2, labels),
            "elements": new(labels),
            "positives": new(labels),
            "setting": torch.tensor(self.setting, dtype=torch.float32, device=device),
            **{name: new() for name in scalars},
        }
        self.hold({})

    @property
    def setting(self) -> tuple[float, float]:
        """The rule as two numbers, saved so that no other rule goes on from this state."""
        if isinstance(self.rule, FollowSlope):
            return 0.0, self.rule.focus
        return 1.0, float(self.rule.objective == "max_entropy")

    @property
    def alpha(self) -> Tensor:
        return self.tensors["alpha"]

    @property
    def trained(self) -> Tensor:
        """The rows that any process trained up to the last step, or this one since then."""
        return self.tensors["visited"] != NEVER

    @property
    def moved(self) -> Tensor:
        """The rows that this process trained since the last step."""
        return self.tensors["visited"] == SINCE

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace some tensors, with what follows from them and what the host must know of it."""
        self.tensors.update(tensors)
        counts = self.tensors["counts"]
        if self.counted is not None:
            rate = base_rate(*counts)
            self.prior = rate.reshape(()) if self.num_labels is None else rate
        if not has_values(counts):
            return  # on the meta device: what the host knew stays
        self.cap = cap(self.beta, self.prior)
        self.steps = int(self.tensors["steps"])
        self.past_warmup = self.steps >= self.warmup
        if isinstance(self.rule, Climb):
            self.cost = self.rule.cost(self.beta, self.prior, *counts)
            # Tensors, since numbers that change would compile a graph anew.
            zero = torch.zeros_like(self.tensors["accuracy"])
            self.limits = zero, zero + self.cap

    def mean(self) -> Tensor:
        """Mean level of the rows trained so far; of all rows if there are none."""
        rows = self.trained
        return self.alpha[rows].mean() if bool(rows.any()) else self.alpha.mean()

    def grow(self, rows: int) -> None:
        """Add rows that were never trained; by the default rule they have the mean level."""
        level = self.tensors.get("mean_level", 0.0)
        start = {"alpha": level, "sample_accuracy": FollowSlope.unknown, "visited": NEVER}
        for name in start.keys() & self.tensors.keys():
            column = self.tensors[name]
            new = column.new_empty(rows - len(column)).fill_(start[name])
            self.tensors[name] = torch.cat((column, new))

    # -- a batch

    def wanted(self, rows: Tensor, alpha: Tensor, prior: float | Tensor) -> Wanted:
        """What to look at in a batch of these levels, to which the prior broadcasts."""
        climbs = isinstance(self.rule, Climb)
        # At 1/2 nothing depends on the labels.
        half = not isinstance(self.prior, Tensor) and self.prior == 0.5
        shape = tuple(prior.shape) if isinstance(prior, Tensor) else ()
        labels = shape if self.counted is not None or (climbs and not half) else None
        share = self._weights(alpha, rows) if self.weighted else None
        return Wanted(climbs and self.past_warmup, self.remembers, labels, share)

    def _weights(self, alpha: Tensor, rows: Tensor | slice) -> Tensor:
        """What samples of these levels weigh in the prior; before the first, their hardness."""
        if isinstance(self.rule, FollowSlope) and not self.past_warmup:
            return self.rule.hardness(self.tensors["sample_accuracy"][rows])
        return alpha

    @torch.no_grad()
    def note(self, rows: Tensor, alpha: Tensor, seen: Seen, partial: bool) -> None:
        """Count the labels of a batch of these levels, and write what it shows.

        `partial`: a sample may have no valid element.
        """
        tensors = self.tensors
        if seen.counts is not None:
            tensors["elements"].add_(seen.counts[0])
            tensors["positives"].add_(seen.counts[1])
        if seen.hits is not None and isinstance(self.rule, FollowSlope):
            old = tensors["sample_accuracy"].index_select(0, rows)
            new = self.rule.remembered(old, seen.hits)
            if partial:  # without a valid element nothing was right or wrong
                new = torch.where(new.isnan(), old, new)
            write(tensors["sample_accuracy"], rows, new)
        if seen.slopes is not None and isinstance(self.rule, Climb):
            reached = tensors["accuracy"], tensors["best_accuracy"]
            new = self.rule.climbed(alpha, self.beta * seen.slopes, self.cost, *reached)
            write(self.alpha, rows, new, self.limits)
        tensors["visited"].index_fill_(0, rows, SINCE)

    # -- an epoch

    def step(self, reading: Reading, group: dist.ProcessGroup | None) -> Tensor:
        """Merge what the processes noted, move by the rule; return the rows that were trained."""
        tensors, moved = self.tensors, self.moved
        # Nothing changes before all processes have answered.
        fresh = reduced(torch.stack((tensors["elements"], tensors["positives"])), group)
        if world_size(group) > 1:
            # Levels that only a step moves are the same on all ranks.
            own = "alpha" if isinstance(self.rule, Climb) else "sample_accuracy"
            new, moved = merged({k: v for k, v in tensors.items() if k == own}, moved, group)
            tensors.update(new)
        counts = tensors["counts"]
        if not self.weighted:
            counts = counts + fresh
        elif bool((fresh[0] > 0).all()):
            # Of the last epoch alone, as many as there are elements at the mean weight.
            counts = fresh / float(self._weights(self.alpha, slice(None)).mean())
        visited = (moved | self.trained).to(torch.uint8)  # all of them BEFORE
        none = {name: torch.zeros_like(tensors[name]) for name in ("elements", "positives")}
        self.hold({"visited": visited, "counts": counts, "steps": tensors["steps"] + 1, **none})
        self.hold(self._moved(reading))
        return moved

    def _moved(self, reading: Reading) -> dict[str, Tensor]:
        """What the rule makes of a reading."""
        rule, tensors, alpha = self.rule, self.tensors, self.alpha
        if isinstance(rule, Climb):
            accuracy = torch.full_like(tensors["accuracy"], reading.accuracy)
            best = torch.maximum(accuracy, tensors["best_accuracy"])
            alpha = alpha.clamp(max=self.cap)
            return {"accuracy": accuracy, "best_accuracy": best, "alpha": alpha}
        if not self.past_warmup:
            return {}
        mean = rule.level if self.steps == self.warmup else float(tensors["mean_level"])
        mean = rule.after_step(mean, reading.slope, self.beta, self.cap)
        # Without a focus all samples are alike.
        accuracy = tensors.get("sample_accuracy", torch.zeros_like(alpha))
        alpha = rule.levels(mean, self.cap, accuracy, self.trained)
        return {"alpha": alpha, "mean_level": torch.full_like(tensors["mean_level"], mean)}

    # -- loading

    def refusal(self, saved: Mapping[str, Any]) -> str | None:
        """Why a saved state does not fit, in a sentence; None if it does."""
        alpha, setting, rows = saved.get("alpha"), saved.get("setting"), len(self.alpha)
        if not isinstance(alpha, Tensor):
            return None  # torch says what is missing
        if not isinstance(setting, Tensor) or setting.shape != (2,) or "climbs" in saved:
            return _expected("be of version 0.3 or later", "one of another version", "train anew")
        if alpha.shape != self.alpha.shape:
            grow = f", load, then `resize({rows})`" * (alpha.numel() < rows)
            remedy = f"build the criterion with num_samples={alpha.numel()}{grow}"
            return _expected(f"have {rows} levels", f"{alpha.numel()}", remedy)
        if alpha.is_meta or setting.is_meta:
            return None
        mine = torch.tensor(self.setting, dtype=torch.float32, device="cpu")
        if setting.float().tolist() != mine.tolist():
            got, remedy = _rule_of(*setting.tolist()), "build the criterion with that rule"
            return _expected(f"be of the rule {self.rule}", got, remedy)
        counts, own, high = saved.get("counts"), self.tensors["counts"], self.cap
        if self.counted and isinstance(counts, Tensor) and counts.shape == own.shape:
            high = cap(self.beta, base_rate(*counts))
        wrong = alpha[~((alpha >= 0) & (alpha <= high + 1e-6))]
        if not wrong.numel():
            return None
        return _expected(
            f"hold levels in [0, {high:.4g}], the cap at beta={self.beta:g}",
            f"one of {float(wrong[0]):.4g}",
            "build the criterion with the beta and prior that it was trained with",
        )


def strength_of(beta: float | None, prior: float | Tensor | str, num_labels: int | None) -> float:
    """The checked strength; None is the largest for a number, and 1 for what may move."""
    if isinstance(prior, str):
        _errors.choice("prior", prior, ("observed", "level_weighted"))
        if isinstance(beta, (int, float)) and 1 < beta <= 2:
            remedy = "a strength of 2, the paper's, needs `prior=0.5`"
            refuse("beta", "be at most 1 with a prior that is counted", beta, remedy)
    elif isinstance(prior, Tensor) and num_labels not in (None, prior.numel()):
        refuse("prior", f"have num_labels={num_labels} values", f"{prior.numel()} values")
    if beta is not None:
        _errors.positive("beta", beta, 1.0 if isinstance(prior, str) else 2.0)
    if isinstance(prior, Tensor) and has_values(prior):
        prior = prior.cpu()  # to be looked at on any device
    chosen = beta if isinstance(prior, str) else _inputs.ranges(0.0, beta, prior, every=True)
    return 1.0 if chosen is None else float(chosen)


def _rule_of(kind: float, value: float) -> str:
    if kind == 0:
        return f"one of the default rule with focus={value:g}"
    return f"one of the published rule for {'max_entropy' if value else 'calibration'}"


def _expected(expected: str, got: str, remedy: str) -> str:
    return f"Expected the saved levels to {expected}, but got {got}; {remedy}"
