"""The page of the study, from the kept runs of ``run.py``.

    python -m benchmarks.study.page

Every number, verdict and picture of ``docs/study.md`` comes from here. The text that does not
depend on the runs is in ``page.md``, where a line such as ``@answers`` is replaced.
Nothing is said beyond a 95 % interval.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.study.compare import Gap, over_seeds
from benchmarks.study.judge import IMAGES, MAPS, RAW, REPAIRS
from benchmarks.study.kept import SEEDED, Kept, load
from benchmarks.study.rows import BEST_FIXED, DEFAULT, FAMILIES, LEVELS, OTHERS, PLAIN, ROWS, SHARED
from benchmarks.study.run import EPOCHS, RESULTS, is_planned, planned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Tasks = dict[str, Kept]

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
NAMES = {
    "digits": "digits",
    "photographs": "photographs",
    "streets": "street scenes",
    "cancer": "cancer",
    "rates": "known rates",
    "digits-25": "digits, 25 %",
    "digits-50": "digits, 50 %",
    "digits-replaced": "digits, masks replaced",
    "digits-borders": "digits, borders moved",
}
MAIN = tuple(NAMES)[:5]
SMOOTHED, SMOOTHED_BASE, DRAWN_HALF = (
    "smoothing-half-0.1",
    "smoothing-base-0.2",
    "moderation-half-0.1",
)
FIXED = (PLAIN, "moderation-base-0.1", BEST_FIXED, *LEVELS[1:])
RIVALS = (
    "decay",
    SMOOTHED,
    "mixup",
    "ensemble",
    "svls",
    "penalty",
    "focal",
    "flsd-53",
    "adafocal",
    "brier",
    "mbls",
    "nacl",
    "mmce",
    "hl1-ace",
    "dice",
    "dropout",
    "inversion",
    "published",
    "max-entropy",
)
SOFTER = (PLAIN, "decay", SMOOTHED, SMOOTHED_BASE, DRAWN_HALF, BEST_FIXED, DEFAULT, "published")


# ---------------------------------------------------------------- text


def title(name: str) -> str:
    """Of a row; a family goes by what its members have in common."""
    if name in FAMILIES:
        return re.sub(r",? (margin )?[\d.]+$", "", ROWS[FAMILIES[name][0]].title) + ", tuned"
    return ROWS[name].title


def figures(gap: Gap) -> str:
    if not np.isfinite(gap.low):
        return f"{gap.value:+.1f} % (one seed)"
    return f"{gap.value:+.1f} % [{gap.low:+.1f}, {gap.high:+.1f}]"


def cell(gap: Gap) -> str:
    """Bold if the interval excludes 0."""
    return f"**{figures(gap)}**" if gap.verdict != "undecided" else figures(gap)


def listed(names: Iterable[str]) -> str:
    *most, last = [NAMES.get(name, name) for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def by_verdict(gaps: dict[str, Gap], intervals: bool = True) -> str:
    """On which tasks it is lower, on which higher, on which no difference is shown."""
    words = {n: figures(gap) if intervals else f"{gap.value:+.1f} %" for n, gap in gaps.items()}
    said = []
    for verdict, where in (
        ("lower", "lower on"),
        ("higher", "higher on"),
        ("undecided", "no difference shown on"),
    ):
        names = [name for name, gap in gaps.items() if gap.verdict == verdict]
        if names:
            said.append(f"{where} " + listed(f"{NAMES[n]} ({words[n]})" for n in names))
    return "; ".join(said)


class Answer(NamedTuple):
    """Of one question: a line for the first screen, a small table, and the tables to unfold."""

    line: str
    table: str
    more: str = ""


def having(kept: Tasks, names: Iterable[str], *rows: str) -> dict[str, Kept]:
    """The tasks among these that have three seeds or more of all rows."""
    return {name: kept[name] for name in names if name in kept and kept[name].has(*rows)}


def pictured(name: str, words: str) -> str:
    return f"![{words}](study/{name}.png)"


# ---------------------------------------------------------------- the questions


def first(kept: Tasks) -> Answer:
    """Stopped early and repaired, does the default beat plain BCE?"""
    there = having(kept, MAIN, PLAIN, DEFAULT)
    gaps = {
        key: {n: k.gap(DEFAULT, PLAIN, "best", True, key) for n, k in there.items()}
        for key in ("nll", "brier")
    }
    rows = []
    for name, k in there.items():
        seeds = k.seeds(PLAIN, DEFAULT)
        maps = [k.best_map(row, "best", seeds) for row in (PLAIN, DEFAULT)]
        values = [
            np.mean(k.each(row, seeds, "best", "test", fix, "nll"))
            for row, fix in zip((PLAIN, DEFAULT), maps, strict=True)
        ]
        rows.append(
            [
                NAMES[name],
                str(len(seeds)),
                f"{values[0]:.4f} ({maps[0]})",
                f"{values[1]:.4f} ({maps[1]})",
                cell(gaps["nll"][name]),
                cell(gaps["brier"][name]),
                cell(k.gap(DEFAULT)),
            ]
        )
    head = ["", "seeds", "plain BCE", "default", "NLL", "Brier", "NLL, last epoch, raw"]
    nll = gaps["nll"]
    lower = {n for n, gap in nll.items() if gap.verdict == "lower" == gaps["brier"][n].verdict}
    goal = {"digits", "photographs"} <= lower and len(lower) > 2
    harm = any(gap.verdict == "higher" for gap in nll.values())
    kind = all(gap.value <= 1 for gap in nll.values())
    word = "No" if harm else "Yes" if goal and kind else "Undecided"
    left = [n for n in MAIN if n not in there]
    line = f"{word}. Its NLL: {by_verdict(nll)}."
    if left:
        line += f" Not run yet: {listed(NAMES[n] for n in left)}."
    return Answer(line, report.table(head, rows), truth(kept))


PAIRS = (
    ("draw, towards the base rate", BEST_FIXED, SMOOTHED_BASE),
    ("draw, towards ½", DRAWN_HALF, SMOOTHED),
    ("base rate, drawn", BEST_FIXED, DRAWN_HALF),
    ("base rate, expected", SMOOTHED_BASE, SMOOTHED),
)


def second(kept: Tasks) -> Answer:
    """Is it the draw, the base rate, or both? Calibration or refinement?"""
    rows, found = [], {}
    for words, one, two in PAIRS:
        for name, k in having(kept, MAIN, one, two).items():
            last = {key: k.gap(one, two, key=key) for key in ("nll", "nll_refined")}
            both = k.gap(one, two, "best", True)
            found[words, name] = last["nll"]
            rows.append(
                [words, NAMES[name], cell(last["nll"]), cell(last["nll_refined"]), cell(both)]
            )
    head = ["", "", "NLL, last epoch, raw", "of it refinement", "NLL, stopped early, repaired"]
    shown: dict[str, list[str]] = {words: [] for words, _ in found}
    for (words, name), gap in found.items():
        if gap.verdict != "undecided":
            shown[words].append(f"{NAMES[name]} {gap.value:+.1f} %")
    lower = {w.split(",")[0] for (w, _), gap in found.items() if gap.verdict == "lower"}
    word = "Both" if len(lower) > 1 else f"The {lower.pop()}" if lower else "Neither is shown"
    said = "; ".join(f"{w} ({', '.join(names)})" for w, names in shown.items() if names)
    line = f"{word}, after the last epoch and unrepaired. What is shown to change the NLL: "
    line += f"{said or 'nothing'}."
    without = [words for words, names in shown.items() if not names]
    if said and without:
        line += f" Not shown: {'; '.join(without)}."
    whole = {n: k.gap(BEST_FIXED) for n, k in having(kept, MAIN, BEST_FIXED, PLAIN).items()}
    gain = [
        f"{NAMES[n]} {_refined(kept[n]):.1f} of {-gap.value:.1f} %"
        for n, gap in whole.items()
        if gap.verdict == "lower"
    ]
    if gain:
        line += f" Of what moderation .2 gains there, refinement is {listed(gain)}."
    return Answer(line, report.table(head, rows))


def _refined(k: Kept) -> float:
    """What drawn moderation gains in refinement, in per cent of plain BCE's NLL."""
    share = k.mean(PLAIN, "last", RAW, "nll_refined") / k.mean(PLAIN, "last", RAW, "nll")
    return -share * k.gap(BEST_FIXED, key="nll_refined").value


