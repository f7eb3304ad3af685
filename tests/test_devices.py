"""What holds on devices that most of us lack; each part is skipped where its device is not."""

import ast
import contextlib
import pathlib
import subprocess
import sys
from unittest import mock

import pytest
import torch
from devices import DEVICE, Moved, NoFloat64
from torch.testing import assert_close

import sc_bce
from sc_bce import AdaptivePerturbation, CalibrationHistogram, ImageHistograms, SCBCEWithLogitsLoss
from sc_bce.losses import levels

try:  # before the first backward of all, which looks what devices there are
    import torch_xla

    XLA = torch_xla.device()
except ImportError:
    XLA = None

N = 6
ADAPTIVE = {
    "default": {},
    "focused": {"focus": 3.0, "prior": 0.5},
    "calibration": {"objective": "calibration", "sampling": "element"},
    "max_entropy": {"objective": "max_entropy", "sampling": "expected"},
    "labels": {"num_labels": 3, "focus": 1.0},
    "tensor": {"prior": torch.tensor([0.1, 0.2, 0.5])},
    "shared": {"num_samples": None, "prior": 0.1},
}
FIXED = {
    "expected": {"alpha": 0.1},
    "sampled": {"alpha": 0.1, "prior": 0.1, "sampling": "sample"},
    "noisy": {"alpha": 0.1, "beta": 1.0, "noise": 0.2, "sampling": "element"},
}


def adaptive(**settings):
    """The loss of these settings; those with an objective are the paper's."""
    make = AdaptivePerturbation.published if "objective" in settings else AdaptivePerturbation
    return make(**settings)


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


# -- on any

MAKERS = {
    "arange", "as_tensor", "empty", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "tensor", "zeros",
}  # fmt: skip


def unplaced(source):
    """Lines that make a tensor and leave it to torch where; buffers of a module may."""
    tree = ast.parse(source)
    buffers = [
        inner
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "register_buffer"
        for inner in ast.walk(call)
    ]
    return [
        call.lineno
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and call not in buffers
        and isinstance(call.func, ast.Attribute) and call.func.attr in MAKERS
        and ast.unparse(call.func.value) == "torch"
        and all(keyword.arg not in ("device", None) for keyword in call.keywords)
    ]  # fmt: skip


def test_no_tensor_is_made_where_a_default_device_happens_to_be():
    """Or it would meet those of another: `pytest --device` sets a default and could not see it."""
    assert unplaced(
        "x = torch.zeros(2)\ny = torch.ones(2, device=d)\nx.register_buffer(torch.ones(2))"
    ) == [1]
    for path in pathlib.Path(sc_bce.__file__).parent.rglob("*.py"):
        assert not unplaced(path.read_text()), path


def test_measures_and_repairs_heed_no_default_device():
    x, y = torch.linspace(-4, 4, 60), torch.arange(60) % 3 > 0
    ends = []
    for place in ("cpu", "meta"):
        with torch.device(place):
            histogram = CalibrationHistogram()
            images = ImageHistograms()
        histogram.update(x, y)
        images.update(x.view(6, 2, 5), y.view(6, 2, 5))
        with torch.device("cpu"):
            repairs = [sc_bce.TemperatureScaling(None, bias=True), sc_bce.IsotonicCalibration()]
        with torch.device(place):
            found = [histogram.ece(), histogram.slope(), images.interval("nll", resamples=20)]
            found += [repair.fit(histogram)(x) for repair in repairs]
        ends.append(found)
    assert_close(*ends)


@pytest.mark.parametrize("name", FIXED)
def test_the_fixed_loss_trains_without_values(name):
    """A meta tensor has none: any look at one, where an accelerator would wait, raises."""
    pos_weight = torch.full((3,), 1.5)
    criterion = SCBCEWithLogitsLoss(**FIXED[name], pos_weight=pos_weight, ignore_index=255).to(
        "meta"
    )
    weight = torch.ones(4, 3, device="meta", requires_grad=True)
    batches = [tuple(part.to("meta") for part in data(step)) for step in range(2)]
    losses = steps(criterion, weight, batches)
    losses += steps(criterion, weight, [(x, y.byte(), index) for x, y, index in batches])
    assert all(loss.is_meta for loss in losses)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool(losses[0] > 0)


def test_a_device_that_is_not_there_is_a_usage_error():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run([*command, "--device", "nowhere"], capture_output=True, text=True)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device nowhere" in run.stderr


# -- without float64


