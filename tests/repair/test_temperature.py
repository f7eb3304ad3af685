"""The line and what both repairs share: formulas, fits, states, refusals."""

import copy
import math
import pickle

import numpy as np
import pytest
import reference as ref
import torch
from devices import array, tensor
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from strategies import seeds
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from sc_bce import (
    AdaptivePerturbation,
    CalibrationHistogram,
    IsotonicCalibration,
    TemperatureScaling,
)


def overconfident(seed=0, n=4000, temperature=3.0, flip=0.0):
    """logits of a network trained at a flip rate, `temperature` times too large; labels"""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1.5, n)
    y = rng.random(n) < ref.sigmoid(truth)
    if flip == 0:
        return tensor(temperature * truth), tensor(y)
    answered = (1 - 2 * flip) * ref.sigmoid(temperature * truth) + flip
    z = np.log(answered / (1 - answered))
    return tensor(z), tensor(y)


def without_flip(z, g, clip=0.001):
    p = np.clip((ref.sigmoid(z) - g) / (1 - 2 * g), clip, 1 - clip)
    return np.log(p / (1 - p))


# 1 - 2g loses digits near 1/2; no training goes there: alpha is capped at 0.49 for beta 2.
flips = st.floats(1e-6, 0.45)


@given(seeds, flips, st.floats(0.2, 20))
def test_forward_is_the_formula(seed, g, temperature):
    z = np.random.default_rng(seed).normal(0, 4, 200)
    scaling = TemperatureScaling(g).double()
    scaling.flip_rates.fill_(g)
    scaling.temperature.fill_(temperature)
    np.testing.assert_allclose(
        array(scaling(tensor(z))), without_flip(z, g) / temperature, rtol=1e-6, atol=1e-9
    )


