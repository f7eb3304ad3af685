"""What the kept runs answer: a sentence and its tables per question.

A row is called lower or higher only where the difference survives the correction of its question.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks import report
from benchmarks.study import contrasts
from benchmarks.study.compare import Gap
from benchmarks.study.contrasts import (
    AT_END,
    ENDS,
    FINE_TUNED,
    MAIN,
    NAMES,
    NO_LEVEL,
    ONE_LEVEL,
    READINGS,
    REPAIRED,
    SEARCHED,
    SMOOTHED,
    SMOOTHED_BASE,
    SOFTER,
    SPOILT,
    Gaps,
    Tasks,
    having,
    reading,
    short,
    title,
)
from benchmarks.study.judge import IMAGES, RAW, REPAIRS
from benchmarks.study.kept import Kept
from benchmarks.study.rows import BEST_FIXED, DEFAULT, PLAIN, ROWS

MISSING = "-"
NOT_RUN = "Not run yet."
SAID = {AT_END: "after the last epoch and unrepaired", REPAIRED: "stopped early and repaired"}
COUNTS = (*IMAGES, 150)
MAPS = {RAW: "no repair", **{repair: repair for repair in REPAIRS}}
MAPS |= {"affine": "temperature and bias"}
CODE = {
    DEFAULT: "AdaptivePerturbation(num_samples)",
    BEST_FIXED: "SCBCEWithLogitsLoss.moderation(0.2, prior=base_rate)",
    "temperature": "TemperatureScaling()",
    "affine": "TemperatureScaling(bias=True)",
    "flip": "TemperatureScaling(None, bias=True)",
    "isotonic": "IsotonicCalibration()",
}


class Answer(NamedTuple):
    """A sentence for the first screen, a table, and what to unfold."""

    line: str
    table: str = ""
    more: str = ""


# ---------------------------------------------------------------- text


def percent(gap: Gap) -> str:
    return f"{gap.value:+.1f} %"


def cell(gap: Gap | None) -> str:
    """With its interval; bold if the difference survives."""
    if gap is None:
        return MISSING
    words = f"{percent(gap)} [{gap.low:+.1f}, {gap.high:+.1f}]"
    return words if gap.verdict == "undecided" else f"**{words}**"


def capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def named(task: str, gap: Gap, more: str = "") -> str:
    return f"{NAMES.get(task, task)} ({percent(gap)}{more})"


def listed(names: Iterable[str]) -> str:
    *most, last = [NAMES.get(name, name) for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def ordered(names: Iterable[str]) -> list[str]:
    """In the order of the tasks."""
    found = set(names)
    return [name for name in NAMES if name in found]


def shown(gaps: Mapping[str, Gap], verdict: str) -> list[str]:
    return [name for name, gap in gaps.items() if gap.verdict == verdict]


def where(gaps: Mapping[str, Gap], of: str = "tasks", on: str = "on") -> str:
    """What a thing is: lower on these, higher on those, not shown to differ on the others."""
    said = []
    for verdict in ("lower", "higher"):
        names = shown(gaps, verdict)
        if names:
            said.append(f"{verdict} {on} {listed(named(name, gaps[name]) for name in names)}")
    rest = shown(gaps, "undecided")
    if said:
        words = " and ".join(said)
        others = f"{len(rest)} others" if len(rest) > 1 else "the other"
        return f"{words}, with no difference shown {on} {others}" if rest else words
    if len(rest) == 1:
        return f"not shown to differ {on} {named(rest[0], gaps[rest[0]])}"
    values = sorted((gaps[name] for name in rest), key=lambda gap: gap.value)
    ends = f"{percent(values[0])} to {percent(values[-1])}"
    return f"not shown to differ {on} any of {len(rest)} {of} ({ends})"


def both(gaps: Gaps, by: int = 0, of: str = "tasks", on: str = "on") -> tuple[str, str]:
    """Stopped early and repaired, and after the last epoch."""
    early, late = (where(reading(gaps, words, by), of, on) for words in (REPAIRED, AT_END))
    return early, late


def beaten(gaps: Mapping[str, Gap]) -> str:
    """Whether it is lower: on two tasks or more, and on none higher by more than 1 %."""
    lower, higher = shown(gaps, "lower"), shown(gaps, "higher")
    if not lower:
        return "No" if higher else "Not shown"
    harm = higher or any(gap.value > 1 for gap in gaps.values())
    return "Yes" if len(lower) > 1 and not harm else "On some tasks"


def grid(gaps: Gaps, head: str = "") -> str:
    """A line for each task and line of the family, a column for each reading."""
    rows = [
        [words, NAMES[task], *(cell(gaps[task, words, each]) for each in READINGS)]
        for task, words in dict.fromkeys(place[:2] for place in gaps)
    ]
    return report.table([head, "", *READINGS], rows)


# ---------------------------------------------------------------- the questions


def default(kept: Tasks) -> Answer:
    gaps = contrasts.of_default(kept)
    if not gaps:
        return Answer(NOT_RUN)
    rows = []
    for name in reading(gaps, AT_END):
        k = kept[name]
        seeds = k.seeds(PLAIN, DEFAULT)
        rows.append([NAMES[name], str(len(seeds))])
        for row in (PLAIN, DEFAULT):
            fix = k.best_map(row, "best", seeds)
            nll = np.mean(k.each(row, seeds, "best", "test", fix, "nll"))
            rows[-1].append(f"{nll:.4f} ({fix})")
        rows[-1] += [cell(gaps[name, DEFAULT, words]) for words in (REPAIRED, AT_END)]
    head = ["", "seeds", "plain BCE", "default", f"NLL, {REPAIRED}", f"NLL, {AT_END}"]
    early, late = both(gaps)
    line = f"{beaten(reading(gaps, REPAIRED))}: its NLL is {early}; {SAID[AT_END]}, it is {late}."
    return Answer(line, report.table(head, rows), truth(kept))


def fine_tuned(kept: Tasks) -> Answer:
    if FINE_TUNED not in kept or PLAIN not in kept[FINE_TUNED].runs:
        return Answer(NOT_RUN)
    k, gaps, rows = kept[FINE_TUNED], contrasts.of_fine_tuned(kept), []
    for row in (PLAIN, *(row for row in ROWS if row in k.runs and row != PLAIN)):
        seeds = k.seeds(row)
        fix = k.best_map(row, "best", seeds)
        slope = np.mean([k.runs[row][seed]["history"]["slope"][-1] for seed in seeds])
        late, early = (cell(gaps.get((FINE_TUNED, row, words))) for words in READINGS)
        rows.append([title(row), str(len(seeds)), f"{slope:.2f}"])
        rows[-1] += [f"{k.mean(row, 'last', RAW, 'nll'):.4f}", late]
        rows[-1] += [f"{k.mean(row, 'best', fix, 'nll'):.4f} ({fix})", early]
        rows[-1] += [f"{k.mean(row, 'best', fix, 'f1'):.3f}"]
    other = "against plain BCE"
    table = report.table(["", "seeds", "slope", AT_END, other, REPAIRED, other, "its F1"], rows)
    if not gaps:
        return Answer(f"Not shown: {_one_seed(k)}.", table)
    said = {(task, short(row), words): gap for (task, row, words), gap in gaps.items()}
    early, late = both(said, 1, "losses and rivals", "with")
    lower = shown(reading(said, REPAIRED, 1), "lower")
    word = capital(listed(lower)) if lower else "Nothing beyond plain BCE is shown to help"
    line = f"{word}: {SAID[REPAIRED]}, the NLL against plain BCE is {early}; {SAID[AT_END]}, "
    return Answer(f"{line}it is {late}.", table)


def _one_seed(k: Kept) -> str:
    """Of a single seed the differences, which no interval belongs to."""
    ends = []
    for words, how in READINGS.items():
        changes = {
            short(row): k.gap(row, PLAIN, *how)
            for row in k.runs
            if row != PLAIN and k.has(row, PLAIN, seeds=1)
        }
        if not changes:
            return "plain BCE alone was run"
        low, high = (pick(changes, key=lambda row: changes[row].value) for pick in (min, max))
        ends.append(
            f"{SAID[words]}, from {named(low, changes[low])} to {named(high, changes[high])}"
        )
    return f"one seed; its NLL against plain BCE is, {'; '.join(ends[::-1])}"


def draws(kept: Tasks) -> Answer:
    """Of a draw and of the base rate, each in two contrasts."""
    gaps = contrasts.of_draws(kept)
    if not gaps:
        return Answer(NOT_RUN)
    late, early = (_effects(gaps, words) for words in READINGS)
    lowering = [factor for factor, words in late.items() if words.startswith("lowers")]
    word = "Both" if len(lowering) > 1 else f"The {lowering[0]}" if lowering else "Not shown"
    said = [
        ", and ".join(f"the {factor} {words}" for factor, words in each.items())
        or "neither is shown to change it"
        for each in (late, early)
    ]
    line = f"{word}: of the NLL {SAID[AT_END]}, {said[0]}; {SAID[REPAIRED]}, {said[1]}."
    return Answer(line, grid(gaps, "what differs"))


def _effects(gaps: Gaps, words: str) -> dict[str, str]:
    """What the draw and the base rate do to the NLL, where it is shown by either contrast."""
    found = {}
    for factor in ("draw", "base rate"):
        acts = []
        for verdict, verb in (("lower", "lowers it"), ("higher", "raises it")):
            tasks = ordered(
                task
                for (task, line, which), gap in gaps.items()
                if which == words and line.startswith(factor) and gap.verdict == verdict
            )
            if tasks:
                acts.append(f"{verb} on {listed(tasks)}")
        if acts:
            found[factor] = " and ".join(acts)
    return found


def levels(kept: Tasks) -> Answer:
    gaps = contrasts.of_levels(kept)
    if not gaps:
        return Answer(NOT_RUN)
    rows = []
    for name in reading(gaps, AT_END):
        k = kept[name]
        ends = contrasts.last_levels(k)
        rows.append(
            [
                NAMES[name],
                f"{title(contrasts.best_fixed(k))} (of {len(contrasts.tried(k))})",
                f"{min(ends):.2f} to {max(ends):.2f}",
                *(cell(gaps[name, DEFAULT, words]) for words in READINGS),
            ]
        )
    head = ["", "best fixed, by hindsight", "level at the end", *READINGS]
    late = reading(gaps, AT_END)
    worse = [name for name in shown(late, "higher") if late[name].low > 2]
    near = all(gap.high <= 2 for gap in late.values())
    word = "No" if worse else "Yes" if near else "Not shown"
    line = f"{word}: {SAID[AT_END]}, its NLL against the best of the fixed levels is {where(late)}."
    return Answer(line, report.table(head, rows))


def samples(kept: Tasks) -> Answer:
    """A level per sample against one for all, and the wrong masks that it finds."""
    gaps, found = contrasts.of_samples(kept), signs_found(kept)
    shared = contrasts.line(gaps, ONE_LEVEL)
    if not shared:
        return Answer(NOT_RUN)
    early, late = both(shared)
    line = f"Against one level for all, {SAID[AT_END]}, its NLL is {late}; {SAID[REPAIRED]}, it is "
    line += early
    if found:
        return Answer(f"{line}; {_found(found)}.", f"{grid(gaps)}\n\n{signs(found)}")
    return Answer(f"{line}.", grid(gaps))


SIGNS = {
    (DEFAULT, "level"): "the level",
    (DEFAULT, "loss"): "the loss, default, last epoch",
    (DEFAULT, "loss-best"): "the loss, default, stopped early",
    (DEFAULT, "quality"): "cleanlab's score, default, last epoch",
    (DEFAULT, "quality-best"): "cleanlab's score, default, stopped early",
    (PLAIN, "loss"): "the loss, plain BCE, last epoch",
    (PLAIN, "loss-best"): "the loss, plain BCE, stopped early",
    (PLAIN, "loss-folds"): "the loss, plain BCE trained without the mask",
    (PLAIN, "quality"): "cleanlab's score, plain BCE, last epoch",
    (PLAIN, "quality-best"): "cleanlab's score, plain BCE, stopped early",
    (PLAIN, "quality-folds"): "cleanlab's score, plain BCE trained without the mask",
}


def signs_found(kept: Tasks) -> dict[str, dict[str, list[float]]]:
    """By the words of ``SIGNS`` and task."""
    found = contrasts.found_wrong(kept)
    return {words: found[sign] for sign, words in SIGNS.items() if sign in found}


def _found(found: dict[str, dict[str, list[float]]]) -> str:
    """What finds the wrong masks best, and how well the level does."""
    said = []
    for task in SPOILT:
        means = {words: float(np.mean(each[task])) for words, each in found.items() if task in each}
        if not means:
            continue
        best, level = max(means, key=means.__getitem__), SIGNS[DEFAULT, "level"]
        less = f"; {level}: {means[level]:.2f}" if level in means and best != level else ""
        kind = NAMES[task].removeprefix("digits with ")
        said.append(f"{kind} are found best by {best} (AUROC {means[best]:.2f}{less})")
    return " and ".join(said)


def signs(found: dict[str, dict[str, list[float]]]) -> str:
    rows = [
        [words, *(f"{np.mean(each[task]):.2f}" if task in each else MISSING for task in SPOILT)]
        for words, each in found.items()
    ]
    return report.table(["AUROC of the wrong masks by", *(NAMES[task] for task in SPOILT)], rows)


def repairs(kept: Tasks) -> Answer:
    gaps, few = contrasts.of_repairs(kept), contrasts.few_images(kept)
    if not gaps or not few:
        return Answer(NOT_RUN)
    rows = [
        [f"{NAMES[task]}, {end}", *(cell(gaps[task, repair, end]) for repair in REPAIRS)]
        for task in ordered(place[0] for place in gaps)
        for end in ENDS.values()
    ]
    table = report.table(["all validation data", *(MAPS[repair] for repair in REPAIRS)], rows)
    body = [
        [f"{NAMES[name]}, {ENDS[epoch]}", MAPS[repair], f"{raw:.4f}", *(f"{x:.4f}" for x in values)]
        for (name, epoch, repair), (raw, values) in few.items()
    ]
    head = ["NLL of plain BCE", "repair", "raw", *(f"{count} images" for count in COUNTS)]
    early, late = (_best_of(gaps, ENDS[epoch]) for epoch in ("best", "last"))
    means = f"stopped early ({early[1]} against no repair, {early[2]}) and"
    if early[0] == late[0]:
        means = f"it has the lowest mean NLL over the tasks, {means} after the last epoch "
        means += f"({late[1]}, {late[2]})"
    else:
        means = f"it has the lowest mean NLL over the tasks {means} {late[0]} after the last "
        means += f"epoch ({late[1]}, {late[2]})"
    by_count: dict[str, list[str]] = {}
    for count, best in best_by_count(kept).items():
        by_count.setdefault(MAPS[best], []).append(str(count))
    lowest = listed(f"{name} with {listed(counts)}" for name, counts in by_count.items())
    line = (
        f"{capital(early[0])}: of four, {means}; on {listed(SEARCHED)}, stopped early, the lowest "
        f"is {lowest} images."
    )
    return Answer(line, table, report.table(head, body))


def _best_of(gaps: Gaps, end: str) -> tuple[str, str, str]:
    """The repair of the least mean NLL, what it changes, and where that is shown."""
    means = mean_change(gaps, end)
    best = min(means, key=means.__getitem__)
    each = {task: gap for (task, repair, e), gap in gaps.items() if (repair, e) == (best, end)}
    lower = shown(each, "lower")
    where_lower = f"lower on {listed(lower)}" if lower else "shown on no task"
    return MAPS[best], f"{means[best]:+.1f} %", where_lower


def mean_change(gaps: Gaps, end: str) -> dict[str, float]:
    """Of each repair, in per cent, over the tasks."""
    return {
        repair: float(np.mean([g.value for place, g in gaps.items() if place[1:] == (repair, end)]))
        for repair in REPAIRS
    }


def best_by_count(kept: Tasks) -> dict[int, str]:
    """The repair, or none, of the least mean NLL, stopped early, by the number of images."""
    found, few = {}, contrasts.few_images(kept)
    for place, count in enumerate(COUNTS if few else ()):
        change = {RAW: 0.0}
        for repair in REPAIRS:
            each = [
                values[place] / raw - 1
                for (_, epoch, which), (raw, values) in few.items()
                if (epoch, which) == ("best", repair)
            ]
            change[repair] = float(np.mean(each))
        found[count] = min(change, key=change.__getitem__)
    return found


def slopes(kept: Tasks) -> Answer:
    """Does the slope tell beforehand where a softening loss helps?"""
    gaps = contrasts.of_slopes(kept)
    if not gaps:
        return Answer(NOT_RUN)
    late, early = (reading(gaps, words) for words in READINGS)
    slope = {name: contrasts.slope_of_plain(kept[name]) for name in late}
    rows = [
        [NAMES[name], f"{slope[name]:.2f}", cell(late[name]), cell(early[name])] for name in late
    ]
    decided = {name: gap for name, gap in late.items() if gap.verdict != "undecided"}
    wrong = [n for n, gap in decided.items() if (slope[n] < 1) != (gap.verdict == "lower")]
    doubts = [  # the same before the correction: doubts are said early
        n
        for n, gap in late.items()
        if n not in decided and (gap.low > 0) == (slope[n] < 1) and (gap.low > 0 or gap.high < 0)
    ]
    word = "Yes" if len(decided) > 1 else "Not shown"
    if wrong or doubts:
        word = "No" if len(wrong) > 1 else "Not always"
    helped = shown(early, "lower")
    line = (
        f"{word}: {SAID[AT_END]}, a slope below 1 tells whether moderation .2 lowers the NLL on "
        f"{len(decided) - len(wrong)} of the {len(decided)} tasks where a difference is shown, of "
        f"{len(late)} tried{', not on ' + listed(wrong) if wrong else ''}"
        f"{', and before the correction it is wrong on ' + listed(doubts) if doubts else ''}; "
        f"{SAID[REPAIRED]}, it lowers it on {listed(helped) if helped else 'none of them'}."
    )
    return Answer(line, report.table(["", "slope of plain BCE", *READINGS], rows))


def rivals(kept: Tasks) -> Answer:
    gaps = contrasts.of_rivals(kept)
    if not gaps:
        return Answer(NOT_RUN)
    tasks, rows = ordered(place[0] for place in gaps), dict.fromkeys(place[1] for place in gaps)
    said, won = [], any(gap.verdict == "lower" for gap in gaps.values())
    for words in (REPAIRED, AT_END):
        wins: dict[str, list[str]] = {}
        least: dict[str, list[str]] = {}
        for task in tasks:
            each = {row: gaps[task, row, words] for row in rows if (task, row, words) in gaps}
            for row in shown(each, "lower"):
                wins.setdefault(short(row), []).append(named(task, each[row]))
            best = min(each, key=lambda row, each=each: each[row].value)  # type: ignore[misc]
            least.setdefault(short(best), []).append(named(task, each[best]))
        on = listed(f"{row} on {listed(where)}" for row, where in (wins or least).items())
        said.append(f"{on}, {SAID[words]}" if wins or not won else "")
    word = "Shown to be lower is" if won else f"None of {len(rows)} is shown to be; the lowest is"
    line = f"{word} {', and '.join(part for part in said if part)}."
    table = report.table(
        ["", *(f"{NAMES[task]}: {words}" for task in tasks for words in READINGS)],
        [
            [title(row), *(cell(gaps.get((task, row, w))) for task in tasks for w in READINGS)]
            for row in rows
        ],
    )
    return Answer(line, more=table)


def corrupted(kept: Tasks) -> Answer:
    """Under corruption and without validation data, which loss is the safest?"""
    gaps = contrasts.of_corrupted(kept)
    if not gaps:
        return Answer(NOT_RUN)
    tasks = ordered(place[0] for place in gaps)
    safest: dict[str, list[str]] = {}
    for task in tasks:
        each = {row: gaps[task, row, AT_END] for row in SOFTER if (task, row, AT_END) in gaps}
        best = min(each, key=lambda row, each=each: each[row].value)  # type: ignore[misc]
        sure = "" if each[best].verdict == "lower" else ", not shown"
        if each[best].value >= 0:
            safest.setdefault(PLAIN, []).append(NAMES[task])
        else:
            safest.setdefault(best, []).append(named(task, each[best], sure))
    repaired = [
        f"{short(row)} on {named(task, gap)}"
        for (task, row, words), gap in gaps.items()
        if words == REPAIRED and gap.verdict == "lower"
    ]
    first, *others = sorted(safest, key=lambda row: -len(safest[row]))
    said = f"its mean NLL is the lowest of {len(SOFTER) + 1}, against plain BCE, on "
    said += listed(safest[first])
    if others:
        said += f", and otherwise {listed(f'{short(n)} on {listed(safest[n])}' for n in others)}"
    line = (
        f"{capital(short(first))}: {SAID[AT_END]}, {said}; {SAID[REPAIRED]} on clean data, "
        f"{listed(repaired) if repaired else 'none'} is shown to be lower."
    )
    return Answer(
        line,
        _corrupted(kept, gaps, tasks, (SMOOTHED, BEST_FIXED, DEFAULT)),
        "\n\n".join(
            [
                _corrupted(kept, gaps, tasks, SOFTER),
                "The same, stopped early and repaired on validation data that are not corrupted:",
                report.table(
                    ["", *(NAMES[task] for task in tasks)],
                    [
                        [title(row), *(cell(gaps.get((task, row, REPAIRED))) for task in tasks)]
                        for row in SOFTER
                    ],
                ),
            ]
        ),
    )


def _corrupted(kept: Tasks, gaps: Gaps, tasks: Sequence[str], rows: Sequence[str]) -> str:
    """After the last epoch, raw."""
    body = []
    for row in (PLAIN, *rows):
        body.append([title(row)])
        for task in tasks:
            k, gap = kept[task], gaps.get((task, row, AT_END))
            mean = f"{contrasts.corrupted(k, row, k.seeds(row)).mean():.4f}" if k.has(row) else ""
            body[-1].append(", ".join(x for x in (mean, cell(gap) if gap else "") if x) or MISSING)
    return report.table(["", *(NAMES[task] for task in tasks)], body)


# ---------------------------------------------------------------- what else is shown


def noisy(kept: Tasks) -> str:
    """What the guide to noisy labels says of masks."""
    found = signs_found(kept)
    said = [f"- {capital(_found(found))}."] if found else []
    gaps = contrasts.line(contrasts.of_samples(kept), NO_LEVEL)
    if gaps:
        early, late = both(gaps)
        said.append(
            f"- {capital(SAID[AT_END])}, the NLL of the default against plain BCE is {late}."
        )
        said.append(f"- {capital(SAID[REPAIRED])}, it is {early}.")
    return "\n".join(said)


def no_object(kept: Tasks) -> str:
    """Images that show none of what is looked for, and whether confidence tells them apart."""
    there = having({n: k for n, k in kept.items() if "ood" in k.all[0]["last"]}, MAIN, PLAIN)
    rows = []
    for row in (PLAIN, *SOFTER):
        rows.append([title(row)])
        for k in there.values():
            if not k.has(row):
                rows[-1] += [MISSING, MISSING]
                continue
            each = np.array(k.each(row, k.seeds(row), "last", "ood", RAW))
            spread = each.std(0, ddof=1)
            rows[-1] += [
                f"{each[:, 0].mean():.3f} ± {spread[0]:.3f}",
                f"{each[:, -2].mean():.2f} ± {spread[-2]:.2f}",
            ]
    columns = ("NLL", "AUROC of confidence")
    return report.table(["", *(f"{NAMES[n]}: {c}" for n in there for c in columns)], rows)


def truth(kept: Tasks) -> str:
    """Where the true probabilities are known: the distance from them, in no bins."""
    if not having(kept, ["rates"], PLAIN, DEFAULT):
        return ""
    k, rows = kept["rates"], []
    for row in (PLAIN, DEFAULT, BEST_FIXED, SMOOTHED, SMOOTHED_BASE):
        if not k.has(row):
            continue
        seeds = k.seeds(row)
        for epoch, fix, words in (
            ("last", RAW, AT_END),
            ("best", RAW, "stopped early, raw"),
            ("best", k.best_map(row, "best", seeds), REPAIRED),
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
        "&#124;p - P&#124;",
        "1000 (p - P)^2",
        "of it calibration",
        "mean p / base rate, label of .01",
    ]
    words = "Known rates: distance of the answers p from the true chances P, mean of the labels."
    return f"{words}\n\n{report.table(head, rows)}"


def take(kept: Tasks) -> str:
    """What to use in which situation, as far as a difference is shown."""
    rows = [
        ["validation data like the test data", _with_validation(kept)],
        ["no repair, training to the last epoch, and a slope below 1", _without(kept, True)],
        ["a slope of 1 or more", _without(kept, False)],
        ["a pretrained network to fine-tune", _pretrained(kept)],
        ["compute to spare", _compute(kept)],
    ]
    table = report.table(["you have", "use"], [row for row in rows if row[1]])
    return table.replace("--:", "---")


def _with_validation(kept: Tasks) -> str:
    gaps = reading(contrasts.of_default(kept), REPAIRED)
    wins = beaten(gaps) == "Yes"
    loss = f"`{CODE[DEFAULT]}`" if wins else "plain BCE"
    counts = {count: best for count, best in best_by_count(kept).items() if best != RAW}
    by_count = [
        f"`{CODE[best]}` from {min(c for c in counts if counts[c] == best)} images on"
        for best in dict.fromkeys(counts.values())
    ]
    words = f"{loss}, stopped at its best validation NLL. "
    if by_count:
        words += "Then compare repairs on images that none of them was fitted to: "
        words += f"{', '.join(by_count)} (question 6). "
    if not wins:
        words += "Whether a softer loss adds to it, your own data must show: "
        words += "`python benchmarks/calibration.py --data FOLDER` (question 1)"
    return words


def _without(kept: Tasks, over_confident: bool) -> str:
    """Of the default and moderation .2: lower on two tasks of this kind, and never higher.

    Higher is said early, of any interval above 0 that is not corrected.
    """
    families = {DEFAULT: contrasts.of_default(kept), BEST_FIXED: contrasts.of_slopes(kept)}
    found, harm = [], []
    for row, gaps in families.items():
        of_kind = {
            task: kept[task].gap(row)
            for task in MAIN
            if task in kept
            and kept[task].has(row, PLAIN, seeds=1)
            and (contrasts.slope_of_plain(kept[task]) < 1) == over_confident
        }
        lower = [task for task in shown(reading(gaps, AT_END), "lower") if task in of_kind]
        higher = [task for task, gap in of_kind.items() if gap.low > 0]
        if len(lower) > 1 and not higher:
            found.append(f"`{CODE[row]}` (lower on {listed(lower)})")
        if higher:
            harm.append(f"not `{CODE[row]}` (higher on {listed(higher)})")
    return f"{', '.join([' or '.join(found) or 'plain BCE', *harm])} (questions 1, 2 and 7)"


def _pretrained(kept: Tasks) -> str:
    if FINE_TUNED not in kept:
        return ""
    gaps, said = contrasts.of_fine_tuned(kept), []
    if not gaps:
        return "plain BCE: nothing else is shown to help (question 2)"
    for words in (REPAIRED, AT_END):
        lower, higher = (
            [short(row) for row in shown(reading(gaps, words, by=1), verdict)]
            for verdict in ("lower", "higher")
        )
        said.append(f"{SAID[words]}, {listed(lower) if lower else 'plain BCE'}")
        said[-1] += f", not {listed(higher)}" if higher else ""
    return f"{'; '.join(said)} (question 2)"


def _compute(kept: Tasks) -> str:
    gaps = contrasts.of_rivals(kept)
    spent = {place: gap for place, gap in gaps.items() if place[1] in ("ensemble", "mixup")}
    if not spent:
        return ""
    wins = [
        f"{short(row)} on {NAMES[task]}, {words}"
        for (task, row, words), gap in spent.items()
        if gap.verdict == "lower"
    ]
    if wins:
        return f"{'; '.join(wins)} (question 8)"
    least = min(spent, key=lambda place: spent[place].value)
    low = f"{short(least[1])} on {named(least[0], spent[least])}, {least[2]}"
    return f"try an ensemble or mixup; none is shown to be lower, the lowest is {low} (question 8)"
