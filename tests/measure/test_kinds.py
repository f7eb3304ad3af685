"""What people really have: rounded and masked input, weights, soft labels, logits of any size."""

import math
from itertools import pairwise

import numpy as np
import pytest
import reference as ref
import torch
import torchmetrics.functional.classification as peer
from torch.testing import assert_close

from sc_bce import CalibrationHistogram, ImageHistograms
from sc_bce.measure.line import affine


def seen(input, target, *, num_labels=None, **options):
    histogram = CalibrationHistogram(num_labels)
    histogram.update(input, target, **options)
    return histogram


def rounded(p, y, **options):
    return seen(p, y, from_logits=False, **options)


def logistic(n, slope=1.0, spread=1.0, shift=0.0, dtype=torch.float64):
    """Logits, and labels that are positive with logit `slope` times theirs."""
    z = spread * torch.randn(n, dtype=dtype) + shift
    return z, torch.rand(n, dtype=dtype) < torch.sigmoid(slope * z)


def line(histogram):
    (cells,) = histogram.cells()
    return affine(cells)


# --- exact 0 and 1 --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sure", [0.0, 1.0])
def test_one_wrong_answer_of_0_or_1_leaves_the_slope(dtype, sure):
    z, y = logistic(10_000)
    p = torch.sigmoid(z).to(dtype)
    before = float(rounded(p, y).slope())
    p[0], y[0] = sure, not sure
    histogram = rounded(p, y)
    assert float(histogram.slope()) == pytest.approx(before, abs=0.01)
    assert line(histogram)[0] == pytest.approx(before, abs=0.01)
    assert histogram.nll() == math.inf  # as for anyone
    told = histogram.to_dict()
    assert (told["sure"], told["sure_wrong"]) == (1, 1)


@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("map", ["uint8", "uint8 / 255", "two decimals"])
def test_the_temperature_of_rounded_maps(map, spread):
    z, y = logistic(200_000, spread=spread)
    p = torch.sigmoid(3 * z)
    exact = line(rounded(p, y))[0]
    if map == "two decimals":
        got = rounded((100 * p).round() / 100, y)
    else:
        bytes = (255 * p).round()
        got = seen(bytes.to(torch.uint8), y) if map == "uint8" else rounded(bytes / 255, y)
    assert exact == pytest.approx(1 / 3, rel=0.02)
    assert line(got)[0] == pytest.approx(1 / 3, rel=0.05)
    assert float(got.slope()) == line(got)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_under_autocast(dtype):
    z, y = logistic(200_000, slope=0.5, spread=4.0, dtype=torch.float32)
    assert line(rounded(torch.sigmoid(z.to(dtype)), y))[0] == pytest.approx(0.5, rel=0.03)


def test_a_calibrated_8_bit_map_of_rare_positives():
    z, y = logistic(400_000, spread=1.5, shift=-4.5)
    assert 0.02 < float(y.double().mean()) < 0.04
    a, b = line(seen((255 * torch.sigmoid(z)).round().to(torch.uint8), y))
    assert a == pytest.approx(1.0, abs=0.05)
    assert b == pytest.approx(0.0, abs=0.15)


def test_uint8_input_is_an_8_bit_map_whatever_is_said():
    bytes, y = torch.tensor([0, 51, 255], dtype=torch.uint8), torch.tensor([0, 1, 1])
    for options in ({}, {"from_logits": False}):
        histogram = seen(bytes, y, **options)
        assert float(histogram.confidence("positive_class")) == pytest.approx(1.2 / 3)
        assert not histogram.from_logits
    assert float(histogram.nll()) == pytest.approx(-math.log(0.2) / 3)


def test_infinite_logits_stand_for_their_interval_too():
    z, y = logistic(10_000)
    z[0], y[0] = math.inf, False
    histogram = seen(z, y)
    assert float(histogram.slope()) == pytest.approx(1.0, abs=0.05)
    assert histogram.nll() == math.inf


def test_hard_decisions_have_a_slope():
    """Right three times in four: logit 1.1 over the stand-in of a half, 2 log 2."""
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    histogram = rounded(torch.tensor([0.0] * 4 + [1.0] * 4), y)
    assert float(histogram.slope()) == pytest.approx(math.log(3) / (2 * math.log(2)), rel=1e-6)


