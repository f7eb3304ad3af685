#!/usr/bin/env bash
# nibabel 5.4.2: labels held in floats and saved as uint8 come back as other numbers.
# An array of 0.0, 1.0 and 2.0 with set_data_dtype(uint8) is stretched over 0 to 255 and stored with
# scl_slope 2/255; label 1 is read as 0.996, and a cast to int makes it background. 0 and 1 alone come
# back as 1.00000006, which == 1 doesn't find. Integer arrays are stored as they are.
# Seen: two labels [0, 0.99607849, 2.00000012], as int [0, 0, 2]; one label [0, 1.00000006]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 nibabel==5.4.2
venv/bin/python - <<'PY'
import nibabel
import numpy as np


def back(labels, kind):
    image = nibabel.Nifti1Image(np.array(labels, kind).reshape(-1, 1, 1), np.eye(4))
    image.set_data_dtype(np.uint8)
    nibabel.save(image, "labels.nii")
    return nibabel.load("labels.nii").get_fdata().ravel()


two, one, whole = back([0, 1, 2], float), back([0, 1], float), back([0, 1, 2], np.int16)
print(two, two.astype(int), one, whole)
assert two.astype(int).tolist() == [0, 0, 2]
assert abs(one[1] - 1) < 1e-6 and one[1] != 1
assert whole.tolist() == [0, 1, 2]
PY
