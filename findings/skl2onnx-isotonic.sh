#!/usr/bin/env bash
# skl2onnx 1.20.0: scikit-learn's isotonic calibration becomes a nearest neighbour.
# CalibratedClassifierCV(method="isotonic") interpolates between its knots; the exported graph picks the
# nearest one (ArgMin of a distance), without a warning. Probabilities differ between the knots.
# Seen: largest difference 0.0596, mean 0.0017 (sigmoid calibration: 1e-07)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 onnx==1.23.2 onnxruntime==1.32.0 skl2onnx==1.20.0
venv/bin/python - <<'PY'
import numpy as np
import onnxruntime
from skl2onnx import to_onnx
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression

rng = np.random.default_rng(0)
X = rng.normal(size=(300, 3)).astype(np.float32)
y = (rng.random(300) < 1 / (1 + np.exp(-2 * X[:, 0]))).astype(int)
differ = {}
for method in ("isotonic", "sigmoid"):
    model = CalibratedClassifierCV(LogisticRegression(), method=method, cv=3).fit(X, y)
    made = to_onnx(model, X[:1], options={"zipmap": False})
    session = onnxruntime.InferenceSession(made.SerializeToString())
    answer = session.run(None, {session.get_inputs()[0].name: X})[1]
    differ[method] = np.abs(answer - model.predict_proba(X))
    print(method, differ[method].max(), differ[method].mean())
    if method == "isotonic":
        assert "ArgMin" in {node.op_type for node in made.graph.node}
assert differ["isotonic"].max() > 0.02 and differ["sigmoid"].max() < 1e-5
PY
