"""The rules of the levels as pure functions: no module, no state."""

import math

import numpy as np
import pytest
import reference as ref
import torch
from devices import tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.testing import assert_close

from sc_bce.losses.rules import Climb, FollowSlope, base_rate, cap

priors = st.floats(0.02, 0.98)
OBJECTIVES = ("calibration", "max_entropy")


# -- cap and base rate


@given(priors, st.floats(0.01, 1))
def test_the_cap_leaves_both_labels_on_their_side(prior, share):
    beta = share / max(prior, 1 - prior)
    high = cap(beta, prior)
    assert high * beta * max(prior, 1 - prior) < 0.5
    assert high == 1 or max(prior, 1 - prior) * (high + 0.01) * beta == pytest.approx(0.5)
    assert cap(beta, torch.tensor([0.5, prior])) == pytest.approx(high, rel=1e-5)


def test_the_cap_by_hand():
    assert cap(2.0, 0.5) == 0.49
    assert cap(1.0, 0.5) == 0.99
    assert cap(0.5, 0.5) == cap(0.1, 0.5) == 1.0
    assert cap(1.0, 0.1) == pytest.approx(1 / 1.8 - 0.01)
    assert cap(1.0, torch.tensor([0.5, 0.1, 0.4])) == pytest.approx(1 / 1.8 - 0.01)
    assert cap(1.0, torch.tensor([0.0, 1.0])) == pytest.approx(0.49)


def test_the_base_rate_is_kept_off_0_and_1():
    rates = base_rate(torch.tensor([0.0, 8, 8, 4]), torch.tensor([0.0, 0, 8, 0.25]))
    assert rates.tolist() == pytest.approx([0.5, 0.5 / 9, 8.5 / 9, 0.75 / 5])


# -- the default rule


@pytest.mark.parametrize(
    ("mean", "slope", "beta", "want"),
    [
        (0.1, 0.5, 1.0, 0.15),  # over-confident: 0.1 (1 - b) of strength more
        (0.1, 0.5, 2.0, 0.125),
        (0.1, 1.3, 1.0, 0.07),
        (0.1, 9.0, 1.0, 0.0),  # at most 0.1 of strength less
        (0.3, 9.0, 1.0, 0.2),
        (0.1, -4.0, 1.0, 0.2),  # nor more
        (0.45, 0.2, 1.0, 0.49),
        (0.1, math.nan, 1.0, 0.1),  # one class, or nothing: hold
        (0.6, math.nan, 1.0, 0.49),  # but a cap that fell holds too
        (0.3, math.inf, 1.0, 0.2),  # what a threshold separates could not be too sure
        (0.3, -math.inf, 1.0, 0.4),
    ],
)
def test_the_mean_level_follows_the_slope(mean, slope, beta, want):
    assert FollowSlope().after_step(mean, slope, beta, 0.49) == pytest.approx(want)


@given(seeds, st.integers(1, 9), st.floats(0, 5), st.floats(0, 1), st.floats(0.1, 1))
def test_difficulty_shares_the_mean_out(seed, rows, focus, mean, high):
    rng = np.random.default_rng(seed)
    accuracy, seen = rng.random(rows), rng.random(rows) < 0.7
    seen[rng.integers(rows)] = True
    mean = min(mean, high)
    levels = FollowSlope(0.2, focus).levels(mean, high, tensor(accuracy), tensor(seen))
    hard = (1 - accuracy) ** focus
    want = np.minimum(np.where(seen, mean * hard / hard[seen].mean(), mean), high)
    np.testing.assert_allclose(levels.cpu().numpy(), want, rtol=1e-6, atol=1e-12)
    if want.max() < high:  # nothing was cut off
        assert levels[tensor(seen)].mean() == pytest.approx(mean)
    order = np.argsort(accuracy[seen])
    assert (
        np.diff(levels.cpu().numpy()[seen][order]) <= 1e-12
    ).all()  # never more for an easier one


@pytest.mark.parametrize("focus", [0.0, 2.0])
def test_samples_that_are_all_perfect_are_all_alike(focus):
    seen = torch.tensor([True, True, False])
    levels = FollowSlope(0.2, focus).levels(0.3, 0.9, torch.ones(3), seen)
    assert levels.tolist() == pytest.approx([0.3] * 3)


def test_an_accuracy_is_remembered_with_weight_nine_tenths():
    new = FollowSlope().remembered(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0]))
    assert new.tolist() == pytest.approx([0.55, 0.9])


@given(seeds, st.floats(0.3, 3), st.floats(0.02, 0.5), st.floats(0.05, 1))
def test_the_level_weighted_base_rate_keeps_the_mean_and_the_base_rate_does_not(
    seed, focus, rate, beta
):
    """E[q] = pi + beta E[a] (c - pi) - beta Cov(a, y), of whole samples of one label each."""
    rng = np.random.default_rng(seed)
    y = (rng.random(400) < rate).astype(float)
    y[:2] = 0, 1
    accuracy = np.where(y == 1, rng.uniform(0, 0.6, 400), rng.uniform(0.7, 1, 400))
    seen = torch.ones(400, dtype=torch.bool)
    alpha = FollowSlope(0.2, focus).levels(0.2, 0.49, tensor(accuracy), seen.to(tensor(y).device))
    alpha = alpha.cpu().numpy()
    pi = y.mean()

    def mean(c):
        q = ref.effective(y, alpha, beta, c).mean()
        covariance = np.mean(alpha * y) - alpha.mean() * pi
        assert q == pytest.approx(pi + beta * alpha.mean() * (c - pi) - beta * covariance)
        return q

    assert mean((alpha * y).sum() / alpha.sum()) == pytest.approx(pi)
    assert mean(pi) < pi  # hard positives lose the most


