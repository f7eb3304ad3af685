"""The command line, `python -m sc_bce` or `sc-bce`: maps and masks in files, no Python needed."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from . import files
from .measure import CalibrationHistogram, ImageHistograms
from .repair import IsotonicCalibration, TemperatureScaling

_TOGETHER = 64  # 8-bit maps that are counted at once
_IMAGES = 1000  # at most, for the intervals
_DRAWS = 300  # of images, for an interval
_INTERVALS = ("slope", "nll", "brier", "ece")
_KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "isotonic": (IsotonicCalibration, {}),
    "affine": (TemperatureScaling, {"bias": True}),
    "temperature": (TemperatureScaling, {}),
}
_STRETCHED = (
    "Every map reaches exactly 0 and 1, be it by rounding to 8 bits or because the maps were "
    "stretched to [0, 1] image by image, as in the evaluation of saliency. Stretched maps have "
    "another calibration than the network: save what it answers instead."
)


class Tally:
    """Counts ``number`` maps as they come, in fixed memory but for the rows of a table."""

    def __init__(self, number: int, args: argparse.Namespace, images: bool) -> None:
        self.labels, self.logits, self.table = args.labels, args.logits, images and bool(args.csv)
        self.total = CalibrationHistogram(self.labels)
        self.images = ImageHistograms(self.labels) if images else None
        self.rows: list[dict[str, float]] = []
        self.seen = self.stretched = 0
        # Of very many maps, so many neighbours are one image of the intervals.
        self.group = 1 << ((number - 1) // _IMAGES).bit_length()
        self._fresh = ImageHistograms(self.labels)  # images that are not yet grouped
        self._pending: list[Tensor] = []
        self._one: dict[str, Tensor] = {}  # the state of each value and label of an 8-bit map

    def add(self, x: Tensor, y: Tensor) -> None:
        """A map and its mask, with the labels first if there are any."""
        x, y = (one.reshape(self.labels or 1, -1) for one in (x, y))
        low, high = x.aminmax()
        top = 255 if x.dtype == torch.uint8 else 1
        self.stretched += not self.logits and bool((low == 0) & (high == top))
        self.seen += 1
        if x.dtype != torch.uint8:
            self.flush()
            self._count(x[None], y[None], None)
            return
        # An 8-bit map has 256 values and two labels: 512 counts say all of it.
        code = x.to(torch.int64).add_(y, alpha=256)
        self._pending.append(torch.stack([row.bincount(minlength=512)[:512] for row in code]))
        if len(self._pending) == _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Count the maps that wait."""
        if self._pending:
            weight = torch.stack(self._pending).double()
            self._pending = []
            x = torch.arange(256, dtype=torch.uint8, device="cpu").repeat(2).expand(weight.shape)
            y = (torch.arange(512, device="cpu") >= 256).to(torch.uint8).expand(weight.shape)
            self._count(x, y, weight)

    def _count(self, x: Tensor, y: Tensor, weight: Tensor | None) -> None:
        kept: dict[str, Any] = {"from_logits": self.logits, "ignore_index": files.IGNORED}
        if self.images is not None:
            if weight is None:
                self._fresh.update(x, y, **kept)
            else:
                self._fresh.merge(self._summed(weight.flatten(0, 1)))
            if len(self._fresh) >= max(self.group, _TOGETHER):
                self.gather()
        if weight is not None:
            x, y, weight = x[:1], y[:1], weight.sum(0, keepdim=True)
        self.total.update(x, y, weight=weight, **kept)

    def gather(self) -> None:
        """Write the rows of the images that are new, and add them up by group."""
        if self.images is None or not len(self._fresh):
            return
        self.rows += _rows(self._fresh) if self.table else []
        state, size = {}, self.group * (self.labels or 1)
        for name, part in self._fresh.state_dict().items():
            shape = (-1, self.labels or 1, *part.shape[1:])
            groups = [one.reshape(shape).sum(0) for one in torch.split(part, size)]
            state[name] = torch.cat(groups)
        self._fresh.load_state_dict(state)
        self.images.merge(self._fresh)
        self._fresh = ImageHistograms(self.labels)

    def _summed(self, weight: Tensor) -> ImageHistograms:
        """Images of 8-bit maps: what a histogram sums of each value and label, so many times."""
        if not self._one:
            values, every = ImageHistograms(), torch.arange(512, device="cpu").view(-1, 1, 1)
            values.update((every % 256).to(torch.uint8), every // 256)
            self._one = values.state_dict()
        images, state = ImageHistograms(self.labels), {}
        for name, one in self._one.items():
            flat = one.flatten(1)
            endless = weight @ flat.isinf().double() > 0
            sums = (weight @ flat.masked_fill(flat.isinf(), 0.0)).masked_fill(endless, math.inf)
            state[name] = sums.reshape(-1, *one.shape[1:])
        images.load_state_dict(state)
        return images


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="map", disable=None, leave=False)


