"""The choice of the defaults: the rule on made readings, and one small round."""

import inspect
import json
from dataclasses import replace

import pytest
import torch

from benchmarks.data import tasks
from benchmarks.study import choose
from benchmarks.study.choose import CANDIDATES, Candidate, Rule
from benchmarks.study.judge import histogram
from benchmarks.study.rows import PLAIN, Setting
from benchmarks.study.run import BENCHMARKS, Source
from sc_bce import AdaptivePerturbation
from sc_bce.losses.rules import FollowSlope

FULL, FLOOR, SIMPLE, PLAINER = (
    Candidate().name,
    Candidate(falls=False).name,
    Candidate(sampling="expected", level=0.0).name,
    Candidate(sampling="expected", level=0.0, focus=0.0).name,
)


def made(**readings):
    """Runs of plain BCE, whose readings are all 1 and 2, and of candidates by task."""
    runs = []
    for task in ("digits", "cancer"):
        runs += [dict(task=task, candidate=PLAIN, seed=s, stopped=1.0, last=2.0) for s in (0, 1)]
    for name, by in readings.items():
        for task, pairs in by.items():
            runs += [
                dict(task=task, candidate=name, seed=seed, stopped=a, last=b)
                for seed, (a, b) in enumerate(pairs)
            ]
    return runs


def test_changes_are_of_means_over_the_same_seeds():
    found = choose.changes(made(**{FULL: {"digits": [(0.8, 1.0), (1.0, 2.0), (9.0, 9.0)]}}))
    assert found == {FULL: {"digits": pytest.approx([-0.1, -0.25])}}


def test_the_lowest_mean_wins_among_those_that_raise_nothing():
    runs = made(**{
        FULL: {"digits": [(1.02, 0.2)] * 2, "cancer": [(1.0, 1.0)] * 2},  # the lowest, but out
        SIMPLE: {"digits": [(0.9, 1.9)] * 2, "cancer": [(1.0, 2.0)] * 2},
        PLAINER: {"digits": [(1.009, 1.2)] * 2, "cancer": [(1.0, 2.0)] * 2},
    })  # fmt: skip
    found = choose.changes(runs)
    assert choose.ordered(found, ["digits", "cancer"]) == [PLAINER, SIMPLE, FULL]
    assert choose.chosen(runs) == PLAINER
    # Who did not come as far is not in question, however good.
    runs += [
        dict(task="digits", candidate=FLOOR, seed=seed, stopped=0.1, last=0.1) for seed in (0, 1)
    ]
    assert choose.ordered(choose.changes(runs), ["digits"])[0] == FLOOR
    assert choose.chosen(runs) == PLAINER


def test_if_all_are_out_the_simplest_of_the_least_harmful_is_chosen():
    runs = made(**{
        FULL: {"digits": [(1.030, 0.2)] * 2, "cancer": [(0.9, 1.0)] * 2},
        SIMPLE: {"digits": [(1.034, 2.0)] * 2, "cancer": [(1.0, 2.0)] * 2},
        PLAINER: {"digits": [(1.036, 2.0)] * 2, "cancer": [(1.0, 2.0)] * 2},
    })  # fmt: skip
    assert choose.chosen(runs) == SIMPLE


def test_the_rule_of_the_candidates_is_the_package_s_with_a_floor_and_a_memory():
    package, same = FollowSlope(0.2, 2.0), Rule(0.2, 2.0)
    floor = Rule(0.2, 2.0, memory=0.7, falls=False)
    for slope in (0.3, 1.0, 2.5, float("nan")):
        for level in (0.0, 0.2, 0.45):
            want = package.after_step(level, slope, 1.0, 0.49)
            assert same.after_step(level, slope, 1.0, 0.49) == want
            assert floor.after_step(level, slope, 1.0, 0.49) == max(want, 0.2)
    assert floor.after_step(0.2, 2.5, 1.0, 0.1) == 0.1  # the cap is above all
    half = torch.full((1,), 0.5)
    assert floor.remembered(half, torch.ones(1)) == pytest.approx(0.65)
    assert same.remembered(half, torch.ones(1)) == package.remembered(half, torch.ones(1))
    built = Candidate(level=0.1, memory=0.7, falls=False).build(
        Setting(tasks.rates(0), 0.5, torch.Generator())
    )
    assert built.rule == Rule(0.1, 2.0, 0.7, falls=False)