# -- the paper's rule


def step(objective, alpha, slope, cost, accuracy, best, lr=0.01, penalty=20.0):
    rule = Climb(objective, lr, penalty)
    single = (torch.tensor(value, dtype=torch.float64) for value in (accuracy, best))
    return rule.climbed(
        *(torch.tensor([v], dtype=torch.float64) for v in (alpha, slope)), cost, *single
    )


@given(
    st.floats(0, 1), st.floats(-9, 9), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1),
    st.sampled_from(OBJECTIVES),
)  # fmt: skip
def test_a_level_climbs_along_its_slope_and_the_constraint(alpha, slope, cost, a, b, objective):
    best = max(a, b)
    over = a - best if objective == "max_entropy" else 1 - a - cost * alpha
    want = alpha + 0.01 * (slope + 20 * min(over, 0))
    for given_cost in (cost, torch.tensor(cost, dtype=torch.float64)):
        new = step(objective, alpha, slope, given_cost, a, best)
        assert float(new) == pytest.approx(want, abs=1e-9)


def test_a_step_by_hand():
    # Half of .2 is the budget of .1: nothing pulls back.
    assert float(step("calibration", 0.2, 3.0, 0.5, 0.9, 0.9)) == pytest.approx(0.23)
    new = step("calibration", 0.6, 3.0, 0.5, 0.9, 0.9)
    assert float(new) == pytest.approx(0.6 + 0.01 * (3 + 20 * (0.1 - 0.3)))
    new = step("max_entropy", 0.6, 3.0, 0.5, 0.8, 0.9)
    assert float(new) == pytest.approx(0.6 + 0.01 * (3 - 20 * 0.1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_slope_that_is_not_finite_moves_nothing(objective, bad):
    assert float(step(objective, 0.3, bad, 0.5, 0.9, 0.9)) == 0.3


def test_a_step_that_overflows_moves_nothing():
    """Two of them in one row, up and down, would be nan on average."""
    rule, one = Climb(lr=1e15, penalty=0.0), torch.tensor(0.9)
    slopes = torch.tensor([1e30, -1e30, 1e-15])
    new = rule.climbed(torch.full((3,), 0.25), slopes, 0.5, one, one)
    assert new.tolist() == [0.25, 0.25, 1.25]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("slope", [0.0, 3.0, -3.0])
def test_at_no_cost_nothing_moves(objective, slope):
    assert float(step(objective, 0.3, slope, torch.zeros(()), 0.9, 0.9)) == 0.3


@given(seeds, st.floats(0.05, 1), st.integers(1, 4))
def test_the_cost_is_a_mean_over_the_labels_counted(seed, beta, columns):
    rng = np.random.default_rng(seed)
    prior = rng.uniform(0, 1, columns).astype(np.float32)
    labels = [rng.random(int(rng.integers(0, 9))).round(int(rng.integers(0, 3))) for _ in prior]
    costs = [y * (1 - c) + (1 - y) * c for c, ys in zip(prior, labels, strict=True) for y in ys]
    counts = [tensor([float(f(ys)) for ys in labels]).float() for f in (len, np.sum)]
    got = Climb().cost(beta, tensor(prior).reshape(columns, 1), *counts)
    assert float(got) == pytest.approx(beta * np.mean(costs) if costs else 0.0, abs=1e-6)
    alike = Climb().cost(beta, torch.full((columns,), 0.3), *counts)
    assert float(Climb().cost(beta, 0.3, *counts)) == pytest.approx(float(alike), abs=1e-6)
    assert Climb().cost(beta, 0.5, *counts) == beta / 2  # whatever was counted


def test_the_published_step_overshoots_and_comes_back():
    rule, path = Climb(), [torch.tensor([0.2])]
    for _ in range(20):  # lr * penalty * kappa = 4 > 2
        new = rule.climbed(path[-1], torch.tensor([5.0]), 1.0, *torch.full((2,), 0.95).unbind())
        path.append(new.clamp(0, 0.49))
    steps = np.diff([float(level) for level in path[-10:]])
    assert (steps > 1e-3).any()
    assert (steps < -1e-3).any()


REFUSED = [
    (lambda: FollowSlope(level=1.2), ValueError, r"`level` to be in \[0, 1\], but got 1.2"),
    (lambda: FollowSlope(level=math.nan), ValueError, "`level` .* but got nan"),
    (lambda: FollowSlope(level="0.2"), TypeError, r"`level` to be a number in \[0, 1\]"),
    (lambda: FollowSlope(focus=-1.0), ValueError, r"`focus` to be in \[0, 100\], but got -1"),
    (lambda: Climb("mc"), ValueError, "one of 'calibration', 'max_entropy', but got 'mc'"),
    (lambda: Climb(lr=0.0), ValueError, "`lr` to be above 0"),
    (lambda: Climb(lr=math.inf), ValueError, "`lr` to be in"),
    (lambda: Climb(penalty=-1), ValueError, "`penalty` to be in"),
]


@pytest.mark.parametrize(("call", "kind", "text"), REFUSED, ids=range(len(REFUSED)))
def test_a_rule_refuses_what_it_cannot_be(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_rules_are_values():
    assert FollowSlope() == FollowSlope(0.2, 1.0) != FollowSlope(0.2, 2.0)
    assert_close(torch.tensor(hash(Climb())), torch.tensor(hash(Climb("calibration", 0.002, 2e3))))
    with pytest.raises(AttributeError):
        FollowSlope().level = 0.3
