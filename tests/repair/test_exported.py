"""Exported repairs answer as torch does, special values included; the runtimes are optional."""

import importlib.util

import pytest
import torch
from runtimes import BUILDS, RUNTIMES, compared, export, fitted

from sc_bce import IsotonicCalibration, TemperatureScaling

CASES = [(name, logits, torch.float32) for name in BUILDS for logits in (True, False)]
CASES += [(name, True, torch.float64) for name in BUILDS]


@pytest.mark.parametrize(("name", "from_logits", "dtype"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_runtimes_answer_special_values_as_torch_does(name, from_logits, dtype, tmp_path):
    pytest.importorskip("onnxscript")
    repair, x = fitted(BUILDS[name], from_logits, dtype)
    path = export(repair, x, tmp_path / "repair.onnx")
    found = [one for one, module in RUNTIMES.items() if importlib.util.find_spec(module)]
    if not found:
        pytest.skip("no runtime is installed")
    for runtime in found if dtype == torch.float32 else found[:1]:
        difference, nan = compared(runtime, repair, x, path)
        assert difference < 3e-5, runtime
        assert all(one != one for one in nan), runtime


@pytest.mark.parametrize("build", [TemperatureScaling, IsotonicCalibration])
@pytest.mark.parametrize("from_logits", [True, False])
def test_only_the_path_that_is_needed_is_exported(build, from_logits, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    repair, x = fitted(build, from_logits)
    nodes = onnx.load(export(repair, x, tmp_path / "repair.onnx")).graph.node
    used = {node.op_type for node in nodes}
    if build is IsotonicCalibration:  # its curve has no logarithm of its own
        assert ("Log" in used) != from_logits
    assert not used & {"IsNaN", "IsInf"}  # which OpenCV 4 and MNN lack
    assert nodes[-1].op_type == "Where"
