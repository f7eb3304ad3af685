"""The defaults of AdaptivePerturbation, chosen by a rule that was written down before any run.

    python -m benchmarks.study.choose --photographs FOLDER --streets FOLDER
    python -m benchmarks.study.choose --table

The rule. Only validation data count, of seeds 0 to 2 (cancer, whose validation sets are small, of
13 to 19 too), which the study does not use. Each run is read twice: NLL after the epoch of the
least validation NLL and an isotonic repair, fitted and measured on different samples (five folds,
each a block of neighbours); and raw NLL after the last epoch. Both are divided by plain BCE's, as
means over the same seeds. Out is a candidate that raises either reading by more than 1 % on a
task. Chosen is, of the rest, the one with the lowest mean over tasks and both readings. If all are
out, that is published, and chosen is the simplest (``Candidate.parts``) of those whose largest rise
is within half a point of the smallest.

Coarse to fine: all candidates on the tasks whose runs take seconds, seed 0; the better half of them
on the other seeds; the first four of these on photographs and street scenes; the first two of these
on the pretrained network. A round orders those that are in by their mean, and after them those that
are out by their largest rise. It may stop after any full seed. All tasks so far count, each the
same.

Finished runs are kept under ``--out``, one JSON each, and the same line goes on from there.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.data.tasks import IGNORED, Task
from benchmarks.report import rounded, table, versions
from benchmarks.study.judge import histogram
from benchmarks.study.rows import PLAIN, ROWS, Row, Setting
from benchmarks.study.run import BENCHMARKS, EPOCHS, RESULTS, Sources, study_tasks, train
from sc_bce import AdaptivePerturbation, CalibrationHistogram, IsotonicCalibration
from sc_bce.losses.rules import FollowSlope

READINGS = ("stopped", "last")
SEEDS = (0, 1, 2)
MORE_SEEDS = {"cancer": tuple(range(13, 20))}
SMALL = ("digits", "cancer", "rates")
ROUNDS = (  # tasks, seeds, and how many candidates
    (SMALL, SEEDS[:1], 18),
    (SMALL, SEEDS, 9),
    (("photographs", "streets"), SEEDS, 4),
    (("pretrained",), SEEDS, 2),
)
FOLDS = 5
WORSE = 0.01  # a rise that is too much
ALIKE = 0.005
KEPT = RESULTS / "choose.json"


# ---------------------------------------------------------------- the candidates


@dataclass(frozen=True)
class Candidate:
    """Settings of the adaptive loss.

    Args:
        memory: weight of the past in a sample's running accuracy.
        falls: whether the mean level may fall below the one that it starts from.
    """

    level: float = 0.2
    focus: float = 2.0
    sampling: str = "sample"
    prior: str = "observed"
    memory: float = 0.9
    falls: bool = True

    @property
    def name(self) -> str:
        words = [f"level {self.level:g}", f"focus {self.focus:g}", self.sampling]
        words += ["level-weighted"] if self.prior == "level_weighted" else []
        words += [f"memory {self.memory:g}"] if self.memory != FollowSlope.memory else []
        return ", ".join(words + ([] if self.falls else ["never below"]))

    @property
    def parts(self) -> int:
        """How many things it takes to explain."""
        drawn, weighted = self.sampling != "expected", self.prior != "observed"
        return sum((self.level > 0, self.focus > 0, drawn, weighted, not self.falls))

    def build(self, s: Setting) -> nn.Module:
        made = AdaptivePerturbation(
            len(s.task.train),
            level=self.level,
            focus=self.focus,
            sampling=self.sampling,
            prior=self.prior,
            num_labels=s.labels,
            ignore_index=IGNORED,
            generator=s.draws,
        )
        made.rule = Rule(self.level, self.focus, self.memory, self.falls)
        made.reset_parameters()
        return made


@dataclass(frozen=True)
class Rule(FollowSlope):
    """The package's rule with two numbers more."""

    memory: float = FollowSlope.memory
    falls: bool = True

    def after_step(self, mean: float, slope: float, beta: float, highest: float) -> float:
        mean = super().after_step(mean, slope, beta, highest)
        return mean if self.falls else min(max(mean, self.level), highest)


CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        # one at a time
        Candidate(),
        Candidate(level=0.0),
        Candidate(level=0.1),
        Candidate(level=0.3),
        Candidate(focus=0.0),
        Candidate(focus=1.0),
        Candidate(sampling="expected"),
        Candidate(memory=0.7),
        Candidate(prior="level_weighted"),
        Candidate(falls=False),
        # together
        Candidate(sampling="expected", falls=False),
        Candidate(sampling="expected", prior="level_weighted"),
        Candidate(sampling="expected", focus=1.0),
        Candidate(sampling="expected", focus=0.0),
        Candidate(sampling="expected", level=0.1),
        Candidate(sampling="expected", level=0.1, focus=0.0),
        Candidate(sampling="expected", level=0.0),
        Candidate(sampling="expected", level=0.0, focus=0.0),
    )
}


# ---------------------------------------------------------------- one run

Run = dict[str, Any]
Changes = dict[str, dict[str, Sequence[float]]]  # by candidate and task: of both readings


def read(task: Task, name: str, seed: int) -> Run:
    """Train a candidate, or plain BCE, and read it on validation data alone."""
    row = ROWS[PLAIN] if name == PLAIN else Row(name, CANDIDATES[name].build, indexed=True)
    trained = train(task, row, seed, lambda: None)
    labels = task.labels if task.labels > 1 else None
    y = task.val.target.float()
    last, best = (trained.predict(which)(task.val.inputs) for which in EPOCHS)
    seen, early = histogram(last, y, labels), histogram(best, y, labels)
    found: Run = {
        "task": task.name,
        "candidate": name,
        "seed": seed,
        "stopped": nll(crossed(best, y, labels)),
        "last": nll(seen),
        "best_epoch": trained.best_epoch,
        "raw": nll(early),
        "slope": trained.history["slope"][-1],
        "accuracy": float(pooled(seen).accuracy()),
        "mean": seen.confidence("positive_class").tolist(),
        "base_rate": seen.accuracy("positive_class").tolist(),
        "levels": trained.history["level"][-1:],
        "seconds": trained.seconds,
        "data": task.fingerprint(),
    }
    return rounded(found, 5)  # type: ignore[no-any-return]


def crossed(logits: Tensor, target: Tensor, labels: int | None) -> CalibrationHistogram:
    """All samples, each repaired by an isotonic map that was fitted to the other folds."""
    after = CalibrationHistogram(labels)
    for fold in torch.arange(len(logits)).tensor_split(FOLDS):
        rest = torch.ones(len(logits), dtype=torch.bool)
        rest[fold] = False
        repair = IsotonicCalibration(labels).fit(histogram(logits[rest], target[rest], labels))
        after.update(repair(logits[fold]), target[fold], ignore_index=IGNORED)
    return after


def pooled(seen: CalibrationHistogram) -> CalibrationHistogram:
    return seen if seen.num_labels is None else seen.pooled()


def nll(seen: CalibrationHistogram) -> float:
    return float(pooled(seen).nll())


# ---------------------------------------------------------------- the rule


def changes(runs: Iterable[Run]) -> Changes:
    """By candidate and task: both readings over plain BCE's of the same seeds, minus 1."""
    by: dict[str, dict[str, dict[int, Run]]] = {}
    for run in runs:
        by.setdefault(run["candidate"], {}).setdefault(run["task"], {})[run["seed"]] = run
    plain = by.pop(PLAIN, {})
    found: Changes = {}
    for name, of in by.items():
        for task in of:
            seeds = of[task].keys() & plain.get(task, {}).keys()
            if seeds:
                found.setdefault(name, {})[task] = [
                    sum(of[task][seed][key] for seed in seeds)
                    / sum(plain[task][seed][key] for seed in seeds)
                    - 1
                    for key in READINGS
                ]
    return found


def mean(of: Mapping[str, Sequence[float]]) -> float:
    return float(np.mean(list(of.values())))


def worst(of: Mapping[str, Sequence[float]]) -> float:
    return float(np.max(list(of.values())))


def ordered(found: Changes, tasks: Collection[str]) -> list[str]:
    """Of the candidates that saw all these tasks: who is in by mean, then who is out by rise."""
    of = {name: {t: by[t] for t in tasks} for name, by in found.items() if by.keys() >= {*tasks}}
    out = {name: worst(of[name]) > WORSE for name in of}
    return sorted(of, key=lambda n: (out[n], worst(of[n]) if out[n] else mean(of[n])))


def chosen(runs: Sequence[Run]) -> str:
    """By the rule above, among the candidates that came as far as any."""
    count = Counter(run["candidate"] for run in runs if run["candidate"] != PLAIN)
    found = {n: of for n, of in changes(runs).items() if count[n] == max(count.values())}
    order = ordered(found, max(found.values(), key=len).keys())
    low = worst(found[order[0]])
    if low <= WORSE:
        return order[0]
    near = [name for name in order if worst(found[name]) <= low + ALIKE]
    return min(near, key=lambda name: CANDIDATES[name].parts)