def _tried(k: Kept) -> dict[str, float]:
    """Raw NLL at the last epoch of each fixed level, on the seeds of the default."""
    rows = [row for row in FIXED if k.has(row, DEFAULT)]
    seeds = k.seeds(DEFAULT, *rows)
    return {row: float(np.mean(k.each(row, seeds, "last", "test", RAW, "nll"))) for row in rows}


def _levels(k: Kept) -> list[float]:
    return [run["history"]["level"][-1] for run in k.runs[DEFAULT].values()]


def third(kept: Tasks) -> Answer:
    """Does the adaptive level find the best fixed one? Does a level per sample help?"""
    rows, gaps = [], {}
    for name, k in having(kept, MAIN, PLAIN, DEFAULT, BEST_FIXED).items():
        means = _tried(k)
        best = min(means, key=means.__getitem__)
        gaps[name] = k.gap(DEFAULT, best)
        level = _levels(k)
        rows.append(
            [
                NAMES[name],
                f"{title(best)} (of {len(means)})",
                f"{min(level):.2f} to {max(level):.2f}",
                cell(gaps[name]),
                cell(k.gap(DEFAULT, best, "best", True)),
            ]
        )
    head = [
        "",
        "best fixed, by hindsight",
        "level at the end",
        "default against it, raw",
        "stopped early, repaired",
    ]
    table = report.table(head, rows)
    each = having(
        kept, ("digits", "photographs", "digits-replaced", "digits-borders"), DEFAULT, SHARED
    )
    focus = {name: k.gap(DEFAULT, SHARED) for name, k in each.items()}
    if focus:
        body = [
            [NAMES[n], cell(gap), cell(each[n].gap(DEFAULT, SHARED, "best", True)), _found(each[n])]
            for n, gap in focus.items()
        ]
        table += "\n\nA level per sample (the default) against one for all:\n\n"
        table += report.table(
            [
                "",
                "NLL, last epoch, raw",
                "stopped early, repaired",
                "wrong masks found by level (by loss), AUROC",
            ],
            body,
        )
    beyond = any(gap.low > 2 for gap in gaps.values())
    within = all(gap.high <= 2 for gap in gaps.values()) and len(gaps) == len(MAIN)
    word = "No" if beyond else "Yes" if within else "Undecided"
    line = f"{word}. After the last epoch and unrepaired, its NLL against the best fixed level: "
    line += f"{by_verdict(gaps)}."
    if focus:
        line += f" A level per sample, against one for all: {by_verdict(focus)}."
    return Answer(line, table)


