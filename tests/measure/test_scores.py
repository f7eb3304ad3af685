"""The numbers that come from the cells: line, curve, decomposition."""

import math

import numpy as np
import pytest
import reference as ref
import torch
from devices import array, tensor
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import seeds

from sc_bce import CalibrationHistogram
from sc_bce.measure import scores as measures
from sc_bce.measure.line import affine, lines
from sc_bce.measure.scores import Cells


def seen(z, y, **options):
    histogram = CalibrationHistogram(**options)
    histogram.update(torch.as_tensor(z), torch.as_tensor(y))
    return histogram


def overfitted(seed, n, scale=2.0, shift=0.0):
    """logits `scale` times too large and shifted, and labels of both classes"""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1.5, n)
    y = (rng.random(n) < ref.sigmoid(truth)).astype(np.int64)
    y[:2] = (0, 1)
    return scale * truth + shift, y


# --- a line ---------------------------------------------------------------------------------------


@given(seeds, st.integers(20, 300), st.floats(0.3, 5), st.floats(-3, 3))
def test_slope_and_intercept_are_the_logistic_fit(seed, n, scale, shift):
    z, y = overfitted(seed, n, scale, shift)
    assume(z[y == 0].max() > z[y == 1].min())  # what a threshold separates has no finite slope
    histogram = seen(z, y)
    a, b = ref.logistic(z, y)
    assert float(histogram.slope()) == pytest.approx(a, rel=2e-3, abs=2e-4)
    assert float(histogram.intercept()) == pytest.approx(b, rel=2e-3, abs=2e-3)
    # At a given slope, the mean probability becomes the base rate.
    b = float(histogram.intercept(slope=0.7))
    assert ref.sigmoid(0.7 * z + b).mean() == pytest.approx(y.mean(), abs=1e-4)


@pytest.mark.parametrize(("mean", "spread"), [(0, 1), (30, 5), (40, 5), (-60, 1), (0, 400)])
@pytest.mark.parametrize("rate", [0.01, 0.5, 0.65])
def test_a_shift_is_found_however_sure_the_logits_are(mean, spread, rate):
    rng = np.random.default_rng(0)
    z = mean + spread * rng.normal(size=2000)
    y = np.arange(2000) < 2000 * rate
    rng.shuffle(y)
    cells = Cells(*(torch.as_tensor(part, dtype=torch.float64) for part in (z, 0 * z + 1, y)))
    assert affine(cells, slope=0.0)[1] == pytest.approx(math.log(rate / (1 - rate)))
    slope, b = affine(cells, slope=1.0)
    assert slope == 1
    assert ref.sigmoid(z + b).mean() == pytest.approx(y.mean(), rel=1e-9)


def test_slope_and_intercept_equal_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    z, y = overfitted(0, 20_000, 3.0, 1.0)
    model = LogisticRegression(C=np.inf, tol=1e-10).fit(z.reshape(-1, 1), y)
    histogram = seen(z, y)
    assert float(histogram.slope()) == pytest.approx(float(model.coef_[0, 0]), rel=5e-4)
    assert float(histogram.intercept()) == pytest.approx(float(model.intercept_[0]), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0, 200.0])
def test_the_slope_of_any_size_of_logits(scale):
    z, y = overfitted(1, 30_000, 1.0)
    want = ref.logistic(z, y)[0]
    assert float(seen(scale * z, y).slope()) * scale == pytest.approx(want, rel=0.01)


def test_a_slope_without_an_answer():
    one = torch.ones(5)
    for z, y in ((torch.randn(5), one), (torch.randn(5), 0 * one), (one, torch.arange(5) % 2)):
        assert seen(z, y).slope().isnan()
        assert seen(z, y).intercept().isnan()
    assert CalibrationHistogram().slope().isnan()
    assert CalibrationHistogram().intercept(slope=1.0).isnan()
    assert seen(torch.randn(5), one).intercept(slope=1.0).isnan()
    # One logit still has a shift: logit(2/5) - 1.
    y = torch.tensor([0, 1, 0, 1, 0])
    assert float(seen(one, y).intercept(slope=1.0)) == pytest.approx(math.log(2 / 3) - 1, rel=1e-3)
    # Nothing between the classes: the likelihood has no end.
    z = torch.linspace(-2, 2, 10)
    assert float(seen(z, z > 0).slope()) == math.inf
    assert float(seen(z, z < 0).slope()) == -math.inf
    assert seen(z, z > 0).intercept().isnan()
    with pytest.raises(TypeError, match="`slope` to be a number"):
        seen(z, z > 0).intercept("1")


