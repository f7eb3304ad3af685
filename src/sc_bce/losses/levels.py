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
from .._torch import has_values, reduced
from .measured import Reading
from .rules import Climb, FollowSlope, base_rate, cap
from .table import SINCE, Table

__all__ = ["Levels", "Rule", "strength_of"]

Rule = FollowSlope | Climb


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
        labels: int,
        warmup: int,
        device: torch.device | None,
    ) -> None:
        self.rule, self.beta, self.warmup = rule, beta, max(warmup, 1)
        self.counted = prior if isinstance(prior, str) else None
        self.prior: float | Tensor = 0.5 if isinstance(prior, str) else prior
        self.remembers = isinstance(rule, FollowSlope) and rule.focus > 0
        start = {"alpha": 0.0, "sample_accuracy": FollowSlope.unknown}
        self.table = Table(rows, start if self.remembers else {"alpha": 0.0}, device)
        single: dict[str, Any] = {"dtype": torch.float32, "device": device}
        slopes = isinstance(rule, FollowSlope)
        scalars = ("mean_level",) if slopes else ("accuracy", "best_accuracy")
        self.values = {
            "steps": torch.zeros((), dtype=torch.int64, device=device),
            # Numbers of elements and positives up to the last step; since then, in this process.
            "counts": torch.zeros(2, labels, **single),
            "elements": torch.zeros(labels, **single),
            "positives": torch.zeros(labels, **single),
            "setting": torch.tensor(self.setting, **single),
            **{name: torch.zeros((), **single) for name in scalars},
        }
        self.refresh()

    @property
    def setting(self) -> tuple[float, float]:
        """The rule as two numbers, saved so that no other rule goes on from this state."""
        if isinstance(self.rule, FollowSlope):
            return 0.0, self.rule.focus
        return 1.0, float(self.rule.objective == "max_entropy")

    @property
    def alpha(self) -> Tensor:
        return self.table.columns["alpha"]

    @property
    def weighted(self) -> bool:
        """Whether the prior is the base rate of samples weighted by their levels."""
        return self.counted == "level_weighted" and self.remembers

    def tensors(self) -> dict[str, Tensor]:
        return {**self.table.tensors(), **self.values}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self.values:
                self.values[name] = tensor
            else:
                self.table.hold(name, tensor)
        self.refresh()

    def refresh(self) -> None:
        """What follows from the state, and what the host must know of it."""
        counts = self.values["counts"]
        if self.counted is not None:
            self.prior = base_rate(*counts)
        if not has_values(counts):
            return  # on the meta device: what the host knew stays
        self.cap = cap(self.beta, self.prior)
        self.steps = int(self.values["steps"])
        self.past_warmup = self.steps >= self.warmup
        if isinstance(self.rule, Climb):
            self.cost = self.rule.cost(self.beta, self.prior, *counts)
            # Tensors, since numbers that change would compile a graph anew.
            zero = torch.zeros_like(self.values["accuracy"])
            self.limits = zero, zero + self.cap

    def mean(self) -> Tensor:
        """Mean level of the rows trained so far; of all rows if there are none."""
        rows = self.table.trained
        return self.alpha[rows].mean() if bool(rows.any()) else self.alpha.mean()

    # -- a batch

    def wanted(self, rows: Tensor, alpha: Tensor, prior: float | Tensor) -> Wanted:
        """What to look at in a batch of these levels, to which the prior broadcasts."""
        climbs, share = isinstance(self.rule, Climb), None
        if self.weighted and isinstance(self.rule, FollowSlope):
            share = alpha
            if not self.past_warmup:
                share = self.rule.hardness(self.table.look_up("sample_accuracy", rows))
        # At 1/2 nothing depends on the labels.
        half = not isinstance(self.prior, Tensor) and self.prior == 0.5
        shape = tuple(prior.shape) if isinstance(prior, Tensor) else ()
        labels = shape if self.counted is not None or (climbs and not half) else None
        return Wanted(climbs and self.past_warmup, self.remembers, labels, share)

    @torch.no_grad()
    def note(self, rows: Tensor, alpha: Tensor, seen: Seen, partial: bool) -> None:
        """Count the labels of a batch of these levels, and write what it shows.

        `partial`: a sample may have no valid element.
        """
        table, values = self.table, self.values
        if seen.counts is not None:
            values["elements"].add_(seen.counts[0])
            values["positives"].add_(seen.counts[1])
        if seen.hits is not None and isinstance(self.rule, FollowSlope):
            old = table.look_up("sample_accuracy", rows)
            new = self.rule.remembered(old, seen.hits)
            if partial:  # without a valid element nothing was right or wrong
                new = torch.where(new.isnan(), old, new)
            table.write("sample_accuracy", rows, new)
        if seen.slopes is not None and isinstance(self.rule, Climb):
            reached = values["accuracy"], values["best_accuracy"]
            new = self.rule.climbed(alpha, self.beta * seen.slopes, self.cost, *reached)
            table.write("alpha", rows, new, self.limits)
        table.mark(rows)

    # -- an epoch

    @property
    def idle(self) -> bool:
        """Whether no sample was trained since the last step."""
        return not bool((self.table.visited == SINCE).any())

    def step(self, reading: Reading, group: dist.ProcessGroup | None) -> Tensor:
        """Merge what the processes noted, move by the rule; return the rows that were trained."""
        # Levels that only a step moves are the same on all ranks.
        climbs = isinstance(self.rule, Climb)
        names = [name for name in self.table.columns if name != "alpha" or climbs]
        moved = self.table.merge(names, group)
        fresh = reduced(torch.stack((self.values["elements"], self.values["positives"])), group)
        counts = self.values["counts"]
        if not self.weighted:
            counts = counts + fresh
        elif bool((fresh[0] > 0).all()):
            # Of the last epoch alone, as many as there are elements at the mean weight.
            counts = fresh / self._mean_weight()
        none = {name: torch.zeros_like(self.values[name]) for name in ("elements", "positives")}
        self.hold({"counts": counts, "steps": self.values["steps"] + 1, **none})
        self.hold(self._climbed(reading) if isinstance(self.rule, Climb) else self._shared(reading))
        return moved

    def _mean_weight(self) -> float:
        if isinstance(self.rule, FollowSlope) and not self.past_warmup:
            return float(self.rule.hardness(self.table.columns["sample_accuracy"]).mean())
        return float(self.alpha.mean())

    def _climbed(self, reading: Reading) -> dict[str, Tensor]:
        accuracy = torch.full_like(self.values["accuracy"], reading.accuracy)
        best = torch.maximum(accuracy, self.values["best_accuracy"])
        alpha = self.alpha.clamp(max=self.cap)
        return {"accuracy": accuracy, "best_accuracy": best, "alpha": alpha}

    def _shared(self, reading: Reading) -> dict[str, Tensor]:
        rule = self.rule
        if not self.past_warmup or not isinstance(rule, FollowSlope):
            return {}
        mean = rule.level if self.steps == self.warmup else float(self.values["mean_level"])
        mean = rule.after_step(mean, reading.slope, self.beta, self.cap)
        alpha = torch.full_like(self.alpha, mean)
        if self.remembers:
            accuracy = self.table.columns["sample_accuracy"]
            alpha = rule.levels(mean, self.cap, accuracy, self.table.trained)
        return {"alpha": alpha, "mean_level": torch.full_like(self.values["mean_level"], mean)}

    def grow(self, rows: int) -> None:
        """Add rows that were never trained; by the default rule they have the mean level."""
        before = len(self.table)
        self.table.grow(rows)
        if "mean_level" in self.values:
            self.alpha[before:] = self.values["mean_level"]

    # -- loading

    def refusal(self, saved: Mapping[str, Any]) -> str | None:
        """Why a saved state does not fit, in a sentence; None if it does."""
        alpha, setting = saved.get("alpha"), saved.get("setting")
        if not isinstance(alpha, Tensor):
            return None  # torch says what is missing
        if not isinstance(setting, Tensor) or "climbs" in saved:
            return _expected("be of version 0.3 or later", "one of another version", "train anew")
        if alpha.shape != self.alpha.shape:
            grow = f", load, then `resize({len(self.alpha)})`" * (len(alpha) < len(self.alpha))
            remedy = f"build the criterion with num_samples={len(alpha)}{grow}"
            return _expected(f"have {len(self.alpha)} levels", f"{alpha.numel()}", remedy)
        mine = torch.tensor(self.setting, dtype=torch.float32, device="cpu").tolist()
        if not setting.is_meta and setting.float().tolist() != mine:
            return _expected(
                f"be of the rule {self.rule}",
                "one of " + _rule_of(setting.tolist()), "build the criterion with that rule",
            )  # fmt: skip
        return self._too_high(alpha, saved.get("counts"))

    def _too_high(self, alpha: Tensor, counts: Any) -> str | None:
        if alpha.is_meta or not alpha.numel():
            return None
        high = self.cap
        if self.counted is not None and isinstance(counts, Tensor):
            high = cap(self.beta, base_rate(*counts))
        low, most = float(alpha.min()), float(alpha.max())
        if most <= high + 1e-6 and low >= 0:
            return None
        return _expected(
            f"hold levels in [0, {high:.4g}], the cap at beta={self.beta:g}",
            f"one of {low if low < 0 else most:.4g}",
            "build the criterion with the beta and prior that it was trained with",
        )