def _found(k: Kept) -> str:
    runs = list(k.runs[DEFAULT].values())
    if "wrong" not in runs[0]:
        return ""
    level, loss = (np.mean([run["wrong"][key] for run in runs]) for key in ("level", "loss"))
    return f"{level:.2f} ({loss:.2f})"


def _rivals(kept: Tasks) -> "tuple[dict[str, Kept], list[str]]":
    there = having(kept, ("digits", "photographs"), PLAIN, DEFAULT)
    rows = [
        row
        for row in dict.fromkeys((*RIVALS, BEST_FIXED, *OTHERS))
        if any(k.has(row, DEFAULT) for k in there.values())
    ]
    return there, rows


def fourth(kept: Tasks) -> Answer:
    """Which rivals are better, where?"""
    there, names = _rivals(kept)
    shown: list[list[str]] = []
    rest: list[list[str]] = []
    wins: dict[str, list[str]] = {}
    for row in names:
        cells, sure = [], False
        for name, k in there.items():
            if not k.has(row, DEFAULT):
                cells += ["", ""]
                continue
            raw, both = k.gap(row, DEFAULT), k.gap(row, DEFAULT, "best", True)
            cells += [cell(raw), cell(both)]
            sure = sure or both.verdict != "undecided"
            if both.verdict == "lower":
                wins.setdefault(name, []).append(f"{title(row)} ({figures(both)})")
        (shown if sure else rest).append([title(row), *cells])
    head = [""]
    for name in there:
        head += [f"{NAMES[name]}: last epoch, raw", f"{NAMES[name]}: stopped early, repaired"]
    said = "; ".join(f"on {NAMES[name]} {', '.join(won)}" for name, won in wins.items())
    line = f"Stopped early and repaired, better than the default: {said or 'none is shown'}."
    if not shown:
        return Answer(line, report.table(head, rest))
    return Answer(line, report.table(head, shown), report.table(head, rest) if rest else "")


def fifth(kept: Tasks) -> Answer:
    """Under corruption and without validation data, which loss is the safest?"""
    there = having(kept, MAIN, PLAIN, BEST_FIXED)
    rows = {row: [title(row)] for row in SOFTER}
    for row, cells in rows.items():
        for k in there.values():
            if not k.has(row, PLAIN):
                cells.append("")
                continue
            mean = f"{corrupted(k, row, k.seeds(row)).mean():.4f}"
            cells.append(mean if row == PLAIN else f"{mean}, {cell(_under_corruption(k, row))}")
    safest: dict[str, list[str]] = {}
    for name, k in there.items():
        gaps = {row: _under_corruption(k, row) for row in SOFTER if k.has(row, PLAIN)}
        least = min(gaps, key=lambda row: gaps[row].value)
        against = "" if least == PLAIN else f" ({figures(gaps[least])})"
        safest.setdefault(least, []).append(f"{NAMES[name]}{against}")
    said = "; ".join(f"{title(row)} on {listed(names)}" for row, names in safest.items())
    line = (
        "After the last epoch and unrepaired, the lowest mean NLL on corrupted data (against plain "
        f"BCE): {said}."
    )
    line += " Stopped early and repaired on clean data"
    for words, row in ((", the default: ", DEFAULT), (" Moderation .2, drawn: ", BEST_FIXED)):
        both = {n: _under_corruption(k, row, True) for n, k in there.items() if k.has(row, PLAIN)}
        line += f"{words}{by_verdict(both)}."
    head = ["", *(NAMES[name] for name in there)]
    repaired = [
        [
            title(row),
            *(
                cell(_under_corruption(k, row, True)) if k.has(row, PLAIN) else ""
                for k in there.values()
            ),
        ]
        for row in SOFTER[1:]
    ]
    few = report.table(head, [rows[row] for row in (PLAIN, SMOOTHED, BEST_FIXED, DEFAULT)])
    others = report.table(head, list(rows.values()))
    words = "The same, stopped early and repaired on validation data that are not corrupted:"
    return Answer(line, few, f"{others}\n\n{words}\n\n{report.table(head, repaired)}")


def corrupted(
    k: Kept, row: str, seeds: Sequence[int], epoch: str = "last", fix: str = RAW
) -> "NDArray[np.float64]":
    """NLL of each seed, mean of the kinds and severities."""
    each = k.each(row, seeds, epoch, "corrupted", fix)
    return np.array([np.mean([brief[0] for brief in one.values()]) for one in each])


