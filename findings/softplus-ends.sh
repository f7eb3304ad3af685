#!/usr/bin/env bash
# OpenCV 5.0.0.93, tract 0.23.9, OpenVINO 2026.4.1: Softplus, the negative log-likelihood of a logit.
# OpenCV and tract answer inf from a logit of 89 on, where it is the logit itself. OpenVINO and tract
# answer 0 at -17 and below, where it is 4e-08. onnxruntime 1.32.0 is right at both ends.
# Seen (at -17 and 89): onnxruntime 4.14e-08 89, OpenVINO 0 89, OpenCV 4.14e-08 inf, tract 0 inf
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 tract==0.23.9 opencv-python-headless==5.0.0.93
venv/bin/python - <<'PY'
import cv2
import numpy as np
import onnxruntime
import openvino
import tract
from onnx import TensorProto, helper, save

x = np.array([[-17, 89]], np.float32)
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy"]
graph = helper.make_graph([helper.make_node("Softplus", ["x"], ["y"])], "g", ends[:1], ends[1:])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "m.onnx")
seen = {"onnxruntime": onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0]}
seen["OpenVINO"] = openvino.Core().compile_model("m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
net = cv2.dnn.readNetFromONNX("m.onnx")
net.setInput(x)
seen["OpenCV"] = net.forward()
model = tract.onnx().load("m.onnx")
model.set_input_fact(0, "1,2,f32")
seen["tract"] = model.into_model().into_runnable().run([x])[0].to_numpy()
seen = {name: np.ravel(one) for name, one in seen.items()}
print(*(f"{name} {low:.3g} {high:g}" for name, (low, high) in seen.items()), sep=", ")
np.testing.assert_allclose(seen["onnxruntime"], [4.139938e-08, 89], 1e-6)
assert seen["OpenVINO"][0] == seen["tract"][0] == 0
assert np.isinf(seen["OpenCV"][1]) and np.isinf(seen["tract"][1])
PY