def strength_of(beta: float | None, prior: float | Tensor | str, num_labels: int | None) -> float:
    """The checked strength; None is the largest for a number, and 1 for what may move."""
    high, most = 1.0, 1.0
    if isinstance(prior, Tensor):
        if num_labels is not None and prior.numel() != num_labels:
            wanted = f"have num_labels={num_labels} values"
            refuse("prior", wanted, f"{prior.numel()} values")
        c = _inputs.prior_buffer(prior)
        high = 1 / float(torch.maximum(c, 1 - c).max()) if c.numel() and not c.is_meta else 2.0
    elif isinstance(prior, str):
        _errors.choice("prior", prior, ("observed", "level_weighted"))
        if isinstance(beta, (int, float)) and 1 < beta <= 2:
            remedy = "a strength of 2, the paper's, needs `prior=0.5`"
            refuse("beta", "be at most 1 with a prior that is counted", beta, remedy)
    else:
        _errors.inside("prior", prior, 0.0, 1.0, remedy="pass `torch.as_tensor(prior)`")
        high = most = 1 / max(prior, 1 - prior)
    if beta is None:
        return most
    _errors.positive("beta", beta, high)
    return float(beta)


def _rule_of(setting: list[float]) -> str:
    kind, value = setting
    if kind == 0:
        return f"the default rule with focus={value:g}"
    return f"the published rule for {'max_entropy' if value else 'calibration'}"


def _expected(expected: str, got: str, remedy: str) -> str:
    return f"Expected the saved levels to {expected}, but got {got}; {remedy}"
