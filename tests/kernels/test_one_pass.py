"""Loss and gradient in one pass: against the formulas, and where it steps aside."""

import contextlib
import math
from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

from sc_bce import sc_bce_with_logits
from sc_bce.kernels import one_pass

SHAPE, PRIOR = (3, 2, 5), 0.3
HALF = (torch.bfloat16, torch.float16)
VOID = 7


def batch(seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(0, spread, SHAPE))
    return x, torch.from_numpy(rng.random(SHAPE)), torch.from_numpy(rng.random(SHAPE) < 0.3)


def taken(x, q, weight=None, ignored=None, mean=False):
    """Loss and gradient; q is given to be overwritten."""
    x = x.clone().requires_grad_()
    loss = one_pass.reduced_loss(x, q.clone(), weight, ignored, mean)
    loss.backward()
    return loss.detach(), x.grad


def judged(x, q, weight=1.0, ignored=None, mean=False):
    """The same by the formulas, in float64."""
    x, q = x.double().numpy(), q.double().numpy()
    valid = np.ones(x.shape, bool) if ignored is None else ~ignored.numpy()
    weight = np.broadcast_to(np.asarray(weight, np.float64), x.shape)
    divisor = max(valid.sum(), 1) if mean else 1
    x = np.where(valid, x, 0.0)
    loss = np.where(valid, weight * ref.bce(x, q), 0.0).sum() / divisor
    gradient = np.where(valid, weight * (ref.sigmoid(x) - q), 0.0) / divisor
    return torch.tensor(loss), torch.from_numpy(gradient)


@contextlib.contextmanager
def watching():
    """A list with an entry for each batch that took one pass."""
    calls, reduced_loss = [], one_pass.reduced_loss

    def watched(*arguments):
        calls.append(arguments)
        return reduced_loss(*arguments)

    with mock.patch.object(one_pass, "reduced_loss", watched):
        yield calls


# --- against the formulas and torch -----------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("voided", [True, False])
@pytest.mark.parametrize("weighted", [None, "number", "per label", "per element"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_loss_and_gradient_are_those_of_the_formulas(dtype, weighted, voided, mean):
    x, q, ignored = batch()
    x, q, ignored = x.to(dtype), q.to(torch.promote_types(dtype, torch.float32)), ignored
    sizes = {"number": (), "per label": (2, 1), "per element": SHAPE}
    weight = None if weighted is None else torch.rand(sizes[weighted], dtype=q.dtype)
    ignored = ignored if voided else None
    loss, gradient = taken(x, q, weight, ignored, mean)
    want, slope = judged(x, q, 1.0 if weight is None else weight, ignored, mean)
    assert loss.dtype == q.dtype
    assert gradient.dtype == dtype
    exact = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(loss.double(), want, rtol=exact, atol=0)
    step = max(torch.finfo(dtype).eps, 2**-22 if dtype != torch.float64 else 0)
    assert_close(gradient.double(), slope, rtol=step, atol=step / 2)


@pytest.mark.parametrize("mean", [True, False])
def test_it_is_torchs_bce(mean):
    x, q, _ = batch(1)
    twin = x.clone().requires_grad_()
    reduction = "mean" if mean else "sum"
    want = F.binary_cross_entropy_with_logits(twin, q, reduction=reduction)
    want.backward()
    loss, gradient = taken(x, q, mean=mean)
    assert_close(loss, want.detach(), rtol=1e-14, atol=0)
    assert_close(gradient, twin.grad, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-22), (torch.float64, 2**-51)])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 19.999, 20.5, 39.999, 40.5, 88.0, 1e3, 1e30])
def test_extreme_logits_are_right_to_a_rounding_of_the_logit(size, dtype, unit):
    for x in (size, -size):
        for target in (0.0, 1.0, 0.05, 0.95):
            logit, q = torch.tensor([x], dtype=dtype), torch.tensor([target], dtype=dtype)
            loss, gradient = taken(logit, q)
            want, slope = judged(logit, q)
            assert abs(loss.double() - want) <= unit * max(size, 1.0)
            assert abs(gradient.double() - slope) <= unit


def test_confident_right_answers_add_no_more_than_the_bound_to_a_mean():
    x = torch.linspace(5, 60, 10_001)
    loss, _ = taken(x, torch.ones_like(x), mean=True)
    want, _ = judged(x, torch.ones_like(x), mean=True)
    assert abs(loss.double() - want) < 1e-8  # 1.2e-4: the roundings do not add up


