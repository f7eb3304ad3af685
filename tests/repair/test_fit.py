"""What people really have: probabilities, 8-bit maps, few data, weights, masks, inference mode."""

import copy
import math

import numpy as np
import pytest
import reference as ref
import torch
from devices import array
from torch.testing import assert_close

from sc_bce import CalibrationHistogram, IsotonicCalibration, TemperatureScaling

BOTH = pytest.mark.parametrize("build", [TemperatureScaling, IsotonicCalibration])


def network(temperature=2.0, shift=0.0, spread=1.5, n=200_000, seed=0):
    """Logits `temperature` times too large, and labels."""
    generator = torch.Generator().manual_seed(seed)
    truth = spread * torch.randn(n, generator=generator) + shift
    return temperature * truth, torch.rand(n, generator=generator) < torch.sigmoid(truth)


def eight_bits(p):
    return (255 * p).round().to(torch.uint8)


STORED = {
    "uint8": eight_bits,
    "uint8 / 255": lambda p: eight_bits(p) / 255,
    "two decimals": lambda p: (100 * p.double()).round() / 100,
    "float16": torch.Tensor.half,
    "bfloat16": torch.Tensor.bfloat16,
    "float32": lambda p: p,
}


# --- exact 0 and 1 ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("temperature", "shift", "spread"), [(3, 0, 1.5), (2, 0, 2), (1, -4.5, 1.5), (3, -4.5, 1.5)]
)
def test_rounded_probabilities_give_the_right_temperature(bias, stored, temperature, shift, spread):
    z, y = network(temperature, shift, spread)
    p = STORED[stored](torch.sigmoid(z))
    scaling = TemperatureScaling(bias=bias).fit(p, y, from_logits=False)
    within = 0.12 if stored == "two decimals" else 0.1  # their steps are wide
    assert float(scaling.temperature) == pytest.approx(temperature, rel=within)
    assert float(scaling.bias) == pytest.approx(0, abs=0.15)
    histogram = CalibrationHistogram()
    histogram.update(p if p.dtype != torch.uint8 else p / 255, y, from_logits=False)
    other = TemperatureScaling(bias=bias).fit(histogram)
    assert float(other.temperature) == pytest.approx(float(scaling.temperature), rel=0.01)
    assert other.nll[0] == float(histogram.nll())
    # A map of many zeros is repaired, not only the rest of it.
    after = array(scaling(p).double())
    best = ref.bce(array(z).astype(float) / temperature, array(y)).mean()
    assert -np.log(np.where(array(y), after, 1 - after)).mean() < 1.15 * best + 0.003


def test_one_wrong_1_among_many_calibrated_probabilities_is_one():
    z, y = network(1, n=10_000)
    p = torch.sigmoid(z.double())
    p[0], y[0] = 1.0, False
    for bias in (False, True):
        scaling = TemperatureScaling(bias=bias).fit(p, y, from_logits=False)
        assert float(scaling.temperature) == pytest.approx(1, abs=0.05)
        assert scaling.nll[0] == math.inf
        assert scaling.nll[1] < 0.6
    histogram = CalibrationHistogram()
    histogram.update(p, y, from_logits=False)
    fitted = TemperatureScaling().fit(histogram)
    assert fitted.nll[0] == float(histogram.nll()) == math.inf
    assert float(fitted.temperature) == pytest.approx(1, abs=0.05)


def test_sure_probabilities_are_repaired_to_their_share():
    z, y = network(3)
    p = eight_bits(torch.sigmoid(z))
    scaling = TemperatureScaling().fit(p, y)
    for end in (0, 255):
        share = float(y[p == end].double().mean())
        got = float(scaling(torch.tensor([end / 255])))
        assert got == pytest.approx(share, abs=1e-3)
    answers = scaling(torch.linspace(0, 1, 10_001))
    assert (answers.diff() >= 0).all()


def test_probabilities_beyond_the_fitted_ones_follow_the_line_unless_0_and_1_were_among_these():
    z, y = network(2, n=5000)
    p, far = torch.sigmoid(z).double().clamp(0.05, 0.95), torch.tensor([1e-3, 0.999]).double()
    scaling = TemperatureScaling().double().fit(p, y, from_logits=False)
    assert scaling.ends.tolist() == [-math.inf, math.inf]
    want = torch.logit(far) / scaling.temperature
    assert_close(torch.logit(scaling(far)), want, rtol=1e-6, atol=0)
    p[0], y[0] = 1.0, True
    scaling = TemperatureScaling().double().fit(p, y, from_logits=False)
    low, high = scaling.ends.tolist()
    assert low == -math.inf
    assert math.log(39) <= high < math.inf  # 1 stands for [0.975, 1]
    one = torch.tensor([1.0]).double()
    assert_close(torch.logit(scaling(one)), high / scaling.temperature[None], rtol=1e-6, atol=0)


