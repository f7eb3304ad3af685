import copy
import math
from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from devices import array, lacks, refused, rng_state, seeded
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, batches, pairs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from sc_bce import SCBCEWithLogitsLoss, _batch, sc_bce_with_logits
from sc_bce._batch import bernoulli, truncated_normal

SETTINGS = {
    "label_smoothing": (SCBCEWithLogitsLoss.label_smoothing, 0.1, 1.0, 0.1, "expected", 0.0),
    "disturb_label": (SCBCEWithLogitsLoss.disturb_label, 0.2, 0.1, 2.0, "element", 0.0),
    "hard_inversion": (SCBCEWithLogitsLoss.hard_inversion, 0.2, 0.2, 2.0, "sample", 0.0),
    "soft_inversion": (SCBCEWithLogitsLoss.soft_inversion, 0.2, 0.2, 1.5, "sample", 0.0),
    "moderation": (SCBCEWithLogitsLoss.moderation, 0.2, 0.2, 1.0, "sample", 0.0),
    "dynamic_moderation": (SCBCEWithLogitsLoss.dynamic_moderation, 0.2, 0.2, 1.0, "sample", 0.25),
}


@given(batches(), pairs(), st.sampled_from(["none", "mean", "sum"]))
def test_module_equals_function(batch, pair, reduction):
    if pair[0] * pair[1] > 0.99999:
        pair = (0.99 * pair[0], pair[1])  # at 1 it would teach nothing, and is refused
    criterion = SCBCEWithLogitsLoss(alpha=pair[0], beta=pair[1], reduction=reduction)
    want = sc_bce_with_logits(batch.input, batch.target, *pair, reduction=reduction)
    assert_close(criterion(batch.input, batch.target), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_named_settings_are_data(name):
    make, argument, alpha, beta, sampling, noise = SETTINGS[name]
    criterion = make(argument, reduction="sum", pos_weight=torch.tensor(2.0), ignore_index=255)
    assert criterion.alpha == pytest.approx(alpha)
    assert (criterion.beta, criterion.sampling, criterion.noise) == (beta, sampling, noise)
    assert (criterion.reduction, criterion.ignore_index) == ("sum", 255)
    x, y = torch.randn(4, 3).double(), torch.randint(0, 2, (4, 3))
    expected = make(
        argument, sampling="expected", noise=0.0, reduction="sum", pos_weight=torch.tensor(2.0)
    )
    want = ref.sc_bce(array(x), array(y), alpha, beta, pos_weight=2.0, reduction="sum")
    assert float(expected(x, y)) == pytest.approx(float(want))
    plain = ref.bce(array(x), array(y), 2.0).sum()
    assert float(criterion.eval()(x, y)) == pytest.approx(float(plain))


def test_named_settings_take_another_sampling():
    assert SCBCEWithLogitsLoss.disturb_label(0.2, sampling="sample").sampling == "sample"
    assert SCBCEWithLogitsLoss.disturb_label(0.2, "sample").sampling == "sample"
    assert SCBCEWithLogitsLoss.hard_inversion(0.2, sampling="element").sampling == "element"
    assert SCBCEWithLogitsLoss.label_smoothing(0.2, sampling="sample").sampling == "sample"


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.99])
def test_disturb_label_redraws_uniformly_among_two_classes(rate):
    # Redrawn with probability `rate`, a label is wrong half of that time.
    criterion = SCBCEWithLogitsLoss.disturb_label(rate)
    x = torch.ones(200_000, 1)
    flipped = criterion(x, torch.ones_like(x)) - math.log1p(math.exp(-1))
    assert float(flipped) == pytest.approx(rate / 2, abs=5 * 0.5 / math.sqrt(200_000))


