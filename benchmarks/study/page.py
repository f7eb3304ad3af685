"""The page of the study, from the kept runs of ``run.py``.

    python -m benchmarks.study.page

Every number, verdict and picture of ``docs/study.md`` comes from here. The text that does not
depend on the runs is in ``page.md``, where a line such as ``@answers`` is replaced.
"""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.study.answers import MAIN, NAMES, QUESTIONS, Tasks, by_verdict, having, no_object
from benchmarks.study.figures import FIGURES
from benchmarks.study.judge import MAPS, RAW
from benchmarks.study.kept import SEEDED, load
from benchmarks.study.rows import DEFAULT, PLAIN, ROWS
from benchmarks.study.run import EPOCHS, RESULTS, is_planned, planned

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PICTURES = tuple(FIGURES)[1:]  # of the questions, in their order


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


def pictured(name: str, words: str) -> str:
    return f"![{words}](study/{name}.png)"


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
