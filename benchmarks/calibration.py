"""Does it calibrate? One small network, trained with each loss on the same dense binary task.

    python benchmarks/calibration.py --quick
    python benchmarks/calibration.py --data FOLDER --seeds 0 1 2 3 4

The first line needs no download. Finished runs are kept under ``--out``: an interrupted study
goes on where it stopped when the same line is given again. ``study.py`` makes the report.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import Answers, auroc, histogram, measure
from methods import METHODS, PLAIN, QUICK, ROWS, Method, PostHoc, Replay
from posthoc import recalibrate
from report import report
from saliency import (
    SaliencyData,
    SmallUNet,
    digit_scenes,
    folder_data,
    folder_ood,
    to_tensors,
)
from torch import Generator, Tensor, nn
from tqdm import tqdm

from sc_bce import AdaptivePerturbation, CalibrationHistogram, SCBCEWithLogitsLoss

Result = dict[str, Any]
Arrays = dict[str, Any]
Task = tuple[str, int]

PARTS = ("val", "test", "ood")
QUICK_COUNTS = {"train": 40, "val": 40, "test": 120, "ood": 60}
# Few training scenes: with 200 plain BCE is all but calibrated, and nothing is left to mend.
STUDY_COUNTS = {"train": 40, "val": 150, "test": 250, "ood": 200}
FORMAT = 3  # of the kept runs: raised when they hold something new
GALLERY = 4  # training samples shown with the highest and with the lowest level
WRONG_MASKS = 0.1  # share of the training masks replaced in the rows about label noise


@dataclass(frozen=True)
class Settings:
    """What every run of one study shares."""

    epochs: int
    size: int
    width: int
    batch: int
    lr: float
    mirror: bool


# ---------------------------------------------------------------- one run


def train_one(
    name: str,
    seed: int,
    data: SaliencyData,
    settings: Settings,
    on_epoch: Callable[[], None] = lambda: None,
    learned: Tensor | None = None,
) -> tuple[Result, Arrays]:
    """Train the network once: measures and history (for JSON), logits and levels (arrays).

    Initial weights, batches and the criterion's draws come from three generators, so that the
    runs of one seed differ in nothing but the method. ``learned`` holds the base's levels.
    """
    started, method = time.process_time(), METHODS[name]
    torch.manual_seed(seed)
    model = SmallUNet(settings.width)
    order, draws = Generator().manual_seed(seed), Generator().manual_seed(seed + 1_000_000)
    extras = Generator().manual_seed(seed + 2_000_000)
    criterion = _criterion(method, len(data.train), draws, learned, extras)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    images, masks = to_tensors(data.train)
    if method.noisy:
        masks, wrong = _replace_masks(masks, extras)
    val_images, val_masks = to_tensors(data.val)
    history, levels = [], []
    for _ in range(settings.epochs):
        model.train()
        for index, image, mask in _batches(images, masks, settings, order):
            logits = model(image)
            loss = criterion(logits, mask, index) if method.indexed else criterion(logits, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        seen = histogram(predict(model, val_images), val_masks)
        history.append(_epoch_row(seen))
        if isinstance(criterion, AdaptivePerturbation):
            criterion.step(seen.accuracy(), seen.confidence())
            levels.append(criterion.alpha.detach().clone())
            history[-1]["alpha"] = float(levels[-1].mean())
        on_epoch()
    splits = {part: to_tensors(getattr(data, part)) for part in PARTS}
    arrays: Arrays = {part: predict(model, x).numpy() for part, (x, _) in splits.items()}
    measures, tables = measure(answers_of(arrays, data))
    result = {"flip_rate": _flip_rate(criterion), "reliability": tables, "history": history}
    if levels:
        arrays |= _gallery(model, images, levels[-1])
        arrays["levels"] = torch.stack(levels).numpy()
        result["levels"] = levels[-1].tolist()
        measures["level"] = {
            "mean": float(levels[-1].mean()),
            "std": float(levels[-1].std(correction=0)),
        }
    if method.noisy:
        measures["noise"] = _detection(model, images, masks, wrong, levels)
    seconds = time.process_time() - started
    return {"method": name, "seed": seed, "seconds": seconds, "measures": measures} | result, arrays


def _criterion(
    method: Method, num_samples: int, draws: Generator, learned: Tensor | None, extras: Generator
) -> nn.Module:
    if method.replay is None or learned is None:
        return method.build(num_samples, draws)
    return Replay(method.replay(learned, extras), draws)


def _flip_rate(criterion: nn.Module) -> float:
    """The flip rate that the network was trained at, at the end."""
    if isinstance(criterion, (AdaptivePerturbation, SCBCEWithLogitsLoss)):
        return float(criterion.flip_rate)
    return 0.0


def _replace_masks(masks: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Some samples, drawn at random, pass their masks round; and which samples these are."""
    count = max(2, round(WRONG_MASKS * len(masks)))
    wrong = torch.randperm(len(masks), generator=generator)[:count]
    masks = masks.clone()
    masks[wrong] = masks[wrong.roll(1)]
    return masks, wrong