@pytest.mark.parametrize("sampling", ["sample", "element"])
@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "label_smoothing"])
def test_mean_of_draws_is_the_expectation(name, sampling):
    make, argument, alpha, beta, _, noise = SETTINGS[name]
    criterion = make(argument, sampling=sampling, reduction="none")
    n = 40_000
    x, y = torch.full((n, 2), 1.5), torch.tensor([0.0, 1.0]).expand(n, 2)
    drawn = criterion(x, y)
    expected = sc_bce_with_logits(x, y, alpha, beta, reduction="none")
    # The loss moves by x times the target; the target's variance is g (beta/2 - g) plus the
    # noise's, less than noise^2. Five standard errors of the mean of n draws.
    g = alpha * beta / 2
    error = 1.5 * math.sqrt((g * (beta / 2 - g) + noise**2) / n)
    assert ((drawn.mean(0) - expected.mean(0)).abs() < 5 * error).all()
    assert not torch.equal(drawn, expected)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.05, 0.25, 63.5 / 64, 1.0])
def test_draws_by_bytes_have_the_probability(alpha):
    """Within five deviations, for a number and for one level per row; 0 and 1 exactly."""
    count = 1 << 20
    for level in (alpha, torch.tensor([alpha, 0.5 * alpha])):
        drawn = bernoulli(level, torch.empty(2, count // 2), "element", None)
        assert drawn.dtype == torch.bool
        for row, want in zip(drawn, [alpha, alpha / (1 if level is alpha else 2)], strict=True):
            bound = 5 * math.sqrt(want * (1 - want) * 2 / count)
            assert abs(float(row.double().mean()) - want) <= bound


@pytest.mark.parametrize("size", [8, 1 << 16])
def test_the_least_uniform_number_is_below_no_probability_of_0(size):
    least = mock.patch.object(_batch, "_uniform", lambda like, shape, generator: torch.zeros(shape))
    with least:
        assert not bernoulli(0.0, torch.empty(size), "element", None).any()
        assert not bernoulli(torch.zeros(size), torch.empty(size, 2), "sample", None).any()


def test_draws_by_bytes_are_independent_and_repeat_with_the_generator():
    states = [seeded(3) for _ in range(2)]
    one, two = (bernoulli(0.3, torch.empty(1 << 18), "element", state) for state in states)
    assert torch.equal(one, two)
    assert not torch.equal(one, bernoulli(0.3, torch.empty(1 << 18), "element", states[0]))
    centred = one.double() - 0.3
    for lag in (1, 2, 3, 4, 7, 8, 16):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 5 * 0.21 / math.sqrt(1 << 18)


def test_samples_are_drawn_whole_and_elements_alone():
    x, y = torch.ones(500, 40), torch.zeros(500, 40)
    for sampling, kinds in (("sample", {0, 40}), ("element", set(range(41)))):
        criterion = SCBCEWithLogitsLoss.hard_inversion(0.3, sampling=sampling, reduction="none")
        flipped = (criterion(x, y) < 1).sum(1)
        assert set(flipped.tolist()) <= kinds
        assert 0.25 < flipped.float().mean() / 40 < 0.35
    assert len(set(flipped.tolist())) > 5


def test_dynamic_moderation_scatters_labels_by_a_truncated_normal():
    criterion = SCBCEWithLogitsLoss.dynamic_moderation(0.9, reduction="none")
    x = torch.ones(110_000, 1)
    # The loss is softplus(x) - q x, hence q by subtraction; what was not drawn is still 0.
    q = math.log1p(math.e) - criterion(x, torch.zeros_like(x))
    noise = q[q > 0.1][:90_000] - 0.5
    assert len(noise) == 90_000
    assert noise.abs().max() <= 0.25 + 1e-6
    assert noise.abs().max() > 0.249
    # Moments of the standard normal truncated to +-0.25, by quadrature.
    grid = np.linspace(-0.25, 0.25, 10_001)
    density = np.exp(-(grid**2) / 2)
    variance = (grid**2 * density).sum() / density.sum()
    assert float(noise.var()) == pytest.approx(variance, rel=0.02)
    assert abs(float(noise.mean())) < 5 * math.sqrt(variance / 90_000)


@pytest.mark.parametrize("name", SETTINGS)
def test_eval_and_no_grad_are_plain_bce_and_draw_nothing(name):
    make, argument, *_ = SETTINGS[name]
    criterion = make(argument)
    x, y = torch.randn(6, 3), torch.rand(6, 3)
    want = F.binary_cross_entropy_with_logits(x, y)
    before = rng_state()
    with torch.no_grad():
        assert torch.equal(criterion(x, y), want)
    with torch.inference_mode():
        assert torch.equal(criterion(x, y), want)
    assert torch.equal(criterion.eval()(x, y), want)
    assert torch.equal(rng_state(), before)


def test_generator_decides_the_draws_and_spares_the_global_one():
    x, y = torch.randn(50, 3), torch.rand(50, 3)
    before = rng_state()
    runs = [SCBCEWithLogitsLoss.dynamic_moderation(0.5, generator=seeded(s)) for s in (1, 1, 2)]
    one, two, three = (run(x, y) for run in runs)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(rng_state(), before)
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.4)
    torch.manual_seed(5)
    first = criterion(x, y)
    torch.manual_seed(5)
    assert torch.equal(criterion(x, y), first)
    # A copy carries its own generator on.
    twin = copy.deepcopy(runs[0])
    assert torch.equal(twin(x, y), runs[0](x, y))


def test_nothing_is_drawn_at_alpha_zero():
    before = rng_state()
    SCBCEWithLogitsLoss(alpha=0.0, sampling="element")(torch.zeros(3), torch.ones(3))
    assert torch.equal(rng_state(), before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_draws_of_few_elements_are_of_float32_whatever_the_input(dtype):
    """A bfloat16 uniform has 256 values: 0.001 would be drawn as 1/256."""
    x = torch.empty(4000, dtype=dtype)
    drawn = torch.stack([bernoulli(0.001, x, "element", None) for _ in range(100)])
    rate = float(drawn.double().mean())
    assert rate == pytest.approx(0.001, abs=5 * math.sqrt(0.001 / drawn.numel()))
    levels = torch.full((4000,), 0.001, dtype=dtype)
    drawn = torch.stack([bernoulli(levels, x, "sample", None) for _ in range(100)])
    rate = float(drawn.double().mean())
    assert rate == pytest.approx(0.001, abs=5 * math.sqrt(0.001 / drawn.numel()))


def test_draws_of_many_elements_are_of_float32_where_a_byte_ties():
    x = torch.empty(1 << 24, dtype=torch.bfloat16)
    alpha = 1.1 / 256**2  # just above one of 256 values of what follows the first byte
    rate = float(bernoulli(alpha, x, "element", None).double().mean())
    assert rate == pytest.approx(alpha, abs=5 * math.sqrt(alpha / (1 << 24)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_is_of_float32_whatever_the_input(dtype):
    noise = truncated_normal(torch.empty(3000, dtype=dtype), 0.25, None)
    assert noise.dtype == torch.float32
    assert len(noise.unique()) > 2900


def test_small_probabilities_are_drawn_in_float32_whatever_the_input():
    # A bfloat16 uniform has 256 values: 0.001 would be drawn as 0 or 1/256.
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.001, sampling="element", reduction="none")
    x = torch.ones(2_000_000, 1, dtype=torch.bfloat16)
    flipped = (criterion(x, torch.zeros_like(x)) < 1).float().mean()
    assert float(flipped) == pytest.approx(0.001, abs=5 * math.sqrt(0.001 / 2_000_000))


def test_scalars_and_empty_batches_can_be_drawn():
    for sampling in ("sample", "element"):
        criterion = SCBCEWithLogitsLoss.hard_inversion(0.4, sampling=sampling)
        losses = {
            round(float(criterion(torch.tensor(1.0), torch.tensor(1.0))), 4) for _ in range(40)
        }
        assert losses == {0.3133, 1.3133}
        assert criterion(torch.empty(0, 2), torch.empty(0, 2)).isnan()


@pytest.mark.parametrize("sampling", ["sample", "element"])
def test_compile_draws_without_a_generator_in_one_graph(sampling):
    criterion = SCBCEWithLogitsLoss.dynamic_moderation(0.5, sampling=sampling)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(2000, 3), torch.rand(2000, 3)
    one, two = compiled(x, y), compiled(x, y)
    assert not torch.equal(one, two)
    assert_close(one, sc_bce_with_logits(x, y, 0.5, 1.0), rtol=0.1, atol=0)


def test_compile_with_a_generator_draws_outside_the_graph():
    x, y = torch.randn(50, 3), torch.rand(50, 3)
    make = SCBCEWithLogitsLoss.hard_inversion
    eager = make(0.4, generator=seeded(1))
    compiled = torch.compile(make(0.4, generator=seeded(1)), backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(x, y), eager(x, y))


def test_numpy_numbers_configure_a_loss_that_compiles():
    criterion = SCBCEWithLogitsLoss(
        alpha=np.float32(0.25), beta=np.float64(1.0), ignore_index=np.int64(255)
    )
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4, 3))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, y), sc_bce_with_logits(x, y, 0.25, 1.0))


