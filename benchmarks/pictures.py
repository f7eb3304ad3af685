"""The pictures of the gallery, of which README shows two, from the built-in scenes.

    python -m benchmarks.pictures

Two small networks are trained with one seed on the quick task of ``calibration.py``: with plain
BCE and with the adaptive loss as it is built without arguments. The picture of the tutorial comes
from the code of its page. Half a minute on one core.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.data import tasks
from benchmarks.data.corruptions import STRENGTHS, corrupted, to_pixels
from benchmarks.data.tasks import Task
from benchmarks.study.judge import histogram
from benchmarks.study.rows import DEFAULT, PLAIN, ROWS
from benchmarks.study.run import train
from sc_bce import CalibrationHistogram, IsotonicCalibration, TemperatureScaling
from sc_bce.__main__ import main as sc_bce
from sc_bce.plot import reliability_diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
TUTORIAL = DOCS / "start.md"
SEED = 0
SURE = 0.95  # a pixel is marked if the wrong label has at least this probability
# Row, epoch and whether a repair is fitted on the validation images.
NETWORKS = {
    "plain BCE": (PLAIN, "last", False),
    "plain BCE, repaired": (PLAIN, "last", True),
    "adaptive": (DEFAULT, "last", False),
    "plain BCE, stopped early, repaired": (PLAIN, "best", True),
}
BEFORE, REPAIRED, OURS, STOPPED = NETWORKS
# Okabe and Ito's palette, told apart by colour-blind readers too; marks and dashes tell it in grey.
ORANGE = "#D55E00"
STYLES: dict[str, dict[str, Any]] = {
    BEFORE: {"color": "#000000", "marker": "x", "linestyle": "--"},
    OURS: {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    REPAIRED: {"color": "#E69F00", "marker": "s", "linestyle": ":"},
    STOPPED: {"color": "#009E73", "marker": "^", "linestyle": "-."},
}


class Shown:
    """The trained networks, and what they answer on the test images."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.trained = {row: train(task, ROWS[row], SEED, lambda: None) for row in (PLAIN, DEFAULT)}
        self.target = task.test.target.float()
        self.repairs = {
            name: TemperatureScaling(bias=True).fit(self.validation(name))
            if repaired
            else nn.Identity()
            for name, (_, _, repaired) in NETWORKS.items()
        }
        self.logits = {name: self.answer(name, task.test.inputs) for name in NETWORKS}
        self.seen = {name: histogram(z, self.target, None) for name, z in self.logits.items()}

    def validation(self, name: str) -> CalibrationHistogram:
        """Before any repair."""
        row, epoch, _ = NETWORKS[name]
        answers = self.trained[row].predict(epoch)(self.task.val.inputs)
        return histogram(answers, self.task.val.target.float(), None)

    def answer(self, name: str, inputs: Tensor) -> Tensor:
        row, epoch, _ = NETWORKS[name]
        answers: Tensor = self.repairs[name](self.trained[row].predict(epoch)(inputs))
        return answers

    def wrong(self, name: str) -> Tensor:
        """Which pixels of the test images are sure and wrong."""
        p = torch.sigmoid(self.logits[name])
        return torch.where(self.target > 0.5, 1 - p, p) >= SURE

    def scenes(self, *quantiles: float) -> list[int]:
        """Test images, in order of how many such pixels plain BCE has more before the repair than
        after it, at the quantiles of this order."""
        counts = [self.wrong(name).flatten(1).sum(1) for name in (BEFORE, REPAIRED)]
        order = (counts[0] - counts[1]).argsort(stable=True)
        return [int(order[round(q * (len(order) - 1))]) for q in quantiles]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _picture(axes: "Axes", pixels: Any) -> None:
    """An image in colours, or a map of probabilities from black (0) to white (1)."""
    axes.imshow(np.asarray(pixels), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _scene(column: "Sequence[Axes]", shown: Shown, i: int, names: Sequence[str]) -> list[int]:
    """Image, mask and the networks' probabilities, with the sure and wrong pixels marked."""
    _picture(column[0], to_pixels(shown.task.test.inputs[i : i + 1])[0])
    _picture(column[1], shown.target[i, 0])
    found = []
    for axes, name in zip(column[2:], names, strict=True):
        _picture(axes, torch.sigmoid(shown.logits[name][i, 0]))
        rows, columns = torch.nonzero(shown.wrong(name)[i, 0]).T
        axes.plot(
            columns.tolist(), rows.tolist(), "s", color=ORANGE, markersize=2.2, markeredgewidth=0
        )
        found.append(len(rows))
    return found


def _line(axes: "Axes", xs: Any, ys: Any, name: str) -> None:
    axes.plot(xs, ys, label=name, markersize=5, **STYLES[name])
    axes.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------- the pictures


def hero_maps(shown: Shown) -> "Figure":
    """README's: the median scene before and after the repair."""
    figure = _figure(4, 4.3)
    four = figure.subplots(2, 2).flatten()
    names = (BEFORE, REPAIRED)
    counts = _scene(four, shown, shown.scenes(0.5)[0], names)
    for axes, title in zip(four, ("image", "true mask", "plain BCE", "repaired"), strict=True):
        axes.set_title(title, fontsize=11)
    for axes, count in zip(four[2:], counts, strict=True):
        axes.set_xlabel(f"sure and wrong: {count} px", fontsize=10, color=ORANGE)
    return figure


def hero_curves(shown: Shown) -> "Figure":
    """README's other half: the reliability curves of all test images."""
    figure = _figure(4, 4.3)
    curve = figure.subplots()
    curve.plot([0.5, 1], [0.5, 1], color="#999999", linewidth=1)
    for name in (BEFORE, REPAIRED):
        seen = shown.seen[name]
        table = seen.reliability(20)
        _line(curve, table.confidence.tolist(), table.accuracy.tolist(), name)
        line = curve.lines[-1]
        line.set_label(f"{name.split(', ')[-1]}\nECE {seen.ece():.3f}, NLL {seen.nll():.3f}")
    curve.set(xlim=(0.5, 1), ylim=(0.5, 1), aspect="equal")
    curve.set_xlabel("confidence", fontsize=11)
    curve.set_ylabel("accuracy", fontsize=11)
    curve.text(0.97, 0.04, "below the line:\ntoo sure", transform=curve.transAxes, ha="right")
    curve.legend(fontsize=11, frameon=False, loc="upper left")
    return figure


def maps(shown: Shown) -> "Figure":
    """Five scenes in the order of what the repair changes."""
    figure = _figure(7.2, 8.6)
    names = (BEFORE, REPAIRED, OURS, STOPPED)
    rows = figure.subplots(2 + len(names), 5)
    for column, i in zip(rows.T, shown.scenes(0.1, 0.3, 0.5, 0.7, 0.9), strict=True):
        _scene(column, shown, i, names)
    for axes, name in zip(rows[:, 0], ("image", "true mask", *names), strict=True):
        axes.set_ylabel(name.replace(", ", ",\n"), fontsize=10)
    return figure


def curves(shown: Shown) -> "Figure":
    return reliability_diagram({name: shown.seen[name] for name in (BEFORE, OURS, STOPPED)})


def repair(shown: Shown) -> "Figure":
    """Plain BCE of the last epoch, before and after two repairs."""
    curve = IsotonicCalibration().fit(shown.validation(BEFORE))
    after = histogram(curve(shown.logits[BEFORE]), shown.target, None)
    named = {"before": shown.seen[BEFORE], "TemperatureScaling": shown.seen[REPAIRED]}
    named["IsotonicCalibration"] = after
    return reliability_diagram(named, kind="positive_class")


def levels(shown: Shown) -> "Figure":
    """The training samples of the highest and of the lowest levels, with their masks."""
    figure = _figure(7.2, 5.2)
    rows = figure.subplots(4, 6)
    samples, held = shown.task.train, shown.trained[DEFAULT].levels
    assert held is not None
    order = held.argsort(descending=True, stable=True)
    for pair, chosen in ((rows[:2], order[:6]), (rows[2:], order[-6:])):
        for column, i in zip(pair.T, chosen.tolist(), strict=True):
            _picture(column[0], to_pixels(samples.inputs[i : i + 1])[0])
            _picture(column[1], samples.target[i, 0])
            column[0].set_title(f"level {held[i]:.2f}", fontsize=10)
    return figure


def corruption(shown: Shown) -> "Figure":
    """NLL over the severity; repairs are those of validation images that are not corrupted."""
    figure = _figure(7.2, 4.6)
    rows = figure.subplots(2, len(STRENGTHS), height_ratios=[1, 1.7], sharey="row")
    start = {name: float(seen.nll()) for name, seen in shown.seen.items()}
    losses = {kind: {name: [nll] for name, nll in start.items()} for kind in STRENGTHS}
    (scene,) = shown.scenes(0.5)
    for kind, severity, inputs in corrupted(shown.task.test.inputs):
        for name in NETWORKS:
            seen = histogram(shown.answer(name, inputs), shown.target, None)
            losses[kind][name].append(float(seen.nll()))
        if severity == 3:
            axes = rows[0, list(STRENGTHS).index(kind)]
            _picture(axes, to_pixels(inputs[scene : scene + 1])[0])
            axes.set_title(f"{kind}, severity 3", fontsize=10)
    for axes, found in zip(rows[1], losses.values(), strict=True):
        for name, values in found.items():
            _line(axes, range(len(values)), values, name)
        axes.set_xlabel("severity", fontsize=10)
        axes.set_xticks(range(6))
    rows[1, 0].set_ylabel("NLL", fontsize=10)
    entries = rows[1, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2, frameon=False)
    return figure


def tutorial(path: Path) -> None:
    """Run the code of the tutorial, which saves its picture into the current folder."""
    blocks = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text("utf-8"), re.DOTALL | re.M)
    back = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec("\n".join(blocks), {"__name__": "page"})
            drawn = Path("reliability.png").read_bytes()
        finally:
            os.chdir(back)
    path.write_bytes(drawn)


