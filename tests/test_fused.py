"""The fused sums against their plain twin, and where they step aside."""

from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, MASKS, batches, pairs, seeds
from torch.testing import assert_close

from sc_bce import AdaptivePerturbation, SCBCEWithLogitsLoss, _fused, sc_bce_with_logits

matrices = st.tuples(st.integers(1, 4), st.integers(1, 70))
blocks = st.sampled_from([1, 3, 8, 64, 1 << 20])


def fusing(block=8):
    """Every batch that the path can take takes it, in blocks of a few elements."""
    return mock.patch.multiple(_fused, _LEAST=1, _EACH=1, _BLOCK=block)


def watched():
    return mock.patch.object(_fused, "sample_sums", wraps=_fused.sample_sums)


# --- against the reference and the twin -------------------------------------------------------


@given(batches(matrices), blocks, st.booleans())
def test_sums_are_the_reference_formulas(batch, block, by_sample):
    x, y = batch.input, batch.target
    parts = len(x) if by_sample else 1
    with fusing(block):
        loss, margin = _fused.sample_sums(x, y, parts)
    x, y = x.numpy().reshape(parts, -1), y.numpy().reshape(parts, -1)
    np.testing.assert_allclose(loss, ref.bce(x, y).sum(1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(margin, ((2 * y - 1) * x).sum(1), rtol=1e-9, atol=1e-9)


@given(
    batches(matrices, scale=5.0), blocks, pairs(), st.sampled_from(["mean", "sum"]), seeds,
    st.sampled_from(["number", "0-d", "per sample", "drawn per sample", "drawn"]),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_plain_path(batch, block, pair, reduction, seed, form):
    alpha, beta = pair
    if form.startswith("drawn"):
        size = batch.input.shape if form == "drawn" else batch.input.shape[:1]
        alpha = torch.from_numpy(np.random.default_rng(seed).random(tuple(size)) < 0.4)
    elif form != "number":
        size = (len(batch.input),) if form == "per sample" else ()
        rng = np.random.default_rng(seed)
        alpha = torch.from_numpy(np.asarray(rng.uniform(0, alpha, size))).requires_grad_()
    input = batch.input.clone().requires_grad_()
    given = [input, alpha] if getattr(alpha, "requires_grad", False) else [input]

    def run():
        loss = sc_bce_with_logits(input, batch.target, alpha, beta, reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss * 3, given)

    plain = run()
    with fusing(block), watched() as taken:
        fused = run()
    assert taken.called == (form != "number" or alpha > 0)
    assert_close(fused, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", [*MASKS, *FLOATS, torch.uint16, torch.uint32, torch.uint64])
def test_every_dtype_is_that_of_the_plain_path(dtype, mask):
    x = (4 * torch.randn(3, 50)).to(dtype).requires_grad_()
    y = torch.randint(0, 2, (3, 50)).to(mask)
    alpha = torch.tensor([0.0, 0.1, 0.4])

    def run():
        loss = sc_bce_with_logits(x, y, alpha)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    plain = run()
    with fusing():
        fused = run()
    assert [f.dtype for f in fused] == [p.dtype for p in plain]
    assert_close(fused, plain)


def test_a_large_batch_takes_it_and_float32_agrees_with_float64():
    x = (6 * torch.randn(2, 1, 512, 514)).requires_grad_()
    y = torch.rand(x.shape) < 0.3
    alpha = torch.tensor([0.02, 0.2])
    with watched() as taken:
        loss = sc_bce_with_logits(x, y, alpha)
        loss.backward()
    assert taken.called
    wide = x.detach().double().requires_grad_()
    want = F.binary_cross_entropy_with_logits(
        wide, ref.effective(y.double(), 2 * alpha.double()[:, None, None, None], 1.0)
    )
    want.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)
    assert_close(x.grad.double() * x.numel(), wide.grad * x.numel(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_saturated_logits_errs_by_less_than_a_rounding_of_one(dtype):
    """Where every logit is large and right, the sigmoid rounds to 1: 1e-7 is the stated bound."""
    for size in (5.0, 9.0, 15.0, 17.0, 30.0, 88.0):
        x = torch.full((1, 4000), size, dtype=dtype)
        with fusing(1000):
            loss, _ = _fused.sample_sums(x, torch.ones_like(x), 1)
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
        assert sc_bce_with_logits(torch.tensor([[torch.inf] * 4]), y, 0.05).isnan()
        # As torch: no overflow below float32's end, and a certain miss costs inf.
        for x, label in ((3e38, 0.0), (-3e38, 1.0), (torch.inf, 0.0)):
            loss, _ = _fused.sample_sums(torch.tensor([[x]]), torch.tensor([[label]]), 1)
            assert loss == abs(x)


# --- differentiation and transforms ------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_all_orders(soft):
    x = (3 * torch.randn(2, 7, dtype=torch.float64)).requires_grad_()
    y = torch.rand(2, 7, dtype=torch.float64)
    y = y if soft else (y > 0.5).double()
    alpha = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    with fusing(4), watched() as taken:
        assert torch.autograd.gradcheck(lambda x, a: sc_bce_with_logits(x, y, a), (x, alpha))
        assert torch.autograd.gradgradcheck(lambda x, a: sc_bce_with_logits(x, y, a), (x, alpha))
    assert taken.called


def test_gradients_of_all_orders_under_a_draw():
    x = (3 * torch.randn(2, 7, dtype=torch.float64)).requires_grad_()
    y, drawn = torch.rand(2, 7, dtype=torch.float64), torch.rand(2, 7) < 0.5
    beta = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    with fusing(4), watched() as taken:
        assert torch.autograd.gradcheck(lambda x, b: sc_bce_with_logits(x, y, drawn, b), (x, beta))
        assert torch.autograd.gradgradcheck(lambda x: sc_bce_with_logits(x, y, drawn, 1.5), (x,))
    assert taken.called


def test_batched_gradients():
    x = torch.randn(3, 6, requires_grad=True)
    y = (torch.rand(3, 6) > 0.5).float()
    with fusing():
        sums = _fused.sample_sums(x, y, 3)[0]
        rows = torch.autograd.grad(sums, x, torch.eye(3), is_grads_batched=True)[0]
    assert_close(rows.sum(0), torch.sigmoid(x) - y)
    assert_close(rows[0, 1:], torch.zeros(2, 6))


def test_transforms_step_aside_and_give_the_same():
    x, y = torch.randn(4, 6), (torch.rand(4, 6) > 0.5).float()

    def loss(x):
        return sc_bce_with_logits(x, y, 0.1)

    plain = (
        torch.func.grad(loss)(x),
        torch.func.jvp(loss, (x,), (x,)),
        torch.func.vmap(loss)(y[None]),
    )
    with fusing(), watched() as taken:
        fused = (
            torch.func.grad(loss)(x),
            torch.func.jvp(loss, (x,), (x,)),
            torch.func.vmap(loss)(y[None]),
        )
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            slope = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
        inside = torch.func.vmap(lambda a: sc_bce_with_logits(x, y, a))(torch.tensor([0.1, 0.2]))
    assert not taken.called
    assert_close(fused, plain)
    assert_close(slope, plain[1][1])
    assert_close(inside[0], loss(x))


def test_what_it_can_not_serve_takes_the_plain_path():
    x, y = torch.randn(4, 6), (torch.rand(4, 6) > 0.5).float()
    one = torch.ones(6)
    with fusing(), watched() as taken:
        sc_bce_with_logits(x.T, y.T, 0.1)
        sc_bce_with_logits(x, y, 0.1, weight=one)
        sc_bce_with_logits(x, y, 0.1, pos_weight=one)
        sc_bce_with_logits(x, y, 0.1, ignore_index=7)
        sc_bce_with_logits(x, y, 0.1, reduction="none")
        sc_bce_with_logits(x, y, torch.full((4, 6), 0.1))
        sc_bce_with_logits(x, y.clone().requires_grad_(), 0.1)
        assert sc_bce_with_logits(x, y.double(), 0.1).dtype == torch.float64
        sc_bce_with_logits(x.to("meta"), y.to("meta"), 0.1)
        sc_bce_with_logits(x, y)
        with pytest.raises(ValueError, match="alpha"):
            sc_bce_with_logits(x, y, torch.tensor([0.1]))
        torch.compile(sc_bce_with_logits, backend="eager", fullgraph=True)(x, y, 0.1)
        assert not taken.called
        sc_bce_with_logits(x, y, 0.1)
        assert taken.called


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
    with fusing(), watched() as taken:
        traced = torch.jit.trace(
            lambda x, y: sc_bce_with_logits(x, y, 0.1), (x, y), check_trace=False
        )
    assert not taken.called
    assert_close(traced(x, y), sc_bce_with_logits(x, y, 0.1))


# --- memory, masks, table ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "expected"), [(torch.bool, 5), (torch.uint8, 5), (torch.float32, 8)]
)
def test_bytes_saved_for_backward(mask, expected):
    x, y = torch.randn(8, 100, requires_grad=True), torch.randint(0, 2, (8, 100)).to(mask)
    saved = {}

    def pack(value):
        saved[value.data_ptr()] = value.numel() * value.element_size()
        return value

    with fusing(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        sc_bce_with_logits(x, y, 0.1)
    # The two sums, whatever the batch, are what goes beyond.
    assert expected <= sum(saved.values()) / x.numel() < expected + 0.05


@pytest.mark.parametrize("bad", [2, 255, -1])
def test_illegal_integers_are_refused(bad):
    y = torch.zeros(3, 8, dtype=torch.int16)
    y[1, 2] = bad
    with fusing(), pytest.raises(ValueError, match=f"got the value {bad}; for a 0/255 mask"):
        sc_bce_with_logits(torch.randn(3, 8), y, 0.1)


@given(seeds, st.sampled_from(["sample", "expected"]), st.sampled_from([0.0, 2.0]))
def test_the_adaptive_loss_and_table_are_those_of_the_plain_path(seed, sampling, focus):
    def train(lots):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        criterion = AdaptivePerturbation(
            6, objective="feedback", sampling=sampling, focus=focus, warmup=1, generator=generator
        )
        losses = []
        for _ in range(3):
            criterion.step(0.8, 0.95)
            x = (5 * torch.randn(8, 30)).requires_grad_()
            y, index = torch.rand(8, 30) > 0.4, torch.randint(0, 6, (8,))
            loss = criterion(x, y, index)
            losses += [loss.detach(), *torch.autograd.grad(loss, x)]
        return criterion.alpha, losses, generator.get_state()

    plain = train(False)
    with fusing(), watched() as taken:
        fused = train(True)
    assert taken.call_count == 3
    assert_close(fused[:2], plain[:2])
    assert torch.equal(fused[2], plain[2])


def test_a_refused_batch_leaves_the_generator_and_the_table():
    generator = torch.Generator().manual_seed(0)
    criterion = AdaptivePerturbation(4, warmup=1, generator=generator)
    criterion.step(0.9)
    before = generator.get_state()
    with fusing(), pytest.raises(ValueError, match="0/255"):
        criterion(torch.randn(2, 8), torch.full((2, 8), 255, dtype=torch.uint8), torch.arange(2))
    with fusing(), pytest.raises(ValueError, match="size"):
        criterion(torch.randn(2, 8), torch.ones(2, 4), torch.arange(2))
    assert torch.equal(generator.get_state(), before)
    assert not criterion.moved.any()


def test_the_named_losses_take_it():
    x, y = torch.randn(4, 9), torch.rand(4, 9) > 0.5
    with fusing(), watched() as taken:
        for criterion in (
            SCBCEWithLogitsLoss.label_smoothing(0.1),
            SCBCEWithLogitsLoss.hard_inversion(0.1),
            SCBCEWithLogitsLoss.soft_inversion(0.1),
            SCBCEWithLogitsLoss.moderation(0.1),
            SCBCEWithLogitsLoss.disturb_label(0.1),
        ):
            criterion(x.clone().requires_grad_(), y)
    assert taken.call_count == 5