@pytest.mark.cpu_only("an accelerator would wait for a look at the values")
def test_floats_other_than_labels_are_refused_in_the_first_batches():
    """Large ones, away from the fused sweep: with a weight."""
    x, y = torch.randn(2, 5000), torch.randint(0, 2, (2, 5000)).float()
    for wrong, got in ((y * 255, "255"), (2 * y - 1, "-1")):
        criterion = SCBCEWithLogitsLoss(weight=torch.ones(5000), alpha=0.1)
        with pytest.raises(ValueError, match=rf"be in \[0, 1\], but got the value {got}; "):
            criterion(x, wrong)
        criterion(x, y)
        with pytest.raises(ValueError, match=rf"but got the value {got}; "):
            criterion(x, wrong)
        for _ in range(4):
            criterion(x, y)
        assert bool(criterion(x, wrong).isfinite())  # looked at no more: a pass for each batch
    # Ignored elements are never looked at.
    void = SCBCEWithLogitsLoss(alpha=0.1, ignore_index=255)
    assert_close(void(x, torch.where(y > 0, 255.0, y)), void(x, torch.where(y > 0, 255, 0)))
    with pytest.raises(ValueError, match=r"\(besides ignore_index=255\), but got the value 7"):
        void(x, torch.where(y > 0, 255.0, 7.0))


