import math
import os
import time
from unittest import mock

import numpy as np
import pytest
import reference as ref
import torch
import torch.distributed as dist
import torchmetrics.functional.classification as peer
from devices import array, random, refused, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import batches, seeds, shapes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from sc_bce import CalibrationHistogram
from sc_bce.measure import counting
from sc_bce.measure import measures as measures_of
from sc_bce.measure import scores as measures

KINDS = ("top_label", "positive_class")
filled = shapes.filter(lambda shape: 0 not in shape)


def measured(p, y, **options):
    histogram = CalibrationHistogram()
    histogram.update(p, y, from_logits=False, **options)
    return histogram


def predictions(seed, n, power=1.0):
    """probabilities that are over-confident by `power`, and outcomes"""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, n)
    return tensor(ref.sigmoid(power * x)), tensor(rng.random(n)) < (tensor(ref.sigmoid(x)))


# --- against NumPy on the raw data ------------------------------------------------------------


@given(batches(filled, soft=False, scale=2.0), st.sampled_from(KINDS), st.sampled_from([1, 5, 10]))
def test_measures_equal_numpy_on_the_raw_data(batch, kind, num_bins):
    histogram = CalibrationHistogram()
    histogram.update(batch.input, batch.target)
    p, y = ref.sigmoid(array(batch.input)), array(batch.target)
    conf, outcome = ref.readings(p, y, kind)
    bins = ref.equal_width(conf, outcome, num_bins)
    for name, want in (("ece", ref.ece), ("oe", ref.oe), ("mce", ref.mce)):
        assert float(getattr(histogram, name)(num_bins, kind)) == pytest.approx(want(bins)), name
    assert float(histogram.debiased_ece(num_bins, kind)) == pytest.approx(
        ref.debiased(bins), abs=1e-7
    )
    assert float(histogram.accuracy(kind)) == pytest.approx(outcome.mean())
    assert float(histogram.confidence(kind)) == pytest.approx(conf.mean())
    assert float(histogram.brier()) == pytest.approx(((p - y) ** 2).mean())
    assert float(histogram.nll()) == pytest.approx(ref.bce(array(batch.input), y).mean())


@given(seeds, st.integers(1, 400), st.sampled_from(KINDS), st.integers(1, 12))
def test_equal_mass_measures_equal_numpy_on_the_raw_data(seed, n, kind, num_bins):
    # One element in every cell at most, so that there are no ties.
    rng = np.random.default_rng(seed)
    conf = 0.5 + (rng.choice(4_000, n, replace=False) + 0.5) / 10_000
    p = np.where(rng.random(n) < 0.5, conf, 1 - conf)
    y = (rng.random(n) < p**2).astype(np.int64)
    histogram = measured(tensor(p), tensor(y))
    conf, outcome = ref.readings(p, y, kind)
    want = ref.ece(ref.equal_mass(conf, outcome, num_bins))
    assert float(histogram.adaptive_ece(num_bins, kind)) == pytest.approx(want)
    assert float(histogram.sweep_ece(kind)) == pytest.approx(ref.sweep(conf, outcome))


def test_equal_mass_bins_take_a_cell_where_its_middle_element_goes():
    # One element, then a tie of three: their middle, the third of four, is in the second bin.
    histogram = measured(torch.tensor([0.6, 0.9, 0.9, 0.9]).double(), torch.tensor([0, 1, 1, 1]))
    assert float(histogram.adaptive_ece(2)) == pytest.approx((0.6 + 0.3) / 4)


@pytest.mark.parametrize("num_bins", [3, 15, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_bins_off_the_grid_stay_within_the_documented_bound(num_bins, kind):
    p, y = predictions(0, 50_000, 1.7)
    histogram = CalibrationHistogram(num_cells=1000)
    histogram.update(p, y, from_logits=False)
    conf, outcome = ref.readings(array(p), array(y), kind)
    want = ref.ece(ref.equal_width(conf, outcome, num_bins))
    edges = np.arange(1, num_bins) / num_bins
    cut = np.isin((conf * 1000).astype(int), (edges * 1000).astype(int)).mean()
    assert abs(float(histogram.ece(num_bins, kind)) - want) <= 2 * cut


def test_reliability_is_the_table_of_the_bins():
    p = torch.tensor([0.05, 0.15, 0.62, 0.97, 1.0])
    y = torch.tensor([0, 1, 1, 1, 0])
    table = measured(p.double(), y).reliability(5)
    assert_close(table.edges, torch.linspace(0, 1, 6, dtype=torch.float64))
    assert table.count.tolist() == [0, 0, 0, 1, 4]
    assert_close(table.confidence[3:], torch.tensor([0.62, (0.95 + 0.85 + 0.97 + 1) / 4]).double())
    assert_close(table.accuracy[3:], torch.tensor([1.0, 0.5]).double())
    assert table.confidence[:3].isnan().all()
    positive = measured(p.double(), y).reliability(2, kind="positive_class")
    assert positive.count.tolist() == [2, 3]
    assert_close(positive.confidence, torch.tensor([0.1, 2.59 / 3]).double())
    assert_close(positive.accuracy, torch.tensor([0.5, 2 / 3]).double())


# --- in the input's own precision -------------------------------------------------------------


@given(
    seeds,
    st.integers(1, 3000),
    st.sampled_from([0.0, 1.0, 4.0, 12.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from([7, 64, 1 << 18]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32]),
)
def test_low_precision_equals_float64(seed, n, scale, dtype, from_logits, block, threads, mask):
    generator = torch.Generator().manual_seed(seed)
    x = (scale * random(torch.randn, generator, n)).to(dtype)
    if not from_logits:
        x = x.sigmoid()
    y = random(torch.rand, generator, n) < 0.4
    want, got = CalibrationHistogram(), CalibrationHistogram()
    want.update(x.double(), y, from_logits=from_logits)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.object(counting, "BLOCK", block):
            got.update(x, y.to(mask), from_logits=from_logits)
    finally:
        torch.set_num_threads(before)
    for name in ("nll", "brier"):
        assert float(getattr(got, name)()) == pytest.approx(
            float(getattr(want, name)()), rel=3e-7, abs=1e-38
        )
    for kind in KINDS:
        assert float(got.accuracy(kind)) == float(want.accuracy(kind))
        assert float(got.confidence(kind)) == pytest.approx(
            float(want.confidence(kind)), rel=3e-7, abs=1e-38
        )
    # Only what lies on an edge may be counted in the cell beside.
    p = x.double().sigmoid() if from_logits else x.double()
    cells = torch.maximum(p, 1 - p) * got.num_cells
    on_edge = (cells - cells.round()).abs() <= 6 * got.num_cells * torch.finfo(torch.float32).eps
    moved = (got.state_dict()["counts"] - want.state_dict()["counts"]).abs().sum()
    assert moved <= 2 * on_edge.sum()


@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0, 85.0])
def test_small_losses_keep_their_digits(margin):
    histogram = CalibrationHistogram()
    histogram.update(torch.tensor([margin, -margin] * 50), torch.tensor([True, False] * 50))
    p = math.exp(-margin) / (1 + math.exp(-margin))
    assert float(histogram.nll()) == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-6)
    assert float(histogram.brier()) == pytest.approx(p**2, rel=1e-6, abs=1e-38)
    wrong = CalibrationHistogram()
    wrong.update(torch.tensor([margin]), torch.tensor([False]))
    assert float(wrong.nll()) == pytest.approx(margin + math.log1p(math.exp(-margin)), rel=1e-7)