def command(shown: Shown, path: Path) -> None:
    """What the command line draws of plain BCE's maps, saved as 8-bit PNG."""
    maps = (255 * torch.sigmoid(shown.logits[BEFORE])).round().to(torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for name, images in (("maps", maps), ("masks", 255 * shown.task.test.target)):
            (Path(folder) / name).mkdir()
            for i, image in enumerate(images):
                Image.fromarray(image[0].numpy()).save(Path(folder) / name / f"{i:03}.png")
        drawn = f"{folder}/drawn.png"
        if sc_bce(["measure", f"{folder}/maps", f"{folder}/masks", "--plot", drawn]):
            raise ValueError("Expected the command to measure the maps, but it refused them")
        with Image.open(drawn) as picture:
            picture.save(path)  # without the version of matplotlib


FIGURES: "tuple[Callable[[Shown], Figure], ...]" = (
    hero_maps,
    hero_curves,
    maps,
    curves,
    repair,
    levels,
    corruption,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train two networks and draw the gallery.")
    parser.add_argument("--epochs", type=int, help="default: those of the quick task")
    parser.add_argument("--out", type=Path, default=DOCS / "gallery", help="default: docs/gallery")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    task = tasks.digits()
    shown = Shown(replace(task, epochs=task.epochs if args.epochs is None else args.epochs))
    for draw in FIGURES:
        draw(shown).savefig(args.out / f"{draw.__name__}.png", metadata={"Software": None})
    command(shown, args.out / "command.png")
    tutorial(args.out.resolve() / "tutorial.png")


if __name__ == "__main__":
    main()