def test_no_sample_is_repaired_by_what_was_fitted_to_it():
    """Folds whose answers mean the opposite: a map of the others is wrong, of its own right."""
    z = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = (z > 0).float()
    y[:4] = 1 - y[:4]  # the first fold alone
    after = choose.crossed(z, y, None)
    own = histogram(z[4:], y[4:], None)
    assert choose.nll(after) > 0.2 * 5  # nearly sure and wrong on a fifth of the pixels
    assert choose.nll(own) < 0.5
    several = choose.crossed(z.repeat(1, 2, 1, 1), y.repeat(1, 2, 1, 1), 2)
    assert choose.nll(several) == pytest.approx(choose.nll(after), rel=1e-6)


def test_a_round_is_kept_resumed_collected_and_told(tmp_path, monkeypatch, capsys):
    few = {FULL: CANDIDATES[FULL], SIMPLE: CANDIDATES[SIMPLE]}
    monkeypatch.setattr(choose, "CANDIDATES", few)
    monkeypatch.setattr(choose, "MORE_SEEDS", {})
    monkeypatch.setattr(choose, "ROUNDS", ((("cancer",), (0, 1), 2), (("rates",), (0, 1), 1)))
    sources = {
        "cancer": Source(lambda seed: replace(tasks.cancer(seed), epochs=3), seeded=True),
        "rates": Source(lambda seed: replace(tasks.rates(seed), epochs=3), seeded=True),
    }
    monkeypatch.setattr(choose, "study_tasks", lambda *folders: sources)
    threads = torch.get_num_threads()
    line = ["--out", str(tmp_path / "runs")]
    choose.main(line)
    paths = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(paths) == 2 * 3 + 2 * 2  # the second round has one candidate and plain BCE
    choose.main(line)
    assert {path: path.stat().st_mtime_ns for path in paths} == paths
    torch.set_num_threads(threads)
    kept = ["--kept", str(tmp_path / "choose.json")]
    choose.main(["--collect", *line, *kept])
    runs = json.loads((tmp_path / "choose.json").read_text())["runs"]
    assert len(runs) == len(paths)
    assert all(0 < run[key] < 3 for run in runs for key in choose.READINGS)
    first = choose.ordered(choose.changes(runs), ["cancer"])[0]
    assert {run["candidate"] for run in runs if run["task"] == "rates"} == {PLAIN, first}
    choose.main(["--table", *kept])
    told = capsys.readouterr().out
    assert all(name in told for name in few)
    assert f"chosen: {first}" in told


def test_the_package_s_defaults_are_what_the_rule_chooses_and_the_page_shows_it():
    runs = json.loads(choose.KEPT.read_text("utf-8"))["runs"]
    best = CANDIDATES[choose.chosen(runs)]
    arguments = inspect.signature(AdaptivePerturbation).parameters
    for name in ("level", "focus", "sampling", "prior"):
        assert arguments[name].default == getattr(best, name), name
    assert FollowSlope() == FollowSlope(best.level, best.focus)
    assert best.memory == FollowSlope.memory
    assert best.falls
    page = (BENCHMARKS.parent / "docs" / "decisions.md").read_text("utf-8")
    assert choose.told(runs) in page


def test_the_mean_probabilities_that_the_page_cites_are_those_printed():
    runs = json.loads(choose.KEPT.read_text("utf-8"))["runs"]
    rows = [line.split(" | ") for line in choose.told_means(runs).splitlines()]
    words = (choose.BENCHMARKS.parent / "docs" / "decisions.md").read_text("utf-8")
    for name in ("level 0.2, focus 1, sample", "level 0.2, focus 2, sample, level-weighted"):
        (cells,) = (row[1:8] for row in rows if row[0] == f"| {name}")
        cited = [cell.removeprefix("0") for cell in cells]
        assert f"{', '.join(cited[:-1])} and {cited[-1]}" in " ".join(words.split()), name