def test_the_functional_is_exempt_from_what_a_module_refuses():
    x, y = torch.zeros(2), torch.tensor([0.0, 1.0])
    loss = sc_bce_with_logits(x, y, 1.0, 1.0, pos_weight=torch.tensor(50.0))
    assert float(loss) == pytest.approx((0.5 * 50 + 0.5) * math.log(2))


def test_a_subclass_may_name_its_arguments():
    class Own(SCBCEWithLogitsLoss):
        def __init__(self, label_smoothing):
            super().__init__(alpha=1.0, beta=label_smoothing)

    x, y = torch.randn(3), torch.rand(3)
    assert torch.equal(Own(label_smoothing=0.1)(x, y), sc_bce_with_logits(x, y, 1.0, 0.1))

    class Same(SCBCEWithLogitsLoss):
        pass

    with pytest.raises(TypeError, match=r"Same\(\) has no argument .*`Same.moderation\(0.1\)`"):
        Same(moderation=0.1)


@pytest.mark.parametrize("sampling", ["sample", "element"])
def test_a_refused_batch_draws_nothing(sampling):
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.3, sampling=sampling)
    before = rng_state()
    with pytest.raises(ValueError, match="size of `input`"):
        criterion(torch.zeros(3), torch.ones(2))
    with pytest.raises(TypeError, match="but got list"):
        criterion([1.0], torch.ones(1))
    assert torch.equal(rng_state(), before)


def test_repr_shows_the_numbers():
    assert repr(SCBCEWithLogitsLoss.dynamic_moderation(0.25, ignore_index=255)) == (
        "SCBCEWithLogitsLoss(alpha=0.25, beta=1.0, prior=0.5, sampling='sample', noise=0.25, "
        "ignore_index=255, reduction='mean')"
    )


