import math
from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from devices import array, refused, tensor
from hypothesis import given
from hypothesis import strategies as st
from paths import watching
from strategies import FLOATS, MASKS, batches, betas, levels, pairs, seeds
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from sc_bce import SCBCEWithLogitsLoss, functional, perturb_target, sc_bce_with_logits
from sc_bce.kernels import cpu

REDUCTIONS = ("none", "mean", "sum")
# Everything holds on both paths.
pytestmark = pytest.mark.usefixtures("path")


def close(actual, expected, rtol=1e-9, atol=1e-9):
    np.testing.assert_allclose(array(actual.double()), expected, rtol=rtol, atol=atol)


# --- against the reference -------------------------------------------------------------------


@given(st.data(), batches(), st.sampled_from(REDUCTIONS))
def test_loss_is_the_reference_formula(data, batch, reduction):
    shape = tuple(batch.input.shape)
    alpha, alpha_array = data.draw(levels(shape, 0.5))
    beta, beta_array = data.draw(levels(shape, 2.0))
    weight = data.draw(st.sampled_from([None, 0.5, 3.0]))
    pos_weight = data.draw(st.sampled_from([None, 0.25, 4.0]))
    got = sc_bce_with_logits(
        batch.input,
        batch.target,
        alpha,
        beta,
        weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
        pos_weight=None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64),
        reduction=reduction,
    )
    want = ref.sc_bce(
        array(batch.input), array(batch.target), alpha_array, beta_array,
        weight or 1.0, pos_weight or 1.0, reduction=reduction,
    )  # fmt: skip
    close(got, want)


@given(st.data(), batches())
def test_target_is_the_reference_formula_and_stays_in_the_unit_interval(data, batch):
    shape = tuple(batch.target.shape)
    alpha, alpha_array = data.draw(levels(shape, 0.5))
    beta, beta_array = data.draw(levels(shape, 2.0))
    got = perturb_target(batch.target, alpha, beta)
    close(got, ref.effective(array(batch.target), alpha_array, beta_array))
    for dtype in FLOATS:
        q = perturb_target(batch.target, alpha, beta, dtype=dtype)
        assert q.dtype == dtype
        assert bool(((q >= 0) & (q <= 1)).all())


@given(batches(), pairs(), st.sampled_from(REDUCTIONS), seeds)
def test_ignored_elements_leave_the_loss_of_the_others(batch, pair, reduction, seed):
    valid = np.random.default_rng(seed).random(tuple(batch.input.shape)) < 0.6
    target = torch.where(tensor(valid), batch.target, -1.0)
    got = sc_bce_with_logits(batch.input, target, *pair, ignore_index=-1, reduction=reduction)
    want = ref.sc_bce(
        array(batch.input), array(batch.target), *pair, valid=valid, reduction=reduction
    )
    close(got, want)
    # Masked equals subset.
    if reduction != "none" and valid.any():
        subset = tensor(valid)
        alone = sc_bce_with_logits(
            batch.input[subset], batch.target[subset], *pair, reduction=reduction
        )
        assert_close(got, alone)


# --- the identities of the theory, each a property -------------------------------------------


@given(batches(), pairs())
def test_identity_shrunk_target_plus_constant_penalty(batch, pair):
    s = pair[0] * pair[1]
    x, y = array(batch.input), array(batch.target)
    got = sc_bce_with_logits(batch.input, batch.target, *pair, reduction="none")
    close(got, (1 - s) * ref.bce(x, y) + s / 2 * (ref.softplus(x) + ref.softplus(-x)))


@given(batches(), pairs())
def test_identity_linear_penalty_on_the_signed_margin(batch, pair):
    s = pair[0] * pair[1]
    x, y = array(batch.input), array(batch.target)
    got = sc_bce_with_logits(batch.input, batch.target, *pair, reduction="none")
    close(got, ref.bce(x, y) + s / 2 * (2 * y - 1) * x)


@given(batches(), pairs())
def test_identity_flip_rate(batch, pair):
    g = pair[0] * pair[1] / 2
    x, y = array(batch.input), array(batch.target)
    got = sc_bce_with_logits(batch.input, batch.target, *pair, reduction="none")
    close(got, (1 - g) * ref.bce(x, y) + g * ref.bce(x, 1 - y))


@given(batches(), pairs())
def test_gradient_is_sigmoid_minus_effective_target(batch, pair):
    x = batch.input.clone().requires_grad_()
    sc_bce_with_logits(x, batch.target, *pair, reduction="sum").backward()
    close(x.grad, ref.sigmoid(array(batch.input)) - ref.effective(array(batch.target), *pair))


@given(pairs(), st.booleans())
def test_minimiser_says_one_minus_the_flip_rate_for_the_label(pair, positive):
    alpha, beta = pair
    q = perturb_target(torch.tensor(float(positive), dtype=torch.float64), alpha, beta)
    confidence = float(q if positive else 1 - q)
    assert confidence == pytest.approx(1 - alpha * beta / 2)
    # The label order is kept iff alpha * beta < 1.
    assert (confidence > 0.5) == (alpha * beta < 1) or confidence == pytest.approx(0.5)
    x = torch.logit(q.clamp(1e-12, 1 - 1e-12)).requires_grad_()
    sc_bce_with_logits(x, torch.tensor(float(positive)).double(), alpha, beta).backward()
    assert x.grad.abs() < 1e-9


@given(batches(), betas, seeds)
def test_a_draw_is_an_alpha_of_zeros_and_ones(batch, beta, seed):
    z = np.random.default_rng(seed).random(tuple(batch.input.shape)) < 0.5
    drawn = tensor(z)
    y = array(batch.target)
    want = ref.bce(array(batch.input), np.where(z, ref.perturbed(y, beta), y))
    close(sc_bce_with_logits(batch.input, batch.target, drawn, beta, reduction="none"), want)


@given(batches(), st.floats(0, 1))
def test_only_the_product_matters_in_expectation(batch, flip):
    one = sc_bce_with_logits(batch.input, batch.target, flip / 2, 2.0)
    two = sc_bce_with_logits(batch.input, batch.target, flip, 1.0)
    assert_close(one, two)


