"""What labels move towards: the forms and laws of the prior, its oracles, and its refusals."""

import math
import warnings

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from devices import array, tensor
from hypothesis import given
from hypothesis import strategies as st
from paths import fusing, plain
from strategies import FLOATS, batches, inner, pairs, perturbations, priors, seeds
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from sc_bce import SCBCEWithLogitsLoss, perturb_target, sc_bce_with_logits

LABELS = torch.tensor([0.0, 1.0], dtype=torch.float64)
REDUCTIONS = ("none", "mean", "sum")
# Everything holds on both paths.
pytestmark = pytest.mark.usefixtures("path")


def close(actual, expected, rtol=1e-9, atol=1e-9):
    np.testing.assert_allclose(array(actual.double()), expected, rtol=rtol, atol=atol)


def wide(values):
    return torch.tensor(values, dtype=torch.float64)


def weights(value):
    return None if value is None else wide(value)


pos_weights = st.sampled_from([None, 0.25, 4.0])


@st.composite
def perturbed_batches(draw, **options):
    batch = draw(batches(**options))
    return batch, draw(perturbations(tuple(batch.input.shape)))


# --- against the reference -------------------------------------------------------------------


@given(perturbed_batches(), st.sampled_from(REDUCTIONS), pos_weights, st.sampled_from([None, 3.0]))
def test_loss_is_the_reference_formula(case, reduction, pos_weight, weight):
    batch, perturbation = case
    got = sc_bce_with_logits(
        batch.input, batch.target, **perturbation.arguments, weight=weights(weight),
        pos_weight=weights(pos_weight), reduction=reduction,
    )  # fmt: skip
    want = ref.sc_bce(
        array(batch.input), array(batch.target), perturbation.alpha, perturbation.beta,
        weight or 1.0, pos_weight or 1.0, reduction=reduction, prior=perturbation.prior,
    )  # fmt: skip
    close(got, want)


@given(perturbed_batches())
def test_target_is_the_reference_formula_and_stays_in_the_unit_interval(case):
    batch, perturbation = case
    got = perturb_target(batch.target, **perturbation.arguments)
    want = ref.effective(
        array(batch.target), perturbation.alpha, perturbation.beta, perturbation.prior
    )
    close(got, want, atol=1e-12)
    for dtype in FLOATS:
        q = perturb_target(batch.target, **perturbation.arguments, dtype=dtype)
        assert bool(((q >= 0) & (q <= 1)).all())


@given(st.data(), batches(), seeds, st.sampled_from(REDUCTIONS))
def test_a_draw_is_an_alpha_of_zeros_and_ones(data, batch, seed, reduction):
    shape = tuple(batch.input.shape)
    prior, c = data.draw(priors(shape))
    z = np.asarray(np.random.default_rng(seed).random(shape) < 0.5)
    y = array(batch.target)
    got = sc_bce_with_logits(batch.input, batch.target, tensor(z), prior=prior, reduction=reduction)
    want = ref.bce(array(batch.input), np.where(z, ref.perturbed(y, ref.largest(c), c), y))
    close(got, want if reduction == "none" else getattr(want, reduction)())


@given(perturbed_batches(), seeds, st.sampled_from(REDUCTIONS))
def test_ignored_elements_leave_the_loss_of_the_others(case, seed, reduction):
    batch, perturbation = case
    valid = np.asarray(np.random.default_rng(seed).random(tuple(batch.input.shape)) < 0.6)
    target = torch.where(tensor(valid), batch.target, -1.0)
    got = sc_bce_with_logits(
        batch.input, target, **perturbation.arguments, ignore_index=-1, reduction=reduction
    )
    want = ref.sc_bce(
        array(batch.input), array(batch.target), perturbation.alpha, perturbation.beta,
        valid=valid, reduction=reduction, prior=perturbation.prior,
    )  # fmt: skip
    close(got, want)


# --- equal forms ------------------------------------------------------------------------------


@given(perturbed_batches(), pos_weights)
def test_identity_a_share_of_the_loss_at_the_prior(case, pos_weight):
    batch, perturbation = case
    x, y, s, w = array(batch.input), array(batch.target), perturbation.strength, pos_weight or 1.0
    got = sc_bce_with_logits(
        batch.input, batch.target, **perturbation.arguments, reduction="none",
        pos_weight=weights(pos_weight),
    )  # fmt: skip
    close(got, (1 - s) * ref.bce(x, y, w) + s * ref.bce(x, perturbation.prior + 0 * x, w))


