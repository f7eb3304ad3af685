"""The rule of the levels, as pure functions: no module, no state."""

import math

import numpy as np
import pytest
import torch
from devices import seeded, tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.testing import assert_close

from sc_bce import levels
from sc_bce.levels import Epoch, Rule

OBJECTIVES = ("calibration", "max_entropy", "feedback")
FEWEST = int(torch.get_default_device().type == "xla")  # which has no cumulative sum of nothing
SOLVERS = ("proximal", "explicit")
priors = st.floats(0.02, 0.98)


def rule(objective="calibration", lr=0.002, penalty=2000.0, solver="proximal", reference=None):
    return Rule(objective, lr, penalty, solver, reference)


def epoch(steps=1, accuracy=0.9, best=0.9, budget=0.1, difficulty=1.0):
    single = (torch.tensor(value) for value in (accuracy, best, budget, difficulty))
    return Epoch(torch.tensor(steps), *single, torch.tensor(True))


def one(value):
    return torch.tensor([value], dtype=torch.float64)


def climb(alpha, gradient, budget, kappa, high, accuracy=0.9, best=0.9, **options):
    """The level after one step, in float64."""
    state = epoch(accuracy=accuracy, best=best)
    moves = levels.climb(rule(**options), 1.0, kappa, high)
    new = levels.climbed(moves, one(alpha), one(gradient), one(budget), state)
    assert new.shape == (1,)
    return float(new)


# --- cap and cost -----------------------------------------------------------------------------


@given(priors, st.floats(0.01, 1))
def test_the_cap_leaves_both_labels_on_their_side(prior, share):
    beta = share / max(prior, 1 - prior)
    cap = levels.cap(beta, prior)
    strength = cap * beta
    assert strength * prior < 0.5
    assert strength * (1 - prior) < 0.5
    assert cap == 1 or max(prior, 1 - prior) * (cap + 0.01) * beta == pytest.approx(0.5)
    assert float(levels.cap(beta, torch.tensor([0.5, prior]))) == pytest.approx(cap, rel=1e-5)


def test_the_cap_by_hand():
    assert levels.cap(2.0, 0.5) == 0.49
    assert levels.cap(1.0, 0.5) == 0.99
    assert levels.cap(0.5, 0.5) == levels.cap(0.1, 0.5) == 1.0
    assert levels.cap(1.0, 0.1) == pytest.approx(1 / 1.8 - 0.01)
    assert float(levels.cap(1.0, torch.tensor([0.5, 0.1, 0.4]))) == pytest.approx(1 / 1.8 - 0.01)
    assert float(levels.cap(1.0, torch.tensor([0.0, 1.0]))) == pytest.approx(0.49)


@given(seeds, st.floats(0.05, 1), st.integers(1, 4))
def test_the_cost_is_a_mean_over_the_labels_counted(seed, beta, columns):
    rng = np.random.default_rng(seed)
    prior = rng.uniform(0, 1, columns).astype(np.float32)
    labels = [rng.random(int(rng.integers(0, 9))).round(int(rng.integers(0, 3))) for _ in prior]
    costs = [1 - c if y >= 0.5 else c for c, ys in zip(prior, labels, strict=True) for y in ys]
    counts = torch.tensor(
        [[len(ys) for ys in labels], [0] * columns, [int((ys >= 0.5).sum()) for ys in labels]]
    )
    want = beta * np.mean(costs) if costs else 0.0
    got = levels.cost(beta, tensor(prior), counts)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(want, abs=1e-6)
    alike = torch.full((columns,), 0.3)
    assert float(levels.cost(beta, 0.3, counts)) == pytest.approx(
        float(levels.cost(beta, alike, counts)), abs=1e-6
    )
    assert levels.cost(beta, 0.5, counts) == beta / 2  # whatever was counted


