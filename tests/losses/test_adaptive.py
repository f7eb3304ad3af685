"""The adaptive loss: whole trainings against the reference, its loss, its use, its dynamics."""

import math
import warnings

import numpy as np
import pytest
import reference as ref
import torch
import torch._dynamo.testing
from devices import array, random, refused, rng_state, seeded, tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import MASKS, seeds
from tables import Measured, assert_same, build, climbing, moving, published, put, saved, trained
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from sc_bce import AdaptivePerturbation, CalibrationHistogram, sc_bce_with_logits

# Tests that train on far more samples than rows before they step, and on few of their rows.
unstepped = pytest.mark.filterwarnings("ignore:AdaptivePerturbation has trained past its warm-up")
sparse = pytest.mark.filterwarnings("ignore:since the last step only the first rows")
weighted = pytest.mark.filterwarnings("ignore:at the levels reached, pos_weight")
# XLA compiles for each size anew, and has no cumulative sum of nothing.
ANY_SIZE = torch.get_default_device().type != "xla"
no_checkpoints = pytest.mark.not_on("xla", "torch.utils.checkpoint asks for torch.xla")
by_value = pytest.mark.cpu_only("an accelerator would wait for a look at the values")
OBJECTIVES = ("calibration", "max_entropy")
COUNTED = ("observed", "level_weighted")


def table(criterion):
    return array(criterion.alpha.double())


def both(num_samples=6, **options):
    """Both rules past their warm-up."""
    return moving(num_samples, **options), climbing(num_samples, **options)


# -- whole trainings against the reference


@st.composite
def targets_of_perturbation(draw, rng):
    """A prior in one of its forms, for an input (N, 2, 3), with a strength that it allows."""
    form = draw(st.sampled_from(["half", "number", "(2, 1)", "(2, 3)", *COUNTED]))
    if form in COUNTED:
        labels = draw(st.sampled_from([None, 2]))
        return dict(prior=form, num_labels=labels, beta=draw(st.floats(0.05, 1)))
    if form in ("half", "number"):
        prior = 0.5 if form == "half" else draw(st.floats(0.02, 0.98))
        farthest = max(prior, 1 - prior)
    else:
        prior = rng.uniform(0, 1, (2, 1) if form == "(2, 1)" else (2, 3)).astype(np.float32)
        prior.flat[0] = draw(st.sampled_from([prior.flat[0], 0.0, 1.0]))
        farthest = float(np.maximum(prior, 1 - prior).max())
    beta = draw(st.floats(0.05, 1)) / farthest * (1 - 1e-6)
    return dict(prior=prior, num_labels=None, beta=beta)


def rules(draw):
    """The options of one rule or the other."""
    objective = draw(st.sampled_from([None, *OBJECTIVES]))
    if objective is None:
        level = draw(st.sampled_from([0.0, 1e-3, 0.2, 0.7, 1.0]))
        return dict(level=level, focus=draw(st.sampled_from([0.0, 1.0, 2.5])))
    return dict(
        objective=objective,
        lr=draw(st.sampled_from([0.002, 0.02])),
        penalty=draw(st.sampled_from([0.0, 10.0, 200.0])),
    )


@unstepped
@sparse
@weighted
@pytest.mark.filterwarnings(r"ignore:step\(\) was called without a training batch")
@given(st.data(), seeds)
def test_a_training_follows_the_reference(data, seed):
    rng = np.random.default_rng(seed)
    rows, rule = data.draw(st.integers(1, 6)), rules(data.draw)
    options = {
        **rule, "warmup": data.draw(st.integers(0, 2)), **data.draw(targets_of_perturbation(rng)),
    }  # fmt: skip
    sampling = data.draw(st.sampled_from(["sample", "element", "expected"]))
    by_weight, ignored, soft = (data.draw(st.booleans()) for _ in range(3))
    weight = rng.uniform(0.5, 2, (2, 3)) if by_weight else None
    prior = options["prior"]
    of_module = {**options, "prior": tensor(prior) if np.ndim(prior) else prior}
    make = published if "objective" in rule else build
    criterion = make(
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
            criterion(tensor(x).requires_grad_(), target, tensor(index))
            want.observe(index, x, y, valid, 1.0 if weight is None else weight)
            np.testing.assert_allclose(table(criterion), want.alpha, rtol=1e-4, atol=1e-5)
        accuracy, slope = rng.random(), rng.choice([rng.uniform(-1, 3), math.nan])
        criterion.step(Measured(float(accuracy), float(slope)))
        want.step(accuracy, slope)
        np.testing.assert_allclose(table(criterion), want.alpha, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(torch.as_tensor(criterion.prior)), want.shown, atol=1e-5)
        strength = want.beta * want.mean_level
        for got, share in zip(criterion.flip_rates, (want.shown, 1 - want.shown), strict=True):
            np.testing.assert_allclose(
                array(got), np.reshape(strength * share, got.shape), atol=1e-5
            )
    assert criterion.alpha.min() >= 0
    assert criterion.alpha.max() <= np.float32(want.cap) + 1e-6


@given(seeds, st.floats(0.05, 1), st.sampled_from(["half", "number", "per label"]))
def test_a_published_level_climbs_along_the_derivative_of_the_loss(seed, share, form):
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
    criterion = published(2, warmup=1, **options)
    criterion.update(x, y, torch.tensor([0, 1]))  # whose labels are counted
    criterion.step(1.0)
    criterion(x.requires_grad_(), y, torch.tensor([0, 1]))
    cap = min(1, 1 / (2 * float(farther) * beta) - 0.01)
    want = (0.01 * alpha.grad).clamp(0, cap)
    assert_close(criterion.alpha.double(), want, rtol=1e-5, atol=1e-7)


@given(seeds, st.sampled_from(["slope", *OBJECTIVES]))
def test_order_and_grouping_of_samples_do_not_matter(seed, rule):
    rng = np.random.default_rng(seed)
    x, y = tensor(rng.normal(2, 4, (6, 3))), tensor(rng.random((6, 3)))
    index = tensor(rng.permutation(9)[:6])
    make = (lambda: moving(9)) if rule == "slope" else (lambda: climbing(9, objective=rule))
    whole, shuffled, alone = make(), make(), make()
    order = tensor(rng.permutation(6))
    whole(x.requires_grad_(), y, index)
    shuffled(x[order], y[order], index[order])
    for i in range(6):
        alone(x[i : i + 1], y[i : i + 1], index[i : i + 1])
    for one in (whole, shuffled, alone):
        one.step(Measured())
    for one in (shuffled, alone):
        assert_close(one.alpha, whole.alpha, rtol=1e-5, atol=1e-7)
        assert_close(one.prior, whole.prior)
    absent = torch.ones(9, dtype=torch.bool)
    absent[index] = False
    assert (whole.alpha[absent] == (0 if rule != "slope" else whole.alpha[absent][0])).all()


def test_a_new_table():
    for criterion, columns in ((build(3), ["alpha", "sample_accuracy", "visited"]),
                               (published(3), ["alpha", "visited"])):  # fmt: skip
        state = {k: v for k, v in criterion.state_dict().items() if v.shape == (3,)}
        assert list(state) == columns
        assert [state.get(k, torch.zeros(3)).tolist() for k in ("alpha", "visited")] == [
            [0] * 3
        ] * 2
        assert state.get("sample_accuracy", torch.tensor([0.5] * 3)).tolist() == [0.5] * 3
        dtypes = {k: torch.uint8 if k == "visited" else torch.float32 for k in columns}
        assert {k: v.dtype for k, v in state.items()} == dtypes


def test_a_step_of_one_process_forgets_since_when_its_rows_were_trained():
    criterion = put(climbing(3), alpha=torch.tensor([0.3, 0.2, 0.1]))
    x, y = torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1)
    for rows, since, then in (([0, 2], [2, 0, 2], [1, 0, 1]), ([1, 1], [1, 2, 1], [1, 1, 1])):
        criterion(x, y, torch.tensor(rows))
        before = saved(criterion)
        assert before["visited"].tolist() == since
        criterion.step(0.9)
        assert criterion.state_dict()["visited"].tolist() == then
        assert torch.equal(criterion.alpha, before["alpha"])