def test_hard_decisions_are_repaired_to_their_shares():
    p = torch.tensor([0.0, 1.0]).repeat_interleave(500)
    y = torch.arange(1000) % 10 != 0
    y[:500] = ~y[:500]
    for build in (TemperatureScaling, lambda: TemperatureScaling(bias=True), IsotonicCalibration):
        repair = build().fit(p, y, from_logits=False)
        assert_close(repair(torch.tensor([0.0, 1.0])), torch.tensor([0.1, 0.9]), atol=2e-3, rtol=0)


# --- a repair remembers what it was fitted to -------------------------------------------------


@BOTH
def test_fitted_to_probabilities_it_takes_and_returns_them(build):
    z, y = network()
    p = torch.sigmoid(z)
    histogram = CalibrationHistogram()
    histogram.update(p, y, from_logits=False)
    of_logits = build().fit(z, y)
    for repair in (build().fit(p, y, from_logits=False), build().fit(histogram)):
        answer = repair(p)
        difference = (answer - torch.sigmoid(of_logits(z))).abs()
        assert difference.mean() < 1e-4
        assert difference.max() < 0.02  # in float32, probabilities near 1 are few
        assert ((answer >= 0) & (answer <= 1)).all()
        assert repair.from_logits.item() is False
        assert "from_logits=False" in repr(repair)
        assert repair(torch.tensor([0.0, 1.0])).isfinite().all()
        with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], but got .*was fitted to"):
            repair(z)
        with torch.inference_mode(), pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
            repair(z.clone())
        fresh = build()
        fresh.load_state_dict(repair.state_dict())
        assert torch.equal(fresh(p), answer)
        for other in (copy.deepcopy(repair), torch.compile(repair, backend="eager")):
            assert torch.equal(other(p), answer)
        program = torch.export.export(repair, (p[:99],)).module()
        assert torch.equal(program(p[:99]), answer[:99])
        # Fitted anew to logits, it takes those again.
        assert torch.equal(repair.fit(z, y)(z), of_logits(z))
        assert "from_logits" not in repr(repair)


@BOTH
@pytest.mark.parametrize("from_logits", [True, False])
def test_transforms_of_torch_take_both(build, from_logits):
    z, y = network(n=3000)
    x = z if from_logits else torch.sigmoid(z)
    repair = build().fit(x, y, from_logits=from_logits)
    want = repair(x)
    assert_close(torch.vmap(repair)(x.view(30, 100)).view(-1), want)
    value, slope = torch.func.jvp(repair, (x,), (torch.ones_like(x),))
    assert_close(value, want)
    with torch.autograd.forward_ad.dual_level():
        many = x.repeat(30)  # more than one block
        dual = torch.autograd.forward_ad.make_dual(many, torch.ones_like(many))
        value, tangent = torch.autograd.forward_ad.unpack_dual(repair(dual))
    assert_close(value, want.repeat(30))
    if build is TemperatureScaling:
        assert_close(tangent, slope.repeat(30))
        few = x[:5].double().requires_grad_()
        assert torch.autograd.gradcheck(repair.double(), few)
        assert torch.autograd.gradgradcheck(repair, few)


@BOTH
def test_not_fitted_is_said_and_saved(build):
    z, y = network(n=1000)
    repair = build()
    assert "not fitted" in repr(repair)
    repair.fit(z, y)
    assert "not fitted" not in repr(repair)
    fresh = build()
    fresh.load_state_dict(repair.state_dict())
    assert "not fitted" not in repr(fresh)
    repair.reset_parameters()
    assert "not fitted" in repr(repair)


@BOTH
def test_8_bit_maps_are_probabilities(build):
    z, y = network()
    p = eight_bits(torch.sigmoid(z))
    repair = build().fit(p, y)
    assert not repair.from_logits
    assert repair(p).dtype == torch.float32
    assert torch.equal(repair(p), repair(p / 255))
    assert torch.equal(repair(p.numpy()), repair(p))
    with pytest.raises(TypeError, match=r"floating-point logits, but got torch\.uint8"):
        build().fit(z, y)(p)