@pytest.mark.parametrize(
    ("logit", "target"), [(math.inf, 1.0), (-math.inf, 0.0), (math.nan, 0.0), (math.nan, 1.0)]
)
def test_an_infinite_right_logit_and_nan_are_nan_as_in_torch(logit, target):
    twin = torch.tensor([logit], requires_grad=True)
    want = F.binary_cross_entropy_with_logits(twin, torch.tensor([target]))
    want.backward()
    loss, gradient = taken(torch.tensor([logit]), torch.tensor([target]))
    assert want.isnan()
    assert loss.isnan()
    assert_close(gradient, twin.grad, equal_nan=True)


@pytest.mark.parametrize(("logit", "target"), [(math.inf, 0.0), (-math.inf, 1.0), (math.inf, 0.5)])
def test_an_infinite_wrong_logit_is_no_number_and_its_gradient_is(logit, target):
    loss, gradient = taken(torch.tensor([logit]), torch.tensor([target]))
    assert not loss.isfinite()
    assert gradient.item() == (1.0 if logit > 0 else 0.0) - target


# --- ignored elements -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 6e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_elements_are_exactly_nothing(bad, dtype, weighted):
    x, q, ignored = batch(2)
    x, q = x.to(dtype).masked_fill(ignored, bad), q.float().masked_fill(ignored, math.nan)
    weight = torch.rand(SHAPE).masked_fill(ignored, bad) if weighted else None
    for mean in (True, False):
        loss, gradient = taken(x, q, weight, ignored, mean)
        assert (gradient[ignored] == 0).all()
        kept = None if weight is None else weight[~ignored]
        alone, slopes = taken(x[~ignored], q[~ignored], kept, None, mean)
        assert_close(loss, alone, rtol=1e-6, atol=0)
        assert_close(gradient[~ignored], slopes)


def test_nothing_to_average():
    x, q, ignored = batch()
    everything = torch.ones_like(ignored)
    for mean in (True, False):
        loss, gradient = taken(x * math.nan, q, None, everything, mean)
        assert loss == 0
        assert (gradient == 0).all()
    for none in (None, everything[:0]):
        assert taken(x[:0], q[:0], None, none, mean=True)[0].isnan()  # as torch
        assert taken(x[:0], q[:0], None, none, mean=False)[0] == 0


# --- derivatives ------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("voided", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_can_be_differentiated_again_and_again(mean, voided, weighted):
    x, q, ignored = batch()
    weight = torch.rand(2, 1, dtype=torch.float64) if weighted else None

    def loss(x):
        return one_pass.reduced_loss(x, q.clone(), weight, ignored if voided else None, mean)

    x.requires_grad_()
    assert gradcheck(loss, x)
    assert gradgradcheck(loss, x)
    total = loss(x)
    for _ in range(3):
        (total,) = (part.sum() for part in torch.autograd.grad(total, x, create_graph=True))
    s = x.detach().sigmoid()
    third = s * (1 - s) * (1 - 2 * s) * (1.0 if weight is None else weight)
    if voided:
        third = third.masked_fill(ignored, 0.0)
    count = (~ignored).sum() if voided else x.numel()
    assert_close(total.detach(), third.sum() / (count if mean else 1))


def test_what_is_ignored_spoils_no_second_derivative():
    x, q, ignored = batch()
    spoilt = x.masked_fill(ignored, math.nan).requires_grad_()
    weight = torch.ones_like(x).masked_fill(ignored, math.nan)
    loss = one_pass.reduced_loss(spoilt, q, weight, ignored, False)
    (gradient,) = torch.autograd.grad(loss, spoilt, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), spoilt)
    s = x.sigmoid()
    assert_close(second, (s * (1 - s)).masked_fill(ignored, 0.0))


def test_without_a_gradient_nothing_is_kept():
    x, q, _ = batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda one: one):
        loss = one_pass.reduced_loss(x, q.clone(), None, None, True)
    assert not loss.requires_grad
    assert kept == []
    assert_close(loss, judged(x, q, mean=True)[0])
    with torch.no_grad():
        assert not one_pass.reduced_loss(
            x.requires_grad_(), q.clone(), None, None, True
        ).requires_grad


