"""From kept runs to the table, the JSON summary and the pictures."""

import json
import platform
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from methods import METHODS, PLAIN, QUICK, ROWS
from numpy.typing import NDArray
from saliency import SaliencyData

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

Summary = dict[str, Any]
Task = tuple[str, int]

COLUMNS = (
    # heading, part, measure, digits
    ("accuracy", "test", "accuracy", 4),
    ("NLL", "test", "nll", 3),
    ("Brier", "test", "brier", 4),
    ("ECE", "test", "ece", 4),
    ("OE", "test", "oe", 4),
    ("conf", "test", "confidence", 3),
    ("conf", "ood", "confidence", 3),
    ("ECE", "ood", "ece", 4),
    ("OE", "ood", "oe", 4),
    ("AUROC", "shift", "auroc_pixel", 3),
)
MORE = (  # only in the full study: more ways to say the same
    ("F", "test", "f", 3),
    ("adaptive", "test", "adaptive_ece", 4),
    ("debiased", "test", "debiased_ece", 4),
)
CELL = 9
LEVEL_BINS = np.linspace(0, 0.5, 101)  # of the learned levels, the same for all methods
ACCURACY_MARGIN = 0.005
NOT_OURS = (PLAIN, "focal")
FEATURED = ("smoothing-0.1", "feedback", "feedback-focus-2")


def report(
    tasks: Sequence[Task],
    data: SaliencyData,
    settings: dict[str, Any],
    runs: Path,
    out: Path,
    full: bool,
) -> None:
    """Write everything to ``out`` and print the table and the verdict."""
    import matplotlib

    matplotlib.use("Agg")  # pictures go to files, no display is needed
    results = [json.loads((runs / f"{name}-seed{seed}.json").read_text()) for name, seed in tasks]
    summary: Summary = {
        "date": date.today().isoformat(),
        "versions": _versions(),
        "threads_per_run": 1,
        "dtype": "float32",
        "data": {"name": data.name, "fingerprint": data.fingerprint()}
        | {part: len(getattr(data, part)) for part in ("train", "val", "test", "ood")},
        "settings": settings,
        "seeds": sorted({seed for _, seed in tasks}),
        "methods": aggregate(results),
    }
    chosen = summary["chosen"] = choose(summary["methods"])
    path = out / "calibration.json"
    # A full study is for programs to read, and large; a quick one is for people.
    layout: dict[str, Any] = {"separators": (",", ":")} if full else {"indent": 1}
    path.write_text(json.dumps(_rounded(summary), **layout) + "\n")
    pictures = [_save(_reliability(tasks, data, runs, chosen), out / "reliability.png")]
    levels = _levels(tasks, data, runs)
    if levels is not None:
        pictures.append(_save(levels, out / "levels.png"))
    print(table(summary, (*MORE, *COLUMNS) if full else COLUMNS))
    print(verdict(summary))
    print("written: " + ", ".join(str(p) for p in [path, *pictures]))