def test_a_line_through_the_origin():
    z, y = overfitted(3, 500, 2.0, 0.5)
    cells = Cells(*(tensor(part).double() for part in (z, np.ones(500), y)))
    a, b = affine(cells, bias=False)
    assert b == 0
    assert a == pytest.approx(ref.logistic(z, y, bias=False)[0], rel=1e-8)


def test_a_line_of_which_one_part_is_given():
    z = tensor([-1.0, 1.0]).double()
    cells = Cells(z, torch.full_like(z, 8), tensor([2.0, 6.0]).double())
    assert affine(cells, slope=1.0, bias=False) == (1.0, 0.0)
    assert affine(cells, slope=2.0) == (2.0, pytest.approx(0.0, abs=1e-9))


@pytest.mark.parametrize("value", [0.1, -1.7])
def test_equal_logits_determine_no_line_however_their_mean_is_rounded(value):
    for count in (1, 3, 7):
        z = torch.full((count + 1,), value, dtype=torch.float64)
        cells = Cells(z, torch.ones_like(z), torch.arange(count + 1).clamp(max=1).to(z))
        assert all(map(math.isnan, affine(cells)))
        a, b = affine(cells._replace(logit=0 * z), bias=False)
        assert math.isnan(a)
        assert b == 0


@given(seeds, st.integers(2, 9))
def test_the_line_of_each_row_is_that_of_the_row_alone(seed, cells):
    rng = np.random.default_rng(seed)
    z = np.sort(rng.normal(size=(7, cells)), 1) * rng.choice([0.1, 1.0, 30.0], (7, 1))
    n = rng.integers(0, 4, (7, cells)).astype(float)
    k = rng.binomial(n.astype(int), 0.4).astype(float)
    k[0], k[1], z[2] = 0, n[1], 0.5  # one class, the other, one logit
    rows = Cells(*(tensor(part).double() for part in (z, n, k)))
    for options in ({}, {"bias": False}, {"slope": 0.7}, {"slope": 2.0, "bias": False}):
        each = [affine(Cells(*row), **options) for row in zip(*rows, strict=True)]
        for found, alone in zip(lines(rows, **options), zip(*each, strict=True), strict=True):
            np.testing.assert_allclose(array(found), alone, rtol=1e-6, atol=1e-6)


def test_a_line_of_tiny_loss_is_found_to_the_end():
    """One wrong in 10^9 at either logit: the mean loss is 2e-8."""
    z = tensor([-1.0, 1.0]).double()
    positive = torch.tensor([1.0, 1e9 - 1], dtype=torch.float64)
    cells = Cells(z, torch.full_like(z, 1e9), positive)
    a, b = affine(cells)
    assert a == pytest.approx(math.log(1e9 - 1), rel=1e-6)
    assert b == pytest.approx(0.0, abs=1e-6)


# --- a curve --------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 60), st.integers(1, 20))
def test_isotonic_regression_is_the_minimax_formula(seed, n, values):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, values, n), rng.integers(0, 2, n)
    count, positive = np.bincount(x, minlength=values), np.bincount(x, y, minlength=values)
    blocks = measures.isotonic(tensor(count), tensor(positive))
    owner = np.searchsorted(blocks.first, x, side="right") - 1
    share = np.array(blocks.positive) / np.array(blocks.count)
    np.testing.assert_allclose(share[owner], ref.isotonic(x, y))
    assert sum(blocks.count) == n
    assert (np.diff(share) > 0).all()


def test_isotonic_regression_equals_scikit_learn():
    from sklearn.isotonic import IsotonicRegression

    z, y = overfitted(4, 5000)
    model = IsotonicRegression().fit(z, y)
    cells = Cells(*(tensor(part) for part in (z, np.ones(5000), y)))
    order = np.argsort(z)
    blocks = measures.isotonic(cells.count[order], cells.positive[order])
    got = np.repeat(np.array(blocks.positive) / blocks.count, np.array(blocks.count, dtype=int))
    np.testing.assert_allclose(got, model.predict(z[order]), rtol=1e-12)


# --- what is wrong --------------------------------------------------------------------------------


