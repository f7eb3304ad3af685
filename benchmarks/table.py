"""What does the adaptive table cost as it grows? Time of a step of training, and of a merge.

    python benchmarks/table.py

A training step (forward, backward, table) on a batch of 32 x 1 x 64 x 64 and the merge of
``step`` between two gloo processes on one machine, for tables of 10^3 to 10^8 rows.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.utils.benchmark import Timer

from sc_bce import AdaptivePerturbation

ROWS = tuple(10**power for power in (3, 5, 7, 8))
SHAPE = (32, 1, 64, 64)


def training_step(criterion: AdaptivePerturbation, rows: int) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    y = torch.rand(SHAPE) > 0.5
    index = torch.randint(0, rows, SHAPE[:1])
    criterion(x, y, index).backward()


def time_steps(seconds: float) -> list[dict[str, Any]]:
    """Median and interquartile range of a step, the sizes taken in turn."""
    timers = {}
    for rows in ROWS:
        criterion = AdaptivePerturbation.published(rows, warmup=1)
        criterion.step(0.9)
        timers[rows] = Timer(
            "training_step(criterion, rows)",
            globals={"training_step": training_step, "criterion": criterion, "rows": rows},
        )
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(5):
        for rows, timer in timers.items():
            times[rows] += timer.blocked_autorange(min_run_time=seconds / 5).times
    return [{"rows": rows, "table_bytes": 5 * rows, **summary(times[rows])} for rows in ROWS]


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle * 1e3, "iqr_ms": (high - low) * 1e3}


def merge(rank: int, world: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = []
    for rows in ROWS:
        criterion = AdaptivePerturbation.published(rows, warmup=1)
        times = []
        for _ in range(4):
            dist.barrier()
            start = time.perf_counter()
            criterion.step(0.9)
            times.append(time.perf_counter() - start)
        results.append({"rows": rows, "processes": world, "median_s": statistics.median(times)})
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/table.json")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each size")
    options = parser.parse_args()
    torch.manual_seed(0)
    steps = time_steps(options.seconds)
    store, merged = options.out.with_suffix(".store"), options.out.with_suffix(".merge")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    spawn(  # type: ignore[no-untyped-call]
        merge, args=(2, str(store.resolve()), str(merged)), nprocs=2
    )
    result = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "shape": SHAPE,
        "step": steps,
        "merge": json.loads(merged.read_text()),
    }
    merged.unlink()
    store.unlink(missing_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in steps:
        print(f"step  {row['rows']:>11,} rows  {row['median_ms']:8.3f} ms  IQR {row['iqr_ms']:.3f}")
    for row in result["merge"]:
        print(f"merge {row['rows']:>11,} rows  {row['median_s']:8.4f} s")


if __name__ == "__main__":
    main()