@given(perturbed_batches())
def test_identity_a_linear_penalty_on_the_slope(case):
    batch, perturbation = case
    x, y, s, c = array(batch.input), array(batch.target), perturbation.strength, perturbation[3]
    got = sc_bce_with_logits(batch.input, batch.target, **perturbation.arguments, reduction="none")
    close(got, ref.bce(x, y) + s * (y - c) * x)


@given(batches(), pairs(), pos_weights)
def test_identity_at_one_half_the_loss_of_flipped_labels(batch, pair, pos_weight):
    g, w = pair[0] * pair[1] / 2, pos_weight or 1.0
    x, y = array(batch.input), array(batch.target)
    for prior in (0.5, torch.tensor(0.5)):
        got = sc_bce_with_logits(
            batch.input, batch.target, *pair, prior=prior, reduction="none",
            pos_weight=weights(pos_weight),
        )  # fmt: skip
        close(got, (1 - g) * ref.bce(x, y, w) + g * ref.bce(x, 1 - y, w))


@given(perturbed_batches())
def test_gradient_is_sigmoid_minus_effective_target(case):
    batch, perturbation = case
    x = batch.input.clone().requires_grad_()
    sc_bce_with_logits(x, batch.target, **perturbation.arguments, reduction="sum").backward()
    want = ref.effective(array(batch.target), *perturbation[1:])
    close(x.grad, ref.sigmoid(array(batch.input)) - want)


# --- laws -------------------------------------------------------------------------------------


@given(inner, st.floats(0, 1), st.floats(0, 1))
def test_a_perfect_fit_says_the_flip_rates(c, share, of_largest):
    beta = of_largest / max(c, 1 - c)
    alpha = share * min(1.0, 1 / max(beta, 1e-9)) * 0.999
    up, down = alpha * beta * c, alpha * beta * (1 - c)
    q = perturb_target(LABELS, alpha, beta, prior=c)
    assert_close(q, wide([up, 1 - down]), rtol=0, atol=1e-12)
    x = torch.logit(q.clamp(1e-12, 1 - 1e-12)).requires_grad_()
    sc_bce_with_logits(x, LABELS, alpha, beta, prior=c).backward()
    assert x.grad.abs().max() < 1e-9


@given(inner, seeds, perturbations((40,)))
def test_the_mean_label_moves_towards_the_prior(c, seed, levels):
    y = np.random.default_rng(seed).random(40) < 0.2
    alpha, beta = float(levels.alpha.flat[0]), float(levels.beta.flat[0]) / 2
    s, pi = alpha * beta, y.mean()
    q = perturb_target(tensor(y), alpha, beta, prior=c, dtype=torch.float64)
    assert float(q.mean()) == pytest.approx((1 - s) * pi + s * c, abs=1e-12)
    if 0 < pi < 1:
        kept = perturb_target(tensor(y), alpha, beta, prior=pi, dtype=torch.float64)
        assert float(kept.mean()) == pytest.approx(pi, abs=1e-12)


@given(inner, st.floats(0, 1), seeds)
def test_the_mean_label_under_levels_per_sample(c, beta, seed):
    """It also loses the covariance of level and share of positives."""
    rng = np.random.default_rng(seed)
    y, alpha = rng.random((30, 8)) < rng.random((30, 1)), rng.random(30)
    share = y.mean(1)
    q = perturb_target(tensor(y), tensor(alpha), beta, prior=c, dtype=torch.float64)
    covariance = (alpha * share).mean() - alpha.mean() * share.mean()
    want = y.mean() + beta * alpha.mean() * (c - y.mean()) - beta * covariance
    assert float(q.mean()) == pytest.approx(want, abs=1e-12)


def test_levels_that_follow_the_label_do_not_keep_the_mean():
    y = (torch.arange(1000) < 20).double()
    q = perturb_target(y, torch.where(y > 0, 0.4, 0.02), 1.0, prior=0.02)
    assert float(q.mean()) == pytest.approx(0.02 * 0.608 + 0.98 * 0.0004)


@given(inner, st.floats(0.001, 0.999))
def test_label_order_is_kept_below_strength_one_and_sides_below_their_bound(c, s):
    bound = 1 / (2 * max(c, 1 - c))
    beta = 1 / max(c, 1 - c)
    low, high = perturb_target(LABELS, s / beta, beta, prior=c)
    assert low < high
    if abs(s - bound) > 1e-9:
        assert (bool(low < 0.5) and bool(high > 0.5)) == (s < bound)
    equal = perturb_target(LABELS, 1 / beta, beta, prior=c)
    assert equal[0] == pytest.approx(float(equal[1]), abs=1e-12)
    if beta > 1.01:  # a tensor may say more than 1 / beta: the order turns
        more = wide(1.01 / beta)
        reversed_ = perturb_target(LABELS, more, beta, prior=c)
        assert reversed_[0] > reversed_[1]


