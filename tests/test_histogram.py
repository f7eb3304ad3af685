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
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, seeds, shapes
from torch.testing import assert_close

from sc_bce import CalibrationHistogram, _tally

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
    return torch.from_numpy(ref.sigmoid(power * x)), torch.from_numpy(rng.random(n)) < (
        torch.from_numpy(ref.sigmoid(x))
    )


# --- against NumPy on the raw data ------------------------------------------------------------


@given(batches(filled, soft=False, scale=2.0), st.sampled_from(KINDS), st.sampled_from([1, 5, 10]))
def test_measures_equal_numpy_on_the_raw_data(batch, kind, num_bins):
    histogram = CalibrationHistogram()
    histogram.update(batch.input, batch.target)
    p, y = ref.sigmoid(batch.input.numpy()), batch.target.numpy()
    conf, outcome = ref.readings(p, y, kind)
    bins = ref.equal_width(conf, outcome, num_bins)
    for name, want in (("ece", ref.ece), ("oe", ref.oe), ("mce", ref.mce)):
        assert float(getattr(histogram, name)(num_bins, kind)) == pytest.approx(want(bins)), name
    assert float(histogram.debiased_ece(num_bins, kind)) == pytest.approx(
        ref.debiased(bins), abs=1e-7
    )
    assert float(histogram.accuracy(kind)) == pytest.approx(outcome.mean())
    assert float(histogram.confidence(kind)) == pytest.approx(conf.mean())
    assert float(histogram.brier(kind)) == pytest.approx(((p - y) ** 2).mean())
    assert float(histogram.nll(kind)) == pytest.approx(ref.bce(batch.input.numpy(), y).mean())


@given(seeds, st.integers(1, 400), st.sampled_from(KINDS), st.integers(1, 12))
def test_equal_mass_measures_equal_numpy_on_the_raw_data(seed, n, kind, num_bins):
    # One element in every cell at most, so that there are no ties.
    rng = np.random.default_rng(seed)
    conf = 0.5 + (rng.choice(4_000, n, replace=False) + 0.5) / 10_000
    p = np.where(rng.random(n) < 0.5, conf, 1 - conf)
    y = (rng.random(n) < p**2).astype(np.int64)
    histogram = measured(torch.from_numpy(p), torch.from_numpy(y))
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
    conf, outcome = ref.readings(p.numpy(), y.numpy(), kind)
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
    x = (scale * torch.randn(n, generator=generator)).to(dtype)
    if not from_logits:
        x = x.sigmoid()
    y = torch.rand(n, generator=generator) < 0.4
    want, got = CalibrationHistogram(), CalibrationHistogram()
    want.update(x.double(), y, from_logits=from_logits)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.object(_tally, "_BLOCK", block):
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
        want = torch.ones(num_bins, dtype=torch.int64)
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
    assert float(histogram.nll()) == pytest.approx(log_loss(y.numpy(), p.numpy()))
    assert float(histogram.brier()) == pytest.approx(brier_score_loss(y.numpy(), p.numpy()))


# --- exactness at scale -----------------------------------------------------------------------


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
    x = torch.from_numpy(rng.normal(size=60))
    y = torch.from_numpy(rng.integers(0, 2, 60))
    whole = CalibrationHistogram()
    whole.update(x, y)
    split = [CalibrationHistogram() for _ in range(parts)]
    for i, (some_x, some_y) in enumerate(zip(x.split(7), y.split(7), strict=True)):
        split[i % parts].update(some_x, some_y)
    total = CalibrationHistogram()
    for part in split:
        total = total + part
    for name in ("ece", "nll", "brier", "confidence", "sweep_ece"):
        assert_close(getattr(total, name)(), getattr(whole, name)())


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
        one.update(p[:7], y[:7], from_logits=False)
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
    time.sleep(0.3)  # as in test_distributed.py
    dist.destroy_process_group()


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
    (update([0.5], [0.5]), ValueError, "only 0 and 1, but got the value 0.5"),
    (update([0.5], [7], ignore_index=255), ValueError, "besides ignore_index=255"),
    (
        update([0.5, 0.5], torch.tensor([1, 255], dtype=torch.uint8), ignore_index=-1),
        ValueError,
        "besides ignore_index=-1.*got the value 255",
    ),
    (update([math.nan, 0.5], [255, 7], ignore_index=255), ValueError, "got the value 7"),
    (update([0.5, -0.1], [True, False]), ValueError, r"in \[0, 1\], but got -0.1"),
    (
        update([0.5], torch.tensor([1 + 1e-12], dtype=torch.float64)),
        ValueError,
        "only 0 and 1, but got",
    ),
    (update([0.5], [1e-30]), ValueError, "only 0 and 1, but got the value 1"),
    (update([1], [1]), TypeError, "floating-point logits, but got torch.int64"),
    (
        lambda: CalibrationHistogram().update([0.5], torch.ones(1)),
        TypeError,
        "Tensor, but got list",
    ),
    (lambda: CalibrationHistogram().merge(3), TypeError, "CalibrationHistogram, but got int"),
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
        "with 7955 cells in `counts`, but got 69; build the histogram with the same num_cells",
    ),
]


def test_a_spoilt_state_is_refused_whole():
    histogram = measured(*predictions(0, 100))
    for name, wrong in (("log_loss", torch.zeros(())), ("doubts", torch.tensor(3.0))):
        state = CalibrationHistogram().state_dict() | {name: wrong}
        with pytest.raises(ValueError, match=f"saved `{name}` to be a Tensor of shape"):
            histogram.load_state_dict(state)
    assert histogram.reliability().count.sum() == 100


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_bad_input_is_refused(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


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
        for kind in KINDS:
            for name in ("accuracy", "confidence", "ece", "nll", "brier"):
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