def test_either_zero_is_a_positive_prediction():
    for zero in (0.0, -0.0):
        histogram = CalibrationHistogram()
        histogram.update(torch.tensor([zero]), torch.tensor([True]))
        assert float(histogram.accuracy()) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_cells", [100, 10_000, 1_000_000])
def test_logits_of_an_edge_are_on_it(dtype, num_cells):
    for num_bins in (10, 20, 25, 50, 100):
        p = torch.arange(1, num_bins, dtype=torch.float64) / num_bins
        histogram = CalibrationHistogram(num_cells=num_cells)
        # Either side of 1/2; the edge at 1/2 itself tells the classes apart.
        logit = torch.logit(p[p != 0.5]).to(dtype)
        histogram.update(logit, torch.ones(len(logit)))
        want = torch.ones(num_bins, dtype=torch.float64)
        want[(num_bins - 1) // 2 : num_bins // 2 + 1] = 0
        assert torch.equal(histogram.reliability(num_bins, "positive_class").count, want)


# --- against implementations of others --------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_bins", [5, 10, 20])
def test_positive_class_equals_torchmetrics_on_small_inputs(seed, num_bins):
    p, y = predictions(seed, 2000, 1.5)
    histogram = measured(p, y)
    for norm, got in (("l1", histogram.ece), ("max", histogram.mce)):
        # torchmetrics bins float32; in float64 nothing falls between.
        want = peer.binary_calibration_error(p, y.long(), n_bins=num_bins, norm=norm)
        assert float(got(num_bins, "positive_class")) == pytest.approx(float(want), abs=2e-6)


def test_nll_and_brier_equal_scikit_learn():
    from sklearn.metrics import brier_score_loss, log_loss

    p, y = predictions(3, 1000)
    histogram = measured(p, y)
    assert float(histogram.nll()) == pytest.approx(log_loss(array(y), array(p)))
    assert float(histogram.brier()) == pytest.approx(brier_score_loss(array(y), array(p)))


# --- exactness at scale -----------------------------------------------------------------------


@pytest.mark.not_on("xla", "its counts are those of the small tests, after a minute")
def test_forty_million_equal_predictions():
    # Counting in float32 stops at 2^24 a bin and reports 0 here.
    n = 40_000_000
    target = torch.zeros(n, dtype=torch.bool)
    target[: n // 2] = True
    histogram = measured(torch.full((n,), 0.9), target)
    assert float(histogram.ece()) == pytest.approx(0.4, abs=1e-6)
    assert float(histogram.adaptive_ece()) == pytest.approx(0.4, abs=1e-6)
    assert float(histogram.sweep_ece()) == pytest.approx(0.4, abs=1e-6)
    assert float(histogram.mce()) == pytest.approx(0.4, abs=1e-6)
    assert float(histogram.accuracy()) == 0.5
    assert histogram.reliability().count.sum() == n


def test_counts_beyond_two_to_the_fifty_stay_whole():
    histogram = measured(torch.full((1000,), 0.9, dtype=torch.float64), torch.arange(1000) % 2)
    for _ in range(40):
        histogram.merge(histogram)
    total = 1000 * 2**40
    assert int(histogram.reliability().count.sum()) == total
    assert float(histogram.adaptive_ece()) == pytest.approx(0.4)
    assert float(histogram.sweep_ece()) == pytest.approx(0.4)


def test_memory_is_fixed_whatever_was_seen():
    histogram = CalibrationHistogram()
    small = sum(part.nbytes for part in histogram.state_dict().values())
    histogram.update(torch.randn(3_000_000), torch.rand(3_000_000) > 0.5)
    assert sum(part.nbytes for part in histogram.state_dict().values()) == small < 500_000


# --- conventions ------------------------------------------------------------------------------


def test_bins_are_ten_unless_said_otherwise():
    histogram = measured(*predictions(0, 500, 2.0))
    for name in ("ece", "oe", "mce", "adaptive_ece", "debiased_ece"):
        measure = getattr(histogram, name)
        for kind in KINDS:
            assert measure(kind=kind) == measure(10, kind) != measure(9, kind), name
    assert histogram.reliability().count.shape == (10,)


def test_a_cell_that_an_edge_cuts_goes_whole_into_the_bin_of_its_centre():
    # 4/7 = 0.571428... cuts the cell from 0.5714 to 0.5715, and 3/7 that from 0.4285 to 0.4286.
    p = torch.tensor([0.57141, 0.57142, 0.57148], dtype=torch.float64)
    assert measured(p, torch.ones(3)).reliability(7).count.tolist() == [0, 0, 0, 0, 3, 0, 0]
    both = measured(torch.cat((p, 1 - p)), torch.ones(6)).reliability(7, "positive_class")
    assert both.count.tolist() == [0, 0, 3, 0, 3, 0, 0]


def test_cells_of_the_tails_go_into_fine_bins_by_their_probability():
    histogram = CalibrationHistogram()
    histogram.update(torch.tensor([8.0, -8.0]), torch.tensor([1, 0]))
    share = torch.sigmoid(torch.tensor(-8.0)).item()  # 0.000335
    assert int(histogram.reliability(10_000).count[9999 - int(1e4 * share)]) == 2
    count = histogram.reliability(10_000, "positive_class").count
    assert count.nonzero()[:, 0].tolist() == [3, 9996]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_probability_and_its_complement_are_the_same_confidence(dtype):
    for num_bins in (10, 20, 25, 50, 100):
        for k in range(num_bins // 2):
            low = measured(torch.tensor([k / num_bins], dtype=dtype), torch.tensor([0]))
            high = measured(torch.tensor([1 - k / num_bins], dtype=dtype), torch.tensor([1]))
            # On the edge of two bins, and so in the one farther from 1/2.
            bin_of_both = min(num_bins - k, num_bins - 1)
            assert low.reliability(num_bins).count.argmax() == bin_of_both
            assert high.reliability(num_bins).count.argmax() == bin_of_both
            positive = low.reliability(num_bins, "positive_class").count
            assert positive.argmax() == max(k - 1, 0)


def test_one_belongs_to_the_last_bin_and_one_half_is_a_positive_prediction():
    histogram = measured(torch.tensor([1.0, 0.0]), torch.tensor([1, 0]))
    assert histogram.reliability(10).count.tolist() == [0] * 9 + [2]
    assert histogram.reliability(10, "positive_class").count.tolist() == [1, *[0] * 8, 1]
    assert float(measured(torch.tensor([0.5]), torch.tensor([1])).accuracy()) == 1
    assert float(measured(torch.tensor([0.5]), torch.tensor([0])).accuracy()) == 0


def test_infinite_logits_are_certain():
    histogram = CalibrationHistogram()
    histogram.update(torch.tensor([math.inf, -math.inf]), torch.tensor([1, 0]))
    assert float(histogram.nll()) == float(histogram.brier()) == float(histogram.ece()) == 0
    histogram.update(torch.tensor([math.inf]), torch.tensor([0]))
    assert float(histogram.nll()) == math.inf
    assert float(histogram.ece()) == pytest.approx(1 / 3)


def test_logits_and_probabilities_agree():
    x, y = torch.randn(1000).double(), torch.rand(1000) > 0.5
    one = CalibrationHistogram()
    one.update(x, y)
    two = measured(torch.sigmoid(x), y)
    for name in ("ece", "oe", "nll", "brier", "confidence", "accuracy"):
        assert_close(getattr(one, name)(), getattr(two, name)())


def test_overconfidence_counts_gaps_above_accuracy_only():
    under = measured(torch.full((10,), 0.6), torch.ones(10))
    assert float(under.oe()) == 0
    assert float(under.ece()) == pytest.approx(0.4, abs=1e-6)


def test_bins_of_one_element_have_no_bias_to_remove():
    assert float(measured(torch.tensor([0.9]), torch.tensor([0])).debiased_ece()) == 0


def test_measures_of_nothing_are_nan():
    histogram = CalibrationHistogram()
    for name in ("accuracy", "confidence", "ece", "oe", "mce", "adaptive_ece", "sweep_ece",
                 "debiased_ece", "brier", "nll"):  # fmt: skip
        value = getattr(histogram, name)()
        assert (value.dtype, value.shape) == (torch.float64, ())
        assert value.isnan(), name
    histogram.update(torch.empty(0, 3), torch.empty(0, 3))
    assert histogram.ece().isnan()


@pytest.mark.parametrize("sure", [0, 255])
def test_a_block_of_sure_answers_may_have_ignored_elements(sure):
    map, y = torch.full((2000,), sure, dtype=torch.uint8), torch.full((2000,), sure > 0).byte()
    y[:7] = 255
    for input, options in ((map, {}), (map / 255, {"from_logits": False})):
        histogram = CalibrationHistogram()
        histogram.update(input, y, ignore_index=255, **options)
        assert float(histogram.nll()) == 0.0
        histogram.update(input, y, weight=(y != 255).double(), ignore_index=255, **options)
        assert float(histogram.nll()) == 0.0


@pytest.mark.parametrize("mask", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_target_dtypes_and_ignored_elements(mask):
    x = torch.tensor([2.0, math.nan, -1.0, 0.5])
    y = torch.tensor([1, 1, 0, 1])
    keep = torch.tensor([True, False, True, True])
    alone = CalibrationHistogram()
    alone.update(x[keep], y[keep].to(mask))
    if mask is torch.bool:
        return
    with_void = torch.where(keep, y, 255).to(mask)
    histogram = CalibrationHistogram()
    histogram.update(x, with_void, ignore_index=255)
    for name in ("ece", "nll", "brier", "accuracy"):
        assert_close(getattr(histogram, name)(), getattr(alone, name)())
    assert histogram.reliability().count.sum() == 3


def test_updates_leave_no_graph():
    histogram = CalibrationHistogram()
    histogram.update(torch.randn(3, requires_grad=True), torch.ones(3))
    assert not histogram.nll().requires_grad


# --- merging, saving --------------------------------------------------------------------------


@given(seeds, st.integers(1, 5))
def test_any_split_of_the_stream_gives_the_same_histogram(seed, parts):
    rng = np.random.default_rng(seed)
    x = tensor(rng.normal(size=60))
    y = tensor(rng.integers(0, 2, 60))
    whole = CalibrationHistogram()
    whole.update(x, y)
    split = [CalibrationHistogram() for _ in range(parts)]
    for i, (some_x, some_y) in enumerate(zip(x.split(7), y.split(7), strict=True)):
        split[i % parts].update(some_x, some_y)
    total = CalibrationHistogram()
    for part in split:
        total = total + part
    for name in ("ece", "nll", "brier", "confidence", "sweep_ece"):
        assert_close(getattr(total, name)(), getattr(whole, name)(), check_device=False)


def test_plus_makes_a_third_and_merge_returns_itself():
    p, y = predictions(0, 100)
    one, two = measured(p, y), measured(p, y)
    total = one + two
    assert one.reliability().count.sum() == 100
    assert one.merge(two) is one
    assert one.reliability().count.sum() == total.reliability().count.sum() == 200
    assert sum([one, two, two]).reliability().count.sum() == 400
    with pytest.raises(TypeError, match="unsupported operand"):
        one + 1


def test_updates_inside_and_outside_inference_mode_add_up():
    with torch.inference_mode():
        histogram = measured(*predictions(0, 100))
    other = measured(*predictions(1, 100))
    histogram.update(*predictions(2, 100), from_logits=False)
    histogram.merge(other)
    histogram.load_state_dict(histogram.state_dict())
    assert histogram.reliability().count.sum() == 300


def test_state_dict_resumes_exactly(tmp_path):
    p, y = predictions(0, 1000)
    histogram = measured(p, y)
    torch.save(histogram.state_dict(), tmp_path / "histogram.pt")
    fresh = CalibrationHistogram()
    fresh.load_state_dict(torch.load(tmp_path / "histogram.pt", weights_only=True))
    saved = fresh.state_dict()
    for one in (histogram, fresh):
        one.update(torch.tensor([40.0, -3.0]), torch.tensor([1, 1]))
    for name, value in histogram.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
        # A state dict is a copy: later updates don't reach it.
        assert not torch.equal(value, saved[name])


def test_all_reduce_alone_changes_nothing(tmp_path):
    histogram = measured(*predictions(0, 100))
    assert histogram.all_reduce() is histogram
    assert histogram.reliability().count.sum() == 100


def _sum_over_ranks(rank, world, store, out):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    p, y = predictions(rank, 100 * (rank + 1), 2.0)
    histogram = measured(p, y).all_reduce()
    torch.save(histogram.state_dict(), f"{out}/{rank}.pt")
    first = dist.new_group([0])
    if rank > 0:  # outside of it
        with pytest.raises(ValueError, match="group"):
            histogram.all_reduce(first)
    time.sleep(0.3)  # as in test_distributed.py
    dist.destroy_process_group()


@pytest.mark.cpu_only("its processes talk through gloo")
@pytest.mark.parametrize("world", [2, 3])
def test_all_reduce_sums_over_processes(tmp_path, world):
    torch.multiprocessing.spawn(
        _sum_over_ranks, args=(world, tmp_path / "store", tmp_path), nprocs=world
    )
    want = CalibrationHistogram()
    for rank in range(world):
        want.update(*predictions(rank, 100 * (rank + 1), 2.0), from_logits=False)
    for rank in range(world):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in want.state_dict().items():
            assert_close(got[name], value)


# --- errors -----------------------------------------------------------------------------------


def test_a_label_is_counted_from_either_end():
    histogram = CalibrationHistogram(2)
    histogram.update(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]]))
    for index, right in ((0, 1.0), (1, 0.0), (-1, 0.0), (True, 0.0)):
        assert float(histogram.label(index).accuracy()) == right


def update(p, y, **options):
    return lambda: measured(torch.as_tensor(p), torch.as_tensor(y), **options)


ERRORS = [
    (
        lambda: CalibrationHistogram(num_cells=0),
        ValueError,
        "`num_cells` to be a positive int, but got 0",
    ),
    (
        lambda: CalibrationHistogram(num_cells=2.0),
        TypeError,
        "`num_cells` to be a positive int, but got 2.0",
    ),
    (lambda: CalibrationHistogram(num_cells=5), ValueError, "`num_cells` to be even"),
    (update([0.5, 0.5], [1]), ValueError, "size of `input`"),
    (update([1.5], [1]), ValueError, r"probabilities in \[0, 1\], but got 1.5; pass logits with"),
    (update([math.nan], [1]), ValueError, "hold no nan, but got nan; the model has diverged"),
    (update([0.5], [255]), ValueError, "got the value 255; for a 0/255 mask pass `mask > 0`"),
    (update([0.5], [1.5]), ValueError, r"in \[0, 1\], but got the value 1.5"),
    (update([0.5], [math.nan]), ValueError, "`target` to hold no nan, .*`ignore_index=math.nan`"),
    (update([0.5], [7], ignore_index=255), ValueError, "besides ignore_index=255"),
    (
        update([0.5, 0.5], torch.tensor([1, 255], dtype=torch.uint8), ignore_index=-1),
        ValueError,
        "hold only 0 and 1, but got the value 255",
    ),
    (update([math.nan, 0.5], [255, 7], ignore_index=255), ValueError, "got the value 7"),
    (update([0.5, -0.1], [True, False]), ValueError, r"in \[0, 1\], but got -0.1"),
    (
        update([0.5], torch.tensor([1 + 1e-12], dtype=torch.float64)),
        ValueError,
        r"in \[0, 1\], but got the value 1.000000000001",
    ),
    (update([1], [1]), TypeError, "floating-point logits, but got torch.int64"),
    (
        lambda: CalibrationHistogram().update([0.5], torch.ones(1)),
        TypeError,
        "Tensor, but got list",
    ),
    (lambda: CalibrationHistogram().merge(3), TypeError, "CalibrationHistogram, but got 3"),
    (
        lambda: CalibrationHistogram().merge(CalibrationHistogram(num_cells=100)),
        ValueError,
        "num_cells=10000, but got num_cells=100",
    ),
    (lambda: CalibrationHistogram().ece(0), ValueError, "`num_bins` to be a positive int"),
    (lambda: CalibrationHistogram().adaptive_ece("10"), TypeError, "`num_bins` to be a positive"),
    (lambda: CalibrationHistogram().ece(kind="all"), ValueError, "'top_label', 'positive_class'"),
    (lambda: CalibrationHistogram().load_state_dict({}), ValueError, "to have the keys"),
    (
        lambda: CalibrationHistogram().load_state_dict(
            CalibrationHistogram(num_cells=100).state_dict()
        ),
        ValueError,
        r"`counts` of shape \(1, 2, 2, 7794\), but got \(1, 2, 2, 70\); build the histogram with",
    ),
]


def test_a_spoilt_state_is_refused_whole():
    histogram = measured(*predictions(0, 100))
    for name, wrong in (("totals", torch.zeros(())), ("doubts", torch.tensor(3.0)), ("sizes", 3)):
        state = CalibrationHistogram().state_dict() | {name: wrong}
        with pytest.raises(ValueError, match=f"hold `{name}` of shape"):
            histogram.load_state_dict(state)
    assert histogram.reliability().count.sum() == 100


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_bad_input_is_refused(call, kind, text):
    values = r"the value|hold no nan|in \\\[0, 1|only 0 and 1|besides"
    histogram = refused(kind, text, call, values)
    assert histogram is None or histogram.nll().isnan()


@pytest.mark.cpu_only("an accelerator refuses no value: it gives nan")
def test_a_refused_update_changes_nothing():
    histogram = measured(*predictions(0, 10))
    before = histogram.state_dict()
    # The bad label stands behind more than a block of good ones.
    target = torch.zeros(600_000)
    target[-1] = 2
    with pytest.raises(ValueError, match="got the value 2"):
        histogram.update(torch.zeros(600_000), target)
    for name, value in histogram.state_dict().items():
        assert torch.equal(value, before[name])


def test_updates_inside_compile_give_nan_for_what_cannot_be_read():
    histogram = CalibrationHistogram()

    @torch.compile(backend="aot_eager")
    def update(x, y):
        histogram.update(x, y)

    update(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))
    assert float(histogram.accuracy()) == 1
    for x, y in (([2.0, math.nan], [1, 0]), ([2.0, 1.0], [1, 255])):
        histogram = CalibrationHistogram()
        update(torch.tensor(x), torch.tensor(y))
        assert histogram.nll().isnan()
        assert histogram.brier().isnan()
        for kind in KINDS:
            for name in ("accuracy", "confidence", "ece"):
                assert getattr(histogram, name)(kind=kind).isnan(), name