def _under_corruption(k: Kept, row: str, repaired: bool = False) -> Gap:
    """Against plain BCE, over the seeds: the last epoch, raw, or stopped early and repaired."""
    seeds = k.seeds(row, PLAIN)
    epoch = "best" if repaired else "last"
    a, b = (
        corrupted(k, name, seeds, epoch, k.best_map(name, epoch, seeds) if repaired else RAW)
        for name in (row, PLAIN)
    )
    return over_seeds(a, b, SEEDED.get(k.task, 0.0)).percent


def no_object(kept: Tasks) -> str:
    """Images that show none of what is looked for, and whether confidence tells them apart."""
    there = having({n: k for n, k in kept.items() if "ood" in k.all[0]["last"]}, MAIN, PLAIN)
    rows = []
    for row in SOFTER:
        cells = []
        for k in there.values():
            if not k.has(row):
                cells += ["", ""]
                continue
            each = np.array(k.each(row, k.seeds(row), "last", "ood", RAW))
            spread = each.std(0, ddof=1)
            cells += [
                f"{each[:, 0].mean():.3f} ± {spread[0]:.3f}",
                f"{each[:, -2].mean():.2f} ± {spread[-2]:.2f}",
            ]
        rows.append([title(row), *cells])
    head = [""]
    for name in there:
        head += [f"{NAMES[name]}: NLL", f"{NAMES[name]}: AUROC of confidence"]
    return report.table(head, rows)


def truth(kept: Tasks) -> str:
    """Where the true probabilities are known: the distance from them, in no bins."""
    if "rates" not in kept or not kept["rates"].has(PLAIN, DEFAULT):
        return ""
    k, rows = kept["rates"], []
    for row in (PLAIN, DEFAULT, BEST_FIXED, SMOOTHED, SMOOTHED_BASE):
        if not k.has(row):
            continue
        seeds = k.seeds(row)
        for epoch, fix, words in (
            ("last", RAW, "last epoch, raw"),
            ("best", RAW, "stopped early, raw"),
            ("best", k.best_map(row, "best", seeds), "stopped early, repaired"),
        ):
            tested = k.each(row, seeds, epoch, "test", fix)
            distance = [
                np.mean([one["chance"][key] for one in tested])
                for key in ("absolute", "squared", "calibration")
            ]
            ratio = np.mean(
                [one["labels"]["mean"][-1] / one["labels"]["base_rate"][-1] for one in tested]
            )
            rows.append(
                [
                    title(row),
                    words,
                    f"{distance[0]:.4f}",
                    f"{1e3 * distance[1]:.2f}",
                    f"{1e3 * distance[2]:.2f}",
                    f"{ratio:.2f}",
                ]
            )
    head = [
        "",
        "",
        "|p - P|",
        "1000 (p - P)^2",
        "of it calibration",
        "mean p / base rate, label of .01",
    ]
    words = "Known rates: distance of the answers p from the true chances P, mean of the labels."
    return f"{words}\n\n{report.table([cell.replace('|', '&#124;') for cell in head], rows)}"


Few = dict[tuple[str, str, str], tuple[float, list[float]]]


def _few(kept: Tasks) -> Few:
    """Plain BCE's NLL by task, epoch and repair: raw, and repaired from 10, 25, 50, 150 images."""
    found: Few = {}
    for name, k in having(kept, ("digits", "photographs"), PLAIN).items():
        for epoch in EPOCHS:
            for repair in REPAIRS:
                few = [
                    float(
                        np.mean(
                            [
                                score[0]
                                for scores in k.each(
                                    PLAIN, k.seeds(PLAIN), epoch, "few", str(count), repair
                                )
                                for score in scores
                            ]
                        )
                    )
                    for count in IMAGES
                ]
                raw, full = (k.mean(PLAIN, epoch, fix, "nll") for fix in (RAW, repair))
                found[name, epoch, repair] = raw, [*few, full]
    return found


ENDS = dict(zip(EPOCHS, ("last epoch", "stopped early"), strict=True))


def sixth(kept: Tasks) -> Answer:
    """How many validation images does each repair need?"""
    found, counts = _few(kept), [*IMAGES, 150]
    enough: dict[str, list[float]] = {}
    rows = {}
    for (name, epoch, repair), (raw, few) in found.items():
        helped = (c for c, x in zip(counts, few, strict=True) if x < raw)
        enough.setdefault(repair, []).append(next(helped, np.inf))
        rows[name, epoch, repair] = [
            f"{NAMES[name]}, {ENDS[epoch]}",
            repair,
            f"{raw:.4f}",
            *(f"{x:.4f}" for x in few),
        ]
    said = [
        f"{repair} {max(least):.0f}" if np.isfinite(max(least)) else f"{repair} more than 150"
        for repair, least in enough.items()
    ]
    line = (
        "Of 10, 25, 50 and 150 images, the fewest that lower plain BCE's mean NLL on digits and "
        f"photographs, stopped early or not: {listed(said)}."
        if said
        else "Not run yet."
    )
    head = ["plain BCE", "repair", "raw", *(f"{count} images" for count in counts)]
    few_rows = [
        row
        for (_, epoch, repair), row in rows.items()
        if epoch == "best" and repair in ("temperature", "isotonic")
    ]
    return Answer(line, report.table(head, few_rows), report.table(head, list(rows.values())))


