"""What holds on devices that most of us lack; each part is skipped where its device is not."""

from unittest import mock

import pytest
import torch
from devices import DEVICE, Moved, NoFloat64
from torch.testing import assert_close

import sc_bce
from sc_bce import AdaptivePerturbation, CalibrationHistogram, SCBCEWithLogitsLoss, _batch, adaptive

N = 6
ADAPTIVE = {
    "default": {},
    "focused": {"objective": "feedback", "focus": 2.0},
    "calibration": {"objective": "calibration", "sampling": "element"},
    "max_entropy": {"objective": "max_entropy", "solver": "explicit", "sampling": "expected"},
    "observed": {"prior": "observed"},
    "labels": {"prior": "observed", "num_labels": 3, "focus": 1.0},
    "tensor": {"prior": torch.tensor([0.1, 0.2, 0.5])},
    "shared": {"num_samples": None, "prior": 0.1},
}
FIXED = {
    "expected": {"alpha": 0.1},
    "sampled": {"alpha": 0.1, "prior": 0.1, "sampling": "sample"},
    "noisy": {"alpha": 0.1, "beta": 1.0, "noise": 0.2, "sampling": "element"},
}


def data(step):
    generator = torch.Generator("cpu").manual_seed(step)
    images = torch.randn(N, 4, generator=generator, device="cpu")
    return images, (images[:, :3] > 0.5).float() * 0.875, torch.arange(N, device="cpu")


# -- without float64


@pytest.fixture
def mps():
    types = (*_batch._WITHOUT_FLOAT64, DEVICE.type)
    with (
        mock.patch.object(_batch, "_WITHOUT_FLOAT64", types),
        mock.patch.object(adaptive, "_has_values", return_value=True),
        NoFloat64() as device,
        Moved(),
    ):
        yield device


def test_the_stand_in_refuses_float64_and_sees_waits(mps):
    x = torch.ones(3).to(DEVICE)
    assert (x.device, (2 * x).device, mps.waits) == (DEVICE, DEVICE, 0)
    for make in (torch.Tensor.double, lambda x: x.sum(dtype=torch.float64)):
        with pytest.raises(TypeError, match="no float64"):
            make(x)
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(3)
    assert x.add_(1) is x
    assert (float(x[0]), mps.waits) == (2, 1)
    assert (x.cpu().double().sum(), mps.waits) == (6, 2)


def epoch(criterion, weight, device, mps=None):
    """Two steps of training; the indexed criterion's levels move."""
    losses = []
    for step in range(2):
        images, target, index = (part.to(device) for part in data(step))
        waits = mps.waits if mps else 0
        logits = images @ weight
        indexed = isinstance(criterion, AdaptivePerturbation) and criterion.num_samples is not None
        loss = criterion(logits, target, index) if indexed else criterion(logits, target)
        loss.backward()
        with torch.no_grad():
            weight -= 0.5 * weight.grad
            weight.grad = None
        if mps:
            assert mps.waits == waits, "training waits for the device"
        losses.append(loss.detach().cpu())
    return losses


@pytest.mark.parametrize("name", FIXED)
def test_the_fixed_loss_trains_without_float64(mps, name):
    criterion = SCBCEWithLogitsLoss(**FIXED[name], pos_weight=torch.full((3,), 1.5)).to(DEVICE)
    weight = torch.ones(4, 3).to(DEVICE).requires_grad_()
    losses = epoch(criterion, weight, DEVICE, mps)
    assert all(loss.isfinite() for loss in losses)
    assert all(rate.isfinite() for rate in criterion.flip_rates)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_levels_train_without_float64_as_with_it(mps, name):
    ends = []
    for device in (DEVICE, torch.device("cpu")):
        settings = {"num_samples": N, "warmup": 2, "sampling": "expected"} | ADAPTIVE[name]
        torch.manual_seed(1)
        criterion = AdaptivePerturbation(**settings).to(device)
        weight = torch.ones(4, 3).to(device).requires_grad_()
        histogram = CalibrationHistogram()
        for _ in range(4):
            losses = epoch(criterion, weight, device, mps)
            histogram.update(torch.linspace(-3, 3, 8).to(device), torch.ones(8).to(device))
            criterion.step(histogram)
        again = AdaptivePerturbation(**settings).to(device)
        again.load_state_dict(criterion.state_dict())
        repr(again)
        state = {key: value.cpu() for key, value in again.state_dict().items()}
        ends.append([losses, state, again.flip_rates, criterion.doubt])
    torch.testing.assert_close(*ends, check_device=False)


def test_measures_and_repairs_work_without_float64(mps):
    ends = []
    for device in (DEVICE, torch.device("cpu")):
        x, y = torch.linspace(-4, 4, 60).to(device), (torch.arange(60) % 3 > 0).to(device)
        histogram = CalibrationHistogram()
        histogram.update(x, y)
        images = sc_bce.bootstrap.ImageHistograms()
        images.update(x.view(6, 10), y.view(6, 10))
        found = [histogram.ece(), histogram.slope(), images.interval("nll", resamples=20)]
        for repair in (sc_bce.TemperatureScaling(bias=True), sc_bce.IsotonicCalibration()):
            repair = repair.to(device)
            found.append(repair.fit(x, y)(x).cpu())
            found.append(repair.fit(histogram)(x).cpu())
        ends.append(found)
    assert_close(*ends)