# -- the default rule in use


def test_the_mean_level_moves_by_the_slope_from_its_start_on_and_difficulty_shares_it_out():
    criterion = build(3, level=0.3, warmup=2)
    x = torch.tensor([[3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])  # right, half right, wrong
    recent, mean = np.full(3, 0.5), None
    for epoch in range(5):
        before = criterion.alpha.clone()
        criterion(x.requires_grad_(), torch.ones(3, 2), torch.arange(3))
        assert torch.equal(criterion.alpha, before)  # a batch moves no level
        recent += 0.1 * (np.array([1, 0.5, 0]) - recent)
        slope = 0.6 if epoch % 2 else 1.2
        criterion.step(Measured(0.9, slope))
        if epoch == 0:  # in the warm-up
            assert criterion.alpha.tolist() == [0, 0, 0]
            continue
        mean = (0.3 if mean is None else mean) + 0.1 * (1 - slope)
        cap = 1 / (2 * float(criterion.prior)) - 0.01  # of positives alone
        want = np.minimum(mean * (1 - recent) ** 2 / np.mean((1 - recent) ** 2), cap)
        np.testing.assert_allclose(array(criterion.alpha), want, rtol=1e-5)
    assert criterion.alpha[2] > 1.5 * criterion.alpha[1] > 2 * criterion.alpha[0]


@pytest.mark.parametrize("rows", [4, None])
def test_without_focus_and_without_a_table_one_level_serves_all(rows):
    criterion = build(rows, focus=0.0)
    x, y = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3) < 0.3
    index = None if rows is None else torch.arange(4)
    want = 0.2
    for slope in (0.5, 0.8, 1.5):
        criterion(x, y, index)
        criterion.step(Measured(0.9, slope))
        want += 0.1 * (1 - slope)
        assert criterion.alpha.tolist() == pytest.approx([want] * (rows or 1))
    assert "sample_accuracy" not in criterion.state_dict()
    if rows:  # rows that are new or were never trained have the mean level too
        criterion.resize(6)
        assert criterion.alpha.tolist() == pytest.approx([want] * 6)


def test_one_shared_level_trains_as_a_table_without_focus_does():
    losses = {}
    x, y = torch.randn(12, 5), torch.rand(12, 1) > 0.7
    for rows in (12, None):
        torch.manual_seed(0)
        model, criterion = torch.nn.Linear(5, 1), build(rows, focus=0.0, sampling="sample")
        for _ in range(3):
            for index in torch.randperm(12).split(4):
                extra = () if rows is None else (index,)
                loss = criterion(model(x[index]), y[index], *extra)
                loss.backward()
                losses.setdefault(rows, []).append(loss.item())
            criterion.step(Measured())
        assert float(criterion.alpha.mean()) > 0.1
    assert losses[12] == losses[None]


def test_a_table_of_one_shared_level_forgets_its_focus():
    assert AdaptivePerturbation(None, focus=3.0).rule.focus == 0.0


def test_rows_that_were_never_trained_have_the_mean_level():
    criterion = moving(5, prior=0.5, focus=1.0)
    x = torch.tensor([[4.0], [-4.0]], requires_grad=True)
    criterion(x, torch.ones(2, 1), torch.tensor([1, 3]))
    criterion.step(Measured(0.9, 0.7))
    assert criterion.alpha.tolist() == pytest.approx([0.23, 0.23 * 0.9, 0.23, 0.23 * 1.1, 0.23])
    criterion.resize(6)
    assert float(criterion.alpha[5]) == pytest.approx(0.23)


@pytest.mark.parametrize("prior", COUNTED)
def test_focus_keeps_the_mean_of_q_where_the_prior_is_weighted_by_level(prior):
    """Seen by its training: rare labels, the hard ones the positives (DESIGN: mean and Cov)."""
    torch.manual_seed(1)
    criterion = build(400, level=0.3, focus=2.0, prior=prior)
    y = (torch.rand(400, 4) < 0.05).float()
    wrong = y.bool() & (torch.rand(400, 4) < 0.8)  # four of five positives are missed
    x = torch.where(wrong, -3.0, 6 * y - 3)
    q = {}
    for epoch in range(6):
        for rows in torch.arange(400).split(50):
            criterion(x[rows].requires_grad_(), y[rows], rows)
        if epoch > 2:
            alpha = criterion.alpha[:, None].double()
            q[epoch] = float((y + alpha * (criterion.prior - y)).mean())
            share = float((alpha * y).mean() / alpha.mean())
            pi, c = float(y.mean()), float(criterion.prior)
            covariance = float(((alpha - alpha.mean()) * (y - pi)).mean())
            want = pi + float(alpha.mean()) * (c - pi) - covariance
            assert q[epoch] == pytest.approx(want, rel=1e-5)
            assert share > 1.2 * pi
        criterion.step(Measured(0.9, 1.0))
    assert len(criterion.alpha.unique()) > 1
    if prior == "observed":
        assert q[5] < 0.9 * float(y.mean())
    else:  # of the epoch before, so not exactly
        assert q[5] == pytest.approx(float(y.mean()), rel=0.05)