def test_the_base_rate_is_kept_off_0_and_1_and_counts_beyond_float32():
    part = levels.FRACTION
    counts = torch.tensor([[0, 8, 8, 4], [0, 0, 8 * part, part // 4], [0, 0, 8, 0]])
    rates = levels.base_rate(counts)
    assert rates.tolist() == pytest.approx([0.5, 0.5 / 9, 8.5 / 9, 0.75 / 5])
    assert rates.dtype == torch.float32
    many = torch.tensor([[2**40], [2**39 * part], [2**39]])
    assert levels.base_rate(many).tolist() == [0.5]
    # 2^40 + 2 labels more: 1 in float32 can't tell them.
    assert float(levels.cost(1.0, 0.25, many)) == pytest.approx(0.5)


# --- climb ------------------------------------------------------------------------------------


@given(
    st.floats(1e-3, 0.05), st.floats(1, 50), st.floats(0, 0.3), st.floats(-3, 8),
    st.floats(0.05, 1), st.floats(0, 1), st.sampled_from(["calibration", "feedback"]),
)  # fmt: skip
def test_both_solvers_have_one_fixed_point(lr, penalty, budget, gain, kappa, start, objective):
    """Where gain = penalty * (kappa alpha - budget), inside [0, high]."""
    high = 0.9
    rest = min(max((budget + gain / penalty) / kappa, 0.0), high) if gain > 0 else 0.0
    for solver in SOLVERS:
        options = dict(solver=solver, lr=lr, penalty=penalty, objective=objective)
        assert climb(rest, gain, budget, kappa, high, **options) == pytest.approx(rest, abs=1e-12)
        if gain < 1e-3:
            continue
        # and no other: from anywhere else a step goes towards it.
        away = start * high
        new = climb(away, gain, budget, kappa, high, **options)
        if abs(away - rest) > 1e-9:
            assert (new - away) * (rest - away) > 0 or new == away == high


@given(
    st.floats(1e-6, 1e3), st.floats(0, 1e6), st.floats(0, 0.45), st.floats(1e-3, 1e3),
    st.floats(1e-3, 1), st.floats(0, 1),
)  # fmt: skip
def test_the_proximal_solver_never_saws(lr, penalty, budget, gain, kappa, start):
    high = min(1.0, 0.49 / kappa)
    rest = min((budget + gain / penalty) / kappa, high) if penalty > 0 else high
    path = [start * high]
    for _ in range(30):
        path.append(climb(path[-1], gain, budget, kappa, high, lr=lr, penalty=penalty))
    path = np.array(path)
    assert (path >= 0).all()
    assert (path <= high).all()
    steps = np.diff(path)
    if path[0] <= rest:
        assert (steps >= -1e-9).all()
        assert (path <= rest + 1e-9).all()
    else:
        assert (steps <= 1e-9).all()
        assert (path >= rest - 1e-9).all()


@given(
    st.floats(1e-4, 0.1), st.floats(0, 100), st.floats(-0.45, 0.45), st.floats(-5, 5),
    st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 1),
)  # fmt: skip
def test_below_the_budget_doubt_climbs_alike_whatever_the_cost(
    lr, penalty, budget, slope, kappa, other, doubt
):
    """The gain of a level grows as its cost; in doubt neither is seen."""
    budget = abs(budget) + 1e3  # out of reach
    options = dict(lr=lr, penalty=penalty)
    one_step, twin = (
        k * climb(doubt / k, k * slope, budget, k, math.inf, **options) for k in (kappa, other)
    )
    assert twin == pytest.approx(one_step, rel=1e-9, abs=1e-12)
    assert one_step == pytest.approx(max(doubt + lr * slope, 0.0))


def test_at_a_cost_of_one_the_proximal_step_is_that_of_version_0_1():
    # c = .2 + .01 * 3; above the budget (c + 4 r) / (1 + 4).
    assert climb(0.2, 3.0, 0.5, 1.0, 0.49, lr=0.01) == pytest.approx(0.23)
    new = climb(0.2, 3.0, 0.1, 1.0, 0.49, lr=0.01, penalty=400.0)
    assert new == pytest.approx((0.23 + 4 * 0.1) / 5)
    # Of half the cost: h = .1 + .02 * 1.5, r + (h - r) / (1 + 8), back to a level by 1 / .5.
    new = climb(0.2, 1.5, 0.1, 0.5, 0.98, lr=0.01, penalty=400.0)
    assert new == pytest.approx((0.1 + (0.13 - 0.1) / 9) / 0.5)


def test_the_explicit_step_is_the_published_one_and_overshoots():
    new = climb(0.2, 3.0, 0.1, 0.5, 0.9, solver="explicit", lr=0.01, penalty=20.0)
    assert new == pytest.approx(0.2 + 0.01 * 3)  # half of .2 is the budget
    new = climb(0.6, 3.0, 0.1, 0.5, 0.9, solver="explicit", lr=0.01, penalty=20.0)
    assert new == pytest.approx(0.6 + 0.01 * (3 + 20 * (0.1 - 0.3)))
    assert climb(0.6, 3.0, 0.1, 0.5, 0.9, solver="explicit", penalty=2000.0) == 0.0
    path = [0.2]
    for _ in range(20):  # lr * penalty * kappa = 4 > 2
        path.append(climb(path[-1], 5.0, 0.05, 1.0, 0.49, solver="explicit"))
    steps = np.diff(path[-10:])
    assert (steps > 1e-3).any()
    assert (steps < -1e-3).any()


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 1), st.sampled_from([None, 0.8]))
def test_max_entropy_follows_what_accuracy_was_lost(accuracy, best, kappa, reference):
    best = max(accuracy, best)
    lost = min(accuracy - (best if reference is None else reference), 0.0)
    options = dict(objective="max_entropy", lr=0.01, penalty=20.0, reference=reference)
    for solver in SOLVERS:
        rate = 0.01 if solver == "explicit" else 0.01 / kappa**2
        new = climb(
            0.4, 3.0, -9.0, kappa, 0.9, accuracy=accuracy, best=best, solver=solver, **options
        )  # fmt: skip
        want = min(max(0.4 + rate * (3 + 20 * lost), 0.0), 0.9)
        assert new == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_at_no_cost_nothing_moves(objective, solver):
    nothing = torch.zeros(())
    for gain in (0.0, 3.0, -3.0):
        assert climb(0.3, gain, 0.1, nothing, 0.9, objective=objective, solver=solver) == 0.3
        new = climb(0.3, gain, 0.1, nothing, torch.tensor(0.9), objective=objective, solver=solver)
        assert new == 0.3