def slopes(kept: Tasks) -> dict[str, tuple[float, Gap, Gap]]:
    """Plain BCE's slope on validation at the last epoch, and what drawn moderation .2 changes."""
    return {
        name: (
            float(np.mean([run["history"]["slope"][-1] for run in k.runs[PLAIN].values()])),
            k.gap(BEST_FIXED),
            k.gap(BEST_FIXED, PLAIN, "best", True),
        )
        for name, k in having(kept, NAMES, PLAIN, BEST_FIXED).items()
    }


def seventh(kept: Tasks) -> Answer:
    """Does the slope tell beforehand where a softening loss helps?"""
    found = slopes(kept)
    rows = [
        [NAMES[name], f"{slope:.2f}", cell(raw), cell(both)]
        for name, (slope, raw, both) in found.items()
    ]
    head = ["", "slope of plain BCE", "moderation .2, last epoch, raw", "stopped early, repaired"]
    right = {
        name: (slope < 1) == (raw.verdict == "lower")
        for name, (slope, raw, _) in found.items()
        if raw.verdict != "undecided"
    }
    wrong = [NAMES[name] for name, good in right.items() if not good]
    word = "No" if len(wrong) > 1 else "Undecided" if wrong or len(right) < 2 else "Yes"
    shown = sum(right.values())
    line = (
        f"{word}, after the last epoch and unrepaired: a slope below 1 predicts whether moderation "
        f".2 lowers the NLL on {shown} of the {len(right)} tasks and variants on which a "
        f"difference is shown, of {len(found)} tried"
    )
    line += f"; it is wrong on {listed(wrong)}." if wrong else "."
    helped = [NAMES[n] for n, (s, _, both) in found.items() if s < 1 and both.verdict == "lower"]
    line += (
        " After early stopping and repair it predicts little: a gain is shown on "
        f"{listed(helped) if helped else 'none of them'}."
    )
    return Answer(line, report.table(head, rows))


QUESTIONS: tuple[tuple[str, Callable[[Tasks], Answer]], ...] = (
    ("Stopped early and repaired, does our default beat plain BCE?", first),
    ("Is it the draw, the base rate, or both?", second),
    ("Does the adaptive level find the best fixed one?", third),
    ("Which rival is better than ours, and on which task?", fourth),
    ("Which loss is the safest if nothing can be repaired?", fifth),
    ("How many validation images does a repair need?", sixth),
    ("Does plain BCE's slope predict when softening helps?", seventh),
)


# ---------------------------------------------------------------- the parts of the page


def answers(kept: Tasks) -> str:
    return "\n".join(
        f"{i}. **{asked}** {answer(kept).line}" for i, (asked, answer) in enumerate(QUESTIONS, 1)
    )


def state(kept: Tasks) -> str:
    """How much of the plan is there, and what it has cost."""
    wanted = [run for run in planned(list(NAMES)) if run[0] in NAMES]
    there = sum(len(k.all) for k in kept.values())
    done = sum(
        is_planned(run["task"], run["row"], run["seed"]) for k in kept.values() for run in k.all
    )
    hours = sum(k.hours for k in kept.values())
    each = ", ".join(f"{NAMES[name]} {len(k.all)}" for name, k in kept.items())
    left = len(wanted) - done
    partial = (
        f"**Partial:** {left} of {len(wanted)} planned runs are missing. What rests on them is "
        "left out, and more seeds will narrow the intervals. "
        if left > 0
        else ""
    )
    return f"{partial}{there} runs ({each}), {hours:.1f} hours of one core."


def made_of(kept: Tasks) -> str:
    versions = {tuple(run["versions"].items()) for k in kept.values() for run in k.all}
    shown = "; ".join(", ".join(f"{name} {v}" for name, v in one) for one in sorted(versions))
    hashes = "; ".join(
        f"{NAMES[name]} {k.all[0]['data']}" for name, k in kept.items() if name not in SEEDED
    )
    tuned = "; ".join(
        f"{NAMES[name]}: {', '.join(ROWS[row].title for row in k.tuned.values())}"
        for name, k in kept.items()
        if k.tuned
    )
    return f"Versions: {shown}.\n\nData: {hashes}.\n\nTuned: {tuned}."


def section(number: int) -> Callable[[Tasks], str]:
    """A question's answer, figure and small table, and the rest to unfold."""

    def text(kept: Tasks) -> str:
        said = QUESTIONS[number - 1][1](kept)
        more = said.more and (
            '\n\n<details markdown="1">\n<summary>The whole table</summary>\n\n'
            f"{said.more}\n\n</details>"
        )
        return f"{said.line}\n\n@{PICTURES[number - 1]}\n\n{said.table}{more}"

    return text


