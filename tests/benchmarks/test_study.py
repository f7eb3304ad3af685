"""The study: what it measures, how its runs are kept, and what its page may say."""

import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.data import tasks
from benchmarks.data.corruptions import corrupted, from_pixels, to_pixels
from benchmarks.study import answers, page, run
from benchmarks.study.answers import beaten, where
from benchmarks.study.compare import Gap, holm, over_both, over_seeds
from benchmarks.study.judge import (
    MAPS,
    Judge,
    against_chance,
    f1,
    histogram,
    label_quality,
    packed,
    per_group,
    separation,
    smooth_ece,
    unpacked,
)
from benchmarks.study.kept import Kept
from benchmarks.study.rows import CORE, FAMILIES, OTHERS, ROWS, base_rate

# --- measures ----------------------------------------------------------------------------------


@pytest.fixture
def drawn():
    rng = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(50, 1, 8, 8, generator=rng)
    y = (torch.rand(z.shape, generator=rng) < torch.sigmoid(z / 2 - 0.5)).float()
    return z, y


def test_smooth_ece_is_the_fixed_point_of_its_definition(drawn):
    z, y = drawn
    table = histogram(z, y, None).reliability(1000, "positive_class")
    found = smooth_ece(table.count, table.confidence, table.accuracy)
    p, grid = torch.sigmoid(z).flatten().double().numpy(), (np.arange(2000) + 0.5) / 2000
    residual = (y.flatten().numpy() - p) / len(p)
    smooth = np.zeros(len(grid))
    for centre in (grid, -grid, 2 - grid):  # reflected at both ends
        kernel = np.exp(-(((centre[:, None] - p) / found) ** 2) / 2)
        smooth += (kernel / (found * np.sqrt(2 * np.pi))) @ residual
    assert np.abs(smooth).mean() == pytest.approx(found, rel=0.01)


def test_f1_and_separation_agree_with_scikit_learn(drawn):
    from sklearn.metrics import f1_score, roc_auc_score

    z, y = drawn
    want = f1_score(y.flatten().numpy(), (z >= 0).flatten().numpy())
    assert f1(histogram(z, y, None)) == pytest.approx(want)
    outside = z[:20] / 2
    pixels, images = separation(z, outside)
    kinds = np.repeat([1, 0], [z.numel(), outside.numel()])
    sure = torch.cat([z.flatten(), outside.flatten()]).abs().numpy()
    assert pixels == pytest.approx(roc_auc_score(kinds, sure), abs=1e-3)
    means = [torch.sigmoid(x.abs()).flatten(1).mean(1).numpy() for x in (z, outside)]
    want = roc_auc_score(np.repeat([1, 0], [50, 20]), np.concatenate(means))
    assert images == pytest.approx(want)


def test_the_truth_has_no_distance_from_the_truth():
    chance = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)).double()
    found = against_chance(torch.logit(chance), chance)
    for values in found.values():
        np.testing.assert_allclose(values, 0, atol=1e-9)
    bent = against_chance(2 * torch.logit(chance), chance)  # an increasing map: all calibration
    np.testing.assert_allclose(bent["calibration"], bent["squared"], rtol=1e-6)
    assert min(bent["divergence"]) > 0


def test_sums_of_samples_keep_their_digits_and_leave_the_ignored_out(drawn):
    z, y = drawn
    y[0] = tasks.IGNORED
    sums = per_group(z, y)
    assert sums.shape == (2, 50)
    assert (sums[:, 0] == 0).all()
    want = torch.nn.functional.binary_cross_entropy_with_logits(z[1:], y[1:])
    assert sums[0].sum() / y[1:].numel() == pytest.approx(float(want), rel=1e-6)
    np.testing.assert_allclose(
        unpacked(dict(packed({"raw": sums})), "raw"), sums, atol=sums.max() / 65535
    )


def test_the_quality_of_a_mask_is_cleanlabs(drawn):
    rank = pytest.importorskip("cleanlab.segmentation.rank")
    z, y = drawn
    p = torch.sigmoid(z.double())
    given = y[:, 0].long().numpy(), torch.cat([1 - p, p], 1).numpy()
    want, _ = rank.get_label_quality_scores(*given, verbose=False)
    np.testing.assert_allclose(label_quality(z, y), want, rtol=1e-9)