# ---------------------------------------------------------------- all runs


def kept_runs(folder: Path) -> list[Run]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def run_round(sources: Sources, names: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Plain BCE and these candidates on these tasks, seed by seed."""
    turns = [(seed, task) for seed in seeds for task in sources]
    if len(seeds) > 1:
        turns += [(seed, task) for task in sources for seed in MORE_SEEDS.get(task, ())]
    wanted = [(task, name, seed) for seed, task in turns for name in (PLAIN, *names)]
    paths = {run: folder / ("--".join(map(str, run)).replace(" ", "") + ".json") for run in wanted}
    held: tuple[Any, Task] | None = None
    for run in tqdm([run for run in wanted if not paths[run].exists()]):
        name, candidate, seed = run
        key = name, seed if sources[name].seeded else 0
        if held is None or held[0] != key:
            held = key, sources[name].task(seed)
        unfinished = paths[run].with_suffix(".part")
        unfinished.write_text(json.dumps(read(held[1], candidate, seed)))
        os.replace(unfinished, paths[run])


def told(runs: Sequence[Run]) -> str:
    """All candidates against plain BCE, in per cent: stopped early and repaired · last epoch."""
    found, count = changes(runs), Counter(run["candidate"] for run in runs)
    seen = {run["task"] for run in runs}
    tasks = [task for task in dict.fromkeys(t for some, *_ in ROUNDS for t in some) if task in seen]
    rows = []
    for name in [n for n in CANDIDATES if n in found]:
        of = found[name]
        pairs = [" · ".join(f"{100 * x:+.1f}" for x in of.get(task, ())) for task in tasks]
        ends = f"{100 * mean(of):+.1f}", f"{100 * worst(of):+.1f}", str(count[name])
        rows.append([name, *pairs, *ends])
    rows.sort(key=lambda row: (-int(row[-1]), float(row[-3])))
    return table(["candidate", *tasks, "mean", "largest rise", "runs"], rows)


def told_means(runs: Sequence[Run], task: str = "rates") -> str:
    """The mean probability after the last epoch over plain BCE's, label by label."""
    by: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run["task"] == task:
            by.setdefault(run["candidate"], {})[run["seed"]] = run
    plain = by.pop(PLAIN)
    rates = np.mean([run["base_rate"] for run in plain.values()], 0)
    rows = []
    for name, of in by.items():
        own, base = (np.mean([one[seed]["mean"] for seed in of], 0) for one in (of, plain))
        rows.append([name, *(f"{x:.2f}" for x in own / base), str(len(of))])
    rows.sort(key=lambda row: (-int(row[-1]), row[0]))
    return table([f"{task}: mean / plain BCE's", *(f"{x:.2g}" for x in rates), "seeds"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Choose the defaults by validation data.")
    parser.add_argument("--photographs", type=Path, help="folder with images/ and masks/")
    parser.add_argument("--streets", type=Path, help="folder with train/, val/ and test/")
    parser.add_argument("--rounds", type=int, default=len(ROUNDS), help="how many of them")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many in a round")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "out" / "choose")
    parser.add_argument("--collect", action="store_true", help="write the kept readings and stop")
    parser.add_argument("--table", action="store_true", help="print those written and stop")
    parser.add_argument("--kept", type=Path, default=KEPT, help="the JSON of both")
    args = parser.parse_args(argv)
    if args.collect:
        parts = json.dumps(versions("torch", "numpy", "scikit-learn"))
        lines = ",\n".join(json.dumps(run) for run in kept_runs(args.out))
        args.kept.write_text(f'{{"versions": {parts}, "runs": [\n{lines}\n]}}\n')
    elif args.table:
        runs = json.loads(args.kept.read_text())["runs"]
        print(f"{told(runs)}\n\nchosen: {chosen(runs)}\n\n{told_means(runs)}")
    else:
        torch.set_num_threads(1)
        args.out.mkdir(parents=True, exist_ok=True)
        sources = study_tasks(args.photographs, args.streets)
        names, so_far = list(CANDIDATES), list[str]()
        for tasks, seeds, count in ROUNDS[: args.rounds]:
            if so_far:
                found = changes(kept_runs(args.out))
                names = ordered({name: found[name] for name in names}, so_far)[:count]
            here = {task: sources[task] for task in tasks if task in sources}
            run_round(here, names, seeds[: args.seeds], args.out)
            so_far += here


if __name__ == "__main__":
    main()
