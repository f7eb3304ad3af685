#!/usr/bin/env bash
# OpenVINO 2026.4.1, tract 0.23.9 (onnxruntime 1.32.0 beside them): Clip, Relu and comparisons of nan.
# onnxruntime hands nan on. OpenVINO and tract answer the lower bound: a missing pixel becomes a sure
# negative behind Clip(-2, 2), and an ordinary 0 behind Relu. To OpenVINO nan >= nan is true, as nan <= nan
# is not.
# Seen (of nan):     Clip  Relu  x >= x  x <= x
#       onnxruntime  nan   nan   False   False
#       OpenVINO     -2    0     True    False
#       tract        -2    0     False   False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 tract==0.23.9
venv/bin/python - <<'PY'
import numpy as np
import onnxruntime
import openvino
import tract
from onnx import TensorProto, helper, numpy_helper, save

x = np.array([[np.nan, 1]], np.float32)


def run(kind, *node):
    ends = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2]), helper.make_tensor_value_info("y", kind, [1, 2])
    bounds = [numpy_helper.from_array(np.float32(v), n) for v, n in ((-2, "low"), (2, "high"))]
    graph = helper.make_graph([helper.make_node(*node)], "g", ends[:1], ends[1:], bounds)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "m.onnx")
    first = onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0]
    second = openvino.Core().compile_model("m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    model = tract.onnx().load("m.onnx")
    model.set_input_fact(0, "1,2,f32")
    return first, second, model.into_model().into_runnable().run([x])[0].to_numpy()


clip = run(TensorProto.FLOAT, "Clip", ["x", "low", "high"], ["y"])
relu = run(TensorProto.FLOAT, "Relu", ["x"], ["y"])
more = run(TensorProto.BOOL, "GreaterOrEqual", ["x", "x"], ["y"])
less = run(TensorProto.BOOL, "LessOrEqual", ["x", "x"], ["y"])
for row in zip(("onnxruntime", "OpenVINO", "tract"), clip, relu, more, less):
    print(*row)
assert np.isnan(clip[0][0, 0]) and np.isnan(relu[0][0, 0])
assert [a[0, 0] for a in clip[1:]] == [-2, -2] and [a[0, 0] for a in relu[1:]] == [0, 0]
assert [bool(a[0, 0]) for a in more] == [False, True, False]
assert not any(a[0, 0] for a in less)
assert all(a[0, 1] for a in (*more, *less))
PY