def test_the_quality_of_a_mask_is_that_of_its_worst_pixels():
    z = torch.tensor([[[[2.0, 2.0]]], [[[2.0, -2.0]]]])
    sure = 1 / (1 + np.exp(-2))
    weight = np.exp(10 * (2 * sure - 1))  # of the pixel that is unlikely, at a temperature of .1
    want = [sure, (sure + weight * (1 - sure)) / (1 + weight)]
    np.testing.assert_allclose(label_quality(z, torch.ones_like(z)), want, rtol=1e-6)


# --- data --------------------------------------------------------------------------------------


def test_corruptions_get_worse_and_are_repeatable():
    inputs = tasks.scenes().test.inputs[:4]
    assert torch.equal(from_pixels(to_pixels(inputs)), inputs)
    found = {(kind, step): x for kind, step, x in corrupted(inputs)}
    assert len(found) == 20
    for kind in ("noise", "blur", "contrast", "jpeg"):
        away = [float((found[kind, step] - inputs).abs().mean()) for step in range(1, 6)]
        assert away == sorted(away)
        assert away[0] > 0
    assert all(torch.equal(x, found[kind, step]) for kind, step, x in corrupted(inputs))
    assert len(list(corrupted(torch.zeros(3, 2)))) == 5


def test_the_tables_are_what_they_say():
    task = tasks.rates(0)
    assert not torch.equal(task.train.inputs, tasks.rates(1).train.inputs)
    rates = task.chance.mean(0)
    np.testing.assert_allclose(rates, tasks.RATES, rtol=0.25)
    np.testing.assert_allclose(task.test.target.float().mean(0), rates, atol=0.02)
    cancer = tasks.cancer(0)
    assert [len(part) for part in (cancer.train, cancer.val, cancer.test)] == [200, 150, 219]
    assert cancer.fingerprint() != tasks.cancer(1).fingerprint()


def test_spoilt_masks_are_a_tenth():
    clean = tasks.scenes().train.target
    for task in (tasks.replaced_scenes(), tasks.careless_scenes()):
        changed = (task.train.target != clean).flatten(1).any(1).nonzero().flatten()
        assert sorted(task.wrong.tolist()) == changed.tolist()
        assert len(changed) == 4
        assert set(task.train.target.unique().tolist()) == {0, 1}
    assert len(tasks.fewer_scenes(0.25).train) == 10


def test_the_base_rate_is_that_of_each_label():
    target = torch.tensor([[1, 0], [0, 0], [255, 1]], dtype=torch.uint8)
    torch.testing.assert_close(base_rate(target, 2), torch.tensor([1.5 / 3, 1.5 / 4]))
    assert base_rate(target[:, :1], 1) == pytest.approx(1.5 / 3)
    assert base_rate(target[..., None, None], 2).shape == (2, 1, 1)


# --- runs --------------------------------------------------------------------------------------


def moving(task, order):
    """Each batch of an image of coordinates and of a mask that follows them."""
    x, y = task.train.inputs, task.train.target.float()
    return list(run._batches(task, x, y, torch.Generator().manual_seed(order)))


