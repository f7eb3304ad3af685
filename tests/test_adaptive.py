import copy
import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import reference as ref
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.testing import assert_close

from sc_bce import AdaptivePerturbation, CalibrationHistogram, sc_bce_with_logits

# Tests that train more than an epoch's samples before they step.
unstepped = pytest.mark.filterwarnings("ignore:AdaptivePerturbation has trained past its warm-up")
OBJECTIVES = ("calibration", "max_entropy", "feedback")
SOLVERS = ("proximal", "explicit")
moving_betas = st.floats(0.05, 2)


def moving(num_samples=6, accuracy=0.9, confidence=0.95, **options):
    """A table past its warm-up."""
    criterion = AdaptivePerturbation(num_samples, warmup=1, **options)
    criterion.step(accuracy, confidence)
    return criterion


def table(criterion):
    return criterion.alpha.double().numpy()


# --- against the reference --------------------------------------------------------------------


@unstepped
@given(
    st.data(), seeds, st.sampled_from(OBJECTIVES), st.sampled_from(SOLVERS), moving_betas,
    st.sampled_from([0.0, 1.0, 2.5]),
)  # fmt: skip
def test_table_follows_the_reference(data, seed, objective, solver, beta, focus):
    rng = np.random.default_rng(seed)
    rows = data.draw(st.integers(1, 6))
    options = dict(
        beta=beta, objective=objective, solver=solver, focus=focus,
        lr=data.draw(st.sampled_from([0.002, 0.02])),
        penalty=data.draw(st.sampled_from([0.0, 10.0, 200.0])),
        warmup=data.draw(st.integers(0, 2)),
        reference_accuracy=data.draw(st.sampled_from([None, 0.8])),
    )  # fmt: skip
    sampling = data.draw(st.sampled_from(["sample", "element", "expected"]))
    weighted, ignored, soft = (data.draw(st.booleans()) for _ in range(3))
    weight = rng.uniform(0.5, 2, 3) if weighted else None
    criterion = AdaptivePerturbation(
        rows, sampling=sampling, ignore_index=-1 if ignored else None,
        weight=None if weight is None else torch.from_numpy(weight),
        pos_weight=torch.tensor(3.0).double(), **options,
    )  # fmt: skip
    want = ref.Table(rows, **options)
    for _ in range(4):
        for _ in range(2):
            n = int(rng.integers(0, 8))
            index = rng.integers(0, rows, n)
            x = rng.normal(0, 8, (n, 2, 3))
            y = rng.random(x.shape) if soft else rng.integers(0, 2, x.shape).astype(float)
            valid = rng.random(x.shape) < 0.5 if ignored else np.ones(x.shape, dtype=bool)
            target = torch.from_numpy(np.where(valid, y, -1.0))
            criterion(torch.from_numpy(x), target, torch.from_numpy(index))
            wide = 1.0 if weight is None else np.broadcast_to(weight, x.shape)
            want.observe(index, ref.margin(x, y, wide, valid), ref.hits(x, y, valid))
            np.testing.assert_allclose(table(criterion), want.alpha, rtol=1e-4, atol=1e-5)
        accuracy, confidence = rng.random(2)
        criterion.step(float(accuracy), torch.tensor(confidence))
        want.step(accuracy, confidence)
        assert float(criterion.budget) == pytest.approx(want.budget, abs=1e-5)
        assert float(criterion.flip_rate) == pytest.approx(want.alpha.mean() * beta / 2, abs=1e-5)
    assert criterion.alpha.min() >= 0
    assert criterion.alpha.max() <= np.float32(want.cap)


@given(seeds, st.floats(0.1, 2))
def test_the_level_climbs_along_the_derivative_of_the_loss(seed, beta):
    rng = np.random.default_rng(seed)
    x, y = torch.from_numpy(rng.normal(0, 3, (2, 4))), torch.from_numpy(rng.random((2, 4)))
    weight = torch.from_numpy(rng.random(4))
    alpha = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss = sc_bce_with_logits(x, y, alpha, beta, weight=weight, reduction="none")
    loss.mean(1).sum().backward()
    criterion = moving(2, 0.0, beta=beta, weight=weight, lr=0.01, penalty=0.0)
    criterion(x, y, torch.tensor([0, 1]))
    want = (0.01 * alpha.grad).clamp(0, min(1, 1 / beta - 0.01))
    assert_close(criterion.alpha.double(), want, rtol=1e-5, atol=1e-7)