@pytest.fixture
def mps():
    with (
        mock.patch("sc_bce._torch.WITHOUT_FLOAT64", ("mps", DEVICE.type)),
        mock.patch.object(levels, "has_values", return_value=True),
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
        criterion = adaptive(**settings).to(device)
        weight = torch.ones(4, 3).to(device).requires_grad_()
        batches = [tuple(part.to(device) for part in data(step)) for step in range(2)]
        histogram = CalibrationHistogram()
        for _ in range(4):
            before = mps.waits
            losses = steps(criterion, weight, batches)
            assert mps.waits == before
            histogram.reset()
            histogram.update(torch.linspace(-3, 3, 8).to(device), torch.ones(8).to(device))
            criterion.step(histogram)
        again = adaptive(**settings).to(device)
        again.load_state_dict(criterion.state_dict())
        repr(again)
        state = {key: value.cpu() for key, value in again.state_dict().items()}
        ends.append([losses, state, again.flip_rates])
    assert_close(*ends, check_device=False)


def test_measures_and_repairs_work_without_float64(mps):
    ends = []
    for device in (DEVICE, torch.device("cpu")):
        x, y = torch.linspace(-4, 4, 60).to(device), (torch.arange(60) % 3 > 0).to(device)
        histogram = CalibrationHistogram()
        histogram.update(x, y)
        images = ImageHistograms()
        images.update(x.view(6, 2, 5), y.view(6, 2, 5))
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
        criterion = adaptive(**settings).to(place)
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


# -- on CUDA

AUTOCAST = torch.float16


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@contextlib.contextmanager
def no_waits():
    """While it lasts, a call that makes the CPU wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


debugged = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


def fixed(name, device):
    pos_weight = torch.full((3,), 1.5)
    return SCBCEWithLogitsLoss(**FIXED[name], pos_weight=pos_weight).to(device)


def adapting(name, device, **options):
    """Past its warm-up, so that each step moves levels."""
    settings = {"num_samples": N, "warmup": 1} | ADAPTIVE[name] | options
    criterion = adaptive(**settings).to(device)
    x, y = torch.ones(N, 3, device=device, requires_grad=True), torch.ones(N, 3, device=device)
    criterion(x, y, *([torch.arange(N, device=device)] if criterion.num_samples else []))
    criterion.step(measured())
    return criterion


def measured():
    """A histogram of over-confident answers."""
    histogram = CalibrationHistogram()
    histogram.update(
        torch.linspace(-3, 3, 60, device="cpu"), torch.arange(60, device="cpu") % 3 > 0
    )
    return histogram


@debugged
def test_the_debug_mode_of_cuda_sees_a_wait(cuda):
    x = torch.ones(3, device=cuda)
    with no_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        float(x.sum())
    assert float(x.sum()) == 3


@debugged
@pytest.mark.parametrize("name", FIXED)
def test_the_fixed_loss_trains_on_cuda_without_a_wait(cuda, name):
    criterion = fixed(name, cuda)
    weight = torch.ones(4, 3, device=cuda, requires_grad=True)
    batches = [tuple(part.to(cuda) for part in data(step)) for step in range(2)]
    steps(criterion, weight, batches)  # the first call of all sets up libraries
    with no_waits():
        steps(criterion, weight, batches)
    assert bool(weight.isfinite().all())


@debugged
@pytest.mark.parametrize("name", ADAPTIVE)
def test_levels_train_on_cuda_without_a_wait_and_as_on_a_cpu(cuda, name):
    ends = []
    for place in (cuda, torch.device("cpu")):
        options = {"sampling": "expected"} | ADAPTIVE[name]
        criterion = adapting(name, place, sampling=options["sampling"])
        weight = torch.ones(4, 3, device=place, requires_grad=True)
        batches = [tuple(part.to(place) for part in data(step)) for step in range(2)]
        histogram = CalibrationHistogram()
        for epoch in range(3):
            watched = place == cuda and epoch > 0
            with no_waits() if watched else contextlib.nullcontext():
                steps(criterion, weight, batches)
            histogram.update(torch.linspace(-3, 3, 8).to(place), torch.ones(8).to(place))
            criterion.step(histogram)
        state = {key: value.cpu() for key, value in criterion.state_dict().items()}
        ends.append([state, [rate.cpu() for rate in criterion.flip_rates], weight.detach().cpu()])
    if options["sampling"] == "expected":  # each device draws its own
        assert_close(*ends, rtol=1e-4, atol=1e-6)


@debugged
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.uint8])
@pytest.mark.parametrize("void", [None, 255])
def test_the_histogram_counts_on_cuda_without_a_wait(cuda, dtype, void):
    x, y = torch.linspace(-5, 5, 40), (torch.arange(40) % 3 > 0).to(dtype)
    far, near = CalibrationHistogram(), CalibrationHistogram()
    there = [part.to(cuda) for part in (x, y)]
    far.update(*there, ignore_index=void)
    with no_waits():
        far.update(*there, ignore_index=void)
    near.update(x.repeat(2), y.repeat(2), ignore_index=void)
    for name in ("ece", "nll", "brier", "accuracy", "slope"):
        assert_close(getattr(far, name)().cpu(), getattr(near, name)())


def captured(step):
    """A step as a CUDA graph, after some calls outside of it; the graph, and what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step()
    return graph, written


def loss_and_gradient(criterion, logits, target, index):
    indexed = isinstance(criterion, AdaptivePerturbation) and criterion.num_samples is not None
    loss = criterion(logits, target, *([index] if indexed else []))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def batch_of(step, device):
    images, target, index = (part.to(device) for part in data(step))
    return 4 * images[:, :3] + 1, target, index


@pytest.mark.parametrize("name", FIXED)
def test_a_cuda_graph_repeats_the_fixed_step(cuda, name):
    criterion = fixed(name, cuda)
    logits, target, index = batch_of(0, cuda)
    logits.requires_grad_()
    graph, written = captured(lambda: loss_and_gradient(criterion, logits, target, index))
    for step in (1, 2):
        x, y, _ = batch_of(step, cuda)
        with torch.no_grad():
            logits.copy_(x)
            target.copy_(y)
        gradients = []
        for _ in range(30):
            graph.replay()
            gradients.append(written[1].clone())
        assert torch.stack(gradients).isfinite().all()
        if name == "expected":
            assert_close(list(written), list(loss_and_gradient(criterion, logits, target, index)))
        else:  # each replay draws anew
            assert any(not torch.equal(one, gradients[0]) for one in gradients)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_cuda_graph_repeats_the_adaptive_step(cuda, name):
    graphed, eager = (adapting(name, cuda, sampling="expected") for _ in range(2))
    logits, target, index = batch_of(0, cuda)
    logits.requires_grad_()
    graph, written = captured(lambda: loss_and_gradient(graphed, logits, target, index))
    for _ in range(3):
        loss_and_gradient(eager, logits, target, index)
    assert_close(graphed.alpha, eager.alpha)
    for step in (1, 2, 3):
        x, y, rows = batch_of(step, cuda)
        with torch.no_grad():
            logits.copy_(x)
            target.copy_(y)
            index.copy_(rows.flip(0))
        graph.replay()
        assert_close(list(written), list(loss_and_gradient(eager, logits, target, index)))
        assert_close(graphed.alpha, eager.alpha)
    assert graphed.alpha.isfinite().all()
    graphed.step(measured())


@pytest.mark.parametrize("make", [lambda d: fixed("sampled", d), lambda d: adapting("focused", d)])
def test_autocast_to_float16_trains_under_a_grad_scaler(cuda, make):
    torch.manual_seed(0)
    model, criterion = torch.nn.Linear(4, 3).to(cuda), make(cuda)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda")
    before = model.weight.detach().clone()
    for step in range(4):
        images, target, index = (part.to(cuda) for part in data(step))
        with torch.autocast("cuda", dtype=AUTOCAST):
            logits = model(images)
            assert logits.dtype == AUTOCAST
            indexed = isinstance(criterion, AdaptivePerturbation)
            loss = criterion(logits, target, *([index] if indexed else []))
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() >= 1
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("name", ["expected", *ADAPTIVE])
def test_compile_on_cuda_gives_what_eager_gives(cuda, name):
    if name in FIXED:
        eager, whole = fixed(name, cuda), fixed(name, cuda)
    else:
        eager, whole = (adapting(name, cuda, sampling="expected") for _ in range(2))
    compiled = torch.compile(whole, fullgraph=True)
    for step in range(3):
        ends = []
        for criterion, call in ((eager, eager), (whole, compiled)):
            logits, target, index = batch_of(step, cuda)
            logits.requires_grad_()
            indexed = getattr(criterion, "num_samples", None) is not None
            loss = call(logits, target, *([index] if indexed else []))
            ends.append([loss.detach(), torch.autograd.grad(loss, logits)[0]])
        assert_close(*ends)
    if name not in FIXED:
        assert_close(whole.alpha, eager.alpha)
