"""The levels of the training samples: their rule, the table, and its merge between processes.

The rule is pure functions of tensors. The table only stores levels and carries its state through
torch's tools. The merge is pure except for the reduction that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks
from .._batch import FRACTION, home, readable
from .._checks import sentence

__all__ = [
    "Climb",
    "Epoch",
    "Levels",
    "Rule",
    "cap",
    "climbed",
    "mean_by_row",
    "merged",
    "next_epoch",
]

Table = TypeVar("Table", bound="Levels")

LARGEST_BUDGET = 0.45  # doubt: at 1/2 a label would carry no information
MARGIN = 0.01  # below the level that would take a label to 1/2
MEMORY = 0.9  # weight of the past in a sample's running accuracy, at each visit
UNKNOWN = 0.5  # accuracy of a sample before its first visit
CARRIED = 0.5  # share of the gap between confidence and accuracy that a step adds to the budget
GAIN = 0.1  # change of strength per step for a calibration slope that is off by 1

_SET = 1 << 9  # rows up to which a set finds duplicates faster than tensors
_CELLS = 8  # cells per row: one row in sixteen finds its cell taken
_CHUNK = 1 << 24  # rows that a step works on at a time: bounds its extra memory


# -- the rule


class Rule(NamedTuple):
    """What stays the same in training."""

    objective: str
    lr: float
    penalty: float
    solver: str
    reference_accuracy: float | None


class Climb(NamedTuple):
    """What moves a level in a batch, apart from the batch."""

    rule: Rule
    beta: float
    kappa: float | Tensor
    cap: float | Tensor
    rate: float | Tensor  # step size along the slope
    pull: float | Tensor  # by which the constraint divides what exceeds the budget


class Epoch(NamedTuple):
    """What a step sets, as 0-d tensors, so that a new value recompiles nothing."""

    steps: Tensor
    accuracy: Tensor
    best_accuracy: Tensor
    budget: Tensor
    difficulty: Tensor  # mean of (1 - sample accuracy)^focus among the samples seen
    climbs: Tensor  # bool: whether levels climb with each batch or are set by the step alone


def cap(beta: float, prior: float | Tensor) -> float | Tensor:
    """The highest level that leaves both labels on their side of 1/2."""
    if isinstance(prior, Tensor):
        farther = torch.maximum(prior, 1 - prior).max()
        return (1 / (2 * farther * beta) - MARGIN).clamp(max=1.0)
    return min(1.0, 1 / (2 * max(prior, 1 - prior) * beta) - MARGIN)


def cost(beta: float, prior: float | Tensor, counts: Tensor) -> float | Tensor:
    """Kappa, what a level of 1 costs in confidence: mean of beta (1 - c if y >= 1/2, else c).

    `counts` has three rows: number of elements, sum of their labels, number of labels of at least
    1/2. They are not needed at c = 1/2. 0 before anything was counted.
    """
    if not isinstance(prior, Tensor) and prior == 0.5:
        return beta / 2
    count, _, high = wide(counts)
    c = wide(prior).reshape(-1) if isinstance(prior, Tensor) else prior
    total = (high * (1 - c) + (count - high) * c).sum()
    kappa: Tensor = beta * total / count.sum().clamp(min=1)
    return kappa.float().to(counts.device)


def base_rate(counts: Tensor) -> Tensor:
    """(N+ + 1/2) / (N + 1) of each label."""
    count, total, _ = wide(counts)
    rate: Tensor = (total / FRACTION + 0.5) / (count + 1)
    return rate.float().to(counts.device)


def wide(value: Tensor) -> Tensor:
    """The value in float64, on the CPU if its device has none."""
    return value.to(home(value.device)).double()


def climb(rule: Rule, beta: float, kappa: float | Tensor, highest: float | Tensor) -> Climb:
    """What moves levels between two steps.

    The explicit solver steps by lr. The others climb in doubt, kappa alpha, so that the speed
    does not depend on the strength.
    """
    rate = rule.lr if rule.solver == "explicit" else rule.lr / kappa**2
    return Climb(rule, beta, kappa, highest, rate, 1 + rule.lr * rule.penalty / kappa)


def climbed(climb: Climb, alpha: Tensor, slope: Tensor, budget: Tensor, epoch: Epoch) -> Tensor:
    """New levels after one step along the gradient of the expected loss, in [0, cap]."""
    rule, kappa, rate = climb.rule, climb.kappa, climb.rate
    new = alpha + rate * (slope if climb.beta == 1 else climb.beta * slope)
    if rule.objective == "max_entropy":
        reference = epoch.best_accuracy
        if rule.reference_accuracy is not None:
            reference = torch.full_like(reference, rule.reference_accuracy)
        new = new + rate * rule.penalty * (epoch.accuracy - reference).clamp(max=0)
    elif rule.solver == "explicit":
        new = new + rate * rule.penalty * (budget - kappa * alpha).clamp(max=0)
    else:
        # The penalty at the new level instead of the old one: a contraction for every strength.
        # Below the budget it would pull upwards, so take the lower of the two.
        rest = budget / kappa
        new = torch.minimum(new, (new - rest).div_(climb.pull).add_(rest))
    if isinstance(kappa, Tensor):
        new = torch.where(kappa > 0, new, alpha)
    if isinstance(climb.cap, Tensor):
        return new.clamp(min=0.0).clamp(max=climb.cap)
    return new.clamp(0.0, climb.cap)


def shared_out(focus: float, budget: Tensor, accuracy: Tensor, difficulty: Tensor) -> Tensor:
    """The budget of each sample: more for those that are often wrong."""
    hardness = torch.rsub(accuracy, 1).pow(focus)
    # If every sample seen is perfect, all are alike: a division by 0 counts as 1.
    weight = (hardness / difficulty).nan_to_num_(1.0, 1.0)
    return weight.mul_(budget).clamp_(max=LARGEST_BUDGET)


def remembered(accuracy: Tensor, hits: Tensor) -> Tensor:
    """A sample's running accuracy after one more visit."""
    return torch.add(MEMORY * accuracy, hits, alpha=1 - MEMORY)


