#!/usr/bin/env bash
# Pillow 13.0.0, OpenCV 5.0.0.93, tifffile 2026.3.3, SimpleITK 2.5.7: a TIFF mask whose white is zero.
# The same 8-bit file is the mask in tifffile and SimpleITK, and its negative in Pillow and OpenCV, which
# follow PhotometricInterpretation 0. With 16 bits nobody inverts it. Object of 4 in 64 pixels.
# Seen, share of the object: 8 bits .0625 .0625 .9375 .9375 (tifffile SimpleITK Pillow OpenCV); 16 bits .0625 four times
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q numpy==2.4.6 pillow==13.0.0 tifffile==2026.3.3 opencv-python-headless==5.0.0.93 SimpleITK==2.5.7
venv/bin/python - <<'PY'
import cv2
import numpy as np
import SimpleITK
import tifffile
from PIL import Image

mask = np.zeros((8, 8), bool)
mask[2:4, 2:4] = True
shares = {}
for kind in (np.uint8, np.uint16):
    top = np.iinfo(kind).max
    tifffile.imwrite("mask.tif", mask.astype(kind) * kind(top), photometric="miniswhite")
    read = {
        "tifffile": tifffile.imread("mask.tif"),
        "SimpleITK": SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("mask.tif")),
        "Pillow": np.asarray(Image.open("mask.tif")),
        "OpenCV": cv2.imread("mask.tif", cv2.IMREAD_UNCHANGED),
    }
    shares[kind] = {name: float(one.mean() / top) for name, one in read.items()}
    print(kind.__name__, shares[kind])
assert list(shares[np.uint8].values()) == [0.0625, 0.0625, 0.9375, 0.9375]
assert set(shares[np.uint16].values()) == {0.0625}
PY