@given(seeds, st.sampled_from(OBJECTIVES), st.sampled_from(SOLVERS))
def test_numbers_and_tensors_climb_alike_and_stay_inside(seed, objective, solver):
    rng = np.random.default_rng(seed)
    alpha, gain = tensor(rng.random(9)) * 0.49, tensor(rng.normal(0, 99, 9))
    budget, kappa = tensor(rng.uniform(-0.45, 0.45, 9)), 0.75
    given_rule = rule(objective=objective, solver=solver)
    numbers = levels.climb(given_rule, 1.0, kappa, 0.49)
    tensors = levels.climb(given_rule, 1.0, torch.tensor(kappa), torch.tensor(0.49).double())
    new, same = (levels.climbed(m, alpha, gain, budget, epoch()) for m in (numbers, tensors))
    assert_close(same, new, atol=1e-7, rtol=0)
    assert new.min() >= 0
    assert new.max() <= 0.49


# --- budgets ----------------------------------------------------------------------------------


@given(seeds, st.floats(0.1, 4), st.floats(-0.45, 0.45))
def test_a_budget_is_shared_out_by_difficulty_and_clipped(seed, focus, budget):
    accuracy = tensor(np.random.default_rng(seed).random(7))
    hardness = (1 - accuracy) ** focus
    shares = levels.shared_out(focus, torch.tensor(budget), accuracy, hardness.mean())
    want = [min(budget * float(h / hardness.mean()), 0.45) for h in hardness]
    assert shares.tolist() == pytest.approx(want)
    if max(want) < 0.45:
        assert float(shares.mean()) == pytest.approx(budget)


def test_a_budget_is_equal_where_all_are_perfect():
    budget, perfect = torch.tensor(0.3), torch.ones(3)
    shares = levels.shared_out(2.0, budget, perfect, torch.tensor(0.0))
    assert shares.tolist() == pytest.approx([0.3] * 3)
    # The hardest of many: .3 * (1 / .1), held at .45.
    hard = levels.shared_out(1.0, budget, torch.tensor([0.0]), torch.tensor(0.1))
    assert hard.tolist() == pytest.approx([0.45])


