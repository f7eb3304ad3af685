import itertools
import math
import warnings
from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
import torch._dynamo.testing
from devices import array, random, refused, rng_state, seeded, tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import MASKS, seeds
from tables import SETTING, assert_same, build, moving, saved, trained
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from sc_bce import AdaptivePerturbation, _batch, sc_bce_with_logits
from sc_bce._batch import Batch, label_counts, sample_means

# Tests that train more than an epoch's samples before they step.
unstepped = pytest.mark.filterwarnings("ignore:AdaptivePerturbation has trained past its warm-up")
# Tests that meet few of their rows.
sparse = pytest.mark.filterwarnings("ignore:since the last step the criterion saw")
# XLA compiles for each size anew, and has no cumulative sum of nothing.
ANY_SIZE = torch.get_default_device().type != "xla"
many_steps = pytest.mark.not_on("xla", "hundreds of steps, each slow there")
no_checkpoints = pytest.mark.not_on("xla", "torch.utils.checkpoint asks for torch.xla")
by_value = pytest.mark.cpu_only("an accelerator would wait for a look at the values")
OBJECTIVES = ("calibration", "max_entropy", "feedback")
SOLVERS = ("proximal", "explicit")
moving_betas = st.floats(0.05, 2)


def table(criterion):
    return array(criterion.alpha.double())


# --- against the reference --------------------------------------------------------------------


@st.composite
def targets_of_perturbation(draw, rng):
    """A prior in one of its forms, for an input (N, 2, 3), with a strength that it allows."""
    form = draw(st.sampled_from(["half", "number", "(2, 1)", "(2, 3)", "observed", "by label"]))
    if form in ("observed", "by label"):
        labels = 2 if form == "by label" else None
        return dict(prior="observed", num_labels=labels, beta=draw(st.floats(0.05, 1)))
    if form in ("half", "number"):
        prior = 0.5 if form == "half" else draw(st.floats(0.02, 0.98))
        farthest = max(prior, 1 - prior)
    else:
        prior = rng.uniform(0, 1, (2, 1) if form == "(2, 1)" else (2, 3)).astype(np.float32)
        prior.flat[0] = draw(st.sampled_from([prior.flat[0], 0.0, 1.0]))
        farthest = float(np.maximum(prior, 1 - prior).max())
    beta = draw(st.floats(0.05, 1)) / farthest * (1 - 1e-6)
    return dict(prior=prior, num_labels=None, beta=beta)


@unstepped
@sparse
@pytest.mark.filterwarnings("ignore:at the levels reached, pos_weight")
@given(
    st.data(), seeds, st.sampled_from(OBJECTIVES), st.sampled_from(SOLVERS),
    st.sampled_from([0.0, 1.0, 2.5]),
)  # fmt: skip
def test_table_follows_the_reference(data, seed, objective, solver, focus):
    rng = np.random.default_rng(seed)
    rows = data.draw(st.integers(1, 6))
    given_prior = data.draw(targets_of_perturbation(rng))
    options = dict(
        objective=objective, solver=solver, focus=focus,
        lr=data.draw(st.sampled_from([0.002, 0.02])),
        penalty=data.draw(st.sampled_from([0.0, 10.0, 200.0])),
        warmup=data.draw(st.integers(0, 2)),
        reference_accuracy=data.draw(st.sampled_from([None, 0.8])),
        **given_prior,
    )  # fmt: skip
    sampling = data.draw(st.sampled_from(["sample", "element", "expected"]))
    weighted, ignored, soft = (data.draw(st.booleans()) for _ in range(3))
    weight = rng.uniform(0.5, 2, 3) if weighted else None
    prior = options["prior"]
    of_module = {**options, "prior": tensor(prior) if np.ndim(prior) else prior}
    criterion = build(
        rows, sampling=sampling, ignore_index=-1 if ignored else None,
        weight=None if weight is None else tensor(weight),
        pos_weight=torch.tensor(3.0).double(), **of_module,
    )  # fmt: skip
    want = ref.Table(rows, **options)
    for _ in range(4):
        for _ in range(2):
            n = int(rng.integers(0, 8)) if ANY_SIZE else 7
            index = rng.integers(0, rows, n)
            x = rng.normal(0, 8, (n, 2, 3))
            y = rng.random(x.shape) if soft else rng.integers(0, 2, x.shape).astype(float)
            valid = rng.random(x.shape) < 0.5 if ignored else np.ones(x.shape, dtype=bool)
            target = tensor(np.where(valid, y, -1.0))
            criterion(tensor(x), target, tensor(index))
            want.observe(index, x, y, valid, 1.0 if weight is None else weight)
            np.testing.assert_allclose(table(criterion), want.alpha, rtol=1e-4, atol=1e-5)
        accuracy, confidence = rng.random(2)
        criterion.step(float(accuracy), torch.tensor(confidence))
        want.step(accuracy, confidence)
        np.testing.assert_allclose(table(criterion), want.alpha, rtol=1e-4, atol=1e-5)
        assert float(criterion.epoch.budget) == pytest.approx(want.budget, abs=1e-5)
        assert float(criterion.doubt) == pytest.approx(want.doubt, abs=1e-5)
        np.testing.assert_allclose(array(torch.as_tensor(criterion.prior)), want.shown, atol=1e-6)
        strength = want.beta * want.mean_level(want.ever)
        for got, share in zip(criterion.flip_rates, (want.shown, 1 - want.shown), strict=True):
            np.testing.assert_allclose(
                array(got), np.reshape(strength * share, got.shape), atol=1e-5
            )
    assert criterion.alpha.min() >= 0
    exact = isinstance(prior, float)
    assert criterion.alpha.max() <= np.float32(want.cap) + (0 if exact else 1e-6)


@given(seeds, st.floats(0.05, 1), st.sampled_from(["half", "number", "per label"]))
def test_the_level_climbs_along_the_derivative_of_the_loss(seed, share, form):
    rng = np.random.default_rng(seed)
    x, y = tensor(rng.normal(0, 3, (2, 4))), tensor(rng.random((2, 4)))
    weight = tensor(rng.random(4))
    prior = {"half": 0.5, "number": float(rng.uniform(0.02, 0.98))}.get(form)
    prior = tensor(rng.uniform(0, 1, 4).astype(np.float32)) if prior is None else prior
    farther = torch.maximum(torch.as_tensor(prior), 1 - torch.as_tensor(prior)).max()
    beta = share * (1 - 1e-6) / float(farther)
    alpha = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = sc_bce_with_logits(x, y, alpha, beta, prior=prior, weight=weight, reduction="none")
    loss.mean(1).sum().backward()
    options = dict(beta=beta, prior=prior, weight=weight, lr=0.01, penalty=0.0)
    criterion = build(2, warmup=1, **options, solver="explicit")
    criterion.update(x, y, torch.tensor([0, 1]))  # whose labels are counted
    criterion.step(1.0)
    criterion(x, y, torch.tensor([0, 1]))
    cap = min(1, 1 / (2 * float(farther) * beta) - 0.01)
    want = (0.01 * alpha.grad).clamp(0, cap)
    assert_close(criterion.alpha.double(), want, rtol=1e-5, atol=1e-7)


@given(seeds, st.floats(0.2, 1), st.sampled_from([0.5, 0.1]))
def test_the_proximal_solver_climbs_alike_in_doubt_whatever_the_strength(seed, share, prior):
    rng = np.random.default_rng(seed)
    x, y = tensor(rng.normal(0, 2, (4, 5))), tensor(rng.random((4, 5)))
    doubts = []
    for beta in (1 / max(prior, 1 - prior), share / max(prior, 1 - prior)):
        criterion = build(4, beta=beta, prior=prior, lr=0.002, penalty=20.0, warmup=1)
        criterion.update(x, y, torch.arange(4))
        criterion.step(0.4)  # a budget that is not reached
        path = []
        for _ in range(6):
            criterion.update(x, y, torch.arange(4))
            path.append(criterion.alpha * float(criterion.doubt) / float(criterion.alpha.mean()))
        assert float(criterion.alpha.max()) < float(criterion._cap)
        doubts.append(torch.stack(path).nan_to_num())
    assert_close(doubts[1], doubts[0], rtol=1e-4, atol=1e-6)