@given(st.floats(0, 1), betas)
def test_label_variance_of_a_draw(alpha, beta):
    g = alpha * beta / 2
    for y in (0.0, 1.0):
        drawn = ref.perturbed(y, beta)
        mean = alpha * drawn + (1 - alpha) * y
        variance = alpha * (drawn - mean) ** 2 + (1 - alpha) * (y - mean) ** 2
        assert variance == pytest.approx(g * (beta / 2 - g), abs=1e-12)


@given(batches(), pairs(), st.floats(0.1, 10))
def test_pos_weight_shifts_the_minimiser_by_its_log(batch, pair, weight):
    q = perturb_target(batch.target, *pair)
    if not bool(((q > 1e-6) & (q < 1 - 1e-6)).all()):
        return
    x = (torch.logit(q) + math.log(weight)).requires_grad_()
    w = torch.tensor(weight, dtype=torch.float64)
    sc_bce_with_logits(x, batch.target, *pair, pos_weight=w, reduction="sum").backward()
    assert_close(x.grad, torch.zeros_like(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.2])
def test_label_smoothing_is_torch_cross_entropy_with_two_classes(eps):
    x = torch.randn(50, dtype=torch.float64)
    y = torch.randint(0, 2, (50,))
    two = torch.stack((torch.zeros_like(x), x), dim=1)
    assert_close(sc_bce_with_logits(x, y, 1.0, eps), F.cross_entropy(two, y, label_smoothing=eps))


# --- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", [*MASKS, *FLOATS])
@pytest.mark.parametrize("alpha", [0.0, 0.1, "per sample"])
def test_every_mask_dtype_gives_the_float_result_in_torchs_dtype(dtype, mask, alpha):
    x = torch.randn(4, 3).to(dtype)
    y = torch.randint(0, 2, (4, 3))
    if alpha == "per sample":
        alpha = torch.tensor([0.0, 0.1, 0.2, 0.3])
    got = sc_bce_with_logits(x, y.to(mask), alpha)
    float_target = y.to(mask) if mask.is_floating_point else y.to(dtype)
    assert got.dtype == F.binary_cross_entropy_with_logits(x, float_target).dtype
    wide = sc_bce_with_logits(x.double(), y.double(), alpha)
    least = max(torch.finfo(got.dtype).eps, torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert_close(got.double(), wide, rtol=4 * least, atol=4 * least)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_smooths_both_labels_alike(dtype):
    x = torch.zeros(2, dtype=dtype, requires_grad=True)
    # In bfloat16 1 - 0.0005 is 1: the gradient there would be -0.5 against 0.4995.
    sc_bce_with_logits(x, torch.tensor([1, 0]), 0.001, 1.0, reduction="sum").backward()
    assert x.grad[0] == -x.grad[1]
    # A gradient in float32 would show it.
    x = torch.zeros(2, requires_grad=True)
    y = torch.tensor([1.0, 0.0], dtype=dtype)
    sc_bce_with_logits(x, y, 0.001, 1.0, reduction="sum").backward()
    assert_close(x.grad, torch.tensor([-0.4995, 0.4995]))
    q = perturb_target(torch.tensor([1.0, 0.0], dtype=dtype), 0.001, 1.0)
    assert q.dtype == torch.float32
    assert_close(q, torch.tensor([0.9995, 0.0005]))


@pytest.mark.parametrize("prior", [0.02, 0.3, torch.tensor(0.7)])
def test_a_label_that_is_wholly_replaced_is_the_prior(prior):
    q = perturb_target(torch.tensor([0.0, 0.25, 1.0]), 1.0, 1.0, prior=prior)
    assert torch.equal(q, torch.as_tensor(prior, dtype=torch.float32).expand(3))


def test_perturb_target_keeps_default_and_given_dtypes():
    assert perturb_target(torch.tensor([True])).dtype == torch.float32
    assert perturb_target(torch.ones(1, dtype=torch.float64), 0.1).dtype == torch.float64
    assert perturb_target(torch.ones(1, dtype=torch.float16), 0.1).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert perturb_target(torch.tensor([1]), 0.1).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_perturb_target_rounds_to_low_precision_once(dtype):
    target = torch.rand(200)
    alpha = torch.rand(200) / 2
    want = perturb_target(target, alpha).to(dtype)
    assert torch.equal(perturb_target(target, alpha, dtype=dtype), want)


def test_perturb_target_leaves_ignored_elements_as_they_are():
    target = torch.tensor([0, 1, 255], dtype=torch.uint8)
    got = perturb_target(target, 0.2, 1.0, ignore_index=255)
    assert_close(got, torch.tensor([0.1, 0.9, 255.0]))


# --- ignore_index -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("mask", [torch.uint8, torch.float32])
def test_ignored_logits_reach_neither_loss_nor_gradient(bad, reduction, alpha, mask):
    x = torch.tensor([1.0, bad, -2.0], requires_grad=True)
    y = torch.tensor([1, 255, 0]).to(mask)
    loss = sc_bce_with_logits(x, y, alpha, ignore_index=255, reduction=reduction)
    loss.sum().backward()
    kept = torch.tensor([1.0, -2.0], requires_grad=True)
    expected = sc_bce_with_logits(kept, torch.tensor([1.0, 0.0]), alpha, reduction=reduction)
    expected.sum().backward()
    assert x.grad[1] == 0
    assert_close(x.grad[[0, 2]], kept.grad)
    if reduction == "none":
        assert loss[1] == 0
        loss = loss[[0, 2]]
    assert_close(loss, expected)


def test_all_ignored_is_zero_and_an_empty_mean_is_nan():
    x = torch.randn(3, requires_grad=True)
    loss = sc_bce_with_logits(x, torch.full((3,), -1), 0.1, ignore_index=-1)
    loss.backward()
    assert loss == 0
    assert_close(x.grad, torch.zeros(3))
    for ignored in (None, 255, math.nan):
        empty = sc_bce_with_logits(torch.empty(0, 2), torch.empty(0, 2), 0.1, ignore_index=ignored)
        assert empty.isnan()
        total = sc_bce_with_logits(
            torch.empty(0, 2), torch.empty(0, 2), 0.1, ignore_index=ignored, reduction="sum"
        )
        assert total == 0


def test_an_ignore_index_outside_the_dtype_ignores_nothing():
    # torch compares a uint8 255 with -1 as equal: the foreground would vanish in silence.
    x, y = torch.zeros(2), torch.tensor([0, 255], dtype=torch.uint8)
    loss = refused(
        ValueError, "got the value 255", lambda: sc_bce_with_logits(x, y, 0.1, ignore_index=-1)
    )
    assert loss is None or loss.isnan()


def test_half_precision_means_over_many_elements_do_not_overflow():
    x = torch.full((20_000,), 10.0, dtype=torch.float16)  # whose sum is beyond 65504
    y = torch.zeros(20_000, dtype=torch.uint8)
    assert sc_bce_with_logits(x, y, 0.0, ignore_index=255) == 10
    assert_close(sc_bce_with_logits(x, y, 0.1), torch.tensor(9.0, dtype=torch.float16))


# --- nan as ignore_index ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0.5, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.2, "per sample"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_missing_label_counts_nowhere(dtype, alpha, reduction, bad):
    alpha = torch.tensor([0.1, 0.3]) if alpha == "per sample" else alpha
    x = torch.tensor([[1.0, bad, -2.0], [bad, 3.0, bad]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[1.0, math.nan, 0.25], [math.nan, 0.0, math.nan]], dtype=dtype)
    loss = sc_bce_with_logits(x, y, alpha, 1.0, ignore_index=math.nan, reduction=reduction)
    loss.sum().backward()
    kept = ~y.isnan()
    level = array(alpha)[:, None] if isinstance(alpha, torch.Tensor) else alpha
    want = ref.sc_bce(
        array(x.double()), array(y.double()), level, 1.0, valid=array(kept), reduction=reduction
    )
    least = 4 * torch.finfo(dtype).eps
    close(loss, want, rtol=max(least, 1e-6), atol=max(least, 1e-6))
    assert x.grad[~kept].tolist() == [0.0, 0.0, 0.0]  # exactly
    assert bool(x.grad[kept].ne(0).all())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [0.5, math.inf])