@given(inner, st.floats(0, 0.999))
def test_the_decision_that_a_prior_moves(c, s):
    """sigmoid(x) >= (1 - s) / 2 + s c is P >= 1/2; 1/2 is P >= (1/2 - s c) / (1 - s)."""
    for p, want in ((0.5, (1 - s) / 2 + s * c), ((0.5 - s * c) / (1 - s), 0.5)):
        if 0 <= p <= 1:
            # A pool of samples that is positive with probability p: linear in the label.
            q = perturb_target(wide(p), s, 1.0, prior=c)
            assert float(q) == pytest.approx(want, abs=1e-12)
    assert pytest.approx(0.62, abs=0.005) == (0.5 - 0.2 * 0.02) / 0.8


@given(batches(), st.data())
def test_a_level_of_zero_is_torch_bit_for_bit_whatever_the_prior(batch, data):
    prior, _ = data.draw(priors(tuple(batch.input.shape)))
    x = batch.input.float()
    want = F.binary_cross_entropy_with_logits(x, batch.target.float())
    assert torch.equal(sc_bce_with_logits(x, batch.target.float(), 0.0, prior=prior), want)
    assert torch.equal(sc_bce_with_logits(x, batch.target.float(), prior=prior), want)


@given(batches(), st.floats(0, 0.999), inner)
def test_none_is_the_largest_legal_strength(batch, s, c):
    x, y = batch.input, batch.target
    high = 1 / max(c, 1 - c)
    want = sc_bce_with_logits(x, y, s / high, high, prior=c)
    assert_close(sc_bce_with_logits(x, y, s / high, prior=c), want, rtol=0, atol=0)
    tensor = wide(c)
    assert_close(sc_bce_with_logits(x, y, s / high, prior=tensor), want)
    far = perturb_target(LABELS, torch.ones(2), prior=c)
    assert float(far[0] if c > 0.5 else far[1]) == pytest.approx(float(c > 0.5), abs=1e-12)
    with pytest.raises(ValueError, match="`beta` to be in"):
        sc_bce_with_logits(x, y, 0.1, high * 1.001, prior=c)