@given(seeds)
def test_a_sample_met_twice_takes_one_step_with_the_mean_gradient(seed):
    rng = np.random.default_rng(seed)
    x = tensor(rng.normal(3, 3, 5))
    y = torch.ones(5)
    twice = moving(4)
    twice(x, y, torch.tensor([2, 0, 2, 2, 1]))
    once = moving(4)
    once(torch.stack((x[1], x[4], x[[0, 2, 3]].mean())), y[:3], torch.tensor([0, 1, 2]))
    assert_close(twice.alpha, once.alpha)


@given(seeds, st.sampled_from(OBJECTIVES))
def test_order_and_grouping_of_samples_do_not_matter(seed, objective):
    rng = np.random.default_rng(seed)
    x, y = tensor(rng.normal(2, 4, (6, 3))), tensor(rng.random((6, 3)))
    index = tensor(rng.permutation(9)[:6])
    whole, shuffled, alone = (moving(9, objective=objective) for _ in range(3))
    order = tensor(rng.permutation(6))
    whole(x, y, index)
    shuffled(x[order], y[order], index[order])
    for i in range(6):
        alone(x[i : i + 1], y[i : i + 1], index[i : i + 1])
    assert_close(shuffled.alpha, whole.alpha, rtol=0, atol=0)
    assert_close(alone.alpha, whole.alpha, rtol=0, atol=0)
    absent = torch.ones(9, dtype=torch.bool)
    absent[index] = False
    assert (whole.alpha[absent] == 0).all()


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_is_the_kernel_at_the_levels_held_before(reduction):
    weights = dict(weight=torch.rand(3), pos_weight=torch.rand(3), reduction=reduction)
    criterion = moving(5, sampling="expected", ignore_index=255, **weights)
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.tensor([[0, 1, 255]]).expand(4, 3).byte()
    index = torch.tensor([4, 0, 2, 1], dtype=torch.int32)
    for _ in range(3):
        held = criterion.alpha.clone()
        loss = criterion(10 * x, y, index)
        want = sc_bce_with_logits(10 * x, y, held[index.long()], 2.0, ignore_index=255, **weights)
        assert_close(loss, want, rtol=0, atol=0)
        grads = [torch.autograd.grad(one.sum(), x)[0] for one in (loss, want)]
        assert_close(*grads, rtol=0, atol=0)
        assert not torch.equal(criterion.alpha, held)


@pytest.mark.parametrize("sampling", ["sample", "element"])
def test_draws_follow_each_samples_level(sampling):
    criterion = moving(2, sampling=sampling, lr=1e-9, reduction="none")
    criterion.alpha.copy_(torch.tensor([0.0, 0.4]))
    x = torch.ones(20_000, 2)
    index = torch.arange(20_000) % 2
    flipped = criterion(x, torch.ones_like(x), index) > 1
    assert not flipped[index == 0].any()
    share = flipped[index == 1].float().mean()
    assert float(share) == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / 10_000))
    whole = (flipped[:, 0] == flipped[:, 1]).all()
    assert bool(whole) == (sampling == "sample")


def test_generator_decides_the_draws():
    x, y, index = torch.randn(50, 2), torch.rand(50, 2), torch.arange(50)
    before = rng_state()
    losses = []
    for seed in (1, 1, 2):
        criterion = moving(50, generator=seeded(seed))
        criterion.alpha.fill_(0.4)
        losses.append(criterion(x, y, index))
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(rng_state(), before)


def test_eval_and_no_grad_are_plain_bce_and_touch_nothing():
    criterion = moving(3, focus=1.0, generator=seeded(0))
    criterion.alpha.fill_(0.3)
    x, y = torch.randn(8, 2), torch.randint(0, 2, (8, 2))
    state = saved(criterion)
    want = torch.nn.functional.binary_cross_entropy_with_logits(x, y.float())
    with torch.no_grad():
        assert torch.equal(criterion(x, y), want)
        assert torch.equal(criterion(x, y, torch.arange(8)), want)
    criterion.eval()
    assert torch.equal(criterion(x, y), want)
    # An index of validation samples is accepted and not used, whatever it holds.
    assert torch.equal(criterion(x, y, torch.tensor([99])), want)
    assert_same(criterion, state)


def test_warm_up_is_plain_bce_and_moves_nothing():
    criterion = build(4, warmup=5)
    x, y, index = torch.randn(4, 2), torch.rand(4, 2), torch.arange(4)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(x, y)
    for epoch in range(5):
        assert torch.equal(criterion(9 * x, y, index), plain) is False
        assert torch.equal(criterion(x, y, index), plain)
        assert (criterion.alpha == 0).all(), epoch
        criterion.step(0.9)
    criterion(x.abs() * 9, torch.ones(4, 2), index)  # epoch 6
    assert (criterion.alpha > 0).all()


@pytest.mark.parametrize("warmup", [0, 1])
def test_nothing_moves_before_the_first_step(warmup):
    criterion = build(1, warmup=warmup)
    x = torch.full((1, 1), 9.0)
    criterion(x, torch.ones(1, 1), torch.tensor([0]))
    assert criterion.alpha == 0
    criterion.step(0.9)
    criterion(x, torch.ones(1, 1), torch.tensor([0]))
    assert criterion.alpha > 0


def test_targets_that_learn_leave_the_table_without_a_graph():
    criterion = moving(2)
    target = torch.full((2, 3), 0.9, requires_grad=True)
    criterion(X, target, torch.tensor([0, 1])).backward()
    assert target.grad is not None
    assert not criterion.alpha.requires_grad
    assert (criterion.alpha > 0).all()