@given(seeds, st.floats(0.3, 6), st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_temperature_minimises_the_likelihood(seed, temperature, g):
    z, y = overconfident(seed, 300, temperature, g)
    rate = array(y).mean()
    clip = 0.001 * min(rate, 1 - rate)
    u = array(z) if g == 0 else without_flip(array(z), float(np.float32(g)), clip)
    best = minimize_scalar(
        lambda log_t: ref.bce(u / np.exp(log_t), array(y)).mean(),
        bounds=(-5, 5), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    got = float(TemperatureScaling(g).fit(z, y).temperature)
    assert got == pytest.approx(math.exp(best.x), rel=1e-4)


@given(seeds)
def test_at_flip_rate_zero_it_is_ordinary_temperature_scaling(seed):
    z = tensor(np.random.default_rng(seed).normal(0, 30, 100))
    z = torch.cat((z, torch.tensor([0.0, 1e4, -1e4, math.inf])))
    scaling = TemperatureScaling().double()
    assert torch.equal(scaling(z), z)
    scaling.temperature.fill_(2.5)
    assert_close(scaling(z), z / 2.5, rtol=1e-15, atol=0)


@given(seeds, st.floats(0, 0.49), st.floats(0.01, 100))
def test_the_decision_never_changes(seed, g, temperature):
    rng = np.random.default_rng(seed)
    z = tensor(rng.normal(0, 1, 200) * 10.0 ** rng.integers(-12, 4, 200))
    for dtype in (torch.float64, torch.float32):
        scaling = TemperatureScaling(g)
        scaling.temperature.fill_(temperature)
        x = torch.cat((z, torch.zeros(1))).to(dtype)
        assert torch.equal(scaling(x) >= 0, x >= 0)


def test_it_undoes_the_flip_and_the_overconfidence():
    z, y = overconfident(1, 200_000, 2.0, 0.1)
    measures = {}
    for name, scaling in (("raw", TemperatureScaling()), ("flip", TemperatureScaling(0.1)),
                          ("ordinary", TemperatureScaling())):  # fmt: skip
        if name != "raw":
            scaling.fit(z[:100_000], y[:100_000])
        measures[name] = CalibrationHistogram()
        measures[name].update(scaling(z[100_000:]), y[100_000:])
    assert float(measures["flip"].ece()) < 0.005
    assert float(measures["flip"].ece()) < 0.3 * float(measures["ordinary"].ece())
    assert float(measures["flip"].nll()) < float(measures["ordinary"].nll())
    assert torch.equal(measures["flip"].accuracy(), measures["raw"].accuracy())


def test_flip_rate_comes_from_the_table():
    criterion = AdaptivePerturbation.published(3)
    criterion.alpha.copy_(torch.tensor([0.0, 0.1, 0.2]))
    assert float(TemperatureScaling(criterion.flip_rates).flip_rates[0]) == pytest.approx(0.1)


def test_large_data_are_looked_at_in_part_and_repeatably():
    z, y = overconfident(2, 1_500_000)
    one, two = (TemperatureScaling().fit(z, y) for _ in range(2))
    assert torch.equal(one.temperature, two.temperature)
    assert float(one.temperature) == pytest.approx(3.0, rel=0.02)


def test_ignored_elements_and_any_shape_and_dtype():
    z, y = overconfident(3, 4000)
    plain = TemperatureScaling().fit(z, y)
    void = torch.arange(5000) % 5 == 0
    holed = torch.full((5000,), math.nan, dtype=torch.float64)
    holed[~void] = z
    mask = torch.full((5000,), 255, dtype=torch.uint8)
    mask[~void] = y.byte()
    again = TemperatureScaling().fit(holed.view(50, 100), mask.view(50, 100), ignore_index=255)
    assert torch.equal(again.temperature, plain.temperature)
    low = TemperatureScaling().fit(z.bfloat16(), y)
    assert float(low.temperature) == pytest.approx(float(plain.temperature), rel=0.01)
    assert low(z.bfloat16()).dtype == torch.bfloat16


def test_a_flip_that_is_loaded_is_removed_and_none_costs_nothing():
    z = torch.linspace(-3, 3, 101)
    fitted = TemperatureScaling((0.05, 0.1))
    fresh = TemperatureScaling()
    assert torch.equal(fresh(z), z)
    none = copy.deepcopy(fresh)
    none.removes_flip = True  # by the long way it is the same
    assert torch.equal(none(z), z)
    parts = dict(fitted.named_buffers())  # not loaded: as DDP broadcasts them
    assert torch.equal(torch.func.functional_call(fresh, parts, (z,)), fitted(z))
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(z), fitted(z))
    assert not torch.equal(fresh(z), z)
    compiled = torch.compile(fresh, backend="eager", fullgraph=True)
    assert_close(compiled(z), fitted(z))


def test_state_dict_and_casting():
    fitted = TemperatureScaling(0.1).fit(*overconfident())
    fresh = TemperatureScaling()
    fresh.load_state_dict(fitted.state_dict())
    z = torch.randn(10)
    assert torch.equal(fresh(z), fitted(z))
    assert repr(fresh).startswith("TemperatureScaling(flip_rate=0.1, temperature=")


def test_compile_and_export_with_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), TemperatureScaling(0.1)).eval()
    model[1].temperature.fill_(1.7)
    x = torch.randn(5, 4)
    with torch.no_grad():
        want = model(x)
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
        assert_close(torch.export.export(model, (x,)).module()(x), want)


Z, Y = torch.tensor([-1.0, 2.0]), torch.tensor([0, 1])


FIT = [
    ((Z, Y[:1]), ValueError, "size of `input`"),
    ((Z, torch.ones(2)), ValueError, "both classes, but got only 1; fit to validation data"),
    ((Z, torch.zeros(2)), ValueError, "both classes, but got only 0"),
    ((Z * math.inf, Y), ValueError, "`input` to hold finite logits, but got an infinite one"),
    ((Z, Y * 255), ValueError, "hold only 0 and 1, but got the value 255; .*`mask > 0`"),
    ((Z[:0], Y[:0]), ValueError, "both classes, but got no element; fit to"),
    ((Z.long(), Y), TypeError, "floating-point logits"),
    (([1.0], Y), TypeError, "`input` to be a Tensor, but got list"),
]