# --- differentiation --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)])
@pytest.mark.parametrize("drawn", [False, True])
def test_gradients_of_all_orders_in_logits_levels_and_prior(reduction, shape, drawn):
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0, 1.0, 0.3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    alpha = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([[0.9], [0.4]], dtype=torch.float64, requires_grad=True)
    prior = (0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    if drawn:
        alpha = torch.tensor([[True, False, True], [True, True, False]])

    def loss(x, beta, prior, *alphas):
        level = alphas[0] if alphas else alpha
        return sc_bce_with_logits(x, y, level, beta, prior=prior, reduction=reduction)

    arguments = (x, beta, prior) if drawn else (x, beta, prior, alpha)
    assert gradcheck(loss, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, arguments)


@given(perturbed_batches(scale=3.0))
def test_gradient_in_the_prior_is_minus_strength_times_logit(case):
    batch, perturbation = case
    prior = perturbation.arguments["prior"]
    if not isinstance(prior, torch.Tensor):
        return
    prior = prior.clone().requires_grad_()
    strength = tensor(perturbation.strength + 0 * array(batch.input))
    arguments = {"alpha": strength, "beta": 1.0, "prior": prior}
    sc_bce_with_logits(batch.input, batch.target, **arguments, reduction="sum").backward()
    full = -perturbation.strength * array(batch.input)
    want = np.zeros(tuple(prior.shape))
    lead = tuple(range(full.ndim - want.ndim))
    short = tuple(place for place, size in enumerate(want.shape) if size == 1)
    want += full.sum(lead).sum(short, keepdims=True)
    close(prior.grad, want)


# --- pos_weight -------------------------------------------------------------------------------


@given(inner, st.floats(0.01, 0.97), st.floats(0.01, 100))
def test_construction_is_refused_iff_a_sure_answer_is_on_the_wrong_side(c, s, weight):
    """By the sign of the loss's own gradient at the decision, logit 0."""
    beta = 1 / max(c, 1 - c)
    w = torch.tensor(weight, dtype=torch.float64)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    y = LABELS
    for given_weight, pos_weight in ((weight, w), (1.0, None)):
        odds = (
            given_weight * s * c / (1 - s * c),
            given_weight * (1 - s * (1 - c)) / (s * (1 - c)),
        )
        if min(abs(math.log(value)) for value in odds) < 1e-5:
            continue  # within the rounding of the module's float32
        loss = sc_bce_with_logits(
            x, y, s / beta, beta, prior=c, pos_weight=pos_weight, reduction="sum"
        )
        negative, positive = torch.autograd.grad(loss, x)[0]
        assert (bool(negative <= 0), bool(positive >= 0)) == (odds[0] >= 1, odds[1] <= 1)
        arguments = dict(alpha=s / beta, beta=beta, prior=c, pos_weight=pos_weight)
        if negative <= 0:
            with pytest.raises(ValueError, match="leave a sure negative on its side of 1/2"):
                SCBCEWithLogitsLoss(**arguments)
        elif positive >= 0:
            with pytest.raises(ValueError, match="leave a sure positive on its side of 1/2"):
                SCBCEWithLogitsLoss(**arguments)
        else:
            SCBCEWithLogitsLoss(**arguments)


@given(st.floats(0.001, 0.5), st.floats(0, 0.99))
def test_the_weight_that_balances_the_classes_never_calls_a_negative_positive_at_the_base_rate(
    rate, s
):
    w = (1 - rate) / rate
    odds = w * s * rate / (1 - s * rate)
    assert odds == pytest.approx(s * (1 - rate) / (1 - s * rate))
    assert odds < 1


def test_smoothing_towards_one_half_from_a_weight_of_nineteen_on():
    for weight in (18.9, 19.1, 50.0):
        make = SCBCEWithLogitsLoss.label_smoothing
        w = torch.tensor([1.0, weight])
        if weight < 19:
            make(0.1, pos_weight=w)
        else:
            with pytest.raises(ValueError, match=r"is called positive.*`prior` to the base rate"):
                make(0.1, pos_weight=w)
        make(0.1, pos_weight=w, prior=0.02)
    with pytest.raises(ValueError, match=r"a sure positive .*is called negative"):
        SCBCEWithLogitsLoss.moderation(0.6, prior=0.02)


# --- flip rates -------------------------------------------------------------------------------


@given(inner, st.floats(0, 1))
def test_flip_rates_are_those_of_the_target(c, share):
    alpha = 0.4 * share
    criterion = SCBCEWithLogitsLoss(alpha=alpha, beta=1.0, prior=c)
    up, down = criterion.flip_rates
    q = perturb_target(LABELS, alpha, 1.0, prior=c)
    assert up.shape == down.shape == ()
    close(torch.stack((up, 1 - down)), array(q), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1)])
def test_flip_rates_of_a_prior_per_label_are_one_per_label(shape):
    prior = torch.tensor([0.02, 0.5, 0.9]).reshape(shape)
    up, down = SCBCEWithLogitsLoss(alpha=0.1, prior=prior).flip_rates
    strength = 0.1 / torch.maximum(prior, 1 - prior)  # the largest legal strength of each label
    assert_close(up, (strength * prior).reshape(-1))
    assert_close(down, (strength * (1 - prior)).reshape(-1))
    up, down = SCBCEWithLogitsLoss.label_smoothing(0.1, prior=prior).flip_rates
    prior = prior.reshape(-1)
    assert_close((up, down), (0.1 * prior, 0.1 * (1 - prior)))


# --- one half is version 0.1 ------------------------------------------------------------------


def first_version(x, y, s):
    """The loss of version 0.1.0 on torch's calls."""
    return F.binary_cross_entropy_with_logits(x, torch.lerp(y, torch.tensor(0.5), s))


def first_sweep(x, y, s):
    """Its fused sums: BCE by one logarithm for the product of 32 sigmoids or more, and margins."""
    m, a = (y - 0.5) * x, x.abs()
    margin, loss = m.sum(1).double(), -(m - 0.5 * a).sum(1).double()  # added in float64 since
    factors = a.sigmoid()
    for _ in range(5):
        factors = factors[:, : factors.shape[1] // 2] * factors[:, factors.shape[1] // 2 :]
    loss = loss - factors.log().sum(1)
    return (loss + s * margin).float().sum() / x.numel()


@given(seeds, pairs(), st.booleans())
def test_towards_one_half_every_bit_is_that_of_the_first_version(seed, pair, by_sample):
    torch.manual_seed(seed % 2**31)
    x, y = (5 * torch.randn(4, 64)).requires_grad_(), (torch.rand(4, 64) < 0.4).float()
    alpha, beta = pair
    s = alpha * beta
    if by_sample:
        alpha = torch.rand(4) / 2
        s = (alpha * beta)[:, None]
    z = x.detach().clone().requires_grad_()
    for prior in (0.5, torch.tensor(0.5)):
        with plain():
            got = sc_bce_with_logits(x, y, alpha, beta, prior=prior)
        want = first_version(z, y, s)
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, z)[0])