def _detection(
    model: nn.Module, images: Tensor, masks: Tensor, wrong: Tensor, levels: Sequence[Tensor]
) -> dict[str, float]:
    """Area under the ROC curve for finding the replaced masks.

    By the level of the sample, at the end and on average over the epochs, and, what anybody can
    have without any level, by its loss.
    """
    loss = nn.functional.binary_cross_entropy_with_logits(
        predict(model, images), masks, reduction="none"
    )
    signs = {"auroc_loss": loss.mean((1, 2, 3))}
    if levels:
        signs["auroc_level"] = levels[-1]
        signs["auroc_mean_level"] = torch.stack(list(levels)).mean(0)
    picked = torch.zeros(len(masks), dtype=torch.bool)
    picked[wrong] = True
    return {key: auroc(sign[picked].numpy(), sign[~picked].numpy()) for key, sign in signs.items()}


def answers_of(arrays: Arrays, data: SaliencyData) -> Answers:
    """The logits of each part beside its masks."""
    return {part: (arrays[part], to_tensors(getattr(data, part))[1].numpy()) for part in PARTS}


def recalibrate_one(row: PostHoc, task: Task, data: SaliencyData, folder: Path) -> Result:
    """The measures of a post-hoc row, from the kept logits of its base."""
    started, base = time.process_time(), (row.base, task[1])
    flip_rate = json.loads(run_file(folder, base).read_text())["flip_rate"]
    arrays = stored(folder, base)
    answers = recalibrate(row.fit, answers_of(arrays, data), flip_rate, row.fitted_on)
    measures, tables = measure(answers)
    return {
        "method": task[0],
        "seed": task[1],
        "seconds": time.process_time() - started,
        "measures": measures,
        "reliability": tables,
    }