def test_missing_labels_reach_no_gradient_of_a_level(bad, reduction):
    alpha = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, bad], [2.0, -3.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, math.nan], [0.0, 0.25]], dtype=torch.float64)
    loss = sc_bce_with_logits(x, y, alpha, 1.0, ignore_index=math.nan, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), alpha)
    want = np.array([0.5, -0.5 * 2 + 0.25 * 3])  # the slopes (y - 1/2) x of each sample
    close(grad, want / 3 if reduction == "mean" else want)


def test_missing_labels_of_a_target():
    y = torch.tensor([0.0, math.nan, 1.0])
    q = perturb_target(y, 0.2, 1.0, ignore_index=math.nan)
    assert_close(q, torch.tensor([0.1, math.nan, 0.9]), equal_nan=True)
    mask = torch.tensor([0, 1])  # none of whose labels can be missing
    want = sc_bce_with_logits(torch.ones(2), mask, 0.1)
    assert torch.equal(sc_bce_with_logits(torch.ones(2), mask, 0.1, ignore_index=math.nan), want)


# --- the mask as a weight ---------------------------------------------------------------------


@given(
    batches(scale=3.0), pairs(), st.sampled_from(["mean", "sum"]), seeds,
    st.sampled_from([None, "weight", "pos_weight", "both"]), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_finite_and_non_finite_ignored_logits_give_one_loss(
    batch, pair, reduction, seed, which, share
):
    """Torch's weight masks finite logits; for others each logit and loss is replaced."""
    rng = np.random.default_rng(seed)
    valid = np.asarray(rng.random(tuple(batch.input.shape)) < share)
    weight = tensor(rng.random(tuple(batch.input.shape))) if which in ("weight", "both") else None
    pos_weight = torch.tensor(3.0).double() if which in ("pos_weight", "both") else None
    target = torch.where(tensor(valid), batch.target, 255.0)
    ends = []
    for put in (0.0, 1e4, math.inf, -math.inf, math.nan):
        x = torch.where(tensor(valid), batch.input, put).requires_grad_()
        loss = sc_bce_with_logits(
            x, target, *pair, weight=weight, pos_weight=pos_weight, ignore_index=255,
            reduction=reduction,
        )  # fmt: skip
        ends.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    want = ref.sc_bce(
        array(batch.input), array(batch.target), *pair,
        1.0 if weight is None else array(weight), 1.0 if pos_weight is None else 3.0,
        valid=valid, reduction=reduction,
    )  # fmt: skip
    close(ends[0][0], want)
    for loss, grad in ends:
        assert_close(loss, ends[0][0], rtol=1e-12, atol=1e-12)
        assert_close(grad, ends[0][1], rtol=1e-12, atol=1e-12)
        assert not bool(grad[tensor(~valid)].any())


@pytest.mark.parametrize("shape", [(7, 2, 5), (40,)])
@pytest.mark.parametrize("size", [None, (), (1,), (2, 1), (1, 2, 1), (7, 1, 1)])
def test_some_samples_at_a_time_are_the_batch(size, shape):
    if size and len(size) > len(shape):
        size = (40,)
    x, y = torch.randn(shape).double().requires_grad_(), torch.randint(0, 2, shape)
    y[torch.rand(shape) < 0.3] = 255
    pos_weight = None if size is None else 3 * torch.rand(size).double()

    def run():
        loss = sc_bce_with_logits(x, y, 0.1, pos_weight=pos_weight, ignore_index=255)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    want = run()
    with mock.patch.object(functional, "BLOCK", 16):
        got = run()
    assert_close(got, want, rtol=1e-12, atol=0)
    assert not bool(got[1][y == 255].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_masked_loss_of_low_precision_is_summed_in_float32(dtype, reduction):
    x = torch.randn(40, 50).to(dtype).requires_grad_()
    y = torch.randint(0, 2, (40, 50), dtype=torch.uint8)
    y[:, ::3] = 255
    weight = torch.rand(50).to(dtype)
    loss = sc_bce_with_logits(x, y, 0.1, weight=weight, ignore_index=255, reduction=reduction)
    want = ref.sc_bce(
        array(x.double()), array(y) * 1.0, 0.1, 2.0, array(weight.double()),
        valid=array(y) < 255, reduction=reduction,
    )  # fmt: skip
    assert loss.dtype == dtype
    close(loss, want, rtol=torch.finfo(dtype).eps)
    assert not bool(torch.autograd.grad(loss, x)[0][y == 255].any())


# --- what torch does at alpha = 0 is kept -----------------------------------------------------


def test_a_certain_hit_has_torchs_gradient_and_an_infinite_one_its_loss():
    """Zero at logit 40 and label 1, and nan at logit inf, are torch's own."""
    for value, label in ((40.0, 1.0), (math.inf, 1.0), (-math.inf, 0.0), (40.0, 0.0)):
        ends = []
        for loss in (F.binary_cross_entropy_with_logits, sc_bce_with_logits):
            x = torch.tensor([value], requires_grad=True)
            found = loss(x, torch.tensor([label]))
            ends.append((found.detach(), torch.autograd.grad(found, x)[0]))
        assert_close(ends[1], ends[0], rtol=0, atol=0, equal_nan=True)
    hit, miss = torch.tensor([40.0], requires_grad=True), torch.tensor([math.inf])
    assert torch.autograd.grad(sc_bce_with_logits(hit, torch.ones(1)), hit)[0].item() == 0
    assert sc_bce_with_logits(miss, torch.ones(1)).isnan()


# --- extreme logits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_logits_have_finite_value_gradient_and_hessian(dtype):
    big = torch.finfo(dtype).max / 4
    x = torch.tensor([-big, -1.0, 0.0, 1.0, big], dtype=dtype, requires_grad=True)
    y = torch.tensor([1, 1, 0, 0, 0])
    loss = sc_bce_with_logits(x, y, 0.1, reduction="none")
    assert loss.isfinite().all()
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    assert grad.isfinite().all()
    (hess,) = torch.autograd.grad(grad.sum(), x)
    assert hess.isfinite().all()


# --- differentiation --------------------------------------------------------------------------


@pytest.mark.not_on("xla", "gradcheck moves inputs by writing into their memory")
@pytest.mark.parametrize("ignored", [None, -1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_in_input_target_alpha_and_beta(ignored, reduction):
    def loss(x, y, alpha, beta):
        return sc_bce_with_logits(
            x, y, alpha, beta, pos_weight=torch.tensor(2.0).double(), weight=torch.rand(2).double(),
            ignore_index=ignored, reduction=reduction,
        )  # fmt: skip

    torch.manual_seed(1)
    arguments = (
        torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
        torch.rand(3, 2, dtype=torch.float64, requires_grad=True),
        (torch.rand(3, dtype=torch.float64) / 2).requires_grad_(),
        torch.rand(3, 1, dtype=torch.float64, requires_grad=True),
    )

    def seeded(*args):
        torch.manual_seed(2)
        return loss(*args)

    assert gradcheck(seeded, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(seeded, arguments)


def test_jvp_and_hessian_through_torch_func():
    x, y = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    alpha = torch.full((4,), 0.2, dtype=torch.float64)
    _, tangent = torch.func.jvp(
        lambda a: sc_bce_with_logits(x, y, a, 1.0, reduction="sum"), (alpha,), (alpha,)
    )
    # d/d alpha of the loss is beta/2 (2y - 1) x.
    assert_close(tangent, (0.5 * (2 * y - 1) * x * alpha).sum())
    hessian = torch.func.hessian(lambda x: sc_bce_with_logits(x, y, alpha, reduction="sum"))(x)
    p = torch.sigmoid(x)
    assert_close(hessian, torch.diag(p * (1 - p)))


# --- transforms and devices -------------------------------------------------------------------


@pytest.mark.parametrize("mask", [torch.float32, torch.bool, torch.int64])
def test_vmap_over_samples_equals_a_loop(mask):
    x, y = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).to(mask)
    alpha = torch.rand(5) / 2
    got = torch.func.vmap(sc_bce_with_logits)(x, y, alpha)
    want = torch.stack([sc_bce_with_logits(*row) for row in zip(x, y, alpha, strict=True)])
    assert_close(got, want)
    grads = torch.func.vmap(torch.func.grad(sc_bce_with_logits))(x, y, alpha)
    assert_close(grads, (torch.sigmoid(x) - perturb_target(y, alpha)) / 3)


@pytest.mark.parametrize("alpha", [0.0, 0.1, "0-d", "per sample", "full"])
@pytest.mark.parametrize("mask", [torch.float32, torch.bool, torch.uint8])
@pytest.mark.parametrize("ignored", [None, 255])
def test_compile_fullgraph_equals_eager(alpha, mask, ignored):
    x = torch.randn(4, 3, 5, requires_grad=True)
    y = torch.randint(0, 2, (4, 3, 5)).to(mask)
    alpha = {"0-d": torch.tensor(0.1), "per sample": torch.rand(4) / 2,
             "full": torch.rand(4, 3, 5) / 2}.get(alpha, alpha)  # fmt: skip
    compiled = torch.compile(sc_bce_with_logits, fullgraph=True, backend="aot_eager")
    got = compiled(x, y, alpha, ignore_index=ignored)
    want = sc_bce_with_logits(x, y, alpha, ignore_index=ignored)
    assert_close(got, want)
    assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])


@pytest.mark.not_on("xla", "inductor writes no code for it")
def test_compile_inductor_and_low_precision():
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    y = torch.randint(0, 2, (4, 3))
    compiled = torch.compile(sc_bce_with_logits, fullgraph=True)
    got = compiled(x, y, torch.rand(4) / 2)
    assert got.dtype == torch.bfloat16
    assert_close(compiled(x, y, 0.1), sc_bce_with_logits(x, y, 0.1), rtol=0.01, atol=0.01)


def test_compile_does_not_repeat_when_alpha_changes():
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(sc_bce_with_logits, fullgraph=True, backend=count)
    for _ in range(4):
        compiled(torch.randn(4, 3), torch.rand(4, 3), torch.rand(4))
    assert count.frame_count == 1


def test_compile_does_not_repeat_by_size():
    """Nor does an alpha of another size, or one of bools."""
    for alpha in (lambda n: 0.1, lambda n: torch.rand(n) / 2, lambda n: torch.rand(n, 3) < 0.1):
        count = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(sc_bce_with_logits, fullgraph=True, backend=count, dynamic=True)
        for size in (8, 1366, 4096, 90_000):
            compiled(torch.randn(size, 3), torch.rand(size, 3), alpha(size))
            compiled(torch.randn(size, 3), torch.rand(size, 3), alpha(size), beta=1.0)
        assert count.frame_count <= 2  # one for each beta


@pytest.mark.parametrize("mask", [torch.float32, torch.bool, torch.int64])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(mask, strict):
    class Loss(torch.nn.Module):
        def forward(self, x, y, alpha):
            loss = sc_bce_with_logits(x, y, alpha, prior=0.2)
            return loss, sc_bce_with_logits(x, y, 0.1), perturb_target(y, alpha, 1.0)

    n = torch.export.Dim("n", min=2, max=1 << 20)
    arguments = (torch.randn(8, 3), torch.randint(0, 2, (8, 3)).to(mask), torch.rand(8) / 2)
    exported = torch.export.export(
        Loss(), arguments, dynamic_shapes=({0: n}, {0: n}, {0: n}), strict=strict
    )
    for size in (2, 8, 1366, 90_000):
        x, y = torch.randn(size, 3), torch.randint(0, 2, (size, 3)).to(mask)
        alpha = torch.rand(size) / 2
        with mock.patch.object(cpu, "BLOCK", 1 << 20):
            want = Loss()(x, y, alpha)
        assert_close(exported.module()(x, y, alpha), want)


def test_export_equals_eager():
    class Loss(torch.nn.Module):
        def forward(self, x, y, alpha):
            return sc_bce_with_logits(x, y, alpha, ignore_index=255)

    arguments = (torch.randn(4, 3), torch.randint(0, 2, (4, 3)), torch.rand(4) / 2)
    exported = torch.export.export(Loss(), arguments, strict=True)
    assert_close(exported.module()(*arguments), Loss()(*arguments))


def test_meta_and_fake_tensors():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(3, 2, device="meta", dtype=dtype)
        y = torch.empty(3, 2, device="meta", dtype=torch.int64)
        loss = sc_bce_with_logits(x, y, 0.1, ignore_index=255, reduction="none")
        assert loss.is_meta
        assert (loss.shape, loss.dtype) == ((3, 2), dtype)
    with FakeTensorMode():
        loss = sc_bce_with_logits(torch.randn(3, 2), torch.ones(3, 2, dtype=torch.long), 0.1)
        assert (loss.shape, loss.dtype) == ((), torch.float32)


@pytest.mark.parametrize(
    "name", ["_len_torch_dispatch_stack", "_get_tracing_state", "_are_functorch_transforms_active"]
)
@pytest.mark.parametrize("mask", [torch.float32, torch.bool, torch.int64])
def test_without_torchs_private_names_the_result_is_the_same(name, mask, monkeypatch):
    x, y = torch.randn(5, 3, requires_grad=True), torch.randint(0, 2, (5, 3)).to(mask)
    alpha = torch.rand(5) / 2

    def run():
        loss = sc_bce_with_logits(x, y, alpha, 1.0, prior=0.1)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    want = run()
    monkeypatch.delattr(torch._C, name)
    with watching() as taken:
        got = run()
    assert taken == [False]
    assert_close(got, want)
    if mask == torch.int64:
        loss = refused(
            ValueError, "the value 255", lambda: sc_bce_with_logits(x, y * 0 + 255, alpha)
        )
        assert loss is None or loss.isnan()


@pytest.mark.parametrize("alpha", [0.0, 0.1, "per sample"])
def test_autocast_gives_what_torch_gives(alpha):
    alpha = torch.rand(4) / 2 if alpha == "per sample" else alpha
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4, 3))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            want = F.binary_cross_entropy_with_logits(x.to(dtype), y.to(dtype))
            assert sc_bce_with_logits(x.to(dtype), y, alpha).dtype == want.dtype == torch.float32