def _tally(args: argparse.Namespace, images: bool, more: int = 0) -> tuple[Tally, list[str], Any]:
    """All maps counted, their names, and the bar, which waits for ``more`` steps."""
    pairs = files.pairs(args.predictions, args.masks)
    files.check_sizes(pairs, args.labels, args.resize)
    masks = files.Masks(args.ignore, args.labels)
    tally = Tally(len(pairs), args, images)
    bar = _bar(len(pairs) + more)
    for _, x, y in files.read_all(pairs, masks, args.logits, args.resize):
        tally.add(x, y)
        bar.update()
    tally.flush()
    tally.gather()
    for one, count in enumerate(masks.classes):
        if not count:
            raise ValueError(
                f"{args.masks}: the masks hold no pixel of class {one}, so nothing can be measured"
                + ("; is it what --ignore leaves out?" if args.ignore is not None else "")
            )
    if tally.seen > 1 and tally.stretched == tally.seen:
        warnings.warn(_STRETCHED, stacklevel=1)
    return tally, [pair.name for pair in pairs], bar


# -- the commands


def _measure(args: argparse.Namespace) -> None:
    if args.plot:
        importlib.import_module("matplotlib")  # not missed at the end
    for path in (args.plot, args.json, args.csv):
        _writable(path)
    labels = range(args.labels or 1)
    tally, names, bar = _tally(args, True, len(labels) * len(_INTERVALS))
    every = cast(ImageHistograms, tally.images)
    intervals: list[dict[str, list[float]]] = []
    for label in labels:
        one = every if args.labels is None else every.label(label)
        intervals.append({})
        for measure in _INTERVALS if len(names) > 1 else ():
            intervals[-1][measure] = list(one.interval(measure, resamples=_DRAWS))
            bar.update()
    bar.close()
    print(f"{len(names)} maps\n{tally.total.summary()}")
    _print_intervals(intervals, args.labels is not None)
    if args.csv:
        _write_csv(args.csv, names, tally.rows, args.labels)
    if args.json:
        kept = {
            "maps": len(names), "stretched": tally.seen > 1 and tally.stretched == tally.seen,
            "measures": tally.total.to_dict(),
            "intervals": intervals[0] if args.labels is None else intervals,
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(_plain(kept), indent=1) + "\n", "utf-8")
    if args.plot:
        _plot(args.plot, tally.total)


def _print_intervals(intervals: list[dict[str, list[float]]], named: bool) -> None:
    if not intervals[0]:
        print("One map: pass several for intervals.")
        return
    print("95 % intervals, if the maps were drawn anew:")
    for label, measures in enumerate(intervals):
        for measure, (value, low, high) in measures.items():
            title = f"label {label} {measure}" if named else measure
            known = f"[{low:.4f}, {high:.4f}]" if low == low else "no interval"
            print(f"  {title:<18}{value:>12.4f}  {known}")


def _rows(part: ImageHistograms) -> list[dict[str, float]]:
    """The measures of each image, label by label."""
    columns = {name: value.reshape(-1).tolist() for name, value in part.per_image().items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _write_csv(
    path: str, names: list[str], rows: list[dict[str, float]], labels: int | None
) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *(["label"] if labels else []), *rows[0]])
        for i, row in enumerate(rows):
            image, label = divmod(i, labels or 1)
            values = [int(v) if k == "count" else f"{v:.8g}" for k, v in row.items()]
            writer.writerow([names[image], *([label] if labels else []), *values])


def _plain(value: Any) -> Any:
    """What JSON can say: nan is null, an infinite number a string."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if value != value else str(value)
    return value


def _plot(path: str, total: CalibrationHistogram) -> None:
    from .plot import reliability_diagram

    labels = range(total.num_labels or 0)
    shown: Any = {f"label {i}": total.label(i) for i in labels} or total
    reliability_diagram(shown, kind="positive_class").savefig(path)


def _repair(args: argparse.Namespace) -> None:
    _writable(args.output)
    tally, _, bar = _tally(args, False)
    bar.close()
    build, settings = _KINDS[args.kind]
    settings = {**settings, "num_labels": args.labels}
    repair = build(**settings).fit(tally.total)
    kept = {"repair": build.__name__, "settings": settings, "state": repair.state_dict()}
    torch.save(kept, args.output)
    print(repair)


def load(path: str) -> IsotonicCalibration | TemperatureScaling:
    """The repair of a file that `sc-bce repair` wrote."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; write it with `sc-bce repair`")
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        build = {one.__name__: one for one, _ in _KINDS.values()}[kept["repair"]]
        repair: IsotonicCalibration | TemperatureScaling = build(**kept["settings"])
        repair.load_state_dict(kept["state"])
    except Exception as error:
        raise ValueError(
            f"{path}: is no repair that `sc-bce repair` of this version wrote"
        ) from error
    return repair


