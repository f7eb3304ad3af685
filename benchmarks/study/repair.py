"""How good is a repair that is fitted to a histogram, and what does it cost?

    python -m benchmarks.study.repair

Trains the small network of the digits task with plain BCE, on three seeds, and prints

- the bounds: NLL on the fitted and on fresh images after isotonic and affine repair, from the cells
  of a histogram and from the raw logits (scikit-learn), for logits scaled by 1 to 32 and for half
  precision;
- the choices within isotonic regression: steps or straight lines, and the rule for its ends;
- how many validation images a repair needs;
- time and memory from 10^5 pixels on, beside scikit-learn's isotonic regression.

Writes ``results/repair.json``.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.data.scenes import SmallUNet, digit_scenes
from benchmarks.data.tasks import Task, part_of
from benchmarks.report import versions
from benchmarks.study.rows import PLAIN, ROWS
from benchmarks.study.run import train
from sc_bce import CalibrationHistogram, IsotonicCalibration, TemperatureScaling

SEEDS = (0, 1, 2)
SCALES = (1, 2, 4, 8, 32)
HALVES = (torch.bfloat16, torch.float16)
IMAGES = (2, 5, 10, 20, 40, 80, 160, 320, 640)
DRAWS = 8  # of as many images among all validation images
PIXELS = (10**5, 10**6, 10**7, 10**8, 10**9)
RAW_AT_MOST = 10**7  # pixels that isotonic regression on raw values gets: it keeps all of them
SIZE = 64  # of the scenes

Map = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor]
Array = NDArray[np.float64]


def trained(seed: int) -> dict[str, Pair]:
    """Logits and masks of plain BCE on validation and test images."""
    scenes = digit_scenes(SIZE, train=40, val=max(IMAGES), test=250, ood=1, seed=seed)
    # Few validation images to look at after each epoch; all of them at the end.
    few, val, test = part_of(scenes.val.thin(10)), part_of(scenes.val), part_of(scenes.test)
    task = Task(
        "digits", part_of(scenes.train), few, test, lambda: SmallUNet(8), 40, batch=10, lr=5e-3
    )
    predict = train(task, ROWS[PLAIN], seed, lambda: None).predict("last")
    return {
        name: (predict(part.inputs), part.target > 0)
        for name, part in (("val", val), ("test", test))
    }


def nll(z: Tensor, y: Tensor) -> float:
    return float(
        torch.nn.functional.binary_cross_entropy_with_logits(
            z.double(), y.double(), reduction="mean"
        )
    )


def histogram(z: Tensor, y: Tensor) -> CalibrationHistogram:
    seen = CalibrationHistogram()
    seen.update(z, y)
    return seen


# ---------------------------------------------------------------- from the raw logits


def raw_isotonic(z: Tensor, y: Tensor) -> Map:
    """scikit-learn's curve, with the rule of this package for its two ends."""
    from sklearn.isotonic import IsotonicRegression

    x, order = z.double().flatten().sort()
    model = IsotonicRegression(out_of_bounds="clip").fit(x.numpy(), y.flatten()[order].double())
    p = torch.from_numpy(model.predict(x.numpy()))
    ends = []
    for end, miss in ((p[0], p[0]), (p[-1], 1 - p[-1])):
        n = float((p == end).sum())
        ends.append(0.5 / (n + 1) if miss == 0 else float(miss))

    def apply(z: Tensor) -> Tensor:
        p = torch.from_numpy(model.predict(z.double().flatten().numpy()))
        return torch.logit(p.clamp(ends[0], 1 - ends[1])).reshape(z.shape)

    return apply