# --- transforms: draws of any size, where values are not there to be read ----------------------


DRAWN = [
    lambda sampling: SCBCEWithLogitsLoss.hard_inversion(0.4, sampling=sampling),
    lambda sampling: SCBCEWithLogitsLoss.moderation(0.2, prior=0.02, sampling=sampling),
    lambda sampling: SCBCEWithLogitsLoss.dynamic_moderation(0.4, sampling=sampling),
]
drawing = pytest.mark.parametrize("sampling", ["sample", "element"])
kinds = pytest.mark.parametrize("make", DRAWN, ids=["flip", "moderate", "noise"])


@pytest.mark.not_on("xla", "make_fx takes what it draws for constants")
@drawing
@kinds
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_draw(sampling, make, mode):
    criterion = make(sampling)
    x, y = torch.randn(5000, 2), torch.rand(5000, 2)
    traced = make_fx(lambda x, y: criterion(x, y), tracing_mode=mode)(x, y)
    one, two = traced(x, y), traced(x, y)
    assert not torch.equal(one, two)
    want = sc_bce_with_logits(x, y, criterion.alpha, criterion.beta, prior=criterion.prior)
    assert_close(one, want, rtol=0.1, atol=0)


@drawing
@kinds
def test_fake_tensors_can_be_drawn(sampling, make):
    criterion = make(sampling)
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(5000, 2, dtype=torch.bfloat16)).requires_grad_()
        for y in (torch.rand(5000, 2), torch.ones(5000, 2, dtype=torch.int64)):
            loss = criterion(x, y.to(x.dtype) if y.is_floating_point() else y)
            loss.backward()
            assert (loss.shape, loss.dtype) == ((), torch.bfloat16)
            assert x.grad.shape == x.shape
        # A subclass makes its random numbers itself, in float32 too.
        assert truncated_normal(x, 0.25, None).dtype == torch.float32


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@lacks((2, 9), "has no BCE of distributed tensors")
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # torch, of a CPU
@pytest.mark.parametrize("sampling", ["expected", "sample", "element"])
def test_distributed_tensors_can_be_drawn(sampling, mesh):
    x, y = torch.randn(5000, 2), torch.rand(5000, 2)
    criterion = SCBCEWithLogitsLoss(alpha=0.4, sampling=sampling)
    shards = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    loss = criterion(shards, distribute_tensor(y, mesh, [Shard(0)]))
    loss.backward()
    assert isinstance(loss, DTensor)
    want = sc_bce_with_logits(x, y, 0.4)
    assert_close(loss.full_tensor(), want, rtol=1e-6 if sampling == "expected" else 0.1, atol=0)
    towards = shards.grad.full_tensor() * x.numel() - torch.sigmoid(x) + y
    flips = (2 * y - 1 - towards).abs() < 1e-4
    if sampling != "expected":
        assert bool((flips | (towards.abs() < 1e-4)).all())
        assert flips.float().mean() == pytest.approx(0.4, abs=0.05)
        whole = bool((flips[:, 0] == flips[:, 1]).all())
        assert whole == (sampling == "sample")


@drawing
@kinds
def test_export_with_a_dynamic_batch(sampling, make):
    criterion = make(sampling)
    n = torch.export.Dim("n", min=2, max=1 << 20)
    x, y = torch.randn(8, 3), torch.rand(8, 3)
    exported = torch.export.export(criterion, (x, y), dynamic_shapes=({0: n}, {0: n}))
    for size in (2, 8, 5000, 200_000):
        x, y = torch.randn(size, 3), torch.rand(size, 3)
        loss = exported.module()(x, y)
        assert loss.shape == ()
        if size > 4000:
            want = sc_bce_with_logits(x, y, criterion.alpha, criterion.beta, prior=criterion.prior)
            assert_close(loss, want, rtol=0.1, atol=0)


