"""What a step costs, beside torch's BCE on the same input and in the same run.

    python benchmarks/speed.py
    python benchmarks/speed.py --device cuda

Writes ``results/speed.json``, or ``results/speed-cuda.json``; ``performance.py`` makes the page.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from sc_bce import (
    AdaptivePerturbation,
    CalibrationHistogram,
    IndexedDataset,
    IsotonicCalibration,
    SCBCEWithLogitsLoss,
    _fused,
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor, Tensor]
Record = dict[str, Any]

SEGMENTATION, LABELS = (32, 1, 384, 384), (32, 11, 120, 160)
TABLES = ((64, 1), (64, 20), (8192,), (65536,))
NUM_SAMPLES = 100_000  # rows of the tables
VOID, VOID_SHARE = 255, 0.1  # of the elements that count for nothing
PRIOR = 0.2
COPIES = 4  # of every input, taken in turn: together larger than the caches where it is large
ROUNDS = 3  # in each of which all contenders have their turn
PIXELS = 10**7
STREAM = 100  # such updates make 10^9
ROWS = 200_000  # of the dataset that is loaded with its index and without
SIZES = tuple(2**power for power in range(6, 27, 2))  # of the comparison with the plain path
# A process that gives freed memory back and faults it in again makes BCE, which allocates most, two
# to three times as slow, or not, as glibc happens to decide. So what is timed keeps its memory.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
BASELINE = "bce"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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


def smoothed(input: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """As segmentation_models_pytorch smooths: (1 - y) s + y (1 - s)."""
    y = target.to(input.dtype)
    return F.binary_cross_entropy_with_logits(input, (1 - y) * 0.05 + y * 0.95)


@dataclass(frozen=True)
class Case:
    """A batch as users have it; every loss of it is timed beside torch's BCE.

    Args:
        void: whether a share of the target is void. BCE, which knows none, then gets the same
            batch without.
        weighted: whether each element has a weight, BCE's too.
    """

    name: str
    shape: tuple[int, ...]
    losses: tuple[str, ...]
    dtype: str = "float32"
    target: str = "float"
    void: bool = False
    weighted: bool = False
    compiled: bool = False

    @property
    def elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def labels(self) -> int | None:
        return self.shape[1] if self.shape == LABELS else None


FIXED = ("expected", "sample")
SMALL = ("sample", "adaptive", "climbing", "focus")
DENSE = (*FIXED, "element", "adaptive", "focus", "adaptive-element")
CASES = (
    *(Case("segmentation", SEGMENTATION, DENSE, target=t) for t in ("float", "bool")),
    Case("rivals", SEGMENTATION, ("smp", "published")),
    *(
        Case("void", SEGMENTATION, (*FIXED, "adaptive", "focus"), target=t, void=True)
        for t in ("float", "uint8")
    ),
    *(
        Case("weight", SEGMENTATION, (*FIXED, "adaptive"), target=t, weighted=True)
        for t in ("float", "bool")
    ),
    *(
        Case("labels", LABELS, (*FIXED, "adaptive"), target=t, void=void)
        for t, void in (("float", False), ("bool", False), ("float", True), ("uint8", True))
    ),
    *(
        Case("low precision", SEGMENTATION, DENSE, dtype=d, target=t)
        for d in ("bfloat16", "float16")
        for t in ("float", "bool")
    ),
    *(
        Case("compiled", SEGMENTATION, ("expected", "sample", "adaptive"), target=t, compiled=True)
        for t in ("float", "bool")
    ),
    *(Case("table", shape, SMALL, target=t) for shape in TABLES for t in ("float", "bool")),
)
# The most that a loss may cost, in the time of BCE in the same case.
ASKED: dict[tuple[str, str], float] = {
    **{("segmentation", name): 0.65 for name in FIXED},
    ("segmentation", "element"): 1.00,
    ("segmentation", "adaptive"): 0.80,
    ("segmentation", "focus"): 0.80,
    ("segmentation", "adaptive-element"): 1.10,
    **{("void", name): 1.00 for name in (*FIXED, "adaptive", "focus")},
    **{("weight", name): 1.00 for name in (*FIXED, "adaptive")},
    **{("labels", name): 0.90 for name in FIXED},
    **{("compiled", name): 1.00 for name in FIXED},
    ("compiled", "adaptive"): 1.15,
}
ASKED |= {("low precision", name): ASKED["segmentation", name] for name in DENSE}
ASKED_SMALL = {  # images or rows of a table: few, many
    "sample": (2.0, 2.0),
    "adaptive": (5.0, 7.0),
    "climbing": (5.0, 7.0),
    "focus": (6.5, 10.0),
}


def asked(record: Record) -> float | None:
    """The most that this may cost, in the time of BCE."""
    if record["contender"] not in record["losses"]:
        return None
    if record["case"] == "table":
        return ASKED_SMALL[record["contender"]][record["shape"][0] > 64]
    if record["threads"] > 2 and record["case"] != "compiled":
        return 1.0
    return ASKED.get((record["case"], record["contender"]))


TITLES = {
    BASELINE: "torch's BCE",
    "smp": "smoothed as segmentation_models_pytorch does, then BCE",
    "published": "the published ASLP step, from its formulas",
    "expected": "SCBCEWithLogitsLoss.label_smoothing(0.1, prior=0.2)",
    "sample": "SCBCEWithLogitsLoss.moderation(0.2, prior=0.2), drawn per sample",
    "element": "the same, drawn per element",
    "adaptive": "AdaptivePerturbation(num_samples)",
    "adaptive-element": "the same, drawn per element",
    "climbing": 'AdaptivePerturbation, objective="calibration": each level climbs',
    "focus": "AdaptivePerturbation, focus=2: each level climbs, by difficulty",
}


def build(name: str, case: Case, device: str = "cpu") -> Loss:
    """A loss of the package, or a rival's, for the batches of a case."""
    if name in ("smp", "published"):
        return smoothed if name == "smp" else PublishedStep()
    weight = torch.rand(case.shape, device=device) if case.weighted else None
    if name == BASELINE:
        return lambda input, target, index: F.binary_cross_entropy_with_logits(
            input, target.to(input.dtype), weight
        )
    options: dict[str, Any] = {"weight": weight, "ignore_index": VOID if case.void else None}
    if name in (*FIXED, "element"):
        prior: float | Tensor = PRIOR
        if case.labels:
            prior = torch.linspace(0.05, 0.5, case.labels).view(-1, 1, 1)
        options["prior"] = prior
        if name == "expected":
            fixed = SCBCEWithLogitsLoss.label_smoothing(0.1, **options)
        else:
            fixed = SCBCEWithLogitsLoss.moderation(0.2, sampling=name, **options)
        fixed.to(device)
        return lambda input, target, index: fixed(input, target)
    settings: dict[str, dict[str, Any]] = {
        "adaptive": {},
        "adaptive-element": {"sampling": "element"},
        "climbing": {"objective": "calibration"},
        "focus": {"focus": 2.0},
    }
    own = settings[name]
    return trained(
        AdaptivePerturbation(NUM_SAMPLES, num_labels=case.labels, **own, **options), case, device
    )


