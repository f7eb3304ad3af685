"""What a finished network is worth: repairs fitted on validation data, and every measure."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.data.corruptions import corrupted
from benchmarks.data.tasks import IGNORED, Part, Task
from sc_bce import CalibrationHistogram, IsotonicCalibration, TemperatureScaling

Predict = Callable[[Tensor], Tensor]
Result = dict[str, Any]
Array = NDArray[Any]

Repair = TemperatureScaling | IsotonicCalibration

REPAIRS: dict[str, Callable[[int | None], Repair]] = {
    "temperature": lambda labels: TemperatureScaling(num_labels=labels),
    "affine": lambda labels: TemperatureScaling(bias=True, num_labels=labels),
    "flip": lambda labels: TemperatureScaling(None, bias=True, num_labels=labels),
    "isotonic": IsotonicCalibration,
}
RAW = "raw"
MAPS = (RAW, *REPAIRS)
GROUPS = 300  # at most so many groups of test samples get a sum of their own
CORRUPTED_ELEMENTS = 1_000_000  # of the test data enter the corruptions, but never above half
IMAGES = (10, 25, 50)  # validation samples that a repair is fitted on, beside all
DRAWS = 4  # times that they are drawn
GRID = 1000  # cells of the smooth calibration error
SCALE = 65535


def histogram(logits: Tensor, target: Tensor, labels: int | None) -> CalibrationHistogram:
    seen = CalibrationHistogram(labels)
    seen.update(logits, target, ignore_index=IGNORED)
    return seen


# ---------------------------------------------------------------- measures of one set of answers


def measures(seen: CalibrationHistogram) -> Result:
    """Of a histogram of one label."""
    table = seen.reliability(GRID, "positive_class")
    rate, mean = seen.accuracy("positive_class"), seen.confidence("positive_class")
    return {
        "nll": float(seen.nll()),
        "brier": float(seen.brier()),
        "nll_refined": float(seen.refinement("log")),
        "brier_refined": float(seen.refinement("brier")),
        "ece": float(seen.ece(10, "positive_class")),
        "ece_top": float(seen.ece()),
        "smooth_ece": smooth_ece(table.count, table.confidence, table.accuracy),
        "accuracy": float(seen.accuracy()),
        "f1": f1(seen),
        "confidence": float(seen.confidence()),
        "slope": float(seen.slope()),
        "shift": float(seen.intercept(slope=1.0)),
        "mean": float(mean),
        "base_rate": float(rate),
    }


def f1(seen: CalibrationHistogram) -> float:
    """Of the decision at 1/2."""
    table = seen.reliability(2, "positive_class")
    said, hits = float(table.count[1]), float((table.count * table.accuracy)[1])
    positives = float((table.count * table.accuracy.nan_to_num(0)).sum())
    return 2 * hits / (said + positives) if said else 0.0


def smooth_ece(count: Tensor, confidence: Tensor, accuracy: Tensor) -> float:
    """Smooth ECE (Blasiok and Nakkiran, ICLR 2024) from equal cells of the probability.

    The residuals are smoothed by a Gaussian, reflected at 0 and 1, of the one width that equals
    the error found with it.
    """
    cells = len(count)
    residual = (count * (accuracy - confidence).nan_to_num(0)).numpy() / max(float(count.sum()), 1)
    wave = np.fft.rfft(np.concatenate([residual, residual[::-1]]))
    frequency = np.pi * np.arange(len(wave))  # of a circle of length 2

    def error(width: float) -> float:
        smooth = np.fft.irfft(wave * np.exp(-((frequency * width) ** 2) / 2), 2 * cells)
        return float(np.abs(smooth[:cells]).sum())

    low, high = 1e-4, 1.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if error(middle) > middle else (low, middle)
    return error(high)


def described(seen: CalibrationHistogram) -> Result:
    """All labels together and, where there are several, each."""
    if seen.num_labels is None:
        return measures(seen)
    found = measures(seen.pooled())
    each = [measures(seen.label(i)) for i in range(seen.num_labels)]
    return found | {"labels": {key: [one[key] for one in each] for key in each[0]}}


def briefly(seen: CalibrationHistogram) -> list[float]:
    """NLL, Brier score, positive-class ECE, top-label ECE, mean probability, accuracy."""
    seen = seen if seen.num_labels is None else seen.pooled()
    values = (
        seen.nll(),
        seen.brier(),
        seen.ece(10, "positive_class"),
        seen.ece(),
        seen.confidence("positive_class"),
        seen.accuracy(),
    )
    return [float(value) for value in values]


def against_chance(logits: Tensor, chance: Tensor) -> Result:
    """The distance from the true probabilities, per label: no bins, no drawn labels.

    ``calibration`` is what an increasing map of the answers could take off the squared distance.
    """
    from sklearn.isotonic import IsotonicRegression

    p = torch.sigmoid(logits.double())
    mapped = np.stack(
        [
            IsotonicRegression().fit_transform(p[:, i].numpy(), chance[:, i].numpy())
            for i in range(p.shape[1])
        ],
        1,
    )
    extra = F.binary_cross_entropy_with_logits(logits.double(), chance, reduction="none")
    extra -= F.binary_cross_entropy(chance, chance, reduction="none")
    squared = (p - chance) ** 2
    left = (torch.from_numpy(mapped) - chance) ** 2
    found = {
        "absolute": (p - chance).abs(),
        "squared": squared,
        "calibration": squared - left,
        "divergence": extra,
    }
    return {key: value.mean(0).tolist() for key, value in found.items()}


def per_group(logits: Tensor, target: Tensor) -> Array:
    """Sums of NLL and Brier score over groups of samples, (2, groups)."""
    valid = target != IGNORED
    y = torch.where(valid, target, 0.0)
    nll = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    brier = (torch.sigmoid(logits) - y) ** 2
    rows = [(x * valid).flatten(1).sum(1, dtype=torch.float64) for x in (nll, brier)]
    return np.stack([np.add.reduceat(row.numpy(), starts(len(logits))) for row in rows])


def starts(samples: int) -> Array:
    """The first sample of each group."""
    return np.unique(np.linspace(0, samples, min(samples, GROUPS), endpoint=False).astype(int))


def separation(inside: Tensor, outside: Tensor) -> list[float]:
    """AUROC of confidence as a sign of being in distribution: of the pixels, of the images."""
    from sklearn.metrics import roc_auc_score

    high, low = (x.abs().clamp(max=30) for x in (inside, outside))
    counts = [torch.histc(x, 3000, 0, 30).double() for x in (high, low)]
    below = counts[1].cumsum(0) - counts[1] / 2
    pixels = float((counts[0] * below).sum() / (counts[0].sum() * counts[1].sum()))
    each = [torch.sigmoid(x).flatten(1).mean(1).numpy() for x in (high, low)]
    kinds = np.repeat([1, 0], [len(x) for x in each])
    return [pixels, float(roc_auc_score(kinds, np.concatenate(each)))]


def label_quality(logits: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """Of each mask, low where some of its pixels are unlikely: the soft minimum of their chances.

    Lad and Mueller 2023 (arXiv 2307.05080), the default of cleanlab's segmentation.
    """
    given = torch.sigmoid(torch.where(target == 1, logits, -logits).double()).flatten(1)
    return (given * torch.softmax((1 - given) / temperature, 1)).sum(1)


# ---------------------------------------------------------------- one network


def chosen(answers: Tensor, val: Tensor, labels: int | None) -> str:
    """The map of the least NLL on validation samples that it was not fitted to, half by half."""
    losses = dict.fromkeys(MAPS, 0.0)
    halves = slice(0, None, 2), slice(1, None, 2)
    for fitted, judged in (halves, halves[::-1]):
        try:
            seen = histogram(answers[fitted], val[fitted], labels)
            maps: dict[str, nn.Module] = {n: make(labels).fit(seen) for n, make in REPAIRS.items()}
        except ValueError:  # one class only
            return RAW
        for name, repair in {RAW: nn.Identity(), **maps}.items():
            after = histogram(repair(answers[judged]), val[judged], labels)
            losses[name] += float((after if labels is None else after.pooled()).nll())
    return min(losses, key=losses.__getitem__)


class Judge:
    """The test data of one task and its corruptions, made once."""

    def __init__(self, task: Task, corrupt: bool) -> None:
        self.task = task
        self.labels = task.labels if task.labels > 1 else None
        self.worse: list[tuple[str, int, Tensor]] = []
        count = CORRUPTED_ELEMENTS // task.test.target[0].numel()
        every = max(2, -(-len(task.test) // max(count, 1)))
        self.thin = self.target(Part(task.test.inputs[::every], task.test.target[::every]))
        if corrupt:
            self.worse = list(corrupted(task.test.inputs[::every]))

    @staticmethod
    def target(part: Part) -> Tensor:
        return part.target.float()

    def judge(self, predict: Predict, few: bool, seed: int) -> tuple[Result, dict[str, Array]]:
        """Every measure of one network, raw and repaired, and the sums of its test samples."""
        task, labels = self.task, self.labels
        val, answers = self.target(task.val), predict(task.val.inputs)
        seen = histogram(answers, val, labels)
        maps: dict[str, nn.Module] = {RAW: nn.Identity()}
        for name, make in REPAIRS.items():
            maps[name] = make(labels).fit(seen)
        found: Result = {
            "val": briefly(seen),
            "repairs": _parameters(maps),
            "chosen": chosen(answers, val, labels),
        }
        logits, target = predict(task.test.inputs), self.target(task.test)
        after = {name: repair(logits) for name, repair in maps.items()}
        found["test"] = {name: described(histogram(z, target, labels)) for name, z in after.items()}
        sums = {name: per_group(z, target) for name, z in after.items()}
        if task.chance is not None:
            for name, z in after.items():
                found["test"][name]["chance"] = against_chance(z, task.chance)
        found["corrupted"] = {name: {} for name in maps}
        for kind, severity, inputs in self.worse:
            z = predict(inputs)
            for name, repair in maps.items():
                brief = briefly(histogram(repair(z), self.thin, labels))
                found["corrupted"][name][f"{kind}-{severity}"] = brief
        if task.ood is not None:
            outside = predict(task.ood.inputs)
            found["ood"] = {
                name: self._outside(after[name], repair(outside)) for name, repair in maps.items()
            }
        if few:
            found["few"] = self._few(answers, val, logits, target, seed)
        return found, sums

    def _outside(self, inside: Tensor, outside: Tensor) -> list[float]:
        """As ``briefly``, then both AUROCs."""
        seen = histogram(outside, torch.zeros_like(outside), self.labels)
        return [*briefly(seen), *separation(inside, outside)]

    def _few(
        self, answers: Tensor, val: Tensor, logits: Tensor, target: Tensor, seed: int
    ) -> Result:
        """NLL and Brier score on the test data after repairs that saw few validation samples."""
        rng, found = Generator().manual_seed(seed), {}
        for count in IMAGES:
            scores: dict[str, list[list[float]]] = {name: [] for name in REPAIRS}
            for _ in range(DRAWS):
                chosen = torch.randperm(len(val), generator=rng)[:count]
                seen = histogram(answers[chosen], val[chosen], self.labels)
                for name, make in REPAIRS.items():
                    try:
                        z = make(self.labels).fit(seen)(logits)
                    except ValueError:  # one class only
                        continue
                    after = histogram(z, target, self.labels)
                    after = after if self.labels is None else after.pooled()
                    scores[name].append([float(after.nll()), float(after.brier())])
            found[str(count)] = scores
        return found


def _parameters(maps: dict[str, nn.Module]) -> Result:
    """What was fitted, but for the curves."""
    kept = ("temperature", "bias", "flip_rates")
    return {
        name: {key: getattr(repair, key).tolist() for key in kept}
        for name, repair in maps.items()
        if isinstance(repair, TemperatureScaling)
    }


def packed(sums: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Two bytes per sum: each row a number of steps of its largest value / 65535."""
    for name, rows in sums.items():
        top = rows.max(1, keepdims=True)
        yield f"{name}-top", top[:, 0]
        yield name, np.round(rows / np.maximum(top, 1e-300) * SCALE).astype(np.uint16)


def unpacked(kept: Any, name: str) -> Array:
    """(2, groups): sums of NLL and of the Brier score."""
    return np.asarray(kept[name] * (kept[f"{name}-top"][:, None] / SCALE))
