"""What a large table costs: time per step, memory, the epoch's step, saving, and the merge.

    python -m benchmarks.speed.table

Writes ``results/scale.json``.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.report import versions
from sc_bce import AdaptivePerturbation, CalibrationHistogram

RESULTS = Path(__file__).parents[1] / "results"
BATCH = 256
SHAPES = ((BATCH, 1, 16, 16), (BATCH, 1))
FEW = 1000  # rows of the table that the large one is compared with
FILLED = 1 << 20  # rows that are trained at once before an epoch's step
Record = dict[str, Any]


def table(rows: int, focus: float) -> AdaptivePerturbation:
    """Past its warm-up, each level on its own."""
    criterion = AdaptivePerturbation(rows, focus=focus, warmup=1)
    x = torch.randn(8, 1)  # labels, of which the base rate is counted
    criterion(x, x > 0, torch.arange(8))
    criterion.step(seen())
    return criterion


def train(criterion: AdaptivePerturbation, rows: torch.Tensor) -> None:
    """As an epoch does, without its gradients."""
    for index in torch.split(rows, FILLED):
        x = torch.randn(len(index), 1)
        criterion.update(x, torch.rand(x.shape) < torch.sigmoid(x / 2), index)


def time_steps(rows: int, shape: tuple[int, ...], focus: float, steps: int) -> Record:
    """Forward and backward with shuffled rows; both tables take turns, in either order."""
    tables = {"few": table(min(FEW, rows), focus), "many": table(rows, focus)}
    times: dict[str, list[float]] = {name: [] for name in tables}
    target = (torch.rand(shape) < 0.3).float()
    for step in range(steps):
        input = (3 * torch.randn(shape)).requires_grad_()
        for name, criterion in sorted(tables.items(), reverse=bool(step % 2)):
            index = shuffled(len(criterion.alpha))
            start = time.perf_counter()
            torch.autograd.grad(criterion(input, target, index), input)
            times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(found[steps // 10 :]) for name, found in times.items()}
    return {
        "shape": list(shape),
        "focus": focus,
        "few_us": middle["few"] * 1e6,
        "many_us": middle["many"] * 1e6,
        "ratio": middle["many"] / middle["few"],
    }


def shuffled(rows: int) -> torch.Tensor:
    """The rows of a batch: no two alike, as a sampler gives them."""
    drawn = torch.randint(0, rows, (8 * BATCH,)).tolist()
    return torch.tensor(list(dict.fromkeys(drawn))[:BATCH])


def seen(samples: int = 10_000) -> CalibrationHistogram:
    histogram = CalibrationHistogram()
    logits = 2 * torch.randn(samples)
    histogram.update(2 * logits, torch.rand(samples) < torch.sigmoid(logits))
    return histogram


def measure_epoch(rows: int, focus: float) -> Record:
    """The epoch's step, and a checkpoint of the table."""
    criterion, histogram = table(rows, focus), seen()
    train(criterion, torch.arange(rows))
    start = time.perf_counter()
    criterion.step(histogram)
    stepped = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.pt"
        torch.save(criterion.state_dict(), path)
        saved, size = time.perf_counter(), path.stat().st_size
        criterion.load_state_dict(torch.load(path, weights_only=True))
        loaded = time.perf_counter()
    return {
        "focus": focus,
        "bytes_per_row": size / rows,
        "gigabytes_at_1e9": size / rows,
        "step_seconds": stepped - start,
        "save_seconds": saved - stepped,
        "load_seconds": loaded - saved,
    }


def merge_worker(rank: int, rows: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    criterion, histogram = table(rows, 2.0), seen()
    train(criterion, torch.arange(rank, rows, 2))
    sent, reduce = 0, dist.all_reduce

    def counted(value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += value.nbytes
        return reduce(value, *args, **kwargs)

    dist.all_reduce = counted  # type: ignore[assignment]
    dist.barrier()
    start = time.perf_counter()
    criterion.step(histogram)
    found = {"seconds": time.perf_counter() - start, "reduced_bytes_per_process": sent}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_merge(rows: int) -> Record:
    """A step of two processes, each of which trained half of the rows, with focus."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(merge_worker, (rows, folder), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
        found: Record = json.loads((Path(folder) / "found.json").read_text())
    return {"processes": 2, "focus": 2.0} | found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=10**8)
    parser.add_argument("--steps", type=int, default=2000, help="timed for each table")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--no-merge", action="store_true", help="leave out the two processes")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result: Record = {
        "versions": versions("sc-bce", "torch"),
        "machine": platform.machine(),
        "threads": args.threads,
        "rows": args.rows,
        "steps": [
            time_steps(args.rows, shape, focus, args.steps)
            for shape in SHAPES
            for focus in (0.0, 2.0)
        ],
        "epoch": [measure_epoch(args.rows, focus) for focus in (0.0, 2.0)],
    }
    if not args.no_merge:
        result["merge"] = measure_merge(args.rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