def test_one_shared_level_needs_no_index():
    shared = moving(None)
    x, y = torch.randn(6, 2) + 4, torch.ones(6, 2)
    shared(x, y)
    assert shared.alpha.shape == (1,)
    assert_close(shared.alpha, 0.002 * x.mean()[None])
    # An index is accepted, so that one loop serves both, and named once as not used.
    with pytest.warns(UserWarning, match="`index` is not used; pass num_samples=len") as caught:
        shared(x, y, torch.arange(100, 106))
    assert [one.filename for one in caught] == [__file__]
    # It is the table of one row.
    one = moving(1)
    one(x, y, torch.zeros(6, dtype=torch.int64))
    one(x, y, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(one.alpha, shared.alpha)
    shared(x, y, torch.arange(100, 106))  # no second warning


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_show_in_the_loss_and_spare_the_table(bad):
    criterion = moving(3, focus=1.0, sampling="expected", reduction="none")
    criterion.alpha.fill_(0.1)
    x = torch.tensor([[bad, 1.0], [5.0, 5.0], [5.0, bad]])
    loss = criterion(x, torch.ones(3, 2), torch.tensor([0, 1, 1]))
    assert not loss[0, 0].isfinite()
    assert criterion.alpha[0] == np.float32(0.1)
    assert criterion.sample_accuracy[0] == 0.5
    # Row 1 stood there twice; only its finite margin counts.
    twin = moving(3, focus=1.0, sampling="expected")
    twin.alpha.fill_(0.1)
    twin(x[1:2], torch.ones(1, 2), torch.tensor([1]))
    assert criterion.alpha[1] == twin.alpha[1] != np.float32(0.1)


def test_ignored_samples_keep_their_level():
    criterion = moving(3, ignore_index=255, sampling="expected", focus=1.0)
    x = torch.full((2, 4), 5.0)
    x[0, 0] = math.nan
    y = torch.ones(2, 4, dtype=torch.uint8)
    y[0], y[1, :2] = 255, 255
    criterion(x, y, torch.tensor([0, 2]))
    assert criterion.alpha[0] == criterion.alpha[1] == 0
    assert_close(criterion.alpha[2], torch.tensor(0.01))
    assert criterion.visited.tolist() == [0, 0, 2]


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_a_row_trained_stays_trained_whatever_it_meets_later(focus):
    criterion = moving(3, ignore_index=255, focus=focus)
    x, y = torch.full((2, 4), 5.0), torch.ones(2, 4)
    index = torch.tensor([0, 2])
    criterion(x, y, index)
    for void in (x * math.nan, x):
        criterion(void, torch.full((2, 4), 255.0), index)
        assert criterion.visited.tolist() == [2, 0, 2]
        criterion.step(0.9)
        assert criterion.visited.tolist() == [1, 0, 1]
        criterion(void, torch.full((2, 4), 255.0), index)
        assert criterion.visited.tolist() == [1, 0, 1]
        criterion.visited.copy_(torch.tensor([2, 0, 2]))
    criterion.step(0.9)
    criterion.step(0.9)
    assert criterion.visited.tolist() == [1, 0, 1]
    assert float(criterion.doubt) == pytest.approx(float(criterion.alpha[[0, 2]].mean()))


def test_one_half_is_positive_in_logit_and_label():
    criterion = build(4, beta=1.0, prior=torch.tensor([0.25]), focus=1.0, warmup=1)
    x = torch.tensor([[0.0], [0.0], [-1.0], [1.0]])
    y = torch.tensor([[1.0], [0.0], [0.5], [0.5]])
    criterion(x, y, torch.arange(4))
    right = [0.55, 0.45, 0.45, 0.55]
    assert criterion.sample_accuracy.tolist() == pytest.approx(right)
    assert criterion.fresh.flatten().tolist() == [4, 2 << 20, 3]


def test_scalars_and_empty_batches():
    criterion = moving(2, sampling="expected")
    criterion(torch.tensor(5.0), torch.tensor(1.0), torch.tensor(1))
    assert criterion.alpha.tolist() == pytest.approx([0, 0.01])
    if not ANY_SIZE:
        return
    loss = criterion(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert loss.isnan()
    assert criterion.alpha.tolist() == pytest.approx([0, 0.01])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_margins_of_any_precision_reach_a_float32_table(dtype):
    criterion = moving(1, sampling="expected", penalty=0.0)
    # 70,000 margins of 1: half precision would stop at 2048, or overflow at 65,504.
    x = torch.ones(1, 70_000, dtype=dtype)
    criterion(x, torch.ones(1, 70_000, dtype=torch.bool), torch.tensor([0]))
    assert criterion.alpha.dtype == torch.float32
    assert_close(criterion.alpha, torch.tensor([0.002]))


# --- dynamics ---------------------------------------------------------------------------------


@many_steps
@given(
    st.floats(1e-4, 1), st.floats(0.01, 1e5), st.floats(0.0, 0.4), st.floats(0.01, 10),
    moving_betas, st.floats(0, 1),
)  # fmt: skip
def test_the_proximal_solver_settles_at_its_fixed_point(lr, penalty, budget, margin, beta, start):
    """c = a + lr g; at rest lr g = lr penalty (beta a/2 - r), inside [0, cap]."""
    criterion = moving(
        1, accuracy=1 - budget, beta=beta, lr=lr, penalty=penalty, sampling="expected"
    )
    cap = min(1, 1 / beta - 0.01)
    criterion.alpha.fill_(start * cap)
    x, y, index = torch.full((1, 1), margin), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    gradient = beta / 2 * margin
    rest = min(max((budget + gradient / penalty) * 2 / beta, 0), cap)
    path = [float(criterion.alpha)]
    for _ in range(60):
        criterion(x, y, index)
        path.append(float(criterion.alpha))
        assert 0 <= path[-1] <= cap + 1e-6
    distance = np.abs(np.array(path) - rest)
    # Never farther from the fixed point, and never across it: no oscillation.
    assert (np.diff(distance) <= 1e-5).all()
    side = np.sign(np.array(path) - rest)[distance > 1e-4]
    assert len(set(side.tolist())) <= 1


@many_steps
def test_the_explicit_solver_saws_at_the_published_defaults():
    # lr * penalty * beta/2 = 4 > 2: the step overshoots and comes back.
    def run(solver):
        criterion = moving(1, accuracy=0.95, solver=solver, sampling="expected")
        x, y = torch.full((1, 1), 5.0), torch.ones(1, 1)
        levels = []
        for _ in range(60):
            criterion(x, y, torch.zeros(1, dtype=torch.int64))
            levels.append(float(criterion.alpha))
        return np.diff(levels[-20:])

    explicit, proximal = run("explicit"), run("proximal")
    assert (explicit > 1e-3).any()
    assert (explicit < -1e-3).any()
    assert np.abs(proximal).max() < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_below_the_budget_both_solvers_are_one(solver):
    criterion = moving(1, accuracy=0.5, solver=solver, sampling="expected")
    criterion(torch.full((1, 1), 5.0), torch.ones(1, 1), torch.tensor([0]))
    assert_close(criterion.alpha, torch.tensor([0.01]))


def test_max_entropy_climbs_while_accuracy_holds_and_falls_when_it_is_lost():
    criterion = moving(1, accuracy=0.9, objective="max_entropy", sampling="expected", penalty=20.0)
    x, y, index = torch.full((1, 1), 5.0), torch.ones(1, 1), torch.tensor([0])
    criterion(x, y, index)
    up = float(criterion.alpha)
    criterion.step(0.8)  # 0.1 below the best seen
    criterion(x, y, index)
    assert float(criterion.alpha) == pytest.approx(up + 0.002 * (5 - 20 * 0.1))
    given = moving(1, 0.9, objective="max_entropy", reference_accuracy=0.95, penalty=20.0)
    given(x, y, index)
    assert float(given.alpha) == pytest.approx(0.002 * (5 - 20 * 0.05))


@many_steps
@unstepped
@pytest.mark.parametrize(
    ("penalty", "margin"), list(itertools.product([200, 500, 1000, 2000], [1, 3, 10]))
)
def test_feedback_settles_where_confidence_is_accuracy(penalty, margin):
    """A network whose confidence follows the flip rate late, over-confident by 0.08."""
    criterion = build(
        8, objective="feedback", penalty=float(penalty), sampling="expected", lr=0.002
    )
    x, y, index = torch.full((8, 1), float(margin)), torch.ones(8, 1), torch.arange(8)
    accuracy, confidence = 0.87, 0.95
    gaps = []
    for _ in range(120):
        for _ in range(20):  # batches of an epoch
            criterion(x, y, index)
        # It moves three tenths of the way to what this flip rate will give.
        goal = 0.95 - 0.9 * float(criterion.flip_rate)
        confidence += 0.3 * (goal - confidence)
        criterion.step(accuracy, confidence)
        gaps.append(confidence - accuracy)
    assert max(abs(gap) for gap in gaps[-20:]) < 0.01
    assert min(gaps) > -0.03


@many_steps
def test_feedback_lets_the_level_fall_to_zero_on_an_underconfident_network():
    criterion = moving(1, 0.9, 0.95, objective="feedback", sampling="expected")
    criterion.alpha.fill_(0.05)
    criterion.visited.fill_(2)
    for _ in range(30):
        criterion.step(0.9, 0.7)
        criterion(torch.full((1, 1), 3.0), torch.ones(1, 1), torch.tensor([0]))
    assert criterion.epoch.budget == pytest.approx(-0.1)
    assert criterion.alpha == 0


def test_feedback_recovers_at_once_from_a_long_time_of_underconfidence():
    """Had the budget piled up at -0.45, the level would stay at 0 for nine more epochs."""
    criterion = moving(1, 0.9, 0.95, objective="feedback", sampling="expected")
    x, y, index = torch.full((1, 1), 3.0), torch.ones(1, 1), torch.tensor([0])
    for _ in range(30):
        criterion.step(0.9, 0.5)
        criterion(x, y, index)
    assert criterion.alpha == 0
    criterion.step(0.8, 0.9)
    criterion(x, y, index)
    assert float(criterion.epoch.budget) == pytest.approx(0.05)
    assert float(criterion.alpha) == pytest.approx(0.006)  # lr times margin, below the budget


@many_steps
@unstepped
def test_focus_softens_hard_samples_more():
    criterion = build(2, focus=2.0, warmup=3, sampling="expected")
    x = torch.tensor([[6.0, 6.0], [6.0, -1.0]])  # sample 1 is half wrong
    y, index = torch.ones(2, 2), torch.tensor([0, 1])
    for _ in range(30):
        for _ in range(10):
            criterion(x, y, index)
        criterion.step(0.9)
    easy, hard = criterion.alpha.tolist()
    assert hard > 3 * easy
    assert criterion.sample_accuracy.tolist() == pytest.approx([1, 0.5], abs=0.01)
    plain = moving(2)
    assert not hasattr(plain, "sample_accuracy")


def test_focus_survives_a_perfect_and_an_unseen_epoch():
    criterion = moving(2, focus=1.0, sampling="expected")
    assert criterion.epoch.difficulty == 0.5
    criterion.visited.fill_(1)
    criterion.sample_accuracy.fill_(1.0)
    criterion.step(0.9)
    criterion(torch.full((2, 1), 5.0), torch.ones(2, 1), torch.arange(2))
    assert criterion.alpha.tolist() == pytest.approx([0.01, 0.01])


@many_steps
def test_focus_gives_equal_samples_the_whole_budget_however_easy():
    criterion = moving(2, focus=10.0, sampling="expected")
    criterion.visited.fill_(1)
    criterion.sample_accuracy.fill_(0.97)
    criterion.step(0.9)
    for _ in range(60):
        criterion.sample_accuracy.fill_(0.97)
        criterion(torch.full((2, 1), 5.0), torch.ones(2, 1), torch.arange(2))
        criterion.sample_accuracy.fill_(0.97)
        criterion.epoch.difficulty.fill_((1 - 0.9 * 0.97 - 0.1) ** 10)  # what this forward reads
    assert criterion.alpha.tolist() == pytest.approx([0.1025, 0.1025], rel=1e-2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_extreme_step_sizes_stay_finite(objective, solver):
    criterion = moving(1, objective=objective, solver=solver, lr=1e15, penalty=1e15)
    for x in (3.0, -3.0, 1e38, 0.0):
        criterion(torch.full((1, 1), x), torch.ones(1, 1), torch.tensor([0]))
        assert 0 <= float(criterion.alpha) <= 0.49 + 1e-6


def test_focus_gives_no_sample_a_budget_above_the_largest():
    criterion = build(4, beta=1.0, focus=1.0, warmup=1, sampling="expected")
    criterion.visited.fill_(1)
    criterion.sample_accuracy.copy_(torch.tensor([0.0, 0.9, 0.9, 0.9]))
    criterion.step(0.6)  # a budget of .4, times 1 / mean(1, .1, .1, .1) = 3.1 for the first
    for _ in range(40):
        criterion.alpha.fill_(0.95)
        criterion.sample_accuracy[0] = 0.0
        criterion(torch.full((1, 1), -0.01), torch.ones(1, 1), torch.tensor([0]))
    # It is pulled towards .45 = beta alpha / 2, and not let rise to the cap of .49 / .5.
    assert float(criterion.alpha[0]) == pytest.approx(0.9 + 0.05 / (1 + 4 / 0.5), abs=1e-3)


def test_flip_rates_and_doubt_are_means_over_the_rows_ever_trained():
    criterion = build(4, beta=1.0)
    criterion.alpha.copy_(torch.tensor([0.0, 0.1, 0.2, 0.3]))
    # Before any was trained, over all: levels may have been written by hand.
    assert [float(criterion.doubt), float(criterion.flip_rate)] == pytest.approx([0.075, 0.075])
    criterion.visited.copy_(torch.tensor([0, 1, 2, 1]))
    assert criterion.flip_rate.shape == criterion.doubt.shape == ()
    assert float(criterion.flip_rate) == pytest.approx(0.1)
    assert float(criterion.doubt) == pytest.approx(0.1)
    assert [float(rate) for rate in criterion.flip_rates] == pytest.approx([0.1, 0.1])


def test_flip_rates_and_doubt_away_from_one_half():
    prior = torch.tensor([0.1, 0.25])
    criterion = build(4, beta=1.0, prior=prior, warmup=1)
    # Of eight labels one positive of the first and two of the second label.
    y = torch.tensor([[1, 0], [0, 1], [0, 0], [0, 1]])
    criterion(torch.zeros(4, 2), y, torch.tensor([0, 1, 0, 1]))
    assert float(criterion.doubt) == 0
    criterion.step(0.9)
    criterion.alpha.copy_(torch.tensor([0.2, 0.4, 0.9, 0.9]))  # two were never trained
    negative, positive = criterion.flip_rates
    assert negative.tolist() == pytest.approx([0.03, 0.075])
    assert positive.tolist() == pytest.approx([0.27, 0.225])
    kappa = (1 * 0.9 + 3 * 0.1 + 2 * 0.75 + 2 * 0.25) / 8
    assert float(criterion.doubt) == pytest.approx(0.3 * kappa)
    one = r"`prior` to be 1/2, given as a number.*but got a tensor, .*; read `flip_rates`, a pair"
    with pytest.raises(ValueError, match=one):
        criterion.flip_rate  # noqa: B018


@pytest.mark.parametrize("illegal", [math.nan, 1e9, -1e9])
@pytest.mark.parametrize("pixels", [5000, 1 << 19])  # the reference path, and the sweep
def test_an_illegal_label_never_spoils_the_observed_prior(illegal, pixels):
    criterion = build(1, prior="observed", beta=1.0, num_labels=2)
    criterion._seen.batches = 4  # past those of which every label is looked at
    y = torch.zeros(1, 2, pixels)
    y[:, :, : pixels // 4] = 1
    y[:, 0, -1] = illegal
    criterion.step(0.9)
    criterion(torch.zeros(1, 2, pixels), y, torch.tensor([0]))
    positives = [pixels // 4 + (illegal > 0), pixels // 4]
    assert criterion.fresh[1].tolist() == [count << 20 for count in positives]
    criterion.step(0.9)
    assert criterion.prior.tolist() == pytest.approx([0.25, 0.25], abs=1e-3)


def test_labels_are_counted_whether_their_values_can_be_read_or_not():
    """Elements, labels in parts of 2^-20, labels of at least 1/2: the sum where that is illegal."""
    for labels, want in (
        ([0.0, 0.25, 0.5, 1.0], [4, 7 << 18, 2]),
        ([0.0, 0.0], [2, 0, 0]),
        ([-1.0, 1.0], [2, 0, 1]),
        ([-0.25, 0.0, 0.0], [3, 0, 0]),
        ([7.0, 0.0, 0.25], [3, 1 << 20, 1]),
    ):
        for mode in (False, True):
            with torch.inference_mode(mode):  # whose tensors are not read
                batch = Batch(torch.zeros(len(labels)), torch.tensor(labels), True, None)
            for shape in ((), (1,)):
                assert label_counts(batch, shape)[:, 0].tolist() == want


def test_without_float64_each_label_is_counted_apart():
    with torch.inference_mode():
        y = torch.tensor([[0.25, 7.0], [0.5, -0.25], [1.0, math.nan]])
    with mock.patch.object(_batch, "_WITHOUT_FLOAT64", (y.device.type,)):
        counts = label_counts(Batch(torch.zeros(3, 2), y, True, None), (1, 2))
    assert counts.tolist() == [[3, 3], [7 << 18, 1 << 20], [2, 1]]


def test_means_of_a_vector_are_its_valid_values():
    means = sample_means(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
    assert means[[0, 2]].tolist() == [1.0, 3.0]
    assert means[1].isnan()


def test_the_observed_prior_counts_valid_labels_and_stays_fixed_between_steps():
    criterion = build(
        4, beta=1.0, prior="observed", num_labels=2, warmup=1, ignore_index=-1, sampling="expected"
    )
    assert criterion.prior.tolist() == [0.5, 0.5]
    y = torch.tensor([[1.0, -1.0], [0.0, 0.25], [0.0, 0.0], [1.0, -1.0]])
    x, index = torch.full((4, 2), 4.0), torch.arange(4)
    criterion(x, y, index)
    criterion(x, y, index, update=False)  # not a batch of its own: counts nothing
    criterion.eval()
    criterion(x, y)
    criterion.train()
    with torch.no_grad():
        criterion(x, y)
    assert criterion.prior.tolist() == [0.5, 0.5]
    assert criterion.fresh.tolist() == [[4, 2], [2 << 20, 1 << 18], [2, 0]]
    criterion.step(0.9)
    assert criterion.fresh.tolist() == [[0, 0]] * 3
    assert criterion.counts.tolist() == [[4, 2], [2 << 20, 1 << 18], [2, 0]]
    assert criterion.counts.dtype == criterion.fresh.dtype == torch.int64
    assert criterion.prior.tolist() == pytest.approx([2.5 / 5, 0.75 / 3])
    criterion(x, y, index)
    assert criterion.prior.tolist() == pytest.approx([0.5, 0.25])
    criterion.step(0.9)
    assert criterion.prior.tolist() == pytest.approx([4.5 / 9, 1.0 / 5])


def test_one_observed_prior_of_images():
    criterion = build(4, beta=1.0, prior="observed", warmup=1, sampling="expected")
    y = torch.zeros(4, 1, 5, 5)
    y[0, 0, 0, :4] = 1
    criterion(torch.zeros_like(y), y, torch.arange(4))
    criterion.step(0.9)
    assert criterion.prior.shape == ()
    assert float(criterion.prior) == pytest.approx(4.5 / 101)
    criterion.alpha.fill_(0.5)
    x = torch.randn(4, 1, 5, 5, requires_grad=True)
    loss = criterion(x, y, torch.arange(4))
    assert_close(loss, sc_bce_with_logits(x, y, 0.5, 1.0, prior=4.5 / 101))
    with pytest.raises(ValueError, match="`prior` to be 1/2"):
        criterion.flip_rate  # noqa: B018


def test_a_step_clips_the_levels_to_the_cap_of_the_new_prior():
    criterion = build(2, beta=1.0, prior="observed", warmup=1)
    criterion.alpha.fill_(0.9)  # below 1 / (2 * .5) - .01
    criterion(torch.zeros(2, 19), torch.zeros(2, 19), torch.arange(2))
    criterion.step(0.9)
    high = 1 / (2 * (1 - 0.5 / 39)) - 0.01
    assert criterion.alpha.tolist() == pytest.approx([high, high])


def test_a_prior_that_costs_nothing_moves_nothing():
    y = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    criterion = build(2, beta=1.0, prior=torch.tensor([0.0, 1.0]), warmup=1, sampling="expected")
    x = torch.tensor([[-3.0, 3.0], [3.0, 3.0]])
    for _ in range(3):
        loss = criterion(x, y, torch.arange(2))
        assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(x, y))
        criterion.step(0.9)
    assert criterion.alpha.tolist() == [0, 0]
    assert float(criterion.doubt) == 0


def test_the_published_setting_is_the_papers():
    criterion = AdaptivePerturbation.published(7)
    shown = {name: getattr(criterion, name) for name in SETTING}
    assert shown == SETTING | {"solver": "explicit"}
    other = AdaptivePerturbation.published(7, "max_entropy", warmup=2, ignore_index=255)
    assert (other.objective, other.warmup, other.ignore_index) == ("max_entropy", 2, 255)

    class Mine(AdaptivePerturbation):
        pass

    assert type(Mine.published(3)) is Mine


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampling", ["expected", "sample", "element"])
@pytest.mark.parametrize("prior", [0.5, torch.tensor([0.1, 0.2, 0.3]), "observed"], ids=str)
def test_a_training_forward_reads_no_value_off_the_cpu(objective, sampling, prior):
    """A meta tensor has no values: any look at one, where an accelerator would wait, raises."""
    options = dict(
        objective=objective, sampling=sampling, focus=2.0, ignore_index=255, beta=1.0, prior=prior
    )  # fmt: skip
    for solver in SOLVERS:
        criterion = moving(9, solver=solver, weight=torch.ones(3), **options).to("meta")
        x = torch.empty(4, 3, device="meta", requires_grad=True)
        index = torch.empty(4, device="meta", dtype=torch.int64)
        for dtype in (torch.uint8, torch.float32):
            y = torch.empty(4, 3, device="meta", dtype=dtype)
            criterion(x, y, index).backward()
            assert x.grad.is_meta
            criterion.update(x, y, index)
            assert criterion.doubt.is_meta


@pytest.mark.not_on("xla", "make_fx takes what it draws for constants")
@pytest.mark.parametrize("sampling", ["expected", "sample", "element"])
@pytest.mark.parametrize("prior", [0.5, "observed"])
def test_traces_and_fake_tensors_draw_too(sampling, prior):
    options = dict(sampling=sampling, prior=prior, beta=1.0, focus=1.0)
    batch = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3), torch.arange(4)
    criterion = moving(6, **options)
    criterion.alpha.fill_(0.3)
    torch.manual_seed(1)
    traced = make_fx(lambda *batch: criterion(*batch, update=False))(*batch)
    for _ in range(2):
        torch.manual_seed(2)
        want = criterion(*batch, update=False)
        torch.manual_seed(2)
        assert_close(traced(*batch), want, rtol=0, atol=0)
    make_fx(lambda *batch: criterion(*batch))(*batch)
    assert criterion.visited.tolist() == [2, 2, 2, 2, 0, 0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(one) for one in batch]
        loss = criterion(*fake)
        assert (loss.shape, loss.dtype) == ((), torch.float32)
    with FakeTensorMode():
        criterion = build(6, **options)
        x = torch.randn(4, 3, requires_grad=True)
        criterion(x, torch.rand(4, 3), torch.arange(4)).backward()
        assert x.grad.shape == (4, 3)


# --- learning apart ---------------------------------------------------------------------------

SETTINGS = [
    dict(),
    dict(focus=1.0, objective="feedback"),
    dict(beta=1.0, prior="observed", num_labels=3, focus=2.0),
    dict(beta=1.0, prior=0.2, solver="explicit"),
    dict(warmup=9, focus=1.0),
]


class Loop:
    """A network, and a table after an epoch; what a plain loop does with one batch."""

    def __init__(self, **options):
        torch.manual_seed(4)
        self.net = torch.nn.Linear(5, 3)
        self.x, self.index = 3 * torch.randn(4, 5), torch.tensor([2, 0, 5, 2])
        self.y = (torch.randn(4, 3) > 0).float()
        self.criterion = build(6, **{"warmup": 1, "sampling": "expected", **options})
        self.criterion.update(self.net(self.x), self.y, self.index)
        self.criterion.step(0.9, 0.95)
        self.criterion.alpha.fill_(0.1)

    def loss(self, logits, **options):
        return self.criterion(logits, self.y, self.index, **options)

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.net.parameters()))


@pytest.fixture(params=SETTINGS, ids=range(len(SETTINGS)))
def loops(request):
    """One for the plain loop, which has run, and one for what is to equal it."""
    plain, other = Loop(**request.param), Loop(**request.param)
    plain.loss(plain.net(plain.x))
    return plain, other


def assert_moved_once(plain, other):
    assert_same(other.criterion, saved(plain.criterion))
    assert other.criterion._seen.samples == plain.criterion._seen.samples == 4


def test_update_false_is_the_same_loss_and_moves_nothing(loops):
    plain, other = loops
    before = saved(other.criterion)
    logits = other.net(other.x)
    first, second = (other.loss(logits, update=False) for _ in range(2))
    assert_same(other.criterion, before)
    assert other.criterion._seen.samples == 0
    third = other.loss(logits)  # a loss logged three times
    assert first == second == third
    assert_moved_once(plain, other)


def test_update_alone_is_what_a_forward_moves(loops):
    plain, other = loops
    generator = other.criterion.generator = seeded(3)
    plain.criterion.generator = seeded(3)
    state = generator.get_state()
    assert other.criterion.update(other.net(other.x), other.y, other.index) is None
    assert_moved_once(plain, other)
    assert torch.equal(generator.get_state(), state)  # it draws nothing


@pytest.mark.not_on("xla", "it has no inference tensors")
def test_update_asks_for_no_mode(loops):
    plain, other = loops
    other.criterion.eval()
    with torch.inference_mode():
        logits = other.net(other.x)
        other.criterion.update(logits, other.y, other.index)
    assert_moved_once(plain, other)


@no_checkpoints
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_the_loss(loops, reentrant):
    plain, other = loops
    x = other.x.clone().requires_grad_()
    kept = []

    def step(x):
        logits = other.net(x)
        kept.append(logits.detach())
        return other.loss(logits, update=False)

    want = other.gradients(other.loss(other.net(other.x), update=False))
    torch.utils.checkpoint.checkpoint(step, x, use_reentrant=reentrant).backward()
    assert len(kept) == 2
    for parameter, gradient in zip(other.net.parameters(), want, strict=True):
        assert_close(parameter.grad, gradient, rtol=0, atol=0)
    other.criterion.update(kept[-1], other.y, other.index)
    assert_moved_once(plain, other)


def test_an_lbfgs_closure(loops):
    plain, other = loops
    logits = other.net(other.x).detach()
    optimizer = torch.optim.LBFGS(other.net.parameters(), max_iter=5)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = other.loss(other.net(other.x), update=False)
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    before = saved(other.criterion)
    optimizer.step(closure)
    assert len(calls) > 2
    assert calls[-1] < calls[0]
    assert_same(other.criterion, before)
    other.criterion.update(logits, other.y, other.index)
    assert_moved_once(plain, other)


def test_two_forwards_of_sharpness_aware_minimisation(loops):
    plain, other = loops
    gradients = other.gradients(other.loss(other.net(other.x)))
    with torch.no_grad():
        for parameter, gradient in zip(other.net.parameters(), gradients, strict=True):
            parameter += 0.05 * gradient
    other.loss(other.net(other.x), update=False).backward()
    assert_moved_once(plain, other)


def test_several_heads_on_one_table_climb_along_their_mean_slope(loops):
    plain, other = loops
    heads = [plain.net(plain.x) + shift for shift in (-2.0, 0.5, 1.5)]  # whose mean it is
    sum(other.loss(head, update=False) for head in heads).backward()
    other.criterion.update(sum(heads) / 3, other.y, other.index)
    assert other.criterion._seen.samples == 4
    assert_same(other.criterion, saved(plain.criterion), but=["alpha", "sample_accuracy"])
    assert_close(other.criterion.alpha, plain.criterion.alpha, rtol=1e-5, atol=1e-7)


def test_the_slope_of_the_mean_is_the_mean_of_the_slopes():
    criterion = moving(2, accuracy=0.2, beta=1.0, sampling="expected")  # a budget out of reach
    x, y = torch.randn(3, 2, 4), torch.tensor([[1.0], [0.0]]).expand(2, 4)
    slopes = ((y - 0.5) * x).mean((0, 2))
    criterion.alpha.fill_(0.5)
    criterion.update(x.mean(0), y, torch.arange(2))
    assert_close(criterion.alpha, 0.5 + 0.002 / 0.5**2 * slopes)


def test_deep_supervision_moves_levels_by_the_last_output(loops):
    plain, other = loops
    logits = other.net(other.x)
    for scale in (0.2, 0.5):
        other.loss(scale * logits, update=False)
    other.loss(logits)
    assert_moved_once(plain, other)


def test_a_forward_that_moves_nothing_counts_no_sample_twice():
    """Four losses per batch are no sign of a missing step, nor of an index that is a position."""
    criterion = build(8, warmup=1)
    for _ in range(3):
        for index in torch.arange(8).split(2):
            for _ in range(4):
                criterion(torch.zeros(2), torch.ones(2), index, update=False)
            criterion.update(torch.zeros(2), torch.ones(2), index)
        criterion.step(0.9)
    few = torch.tensor([1, 4])
    for _ in range(4):
        criterion(torch.zeros(2), torch.ones(2), few, update=False)
    criterion.update(torch.zeros(2), torch.ones(2), few)
    criterion.step(0.9)


@by_value
@pytest.mark.parametrize("index", [None, torch.arange(3), torch.tensor([0, 9])], ids=str)
def test_update_refuses_what_a_forward_refuses_and_moves_nothing(index):
    criterion = moving(3, focus=1.0)
    before = saved(criterion)
    with pytest.raises((ValueError, IndexError), match="`index`"):
        criterion.update(X, Y, index)
    with pytest.raises(ValueError, match="mask > 0"):
        criterion.update(X, (Y * 255).byte(), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="floating-point logits"):
        criterion.update(X.long(), Y, torch.tensor([0, 1]))
    assert_same(criterion, before)
    assert criterion._seen.samples == 0


# --- compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compile_fullgraph_moves_the_table(objective):
    generator = torch.Generator().manual_seed(3)  # whose numbers leave a level above 0
    options = dict(objective=objective, sampling="expected", focus=1.0, ignore_index=255)
    eager, compiled = moving(7, **options), moving(7, **options)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for epoch in range(2):
        for _ in range(3):
            x = random(torch.randn, generator, 4, 3).requires_grad_()
            y = random(torch.randint, generator, 0, 2, (4, 3)).byte()
            index = random(torch.randint, generator, 0, 7, (4,))
            losses = [one(5 * x, y, index) for one in (eager, call)]
            assert_close(*losses)
            assert_close(*[torch.autograd.grad(loss, x)[0] for loss in losses])
        assert_close(compiled.alpha, eager.alpha)
        for one in (eager, compiled):
            one.step(0.8 + 0.01 * epoch, 0.9)
    assert (compiled.alpha > 0).any()


@pytest.mark.not_on("xla", "it compiles for each size anyway")
def test_compile_does_not_repeat_over_epochs_and_batch_sizes():
    count = torch._dynamo.testing.CompileCounter()
    criterion = AdaptivePerturbation(100, warmup=1, sampling="sample", objective="feedback")
    compiled = torch.compile(criterion, fullgraph=True, backend=count, dynamic=True)
    frames = []
    for epoch in range(4):
        for size in (8, 8, 5):
            compiled(torch.randn(size, 3), torch.rand(size, 3), torch.randint(0, 100, (size,)))
        criterion.step(0.8 + 0.02 * epoch, 0.9)
        frames.append(count.frame_count)
    # One graph for the warm-up, one for after it.
    assert frames == [1, 2, 2, 2]


@pytest.mark.parametrize("prior", [0.2, torch.tensor([0.1, 0.2, 0.3]), "observed"], ids=str)
def test_compile_follows_a_prior_without_a_repetition(prior):
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    options = dict(sampling="expected", warmup=1, beta=1.0, prior=prior, focus=1.0)
    eager, compiled = (build(12, objective="feedback", **options) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True, backend=count)
    frames = []
    for epoch in range(4):
        for _ in range(3):
            x, y = 4 * torch.randn(4, 3), (torch.rand(4, 3) < 0.3).float()
            index = torch.randint(0, 12, (4,))
            assert_close(call(x, y, index), eager(x, y, index))
        for one in (eager, compiled):
            one.step(0.8 + 0.01 * epoch, 0.9)
        assert_close(compiled.alpha, eager.alpha)
        frames.append(count.frame_count)
    assert frames == [1, 2, 2, 2]
    assert torch.equal(compiled.counts, eager.counts)
    assert (compiled.alpha > 0).any()


def test_compile_of_a_forward_that_does_not_move_and_of_update():
    eager, compiled = moving(7, sampling="expected"), moving(7, sampling="expected")
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    x, y, index = 4 * torch.rand(4, 3), torch.ones(4, 3), torch.tensor([1, 6, 1, 2])
    for _ in range(2):
        assert_close(forward(x, y, index, update=False), eager(x, y, index, update=False))
        assert torch.equal(compiled.alpha > 0, eager.alpha > 0)
        update(x, y, index)
        eager.update(x, y, index)
        assert_close(compiled.alpha, eager.alpha)
    assert (compiled.alpha > 0).any()


@pytest.mark.not_on("xla", "inductor writes no code for it")
def test_compile_inductor_refuses_an_index_out_of_range():
    criterion = moving(6, sampling="expected")
    compiled = torch.compile(criterion, fullgraph=True)
    for wrong in (-1, 6):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            compiled(torch.full((2, 1), 3.0), torch.ones(2, 1), torch.tensor([0, wrong]))
    assert (criterion.alpha[1:] == 0).all()


@pytest.mark.not_on("xla", "inductor writes no code for it")
def test_compile_inductor_trains():
    criterion = moving(4)
    criterion.compile(fullgraph=True)
    x = torch.randn(4, 3, requires_grad=True)
    criterion(9 * x.abs(), torch.ones(4, 3), torch.arange(4)).backward()
    assert (criterion.alpha > 0).all()
    assert x.grad.isfinite().all()


# --- size and repr ---------------------------------------------------------------------------


def test_resize_keeps_what_is_there():
    criterion = moving(2, focus=1.0, sampling="expected")
    criterion(torch.full((2, 1), 5.0), torch.ones(2, 1), torch.arange(2))
    before = criterion.alpha.clone()
    criterion.resize(2)  # as large as it is
    assert torch.equal(criterion.alpha, before)
    criterion.resize(4)
    assert torch.equal(criterion.alpha, torch.cat((before, torch.zeros(2))))
    assert criterion.sample_accuracy.tolist() == pytest.approx([0.55, 0.55, 0.5, 0.5])
    assert criterion.visited.tolist() == [2, 2, 0, 0]
    criterion(torch.full((1, 1), 5.0), torch.ones(1, 1), torch.tensor([3]))
    assert criterion.alpha[3] > 0
    assert criterion.num_samples == 4
    with pytest.raises(ValueError, match="at least the table's 4, but got 3"):
        criterion.resize(3)
    with pytest.raises(ValueError, match="table's None"):
        build(None).resize(3)


def test_repr_summarises_the_table():
    criterion = build(4, ignore_index=255, reference_accuracy=0.9)
    criterion.alpha.copy_(torch.tensor([0.0, 0.1, 0.2, 0.1]))
    whole = (
        "AdaptivePerturbation(num_samples=4, beta=2.0, prior=0.5, objective='calibration', "
        "lr=0.002, penalty=2000.0, warmup=5, solver='proximal', focus=0.0, sampling='sample', "
        "reference_accuracy=0.9, ignore_index=255, reduction='mean', mean_alpha=0.1, "
        "above_zero=75%"
    )
    for steps in range(5):
        assert repr(criterion) == f"{whole}, warming up {steps}/5)"
        criterion.step(0.9)
    assert repr(criterion) == f"{whole})"
    assert ", warming up 0/1)" in repr(build(1, warmup=0))


def test_repr_shows_where_the_prior_comes_from():
    observed = build(4, beta=1.0, prior="observed", num_labels=3)
    assert ", beta=1.0, prior='observed', " in repr(observed)
    assert ", num_labels=3, " in repr(observed)
    assert ", prior=(3,), " in repr(build(4, beta=1.0, prior=torch.full((3,), 0.1)))
    assert "mean_alpha" not in repr(build(4).to("meta"))


# --- warnings and errors ----------------------------------------------------------------------


def test_training_past_the_warm_up_without_a_step_warns_once():
    criterion = build(4, warmup=2)
    x, y, index = torch.randn(4, 1), torch.ones(4, 1), torch.arange(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(x, y, index)
        criterion(x, y, index)
    with pytest.warns(UserWarning, match=r"step\(\) was never called.*plain BCE") as caught:
        criterion(x, y, index)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(x, y, index)


@many_steps
def test_a_stepped_table_never_warns(monkeypatch):
    criterion = build(1, warmup=100)
    criterion.step(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            criterion(torch.zeros(1), torch.ones(1), torch.tensor([0]))
    monkeypatch.setattr("sc_bce.adaptive._PATIENCE", 3)
    shared = build(None)
    for _ in range(3):
        shared(torch.zeros(5), torch.ones(5))
    with pytest.warns(UserWarning, match="never called"):
        shared(torch.zeros(5), torch.ones(5))


def test_an_index_that_is_a_position_warns_once_at_the_users_line():
    criterion = moving(6)
    for epoch in range(2):
        for _ in range(3):
            criterion(torch.zeros(2), torch.ones(2), torch.arange(2))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            criterion.step(0.9)
        assert [one.filename for one in caught] == [__file__] * (1 - epoch)
        text = (
            "since the last step the criterion saw 6 samples but only 2 of its 6 rows; pass the "
            "index of each sample in the dataset, as IndexedDataset yields it, not its position "
            "in the batch"
        )
        assert all(str(one.message) == text for one in caught)


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 1, 2, 0, 1], [5, 0, 3] * 4, []], ids=str)
def test_the_rows_of_a_fold_are_no_positions(rows):
    """Half of the rows, however often; or fewer, in an epoch cut short."""
    criterion = moving(6)
    for _ in range(3):
        if rows:
            criterion(torch.zeros(len(rows)), torch.ones(len(rows)), torch.tensor(rows))
        criterion.eval()  # and a validation with gradients, its samples without an index
        criterion(torch.zeros(50, requires_grad=True), torch.ones(50))
        criterion.train()
        with torch.no_grad():
            criterion(torch.zeros(50), torch.ones(50))
        criterion.step(0.9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_wholly_void_samples_are_no_positions(objective):
    """Partly annotated data: more than half of the rows are never moved."""
    criterion = build(10, objective=objective, warmup=1, ignore_index=255)
    x, y = torch.randn(10, 4), torch.randint(0, 2, (10, 4))
    y[4:] = 255
    for _ in range(3):
        for rows in torch.arange(10).split(5):
            criterion(x[rows], y[rows], rows)
        criterion.step(0.9, 0.95)


def test_a_small_subset_of_the_table_is_no_batch():
    criterion = moving(1000)
    for _ in range(3):
        criterion(torch.zeros(80), torch.ones(80), torch.arange(80))
        criterion.step(0.9)


def test_a_reset_forgets_what_was_seen():
    criterion = build(4, warmup=1)
    x, y, index = torch.zeros(4), torch.ones(4), torch.arange(4)
    for _ in range(3):  # an epoch each, and no step in between
        criterion(x, y, index)
        assert criterion._seen.batches == 1
        criterion.reset_parameters()
    assert (criterion._seen.batches, criterion._seen.samples) == (0, 0)


def test_an_epoch_resumed_before_its_end_never_warns():
    x, index = torch.zeros(20), torch.arange(20)
    criterion = moving(20)
    criterion.step(0.9)
    criterion(x, torch.ones(20), index)
    resumed = moving(20)
    resumed.load_state_dict(criterion.state_dict())
    resumed(x[:1], torch.ones(1), index[:1])  # one sample is left
    resumed.step(0.9)


def test_accumulation_and_short_epochs_never_warn():
    criterion = build(8, warmup=2)
    x = torch.zeros(2, requires_grad=True)
    for epoch in range(3):
        for index in torch.arange(8).split(2):
            (criterion(x, torch.ones(2), index) / 4).backward()
        if epoch == 2:
            break
        criterion.step(0.9)


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *batch):
        return self.inner(*batch)


def called_by_a_hook(criterion, *batch):
    net = torch.nn.Sequential(torch.nn.Identity())
    net.register_forward_hook(lambda module, given, output: criterion(output, *batch[1:]))
    return net(batch[0])


def checkpointed(criterion, *batch):
    return torch.utils.checkpoint.checkpoint(criterion, *batch, use_reentrant=False)


WAYS = {
    "plain": lambda criterion, *batch: criterion(*batch),
    "wrapped": lambda criterion, *batch: Wrapper(Wrapper(criterion))(*batch),
    "hook": called_by_a_hook,
    "checkpoint": checkpointed,
    "update": lambda criterion, *batch: criterion.update(*batch),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=no_checkpoints if way == "checkpoint" else ()) for way in WAYS]
)
def test_a_warning_names_the_users_line_whatever_lies_between(way):
    criterion = build(2, warmup=1)
    batch = torch.zeros(2, requires_grad=True), torch.ones(2), torch.arange(2)
    WAYS[way](criterion, *batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            WAYS[way](criterion, *batch)
    assert [one.filename for one in caught] == [__file__]
    with open(__file__) as file:
        line = file.readlines()[caught[0].lineno - 1]
    assert "criterion" in line or "self.inner(*batch)" in line


def make(**options):
    return lambda: build(**{"num_samples": 3, **options})


TENTH = torch.tensor([0.5, 0.1], device="cpu")  # elsewhere a look would wait
CONSTRUCTION = [
    (make(num_samples=0), ValueError, "`num_samples` to be a positive int, but got 0"),
    (make(num_samples=2.5), TypeError, "`num_samples` to be a positive int, but got 2.5"),
    (make(num_samples=True), TypeError, "`num_samples` to be a positive int"),
    (make(beta=0), ValueError, "`beta` to be above 0, but got 0"),
    (make(beta=2.1), ValueError, r"`beta` to be in \[0, 2\], but got 2.1"),
    (make(beta=math.nan), ValueError, "`beta` .* but got nan"),
    (make(prior=0.1, beta=1.2), ValueError, r"`beta` to be in \[0, 1.11111\], but got 1.2"),
    (make(prior=TENTH, beta=1.2), ValueError, r"`beta` to be in \[0, 1.11111\]"),
    (
        make(prior="observed", beta=2.0),
        ValueError,
        r"be at most 1 with the observed prior, but got 2.0; .* needs `prior=0.5`",
    ),
    (make(prior=0.0), ValueError, "`prior` to be between 0 and 1, but got 0"),
    (make(prior=1.5), ValueError, r"`prior` to be in \[0, 1\], but got 1.5"),
    (make(prior=[0.5]), TypeError, r"`prior` to be a number .* or a Tensor, but got list; pass"),
    (make(prior=11 * TENTH, beta=0.5), ValueError, r"`prior` to be in \[0, 1\], but got"),
    (make(prior=torch.tensor(1j), beta=0.5), TypeError, "`prior` to be a real Tensor"),
    (make(prior="rate", beta=1.0), ValueError, "`prior` to be one of 'observed', but got 'rate'"),
    (make(num_labels=0), ValueError, "`num_labels` to be a positive int, but got 0"),
    (make(prior=torch.full((3,), 0.2), num_labels=2), ValueError, "num_labels=2 values, .* 3"),
    (make(num_samples=None, focus=1.0), ValueError, "`focus` to be 0 if all samples share one"),
    (make(weight=2.0), TypeError, r"`weight` .*pass `torch.tensor\(2.0\)`"),
    (make(pos_weight=2.0), TypeError, r"`pos_weight` .*pass `torch.tensor\(2.0\)`"),
    (make(objective="mc"), ValueError, "'feedback', 'calibration', 'max_entropy', but got 'mc'"),
    (make(lr=0.0), ValueError, "`lr` to be above 0"),
    (make(lr=math.inf), ValueError, "`lr` to be in"),
    (make(penalty=-1), ValueError, "`penalty` to be in"),
    (make(warmup=-1), ValueError, "`warmup` to be an int, 0 or more, but got -1"),
    (make(warmup=1.5), TypeError, "`warmup` to be an int, 0 or more, but got 1.5"),
    (make(solver="newton"), ValueError, "'proximal', 'explicit', but got 'newton'"),
    (make(focus=-1.0), ValueError, "`focus` to be in"),
    (make(sampling="batch"), ValueError, "'expected', 'sample', 'element'"),
    (make(reference_accuracy=90), ValueError, r"`reference_accuracy` .* but got 90"),
    (make(ignore_index="void"), TypeError, "`ignore_index`"),
    (make(reduction="avg"), ValueError, "`reduction`"),
    (make(generator=1), TypeError, "`generator`"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), CONSTRUCTION, ids=range(len(CONSTRUCTION)))
def test_bad_configuration_is_refused_at_construction(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


X, Y = torch.full((2, 3), 5.0), torch.ones(2, 3)
FORWARD = [
    (None, ValueError, "in training, but got None; wrap .* IndexedDataset .* num_samples=None"),
    ([0, 1], TypeError, r"integer Tensor, but got list; pass `torch.as_tensor\(index\)`"),
    (torch.zeros(2), TypeError, "got torch.float32; pass `index.long"),
    (torch.zeros(2, dtype=torch.bool), TypeError, "got torch.bool"),
    (torch.arange(3), ValueError, r"shape \(2,\), but got shape \(3,\)"),
    (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"got shape \(2, 1\)"),
    pytest.param(
        torch.tensor([0, 3]),
        IndexError,
        r"\[0, 2\], but got 3; num_samples=3 .*Subset.*`resize`",
        marks=by_value,
    ),
    pytest.param(torch.tensor([-1, 0]), IndexError, r"\[0, 2\], but got -1", marks=by_value),
]


@pytest.mark.parametrize(("index", "kind", "text"), FORWARD, ids=range(len(FORWARD)))
@pytest.mark.parametrize("warm", [False, True])
def test_a_bad_index_is_refused_and_nothing_moves(index, kind, text, warm):
    criterion = build(3) if warm else moving(3)
    with pytest.raises(kind, match=text):
        criterion(X, Y, index)
    assert (criterion.alpha == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_an_index_of_any_integer_dtype(dtype):
    criterion = moving(3, sampling="expected")
    criterion(X, Y, torch.tensor([2, 0]).to(dtype))
    assert criterion.alpha.tolist() == pytest.approx([0.01, 0, 0.01])


@by_value
def test_a_refused_batch_draws_nothing_and_counts_for_nothing():
    generator = seeded(0)
    criterion = moving(3, generator=generator)
    before = generator.get_state()
    for _ in range(3):
        with pytest.raises(ValueError, match="mask > 0"):
            criterion(X, (Y * 255).byte(), torch.tensor([0, 1]))
    assert torch.equal(generator.get_state(), before)
    waiting = build(3, warmup=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with pytest.raises(ValueError, match="mask > 0"):
                waiting(X, (Y * 255).byte(), torch.tensor([0, 1]))
        waiting(X, Y, torch.tensor([0, 1]))


def test_numpy_integers_are_integers():
    criterion = build(np.int64(3), warmup=np.int32(1))
    criterion.resize(np.int64(5))
    assert repr(criterion).startswith("AdaptivePerturbation(num_samples=5, ")


def test_other_bad_batches_are_refused_and_nothing_moves():
    criterion = moving(3, focus=1.0)
    index = torch.tensor([0, 1])
    cases = [
        (X, Y[:1], ValueError, "size of `input`"),
        (X, (Y * 255).byte(), ValueError, "mask > 0"),
        (X.long(), Y, TypeError, "floating-point logits"),
        (
            X.to("meta"),
            Y.to("meta"),
            ValueError,
            r"table's device \w+(:0)?, .*`criterion.to\('meta'\)",
        ),
    ]
    for x, y, kind, text in cases:
        loss = refused(kind, text, lambda: criterion(x, y, index))  # noqa: B023
        assert loss is None or loss.isnan()
    assert (criterion.alpha == 0).all()
    if torch.get_default_device().type == "cpu":  # elsewhere the nan was seen in the batch
        assert not criterion.visited.any()


STEPS = [
    ((math.nan,), ValueError, r"`accuracy` to be in \[0, 1\], but got nan"),
    ((1.2,), ValueError, "`accuracy` .* but got 1.2"),
    ((torch.tensor(-0.1),), ValueError, "`accuracy` .* but got -0.1"),
    (("0.9",), TypeError, "`accuracy` to be a number"),
    ((torch.tensor([0.9]),), TypeError, r"0-d tensor .* got a tensor of shape \(1,\)"),
    ((0.9, 1.5), ValueError, "`confidence` .* but got 1.5"),
    ((0.9, None), ValueError, r"`confidence` to be given .*'feedback', .*`step\(histogram\)`"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "text"), STEPS, ids=range(len(STEPS)))
def test_bad_measurements_are_refused_and_nothing_moves(arguments, kind, text):
    criterion = trained(moving(3, objective="feedback", beta=1.0, prior=0.3))
    before = saved(criterion)
    with pytest.raises(kind, match=text):
        criterion.step(*arguments)
    assert_same(criterion, before)


class Measured:
    """What a step needs of a histogram: two methods, and no slope."""

    def accuracy(self):
        return torch.tensor(2 / 3)

    def confidence(self):
        return torch.tensor(0.85)


def test_step_takes_numbers_0d_tensors_and_a_histogram_and_returns_nothing():
    histogram = Measured()
    apart, whole = (moving(3, objective="feedback") for _ in range(2))
    assert apart.step(histogram.accuracy(), histogram.confidence()) is None
    assert whole.step(histogram) is None
    assert_same(whole, apart.state_dict())
    assert float(whole.epoch.accuracy) == pytest.approx(2 / 3)
    assert apart.step(1, np.float32(0.5)) is None
    assert float(apart.epoch.accuracy) == 1


def test_step_pools_what_can_be_pooled():
    class Pooled:
        def accuracy(self):
            return torch.tensor([0.5, 0.9])

        confidence = accuracy

        def pooled(self):
            return Whole()

    class Whole:
        def accuracy(self):
            return torch.tensor(0.7)

        def confidence(self):
            return 0.8

    criterion = moving(3, objective="feedback")
    criterion.step(Pooled())
    assert float(criterion.epoch.accuracy) == pytest.approx(0.7)
    assert float(criterion.epoch.budget) == 0  # nothing was trained: it stays
    trained(criterion).step(Whole())
    assert float(criterion.epoch.budget) == pytest.approx(0.05)


@pytest.mark.parametrize("mask", [*MASKS, torch.uint16, torch.uint32, torch.uint64, torch.bfloat16])
def test_hits_and_labels_are_counted_in_masks_of_any_dtype(mask):
    x, y = torch.randn(5, 9), torch.rand(5, 9) > 0.5
    criterion = AdaptivePerturbation(5, focus=1.0, warmup=1)
    criterion.step(0.9, 0.95)
    criterion(x, y.to(mask), torch.arange(5))
    want = 0.9 * 0.5 + 0.1 * ((x >= 0) == y).float().mean(1)
    assert_close(criterion.sample_accuracy, want)
    positives = int(y.sum())
    assert criterion.fresh.flatten().tolist() == [45, positives << 20, positives]