def next_epoch(
    rule: Rule,
    epoch: Epoch,
    accuracy: float,
    confidence: float | None,
    doubt: float | None,
    highest: float,
) -> Epoch:
    """The epoch that follows a step.

    `doubt` is the mean of kappa alpha over the rows that moved, None if none moved or the warm-up
    lasts; `highest` is the doubt at the cap.
    """
    budget = epoch.budget
    if rule.objective == "calibration":
        budget = torch.full_like(budget, 1 - accuracy)
    elif rule.objective == "feedback" and doubt is not None and confidence is not None:
        # Start from the doubt that the levels have reached: the budget must not run ahead while
        # they still climb, nor wind up below 0, which would hold them at 0 long afterwards.
        used = min(max(float(budget), 0.0), doubt)
        used += CARRIED * (confidence - accuracy)
        used = min(max(used, -LARGEST_BUDGET), LARGEST_BUDGET, highest)
        budget = torch.full_like(budget, used)
    return epoch._replace(
        steps=epoch.steps + 1,
        accuracy=torch.full_like(epoch.accuracy, accuracy),
        best_accuracy=epoch.best_accuracy.clamp(min=accuracy),
        budget=budget,
    )


def shared_level(level: float, slope: float, beta: float, highest: float) -> float:
    """The level of all samples after a step that measured a calibration slope.

    Below 1 the logits are too large and the strength grows; above 1 it falls. A slope that could
    not be fitted changes nothing.
    """
    if not math.isnan(slope):
        level += GAIN * min(max(1 - slope, -1.0), 1.0) / beta
    return min(max(level, 0.0), highest)


def mean_difficulty(focus: float, accuracy: Tensor, seen: Tensor) -> Tensor:
    """Mean of (1 - accuracy)^focus over the samples seen, of which there must be one."""
    total, count = 0.0, 0
    for start in range(0, len(seen), _CHUNK):
        rows = slice(start, start + _CHUNK)
        hardness = (1 - accuracy[rows]) ** focus
        hardness = torch.where(seen[rows], hardness, 0.0)
        total += float(hardness.to(home(hardness.device)).sum(dtype=torch.float64))
        count += int(seen[rows].sum())
    return accuracy.new_tensor(total / count)


class ByRow(NamedTuple):
    """Means over the places of a batch that share a row, returned at each of these places."""

    group: Tensor  # number of the row's group, for each place
    valid: Tensor
    places: Tensor  # number of valid places that share the row, for each place

    @property
    def any(self) -> Tensor:
        return self.places > 0

    def mean(self, values: Tensor) -> Tensor:
        return self.total(torch.where(self.valid, values, 0.0)) / self.places.clamp(min=1)

    def total(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, self.group, values)[self.group]