def test_crops_are_windows_whose_masks_move_with_them():
    down, across = torch.meshgrid(*[(torch.arange(32) + 0.5) / 32] * 2, indexing="ij")
    image = torch.stack([across, down, torch.zeros(32, 32)]).expand(64, 3, 32, 32)
    part = tasks.Part(image, (image[:, :1] > 0.5).to(torch.uint8))
    task = tasks.Task("flat", part, part, part, torch.nn.Identity, 1, 64, 0.1, crop=0.25)
    ((_, x, y),) = moving(task, 0)
    # The coordinates tell the window: it lies inside, and has a quarter to all of the area.
    step = x[:, 0, 16, 17] - x[:, 0, 16, 16]
    torch.testing.assert_close(step, x[:, 1, 17, 16] - x[:, 1, 16, 16], atol=1e-5, rtol=0)
    area = (32 * step) ** 2
    assert 0.25 <= area.min() < 0.35
    assert 0.9 < area.max() <= 1
    middle = x[:, :2].mean((2, 3))
    assert ((middle - 0.5).abs() <= (1 - 32 * step[:, None]) / 2 + 1e-3).all()
    assert middle.std(0).min() > 0.05
    assert set(y.unique().tolist()) == {0, 1}
    assert ((y == 1) == (x[:, :1] > 0.5)).float().mean() > 0.98
    ((_, again, _),), ((_, other, _),) = moving(task, 0), moving(task, 1)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_a_network_is_fine_tuned_in_one_cycle_its_old_layers_slowly(monkeypatch):
    def build():
        layers = {"encoder": torch.nn.Conv2d(3, 4, 1), "head": torch.nn.Conv2d(4, 1, 1, bias=False)}
        return torch.nn.Sequential(OrderedDict(layers))

    task = replace(tasks.digits(), build=build, epochs=2, batch=16, lr=0.01, fine_tuned=True)
    seen, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        seen.append([(group["lr"], len(group["params"])) for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run.train(task, ROWS["bce"], 0, lambda: None)
    assert len(seen) == 2 * 3  # batches of 40 samples
    rates = np.array(seen)[..., 0]
    np.testing.assert_allclose(rates[:, 0], 0.05 * rates[:, 1])
    assert (np.array(seen)[..., 1] == [2, 1]).all()  # what the encoder has, and the head
    top = rates[:, 1].argmax()
    assert 0 < top < 5
    assert (np.diff(rates[: top + 1, 1]) > 0).all()
    assert (np.diff(rates[top:, 1]) < 0).all()
    assert rates.max() <= 0.01
    assert rates[-1, 1] < 1e-5


def test_a_task_without_data_is_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["--tasks", "pretrained", "digits"])
    said = capsys.readouterr().err
    assert "nothing to make pretrained of; photographs and pretrained need --photographs" in said


# After one epoch a network may say nothing yet.
@pytest.mark.filterwarnings("ignore:The temperature is at its upper limit")
def test_every_row_trains_and_the_same_again_gives_the_same():
    task = replace(tasks.scenes(), epochs=1)
    few = tasks.Part(task.train.inputs[:10], task.train.target[:10])
    small = [tasks.Part(p.inputs[:20], p.target[:20]) for p in (task.val, task.test)]
    task = replace(task, name="small", train=few, val=small[0], test=small[1], ood=None)
    judge = Judge(task, corrupt=False)
    for name in ROWS:
        trained = run.train(task, ROWS[name], 0, lambda: None)
        assert np.isfinite(trained.history["val"]).all(), name
    one, two = (run.finish(task, "adaptive", 0, judge, lambda *_: None) for _ in range(2))
    for result, _ in (one, two):
        del result["seconds"], result["training_seconds"]
    assert json.dumps(one[0]) == json.dumps(two[0])
    assert all(np.array_equal(one[1][key], two[1][key]) for key in two[1])


def test_the_plan_names_rows_that_are_there():
    for task, rows, _ in run.PLAN:
        assert all(row in ROWS or row in FAMILIES for row in rows), task
    assert {*CORE, *OTHERS}.isdisjoint(one for rows in FAMILIES.values() for one in rows)
    wanted = run.planned(["digits"])
    assert wanted[:3] == [("digits", row, 3) for row in ("bce", "adaptive", "moderation-base-0.2")]
    assert len(wanted) == len(set(wanted))


def test_runs_are_kept_resumed_collected_and_told(tmp_path):
    line = ["--tasks", "cancer", "--rows", "bce", "adaptive", "decay", "moderation-base-0.2"]
    line += ["--jobs", "1", "--out", str(tmp_path / "out")]
    run.main([*line, "--seeds", "3", "4"])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.json")}
    # three rows of each seed; of the tuned one all three with the first, the best with the other
    assert len(kept) == 2 * 3 + 3 + 1
    run.main([*line, "--seeds", "3", "4", "5"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    files = []
    for name in ("one", "two"):
        run.main(["--collect", "--out", str(tmp_path / "out"), "--results", str(tmp_path / name)])
        files.append((tmp_path / name / "cancer.zip").read_bytes())
    assert files[0] == files[1]
    fresh = ["--out", str(tmp_path / "fresh")]
    run.main(["--restore", *fresh, "--results", str(tmp_path / "one")])
    run.main(["--collect", *fresh, "--results", str(tmp_path / "three")])
    assert (tmp_path / "three" / "cancer.zip").read_bytes() == files[0]
    found = Kept(tmp_path / "one" / "cancer.zip")
    assert found.seeds("bce", "decay") == [3, 4, 5]
    for name in MAPS:
        scores = found.samples("bce", "last", name, [3, 4, 5])
        assert scores.mean() == pytest.approx(found.mean("bce", "last", name, "nll"))
    page.main(["--results", str(tmp_path / "one"), "--out", str(tmp_path)])
    text = (tmp_path / "study.md").read_text("utf-8")
    assert "**Partial:**" in text
    assert "@" not in text
    assert "{{" not in text


# --- intervals ---------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    gap = over_seeds(a, b)
    want = ttest_rel(a, b)
    between = want.confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx((between.low, between.high))
    assert gap.p == pytest.approx(want.pvalue)
    wide = over_seeds(a, b, overlap=1.0)
    assert wide.high - wide.low == pytest.approx((gap.high - gap.low) * 6**0.5)
    assert gap.percent.value == pytest.approx(100 * (a.mean() - b.mean()) / b.mean())
    assert over_seeds(a[:1], b[:1]).verdict == "undecided"


def test_the_interval_over_seeds_and_images_covers():
    rng = np.random.default_rng(0)
    hits, small = [], []
    for _ in range(400):
        noise = rng.normal(0, 1, (5, 1)) + rng.normal(0, 3, (1, 60)) + rng.normal(0, 2, (5, 60))
        gap = over_both(noise + 1, np.zeros_like(noise))
        hits.append(gap.low < 1 < gap.high)
        small.append(over_both(noise, np.zeros_like(noise)).p)
    assert 0.95 <= np.mean(hits) <= 0.995
    assert np.mean(np.array(small) < 0.05) == pytest.approx(1 - np.mean(hits))
    for error in (0.5, 0.2, 0.05):  # at most that often, if nothing differs
        assert np.mean(np.array(small) < error) <= error + 3 * (error * (1 - error) / 400) ** 0.5


def test_p_is_that_of_the_interval_which_just_reaches_0():
    from scipy.stats import norm, t

    rng = np.random.default_rng(0)
    for shift in (0.0, 0.2, 0.5, 1.0, 3.0):
        noise = rng.normal(0, 1, (4, 1)) + rng.normal(0, 1, (1, 30)) + rng.normal(0, 1, (4, 30))
        gap = over_both(noise + shift, np.zeros_like(noise))
        seeds, images = noise.mean(1).std(ddof=1) / 2, noise.mean(0).std(ddof=1) / 30**0.5
        half = np.hypot(t.isf(gap.p / 2, 3) * seeds, norm.isf(gap.p / 2) * images)
        assert half == pytest.approx(abs(gap.value))
        assert (gap.p < 0.05) == (gap.low > 0 or gap.high < 0) == (gap.verdict != "undecided")
    same = over_both(noise, noise)
    assert (same.value, same.p, same.verdict) == (0, 1, "undecided")


def test_holm_is_the_one_of_the_textbook():
    chances = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    family = {name: Gap(-1, -2, 0, 1, p) for name, p in chances.items()}
    found = holm(family)
    assert list(found) == list("abcd")
    assert [found[name].p for name in "abcd"] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [found[name].verdict for name in "abcd"] == ["lower", "undecided", "undecided", "lower"]
    assert (found["b"].low, found["b"].high) == (-2, 0)
    assert holm({}) == {}


def test_a_family_without_differences_is_rarely_called_different():
    rng = np.random.default_rng(0)
    alone, corrected = [], []
    for _ in range(300):
        rows = rng.normal(0, 1, (12, 5)) + rng.normal(0, 1, 5)  # they share their opponent
        family = {name: over_seeds(row, np.zeros(5)) for name, row in enumerate(rows)}
        alone.append(any(gap.verdict != "undecided" for gap in family.values()))
        corrected.append(any(gap.verdict != "undecided" for gap in holm(family).values()))
    assert np.mean(alone) > 0.2
    assert np.mean(corrected) <= 0.06


# --- what the page says ------------------------------------------------------------------------


def _gaps(**values):
    """Differences with a p of .01 where the value is a whole number."""
    return {
        name: Gap(value, value - 1, value + 1, 100, 0.01 if value == int(value) else 0.4)
        for name, value in values.items()
    }


def test_where_names_what_is_shown_and_counts_the_rest():
    assert where(_gaps(digits=-3, cancer=2, rates=-0.5, streets=0.5)) == (
        "lower on digits (-3.0 %) and higher on cancer (+2.0 %), with no difference shown on 2 "
        "others"
    )
    assert where(_gaps(digits=-0.5, cancer=0.7)) == (
        "not shown to differ on any of 2 tasks (-0.5 % to +0.7 %)"
    )
    assert where(_gaps(rates=0.5)) == "not shown to differ on known rates (+0.5 %)"


def test_better_means_lower_on_two_tasks_and_nowhere_worse():
    assert beaten(_gaps(digits=-3, cancer=-2, rates=0.5)) == "Yes"
    assert beaten(_gaps(digits=-3, cancer=-2, rates=1.5)) == "On some tasks"
    assert beaten(_gaps(digits=-3, rates=0.5)) == "On some tasks"
    assert beaten(_gaps(digits=-0.5)) == "Not shown"
    assert beaten(_gaps(digits=-0.5, rates=2)) == "No"


@pytest.fixture
def fine_tuned(tmp_path):
    """The kept runs, those of the photographs passed off as a fine-tuned network's."""
    path = tmp_path / "pretrained.zip"
    path.write_bytes((run.RESULTS / "photographs.zip").read_bytes())
    found = Kept(path)
    rows = ("bce", "adaptive", "moderation-base-0.2", "published", "mixup-0.3", "ensemble")
    found.runs = {row: found.runs[row] for row in rows}
    for seed, one in found.runs["mixup-0.3"].items():
        assert seed >= 3
        assert one["row"] == "mixup-0.3"
    others = ("digits", "photographs", "streets")
    return {"pretrained": found} | {name: Kept(run.RESULTS / f"{name}.zip") for name in others}


def test_readmes_table_has_four_rows_and_a_dash_where_a_row_is_missing(fine_tuned):
    lines = page.readme(fine_tuned).splitlines()
    assert [cell.split("(")[0].strip() for cell in lines[0].split("|")[2:-1]] == [
        "fine-tuned photographs",
        "digits",
        "photographs",
        "street scenes",
    ]
    assert sum(line.startswith("|") for line in lines) == 6
    assert " - " not in lines[4]
    del fine_tuned["pretrained"].runs["adaptive"]
    del fine_tuned["pretrained"].runs["bce"][3]
    lines = page.readme(fine_tuned).splitlines()
    assert lines[4].split("|")[2] == " - "
    assert lines[2].split("|")[2] != " - "


def test_a_fine_tuned_network_is_told_with_any_number_of_seeds(fine_tuned):
    kept, k = {"pretrained": fine_tuned["pretrained"]}, fine_tuned["pretrained"]
    assert "**" in answers.fine_tuned(kept).table
    assert "mixup 0.3" in answers.fine_tuned(kept).table
    assert k.row("mixup") == "mixup-0.3"
    k.runs = {row: {3: runs[3]} for row, runs in k.runs.items()}
    assert answers.fine_tuned(kept).line.startswith("Not shown: one seed; its NLL against plain")
    k.runs = {"bce": k.runs["bce"]}
    assert answers.fine_tuned(kept).line == "Not shown: plain BCE alone was run."
    assert answers.fine_tuned({}).line == answers.NOT_RUN


def test_no_advice_for_what_harms(fine_tuned):
    before = answers.take(fine_tuned)
    assert "`SCBCEWithLogitsLoss.moderation(0.2, prior=base_rate)` (lower on" in before
    k = fine_tuned["pretrained"]
    for one in k.runs["moderation-base-0.2"].values():
        one["last"]["test"]["raw"]["nll"] *= 2
    for seeds in (5, 1):  # a single one is enough to withhold it
        for row, runs in k.runs.items():
            k.runs[row] = dict(list(runs.items())[:seeds])
        told = answers.slopes(fine_tuned).line
        assert told.startswith("Not always") == (seeds > 1), told  # a family takes two seeds
        assert ("not on fine-tuned photographs" in told) == (seeds > 1)
        after = answers.take(fine_tuned)
        assert "moderation(0.2, prior=base_rate)` (lower on" not in after
        assert "moderation(0.2, prior=base_rate)` (higher on fine-tuned photographs)" in after
        assert "`AdaptivePerturbation(num_samples)` (lower on" in after