@given(seeds, pairs(), st.booleans())
def test_towards_one_half_the_sweep_is_that_of_the_first_version(seed, pair, by_sample):
    torch.manual_seed(seed % 2**31)
    x, y = 5 * torch.randn(4, 64), (torch.rand(4, 64) < 0.4).float()
    alpha, beta = pair
    s = torch.tensor(alpha * beta)
    if alpha == 0:
        return
    if by_sample:
        alpha = torch.rand(4) / 2
        s = alpha * beta
    with fusing(1 << 20):
        got = sc_bce_with_logits(x, y, alpha, beta)
    rows = (x, y) if by_sample else (x.view(1, -1), y.view(1, -1))
    assert torch.equal(got, first_sweep(*rows, s))


# --- oracles ----------------------------------------------------------------------------------


@given(batches(soft=False), st.floats(0, 1))
def test_oracle_keras_smoothing(batch, eps):
    """keras.losses.binary_crossentropy: y * (1 - eps) + eps / 2."""
    y = array(batch.target)
    close(perturb_target(batch.target, 1.0, eps), y * (1 - eps) + 0.5 * eps, atol=1e-12)


@given(st.floats(0, 1), seeds)
def test_oracle_paddle_smoothing_with_a_prior_distribution(eps, seed):
    """paddle.nn.functional.label_smooth(y, prior_dist, epsilon): (1 - eps) y + eps prior."""
    rng = np.random.default_rng(seed)
    y, prior = rng.integers(0, 2, (6, 3)).astype(float), rng.dirichlet(np.ones(3))[None]
    want = (1 - eps) * y + eps * prior
    got = perturb_target(tensor(y), 1.0, eps, prior=tensor(prior))
    close(got, want, atol=1e-12)
    # Its one_hot example: classes, epsilon 0.1, uniform over three.
    hot = torch.eye(3, dtype=torch.float64)
    close(
        perturb_target(hot, 1.0, 0.1, prior=torch.full((3,), 1 / 3, dtype=torch.float64)),
        np.where(np.eye(3) > 0, 0.9 + 0.1 / 3, 0.1 / 3),
    )


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_oracle_platts_targets(positives, negatives):
    """(N+ + 1) / (N+ + 2) and 1 / (N- + 2), Platt 1999: smoothing towards a prior of its own."""
    up, down = 1 / (negatives + 2), 1 / (positives + 2)
    s, c = up + down, up / (up + down)
    assert s < 1
    got = perturb_target(torch.tensor([True, False]), 1.0, s, prior=c, dtype=torch.float64)
    want = [(positives + 1) / (positives + 2), 1 / (negatives + 2)]
    close(got, want, atol=1e-12)
    # Towards one half it takes a level for each label.
    alpha = torch.tensor([down, up], dtype=torch.float64)
    close(perturb_target(torch.tensor([True, False]), alpha, 2.0, dtype=torch.float64), want)


def test_oracle_spatially_varying_smoothing():
    """Half of the label, half of the Gaussian mean of its eight neighbours."""
    y = (torch.rand(2, 1, 7, 9) < 0.4).double()
    kernel = torch.exp(-torch.tensor([[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]]) / 2)
    kernel[1, 1] = 0
    kernel = (kernel / kernel.sum()).double()
    around = F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), kernel[None, None])
    # Islay and colleagues' kernel, whose centre weighs as much as the neighbours together.
    whole = kernel.clone()
    whole[1, 1] = 1
    want = F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), whole[None, None] / whole.sum())
    assert_close(perturb_target(y, 1.0, 0.5, prior=around.clamp(0, 1)), want)
    x = torch.randn_like(y).requires_grad_()
    loss = sc_bce_with_logits(x, y, 1.0, 0.5, prior=around.clamp(0, 1))
    assert_close(loss, F.binary_cross_entropy_with_logits(x, want))