def test_scalars_and_empty_batches():
    want = ref.sc_bce(np.array(0.3), np.array(1.0), 0.1, 2.0)
    got = sc_bce_with_logits(torch.tensor(0.3).double(), torch.tensor(1), 0.1)
    assert float(got) == pytest.approx(float(want))
    empty = sc_bce_with_logits(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0))
    assert empty.isnan()


# --- where values can't be read, an illegal integer is nan ------------------------------------


def test_illegal_integers_give_nan_where_they_cannot_be_read():
    x, y = torch.zeros(3), torch.tensor([0, 255, 1])
    assert torch.func.vmap(sc_bce_with_logits)(x, y, torch.zeros(3))[1].isnan()
    compiled = torch.compile(sc_bce_with_logits, fullgraph=True, backend="aot_eager")
    for alpha in (0.0, 0.1):
        loss = compiled(x, y, alpha, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
    for prior in (0.3, torch.tensor(0.3)):  # also where the draw replaces the label
        loss = compiled(x, y, torch.tensor([True] * 3), 1.0, prior=prior, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]


# --- on a CPU every label is looked at --------------------------------------------------------

WRONG = {  # two labels, the dtypes that they come in, and which of them is named
    "0/255": (0, 255, (torch.uint8, torch.uint16, torch.int16, torch.int64, *FLOATS), 255),
    "-1/1": (1, -1, (torch.int8, torch.int64, *FLOATS), -1),
    "1/2": (1, 2, (torch.uint8, torch.int64, torch.uint32, *FLOATS), 2),
}
MANY = (1 << 20) + 3  # above every size from which something is done another way
looked_at = pytest.mark.cpu_only("an accelerator would wait for a look at the values")
SETTINGS = [
    dict(), dict(alpha=0), dict(alpha=0.1), dict(alpha=0.1, ignore_index=7),
    dict(ignore_index=7), dict(alpha=0.1, reduction="none"), dict(alpha=0.1, ignore_index=math.nan),
    dict(alpha=torch.tensor(0.1)),
]  # fmt: skip


def labelled(name, dtype, size):
    """Legal labels, and the wrong one in the last place alone."""
    right, wrong, _, named = WRONG[name]
    y = torch.full((size,), right, dtype=torch.float32)
    y[-1] = wrong
    return y.to(dtype), f"got the value {named}; for a 0/255 mask pass `mask > 0`"


@looked_at
@pytest.mark.parametrize("setting", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in WRONG.items() for dtype in case[2]]
)
def test_a_wrong_label_is_refused_in_every_dtype(name, dtype, setting):
    y, text = labelled(name, dtype, 60)
    x = torch.zeros(60)
    with pytest.raises(ValueError, match=text):
        sc_bce_with_logits(x, y, **setting)
    target = {key: value for key, value in setting.items() if key != "reduction"}
    with pytest.raises(ValueError, match=text):
        perturb_target(y, **target)