def test_both_histograms_say_the_same_of_rounded_data():
    z, y = logistic(100_000, spread=3.0)
    p = (100 * torch.sigmoid(z)).round() / 100
    images = ImageHistograms()
    images.update(p.view(100, 1, -1), y.view(100, 1, -1), from_logits=False)
    one, two = float(images.histogram().slope()), float(rounded(p, y).slope())
    assert one == pytest.approx(two, rel=0.01)
    assert two == pytest.approx(1.0, rel=0.03)


def test_a_summary_counts_what_is_sure_and_advises_as_without_it():
    z, y = logistic(20_000, slope=0.5, spread=3.0)
    p = torch.sigmoid(z)
    p[:10], y[:10] = 1.0, True
    p[0], y[0] = 0.0, True
    lines = rounded(p, y).summary().splitlines()
    assert lines[1].split() == ["exactly", "0", "or", "1", "10"]
    assert lines[2].split() == ["of", "these", "wrong", "1"]
    assert lines[-1].startswith("Over-confident (slope below 1)")
    assert "the NLL is infinite: measure logits" in lines[-1]
    assert "bound" not in lines[-1]
    assert "exactly" not in rounded(torch.sigmoid(z), y).summary()


# --- logits of any size and closeness -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4, 1e5])
def test_scores_of_any_scale(scale, dtype):
    u, y = logistic(100_000)
    want = line(seen(u, y))[0]
    histogram = seen((scale * u).to(dtype), y)
    assert float(histogram.slope()) * scale == pytest.approx(want, rel=0.02)
    assert line(histogram)[0] * scale == pytest.approx(want, rel=0.02)
    assert float(histogram.refinement()) == pytest.approx(float(seen(u, y).refinement()), rel=0.01)


@pytest.mark.parametrize(
    ("centre", "spread"), [(-2.3, 1e-3), (5.0, 1e-3), (0.0, 1e-7), (20.0, 0.01)]
)
def test_different_logits_in_one_cell_have_a_slope(centre, spread):
    u, y = logistic(20_000)
    histogram = seen(centre + spread * u, y)
    assert float(histogram.slope()) * spread == pytest.approx(1.0, rel=0.12)


def test_equal_logits_have_none_however_often_they_are_summed():
    y = torch.arange(300_000) % 2
    for value in (0.1, -1.7, 1000.1):
        z = torch.full((300_000,), value, dtype=torch.float64)
        assert seen(z, y).slope().isnan()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_no_part_of_a_decomposition_is_negative(scale):
    z = scale * (3 + 1e-4 * torch.randn(5000, dtype=torch.float64))
    y = z > z.median()
    for score in ("log", "brier"):
        for part in seen(z, y).decomposition(score):
            assert float(part) >= 0


# --- masks, missing labels, weights, fractions ----------------------------------------------------