# --- forms and refusals -----------------------------------------------------------------------


def test_a_prior_of_zero_or_one_perturbs_no_label_that_equals_it():
    y = torch.tensor([0.0, 1.0, 0.0, 1.0])
    prior = torch.tensor([0.0, 1.0, 1.0, 0.0])
    q = perturb_target(y, 0.2, prior=prior)
    assert_close(q, torch.tensor([0.0, 1.0, 0.2, 0.8]), rtol=0, atol=1e-7)
    assert torch.equal(q[:2], y[:2])
    x = torch.randn(4)
    loss = sc_bce_with_logits(x, y, 0.2, prior=prior, reduction="none")
    assert torch.equal(loss[:2], F.binary_cross_entropy_with_logits(x, y, reduction="none")[:2])
    assert SCBCEWithLogitsLoss(alpha=0.2, prior=torch.tensor([0.0, 1.0])).beta is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_a_prior_of_integers_is_taken_as_numbers(dtype):
    x, y = torch.randn(4, 2), torch.randint(0, 2, (4, 2))
    prior = torch.tensor([0, 1])
    want = sc_bce_with_logits(x, y, 0.3, prior=prior.float())
    assert torch.equal(sc_bce_with_logits(x, y, 0.3, prior=prior.to(dtype)), want)
    criterion = SCBCEWithLogitsLoss(alpha=0.3, prior=prior.to(dtype))
    assert criterion.prior.dtype == torch.float32
    assert torch.equal(criterion(x, y), want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_result_has_the_dtype_of_the_batch_whatever_that_of_the_prior(dtype):
    x, y = torch.randn(4, 3), torch.rand(4, 3)
    prior = torch.tensor([0.25, 0.5, 0.75])
    want = sc_bce_with_logits(x, y, 0.1, prior=prior)
    got = sc_bce_with_logits(x, y, 0.1, prior=prior.to(dtype))
    assert got.dtype == torch.float32
    assert_close(got, want, rtol=0, atol=2e-7)  # quarters are exact in every dtype
    low = sc_bce_with_logits(x.bfloat16(), y.bfloat16(), 0.1, prior=prior.to(dtype))
    assert low.dtype == torch.bfloat16
    assert perturb_target(y, 0.1, prior=prior.to(dtype)).dtype == torch.float32


def test_a_prior_broadcasts_as_pos_weight_does():
    x, y = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    rates = torch.tensor([0.02, 0.3, 0.9])
    want = torch.stack(
        [
            sc_bce_with_logits(x[:, place], y[:, place], 0.3, 1.0, prior=float(rate))
            for place, rate in enumerate(rates)
        ]
    ).mean()
    for prior in (rates[:, None, None], rates[None, :, None, None]):
        assert_close(sc_bce_with_logits(x, y, 0.3, 1.0, prior=prior), want)
    square = torch.randn(3, 3)
    columns = sc_bce_with_logits(square, square.sigmoid(), 0.3, 1.0, prior=rates)
    rows = sc_bce_with_logits(square.T, square.T.sigmoid(), 0.3, 1.0, prior=rates[:, None])
    assert_close(columns, rows)  # along the labels, never along the samples


X, Y = torch.zeros(4, 2, 3, 3), torch.ones(4, 2, 3, 3)
REFUSED = [
    (dict(prior=0.0), ValueError, r"`prior` to be between 0 and 1, but got 0.0"),
    (dict(prior=1.0), ValueError, r"`prior` to be between 0 and 1, but got 1.0"),
    (dict(prior=0), ValueError, r"`prior` to be between 0 and 1, but got 0"),
    (dict(prior=1), ValueError, r"`prior` to be between 0 and 1, but got 1"),
    (dict(prior=torch.tensor(0.02), beta=2.0), ValueError, r"`beta` to be in \[0, 1.02041\], but"),
    (dict(prior=torch.tensor([[[0.3]], [[0.9]]]), beta=1.2), ValueError, r"in \[0, 1.11111\], but"),
    (dict(prior=-0.1), ValueError, r"`prior` to be in \[0, 1\], but got -0.1"),
    (dict(prior=math.nan), ValueError, r"`prior` to be in \[0, 1\], but got nan"),
    (dict(prior=None), TypeError, r"`prior` to be a number in \[0, 1\] or a Tensor, but got None"),
    (dict(prior="observed"), TypeError, r"got 'observed' \(str\); pass `torch.as_tensor\(prior\)`"),
    (dict(prior=[0.1, 0.2]), TypeError, r"got list; pass `torch.as_tensor\(prior\)`"),
    (
        dict(prior=torch.full((2,), 0.1)),
        ValueError,
        r"one value per label, shape \(2, 1, 1\), but got shape \(2,\), which would lie along the "
        r"last dimension; pass `prior.reshape\(-1, 1, 1\)`",
    ),
    (dict(prior=torch.full((3,), 0.1)), ValueError, r"which would lie along the last dimension"),
    (
        dict(prior=torch.full((4, 1, 1), 0.1)),
        ValueError,
        r"broadcasts to \(4, 2, 3, 3\) from the last dimension, but got shape \(4, 1, 1\)",
    ),
    (dict(prior=torch.full((1, 4, 2, 3, 3), 0.1)), ValueError, r"from the last dimension, but got"),
    (dict(prior=torch.full((2, 1, 1), 0.1j)), TypeError, r"`prior` to be a real Tensor, but got"),
    (
        dict(prior=torch.tensor([[[0.1]], [[1.5]]])),
        ValueError,
        r"in \[0, 1\], but got the value 1.5$",
    ),
    (dict(prior=torch.full((2, 1, 1), -1.0)), ValueError, r"in \[0, 1\], but got the value -1$"),
    (dict(prior=torch.full((2, 1, 1), math.nan)), ValueError, r"1\], but got the value nan$"),
    (dict(alpha=0.1, beta=1.5, prior=0.1), ValueError, r"`beta` to be in \[0, 1.11111\]"),
    (dict(alpha=0.95, prior=0.1), ValueError, r"alpha \* beta = 0.95 \* 1.11111.* > 1"),
]


@pytest.mark.parametrize(("wrong", "kind", "text"), REFUSED, ids=range(len(REFUSED)))
def test_a_wrong_prior_is_named_with_its_remedy(wrong, kind, text):
    arguments = {"alpha": 0.1, **wrong}
    with pytest.raises(kind, match=text):
        sc_bce_with_logits(X, Y, **arguments)
    with pytest.raises(kind, match=text):
        perturb_target(Y, **arguments)
    with pytest.raises(kind, match=text):
        SCBCEWithLogitsLoss(**arguments)(X, Y)


def test_a_matrix_takes_a_prior_per_label_only():
    x, y = torch.zeros(4, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"broadcasts to \(4, 2\) from the last dimension"):
        sc_bce_with_logits(x, y, 0.1, prior=torch.full((4,), 0.1))


def test_a_module_checks_beta_against_every_prior():
    """However many: the module does it once."""
    prior = torch.full((5000,), 0.02)
    with pytest.raises(ValueError, match=r"`beta` to be in \[0, 1.02041\], but got 1.1"):
        SCBCEWithLogitsLoss(alpha=0.1, beta=1.1, prior=prior)
    # 1 / (1 - 0.02) of the number, whose float32 gives a little less.
    SCBCEWithLogitsLoss(alpha=0.1, beta=1 / 0.98, prior=prior)


def test_a_modules_tensor_must_be_of_probabilities():
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"`prior` to be in \[0, 1\], but got"):
            SCBCEWithLogitsLoss(alpha=0.1, prior=torch.tensor([0.1, bad]))


