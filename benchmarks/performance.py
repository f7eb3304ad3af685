"""The page about speed and memory, from the JSON that ``speed.py`` has left.

    python benchmarks/performance.py

Writes ``docs/performance.md`` and its picture; the words stand in ``benchmarks/performance.md``.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed import BASELINE, COMPILED, CONTENDERS, KINDS, MODES, SHAPES
from study import COLOURS, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]

HERE = Path(__file__).parent
LARGE, SMALL = SHAPES[:2], SHAPES[2:]
THREADS = 2  # of the targets, the picture and the README
ALL = (*CONTENDERS, *(f"{name}, compiled" for name in COMPILED))
SHOWN = (BASELINE, "smp", "fixed", "sample", "adaptive", "adaptive-focus")  # in the picture


def title(name: str) -> str:
    plain = name.removesuffix(", compiled")
    return CONTENDERS[plain][0] + name.removeprefix(plain)


def ratio(
    result: Result,
    name: str,
    shape: Sequence[int] = SHAPES[0],
    kind: tuple[str, str] = KINDS[0],
    mode: str = MODES[0],
    threads: int = THREADS,
) -> float | None:
    """Time over that of eager BCE in the same case; none where it was not measured."""
    wanted = {
        "contender": name,
        "shape": list(shape),
        "dtype": kind[0],
        "target": kind[1],
        "mode": mode,
        "threads": threads,
    }
    for record in result["times"]:
        if wanted.items() <= record.items():
            return float(record["ratio"])
    return None


def memory(result: Result, name: str, kind: tuple[str, str]) -> Result:
    (found,) = (
        record
        for record in result["memory"]
        if (record["contender"], record["dtype"], record["target"]) == (name, *kind)
    )
    return dict(found)


def histogram_gain(result: Result, threads: int = THREADS) -> float:
    (found,) = (row for row in result["histogram"] if row["threads"] == threads)
    return float(found["torchmetrics"]["median_ms"] / found["ours"]["median_ms"])


# ---------------------------------------------------------------- tables


def about(result: Result) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['date']}; {packages}; {result['machine']} with {result['instructions']}, "
        f"{result['cores']} cores."
    )


def targets(result: Result) -> str:
    def timed(name: str, kind: tuple[str, str] = KINDS[0]) -> float:
        found = ratio(result, name, kind=kind)
        if found is None:
            raise ValueError(f"speed.json lacks {name} with {kind}: run speed.py in full")
        return found

    mask = KINDS[1]
    compiled, plain_compiled = timed("fixed, compiled"), timed(f"{BASELINE}, compiled")
    saved = memory(result, "fixed", mask)["saved_bytes_per_element"]
    peak, plain_peak = (
        memory(result, name, KINDS[0])["peak_bytes_per_element"] for name in ("fixed", BASELINE)
    )
    rows: list[tuple[str, float, float, float | None]] = [  # measured, asked, hoped for
        ("fixed level, eager", timed("fixed"), 1.0, 0.7),
        ("fixed level, eager, bool mask", timed("fixed", mask), 0.9, 0.6),
        ("fixed level, compiled", compiled, 0.6, 0.4),
        ("fixed level, compiled, against compiled BCE", compiled / plain_compiled, 1.0, None),
        ("adaptive step, eager", timed("adaptive"), 1.2, 0.85),
        ("adaptive step, compiled", timed("adaptive, compiled"), 0.75, 0.45),
        ("adaptive step / published step", timed("adaptive") / timed("published"), 1 / 3, 1 / 6),
        ("bytes saved for backward, bool mask", saved, 5.0, None),
        ("peak memory / that of BCE", peak / plain_peak, 1.0, 0.5),
        ("histogram / torchmetrics", 1 / histogram_gain(result), 1 / 10, 1 / 30),
    ]
    table = []
    for name, found, asked, hope in rows:
        met = "yes" if round(found, 2) <= asked else "no"
        if hope is not None and found <= hope:
            met = "yes, as hoped"
        hoped = "" if hope is None else f"{hope:.2f}"
        table.append([name, f"{found:.2f}", f"{asked:.2f}", hoped, met])
    return markdown(["", "measured", "asked, at most", "hoped for", "met"], table)


def summary(result: Result) -> str:
    """The large batch in one table: what README shows."""
    columns = ((KINDS[0], ""), (KINDS[1], ""), (KINDS[0], ", compiled"))
    rows = []
    for name in SHOWN:
        found = [ratio(result, name + suffix, kind=kind) for kind, suffix in columns]
        rows.append([title(name), *("" if value is None else f"{value:.2f}" for value in found)])
    return markdown(["", "float target", "bool mask", "float target, compiled"], rows)


def ratios(shapes: Sequence[Sequence[int]]) -> Callable[[Result], str]:
    """All contenders, one column per number of threads and kind of input."""

    def tables(result: Result) -> str:
        threads = sorted({record["threads"] for record in result["times"]})
        parts = []
        for shape in shapes:
            for mode in MODES:
                columns = [
                    (kind, count)
                    for kind in KINDS
                    for count in threads
                    if ratio(result, BASELINE, shape, kind, mode, count) is not None
                ]
                head = [f"{d} {t}, {c}" for (d, t), c in columns]
                rows = []
                for name in ALL:
                    found = [ratio(result, name, shape, kind, mode, c) for kind, c in columns]
                    if any(value is not None for value in found):
                        cells = ["" if value is None else f"{value:.2f}" for value in found]
                        rows.append([title(name), *cells])
                size = " x ".join(map(str, shape))
                table = markdown(["dtype target, threads", *head], rows)
                parts.append(f"*{size}, {mode}:*\n\n{table}")
        return "\n\n".join(parts)

    return tables


def memories(result: Result) -> str:
    kinds = KINDS[:2]
    head = [f"{what}, {dtype} {target}" for dtype, target in kinds for what in ("saved", "peak")]
    rows = []
    for name in CONTENDERS:
        found = [memory(result, name, kind) for kind in kinds]
        cells = [
            f"{one[f'{what}_bytes_per_element']:.1f}" for one in found for what in ("saved", "peak")
        ]
        rows.append([title(name), *cells])
    return markdown(["", *head], rows)


def histogram(result: Result) -> str:
    rows = [
        [
            str(row["threads"]),
            *(f"{row[name]['median_ms']:.0f} ms" for name in ("ours", "torchmetrics")),
            f"{histogram_gain(result, row['threads']):.1f}",
            *(f"{row[name]['state_bytes']:,}" for name in ("ours", "torchmetrics")),
            f"{row['stream']['pixels']:,} in {row['stream']['seconds']:.0f} s, "
            f"{row['stream']['state_bytes']:,} bytes",
        ]
        for row in result["histogram"]
    ]
    head = ["threads", "ours", "torchmetrics", "times faster", "bytes held", "by torchmetrics"]
    return markdown([*head, "a stream"], rows)


# ---------------------------------------------------------------- picture and page


def figure(result: Result) -> "Figure":
    """Eager and compiled, beside eager BCE."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 3.4), dpi=120, layout="constrained")
    axes = drawing.subplots()
    for place, name in enumerate(reversed(SHOWN)):
        for shift, suffix, colour in ((0.2, "", COLOURS[4]), (-0.2, ", compiled", COLOURS[1])):
            found = ratio(result, name + suffix)
            if found is not None:
                label = suffix.removeprefix(", ") or "eager"
                axes.barh(place + shift, found, 0.38, color=colour, label=label)
                axes.text(found + 0.01, place + shift, f"{found:.2f}", va="center", fontsize=7)
    axes.axvline(1, color="#999999", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(SHOWN)), [title(name) for name in reversed(SHOWN)], fontsize=8)
    axes.set_xlabel("time of forward and backward, eager BCE = 1", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    lines, labels = axes.get_legend_handles_labels()
    kept = dict(zip(labels, lines, strict=True))
    axes.legend(kept.values(), kept.keys(), fontsize=8, frameon=False, loc="center right")
    return drawing


TABLES: dict[str, Callable[[Result], str]] = {
    "about": about,
    "targets": targets,
    "large": ratios(LARGE),
    "small": ratios(SMALL),
    "memory": memories,
    "histogram": histogram,
}


def page(words: str, result: Result, folder: Path) -> str:
    """The words with each ``@name`` line filled in; the picture goes to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)

    def fill(found: re.Match[str]) -> str:
        if found[1] != "figure":
            return TABLES[found[1]](result)
        figure(result).savefig(folder / "speed.png", metadata={"Software": None})
        return f"![Time of a step, beside eager BCE]({folder.name}/speed.png)"

    return re.sub(r"^@([\w-]+)$", fill, words, flags=re.M)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--speed", type=Path, default=HERE / "results/speed.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="default: docs")
    args = parser.parse_args(argv)
    result = json.loads(args.speed.read_text("utf-8"))
    text = page((HERE / "performance.md").read_text("utf-8"), result, args.out / "performance")
    (args.out / "performance.md").write_text(text, "utf-8")
    print(f"written: {args.out / 'performance.md'}")


if __name__ == "__main__":
    main()
