"""The levels of the training samples: their rule, the table, and its merge between processes.

The rule is pure functions of tensors; the table only stores, and carries its state through
torch's tools; the merge is pure but for the reduction that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _checks
from ._batch import FRACTION, home, readable
from ._checks import sentence

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

LARGEST_BUDGET = 0.45  # of doubt: labels keep clear of the flip that would hide them
MARGIN = 0.01  # of the level that would take a label to 1/2
MEMORY = 0.9  # of a sample's running accuracy, at each visit
UNKNOWN = 0.5  # accuracy of a sample before its first visit
CARRIED = 0.5  # of the gap between confidence and accuracy, at each step
GAIN = 0.1  # of strength, at each step, for a calibration slope that is off by 1

_SET = 1 << 9  # rows, up to which a set finds duplicates more quickly than tensors
_CELLS = 8  # for each row: one in sixteen finds its cell taken
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
    """All that moves a level with a batch, beside the batch."""

    rule: Rule
    beta: float
    kappa: float | Tensor
    cap: float | Tensor
    rate: float | Tensor  # of a step along the slope
    pull: float | Tensor  # of the constraint, at the new level


class Epoch(NamedTuple):
    """What a step sets, 0-d tensors: a new value recompiles nothing."""

    steps: Tensor
    accuracy: Tensor
    best_accuracy: Tensor
    budget: Tensor
    difficulty: Tensor  # mean of (1 - sample accuracy)^focus among the samples seen
    climbs: Tensor  # bool: whether levels climb with each batch, or are set by the step alone


def cap(beta: float, prior: float | Tensor) -> float | Tensor:
    """The highest level that leaves both labels on their side of 1/2."""
    if isinstance(prior, Tensor):
        farther = torch.maximum(prior, 1 - prior).max()
        return (1 / (2 * farther * beta) - MARGIN).clamp(max=1.0)
    return min(1.0, 1 / (2 * max(prior, 1 - prior) * beta) - MARGIN)


def cost(beta: float, prior: float | Tensor, counts: Tensor) -> float | Tensor:
    """kappa, what a level of 1 costs in confidence: mean of beta (1 - c where y >= 1/2, else c).

    `counts` has three rows: elements, their labels summed, and those of at least 1/2. At c = 1/2
    they are not needed. 0 before anything was counted.
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
    """In float64, where the device has it, else on the CPU."""
    return value.to(home(value.device)).double()


