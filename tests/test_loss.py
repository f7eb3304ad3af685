import copy
import math

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, pairs
from torch.testing import assert_close

from sc_bce import SCBCEWithLogitsLoss, sc_bce_with_logits
from sc_bce._batch import bernoulli as draw

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
    want = ref.sc_bce(x.numpy(), y.numpy(), alpha, beta, pos_weight=2.0, reduction="sum")
    assert float(criterion.eval()(x, y)) == pytest.approx(float(want))


def test_named_settings_take_another_sampling():
    assert SCBCEWithLogitsLoss.disturb_label(0.2, sampling="sample").sampling == "sample"
    assert SCBCEWithLogitsLoss.disturb_label(0.2, "sample").sampling == "sample"
    assert SCBCEWithLogitsLoss.hard_inversion(0.2, sampling="element").sampling == "element"
    assert SCBCEWithLogitsLoss.label_smoothing(0.2, sampling="sample").sampling == "sample"


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
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
    expected = criterion.eval()(x, y)
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
        drawn = draw(level, torch.empty(2, count // 2), "element", None)
        assert drawn.dtype == torch.bool
        for row, want in zip(drawn, [alpha, alpha / (1 if level is alpha else 2)], strict=True):
            bound = 5 * math.sqrt(want * (1 - want) * 2 / count)
            assert abs(float(row.double().mean()) - want) <= bound


def test_draws_by_bytes_are_independent_and_repeat_with_the_generator():
    states = [torch.Generator().manual_seed(3) for _ in range(2)]
    one, two = (draw(0.3, torch.empty(1 << 18), "element", state) for state in states)
    assert torch.equal(one, two)
    assert not torch.equal(one, draw(0.3, torch.empty(1 << 18), "element", states[0]))
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
    criterion = SCBCEWithLogitsLoss.dynamic_moderation(1.0, reduction="none")
    x = torch.ones(100_000, 1)
    # The loss is softplus(x) - q x, hence q by subtraction.
    noise = math.log1p(math.e) - criterion(x, torch.zeros_like(x)) - 0.5
    assert noise.abs().max() <= 0.25 + 1e-6
    assert noise.abs().max() > 0.249
    # Moments of the standard normal truncated to +-0.25, by quadrature.
    grid = np.linspace(-0.25, 0.25, 10_001)
    density = np.exp(-(grid**2) / 2)
    variance = (grid**2 * density).sum() / density.sum()
    assert float(noise.var()) == pytest.approx(variance, rel=0.02)
    assert abs(float(noise.mean())) < 5 * math.sqrt(variance / 100_000)


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "label_smoothing"])
def test_eval_and_no_grad_are_the_expectation_and_draw_nothing(name):
    make, argument, alpha, beta, _, _ = SETTINGS[name]
    criterion = make(argument)
    x, y = torch.randn(6, 3), torch.rand(6, 3)
    want = sc_bce_with_logits(x, y, alpha, beta)
    before = torch.get_rng_state()
    with torch.no_grad():
        assert_close(criterion(x, y), want)
    with torch.inference_mode():
        assert_close(criterion(x, y), want)
    assert_close(criterion.eval()(x, y), want)
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_decides_the_draws_and_spares_the_global_one():
    x, y = torch.randn(50, 3), torch.rand(50, 3)
    before = torch.get_rng_state()
    runs = [
        SCBCEWithLogitsLoss.dynamic_moderation(0.5, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    one, two, three = (run(x, y) for run in runs)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(torch.get_rng_state(), before)
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.5)
    torch.manual_seed(5)
    first = criterion(x, y)
    torch.manual_seed(5)
    assert torch.equal(criterion(x, y), first)
    # A copy carries its own generator on.
    twin = copy.deepcopy(runs[0])
    assert torch.equal(twin(x, y), runs[0](x, y))


def test_nothing_is_drawn_at_alpha_zero():
    before = torch.get_rng_state()
    SCBCEWithLogitsLoss(alpha=0.0, sampling="element")(torch.zeros(3), torch.ones(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_small_probabilities_are_drawn_in_float32_whatever_the_input():
    # A bfloat16 uniform has 256 values: 0.001 would be drawn as 0 or 1/256.
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.001, sampling="element", reduction="none")
    x = torch.ones(2_000_000, 1, dtype=torch.bfloat16)
    flipped = (criterion(x, torch.zeros_like(x)) < 1).float().mean()
    assert float(flipped) == pytest.approx(0.001, abs=5 * math.sqrt(0.001 / 2_000_000))


def test_scalars_and_empty_batches_can_be_drawn():
    for sampling in ("sample", "element"):
        criterion = SCBCEWithLogitsLoss.hard_inversion(0.5, sampling=sampling)
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
    assert_close(one, criterion.eval()(x, y), rtol=0.1, atol=0)


def test_compile_with_a_generator_draws_outside_the_graph():
    x, y = torch.randn(50, 3), torch.rand(50, 3)
    make = SCBCEWithLogitsLoss.hard_inversion
    eager = make(0.5, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(
        make(0.5, generator=torch.Generator().manual_seed(1)), backend="aot_eager"
    )
    for _ in range(2):
        assert_close(compiled(x, y), eager(x, y))


def test_numpy_numbers_configure_a_loss_that_compiles():
    criterion = SCBCEWithLogitsLoss(
        alpha=np.float32(0.25), beta=np.float64(1.0), ignore_index=np.int64(255)
    )
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4, 3))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, y), sc_bce_with_logits(x, y, 0.25, 1.0))


@pytest.mark.parametrize("sampling", ["sample", "element"])
def test_a_refused_batch_draws_nothing(sampling):
    criterion = SCBCEWithLogitsLoss.hard_inversion(0.3, sampling=sampling)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="size of `input`"):
        criterion(torch.zeros(3), torch.ones(2))
    with pytest.raises(TypeError, match="but got list"):
        criterion([1.0], torch.ones(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_repr_shows_the_numbers():
    assert repr(SCBCEWithLogitsLoss.dynamic_moderation(0.25, ignore_index=255)) == (
        "SCBCEWithLogitsLoss(alpha=0.25, beta=1.0, sampling='sample', noise=0.25, "
        "ignore_index=255, reduction='mean')"
    )


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
    (lambda: LOSS.soft_inversion(0.7), ValueError, r"0.7 \* 1.5 > 1"),
    (lambda: LOSS.dynamic_moderation(0.1, sampling="expected"), ValueError, "no noise"),
]


@pytest.mark.parametrize(("make", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_bad_configuration_is_refused_at_construction(make, kind, text):
    with pytest.raises(kind, match=text):
        make()