# --- the module -------------------------------------------------------------------------------


def test_a_tensor_prior_is_a_buffer_that_no_checkpoint_holds():
    own = torch.tensor([0.1, 0.9], dtype=torch.float64)
    criterion = SCBCEWithLogitsLoss(alpha=0.2, prior=own)
    assert criterion.prior.dtype == torch.float32
    assert not criterion.state_dict()
    assert "prior" in dict(criterion.named_buffers())
    own.zero_()
    assert_close(criterion.prior, torch.tensor([0.1, 0.9]))
    assert criterion.to("meta").prior.is_meta
    assert repr(SCBCEWithLogitsLoss(alpha=0.2, prior=torch.tensor([0.1, 0.9]))) == (
        "SCBCEWithLogitsLoss(alpha=0.2, beta=None, prior=(2,), sampling='expected', "
        "reduction='mean')"
    )


@given(perturbed_batches(), st.sampled_from(REDUCTIONS))
def test_module_equals_function(case, reduction):
    batch, perturbation = case
    prior = perturbation.arguments["prior"]
    prior = prior.float() if isinstance(prior, torch.Tensor) else prior
    criterion = SCBCEWithLogitsLoss(alpha=0.15, prior=prior, reduction=reduction)
    want = sc_bce_with_logits(batch.input, batch.target, 0.15, prior=prior, reduction=reduction)
    assert_close(criterion(batch.input, batch.target), want, rtol=0, atol=0)