@looked_at
@pytest.mark.parametrize("setting", SETTINGS[:7], ids=range(7))
@pytest.mark.parametrize(
    ("name", "dtype"), [("0/255", torch.uint8), ("-1/1", torch.int8), ("1/2", torch.float32)]
)
@pytest.mark.parametrize("size", [1, 4097, MANY])
def test_a_wrong_label_is_refused_at_every_size(size, name, dtype, setting):
    y, text = labelled(name, dtype, size)
    with pytest.raises(ValueError, match=text):
        sc_bce_with_logits(torch.zeros(size), y, **setting)


@looked_at
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["inference", "every other", "transposed", "of a subclass"])
def test_a_wrong_label_is_refused_in_a_tensor_of_any_kind(kind, alpha, dtype):
    y, text = labelled("0/255", dtype, 64)
    x = torch.zeros(64)
    if kind == "inference":
        with torch.inference_mode():
            y = y.clone()
        assert y.is_inference()
    elif kind == "every other":
        x, y = torch.zeros(32), y[1::2]
        assert not y.is_contiguous()
    elif kind == "transposed":
        x, y = torch.zeros(8, 8), y.view(8, 8).T
    else:
        y = y.as_subclass(type("Mask", (torch.Tensor,), {}))
    for ignored in (None, 7):
        with pytest.raises(ValueError, match=text):
            sc_bce_with_logits(x, y, alpha, ignore_index=ignored)
        with pytest.raises(ValueError, match=text):
            perturb_target(y, alpha, ignore_index=ignored)