@pytest.mark.parametrize(("arguments", "kind", "text"), FIT, ids=range(len(FIT)))
def test_bad_validation_data_are_refused_and_nothing_changes(arguments, kind, text):
    scaling = TemperatureScaling()
    with pytest.raises(kind, match=text):
        scaling.fit(*arguments)
    assert scaling.temperature == 1


def test_integer_logits_are_refused_rather_than_truncated():
    with pytest.raises(TypeError, match=r"`input` to hold .* but got torch.int64"):
        TemperatureScaling(0.25)(torch.tensor([1, 2]))


@pytest.mark.parametrize("g", [0.001, 0.1, 0.49, 0.4999, 0.49999])
def test_what_is_calibrated_is_never_beyond_the_clip(g):
    z = torch.linspace(-30, 30, 1001)
    assert TemperatureScaling(g)(z).abs().max() <= math.log(999) + 1e-5


def test_logits_that_say_nothing_leave_the_temperature():
    scaling = TemperatureScaling().fit(torch.zeros(4), torch.tensor([0, 1, 1, 1]))
    assert scaling.temperature == 1


@pytest.mark.parametrize("rate", [-0.1, 0.5, math.nan])
def test_bad_flip_rates_are_refused(rate):
    with pytest.raises(ValueError, match="`flip_rate`"):
        TemperatureScaling(rate)
    with pytest.raises(TypeError, match="`flip_rate`"):
        TemperatureScaling(torch.tensor([rate]))


@pytest.mark.parametrize("g", [0.0, 0.035, 0.1, 0.25])
def test_a_flip_rate_of_none_is_found(g):
    """Logits of a network trained at flip rate g, and twice too sure below it."""
    truth = 2.5 * torch.randn(200_000, dtype=torch.float64)
    target = torch.rand(len(truth)) < torch.sigmoid(truth)
    logits = torch.logit((1 - 2 * g) * torch.sigmoid(2 * truth) + g)
    scaling = TemperatureScaling(None).fit(logits, target)
    assert scaling.flip_rates.tolist() == pytest.approx([g, g], abs=0.0101)
    assert float(scaling.temperature) == pytest.approx(2.0, abs=0.2)
    again = TemperatureScaling(tuple(scaling.flip_rates)).fit(logits, target)
    assert_close(scaling(logits), again(logits), rtol=1e-3, atol=1e-3)


def test_a_pair_of_flip_rates_is_found():
    truth = 2.5 * torch.randn(200_000, dtype=torch.float64) - 1
    target = torch.rand(len(truth)) < torch.sigmoid(truth)
    logits = torch.logit(0.8 * torch.sigmoid(1.5 * truth) + 0.02)
    histogram = CalibrationHistogram()
    histogram.update(logits, target)
    scaling = TemperatureScaling(None, bias=True).fit(histogram)
    assert scaling.flip_rates.tolist() == pytest.approx([0.02, 0.18], abs=0.01)
    assert float(scaling.temperature) == pytest.approx(1.5, abs=0.1)
    assert float(scaling.bias) == pytest.approx(0, abs=0.1)
    assert repr(scaling).startswith("TemperatureScaling(flip_rate=(0.0")


def test_a_fitted_flip_rate_has_no_higher_loss_than_any_given_one():
    logits = 4 * torch.randn(5000)
    target = torch.rand(5000) < 0.1 + 0.8 * torch.sigmoid(logits / 2)

    def loss(rate):
        z = TemperatureScaling(rate).fit(logits, target)(logits)
        return float(torch.nn.functional.binary_cross_entropy_with_logits(z, target.float()))

    fitted = loss(None)
    assert all(fitted <= loss(rate) + 1e-6 for rate in (0.0, 0.02, 0.06, 0.1, 0.2, 0.3))


def test_before_the_fit_a_flip_rate_of_none_removes_nothing_and_its_state_is_saved():
    scaling = TemperatureScaling(None)
    z = torch.linspace(-4, 4, 9)
    assert torch.equal(scaling(z), z)
    target = torch.rand(4000) < 0.85
    scaling.fit(torch.where(target, 2.0, -2.0) * torch.where(torch.rand(4000) < 0.9, 1, -1), target)
    other = TemperatureScaling(None)
    other.load_state_dict(scaling.state_dict())
    assert torch.equal(other(z), scaling(z))
    before = scaling.state_dict()
    with pytest.raises(ValueError, match="both classes"):
        scaling.fit(torch.ones(3), torch.ones(3))
    assert_close(scaling.state_dict(), before)


