#!/usr/bin/env bash
# onnxconverter-common 1.16.0: float16 conversion changes constants that float16 can hold or must not lose.
# convert_float_to_float16 moves whatever is above 10,000 to 10,000, although float16 goes to 65,504, and
# whatever is below 1e-07 in size to 1e-07. A table's index, x * 20000, is halved: it raises a Python
# warning, and the file is valid.
# Seen: x * 20000 at x = 0.5 is 5000, not 10000; the constant 1e-09 becomes 1.19e-07
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 onnxconverter-common==1.16.0
venv/bin/python - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common.float16 import convert_float_to_float16

ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]


def made(factor):
    constant = numpy_helper.from_array(np.float32(factor), "k")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["y"])], "g", ends[:1], ends[1:], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return convert_float_to_float16(model, keep_io_types=True)


large, small = made(20000), made(1e-9)
session = onnxruntime.InferenceSession(large.SerializeToString())
index = session.run(None, {"x": np.array([0.5], np.float32)})[0]
least = float(numpy_helper.to_array(small.graph.initializer[0]))
print(index, least)
assert float(np.float16(20000)) == 20000 and index.tolist() == [5000]
assert 9e-8 < least < 2e-7
PY