def same(one, two):
    for name, part in one.state_dict().items():
        assert_close(part, two.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_masks_of_numpy_are_honoured():
    p = np.ma.MaskedArray([0.9, 0.9, 0.9, 0.1], mask=[0, 0, 0, 1])
    y = np.ma.MaskedArray([1, 1, 1, 1], mask=[0, 0, 0, 1])
    histogram = rounded(p, y)
    assert histogram.to_dict()["count"] == 3
    assert float(histogram.nll()) == pytest.approx(-math.log(0.9))
    filled = np.ma.MaskedArray([0.9, 1e20, -9999.0], mask=[0, 1, 1])
    marks = np.ma.MaskedArray([1, 999999, 0], mask=[0, 1, 0])
    same(rounded(filled, marks), rounded(np.array([0.9]), np.array([1])))
    images = ImageHistograms()
    images.update(p.reshape(2, 1, 2), y.reshape(2, 1, 2), from_logits=False)
    assert float(images.histogram().nll()) == pytest.approx(-math.log(0.9))


def test_missing_labels_may_be_nan():
    z = torch.tensor([2.0, math.nan, -1.0])
    y = torch.tensor([1.0, math.nan, 0.0])
    same(seen(z, y, ignore_index=math.nan), seen(z[::2], y[::2]))


def test_weights_equal_repetition_and_scikit_learn():
    from sklearn.metrics import brier_score_loss, log_loss

    z, y = logistic(500)
    times = torch.randint(0, 4, (500,))
    want, got = (
        seen(z.repeat_interleave(times), y.repeat_interleave(times)),
        seen(z, y, weight=times),
    )
    same(got, want)
    assert repr(got) == f"CalibrationHistogram(num_cells=10000, count={int(times.sum())})"
    weight = torch.rand(500).double()
    got, p = seen(z, y, weight=weight.numpy()), torch.sigmoid(z).numpy()
    assert float(got.nll()) == pytest.approx(log_loss(y, p, sample_weight=weight))
    assert float(got.brier()) == pytest.approx(brier_score_loss(y, p, sample_weight=weight))
    nothing = torch.tensor([math.nan, 2.0]), torch.ones(2)
    assert float(seen(*nothing, weight=torch.tensor([0.0, 1.0])).accuracy()) == 1
    images = seen(z.view(5, 100), y.view(5, 100), weight=torch.arange(5)[:, None])
    assert float(images.to_dict()["count"]) == 1000


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_mean_nothing_are_refused(weight):
    with pytest.raises(ValueError, match="`weight` to be 0 or more, and finite, but got the value"):
        seen(torch.zeros(2), torch.ones(2), weight=torch.tensor([1.0, weight]))


def test_soft_labels_count_as_fractions():
    z, soft = torch.randn(400).double(), torch.rand(400).double()
    both = torch.cat((torch.ones(400), torch.zeros(400)))
    want = seen(z.repeat(2), both, weight=torch.cat((soft, 1 - soft)))
    got = seen(z, soft)
    same(got, want)
    assert float(got.nll()) == pytest.approx(float(ref.bce(z.numpy(), soft.numpy()).mean()))
    assert float(got.accuracy("positive_class")) == pytest.approx(float(soft.mean()))
    hard = (soft > 0.5).float()
    assert torch.equal(
        seen(z, hard).state_dict()["counts"], seen(z, hard.bool()).state_dict()["counts"]
    )


def test_counts_of_hard_labels_are_whole_beyond_float32():
    histogram = rounded(torch.full((3,), 0.9).double(), torch.tensor([1, 1, 0]))
    for _ in range(50):
        histogram.merge(histogram)
    assert int(histogram.to_dict()["count"]) == 3 * 2**50
    histogram.merge(rounded(torch.tensor([0.9]).double(), torch.tensor([1])))
    assert int(histogram.to_dict()["count"]) == 3 * 2**50 + 1


# --- bins -----------------------------------------------------------------------------------------


def test_edges_of_ones_own():
    z, y = logistic(5000)
    p, edges = torch.sigmoid(z), [0.0, 0.1, 0.5, 1.0]
    table = seen(z, y).reliability(edges=edges, kind="positive_class")
    for m, (low, high) in enumerate(pairwise(edges)):
        inside = (p >= low) & (p < high)
        assert int(table.count[m]) == int(inside.sum())
        assert float(table.confidence[m]) == pytest.approx(float(p[inside].mean()))
        assert float(table.accuracy[m]) == pytest.approx(float(y[inside].double().mean()))
    upper = seen(z, y).reliability(edges=[0.9, 1.0], kind="positive_class")
    assert int(upper.count) == int((p >= 0.9).sum())
    for wrong in ([0.5], [0.5, 0.2], 3):
        with pytest.raises(ValueError, match="`edges` to be two or more increasing numbers"):
            seen(z, y).reliability(edges=wrong)


@pytest.mark.parametrize("kind", ["top_label", "positive_class"])
def test_bins_of_equal_mass(kind):
    z, y = logistic(5000)
    histogram = seen(z, y)
    table = histogram.reliability(5, kind, equal_mass=True)
    assert (table.count - 1000).abs().max() < 20
    assert (table.edges.diff() > 0).all()
    assert float(table.edges[-1]) == 1
    conf, _ = ref.readings(torch.sigmoid(z).numpy(), y.numpy(), kind)
    assert table.edges[1:-1].tolist() == pytest.approx(
        np.quantile(conf, [0.2, 0.4, 0.6, 0.8]), abs=2e-3
    )
    gap = (table.count * (table.accuracy - table.confidence).abs()).sum() / 5000
    assert float(gap) == pytest.approx(float(histogram.adaptive_ece(5, kind)))


@pytest.mark.parametrize("num_bins", [5, 10])
def test_average_and_l2_error_equal_their_formulas_and_torchmetrics(num_bins):
    z, y = logistic(3000, slope=0.5, spread=3.0)
    histogram, p = seen(z, y), torch.sigmoid(z)
    bins = ref.equal_width(*ref.readings(p.numpy(), y.numpy(), "positive_class"), num_bins)
    want = np.mean([abs(accuracy - confidence) for _, accuracy, confidence in bins])
    assert float(histogram.average_error(num_bins, "positive_class")) == pytest.approx(want)
    l2 = peer.binary_calibration_error(p, y.long(), n_bins=num_bins, norm="l2")
    assert float(histogram.l2_error(num_bins, "positive_class")) == pytest.approx(
        float(l2), abs=2e-6
    )
    few = rounded(torch.tensor([0.95, 0.95, 0.95, 0.65]).double(), torch.ones(4))
    assert float(few.average_error()) == pytest.approx((0.05 + 0.35) / 2)  # empty bins don't count
    assert CalibrationHistogram().average_error().isnan()


# --- what a histogram remembers -------------------------------------------------------------------


def test_a_histogram_remembers_whether_it_saw_logits():
    p, y = torch.rand(20, 2), torch.rand(20, 2) < 0.5
    assert CalibrationHistogram().from_logits
    of_p, of_z = rounded(p, y, num_labels=2), seen(torch.logit(p), y, num_labels=2)
    assert not of_p.from_logits
    assert of_z.from_logits
    for other in (of_p.pooled(), of_p.label(1), of_p + of_p, sum([of_p])):
        assert not other.from_logits
    assert (of_p + of_z).from_logits
    loaded = CalibrationHistogram(2)
    loaded.load_state_dict(of_p.state_dict())
    assert not loaded.from_logits
    assert not (CalibrationHistogram(2) + of_p).from_logits
    loaded.reset()
    assert loaded.from_logits
    assert repr(loaded) == repr(CalibrationHistogram(2))
    with pytest.raises(AttributeError):
        loaded.from_logits = True


def test_states_are_ordinary_tensors_also_in_inference_mode():
    with torch.inference_mode():
        z, y = torch.randn(4, 1, 5), torch.rand(4, 1, 5) < 0.5
        histogram, images, other = seen(z, y), ImageHistograms(), CalibrationHistogram()
        images.update(z, y)
        images.merge(images)
        other.load_state_dict(histogram.state_dict())
        other.merge(histogram)
    for one in (histogram, images, other):
        assert not any(part.is_inference() for part in one.state_dict().values())


def test_exclusive_classes_are_measured_one_by_one():
    logits, y = torch.randn(300, 3, 4).double(), torch.randint(0, 3, (300, 4))
    histogram = CalibrationHistogram(num_labels=3)
    marks = torch.nn.functional.one_hot(y, 3).movedim(-1, 1)
    histogram.update(logits.softmax(1), marks, from_logits=False)
    for c in range(3):
        alone = rounded(logits.softmax(1)[:, c], y == c)
        assert_close(histogram.ece(kind="positive_class")[c], alone.ece(kind="positive_class"))
    with pytest.raises(ValueError, match="`num_labels=3` and `from_logits=False`"):
        histogram.update(logits, y)
    two = torch.randn(5, 2, 4)
    with pytest.raises(ValueError, match=r"pass `input\[:, 1\] - input\[:, 0\]`"):
        CalibrationHistogram().update(two, torch.zeros(5, 4))


# --- probabilities taken for logits ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (torch.rand(60), "if they were probabilities; pass these"),
        (torch.rand(999), "if they were probabilities; pass these"),
        (0.3 + 0.4 * torch.rand(5000), "if they were probabilities; pass these"),
        (torch.cat((torch.rand(5000), torch.tensor([-1e-3]))), "if they were probabilities"),
        (torch.cat((torch.rand(5000), torch.tensor([7.0]))), "if they were probabilities"),
        (torch.log(torch.rand(5000)), "log-probabilities; pass their `exp"),
    ],
    ids=range(6),
)
def test_probabilities_taken_for_logits_are_noticed(values, text):
    p = values.exp() if values.max() <= 0 else values.clamp(0, 1)
    histogram = seen(values, torch.rand(len(p)) < p)
    with pytest.warns(UserWarning, match=text):
        histogram.ece()