def distinct(rows: Tensor) -> bool:
    """Whether no row occurs twice, found by the host in O(batch): sorting takes longer."""
    count = len(rows)
    if count <= _SET:
        return len(set(rows.tolist())) == count
    # Each row writes its place into the cell of its last bits. A row that finds another place
    # there shares these bits with another row.
    place = torch.arange(count, dtype=torch.int32, device="cpu")
    cells = 1 << (_CELLS * count).bit_length()
    cell = rows & (cells - 1)
    holder = torch.empty(cells, dtype=torch.int32, device="cpu").scatter_(0, cell, place)
    other = holder.index_select(0, cell)
    if torch.equal(other, place):
        return True
    lost = (other != place).nonzero()[:, 0]
    losers = rows[lost]
    if bool((rows[other[lost]] == losers).any()):
        return False
    if 2 * len(losers) > count:  # many rows with equal last bits, as in a range with a large step
        ordered = rows.sort()[0]
        return not bool((ordered[1:] == ordered[:-1]).any())
    return distinct(losers)


def mean_by_row(rows: Tensor, valid: Tensor) -> ByRow:
    """Group the places of a batch by row: by sorting, since torch.unique waits for its size."""
    ordered, order = rows.sort(stable=True)
    starts = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0, dtype=torch.int64)
    group = torch.empty_like(order).scatter_(0, order, starts)
    ones = valid.float()
    return ByRow(group, valid, torch.zeros_like(ones).index_add_(0, group, ones)[group])


# -- the table

HEAD = 16  # bytes: a seed and a rank, in front of a generator's state
NEVER, BEFORE, SINCE = 0, 1, 2  # when a row was last trained, relative to the last step


