"""The figures of the study."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.study import contrasts
from benchmarks.study.answers import COUNTS, MAPS, SIGNS, signs_found
from benchmarks.study.compare import Gap
from benchmarks.study.contrasts import (
    ENDS,
    MAIN,
    NAMES,
    READINGS,
    REPAIRED,
    SMOOTHED,
    SPOILT,
    Gaps,
    Tasks,
    having,
    title,
)
from benchmarks.study.judge import RAW, REPAIRS
from benchmarks.study.rows import BEST_FIXED, DEFAULT, FAMILIES, PLAIN, ROWS
from benchmarks.study.run import EPOCHS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")


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
            family = next((f for f, members in FAMILIES.items() if row in members), row)
            mark, colour, label = MARKS.get(family, (".", "#888888", "other rows"))
            if k.row(family) != row:  # not the tuned one
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


Lines = dict[str, dict[str, Gap]]
"""The differences in each reading, by what stands beside them."""


def _forest(panels: dict[str, Lines], words: str) -> "Figure":
    """A line per difference, a mark per reading with its interval; filled if it survives.

    An interval that is far wider than all differences of its panel is cut.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))[::-1]
    height = (0.34 if len(names) < 12 else 0.24) * len(names) + 1.2
    figure, axes = _figure(max(len(panels), 1), 1.5 * max(len(panels), 2) + 2.2, height)
    for one, (head, lines) in zip(axes, panels.items(), strict=False):
        one.axvline(0, color="#888888", linewidth=1)
        for name, gaps in lines.items():
            for step, mark, reading in zip((0.15, -0.15), "os", READINGS, strict=True):
                gap, y = gaps[reading], names.index(name) + step
                if np.isfinite(gap.low):
                    one.plot([gap.low, gap.high], [y, y], color="#000000", linewidth=0.8)
                face = "white" if gap.verdict == "undecided" else "#000000"
                one.plot(gap.value, y, mark, color="#000000", markersize=4, markerfacecolor=face)
        most = max((abs(gap.value) for gaps in lines.values() for gap in gaps.values()), default=0)
        low, high = one.get_xlim()
        one.set_xlim(max(low, -3 * most - 1), min(high, 3 * most + 1))
        one.set_yticks(range(len(names)), names)
        one.set_ylim(-0.6, len(names) - 0.4)
        one.tick_params(left=one is axes[0], labelleft=one is axes[0])
        one.locator_params(axis="x", nbins=4)
        one.set_title(head, fontsize=9)
    figure.supxlabel(f"{words} (filled: shown)", fontsize=8)
    for mark, label in zip("os", READINGS, strict=True):
        axes[0].plot([], [], mark, color="#000000", markersize=4, label=label)
    figure.legend(loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    return figure


def _of_tasks(gaps: Gaps) -> dict[str, Lines]:
    """One panel, a line per task."""
    lines: Lines = {}
    for (task, _, reading), gap in gaps.items():
        lines.setdefault(NAMES[task], {})[reading] = gap
    return {"": lines}


def _of_rows(gaps: Gaps) -> dict[str, Lines]:
    """A panel per task, a line per row or contrast."""
    panels: dict[str, Lines] = {}
    for (task, row, reading), gap in gaps.items():
        words = title(row) if row in ROWS or row in FAMILIES else row
        panels.setdefault(NAMES[task], {}).setdefault(words, {})[reading] = gap
    return {name: panels[name] for name in NAMES.values() if name in panels}


def gaps_figure(kept: Tasks) -> "Figure":
    return _forest(_of_tasks(contrasts.of_default(kept)), "NLL of the default against plain BCE, %")


def fine_tuned_figure(kept: Tasks) -> "Figure | None":
    gaps = contrasts.of_fine_tuned(kept)
    return _forest(_of_rows(gaps), "NLL against plain BCE, %") if gaps else None


def draws_figure(kept: Tasks) -> "Figure":
    return _forest(_of_rows(contrasts.of_draws(kept)), "change of NLL, %")


def rivals_figure(kept: Tasks) -> "Figure":
    gaps = contrasts.of_rivals(kept)
    early = {place: gap.value for place, gap in gaps.items() if place[2] == REPAIRED}
    order = sorted(
        gaps, key=lambda place: np.mean([v for p, v in early.items() if p[1] == place[1]])
    )
    lowest_first = {place: gaps[place] for place in order}
    return _forest(_of_rows(lowest_first), "NLL against the adaptive default, %")


def corrupted_figure(kept: Tasks) -> "Figure":
    words = "NLL on corrupted data against plain BCE, %"
    return _forest(_of_rows(contrasts.of_corrupted(kept)), words)


def _legend(axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def levels_figure(kept: Tasks) -> "Figure":
    """Raw NLL at the last epoch over the level: fixed ones, and the adaptive loss at its own."""
    there = having(kept, MAIN, PLAIN, DEFAULT, BEST_FIXED)
    figure, axes = _figure(max(len(there), 1), 1.8 * max(len(there), 1) + 0.8, 2.8)
    for one, k in zip(axes, there.values(), strict=False):
        means = contrasts.tried(k)
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
            float(np.mean(contrasts.last_levels(k))),
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


def images_figure(kept: Tasks) -> "Figure":
    """What each repair changes, over the number of validation images."""
    found = contrasts.few_images(kept)
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
                COUNTS,
                [100 * (x / raw - 1) for x in few],
                marker=mark,
                linestyle=line,
                color=colour,
                markersize=4,
                linewidth=1,
                label=MAPS[repair],
            )
        one.set_title(f"{NAMES[name]}, {ENDS[epoch]}", fontsize=9)
        one.set_xscale("log")
        one.set_xticks(COUNTS, [str(count) for count in COUNTS])
        one.minorticks_off()
    figure.supxlabel("validation images", fontsize=8)
    axes[0].set_ylabel("change of plain BCE's NLL, %", fontsize=8)
    _legend(axes[-1])
    return figure


def slopes_figure(kept: Tasks) -> "Figure":
    """What moderation .2 changes, over plain BCE's slope."""
    figure, axes = _figure(2, 7.6, 3.2)
    gaps = contrasts.of_slopes(kept)
    most = max((abs(gap.value) for gap in gaps.values()), default=0.0)
    for one, words in zip(axes, READINGS, strict=True):
        one.axhline(0, color="#888888", linewidth=1)
        one.axvline(1, color="#888888", linewidth=1, linestyle="--")
        for name, gap in contrasts.reading(gaps, words).items():
            slope = contrasts.slope_of_plain(kept[name])
            one.plot([slope, slope], [gap.low, gap.high], color="#000000", linewidth=1)
            face = "white" if gap.verdict == "undecided" else COLOURS[4]
            mark = "o" if name in MAIN else "s"
            one.plot(slope, gap.value, mark, color=COLOURS[4], markersize=5, markerfacecolor=face)
            if name in MAIN:
                one.annotate(
                    NAMES[name], (slope, gap.value), (4, 4), textcoords="offset points", fontsize=7
                )
        one.set_title(words, fontsize=9)
        one.set_xlabel("calibration slope of plain BCE (validation)", fontsize=8)
        one.set_ylim(-1.5 * most - 5, 1.5 * most + 5)  # a wide interval is cut
    axes[0].set_ylabel("NLL of moderation .2 against plain BCE, %", fontsize=8)
    look: dict[str, Any] = {"color": COLOURS[4], "markerfacecolor": "white", "markersize": 5}
    axes[1].plot([], [], "s", label="digits with fewer or wrong masks", **look)
    _legend(axes[1])
    return figure


def wrong_figure(kept: Tasks) -> "Figure | None":
    """How well each sign finds the wrong masks: a bar for the mean, a ring per seed."""
    found = signs_found(kept)
    if not found:
        return None
    figure, axes = _figure(len(SPOILT), 8.0, 0.28 * max(len(found), 1) + 1.0)
    for one, task in zip(axes, SPOILT, strict=True):
        one.axvline(0.5, color="#888888", linewidth=1)
        for y, (words, each) in enumerate(list(found.items())[::-1]):
            if task not in each:
                continue
            mean = float(np.mean(each[task]))
            colour = COLOURS[5] if words == SIGNS[DEFAULT, "level"] else COLOURS[4]
            one.barh(y, mean - 0.5, left=0.5, height=0.6, color=colour, alpha=0.5)
            one.plot(each[task], [y] * len(each[task]), "o", color="#000000", mfc="none", ms=4)
        one.set_yticks(range(len(found)), list(found)[::-1])
        one.tick_params(left=one is axes[0], labelleft=one is axes[0])
        one.set_xlim(0.3, 1.02)
        one.set_ylim(-0.6, len(found) - 0.4)
        one.set_title(NAMES[task], fontsize=9)
    figure.supxlabel("AUROC of the wrong masks (.5: chance)", fontsize=8)
    return figure


FIGURES: dict[str, "tuple[str, Callable[[Tasks], Figure | None]]"] = {
    "parts": ("Miscalibration against refinement, one point per row", parts_figure),
    "default": ("NLL of the default against plain BCE", gaps_figure),
    "fine-tuned": ("NLL against plain BCE on a fine-tuned network", fine_tuned_figure),
    "draw": ("What the draw and the base rate each change", draws_figure),
    "level": ("NLL over the fixed level, and the adaptive loss at its own", levels_figure),
    "wrong": ("How well levels and losses find wrong masks", wrong_figure),
    "repair": ("Change of NLL by a repair over the number of images", images_figure),
    "slope": ("Change of NLL over the slope of plain BCE", slopes_figure),
    "rivals": ("NLL of the rivals against the default", rivals_figure),
    "corrupted": ("NLL against plain BCE on corrupted images", corrupted_figure),
}
