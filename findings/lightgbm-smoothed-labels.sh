#!/usr/bin/env bash
# LightGBM 4.7.0: the objective "binary" takes every label above 0 for a positive.
# Labels smoothed to .05 and .95 train a model that answers 1 for everything (it warns "Contains only one
# class" and goes on). The objective "cross_entropy" takes the same labels as probabilities.
# Seen: binary, smoothed: mean 1.000; cross_entropy, smoothed: mean 0.493; binary, 0 and 1: mean 0.492
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 scipy==1.17.1 lightgbm==4.7.0
venv/bin/python - <<'PY'
import lightgbm
import numpy as np

rng = np.random.default_rng(0)
X = rng.normal(size=(2000, 2))
hard = (rng.random(2000) < 1 / (1 + np.exp(-2 * X[:, 0]))).astype(float)
soft = 0.9 * hard + 0.05


def mean(objective, label):
    settings = {"objective": objective, "verbose": -1, "num_threads": 1}
    return lightgbm.train(settings, lightgbm.Dataset(X, label), 20).predict(X).mean()


seen = mean("binary", soft), mean("cross_entropy", soft), mean("binary", hard)
print("binary smoothed {:.3f}, cross_entropy smoothed {:.3f}, binary {:.3f}".format(*seen))
assert seen[0] > 0.999
assert abs(seen[1] - soft.mean()) < 0.02 and abs(seen[2] - hard.mean()) < 0.02
PY