def test_right_logits_are_never_warned_about():
    n = 20_000
    for z, rate in (
        (0.1 * torch.randn(n) + 0.3, 0.5),  # untrained networks, of rare labels and others
        (0.1 * torch.randn(n) + 0.3, 0.03),
        (0.1 * torch.randn(n) + 0.5, 0.5),
        (torch.randn(n).abs().clamp(max=0.9) * 0.5 + 0.1, 0.2),
        (torch.randn(n) - 4.6, None),  # calibrated, and nearly never positive
        ((torch.randn(n) - 4.6).clamp(max=-0.01), None),
        (-torch.randn(n).abs(), None),
        (0.1 * torch.rand(n) + 0.1, None),
        (torch.randn(n), None),
    ):
        y = torch.rand(n) < (torch.sigmoid(z) if rate is None else rate)
        seen(z, y).ece()
        for part in range(0, 6000, 60):
            seen(z[part : part + 60], y[part : part + 60]).ece()
    # Calibrated logits that are all in [0, 1], or all below 0 and too low by a half.
    z = 0.4 * torch.rand(n) + 0.3
    seen(z, torch.rand(n) < torch.sigmoid(z)).ece()
    z = torch.randn(n) - 5
    seen(z[z < -1], torch.rand(int((z < -1).sum())) < torch.sigmoid(z[z < -1] + 0.5)).ece()