@drawing
def test_compile_does_not_repeat_by_size(sampling):
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.4, sampling=sampling)
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(criterion, fullgraph=True, backend=count, dynamic=True)
    for size in (8, 4095, 4097, 100_000):
        compiled(torch.randn(size, 3), torch.rand(size, 3))
    assert count.frame_count == 1


def test_compile_does_not_repeat_for_batches_seen_without_it():
    criterion = SCBCEWithLogitsLoss(alpha=0.1)
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(criterion, fullgraph=True, backend=count)
    x, y = torch.randn(4, 3), torch.rand(4, 3)
    for _ in range(6):
        compiled(x, y)
        criterion(x, y)
    assert count.frame_count == 1


# --- configuration -----------------------------------------------------------------------------


@pytest.mark.cpu_only("it sets default devices itself")
def test_a_loss_can_be_built_on_any_default_device():
    with torch.device("meta"):
        criterion = SCBCEWithLogitsLoss.moderation(0.2, prior=0.02)
        held = SCBCEWithLogitsLoss(alpha=0.2, prior=torch.full((3,), 0.1))
    assert_close(criterion.flip_rates, (torch.tensor(0.004), torch.tensor(0.196)))
    assert held.prior.is_meta
    assert held.flip_rates[0].is_meta


LOSS = SCBCEWithLogitsLoss
ERRORS = [
    (lambda: LOSS(alpha=1.1), ValueError, r"`alpha` to be in \[0, 1\], but got 1.1"),
    (lambda: LOSS(alpha=math.nan), ValueError, "`alpha` .* but got nan"),
    (lambda: LOSS(beta=-1), ValueError, r"`beta` to be in \[0, 2\], but got -1"),
    (lambda: LOSS(alpha=torch.tensor(0.1)), TypeError, "`alpha` to be a number"),
    (lambda: LOSS(alpha=0.7), ValueError, r"0.7 \* 2.0 > 1"),
    (lambda: LOSS(alpha=0.7, sampling="sample"), ValueError, r"0.7 \* 2.0 > 1"),
    (lambda: LOSS(reduction="avg"), ValueError, "'none', 'mean', 'sum', but got 'avg'"),
    (lambda: LOSS(sampling="batch"), ValueError, "'expected', 'sample', 'element', but got 'bat"),
    (lambda: LOSS(noise=0.1, beta=1.0), ValueError, "has no noise, so drop `noise`"),
    (lambda: LOSS(noise=0.6, beta=1.0, sampling="sample"), ValueError, r"in \[0, 0.5\], but"),
    (lambda: LOSS(noise=0.1, sampling="sample"), ValueError, r"`noise` to be in \[0, 0\]"),
    (lambda: LOSS(noise="much"), TypeError, "`noise` to be a number"),
    (lambda: LOSS(ignore_index=[255]), TypeError, "`ignore_index` to be an int"),
    (lambda: LOSS(generator=3), TypeError, r"`generator` to be .* got 3 \(int\); pass `torch.Gen"),
    (lambda: LOSS.label_smoothing(1.2), ValueError, r"`eps` to be in \[0, 1\], but got 1.2"),
    (lambda: LOSS.disturb_label(-0.1), ValueError, r"`rate` to be in \[0, 1\], but got -0.1"),
    (lambda: LOSS.hard_inversion(0.6), ValueError, r"0.6 \* 2.0 > 1"),
    # What teaches nothing.
    (
        lambda: LOSS.label_smoothing(1.0),
        ValueError,
        r"below 1 / beta, but got alpha \* beta = 1",
    ),
    (lambda: LOSS.hard_inversion(0.5), ValueError, r"= 1, which loses the order of the labels; lo"),
    (lambda: LOSS.disturb_label(1.0), ValueError, r"alpha \* beta = 1, which loses"),
    (lambda: LOSS.moderation(1.0), ValueError, r"alpha \* beta = 1, which loses"),
    (lambda: LOSS(alpha=0.5), ValueError, r"alpha \* beta = 1, which loses"),
    (lambda: LOSS(alpha=1.0, beta=1.0, prior=0.02), ValueError, r"alpha \* beta = 1, which loses"),
    (lambda: LOSS(alpha=1.0, prior=torch.tensor([0.0, 0.5])), ValueError, r"alpha \* beta = 2"),
    # What takes every answer to one side.
    (
        lambda: LOSS.label_smoothing(0.1, pos_weight=torch.tensor(50.0)),
        ValueError,
        r"`alpha` to leave a sure negative on its side of 1/2, but got alpha=1, beta=0.1, "
        r"prior=0.5 and pos_weight=50.0, with which its best answer has odds 2.63 and is called "
        r"positive; lower alpha or pos_weight, or set `prior` to the base rate of the positives",
    ),
    (
        lambda: LOSS.moderation(0.6, prior=0.02),
        ValueError,
        r"`alpha` to leave a sure positive on its side of 1/2, but got alpha=0.6, beta=1.0, "
        r"prior=0.02 and pos_weight=None, with which its best answer has odds 0.701 and is called "
        r"negative",
    ),
    (
        lambda: LOSS(alpha=0.3, prior=torch.tensor([0.3, 0.9]), pos_weight=torch.tensor([1.0, 4])),
        ValueError,
        r"a sure negative .* odds 1.71",
    ),
    (
        lambda: LOSS(alpha=0.3, prior=torch.full((900,), 0.3), pos_weight=torch.full((900,), 9.0)),
        ValueError,
        r"prior of shape \(900,\) and pos_weight of shape \(900,\), with which",
    ),
    (
        lambda: LOSS.hard_inversion(0.1, prior=torch.full((900,), 0.3)),
        ValueError,
        r"is defined by, but got a tensor of shape \(900,\); use moderation",
    ),
    (
        lambda: LOSS(alpha=0.1, prior=torch.full((2,), 0.3), pos_weight=torch.ones(3)),
        ValueError,
        r"`pos_weight` to broadcast with `prior` of shape \(2,\), but got shape \(3,\)$",
    ),
    (lambda: LOSS(prior=torch.linspace(0, 2, 900)), ValueError, r"1\], but got the value 2$"),
    # What other losses call by these names.
    (
        lambda: LOSS(0.1),
        TypeError,
        r"`weight` to be a Tensor or None, but got 0.1 \(float\); for label smoothing write "
        r"`SCBCEWithLogitsLoss.label_smoothing\(0.1\)`",
    ),
    (lambda: LOSS(pos_weight=50.0), TypeError, r"`pos_weight` .* pass `torch.tensor\(50.0\)`"),
    (
        lambda: LOSS(label_smoothing=0.1),
        TypeError,
        r"no argument `label_smoothing`; write `SCBCEWithLogitsLoss.label_smoothing\(0.1\)`",
    ),
    (lambda: LOSS(moderation=0.1), TypeError, r"write `SCBCEWithLogitsLoss.moderation\(0.1\)`"),
    (lambda: LOSS(smoothing=0.1), TypeError, r"unexpected keyword argument 'smoothing'"),
    (lambda: LOSS.soft_inversion(0.7), ValueError, r"0.7 \* 1.5 > 1"),
    (lambda: LOSS.dynamic_moderation(0.1, sampling="expected"), ValueError, "no noise"),
]


@pytest.mark.parametrize(("make", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_bad_configuration_is_refused_at_construction(make, kind, text):
    """What a tensor holds is looked at on a CPU only."""
    values = "the value|sure negative|beta = 2|of shape .* with which|broadcast with"
    refused(kind, text, make, values)


def test_a_prior_follows_the_device_and_no_cast():
    prior = torch.tensor([0.02, 0.3])
    criterion = LOSS.moderation(0.2, prior=prior)
    assert torch.equal(criterion.half().prior, prior)
    assert criterion.to("meta").prior.is_meta
    assert torch.equal(criterion.to_empty(device="cpu").prior, prior)
    assert not criterion.state_dict()