def readme(kept: Tasks) -> str:
    """Four rows and at most four columns, mean NLL, and what they show."""
    there = having(kept, MAIN, PLAIN, DEFAULT)
    shown = list(there)[:4]
    lines = (
        ("plain BCE, to the last epoch", PLAIN, "last", False),
        ("plain BCE, stopped early and repaired", PLAIN, "best", True),
        ("adaptive, to the last epoch", DEFAULT, "last", False),
        ("adaptive, stopped early and repaired", DEFAULT, "best", True),
    )
    rows = []
    for words, row, epoch, repaired in lines:
        cells = []
        for name in shown:
            k = there[name]
            seeds = k.seeds(PLAIN, DEFAULT)
            fix = k.best_map(row, epoch, seeds) if repaired else RAW
            cells.append(f"{np.mean(k.each(row, seeds, epoch, 'test', fix, 'nll')):.4f}")
        rows.append([words, *cells])
    table = report.table(["NLL on test data", *(NAMES[name] for name in shown)], rows)
    ends, both = (
        by_verdict(
            {name: there[name].gap(DEFAULT, PLAIN, epoch, repaired) for name in shown},
            intervals=False,
        )
        for epoch, repaired in (("last", False), ("best", True))
    )
    return (
        f"{table}\n\nNLL of the adaptive loss against plain BCE:\n\n"
        f"- both to the last epoch: {ends};\n- both stopped early and repaired: {both}."
    )


