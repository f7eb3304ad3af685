"""Exported repairs answer as torch does, special values included; the runtimes are optional."""

import importlib.util

import pytest
import torch

from benchmarks.runtimes import BUILDS, DESTINATIONS, by_onnxruntime, compared, export, fitted
from sc_bce import IsotonicCalibration, TemperatureScaling

RUNTIMES = ("onnxruntime", "OpenVINO", "OpenCV", "tract")
CASES = [(name, logits, torch.float32) for name in BUILDS for logits in (True, False)]
CASES += [(name, True, torch.float64) for name in BUILDS]


@pytest.mark.parametrize(("name", "from_logits", "dtype"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_runtimes_answer_special_values_as_torch_does(name, from_logits, dtype, tmp_path):
    pytest.importorskip("onnxscript")
    repair, x = fitted(BUILDS[name], from_logits, dtype)
    found = [one for one in RUNTIMES if importlib.util.find_spec(DESTINATIONS[one].needs)]
    if not found:
        pytest.skip("no runtime is installed")
    for runtime in found if dtype == torch.float32 else found[:1]:
        difference, nan = compared(DESTINATIONS[runtime].build(repair, x, tmp_path), repair, x)
        assert difference < 3e-5, runtime
        assert all(one != one for one in nan), runtime


def test_rare_probabilities_survive_the_last_node(tmp_path):
    """The Sigmoid of onnxruntime is 0 from a logit of -18 on, that of tract never below 4e-7."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    repair, _ = fitted(TemperatureScaling, from_logits=False)
    x = torch.tensor([[1e-30, 1e-20, 1e-12, 1e-6]])
    answer = by_onnxruntime(export(repair, x, tmp_path / "repair.onnx"))(x)
    want = torch.sigmoid(torch.logit(x.double()) / repair.temperature)
    torch.testing.assert_close(torch.from_numpy(answer).double(), want, rtol=1e-4, atol=0)
    torch.testing.assert_close(repair(x).double(), want, rtol=1e-4, atol=0)
    repair.temperature.fill_(0.5)
    repair(x.requires_grad_()).sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("build", [TemperatureScaling, IsotonicCalibration])
@pytest.mark.parametrize("from_logits", [True, False])
def test_only_the_path_that_is_needed_is_exported(build, from_logits, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    repair, x = fitted(build, from_logits)
    nodes = onnx.load(export(repair, x, tmp_path / "repair.onnx")).graph.node
    used = {node.op_type for node in nodes}
    assert ("Log" in used) != from_logits  # nothing else here has a logarithm
    if build is TemperatureScaling and from_logits:  # without a flip it is a line
        assert used - {"Constant", "Cast"} <= {"Add", "Div", "LessOrEqual", "Not", "Where"}
    assert not used & {"IsNaN", "IsInf"}  # which OpenCV 4 and MNN lack
    # nan equals nan in MNN, and is at least nan in OpenVINO.
    assert "LessOrEqual" in used
    assert not used & {"Equal", "GreaterOrEqual"}
    assert nodes[-1].op_type == "Where"