def raw_affine(z: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and intercept of scikit-learn's logistic regression without a penalty."""
    from sklearn.linear_model import LogisticRegression

    x = z.double().flatten()
    scale = float(x.std())
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    model.fit((x / scale).numpy().reshape(-1, 1), y.flatten().numpy())
    return float(model.coef_[0, 0]) / scale, float(model.intercept_[0])


def line(slope: float, shift: float) -> Map:
    return lambda z: slope * z.double() + shift


def raw_temperature(z: Tensor, y: Tensor) -> float:
    from scipy.optimize import minimize_scalar

    x, label = z.double(), y.double()
    best = minimize_scalar(
        lambda t: nll(x / np.exp(t), label),
        bounds=(-4, 6),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return float(np.exp(best.x))


def bounds(seed: int, answers: dict[str, Pair]) -> list[dict[str, Any]]:
    rows = []
    cases = [(f"x {scale}", scale, torch.float32) for scale in SCALES]
    cases += [(str(kind).split(".")[1], 1, kind) for kind in HALVES]
    for name, scale, kind in cases:
        val, test = (((z * scale).to(kind), y) for z, y in (answers["val"], answers["test"]))
        seen = histogram(*val)
        platt = TemperatureScaling(bias=True).double().fit(seen)
        scaling = TemperatureScaling().double().fit(seen)
        pairs: dict[str, tuple[Map, Map]] = {
            "isotonic": (IsotonicCalibration().fit(seen), raw_isotonic(*val)),
            "affine": (platt, line(*raw_affine(*val))),
        }
        row: dict[str, Any] = {"seed": seed, "logits": name}
        for repair, (ours, raw) in pairs.items():
            for part, (z, y) in (("val", val), ("test", test)):
                row[f"{repair} {part}"] = (nll(ours(z.double()), y), nll(raw(z), y))
        row["temperature"] = (float(scaling.temperature), raw_temperature(*val))
        rows.append(row)
    return rows


# ---------------------------------------------------------------- choices


class Curve(NamedTuple):
    """Isotonic regression on raw logits: its blocks, from the lowest logits on."""

    first: Array  # the least logit
    middle: Array  # the mean logit
    size: Array
    positive: Array


def curve(z: Tensor, y: Tensor) -> Curve:
    from sklearn.isotonic import isotonic_regression

    place, owner, count = np.unique(z.double().numpy(), return_inverse=True, return_counts=True)
    positive = np.bincount(owner.reshape(-1), y.flatten().numpy(), len(place))
    fitted = isotonic_regression(positive / count, sample_weight=count)
    starts = np.flatnonzero(np.diff(fitted, prepend=-1.0))
    sums = (np.add.reduceat(each, starts) for each in (place * count, count, positive))
    total, size, hits = sums
    return Curve(place[starts], total / size, size, hits)


def shares(blocks: Curve, ends: str) -> Array:
    """The probability of each block; at either end, a block of one class must not be sure."""
    n, k = blocks.size, blocks.positive
    share, last = k / n, len(n) - 1
    if ends == "half a count":
        return np.where(share == 0, 0.5 / (n + 1), np.where(share == 1, (n + 0.5) / (n + 1), share))
    if ends == "clip at 0.001":
        return share.clip(1e-3, 1 - 1e-3)
    if last and share[0] == 0:
        share[:2] = (k[0] + k[1]) / (n[0] + n[1])
    if last and share[last] == 1:
        share[last - 1 :] = (k[-1] + k[-2]) / (n[-1] + n[-2])
    return share.clip(1e-9, 1 - 1e-9)


def steps(blocks: Curve, values: Array, z: Array) -> Array:
    """One value for each block, from its least logit on."""
    place = np.searchsorted(blocks.first, z, side="right") - 1
    found: Array = values[place.clip(0)]
    return found


def lines(blocks: Curve, values: Array, z: Array) -> Array:
    """On straight lines between the blocks' mean logits."""
    return np.asarray(np.interp(z, blocks.middle, values))


ENDS = ("half a count", "clip at 0.001", "end block pooled with its neighbour")
FORMS = {"steps": steps, "lines": lines}


def choices(seed: int, answers: dict[str, Pair]) -> list[dict[str, Any]]:
    """NLL on fresh images of each form of the curve, by the number of validation images."""
    rows = []
    (z, y), (fresh, label) = answers["val"], answers["test"]
    generator = torch.Generator().manual_seed(seed)
    for images in IMAGES:
        losses: dict[str, list[float]] = {}
        for _ in range(DRAWS if images < len(z) else 1):
            chosen = torch.randperm(len(z), generator=generator)[:images]
            if not 0 < int(y[chosen].sum()) < y[chosen].numel():
                continue
            seen, blocks = histogram(z[chosen], y[chosen]), curve(z[chosen], y[chosen])
            maps: dict[str, Map] = {
                "none": lambda z: z,
                "temperature": TemperatureScaling().fit(seen),
                "affine": TemperatureScaling(bias=True).fit(seen),
            }
            for name, repair in maps.items():
                losses.setdefault(name, []).append(nll(repair(fresh), label))
            for form, drawn in FORMS.items():
                for ends in ENDS:
                    share = shares(blocks, ends)
                    repaired = drawn(blocks, np.log(share / (1 - share)), fresh.double().numpy())
                    found = nll(torch.from_numpy(repaired), label)
                    losses.setdefault(f"{form}, {ends}", []).append(found)
        rows.append(
            {
                "seed": seed,
                "images": images,
                "nll": {k: float(np.mean(v)) for k, v in losses.items()},
            }
        )
    return rows


# ---------------------------------------------------------------- costs


def cost(pixels: int, raw: bool) -> dict[str, Any]:
    """Time and peak memory of one fit, in a process of its own; pixels come in millions."""
    from sklearn.isotonic import IsotonicRegression

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    step = min(pixels, 10**6)
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    seen, kept = CalibrationHistogram(), []
    for _ in range(pixels // step):
        z = 4 * torch.randn(step, generator=generator)
        y = torch.rand(step, generator=generator) < torch.sigmoid(z / 3)
        started = time.perf_counter()
        if raw:
            kept.append((z.numpy(), y.numpy()))
        else:
            seen.update(z, y)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    if raw:
        x, label = (np.concatenate(part) for part in zip(*kept, strict=True))
        IsotonicRegression(out_of_bounds="clip").fit(x, label)
    else:
        IsotonicCalibration().fit(seen)
    seconds += time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "pixels": pixels,
        "contender": "scikit-learn, raw values" if raw else "IsotonicCalibration, histogram",
        "seconds": seconds,
        "megabytes": (peak - before) / 1024,
    }


def costs() -> list[dict[str, Any]]:
    rows = []
    for pixels in PIXELS:
        for raw in (False, True):
            if raw and pixels > RAW_AT_MOST:
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                rows.append(alone.submit(cost, pixels, raw).result())
    return rows


# ---------------------------------------------------------------- printing


def show_bounds(rows: list[dict[str, Any]]) -> None:
    kinds = [key for key in rows[0] if key not in ("seed", "logits")]
    print("From the cells of a histogram, and (from raw values): worst relative difference")
    print(f"{'logits':>10} {'seed':>4}" + "".join(f"{kind:>24}" for kind in kinds))
    for row in rows:
        text = "".join(f"{row[k][0]:>14.5f} ({row[k][1]:.5f})" for k in kinds)
        print(f"{row['logits']:>10} {row['seed']:>4}{text}")
    for kind in kinds:
        worst = max(abs(ours / raw - 1) for ours, raw in (row[kind] for row in rows))
        print(f"worst relative difference, {kind}: {worst:.2e}")


def show_choices(rows: list[dict[str, Any]]) -> None:
    print("\nNLL on fresh images by the number of validation images, mean of the seeds")
    names = list(rows[0]["nll"])
    images = sorted({row["images"] for row in rows})
    print(f"{'':>50}" + "".join(f"{n:>8}" for n in images))
    for name in names:
        means = [np.mean([r["nll"][name] for r in rows if r["images"] == n]) for n in images]
        print(f"{name:>50}" + "".join(f"{mean:>8.4f}" for mean in means))


def show_costs(rows: list[dict[str, Any]]) -> None:
    print("\nTime and memory of a fit, one thread, the generation of the pixels left out")
    for row in rows:
        print(
            f"{row['pixels']:>12,} {row['contender']:<32}{row['seconds']:>9.2f} s"
            f"{row['megabytes']:>9.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("bounds", "choices", "costs"), nargs="*")
    chosen = parser.parse_args().only or ["bounds", "choices", "costs"]
    torch.set_num_threads(1)
    path = Path(__file__).parents[1] / "results" / "repair.json"
    result: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    parts = {"bounds": bounds, "choices": choices}
    if set(chosen) & set(parts):
        networks = {seed: trained(seed) for seed in SEEDS}
        for name in (name for name in parts if name in chosen):
            result[name] = [
                row for s, answers in networks.items() for row in parts[name](s, answers)
            ]
            (show_bounds if name == "bounds" else show_choices)(result[name])
    if "costs" in chosen:
        result["costs"] = costs()
        show_costs(result["costs"])
    result["versions"] = versions("torch", "scikit-learn")
    result["threads"] = 1
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