def trained(criterion: AdaptivePerturbation, case: Case, device: str) -> AdaptivePerturbation:
    """A table past its warm-up, at levels above 0."""
    criterion.to(device)
    criterion.weight, weight = None, criterion.weight
    shape = (8, *case.shape[1:2], *(4 for _ in case.shape[2:]))
    x = torch.randn(shape, device=device)
    histogram = CalibrationHistogram()
    histogram.update(4 * torch.randn(4000), torch.rand(4000) > 0.5)  # over-confident
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few rows a step look like a mistake
        for _ in range(3):
            criterion(x, x > 0.8, torch.arange(8, device=device))
            criterion.step(histogram)
    criterion.weight = weight
    return criterion


# ---------------------------------------------------------------- time


def batches(case: Case, device: str = "cpu") -> list[Batch]:
    """Logits as of a trained network, of which a fifth are positive."""
    dtype = getattr(torch, case.dtype)
    kinds = {"float": dtype, "bool": torch.bool, "uint8": torch.uint8}
    made = []
    for _ in range(COPIES):
        x = (3 * torch.randn(case.shape, device=device)).to(dtype).requires_grad_()
        y = (torch.rand(case.shape, device=device) < PRIOR).to(kinds[case.target])
        if case.void:
            y[torch.rand(case.shape, device=device) < VOID_SHARE] = VOID
        index = torch.randperm(NUM_SAMPLES, device=device)[: case.shape[0]]
        made.append((x, y, index))
    return made


def stepper(loss: Loss, given: Sequence[Batch]) -> Callable[[], object]:
    ring = cycle(given)

    def step() -> object:
        input, target, index = next(ring)
        return torch.autograd.grad(loss(input, target, index), input)

    return step


def time_steps(
    steps: dict[str, Callable[[], object]], threads: int, seconds: float, warm: int = COPIES
) -> dict[str, dict[str, float]]:
    """Median and interquartile range of each, all in turn in every round."""
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=threads)
        for name, step in steps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            timer.timeit(warm)  # what ran before has left the caches and the memory cold
            times[name] += timer.blocked_autorange(min_run_time=seconds / ROUNDS).times
    return {name: spread(found) for name, found in times.items()}


def spread(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle * 1e3, "iqr_ms": (high - low) * 1e3}


