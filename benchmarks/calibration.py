"""What would it do for my data? One small network, trained with three losses, on your images.

    python benchmarks/calibration.py --quick
    python benchmarks/calibration.py --data FOLDER --seeds 0 1 2

The first line needs no download. A folder has images/ and masks/ of equal stems, or train/, val/
and test/ with images/ and labels/ each (one label per pixel, from 0 on). Finished runs are kept
under ``--out``: the same line goes on where it was stopped.
"""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file, which puts this folder on the path and not the checkout
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.data import tasks
from benchmarks.data.scenes import LAYOUTS, SmallUNet, folder_data
from benchmarks.data.tasks import Task
from benchmarks.report import versions
from benchmarks.study.compare import Array, Gap, over_both
from benchmarks.study.judge import RAW, unpacked
from benchmarks.study.rows import DEFAULT, PLAIN
from benchmarks.study.run import EPOCHS, FORMAT, JUDGED, Run, Source, missing, run_all, run_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]

SMOOTHED = "smoothing-half-0.1"
TRAINED = (PLAIN, SMOOTHED, DEFAULT)
COLUMNS = (
    ("NLL", "nll", 4),
    ("refined", "nll_refined", 4),
    ("Brier", "brier", 4),
    ("ECE", "ece", 4),
    ("accuracy", "accuracy", 4),
    ("F1", "f1", 4),
    ("mean/rate", "ratio", 3),
)
QUICK_COUNTS = {"train": 40, "val": 40, "test": 120}


@dataclass(frozen=True)
class Line:
    """One line of the table: a trained row, at one of its epochs, raw or repaired."""

    title: str
    row: str
    epoch: str
    repaired: bool


LINES = (
    Line("plain BCE", PLAIN, "last", False),
    Line("plain BCE, stopped early, repaired", PLAIN, "best", True),
    Line("label smoothing 0.1", SMOOTHED, "last", False),
    Line("adaptive, the default", DEFAULT, "last", False),
    Line("adaptive, stopped early, repaired", DEFAULT, "best", True),
)
RIVAL, OURS = LINES[1], LINES[4]


# ---------------------------------------------------------------- the data


def folder_task(folder: Path, size: int, epochs: int, quick: bool, labels: int) -> Task:
    """A folder of either kind as a task."""
    if (folder / "train").is_dir():
        width = 4 * round(size / 3)  # 4 : 3
        task = tasks.streets(folder, width, size, labels)
        return replace(task, name=folder.resolve().name, epochs=epochs)
    data = folder_data(folder, size, ood=1)
    splits = [getattr(data, part) for part in QUICK_COUNTS]
    if quick:
        counts = QUICK_COUNTS.values()
        splits = [split.thin(count) for split, count in zip(splits, counts, strict=True)]
    train, val, test = (tasks.part_of(split) for split in splits)
    width, batch, lr = (8, 10, 5e-3) if quick else (12, 16, 2e-3)
    build = partial(SmallUNet, width)
    return Task(data.name, train, val, test, build, epochs, batch, lr, mirror=True)


def digits_task(epochs: int) -> Task:
    return replace(tasks.digits(), epochs=epochs)


def source_of(args: argparse.Namespace) -> tuple[Source, int]:
    """Where the task comes from, and its epochs."""
    small = args.quick or args.data is None
    epochs = args.epochs if args.epochs is not None else 120 if small else 40
    streets = args.data is not None and (args.data / "train").is_dir()
    usual = 60 if streets and not args.quick else 32 if small else 48
    size = args.size if args.size is not None else usual
    if size < 16 or size % 4:
        raise ValueError(f"Expected --size to be a multiple of 4 from 16 on, but got {size}")
    if epochs < 1 or args.jobs < 1:
        raise ValueError(f"Expected --epochs and --jobs above 0, but got {epochs}, {args.jobs}")
    if args.data is None:
        return Source(partial(digits_task, epochs), corrupt=False), epochs
    make = partial(folder_task, args.data, size, epochs, args.quick, args.labels)
    return Source(make, corrupt=False), epochs


