"""What `sc-bce measure` costs beyond decoding the maps and masks.

    python -m benchmarks.speed.maps

Writes ``results/maps.json``: seconds for 1,000 8-bit maps of 128 x 128 pixels and their masks, of
only decoding them and of each command, in turns on one thread, and the peak memory with more maps.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.report import rounded, versions
from sc_bce.__main__ import main as sc_bce

OUT = Path(__file__).parents[1] / "results" / "maps.json"
SIDE, COARSE = 128, 9
COMMANDS = {
    "repair": ("repair", "-o", "repair.pt"),
    "measure": ("measure", "--json", "measures.json"),
    "measure, with a table": ("measure", "--csv", "maps.csv"),
}


def save(folder: Path, number: int) -> None:
    """Maps that are twice too sure, with the smooth shapes and the grain of a network's."""
    generator = torch.Generator().manual_seed(0)
    for part in ("maps", "masks"):
        (folder / part).mkdir()
    for i in range(number):
        coarse = torch.randn(1, 1, COARSE, COARSE, generator=generator)
        truth = 3 * F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")[0, 0] - 1
        logit = 2 * (truth + 0.05 * torch.randn(SIDE, SIDE, generator=generator))
        mask = truth + torch.randn((), generator=generator) > 0
        for part, values in (("maps", torch.sigmoid(logit)), ("masks", mask)):
            pixels = (255 * values).round().numpy().astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i:06}.png")


def decode(folder: Path) -> None:
    for part in ("maps", "masks"):
        for path in sorted((folder / part).iterdir()):
            with Image.open(path) as picture:
                np.asarray(picture)


def command(folder: Path, name: str) -> None:
    first, option, file = COMMANDS[name]
    arguments = [first, f"{folder}/maps", f"{folder}/masks", option, f"{folder}/{file}"]
    with contextlib.redirect_stdout(io.StringIO()):
        if sc_bce(arguments):
            raise ValueError(f"Expected {name} to run, but it refused the maps")


def seconds(folder: Path, rounds: int) -> dict[str, float]:
    """Medians, all taking turns."""
    runs: dict[str, Any] = {"decode": lambda: decode(folder)}
    runs |= {name: lambda name=name: command(folder, name) for name in COMMANDS}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first one warms up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def peak(folder: Path, number: int, copies: int) -> float:
    """MiB that a process takes to measure the maps, each of them under several names."""
    many = folder / str(copies)
    for part in ("maps", "masks"):
        (many / part).mkdir(parents=True)
        for i in range(number * copies):
            os.link(folder / part / f"{i % number:06}.png", many / part / f"{i:06}.png")
    call = [sys.executable, "-m", "benchmarks.speed.maps", "--peak", str(many)]
    found = subprocess.run(call, check=True, capture_output=True, text=True)
    return float(found.stdout)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maps", type=int, default=1000, help="default: 1000")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.peak:
        command(args.peak, "measure")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, args.maps)
        found = seconds(folder, args.rounds)
        memory = {args.maps * n: peak(folder, args.maps, n) for n in (1, 2, 8)}
    result = {
        "maps": args.maps, "side": SIDE, "seconds": found,
        "times decoding": {name: found[name] / found["decode"] for name in COMMANDS},
        "peak MiB": memory, "versions": versions("torch", "Pillow", "numpy"),
    }  # fmt: skip
    args.out.write_text(json.dumps(rounded(result, 3), indent=1) + "\n", "utf-8")
    print(json.dumps(rounded(result, 3), indent=1))


if __name__ == "__main__":
    main()