def table_csv(kept: Tasks) -> str:
    """Every row of every task: mean and standard deviation over the seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [key for key in next(iter(kept.values())).all[0]["last"]["test"][RAW] if key != "labels"]
    writer.writerow(
        ["task", "row", "epoch", "map", "seeds", *(f"{k}{s}" for k in keys for s in ("", " sd"))]
    )
    for name, k in kept.items():
        for row in (row for row in ROWS if row in k.runs):
            seeds = k.seeds(row)
            for epoch in EPOCHS:
                for fix in MAPS:
                    values = [k.each(row, seeds, epoch, "test", fix, key) for key in keys]
                    figures = [
                        f"{x:.4g}"
                        for each in values
                        for x in (np.mean(each), np.std(each, ddof=1) if len(each) > 1 else np.nan)
                    ]
                    writer.writerow([name, row, epoch, fix, len(seeds), *figures])
    return text.getvalue()


# ---------------------------------------------------------------- pictures


def _figure(columns: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False).ravel().tolist()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=7)
    return figure, axes


MARKS = {
    PLAIN: ("X", COLOURS[0], "plain BCE"),
    DEFAULT: ("o", COLOURS[4], "adaptive (default)"),
    BEST_FIXED: ("D", COLOURS[5], "moderation .2 to base rate"),
    "published": ("v", COLOURS[6], "adaptive as published"),
    SMOOTHED: ("s", COLOURS[3], "smoothing .1 to ½"),
    "mixup": ("P", COLOURS[1], "mixup"),
    "ensemble": ("*", COLOURS[1], "ensemble of 3"),
}


def parts_figure(kept: Tasks) -> "Figure":
    """All rows: miscalibration against refinement, at the last epoch and stopped early."""
    from matplotlib.ticker import LogLocator

    there = having(kept, MAIN, PLAIN)
    figure, axes = _figure(max(len(there), 1), max(1.9 * len(there), 6.0), 3.6)
    for one, (name, k) in zip(axes, there.items(), strict=False):
        for row in k.runs:
            family = next((f for f, best in k.tuned.items() if best == row), row)
            mark, colour, label = MARKS.get(family, (".", "#888888", "other rows"))
            if any(row in members and k.tuned.get(f) != row for f, members in FAMILIES.items()):
                continue
            seeds = k.seeds(row)
            if len(seeds) < 2:
                continue
            for epoch in EPOCHS:
                nll, refined = (
                    np.array(k.each(row, seeds, epoch, "test", RAW, key))
                    for key in ("nll", "nll_refined")
                )
                x, y = refined, nll - refined
                half = [1.96 * v.std(ddof=1) / len(seeds) ** 0.5 for v in (x, y)]
                one.errorbar(
                    x.mean(),
                    y.mean(),
                    xerr=half[0],
                    yerr=half[1],
                    fmt=mark,
                    color=colour,
                    markerfacecolor=colour if epoch == "last" else "white",
                    markersize=6,
                    elinewidth=0.6,
                    label=label if epoch == "last" else None,
                    zorder=2 if label == "other rows" else 3,
                )
        one.set_title(NAMES[name], fontsize=9)
        one.set_yscale("log")
        one.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.yaxis.set_major_formatter("{x:g}")
        one.minorticks_off()
        one.locator_params(axis="x", nbins=3)
        one.set_xlabel("refinement (NLL)", fontsize=8)
    axes[0].set_ylabel("miscalibration (NLL)", fontsize=8)
    named: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=4,
        fontsize=7,
        frameon=False,
    )
    return figure


Change = Callable[[Kept, str], "Gap | None"]


def _against(other: str, epoch: str, repaired: bool) -> Change:
    def change(k: Kept, row: str) -> "Gap | None":
        return k.gap(row, other, epoch, repaired) if k.has(row, other) else None

    return change


def _forest(
    there: dict[str, Kept],
    rows: Sequence[tuple[str, str]],
    changes: Sequence[tuple[str, Change]],
    words: str,
) -> "Figure":
    """A panel per task, a line per row (its words and name), a mark per change with its interval.

    A mark is filled if the interval excludes 0.
    """
    height = 0.24 * len(rows) * len(changes) ** 0.5 + 1.2
    figure, axes = _figure(max(len(there), 1), 1.5 * max(len(there), 1) + 2.2, height)
    steps = np.linspace(0.15, -0.15, len(changes)) if len(changes) > 1 else [0.0]
    for one, k in zip(axes, there.values(), strict=False):
        one.axvline(0, color="#888888", linewidth=1)
        ends: list[float] = []
        for place, (_, row) in enumerate(rows[::-1]):
            for step, mark, (_, change) in zip(steps, "os", changes, strict=False):
                gap = change(k, row)
                if gap is None:
                    continue
                y, finite = place + step, np.isfinite(gap.low)
                ends += [gap.value, *((gap.low, gap.high) if finite else ())]
                if finite:
                    one.plot([gap.low, gap.high], [y, y], color="#000000", linewidth=0.8)
                one.plot(
                    gap.value,
                    y,
                    mark,
                    color="#000000",
                    markersize=4,
                    markerfacecolor="#000000" if gap.verdict != "undecided" and finite else "white",
                )
        one.set_yticks(range(len(rows)), [words for words, _ in rows[::-1]])
        one.set_ylim(-0.6, len(rows) - 0.4)
        one.tick_params(left=one is axes[0], labelleft=one is axes[0])
        one.locator_params(axis="x", nbins=4)
        one.set_title(NAMES[k.task], fontsize=9)
    figure.supxlabel(words, fontsize=8)
    if len(changes) > 1:
        for mark, (label, _) in zip("os", changes, strict=False):
            axes[0].plot([], [], mark, color="#000000", markersize=4, label=label)
        figure.legend(loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    return figure


def _both(other: str) -> list[tuple[str, Change]]:
    return [
        ("last epoch, raw", _against(other, "last", False)),
        ("stopped early, repaired", _against(other, "best", True)),
    ]


def gaps_figure(kept: Tasks) -> "Figure":
    """Against plain BCE, both stopped early and repaired."""
    names = (DEFAULT, BEST_FIXED, SMOOTHED_BASE, DRAWN_HALF, SMOOTHED, "published", "decay")
    rows = [(title(name), name) for name in names]
    there = having(kept, MAIN, PLAIN, DEFAULT)
    return _forest(there, rows, _both(PLAIN)[1:], "NLL against plain BCE, %")


def draws_figure(kept: Tasks) -> "Figure":
    """The four contrasts of draw and base rate."""
    seconds = {words: two for words, _, two in PAIRS}
    firsts = {words: one for words, one, _ in PAIRS}

    def change(epoch: str, repaired: bool) -> Change:
        return lambda k, words: _against(seconds[words], epoch, repaired)(k, firsts[words])

    there = {n: k for n, k in kept.items() if n in having(kept, MAIN, BEST_FIXED, SMOOTHED_BASE)}
    return _forest(
        there,
        [(words, words) for words in firsts],
        [
            ("last epoch, raw", change("last", False)),
            ("stopped early, repaired", change("best", True)),
        ],
        "change of NLL, %",
    )


def _legend(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def levels_figure(kept: Tasks) -> "Figure":
    """Raw NLL at the last epoch over the level: fixed ones, and the adaptive loss at its own."""
    there = having(kept, MAIN, PLAIN, DEFAULT, BEST_FIXED)
    figure, axes = _figure(max(len(there), 1), 1.8 * max(len(there), 1) + 0.8, 2.8)
    for one, k in zip(axes, there.values(), strict=False):
        means = _tried(k)
        levels = [0.0 if row == PLAIN else float(row.rsplit("-", 1)[1]) for row in means]
        base = means[PLAIN]
        order = np.argsort(levels)
        change = [100 * (value / base - 1) for value in means.values()]
        one.plot(
            np.array(levels)[order],
            np.array(change)[order],
            "o-",
            color="#000000",
            markersize=4,
            linewidth=1,
            label="fixed level",
        )
        seeds = k.seeds(DEFAULT, *means)
        value = np.mean(k.each(DEFAULT, seeds, "last", "test", RAW, "nll"))
        one.plot(
            float(np.mean(_levels(k))),
            100 * (value / base - 1),
            "*",
            color=COLOURS[5],
            markersize=11,
            markeredgecolor="#000000",
            label="adaptive (default)",
        )
        one.set_title(NAMES[k.task], fontsize=9)
        one.set_xlim(-0.03, 0.43)
    figure.supxlabel("level towards the base rate, drawn per sample", fontsize=8)
    axes[0].set_ylabel("NLL against plain BCE, %", fontsize=8)
    _legend(axes[0])
    return figure


def rivals_figure(kept: Tasks) -> "Figure":
    there, names = _rivals(kept)
    rows = [(title(name), name) for name in names]
    return _forest(there, rows, _both(DEFAULT), "NLL against the adaptive default, %")


def corrupted_figure(kept: Tasks) -> "Figure":
    def change(repaired: bool) -> Change:
        return lambda k, row: _under_corruption(k, row, repaired) if k.has(row, PLAIN) else None

    return _forest(
        having(kept, MAIN, PLAIN, BEST_FIXED),
        [(title(name), name) for name in SOFTER[1:]],
        [("last epoch, raw", change(False)), ("stopped early, repaired", change(True))],
        "NLL on corrupted data against plain BCE, %",
    )


def images_figure(kept: Tasks) -> "Figure":
    """What each repair changes, over the number of validation images."""
    found = _few(kept)
    panels = list(dict.fromkeys((name, epoch) for name, epoch, _ in found))
    figure, axes = _figure(max(len(panels), 1), 2.2 * max(len(panels), 1) + 0.8, 2.8)
    looks = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"))
    for one, (name, epoch) in zip(axes, panels, strict=False):
        one.axhline(0, color="#888888", linewidth=1)
        for repair, (mark, line), colour in zip(
            REPAIRS, looks, COLOURS[:1] + COLOURS[3:], strict=False
        ):
            raw, few = found[name, epoch, repair]
            one.plot(
                [*IMAGES, 150],
                [100 * (x / raw - 1) for x in few],
                marker=mark,
                linestyle=line,
                color=colour,
                markersize=4,
                linewidth=1,
                label=repair,
            )
        one.set_title(f"{NAMES[name]}, {ENDS[epoch]}", fontsize=9)
        one.set_xscale("log")
        one.set_xticks([*IMAGES, 150], [str(count) for count in (*IMAGES, 150)])
        one.minorticks_off()
    figure.supxlabel("validation images", fontsize=8)
    axes[0].set_ylabel("change of plain BCE's NLL, %", fontsize=8)
    _legend(axes[-1])
    return figure


def slopes_figure(kept: Tasks) -> "Figure":
    """What moderation .2 changes, over plain BCE's slope."""
    figure, axes = _figure(2, 7.6, 3.2)
    found = slopes(kept)
    for one, words in zip(axes, ("last epoch, raw", "stopped early, repaired"), strict=True):
        one.axhline(0, color="#888888", linewidth=1)
        one.axvline(1, color="#888888", linewidth=1, linestyle="--")
        for name, (slope, raw, both) in found.items():
            gap = raw if one is axes[0] else both
            one.plot([slope, slope], [gap.low, gap.high], color="#000000", linewidth=1)
            face = COLOURS[4] if name in MAIN else "white"
            one.plot(slope, gap.value, "o", color=COLOURS[4], markersize=5, markerfacecolor=face)
            if name in MAIN:
                one.annotate(
                    NAMES[name], (slope, gap.value), (4, 4), textcoords="offset points", fontsize=7
                )
        one.set_title(words, fontsize=9)
        one.set_xlabel("calibration slope of plain BCE (validation)", fontsize=8)
        most = max((abs(values[1].value) for values in found.values()), default=0.0)
        one.set_ylim(-1.5 * most - 5, 1.5 * most + 5)  # a wide interval is cut
    axes[0].set_ylabel("NLL of moderation .2 against plain BCE, %", fontsize=8)
    axes[1].plot(
        [],
        [],
        "o",
        color=COLOURS[4],
        markerfacecolor="white",
        markersize=5,
        label="digits with fewer or wrong masks",
    )
    _legend(axes[1])
    return figure


