#!/usr/bin/env bash
# ml_dtypes 0.6.0 (JAX's and TensorFlow's), onnx 1.23.2, onnxruntime 1.32.0, OpenVINO 2026.4.1: a logit
# of 500 in float8_e4m3fn. ONNX Cast saturates to 448 in its reference and in onnxruntime; OpenVINO, given
# the same file, answers nan, and so does a cast of ml_dtypes.
# Seen: ml_dtypes nan, onnx reference 448, onnxruntime 448, OpenVINO nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 ml_dtypes==0.6.0
venv/bin/python - <<'PY'
import ml_dtypes
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper, save
from onnx.reference import ReferenceEvaluator

x = np.array([500, 448], np.float32)
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
nodes = [
    helper.make_node("Cast", ["x"], ["small"], to=TensorProto.FLOAT8E4M3FN),
    helper.make_node("Cast", ["small"], ["y"], to=TensorProto.FLOAT),
]
graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), "m.onnx")
seen = {
    "ml_dtypes": x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "onnx": ReferenceEvaluator("m.onnx").run(None, {"x": x})[0],
    "onnxruntime": onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0],
    "OpenVINO": openvino.Core().compile_model("m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0],
}
print(seen)
assert all(one[1] == 448 for one in seen.values())
assert np.isnan(seen["ml_dtypes"][0]) and np.isnan(seen["OpenVINO"][0])
assert seen["onnx"][0] == seen["onnxruntime"][0] == 448
PY