def _batches(
    images: Tensor, masks: Tensor, settings: Settings, order: Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One pass over the training samples in random order, each mirrored at random."""
    for index in torch.split(torch.randperm(len(images), generator=order), settings.batch):
        image, mask = images[index], masks[index]
        if settings.mirror:
            flip = torch.rand(len(index), 1, 1, 1, generator=order) < 0.5
            image, mask = (torch.where(flip, x.flip(-1), x) for x in (image, mask))
        yield index, image, mask


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of all images, (N, 1, H, W)."""
    model.eval()
    return torch.cat([model(batch) for batch in torch.split(images, 64)])


def _epoch_row(seen: CalibrationHistogram) -> dict[str, float]:
    return {
        "accuracy": float(seen.accuracy()),
        "confidence": float(seen.confidence()),
        "ece": float(seen.ece(num_bins=10)),
    }


def _gallery(model: nn.Module, images: Tensor, level: Tensor) -> Arrays:
    """The network's answers on the training samples of the highest and the lowest levels."""
    if len(level) != len(images):
        return {}
    ranked = level.argsort(descending=True, stable=True)
    shown = torch.cat([ranked[:GALLERY], ranked.flip(0)[:GALLERY]])
    return {"shown": shown.numpy(), "shown_logits": predict(model, images[shown]).numpy()}


# ---------------------------------------------------------------- many runs, kept and resumed


def run_study(
    tasks: Sequence[Task], data: SaliencyData, settings: Settings, folder: Path, jobs: int
) -> None:
    """Finish what is not yet in ``folder``, ``jobs`` runs at a time; first what others build on."""
    missing = [task for task in tasks if not run_file(folder, task).exists()]
    for first in (True, False):
        turn = [task for task in missing if (ROWS[task[0]].base is None) == first]
        if turn:
            _run_all(turn, data, settings, folder, jobs)


def _run_all(
    missing: Sequence[Task], data: SaliencyData, settings: Settings, folder: Path, jobs: int
) -> None:
    context = multiprocessing.get_context("spawn")
    epochs: Synchronized[int] = context.Value("q", 0)
    given = (data, settings, folder, epochs)
    total = sum(settings.epochs if name in METHODS else 1 for name, _ in missing)
    title = f"{len(missing)} runs"
    with (
        ProcessPoolExecutor(min(jobs, len(missing)), context, _start_worker, given) as pool,
        tqdm(total=total, desc=title, unit=" epochs") as bar,
    ):
        running = {pool.submit(_run, task) for task in missing}
        try:
            while running:
                done, running = wait(running, timeout=0.5)
                bar.update(epochs.value - bar.n)
                for future in done:
                    future.result()  # a failed run ends the study here
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what runs already is finished and kept
            raise


def prepare(folder: Path, data: SaliencyData, settings: Settings) -> None:
    """Make the folder of kept runs; runs of other settings or data must never be mixed in."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {"format": FORMAT, "settings": asdict(settings), "data": data.fingerprint()}
    path = folder / "stamp.json"
    if not path.exists():
        path.write_text(json.dumps(stamp, indent=1))
    elif json.loads(path.read_text()) != stamp:
        raise ValueError(
            f"{folder} holds runs of other settings or data: remove it, or give another --out"
        )


def run_file(folder: Path, task: Task) -> Path:
    return folder / f"{task[0]}-seed{task[1]}.json"


def stored(folder: Path, task: Task) -> Arrays:
    """The kept arrays of a finished run."""
    with np.load(run_file(folder, task).with_suffix(".npz")) as kept:
        return dict(kept)


_worker: dict[str, Any] = {}  # what each worker process is given once, at its start


def _start_worker(
    data: SaliencyData, settings: Settings, folder: Path, epochs: "Synchronized[int]"
) -> None:
    """One thread per process: the runs are independent, so this uses the cores best."""
    torch.set_num_threads(1)
    _worker.update(data=data, settings=settings, folder=folder, epochs=epochs)


def _run(task: Task) -> None:
    """Do one task and keep it; the JSON comes last and so marks a finished run."""
    data, folder, row = _worker["data"], _worker["folder"], ROWS[task[0]]
    path = run_file(folder, task)
    if isinstance(row, PostHoc):
        result = recalibrate_one(row, task, data, folder)
        _count_epoch()
    else:
        learned = None
        if row.base is not None:
            learned = torch.from_numpy(stored(folder, (row.base, task[1]))["levels"])
        result, arrays = train_one(*task, data, _worker["settings"], _count_epoch, learned)
        np.savez(path.with_suffix(".npz"), **arrays)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result))
    os.replace(unfinished, path)


def _count_epoch() -> None:
    with _worker["epochs"].get_lock():
        _worker["epochs"].value += 1


# ---------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train one small network with each loss and measure its calibration.",
        epilog="methods: " + ", ".join(ROWS),
    )
    parser.add_argument("--quick", action="store_true", help="a small study, about a minute")
    parser.add_argument("--data", type=Path, help="folder with images/ and masks/ of equal stems")
    parser.add_argument("--ood", type=Path, help="folder of images that show no object")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 to 4")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--size", type=int, help="pixels of a side, a multiple of 4")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/out/<name of the data>")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    """The defaults of the quick and of the full study, with what the user asked for."""
    small = args.quick or args.data is None  # the built-in scenes are simple
    size = args.size if args.size is not None else 32 if small else 48
    usual = 120 if args.quick else 100 if args.data is None else 40
    epochs = args.epochs if args.epochs is not None else usual
    if size < 16 or size % 4:
        raise ValueError(f"Expected --size to be a multiple of 4 from 16 on, but got {size}")
    if epochs < 1 or args.jobs < 1:
        raise ValueError(f"Expected --epochs and --jobs above 0, but got {epochs}, {args.jobs}")
    mirror = args.data is not None  # a mirrored digit is no digit
    width = 8 if args.quick else 12
    if small:
        return Settings(epochs, size, width, batch=10, lr=5e-3, mirror=mirror)
    return Settings(epochs, size, width, batch=16, lr=2e-3, mirror=mirror)


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Seed after seed, each method after those that it is compared with or builds on."""
    names = args.methods or (QUICK if args.quick else ROWS)
    unique: dict[str, None] = {}
    for name in (PLAIN, *names):
        if name not in ROWS:
            raise ValueError(f"Expected --methods from {', '.join(ROWS)}, but got {name}")
        row = ROWS[name]
        unique |= dict.fromkeys((row.reference, row.base or row.reference, name))
    seeds = args.seeds or ([0] if args.quick else range(5))
    return [(name, seed) for seed in dict.fromkeys(seeds) for name in unique]


def load_data(args: argparse.Namespace, size: int) -> SaliencyData:
    """The chosen data; a quick run takes a small part of it."""
    counts = QUICK_COUNTS if args.quick else STUDY_COUNTS
    if args.data is None:
        data = digit_scenes(size, **counts)
    else:
        data = folder_data(args.data, size, ood=counts["ood"])
    if args.ood is not None:
        data = replace(data, ood=folder_ood(args.ood, size))
    if args.quick:
        data = replace(data, **{part: getattr(data, part).thin(counts[part]) for part in counts})
    return data


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then report; what the user can mend is said in one line."""
    args = parse(argv)
    try:
        settings, tasks = settings_of(args), tasks_of(args)
        data = load_data(args, settings.size)
        out = args.out or Path(__file__).parent / "out" / data.name
        runs = out / ("quick-runs" if args.quick else "runs")
        if args.quick:
            shutil.rmtree(runs, ignore_errors=True)
        prepare(runs, data, settings)
    except ValueError as error:
        sys.exit(f"calibration.py: {error}")
    try:
        run_study(tasks, data, settings, runs, args.jobs)
    except KeyboardInterrupt:
        sys.exit("calibration.py: stopped; the same line goes on with what is missing")
    report(tasks, data, asdict(settings), runs, out, full=not args.quick)


if __name__ == "__main__":
    main()