# --- who takes it -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("voided", [False, True])
def test_half_precision_takes_it_whatever_the_target(dtype, target_dtype, reduction, voided):
    x, _, positive = batch(3)
    if voided and target_dtype == torch.bool:
        pytest.skip("a bool mask has no value to ignore")
    y, hard = positive.to(target_dtype), positive.numpy().astype(np.float64)
    valid = np.ones(SHAPE, bool)
    if voided:
        valid[0, 0, :3] = False
        y[torch.from_numpy(~valid)] = VOID
    x = x.to(dtype).requires_grad_()
    options = dict(prior=PRIOR, reduction=reduction, ignore_index=VOID if voided else None)
    with watching() as calls:
        loss = sc_bce_with_logits(x, y, 0.2, 1.0, **options)
    assert len(calls) == 1
    loss.backward()
    options = dict(prior=PRIOR, reduction=reduction, valid=valid)
    wide = x.detach().double().numpy()
    want = ref.sc_bce(wide, hard, 0.2, 1.0, **options)
    step = torch.finfo(dtype).eps
    assert loss.dtype == (torch.float32 if y.is_floating_point() else dtype)  # as torch promotes
    assert loss.item() == pytest.approx(want, rel=step)
    q = ref.effective(hard, 0.2, 1.0, PRIOR)
    divisor = valid.sum() if reduction == "mean" else 1
    slope = torch.from_numpy(np.where(valid, ref.sigmoid(wide) - q, 0.0) / divisor)
    assert_close(x.grad.double(), slope, rtol=2 * step, atol=1e-7)


def test_an_accelerator_takes_it():
    x = torch.empty(4, 3, device="meta", requires_grad=True)
    with watching() as calls:
        loss = sc_bce_with_logits(x, torch.empty(4, 3, device="meta"), 0.1, weight=x.new_ones(3))
    assert len(calls) == 1
    loss.backward()
    assert x.grad.shape == (4, 3)
    assert x.grad.dtype == torch.float32


def test_it_steps_aside_where_another_derivative_is_wanted():
    x, q, _ = batch()
    x, q = x.bfloat16().requires_grad_(), q.float()
    wanting = (
        dict(target=q.clone().requires_grad_()),
        dict(prior=torch.tensor(0.3, requires_grad=True)),
        dict(alpha=torch.tensor(0.3, requires_grad=True)),
        dict(pos_weight=torch.ones(2, 1)),
        dict(reduction="none"),
    )
    for options in wanting:
        with watching() as calls:
            sc_bce_with_logits(x, **dict(target=q, alpha=0.1, beta=1.0) | options).sum().backward()
        assert calls == [], options
        for value in options.values():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                assert value.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        sc_bce_with_logits(x, q, 0.1, weight=torch.ones(2, 1, requires_grad=True))  # torch's own


def test_it_steps_aside_under_transforms():
    x, q, _ = batch()
    x, q = x.bfloat16(), q.float()

    def loss(x, q):
        return sc_bce_with_logits(x, q, 0.1, 1.0)

    with watching() as calls:
        each = torch.func.vmap(loss)(x, q)
        slope = torch.func.grad(loss)(x, q)
        with forward_ad.dual_level():
            dual = loss(forward_ad.make_dual(x, torch.ones_like(x)), q)
            change = forward_ad.unpack_dual(dual).tangent
    assert calls == []
    assert_close(each.float().mean(), loss(x, q).float(), rtol=1e-2, atol=0)
    assert_close(change.float(), slope.float().sum(), rtol=2e-2, atol=1e-3)
    twin = x.clone().requires_grad_()
    loss(twin, q).backward()  # by one pass
    assert_close(slope, twin.grad, rtol=2e-2, atol=1e-4)


def test_it_steps_aside_under_compile():
    x, q, _ = batch()
    x, q = x.bfloat16().requires_grad_(), q.float()
    with watching() as calls:
        step = torch.compile(sc_bce_with_logits, fullgraph=True, backend="aot_eager")
        loss = step(x, q, 0.1, 1.0)
        loss.backward()
    assert calls == []
    assert_close(loss, sc_bce_with_logits(x, q, 0.1, 1.0))


def test_logits_of_full_precision_on_a_cpu_take_torchs_call():
    x, q, _ = batch()
    with watching() as calls:
        sc_bce_with_logits(x.requires_grad_(), q, 0.1)
    assert calls == []