def _apply(args: argparse.Namespace) -> None:
    repair = load(args.repair)
    logits = repair.takes_logits
    found = files.find(args.predictions)
    for path in found.values():
        files.check_labels(path, files.size_of(path), repair.num_labels)
    with _bar(len(found)) as bar, torch.no_grad():
        for name, path in found.items():
            x = files.read_map(path, repair.num_labels, logits)
            answer = repair(x if repair.num_labels is None else x[None]).reshape(x.shape)
            picture = path.suffix.lower() in files.IMAGES
            files.write_map(Path(args.output) / name, answer, picture)
            bar.update()
    print(f"{len(found)} maps written to {args.output}")


def _onnx(args: argparse.Namespace) -> None:
    import onnx

    from .integrations.onnx import append, check

    importlib.import_module("onnxruntime")
    _writable(args.output_file)
    repair = load(args.repair)
    try:
        model = onnx.load(args.model)
    except Exception as error:
        raise ValueError(f"{args.model}: is no ONNX file ({error})") from error
    made = append(model, repair, output=args.output)
    difference = check(model, made, repair, output=args.output)
    onnx.save(made, args.output_file)
    print(f"onnxruntime answers as torch does; largest difference {difference:.1g}")


# -- arguments


def _writable(path: str | None) -> None:
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; make it first")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", help="folder, glob or file of maps (png, tif, npy, npz, pt)")
    parser.add_argument("masks", help="folder, glob or file of masks: 0 and 1, or 0 and 255")
    parser.add_argument(
        "--ignore", type=float, metavar="VALUE", help="value of a mask to leave out"
    )
    parser.add_argument(
        "--labels", type=int, metavar="C",
        help="number of maps in the first dimension; masks likewise, or of class numbers",
    )  # fmt: skip
    parser.add_argument("--logits", action="store_true", help="floats are logits")
    parser.add_argument("--resize", action="store_true", help="make maps as large as their masks")
    parser.epilog = f"{files.LAYOUT}\n{parser.epilog}"


def _command(some: Any, name: str, run: Any, text: str, *examples: str) -> argparse.ArgumentParser:
    lines = "\n".join(f"  sc-bce {name} {example}" for example in examples)
    parser: argparse.ArgumentParser = some.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"examples:\n{lines}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "sc-bce", description="Measure and repair the calibration of maps of probabilities."
    )
    some = parser.add_subparsers(required=True, metavar="COMMAND")
    one = _command(
        some, "measure", _measure, "measure the calibration of maps against their masks",
        "maps/ masks/ --plot reliability.png --csv maps.csv",
        "'maps/*.npy' masks/ --labels 21 --ignore 255 --json measures.json",
    )  # fmt: skip
    _data(one)
    one.add_argument("--plot", metavar="FILE", help="reliability diagram, of any matplotlib format")
    one.add_argument("--json", metavar="FILE", help="every measure, and the intervals")
    one.add_argument("--csv", metavar="FILE", help="every measure of each map (and label)")
    one = _command(
        some, "repair", _repair, "fit a repair to maps and masks of validation images",
        "maps/ masks/ -o repair.pt", "logits/ masks/ --logits --kind affine -o repair.pt",
    )  # fmt: skip
    _data(one)
    one.add_argument("-o", "--output", required=True, metavar="FILE", help="file of the repair")
    one.add_argument("--kind", choices=_KINDS, default="affine", help="default: affine")
    one = _command(
        some, "apply", _apply,
        "repair maps; pictures become 16-bit PNG, everything else .npy",
        "repair.pt maps/ -o repaired/", "repair.pt 'maps/**/*.npy' -o repaired/",
    )  # fmt: skip
    one.add_argument("repair", help="what `sc-bce repair` wrote")
    one.add_argument(
        "predictions", help="folder, glob or file of maps, as the repair was fitted to"
    )
    one.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to write")
    one = _command(
        some, "onnx", _onnx, "append a repair to an ONNX model",
        "model.onnx repair.pt -o calibrated.onnx",
        "model.onnx repair.pt -o calibrated.onnx --output logits",
    )  # fmt: skip
    one.add_argument("model", help="ONNX file")
    one.add_argument("repair", help="what `sc-bce repair` wrote")
    one.add_argument("-o", dest="output_file", required=True, metavar="FILE", help="new ONNX file")
    one.add_argument("--output", metavar="NAME", help="output to repair; default: the only one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 2 if it was refused, with the reason on stderr."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)  # maps are small: threads would wait for each other
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            args.run(args)
            problem = ""
        except ImportError as error:
            extra = "onnx" if args.run is _onnx else "cli"
            problem = f"{error}; pip install {_NEEDS[extra]}"
        except (ValueError, TypeError, IndexError, OSError) as error:
            problem = str(error)
    for text in dict.fromkeys(str(one.message) for one in said if one.category is UserWarning):
        print(f"sc-bce: note: {text}", file=sys.stderr)
    if problem:
        print(f"sc-bce: error: {problem}", file=sys.stderr)
    return 2 if problem else 0


_NEEDS = {"cli": "numpy pillow tqdm matplotlib", "onnx": "onnx onnxruntime"}

if __name__ == "__main__":
    sys.exit(main())
