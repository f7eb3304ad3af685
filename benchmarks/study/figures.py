"""The figures of the study."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.study.answers import (
    DRAWN_HALF,
    ENDS,
    MAIN,
    NAMES,
    PAIRS,
    SMOOTHED,
    SMOOTHED_BASE,
    SOFTER,
    Tasks,
    few_images,
    having,
    last_levels,
    rivals_tried,
    slopes,
    title,
    tried,
    under_corruption,
)
from benchmarks.study.compare import Gap
from benchmarks.study.judge import IMAGES, RAW, REPAIRS
from benchmarks.study.kept import Kept
from benchmarks.study.rows import BEST_FIXED, DEFAULT, FAMILIES, PLAIN
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
        means = tried(k)
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
            float(np.mean(last_levels(k))),
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
    there, names = rivals_tried(kept)
    rows = [(title(name), name) for name in names]
    return _forest(there, rows, _both(DEFAULT), "NLL against the adaptive default, %")


def corrupted_figure(kept: Tasks) -> "Figure":
    def change(repaired: bool) -> Change:
        return lambda k, row: under_corruption(k, row, repaired) if k.has(row, PLAIN) else None

    return _forest(
        having(kept, MAIN, PLAIN, BEST_FIXED),
        [(title(name), name) for name in SOFTER[1:]],
        [("last epoch, raw", change(False)), ("stopped early, repaired", change(True))],
        "NLL on corrupted data against plain BCE, %",
    )


def images_figure(kept: Tasks) -> "Figure":
    """What each repair changes, over the number of validation images."""
    found = few_images(kept)
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