def test_where_a_look_would_wait_or_break_a_graph_there_is_none():
    """The one exception: compile, vmap and devices; a float is then taken as it is."""
    x, y = torch.zeros(3), torch.tensor([0.0, 255.0, 1.0])
    want = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    assert_close(torch.func.vmap(sc_bce_with_logits)(x, y), want)
    compiled = torch.compile(sc_bce_with_logits, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, y, reduction="none"), want)
    for wrong in (y, y.long()):
        assert sc_bce_with_logits(x.to("meta"), wrong.to("meta"), 0.1).is_meta


@looked_at
def test_an_advice_fits_the_value():
    """A mask that was divided by 255 already is not told to do it; 1.0000000591 is not 1."""
    y = torch.tensor([0.0, 1.0 + 5.91e-8], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got the value 1.0000000591; name a void label") as wrong:
        sc_bce_with_logits(torch.zeros(2), y, 0.1)
    assert "255" not in str(wrong.value)
    y[1] = 1 + 1 / 255
    with pytest.raises(ValueError, match=r"got the value 1.00392; name a void label with"):
        sc_bce_with_logits(torch.zeros(2), y)


# --- errors -----------------------------------------------------------------------------------

X, Y = torch.zeros(4, 2), torch.ones(4, 2)
ERRORS = [
    (dict(alpha=-0.1), ValueError, r"`alpha` to be in \[0, 1\], but got -0.1"),
    (dict(alpha=1.5), ValueError, r"`alpha` to be in \[0, 1\], but got 1.5"),
    (dict(alpha=math.nan), ValueError, r"`alpha` to be in \[0, 1\], but got nan"),
    (dict(alpha="0.1"), TypeError, r"number in \[0, 1\] or a Tensor, but got '0.1' \(str\)"),
    (dict(alpha=None), TypeError, r"`alpha` to be a number"),
    (dict(alpha=np.full(4, 0.1)), TypeError, r"got ndarray; pass `torch.as_tensor\(alpha\)`"),
    (dict(alpha=0.1, ignore_index=1.5), ValueError, r"an int of 64 bits or None, but got 1.5"),
    (dict(alpha=0.1, ignore_index=2**70), ValueError, r"an int of 64 bits"),
    (dict(alpha=0.1, beta=2.1), ValueError, r"`beta` to be in \[0, 2\], but got 2.1"),
    (dict(beta=math.nan), ValueError, r"`beta` to be in \[0, 2\], but got nan"),
    (dict(alpha=0.6, beta=2.0), ValueError, r"alpha \* beta = 0.6 \* 2.0 > 1; lower one"),
    (
        dict(alpha=torch.full((4,), 1.5)),
        ValueError,
        r"`alpha` to be in \[0, 1\], but got the value 1",
    ),
    (dict(alpha=torch.tensor(-0.1)), ValueError, r"in \[0, 1\], but got the value -0.1; the third"),
    (
        dict(alpha=torch.tensor([[0.5, 20.0]])),  # a weight as the third argument
        ValueError,
        r"got the value 20; the third argument is alpha; pass a weight as `weight=`",
    ),
    (
        dict(alpha=0.1, target=Y * 255),
        ValueError,
        r"`target` to be in \[0, 1\], but got the value 25",
    ),
    (
        dict(alpha=0.1, target=2 * Y - 3),
        ValueError,
        r"got the value -1; .* labels -1 and 1 `target",
    ),
    (
        dict(alpha=0.1, target=Y * 7, ignore_index=255),
        ValueError,
        r"in \[0, 1\] \(besides ignore_index=255\), but got the value 7",
    ),
    (dict(alpha=torch.ones(1)), ValueError, r"4 values, one per sample .* got shape \(1,\)"),
    (dict(alpha=torch.ones(2)), ValueError, r"broadcasts to \(4, 2\), but got shape \(2,\)"),
    (dict(alpha=torch.ones(4, 3)), ValueError, r"`alpha` .* but got shape \(4, 3\)"),
    (dict(alpha=0.1, beta="2"), TypeError, r"`beta` to be a number in \[0, 2\] or a Tensor, but"),
    (dict(alpha=0.1, beta=torch.ones(3)), ValueError, r"`beta` .* but got shape \(3,\)"),
    (dict(alpha=0.1, reduction="avg"), ValueError, r"'none', 'mean', 'sum', but got 'avg'"),
    (dict(alpha=0.1, ignore_index="void"), TypeError, r"`ignore_index` to be an int or None"),
    (dict(ignore_index=math.inf), TypeError, r"int or None, or `math.nan`, but got inf"),
    (dict(ignore_index=True), TypeError, r"int or None, or `math.nan`, but got True \(bool\)"),
    (dict(alpha=0.1, target=Y[:3]), ValueError, r"have the size of `input`.*reshape"),
    (dict(alpha=0.1, target=[1.0]), TypeError, r"`target` to be a Tensor, but got list"),
    (dict(alpha=0.1, target=Y.to(torch.complex64)), TypeError, r"got torch.complex64; pass"),
    (dict(alpha=0.1, input=[1.0]), TypeError, r"`input` to be a Tensor, but got list"),
    (dict(alpha=0.1, input=X.long()), TypeError, r"floating-point logits, but got torch.int64"),
    (
        dict(alpha=0.1, target=(Y * 255).byte()),
        ValueError,
        r"only 0 and 1, but got the value 255; .*`mask > 0` or `mask / 255`",
    ),
    (dict(alpha=0.0, target=(Y * 255).byte()), ValueError, r"got the value 255"),
    (dict(alpha=0.1, target=-Y.long()), ValueError, r"got the value -1"),
    (
        dict(alpha=0.1, target=Y.long() * 7, ignore_index=255),
        ValueError,
        r"\(besides ignore_index=255\), but got the value 7",
    ),
]


@pytest.mark.parametrize(("wrong", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_bad_input_is_named_with_its_remedy(wrong, kind, text):
    given = {"input": X, "target": Y, **wrong}
    loss = refused(kind, text, lambda: sc_bce_with_logits(**given))
    if loss is not None:  # an illegal integer is nan where it can't be read
        assert bool(loss.isnan()) != given["target"].is_floating_point()


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [case for case in ERRORS if not {"input", "reduction"} & set(case[0])
     and "size of `input`" not in case[2]],
)  # fmt: skip
def test_perturb_target_refuses_the_same(wrong, kind, text):
    given = {"target": Y, **wrong}
    q = refused(kind, text, lambda: perturb_target(**given))
    if q is not None:
        assert bool(q.isnan().all()) != given["target"].is_floating_point()


def test_perturb_target_refuses_an_integer_dtype():
    with pytest.raises(TypeError, match=r"floating-point torch.dtype, but got torch\.int64"):
        perturb_target(Y, 0.1, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"floating-point torch.dtype, but got float32"):
        perturb_target(Y, 0.1, dtype="float32")


def test_a_tensor_alpha_is_looked_at_only_where_it_can_be_read():
    x, y = torch.zeros(3, 2), torch.ones(3, 2)
    wrong = torch.tensor([0.0, 0.5, 7.0])
    inside = torch.func.vmap(sc_bce_with_logits)(x, y, wrong)
    want = ref.sc_bce(array(x), array(y), array(wrong)[:, None], 2.0, reduction="none")
    close(inside, want.mean(1), rtol=1e-6)
    compiled = torch.compile(sc_bce_with_logits, fullgraph=True, backend="aot_eager")
    close(compiled(x, y, wrong), want.mean(), rtol=1e-6)
    assert sc_bce_with_logits(x[0], y[0], torch.ones(2, dtype=torch.uint8)).isfinite()
    text = r"`alpha` to be in \[0, 1\], but got the value nan"
    loss = refused(ValueError, text, lambda: sc_bce_with_logits(x, y, torch.tensor(torch.nan)))
    assert loss is None or loss.isnan()


def test_labels_that_are_nan_are_torchs_to_carry_through():
    x, y = torch.zeros(3, 2), torch.ones(3, 2)
    y[1, 1] = torch.nan
    assert sc_bce_with_logits(x, y, 0.1).isnan()
    ignored = sc_bce_with_logits(x, torch.where(y.isnan(), 255.0, y), 0.1, ignore_index=255)
    assert_close(ignored, sc_bce_with_logits(torch.zeros(5), torch.ones(5), 0.1))


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize(("size", "ones"), [((2, 5, 4, 5), ", 1, 1"), ((2, 5, 5), ", 1")])
def test_a_weight_per_label_does_not_lie_along_the_last_dimension(size, ones, name, alpha):
    """Where C = W torch takes it without a word."""
    x, y, rates = torch.randn(size), torch.rand(size), torch.rand(5) + 0.5
    text = (
        rf"`{name}` to have one value per label, shape \(5{ones}\), but got shape \(5,\), which "
        rf"would lie along the last dimension; pass `{name}.reshape\(-1{ones}\)`"
    )
    with pytest.raises(ValueError, match=text):
        sc_bce_with_logits(x, y, alpha, **{name: rates})
    along = rates.reshape(-1, *(1 for _ in size[2:]))
    got = sc_bce_with_logits(x, y, alpha, **{name: along})
    w = array(along.double())
    weights = {"weight": w} if name == "weight" else {"pos_weight": w}
    close(got, ref.sc_bce(array(x), array(y), alpha, 2.0, **weights), rtol=1e-6)
    one = torch.tensor([2.0])  # of one value, and of (N, C), is no question
    assert sc_bce_with_logits(x, y, alpha, **{name: one}).isfinite()
    assert sc_bce_with_logits(x[:, :, 0], y[:, :, 0], alpha, **{name: one}).isfinite()


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize(
    ("input", "target", "text"),
    [
        ((4, 2, 3, 3), (4, 3, 3), r"softmax over two classes pass `input\[:, 1\] - input\[:, 0\]`"),
        ((4, 2), (4,), r"`input\[:, 1\] - input\[:, 0\]`, which is the logit of class 1"),
        ((4, 1, 3, 3), (4, 3, 3), r"pass `target.unsqueeze\(1\)`"),
        ((4, 5, 3), (4, 3), r"measures 5 exclusive classes .*`num_labels=5`"),
        ((4, 3), (3, 4), r"`target` to have the size of `input`, \(4, 3\), but got \(3, 4\); resh"),
    ],
)
def test_sizes_that_differ_name_what_was_probably_meant(input, target, text, alpha):
    x, y = torch.zeros(input), torch.ones(target)
    if alpha == 0:  # torch's own
        with pytest.raises(ValueError, match=r"must be the same as input size"):
            sc_bce_with_logits(x, y)
    else:
        with pytest.raises(ValueError, match=text):
            sc_bce_with_logits(x, y, alpha)
    if "input[:, 1]" in text.replace("\\", ""):
        z = torch.randn(input)
        label = torch.randint(0, 2, target)
        ours = sc_bce_with_logits(z[:, 1] - z[:, 0], label, alpha)
        assert_close(ours, F.cross_entropy(z, label, label_smoothing=2 * alpha))


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.cpu_only("they are made of one")
@pytest.mark.parametrize("alpha", [0.0, 0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_what_torch_computes_nothing_in_is_named(dtype, alpha):
    text = rf"dtype of at least 16 bits, but got {dtype}; pass `{{}}.float\(\)`"
    with pytest.raises(TypeError, match="`input` .*" + text.format("input")):
        sc_bce_with_logits(X.to(dtype), Y, alpha)
    with pytest.raises(TypeError, match="`target` .*" + text.format("target")):
        sc_bce_with_logits(X, Y.to(dtype), alpha)
    with pytest.raises(TypeError, match="`target` .*" + text.format("target")):
        perturb_target(Y.to(dtype), alpha)
    sparse = r"to be dense, but got torch.sparse_coo; pass `{}.to_dense\(\)`"
    with pytest.raises(TypeError, match="`input` " + sparse.format("input")):
        sc_bce_with_logits(X.to_sparse(), Y, alpha)
    with pytest.raises(TypeError, match="`target` " + sparse.format("target")):
        sc_bce_with_logits(X, Y.to_sparse(), alpha)


def test_input_that_is_no_tensor_is_refused_at_alpha_zero_too():
    with pytest.raises(TypeError, match="`input` to be a Tensor, but got list"):
        sc_bce_with_logits([1.0], torch.tensor([1]))


def test_any_real_number_is_a_level():
    from fractions import Fraction

    want = sc_bce_with_logits(X, Y, 0.25, 1.5)
    for alpha, beta in ((Fraction(1, 4), Fraction(3, 2)), (np.float32(0.25), np.float64(1.5))):
        assert torch.equal(sc_bce_with_logits(X, Y, alpha, beta), want)


def test_levels_of_a_scalar_have_no_dimension():
    with pytest.raises(ValueError, match="0-d tensor, no dimension"):
        sc_bce_with_logits(torch.tensor(0.0), torch.tensor(1.0), torch.ones(1))


# --- what only some ways of calling it see ------------------------------------------------------


def test_an_infinite_label_is_no_number_where_it_cannot_be_refused():
    def loss(x, y):
        return sc_bce_with_logits(x, y, 0.1, ignore_index=math.nan)

    x, y = torch.tensor([0.0, 2.0]), torch.tensor([math.inf, 1.0])
    assert math.isnan(torch.compile(loss, backend="eager")(x, y))
    assert torch.vmap(loss)(x[None], y[None]).isnan().all()


def test_forward_mode_checks_and_draws_alike():
    x, y = torch.linspace(-2, 2, 40_000), torch.arange(40_000) % 3 == 0
    criterion = SCBCEWithLogitsLoss.disturb_label(0.4)
    torch.manual_seed(0)
    want = criterion(x, y)
    with torch.autograd.forward_ad.dual_level():
        torch.manual_seed(0)
        assert torch.equal(criterion(x, y), want)
        with pytest.raises(ValueError, match="`alpha`"):
            sc_bce_with_logits(x, y, torch.tensor(1.5))
        with pytest.raises(ValueError, match="`prior`"):
            sc_bce_with_logits(x, y, 0.1, prior=torch.tensor(-3.0))


def test_no_label_wraps_around_to_the_ignored_one():
    y = torch.tensor([0, 1, 2**64 - 1], dtype=torch.uint64)
    for alpha in (0.0, 0.1):
        with pytest.raises(ValueError, match=r"hold only 0 and 1, but got the value 1\.84467e\+19"):
            sc_bce_with_logits(torch.zeros(3), y, alpha, ignore_index=-1)


def test_a_weight_of_too_many_samples_is_torchs_error():
    x, y = torch.randn(1, 1 << 20), torch.randint(2, (1, 1 << 20))
    y[:, ::5] = 255
    with pytest.raises(RuntimeError, match="1048576"):
        sc_bce_with_logits(x, y, 0.1, weight=torch.rand(4, 1), ignore_index=255)
