"""The page about speed and memory, from the JSON of ``measure``, ``counted`` and ``table``.

    python -m benchmarks.speed.page

Writes ``docs/performance.md`` and its picture; the words are in ``page.md``.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import fill, table
from benchmarks.speed import counted
from benchmarks.speed.measure import BASELINE, LABELS, SEGMENTATION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
DOCS = HERE.parents[1] / "docs"
THREADS = 2  # of the first screen, the picture and README
COLOURS = {"sample": "#0072B2", "adaptive": "#E69F00"}  # of what is drawn
# Title, case, shape, target, void: what users train on.
SHOWN: tuple[tuple[str, str, tuple[int, ...], str, bool], ...] = (
    ("Segmentation, 32 x 1 x 384 x 384", "segmentation", SEGMENTATION, "float", False),
    ("Segmentation, a bool mask", "segmentation", SEGMENTATION, "bool", False),
    ("Segmentation, a tenth of it ignored", "void", SEGMENTATION, "uint8", True),
    ("11 labels, 32 x 11 x 120 x 160", "labels", LABELS, "float", False),
    ("A table, 8,192 rows a batch", "table", (8192,), "float", False),
    ("A table, 64 rows of 20 labels", "table", (64, 20), "float", False),
    ("Segmentation, all compiled", "compiled", SEGMENTATION, "float", False),
)
SIZES = (64, 4096, 65536, 2**20, 2**26)  # of those that were timed
COLUMNS = {"sample": "fixed level", "adaptive": "adaptive level", "climbing": "published"}


def matching(records: Sequence[Result], **wanted: Any) -> list[Result]:
    return [record for record in records if wanted.items() <= record.items()]


def timed(result: Result, **wanted: Any) -> Result:
    """The one record of this case."""
    wanted = {"dtype": "float32", "threads": THREADS} | wanted
    found = matching(result["times"], **wanted)
    if len(found) != 1:
        raise ValueError(f"Expected one record of {wanted}, but got {len(found)}: run measure.py")
    return found[0]


def shown(result: Result, place: int, name: str) -> Result:
    _, case, shape, target, void = SHOWN[place]
    return timed(result, case=case, shape=list(shape), target=target, void=void, contender=name)


# ---------------------------------------------------------------- tables


def about(result: Result) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['date']}; {packages}; {result['machine']} with {result['instructions']}, "
        f"{result['cores']} cores."
    )


def first(result: Result) -> str:
    rows = []
    for place, (words, *_) in enumerate(SHOWN):
        base = shown(result, place, BASELINE)["median_ms"]
        cells = [f"{shown(result, place, name)['ratio']:.2f}" for name in COLUMNS]
        rows.append([words, f"{base:.3g} ms", *cells])
    return table(["", "BCE", *COLUMNS.values()], rows)


def given_back(result: Result) -> str:
    """The first row, if glibc may give memory back."""
    found = {record["contender"]: record for record in result["given_back"]}
    ours = ", ".join(f"{found[n]['median_ms']:.3g} ms ({w})" for n, w in COLUMNS.items())
    return (
        "With glibc's defaults the first row of the table was, in another process on the same day: "
        f"BCE {found[BASELINE]['median_ms']:.3g} ms, {ours}."
    )


def rivals(result: Result) -> str:
    rows = []
    for name in ("smp", "published"):
        each = matching(result["times"], case="rivals", contender=name)
        cells = [f"{record['ratio']:.2f}" for record in each]
        rows.append([result["titles"][name], *cells])
    threads = sorted({record["threads"] for record in result["times"]})
    return table(["", *(f"{count} threads" for count in threads)], rows)


def sizes(result: Result) -> str:
    """Time over BCE's."""
    names = list(dict.fromkeys(record["loss"] for record in result["sizes"]))
    rows = []
    for count in SIZES:
        cells = []
        for name in names:
            (found,) = matching(result["sizes"], loss=name, elements=count, threads=THREADS)
            cells.append(f"{found['of_bce']:.2f}")
        rows.append([f"{count:,}", *cells])
    return table(["elements", *names], rows)