def time_case(case: Case, threads: int, seconds: float, device: str = "cpu") -> list[Record]:
    torch.manual_seed(0)
    given = batches(case, device)
    bare = given
    if case.void:
        bare = [(x, torch.where(y == VOID, 0, y), index) for x, y, index in given]
    losses = {name: build(name, case, device) for name in (BASELINE, *case.losses)}
    if case.compiled:
        torch._dynamo.reset()
        losses = {name: torch.compile(loss, fullgraph=True) for name, loss in losses.items()}
        losses["eager bce"] = build(BASELINE, case, device)
    steps = {
        name: stepper(loss, bare if name.endswith(BASELINE) else given)
        for name, loss in losses.items()
    }
    timed = time_steps(steps, threads, seconds)
    base = timed[BASELINE]["median_ms"]
    about: Record = {"case": case.name, "shape": list(case.shape), "dtype": case.dtype}
    about |= {"target": case.target, "void": case.void, "threads": threads}
    about |= {"losses": list(case.losses)}
    records = []
    for name, found in timed.items():
        record = about | {"contender": name, "ratio": found["median_ms"] / base} | found
        records.append(record | {"asked": asked(record)})
    for record in records:
        del record["losses"]
    return records


def time_all(threads: int, seconds: float, device: str = "cpu") -> list[Record]:
    """All cases at one number of threads; a process of its own, since compiled code keeps it."""
    torch.set_num_threads(threads)
    records = []
    for case in tqdm(CASES, desc=f"{threads} threads", unit=" cases"):
        if threads > 2 and case.elements < 10**6:
            continue
        records += time_case(case, threads, seconds, device)
    return records


def time_first(threads: int, seconds: float) -> list[Record]:
    torch.set_num_threads(threads)
    return time_case(CASES[0], threads, seconds)


# ---------------------------------------------------------------- which path


