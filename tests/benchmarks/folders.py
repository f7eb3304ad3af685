"""Small folders of images and masks."""

import numpy as np
from PIL import Image


def paint(folder, count=20, size=(40, 30), white=255, suffix="png"):
    """A folder of squares and their masks."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i in range(count):
        mask = np.zeros(size[::-1], np.uint8)
        mask[5:20, i : i + 15] = 1
        shade = np.stack([mask * 180 + 20] * 3, -1).astype(np.uint8)
        Image.fromarray(shade).save(folder / "images" / f"{i:03}.{suffix}")
        Image.fromarray(mask * white).save(folder / "masks" / f"{i:03}.png")
    return folder


def pave(folder, counts, size=(16, 12)):
    """Street scenes: three bands of labels 0, 3 and void, and a spot of label 10."""
    for part, count in counts.items():
        (folder / part / "images").mkdir(parents=True)
        (folder / part / "labels").mkdir()
        for i in range(count):
            labels = np.repeat(np.array([0, 3, 11], np.uint8), size[1] // 3)[:, None]
            labels = np.tile(labels, (1, size[0]))
            labels[0, 0] = 10
            shade = np.stack([labels * 20] * 3, -1)
            Image.fromarray(shade).save(folder / part / "images" / f"{i:03}.jpg")
            Image.fromarray(labels).save(folder / part / "labels" / f"{i:03}.png")
    return folder