@BOTH
def test_arrays_are_taken_by_forward_too(build):
    z, y = network(n=2000)
    repair = build().fit(z.numpy(), y.numpy())
    assert torch.equal(repair(z.numpy()), repair(z))
    masked = np.ma.masked_array(z.numpy(), np.arange(2000) < 5)
    got = repair(masked)
    assert got.isnan().tolist() == (torch.arange(2000) < 5).tolist()
    assert torch.equal(got[5:], repair(z)[5:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_probabilities_are_finite(dtype):
    z, y = network()
    repair = TemperatureScaling((0.01, 0.02), bias=True).fit(torch.sigmoid(z), y, from_logits=False)
    p = torch.tensor([0.0, 1e-3, 0.3, 1.0, math.nan], dtype=dtype, requires_grad=True)
    answer = repair(p)
    assert answer.dtype == dtype
    (gradient,) = torch.autograd.grad(answer[:4].sum(), p)
    assert gradient.isfinite().all()
    assert gradient[2] > 0


# --- few, separable and reversed data ---------------------------------------------------------


def separable(seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(5000, generator=generator) < 0.5
    z = (y.float() * 2 - 1) * 2 + torch.randn(5000, generator=generator)
    return z, y


@pytest.mark.parametrize("seed", range(2, 8))
def test_few_data_are_fitted_as_by_sklearn(seed):
    calibration = pytest.importorskip("sklearn.calibration")
    z, y = separable(seed)
    ours = TemperatureScaling(bias=True).fit(z[:20], y[:20])
    theirs = calibration._SigmoidCalibration().fit(array(z[:20]).astype(float), array(y[:20]))
    want = theirs.predict(array(z).astype(float))
    np.testing.assert_allclose(array(torch.sigmoid(ours(z.double()))), want, atol=1e-5)
    for scaling in (ours, TemperatureScaling().fit(z[:20], y[:20])):
        assert ref.bce(array(scaling(z[20:].double())), array(y[20:])).mean() < 0.25


def test_the_rule_of_few_data():
    """Platt's targets below 20 of the rarer class, and where a threshold separates the classes."""
    z, y = network(n=60, seed=3)
    order = y.long().argsort(stable=True)
    z, y = z[order], y[order]
    negatives = int((~y).sum())

    def slope(targets, z, y):
        # By bisection of the derivative, which falls in T.
        low, high = 1e-6, 1e6
        for _ in range(200):
            middle = math.sqrt(low * high)
            p = ref.sigmoid(array(z).astype(float) * middle)
            up = (array(z) * (targets - p)).sum() > 0
            low, high = (middle, high) if up else (low, middle)
        return low

    for few in (19, 20):
        some, label = z[negatives - few :], y[negatives - few :]
        n = [few, int(y.sum())]
        targets = array(label).astype(float)
        if few < 20:
            targets = np.where(array(label), (n[1] + 1) / (n[1] + 2), 1 / (n[0] + 2))
        got = float(TemperatureScaling().fit(some, label).temperature)
        assert got == pytest.approx(1 / slope(targets, some, label), rel=1e-4)
    many = torch.linspace(-3, 3, 1000)
    targets = np.where(array(many > 0), 501 / 502, 1 / 502)
    got = float(TemperatureScaling().fit(many, many > 0).temperature)
    assert got == pytest.approx(1 / slope(targets, many, many > 0), rel=1e-4)


def test_what_ends_at_a_limit_is_said_once():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, generator=generator)
    y = torch.rand(500, generator=generator) < torch.sigmoid(-2 * z)
    with pytest.warns(UserWarning, match="upper limit: the logits rank the labels backw") as seen:
        scaling = TemperatureScaling(num_labels=2).fit(
            torch.stack((z, z), 1), torch.stack((y, y), 1)
        )
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert_close(scaling.temperature, 1000 * z.square().mean().sqrt().expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [5000, 30_000])
def test_scores_of_any_scale(scale, bias, n):
    z, y = network(1, n=n)
    z = z.double()
    want = TemperatureScaling(bias=bias).fit(z, y)
    got = TemperatureScaling(bias=bias).fit(z * scale, y)
    assert float(got.temperature) == pytest.approx(scale * float(want.temperature), rel=1e-4)
    assert got.nll[1] == pytest.approx(want.nll[1], rel=1e-6)
    half = (z * scale).half()
    assert got(half[half.isfinite()]).isfinite().all()


def test_float16_answers_are_finite():
    z = torch.tensor([-2e-4, -1e-4, 1e-4, 2e-4])
    scaling = TemperatureScaling().fit(z.repeat(50), torch.tensor([0, 0, 1, 1]).repeat(50))
    answer = scaling(torch.tensor([60000.0, -60000.0]).half())
    assert answer.tolist() == [65504, -65504]


# --- many logits ------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [10_000, 1_000_000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("offset", "scale"), [(0.0, 1.0), (0.0, 1e-4), (0.0, 1e4), (1000.0, 1.0), (-30.0, 1e-3)]
)
def test_no_number_of_elements_makes_a_jump(edge, bias, offset, scale):
    z, y = network(1, n=edge + 1)
    z = z.double() * scale + offset * bias
    one, more = (TemperatureScaling(bias=bias).fit(z[:n], y[:n]) for n in (edge, edge + 1))
    assert float(one.temperature) == pytest.approx(float(more.temperature), rel=1e-3)
    assert float(one.temperature) == pytest.approx(scale, rel=0.06)
    assert one.nll[1] == pytest.approx(more.nll[1], rel=1e-3)


def test_many_logits_are_fitted_as_few_are():
    from sklearn.linear_model import LogisticRegression

    z, y = network(3, n=50_000)
    scaling = TemperatureScaling(bias=True).double().fit(z, y)
    model = LogisticRegression(C=np.inf, tol=1e-12).fit(array(z).astype(float)[:, None], array(y))
    assert 1 / float(scaling.temperature) == pytest.approx(float(model.coef_[0, 0]), rel=1e-6)
    assert float(scaling.bias) == pytest.approx(float(model.intercept_[0]), abs=1e-6)


@BOTH
def test_zeros_of_both_signs_are_one(build):
    repair = build().fit(*network())
    assert torch.equal(repair(torch.tensor([0.0])), repair(torch.tensor([-0.0])))


# --- weights, soft labels, masks --------------------------------------------------------------

KINDS = [
    lambda: TemperatureScaling(bias=True),
    lambda: TemperatureScaling((0.01, 0.02)),
    IsotonicCalibration,
]
EACH = pytest.mark.parametrize("build", KINDS, ids=range(len(KINDS)))


@EACH
@pytest.mark.parametrize("n", [300, 30_000])
def test_weights_count_as_copies(build, n):
    z, y = network(n=n)
    w = torch.arange(n) % 4
    want = build().fit(z.repeat_interleave(w), y.repeat_interleave(w))
    got = build().fit(z, y, weight=w)
    assert_close(got(z), want(z), rtol=1e-4, atol=1e-4)
    assert got.nll == pytest.approx(want.nll, rel=1e-5)
    # The largest is 1 if all are smaller, so that shares of 1 are no few elements.
    small = build().fit(z, y, weight=torch.full((n,), 1e-6))
    assert_close(small(z), build().fit(z, y)(z), rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("n", [400, 30_000])
def test_soft_labels_count_in_fractions(build, n):
    z, _ = network(n=n)
    soft = (torch.sigmoid(z / 2) * 4).round() / 4
    want = build().fit(z.repeat(4), torch.cat([soft > share for share in (0, 0.25, 0.5, 0.75)]))
    got = build().fit(z, soft, weight=torch.full((n,), 4))
    assert_close(got(z), want(z), rtol=1e-4, atol=1e-4)
    assert got.nll == pytest.approx(want.nll, rel=1e-6)


@EACH
def test_masked_arrays_and_missing_labels_are_left_out(build):
    z, y = network(n=3000)
    out = torch.arange(3000) % 3 == 0
    want = build().fit(z[~out], y[~out])
    bad = array(torch.where(out, 5e19, z.double()))
    label = np.where(array(out), 7, array(y).astype(int))
    mask = array(out)
    missing = torch.where(out, torch.nan, y.double())
    for arguments, options in (
        ((np.ma.masked_array(bad, mask), np.ma.masked_array(label, mask)), {}),
        ((np.ma.masked_array(bad, mask), array(y)), {}),
        ((array(z), np.ma.masked_array(label, mask)), {}),
        ((z, missing), {"ignore_index": math.nan}),
        ((z, missing.numpy()), {"ignore_index": math.nan}),
        ((z, y), {"weight": ~out}),
    ):
        got = build().fit(*arguments, **options)
        assert got.nll == pytest.approx(want.nll, rel=1e-6)
        assert_close(got(z), want(z), rtol=1e-4, atol=1e-4)


Z, Y = torch.linspace(-3, 3, 60).view(6, 2, 5), (torch.arange(60) % 7 > 2).view(6, 2, 5)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "options", "kind", "text"),
    [
        ((Z, Y), {"weight": -Y.float()}, ValueError, "`weight` to be 0 or more, and finite, but"),
        ((Z, Y), {"weight": Y * math.inf}, ValueError, "`weight` to be 0 or more, and finite, but"),
        ((Z, Y), {"weight": torch.ones(5)}, ValueError, r"one value per label, .*reshape\(-1, 1"),
        ((Z, Y), {"weight": [1]}, TypeError, "`weight` to be a Tensor, but got list"),
        ((Z, Y.float() * math.nan), {}, ValueError, "hold no nan, but got nan; .*=math.nan"),
        ((Z, Y), {"from_logits": False}, ValueError, r"probabilities in \[0, 1\], .*s=True"),
        ((Z.sigmoid() + 6e-8 + (Z > 2), Y), {"from_logits": False}, ValueError, r"got 1\.\d+;"),
        ((torch.logit((Z > 0).float()), Y), {}, ValueError, "exactly 0 or 1; .*from_logits=False"),
        ((Z, Y), {"ignore_index": 0.5}, ValueError, "`ignore_index` to be an int of 64 bits or No"),
        ((Z.to(torch.float8_e5m2), Y), {}, TypeError, "at least 16 bits, but got torch.float8"),
        ((Z.to_sparse(), Y), {}, TypeError, "be dense, but got torch.sparse_coo"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do_and_change_nothing(build, arguments, options, kind, text):
    repair = build()
    before = copy.deepcopy(repair.state_dict())
    with pytest.raises(kind, match=text):
        repair.fit(*arguments, **options)
    assert_close(repair.state_dict(), before)
    assert "not fitted" in repr(repair)


@BOTH
def test_log_probabilities_and_few_probabilities_taken_for_logits_warn(build):
    z, y = network(n=60)
    with pytest.warns(UserWarning, match="look as if they were probabilities; .*from_logits=False"):
        build().fit(torch.sigmoid(z), y)
    pair = torch.stack((-z, z), 1).log_softmax(1)
    with pytest.warns(UserWarning, match="as if they were log-probabilities; .*`x.:, 1. - x"):
        build().fit(pair, torch.stack((~y, y), 1))


# --- inference mode, loading ------------------------------------------------------------------


@EACH
def test_what_inference_mode_stores_can_be_changed_outside(build):
    z, y = network(n=2000)
    with torch.inference_mode():
        repair = build()
        repair.fit(z.clone(), y.clone())
        want = repair(z)
        fresh = build()
        fresh.load_state_dict(repair.state_dict())
        assigned = build()
        assigned.load_state_dict(
            {k: v.clone() for k, v in repair.state_dict().items()}, assign=True
        )
        repair.reset_parameters()
        repair.fit(z, y)
    for one in (repair, fresh, assigned):
        assert not any(part.is_inference() for part in one.buffers())
        x = z.clone().requires_grad_()
        got = one(x)
        assert torch.equal(got, want)
        if isinstance(one, TemperatureScaling):
            got.sum().backward()
            assert (x.grad >= 0).all()
            assert x.grad.median() > 0.1
        one.load_state_dict(build().state_dict())
        one.fit(z, y)
        assert torch.equal(one(z), want)


@pytest.mark.parametrize(
    "state",
    [
        {"flip_rate": torch.tensor(0.1), "temperature": torch.tensor(1.7)},
        {"flip_rates": torch.zeros(2), "temperature": torch.tensor(1.7), "bias": torch.tensor(0.0),
         "clip": torch.tensor(1e-3)},
        TemperatureScaling(num_labels=2).state_dict(),
    ],
)  # fmt: skip
def test_states_of_other_versions_and_sizes_are_refused_whole(state):
    model = torch.nn.Sequential(TemperatureScaling(0.1))
    before = copy.deepcopy(model.state_dict())
    state = {f"0.{name}": part for name, part in state.items()}
    with pytest.raises(RuntimeError, match="`0` is of another version or num_labels: fit this mod"):
        model.load_state_dict(state)
    assert_close(model.state_dict(), before)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logits", [True, False])
def test_many_elements_in_half_precision_get_the_answers_of_few(build, dtype, logits):
    z, y = network(n=100_000)
    repair = build().fit(*((z, y) if logits else (z.sigmoid(), y)), from_logits=logits)
    x = (z if logits else z.sigmoid()).to(dtype)
    x[:3] = torch.tensor([torch.nan, 0.0, 1.0]).to(dtype)
    few = torch.cat([repair(part) for part in x.split(1000)])
    for many in (x, x.view(100, 1000).t()):
        want = few if many.dim() == 1 else few.view(100, 1000).t()
        got = repair(many)
        assert (got.shape, got.dtype) == (many.shape, dtype)
        assert_close(got, want, rtol=0, atol=0, equal_nan=True)