def test_an_update_reads_no_value_off_the_cpu():
    """A meta tensor has no values: any look at one, where an accelerator would wait, raises."""
    for from_logits in (True, False):
        histogram = CalibrationHistogram()
        x = torch.empty(4, 3, device="meta")
        y = torch.empty(4, 3, device="meta", dtype=torch.uint8)
        histogram.update(x, y, from_logits=from_logits, ignore_index=255)
        for value in (histogram.ece(), histogram.accuracy(), histogram.nll(), histogram.oe()):
            assert value.is_meta


def test_repr():
    assert repr(measured(*predictions(0, 5))) == "CalibrationHistogram(num_cells=10000, count=5)"


# --- tails ------------------------------------------------------------------------------------


@given(
    seeds,
    st.sampled_from([1.0, 8.0, 60.0, 300.0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_cells_logit_is_the_mean_of_its_elements(seed, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    z = (scale * random(torch.randn, generator, 500)).to(dtype)
    y = random(torch.rand, generator, 500) < 0.3
    histogram = CalibrationHistogram()
    histogram.update(z, y)
    (cells,) = histogram.cells()
    assert int(cells.count.sum()) == 500
    assert int(cells.positive.sum()) == int(y.sum())
    filled = cells.count > 0
    logit = cells.logit[filled]
    assert (logit.diff() > 0).all()
    assert logit.isfinite().all()
    # One after the other, elements in order fill the cells in order: each lies near its cell.
    order = z.double().sort().values.clamp(-744, 744)
    near = torch.repeat_interleave(logit.clamp(-744, 744), cells.count[filled].long())
    # Below a logit of 7.1 a cell is 1e-4 of probability wide, beyond it 1/20, then 0.4 of logit.
    slope = torch.sigmoid(order) * torch.sigmoid(-order)
    width = torch.where(
        order.abs() < 7.2, 1.1e-4 / slope, torch.where(order.abs() < 50, 0.06, 0.41)
    )
    assert ((near - order).abs() <= width).all()


def test_elements_of_one_cell_have_their_mean_logit():
    histogram = CalibrationHistogram()
    z = torch.tensor([1.2346, -1.2348, -1.2348], dtype=torch.float64)
    histogram.update(z, torch.ones(3))
    (cells,) = histogram.cells()
    filled = cells.count > 0
    assert cells.count[filled].tolist() == [2, 1]
    assert cells.logit[filled].tolist() == pytest.approx([-1.2348, 1.2346], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_saturated_logits_are_told_apart_where_doubts_are_not(dtype):
    """exp(-100) is 0 in float32: the cell comes from the logit itself."""
    histogram = CalibrationHistogram()
    histogram.update(torch.tensor([100.0, 200.0, 400.0, 700.0, 1e30]).to(dtype), torch.ones(5))
    (cells,) = histogram.cells()
    got = cells.logit[cells.count > 0]
    want = torch.tensor([100.0, 200.0, 400.0, 700.0, 1e30], device="cpu").double()
    assert_close(got, want, atol=0, rtol=1e-6)
    assert float(histogram.ece()) == pytest.approx(0, abs=1e-30)


def test_tails_belong_to_the_last_bin_and_keep_half_a_megabyte():
    histogram = measured(
        torch.tensor([1e-9, 1 - 1e-6, 0.99995], dtype=torch.float64), torch.ones(3)
    )
    assert histogram.reliability(1000).count[-1] == 3
    assert histogram.reliability(1000, "positive_class").count[[0, -1]].tolist() == [1, 2]
    assert sum(part.nbytes for part in histogram.state_dict().values()) < 500_000


@pytest.mark.parametrize(("units", "inside"), [(1, True), (2, True), (8, False)])
def test_an_edge_reaches_two_units_down_and_not_far(units, inside):
    """0.9 in float32 less some units: the edge's bin, until too far below it."""
    p = torch.tensor([0.9]) - units * torch.finfo(torch.float32).eps
    assert (int(measured(p, torch.ones(1)).reliability(10).count.argmax()) == 9) is inside


# --- labels apart -----------------------------------------------------------------------------


@settings(max_examples=12)
@given(seeds, st.sampled_from([(7, 3), (2, 3, 4), (2, 3, 2, 5)]), st.booleans())
def test_labels_apart_are_as_many_histograms(seed, size, ignoring):
    generator = torch.Generator().manual_seed(seed)
    z = 3 * random(torch.randn, generator, *size)
    y = (random(torch.rand, generator, *size) < 0.5).long()
    if ignoring:
        y = torch.where(random(torch.rand, generator, *size) < 0.2, 255, y)
    void = 255 if ignoring else None
    together = CalibrationHistogram(3)
    together.update(z, y, ignore_index=void)
    apart = []
    for label in range(3):
        apart.append(CalibrationHistogram())
        apart[-1].update(z[:, label], y[:, label], ignore_index=void)
    for name in ("accuracy", "confidence", "ece", "oe", "mce", "adaptive_ece", "sweep_ece",
                 "debiased_ece", "brier", "nll", "slope", "intercept", "refinement"):  # fmt: skip
        got = getattr(together, name)()
        assert got.shape == (3,)
        want = torch.stack([getattr(one, name)() for one in apart])
        assert_close(got, want, equal_nan=True)
        one = getattr(together.label(1), name)()
        assert_close(one, want[1], equal_nan=True)
    table, tables = together.reliability(5), [one.reliability(5) for one in apart]
    assert_close(table.edges, tables[0].edges)
    for name in ("count", "confidence", "accuracy"):
        want = torch.stack([getattr(one, name) for one in tables])
        assert_close(getattr(table, name), want, equal_nan=True)
    pooled = together.pooled()
    assert pooled.num_labels is None
    for name in ("ece", "nll", "accuracy"):
        assert_close(getattr(pooled, name)(), getattr(sum(apart), name)(), equal_nan=True)


def test_labels_apart_merge_and_load():
    x, y = torch.randn(20, 2), torch.randint(0, 2, (20, 2))
    one = CalibrationHistogram(num_labels=2)
    one.update(x, y)
    assert (one + one).reliability(1).count.tolist() == [[40], [40]]
    other = CalibrationHistogram(num_labels=2)
    other.load_state_dict(one.state_dict())
    assert_close(other.nll(), one.nll().cpu())  # a new histogram is on the CPU, and stays there
    assert repr(one) == "CalibrationHistogram(num_labels=2, num_cells=10000, count=40)"
    assert len(one.cells()) == 2
    with pytest.raises(ValueError, match="num_labels=2, but got num_labels=None; build both"):
        one.merge(CalibrationHistogram())
    with pytest.raises(ValueError, match=r"`counts` of shape \(2, .*but got \(1, "):
        one.load_state_dict(CalibrationHistogram().state_dict())
    with pytest.raises(ValueError, match=r"num_labels=2 labels in dimension 1, but got shape \(4,"):
        one.update(torch.randn(4, 3), torch.ones(4, 3))
    with pytest.raises(IndexError, match=r"`index` to be in \[-2, 1\], but got 2"):
        one.label(2)
    with pytest.raises(ValueError, match="`num_labels` to be a positive int"):
        CalibrationHistogram(0)


# --- state ------------------------------------------------------------------------------------


def test_plus_works_from_either_side_and_changes_nothing():
    one, two = measured(*predictions(0, 10)), measured(*predictions(1, 20))
    total = sum([one, two])
    assert total is not one
    for histogram, count in ((total, 30), (one, 10), (two, 20), (0 + one, 10)):
        assert histogram.reliability(1).count.item() == count
    # What a sum returns is a histogram of its own, also the sum of one.
    sum([one]).merge(two)
    assert one.reliability(1).count.item() == 10
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + one


def test_a_sum_is_on_the_device_of_its_first_part():
    x, y = torch.zeros(3), torch.ones(3)
    near, far = CalibrationHistogram(), CalibrationHistogram()
    near.update(x.cpu(), y.cpu())
    far.update(x.to("meta"), y.to("meta"))
    for total, device in ((far + far, "meta"), (sum([far, near]), "meta"), (near + near, "cpu")):
        assert total.nll().device.type == device


def test_loading_copies():
    """What happens to the caller's tensors afterwards does not reach the histogram."""
    source = measured(*predictions(0, 100))
    state, histogram = source.state_dict(), CalibrationHistogram()
    histogram.load_state_dict(state)
    for part in state.values():
        part.add_(1)
    for name, part in source.state_dict().items():
        assert torch.equal(histogram.state_dict()[name], part)


def test_loading_keeps_device_and_dtype():
    state = measured(*predictions(0, 100)).state_dict()
    narrow = {name: part.to(torch.float32) for name, part in state.items()}
    histogram = CalibrationHistogram()
    histogram.load_state_dict(narrow)
    assert histogram.state_dict()["counts"].dtype == torch.float64
    assert histogram.state_dict()["doubts"].dtype == torch.float64
    elsewhere = CalibrationHistogram()
    elsewhere.update(torch.empty(3, device="meta"), torch.empty(3, device="meta"))
    elsewhere.load_state_dict(state)
    assert all(part.is_meta for part in elsewhere.state_dict().values())


def test_states_of_0_2_are_refused():
    """Its counts were whole numbers in cells of their own."""
    old = {
        "counts": torch.zeros(1, 2, 2, 7592, dtype=torch.int64), "doubts": torch.zeros(1, 2, 7592),
        "squared_error": torch.zeros(1), "log_loss": torch.zeros(1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"have the keys .*; pass what .* older states don't load"):
        CalibrationHistogram().load_state_dict(old)


# --- NumPy ------------------------------------------------------------------------------------


def test_numpy_arrays_are_taken():
    p, y = predictions(0, 100)
    want = measured(p, y)
    frozen = array(y).copy()
    frozen.flags.writeable = False
    x, label = array(p), array(y)
    for some, labels in (
        (x, label),
        (x[::-1], label[::-1]),
        (x.astype(">f8"), frozen),
        (x.reshape(10, 10).T, label.reshape(10, 10).T),
    ):
        got = CalibrationHistogram()
        got.update(some, labels, from_logits=False)
        assert_close(got.ece(), want.ece().cpu())  # as NumPy's arrays, on the CPU
        assert_close(got.nll(), want.nll().cpu())
    one = CalibrationHistogram()
    one.update(np.float64(0.9), np.int64(1), from_logits=False)
    assert float(one.confidence()) == pytest.approx(0.9)
    with pytest.raises(TypeError, match="an array of numbers, but got an array of object"):
        one.update(np.array([None, 1]), np.array([0, 1]))


# --- probabilities for logits -----------------------------------------------------------------


def first_look(histogram):
    """The first measure that looks at the cells: on an accelerator, one that reads them anyway."""
    if torch.get_default_device().type == "cpu":
        return histogram.ece
    histogram.ece()  # a warning here would be an error
    return histogram.slope


def test_probabilities_taken_for_logits_warn_once():
    p, y = torch.rand(2000), torch.rand(2000) > 0.5
    histogram = CalibrationHistogram()
    histogram.update(p, y)
    measure = first_look(histogram)
    with pytest.warns(
        UserWarning, match=r"look as if they were probabilities; pass these with .*from_logits=Fa"
    ) as seen:
        measure()
    assert seen[0].filename == __file__
    assert len(seen) == 1
    histogram.nll()
    histogram.slope()
    with pytest.warns(UserWarning, match="as if they were probabilities"):
        (CalibrationHistogram(2).merge(_two_labels(p, y))).slope()


def _two_labels(p, y):
    made = CalibrationHistogram(2)
    made.update(p.view(-1, 2), y.view(-1, 2))
    return made


def test_what_may_be_logits_does_not_warn():
    y = torch.rand(2000) > 0.5
    for x, options in (
        (torch.rand(2000), {"from_logits": False}),
        (0.1 + torch.rand(2000) * 0.6, {}),  # an untrained network
        (0.3 + 0.05 * torch.randn(2000), {}),
        (0.002 * torch.rand(2000), {}),  # one whose head begins at zero
        (torch.full((2000,), 0.3), {}),
        (torch.rand(49), {}),
        (torch.rand(2000) - 0.01, {}),
        (torch.rand(2000) * 1.1, {}),
    ):
        histogram = CalibrationHistogram()
        histogram.update(x, y[: len(x)], **options)
        histogram.ece()


# --- reports ----------------------------------------------------------------------------------


def test_to_dict_is_every_measure_for_a_log():
    import json

    histogram = measured(*predictions(0, 5000, 2.0))
    told = histogram.to_dict()
    assert told["count"] == 5000
    for name in ("accuracy", "confidence", "ece", "oe", "nll", "brier", "slope", "intercept"):
        assert told[name] == float(getattr(histogram, name)())
    assert told["ece_positive_class"] == float(histogram.ece(kind="positive_class"))
    assert told["nll_refinement"] == float(histogram.refinement())
    assert told["brier_miscalibration"] == float(histogram.decomposition("brier").miscalibration)
    assert json.loads(json.dumps(told)) == told
    assert len(_two_labels(torch.randn(100), torch.rand(100) < 0.5).to_dict()["nll"]) == 2


def test_untrained_networks_do_not_look_like_probabilities():
    """After pooling, the logits of all images are nearly alike: inside [0, 1] for half of these."""
    inside = 0
    for seed in range(40):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2),
            torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(32, 1),
        )  # fmt: skip
        with torch.no_grad():
            logits = model(torch.rand(1000, 3, 16, 16))
        inside += bool((logits >= 0).all() & (logits <= 1).all())
        histogram = CalibrationHistogram()
        histogram.update(logits, torch.rand(1000, 1) > 0.5)
        histogram.ece()
    assert inside > 10


@pytest.mark.parametrize(
    "p",
    [
        torch.sigmoid(torch.randn(5000) - 4),  # of rare positives
        torch.sigmoid(0.5 * torch.randn(5000) - 6),
        torch.sigmoid(torch.randn(5000) + 4),
        0.1 + 0.8 * torch.rand(5000),
    ],
    ids=range(4),
)
def test_probabilities_of_rare_labels_warn_too(p):
    y = torch.rand(5000) < 0.5
    histogram = CalibrationHistogram()
    histogram.update(p, y)
    measure = first_look(histogram)
    with pytest.warns(UserWarning, match="look as if they were probabilities; pass these"):
        measure()


@pytest.mark.parametrize(
    ("scale", "shift", "advice"),
    [
        (1.0, 0.0, "Well calibrated: nothing to repair."),
        (2.0, 0.0, "Over-confident (slope below 1)"),
        (0.5, 0.0, "Not confident enough (slope above 1)"),
        (1.0, 1.0, "The slope is right, the curve is not: repair it; label smoothing would not"),
        (-1.0, 0.0, "The logits rank the labels backwards (slope below 0): check the data first."),
    ],
)
def test_summary_advises(scale, shift, advice):
    truth = 1.5 * torch.randn(50_000)
    y = torch.rand(50_000) < torch.sigmoid(truth)
    histogram = CalibrationHistogram()
    histogram.update(scale * truth + shift, y)
    lines = histogram.summary().splitlines()
    assert lines[-1].startswith(advice)
    told = histogram.to_dict()
    assert lines[0].split() == ["elements", "50000"]
    for line, key in zip(lines[5:7], ("slope", "intercept"), strict=True):
        assert line.split() == [key, f"{told[key]:.4f}"]


@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_summary_does_not_take_luck_for_miscalibration(shift):
    generator = torch.Generator("cpu").manual_seed(0)
    said = []
    for _ in range(20):
        truth = 1.5 * torch.randn(3000, generator=generator, device="cpu") + shift
        y = torch.rand(3000, generator=generator, device="cpu") < torch.sigmoid(truth)
        histogram = CalibrationHistogram()
        histogram.update(truth, y)
        said.append(histogram.summary().splitlines()[-1])
    # Two standard errors leave one in twenty; the slope of rare labels is off by a tenth at times.
    assert sum("a repair does" in line for line in said) <= 2
    assert said.count("Well calibrated: nothing to repair.") >= 15


def test_summary_of_labels_and_of_nothing():
    text = _two_labels(torch.randn(1000), torch.rand(1000) > 0.5).summary()
    assert text.splitlines()[0].split() == ["label", "0", "label", "1"]
    # Labels that differ are advised apart: together these have a slope of about 1.
    truth = torch.randn(50_000, 3)
    y = torch.rand(50_000, 3) < torch.sigmoid(truth)
    apart = CalibrationHistogram(3)
    apart.update(truth * torch.tensor([2.0, 0.5, 2.0]), y)
    assert [line.split(" (")[0] for line in apart.summary().splitlines()[-2:]] == [
        "label 0, 2: Over-confident",
        "label 1: Not confident enough",
    ]
    text = CalibrationHistogram().summary()
    assert text.endswith("measure data with both classes and more than one logit.")


@pytest.mark.parametrize("from_logits", [False, True])
def test_summary_of_a_network_that_is_never_wrong(from_logits):
    y = torch.arange(100) % 2
    p = torch.logit(y.float()) if from_logits else y.float()
    histogram = CalibrationHistogram()
    histogram.update(p, y, from_logits=from_logits)
    assert histogram.nll() == 0
    assert histogram.summary().endswith("up to ties: the slope is infinite. Measure more.")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_masks_of_any_unsigned_integer(dtype):
    z, y = torch.randn(300), torch.randint(0, 2, (300,))
    y[::7] = 255
    got, want = CalibrationHistogram(), CalibrationHistogram()
    got.update(z, y.to(dtype), ignore_index=255)
    want.update(z, y, ignore_index=255)
    assert got.to_dict() == want.to_dict()


@pytest.mark.cpu_only("an accelerator refuses no value: it gives nan")
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_a_void_label_of_an_unsigned_mask_is_named(dtype):
    with pytest.raises(ValueError, match="255"):
        CalibrationHistogram().update(torch.randn(3), torch.tensor([0, 1, 255]).to(dtype))


def test_summary_of_a_sure_mistake():
    z = torch.randn(10_000)
    y = torch.rand(10_000) < torch.sigmoid(z)
    z[0], y[0] = math.inf, False
    histogram = CalibrationHistogram()
    histogram.update(z, y)
    assert histogram.nll() == math.inf
    lines = histogram.summary().splitlines()
    assert lines[1].split() == ["exactly", "0", "or", "1", "1"]
    assert lines[2].split() == ["of", "these", "wrong", "1"]
    assert lines[-1] == (
        "Well calibrated: nothing to repair. A probability of exactly 0 or 1 is wrong, so the NLL "
        "is infinite: measure logits, or probabilities that were not rounded."
    )


def test_a_histogram_without_values_says_so():
    histogram = CalibrationHistogram()
    histogram.update(torch.empty(3, device="meta"), torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="`histogram` to hold values, but got one on device meta"):
        histogram.slope()


@pytest.mark.parametrize("labels", [None, 2])
def test_measures_live_where_the_state_does(labels):
    """Fake tensors on a stand-in device: torch refuses to mix devices as a real one does."""
    with (
        FakeTensorMode(),
        mock.patch.object(measures_of, "lines", return_value=torch.zeros(2, labels or 1).double()),
        mock.patch.object(measures, "cells_of", return_value=(torch.zeros(labels or 1, 2),) * 3),
        mock.patch.object(measures, "isotonic", return_value=measures.Blocks([], [], [])),
    ):
        histogram = CalibrationHistogram(labels)
        x, y = torch.randn(9, 2, device="lazy:0"), torch.rand(9, 2, device="lazy:0") > 0.5
        histogram.update(x, y)
        names = ("accuracy", "ece", "oe", "mce", "adaptive_ece", "debiased_ece", "nll", "brier")
        for name in (*names, "slope", "intercept", "refinement"):
            assert getattr(histogram, name)().device.type == "lazy", name
        for score in ("log", "brier"):
            assert {part.device.type for part in histogram.decomposition(score)} == {"lazy"}


@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("from_logits", [True, False])
def test_void_elements_are_as_if_left_out_whatever_they_hold(target_dtype, from_logits):
    torch.manual_seed(0)
    input = 3 * torch.randn(5000)
    target = (torch.rand(5000) < 0.3).to(target_dtype)
    if not from_logits:
        input = torch.sigmoid(input)
    void = torch.rand(5000) < 0.2
    spoilt, marked = input.clone(), target.clone()
    spoilt[void] = torch.tensor([torch.nan, torch.inf, -torch.inf, 7.0]).repeat(1250)[void]
    marked[void] = 255
    whole, rest = CalibrationHistogram(), CalibrationHistogram()
    whole.update(spoilt, marked, ignore_index=255, from_logits=from_logits)
    rest.update(input[~void], target[~void], from_logits=from_logits)
    for name, part in rest.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], part, rtol=1e-6, atol=1e-6)
    marked[~void] = 3
    call = lambda: whole.update(spoilt, marked, ignore_index=255, from_logits=from_logits)  # noqa: E731
    refused(ValueError, "the value 3", call)


@pytest.mark.slow
@pytest.mark.cpu_only("torchmetrics keeps 400 MB")
def test_many_elements_in_one_bin_beside_torchmetrics():
    """As docs/compare.md says: counts in float32 stop at 2^24."""
    p = torch.full((1 << 25,), 0.9)
    y = torch.arange(1 << 25) % 2 == 0  # right in half of the cases: an error of 0.4
    histogram = CalibrationHistogram()
    histogram.update(p, y, from_logits=False)
    assert float(histogram.ece()) == pytest.approx(0.4, abs=1e-6)
    assert float(peer.binary_calibration_error(p, y, n_bins=10)) == pytest.approx(0.0, abs=1e-3)
