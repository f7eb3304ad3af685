"""Who else measures what, and by which call of ours the number is the same.

    pip install probcal pycalib mapie calzone-tool netcal torch-uncertainty torchvision timm \
        torchmetrics optax paddlepaddle
    python -m benchmarks.measures_of_others

It computes each number twice, with the other package and this one, on 2,000 drawn answers, and
prints a markdown table: K is "positive_class". What is not installed is left out. rms needs
`Rscript` with R's package rms. Not run in CI: these packages ask for gigabytes.
"""

from __future__ import annotations

import csv
import importlib
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sc_bce import CalibrationHistogram, TemperatureScaling, perturb_target

KIND = "positive_class"
DRAW = np.random.default_rng(0)
Z = 2 * DRAW.normal(size=2000)
P = 1 / (1 + np.exp(-Z))
Y = (DRAW.random(2000) < 1 / (1 + np.exp(-(0.6 * Z + 0.3)))).astype(int)
TWO = np.stack([1 - P, P], 1)
OURS = CalibrationHistogram()
OURS.update(torch.tensor(Z), torch.tensor(Y))

Row = tuple[str, Any, str, Any]  # their call, their number, our call, our number


def pycalib() -> Iterator[Row]:
    them = importlib.import_module("pycalib.metrics")
    yield "`binary_ECE(y, p, bins=10)`", them.binary_ECE(Y, P, bins=10), "`ece(10, K)`", ece(10)
    mce = OURS.mce(10, KIND)
    yield "`binary_MCE(y, p, bins=10)`", them.binary_MCE(Y, P, bins=10), "`mce(10, K)`", mce
    top = OURS.ece(10)
    yield "`conf_ECE(y, two, bins=10)`", them.conf_ECE(Y, TWO, bins=10), "`ece(10)`", top


def calzone() -> Iterator[Row]:
    error = importlib.import_module("calzone.metrics").calculate_ece_mce
    bins = importlib.import_module("calzone.utils").reliability_diagram
    for equal, ours, call in (
        (False, ece(10), "`ece(10, K)`"),
        (True, OURS.adaptive_ece(10, KIND), "`adaptive_ece(10, K)`"),
    ):
        seen, said, _, count = bins(Y, TWO, 10, class_to_plot=1, is_equal_freq=equal)
        name = f"`calculate_ece_mce` of `reliability_diagram(y, two, 10, 1, {equal})`"
        yield (
            f"{name}; counts {int(count.sum())} of {len(Y)}",
            error(seen, said, count)[0],
            call,
            ours,
        )


def mapie() -> Iterator[Row]:
    them = importlib.import_module("mapie.metrics.calibration").expected_calibration_error
    order = np.random.default_rng(1).permutation(len(Y))
    for bins in (10, 11):
        call = f'`expected_calibration_error(y, p, num_bins={bins}, split_strategy="uniform")`'
        yield call, them(Y, P, num_bins=bins, split_strategy="uniform"), "`ece(10, K)`", ece(10)
    call = '`expected_calibration_error(y, p, num_bins=10, split_strategy="array split")`'
    for name, rows in (("", slice(None)), (", rows in another order", order)):
        theirs = them(Y[rows], P[rows], num_bins=10, split_strategy="array split")
        yield call + name, theirs, "`adaptive_ece(10, K)`", OURS.adaptive_ece(10, KIND)


def probcal() -> Iterator[Row]:
    them = importlib.import_module("probcal.metrics")
    ours = OURS.adaptive_ece(15, KIND)
    yield "`ece(y, p)`, 15 bins of equal mass", them.ece(Y, P), "`adaptive_ece(15, K)`", ours
    width = them.ece(Y, P, n_bins=10, strategy="width")
    yield '`ece(y, p, n_bins=10, strategy="width")`', width, "`ece(10, K)`", ece(10)


def netcal() -> Iterator[Row]:
    them = importlib.import_module("netcal.metrics")
    ace = OURS.average_error(10, KIND)
    yield "`ECE(10).measure(p, y)`", them.ECE(10).measure(P, Y), "`ece(10, K)`", ece(10)
    yield "`ACE(10).measure(p, y)`", them.ACE(10).measure(P, Y), "`average_error(10, K)`", ace
    fit = importlib.import_module("netcal.scaling").TemperatureScaling
    ours = TemperatureScaling().fit(torch.tensor(Z), torch.tensor(Y))
    moved = (ours(torch.tensor(Z)).sigmoid() - torch.tensor(P)).abs().max()
    for kind in (np.float64, np.float32):
        other = fit()
        other.fit(P.astype(kind), Y)
        theirs = np.abs(other.transform(P.astype(kind)) - P).max()
        call = f"`TemperatureScaling().fit(p, y)` in {kind.__name__}: largest change of p"
        yield call, theirs, "`TemperatureScaling().fit(z, y)`", moved


