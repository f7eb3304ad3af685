"""Intervals over images: they cover, and those over pixels do not."""

import math

import pytest
import torch
from torch.testing import assert_close

from sc_bce import CalibrationHistogram, ImageHistograms, Interval
from sc_bce.measure import images as bootstrap

SPREAD = 1.0  # of what all pixels of an image have in common


def images(number, pixels, generator, scale=1.6):
    """Logits of two networks and labels; the pixels of an image err together."""
    shared, common = (SPREAD * torch.randn(number, 1, generator=generator) for _ in range(2))
    z = 1.5 * torch.randn(number, pixels, generator=generator) + shared
    y = torch.rand(number, pixels, generator=generator) < torch.sigmoid(z + common)
    other = 1.2 * z + 0.3 * torch.randn(number, pixels, generator=generator)
    return scale * z, other, y


def made(z, y, **options):
    """Of (N, pixels): each row is an image."""
    histograms = ImageHistograms(**options)
    histograms.update(z[:, None], y[:, None])
    return histograms


def truth(scale):
    """The measures of endless images."""
    one, two = (CalibrationHistogram(num_cells=100) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        z, other, y = images(20_000, 25, generator, scale)
        one.update(z, y)
        two.update(other, y)
    return one, two


def covered(repeats, scale, number=100, pixels=100, resamples=400):
    """How often an interval of 95 % holds the true value, by measure; last, over pixels."""
    names, generator = ("nll", "brier", "ece"), torch.Generator().manual_seed(2)
    exact = [{name: float(getattr(h, name)()) for name in names} for h in truth(scale)]
    hits = {}
    for _ in range(repeats):
        z, other, y = images(number, pixels, generator, scale)
        one, two = made(z, y), made(other, y)
        for name in names:
            interval = one.interval(name, resamples=resamples)
            value = exact[0][name]
            hits.setdefault(name, []).append(interval.low <= value <= interval.high)
            interval = one.interval(name, other=two, resamples=resamples)
            value -= exact[1][name]
            hits.setdefault(f"{name}, paired", []).append(interval.low <= value <= interval.high)
        # Each pixel as if it were an image of its own: the spread of a mean over pixels.
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            z, y.float(), reduction="none"
        ).flatten()
        reach = 1.96 * float(loss.std()) / math.sqrt(len(loss))
        hits.setdefault("nll, pixels", []).append(
            abs(float(loss.mean()) - exact[0]["nll"]) <= reach
        )
    return {name: sum(hit) / repeats for name, hit in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.6, 1.0, 2.5])  # ECE .09, .03 and .15
def test_intervals_cover_on_400_repetitions(scale):
    shares = covered(400, scale)
    print(scale, shares)
    assert shares.pop("nll, pixels") < 0.75
    assert shares.pop("ece, paired") >= 0.92  # its draws are lifted too: it covers more
    assert all(0.92 <= share <= 0.98 for share in shares.values()), shares


def test_intervals_cover_and_those_over_pixels_do_not():
    shares = covered(25, 1.6, number=60, pixels=60, resamples=200)
    assert shares.pop("nll, pixels") < 0.8
    assert all(share >= 0.84 for share in shares.values()), shares


def test_an_interval_of_a_mean_is_the_t_interval_of_the_images():
    z, _, y = images(200, 50, torch.Generator().manual_seed(0))
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        z.double(), y.double(), reduction="none"
    ).mean(1)
    got = made(z, y).interval("nll", resamples=4000)
    error = float(each.std()) / math.sqrt(200)
    assert got.value == pytest.approx(float(each.mean()), rel=1e-6)
    assert got.high - got.low == pytest.approx(2 * 1.96 * error, rel=0.07)
    narrow = made(z, y).interval("nll", level=0.5, resamples=4000)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * error, rel=0.1)


def test_a_paired_difference_is_better_known_than_either():
    z, _, y = images(100, 50, torch.Generator().manual_seed(0))
    one, two = made(z, y), made(z + 0.05, y)
    alone, difference = one.interval(), one.interval(other=two)
    assert difference.value == pytest.approx(alone.value - two.interval().value)
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)
    assert one.interval(other=one) == Interval(0.0, 0.0, 0.0)


def test_an_ece_near_0_has_an_upper_bound_alone():
    generator = torch.Generator().manual_seed(0)
    truth = 1.5 * torch.randn(100, 200, generator=generator)
    y = torch.rand(100, 200, generator=generator) < torch.sigmoid(truth)
    got = made(truth, y).interval("ece")
    assert got.low == 0
    assert 0 < got.value < got.high < 0.03
    assert made(3 * truth, y).interval("ece").low > 0.1


def test_what_is_no_error_keeps_its_lower_end():
    """A value within three standard deviations of 0, of draws that are all above it."""
    z, y = torch.full((20, 20), 3.0), torch.zeros(20, 20)
    y[:, 0], y[0] = 1, 1  # right once in each image, and everywhere in the first
    value, low, high = made(z, y).interval("accuracy")
    assert value == pytest.approx(0.0975)
    assert low == pytest.approx(0.05)
    assert high < 0.3
    for error in ("brier", lambda histogram: histogram.brier()):
        value, low, high = made(z, 1 - y).interval(error)
        assert low == 0 < value < high


def test_probabilities_taken_for_logits_are_said_once():
    images = made(torch.rand(20, 50), torch.rand(20, 50) < 0.5)
    with pytest.warns(UserWarning, match="as if they were probabilities"):
        images.interval("ece", resamples=5)
    for other in (ImageHistograms().merge(images), made(torch.randn(20, 50), torch.ones(20, 50))):
        other.update(torch.rand(2, 1, 50), torch.ones(2, 1, 50), from_logits=False)
        other.histogram().ece()
    with pytest.warns(UserWarning, match="as if they were probabilities"):
        ImageHistograms().merge(images).histogram().ece()