def climb(rule: Rule, beta: float, kappa: float | Tensor, highest: float | Tensor) -> Climb:
    """What stays the same between two steps.

    The explicit solver steps by lr; every other climbs in doubt, kappa alpha, so that it climbs
    alike whatever the strength.
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
        # Below the budget it would pull up, so the lower of both is right on either side.
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
    # Where every sample seen is perfect, all are alike: what is divided by 0 counts as 1.
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

    `doubt` is the mean of kappa alpha over the rows that moved, None where none did or none may
    yet; `highest` is the doubt at the cap.
    """
    budget = epoch.budget
    if rule.objective == "calibration":
        budget = torch.full_like(budget, 1 - accuracy)
    elif rule.objective == "feedback" and doubt is not None and confidence is not None:
        # From what the levels have followed: the budget must neither run ahead while they still
        # climb nor pile up below 0, where they can't go, and hold them there long after.
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

    Below 1 the logits are too large, and the strength grows; above 1 it falls. A slope that
    could not be fitted says nothing.
    """
    if not math.isnan(slope):
        level += GAIN * min(max(1 - slope, -1.0), 1.0) / beta
    return min(max(level, 0.0), highest)


def mean_difficulty(focus: float, accuracy: Tensor, seen: Tensor) -> Tensor:
    """Mean of (1 - accuracy)^focus among the samples seen, of which there is one."""
    total, count = 0.0, 0
    for start in range(0, len(seen), _CHUNK):
        rows = slice(start, start + _CHUNK)
        hardness = (1 - accuracy[rows]) ** focus
        hardness = torch.where(seen[rows], hardness, 0.0)
        total += float(hardness.to(home(hardness.device)).sum(dtype=torch.float64))
        count += int(seen[rows].sum())
    return accuracy.new_tensor(total / count)


class ByRow(NamedTuple):
    """Means over the places of a batch that share a row, given back to each such place."""

    group: Tensor  # of each place
    valid: Tensor
    places: Tensor  # valid ones of its row

    @property
    def any(self) -> Tensor:
        return self.places > 0

    def mean(self, values: Tensor) -> Tensor:
        return self.total(torch.where(self.valid, values, 0.0)) / self.places.clamp(min=1)

    def total(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values).index_add_(0, self.group, values)[self.group]


def distinct(rows: Tensor) -> bool:
    """Whether none is there twice, seen by the host in a time O(batch): sorting takes more."""
    count = len(rows)
    if count <= _SET:
        return len(set(rows.tolist())) == count
    # Each leaves its place in a cell of its last bits. Who finds another's there shares them.
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
    if 2 * len(losers) > count:  # rows of equal last bits, as of a large step
        ordered = rows.sort()[0]
        return not bool((ordered[1:] == ordered[:-1]).any())
    return distinct(losers)


def mean_by_row(rows: Tensor, valid: Tensor) -> ByRow:
    """By sorting, at O(batch): torch.unique would make an accelerator wait for its size."""
    ordered, order = rows.sort(stable=True)
    starts = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0, dtype=torch.int64)
    group = torch.empty_like(order).scatter_(0, order, starts)
    ones = valid.float()
    return ByRow(group, valid, torch.zeros_like(ones).index_add_(0, group, ones)[group])


# -- the table

HEAD = 16  # bytes of a seed and a rank, before a generator's state
NEVER, BEFORE, SINCE = 0, 1, 2  # when a row was last trained: relative to the last step


class Levels(nn.Module):
    """One level per sample, with all else that decides the future of training.

    Its tensors are plain attributes: a registered buffer would be overwritten by
    DistributedDataParallel at each forward, and cast by ``half()``. They move with the module,
    are saved in its ``state_dict``, and are shown as buffers to who asks this very module, as
    FSDP2 and torch.distributed.checkpoint do.
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
        """Start again from level 0, as after construction."""
        rows, labels = self._size
        device = self.alpha.device if hasattr(self, "alpha") else None
        # Whatever torch's default dtype is.
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
            # Elements, labels summed in fractions, and labels of at least 1/2: until the last
            # step, and since then in this process.
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
        """What is averaged between processes, by name."""
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
        """What the last step set."""
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
        """The rows that any process has trained; of those since the last step, this one's."""
        return self.visited != NEVER

    def mean_level(self, rows: Tensor) -> Tensor:
        """Mean over these rows; over all, if there are none."""
        rows = rows | ~rows.any()
        return torch.where(rows, self.alpha, 0.0).sum() / rows.sum()

    def observe(
        self, rows: Tensor, slopes: Tensor, hits: Tensor | None, focus: float, climb: Climb | None
    ) -> None:
        """Move the rows of a batch; where nothing valid and finite was seen, hold."""
        # Rows that are alone, and all finite, need no means: most batches on a CPU.
        plain = readable(rows) and math.isfinite(float(slopes.sum())) and distinct(rows)
        by_row = None if plain else mean_by_row(rows, slopes.isfinite())

        def mean(values: Tensor) -> Tensor:
            return values if by_row is None else by_row.mean(values)

        def keep(column: Tensor, old: Tensor, new: Tensor) -> None:
            if by_row is None:
                column.scatter_(0, rows, new)  # in half the time
            else:
                column.index_copy_(0, rows, torch.where(by_row.any, new, old))

        budget = self.budget
        if hits is not None:
            old = self.sample_accuracy.index_select(0, rows)
            recent = remembered(old, mean(hits))
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

    def mark(self, rows: Tensor) -> None:
        """Note that these rows have trained."""
        if readable(rows):
            self.visited.scatter_(0, rows, self.visited.new_full(rows.shape, SINCE))
        else:
            self.visited.index_fill_(0, rows, SINCE)

    def merge(self, columns: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Tensor:
        """Merge columns between processes; returns the rows that any of them has moved."""
        moved = self.visited == SINCE
        if world_size(group) > 1:
            new, moved = merged(columns, moved, lambda total: dist.all_reduce(total, group=group))
            self.hold(new)
        before = torch.where(self.visited == NEVER, NEVER, BEFORE)
        self.visited = torch.where(moved, BEFORE, before).to(torch.uint8)
        return moved

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

    def _apply(self: Table, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = self.held()
        moved = {name: fn(tensor) for name, tensor in held.items()}
        for name, new in moved.items():
            # The device is followed, a dtype is not: bfloat16 would lose steps below 1/256.
            if new.dtype != held[name].dtype:
                moved[name] = held[name].to(new.device)
        self.hold(moved)
        return self

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:  # asked module by module; DistributedDataParallel asks its root for all
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
            # A copy: what a tool loads into it in place must pass load_state_dict first.
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
        for hook in hooks.values():  # which may rename keys
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
        # One device for all: a broadcast delivers scalars on the CPU.
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
        """Why a saved state is not one of this table, in a sentence."""
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
    """The columns as all processes hold them, and the rows that any of them moved.

    A row becomes the mean of its values over the processes that moved it. Into copies: if a
    process dies on the way, the table of this one is whole.
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
    """Give each process its own seed, all from the first one's generator.

    Right after it any process's checkpoint serves all: a seed and a rank say everything.
    """
    if world_size(group) > 1:
        seed = torch.zeros((), dtype=torch.int64, device=generator.device)
        seed.random_(0, 2**62, generator=generator)
        seed = reduced(seed.to(device) * (rank(group) == 0), group)
        generator.manual_seed(int(seed) + rank(group))


def packed(generator: torch.Generator) -> Tensor:
    """A generator's state behind its seed and the rank that it serves: of one size anywhere."""
    head = torch.tensor([generator.initial_seed(), rank(None)], dtype=torch.uint64, device="cpu")
    return torch.cat((head.view(torch.uint8), generator.get_state().cpu()))


def unpack(saved: Tensor, generator: torch.Generator) -> None:
    """Restore a generator; on another rank than the saved one, by the seed of this one."""
    if saved.dim() == 2:  # version 0.1, after a step: the state of every rank
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
