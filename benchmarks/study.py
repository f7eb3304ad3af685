"""The page of the study, from the kept runs of ``runs.py``.

    python benchmarks/study.py

Every number, verdict and picture of ``docs/study.md`` comes from here; what stays the same
whatever the runs say stands in ``benchmarks/study.md``, where a line such as ``@answers`` is
replaced. Nothing is said beyond a 95 % interval.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from compare import Gap, over_seeds
from evaluation import IMAGES, MAPS, RAW, REPAIRS
from kept import SEEDED, Kept, load
from rows import BEST_FIXED, DEFAULT, FAMILIES, LEVELS, OTHERS, PLAIN, ROWS
from runs import EPOCHS, RESULTS, is_planned, planned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Tasks = dict[str, Kept]

HERE = Path(__file__).parent
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


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title(name: str) -> str:
    """Of a row; a family goes by what its members have in common."""
    if name in FAMILIES:
        return re.sub(r",? (margin )?[\d.]+$", "", ROWS[FAMILIES[name][0]].title) + ", tuned"
    return ROWS[name].title


def cell(gap: Gap) -> str:
    """Bold where the interval excludes 0."""
    if not np.isfinite(gap.low):
        return f"{gap.value:+.1f} % (one seed)"
    text = f"{gap.value:+.1f} % [{gap.low:+.1f}, {gap.high:+.1f}]"
    return f"**{text}**" if gap.verdict != "undecided" else text


def listed(names: Iterable[str]) -> str:
    *most, last = [NAMES.get(name, name) for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def by_verdict(gaps: dict[str, Gap]) -> str:
    """Where lower, where higher, where neither is shown."""
    said = []
    for verdict, words in (
        ("lower", "lower on"),
        ("higher", "higher on"),
        ("undecided", "neither shown on"),
    ):
        names = [name for name, gap in gaps.items() if gap.verdict == verdict]
        if names:
            each = ", ".join(f"{NAMES.get(n, n)} ({gaps[n].value:+.1f} %)" for n in names)
            said.append(f"{words} {each}")
    return "; ".join(said)


def having(kept: Tasks, names: Iterable[str], *rows: str) -> dict[str, Kept]:
    """The tasks among these that have three seeds or more of all rows."""
    return {name: kept[name] for name in names if name in kept and kept[name].has(*rows)}


def pictured(name: str, words: str) -> str:
    return f"![{words}](study/{name}.png)"


# ---------------------------------------------------------------- the questions


def first(kept: Tasks) -> tuple[str, str]:
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
            k.mean(row, "best", fix, "nll") for row, fix in zip((PLAIN, DEFAULT), maps, strict=True)
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
    answer = f"{word}. NLL of the default: {by_verdict(nll)}."
    if left:
        answer += f" Not run yet: {listed(left)}."
    return answer, markdown(head, rows)


def second(kept: Tasks) -> tuple[str, str]:
    """Is it the draw, the base rate, or both? Calibration or refinement?"""
    pairs = (
        ("draw, towards the base rate", BEST_FIXED, SMOOTHED_BASE),
        ("draw, towards ½", DRAWN_HALF, SMOOTHED),
        ("base rate, drawn", BEST_FIXED, DRAWN_HALF),
        ("base rate, expected", SMOOTHED_BASE, SMOOTHED),
    )
    rows, found = [], {}
    for words, one, two in pairs:
        for name, k in having(kept, MAIN, one, two).items():
            last = {key: k.gap(one, two, key=key) for key in ("nll", "nll_refined")}
            both = k.gap(one, two, "best", True)
            found[words, name] = last["nll"]
            rows.append(
                [words, NAMES[name], cell(last["nll"]), cell(last["nll_refined"]), cell(both)]
            )
    head = ["", "", "NLL, last epoch, raw", "of it refinement", "NLL, stopped early, repaired"]
    said = []
    for words, _, _ in pairs:
        gaps = {name: gap for (w, name), gap in found.items() if w == words}
        if gaps:
            said.append(f"{words}: {by_verdict(gaps)}")
    parts = [
        (name, k.gap(BEST_FIXED, PLAIN, key="nll_refined"), k.gap(BEST_FIXED))
        for name, k in having(kept, MAIN, BEST_FIXED, PLAIN).items()
    ]
    gain = ", ".join(
        f"{NAMES[name]} {-refined.value * refined.base / 100:.1f} of {-whole.value:.1f} %"
        for name, refined, whole in _scaled(parts, kept)
        if whole.verdict == "lower"
    )
    answer = f"At the last epoch, raw: {'. '.join(said)}."
    if gain:
        answer += f" Of what drawn moderation .2 gains on plain BCE there, refinement is {gain}."
    return answer, markdown(head, rows)


def _scaled(parts: Sequence[tuple[str, Gap, Gap]], kept: Tasks) -> list[tuple[str, Gap, Gap]]:
    """Refinement in per cent of the NLL, so that the two add up."""
    found = []
    for name, refined, whole in parts:
        k = kept[name]
        share = k.mean(PLAIN, "last", RAW, "nll_refined") / k.mean(PLAIN, "last", RAW, "nll")
        found.append((name, refined._replace(base=100 * share), whole))
    return found


def third(kept: Tasks) -> tuple[str, str]:
    """Does the adaptive level find the best fixed one? Does a level per sample help?"""
    rows, gaps = [], {}
    for name, k in having(kept, MAIN, PLAIN, DEFAULT, BEST_FIXED).items():
        tried = [row for row in FIXED if k.has(row, DEFAULT)]
        means = {row: k.mean(row, "last", RAW, "nll") for row in tried}
        best = min(means, key=means.__getitem__)
        gaps[name] = k.gap(DEFAULT, best)
        level = [run["history"]["level"][-1] for run in k.runs[DEFAULT].values()]
        rows.append(
            [
                NAMES[name],
                title(best),
                f"{min(level):.2f} to {max(level):.2f}",
                cell(gaps[name]),
                cell(k.gap(DEFAULT, best, "best", True)),
            ]
        )
    head = ["", "best fixed, by hindsight", "level at the end", "default against it, raw",
            "stopped early, repaired"]  # fmt: skip
    text = markdown(head, rows)
    each = having(kept, ("digits", "photographs", "digits-replaced", "digits-borders"),
                  DEFAULT, "adaptive-focus-2")  # fmt: skip
    focus = {name: k.gap("adaptive-focus-2", DEFAULT) for name, k in each.items()}
    if focus:
        body = [
            [NAMES[n], cell(gap), cell(each[n].gap("adaptive-focus-2", DEFAULT, "best", True)),
             _found(each[n])]
            for n, gap in focus.items()
        ]  # fmt: skip
        text += "\n\nA level per sample (focus 2) against one for all (the default):\n\n"
        text += markdown(["", "NLL, last epoch, raw", "stopped early, repaired",
                          "wrong masks found by level (by loss), AUROC"], body)  # fmt: skip
    beyond = any(gap.low > 2 for gap in gaps.values())
    within = all(gap.high <= 2 for gap in gaps.values()) and len(gaps) == len(MAIN)
    word = "No" if beyond else "Yes" if within else "Undecided"
    answer = f"{word}. Raw NLL at the last epoch, against the best fixed level: {by_verdict(gaps)}."
    if focus:
        answer += f" A level per sample, against one for all: {by_verdict(focus)}."
    return answer, text


def _found(k: Kept) -> str:
    runs = list(k.runs["adaptive-focus-2"].values())
    if "wrong" not in runs[0]:
        return ""
    level, loss = (np.mean([run["wrong"][key] for run in runs]) for key in ("level", "loss"))
    return f"{level:.2f} ({loss:.2f})"


def fourth(kept: Tasks) -> tuple[str, str]:
    """Which rivals are better, where?"""
    there = [n for n in ("digits", "photographs") if n in kept and kept[n].has(PLAIN, DEFAULT)]
    rows: list[list[str]] = []
    wins: dict[str, list[str]] = {}
    for row in dict.fromkeys((*RIVALS, BEST_FIXED, *OTHERS)):
        cells = []
        for name in there:
            k = kept[name]
            if not k.has(row, DEFAULT):
                cells += ["", ""]
                continue
            raw, both = k.gap(row, DEFAULT), k.gap(row, DEFAULT, "best", True)
            cells += [cell(raw), cell(both)]
            if both.verdict == "lower":
                wins.setdefault(name, []).append(title(row))
        if any(cells):
            rows.append([title(row), *cells])
    head = [""]
    for name in there:
        head += [f"{NAMES[name]}: last epoch, raw", f"{NAMES[name]}: stopped early, repaired"]
    said = "; ".join(f"on {NAMES[name]} {', '.join(won)}" for name, won in wins.items())
    answer = f"Stopped early and repaired, better than the default: {said or 'none is shown'}."
    return answer, markdown(head, rows)


def fifth(kept: Tasks) -> tuple[str, str]:
    """Under corruption and without validation data, which loss is the safest?"""
    rows, said = [], []
    there = having(kept, MAIN, PLAIN, BEST_FIXED)
    for row in SOFTER:
        cells = []
        for k in there.values():
            if not k.has(row):
                cells.append("")
            elif row == PLAIN:
                cells.append(f"{corrupted(k, row, k.seeds(row)).mean():.4f}")
            else:
                gap = _under_corruption(k, row)
                cells.append(f"{corrupted(k, row, k.seeds(row)).mean():.4f}, {cell(gap)}")
        rows.append([title(row), *cells])
    for name, k in there.items():
        gaps = {row: _under_corruption(k, row).value for row in SOFTER if k.has(row, PLAIN)}
        least = min(gaps, key=gaps.__getitem__)
        against = "" if least == PLAIN else f" ({cell(_under_corruption(k, least))} of plain BCE)"
        said.append(f"{NAMES[name]} {title(least)}{against}".replace("**", ""))
    answer = f"Least mean NLL over the corruptions, to the last epoch, raw: {'; '.join(said)}."
    both = {name: _under_corruption(k, DEFAULT, True) for name, k in there.items()}
    answer += f" With both stopped early and repaired before, the default: {by_verdict(both)}."
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
    words = "The same, stopped early and repaired on validation data that are not corrupted:"
    return answer, f"{markdown(head, rows)}\n\n{words}\n\n{markdown(head, repaired)}"


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
            cells += [f"{each[:, 0].mean():.3f} ± {spread[0]:.3f}",
                      f"{each[:, -2].mean():.2f} ± {spread[-2]:.2f}"]  # fmt: skip
        rows.append([title(row), *cells])
    head = [""]
    for name in there:
        head += [f"{NAMES[name]}: NLL", f"{NAMES[name]}: AUROC of confidence"]
    return markdown(head, rows)


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
                [title(row), words, f"{distance[0]:.4f}", f"{1e3 * distance[1]:.2f}",
                 f"{1e3 * distance[2]:.2f}", f"{ratio:.2f}"]
            )  # fmt: skip
    head = [
        "",
        "",
        "|p - P|",
        "1000 (p - P)^2",
        "of it calibration",
        "mean p / base rate, label of .01",
    ]
    words = "Known rates: distance of the answers p from the true chances P, mean of the labels."
    return f"{words}\n\n{markdown([cell.replace('|', '&#124;') for cell in head], rows)}"


def corrupted(
    k: Kept, row: str, seeds: Sequence[int], epoch: str = "last", fix: str = RAW
) -> "NDArray[np.float64]":
    """NLL of each seed, mean of the kinds and severities."""
    each = k.each(row, seeds, epoch, "corrupted", fix)
    return np.array([np.mean([brief[0] for brief in one.values()]) for one in each])


def sixth(kept: Tasks) -> tuple[str, str]:
    """How many validation images does each repair need?"""
    rows, said = [], []
    for name in ("digits", "photographs"):
        if name not in kept or not kept[name].has(PLAIN):
            continue
        k = kept[name]
        for epoch, words in zip(EPOCHS, ("last epoch", "stopped early"), strict=True):
            raw = k.mean(PLAIN, epoch, RAW, "nll")
            enough = {}
            for repair in REPAIRS:
                few = [_few(k, epoch, repair, count) for count in IMAGES]
                full = k.mean(PLAIN, epoch, repair, "nll")
                rows.append(
                    [f"{NAMES[name]}, {words}", repair, f"{raw:.4f}", *(f"{x:.4f}" for x in few),
                     f"{full:.4f}"]
                )  # fmt: skip
                counts = [*IMAGES, 150]
                below = [c for c, x in zip(counts, [*few, full], strict=True) if x < raw]
                enough[repair] = min(below, default=151)
            least, most = (f(enough.values()) for f in (min, max))
            span = str(least) if least == most else f"{least} to {most}"
            said.append(f"{NAMES[name]}, {words}, {span}".replace("151", "more than 150"))
    head = ["plain BCE", "repair", "raw", *(f"{count} images" for count in IMAGES), "150 images"]
    answer = (
        "The fewest of 10, 25, 50 and 150 images with which plain BCE's mean NLL falls, from the "
        f"easiest to the hardest of the four repairs: {'; '.join(said)}."
    )
    return answer, markdown(head, rows)


def _few(k: Kept, epoch: str, repair: str, count: int) -> float:
    each = k.each(PLAIN, k.seeds(PLAIN), epoch, "few", str(count), repair)
    return float(np.mean([score[0] for scores in each for score in scores]))


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


def seventh(kept: Tasks) -> tuple[str, str]:
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
    wrong = [name for name, good in right.items() if not good]
    answer = (
        f"At the last epoch, raw, drawn moderation .2 is shown to change the NLL on {len(right)} "
        f"of {len(found)} tasks and variants; a slope below 1 tells it rightly on "
        f"{sum(right.values())}"
    )
    answer += f", wrongly on {listed(wrong)}." if wrong else "."
    helped = [n for n, (s, _, both) in found.items() if s < 1 and both.verdict == "lower"]
    answer += (
        " After early stopping and repair a slope below 1 promises little: the NLL is shown to be "
        f"lower on {listed(helped) if helped else 'none of these tasks'}."
    )
    return answer, markdown(head, rows)


QUESTIONS: tuple[tuple[str, Callable[[Tasks], tuple[str, str]]], ...] = (
    ("Stopped early and repaired, does our default beat plain BCE?", first),
    ("Is it the draw, the base rate, or both?", second),
    ("Does the adaptive level find the best fixed one?", third),
    ("Which rival is better than ours, where?", fourth),
    ("Which loss is the safest where nothing can be repaired?", fifth),
    ("How many validation images does a repair need?", sixth),
    ("Does plain BCE's slope tell beforehand where softening helps?", seventh),
)


# ---------------------------------------------------------------- the parts of the page


def answers(kept: Tasks) -> str:
    lines = [
        f"{i}. **{asked}** {answer(kept)[0]}" for i, (asked, answer) in enumerate(QUESTIONS, 1)
    ]
    return "\n".join(lines)


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
        f"**Partial:** {left} of {len(wanted)} planned runs are missing; what rests on them is "
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
    def text(kept: Tasks) -> str:
        answer, table = QUESTIONS[number - 1][1](kept)
        return f"{answer}\n\n{table}"

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
    table = markdown(["NLL on test data", *(NAMES[name] for name in shown)], rows)
    ends, both = (
        by_verdict({name: there[name].gap(DEFAULT, PLAIN, epoch, repaired) for name in shown})
        for epoch, repaired in (("last", False), ("best", True))
    )
    return (
        f"{table}\n\nThe adaptive loss against plain BCE, both to the last epoch: {ends}. Both "
        f"stopped early and repaired: {both}."
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
    there = having(kept, MAIN, PLAIN)
    figure, axes = _figure(max(len(there), 1), max(2.9 * len(there), 6.0), 3.8)
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
                    x.mean(), y.mean(), xerr=half[0], yerr=half[1], fmt=mark, color=colour,
                    markerfacecolor=colour if epoch == "last" else "white", markersize=6,
                    elinewidth=0.6, label=label if epoch == "last" else None,
                    zorder=2 if label == "other rows" else 3,
                )  # fmt: skip
        one.set_title(NAMES[name], fontsize=9)
        one.set_yscale("log")
        one.locator_params(axis="x", nbins=4)
        one.set_xlabel("refinement (NLL)", fontsize=8)
    axes[0].set_ylabel("miscalibration (NLL)", fontsize=8)
    named: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=4, fontsize=7,
        frameon=False,
    )  # fmt: skip
    return figure


def gaps_figure(kept: Tasks) -> "Figure":
    """Against plain BCE, both stopped early and repaired."""
    rows = (DEFAULT, BEST_FIXED, SMOOTHED_BASE, DRAWN_HALF, SMOOTHED, "published", "decay")
    there = having(kept, MAIN, PLAIN, DEFAULT)
    figure, axes = _figure(max(len(there), 1), 2.6 * max(len(there), 1) + 1.5, 2.8)
    for one, (name, k) in zip(axes, there.items(), strict=False):
        one.axvline(0, color="#888888", linewidth=1)
        for place, row in enumerate(rows[::-1]):
            if not k.has(row, PLAIN):
                continue
            gap = k.gap(row, PLAIN, "best", True)
            sure = gap.verdict != "undecided"
            one.plot([gap.low, gap.high], [place, place], color="#000000", linewidth=1)
            one.plot(
                gap.value,
                place,
                "o",
                color="#000000",
                markerfacecolor="#000000" if sure else "white",
            )
        one.set_yticks(range(len(rows)), [title(row) for row in rows[::-1]])
        one.set_ylim(-0.5, len(rows) - 0.5)
        one.tick_params(left=one is axes[0], labelleft=one is axes[0])
        one.locator_params(axis="x", nbins=5)
        one.set_title(NAMES[name], fontsize=9)
        one.set_xlabel("NLL against plain BCE, %", fontsize=8)
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
            one.plot(slope, gap.value, "o", color=COLOURS[4], markersize=5)
            one.annotate(
                NAMES[name], (slope, gap.value), (4, 4), textcoords="offset points", fontsize=6
            )
        one.set_title(words, fontsize=9)
        one.set_xlabel("calibration slope of plain BCE (validation)", fontsize=8)
        most = max((abs(values[1].value) for values in found.values()), default=0.0)
        one.set_ylim(-1.5 * most - 5, 1.5 * most + 5)  # a wide interval is cut
    axes[0].set_ylabel("NLL of moderation .2 against plain BCE, %", fontsize=8)
    return figure


FIGURES: dict[str, "tuple[str, Callable[[Tasks], Figure]]"] = {
    "parts": ("Miscalibration against refinement, one point per row", parts_figure),
    "gaps": ("NLL against plain BCE, both stopped early and repaired", gaps_figure),
    "slopes": ("Change of NLL over the slope of plain BCE", slopes_figure),
}
TEXTS: dict[str, Callable[[Tasks], str]] = {
    "answers": answers,
    "made-of": made_of,
    "no-object": no_object,
    "truth": truth,
    **{f"question-{i}": section(i) for i in range(1, len(QUESTIONS) + 1)},
}


# ---------------------------------------------------------------- the page


def page(words: str, kept: Tasks, folder: Path) -> str:
    """The words with each ``@name`` line filled in; pictures and the CSV go to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").write_text(table_csv(kept), "utf-8")

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name in TEXTS:
            return TEXTS[name](kept)
        if name not in FIGURES:
            known = ", ".join(f"@{known}" for known in (*TEXTS, *FIGURES))
            raise ValueError(f"Expected one of {known}, but the words have @{name}")
        caption, draw = FIGURES[name]
        draw(kept).savefig(folder / f"{name}.png", metadata={"Software": None})
        return pictured(name, caption)

    words = words.replace("{{state}}", state(kept))
    return re.sub(r"^@([\w-]+)$", fill, words, flags=re.M)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the page of the study from its runs.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: results/study")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="default: docs")
    args = parser.parse_args(argv)
    kept: dict[str, Any] = load(args.results)
    if not kept:
        sys.exit(f"study.py: {args.results} holds no runs: collect some with runs.py")
    kept = {name: kept[name] for name in NAMES if name in kept}
    text = page((HERE / "study.md").read_text("utf-8"), kept, args.out / "study")
    (args.out / "study.md").write_text(text, "utf-8")
    print(f"written: {args.out / 'study.md'}")


if __name__ == "__main__":
    main()
