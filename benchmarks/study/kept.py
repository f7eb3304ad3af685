"""The kept runs of the study, as the page asks for them."""

import io
import json
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.compare import Array, Gap, over_both, over_seeds
from benchmarks.study.judge import MAPS
from benchmarks.study.rows import FAMILIES, PLAIN, ROWS
from benchmarks.study.run import EPOCHS

Result = dict[str, Any]

SCORES = ("nll", "brier")
SEEDED = {"cancer": 219 / 200, "rates": 0.0}  # of other test samples per seed; test / training


class Kept:
    """All runs of one task.

    A row is named as in ``rows``, or by its family (see ``row``). Runs of rows that are no longer
    there are left out.
    """

    def __init__(self, path: Path) -> None:
        self.task = path.stem
        self.runs: dict[str, dict[int, Result]] = {}
        self._sums: dict[tuple[str, int], Array] = {}
        with zipfile.ZipFile(path) as file:
            sums = np.load(io.BytesIO(file.read("sums.npy")))
            lines = file.read("runs.jsonl").decode().splitlines()
        for line, scores in zip(lines, sums, strict=True):
            run = json.loads(line)
            if run["row"] not in ROWS:
                continue
            self.runs.setdefault(run["row"], {})[run["seed"]] = run
            self._sums[run["row"], run["seed"]] = scores.astype(float)
        hashes = {run["data"] for run in self.all if self.task not in SEEDED}
        if len(hashes) > 1 or len({run["format"] for run in self.all}) > 1:
            raise ValueError(f"{path} holds runs of different data or formats")

    @property
    def all(self) -> list[Result]:
        return [run for row in self.runs.values() for run in row.values()]

    @cached_property
    def tuned(self) -> dict[str, str]:
        """Of each family that is complete on the first seed, the row of least validation NLL."""
        found = {}
        for family, members in FAMILIES.items():
            losses = {
                row: min(self.runs[row][min(self.runs[row])]["history"]["val"])
                for row in members
                if row in self.runs
            }
            if len(losses) == len(members):
                found[family] = min(losses, key=losses.__getitem__)
        return found

    def row(self, name: str) -> str:
        """Of a family the tuned member, or the only one that was run."""
        there = [row for row in FAMILIES.get(name, ()) if row in self.runs]
        return self.tuned.get(name, there[0] if len(there) == 1 else name)

    def seeds(self, *names: str) -> list[int]:
        """That all these rows have."""
        sets = [set(self.runs.get(self.row(name), {})) for name in names]
        return sorted(set.intersection(*sets))

    def has(self, *names: str, seeds: int = 2) -> bool:
        return len(self.seeds(*names)) >= seeds

    def each(self, name: str, seeds: Sequence[int], *keys: str) -> list[Any]:
        """What lies under ``keys`` in each run."""
        found = []
        for seed in seeds:
            value: Any = self.runs[self.row(name)][seed]
            for key in keys:
                value = value[key]
            found.append(value)
        return found

    def mean(self, name: str, epoch: str, fix: str, key: str) -> float:
        return float(np.mean(self.each(name, self.seeds(name), epoch, "test", fix, key)))

    def best_map(self, name: str, epoch: str, seeds: Sequence[int]) -> str:
        """The map, or none, of the least mean test NLL: by hindsight, for every row alike."""
        means = {f: np.mean(self.each(name, seeds, epoch, "test", f, "nll")) for f in MAPS}
        return min(means, key=lambda f: float(means[f]))

    def samples(
        self, name: str, epoch: str, fix: str, seeds: Sequence[int], key: str = "nll"
    ) -> Array:
        """(seeds, groups of test samples), whose mean is the score."""
        scores = self.each(name, seeds, epoch, "test", fix, key)
        rows = []
        for seed, score in zip(seeds, scores, strict=True):
            place = EPOCHS.index(epoch), MAPS.index(fix), SCORES.index(key)
            sums = self._sums[self.row(name), seed][place]
            rows.append(sums / sums.mean() * score)
        return np.stack(rows)

    def gap(
        self,
        first: str,
        second: str = PLAIN,
        epoch: str = "last",
        repaired: bool = False,
        key: str = "nll",
    ) -> Gap:
        """The first row minus the second, in per cent of the second."""
        seeds = self.seeds(first, second)
        fixes = [self.best_map(n, epoch, seeds) if repaired else MAPS[0] for n in (first, second)]
        if self.task in SEEDED or key not in SCORES:
            a, b = (
                self.each(name, seeds, epoch, "test", fix, key)
                for name, fix in zip((first, second), fixes, strict=True)
            )
            return over_seeds(a, b, SEEDED.get(self.task, 0.0)).percent
        one, two = (
            self.samples(name, epoch, fix, seeds, key)
            for name, fix in zip((first, second), fixes, strict=True)
        )
        return over_both(one, two).percent

    @property
    def hours(self) -> float:
        return float(sum(run["seconds"] for run in self.all)) / 3600


def load(folder: Path) -> dict[str, Kept]:
    return {path.stem: Kept(path) for path in sorted(folder.glob("*.zip"))}
