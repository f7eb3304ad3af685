"""The questions of the study, and what its kept runs answer. Nothing is said beyond an interval."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.study.compare import Gap, over_seeds
from benchmarks.study.judge import IMAGES, RAW, REPAIRS
from benchmarks.study.kept import SEEDED, Kept
from benchmarks.study.rows import BEST_FIXED, DEFAULT, FAMILIES, LEVELS, OTHERS, PLAIN, ROWS, SHARED
from benchmarks.study.run import EPOCHS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Tasks = dict[str, Kept]

NAMES = {
    "pretrained": "pretrained network",
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
MAIN = tuple(NAMES)[:6]
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


def tried(k: Kept) -> dict[str, float]:
    """Raw NLL at the last epoch of each fixed level, on the seeds of the default."""
    rows = [row for row in FIXED if k.has(row, DEFAULT)]
    seeds = k.seeds(DEFAULT, *rows)
    return {row: float(np.mean(k.each(row, seeds, "last", "test", RAW, "nll"))) for row in rows}


def last_levels(k: Kept) -> list[float]:
    return [run["history"]["level"][-1] for run in k.runs[DEFAULT].values()]


def third(kept: Tasks) -> Answer:
    """Does the adaptive level find the best fixed one? Does a level per sample help?"""
    rows, gaps = [], {}
    for name, k in having(kept, MAIN, PLAIN, DEFAULT, BEST_FIXED).items():
        means = tried(k)
        best = min(means, key=means.__getitem__)
        gaps[name] = k.gap(DEFAULT, best)
        level = last_levels(k)
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


def rivals_tried(kept: Tasks) -> "tuple[dict[str, Kept], list[str]]":
    there = having(kept, ("digits", "photographs"), PLAIN, DEFAULT)
    rows = [
        row
        for row in dict.fromkeys((*RIVALS, BEST_FIXED, *OTHERS))
        if any(k.has(row, DEFAULT) for k in there.values())
    ]
    return there, rows


def fourth(kept: Tasks) -> Answer:
    """Which rivals are better, where?"""
    there, names = rivals_tried(kept)
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
            cells.append(mean if row == PLAIN else f"{mean}, {cell(under_corruption(k, row))}")
    safest: dict[str, list[str]] = {}
    for name, k in there.items():
        gaps = {row: under_corruption(k, row) for row in SOFTER if k.has(row, PLAIN)}
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
        both = {n: under_corruption(k, row, True) for n, k in there.items() if k.has(row, PLAIN)}
        line += f"{words}{by_verdict(both)}."
    head = ["", *(NAMES[name] for name in there)]
    repaired = [
        [
            title(row),
            *(
                cell(under_corruption(k, row, True)) if k.has(row, PLAIN) else ""
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


def under_corruption(k: Kept, row: str, repaired: bool = False) -> Gap:
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


def few_images(kept: Tasks) -> Few:
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
    found, counts = few_images(kept), [*IMAGES, 150]
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
