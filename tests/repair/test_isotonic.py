"""The curve: blocks, cells, blocks of many logits."""

import math
import warnings

import numpy as np
import pytest
import reference as ref
import torch
from devices import array, tensor
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from sc_bce import CalibrationHistogram, IsotonicCalibration
from sc_bce.measure.cells import grid
from sc_bce.repair.fit import place

Z, Y = torch.tensor([-1.0, 2.0]), torch.tensor([0, 1])


def filled(z, y, **options):
    histogram = CalibrationHistogram(**options)
    histogram.update(torch.as_tensor(z), torch.as_tensor(y))
    return histogram


@given(seeds, st.sampled_from([1e-4, 0.1, 3.0, 30.0, 1e3, 1e5]))
def test_places_need_no_cells_beyond_the_largest_logit(seed, scale):
    z = torch.from_numpy(np.random.default_rng(seed).normal(0, scale, 200)).float()
    cells = grid(10_000)
    assert torch.equal(place(cells, z, float(z.abs().max())), place(cells, z, math.inf))


@given(seeds, st.integers(5, 200))
def test_the_curve_goes_through_the_blocks_and_rises(seed, n):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(0, 2, n), rng.integers(0, 2, n)
    y[:2] = (0, 1)
    histogram = CalibrationHistogram()
    histogram.update(tensor(z), tensor(y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few points may lie better as they are
        repair = IsotonicCalibration().double().fit(histogram)
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    x = torch.cat((torch.tensor([-math.inf, -1e30]).double(), x, torch.tensor([1e30, math.inf])))
    got = repair(x)
    assert got.isfinite().all()
    assert (got.diff() >= 0).all()
    # At each fitted logit the share of its block; of the end blocks, half a count in n + 1.
    fitted, cell = ref.isotonic(z, y), array(place(grid(10_000), tensor(z), math.inf))
    values, counts = np.unique(fitted, return_counts=True)
    if len(values) == 1:
        fitted[:] = (y.sum() + 0.5) / (n + 1)
    else:
        if values[0] == 0:
            fitted[fitted == 0] = min(0.5 / (counts[0] + 1), values[1])
        if values[-1] == 1:
            fitted[fitted == 1] = max((counts[-1] + 0.5) / (counts[-1] + 1), values[-2])
    if len(np.unique(cell)) == n:  # else ties that the reference does not have
        np.testing.assert_allclose(
            array(repair.table[tensor(cell)]), np.log(fitted / (1 - fitted)), rtol=1e-6
        )


def test_a_curve_without_a_fit_leaves_logits_as_they_are():
    x = torch.cat((torch.linspace(-9, 9, 1001), torch.linspace(-700, 700, 1001))).double()
    got = IsotonicCalibration().double()(x)
    assert ((got - x).abs() <= torch.where(x.abs() < 50, 0.07, 0.201)).all()
    assert ((got - x)[x.abs() < 4].abs() < 3.1e-3).all()


def test_the_ends_do_not_cost_more_than_they_must():
    """A network that is never wrong on the fitted data may be on fresh ones."""
    truth = 3 * torch.randn(3000, dtype=torch.float64)
    y = torch.rand(3000) < torch.sigmoid(truth)
    fresh = 3 * torch.randn(50_000, dtype=torch.float64)
    label = torch.rand(50_000) < torch.sigmoid(fresh)
    repair = IsotonicCalibration().double().fit(truth, y)
    best = ref.bce(array(fresh), array(label)).mean()
    assert ref.bce(array(repair(fresh)), array(label)).mean() < 1.05 * best


def test_a_curve_needs_the_fine_cells_and_a_meta_histogram_has_none():
    with pytest.raises(ValueError, match=r"num_cells=10000, but got .*num_cells=100; build"):
        IsotonicCalibration().fit(filled(Z, Y, num_cells=100))
    histogram = CalibrationHistogram()
    histogram.update(torch.empty(3, device="meta"), torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="`histogram` to hold values, but got one on device meta"):
        IsotonicCalibration().fit(histogram)


@pytest.mark.cpu_only("only there they are read block by block")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("labels", [None, 3])
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_many_logits_are_read_from_the_curve_as_few_are(dtype, labels, scale):
    repair = IsotonicCalibration(labels)
    torch.manual_seed(0)
    repair.table.copy_(torch.randn_like(repair.table))
    z = (scale * torch.randn(1500, 3, 11, 17)).to(dtype)
    z[0, 0, 0, :6] = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-30])
    for logits in (z, z.transpose(2, 3), z[:, :, ::2]):
        one_by_one = torch.cat([repair(part) for part in logits.split(5)])
        many = repair(logits)
        assert many.dtype == dtype
        assert torch.equal(many.isnan(), logits.isnan())
        assert torch.equal(many.nan_to_num(), one_by_one.nan_to_num())
        needs = logits.detach().clone().requires_grad_()
        assert torch.equal(repair(needs).detach().nan_to_num(), many.nan_to_num())
        with torch.inference_mode():
            assert torch.equal(repair(logits).nan_to_num(), many.nan_to_num())


def test_a_curve_of_no_element_is_none():
    assert IsotonicCalibration(3)(torch.zeros(5000, 3, 0)).shape == (5000, 3, 0)
    assert IsotonicCalibration()(torch.zeros(0)).shape == (0,)