def test_the_next_epoch_of_calibration_and_max_entropy():
    after = levels.next_epoch(rule(), epoch(3, 0.9, 0.92, 0.1, 0.7), 0.85, None, 0.2, 0.49)
    assert after.steps.dtype == torch.int64
    assert [float(value) for value in after] == pytest.approx([4, 0.85, 0.92, 0.15, 0.7, 1])
    after = levels.next_epoch(
        rule(objective="max_entropy"), epoch(3, 0.9, 0.92, 0.1, 0.7), 0.95, 0.99, 0.2, 0.49
    )  # fmt: skip
    assert [float(value) for value in after] == pytest.approx([4, 0.95, 0.95, 0.1, 0.7, 1])


@pytest.mark.parametrize(
    ("budget", "doubt", "gap", "highest", "want"),
    [
        (0.1, 0.3, 0.06, 0.49, 0.13),  # from the budget, which the levels have reached
        (0.3, 0.1, 0.06, 0.49, 0.13),  # from the doubt, where they still climb
        (-0.2, 0.1, 0.06, 0.49, 0.03),  # from 0, not from what piled up below
        (0.1, 0.0, -0.06, 0.49, -0.03),
        (0.4, 0.44, 0.5, 0.49, 0.45),  # never above .45
        (0.2, 0.3, 0.9, 0.25, 0.25),  # nor above the doubt at the cap
        (0.0, 0.0, -1.0, 0.49, -0.45),
        (0.1, None, 0.5, 0.49, 0.1),  # nothing was trained: it stays
    ],
)
def test_the_next_budget_of_feedback(budget, doubt, gap, highest, want):
    accuracy, confidence = (0.5, 0.5 + gap) if gap < 0.5 else (0.5 - gap / 2, 0.5 + gap / 2)
    if gap == -1.0:
        accuracy, confidence = 1.0, 0.0
    after = levels.next_epoch(
        rule(objective="feedback"), epoch(budget=budget), accuracy, confidence, doubt, highest
    )  # fmt: skip
    assert float(after.budget) == pytest.approx(want)


@pytest.mark.parametrize(
    ("level", "slope", "beta", "want"),
    [
        (0.1, 0.5, 1.0, 0.15),  # over-confident: 0.1 (1 - a) of strength more
        (0.1, 0.5, 2.0, 0.125),
        (0.1, 1.3, 1.0, 0.07),
        (0.1, 9.0, 1.0, 0.0),  # at most 0.1 of strength less
        (0.3, 9.0, 1.0, 0.2),
        (0.1, -4.0, 1.0, 0.2),  # nor more
        (0.45, 0.2, 1.0, 0.49),
        (0.1, math.nan, 1.0, 0.1),  # one class, or nothing: hold
        (0.3, math.inf, 1.0, 0.2),  # what a threshold separates could not be too sure
    ],
)
def test_the_shared_level_follows_the_slope(level, slope, beta, want):
    assert levels.shared_level(level, slope, beta, 0.49) == pytest.approx(want)


def test_difficulty_is_a_mean_over_the_samples_seen(monkeypatch):
    accuracy = torch.tensor([0.0, 0.5, 0.9, 1.0, 0.2])
    seen = torch.tensor([True, True, False, True, True])
    for chunk in (1 << 24, 2, 1):
        monkeypatch.setattr(levels, "_CHUNK", chunk)
        got = levels.mean_difficulty(2.0, accuracy, seen)
        assert float(got) == pytest.approx((1 + 0.25 + 0 + 0.64) / 4)
        assert got.dtype == torch.float32


def test_an_accuracy_is_remembered():
    assert levels.remembered(torch.tensor(0.5), torch.tensor(1.0)).item() == pytest.approx(0.55)


# --- repeated rows ----------------------------------------------------------------------------


@given(seeds, st.integers(FEWEST, 12), st.integers(1, 6))
def test_means_by_row_are_those_of_a_loop(seed, places, rows):
    rng = np.random.default_rng(seed)
    index, values = rng.integers(0, rows, places), rng.normal(size=places).astype(np.float32)
    valid = rng.random(places) < 0.7
    values[~valid] = rng.choice([np.nan, np.inf, 5.0], (~valid).sum())
    by_row = levels.mean_by_row(tensor(index), tensor(valid))
    mean = by_row.mean(tensor(values))
    for place, row in enumerate(index):
        here = [values[i] for i in range(places) if index[i] == row and valid[i]]
        assert bool(by_row.any[place]) == bool(here)
        assert float(by_row.places[place]) == len(here)
        assert float(mean[place]) == pytest.approx(np.mean(here) if here else 0.0, abs=1e-5)