def prepare(folder: Path, task: Task) -> None:
    """Make the folder of kept runs; runs of other settings or data must never be mixed in."""
    stamp = {"format": FORMAT, "data": task.fingerprint(), "epochs": task.epochs}
    path = folder / "stamp.json"
    if path.exists() and json.loads(path.read_text()) != stamp:
        raise ValueError(
            f"{folder} holds runs of other settings or data: remove it, or give another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stamp))


# ---------------------------------------------------------------- the report


class Kept:
    """The finished runs of one task."""

    def __init__(self, folder: Path, task: str, seeds: Sequence[int]) -> None:
        self.runs: dict[str, list[Result]] = {}
        self.sums: dict[str, list[Any]] = {}
        for row in TRAINED:
            paths = [run_file(folder, (task, row, seed)) for seed in seeds]
            self.runs[row] = [json.loads(_with(path, "json").read_text()) for path in paths]
            self.sums[row] = [dict(np.load(_with(path, "npz"))) for path in paths]

    def maps(self, line: Line) -> list[str]:
        """Of each seed, the repair that did best on validation samples it was not fitted to."""
        runs = self.runs[line.row]
        return [run[line.epoch]["chosen"] if line.repaired else RAW for run in runs]

    def tested(self, line: Line) -> list[Result]:
        each = zip(self.runs[line.row], self.maps(line), strict=True)
        found = [run[line.epoch]["test"][name] for run, name in each]
        return [one | {"ratio": one["mean"] / one["base_rate"]} for one in found]

    def mean(self, line: Line, key: str) -> float:
        return float(np.mean([one[key] for one in self.tested(line)]))

    def nll(self, line: Line) -> Array:
        """(seeds, groups of test samples), whose mean is the NLL."""
        rows = []
        each = zip(self.sums[line.row], self.maps(line), self.tested(line), strict=True)
        for kept, name, found in each:
            sums = unpacked(kept, f"{line.epoch}-{name}")[0]
            rows.append(sums / sums.mean() * found["nll"])
        return np.stack(rows)

    def gap(self) -> Gap:
        return over_both(self.nll(OURS), self.nll(RIVAL)).percent

    def slope(self) -> float:
        return float(np.mean([run["history"]["slope"][-1] for run in self.runs[PLAIN]]))


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def table(kept: Kept) -> str:
    width = max(len(line.title) for line in LINES)
    rows = [" " * width + "".join(f"{name:>10}" for name, _, _ in COLUMNS)]
    for line in LINES:
        values = (f"{kept.mean(line, key):10.{digits}f}" for _, key, digits in COLUMNS)
        rows.append(f"{line.title:{width}}" + "".join(values))
    return "\n".join(rows)


def sentence(kept: Kept, test: int, seeds: int) -> str:
    """What was seen, and no more."""
    gap, slope = kept.gap(), kept.slope()
    told = {
        "lower": "the default is better here",
        "higher": "plain BCE is better here",
        "undecided": "no difference is shown",
    }[gap.verdict]
    sure = "over-confident" if slope < 1 else "not over-confident"
    several = f"{seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"Seen on {test} test images and {several}: plain BCE ends {sure} (calibration slope "
        f"{slope:.2f}, 1 is right); with both stopped early and repaired, the NLL of the default "
        f"differs from plain BCE's by {gap.value:+.1f} % (95 % interval {gap.low:+.1f} % to "
        f"{gap.high:+.1f} %): {told}."
    )


def figure(kept: Kept) -> "Figure":
    """NLL, divided into what no repair can mend and what one could."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 2.6), dpi=120, layout="constrained")
    axes = picture.subplots()
    lines = LINES[::-1]
    total = np.array([kept.mean(line, "nll") for line in lines])
    left = np.array([kept.mean(line, "nll_refined") for line in lines])
    place = [float(i) for i in range(len(lines))]
    axes.barh(place, left, color="#56B4E9", label="refinement: no repair mends it")
    axes.barh(place, total - left, left=left, color="#D55E00", hatch="///", label="miscalibration")
    axes.set_yticks(place, [line.title for line in lines])
    for spot, value in zip(place, total.tolist(), strict=True):
        axes.text(value, spot, f" {value:.3f}", va="center", fontsize=8)
    axes.set_xlim(left=0.8 * float(left.min()))
    axes.set_xlabel("NLL on test images (the axis does not begin at 0)")
    axes.spines[["top", "right"]].set_visible(False)
    picture.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return picture


def report(kept: Kept, task: Task, seeds: Sequence[int], out: Path) -> str:
    """What to print; the files are written."""
    said = sentence(kept, len(task.test), len(seeds))
    lines = {
        line.title: {key: kept.mean(line, key) for _, key, _ in COLUMNS} | {"maps": kept.maps(line)}
        for line in LINES
    }
    summary = {
        "data": task.name,
        "counts": [len(part) for part in (task.train, task.val, task.test)],
        "epochs": task.epochs,
        "seeds": list(seeds),
        "date": date.today().isoformat(),
        "versions": versions("torch", "numpy", "scikit-learn"),
        "lines": lines,
        "gap": kept.gap()._asdict(),
        "sentence": said,
    }
    (out / "calibration.json").write_text(json.dumps(summary, indent=1) + "\n")
    figure(kept).savefig(out / "calibration.png", metadata={"Software": None})
    told = textwrap.fill(said, 100, break_on_hyphens=False)
    written = ", ".join(str(out / f"calibration.{kind}") for kind in ("png", "json"))
    return f"{table(kept)}\n\n{told}\nwritten: {written}"


# ---------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train one small network with three losses and measure its probabilities.",
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small study, about a minute")
    parser.add_argument("--data", type=Path, help="folder of images and masks, laid out as below")
    parser.add_argument("--labels", type=int, default=tasks.STREET_LABELS, help="of a label image")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--size", type=int, help="pixels of the shorter side, a multiple of 4")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/out/<name of the data>")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then report; what the user can mend is said in one line."""
    args = parse(argv)
    try:
        source, epochs = source_of(args)
        task = source.task(0)
        out = args.out or Path(__file__).parent / "out" / task.name
        runs = out / ("quick-runs" if args.quick else "runs")
        prepare(runs, task)
    except ValueError as error:
        sys.exit(f"calibration.py: {error}")
    seeds = list(dict.fromkeys(args.seeds or [0]))
    wanted: list[Run] = [(task.name, row, seed) for seed in seeds for row in TRAINED]
    steps = missing(wanted, runs) * (epochs + len(EPOCHS) * JUDGED) + JUDGED
    try:
        with tqdm(total=steps, desc="train, evaluate, draw", unit=" steps") as bar:
            run_all(wanted, {task.name: source}, runs, args.jobs, bar, by_epoch=True)
            told = report(Kept(runs, task.name, seeds), task, seeds, out)
            bar.update(JUDGED)
    except KeyboardInterrupt:
        sys.exit("calibration.py: stopped; the same line goes on with what is missing")
    print(told)


if __name__ == "__main__":
    main()
