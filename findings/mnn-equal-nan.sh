#!/usr/bin/env bash
# MNN 3.6.1: nan equals nan, and does not equal it either.
# MNN.expr.equal(x, x) and not_equal(x, x) are both 1 for nan; greater_equal(x, x) is 0. A converted ONNX
# graph that finds missing values by Equal(x, x) finds none.
# Seen: equal [1 1], not_equal [1 0], greater_equal [0 1] (nan, 1); converted Equal [1 1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 onnx==1.23.2 MNN==3.6.1
venv/bin/python - <<'PY'
import _tools
import MNN
import numpy as np
from MNN import expr
from onnx import TensorProto, helper, numpy_helper, save

data = np.array([[np.nan, 1]], np.float32)
x = expr.const(data, [1, 2], expr.NCHW)
seen = {f.__name__: np.array(f(x, x).read()).ravel().astype(int) for f in (expr.equal, expr.not_equal, expr.greater_equal)}
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy"]
nodes = [helper.make_node("Equal", ["x", "x"], ["k"]), helper.make_node("Where", ["k", "one", "zero"], ["y"])]
values = [numpy_helper.from_array(np.float32(v), n) for v, n in ((1, "one"), (0, "zero"))]
graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], values)
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), "m.onnx")
# What the command mnnconvert calls.
_tools.mnnconvert(["", "-f", "ONNX", "--modelFile", "m.onnx", "--MNNModel", "m.mnn", "--bizCode", "x"])
net = MNN.nn.load_module_from_file("m.mnn", ["x"], ["y"])
seen["converted"] = np.array(net.forward([x])[0].read()).ravel().astype(int)
print(seen)
assert seen["equal"].tolist() == [1, 1] and seen["not_equal"].tolist() == [1, 0]
assert seen["greater_equal"].tolist() == [0, 1] and seen["converted"].tolist() == [1, 1]
PY