@pytest.mark.parametrize("rate", [0.0, 0.1, (0.02, 0.2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nan_stays_nan_and_infinite_logits_stay_certain(rate, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.5], dtype=dtype)
    for repair in (TemperatureScaling(rate), IsotonicCalibration()):
        got = repair(x)
        assert got.dtype == dtype
        assert got.isnan().tolist() == [True, False, False, False]
        assert got[1] > got[3] > got[2]


def test_half_precision_is_computed_in_float32():
    z, y = overconfident(0, 4000)
    x = (3 * torch.randn(500)).half()
    for repair in (
        TemperatureScaling(0.1, bias=True).fit(z, y), IsotonicCalibration().fit(z, y)
    ):  # fmt: skip
        assert torch.equal(repair(x), repair(x.float()).half())
        # A module in half precision still answers float32 inputs in float32.
        wide = repair.half()(x.float())
        assert wide.dtype == torch.float32
        if isinstance(repair, TemperatureScaling):  # a table's values are what they are
            assert not torch.equal(wide, wide.half().float())


def test_labels_apart_keep_the_dtype_and_precision_of_the_input():
    """A (C,) temperature in float64 would lift float32 logits to float64, a 0-d one would not."""
    scaling = TemperatureScaling(num_labels=2).double()
    scaling.temperature.copy_(torch.tensor([1 / 3, 3.0], dtype=torch.float64))
    x = torch.randn(50, 2)
    want = x / torch.tensor([1 / 3, 3.0], dtype=torch.float64).float()
    assert torch.equal(scaling(x), want)


@pytest.mark.cpu_only("it goes from the meta device to the CPU")
def test_meta_device_then_reset():
    fitted = TemperatureScaling((0.05, 0.1), bias=True).fit(*overconfident())
    for build in (lambda: TemperatureScaling((0.05, 0.1), bias=True), IsotonicCalibration):
        with torch.device("meta"):
            made = build()
        assert all(part.is_meta for part in made.state_dict().values())
        assert repr(made)
        made = made.to_empty(device="cpu")
        for part in made.buffers():
            part.fill_(777)
        made.reset_parameters()
        for name, part in build().state_dict().items():
            assert torch.equal(made.state_dict()[name], part), name
    made = TemperatureScaling((0.05, 0.1)).to_empty(device="cpu")
    made.load_state_dict(fitted.state_dict())
    z = torch.randn(9)
    assert torch.equal(made(z), fitted(z))


@given(seeds, st.floats(1e-4, 0.6), st.floats(1e-4, 0.3), st.floats(1e-5, 0.01))
def test_a_pair_is_removed_by_the_formula(seed, up, down, clip):
    z = np.random.default_rng(seed).normal(0, 4, 200)
    scaling = TemperatureScaling((0.1, 0.1)).double()
    scaling.flip_rates.copy_(torch.tensor([up, down]))
    scaling.clip.fill_(clip)
    up, down, clip = (float(np.float32(part)) for part in (up, down, clip))
    scaling.flip_rates.copy_(torch.tensor([up, down]))
    scaling.clip.fill_(clip)
    p = np.clip((ref.sigmoid(z) - up) / (1 - up - down), clip, 1 - clip)
    # Near the clip a rounding of the probability is much of the logit.
    slack = 1e-14 / np.minimum(p, 1 - p)
    got = array(scaling(tensor(z)))
    assert (np.abs(got - np.log(p / (1 - p))) <= 1e-9 + slack).all()
    narrow = array(scaling(tensor(z).float()))
    assert (np.abs(narrow - np.log(p / (1 - p))) <= 1e-4 + 1e-6 / np.minimum(p, 1 - p)).all()


def test_a_side_without_a_flip_is_not_clipped():
    z = torch.tensor([-50.0, 50.0], dtype=torch.float64)
    low, high = TemperatureScaling((0.0, 0.1))(z).tolist()
    assert low == pytest.approx(-50 - math.log(0.9), rel=1e-6)
    assert high == pytest.approx(math.log(999), rel=1e-6)
    low, high = TemperatureScaling((0.1, 0.0))(z).tolist()
    assert low == pytest.approx(-math.log(999), rel=1e-6)
    assert high == pytest.approx(50 + math.log(0.9), rel=1e-6)


def test_the_clip_of_a_rare_label_lies_below_its_base_rate():
    truth = torch.randn(200_000, dtype=torch.float64) * 2 - 8
    y = torch.rand(200_000) < torch.sigmoid(truth)
    z = torch.logit(0.8 * torch.sigmoid(truth) + 0.1)
    scaling = TemperatureScaling(0.1).fit(z, y)
    rate = float(y.double().mean())
    assert float(scaling.clip) == pytest.approx(1e-3 * rate)
    assert float(torch.sigmoid(scaling(z)).mean()) == pytest.approx(rate, rel=0.2)


def test_a_bias_brings_the_mean_to_the_base_rate():
    from sklearn.linear_model import LogisticRegression

    z, y = overconfident(5, 20_000)
    z = z + 2
    scaling = TemperatureScaling(bias=True).double().fit(z, y)
    model = LogisticRegression(C=np.inf, tol=1e-10).fit(array(z).reshape(-1, 1), array(y))
    assert 1 / float(scaling.temperature) == pytest.approx(float(model.coef_[0, 0]), rel=1e-4)
    assert float(scaling.bias) == pytest.approx(float(model.intercept_[0]), rel=1e-3)
    assert float(torch.sigmoid(scaling(z)).mean()) == pytest.approx(
        float(y.double().mean()), rel=1e-6
    )
    assert "bias=" in repr(scaling)


@pytest.mark.parametrize("size", [(400, 3), (50, 3, 4), (40, 3, 5, 2)])
def test_labels_apart_are_as_many_repairs(size):
    truth = torch.randn(size)
    y = torch.rand(size) < torch.sigmoid(truth)
    z = truth * torch.tensor([1.0, 2.0, 4.0]).view(1, 3, *(1 for _ in size[2:]))
    together = CalibrationHistogram(3)
    together.update(z, y)
    for build in (
        lambda **labels: TemperatureScaling(bias=True, **labels),
        lambda **labels: TemperatureScaling((0.01, 0.02), **labels),
        lambda **labels: IsotonicCalibration(**labels),
    ):
        for data in ((together,), (z, y)):
            repair = build(num_labels=3).fit(*data)
            got = repair(z)
            for label in range(3):
                apart = (together.label(label),) if len(data) == 1 else (z[:, label], y[:, label])
                alone = build().fit(*apart)
                assert_close(got[:, label], alone(z[:, label]), rtol=1e-5, atol=1e-5)
        fresh = build(num_labels=3)
        fresh.load_state_dict(repair.state_dict())
        assert torch.equal(fresh(z), got)
        with pytest.raises(ValueError, match="num_labels=3 labels in dimension 1"):
            repair(torch.randn(4, 2))
    pair = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([0.1, 0.2, 0.3])
    assert_close(TemperatureScaling(pair, num_labels=3).flip_rates, torch.stack(pair))


@pytest.mark.parametrize("scale", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_histogram_is_enough(scale, dtype):
    from sklearn.isotonic import IsotonicRegression

    z, y = overconfident(6, 100_000, temperature=1.5)
    z = (scale * z).to(dtype)
    histogram = CalibrationHistogram()
    histogram.update(z, y)
    raw = TemperatureScaling(bias=True).fit(z, y)
    cells = TemperatureScaling(bias=True).fit(histogram)
    assert float(cells.temperature) == pytest.approx(float(raw.temperature), rel=0.01)
    label = array(y)
    for ours, want in (
        (cells(z.double()), ref.bce(array(raw(z.double())), label).mean()),
        (
            IsotonicCalibration().fit(histogram)(z.double()),
            ref.log_score(
                IsotonicRegression().fit(array(z.double()), label).predict(array(z.double())), label
            ),
        ),
    ):
        assert ref.bce(array(ours), label).mean() == pytest.approx(want, rel=1e-3)


def test_the_line_on_a_small_set_is_exact_and_on_a_large_one_gathered():
    z, y = overconfident(2, 1_200_000)
    whole = TemperatureScaling(bias=True).fit(z, y)
    histogram = CalibrationHistogram()
    histogram.update(z, y)
    cells = TemperatureScaling(bias=True).fit(histogram)
    assert float(whole.temperature) == pytest.approx(float(cells.temperature), rel=2e-3)
    from scipy.optimize import minimize

    best = minimize(
        lambda t: ref.bce(array(z)[::10] * t[0] + t[1], array(y)[::10]).mean(), [0.3, 0.0]
    )
    some = TemperatureScaling(bias=True).fit(z[::10], y[::10])
    assert 1 / float(some.temperature) == pytest.approx(best.x[0], rel=1e-4)


def test_lines_equal_probcal():
    probcal = pytest.importorskip("probcal")
    z, y = overconfident(8, 50_000)
    z = z + 0.5
    p = array(torch.sigmoid(z))
    for ours, theirs in (
        (TemperatureScaling(bias=True), probcal.PlattCalibrator()),
        (TemperatureScaling(), probcal.TemperatureCalibrator()),
    ):
        want = theirs.fit(p, array(y).astype(int)).predict_proba(p)
        np.testing.assert_allclose(array(torch.sigmoid(ours.fit(z, y)(z))), want, atol=1e-4)


def test_numpy_arrays_fit():
    z, y = overconfident(0, 2000)
    for build in (TemperatureScaling, IsotonicCalibration):
        one, two = build().fit(z, y), build().fit(array(z), array(y))
        assert torch.equal(one(z), two(z))


def test_fits_tell_what_they_gained_and_warn_of_what_they_lost():
    z, y = overconfident(0, 4000)
    scaling = TemperatureScaling()
    assert scaling.nll is None
    scaling.fit(z, y)
    before, after = scaling.nll
    assert before == pytest.approx(ref.bce(array(z), array(y)).mean())
    assert after == pytest.approx(ref.bce(array(scaling(z)), array(y)).mean(), rel=1e-6)
    assert repr(scaling).endswith(f"nll={before:.4f} -> {after:.4f})")
    with pytest.warns(
        UserWarning, match=r"raises the NLL of the data .* \(see `nll`\): is its flip rate"
    ) as seen:
        TemperatureScaling(0.4).fit(z / 3, y)
    assert seen[0].filename == __file__
    scaling.reset_parameters()
    assert scaling.nll is None
    with pytest.warns(UserWarning, match="too few for a curve; take TemperatureScaling"):
        IsotonicCalibration().fit(20 * z.sign(), z > 0)


@pytest.mark.cpu_only("it plays the accelerator itself")
@pytest.mark.parametrize("labels", [None, 2])
def test_on_an_accelerator_repairs_answer_there(labels):
    """Fake tensors on a stand-in device: torch refuses to mix devices as a real one does."""
    with FakeTensorMode():
        for repair in (
            TemperatureScaling((0.1, 0.2), num_labels=labels), IsotonicCalibration(labels)
        ):  # fmt: skip
            repair = repair.to("lazy")
            assert repair(torch.randn(5, 2, device="lazy")).device.type == "lazy"


REPAIRS = [
    lambda: TemperatureScaling(0.1, bias=True),
    lambda: TemperatureScaling((0.05, 0.1), num_labels=3),
    lambda: IsotonicCalibration(),
    lambda: IsotonicCalibration(num_labels=3),
]


@pytest.mark.parametrize("build", REPAIRS, ids=range(len(REPAIRS)))
def test_compile_and_export_of_each_repair(build):
    repair = build()
    truth = torch.randn(500, 3)
    repair.fit(2 * truth, torch.rand(500, 3) < torch.sigmoid(truth))
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), repair).eval()
    x = torch.randn(5, 4)
    with torch.no_grad():
        want = model(x)
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
        batch = torch.export.Dim("batch")
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        more = torch.randn(9, 4)
        assert_close(exported(more), model(more))


@pytest.mark.parametrize("build", REPAIRS, ids=range(len(REPAIRS)))
def test_copies_and_checkpoints_of_a_whole_model_answer_the_same(build, tmp_path):
    def whole(repair):
        return torch.nn.Sequential(torch.nn.Linear(4, 3), repair)

    truth = torch.randn(500, 3)
    model = whole(build().fit(2 * truth, torch.rand(500, 3) < torch.sigmoid(truth)))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    fresh = whole(build())
    fresh.load_state_dict(state, strict=True)
    with torch.device("meta"):
        assigned = whole(build())
    assigned.load_state_dict(state, strict=True, assign=True)
    x = torch.randn(5, 4)
    for other in (fresh, assigned, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", REPAIRS, ids=range(len(REPAIRS)))
def test_onnxruntime_answers_the_same(build, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    repair = build()
    truth = torch.randn(500, 3)
    repair.fit(2 * truth, torch.rand(500, 3) < torch.sigmoid(truth))
    x = torch.cat((4 * torch.randn(20, 3), torch.tensor([[math.nan, math.inf, -math.inf]])))
    torch.onnx.export(repair, (x,), str(tmp_path / "repair.onnx"), dynamo=False, input_names=["x"])
    session = runtime.InferenceSession(tmp_path / "repair.onnx")
    got = tensor(session.run(None, {"x": array(x)})[0])
    assert_close(got, repair(x), rtol=1e-5, atol=1e-5, equal_nan=True)


def filled(z, y, **options):
    histogram = CalibrationHistogram(**options)
    histogram.update(torch.as_tensor(z), torch.as_tensor(y))
    return histogram


def spoilt():
    """What an illegal element leaves on an accelerator, where nothing waits to refuse it."""
    histogram = filled(Z, Y)
    state = histogram.state_dict()
    histogram.load_state_dict({name: part * math.nan for name, part in state.items()})
    return histogram


BAD = [
    ((CalibrationHistogram(),), ValueError, "`histogram` to hold both classes, but got no element"),
    ((filled(Z, [1, 1]),), ValueError, "`histogram` to hold both classes, but got only 1"),
    ((spoilt(),), ValueError, "`histogram` to hold both classes, but got nan; .* accelerator"),
    ((CalibrationHistogram(2),), ValueError, "=None and num_cells=10000, but got num_labels=2 and"),
    ((filled(Z, Y), Y), TypeError, "`target` to be None, like `weight`, beside a Cal"),
    ((Z,), TypeError, "`target` to be a Tensor, but got None"),
    (([Z],), TypeError, "`input` to be a Tensor, but got list"),
    ((Z, Y.float() * 0.5 + 300), ValueError, r"`target` to be in \[0, 1\], but got the value 300"),
    ((Z * math.nan, Y), ValueError, "`input` to hold no nan, but got nan; the model has"),
]


@pytest.mark.parametrize("build", [TemperatureScaling, IsotonicCalibration])
@pytest.mark.parametrize(("arguments", "kind", "text"), BAD, ids=range(len(BAD)))
def test_bad_data_of_either_repair_are_refused(build, arguments, kind, text):
    repair = build()
    before = {name: part.clone() for name, part in repair.state_dict().items()}
    with pytest.raises(kind, match=text):
        repair.fit(*arguments)
    for name, part in repair.state_dict().items():
        assert torch.equal(part, before[name])


def test_a_label_of_one_class_is_named():
    z, y = torch.randn(50, 3), torch.rand(50, 3) < torch.tensor([0.5, 0.0, 0.5])
    for data in ((filled(z, y, num_labels=3),), (z, y)):
        for build in (TemperatureScaling, IsotonicCalibration):
            with pytest.raises(ValueError, match="both classes of label 1, but got only 0; fit to"):
                build(num_labels=3).fit(*data)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        ((0.5, 0.5), r"sum to less than 1, .* but got \(0.5, 0.5\); it is `criterion.flip_rates`"),
        ((0.1, 0.1, 0.1), r"a number or a pair \(g0, g1\), but got 3 values"),
        ((0.1, -0.1), r"`flip_rate` to be in \[0, 1\], but got -0.1"),
        (0.5, "be below 1/2, so that labels carry information, but got 0.5"),
    ],
)
def test_bad_pairs_are_refused(rate, text):
    with pytest.raises(ValueError, match=text):
        TemperatureScaling(rate)


@pytest.mark.parametrize("build", [TemperatureScaling, IsotonicCalibration])
def test_a_bad_number_of_labels_is_refused(build):
    with pytest.raises(ValueError, match="`num_labels` to be a positive int, but got 0"):
        build(num_labels=0)
    with pytest.raises(TypeError, match=r"`num_labels` to be a positive int, but got 2\.0"):
        build(num_labels=2.0)


def test_a_bias_is_shown_where_one_is_fitted_or_held():
    assert "bias" not in repr(TemperatureScaling())
    assert "bias=0" in repr(TemperatureScaling(bias=True))
    held = TemperatureScaling(num_labels=2)
    held.bias[1] = 0.5
    assert "bias=[0, 0.5]" in repr(held)


def test_the_gradient_at_0_is_that_beside_it():
    z = torch.zeros(3, requires_grad=True)
    TemperatureScaling()(z).sum().backward()
    assert z.grad.tolist() == [1, 1, 1]
    fitted = TemperatureScaling((0.1, 0.2))
    for near in (0.0, 1e-4):
        z = torch.tensor([near], requires_grad=True)
        (grad,) = torch.autograd.grad(fitted(z).sum(), z)
        assert float(grad) == pytest.approx(0.25 / 0.7 / (0.4 / 0.7 * 0.3 / 0.7), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("build", [TemperatureScaling, IsotonicCalibration])
def test_masks_of_any_unsigned_integer(build, dtype):
    z = torch.randn(300)
    y = (torch.rand(300) < torch.sigmoid(z)).long()
    assert build().fit(z, y.to(dtype)).nll == build().fit(z, y).nll


@pytest.mark.parametrize("num_labels", [None, 3])
def test_a_stacked_pair_is_told_to_be_a_tuple(num_labels):
    with pytest.raises(TypeError, match=r"shape \(2,\); pass .* a pair as a tuple \(g0, g1\)"):
        TemperatureScaling(torch.tensor([0.1, 0.2]), num_labels=num_labels)


def test_logits_that_are_all_alike_have_a_documented_answer():
    z, y = torch.full((8,), 0.7), torch.tensor([0, 1, 1, 1, 1, 1, 0, 1])
    # Of 0.1 in float64 the mean of three is not quite 0.1; a flip once removed rounds likewise.
    wide, three = torch.full((3,), 0.1).double().fill_(0.1), torch.tensor([0, 1, 1])
    for scaling in (TemperatureScaling(bias=True), TemperatureScaling(0.1, bias=True)):
        scaling.fit(wide, three)
        assert scaling.temperature == 1
        assert float(scaling(wide)[0]) == pytest.approx(math.log(2), rel=1e-4)
    for data in ((z, y), (filled(z, y),)):
        scaling = TemperatureScaling(bias=True).fit(*data)
        assert scaling.temperature == 1
        assert float(scaling(z)[0]) == pytest.approx(math.log(3), rel=1e-4)
        assert float(IsotonicCalibration().fit(*data)(z)[0]) == pytest.approx(
            math.log(6.5 / 2.5), rel=1e-4
        )


@pytest.mark.cpu_only("an accelerator would wait for a look at the values")
def test_probabilities_taken_for_logits_warn():
    p = torch.rand(3000)
    y = torch.rand(3000) < p
    for build in (TemperatureScaling, IsotonicCalibration):
        with pytest.warns(UserWarning, match="look as if they were probabilities") as seen:
            build().fit(p, y)
        assert len(seen) == 1
        assert seen[0].filename == __file__
        with pytest.warns(UserWarning, match="look as if they were probabilities"):
            build().fit(filled(p, y))
