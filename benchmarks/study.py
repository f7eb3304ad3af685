"""The written report of the study, from the JSON files that ``calibration.py`` has left.

    python benchmarks/study.py

Every number, table and picture of ``docs/study.md`` comes from here; its words stand in
``benchmarks/study.md``, where a line such as ``@headline`` is replaced by what this file makes of
each study, and ``{{digits feedback test ece}}`` by one mean.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from methods import MENDED, PENALTIES, PLAIN
from report import paired, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Study = dict[str, Any]
Column = tuple[str, str, str]  # heading, part, measure

HERE = Path(__file__).parent
COLUMNS: tuple[Column, ...] = (
    ("accuracy", "test", "accuracy"),
    ("F", "test", "f"),
    ("NLL", "test", "nll"),
    ("Brier", "test", "brier"),
    ("ECE", "test", "ece"),
    ("adaptive ECE", "test", "adaptive_ece"),
    ("debiased", "test", "debiased_ece"),
    ("OE", "test", "oe"),
    ("confidence", "test", "confidence"),
    ("OOD confidence", "ood", "confidence"),
    ("OOD ECE", "ood", "ece"),
    ("OOD OE", "ood", "oe"),
    ("AUROC", "shift", "auroc_pixel"),
)
SHORT = tuple(c for c in COLUMNS if c[0] not in ("F", "adaptive ECE", "debiased", "OOD OE"))
LEVELS: tuple[Column, ...] = (("mean level", "level", "mean"), ("spread of levels", "level", "std"))
NOISE: tuple[Column, ...] = (
    ("found by level", "noise", "auroc_level"),
    ("found by mean level", "noise", "auroc_mean_level"),
    ("found by loss", "noise", "auroc_loss"),
)
OURS, USUAL = f"{MENDED}+flip-temperature", f"{PLAIN}+temperature"
SMOOTHING = ("smoothing-0.05", "smoothing-0.1", "smoothing-0.2")
HEADLINE = (
    PLAIN,
    "smoothing-0.1",
    "feedback",
    "feedback-focus-2",
    USUAL,
    f"{PLAIN}+isotonic",
    OURS,
)
# In the order of the headline, so that a row has one colour in all pictures.
CURVES = (PLAIN, "smoothing-0.1", "feedback", "feedback-focus-2", "max-entropy", "calibration")
HISTOGRAMS = (
    "max-entropy",
    "calibration",
    "feedback",
    *(f"feedback-focus-{k}" for k in (1, 2, 3)),
    *(f"feedback-penalty-{penalty}" for penalty in PENALTIES),
)
PAIRS = (
    ("feedback", "feedback-mean"),
    ("feedback", "feedback-shuffled"),
    ("feedback", "feedback-shared"),
    ("feedback-focus-2", "feedback"),
    ("feedback-focus-2", "feedback-focus-2-mean"),
    ("feedback-focus-2", "feedback-focus-2-shuffled"),
)
# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")


@dataclass(frozen=True)
class Target:
    """One thing that was to be reached: ``first`` against ``second`` in one measure.

    Args:
        ratio: the mean of ``first`` is to be at most this many times that of ``second``.
        surely: the 95 % interval of the difference is to lie below 0.
        loss: ``first`` is to be at most this much lower than ``second``.
    """

    first: str
    second: str
    column: Column
    ratio: float | None = None
    surely: bool = False
    loss: float | None = None


ACCURACY, NLL, ECE, OE, OOD_CONFIDENCE, OOD_ECE, AUROC = (
    next(column for column in COLUMNS if column[0] == heading)
    for heading in ("accuracy", "NLL", "ECE", "OE", "OOD confidence", "OOD ECE", "AUROC")
)
TARGETS = (
    Target(OURS, USUAL, ECE, ratio=0.5, surely=True),
    *(Target(OURS, USUAL, c, surely=True) for c in COLUMNS if c[0] in ("NLL", "Brier")),
    Target(OURS, USUAL, OOD_ECE, surely=True),
    Target(OURS, USUAL, ACCURACY, loss=0.0),
    Target("feedback", PLAIN, ECE, ratio=0.5),
    Target("feedback", PLAIN, OE, ratio=0.35),
    Target("feedback", PLAIN, ACCURACY, loss=0.003),
    *(Target("feedback", name, ECE, ratio=1.0) for name in SMOOTHING),
    Target("feedback", PLAIN, OOD_CONFIDENCE, surely=True),
    Target("feedback", PLAIN, AUROC, loss=0.0),
)


# ---------------------------------------------------------------- tables


def values(study: Study, name: str, column: Column) -> list[float]:
    """One value per seed, in the same order for all rows; none where the row has no such."""
    method: dict[str, Any] = study["methods"].get(name, {}).get("measures", {})
    found: list[float] = method.get(column[1], {}).get(column[2], {}).get("values", [])
    return found


def cell(found: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not found:
        return ""
    spread = f" ± {np.std(found, ddof=1):.4f}" if len(found) > 1 else ""
    return f"{np.mean(found):.4f}{spread}"


def difference(study: Study, first: str, second: str, column: Column) -> str:
    """The paired difference with its interval; bold where that excludes 0."""
    a, b = values(study, first, column), values(study, second, column)
    if not a or not b:
        return ""
    if len(a) < 2:
        return f"{a[0] - b[0]:+.4f}"
    gap = paired(a, b)
    low, high = gap["interval"]
    text = f"{gap['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def title(study: Study, name: str) -> str:
    found: str = study["methods"][name]["title"]
    return found


def means(study: Study, names: Sequence[str], columns: Sequence[Column]) -> str:
    """One line per method, one column per measure."""
    rows = [
        [title(study, name), *(cell(values(study, name, column)) for column in columns)]
        for name in names
        if name in study["methods"]
    ]
    return markdown(["", *(column[0] for column in columns)], rows) if rows else ""


def differences(
    study: Study, pairs: Sequence[tuple[str, str]], columns: Sequence[Column] = SHORT
) -> str:
    """One line per pair of methods: the first minus the second."""
    rows = [
        [
            title(study, first),
            title(study, second),
            *(difference(study, first, second, column) for column in columns),
        ]
        for first, second in pairs
        if first in study["methods"] and second in study["methods"] and first != second
    ]
    return markdown(["row", "minus", *(column[0] for column in columns)], rows) if rows else ""


def group(study: Study, kind: str) -> list[str]:
    return [name for name, method in study["methods"].items() if method["group"] == kind]


def referred(study: Study, kind: str) -> list[tuple[str, str]]:
    """Each row of a group with the row that it is compared with."""
    return [(name, study["methods"][name]["reference"]) for name in group(study, kind)]


def about(study: Study) -> str:
    data, settings, versions = study["data"], study["settings"], study["versions"]
    seeds = ", ".join(map(str, study["seeds"]))
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    hours = sum(m["seconds"] for m in study["methods"].values()) * len(study["seeds"]) / 3600
    return (
        f"{data['train']} training, {data['val']} validation and {data['test']} test images and "
        f"{data['ood']} without any object, {settings['size']} by {settings['size']} pixels; "
        f"{settings['epochs']} epochs, batches of {settings['batch']}; seeds {seeds}; "
        f"{study['date']}; {packages}; {hours:.1f} hours of one core. {verdict(study)}"
    ).replace("\n", " ")


def headline(study: Study) -> str:
    compared = differences(study, [(OURS, other) for other in HEADLINE])
    return f"{means(study, HEADLINE, SHORT)}\n\n{compared}"


def summary(studies: Sequence[Study]) -> str:
    """The headline of all studies in one table: what README shows."""
    columns = [(study, column) for study in studies for column in (ACCURACY, NLL, ECE, OOD_ECE)]
    head = [f"{study['data']['name']}: {column[0]}" for study, column in columns]
    rows = [
        [
            title(studies[0], name),
            *(f"{np.mean(values(study, name, column)):.4f}" for study, column in columns),
        ]
        for name in HEADLINE
    ]
    return markdown(["", *head], rows)


def targets(study: Study) -> str:
    """What was to be reached, and whether it was."""
    rows = [
        judged
        for target in TARGETS
        if target.first in study["methods"] and target.second in study["methods"]
        for judged in [_judge(study, target)]
    ]
    return markdown(["row", "against", "asked", "measured", "met"], rows)


def _judge(study: Study, target: Target) -> list[str]:
    a = values(study, target.first, target.column)
    b = values(study, target.second, target.column)
    heading, gap, ratio = target.column[0], np.mean(a) - np.mean(b), np.mean(a) / np.mean(b)
    asked, met = [], True
    measured = difference(study, target.first, target.second, target.column)
    if target.ratio is not None:
        asked.append(f"{heading} at most {target.ratio:g} times")
        measured = f"{ratio:.2f} times, {measured}"
        met &= bool(ratio <= target.ratio)
    if target.surely:
        asked.append(f"{heading} lower, interval without 0")
        met &= len(a) > 1 and paired(a, b)["interval"][1] < 0
    if target.loss is not None:
        asked.append(f"{heading} at most {target.loss:g} lower" if target.loss else "")
        asked[-1] = asked[-1] or f"{heading} not lower"
        met &= bool(gap >= -target.loss)
    titles = [title(study, name) for name in (target.first, target.second)]
    return [*titles, "; ".join(asked), measured, "yes" if met else "no"]


def rows_of(*kinds: str) -> Callable[[Study], str]:
    """All measures of some groups, and their differences to the reference."""

    def section(study: Study) -> str:
        names = [name for kind in kinds for name in group(study, kind)]
        pairs = [pair for kind in kinds for pair in referred(study, kind)]
        if not names:
            return ""
        return f"{means(study, names, COLUMNS)}\n\n{differences(study, pairs)}"

    return section


def levels(study: Study) -> str:
    """Do the levels of the samples matter? The learned table against what replaces it."""
    names = [name for name in dict.fromkeys(n for pair in PAIRS for n in pair)]
    return f"{means(study, names, (*LEVELS, *SHORT))}\n\n{differences(study, PAIRS)}"


def penalties(study: Study) -> str:
    """The rows of each objective by rising penalty, the default last."""
    names = [
        name
        for objective in ("calibration", "feedback")
        for name in (*(f"{objective}-penalty-{p}" for p in PENALTIES), objective)
    ]
    pairs = [(name, PLAIN) for name in names]
    if not group(study, "penalty"):
        return ""
    return f"{means(study, names, (*LEVELS, *SHORT))}\n\n{differences(study, pairs)}"


def forms(study: Study) -> str:
    """The flip removal in its forms, and what no fit on the validation images can beat."""
    names = [OURS, f"{MENDED}+fitted-flip", *group(study, "form")]
    bounds = [USUAL, f"{PLAIN}+isotonic", OURS, *group(study, "bound")]
    compared = differences(study, [(name, OURS) for name in names])
    if not group(study, "form"):
        return ""
    return f"{means(study, names, SHORT)}\n\n{compared}\n\n{means(study, bounds, SHORT)}"


def noise(study: Study) -> str:
    compared = differences(study, referred(study, "noise"))
    if not compared:
        return ""
    return f"{means(study, group(study, 'noise'), (*NOISE, *SHORT))}\n\n{compared}"


# ---------------------------------------------------------------- pictures


def _figure(columns: int, rows: int = 1, height: float = 3.4) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * columns, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: "Figure", axes: "Axes", columns: int) -> None:
    """Below all panels, since it belongs to each."""
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False
    )


def _shown(study: Study, names: Sequence[str], key: str) -> list[tuple[str, str, Any]]:
    """Colour, title and what is kept under ``key``, of the rows that have it."""
    return [
        (colour, title(study, name), study["methods"][name][key])
        for colour, name in zip(COLOURS, names, strict=False)
        if key in study["methods"].get(name, {})
    ]


def reliability_figure(study: Study) -> "Figure":
    """Accuracy over confidence, all seeds together, in and out of distribution."""
    figure, axes = _figure(2, height=4.2)
    for one, (part, name) in zip(
        axes, (("test", "test images"), ("ood", "no object")), strict=True
    ):
        one.plot([0.5, 1], [0.5, 1], "--", color="#999999", linewidth=1)
        for colour, label, tables in _shown(study, HEADLINE, "reliability"):
            count, sure, right = (
                np.array(tables[part][k]) for k in ("count", "confidence", "right")
            )
            some = count >= count.sum() / 1000  # bins of fewer pixels say nothing
            x, y = sure[some] / count[some], right[some] / count[some]
            one.plot(x, y, "o-", color=colour, label=label, markersize=3, linewidth=1.2)
        one.set(title=name, xlabel="confidence", ylabel="accuracy", xlim=(0.5, 1))
    _legend(figure, axes[0], columns=2)
    return figure


def levels_figure(study: Study) -> "Figure":
    """Learned levels of the training samples over one axis, so that the spreads compare."""
    names = [n for n in HISTOGRAMS if "levels" in study["methods"].get(n, {})]
    figure, axes = _figure(2, max(1, -(-len(names) // 2)), height=1.0 + 0.5 * len(names))
    tables = {name: study["methods"][name]["levels"] for name in names}
    ends = (
        e for t in tables.values() for e, n in zip(t["edges"][1:], t["counts"], strict=True) if n
    )
    high = max([0.01, *ends])
    for one, (name, table) in zip(axes, tables.items(), strict=False):
        share = np.array(table["counts"]) / sum(table["counts"])
        one.stairs(share, table["edges"], fill=True, color=COLOURS[4])
        one.set_title(title(study, name), fontsize=7, loc="right")
        one.set_xlim(0, 1.02 * high)
        one.tick_params(labelsize=6)
    for one in axes[len(names) :]:
        one.set_axis_off()
    figure.supxlabel("learned perturbation probability (level)", fontsize=8)
    figure.supylabel("share of the training samples", fontsize=8)
    return figure


def curves_figure(study: Study) -> "Figure":
    """What happens on the validation images over the epochs, mean of the seeds."""
    figure, axes = _figure(4)
    panels = (
        ("alpha", "mean level"),
        ("confidence", "confidence"),
        ("accuracy", "accuracy"),
        ("ece", "ECE"),
    )
    for one, (key, name) in zip(axes, panels, strict=True):
        for colour, label, history in _shown(study, CURVES, "history"):
            if key in history:
                epochs = range(1, len(history[key]) + 1)
                one.plot(epochs, history[key], color=colour, label=label, linewidth=1.2)
        one.set(title=name, xlabel="epoch")
    _legend(figure, axes[1], columns=3)
    return figure


# ---------------------------------------------------------------- the page

TABLES: dict[str, Callable[[Study], str]] = {
    "about": about,
    "headline": headline,
    "targets": targets,
    "losses": rows_of("fixed", "adaptive"),
    "posthoc": rows_of("posthoc"),
    "levels": levels,
    "penalties": penalties,
    "noise": noise,
    "variants": rows_of("variant"),
    "forms": forms,
}
FIGURES: dict[str, "Callable[[Study], Figure]"] = {
    "reliability-figure": reliability_figure,
    "levels-figure": levels_figure,
    "curves-figure": curves_figure,
}


def page(words: str, studies: Sequence[Study], folder: Path) -> str:
    """The words with each ``@name`` line filled in; the pictures go to ``folder``."""
    by_name = {study["data"]["name"]: study for study in studies}
    if len(by_name) < len(studies):
        raise ValueError("Expected studies of different data, but two have the same: give one")
    folder.mkdir(parents=True, exist_ok=True)

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES and name not in FIGURES:
            known = ", ".join(f"@{known}" for known in (*TABLES, *FIGURES))
            raise ValueError(f"Expected one of {known}, but the words have @{name}")
        return "\n\n".join(filter(None, (_filled(name, study, folder) for study in studies)))

    def mean(found: re.Match[str]) -> str:
        data, method, part, key = found[1].split()
        got = values(by_name[data], method, ("", part, key))
        if not got:
            raise ValueError(f"Expected a measure, but no study has {found[0]}")
        return f"{np.mean(got):.4f}"

    # What is said of other data than these is left out.
    parts = re.split(r"^(?=## )", words, flags=re.M)
    words = "".join(part for part in parts if set(re.findall(r"\{\{(\S+)", part)) <= set(by_name))
    filled = re.sub(r"^@([\w-]+)$", fill, words, flags=re.M)
    return re.sub(r"\{\{(\S+ \S+ \S+ \S+)\}\}", mean, filled)


def _filled(name: str, study: Study, folder: Path) -> str:
    data = study["data"]["name"]
    if name in TABLES:
        return f"*{data}:* {TABLES[name](study)}" if name == "about" else _captioned(name, study)
    path = folder / f"{data}-{name.removesuffix('-figure')}.png"
    FIGURES[name](study).savefig(path, metadata={"Software": None})
    return f"![{data}: {path.stem}]({folder.name}/{path.name})"


def _captioned(name: str, study: Study) -> str:
    """The name of the data above its tables; nothing where the study has no such rows."""
    tables = TABLES[name](study).strip()
    return f"*{study['data']['name']}*\n\n{tables}" if tables else ""


def kept_studies() -> list[Path]:
    found = HERE.glob("results/*/calibration.json")
    return sorted(path for path in found if path.parent.name != "quick")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the report of the study from its JSON.")
    parser.add_argument(
        "studies", nargs="*", type=Path, metavar="JSON", help="default: those under results/"
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="default: docs")
    args = parser.parse_args(argv)
    paths = args.studies or kept_studies()
    if not paths:
        sys.exit("study.py: no study is kept under results/: give the JSON of one")
    studies = [json.loads(path.read_text("utf-8")) for path in paths]
    try:
        text = page((HERE / "study.md").read_text("utf-8"), studies, args.out / "study")
    except ValueError as error:
        sys.exit(f"study.py: {error}")
    (args.out / "study.md").write_text(text, "utf-8")
    print(f"written: {args.out / 'study.md'}")


if __name__ == "__main__":
    main()
