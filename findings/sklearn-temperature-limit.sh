#!/usr/bin/env bash
# scikit-learn 1.9.1: CalibratedClassifierCV(method="temperature") stops at T = 22026, without a warning.
# The search for log(1/T) ends at -10. Scores of a scale of 1e5 and 1e6 (an unscaled margin) stay over-
# confident, while up to 1e3 the answer does not depend on the scale, as it should not.
# Seen: NLL after calibration, scores times 1: 0.465, 1e3: 0.465, 1e5: 2.016, 1e6: 61.767
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
venv/bin/python - <<'PY'
import warnings

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

warnings.simplefilter("error")
rng = np.random.default_rng(0)
X = rng.normal(size=(3000, 1))
y = (rng.random(3000) < 1 / (1 + np.exp(-2 * X[:, 0]))).astype(int)
seen = {}
for scale in (1, 1e3, 1e5, 1e6):
    model = LogisticRegression().fit(X, y)
    model.coef_ *= scale
    model.intercept_ *= scale
    fitted = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(X, y)
    p = fitted.predict_proba(X)[:, 1]
    seen[scale] = -np.mean(np.log(np.where(y, p, 1 - p) + 1e-300))
    print(f"{scale:g}: NLL {seen[scale]:.3f}, 1/T {fitted.calibrated_classifiers_[0].calibrators[0].beta_:.4g}")
assert abs(seen[1e3] - seen[1]) < 1e-6
assert seen[1e5] > 2 * seen[1] and seen[1e6] > 50 * seen[1]
PY