def _versions() -> dict[str, str]:
    """What the figures depend on; a package run from its sources has no version to tell."""
    found = {"python": platform.python_version()}
    for package in ("sc-bce", "torch", "numpy", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _rounded(value: Any) -> Any:
    """Six significant digits are more than any figure here can bear."""
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# ---------------------------------------------------------------- figures and words


def aggregate(results: Sequence[dict[str, Any]]) -> dict[str, Summary]:
    """Per method: mean and deviation over the seeds, difference to its reference, curves."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["method"], {})[result["seed"]] = result
    return {name: _aggregate_one(name, runs, by_name) for name, runs in by_name.items()}


def _aggregate_one(
    name: str, runs: dict[int, dict[str, Any]], by_name: dict[str, dict[int, dict[str, Any]]]
) -> Summary:
    """The runs of one method; measures that its reference lacks have no difference."""
    row, some = ROWS[name], next(iter(runs.values()))
    plain = by_name[row.reference]

    def values(results: dict[int, dict[str, Any]], part: str, key: str) -> list[float]:
        found = [results[seed]["measures"].get(part, {}).get(key) for seed in runs]
        return [value for value in found if value is not None]

    found: Summary = {
        "title": row.title,
        "group": row.group,
        "reference": row.reference,
        "seconds": float(np.mean([r["seconds"] for r in runs.values()])),
        "measures": {
            part: {key: _statistics(values(runs, part, key), values(plain, part, key)) for key in m}
            for part, m in some["measures"].items()
        },
        "reliability": {
            part: {
                key: np.sum([r["reliability"][part][key] for r in runs.values()], axis=0).tolist()
                for key in table
            }
            for part, table in some["reliability"].items()
        },
    }
    if "history" in some:
        found["history"] = _mean_history([r["history"] for r in runs.values()])
    if "levels" in some:
        counts, edges = np.histogram([r["levels"] for r in runs.values()], bins=list(LEVEL_BINS))
        found["levels"] = {"edges": edges.tolist(), "counts": counts.tolist()}
    return found


def _statistics(values: list[float], plain: list[float]) -> dict[str, Any]:
    """Mean, deviation and the difference to the reference of the same seeds."""
    found: dict[str, Any] = {"values": values, "mean": float(np.mean(values))}
    if len(values) > 1:
        found["std"] = float(np.std(values, ddof=1))
        if plain:
            found |= paired(values, plain)
    return found


def paired(values: list[float], others: list[float]) -> dict[str, Any]:
    """The mean difference of equal seeds, and its 95 % interval after Student."""
    from scipy.stats import t

    gap = np.subtract(values, others)
    reach = t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap))
    interval = [float(gap.mean() - reach), float(gap.mean() + reach)]
    return {"difference": float(gap.mean()), "interval": interval}


def _mean_history(histories: list[list[dict[str, float]]]) -> dict[str, list[float]]:
    """The mean over the seeds of each curve over the epochs."""
    return {
        key: np.mean([[row[key] for row in history] for history in histories], axis=0).tolist()
        for key in histories[0][0]
    }


def _mean(methods: dict[str, Summary], name: str, part: str, key: str) -> float:
    return float(methods[name]["measures"][part][key]["mean"])


def choose(methods: dict[str, Summary]) -> str:
    """The lowest validation ECE among those about as accurate there as plain BCE."""
    floor = _mean(methods, PLAIN, "val", "accuracy") - ACCURACY_MARGIN
    ours = [name for name in methods if name not in NOT_OURS and ROWS[name].base is None]
    ours = [name for name in ours if ROWS[name].reference == PLAIN]
    able = [name for name in ours if _mean(methods, name, "val", "accuracy") >= floor]
    return min(able or [PLAIN], key=lambda name: _mean(methods, name, "val", "ece"))


def table(summary: Summary, columns: Sequence[tuple[str, str, str, int]] = COLUMNS) -> str:
    """One line per method: means over the seeds on the test images and out of distribution."""
    methods = summary["methods"]
    width = max(len(m["title"]) for m in methods.values())
    inside = sum(CELL for column in columns if column[1] == "test")
    lines = [
        " " * width + f"{'in distribution':>{inside}}" + f"{'out of distribution':>{CELL * 4}}",
        " " * width + "".join(f"{column[0]:>{CELL}}" for column in columns),
    ]
    for name, method in methods.items():
        cells = [f"{_mean(methods, name, p, k):{CELL}.{digits}f}" for _, p, k, digits in columns]
        lines.append(f"{method['title']:<{width}}" + "".join(cells))
    return "\n".join(lines)


def verdict(summary: Summary) -> str:
    """In words: what the validation images chose, and what that gave on the test images."""
    methods, chosen = summary["methods"], summary["chosen"]
    if chosen == PLAIN:
        return "No setting is as accurate as plain BCE on the validation images: none is chosen."
    ece, plain = (_mean(methods, name, "test", "ece") for name in (chosen, PLAIN))
    gain = _mean(methods, chosen, "test", "accuracy") - _mean(methods, PLAIN, "test", "accuracy")
    sure, right = (_mean(methods, PLAIN, "test", key) for key in ("confidence", "accuracy"))
    leaning = "over-confident" if sure > right else "under-confident"
    return (
        f"Plain BCE is {leaning}: mean confidence {sure:.3f} at accuracy {right:.3f}.\n"
        f"Chosen on the validation images (lowest ECE at about plain BCE's accuracy): "
        f"{methods[chosen]['title']}.\n"
        f"Its test ECE is {ece:.4f}, {ece / plain:.2f} times plain BCE's {plain:.4f}; "
        f"its accuracy is {100 * gain:+.2f} percentage points."
    )


# ---------------------------------------------------------------- pictures


def _save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def _reliability(tasks: Sequence[Task], data: SaliencyData, runs: Path, chosen: str) -> "Figure":
    """Plain BCE, the chosen setting and the featured ones, all seeds of each together."""
    from sc_bce import CalibrationHistogram
    from sc_bce.plot import reliability_diagram

    target = torch.from_numpy(data.test.masks).unsqueeze(1)
    shown: dict[str, CalibrationHistogram] = {}
    for name in list(dict.fromkeys((PLAIN, chosen, *FEATURED)))[:4]:
        for seed in (seed for n, seed in tasks if n == name):
            seen = shown.setdefault(METHODS[name].title, CalibrationHistogram())
            seen.update(torch.from_numpy(_arrays(runs, (name, seed))["test"]), target)
    return reliability_diagram(shown)


def _arrays(runs: Path, task: Task) -> dict[str, NDArray[Any]]:
    with np.load(runs / f"{task[0]}-seed{task[1]}.npz") as stored:
        return dict(stored)


def _levels(tasks: Sequence[Task], data: SaliencyData, runs: Path) -> "Figure | None":
    """The learned levels of the first seed, and the samples with the highest and lowest."""
    from matplotlib import pyplot as plt

    first, trained = tasks[0][1], [name for name, _ in tasks if name in METHODS]
    able = [name for name in dict.fromkeys(trained) if METHODS[name].group == "adaptive"]
    stored = {name: _arrays(runs, (name, first)) for name in able if name in QUICK or not able[4:]}
    adaptive = {name: a for name, a in stored.items() if "shown" in a}
    if not adaptive:
        return None
    best = "feedback-focus-2" if "feedback-focus-2" in adaptive else next(iter(adaptive))
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3), squeeze=False)[0]
    _draw_histograms(left, {n: a["levels"][-1] for n, a in adaptive.items()})
    right.suptitle(f"{METHODS[best].title}: image, mask, prediction", fontsize=10)
    _draw_samples(right, data, adaptive[best])
    return figure


def _draw_histograms(figure: "SubFigure", levels: dict[str, NDArray[Any]]) -> None:
    """One row per method over the same bins: equal levels would hide one another."""
    figure.suptitle("training samples by learned perturbation probability $\\alpha$", fontsize=10)
    bins = np.linspace(0, max(0.02, *(float(v.max()) for v in levels.values())) * 1.02, 41)
    rows = figure.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(rows, levels.items(), strict=True):
        axes.hist(values, bins=list(bins), color="#0072B2")
        axes.set_title(METHODS[name].title, fontsize=8, loc="right")
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel(r"$\alpha$")


def _draw_samples(figure: "SubFigure", data: SaliencyData, arrays: dict[str, Any]) -> None:
    """Highest levels in the left column, lowest in the right one."""
    rows = len(arrays["shown"]) // 2
    grid = figure.subplots(rows, 2)
    answers = zip(arrays["shown"], arrays["shown_logits"], strict=True)
    for place, (sample, logits) in enumerate(answers):
        axes = grid[place % rows, place // rows]
        guess = 255 / (1 + np.exp(-logits[0]))
        planes = [np.repeat(p[..., None], 3, -1) for p in (data.train.masks[sample] * 255.0, guess)]
        gap = np.full((len(guess), 1, 3), 255)
        strip = [data.train.images[sample], gap, planes[0], gap, planes[1]]
        axes.imshow(np.concatenate(strip, axis=1).astype(np.uint8))
        rank = ("highest: ", "lowest: ")[place // rows] if place % rows == 0 else ""
        axes.set_title(rf"{rank}$\alpha$ = {arrays['levels'][-1][sample]:.3f}", fontsize=8)
        axes.axis("off")