class Levels(nn.Module):
    """One level per sample, and the rest of the state that training depends on.

    The tensors are plain attributes: DistributedDataParallel would overwrite a registered buffer
    at each forward, and ``half()`` would cast it. They move with the module and are saved in its
    ``state_dict``. They are listed as buffers if this very module is asked for its own, as FSDP2
    and torch.distributed.checkpoint do.
    """

    alpha: Tensor
    visited: Tensor
    sample_accuracy: Tensor
    steps: Tensor
    accuracy: Tensor
    best_accuracy: Tensor
    budget: Tensor
    difficulty: Tensor
    climbs: Tensor
    counts: Tensor
    fresh: Tensor
    setting: Tensor
    num_samples: int | None
    generator: torch.Generator | None = None

    def __init__(self, rows: int, focus: float, labels: int, objective: int) -> None:
        super().__init__()
        self._size = (rows, labels)
        self._setting = (float(objective), float(focus))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again from level 0."""
        rows, labels = self._size
        device = self.alpha.device if hasattr(self, "alpha") else None
        # Independent of torch's default dtype.
        single: dict[str, Any] = {"dtype": torch.float32, "device": device}
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        held = {
            "alpha": torch.zeros(rows, **single),
            "visited": torch.full((rows,), NEVER, dtype=torch.uint8, device=device),
            "steps": torch.zeros((), **whole),
            "accuracy": torch.zeros((), **single),
            "best_accuracy": torch.zeros((), **single),
            "budget": torch.zeros((), **single),
            "difficulty": torch.full((), (1 - UNKNOWN) ** self._setting[1], **single),
            "climbs": torch.ones((), dtype=torch.bool, device=device),
            # Elements, sum of labels in fractions, labels of at least 1/2: up to the last step,
            # and since then in this process.
            "counts": torch.zeros(3, labels, **whole),
            "fresh": torch.zeros(3, labels, **whole),
            "setting": torch.tensor(self._setting, **single),
        }
        if self.focused:
            held["sample_accuracy"] = torch.full((rows,), UNKNOWN, **single)
        self.hold(held)

    @property
    def focused(self) -> bool:
        return self._setting[1] > 0

    @property
    def columns(self) -> dict[str, Tensor]:
        """The columns that a merge averages between processes, by name."""
        names = ("alpha", "sample_accuracy") if self.focused else ("alpha",)
        return {name: getattr(self, name) for name in names}

    def held(self) -> dict[str, Tensor]:
        """Every tensor of the state, by name."""
        others = ("visited", "counts", "fresh", "setting", *Epoch._fields)
        return {**self.columns, **{name: getattr(self, name) for name in others}}

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors of the state."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    @property
    def epoch(self) -> Epoch:
        """The values that the last step set."""
        return Epoch(*(getattr(self, name) for name in Epoch._fields))

    def grow(self, rows: int) -> None:
        """Add rows that were never trained."""
        start = {"alpha": 0.0, "visited": NEVER, "sample_accuracy": UNKNOWN}
        old = {**self.columns, "visited": self.visited}
        extra = rows - len(self.alpha)
        self.hold(
            {name: torch.cat((v, v.new_full((extra,), start[name]))) for name, v in old.items()}
        )
        self._size = (rows, self._size[1])

    @property
    def trained(self) -> Tensor:
        """The rows that any process trained up to the last step, or this one since then."""
        return self.visited != NEVER

    def mean_level(self, rows: Tensor) -> Tensor:
        """Mean level of these rows; of all rows if there are none."""
        rows = rows | ~rows.any()
        return torch.where(rows, self.alpha, 0.0).sum() / rows.sum()

    def observe(
        self, rows: Tensor, slopes: Tensor, hits: Tensor | None, focus: float, climb: Climb | None
    ) -> Tensor | None:
        """Move the rows of a batch; a row without a valid and finite slope stays.

        Returns the number of samples without one; None if all have one.
        """
        # If rows are distinct and slopes finite, as in most batches on a CPU, no means are needed.
        plain = readable(rows) and math.isfinite(float(slopes.sum())) and distinct(rows)
        finite = None if plain else slopes.isfinite()
        by_row = None if finite is None else mean_by_row(rows, finite)

        def mean(values: Tensor) -> Tensor:
            return values if by_row is None else by_row.mean(values)

        def keep(column: Tensor, old: Tensor, new: Tensor) -> None:
            if by_row is None:
                column.scatter_(0, rows, new)  # half the time of index_copy_
            else:
                column.index_copy_(0, rows, torch.where(by_row.any, new, old))

        budget = self.budget
        if hits is not None:
            old = self.sample_accuracy.index_select(0, rows)
            recent = remembered(old, mean(hits))  # first, so that the budget is of this forward
            budget = shared_out(focus, budget, recent, self.difficulty)
            keep(self.sample_accuracy, old, recent)
        if climb is not None:
            old = self.alpha.index_select(0, rows)
            keep(self.alpha, old, climbed(climb, old, mean(slopes), budget, self.epoch))
        if by_row is None:
            self.mark(rows)
        else:
            before = self.visited.index_select(0, rows)
            keep(self.visited, before, torch.full_like(before, SINCE))
        return None if finite is None else len(rows) - finite.sum()

    def mark(self, rows: Tensor) -> None:
        """Mark these rows as trained since the last step."""
        if readable(rows):
            self.visited.scatter_(0, rows, self.visited.new_full(rows.shape, SINCE))
        else:
            self.visited.index_fill_(0, rows, SINCE)

    def merge(self, columns: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Tensor:
        """Merge columns between processes; return the rows that any of them has moved."""
        moved = self.visited == SINCE
        if world_size(group) > 1:
            new, moved = merged(columns, moved, lambda total: dist.all_reduce(total, group=group))
            self.hold(new)
        before = torch.where(self.visited == NEVER, NEVER, BEFORE)
        self.visited = torch.where(moved, BEFORE, before).to(torch.uint8)
        return moved

    def resize(self, num_samples: int) -> None:
        """Grow the table to ``num_samples`` rows for new training data; they start at level 0.

        Args:
            num_samples: number of training samples, not smaller than before.

        Raises:
            ValueError: fewer rows than before, or a module with one shared level.
            TypeError: ``num_samples`` is not an int.

        Example:
            >>> from sc_bce import AdaptivePerturbation
            >>> criterion = AdaptivePerturbation(num_samples=2)
            >>> criterion.resize(3)
            >>> criterion.alpha
            tensor([0., 0., 0.])
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

    def _apply(self: Table, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = self.held()
        moved = {name: fn(tensor) for name, tensor in held.items()}
        for name, new in moved.items():
            # Follow the device but not the dtype: bfloat16 would lose steps below 1/256.
            if new.dtype != held[name].dtype:
                moved[name] = held[name].to(new.device)
        self.hold(moved)
        return self

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:  # FSDP2 asks module by module, DistributedDataParallel recurses from a root
            for name, tensor in self._saved().items():
                yield f"{prefix}.{name}" if prefix else name, tensor

    def _saved(self) -> dict[str, Tensor]:
        if self.generator is None:
            return self.held()
        return {**self.held(), "generator": packed(self.generator).to(self.alpha.device)}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._saved().items():
            # A copy, so that what a tool loads into it in place goes through load_state_dict.
            destination[prefix + name] = tensor.clone()

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
        given, hooks = dict(state_dict), self._load_state_dict_pre_hooks
        rest = (strict, missing_keys, unexpected_keys, error_msgs)
        for hook in hooks.values():  # a hook may rename keys
            hook(given, prefix, local_metadata, *rest)
        own = {key[len(prefix) :]: given[key] for key in given if key.startswith(prefix)}
        saved = _of_any_version(own, self)
        problem = self.refusal(saved)
        if problem is not None:  # before anything is loaded
            error_msgs.append(problem)
            return
        names = self._saved().keys()
        others = {prefix + name: value for name, value in own.items() if name in self._buffers}
        self._load_state_dict_pre_hooks = type(hooks)()  # they have run
        try:
            super()._load_from_state_dict(others, prefix, local_metadata, *rest)
        finally:
            self._load_state_dict_pre_hooks = hooks
        if strict:
            missing_keys.extend(prefix + name for name in names if name not in saved)
            known = names | self._buffers.keys()
            unexpected_keys.extend(prefix + name for name in saved if name not in known)
        found = {name: saved[name] for name in names if name in saved and name != "generator"}
        assign = local_metadata.get("assign_to_params_buffers", False) or self.alpha.is_meta
        # One device for all tensors: a broadcast delivers scalars on the CPU.
        like = found.get("alpha", self.alpha) if assign else self.alpha
        self.hold(
            {
                name: value.detach().to(like.device, getattr(self, name).dtype, copy=True)
                for name, value in found.items()
            }
        )
        if self.generator is not None and "generator" in saved:
            unpack(saved["generator"].cpu(), self.generator)

    def refusal(self, saved: Mapping[str, Tensor]) -> str | None:
        """Why a saved state does not fit this table, in a sentence; None if it does."""
        return None


def _of_any_version(saved: Mapping[str, Any], table: Levels) -> dict[str, Any]:
    """A saved state under today's names; version 0.1 kept two bools and counted no labels."""
    new = dict(saved)
    if "moved" not in new or "visited" in new:
        return new
    moved, ever = new.pop("moved"), new.pop("seen", new.get("alpha", table.alpha) > 0)
    new["visited"] = torch.where(moved, SINCE, torch.where(ever, BEFORE, NEVER)).to(torch.uint8)
    for name in ("counts", "fresh", "setting"):
        new[name] = getattr(table, name)
    new["climbs"] = torch.ones_like(table.epoch.climbs)
    return new


# -- between processes


def merged(
    columns: Mapping[str, Tensor], moved: Tensor, all_reduce: Callable[[Tensor], object]
) -> tuple[dict[str, Tensor], Tensor]:
    """The merged columns, and the rows that any process moved.

    A row becomes the mean of its values over the processes that moved it. The result is a copy,
    so that this process keeps a whole table if another dies during the merge.
    """
    new = {name: column.clone() for name, column in columns.items()}
    anywhere = moved.clone()
    for start in range(0, len(moved), _CHUNK):
        rows = slice(start, start + _CHUNK)
        own = moved[rows].float()
        movers = own.clone()
        all_reduce(movers)
        anywhere[rows] = movers > 0
        for name, column in columns.items():
            total = column[rows] * own
            all_reduce(total)
            new[name][rows] = torch.where(movers > 0, total / movers, column[rows])
    return new, anywhere


def world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if world_size(group) > 1 else 0


def reduced(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the processes."""
    if world_size(group) > 1:
        value = value.clone()
        dist.all_reduce(value, group=group)
    return value


def reseed(
    generator: torch.Generator, device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """Seed each process's generator anew, from the generator of rank 0.

    Right after it the checkpoint of one process restores all: seed and rank determine the state.
    """
    if world_size(group) > 1:
        seed = torch.zeros((), dtype=torch.int64, device=generator.device)
        seed.random_(0, 2**62, generator=generator)
        seed = reduced(seed.to(device) * (rank(group) == 0), group)
        generator.manual_seed(int(seed) + rank(group))


def packed(generator: torch.Generator) -> Tensor:
    """A generator's seed, rank and state in one tensor, whose size is the same on any world."""
    head = torch.tensor([generator.initial_seed(), rank(None)], dtype=torch.uint64, device="cpu")
    return torch.cat((head.view(torch.uint8), generator.get_state().cpu()))


def unpack(saved: Tensor, generator: torch.Generator) -> None:
    """Restore a generator; on a rank other than the saved one, from the seed of this rank."""
    if saved.dim() == 2:  # version 0.1, after a step: the states of all ranks
        if rank(None) < len(saved):
            generator.set_state(saved[rank(None)].clone())
    elif len(saved) == len(generator.get_state()):  # version 0.1, within an epoch
        generator.set_state(saved.clone())
    else:
        seed, served = (int(value) for value in saved[:HEAD].clone().view(torch.uint64))
        if served == rank(None):
            # A copy, since set_state reads a view from the start of its storage.
            generator.set_state(saved[HEAD:].clone())
        else:
            generator.manual_seed((seed - served + rank(None)) % 2**64)
