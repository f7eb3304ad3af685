"""Which defaults? Each setting of the adaptive loss on each task, judged on validation data alone.

    python benchmarks/defaults.py --tasks digits start rare
    python benchmarks/defaults.py --data FOLDER --streets FOLDER

Photographs need ``--data``, street scenes ``--streets``. Finished runs are kept under ``--out``:
the same line goes on where it was stopped. Figures of the test data are kept as well, and printed
only with ``--test``, after the choice.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
import torch
from tasks import IGNORED, Part, Task
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from sc_bce import AdaptivePerturbation, CalibrationHistogram

Result = dict[str, Any]
Runs = dict[str, dict[str, Result]]  # by "task--setting", then by seed

RESULTS = Path(__file__).parent / "results" / "defaults" / "runs.json"
PLAIN = "bce"
DEFAULT = "default"  # the package's own loss, as it is built without arguments
FIXED = (0.05, 0.1, 0.2, 0.3, 0.4)
CELLS, REACH = 3000, 30.0  # logits are counted in cells of 0.02, from -30 to 30
LR, PENALTY = 0.002, 2000.0  # of the climb
SHARE = 0.45  # the most doubt that one sample may have


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Seen:
    """Logits and labels, counted: enough for every signal of a loop."""

    centre: Tensor  # of each cell, (K,)
    count: Tensor  # (K,)
    positives: Tensor  # (K,)
    nll: float

    @classmethod
    def of(cls, logits: Tensor, target: Tensor) -> "Seen":
        valid = target != IGNORED
        x, y = logits[valid], target[valid].float()
        cell = ((x + REACH) * (CELLS / (2 * REACH))).long().clamp_(0, CELLS - 1)
        centre = ((torch.arange(CELLS) + 0.5) * (2 * REACH / CELLS) - REACH).double()
        count = torch.bincount(cell, minlength=CELLS).double()
        positives = torch.bincount(cell, y, minlength=CELLS).double()
        nll = F.binary_cross_entropy_with_logits(x, y, reduction="sum").double() / len(x)
        return cls(centre, count, positives, float(nll))

    def mean(self, per_cell: Tensor) -> float:
        return float((per_cell * self.count).sum() / self.count.sum())

    def gap(self, shift: float = 0.0) -> float:
        """Mean top-label confidence minus accuracy, of the logits shifted by ``shift``."""
        return self.confidence(shift) - self.accuracy(shift)

    def confidence(self, shift: float = 0.0) -> float:
        return self.mean(torch.sigmoid((self.centre + shift).abs()))

    def accuracy(self, shift: float = 0.0) -> float:
        right = torch.where(
            self.centre + shift >= 0, self.positives, self.count - self.positives
        ).sum()
        return float(right / self.count.sum())

    def recalibration(self, free_slope: bool) -> tuple[float, float]:
        """(slope, intercept) of the logistic fit; the slope is 1 where it is not free."""
        basis = torch.stack([torch.ones_like(self.centre), self.centre])
        fitted = torch.tensor([0.0, 1.0], dtype=torch.float64)
        free = slice(0, 2 if free_slope else 1)
        for _ in range(30):
            p = torch.sigmoid(fitted @ basis)
            gradient = basis[free] @ (self.positives - self.count * p)
            hessian = (basis[free] * (self.count * p * (1 - p))) @ basis[free].T
            hessian += 1e-9 * self.count.sum() * torch.eye(len(hessian), dtype=torch.float64)
            move = torch.linalg.solve(hessian, gradient)
            fitted[free] += move.clamp(-1, 1)
            if float(move.abs().max()) < 1e-7:
                break
        return float(fitted[1]), float(fitted[0])

    def f1(self) -> float:
        """F1 of the decision at 1/2."""
        said = self.centre >= 0
        hits = float(self.positives[said].sum())
        return 2 * hits / max(float(self.count[said].sum() + self.positives.sum()), 1.0)

    def ece(self, bins: int = 10) -> float:
        """Top label, equal widths of confidence."""
        confidence = torch.sigmoid(self.centre.abs())
        right = torch.where(self.centre >= 0, self.positives, self.count - self.positives)
        place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
        zeros = torch.zeros(bins, dtype=torch.float64)
        gaps = zeros.index_add(0, place, confidence * self.count - right)
        return float(gaps.abs().sum() / self.count.sum())

    def summary(self) -> dict[str, float]:
        slope, intercept = self.recalibration(free_slope=True)
        shift = self.recalibration(free_slope=False)[1]
        return {
            "nll": self.nll,
            "ece": self.ece(),
            "f1": self.f1(),
            "accuracy": self.accuracy(),
            "gap": self.gap(),
            "corrected_gap": self.gap(shift),
            "slope": slope,
            "intercept": intercept,
            "mean": self.mean(torch.sigmoid(self.centre)),
            "base_rate": float(self.positives.sum() / self.count.sum()),
        }


# ---------------------------------------------------------------- the settings


@dataclass(frozen=True)
class Setting:
    """One row: how the level of each epoch comes about.

    Args:
        level: the level before the first step; of a row without ``signal`` the level throughout.
        signal: what moves it: none, "gap", "corrected_gap", "slope" or "overfit".
        climb: whether each sample climbs towards a budget, or all take the level at once.
        gain: of the signal; of "overfit" the level that a ratio of 0 would ask for.
        half: whether the prior is 1/2, or the base rate of each label.
        lead: how much of a change of the signal is passed on at once.
        pos_weight: as in torch; its logarithm is taken off the logits before they are measured,
            which moves no slope.
        look: how many validation samples the loop is shown; it is judged on all of them.
    """

    level: float = 0.0
    signal: str = ""
    climb: bool = False
    gain: float = 0.5
    beta: float = 1.0
    half: bool = False
    focus: float = 0.0
    warmup: int = 1
    cap: float = 1.0
    look: int | None = None
    lead: float = 0.0
    pos_weight: float = 1.0


SETTINGS: dict[str, Setting] = {
    PLAIN: Setting(),
    DEFAULT: Setting(signal="slope", gain=0.1),
    **{f"fixed-{level:g}": Setting(level) for level in FIXED},
    "gap": Setting(signal="gap", climb=True, warmup=5),
    "gap-focus": Setting(signal="gap", climb=True, warmup=5, focus=2.0),
    "gap-focus-warm1": Setting(signal="gap", climb=True, focus=2.0),
    "gap-focus-half": Setting(signal="gap", climb=True, warmup=5, focus=2.0, beta=2.0, half=True),
    "corrected": Setting(signal="corrected_gap", climb=True, warmup=5),
    "corrected-focus": Setting(signal="corrected_gap", climb=True, warmup=5, focus=2.0),
    "corrected-focus-warm1": Setting(signal="corrected_gap", climb=True, focus=2.0),
    **{f"slope-{gain:g}": Setting(signal="slope", gain=gain) for gain in (0.05, 0.1, 0.2)},
    "slope-0.1-focus": Setting(signal="slope", gain=0.1, focus=2.0),
    "slope-0.1-focus-1": Setting(signal="slope", gain=0.1, focus=1.0),
    "slope-0.1-from-0.2": Setting(0.2, signal="slope", gain=0.1),
    "slope-0.1-climb": Setting(signal="slope", gain=0.1, climb=True),
    "slope-0.1-climb-focus": Setting(signal="slope", gain=0.1, climb=True, focus=2.0),
    "slope-0.1-warm5": Setting(signal="slope", gain=0.1, warmup=5),
    "slope-0.1-half": Setting(signal="slope", gain=0.1, half=True),
    "slope-0.1-half-2": Setting(signal="slope", gain=0.05, beta=2.0, half=True),
    **{f"half-{level:g}": Setting(level, half=True) for level in (0.05, 0.1, 0.2)},
    "gap-shared": Setting(signal="gap", gain=0.3),
    "corrected-shared": Setting(signal="corrected_gap", gain=0.3),
    "slope-0.1-lead": Setting(signal="slope", gain=0.1, lead=0.5),
    "slope-0.1-lead-0.2": Setting(signal="slope", gain=0.1, lead=0.2),
    "bce-pos50": Setting(pos_weight=50.0),
    "slope-0.1-pos50": Setting(signal="slope", gain=0.1, pos_weight=50.0),
    "slope-0.1-look40": Setting(signal="slope", gain=0.1, look=40),
    "slope-0.1-look150": Setting(signal="slope", gain=0.1, look=150),
    "gap-focus-look40": Setting(signal="gap", climb=True, warmup=5, focus=2.0, look=40),
    "overfit-0.5": Setting(signal="overfit", gain=0.5),
    "overfit-1": Setting(signal="overfit", gain=1.0),
    "overfit-1.5": Setting(signal="overfit", gain=1.5),
    "overfit-1-focus": Setting(signal="overfit", gain=1.0, focus=2.0),
    "overfit-1-from-0.2": Setting(0.2, signal="overfit", gain=1.0),
    "overfit-1-half": Setting(signal="overfit", gain=1.0, half=True),
}


class Levels:
    """One level per training sample, and the rule that moves them."""

    def __init__(self, setting: Setting, train: Part, labels: int) -> None:
        self.setting = setting
        self.prior = _prior(train.target, labels, setting.half)
        doubt, largest = _doubt(train.target, self.prior)
        self.doubt = setting.beta * doubt
        self.cap = min(setting.cap, 1 / (2 * largest * setting.beta) - 0.01)
        if not setting.signal:
            self.cap = 1.0
        self.alpha = torch.full((len(train),), min(setting.level, self.cap))
        self.accuracy = torch.full((len(train),), 0.5)
        self.budget, self.error = 0.0, 0.0
        self.steps = 0
        self.log_loss, self.elements = 0.0, 0

    def loss(self, index: Tensor, logits: Tensor, target: Tensor, draws: Generator) -> Tensor:
        return masked_bce(logits, self.target(index, target, draws), self.setting.pos_weight)

    def target(self, index: Tensor, target: Tensor, draws: Generator) -> Tensor:
        """The perturbed labels of a batch; what is ignored keeps its value."""
        drawn = torch.rand(len(index), generator=draws) < self.alpha[index]
        strength = (drawn * self.setting.beta).view(-1, *[1] * (target.dim() - 1))
        moved = target + strength * (self.prior - target)
        return torch.where(target == IGNORED, target, moved)

    def see(self, index: Tensor, logits: Tensor, target: Tensor) -> None:
        """Learn from a training forward, after its loss was taken."""
        valid = target != IGNORED
        y = torch.where(valid, target, 0.0)
        # mean of an image's valid elements; an image without any moves nothing
        count = valid.flatten(1).sum(1).clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        self.log_loss += float((loss * valid).sum(dtype=torch.float64))
        self.elements += int(valid.sum())
        right = (((logits >= 0) == (y >= 0.5)) & valid).flatten(1).sum(1) / count
        self.accuracy[index] = 0.9 * self.accuracy[index] + 0.1 * right
        if self.setting.climb and self.steps >= self.setting.warmup:
            slope = ((y - self.prior) * logits * valid).flatten(1).sum(1) / count
            self._climb(index, self.setting.beta * slope)

    def _climb(self, index: Tensor, slope: Tensor) -> None:
        budget = self.budget * self.weights()[index]
        budget = budget.clamp(max=SHARE)
        h = self.doubt * self.alpha[index] + LR / self.doubt * slope
        beyond = budget + (h - budget) / (1 + LR * PENALTY / self.doubt)
        doubt = torch.where(h <= budget, h, beyond)
        self.alpha[index] = (doubt / self.doubt).clamp(0, self.cap)

    def threshold(self) -> Tensor:
        """The logit at which a network trained at the mean level means a chance of 1/2."""
        strength = self.setting.beta * self.alpha.mean()
        return torch.logit((1 - strength) / 2 + strength * self.prior)

    def weights(self) -> Tensor:
        """How the level is shared out: 1 on average."""
        hardness = (1 - self.accuracy) ** self.setting.focus
        return hardness / hardness.mean().clamp(min=1e-12)

    def step(self, seen: dict[str, float]) -> dict[str, float]:
        """Move the shared level after the validation of an epoch."""
        setting, self.steps = self.setting, self.steps + 1
        train_nll = self.log_loss / max(self.elements, 1)
        self.log_loss, self.elements = 0.0, 0
        if setting.signal and self.steps >= setting.warmup:
            mean = float(self.alpha.mean())
            if setting.climb:
                follow = min(max(self.budget, 0.0), self.doubt * mean)
                raised = follow + setting.gain * self._error(seen)
                self.budget = min(max(raised, -SHARE), min(SHARE, self.doubt * self.cap))
            else:
                self._set(self._wanted(mean, train_nll, seen))
        return {"train_nll": train_nll, "level": float(self.alpha.mean())}

    def _wanted(self, level: float, train_nll: float, seen: dict[str, float]) -> float:
        setting, gain = self.setting, self.setting.gain
        if setting.signal == "overfit":
            return level / 2 + gain / 2 * max(0.0, 1 - train_nll / seen["nll"])
        error = self._error(seen) / self.doubt
        lead = setting.lead * (max(error, 0.0) - self.error)
        self.error = max(error, 0.0)
        return level + gain * error + lead

    def _error(self, seen: dict[str, float]) -> float:
        """How much doubt is missing, by the signal; a slope says it in units of the level."""
        if self.setting.signal == "slope":
            return self.doubt * min(max(1 - seen["slope"], -1.0), 1.0)
        return seen[self.setting.signal]

    def _set(self, level: float) -> None:
        if math.isfinite(level):
            self.alpha = (level * self.weights()).clamp(0, self.cap)


class Packaged(Levels):
    """`AdaptivePerturbation(num_samples)` and `step(histogram)`, as a user has them."""

    def __init__(self, setting: Setting, task: Task, model: nn.Module, draws: Generator) -> None:
        super().__init__(setting, task.train, task.labels)
        self.criterion = AdaptivePerturbation(
            len(task.train),
            num_labels=task.labels if task.labels > 1 else None,
            ignore_index=IGNORED,
            generator=draws,
        )
        self.model, self.val = model, task.val

    def loss(self, index: Tensor, logits: Tensor, target: Tensor, draws: Generator) -> Tensor:
        loss: Tensor = self.criterion(logits, target, index)
        return loss

    @torch.no_grad()
    def step(self, seen: dict[str, float]) -> dict[str, float]:
        labels = self.criterion.num_labels
        histogram = CalibrationHistogram(labels)
        for inputs, target in zip(
            torch.split(self.val.inputs, 64), torch.split(self.val.target, 64), strict=True
        ):
            histogram.update(self.model(inputs), target, ignore_index=IGNORED)
        self.criterion.step(histogram)
        self.alpha = self.criterion.alpha
        train_nll = self.log_loss / max(self.elements, 1)
        self.log_loss, self.elements = 0.0, 0
        return {"train_nll": train_nll, "level": float(self.alpha.mean())}


def _prior(target: Tensor, labels: int, half: bool) -> Tensor:
    """1/2, or (N+ + 1/2) / (N + 1) of the training labels, in the shape that broadcasts."""
    if half:
        return torch.tensor(0.5)
    dims = [d for d in range(target.dim()) if labels == 1 or d != 1]
    valid = target != IGNORED
    positives, count = (target == 1).sum(dims), valid.sum(dims)
    prior = ((positives + 0.5) / (count + 1)).float()
    return prior.view(-1, *[1] * (target.dim() - 2)) if labels > 1 else prior


def _doubt(target: Tensor, prior: Tensor) -> tuple[float, float]:
    """What a level of 1 at strength 1 costs in confidence; and the largest of c and 1 - c."""
    cost = torch.where(target == 1, 1 - prior, prior)
    valid = target != IGNORED
    largest = torch.maximum(prior, 1 - prior).max()
    return float(cost[valid].mean(dtype=torch.float64)), float(largest)


# ---------------------------------------------------------------- one run


def train_one(task: Task, setting: Setting, seed: int) -> Result:
    """Train once; initial weights, batches and draws come from three generators."""
    started = time.process_time()
    torch.manual_seed(seed)
    model = task.build()
    order, draws = Generator().manual_seed(seed), Generator().manual_seed(seed + 1_000_000)
    levels = Levels(setting, task.train, task.labels)
    if setting is SETTINGS[DEFAULT]:
        levels = Packaged(setting, task, model, draws)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs)
    few = _first(task.val, setting.look)
    history = []
    for _ in range(task.epochs):
        model.train()
        for index in torch.split(torch.randperm(len(task.train), generator=order), task.batch):
            image, target = task.train.inputs[index], task.train.target[index].float()
            if task.mirror:
                flip = torch.rand(len(index), 1, 1, 1, generator=order) < 0.5
                image, target = (torch.where(flip, x.flip(-1), x) for x in (image, target))
            logits = model(image)
            loss = levels.loss(index, logits, target, draws)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            levels.see(index, logits.detach(), target)
        if task.cosine:
            schedule.step()
        trained = levels.threshold()
        seen = predict(model, task.val, trained, setting.pos_weight)
        shown = seen if few is None else predict(model, few, trained, setting.pos_weight)
        history.append(seen | levels.step(shown))
    return {
        "epochs": history,
        "test": predict(model, task.test, trained, setting.pos_weight),
        "level_std": float(levels.alpha.std(correction=0)),
        "prior": levels.prior.flatten().tolist(),
        "doubt": levels.doubt,
        "seconds": time.process_time() - started,
    }


def _first(part: Part, count: int | None) -> Part | None:
    return None if count is None else Part(part.inputs[:count], part.target[:count])


def masked_bce(logits: Tensor, target: Tensor, pos_weight: float) -> Tensor:
    """Mean binary cross entropy of the elements that are not ignored."""
    valid = target != IGNORED
    loss = F.binary_cross_entropy_with_logits(
        logits,
        torch.where(valid, target, 0.0),
        reduction="none",
        pos_weight=None if pos_weight == 1 else torch.tensor(pos_weight),
    )
    return (loss * valid).sum() / valid.sum()


@torch.no_grad()
def predict(model: nn.Module, part: Part, threshold: Tensor, pos_weight: float) -> dict[str, float]:
    """All measures, and F1 of the decision that the levels trained in (their mean) ask for."""
    model.eval()
    logits = torch.cat([model(batch) for batch in torch.split(part.inputs, 64)])
    logits -= math.log(pos_weight)
    valid = part.target != IGNORED
    said, true = (logits >= threshold) & valid, part.target == 1
    hits, total = float((said & true).sum()), float(said.sum() + true.sum())
    return Seen.of(logits, part.target).summary() | {"f1_repaired": 2 * hits / max(total, 1.0)}


# ---------------------------------------------------------------- many runs, kept


def run_file(folder: Path, task: str, setting: str, seed: int) -> Path:
    return folder / f"{task}--{setting}--{seed}.json"


def run_all(
    chosen: Sequence[Task], settings: Sequence[str], seeds: Sequence[int], folder: Path
) -> None:
    """Finish what is not yet in ``folder``, seed after seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for task in chosen:
            for name in settings:
                path = run_file(folder, task.name, name, seed)
                if path.exists():
                    continue
                result = train_one(task, SETTINGS[name], seed)
                unfinished = path.with_suffix(".part")
                unfinished.write_text(json.dumps(result))
                os.replace(unfinished, path)
                print(path.stem, f"{result['seconds']:.0f} s", flush=True)