def test_the_level_weighted_prior_is_the_last_epochs_alone_and_per_label():
    criterion = put(moving(2, prior="level_weighted", num_labels=2), alpha=torch.tensor([0.1, 0.3]))
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x = torch.zeros(2, 2, requires_grad=True)
    for _ in range(2):  # the first weights are .1 and .3, of a mean of .2
        criterion(x, y, torch.arange(2))
    criterion(x[:0], y[:0], torch.arange(0))  # a batch of nothing counts for nothing
    criterion.step(Measured(0.9, math.nan))
    assert criterion.prior.tolist() == pytest.approx([(1 + 0.5) / 5, (3 + 0.5) / 5])
    # Difficulty is equal, so now the levels are; and only this epoch's labels count.
    criterion(x, 1 - 0 * y, torch.arange(2))
    criterion.step(Measured(0.9, math.nan))
    assert criterion.prior.tolist() == pytest.approx([2.5 / 3, 2.5 / 3])


def test_the_level_weighted_prior_holds_while_all_levels_are_0():
    criterion = put(moving(2, level=0.0, prior="level_weighted"), counts=[[40.0], [10.0]])
    assert float(criterion.prior) == pytest.approx(10.5 / 41)
    criterion(torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1), torch.arange(2))
    criterion.step(Measured(0.9, 1.0))
    assert float(criterion.prior) == pytest.approx(10.5 / 41)
    # Without a focus, and by the paper's rule, it is the base rate.
    for one in (build(2, focus=0.0, prior="level_weighted"),
                published(2, beta=1.0, prior="level_weighted")):  # fmt: skip
        one(torch.zeros(2, 4, requires_grad=True), torch.eye(2, 4), torch.arange(2))
        one.step(Measured())
        assert float(one.prior) == pytest.approx(2.5 / 9)


# -- step


def over_confident(slope=0.5, count=4000, seed=1):
    """Validation logits whose recalibration has that slope."""
    generator = torch.Generator().manual_seed(seed)
    truth = random(torch.randn, generator, count) - 2
    histogram = CalibrationHistogram()
    chance = random(torch.rand, generator, count)
    histogram.update(truth / slope, chance < torch.sigmoid(truth))
    return histogram


@pytest.mark.parametrize("slope", [0.5, 0.8, 1.5])
def test_a_step_reads_the_slope_of_a_histogram(slope):
    criterion, histogram = build(6, focus=0.0), over_confident(slope)
    measured, want = float(histogram.slope()), 0.2
    assert measured == pytest.approx(slope, abs=0.1)
    for _ in range(3):
        trained(criterion)
        assert criterion.step(histogram) is None
        want += 0.1 * (1 - measured)
        assert criterion.alpha.tolist() == pytest.approx([want] * 6, abs=1e-6)


def test_a_histogram_of_one_class_holds_the_mean_level():
    criterion = trained(moving(6, focus=0.0))
    one_class = CalibrationHistogram()
    one_class.update(torch.randn(50), torch.ones(50))
    criterion.step(one_class)
    assert criterion.alpha.tolist() == pytest.approx([0.2] * 6)


def test_a_histogram_of_several_labels_is_pooled_by_its_counts():
    apart, whole = CalibrationHistogram(2), CalibrationHistogram()
    generator = torch.Generator().manual_seed(0)
    x = random(torch.randn, generator, 200, 2) * 3
    y = random(torch.rand, generator, 200, 2) < 0.3
    apart.update(x, y)
    whole.update(x, y)
    for make in (moving, climbing):
        one, other = trained(make(6)), trained(make(6))
        one.step(apart)
        other.step(whole)
        assert_same(one, saved(other))


def test_an_object_with_accuracy_and_slope_will_do():
    class Mine:
        def accuracy(self):
            return torch.tensor(2 / 3)

        def slope(self):
            return torch.tensor(0.5)

    criterion = trained(moving(6, focus=0.0))
    criterion.step(Mine())
    assert criterion.alpha.tolist() == pytest.approx([0.25] * 6)
    numbers, whole = trained(climbing(6)), trained(climbing(6))
    numbers.step(torch.tensor(2 / 3))
    whole.step(Mine())
    assert_same(numbers, saved(whole))
    assert float(whole.state_dict()["accuracy"]) == pytest.approx(2 / 3)
    trained(numbers).step(1)
    assert float(numbers.state_dict()["best_accuracy"]) == 1


class OnlyAccuracy:
    def accuracy(self):
        return 0.9


STEPS = [
    (moving, 0.9, TypeError, r"`measured` to have the methods `accuracy\(\)` and `slope\(\)`, but "
     r"got 0.9 \(float\); pass the CalibrationHistogram .*`AdaptivePerturbation.published`"),
    (moving, OnlyAccuracy(), TypeError, "but got OnlyAccuracy; pass the CalibrationHistogram"),
    (moving, Measured(math.nan, 1.0), ValueError, "seen an element, but got an empty histogram"),
    (moving, CalibrationHistogram(), ValueError, r"empty histogram; call `histogram.update\("),
    (moving, Measured(1.2, 1.0), ValueError, r"`accuracy` to be in \[0, 1\], but got 1.2"),
    (climbing, math.nan, ValueError, r"`accuracy` to be in \[0, 1\], but got nan"),
    (climbing, torch.tensor(-0.1), ValueError, "`accuracy` .* but got -0.1"),
    (climbing, "0.9", TypeError, "`accuracy` to be a number"),
    (climbing, torch.tensor([0.9]), TypeError, r"0-d tensor .* got a tensor of shape \(1,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "measured", "kind", "text"), STEPS, ids=range(len(STEPS)))
def test_bad_measurements_are_refused_and_nothing_moves(make, measured, kind, text):
    criterion = trained(make(6, beta=1.0, prior=0.3))
    before = saved(criterion)
    with pytest.raises(kind, match=text):
        criterion.step(measured)
    assert_same(criterion, before)


@pytest.mark.parametrize("make", [build, moving, published, climbing])
def test_a_step_without_a_training_batch_changes_nothing_and_says_so_in_one_text(make):
    criterion = make(4, generator=seeded(0))
    if criterion.alpha.any():  # past a whole epoch
        trained(criterion).step(Measured())
    before = saved(criterion)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):  # a sanity check before training, and more
            criterion.step(Measured(0.9, 0.1))
    assert_same(criterion, before)
    assert {str(one.message) for one in caught} == {
        "step() was called without a training batch since the last step, so it moved nothing; a "
        "sanity check before training needs no step, and training needs `criterion.train()`"
    }
    assert {one.filename for one in caught} == {__file__}
    with pytest.raises(TypeError):  # which it looks at all the same
        criterion.step("0.9")


def test_steps_before_training_are_no_warm_up():
    criterion, other = build(4, warmup=2), build(4, warmup=2)
    with pytest.warns(UserWarning, match="without a training batch"):
        criterion.step(Measured())
    for one in (criterion, other):
        for _ in range(3):
            trained(one).step(Measured())
    assert_same(criterion, saved(other))


# -- the loss


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_is_the_functions_at_the_levels_held_before(reduction):
    weights = dict(weight=torch.rand(3), pos_weight=torch.rand(3), reduction=reduction)
    x = torch.randn(4, 3, requires_grad=True)
    y = torch.tensor([[0, 1, 255]]).expand(4, 3).byte()
    index = torch.tensor([4, 0, 2, 1], dtype=torch.int32)
    for criterion in both(5, prior=0.3, beta=1.2, ignore_index=255, **weights):
        for _ in range(3):
            held = criterion.alpha.clone()
            loss = criterion(10 * x, y, index)
            given_alpha = held[index.long()]
            want = sc_bce_with_logits(
                10 * x, y, given_alpha, 1.2, prior=0.3, ignore_index=255, **weights
            )
            assert_close(loss, want, rtol=0, atol=0)
            grads = [torch.autograd.grad(one.sum(), x)[0] for one in (loss, want)]
            assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("sampling", ["sample", "element"])
def test_draws_follow_each_samples_level(sampling):
    criterion = moving(2, beta=2.0, prior=0.5, sampling=sampling, reduction="none")
    put(criterion, alpha=torch.tensor([0.0, 0.4]))
    x = torch.ones(20_000, 2, requires_grad=True)
    index = torch.arange(20_000) % 2
    flipped = criterion(x, torch.ones_like(x), index, update=False) > 1
    assert not flipped[index == 0].any()
    share = flipped[index == 1].float().mean()
    assert float(share) == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / 10_000))
    whole = (flipped[:, 0] == flipped[:, 1]).all()
    assert bool(whole) == (sampling == "sample")