def test_numbers_in_refusals_are_exact():
    for value, text in ((1 + 2**-52, "1.0000000000000002"), (1.0000000591, "1.0000000591")):
        p = torch.tensor([value], dtype=torch.float64)
        with pytest.raises(ValueError, match=rf"got {text}; .*`input.clamp\(0, 1\)`"):
            rounded(p, torch.tensor([1]))
    with pytest.raises(TypeError, match="at least 16 bits"):
        seen(torch.ones(1).to(torch.float8_e4m3fn), torch.ones(1))
    with pytest.raises(TypeError, match="be dense"):
        seen(torch.ones(1), torch.ones(1).to_sparse())


# --- images ---------------------------------------------------------------------------------------


def test_a_table_with_a_row_for_each_image_and_label():
    z, y = torch.randn(4, 3, 50), torch.rand(4, 3, 50) < 0.4
    together, apart = ImageHistograms(), ImageHistograms(3)
    together.update(z, y)
    apart.update(z, y)
    assert repr(apart) == "ImageHistograms(num_labels=3, num_cells=100, images=4)"
    table, tables = together.per_image(), apart.per_image()
    assert set(table) == set(CalibrationHistogram().to_dict())
    for name in ("nll", "brier", "accuracy", "ece", "slope", "count"):
        assert (table[name].shape, tables[name].shape) == ((4,), (4, 3))
        for i in range(4):
            one = CalibrationHistogram(num_cells=100)
            one.update(z[i], y[i])
            assert float(table[name][i]) == pytest.approx(one.to_dict()[name], rel=1e-9)
            for label in range(3):
                one = CalibrationHistogram(num_cells=100)
                one.update(z[i, label], y[i, label])
                assert float(tables[name][i, label]) == pytest.approx(one.to_dict()[name], rel=1e-9)
    assert ImageHistograms(3).per_image()["nll"].shape == (0, 3)
    assert apart.histogram().nll().shape == (3,)
    assert_close(apart.label(1).histogram().nll(), apart.histogram().nll()[1])
    with pytest.raises(ValueError, match=r"pass `images.label\(i\).interval"):
        apart.interval()
    samples = ImageHistograms(2)
    samples.update(torch.randn(5, 2), torch.ones(5, 2))
    assert len(samples) == 5


@pytest.mark.parametrize("size", [(), (50,), (8, 8)])
def test_an_image_alone_or_flat_pixels_are_not_many_images(size):
    with pytest.raises(ValueError, match=r"batch of images.*pass one image as `input\[None\]`"):
        ImageHistograms().update(torch.randn(size), torch.ones(size))
    images = ImageHistograms()
    images.update(torch.randn(1, 8, 8), torch.ones(1, 8, 8))
    assert len(images) == 1


def test_intervals_between_other_images_are_refused():
    z, y = torch.randn(6, 1, 30), torch.rand(6, 1, 30) < torch.linspace(0.1, 0.9, 6)[:, None, None]
    one, shuffled, cropped = ImageHistograms(), ImageHistograms(), ImageHistograms()
    one.update(z, y)
    shuffled.update(z.flip(0), y.flip(0))
    cropped.update(z[..., 1:], y[..., 1:])
    for other in (shuffled, cropped):
        with pytest.raises(ValueError, match="same images in the same order, but got other labels"):
            one.interval(other=other)
    one.interval(other=one, resamples=10)