FIGURES: dict[str, "tuple[str, Callable[[Tasks], Figure]]"] = {
    "parts": ("Miscalibration against refinement, one point per row", parts_figure),
    "gaps": ("NLL against plain BCE, both stopped early and repaired", gaps_figure),
    "draws": ("What the draw and the base rate each change", draws_figure),
    "levels": ("NLL over the fixed level, and the adaptive loss at its own", levels_figure),
    "rivals": ("NLL of the rivals against the default", rivals_figure),
    "corrupted": ("NLL against plain BCE on corrupted images", corrupted_figure),
    "images": ("Change of NLL by a repair over the number of images", images_figure),
    "slopes": ("Change of NLL over the slope of plain BCE", slopes_figure),
}
PICTURES = tuple(FIGURES)[1:]  # of the questions, in their order
TEXTS: dict[str, Callable[[Tasks], str]] = {
    "answers": answers,
    "made-of": made_of,
    "no-object": no_object,
    **{f"question-{i}": section(i) for i in range(1, len(QUESTIONS) + 1)},
}


# ---------------------------------------------------------------- the page


def page(words: str, kept: Tasks, folder: Path) -> str:
    """The words with each ``@name`` line filled in; pictures and the CSV go to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").write_text(table_csv(kept), "utf-8")

    def drawn(name: str) -> str:
        caption, draw = FIGURES[name]
        draw(kept).savefig(folder / f"{name}.png", metadata={"Software": None})
        return pictured(name, caption)

    parts: dict[str, Callable[[], str]] = {name: partial(drawn, name) for name in FIGURES}
    parts |= {name: partial(text, kept) for name, text in TEXTS.items()}
    return report.fill(words.replace("{{state}}", state(kept)), parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the page of the study from its runs.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: results/study")
    parser.add_argument("--out", type=Path, default=DOCS, help="default: docs")
    args = parser.parse_args(argv)
    kept: dict[str, Any] = load(args.results)
    if not kept:
        sys.exit(f"page.py: {args.results} holds no runs: collect some with run.py")
    kept = {name: kept[name] for name in NAMES if name in kept}
    text = page((HERE / "page.md").read_text("utf-8"), kept, args.out / "study")
    (args.out / "study.md").write_text(text, "utf-8")
    print(f"written: {args.out / 'study.md'}")


if __name__ == "__main__":
    main()