@given(seeds)
def test_a_sample_met_twice_takes_one_step_with_the_mean_gradient(seed):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(3, 3, 5))
    y = torch.ones(5)
    twice = moving(4)
    twice(x, y, torch.tensor([2, 0, 2, 2, 1]))
    once = moving(4)
    once(torch.stack((x[1], x[4], x[[0, 2, 3]].mean())), y[:3], torch.tensor([0, 1, 2]))
    assert_close(twice.alpha, once.alpha)


@given(seeds, st.sampled_from(OBJECTIVES))
def test_order_and_grouping_of_samples_do_not_matter(seed, objective):
    rng = np.random.default_rng(seed)
    x, y = torch.from_numpy(rng.normal(2, 4, (6, 3))), torch.from_numpy(rng.random((6, 3)))
    index = torch.from_numpy(rng.permutation(9)[:6])
    whole, shuffled, alone = (moving(9, objective=objective) for _ in range(3))
    order = torch.from_numpy(rng.permutation(6))
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
    before = torch.get_rng_state()
    losses = []
    for seed in (1, 1, 2):
        criterion = moving(50, generator=torch.Generator().manual_seed(seed))
        criterion.alpha.fill_(0.4)
        losses.append(criterion(x, y, index))
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_eval_and_no_grad_are_plain_bce_and_touch_nothing():
    criterion = moving(3, focus=1.0, generator=torch.Generator().manual_seed(0))
    criterion.alpha.fill_(0.3)
    x, y = torch.randn(8, 2), torch.randint(0, 2, (8, 2))
    state = copy.deepcopy(criterion.state_dict())
    want = torch.nn.functional.binary_cross_entropy_with_logits(x, y.float())
    with torch.no_grad():
        assert torch.equal(criterion(x, y), want)
        assert torch.equal(criterion(x, y, torch.arange(8)), want)
    criterion.eval()
    assert torch.equal(criterion(x, y), want)
    # An index of validation samples is accepted and not used, whatever it holds.
    assert torch.equal(criterion(x, y, torch.tensor([99])), want)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_warm_up_is_plain_bce_and_moves_nothing():
    criterion = AdaptivePerturbation(4)
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
    criterion = AdaptivePerturbation(1, warmup=warmup)
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
    # An index is accepted, so that one loop serves both.
    shared(x, y, torch.arange(100, 106))
    # It is the table of one row.
    one = moving(1)
    one(x, y, torch.zeros(6, dtype=torch.int64))
    one(x, y, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(one.alpha, shared.alpha)


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
    assert criterion.seen.tolist() == [False, False, True]


def test_scalars_and_empty_batches():
    criterion = moving(2, sampling="expected")
    criterion(torch.tensor(5.0), torch.tensor(1.0), torch.tensor(1))
    assert criterion.alpha.tolist() == pytest.approx([0, 0.01])
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


@unstepped
@pytest.mark.parametrize(
    ("penalty", "margin"), list(itertools.product([200, 500, 1000, 2000], [1, 3, 10]))
)
def test_feedback_settles_where_confidence_is_accuracy(penalty, margin):
    """A network whose confidence follows the flip rate late, over-confident by 0.08."""
    criterion = AdaptivePerturbation(
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


def test_feedback_lets_the_level_fall_to_zero_on_an_underconfident_network():
    criterion = moving(1, 0.9, 0.95, objective="feedback", sampling="expected")
    criterion.alpha.fill_(0.05)
    for _ in range(30):
        criterion.step(0.9, 0.7)
        criterion(torch.full((1, 1), 3.0), torch.ones(1, 1), torch.tensor([0]))
    assert criterion.budget == pytest.approx(-0.1)
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
    assert criterion.budget == pytest.approx(0.05)
    assert criterion.alpha == pytest.approx(0.006)  # lr times margin, below the budget


@unstepped
def test_focus_softens_hard_samples_more():
    criterion = AdaptivePerturbation(
        2, objective="calibration", focus=2.0, warmup=3, sampling="expected"
    )
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
    assert criterion.difficulty == 0.5
    criterion.seen.fill_(True)
    criterion.sample_accuracy.fill_(1.0)
    criterion.step(0.9)
    criterion(torch.full((2, 1), 5.0), torch.ones(2, 1), torch.arange(2))
    assert criterion.alpha.tolist() == pytest.approx([0.01, 0.01])


def test_focus_gives_equal_samples_the_whole_budget_however_easy():
    criterion = moving(2, focus=10.0, sampling="expected")
    criterion.seen.fill_(True)
    criterion.sample_accuracy.fill_(0.97)
    criterion.step(0.9)
    for _ in range(60):
        criterion.sample_accuracy.fill_(0.97)
        criterion(torch.full((2, 1), 5.0), torch.ones(2, 1), torch.arange(2))
        criterion.sample_accuracy.fill_(0.97)
        criterion.difficulty.fill_((1 - 0.9 * 0.97 - 0.1) ** 10)  # what this forward reads
    assert criterion.alpha.tolist() == pytest.approx([0.1025, 0.1025], rel=1e-2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_extreme_step_sizes_stay_finite(objective, solver):
    criterion = moving(1, objective=objective, solver=solver, lr=1e15, penalty=1e15)
    for x in (3.0, -3.0, 1e38, 0.0):
        criterion(torch.full((1, 1), x), torch.ones(1, 1), torch.tensor([0]))
        assert 0 <= float(criterion.alpha) <= 0.49 + 1e-6


def test_flip_rate():
    criterion = AdaptivePerturbation(4, beta=1.0)
    criterion.alpha.copy_(torch.tensor([0.0, 0.1, 0.2, 0.3]))
    assert criterion.flip_rate.shape == ()
    assert float(criterion.flip_rate) == pytest.approx(0.075)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampling", ["expected", "sample", "element"])
def test_a_training_forward_reads_no_value_off_the_cpu(objective, sampling):
    """A meta tensor has no values: any look at one, where an accelerator would wait, raises."""
    options = dict(objective=objective, sampling=sampling, focus=2.0, ignore_index=255)
    for solver in SOLVERS:
        criterion = moving(9, solver=solver, weight=torch.ones(3), **options).to("meta")
        x = torch.empty(4, 3, device="meta", requires_grad=True)
        y = torch.empty(4, 3, device="meta", dtype=torch.uint8)
        loss = criterion(x, y, torch.empty(4, device="meta", dtype=torch.int64))
        loss.backward()
        assert x.grad.is_meta


# --- compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compile_fullgraph_moves_the_table(objective):
    torch.manual_seed(3)
    options = dict(objective=objective, sampling="expected", focus=1.0, ignore_index=255)
    eager, compiled = moving(7, **options), moving(7, **options)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for epoch in range(2):
        for _ in range(3):
            x = torch.randn(4, 3, requires_grad=True)
            y = torch.randint(0, 2, (4, 3)).byte()
            index = torch.randint(0, 7, (4,))
            losses = [one(5 * x, y, index) for one in (eager, call)]
            assert_close(*losses)
            assert_close(*[torch.autograd.grad(loss, x)[0] for loss in losses])
        assert_close(compiled.alpha, eager.alpha)
        for one in (eager, compiled):
            one.step(0.8 + 0.01 * epoch, 0.9)
    assert (compiled.alpha > 0).any()


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


def test_compile_inductor_refuses_an_index_out_of_range():
    criterion = moving(6, sampling="expected")
    compiled = torch.compile(criterion, fullgraph=True)
    for wrong in (-1, 6):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            compiled(torch.full((2, 1), 3.0), torch.ones(2, 1), torch.tensor([0, wrong]))
    assert (criterion.alpha[1:] == 0).all()


def test_compile_inductor_trains():
    criterion = moving(4)
    criterion.compile(fullgraph=True)
    x = torch.randn(4, 3, requires_grad=True)
    criterion(9 * x.abs(), torch.ones(4, 3), torch.arange(4)).backward()
    assert (criterion.alpha > 0).all()
    assert x.grad.isfinite().all()


# --- state ------------------------------------------------------------------------------------


def test_casting_moves_weights_and_spares_the_table():
    criterion = moving(3, pos_weight=torch.ones(1), focus=1.0)
    before = criterion.alpha.clone()
    for cast in (criterion.half, criterion.double, lambda: criterion.to(torch.bfloat16)):
        cast()
        assert criterion.alpha.dtype == criterion.sample_accuracy.dtype == torch.float32
        assert criterion.budget.dtype == torch.float32
        assert torch.equal(criterion.alpha, before)
    assert criterion.pos_weight.dtype == torch.bfloat16
    assert criterion.to("meta").alpha.is_meta
    assert "mean_alpha" not in repr(criterion)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_the_table_is_float32_whatever_torchs_default(default):
    torch.set_default_dtype(default)
    try:
        criterion = moving(6, focus=1.0, ignore_index=255)
        x, y = torch.ones(2, 3, dtype=torch.float32), torch.ones(2, 3, dtype=torch.uint8)
        criterion(x, y, torch.tensor([1, 2]))
    finally:
        torch.set_default_dtype(torch.float32)
    floats = [v for v in criterion.state_dict().values() if v.is_floating_point()]
    assert len(floats) == 6
    assert all(value.dtype == torch.float32 for value in floats)
    assert criterion.alpha[1] > 0


def test_every_key_of_the_state_is_an_attribute():
    # torch.distributed.checkpoint finds a model's state by name.
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    options = dict(focus=1.0, pos_weight=torch.ones(1), generator=torch.Generator())
    model = torch.nn.ModuleDict({"criterion": moving(6, **options)})
    assert set(get_model_state_dict(model)) == set(model.state_dict())


def test_built_on_meta_and_loaded_by_assignment():
    source = moving(3, focus=1.0)
    source.alpha.fill_(0.2)
    with torch.device("meta"):
        criterion = AdaptivePerturbation(3, focus=1.0, warmup=1)
    criterion.load_state_dict(source.state_dict(), assign=True)
    for name, value in source.state_dict().items():
        assert torch.equal(criterion.state_dict()[name], value)


TRAIN = """
import sys, torch
from sc_bce import AdaptivePerturbation
mode, path, objective, stop = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.manual_seed(0)
net = torch.nn.Linear(4, 3)
criterion = AdaptivePerturbation(
    10, objective=objective, warmup=1, focus=1.0, sampling="element", lr=0.1, penalty=10.0,
    generator=torch.Generator().manual_seed(7),
)
optimizer = torch.optim.SGD([*net.parameters()], lr=0.5)
everything = torch.nn.ModuleList([net, criterion])
data = torch.Generator().manual_seed(3)
x, y = torch.randn(10, 4, generator=data), torch.randint(0, 2, (10, 3), generator=data)
start = 0
if mode == "resume":
    saved = torch.load(path, weights_only=True)
    everything.load_state_dict(saved["state"])
    start = saved["step"]
losses = []
for step in range(start, 24):
    if mode == "stop" and step == stop:
        torch.save({"state": everything.state_dict(), "step": step}, path)
        sys.exit()
    rows = torch.arange(10).roll(step)[:4]
    loss = criterion(net(x[rows]), y[rows], rows)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item().hex())
    if step % 5 == 4:
        criterion.step(0.7 + 0.01 * step, 0.95)
print(losses[-6:], [a.hex() for a in criterion.alpha.tolist()], float(criterion.budget).hex())
print(criterion.generator.get_state().tolist())
"""


@pytest.mark.parametrize(
    ("objective", "stop"),
    [("calibration", 13), ("max_entropy", 17), ("feedback", 2), ("feedback", 13)],
)
def test_resume_in_a_new_process_is_exact(tmp_path, objective, stop):
    def run(mode):
        command = [sys.executable, "-c", TRAIN, mode, str(tmp_path / "c.pt"), objective, str(stop)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("stop")
    resumed, straight = run("resume"), run("straight")
    assert "0x1." in straight
    assert resumed == straight


def test_loading_another_size_names_both_and_changes_nothing():
    source, criterion = moving(5), moving(3)
    source.alpha.fill_(0.2)
    with pytest.raises(ValueError, match=r"num_samples=3, but got num_samples=5; .*resize"):
        criterion.load_state_dict(source.state_dict())
    assert (criterion.alpha == 0).all()


def test_loading_reports_missing_and_unexpected_keys():
    state = moving(3, generator=torch.Generator()).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"generator"'):
        AdaptivePerturbation(3).load_state_dict(state)
    del state["budget"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"budget"'):
        AdaptivePerturbation(3, generator=torch.Generator()).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"sample_accuracy"'):
        AdaptivePerturbation(3, focus=1.0).load_state_dict(moving(3).state_dict())


def test_a_spoilt_state_is_refused_whole():
    criterion = moving(3, focus=1.0)
    state = moving(3, focus=1.0).state_dict()
    state["alpha"] = torch.full((3,), 0.2)
    cases = [("accuracy", torch.zeros(3), "0-d tensor, but got shape"),
             ("seen", torch.zeros(1, dtype=torch.bool), "num_samples=1")]  # fmt: skip
    for name, wrong, text in cases:
        with pytest.raises(ValueError, match=f"saved `{name}` to .*{text}"):
            criterion.load_state_dict(state | {name: wrong})
        assert (criterion.alpha == 0).all()


def test_a_hook_may_rename_keys_while_loading():
    source = moving(3)
    source.alpha.fill_(0.2)
    state = source.state_dict()
    state["levels"] = state.pop("alpha")
    criterion = AdaptivePerturbation(3)
    criterion.register_load_state_dict_pre_hook(
        lambda module, state, *rest: state.update(alpha=state.pop("levels"))
    )
    criterion.load_state_dict(state)
    assert torch.equal(criterion.alpha, source.alpha)


def test_a_checkpoint_of_several_ranks_serves_one_process():
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    criterion = moving(3, generator=torch.Generator())
    state = criterion.state_dict()
    state["generator"] = torch.stack([one.get_state() for one in generators])
    criterion.load_state_dict(state)
    assert torch.equal(criterion.generator.get_state(), generators[0].get_state())
    assert criterion.state_dict()["generator"].dim() == 1


def test_resize_keeps_what_is_there():
    criterion = moving(2, focus=1.0, sampling="expected")
    criterion(torch.full((2, 1), 5.0), torch.ones(2, 1), torch.arange(2))
    before = criterion.alpha.clone()
    criterion.resize(4)
    assert torch.equal(criterion.alpha, torch.cat((before, torch.zeros(2))))
    assert criterion.sample_accuracy.tolist() == pytest.approx([0.55, 0.55, 0.5, 0.5])
    assert criterion.seen.tolist() == [True, True, False, False]
    criterion(torch.full((1, 1), 5.0), torch.ones(1, 1), torch.tensor([3]))
    assert criterion.alpha[3] > 0
    assert criterion.num_samples == 4
    with pytest.raises(ValueError, match="at least the table's 4, but got 3"):
        criterion.resize(3)
    with pytest.raises(ValueError, match="table's None"):
        AdaptivePerturbation(None).resize(3)


def test_deepcopy_is_independent():
    criterion = moving(2, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(criterion)
    twin(torch.full((2, 1), 5.0), torch.ones(2, 1), torch.arange(2))
    assert (criterion.alpha == 0).all()
    assert (twin.alpha > 0).all()


def test_repr_summarises_the_table():
    criterion = AdaptivePerturbation(4, ignore_index=255, reference_accuracy=0.9)
    criterion.alpha.copy_(torch.tensor([0.0, 0.1, 0.2, 0.1]))
    assert repr(criterion) == (
        "AdaptivePerturbation(num_samples=4, beta=2.0, objective='calibration', lr=0.002, "
        "penalty=2000.0, warmup=5, solver='proximal', focus=0.0, sampling='sample', "
        "reference_accuracy=0.9, ignore_index=255, reduction='mean', mean_alpha=0.1, "
        "above_zero=75%)"
    )


# --- warnings and errors ----------------------------------------------------------------------


def test_training_past_the_warm_up_without_a_step_warns_once():
    criterion = AdaptivePerturbation(4, warmup=2)
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


def test_a_stepped_table_never_warns(monkeypatch):
    criterion = AdaptivePerturbation(1, warmup=100)
    criterion.step(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            criterion(torch.zeros(1), torch.ones(1), torch.tensor([0]))
    monkeypatch.setattr("sc_bce.adaptive._PATIENCE", 3)
    shared = AdaptivePerturbation(None)
    for _ in range(3):
        shared(torch.zeros(5), torch.ones(5))
    with pytest.warns(UserWarning, match="never called"):
        shared(torch.zeros(5), torch.ones(5))


def make(**options):
    return lambda: AdaptivePerturbation(**{"num_samples": 3, **options})


CONSTRUCTION = [
    (make(num_samples=0), ValueError, "`num_samples` to be a positive int, but got 0"),
    (make(num_samples=2.5), TypeError, "`num_samples` to be a positive int, but got 2.5"),
    (make(num_samples=True), TypeError, "`num_samples` to be a positive int"),
    (make(beta=0), ValueError, "`beta` to be above 0, but got 0"),
    (make(beta=2.1), ValueError, r"`beta` to be in \[0, 2\], but got 2.1"),
    (make(beta=math.nan), ValueError, "`beta` .* but got nan"),
    (make(objective="mc"), ValueError, "'calibration', 'max_entropy', 'feedback', but got 'mc'"),
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
    (None, ValueError, "got None; wrap the data set in IndexedDataset .* num_samples=None"),
    ([0, 1], TypeError, r"integer Tensor, but got list; pass `torch.as_tensor\(index\)`"),
    (torch.zeros(2), TypeError, "got torch.float32; pass `index.long"),
    (torch.zeros(2, dtype=torch.bool), TypeError, "got torch.bool"),
    (torch.arange(3), ValueError, r"shape \(2,\), but got shape \(3,\)"),
    (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"got shape \(2, 1\)"),
    (torch.tensor([0, 3]), IndexError, r"\[0, 2\], but got 3; num_samples=3 .* `resize`"),
    (torch.tensor([-1, 0]), IndexError, r"\[0, 2\], but got -1"),
]


@pytest.mark.parametrize(("index", "kind", "text"), FORWARD, ids=range(len(FORWARD)))
@pytest.mark.parametrize("warm", [False, True])
def test_a_bad_index_is_refused_and_nothing_moves(index, kind, text, warm):
    criterion = AdaptivePerturbation(3) if warm else moving(3)
    with pytest.raises(kind, match=text):
        criterion(X, Y, index)
    assert (criterion.alpha == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_an_index_of_any_integer_dtype(dtype):
    criterion = moving(3, sampling="expected")
    criterion(X, Y, torch.tensor([2, 0]).to(dtype))
    assert criterion.alpha.tolist() == pytest.approx([0.01, 0, 0.01])


def test_a_refused_batch_draws_nothing_and_counts_for_nothing():
    generator = torch.Generator().manual_seed(0)
    criterion = moving(3, generator=generator)
    before = generator.get_state()
    for _ in range(3):
        with pytest.raises(ValueError, match="mask > 0"):
            criterion(X, (Y * 255).byte(), torch.tensor([0, 1]))
    assert torch.equal(generator.get_state(), before)
    waiting = AdaptivePerturbation(3, warmup=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with pytest.raises(ValueError, match="mask > 0"):
                waiting(X, (Y * 255).byte(), torch.tensor([0, 1]))
        waiting(X, Y, torch.tensor([0, 1]))


def test_numpy_integers_are_integers():
    criterion = AdaptivePerturbation(np.int64(3), warmup=np.int32(1))
    criterion.resize(np.int64(5))
    assert repr(criterion).startswith("AdaptivePerturbation(num_samples=5, ")


def test_other_bad_batches_are_refused_and_nothing_moves():
    criterion = moving(3, focus=1.0)
    index = torch.tensor([0, 1])
    cases = [
        (X, Y[:1], ValueError, "size of `input`"),
        (X, (Y * 255).byte(), ValueError, "mask > 0"),
        (X.long(), Y, TypeError, "floating-point logits"),
        (X.to("meta"), Y.to("meta"), ValueError, r"table's device cpu, .*`criterion.to\('meta'\)"),
    ]
    for x, y, kind, text in cases:
        with pytest.raises(kind, match=text):
            criterion(x, y, index)
    assert (criterion.alpha == 0).all()
    assert not criterion.seen.any()


STEPS = [
    ((math.nan,), ValueError, r"`accuracy` to be in \[0, 1\], but got nan"),
    ((1.2,), ValueError, "`accuracy` .* but got 1.2"),
    ((torch.tensor(-0.1),), ValueError, "`accuracy` .* but got -0.1"),
    (("0.9",), TypeError, "`accuracy` to be a number"),
    ((torch.tensor([0.9]),), TypeError, r"0-d tensor .* got a tensor of shape \(1,\)"),
    ((0.9, 1.5), ValueError, "`confidence` .* but got 1.5"),
    ((0.9, None), ValueError, r"`confidence` to be given .*`step\(h.accuracy\(\), h.confidence"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "text"), STEPS, ids=range(len(STEPS)))
def test_bad_measurements_are_refused_and_nothing_moves(arguments, kind, text):
    criterion = moving(3, objective="feedback")
    before = copy.deepcopy(criterion.state_dict())
    with pytest.raises(kind, match=text):
        criterion.step(*arguments)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name])


def test_step_takes_numbers_and_0d_tensors_and_returns_nothing():
    histogram = CalibrationHistogram()
    histogram.update(torch.tensor([2.0, -1.0, 3.0]), torch.tensor([1, 0, 0]))
    criterion = moving(3, objective="feedback")
    assert criterion.step(histogram.accuracy(), histogram.confidence()) is None
    assert criterion.step(1, np.float32(0.5)) is None
    assert float(criterion.accuracy) == 1