# ---------------------------------------------------------------- the table


def load(folder: Path) -> Runs:
    """Kept runs by task and setting, without what no table needs."""
    runs: Runs = {}
    for path in sorted(folder.glob("*--*--*.json")):
        task, setting, seed = path.stem.split("--")
        run = json.loads(path.read_text())
        runs.setdefault(f"{task}--{setting}", {})[seed] = {
            "val": run["epochs"][-1],
            "test": run["test"],
            "best_nll": min(epoch["nll"] for epoch in run["epochs"]),
            "highest_level": max(epoch["level"] for epoch in run["epochs"]),
            "seconds": run["seconds"],
        }
    return runs


def rounded(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(runs: Runs, test: bool = False) -> str:
    """One block per task: validation (or test) figures of the last epoch, per setting."""
    lines = []
    for task in dict.fromkeys(key.split("--")[0] for key in runs):
        found = {name: runs.get(f"{task}--{name}", {}) for name in SETTINGS}
        rows = {name: kept for name, kept in found.items() if kept}
        lines += ["", task, HEADER]
        lines += [_line(name, kept, rows, test) for name, kept in rows.items()]
    return "\n".join(lines)


HEADER = (
    f"{'setting':23} {'seeds':>5} {'NLL':>7} {'to best':>15} {'stopped':>7} {'ECE':>6} "
    f"{'F1 diff':>15} {'mended':>15} {'level':>5} {'gap':>6} {'corr':>6} {'slope':>5} {'over':>4} "
    f"{'mean/c':>6}  NLL (level) of each seed"
)


def _line(
    name: str, kept: dict[str, Result], rows: dict[str, dict[str, Result]], test: bool
) -> str:
    """Means over the seeds.

    "to best" is against that level of the grid that has the best mean on these seeds, with half
    of the paired 95 % interval; "stopped" is the NLL at its best epoch; F1 is against plain BCE,
    "mended" with the decision moved to where the level puts a chance of 1/2.
    """
    ends = {seed: _end(run, test) for seed, run in kept.items()}
    column = {key: [end[key] for end in ends.values()] for key in next(iter(ends.values()))}
    plain = [_end(run, test)["f1"] for seed, run in rows.get(PLAIN, {}).items() if seed in ends]
    grid = [
        [_end(row[seed], test)["nll"] for seed in ends]
        for other, row in rows.items()
        if (other == PLAIN or other.startswith("fixed")) and row.keys() >= ends.keys()
    ]
    best = min(grid, key=_mean, default=[])
    early = _mean([run["best_nll"] for run in kept.values()])
    over = _mean([1 - end["train_nll"] / end["val_nll"] for end in ends.values()])
    ratio = _mean([end["mean"] / end["base_rate"] for end in ends.values()])
    each = "  ".join(f"{end['nll']:.4f} ({end['level']:.3f})" for end in ends.values())
    mean = {key: _mean(values) for key, values in column.items()}
    return (
        f"{name:23} {len(kept):5} {mean['nll']:7.4f} {_paired(column['nll'], best, True)} "
        f"{early:7.4f} {mean['ece']:6.4f} {_paired(column['f1'], plain)} "
        f"{_paired(column['f1_repaired'], plain)} {mean['level']:5.3f} {mean['gap']:+6.3f} "
        f"{mean['corrected_gap']:+6.3f} {mean['slope']:5.2f} {over:4.2f} {ratio:6.2f}  {each}"
    )


def _paired(mine: list[float], other: list[float], relative: bool = False) -> str:
    """Mean difference and half of its 95 % interval over the seeds."""
    from scipy.stats import t

    if len(mine) != len(other):
        return f"{'':15}"
    unit = _mean(other) / 100 if relative else 1.0
    moved = [(a - b) / unit for a, b in zip(mine, other, strict=True)]
    middle, digits = _mean(moved), 1 if relative else 3
    if len(moved) == 1 or mine == other:
        return f"{middle:+6.{digits}f}{'%' if relative else '':9}"
    spread = math.sqrt(sum((m - middle) ** 2 for m in moved) / (len(moved) - 1) / len(moved))
    half = float(t.ppf(0.975, len(moved) - 1)) * spread
    return f"{middle:+6.{digits}f}{'%' if relative else ' '} ±{half:6.{digits}f}"


def _end(run: Result, test: bool) -> dict[str, float]:
    """The figures of the last epoch, on validation or on test data, and what the loop then had."""
    last: dict[str, float] = run["val"]
    seen: dict[str, float] = run["test"] if test else last
    loop = {"level": last["level"], "train_nll": last["train_nll"], "val_nll": last["nll"]}
    return seen | loop


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# ---------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Choose the defaults of the adaptive loss on validation data.",
        epilog="settings: " + ", ".join(SETTINGS),
    )
    names = ("digits", "photographs", "streets", "rare", "start")
    parser.add_argument("--tasks", nargs="+", choices=names, help="default: all that have data")
    parser.add_argument("--data", type=Path, help="folder with images/ and masks/ of equal stems")
    parser.add_argument("--streets", type=Path, help="folder with train/, val/ and test/")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "defaults")
    parser.add_argument("--test", action="store_true", help="print the figures of the test data")
    parser.add_argument("--print", action="store_true", help="only print what results/ holds")
    parser.add_argument("--keep", action="store_true", help="copy what --out holds into results/")
    return parser.parse_args(argv)


def load_tasks(args: argparse.Namespace) -> list[Task]:
    makers: dict[str, Callable[[], Task]] = {
        "digits": tasks.digits,
        "start": tasks.start,
        "rare": tasks.rare,
    }
    if args.data is not None:
        makers["photographs"] = lambda: tasks.photographs(args.data)
    if args.streets is not None:
        makers["streets"] = lambda: tasks.streets(args.streets)
    for name in args.tasks or ():
        if name not in makers:
            raise ValueError(f"{name} needs a folder: give --data or --streets")
    return [make() for name, make in makers.items() if name in (args.tasks or makers)]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    if args.print:
        runs: Runs = json.loads(RESULTS.read_text())
    else:
        try:
            chosen = load_tasks(args)
        except ValueError as error:
            sys.exit(f"defaults.py: {error}")
        run_all(chosen, args.settings, args.seeds, args.out)
        runs = load(args.out)
    runs = rounded(runs)
    if args.keep:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(runs, separators=(",", ":")) + "\n")
    print(table(runs, args.test))


if __name__ == "__main__":
    main()