@pytest.mark.parametrize("sampling", ["sample", "element"])
@pytest.mark.parametrize("prior", [0.02, torch.tensor([[0.02, 0.7]])])
def test_the_mean_of_draws_is_the_expectation(sampling, prior):
    n = 40_000
    x, y = torch.full((n, 2), 1.5), torch.tensor([0.0, 1.0]).expand(n, 2)
    criterion = SCBCEWithLogitsLoss.moderation(
        0.2, prior=prior, sampling=sampling, reduction="none"
    )
    drawn = criterion(x, y)
    want = sc_bce_with_logits(x, y, 0.2, 1.0, prior=prior, reduction="none")
    # The label moves by y - c at most, with probability 0.2: five standard errors of its mean.
    error = 1.5 * math.sqrt(0.2 * 0.8 / n)
    assert ((drawn.mean(0) - want.mean(0)).abs() < 5 * error).all()
    moved = (drawn - F.binary_cross_entropy_with_logits(x, y, reduction="none")).abs() > 1e-6
    assert 0.18 < moved.float().mean() < 0.22
    assert bool((moved[:, 0] == moved[:, 1]).all()) == (sampling == "sample")


@pytest.mark.parametrize("name", ["label_smoothing", "moderation"])
def test_named_settings_that_take_any_prior(name):
    make = getattr(SCBCEWithLogitsLoss, name)
    criterion = make(0.2, prior=0.02, sampling="expected")
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4, 3))
    assert_close(criterion(x, y), sc_bce_with_logits(x, y, 0.2, 1.0, prior=0.02))


@pytest.mark.parametrize(
    "name", ["disturb_label", "hard_inversion", "soft_inversion", "dynamic_moderation"]
)
def test_settings_that_are_defined_by_one_half(name):
    make = getattr(SCBCEWithLogitsLoss, name)
    make(0.2, prior=0.5)
    for prior in (0.02, torch.tensor([0.02, 0.5])):
        with pytest.raises(ValueError, match=rf"`prior` to be 1/2, which {name} is defined by"):
            make(0.2, prior=prior)


def test_noise_is_refused_with_another_prior():
    for prior in (0.02, torch.tensor([0.5])):
        with pytest.raises(ValueError, match="`prior` to be 1/2 if noise is drawn"):
            SCBCEWithLogitsLoss(alpha=0.1, beta=1.0, noise=0.1, sampling="sample", prior=prior)


# --- transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.02, torch.tensor([0.1, 0.5, 0.9]), torch.tensor(0.3)])
def test_vmap_compile_and_export_equal_eager(prior):
    x, y, alpha = torch.randn(5, 3), torch.randint(0, 2, (5, 3)), torch.rand(5) / 2

    def loss(x, y, alpha):
        return sc_bce_with_logits(x, y, alpha, prior=prior)

    want = loss(x, y, alpha)
    assert_close(torch.func.vmap(loss)(x, y, alpha).mean(), want)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, y, alpha), want)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            if isinstance(prior, torch.Tensor):  # of a closure, torch 2.6 can't export one
                self.register_buffer("prior", prior)
            else:
                self.prior = prior

        def forward(self, x, y, alpha):
            return sc_bce_with_logits(x, y, alpha, prior=self.prior)

    exported = torch.export.export(Loss(), (x, y, alpha))
    assert_close(exported.module()(x, y, alpha), want)


def test_compile_does_not_repeat_when_the_prior_changes():
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(sc_bce_with_logits, fullgraph=True, backend=count)
    for _ in range(4):
        compiled(torch.randn(4, 3), torch.rand(4, 3), torch.rand(4) / 2, prior=torch.rand(3))
    assert count.frame_count == 1


def test_forward_mode_in_the_prior():
    x, y = torch.randn(4, 3).double(), torch.rand(4, 3).double()
    prior = wide([0.1, 0.5, 0.9])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(prior, torch.ones(3).double())
        loss = sc_bce_with_logits(x, y, 0.2, 1.0, prior=dual, reduction="sum")
        slope = torch.autograd.forward_ad.unpack_dual(loss).tangent
    assert_close(slope, -0.2 * x.sum())


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCBCEWithLogitsLoss(alpha=0.1, prior=torch.tensor([0.1, 0.2]))(X[..., 0, 0], Y[..., 0, 0])
