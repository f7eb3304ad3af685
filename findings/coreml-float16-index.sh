#!/usr/bin/env bash
# coremltools 9.0: the index of a table is computed in float16 by default.
# Multiplication and rounding that end in an integer index are cast to float16 (compute_precision), which
# has no odd number above 2048 and none above 65504; only the result is int32. Of a table of 20,001 rows
# most can't be reached. Nothing warns. With compute_precision=FLOAT32 the program has no float16.
# Seen in the program: mul_0_cast_fp16 -> floor_0_cast_fp16 -> cast int32 -> gather
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 coremltools==9.0
venv/bin/python - <<'PY'
import coremltools
import numpy as np
from coremltools.converters.mil import Builder as mb

table = np.arange(20001, dtype=np.float32)


@mb.program(input_specs=[mb.TensorSpec(shape=(1, 8))])
def look_up(x):
    index = mb.cast(x=mb.floor(x=mb.mul(x=x, y=np.float32(20000))), dtype="int32")
    return mb.gather(x=table, indices=index, axis=0)


def operators(**settings):
    made = coremltools.convert(look_up, convert_to="mlprogram", **settings)
    lines = [line.strip() for line in str(made._mil_program).splitlines() if "%" in line]
    return [line for line in lines if " = " in line]


half = operators()
whole = operators(compute_precision=coremltools.precision.FLOAT32)
print(*half, *whole, sep="\n")
assert any(" = floor(" in line and "fp16)(Tensor)" in line for line in half)
assert any(" = gather(" in line for line in half)
assert not any("fp16" in line for line in whole)
reached = np.floor((np.arange(20001) / 20000).astype(np.float16) * np.float16(20000)).astype(int)
print(len(np.unique(reached)), "of", len(table), "rows can be reached in float16")
assert len(np.unique(reached)) < len(table) / 2
PY