def test_generator_decides_the_draws():
    x, y, index = torch.randn(50, 2, requires_grad=True), torch.rand(50, 2), torch.arange(50)
    before = rng_state()
    losses = []
    for seed in (1, 1, 2):
        criterion = moving(50, level=0.4, sampling="sample", generator=seeded(seed))
        losses.append(criterion(x, y, index))
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(rng_state(), before)


def test_eval_and_no_grad_are_plain_bce_and_touch_nothing():
    for criterion in both(3, sampling="sample", generator=seeded(0)):
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


@pytest.mark.filterwarnings(
    "ignore:AdaptivePerturbation has trained past its warm-up"
)  # two passes
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("make", [build, published])
def test_warm_up_is_plain_bce_bit_for_bit_and_moves_nothing(make, warmup):
    generator = seeded(0)
    options = dict(prior=0.3, beta=1.0, sampling="sample", generator=generator)
    criterion, before = make(4, warmup=warmup, **options), generator.get_state()
    x, y, index = torch.randn(4, 2, requires_grad=True), torch.rand(4, 2), torch.arange(4)
    for epoch in range(max(warmup, 1)):
        for dtype in (torch.float32, torch.bfloat16):  # which torch does not compute in float32
            given_x, given_y = x.to(dtype), y.to(dtype)
            plain = torch.nn.functional.binary_cross_entropy_with_logits(given_x, given_y)
            loss = criterion(given_x, given_y, index)
            assert torch.equal(loss, plain)
            assert loss.dtype == dtype
        assert (criterion.alpha == 0).all(), epoch
        criterion.step(Measured(0.9, 1.0))
    assert torch.equal(generator.get_state(), before)  # nothing was drawn
    if make is build:  # the step that ends it sets the levels, a batch of the paper's moves them
        assert (criterion.alpha > 0).all()
        assert criterion.alpha.mean() == pytest.approx(0.2)
    else:
        assert (criterion.alpha == 0).all()
        criterion(x.detach().abs().requires_grad_() * 9, torch.ones(4, 2), index)
        assert (criterion.alpha > 0).all()


