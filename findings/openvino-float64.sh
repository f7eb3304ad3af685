#!/usr/bin/env bash
# OpenVINO 2026.4.1: a graph of float64 is computed in float32 on the CPU, and typed float64.
# Input, output and constant of an ONNX model are double, and the execution precision is asked to be
# f64. What is close to 1 loses its digits: 1 - (1 - 1e-12) is 0, and 1e300 becomes 3.4e+38. onnxruntime
# 1.32.0 answers in double.
# Seen: openvino float64 [0.0, 3.4028234663852886e+38]
#       onnxruntime float64 [-9.999778782798785e-13, 1e+300]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1
venv/bin/python - <<'PY'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper, save

x = np.array([[1 - 1e-12, 1e300]])
ends = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, [1, 2]) for n in "xy"]
one = numpy_helper.from_array(np.float64(1), "one")
graph = helper.make_graph([helper.make_node("Sub", ["x", "one"], ["y"])], "g", ends[:1], ends[1:], [one])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "m.onnx")
got = openvino.Core().compile_model("m.onnx", "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})(x)[0]
want = onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0]
print("openvino", got.dtype, got[0].tolist(), "\nonnxruntime", want.dtype, want[0].tolist())
assert got.dtype == want.dtype == np.float64
assert want[0, 0] != 0 and want[0, 1] == 1e300
assert got[0, 0] == 0 and got[0, 1] < 1e39
PY
