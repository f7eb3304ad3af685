"""What does the loss cost? Time and memory of a step, all contenders in turn in one run.

    python benchmarks/speed.py

Writes ``results/speed.json``; ``performance.py`` makes the page from it.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import metadata
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from tqdm import tqdm

from sc_bce import AdaptivePerturbation, CalibrationHistogram, SCBCEWithLogitsLoss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor, Tensor]
Record = dict[str, Any]

SHAPES = ((32, 1, 384, 384), (8, 1, 384, 384), (64, 1000), (4096, 1), (65536,))
KINDS = (("float32", "float"), ("float32", "bool"), ("float32", "uint8"), ("bfloat16", "float"))
MODES = ("forward and backward", "forward")
# Compiling takes longer than all the timing: only where it is asked most.
COMPILED_CASES = (
    (SHAPES[0], KINDS[0], MODES[0]),
    (SHAPES[0], KINDS[1], MODES[0]),
    (SHAPES[2], KINDS[0], MODES[0]),
)
NUM_SAMPLES = 100_000  # rows of the tables
COPIES = 4  # of every input, taken in turn: together larger than the caches where it is large
ROUNDS = 3  # in each of which all contenders have their turn
PIXELS = 10**7
STREAM = 100  # such updates make 10^9
BASELINE = "bce"


# ---------------------------------------------------------------- contenders


class PublishedStep:
    """A training step of the paper's code, written again from its formulas.

    The levels are host scalars in a dict, the two losses of each image come from clamped
    probabilities, and every image's level is moved in a Python loop. Mended where it would not
    run: beta is 2 in labels and gradient alike.
    """

    def __init__(self, lr: float = 0.002, penalty: float = 2000.0, budget: float = 0.1) -> None:
        self.alpha = dict.fromkeys(range(NUM_SAMPLES), 0.01)
        self.lr, self.penalty, self.budget = lr, penalty, budget

    def __call__(self, input: Tensor, target: Tensor, index: Tensor) -> Tensor:
        target = target.to(input.dtype)
        names = [int(i) for i in index]
        drawn = torch.tensor([random.random() < self.alpha[name] for name in names])
        flipped = 1 - target
        mixed = torch.where(drawn.view(-1, *(1 for _ in input.shape[1:])), flipped, target)
        loss = F.binary_cross_entropy_with_logits(input, mixed)
        with torch.no_grad():
            p = torch.sigmoid(input).clamp(1e-7, 1 - 1e-7)
            clean = -(target * p.log() + (1 - target) * (1 - p).log())
            p = torch.sigmoid(input).clamp(1e-7, 1 - 1e-7)
            wrong = -(flipped * p.log() + (1 - flipped) * (1 - p).log())
            for place, name in enumerate(names):
                gradient = float((wrong[place] - clean[place]).mean())
                alpha = self.alpha[name]
                step = gradient + self.penalty * min(self.budget - alpha, 0.0)
                self.alpha[name] = min(max(alpha + self.lr * step, 0.0), 0.49)
        return loss


def plain(input: Tensor, target: Tensor, index: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(input, target.to(input.dtype))


def smoothed(input: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """As segmentation_models_pytorch smooths: (1 - y) s + y (1 - s)."""
    y = target.to(input.dtype)
    return F.binary_cross_entropy_with_logits(input, (1 - y) * 0.05 + y * 0.95)


def timm_smoothed(input: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """As timm smooths dense targets: off + y (on - off)."""
    y = target.to(input.dtype)
    return F.binary_cross_entropy_with_logits(input, 0.05 + y * (0.95 - 0.05))


def fixed(criterion: SCBCEWithLogitsLoss) -> Loss:
    return lambda input, target, index: criterion(input, target)


def adaptive(**options: Any) -> AdaptivePerturbation:
    """A table past its warm-up."""
    own = {"objective": "calibration", "beta": 2.0, "prior": 0.5, "warmup": 1}
    criterion = AdaptivePerturbation(NUM_SAMPLES, **{**own, **options})
    criterion.step(0.9)
    return criterion


CONTENDERS: dict[str, tuple[str, Callable[[], Loss]]] = {
    BASELINE: ("torch's BCE (cast where it must be)", lambda: plain),
    "smp": ("smoothed as segmentation_models_pytorch does, then BCE", lambda: smoothed),
    "timm": ("smoothed as timm does, then BCE", lambda: timm_smoothed),
    "fixed": (
        "SCBCEWithLogitsLoss.label_smoothing(0.1)",
        lambda: fixed(SCBCEWithLogitsLoss.label_smoothing(0.1)),
    ),
    "sample": (
        "SCBCEWithLogitsLoss.hard_inversion(0.05), drawn per sample",
        lambda: fixed(SCBCEWithLogitsLoss.hard_inversion(0.05)),
    ),
    "element": (
        "SCBCEWithLogitsLoss.disturb_label(0.1), drawn per element",
        lambda: fixed(SCBCEWithLogitsLoss.disturb_label(0.1)),
    ),
    "adaptive": ("AdaptivePerturbation, drawn per sample", lambda: adaptive()),
    "adaptive-expected": (
        "AdaptivePerturbation, expected",
        lambda: adaptive(sampling="expected"),
    ),
    "adaptive-focus": ("AdaptivePerturbation, focus 2", lambda: adaptive(focus=2.0)),
    "published": ("the published ASLP step, from its formulas", PublishedStep),
}
COMPILED = (BASELINE, "smp", "fixed", "sample", "adaptive", "adaptive-expected")


# ---------------------------------------------------------------- time


def batches(shape: tuple[int, ...], dtype: str, target: str) -> list[Batch]:
    """Logits as of a trained network, of which a third are positive."""
    kinds = {"float": getattr(torch, dtype), "bool": torch.bool, "uint8": torch.uint8}
    made = []
    for _ in range(COPIES):
        x = (3 * torch.randn(shape)).to(getattr(torch, dtype)).requires_grad_()
        y = (torch.rand(shape) < 0.33).to(kinds[target])
        made.append((x, y, torch.randint(0, NUM_SAMPLES, shape[:1])))
    return made


def stepper(loss: Loss, given: Sequence[Batch], backward: bool) -> Callable[[], object]:
    ring = cycle(given)

    def step() -> object:
        input, target, index = next(ring)
        value = loss(input, target, index)
        return torch.autograd.grad(value, input) if backward else value

    return step


def time_case(
    losses: dict[str, Loss], given: Sequence[Batch], backward: bool, threads: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Median and interquartile range of each, all in turn in every round."""
    timers = {
        name: Timer(
            "step()",
            globals={"step": stepper(loss, given, backward)},
            num_threads=threads,
        )
        for name, loss in losses.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            timer.timeit(2 * COPIES)  # what ran before has left the caches and the memory cold
            times[name] += timer.blocked_autorange(min_run_time=seconds / ROUNDS).times
    return {name: spread(found) for name, found in times.items()}


def spread(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle * 1e3, "iqr_ms": (high - low) * 1e3}


def cases() -> Iterator[tuple[tuple[int, ...], tuple[str, str], str]]:
    for shape in SHAPES:
        for kind in KINDS:
            for mode in MODES:
                if mode == MODES[0] or kind == KINDS[0]:
                    yield shape, kind, mode


def time_all(threads: int, seconds: float) -> list[Record]:
    """All cases at one number of threads; a process of its own, since compiled code keeps it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    records = []
    for shape, kind, mode in tqdm(list(cases()), desc=f"{threads} threads", unit=" cases"):
        losses = {name: build() for name, (_, build) in CONTENDERS.items()}
        if (shape, kind, mode) in COMPILED_CASES:
            torch._dynamo.reset()
            for name in COMPILED:
                losses[f"{name}, compiled"] = torch.compile(CONTENDERS[name][1](), fullgraph=True)
        given = batches(shape, *kind)
        timed = time_case(losses, given, mode == MODES[0], threads, seconds)
        base = timed[BASELINE]["median_ms"]
        for name, found in timed.items():
            records.append(
                {
                    "contender": name,
                    "shape": list(shape),
                    "dtype": kind[0],
                    "target": kind[1],
                    "mode": mode,
                    "threads": threads,
                    "ratio": found["median_ms"] / base,
                }
                | found
            )
    return records


# ---------------------------------------------------------------- memory


def saved_bytes(loss: Loss, batch: Batch) -> float:
    """Bytes per element that are kept for backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss(*batch)
    return sum(kept.values()) / batch[0].numel()


def peak_bytes(loss: Loss, batch: Batch) -> float:
    """Most bytes per element allocated at a time beyond the inputs and the gradient."""
    with torch.profiler.profile(profile_memory=True) as profile:
        gradient = torch.autograd.grad(loss(*batch), batch[0])
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / batch[0].numel() - gradient[0].element_size()


def measure_memory() -> list[Record]:
    torch.manual_seed(0)
    records = []
    for dtype, target in KINDS:
        batch = batches(SHAPES[0], dtype, target)[0]
        for name, (_, build) in CONTENDERS.items():
            loss = build()
            loss(*batch)
            records.append(
                {
                    "contender": name,
                    "shape": list(SHAPES[0]),
                    "dtype": dtype,
                    "target": target,
                    "saved_bytes_per_element": saved_bytes(loss, batch),
                    "peak_bytes_per_element": peak_bytes(loss, batch),
                }
            )
    return records


# ---------------------------------------------------------------- the histogram


def time_histogram(threads: int, seconds: float) -> Record:
    """An update with 10^7 predictions beside that of torchmetrics, and 10^9 in a stream."""
    from torchmetrics.classification import BinaryCalibrationError

    torch.manual_seed(0)
    logits = 3 * torch.randn(PIXELS)
    probabilities, target = torch.sigmoid(logits), torch.rand(PIXELS) < torch.sigmoid(logits)
    other = BinaryCalibrationError(n_bins=15, validate_args=False)

    def theirs() -> None:
        other.reset()
        other.update(probabilities, target)
        other.compute()

    def mine() -> None:
        ours = CalibrationHistogram()
        ours.update(logits, target)
        ours.ece(num_bins=15)

    times: dict[str, list[float]] = {"ours": [], "torchmetrics": []}
    for _ in range(ROUNDS):
        for name, call in (("ours", mine), ("torchmetrics", theirs)):
            timer = Timer("call()", globals={"call": call}, num_threads=threads)
            times[name] += timer.blocked_autorange(min_run_time=max(seconds, 2.0) / ROUNDS).times
    found: Record = {name: spread(values) for name, values in times.items()}
    stream = CalibrationHistogram()
    stream.update(logits, target)
    found["ours"]["state_bytes"] = state_bytes(stream)
    found["torchmetrics"]["state_bytes"] = sum(
        kept.nbytes for name in ("confidences", "accuracies") for kept in getattr(other, name)
    )
    start = time.perf_counter()
    for _ in range(STREAM - 1):
        stream.update(logits, target)
    found["stream"] = {
        "pixels": int(stream.reliability().count.sum()),
        "seconds": (time.perf_counter() - start) * STREAM / (STREAM - 1),
        "state_bytes": state_bytes(stream),
    }
    return found | {"threads": threads, "pixels": PIXELS}


def state_bytes(histogram: CalibrationHistogram) -> int:
    return sum(value.nbytes for value in histogram.state_dict().values())


# ---------------------------------------------------------------- command line


def versions() -> dict[str, str]:
    packages = ("sc-bce", "torch", "torchmetrics")
    found = {package: metadata.version(package) for package in packages}
    return {"python": platform.python_version()} | found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, 2, cores}))
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each contender")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/speed.json")
    args = parser.parse_args(argv)
    times: list[Record] = []
    for threads in args.threads:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            times += pool.submit(time_all, threads, args.seconds).result()
    torch.set_num_threads(args.threads[0])
    result = {
        "date": date.today().isoformat(),
        "versions": versions(),
        "machine": platform.machine(),
        "cores": cores,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "contenders": {name: title for name, (title, _) in CONTENDERS.items()},
        "times": times,
        "memory": measure_memory(),
        "histogram": [time_histogram(threads, args.seconds) for threads in args.threads[:2]],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rounded(result), indent=None, separators=(",", ":")) + "\n")
    for record in times:
        if record["shape"] == list(SHAPES[0]) and record["mode"] == MODES[0]:
            print(
                f"{record['threads']} threads {record['dtype']:9}{record['target']:6}"
                f"{record['contender']:30}{record['median_ms']:9.3f} ms{record['ratio']:7.2f}"
            )


def rounded(value: Any) -> Any:
    """Four significant digits are more than a timing can bear."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