def test_targets_that_learn_leave_the_table_without_a_graph():
    for criterion in both(2):
        target = torch.full((2, 3), 0.9, requires_grad=True)
        criterion(X, target, torch.tensor([0, 1])).backward()
        assert target.grad is not None
        assert not criterion.alpha.requires_grad
        criterion.step(Measured())
        assert not any(value.requires_grad for value in criterion.state_dict().values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_show_in_the_loss_and_spare_the_levels(bad):
    criterion = put(climbing(3, reduction="none"), alpha=0.1)
    x = torch.tensor([[bad, 1.0], [5.0, 5.0], [5.0, bad]], requires_grad=True)
    loss = criterion(x, torch.ones(3, 2), torch.tensor([0, 1, 1]))
    assert not loss[0, 0].isfinite()
    assert criterion.alpha[0] == np.float32(0.1)
    # Row 1 occurs twice: the sample that is not finite takes a step of 0, and halves the mean.
    twin = put(climbing(3), alpha=0.1)
    twin(x[1:2], torch.ones(1, 2), torch.tensor([1]))
    assert float(criterion.alpha[1]) == pytest.approx(0.1 + (float(twin.alpha[1]) - 0.1) / 2)
    other = moving(3)
    other(x, torch.ones(3, 2), torch.tensor([0, 1, 1]))
    other.step(Measured())
    assert other.alpha.isfinite().all()


def test_ignored_samples_keep_what_they_have():
    x = torch.full((2, 4), 5.0)
    x[0, 0] = math.nan
    y = torch.ones(2, 4, dtype=torch.uint8)
    y[0], y[1, :2] = 255, 255
    default, climbs = both(3, ignore_index=255)
    for criterion in (default, climbs):
        criterion(x.requires_grad_(), y, torch.tensor([0, 2]))
    assert climbs.alpha.tolist() == pytest.approx([0, 0, 0.01])
    assert default.state_dict()["sample_accuracy"].tolist() == pytest.approx([0.5, 0.5, 0.55])
    assert [float(default.state_dict()[name]) for name in ("elements", "positives")] == [2, 2]


def test_samples_without_elements_spoil_nothing():
    for criterion in both(3):
        criterion(torch.zeros(2, 0, requires_grad=True), torch.zeros(2, 0), torch.arange(2))
        criterion.step(Measured(0.9, 1.0))
        assert all(value.isfinite().all() for value in criterion.state_dict().values())
        assert torch.as_tensor(criterion.prior) == 0.5


def test_one_half_is_positive_in_logit_and_label():
    criterion = build(4, num_labels=1)
    x = torch.tensor([[0.0], [0.0], [-1.0], [1.0]], requires_grad=True)
    y = torch.tensor([[1.0], [0.0], [0.5], [0.5]])
    criterion(x, y, torch.arange(4))
    state = criterion.state_dict()
    assert state["sample_accuracy"].tolist() == pytest.approx([0.55, 0.45, 0.45, 0.55])
    assert [state[name].tolist() for name in ("elements", "positives")] == [[4], [2]]


def test_scalars_and_empty_batches():
    criterion = climbing(2)
    five = torch.tensor(5.0, requires_grad=True)
    criterion(five, torch.tensor(1.0), torch.tensor(1))
    assert criterion.alpha.tolist() == pytest.approx([0, 0.01])
    assert moving(2)(five, torch.tensor(1.0), torch.tensor(1)).shape == ()
    if not ANY_SIZE:
        return
    none = torch.empty(0, dtype=torch.int64)
    loss = criterion(torch.empty(0, 3, requires_grad=True), torch.empty(0, 3), none)
    assert loss.isnan()
    assert criterion.alpha.tolist() == pytest.approx([0, 0.01])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_slopes_of_any_precision_reach_a_float32_table(dtype):
    criterion = climbing(1, penalty=0.0)
    # 70,000 slopes of 1: half precision would stop at 2048, or overflow at 65,504.
    x = torch.ones(1, 70_000, dtype=dtype, requires_grad=True)
    criterion(x, torch.ones(1, 70_000, dtype=torch.bool), torch.tensor([0]))
    assert criterion.alpha.dtype == torch.float32
    assert_close(criterion.alpha, torch.tensor([0.002]))


@pytest.mark.parametrize("mask", [*MASKS, torch.uint16, torch.uint32, torch.uint64, torch.bfloat16])
def test_hits_and_labels_are_counted_in_masks_of_any_dtype(mask):
    x, y = torch.randn(5, 9, requires_grad=True), torch.rand(5, 9) > 0.5
    criterion = build(5)
    criterion(x, y.to(mask), torch.arange(5))
    state = criterion.state_dict()
    want = 0.9 * 0.5 + 0.1 * ((x >= 0) == y).float().mean(1)
    assert_close(state["sample_accuracy"], want)
    assert [state[name].item() for name in ("elements", "positives")] == [45, int(y.sum())]


# -- dynamics of the published rule


def test_max_entropy_climbs_while_accuracy_holds_and_falls_when_it_is_lost():
    criterion = climbing(1, accuracy=0.9, objective="max_entropy", penalty=20.0)
    x, y, index = torch.full((1, 1), 5.0, requires_grad=True), torch.ones(1, 1), torch.tensor([0])
    criterion(x, y, index)
    up = float(criterion.alpha)
    assert up == pytest.approx(0.01)
    criterion.step(0.8)  # 0.1 below the best seen
    criterion(x, y, index)
    assert float(criterion.alpha) == pytest.approx(up + 0.002 * (5 - 20 * 0.1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_step_sizes_stay_finite(objective):
    criterion = climbing(1, objective=objective, lr=1e15, penalty=1e15)
    for x in (3.0, -3.0, 1e38, 0.0):
        logits = torch.tensor([[x], [-x]], requires_grad=True)
        criterion(logits, torch.ones(2, 1), torch.tensor([0, 0]))
        assert 0 <= float(criterion.alpha) <= 0.49 + 1e-6


def test_a_prior_that_costs_nothing_moves_nothing():
    y = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    criterion = published(2, beta=1.0, prior=torch.tensor([0.0, 1.0]), warmup=1)
    x = torch.tensor([[-3.0, 3.0], [3.0, 3.0]], requires_grad=True)
    for _ in range(3):
        loss = criterion(x, y, torch.arange(2))
        assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(x, y))
        criterion.step(0.9)
    assert criterion.alpha.tolist() == [0, 0]


def test_a_step_clips_published_levels_to_the_cap_of_the_new_prior():
    criterion = put(climbing(2, beta=1.0, prior="observed"), alpha=0.9)  # below 1 / (2 * .5) - .01
    x = torch.zeros(2, 19, requires_grad=True)
    criterion(x, torch.zeros(2, 19), torch.arange(2))
    criterion.step(0.9)
    high = 1 / (2 * (1 - 0.5 / 39)) - 0.01
    assert criterion.alpha.tolist() == pytest.approx([high, high])


def test_the_published_setting_is_the_papers():
    criterion = AdaptivePerturbation.published(7)
    assert repr(criterion) == (
        "AdaptivePerturbation(num_samples=7, Climb(objective='calibration', lr=0.002, "
        "penalty=2000.0), beta=2.0, prior=0.5, warmup=5, sampling='sample', reduction='mean', "
        "mean_alpha=0, warming up 0/5)"
    )
    other = AdaptivePerturbation.published(7, "max_entropy", warmup=2, ignore_index=255)
    assert (other.rule.objective, other.warmup, other.ignore_index) == ("max_entropy", 2, 255)

    class Mine(AdaptivePerturbation):
        pass

    assert type(Mine.published(3)) is Mine
    for name in ("level", "focus"):
        text = f"`{name}` to be left out: the published rule has none, but got 0.5"
        with pytest.raises(ValueError, match=text):
            AdaptivePerturbation.published(7, **{name: 0.5})


# -- levels, flip rates, prior


def test_levels_are_read_only():
    criterion = AdaptivePerturbation(4)
    text = "`alpha` is read-only: `step` moves the levels; set where they start with `level`, or"
    with pytest.raises(AttributeError, match=text):
        criterion.alpha = torch.zeros(4)
    assert (criterion.alpha.shape, criterion.alpha.dtype) == ((4,), torch.float32)
    assert "alpha" not in dict(criterion.named_buffers())


def test_flip_rates_are_means_over_the_rows_ever_trained():
    criterion = put(build(4, prior=0.5), alpha=torch.tensor([0.0, 0.1, 0.2, 0.3]))
    # Before any was trained, over all: the levels may have been loaded.
    assert [float(rate) for rate in criterion.flip_rates] == pytest.approx([0.075, 0.075])
    put(criterion, visited=torch.tensor([0, 1, 2, 1]))
    assert [float(rate) for rate in criterion.flip_rates] == pytest.approx([0.1, 0.1])
    assert criterion.flip_rates[0].shape == ()


def test_flip_rates_have_one_value_for_each_label():
    rates = torch.tensor([0.1, 0.3])
    criterion = put(build(3, prior=rates[:, None, None]), alpha=0.2)
    for got, want in zip(criterion.flip_rates, (0.2 * rates, 0.2 * (1 - rates)), strict=True):
        assert_close(got, want)


def test_the_observed_prior_counts_valid_labels_and_stays_fixed_between_steps():
    criterion = build(4, num_labels=2, ignore_index=-1)
    assert criterion.prior.tolist() == [0.5, 0.5]
    y = torch.tensor([[1.0, -1.0], [0.0, 0.25], [0.0, 0.0], [1.0, -1.0]])
    x, index = torch.full((4, 2), 4.0, requires_grad=True), torch.arange(4)

    def counts():
        state = criterion.state_dict()
        return [state[name].tolist() for name in ("elements", "positives")]

    criterion(x, y, index)
    criterion(x, y, index, update=False)  # not a batch of its own: counts nothing
    criterion.eval()
    criterion(x, y)
    criterion.train()
    with torch.no_grad():
        criterion(x, y)
    assert criterion.prior.tolist() == [0.5, 0.5]
    assert counts() == [[4, 2], [2, 0.25]]
    criterion.step(Measured())
    assert counts() == [[0, 0], [0, 0]]
    assert criterion.state_dict()["counts"].tolist() == [[4, 2], [2, 0.25]]
    assert criterion.prior.tolist() == pytest.approx([2.5 / 5, 0.75 / 3])
    criterion(x, y, index)
    assert criterion.prior.tolist() == pytest.approx([0.5, 0.25])
    criterion.step(Measured())
    assert criterion.prior.tolist() == pytest.approx([4.5 / 9, 1.0 / 5])


def test_one_observed_prior_of_images():
    criterion = build(4, focus=0.0, level=0.4)
    y = torch.zeros(4, 1, 5, 5)
    y[0, 0, 0, :4] = 1
    criterion(torch.zeros_like(y).requires_grad_(), y, torch.arange(4))
    criterion.step(Measured(0.9, 1.0))
    assert criterion.prior.shape == ()
    assert float(criterion.prior) == pytest.approx(4.5 / 101)
    x = torch.randn(4, 1, 5, 5, requires_grad=True)
    loss = criterion(x, y, torch.arange(4))
    assert_close(loss, sc_bce_with_logits(x, y, 0.4, 1.0, prior=4.5 / 101))


class Calls(TorchDispatchMode):
    """How many calls of aten there are."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.cpu_only("meta tensors are everywhere alike")
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
@pytest.mark.parametrize("labels", [None, 3])
def test_counting_labels_costs_three_calls_a_forward(dtype, labels):
    def calls(**options):
        criterion = build(9, beta=1.0, **options).to("meta")
        x = torch.empty(4, 3, 5, device="meta", requires_grad=True)
        y = torch.empty(4, 3, 5, device="meta", dtype=dtype)
        with Calls() as counted:
            criterion(x, y, torch.empty(4, device="meta", dtype=torch.int64))
        return counted.number

    plain = calls(prior=0.5 if labels is None else torch.full((3, 1), 0.5))
    assert plain > 5
    assert calls(prior="observed", num_labels=labels) - plain <= 3


# -- learning apart from the loss

SETTINGS = [
    (moving, dict()),
    (moving, dict(prior="level_weighted", num_labels=3)),
    (moving, dict(focus=0.0, prior=0.2)),
    (climbing, dict()),
    (climbing, dict(beta=1.0, prior="observed", num_labels=3)),
    (build, dict(warmup=9)),
]


class Loop:
    """A network, and a table after an epoch; what a plain loop does with one batch."""

    def __init__(self, make, options):
        torch.manual_seed(4)
        self.net = torch.nn.Linear(5, 3)
        self.x, self.index = 3 * torch.randn(4, 5), torch.tensor([2, 0, 5, 2])
        self.y = (torch.randn(4, 3) > 0).float()
        self.criterion = make(6, **options)
        self.criterion.update(self.net(self.x), self.y, self.index)
        self.criterion.step(Measured())

    def loss(self, logits, **options):
        return self.criterion(logits, self.y, self.index, **options)

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.net.parameters()))


@pytest.fixture(params=SETTINGS, ids=range(len(SETTINGS)))
def loops(request):
    """One for the plain loop, which has run, and one for what is to equal it."""
    plain, other = Loop(*request.param), Loop(*request.param)
    plain.loss(plain.net(plain.x))
    return plain, other


def assert_moved_once(plain, other):
    assert_same(other.criterion, saved(plain.criterion))


def test_update_false_is_the_same_loss_and_moves_nothing(loops):
    plain, other = loops
    before = saved(other.criterion)
    logits = other.net(other.x)
    first, second = (other.loss(logits, update=False) for _ in range(2))
    assert_same(other.criterion, before)
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


def test_several_heads_on_one_table_climb_along_their_mean_slope():
    plain, other = Loop(climbing, {}), Loop(climbing, {})
    plain.loss(plain.net(plain.x))
    heads = [plain.net(plain.x) + shift for shift in (-2.0, 0.5, 1.5)]  # whose mean it is
    sum(other.loss(head, update=False) for head in heads).backward()
    other.criterion.update(sum(heads) / 3, other.y, other.index)
    assert_close(other.criterion.alpha, plain.criterion.alpha, rtol=1e-5, atol=1e-7)
    assert (plain.criterion.alpha > 0).any()


@by_value
@pytest.mark.parametrize("index", [None, torch.arange(3), torch.tensor([0, 9])], ids=str)
def test_update_refuses_what_a_forward_refuses_and_moves_nothing(index):
    for criterion in both(3):
        before = saved(criterion)
        for call in (criterion, criterion.update):
            with pytest.raises((ValueError, IndexError), match="`index`"):
                call(X, Y, index)
            with pytest.raises(ValueError, match="mask > 0"):
                call(X, (Y * 255).byte(), torch.tensor([0, 1]))
            with pytest.raises(TypeError, match="floating-point logits"):
                call(X.detach().long(), Y, torch.tensor([0, 1]))
            with pytest.raises(ValueError, match="size of `input`"):
                call(X, Y[:1], torch.tensor([0, 1]))
        assert_same(criterion, before)


@by_value
def test_a_refused_batch_draws_nothing():
    generator = seeded(0)
    criterion = moving(3, sampling="sample", generator=generator)
    before = generator.get_state()
    with pytest.raises(ValueError, match="mask > 0"):
        criterion(X, (Y * 255).byte(), torch.tensor([0, 1]))
    assert torch.equal(generator.get_state(), before)


def test_an_illegal_label_that_cannot_be_read_is_nan():
    criterion = moving(3)
    loss = refused(
        ValueError, "mask > 0", lambda: criterion(X, (Y * 255).byte(), torch.tensor([0, 1]))
    )
    assert loss is None or loss.isnan()


def test_the_labels_along_dimension_1_are_as_many_as_the_priors():
    with pytest.raises(ValueError, match=r"num_labels=2 along dimension 1, but got shape \(2, 3\)"):
        moving(3, num_labels=2)(X, Y, torch.tensor([0, 1]))


# -- inference mode


@pytest.mark.not_on("xla", "it has no inference tensors")
@pytest.mark.parametrize("call", ["step", "resize", "reset_parameters", "load", "build"])
@pytest.mark.parametrize("make", [moving, climbing])
def test_what_is_stored_in_inference_mode_trains_on(make, call):
    """Otherwise each later training forward raises "Inplace update to inference tensor"."""
    criterion = trained(make(6, beta=0.9, prior="observed", generator=seeded(0)))
    with torch.inference_mode():
        if call == "step":
            criterion.step(Measured())
        elif call == "resize":
            criterion.resize(8)
        elif call == "reset_parameters":
            criterion.reset_parameters()
        elif call == "load":
            criterion.load_state_dict({k: v * 1 for k, v in criterion.state_dict().items()})
        else:
            criterion = make(6, beta=0.9, prior=torch.tensor(0.2))
    for _ in range(2):
        trained(criterion, batches=2).step(Measured())
    x = torch.randn(4, 3, requires_grad=True)
    criterion(x, torch.ones(4, 3), torch.arange(4)).backward()
    assert x.grad.isfinite().all()
    assert not any(value.is_inference() for value in (criterion.alpha, criterion.prior))


# -- tracing and compile


@pytest.mark.parametrize("sampling", ["expected", "sample", "element"])
@pytest.mark.parametrize("prior", [0.5, torch.tensor([0.1, 0.2, 0.3]), *COUNTED], ids=str)
@pytest.mark.parametrize("make", [moving, climbing])
def test_a_training_forward_reads_no_value_off_the_cpu(make, prior, sampling):
    """A meta tensor has no values: any look at one, where an accelerator would wait, raises."""
    options = dict(sampling=sampling, ignore_index=255, beta=1.0, prior=prior)
    criterion = make(9, weight=torch.ones(3), **options).to("meta")
    x = torch.empty(4, 3, device="meta", requires_grad=True)
    index = torch.empty(4, device="meta", dtype=torch.int64)
    for dtype in (torch.uint8, torch.float32):
        y = torch.empty(4, 3, device="meta", dtype=dtype)
        criterion(x, y, index).backward()
        assert x.grad.is_meta
        criterion.update(x, y, index)


@pytest.mark.not_on("xla", "make_fx takes what it draws for constants")
@pytest.mark.parametrize("sampling", ["expected", "sample", "element"])
@pytest.mark.parametrize("make", [moving, climbing])
def test_traces_and_fake_tensors_draw_too(make, sampling):
    options = dict(sampling=sampling, prior="observed", beta=1.0)
    batch = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3), torch.arange(4)
    criterion = put(make(6, **options), alpha=0.3)
    torch.manual_seed(1)
    traced = make_fx(lambda *batch: criterion(*batch, update=False))(*batch)
    for _ in range(2):
        torch.manual_seed(2)
        want = criterion(*batch, update=False)
        torch.manual_seed(2)
        assert_close(traced(*batch), want, rtol=0, atol=0)
    make_fx(lambda *batch: criterion(*batch))(*batch)
    assert criterion.state_dict()["visited"].tolist() == [2, 2, 2, 2, 0, 0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(one) for one in batch]
        loss = criterion(*fake)
        assert (loss.shape, loss.dtype) == ((), torch.float32)
    with FakeTensorMode():
        criterion = build(6, **options)
        x = torch.randn(4, 3, requires_grad=True)
        criterion(x, torch.rand(4, 3), torch.arange(4)).backward()
        assert x.grad.shape == (4, 3)


WAYS = {
    "default": lambda **options: build(12, **options),
    "one level": lambda **options: build(12, focus=0.0, **options),
    "published": lambda **options: published(12, warmup=1, **options),
}


@pytest.mark.parametrize(
    ("way", "prior"),
    [("default", 0.2), ("default", torch.tensor([0.1, 0.2, 0.3])), ("default", "level_weighted"),
     ("one level", "observed"), ("published", 0.5), ("published", 0.2), ("published", "observed")],
    ids=str,
)  # fmt: skip
def test_compile_in_one_graph_follows_levels_and_prior_without_a_repetition(way, prior):
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager, compiled = (WAYS[way](beta=1.0, prior=prior, ignore_index=255) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True, backend=count)
    frames = []
    for epoch in range(5):
        for _ in range(3):
            x = (4 * torch.randn(4, 3)).requires_grad_()
            y = (torch.rand(4, 3) < 0.3).byte()
            index = torch.randint(0, 12, (4,))
            losses = [one(x, y, index) for one in (eager, call)]
            assert_close(*losses)
            assert_close(*[torch.autograd.grad(loss, x)[0] for loss in losses])
        for one in (eager, compiled):
            one.step(Measured(0.8 + 0.01 * epoch, 0.7))
        assert_close(compiled.alpha, eager.alpha)
        frames.append(count.frame_count)
    # One graph for the warm-up, one for after it.
    assert frames == [1, 2, 2, 2, 2]
    assert_close(compiled.prior, eager.prior)
    assert (compiled.alpha > 0).any()


@pytest.mark.not_on("xla", "it compiles for each size anyway")
@pytest.mark.parametrize("rows", [100, None])
def test_compile_does_not_repeat_over_epochs_and_batch_sizes(rows):
    count = torch._dynamo.testing.CompileCounter()
    criterion = AdaptivePerturbation(rows)
    compiled = torch.compile(criterion, fullgraph=True, backend=count, dynamic=True)
    frames = []
    for _ in range(4):
        for size in (8, 8, 5):
            index = () if rows is None else (torch.randint(0, 100, (size,)),)
            compiled(torch.randn(size, 3, requires_grad=True), torch.rand(size, 3), *index)
        criterion.step(Measured())
        frames.append(count.frame_count)
    assert frames == [1, 2, 2, 2]


def test_compile_of_a_forward_that_does_not_move_and_of_update():
    eager, compiled = climbing(7), climbing(7)
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    x, y = (4 * torch.rand(4, 3)).requires_grad_(), torch.ones(4, 3)
    index = torch.tensor([1, 6, 1, 2])
    for _ in range(2):
        assert_close(forward(x, y, index, update=False), eager(x, y, index, update=False))
        assert torch.equal(compiled.alpha > 0, eager.alpha > 0)
        update(x, y, index)
        eager.update(x, y, index)
        assert_close(compiled.alpha, eager.alpha)
    assert (compiled.alpha > 0).any()


@pytest.mark.not_on("xla", "inductor writes no code for it")
def test_compile_inductor_refuses_an_index_out_of_range():
    criterion = climbing(6)
    compiled = torch.compile(criterion, fullgraph=True)
    for wrong in (-1, 6):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            compiled(X[:, :1].detach().requires_grad_(), Y[:, :1], torch.tensor([0, wrong]))
    assert (criterion.alpha[1:] == 0).all()


@pytest.mark.not_on("xla", "inductor writes no code for it")
@pytest.mark.parametrize("make", [moving, climbing])
def test_compile_inductor_trains(make):
    criterion, eager = make(4), make(4)
    criterion.compile(fullgraph=True)
    x = torch.randn(4, 3, requires_grad=True)
    for one in (criterion, eager):
        one(9 * x.abs(), torch.ones(4, 3), torch.arange(4)).backward()
        one.step(Measured())
    assert_close(criterion.alpha, eager.alpha)
    assert x.grad.isfinite().all()


# -- size and repr


def test_resize_keeps_what_is_there():
    criterion = trained(moving(2, focus=1.0))
    before = saved(criterion)
    criterion.resize(2)  # as large as it is
    assert_same(criterion, before)
    criterion.resize(np.int64(4))
    after = saved(criterion)
    assert_close(after["alpha"], torch.cat((before["alpha"], torch.full((2,), 0.2))))
    accuracy = torch.cat((before["sample_accuracy"], torch.full((2,), 0.5)))
    assert_close(after["sample_accuracy"], accuracy)
    assert after["visited"].tolist() == [2, 2, 0, 0]
    trained(criterion).step(Measured())
    assert criterion.num_samples == 4
    with pytest.raises(ValueError, match="at least the table's 4, but got 3; build a new module"):
        criterion.resize(3)
    with pytest.raises(ValueError, match="table's None"):
        build(None).resize(3)
    climbs = put(climbing(2), alpha=0.2)
    climbs.resize(3)
    assert climbs.alpha.tolist() == pytest.approx([0.2, 0.2, 0.0])


def test_repr_shows_the_rule_and_the_table():
    criterion = build(4, ignore_index=255, warmup=3)
    whole = (
        "AdaptivePerturbation(num_samples=4, FollowSlope(level=0.2, focus=2.0), beta=1.0, "
        "prior='observed', warmup=3, sampling='expected', ignore_index=255, reduction='mean', "
        "mean_alpha="
    )
    for steps in range(3):
        assert repr(criterion) == f"{whole}0, warming up {steps}/3)"
        trained(criterion, labels=1).step(Measured(0.9, 1.0))
    assert repr(criterion) == f"{whole}0.2)"
    assert ", warming up 0/1)" in repr(build(1, warmup=0))


def test_repr_shows_where_the_prior_comes_from():
    assert ", num_labels=3, " in repr(build(4, num_labels=3))
    assert ", prior='level_weighted', " in repr(build(4, prior="level_weighted"))
    assert ", prior=(3,), " in repr(build(4, prior=torch.full((3,), 0.1)))
    assert "mean_alpha" not in repr(build(4).to("meta"))


# -- construction


def make(**options):
    return lambda: build(**{"num_samples": 3, **options})


TENTH = torch.tensor([0.5, 0.1], device="cpu")  # elsewhere a look would wait
CONSTRUCTION = [
    (make(num_samples=0), ValueError, "`num_samples` to be a positive int, but got 0"),
    (make(num_samples=2.5), TypeError, "`num_samples` to be a positive int, but got 2.5"),
    (make(num_samples=True), TypeError, "`num_samples` to be a positive int"),
    (make(level=1.5), ValueError, r"`level` to be in \[0, 1\], but got 1.5"),
    (make(focus=-1.0), ValueError, "`focus` to be in"),
    (make(beta=0), ValueError, "`beta` to be above 0, but got 0"),
    (make(beta=2.1, prior=0.5), ValueError, r"`beta` to be in \[0, 2\], but got 2.1"),
    (make(beta=math.nan), ValueError, "`beta` .* but got nan"),
    (make(prior=0.1, beta=1.2), ValueError, r"`beta` to be in \[0, 1.11111\], but got 1.2"),
    (make(prior=TENTH, beta=1.2), ValueError, r"`beta` to be in \[0, 1.11111\]"),
    (make(beta=2.0), ValueError, r"be at most 1 with a prior that is counted, but got 2.0; .* "
     "needs `prior=0.5`"),
    (make(prior=0.0), ValueError, "`prior` to be between 0 and 1, but got 0"),
    (make(prior=1.5), ValueError, r"`prior` to be in \[0, 1\], but got 1.5"),
    (make(prior=[0.5]), TypeError, r"`prior` to be a number .* or a Tensor, but got list; pass"),
    (make(prior=11 * TENTH, beta=0.5), ValueError, r"`prior` to be in \[0, 1\], but got"),
    (make(prior=torch.tensor(1j), beta=0.5), TypeError, "`prior` to be a real Tensor"),
    (make(prior="rate"), ValueError, "one of 'observed', 'level_weighted', but got 'rate'"),
    (make(num_labels=0), ValueError, "`num_labels` to be a positive int, but got 0"),
    (make(prior=torch.full((3,), 0.2), num_labels=2), ValueError, "num_labels=2 values, .* 3"),
    (make(weight=2.0), TypeError, r"`weight` .*pass `torch.tensor\(2.0\)`"),
    (make(pos_weight=2.0), TypeError, r"`pos_weight` .*pass `torch.tensor\(2.0\)`"),
    (make(warmup=-1), ValueError, "`warmup` to be an int, 0 or more, but got -1"),
    (make(warmup=1.5), TypeError, "`warmup` to be an int, 0 or more, but got 1.5"),
    (make(sampling="batch"), ValueError, "'expected', 'sample', 'element'"),
    (make(ignore_index="void"), TypeError, "`ignore_index`"),
    (make(reduction="avg"), ValueError, "`reduction`"),
    (lambda: published(3, objective="mc"), ValueError, "'calibration', 'max_entropy', but got"),
    (lambda: published(3, lr=0.0), ValueError, "`lr` to be above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), CONSTRUCTION, ids=range(len(CONSTRUCTION)))
def test_bad_configuration_is_refused_at_construction(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_the_defaults():
    criterion = AdaptivePerturbation(4)
    assert repr(criterion).startswith(
        "AdaptivePerturbation(num_samples=4, FollowSlope(level=0.2, focus=1.0), beta=1.0, "
        "prior='observed', warmup=1, sampling='sample', reduction='mean'"
    )
    assert AdaptivePerturbation(4, prior=0.5).beta == 2.0
    assert AdaptivePerturbation(4, prior=0.2).beta == 1.25
    assert AdaptivePerturbation(4, prior=TENTH).beta == 1.0


X, Y = torch.full((2, 3), 5.0, requires_grad=True), torch.ones(2, 3)
