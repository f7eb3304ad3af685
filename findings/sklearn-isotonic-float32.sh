#!/usr/bin/env bash
# scikit-learn 1.9.1: IsotonicRegression of rare probabilities in float32 is a constant.
# Inputs closer than 1e-6 to each other count as one, whatever their size, so that a curve of
# probabilities between 1e-10 and 1e-6 has one knot in float32 and sixteen in float64. The data are the
# same and exact in both.
# Seen: float64 16 knots, 8 answers from 0 to 0.5; float32 1 knot, 1 answer, 0.00725
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
venv/bin/python - <<'PY'
import numpy as np
from sklearn.isotonic import IsotonicRegression

rng = np.random.default_rng(0)
p = (10 ** rng.uniform(-10, -6, 4000)).astype(np.float32)
y = (rng.random(4000) < np.clip(p.astype(float) * 1e5, 0, 1)).astype(np.float32)
answers = {}
for kind in (np.float64, np.float32):
    curve = IsotonicRegression(out_of_bounds="clip").fit(p.astype(kind), y.astype(kind))
    answers[kind] = np.unique(curve.predict(p.astype(kind)))
    ends = answers[kind][[0, -1]]
    print(kind.__name__, len(curve.X_thresholds_), "knots,", len(answers[kind]), "answers", ends)
assert len(np.unique(p)) > 3900
assert len(answers[np.float64]) > 4 and len(answers[np.float32]) == 1
PY
