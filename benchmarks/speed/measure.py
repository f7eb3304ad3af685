"""What a step costs, beside torch's BCE on the same input and in the same run.

    python -m benchmarks.speed.measure
    python -m benchmarks.speed.measure --device cuda
    python -m benchmarks.speed.measure --before FOLDER/src/sc_bce

Writes ``results/speed.json``, or ``results/speed-cuda.json``; ``page.py`` makes the page. With
``--before`` the package of another checkout takes its turns in the same rounds.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import sc_bce
from benchmarks.report import rounded, versions

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
SIZES = tuple(2**power for power in range(6, 27, 2))
# A process that gives freed memory back and faults it in again makes BCE, which allocates most, two
# to three times as slow, or not, as glibc happens to decide. So what is timed keeps its memory.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
BASELINE = "bce"
BEFORE = "before "  # of the names of the other checkout's contenders
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
SMALL = ("sample", "adaptive", "climbing", "shared")
DENSE = (*FIXED, "element", "adaptive", "climbing", "shared", "adaptive-element")
CASES = (
    *(Case("segmentation", SEGMENTATION, DENSE, target=t) for t in ("float", "bool")),
    Case("rivals", SEGMENTATION, ("smp", "published")),
    *(
        Case("void", SEGMENTATION, (*FIXED, "adaptive", "climbing", "shared"), target=t, void=True)
        for t in ("float", "uint8")
    ),
    Case("weight", SEGMENTATION, ("sample", "adaptive"), weighted=True),
    *(
        Case("labels", LABELS, (*FIXED, "adaptive", "climbing"), target=t, void=void)
        for t, void in (("float", False), ("bool", False), ("float", True), ("uint8", True))
    ),
    Case("low precision", SEGMENTATION, ("sample", "adaptive"), dtype="bfloat16", target="bool"),
    *(
        Case("compiled", SEGMENTATION, (*FIXED, "adaptive", "climbing"), target=t, compiled=True)
        for t in ("float", "bool")
    ),
    *(Case("table", shape, SMALL, target=t) for shape in TABLES for t in ("float", "bool")),
)
TITLES = {
    BASELINE: "torch's BCE",
    "smp": "smoothed as segmentation_models_pytorch does, then BCE",
    "published": "the published ASLP step, from its formulas",
    "expected": "SCBCEWithLogitsLoss.label_smoothing(0.1, prior=0.2)",
    "sample": "SCBCEWithLogitsLoss.moderation(0.2, prior=0.2), drawn per sample",
    "element": "the same, drawn per element",
    "adaptive": "AdaptivePerturbation(num_samples)",
    "adaptive-element": "the same, drawn per element",
    "shared": "AdaptivePerturbation, focus=0: one level for all",
    "climbing": "AdaptivePerturbation.published: each level climbs with every batch",
}


def package_of(source: Path | None) -> ModuleType:
    """The package in this folder, whatever it is called here; the one that is installed if none."""
    if source is None:
        return sc_bce
    name = "sc_bce_before"
    spec = importlib.util.spec_from_file_location(
        name, source / "__init__.py", submodule_search_locations=[str(source)]
    )
    if spec is None or spec.loader is None or not (source / "__init__.py").exists():
        raise ValueError(f"Expected --before to be a folder src/sc_bce, but got {source}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def build(name: str, case: Case, device: str = "cpu", package: ModuleType = sc_bce) -> Loss:
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
            fixed = package.SCBCEWithLogitsLoss.label_smoothing(0.1, **options)
        else:
            fixed = package.SCBCEWithLogitsLoss.moderation(0.2, sampling=name, **options)
        fixed.to(device)
        return lambda input, target, index: fixed(input, target)
    adaptive = package.AdaptivePerturbation
    if name == "climbing":
        criterion = adaptive.published(NUM_SAMPLES, warmup=1, **options)
    else:
        settings: dict[str, dict[str, Any]] = {
            "adaptive": {},
            "adaptive-element": {"sampling": "element"},
            "shared": {"focus": 0.0},
        }
        options |= settings[name] | {"num_labels": case.labels}
        criterion = adaptive(NUM_SAMPLES, **options)
    return trained(criterion, case, device, package)


def trained(criterion: Any, case: Case, device: str, package: ModuleType) -> Loss:
    """A table past its warm-up, at levels above 0."""
    criterion.to(device)
    criterion.weight, weight = None, criterion.weight
    shape = (8, *case.shape[1:2], *(4 for _ in case.shape[2:]))
    x = torch.randn(shape, device=device)
    histogram = package.CalibrationHistogram()
    histogram.update(4 * torch.randn(4000), torch.rand(4000) > 0.5)  # over-confident
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few rows a step look like a mistake
        for _ in range(3):
            criterion(x, x > 0.8, torch.arange(8, device=device))
            criterion.step(histogram)
    criterion.weight = weight
    loss: Loss = criterion
    return loss


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


def time_case(
    case: Case, threads: int, seconds: float, device: str = "cpu", before: Path | None = None
) -> list[Record]:
    torch.manual_seed(0)
    given = batches(case, device)
    bare = given
    if case.void:
        bare = [(x, torch.where(y == VOID, 0, y), index) for x, y, index in given]
    losses = {name: build(name, case, device) for name in (BASELINE, *case.losses)}
    if before is not None:
        package = package_of(before)
        ours = [name for name in case.losses if name not in ("smp", "published")]
        losses |= {f"{BEFORE}{name}": build(name, case, device, package) for name in ours}
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
    records = []
    for name, found in timed.items():
        if name.startswith(BEFORE):
            continue
        record = about | {"contender": name, "ratio": found["median_ms"] / base} | found
        if f"{BEFORE}{name}" in timed:
            record["of_before"] = found["median_ms"] / timed[f"{BEFORE}{name}"]["median_ms"]
        records.append(record)
    return records


def time_all(
    threads: int, seconds: float, device: str = "cpu", before: Path | None = None
) -> list[Record]:
    """All cases at one number of threads; a process of its own, since compiled code keeps it."""
    torch.set_num_threads(threads)
    records = []
    for case in tqdm(CASES, desc=f"{threads} threads", unit=" cases"):
        if threads > 2 and case.elements < 10**6:
            continue
        records += time_case(case, threads, seconds, device, before)
    return records


def time_first(threads: int, seconds: float) -> list[Record]:
    torch.set_num_threads(threads)
    return time_case(CASES[0], threads, seconds)


def sized_cases() -> Iterator[tuple[str, Case]]:
    for size in SIZES:
        rows = max(size >> 12, 1)
        shape = (rows, size // rows)
        for name in ("expected", "sample", "element", "adaptive"):
            yield name, Case("sizes", shape, (name,))
        yield "void", Case("sizes", shape, ("sample",), void=True)


def time_sizes(threads: int, seconds: float) -> list[Record]:
    """Beside BCE at all sizes, in a process of its own."""
    torch.set_num_threads(threads)
    records = []
    for title, case in tqdm(list(sized_cases()), desc=f"sizes, {threads} threads"):
        torch.manual_seed(0)
        given = batches(case)[:2]
        steps = {name: stepper(build(name, case), given) for name in (*case.losses, BASELINE)}
        timed = time_steps(steps, threads, seconds, warm=1 if case.elements > 1 << 22 else COPIES)
        own, base = (timed[name]["median_ms"] for name in steps)
        about: Record = {"loss": title, "elements": case.elements, "threads": threads}
        records.append(about | {"own_ms": own, "bce_ms": base, "of_bce": own / base})
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
    timer = Timer(
        "target.copy_(source)",
        globals={"target": target, "source": source},
        num_threads=torch.get_num_threads(),
    )
    return 2 * source.nbytes / timer.blocked_autorange(min_run_time=seconds).median


# ---------------------------------------------------------------- the histogram


def time_histogram(threads: int, seconds: float, before: Path | None = None) -> Record:
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

    def counted(package: ModuleType) -> Callable[[], None]:
        def count() -> None:
            ours = package.CalibrationHistogram()
            ours.update(logits, target)
            ours.ece(num_bins=15)

        return count

    calls: dict[str, Callable[[], object]] = {"ours": counted(sc_bce), "torchmetrics": theirs}
    if before is not None:
        calls["before"] = counted(package_of(before))
    found: Record = dict(time_steps(calls, threads, max(seconds, 2.0), warm=1))
    stream = sc_bce.CalibrationHistogram()
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


def state_bytes(histogram: sc_bce.CalibrationHistogram) -> int:
    return sum(value.nbytes for value in histogram.state_dict().values())


# ---------------------------------------------------------------- dataset and repair


def time_others(threads: int, seconds: float, before: Path | None = None) -> list[Record]:
    """An epoch of IndexedDataset beside that of the bare dataset, a repair beside sigmoid."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    columns = TensorDataset(torch.randn(ROWS, 10), torch.randn(ROWS, 1))
    pairs: list[Any] = [columns[row] for row in range(ROWS)]
    logits = 3 * torch.randn(PIXELS)
    label = torch.rand(PIXELS) < torch.sigmoid(logits)
    given: dict[str, dict[str, Callable[[], object]]] = {}

    def epoch(dataset: Any) -> Callable[[], object]:
        loader = DataLoader(dataset, batch_size=256, shuffle=True)
        return lambda: sum(len(batch) for batch in loader)

    def on(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
        return lambda: function(x)

    packages = {"ours": sc_bce} | ({} if before is None else {"before": package_of(before)})
    for what, dataset in (("TensorDataset", columns), ("list of tuples", pairs)):
        made = {name: epoch(one.IndexedDataset(dataset)) for name, one in packages.items()}
        given[f"IndexedDataset, {what}"] = {"theirs": epoch(dataset)} | made
    repairs = {name: one.IsotonicCalibration().fit(logits, label) for name, one in packages.items()}
    for dtype in BYTES:
        x = logits.to(getattr(torch, dtype))
        made = {name: on(repair, x) for name, repair in repairs.items()}
        given[f"isotonic repair, {dtype}"] = {"theirs": on(torch.sigmoid, x)} | made
    records = []
    for what, calls in given.items():
        timed = time_steps(calls, threads, seconds, warm=1)
        ms, base = (timed[name]["median_ms"] for name in ("ours", "theirs"))
        record: Record = {"case": what, "threads": threads, "median_ms": ms, "base_ms": base}
        record["ratio"] = ms / base
        if "before" in timed:
            record["of_before"] = ms / timed["before"]["median_ms"]
        records.append(record)
    return records


# ---------------------------------------------------------------- command line


def alone(function: Callable[..., Any], *args: Any, keep: bool = True) -> Any:
    """In a process of its own, which keeps the memory that it frees, or does as glibc likes."""
    with (
        mock.patch.dict(os.environ, ALLOCATOR if keep else {}),
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        return pool.submit(function, *args).result()


def about(device: str) -> Record:
    found: Record = {"date": date.today().isoformat(), "device": device}
    found["versions"] = versions("sc-bce", "torch", "torchmetrics")
    found |= {"machine": platform.machine(), "cores": os.cpu_count() or 1}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device == "cuda":
        found["accelerator"] = torch.cuda.get_device_name()
    return found | {"allocator": ALLOCATOR, "titles": TITLES}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing for each contender")
    parser.add_argument("--before", type=Path, help="src/sc_bce of another checkout, timed as well")
    parser.add_argument("--out", type=Path, help="default: results/speed.json, or speed-cuda.json")
    args = parser.parse_args(argv)
    package_of(args.before)  # what is wrong with it is said at once
    result, seconds, before = about(args.device), args.seconds, args.before
    if args.device == "cpu":
        few = args.threads[:2]
        each = [alone(time_all, n, seconds, "cpu", before) for n in args.threads]
        result["times"] = [record for records in each for record in records]
        each = [alone(time_sizes, n, seconds / 4) for n in args.threads]
        result["sizes"] = [record for records in each for record in records]
        result["memory"] = measure_memory()
        result["given_back"] = alone(time_first, 2, seconds, keep=False)
        result["histogram"] = [alone(time_histogram, n, seconds, before) for n in few]
        each = [alone(time_others, n, seconds, before) for n in few]
        result["others"] = [record for records in each for record in records]
    else:
        result["times"] = time_all(1, seconds, "cuda", before)
    torch.set_num_threads(min(args.threads[-1], result["cores"]))
    result["copy_bytes_per_second"] = copy_bandwidth(args.device, seconds)
    name = "speed.json" if args.device == "cpu" else "speed-cuda.json"
    out = args.out or Path(__file__).parents[1] / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    result = rounded(result, 4)  # more than a timing can bear
    out.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n")
    show(result)


def show(result: Record) -> None:
    for record in result["times"]:
        shape = "x".join(str(size) for size in record["shape"])
        before = f"{record['of_before']:7.2f} of before" if "of_before" in record else ""
        print(
            f"{record['threads']} threads {record['case']:14}{shape:15}{record['dtype']:9}"
            f"{record['target']:6}{'void ' if record['void'] else '     '}"
            f"{record['contender']:18}{record['median_ms']:9.3f} ms{record['ratio']:7.2f}{before}"
        )


if __name__ == "__main__":
    main()