def launches(_: Result) -> str:
    """Of the JSON of ``counted.py``."""
    found = json.loads(counted.OUT.read_text("utf-8"))
    return f"{counted.shown(found['rows'])}\n\nCounted with torch {found['versions']['torch']}."


def histogram(result: Result) -> str:
    rows = [
        [
            str(row["threads"]),
            *(f"{row[name]['median_ms']:.0f} ms" for name in ("ours", "torchmetrics")),
            f"{row['ours']['median_ms'] / row['torchmetrics']['median_ms']:.2f}",
            *(f"{row[name]['state_bytes']:,}" for name in ("ours", "torchmetrics")),
        ]
        for row in result["histogram"]
    ]
    head = ["threads", "ours", "torchmetrics", "ratio", "bytes held", "by torchmetrics"]
    return table(head, rows)


def scale(_: Result) -> str:
    """Of the JSON of ``table.py``, in words."""
    found = json.loads((RESULTS / "scale.json").read_text("utf-8"))
    ratios = [record["ratio"] for record in found["steps"]]
    row = max(found["epoch"], key=lambda record: float(record["bytes_per_row"]))
    merge = found["merge"]
    return (
        f"A step with a table of {found['rows']:,} samples and shuffled batches of 256 takes "
        f"{min(ratios):.2f} to {max(ratios):.2f} times as long as with {min(1000, found['rows']):,}"
        f" samples. With focus a sample takes {row['bytes_per_row']:.0f} bytes; `step` took "
        f"{row['step_seconds']:.1f} s, and {merge['seconds']:.0f} s between two gloo processes "
        f"({merge['reduced_bytes_per_process'] / 1e9:.1f} GB reduced by each). "
        "`python -m benchmarks.speed.table` makes these figures."
    )


# ---------------------------------------------------------------- picture and page


def figure(result: Result) -> "Figure":
    """The first screen, drawn for a phone: what is timed stands above its bars."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.4, 5.2), dpi=180, layout="constrained")
    axes = drawing.subplots()
    for place, (words, *_) in enumerate(reversed(SHOWN)):
        axes.text(0, place + 0.42, words, va="center", fontsize=8.5)
    for shift, (name, colour) in zip((0.14, -0.14), COLOURS.items(), strict=True):
        for row, place in enumerate(reversed(range(len(SHOWN)))):
            found = shown(result, place, name)["ratio"]
            axes.barh(row + shift, found, 0.26, color=colour, label=COLUMNS[name])
            clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # of the line at 1
            axes.text(
                found + 0.04, row + shift, f"{found:.2f}", va="center", fontsize=8, bbox=clear
            )
    axes.axvline(1, color="#999999", linewidth=1, linestyle="--", zorder=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.5, len(SHOWN) - 0.3)
    axes.set_xlabel("time of forward and backward, BCE = 1", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    lines, labels = axes.get_legend_handles_labels()
    kept = dict(zip(labels, lines, strict=True))
    axes.legend(kept.values(), kept.keys(), fontsize=8, frameon=False, loc="lower right")
    return drawing


TABLES: dict[str, Callable[[Result], str]] = {
    "about": about,
    "first": first,
    "given-back": given_back,
    "rivals": rivals,
    "sizes": sizes,
    "counted": launches,
    "scale": scale,
    "histogram": histogram,
}


def page(words: str, result: Result, folder: Path) -> str:
    """The words with each ``@name`` line filled in; the picture goes to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)

    def drawn() -> str:
        figure(result).savefig(folder / "speed.png", metadata={"Software": None})
        return f"![Time of a step, beside BCE]({folder.name}/speed.png)"

    parts: dict[str, Callable[[], str]] = {n: partial(make, result) for n, make in TABLES.items()}
    return fill(words, parts | {"figure": drawn})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--speed", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--out", type=Path, default=DOCS, help="default: docs")
    args = parser.parse_args(argv)
    result = json.loads(args.speed.read_text("utf-8"))
    text = page((HERE / "page.md").read_text("utf-8"), result, args.out / "performance")
    (args.out / "performance.md").write_text(text, "utf-8")
    print(f"written: {args.out / 'performance.md'}")


if __name__ == "__main__":
    main()
