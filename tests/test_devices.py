"""What holds on devices that most of us lack; each part is skipped where its device is not."""

from unittest import mock

import pytest
import torch
from devices import DEVICE, Moved, NoFloat64
from torch.testing import assert_close

import sc_bce
from sc_bce import AdaptivePerturbation, CalibrationHistogram, SCBCEWithLogitsLoss, _batch, adaptive

try:  # before the first backward of all, which looks what devices there are
    import torch_xla

    XLA = torch_xla.device()
except ImportError:
    XLA = None

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


def steps(criterion, weight, batches):
    """Steps of training; the losses."""
    indexed = isinstance(criterion, AdaptivePerturbation) and criterion.num_samples is not None
    losses = []
    for images, target, index in batches:
        logits = images @ weight
        loss = criterion(logits, target, index) if indexed else criterion(logits, target)
        loss.backward()
        with torch.no_grad():
            weight -= 0.5 * weight.grad
            weight.grad = None
        losses.append(loss.detach())
    return losses


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


@pytest.mark.parametrize("name", FIXED)
def test_the_fixed_loss_trains_without_float64(mps, name):
    criterion = SCBCEWithLogitsLoss(**FIXED[name], pos_weight=torch.full((3,), 1.5)).to(DEVICE)
    weight = torch.ones(4, 3).to(DEVICE).requires_grad_()
    batches = [tuple(part.to(DEVICE) for part in data(step)) for step in range(2)]
    losses = steps(criterion, weight, batches)
    assert mps.waits == 0
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
        batches = [tuple(part.to(device) for part in data(step)) for step in range(2)]
        histogram = CalibrationHistogram()
        for _ in range(4):
            before = mps.waits
            losses = steps(criterion, weight, batches)
            assert mps.waits == before
            histogram.update(torch.linspace(-3, 3, 8).to(device), torch.ones(8).to(device))
            criterion.step(histogram)
        again = AdaptivePerturbation(**settings).to(device)
        again.load_state_dict(criterion.state_dict())
        repr(again)
        state = {key: value.cpu() for key, value in again.state_dict().items()}
        ends.append([losses, state, again.flip_rates, criterion.doubt])
    assert_close(*ends, check_device=False)


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


# -- on XLA: a true second device, whose CPU runs it too


@pytest.fixture(scope="module")
def xla():
    if XLA is None:
        pytest.skip("needs torch_xla: .ci/devices")
    from torch_xla.debug import metrics

    def waits(run):
        """What the device did not do itself, and what was read from it."""
        torch_xla.sync()
        metrics.clear_all()
        run()
        torch_xla.sync()
        calls = {n: metrics.counter_value(n) for n in metrics.counter_names() if "aten::" in n}
        reads = metrics.metric_data("TransferFromDeviceTime")
        return calls, reads[0] if reads else 0

    return XLA, waits


def test_the_counters_of_xla_see_a_wait(xla):
    device, waits = xla
    x = torch.ones(3, device=device)
    calls, reads = waits(lambda: float(x.sum()))
    assert calls["aten::_local_scalar_dense"] == 1
    assert reads == 1


@pytest.mark.parametrize("name", FIXED)
def test_the_fixed_loss_trains_on_xla_without_a_wait(xla, name):
    device, waits = xla
    criterion = SCBCEWithLogitsLoss(**FIXED[name], pos_weight=torch.full((3,), 1.5)).to(device)
    weight = torch.ones(4, 3, device=device, requires_grad=True)
    batches = [tuple(part.to(device) for part in data(step)) for step in range(2)]
    assert waits(lambda: steps(criterion, weight, batches)) == ({}, 0)
    assert bool(weight.isfinite().all())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_levels_train_on_xla_without_a_wait_and_as_on_a_cpu(xla, name):
    device, waits = xla
    ends = []
    for place in (device, torch.device("cpu")):
        settings = {"num_samples": N, "warmup": 2, "sampling": "expected"} | ADAPTIVE[name]
        drawn = settings["sampling"] != "expected"
        criterion = AdaptivePerturbation(**settings).to(place)
        weight = torch.ones(4, 3, device=place, requires_grad=True)
        batches = [tuple(part.to(place) for part in data(step)) for step in range(2)]
        histogram = CalibrationHistogram()
        for _ in range(4):
            found = waits(lambda: steps(criterion, weight, batches))  # noqa: B023
            assert found == ({}, 0)
            histogram.update(torch.linspace(-3, 3, 8).to(place), torch.ones(8).to(place))
            criterion.step(histogram)
        state = {key: value.cpu() for key, value in criterion.state_dict().items()}
        assert state["alpha"].isfinite().all()
        ends.append([state, [rate.cpu() for rate in criterion.flip_rates], weight.detach().cpu()])
    if not drawn:  # each device draws its own
        assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.uint8])
def test_the_histogram_counts_on_xla_without_a_wait(xla, dtype):
    device, waits = xla
    x, y = torch.linspace(-5, 5, 40), (torch.arange(40) % 3 > 0).to(dtype)
    far, near = CalibrationHistogram(), CalibrationHistogram()
    there = [part.to(device) for part in (x, y)]
    assert waits(lambda: far.update(*there)) == ({}, 0)
    near.update(x, y)
    for name in ("ece", "nll", "brier", "accuracy", "slope"):
        assert_close(getattr(far, name)().cpu(), getattr(near, name)())


def test_illegal_values_give_nan_on_xla(xla):
    device, _ = xla
    histogram, y = CalibrationHistogram(), torch.tensor([0, 1, 255]).to(device)
    histogram.update(torch.zeros(3, device=device), y)
    assert histogram.nll().isnan()
    criterion = SCBCEWithLogitsLoss(alpha=0.1)
    assert criterion(torch.zeros(3, device=device), y).isnan()


def test_repairs_fit_on_xla_as_on_a_cpu(xla):
    device, _ = xla
    x, y = torch.linspace(-4, 4, 60), torch.arange(60) % 3 > 0
    for make in (lambda: sc_bce.TemperatureScaling(bias=True), sc_bce.IsotonicCalibration):
        far, near = make().to(device), make()
        assert_close(far.fit(x.to(device), y.to(device))(x.to(device)).cpu(), near.fit(x, y)(x))