@given(seeds, st.integers(2, 80))
def test_decomposition_equals_its_definition_on_the_raw_data(seed, n):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(0, 3, n), rng.integers(0, 2, n)
    histogram = seen(z, y)
    for name, score, own in (
        ("log", ref.log_score, histogram.nll()), ("brier", ref.brier_score, histogram.brier())
    ):  # fmt: skip
        want = ref.decomposition(ref.sigmoid(z), y, score)
        got = histogram.decomposition(name)
        # Two elements in one cell are a tie here and none there.
        assert [float(part) for part in got] == pytest.approx(want, abs=0.05)
        assert float(got.miscalibration - got.discrimination + got.uncertainty) == pytest.approx(
            float(own), rel=1e-12
        )
        assert float(histogram.refinement(name)) == pytest.approx(want[2] - want[1], abs=0.05)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_decomposition_of_many_equals_its_definition(scale):
    from sklearn.isotonic import IsotonicRegression

    z, y = overfitted(5, 20_000, scale)
    p = IsotonicRegression().fit(z, y).predict(z)
    histogram = seen(z, y)
    rate = np.full(len(y), y.mean())
    for name, score in (("log", ref.log_score), ("brier", ref.brier_score)):
        own = ref.bce(z, y).mean() if name == "log" else score(ref.sigmoid(z), y)
        want = (own - score(p, y), score(rate, y) - score(p, y), score(rate, y))
        got = [float(part) for part in histogram.decomposition(name)]
        assert got == pytest.approx(want, abs=1e-3)


def test_decomposition_equals_model_diagnostics():
    scoring = pytest.importorskip("model_diagnostics.scoring")
    z, y = overfitted(6, 3000)
    p = ref.sigmoid(z)
    for name, score in (("log", scoring.LogLoss()), ("brier", scoring.SquaredError())):
        want = scoring.decompose(y, p, scoring_function=score, functional="mean")
        got = seen(z, y).decomposition(name)
        for part in got._fields:
            assert float(getattr(got, part)) == pytest.approx(float(want[part][0]), abs=1e-3)


def test_refinement_knows_a_repair_from_a_better_network():
    z, y = overfitted(7, 50_000)
    one, other = seen(z, y), seen(3 * z + 1, y)
    assert float(other.nll()) > float(one.nll()) + 0.1
    assert float(other.refinement()) == pytest.approx(float(one.refinement()), rel=1e-3)
    noise = np.random.default_rng(0).normal(0, 2, len(z))
    assert float(seen(z + noise, y).refinement()) > float(one.refinement()) + 0.01


def test_refinement_keeps_the_digits_of_large_counts():
    """In float32 2^24 + 1 elements would be 2^24."""
    n, k = 2.0**24 + 1, 2.0**23 - 1
    blocks = measures.Blocks([0], [n], [k])
    assert float(measures.refined(blocks, "brier")) == pytest.approx(k / n * (1 - k / n), rel=1e-15)
    assert measures.refined(measures.Blocks([], [], []), "log").isnan()


def test_decomposition_of_labels_is_that_of_each():
    z, y = torch.randn(90, 3), torch.rand(90, 3) < torch.tensor([0.1, 0.5, 0.8])
    histogram = seen(z, y, num_labels=3)
    for score in ("log", "brier"):
        for label in range(3):
            want = histogram.label(label).decomposition(score)
            for part, value in zip(histogram.decomposition(score), want, strict=True):
                assert float(part[label]) == pytest.approx(float(value), rel=1e-12)


def test_decomposition_of_nothing_and_of_an_unknown_score():
    for part in CalibrationHistogram().decomposition():
        assert part.isnan()
    with pytest.raises(ValueError, match="`score` to be one of 'log', 'brier', but got 'nll'"):
        CalibrationHistogram().decomposition("nll")


# --- equal mass -----------------------------------------------------------------------------------


def test_the_sweep_goes_on_to_the_finest_bins():
    """Accuracy that rises from each element to the next: one bin for each, and a known ECE."""
    conf = np.array([0.55, 0.65, 0.75, 0.85, 0.95])
    y = np.array([0, 1, 1, 1, 1])
    histogram = CalibrationHistogram()
    histogram.update(tensor(conf), tensor(y), from_logits=False)
    assert float(histogram.sweep_ece()) == pytest.approx(ref.sweep(conf, y))
    assert float(histogram.sweep_ece()) == pytest.approx(np.abs(conf - y).mean())


def test_equal_mass_bins_count_beyond_int32_and_float32():
    """Of 2^31 + 2^25 + 1 elements a 32-bit count would turn over, a float32 one lose the last."""
    count = torch.tensor([[2**31, 2**25 + 1]])
    cells = measures.Bins(count, count.double() * 0.5, count.double() * 0.9)
    bins = measures.equal_mass(cells, 2)
    assert bins.count.dtype == torch.int64
    assert bins.total.tolist() == [2**31 + 2**25 + 1]
    assert bins.count.tolist() == [[2**31, 2**25 + 1]]