def test_masks_of_any_unsigned_integer():
    z, y = torch.randn(4, 30), torch.rand(4, 30) < 0.5
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        got = made(z, y.to(dtype)).state_dict()
        assert all(torch.equal(got[name], part) for name, part in made(z, y).state_dict().items())


def test_any_measure_in_any_chunks(monkeypatch):
    z, _, y = images(30, 40, torch.Generator().manual_seed(0))
    histograms = made(z, y)

    def measure(histogram):
        return histogram.ece(5, "positive_class")

    whole = histograms.interval(measure, resamples=100)
    assert whole.value == pytest.approx(float(measure(histograms.histogram())))
    monkeypatch.setattr(bootstrap, "TOGETHER", 1000)
    assert histograms.interval(measure, resamples=100) == whole
    assert histograms.interval(measure, resamples=100, seed=1) != whole
    for name in ("slope", "refinement", "accuracy", "adaptive_ece"):
        got = histograms.interval(name, resamples=20)
        assert got.low < got.value < got.high


def test_images_together_are_one_histogram():
    z, _, y = images(10, 30, torch.Generator().manual_seed(0))
    want = CalibrationHistogram(num_cells=100)
    want.update(z, y)
    histograms = ImageHistograms()
    histograms.update(z[:4].view(4, 5, 6), y[:4].view(4, 5, 6))
    histograms.merge(made(z[4:], y[4:]))
    assert len(histograms) == 10
    assert repr(histograms) == "ImageHistograms(num_cells=100, images=10)"
    for name in ("ece", "nll", "brier", "accuracy", "slope"):
        assert_close(getattr(histograms.histogram(), name)(), getattr(want, name)())
    fresh = ImageHistograms()
    fresh.load_state_dict(histograms.state_dict())
    assert fresh.interval(resamples=50) == histograms.interval(resamples=50)
    fresh.load_state_dict(ImageHistograms().state_dict())
    assert len(fresh) == 0


def test_a_batch_without_images_changes_nothing():
    histograms = ImageHistograms()
    histograms.update(torch.empty(0, 1, 4), torch.empty(0, 1, 4))
    assert len(histograms) == 0
    assert histograms.histogram().nll().isnan()
    assert histograms.per_image()["nll"].shape == (0,)


def test_ten_thousand_images_fit():
    state = ImageHistograms().state_dict()
    row = sum(part.element_size() * part[:0].new_empty(part.shape[1:]).numel()
              for part in state.values())  # fmt: skip
    assert 10_000 * row < 46e6


def test_a_slope_that_some_draws_do_not_have_is_nan():
    rare = made(torch.randn(20, 30), torch.zeros(20, 30))
    rare.update(torch.randn(1, 1, 30), torch.ones(1, 1, 30))
    value, low, high = rare.interval("slope", resamples=50)
    assert math.isfinite(value)
    assert math.isnan(low)
    assert math.isnan(high)


def test_void_elements_and_probabilities():
    z, _, y = images(5, 20, torch.Generator().manual_seed(0))
    mask = y.to(torch.uint8)
    mask[:, ::3] = 255
    got, want = ImageHistograms(), ImageHistograms()
    got.update(
        torch.sigmoid(z.double())[:, None], mask[:, None], from_logits=False, ignore_index=255
    )
    keep = torch.arange(20) % 3 != 0
    want.update(z[:, None, keep].double(), y[:, None, keep])
    assert_close(got.histogram().nll(), want.histogram().nll())


ONE = made(torch.randn(3, 4), torch.ones(3, 4))
ERRORS = [
    (lambda: ImageHistograms(num_cells=5), ValueError, "`num_cells` to be even"),
    (lambda: ONE.update(torch.tensor(1.0), torch.tensor(1)), ValueError, "a batch of images"),
    (lambda: ONE.interval("size"), ValueError, "to be one of 'nll', 'brier', .* but got 'size'"),
    (lambda: ONE.interval("update"), ValueError, "one of 'nll', .* but got 'update'"),
    (
        lambda: ONE.interval(lambda h: float(h.nll()), resamples=1),
        TypeError,
        r"return a Tensor of shape \(1,\) .* but got .* \(float\); leave out `float`",
    ),
    (lambda: ONE.interval(lambda h: h.to_dict()["nll"]), TypeError, "a Tensor .* but got list"),
    (lambda: ONE.interval(lambda h: h.measures()), TypeError, "a Tensor .* but got dict"),
    (lambda: ONE.interval(level=1.0), ValueError, r"`level` to be between 0 and 1, but got 1.0"),
    (lambda: ONE.interval(resamples=0), ValueError, "`resamples` to be a positive int"),
    (lambda: ONE.interval(other=3), TypeError, "`other` to be ImageHistograms, but got 3"),
    (lambda: ONE.merge(ImageHistograms(num_cells=10)), ValueError, "num_cells=100, but got num_ce"),
    (
        lambda: ONE.interval(other=made(torch.randn(2, 4), torch.ones(2, 4))),
        ValueError,
        "hold the same 3 images, but got 2 images",
    ),
    (
        lambda: ONE.load_state_dict({"counts": 3}),
        ValueError,
        "have the keys .*older states don't load",
    ),
    (
        lambda: ONE.load_state_dict({**ONE.state_dict(), "doubts": torch.zeros(3)}),
        ValueError,
        r"hold `doubts` of shape \(3, 2, 70\), but got \(3,\); build",
    ),
    (lambda: ImageHistograms().interval(), ValueError, "two images or more, but got 0; update"),
]


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_bad_input_is_refused(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
    assert len(ONE) == 3
