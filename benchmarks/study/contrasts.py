"""What each question of the study compares: differences of two rows, corrected for their number."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.study.compare import Gap, holm, over_both, over_seeds
from benchmarks.study.judge import IMAGES, RAW, REPAIRS
from benchmarks.study.kept import SEEDED, Kept
from benchmarks.study.rows import BEST_FIXED, DEFAULT, FAMILIES, LEVELS, OTHERS, PLAIN, ROWS, SHARED
from benchmarks.study.run import EPOCHS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Tasks = dict[str, Kept]
Gaps = dict[tuple[str, str, str], Gap]
"""By task, line (a row, or what two rows differ in) and reading."""

NAMES = {
    "pretrained": "fine-tuned photographs",
    "digits": "digits",
    "photographs": "photographs",
    "streets": "street scenes",
    "cancer": "cancer",
    "rates": "known rates",
    "digits-25": "a quarter of the digits",
    "digits-50": "half of the digits",
    "digits-replaced": "digits with replaced masks",
    "digits-borders": "digits with moved borders",
}
FINE_TUNED, *_ = MAIN = tuple(NAMES)[:6]
SPOILT = ("digits-replaced", "digits-borders")
SEARCHED = ("digits", "photographs")  # on which all rivals are tried

ENDS = dict(zip(EPOCHS, ("last epoch", "stopped early"), strict=True))
AT_END, REPAIRED = "last epoch, raw", "stopped early, repaired"
READINGS = {AT_END: ("last", False), REPAIRED: ("best", True)}

SMOOTHED, SMOOTHED_BASE, DRAWN_HALF = (
    "smoothing-half-0.1",
    "smoothing-base-0.2",
    "moderation-half-0.1",
)
ONE_LEVEL, NO_LEVEL = "against one level for all", "against plain BCE"
FIXED = (PLAIN, "moderation-base-0.1", BEST_FIXED, *LEVELS[1:])
SOFTER = ("decay", SMOOTHED, SMOOTHED_BASE, DRAWN_HALF, BEST_FIXED, DEFAULT, "published")
RIVALS = tuple(
    dict.fromkeys(
        (
            *("decay", SMOOTHED, "mixup", "ensemble", "svls", "penalty", "focal", "flsd-53"),
            *("adafocal", "brier", "mbls", "nacl", "mmce", "hl1-ace", "dice", "dropout"),
            *("inversion", "published", "max-entropy", BEST_FIXED, *OTHERS),
        )
    )
)
PAIRS = {
    "draw, towards the base rate": (BEST_FIXED, SMOOTHED_BASE),
    "draw, towards ½": (DRAWN_HALF, SMOOTHED),
    "base rate, drawn": (BEST_FIXED, DRAWN_HALF),
    "base rate, expected": (SMOOTHED_BASE, SMOOTHED),
}


def title(name: str) -> str:
    """Of a row; a family goes by what its members have in common."""
    if name in FAMILIES:
        return re.sub(r",? (margin )?[\d.]+$", "", ROWS[FAMILIES[name][0]].title) + ", tuned"
    return ROWS[name].title


def short(name: str) -> str:
    """For a sentence."""
    return re.sub(r", (drawn|tuned)| \\((default|MC)\\)|plain BCE, ", "", title(name))


def having(kept: Tasks, names: Iterable[str], *rows: str) -> Tasks:
    """The tasks among these that have two seeds or more of all rows."""
    return {name: kept[name] for name in names if name in kept and kept[name].has(*rows)}


# ---------------------------------------------------------------- a family per question


def compared(
    kept: Tasks,
    pairs: Iterable[tuple[str, str, str, str]],
    gap: Callable[[Kept, str, str, str, bool], Gap] = Kept.gap,
) -> Gaps:
    """One family: each (task, line, row, other) that has two seeds, in both readings."""
    return holm(
        {
            (task, line, reading): gap(kept[task], row, other, *how)
            for task, line, row, other in pairs
            if having(kept, [task], row, other)
            for reading, how in READINGS.items()
        }
    )


def of_default(kept: Tasks) -> Gaps:
    return compared(kept, [(task, DEFAULT, DEFAULT, PLAIN) for task in MAIN])


def of_fine_tuned(kept: Tasks) -> Gaps:
    rows = kept[FINE_TUNED].runs if FINE_TUNED in kept else ()
    return compared(kept, [(FINE_TUNED, row, row, PLAIN) for row in rows if row != PLAIN])


def of_draws(kept: Tasks) -> Gaps:
    return compared(kept, [(task, line, *rows) for line, rows in PAIRS.items() for task in MAIN])


def of_levels(kept: Tasks) -> Gaps:
    """The default against the best fixed level."""
    there = having(kept, MAIN, PLAIN, DEFAULT, BEST_FIXED)
    return compared(kept, [(task, DEFAULT, DEFAULT, best_fixed(k)) for task, k in there.items()])


def of_samples(kept: Tasks) -> Gaps:
    """A level per sample against one for all and, with wrong masks, against plain BCE."""
    shared = [(task, ONE_LEVEL, DEFAULT, SHARED) for task in (*SEARCHED, *SPOILT)]
    return compared(kept, [*shared, *((task, NO_LEVEL, DEFAULT, PLAIN) for task in SPOILT)])


def of_slopes(kept: Tasks) -> Gaps:
    return compared(kept, [(task, BEST_FIXED, BEST_FIXED, PLAIN) for task in NAMES])


def of_rivals(kept: Tasks) -> Gaps:
    return compared(kept, [(task, row, row, DEFAULT) for row in RIVALS for task in SEARCHED])


def of_corrupted(kept: Tasks) -> Gaps:
    intact = {n: k for n, k in kept.items() if k.all[0]["last"]["corrupted"][RAW]}
    pairs = [(task, row, row, PLAIN) for row in SOFTER for task in MAIN]
    return compared(intact, pairs, under_corruption)


def of_repairs(kept: Tasks) -> Gaps:
    """Plain BCE repaired, with all validation data, against raw; here the epoch is the reading."""
    return holm(
        {
            (task, repair, ENDS[epoch]): repair_gap(k, epoch, repair)
            for repair in REPAIRS
            for task, k in having(kept, MAIN, PLAIN).items()
            for epoch in EPOCHS
        }
    )


def reading(gaps: Gaps, wanted: str, by: int = 0) -> dict[str, Gap]:
    """Of one reading, by task (0) or by line (1)."""
    return {place[by]: gap for place, gap in gaps.items() if place[2] == wanted}


def line(gaps: Gaps, wanted: str) -> Gaps:
    return {place: gap for place, gap in gaps.items() if place[1] == wanted}


# ---------------------------------------------------------------- what they are made of


def tried(k: Kept) -> dict[str, float]:
    """Raw NLL at the last epoch of each fixed level, on the seeds of the default."""
    rows = [row for row in FIXED if k.has(row, DEFAULT)]
    seeds = k.seeds(DEFAULT, *rows)
    return {row: float(np.mean(k.each(row, seeds, "last", "test", RAW, "nll"))) for row in rows}


def best_fixed(k: Kept) -> str:
    means = tried(k)
    return min(means, key=means.__getitem__)


def last_levels(k: Kept) -> list[float]:
    return [run["history"]["level"][-1] for run in k.runs[DEFAULT].values()]


def slope_of_plain(k: Kept) -> float:
    """Of the validation logits at the last epoch."""
    return float(np.mean([run["history"]["slope"][-1] for run in k.runs[PLAIN].values()]))


def corrupted(
    k: Kept, row: str, seeds: Sequence[int], epoch: str = "last", fix: str = RAW
) -> "NDArray[np.float64]":
    """NLL of each seed, mean of the kinds and severities."""
    each = k.each(row, seeds, epoch, "corrupted", fix)
    return np.array([np.mean([brief[0] for brief in one.values()]) for one in each])


def under_corruption(k: Kept, row: str, other: str, epoch: str, repaired: bool) -> Gap:
    """Over the seeds; a repair is the one that is best on clean data."""
    seeds = k.seeds(row, other)
    a, b = (
        corrupted(k, name, seeds, epoch, k.best_map(name, epoch, seeds) if repaired else RAW)
        for name in (row, other)
    )
    return over_seeds(a, b, SEEDED.get(k.task, 0.0)).percent


def repair_gap(k: Kept, epoch: str, repair: str) -> Gap:
    seeds = k.seeds(PLAIN)
    if k.task in SEEDED:
        a, b = (k.each(PLAIN, seeds, epoch, "test", fix, "nll") for fix in (repair, RAW))
        return over_seeds(a, b, SEEDED[k.task]).percent
    one, two = (k.samples(PLAIN, epoch, fix, seeds) for fix in (repair, RAW))
    return over_both(one, two).percent


def few_images(kept: Tasks) -> dict[tuple[str, str, str], tuple[float, list[float]]]:
    """Plain BCE's NLL by task, epoch and repair: raw, and repaired from 10, 25, 50, 150 images."""
    found = {}
    for name, k in having(kept, SEARCHED, PLAIN).items():
        seeds = k.seeds(PLAIN)
        for epoch in EPOCHS:
            for repair in REPAIRS:
                drawn = (k.each(PLAIN, seeds, epoch, "few", str(n), repair) for n in IMAGES)
                few = [float(np.mean([s[0] for scores in runs for s in scores])) for runs in drawn]
                raw, full = (k.mean(PLAIN, epoch, fix, "nll") for fix in (RAW, repair))
                found[name, epoch, repair] = raw, [*few, full]
    return found


def found_wrong(kept: Tasks) -> dict[tuple[str, str], dict[str, list[float]]]:
    """AUROC of each seed in finding wrong masks, by row and sign (see ``run``), then by task."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in (DEFAULT, PLAIN):
        for task, k in having(kept, SPOILT, row).items():
            runs = [run["wrong"] for run in k.runs[row].values()]
            for sign in dict.fromkeys(sign for run in runs for sign in run):
                each = [run[sign] for run in runs if sign in run]
                found.setdefault((row, sign), {})[task] = each
    return found