def torchmetrics() -> Iterator[Row]:
    them = importlib.import_module("torchmetrics.classification").BinaryCalibrationError
    for count in (2_000, 65_519, 65_520):
        said = torch.linspace(0, 1, count).half()
        seen = torch.arange(count) % 2
        metric, ours = them(n_bins=10), CalibrationHistogram()
        metric.update(said, seen)
        ours.update(said, seen, from_logits=False)
        call = f"`BinaryCalibrationError(10)`, {count:,} float16 elements"
        yield call, metric.compute(), "`ece(10, K)`", ours.ece(10, KIND)


def torch_uncertainty() -> Iterator[Row]:
    them = importlib.import_module("torch_uncertainty.post_processing").TemperatureScaler
    for largest in (16.0, 17.0):
        for kind in (torch.float64, torch.float32):
            z = torch.cat([torch.tensor(Z), torch.tensor([largest])]).to(kind)
            y = torch.cat([torch.tensor(Y), torch.tensor([1])])
            other = them()
            batches = [(z[:, None], y)]
            other.fit(batches, progress=False)
            ours = TemperatureScaling().fit(z, y)
            name = str(kind).removeprefix("torch.")
            call = f"`TemperatureScaler().fit(...)` in {name}, largest logit {largest:.0f}"
            yield call, other.temperature[0], "`TemperatureScaling().fit(z, y)`", ours.temperature


def optax() -> Iterator[Row]:
    numbers = importlib.import_module("jax.numpy")
    them = importlib.import_module("optax").smooth_labels
    for name, labels, place in (("one column", [[1.0]], 0), ("one-hot", [[0.0, 1.0]], 1)):
        theirs = them(numbers.array(labels), 0.1)[0, place]
        call = f"`smooth_labels(y, 0.1)`, a positive in {name}"
        yield call, theirs, "`perturb_target(y, 1.0, 0.1)`", smoothed()


def paddle() -> Iterator[Row]:
    them = importlib.import_module("paddle")
    smooth = importlib.import_module("paddle.nn.functional").label_smooth
    for name, labels, place in (("one column", [[1.0]], 0), ("one-hot", [[0.0, 1.0]], 1)):
        theirs = smooth(them.to_tensor(labels), epsilon=0.1).numpy()[0, place]
        call = f"`label_smooth(y, epsilon=0.1)`, a positive in {name}"
        yield call, theirs, "`perturb_target(y, 1.0, 0.1)`", smoothed()


def rms() -> Iterator[Row]:
    script = (
        "suppressMessages(library(rms)); d <- read.csv(commandArgs(TRUE)[1]);"
        "v <- val.prob(d$p, d$y, pl=FALSE);"
        'for (n in c("Intercept", "Slope", "Brier")) cat(n, sprintf("%.9f", v[[n]]), "\\n")'
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answers.csv")
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("p", "y"), *zip(P, Y, strict=True)])
        command = ["Rscript", "-e", script, str(path)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ours = {"Intercept": OURS.intercept(), "Slope": OURS.slope(), "Brier": OURS.brier()}
    for line in lines.splitlines():
        name, value = line.split()
        yield f"`val.prob(p, y)`: {name}", float(value), f"`{name.lower()}()`", ours[name]


def ece(bins: int) -> torch.Tensor:
    return OURS.ece(bins, KIND)


def smoothed() -> torch.Tensor:
    return perturb_target(torch.ones(1), 1.0, 0.1)[0]


def rms_version() -> str:
    command = ["Rscript", "-e", 'cat(as.character(packageVersion("rms")))']
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "probcal": probcal,
    "pycalib": pycalib,
    "MAPIE": mapie,
    "calzone-tool": calzone,
    "netcal": netcal,
    "torchmetrics": torchmetrics,
    "torch_uncertainty": torch_uncertainty,
    "optax": optax,
    "paddlepaddle": paddle,
}


def main() -> None:
    warnings.simplefilter("ignore")
    print("| package | its call | its number | ours | our number |\n|---|---|---|---|---|")
    for name, part in PARTS.items():
        try:
            head = f"{name} {version(name)}"
            for theirs, value, ours, own in part():
                print(f"| {head} | {theirs} | {float(value):.4f} | {ours} | {float(own):.4f} |")
        except ImportError:
            continue
    if shutil.which("Rscript"):
        head = f"rms {rms_version()}"
        for theirs, value, ours, own in rms():
            print(f"| {head} | {theirs} | {float(value):.4f} | {ours} | {float(own):.4f} |")


if __name__ == "__main__":
    main()
