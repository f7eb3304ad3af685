"""The fused sweep against the reference path, and where it steps aside."""

import math
from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from paths import fusing, plain, watching
from strategies import FLOATS, MASKS, batches, inner, pairs, seeds
from torch.testing import assert_close

from sc_bce import (
    AdaptivePerturbation,
    CalibrationHistogram,
    SCBCEWithLogitsLoss,
    sc_bce_with_logits,
)
from sc_bce.functional import Batch, Perturbation, Wanted, look
from sc_bce.kernels import cpu

cubes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40))
blocks = st.sampled_from([1, 3, 8, 64, 1 << 20])
VOID = 7


def swept(x, y, alpha=0.0, beta=2.0, prior=0.5, *, void=None, weight=None, wanted=None):
    """The summed loss of a batch, and what it shows; None where the sweep steps aside."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64)  # a number 0 would be torch's own call
    batch, given = Batch(x, y, void, True, True), Perturbation(alpha, beta, prior)
    return cpu.sweep(batch, given, weight, None, "sum", wanted or Wanted())


# --- against the reference and the plain path -------------------------------------------------


@st.composite
def rows(draw, shape):
    """A prior in a form that varies by row, and the array that it broadcasts to."""
    form = draw(st.sampled_from(["number", "0-d", "per sample", "per label"]))
    rng = np.random.default_rng(draw(seeds))
    if form == "number":
        c = draw(inner)
        return c, np.asarray(c)
    size = {"0-d": (), "per sample": (shape[0], 1, 1), "per label": (shape[1], 1)}[form]
    array = np.asarray(rng.random(size))
    return torch.from_numpy(array), array


def with_void(target, rng):
    """The target with a third of its elements void, and where it has none."""
    valid = rng.random(tuple(target.shape)) < 0.67
    return torch.where(torch.from_numpy(valid), target, VOID), valid


def weights(form, shape, rng):
    size = {"number": (), "per sample": (shape[0], 1, 1), "per label": (shape[1], 1)}
    return torch.from_numpy(np.asarray(rng.random(size.get(form, tuple(shape)))))


forms = st.sampled_from([None, "number", "per sample", "per label", "per element"])


@given(
    batches(cubes, scale=5.0), blocks, seeds, forms, st.booleans(), st.booleans(), st.booleans(),
    st.floats(0, 1), inner,
)  # fmt: skip
def test_what_a_batch_shows_is_that_of_the_formulas(
    batch, block, seed, form, voided, by_label, shared, alpha, c
):
    """By the sweep, and by the plain way, which looks without a loss."""
    rng, x, y = np.random.default_rng(seed), batch.input, batch.target
    valid, w, labels = np.ones(tuple(y.shape), dtype=bool), np.ones(x.shape), y.shape[1]
    void = float(VOID) if voided else None
    if voided:
        y, valid = with_void(y, rng)
    weight = None if form is None else weights(form, x.shape, rng)
    if form is not None:
        w = np.broadcast_to(weight.numpy(), x.shape)
    prior, array = c, np.asarray(c)
    if by_label:
        array = rng.random((1, labels, 1))
        prior = torch.from_numpy(array)
    share = torch.rand(len(x)) if shared else None
    shape = tuple(prior.shape) if by_label else ()
    wanted = Wanted(slopes=True, hits=True, labels=shape, share=share)
    with fusing(block):
        loss, seen = swept(
            x, y, alpha, 1.0, prior, void=void, weight=weight, wanted=wanted
        )  # fmt: skip
    plain = look(Batch(x, y, void, True, True), prior, weight, wanted)
    x, y = x.numpy(), np.where(valid, y.numpy(), 0.0)
    want = ref.sc_bce(x, y, alpha, 1.0, w, valid=valid, prior=array, reduction="sum")
    np.testing.assert_allclose(loss, want, rtol=1e-9, atol=1e-8)
    with np.errstate(invalid="ignore"):
        slopes = np.where(valid, w * (y - array) * x, 0).sum((1, 2)) / valid.sum((1, 2))
    each = np.ones(len(x)) if share is None else share.numpy().astype(float)
    axes = (0, 2) if by_label else (0, 1, 2)
    number, positive = (
        (value * each[:, None, None]).sum(axes).reshape(-1) for value in (valid * 1.0, y)
    )
    for found in (seen, plain):
        np.testing.assert_allclose(found.slopes, slopes, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.hits, ref.hits(x, y, valid), rtol=1e-6)
        np.testing.assert_allclose(found.counts[1], positive, rtol=1e-5, atol=1e-6)
        got = np.broadcast_to(np.asarray(found.counts[0]), number.shape)
        np.testing.assert_allclose(got, number, rtol=1e-5)
        assert {value.dtype for value in found[:2]} == {torch.float32}


def test_what_is_not_wanted_is_not_shown():
    x, y = torch.randn(3, 8), torch.rand(3, 8)
    with fusing():
        assert swept(x, y, 0.1)[1] == (None, None, None)
        seen = swept(x, y, 0.1, wanted=Wanted(hits=True))[1]
    assert (seen.slopes, seen.counts) == (None, None)
    assert look(Batch(x, y, None, True, True), 0.5, None, Wanted()) == (None, None, None)


@given(
    batches(cubes, scale=5.0), blocks, pairs(), st.sampled_from(["mean", "sum"]), seeds,
    st.sampled_from(["number", "0-d", "per sample", "drawn per sample", "drawn"]),
    forms, st.booleans(), st.data(),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_plain_path(
    batch, block, pair, reduction, seed, form, weighted, voided, data
):
    alpha, beta = pair
    prior, _ = data.draw(rows(tuple(batch.input.shape)))
    if prior != 0.5 if isinstance(prior, float) else True:
        beta /= 2
    rng = np.random.default_rng(seed)
    input, target = batch.input.clone().requires_grad_(), batch.target
    if voided:
        target, _ = with_void(target, rng)
    weight = None if weighted is None else weights(weighted, input.shape, rng)
    inputs = [input]
    if form.startswith("drawn"):
        size = batch.input.shape if form == "drawn" else batch.input.shape[:1]
        alpha = torch.from_numpy(rng.random(tuple(size)) < 0.4)
        beta = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
        inputs.append(beta)
    elif form != "number":
        size = (len(batch.input),) if form == "per sample" else ()
        alpha = torch.from_numpy(np.asarray(rng.uniform(0, alpha, size))).requires_grad_()
        inputs.append(alpha)
    if isinstance(prior, torch.Tensor):
        inputs.append(prior.requires_grad_())

    def run(create_graph=False):
        loss = sc_bce_with_logits(
            input, target, alpha, beta, prior=prior, weight=weight, reduction=reduction,
            ignore_index=VOID if voided else None,
        )  # fmt: skip
        grads = torch.autograd.grad(loss * 3, inputs, create_graph=create_graph, allow_unused=True)
        return loss.detach(), *(torch.zeros(()) if g is None else g.detach() for g in grads)

    want = run()
    with fusing(block), watching() as taken:
        fused, again = run(), run(create_graph=True)
    assert taken == ([True, True] if form != "number" or alpha > 0 or voided else [])
    assert_close(fused, want, rtol=1e-9, atol=1e-9)
    assert_close(again, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_a_void_logit_may_be_anything(value, mask):
    x = 4 * torch.randn(3, 50)
    y = torch.randint(0, 2, (3, 50)).to(mask)
    x[:, ::7], y[:, ::7] = value, 255
    x[2], y[2] = value, 255
    x.requires_grad_()
    alpha = torch.tensor([0.0, 0.1, 0.4])
    kept = y != 255
    want = sc_bce_with_logits(x[:2][kept[:2]].view(2, -1), y[:2][kept[:2]].view(2, -1), alpha[:2])
    for reduction, count in (("mean", 1), ("sum", kept.sum())):
        with fusing():
            loss = sc_bce_with_logits(x, y, alpha, ignore_index=255, reduction=reduction)
        assert_close(loss, (want * count).to(loss.dtype))
        gradient = torch.autograd.grad(loss, x)[0]
        assert gradient[~kept].eq(0).all()
        assert gradient[kept].ne(0).all()


def test_all_void_is_exactly_nothing():
    x, y = (300 * torch.randn(2, 70)).requires_grad_(), torch.full((2, 70), 255, dtype=torch.uint8)
    for weight in (None, torch.rand(2, 70)):
        with fusing(), watching() as taken:
            loss = sc_bce_with_logits(x, y, 0.1, 1.0, prior=0.3, weight=weight, ignore_index=255)
        assert taken == [True]
        assert loss.item() == 0
        assert torch.autograd.grad(loss, x)[0].eq(0).all()


def test_an_illegal_label_beside_void_ones_is_refused_in_large_batches_too():
    x, y = torch.zeros(1 << 20), torch.zeros(1 << 20, dtype=torch.uint8)
    y[5], y[-1] = 255, 2
    with pytest.raises(ValueError, match=r"besides ignore_index=255\), but got the value 2"):
        sc_bce_with_logits(x, y, 0.1, ignore_index=255)
    y = y.short()
    y[-1] = -1
    with pytest.raises(ValueError, match="got the value -1"):
        sc_bce_with_logits(x, y, 0.1, ignore_index=255)
    y[-1] = 1
    want = sc_bce_with_logits(x, y, 0.1, ignore_index=255)
    assert want.isfinite()
    across = y.view(1024, 1024).t()
    assert_close(sc_bce_with_logits(x.view(1024, 1024), across, 0.1, ignore_index=255), want)


@pytest.mark.parametrize("prior", [0.5, 0.02, torch.tensor([[0.02], [0.5], [0.9]])])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", [*MASKS, *FLOATS, torch.uint16, torch.uint32, torch.uint64])
def test_every_dtype_is_that_of_the_reference_path(dtype, mask, prior):
    x = (4 * torch.randn(3, 50)).to(dtype).requires_grad_()
    y = torch.randint(0, 2, (3, 50)).to(mask)
    alpha = torch.tensor([0.0, 0.1, 0.4])

    def run():
        loss = sc_bce_with_logits(x, y, alpha, 1.0, prior=prior)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    want = run()
    with fusing():
        fused = run()
    assert [f.dtype for f in fused] == [w.dtype for w in want]
    assert_close(fused, want)


@pytest.mark.parametrize("prior", [0.5, 0.02, torch.tensor([0.02, 0.3])[:, None, None]])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_large_batch_takes_it_and_float32_agrees_with_float64(prior, drawn):
    x = (6 * torch.randn(2, 2, 512, 513)).requires_grad_()
    y = torch.rand(x.shape) < 0.3
    alpha = torch.rand(x.shape) < 0.2 if drawn else torch.tensor([0.02, 0.2])
    with watching() as taken:
        loss = sc_bce_with_logits(x, y, alpha, 1.0, prior=prior)
        loss.backward()
    assert taken
    assert all(taken)
    level = alpha.numpy() if drawn else alpha.double().numpy()[:, None, None, None]
    c = prior.double().numpy() if isinstance(prior, torch.Tensor) else prior
    wide, q = x.detach().double().numpy(), ref.effective(y.numpy(), level, 1.0, c)
    assert loss.item() == pytest.approx(ref.bce(wide, q).mean(), abs=1e-6)
    np.testing.assert_allclose(x.grad.numpy() * x.numel(), ref.sigmoid(wide) - q, atol=1e-6)


@pytest.mark.parametrize("width", [1, 31, 32, 63, 64, 127, 255, 511, 1023, 4095, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_of_sigmoids_underflows(width, dtype):
    """Undecided logits, whose sigmoids are 1/2: 150 of them are no float32 any more."""
    x = torch.zeros(2, width, dtype=dtype)
    for y in (torch.zeros_like(x), torch.ones(2, width, dtype=torch.bool)):
        with fusing(1 << 20):
            loss, _ = swept(x, y, 0.1)
        assert loss.item() == pytest.approx(2 * width * np.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_saturated_logits_errs_by_less_than_a_rounding_of_one(dtype):
    """Where every logit is large and right, the sigmoid rounds to 1: 1e-7 is the stated bound."""
    for size in (5.0, 9.0, 15.0, 17.0, 30.0, 88.0):
        x = torch.full((1, 4000), size, dtype=dtype)
        with fusing(1000):
            loss, _ = swept(x, torch.ones_like(x))
        want = float(np.log1p(np.exp(-size)))
        assert float(loss) / 4000 == pytest.approx(want, abs=torch.finfo(dtype).eps)


def test_extreme_and_non_finite_logits():
    y = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    for x in (1e30, 1e4, -1e4, -1e30):
        input = torch.full((1, 4), x, requires_grad=True)
        with fusing():
            loss = sc_bce_with_logits(input, y, 0.05)
            loss.backward()
        assert_close(loss.detach(), sc_bce_with_logits(input.detach(), y, 0.05))
        assert bool(input.grad.isfinite().all())
    with fusing():
        bad = torch.tensor([[1.0, torch.nan, 2.0, 3.0]])
        assert sc_bce_with_logits(bad, y, 0.05).isnan()
        # As torch: no overflow below float32's end, and a certain miss costs inf.
        assert sc_bce_with_logits(torch.tensor([[torch.inf] * 4]), y, 0.05) == torch.inf
        assert swept(torch.tensor([[torch.inf]]), torch.tensor([[0.0]])) is None
        for x, label in ((3e38, 0.0), (-3e38, 1.0)):
            loss, _ = swept(torch.tensor([[x]]), torch.tensor([[label]]))
            assert loss == abs(x)


@pytest.mark.parametrize("prior", [0.5, 0.02, torch.tensor([[0.02], [0.5], [0.9]])])
def test_a_row_of_level_zero_has_a_finite_loss_whatever_its_logits(prior):
    """Its slopes add up to more than float32 holds, and 0 times inf is nan."""
    x = torch.full((3, 70_000), 5e33)
    x[1] = -5e33
    x[2] = 1.0
    y = x > 0
    alpha = torch.tensor([0.0, 0.0, 0.1])
    x.requires_grad_()
    with fusing(1 << 20), watching() as taken:
        loss = sc_bce_with_logits(x, y, alpha, 1.0, prior=prior)
    assert taken
    assert all(taken)
    (grad,) = torch.autograd.grad(loss, x)
    (again,) = torch.autograd.grad(
        sc_bce_with_logits(x, y, alpha, 1.0, prior=prior), x, create_graph=True
    )
    c = prior if isinstance(prior, float) else 0.9
    row = ref.sc_bce(1.0, 1.0, 0.1, 1.0, prior=c)
    assert loss.item() == pytest.approx(float(row) / 3, rel=1e-5)
    assert not grad[:2].any()
    assert bool(grad[2].isfinite().all())
    assert_close(again, grad)


# --- differentiation and transforms ------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_all_orders(soft):
    x = (3 * torch.randn(2, 7, dtype=torch.float64)).requires_grad_()
    y = torch.rand(2, 7, dtype=torch.float64)
    y = y if soft else (y > 0.5).double()
    alpha = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    prior = torch.tensor([[0.2], [0.6]], dtype=torch.float64, requires_grad=True)

    def loss(x, alpha, prior):
        return sc_bce_with_logits(x, y, alpha, 1.1, prior=prior)

    with fusing(4), watching() as taken:
        assert torch.autograd.gradcheck(loss, (x, alpha, prior), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, (x, alpha, prior))
    assert taken
    assert all(taken)


def test_gradients_of_all_orders_under_a_draw():
    x = (3 * torch.randn(2, 7, dtype=torch.float64)).requires_grad_()
    y, drawn = torch.rand(2, 7, dtype=torch.float64), torch.rand(2, 7) < 0.5
    beta = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    prior = torch.tensor([[0.2], [0.6]], dtype=torch.float64, requires_grad=True)

    def loss(x, beta, prior):
        return sc_bce_with_logits(x, y, drawn, beta, prior=prior)

    with fusing(4), watching() as taken:
        assert torch.autograd.gradcheck(loss, (x, beta, prior), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, (x, beta, prior))
    assert taken
    assert all(taken)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("prior", [0.5, 0.02, torch.tensor([[0.1], [0.9]]).double()])
def test_a_gradient_to_be_differentiated_again_is_the_gradient(drawn, prior):
    """By hand: sigmoid(x) - y + s (y - c), and s (1 - s)-like curvature of the sigmoid alone."""
    x = (3 * torch.randn(2, 7, dtype=torch.float64)).requires_grad_()
    y = torch.rand(2, 7, dtype=torch.float64)
    alpha = torch.rand(2, 7) < 0.5 if drawn else torch.tensor([0.1, 0.3]).double()
    s = 0.8 * (alpha.double() if drawn else alpha[:, None])
    with fusing(4), watching() as taken:
        loss = sc_bce_with_logits(x, y, alpha, 0.8, prior=prior, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (plain,) = torch.autograd.grad(
            sc_bce_with_logits(x, y, alpha, 0.8, prior=prior, reduction="sum"), x
        )
    assert taken == [True, True]
    want = torch.sigmoid(x) - y + s * (y - prior)
    assert_close(grad, want)
    assert_close(plain, want.detach())
    (curvature,) = torch.autograd.grad(grad.sum(), x)
    assert_close(curvature, (torch.sigmoid(x) * torch.sigmoid(-x)).detach())


def test_batched_gradients():
    x = torch.randn(3, 6, requires_grad=True)
    y = (torch.rand(3, 6) > 0.5).float()
    with fusing():
        loss = sc_bce_with_logits(x, y, 0.2, 1.0, prior=0.1, reduction="sum")
        rows = torch.autograd.grad(loss, x, torch.arange(3.0), is_grads_batched=True)[0]
    want = torch.sigmoid(x.detach()) - y + 0.2 * (y - 0.1)
    assert_close(rows, torch.arange(3.0)[:, None, None] * want)


def test_transforms_step_aside_and_give_the_same():
    x, y = torch.randn(4, 6), (torch.rand(4, 6) > 0.5).float()

    def loss(x):
        return sc_bce_with_logits(x, y, 0.1)

    plain = (
        torch.func.grad(loss)(x),
        torch.func.jvp(loss, (x,), (x,)),
        torch.func.vmap(loss)(y[None]),
    )
    with fusing(), watching() as taken:
        fused = (
            torch.func.grad(loss)(x),
            torch.func.jvp(loss, (x,), (x,)),
            torch.func.vmap(loss)(y[None]),
        )
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            slope = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
            for name in ("alpha", "beta", "prior"):
                dual = torch.autograd.forward_ad.make_dual(torch.tensor(0.3), torch.ones(()))
                value = sc_bce_with_logits(
                    x, y, **{"alpha": 0.2, "beta": 1.0, "prior": 0.1, name: dual}, reduction="sum"
                )
                got = torch.autograd.forward_ad.unpack_dual(value).tangent
                want = {
                    "alpha": (y - 0.1) * x, "beta": 0.2 * (y - 0.1) * x, "prior": -0.2 * x
                }  # fmt: skip
                assert_close(got, want[name].sum())
        inside = torch.func.vmap(lambda a: sc_bce_with_logits(x, y, a))(torch.tensor([0.1, 0.2]))
    assert not any(taken)
    assert_close(fused, plain)
    assert_close(slope, plain[1][1])
    assert_close(inside[0], loss(x))


def test_what_it_can_not_serve_takes_the_reference_path():
    x, y = torch.randn(4, 6), (torch.rand(4, 6) > 0.5).float()
    one = torch.ones(6)
    with fusing(), watching() as taken:
        sc_bce_with_logits(x.T, y.T, 0.1)
        sc_bce_with_logits(x, y, 0.1, pos_weight=one)
        with pytest.raises(RuntimeError, match="weight"):
            sc_bce_with_logits(x, y, 0.1, weight=one.clone().requires_grad_())
        sc_bce_with_logits(x, y.long(), 0.1, ignore_index=(1 << 24) + 1)
        sc_bce_with_logits(x, y, 0.1, reduction="none")
        with mock.patch.object(cpu, "MIN_FIXED", 25):
            sc_bce_with_logits(x, y, 0.1)
            sc_bce_with_logits(x, y, 0.1, ignore_index=255)
            sc_bce_with_logits(x, y, torch.rand(4, 6) < 0.5)
        with mock.patch.object(cpu, "MIN_WEIGHTED", 25):
            sc_bce_with_logits(x, y, 0.1, weight=torch.full((4, 1), 0.1))
        with mock.patch.object(cpu, "MIN_ELEMENTS", 25):
            AdaptivePerturbation(4)(x, y, torch.arange(4))
        with mock.patch.object(cpu, "MIN_PER_ROW", 2):
            sc_bce_with_logits(x, y, torch.full((4, 6), 0.1))
            sc_bce_with_logits(x, y, 0.1, prior=torch.full((4, 6), 0.1))
            sc_bce_with_logits(x, y, 0.1, prior=torch.full((6,), 0.1))
            sc_bce_with_logits(x, y, 0.1, weight=torch.full((6,), 0.1))
        sc_bce_with_logits(x, y.clone().requires_grad_(), 0.1)
        assert sc_bce_with_logits(x, y.double(), 0.1).dtype == torch.float64
        sc_bce_with_logits(x.to("meta"), y.to("meta"), 0.1)
        sc_bce_with_logits(x, y)
        with pytest.raises(ValueError, match="alpha"):
            sc_bce_with_logits(x, y, torch.tensor([0.1]))
        torch.compile(sc_bce_with_logits, backend="eager", fullgraph=True)(x, y, 0.1)
        assert not any(taken)
        taken.clear()
        sc_bce_with_logits(x, y, 0.1)
        assert taken == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_gradients_in_low_precision_are_computed_in_float32(dtype):
    x = torch.full((2, 8), 7.0, dtype=dtype, requires_grad=True)
    y = torch.ones(2, 8, dtype=torch.bool)
    want = 1 - 0.001 / 1 - float(torch.sigmoid(torch.tensor(7.0, dtype=torch.float64)))
    with fusing():
        loss = sc_bce_with_logits(x, y, 0.001, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert grad[0, 0].item() == pytest.approx(-want, rel=0.02)


def test_masks_of_inference_mode_and_a_default_device():
    x = torch.randn(4, 2000, requires_grad=True)
    with torch.inference_mode():
        y = torch.rand(4, 2000) > 0.5
    with fusing():
        sc_bce_with_logits(x, y, 0.1).backward()
        want = x.grad.clone()
        with torch.device("meta"):
            criterion = SCBCEWithLogitsLoss.disturb_label(0.1)
            criterion(x, y.clone()).backward()
            (again,) = torch.autograd.grad(sc_bce_with_logits(x, y.clone(), 0.1), x)
    assert_close(again, want)


@pytest.mark.filterwarnings("ignore")
def test_tracing_steps_aside():
    x, y = torch.randn(2, 8), torch.rand(2, 8) > 0.5
    with fusing(), watching() as taken:
        traced = torch.jit.trace(
            lambda x, y: sc_bce_with_logits(x, y, 0.1), (x, y), check_trace=False
        )
    assert not any(taken)
    assert_close(traced(x, y), sc_bce_with_logits(x, y, 0.1))


# --- memory, masks, table ----------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.5, 0.02, torch.full((8, 1), 0.1)])
@pytest.mark.parametrize(
    ("mask", "expected"), [(torch.bool, 5), (torch.uint8, 5), (torch.float32, 8)]
)
def test_bytes_saved_for_backward(mask, expected, prior):
    x, y = torch.randn(8, 2000, requires_grad=True), torch.randint(0, 2, (8, 2000)).to(mask)
    saved = {}

    def pack(value):
        saved[value.data_ptr()] = value.numel() * value.element_size()
        return value

    with fusing(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        sc_bce_with_logits(x, y, 0.1, 1.0, prior=prior)
    # One value for each row, whatever the batch, is what goes beyond.
    assert expected <= sum(saved.values()) / x.numel() < expected + 0.05


def test_a_learned_level_of_each_sample_needs_no_tensor_of_full_size():
    x, y = torch.randn(4, 50_000, requires_grad=True), torch.rand(4, 50_000) < 0.3
    alpha = torch.full((4,), 0.2, requires_grad=True)
    with fusing(1000):
        loss = sc_bce_with_logits(x, y, alpha, 1.0)
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward()
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert taken < 1.5 * x.numel() * 4
    with plain():
        (want,) = torch.autograd.grad(sc_bce_with_logits(x, y, alpha, 1.0), alpha)
    assert_close(alpha.grad, want)


def test_an_ignored_sample_may_have_any_weight():
    x, y = torch.randn(4, 1, 6, requires_grad=True), torch.rand(4, 1, 6) < 0.5
    y = y.byte()
    y[3] = 255
    keep = torch.tensor([1.0, 0.5, 2.0, 0.0]).reshape(4, 1, 1)
    want = sc_bce_with_logits(x, y, 0.2, weight=keep, ignore_index=255)
    (slope,) = torch.autograd.grad(want, x)
    for missing in (math.nan, math.inf):
        weight = keep.clone()
        weight[3] = missing
        with fusing():
            got = sc_bce_with_logits(x, y, 0.2, weight=weight, ignore_index=255)
        assert_close(got, want)
        assert_close(torch.autograd.grad(got, x)[0], slope)


@pytest.mark.parametrize("bad", [2, 255, -1])
def test_illegal_integers_are_refused(bad):
    y = torch.zeros(3, 8, dtype=torch.int16)
    y[1, 2] = bad
    with fusing(), pytest.raises(ValueError, match=f"got the value {bad}; for a 0/255 mask"):
        sc_bce_with_logits(torch.randn(3, 8), y, 0.1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (0.0, 1.5)])
def test_float_labels_outside_the_unit_interval_are_refused(dtype, low, high):
    """One of them, in the last block of a batch that is too large for a look of its own."""
    x, y = torch.randn(3, 3000).to(dtype), torch.zeros(3, 3000, dtype=dtype)
    y[2, -1] = high
    y[2, -2] = low
    bad = low if low < 0 else high
    text = rf"`target` to be in \[0, 1\], but got the value {bad:g}; .*name a void label with"
    with fusing(1000), pytest.raises(ValueError, match=text):
        sc_bce_with_logits(x, y, 0.1)
    with fusing(1000), pytest.raises(ValueError, match=text):
        sc_bce_with_logits(x[:, -8:], y[:, -8:], 0.1)
    with pytest.raises(ValueError, match=text):
        sc_bce_with_logits(x[:, -8:], y[:, -8:], 0.1)


def measured():
    """A histogram of over-confident answers: its slope raises the levels."""
    histogram, x = CalibrationHistogram(), torch.linspace(-4, 4, 200)
    histogram.update(x, torch.rand(200, generator=torch.Generator().manual_seed(0)) < x / 16 + 0.5)
    return histogram


@given(
    seeds,
    st.sampled_from(["sample", "expected", "element"]),
    st.sampled_from([0.0, 2.0, "published"]),
    st.sampled_from([0.5, 0.1, torch.tensor([[0.1], [0.6]]), "observed"]),
)
def test_the_adaptive_loss_and_table_are_those_of_the_plain_path(seed, sampling, focus, prior):
    def train():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        setting = dict(sampling=sampling, warmup=1, generator=generator, beta=1.0, prior=prior)
        if focus == "published":
            criterion = AdaptivePerturbation.published(20, lr=0.02, penalty=1.0, **setting)
        else:
            criterion = AdaptivePerturbation(20, focus=focus, **setting)
        losses = []
        for _ in range(4):
            x = (5 * torch.randn(8, 2, 30)).requires_grad_()
            y, index = torch.rand(8, 2, 30) > 0.4, torch.randint(0, 20, (8,))
            loss = criterion(x, y, index)
            losses += [loss.detach(), *torch.autograd.grad(loss, x)]
            criterion.step(measured())
        return criterion.alpha.clone(), criterion.prior, losses, generator.get_state()

    want = train()
    with fusing(), watching() as taken:
        fused = train()
    assert taken == [False, True, True, True]  # the warm-up is torch's own call
    assert_close(fused[:3], want[:3])
    assert bool(want[0].any())
    assert torch.equal(fused[3], want[3])


@pytest.mark.parametrize("sampling", ["sample", "element"])
@pytest.mark.parametrize("size", [40, 5000])
def test_a_draw_for_each_logit_of_a_vector_moves_levels_by_all_of_them(sampling, size):
    """With (N,) logits a draw per sample has the shape of one per element, and is no filter."""

    def train():
        criterion = AdaptivePerturbation.published(
            size, "max_entropy", lr=0.1, penalty=0.0, warmup=1, sampling=sampling,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        criterion(x, x > 0, torch.arange(size))
        criterion.step(0.8)
        criterion(x, x > 0, torch.arange(size))
        return criterion(x, x > 0, torch.arange(size)).detach(), criterion.alpha

    x = torch.randn(size, requires_grad=True)
    loss, alpha = train()
    with fusing(), watching() as taken:
        fused, again = train()
    assert taken == [False, True, True]
    assert_close(fused, loss)
    assert_close(again, alpha)
    assert_close(alpha, (0.2 * x.detach().abs()).clamp(max=0.49))


@pytest.mark.parametrize("size", [9, (1 << 18) + 5])
def test_a_bool_alpha_of_a_vector_is_a_draw_on_both_paths(size):
    x, y, drawn = torch.randn(size), torch.rand(size) < 0.4, torch.rand(size) < 0.3
    beta = 0.5 + torch.rand(size)
    q = torch.where(drawn, y + beta * (0.1 - y.float()), y.float())
    want = F.binary_cross_entropy_with_logits(x, q)
    for numbers in (beta, beta.mean()):
        q = torch.where(drawn, y + numbers * (0.1 - y.float()), y.float())
        want = F.binary_cross_entropy_with_logits(x, q)
        assert_close(sc_bce_with_logits(x, y, drawn, numbers, prior=0.1), want)
        with fusing(1 << 20):
            assert_close(sc_bce_with_logits(x, y, drawn, numbers, prior=0.1), want)


def test_a_refused_batch_leaves_the_generator_and_the_table():
    generator = torch.Generator().manual_seed(0)
    criterion = AdaptivePerturbation.published(4, warmup=1, generator=generator)
    x, index = torch.randn(2, 8), torch.arange(2)
    criterion(x, torch.ones(2, 8), index)
    criterion.step(0.9)
    before, held = generator.get_state(), {n: v.clone() for n, v in criterion.held().items()}
    with fusing(), pytest.raises(ValueError, match="0/255"):
        criterion(x, torch.full((2, 8), 255, dtype=torch.uint8), index)
    with fusing(), pytest.raises(ValueError, match="size"):
        criterion(x, torch.ones(2, 4), index)
    assert torch.equal(generator.get_state(), before)
    assert all(torch.equal(value, held[name]) for name, value in criterion.held().items())


def test_the_named_losses_take_it():
    x, y = torch.randn(4, 9), torch.rand(4, 9) > 0.5
    with fusing(), watching() as taken:
        for criterion in (
            SCBCEWithLogitsLoss.label_smoothing(0.1),
            SCBCEWithLogitsLoss.hard_inversion(0.1),
            SCBCEWithLogitsLoss.soft_inversion(0.1),
            SCBCEWithLogitsLoss.moderation(0.1),
            SCBCEWithLogitsLoss.disturb_label(0.1),
        ):
            criterion(x.clone().requires_grad_(), y)
    assert taken == [True] * 5


def test_tensors_of_inference_mode_serve_on_both_paths():
    with torch.inference_mode():
        alpha, prior = torch.rand(4) / 2, torch.rand(6)
    x, y = torch.randn(4, 6, requires_grad=True), torch.rand(4, 6) < 0.5
    for setting in ({"alpha": alpha}, {"alpha": 0.2, "prior": prior}):

        def grad(setting=setting):
            return torch.autograd.grad(sc_bce_with_logits(x, y, beta=1.0, **setting), x)[0]

        want = grad()
        with fusing():
            assert_close(grad(), want)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_what_is_not_finite_is_what_torch_makes_of_it(value, label):
    x, y = torch.randn(4, 6), torch.ones(4, 6)
    x[1, 2], y[1, 2] = value, label
    want = sc_bce_with_logits(x, y, 0.2)
    with fusing():
        assert_close(sc_bce_with_logits(x, y, 0.2), want, equal_nan=True)


def test_many_blocks_are_summed_as_exactly_as_one():
    """In float32 each of 4,096 blocks would add up to half a unit of its last place."""
    x, y = 4 * torch.randn(1, 1 << 16), torch.rand(1, 1 << 16) < 0.02
    with fusing(16):
        got = sc_bce_with_logits(x, y, 0.3, 1.0, prior=0.02)
    want = sc_bce_with_logits(x.double(), y, 0.3, 1.0, prior=0.02)
    assert got.dtype == torch.float32
    assert abs(float(got) - float(want)) < 5e-8 * float(want)


def test_elements_and_hits_are_counted_exactly():
    """More than float32 can count: its ratio would be a unit of the last place less."""
    size = (1 << 24) + 8
    x, y = torch.zeros(1, size, dtype=torch.bfloat16), torch.ones(1, size, dtype=torch.uint8)
    y[0, 0], x[0, 1] = 255, -1
    _, seen = swept(x, y, 0.0, 1.0, void=255.0, wanted=Wanted(hits=True, labels=()))
    assert seen.hits.item() == np.float32((size - 2) / (size - 1)) == np.float32(1 - 2**-24)
    assert [part.item() for part in seen.counts] == [np.float32(size - 1)] * 2


@pytest.mark.parametrize("threads", [1, 2, 4, 9])
def test_each_thread_has_its_share_of_elements(threads):
    counted = min(threads, 4)
    with (
        mock.patch.object(torch, "get_num_threads", return_value=threads),
        mock.patch.multiple(cpu, BLOCK=8, MIN_FIXED=16, MIN_ELEMENTS=4, MIN_PER_ROW=1),
        watching() as taken,
    ):
        for share, fixed, by_sample in (
            (3, False, False), (4, False, True), (15, False, True), (16, True, True),
        ):  # fmt: skip
            x, y = torch.randn(share * counted), torch.ones(share * counted)
            taken.clear()
            got = sc_bce_with_logits(x, y, 0.1)
            ignored = sc_bce_with_logits(x, y, 0.1, ignore_index=255)
            assert (swept(x, y, 0.1, wanted=Wanted(hits=True)) is not None) == by_sample
            assert taken == [fixed, fixed, by_sample]
            want = ref.sc_bce(x.numpy(), y.numpy(), 0.1, 2.0)
            assert (float(got), float(ignored)) == pytest.approx((want, want), rel=1e-5)
