"""The page of the study, from the kept runs of ``run.py``.

    python -m benchmarks.study.page

Every number, verdict and picture of ``docs/study.md`` comes from here. The text that does not
depend on the runs is in ``page.md``, where a line such as ``@answers`` is replaced. Printed is what
README and the guide to noisy labels take over.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.study import answers
from benchmarks.study.answers import MISSING, SAID, Answer, no_object, take, where
from benchmarks.study.contrasts import (
    AT_END,
    MAIN,
    NAMES,
    READINGS,
    REPAIRED,
    Tasks,
    of_default,
    reading,
)
from benchmarks.study.figures import FIGURES
from benchmarks.study.judge import MAPS, RAW
from benchmarks.study.kept import SEEDED, load
from benchmarks.study.rows import DEFAULT, PLAIN, ROWS
from benchmarks.study.run import EPOCHS, RESULTS, is_planned, planned

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
COLUMNS = 4  # of README's table, at most
QUESTIONS: tuple[tuple[str, str, Callable[[Tasks], Answer]], ...] = (  # and figure, its anchor too
    ("Stopped early and repaired, does our default beat plain BCE?", "default", answers.default),
    ("What does a fine-tuned pretrained network need?", "fine-tuned", answers.fine_tuned),
    ("Is it the draw, the base rate, or both?", "draw", answers.draws),
    ("Does the adaptive level find the best fixed one?", "level", answers.levels),
    ("What does a level per sample add?", "wrong", answers.samples),
    ("Which repair, and for how many validation images?", "repair", answers.repairs),
    ("Does plain BCE's slope predict when softening helps?", "slope", answers.slopes),
    ("Which rival is better than our default?", "rivals", answers.rivals),
    ("Which loss is the safest if nothing can be repaired?", "corrupted", answers.corrupted),
)


# ---------------------------------------------------------------- the parts of the page


def sentences(kept: Tasks) -> str:
    return "\n".join(
        f"{i}. **[{asked}](#{name})** {answer(kept).line}"
        for i, (asked, name, answer) in enumerate(QUESTIONS, 1)
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


def sections(kept: Tasks) -> str:
    """Of each question the answer, figure and table, and the rest to unfold."""
    parts = []
    for i, (asked, name, answer) in enumerate(QUESTIONS, 1):
        line, table, more = answer(kept)
        parts += [f"## {i}. {asked} {{ #{name} }}", line, f"@{name}", table]
        if more:
            head = '<details markdown="1">\n<summary>The whole table</summary>'
            parts.append(f"{head}\n\n{more}\n\n</details>")
    return "\n\n".join(part for part in parts if part)


def readme(kept: Tasks) -> str:
    """Mean NLL of four rows on the first tasks that there are, and what they show."""
    names = [n for n in MAIN if n in kept and kept[n].has(PLAIN, seeds=1)][:COLUMNS]
    lines = (
        ("plain BCE, to the last epoch", PLAIN, AT_END),
        ("plain BCE, stopped early and repaired", PLAIN, REPAIRED),
        ("adaptive, to the last epoch", DEFAULT, AT_END),
        ("adaptive, stopped early and repaired", DEFAULT, REPAIRED),
    )
    head, rows = ["NLL on test data"], [[words] for words, _, _ in lines]
    for name in names:
        k = kept[name]
        seeds = k.seeds(PLAIN, DEFAULT) or k.seeds(PLAIN)
        head.append(NAMES[name] if len(seeds) > 2 else f"{NAMES[name]} (seeds: {len(seeds)})")
        for cells, (_, row, words) in zip(rows, lines, strict=True):
            epoch, repaired = READINGS[words]
            if not set(seeds) <= set(k.seeds(row)):
                cells.append(MISSING)
                continue
            fix = k.best_map(row, epoch, seeds) if repaired else RAW
            cells.append(f"{np.mean(k.each(row, seeds, epoch, 'test', fix, 'nll')):.4f}")
    gaps = of_default(kept)  # of all tasks, whose number the correction counts
    said = []
    for words in (REPAIRED, AT_END):
        each = {name: gap for name, gap in reading(gaps, words).items() if name in names}
        if each:
            said.append(f"- {SAID[words]}: {where(each)}")
    shown = "NLL of the adaptive loss against plain BCE, corrected for the number of comparisons:"
    return "\n\n".join([report.table(head, rows), *([shown, "\n".join(said)] if said else [])])


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


TEXTS: dict[str, Callable[[Tasks], str]] = {
    "sentences": sentences,
    "made-of": made_of,
    "no-object": no_object,
    "sections": sections,
    "take": take,
}


# ---------------------------------------------------------------- the page


def page(words: str, kept: Tasks, folder: Path) -> str:
    """The words with each ``@name`` line filled in; pictures and the CSV go to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").write_text(table_csv(kept), "utf-8")

    def drawn(name: str) -> str:
        caption, draw = FIGURES[name]
        figure = draw(kept)
        if figure is None:
            return ""
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        return f"![{caption}](study/{name}.png)"

    parts: dict[str, Callable[[], str]] = {name: partial(drawn, name) for name in FIGURES}
    parts |= {name: partial(text, kept) for name, text in TEXTS.items()}
    filled = report.fill(words.replace("{{state}}", state(kept)), parts)
    return re.sub(r"\n{3,}", "\n\n", filled)


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
    print(f"README:\n\n{readme(kept)}\n\nguide/noisy.md:\n\n{answers.noisy(kept)}\n")
    print(f"written: {args.out / 'study.md'}")


if __name__ == "__main__":
    main()