def test_rows_beyond_two_keep_apart_where_a_sum_of_bools_is_a_bool(monkeypatch):
    # As on devices whose cumulative sum keeps the dtype unless it is told.
    plain = torch.Tensor.cumsum

    def keeps_its_dtype(self, dim, dtype=None):
        return plain(self, dim, dtype=self.dtype if dtype is None else dtype)

    monkeypatch.setattr(torch.Tensor, "cumsum", keeps_its_dtype)
    by_row = levels.mean_by_row(torch.tensor([7, 0, 4, 7, 4, 2]), torch.ones(6, dtype=torch.bool))
    mean = by_row.mean(torch.tensor([1.0, 2.0, 3.0, 5.0, 9.0, 8.0]))
    assert mean.tolist() == [3.0, 2.0, 6.0, 3.0, 6.0, 8.0]


# --- between processes ------------------------------------------------------------------------


def reductions(tables):
    """What `all_reduce` does on each of several ranks that run one after another.

    Each call of a rank is answered by the sum of what all ranks bring to this call, which is
    known from a first run that records what each rank brings.
    """
    brought = []
    for columns, moved in tables:
        calls = []
        levels.merged(columns, moved, lambda total, calls=calls: calls.append(total.clone()))
        brought.append(calls)
    sums = [sum(call) for call in zip(*brought, strict=True)]

    def of_one_rank():
        answers = iter(sums)
        return lambda total: total.copy_(next(answers))

    return of_one_rank


@given(seeds, st.integers(1, 4), st.integers(1, 7), st.integers(1, 8))
def test_a_row_becomes_the_mean_of_those_that_moved_it(seed, ranks, rows, chunk):
    rng = np.random.default_rng(seed)
    tables = []
    for _ in range(ranks):
        columns = {name: tensor(rng.random(rows)).float() for name in ("alpha", "beta")}
        tables.append((columns, tensor(rng.random(rows) < 0.5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "_CHUNK", chunk)
        reduce = reductions(tables)
        for columns, moved in tables:
            before = {name: column.clone() for name, column in columns.items()}
            new, anywhere = levels.merged(columns, moved, reduce())
            for name, column in columns.items():
                assert torch.equal(column, before[name])  # the table itself is left alone
                for row in range(rows):
                    values = [float(c[name][row]) for c, m in tables if m[row]]
                    want = sum(values) / len(values) if values else float(column[row])
                    assert float(new[name][row]) == pytest.approx(want, abs=1e-6)
                    assert bool(anywhere[row]) == bool(values)


def test_a_reduction_that_fails_leaves_the_table_whole():
    columns, moved = {"alpha": torch.tensor([0.1, 0.2])}, torch.tensor([True, False])
    calls = []

    def dies(total):
        calls.append(total)
        if len(calls) == 2:
            raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        levels.merged(columns, moved, dies)
    assert columns["alpha"].tolist() == pytest.approx([0.1, 0.2])
    assert moved.tolist() == [True, False]


def test_a_generator_of_one_process_is_left_alone_and_packs_to_one_size():
    generator = seeded(3)
    torch.rand(5, generator=generator)
    before = generator.get_state()
    levels.reseed(generator, torch.device("cpu"), None)
    assert torch.equal(generator.get_state(), before)
    packed = levels.packed(generator)
    assert packed.dtype == torch.uint8
    assert packed.shape == (16 + len(before),)
    other = torch.Generator()
    levels.unpack(packed, other)
    assert torch.equal(other.get_state(), before)
    # Saved by rank 3, of the seed that rank 0 would have had as 3 less.
    packed[8] = 3
    levels.unpack(packed, other)
    assert other.initial_seed() == (3 - 3) % 2**64


@pytest.mark.cpu_only("elsewhere the host does not look")
@given(st.integers(1, 4000), st.sampled_from([1, 8, 1000, 1 << 14, 1 << 40]), st.booleans(), seeds)
def test_rows_are_seen_to_be_distinct(count, stride, twice, seed):
    rng = np.random.default_rng(seed)
    rows = stride * rng.permutation(4 * count)[:count]
    if twice and count > 1:
        first, second = rng.choice(count, 2, replace=False)
        rows[first] = rows[second]
    assert levels.distinct(torch.from_numpy(rows)) == (len(np.unique(rows)) == count)