def sweep_cases() -> Iterator[tuple[str, Case, str]]:
    for size in SIZES:
        rows = max(size >> 12, 1)
        shape = (rows, size // rows)
        for name in ("expected", "sample", "element", "adaptive"):
            yield name, Case("sizes", shape, (name,)), name
        yield "void", Case("sizes", shape, ("sample",), void=True), "sample"


def compare_paths(threads: int, seconds: float) -> list[Record]:
    """The path that is taken beside the plain one and BCE, at all sizes, in its own process."""
    torch.set_num_threads(threads)
    records = []
    for title, case, name in tqdm(list(sweep_cases()), desc=f"sizes, {threads} threads"):
        torch.manual_seed(0)
        given = batches(case)[:2]
        loss = build(name, case)

        def plain(*batch: Tensor, loss: Loss = loss) -> Tensor:
            with mock.patch.object(_fused, "_MIN_PER_ROW", 1 << 62):
                return loss(*batch)

        def own(*batch: Tensor, loss: Loss = loss) -> Tensor:  # the same but for what is patched
            with mock.patch.object(_fused, "_LOOK", _fused._LOOK):
                return loss(*batch)

        steps = {
            "own": stepper(own, given),
            "plain": stepper(plain, given),
            BASELINE: stepper(build(BASELINE, case), given),
        }
        timed = time_steps(steps, threads, seconds, warm=1 if case.elements > 1 << 22 else COPIES)
        found = {key: value["median_ms"] for key, value in timed.items()}
        records.append(
            {"loss": title, "elements": case.elements, "threads": threads}
            | {f"{key}_ms": value for key, value in found.items()}
            | {"of_plain": found["own"] / found["plain"], "of_bce": found["own"] / found[BASELINE]}
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
    for case in CASES:
        if case.shape not in (SEGMENTATION, LABELS) or case.compiled:
            continue
        batch = batches(case)[0]
        for name in (BASELINE, *case.losses):
            loss = build(name, case)
            loss(*batch)
            about: Record = {"case": case.name, "contender": name, "shape": list(case.shape)}
            about |= {"dtype": case.dtype, "target": case.target, "void": case.void}
            saved, peak = saved_bytes(loss, batch), peak_bytes(loss, batch)
            records.append(
                about | {"saved_bytes_per_element": saved, "peak_bytes_per_element": peak}
            )
    return records


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes read and written in a second by a copy of 2^26 floats."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    timer = Timer("target.copy_(source)", globals={"target": target, "source": source},
                  num_threads=torch.get_num_threads())  # fmt: skip
    return 2 * source.nbytes / timer.blocked_autorange(min_run_time=seconds).median


# ---------------------------------------------------------------- the histogram


def time_histogram(threads: int, seconds: float) -> Record:
    """An update with 10^7 predictions beside that of torchmetrics, and 10^9 in a stream."""
    from torchmetrics.classification import BinaryCalibrationError

    torch.set_num_threads(threads)
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


# ---------------------------------------------------------------- dataset and repair


def time_others(threads: int, seconds: float) -> list[Record]:
    """An epoch of IndexedDataset beside that of the bare dataset, a repair beside sigmoid."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    columns = TensorDataset(torch.randn(ROWS, 10), torch.randn(ROWS, 1))
    pairs: list[Any] = [columns[row] for row in range(ROWS)]
    given: dict[tuple[str, float], tuple[Callable[[], object], Callable[[], object]]] = {}

    def epoch(dataset: Any) -> Callable[[], object]:
        loader = DataLoader(dataset, batch_size=256, shuffle=True)
        return lambda: sum(len(batch) for batch in loader)

    def repaired(repair: IsotonicCalibration, x: Tensor) -> Callable[[], object]:
        return lambda: repair(x)

    def sigmoid(x: Tensor) -> Callable[[], object]:
        return lambda: torch.sigmoid(x)

    for what, dataset in (("TensorDataset", columns), ("list of tuples", pairs)):
        given[f"IndexedDataset, {what}", 1.15] = epoch(IndexedDataset(dataset)), epoch(dataset)
    logits = 3 * torch.randn(PIXELS)
    repair = IsotonicCalibration().fit(logits, torch.rand(PIXELS) < torch.sigmoid(logits))
    for name in BYTES:
        x = logits.to(getattr(torch, name))
        given[f"isotonic repair, {name}", 4.0] = repaired(repair, x), sigmoid(x)
    records = []
    for (what, goal), (ours, theirs) in given.items():
        timed = time_steps({"ours": ours, "theirs": theirs}, threads, seconds, warm=1)
        ms, base = (timed[name]["median_ms"] for name in ("ours", "theirs"))
        about: Record = {"case": what, "threads": threads, "median_ms": ms, "base_ms": base}
        records.append(about | {"ratio": ms / base, "asked": goal})
    return records


# ---------------------------------------------------------------- command line


def versions() -> dict[str, str]:
    packages = ("sc-bce", "torch", "torchmetrics")
    found = {package: metadata.version(package) for package in packages}
    return {"python": platform.python_version()} | found


def alone(function: Callable[..., Any], *args: Any, keep: bool = True) -> Any:
    """In a process of its own, which keeps the memory that it frees, or does as glibc likes."""
    with (
        mock.patch.dict(os.environ, ALLOCATOR if keep else {}),
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        return pool.submit(function, *args).result()


def about(device: str) -> Record:
    cores = os.cpu_count() or 1
    found: Record = {"date": date.today().isoformat(), "versions": versions(), "device": device}
    found |= {"machine": platform.machine(), "cores": cores}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        found["accelerator"] = torch.cuda.get_device_name()
    return found | {"allocator": ALLOCATOR, "titles": TITLES}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each contender")
    parser.add_argument("--out", type=Path, help="default: results/speed.json, or speed-cuda.json")
    args = parser.parse_args(argv)
    result = about(args.device)
    if args.device == "cpu":
        times = [r for n in args.threads for r in alone(time_all, n, args.seconds)]
        sizes = [r for n in args.threads for r in alone(compare_paths, n, args.seconds / 4)]
        result |= {"times": times, "sizes": sizes, "memory": measure_memory()}
        result["given_back"] = alone(time_first, 2, args.seconds, keep=False)
        result["histogram"] = [
            alone(time_histogram, threads, args.seconds) for threads in args.threads[:2]
        ]
        result["others"] = [
            record
            for threads in args.threads[:2]
            for record in alone(time_others, threads, args.seconds)
        ]
    else:
        times = time_all(1, args.seconds, "cuda")
        result |= {"times": times}
    torch.set_num_threads(min(args.threads[-1], result["cores"]))
    result["copy_bytes_per_second"] = copy_bandwidth(args.device, args.seconds)
    name = "speed.json" if args.device == "cpu" else "speed-cuda.json"
    out = args.out or Path(__file__).parent / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rounded(result), indent=None, separators=(",", ":")) + "\n")
    show(result)


def show(result: Record) -> None:
    for record in result["times"]:
        goal = "" if record["asked"] is None else f" (asked {record['asked']:.2f})"
        shape = "x".join(str(size) for size in record["shape"])
        print(
            f"{record['threads']} threads {record['case']:14}{shape:15}{record['dtype']:9}"
            f"{record['target']:6}{'void ' if record['void'] else '     '}"
            f"{record['contender']:18}{record['median_ms']:9.3f} ms{record['ratio']:7.2f}{goal}"
        )
    if result.get("sizes"):
        worst = max(result["sizes"], key=lambda record: float(record["of_plain"]))
        print(
            f"worst against the plain path: {worst['of_plain']:.2f} ({worst['loss']}, "
            f"{worst['elements']} elements, {worst['threads']} threads)"
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
