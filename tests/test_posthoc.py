import math

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from strategies import seeds
from torch.testing import assert_close

from sc_bce import AdaptivePerturbation, CalibrationHistogram, TemperatureScaling


def overconfident(seed=0, n=4000, temperature=3.0, flip=0.0):
    """logits of a network trained at a flip rate, `temperature` times too large; labels"""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1.5, n)
    y = rng.random(n) < ref.sigmoid(truth)
    if flip == 0:
        return torch.from_numpy(temperature * truth), torch.from_numpy(y)
    answered = (1 - 2 * flip) * ref.sigmoid(temperature * truth) + flip
    z = np.log(answered / (1 - answered))
    return torch.from_numpy(z), torch.from_numpy(y)


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
        scaling(torch.from_numpy(z)).numpy(), without_flip(z, g) / temperature, rtol=1e-6, atol=1e-9
    )


@given(seeds, st.floats(0.3, 6), st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_temperature_minimises_the_likelihood(seed, temperature, g):
    z, y = overconfident(seed, 300, temperature, g)
    rate = y.numpy().mean()
    clip = 0.001 * min(rate, 1 - rate)
    u = z.numpy() if g == 0 else without_flip(z.numpy(), float(np.float32(g)), clip)
    best = minimize_scalar(
        lambda log_t: ref.bce(u / np.exp(log_t), y.numpy()).mean(),
        bounds=(-5, 5), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    got = float(TemperatureScaling(g).fit(z, y).temperature)
    assert got == pytest.approx(math.exp(best.x), rel=1e-4)


@given(seeds)
def test_at_flip_rate_zero_it_is_ordinary_temperature_scaling(seed):
    z = torch.from_numpy(np.random.default_rng(seed).normal(0, 30, 100))
    z = torch.cat((z, torch.tensor([0.0, 1e4, -1e4, math.inf])))
    scaling = TemperatureScaling().double()
    assert torch.equal(scaling(z), z)
    scaling.temperature.fill_(2.5)
    assert_close(scaling(z), z / 2.5, rtol=1e-15, atol=0)


@given(seeds, st.floats(0, 0.49), st.floats(0.01, 100))
def test_the_decision_never_changes(seed, g, temperature):
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(0, 1, 200) * 10.0 ** rng.integers(-12, 4, 200))
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
    criterion = AdaptivePerturbation(3)
    criterion.alpha.copy_(torch.tensor([0.0, 0.1, 0.2]))
    assert float(TemperatureScaling(criterion.flip_rate).flip_rate) == pytest.approx(0.1)


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


def test_separable_and_reversed_data_stay_inside_the_bracket():
    z = torch.tensor([-1.0, 1.0])
    assert 0.001 <= float(TemperatureScaling().fit(z, z > 0).temperature) < 0.01
    assert float(TemperatureScaling().fit(z, z < 0).temperature) == pytest.approx(1000, rel=0.1)


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
    ((Z, Y[:1]), ValueError, "size of `logits`"),
    ((Z, torch.ones(2)), ValueError, "both classes, but got only 1; fit to validation data"),
    ((Z, torch.zeros(2)), ValueError, "both classes, but got only 0"),
    ((Z * math.inf, Y), ValueError, "`logits` to be finite, but got inf or nan"),
    ((Z, Y * 255), ValueError, r"`target` to be in \[0, 1\], but got 255; .*`mask > 0`"),
    ((Z[:0], Y[:0]), ValueError, "an element to fit to, but got none"),
    ((Z.long(), Y), TypeError, "floating-point logits"),
    (([1.0], Y), TypeError, "`logits` to be a Tensor, but got list"),
]


@pytest.mark.parametrize(("arguments", "kind", "text"), FIT, ids=range(len(FIT)))
def test_bad_validation_data_are_refused_and_nothing_changes(arguments, kind, text):
    scaling = TemperatureScaling()
    with pytest.raises(kind, match=text):
        scaling.fit(*arguments)
    assert scaling.temperature == 1


def test_integer_logits_are_refused_rather_than_truncated():
    with pytest.raises(TypeError, match=r"`logits` to hold .* but got torch.int64"):
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


# --- a fitted flip rate -------------------------------------------------------------------------


@pytest.mark.parametrize("g", [0.0, 0.035, 0.1, 0.25])
def test_a_flip_rate_of_none_is_found(g):
    """Logits of a network trained at flip rate g, and twice too sure below it."""
    truth = 2.5 * torch.randn(200_000, dtype=torch.float64)
    target = torch.rand(len(truth)) < torch.sigmoid(truth)
    logits = torch.logit((1 - 2 * g) * torch.sigmoid(2 * truth) + g)
    scaling = TemperatureScaling(None).fit(logits, target)
    assert float(scaling.flip_rate) == pytest.approx(g, abs=0.0101)
    assert float(scaling.temperature) == pytest.approx(2.0, abs=0.2)
    again = TemperatureScaling(float(scaling.flip_rate)).fit(logits, target)
    assert_close(scaling(logits), again(logits), rtol=1e-5, atol=1e-5)


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
