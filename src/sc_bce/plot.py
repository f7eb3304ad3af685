"""The reliability diagram. Needs matplotlib: `pip install sc-bce[plot]`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import _checks
from .histogram import CalibrationHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["reliability_diagram"]

# Okabe and Ito's palette, told apart by colour-blind readers too; hatching tells it in grey.
_LINE = "#444444"
_BAR: dict[str, Any] = {"facecolor": "#0072B2", "edgecolor": "white"}
_ABOVE: dict[str, Any] = {"facecolor": "#F3CF80", "edgecolor": "#E69F00", "hatch": "//"}
_BELOW: dict[str, Any] = {"facecolor": "#A9D9F5", "edgecolor": "#0072B2", "hatch": "\\\\"}


def reliability_diagram(
    histogram: CalibrationHistogram | Mapping[str, CalibrationHistogram],
    *,
    num_bins: int = 10,
    kind: str = "top_label",
) -> Figure:
    """Draw accuracy against confidence, the gap shaded, with the counts of elements below.

    Args:
        histogram: one histogram, or several by the name to be written above each.
        num_bins: equal-width bins over [0, 1]. Default: 10.
        kind: ``"top_label"`` (shown from 0.5 on) or ``"positive_class"``. Default:
            ``"top_label"``.

    Returns:
        A matplotlib ``Figure``, registered with no global state: ``figure.savefig(path)``.

    Raises:
        TypeError: not a histogram, or a mapping of them.
        ValueError: no histogram; an unknown ``kind``.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from sc_bce import CalibrationHistogram
        >>> from sc_bce.plot import reliability_diagram
        >>> histogram = CalibrationHistogram()
        >>> histogram.update(torch.randn(1000), torch.rand(1000) > 0.5)
        >>> figure = reliability_diagram({"untrained": histogram})
        >>> [axes.get_title() for axes in figure.axes[:1]]
        ['untrained']
    """
    named = histogram if isinstance(histogram, Mapping) else {"": histogram}
    _checks.histograms(named, CalibrationHistogram)
    _checks.choice("kind", kind, ("top_label", "positive_class"))
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("reliability_diagram needs: pip install sc-bce[plot]") from error
    figure = Figure(figsize=(0.6 + 2.9 * len(named), 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(
        2, len(named), sharex="all", sharey="row", squeeze=False, height_ratios=[4, 1]
    )
    figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr,call-arg]
    for column, (name, one) in enumerate(named.items()):
        _draw(axes[0, column], axes[1, column], one, num_bins, kind)
        axes[0, column].set_title(textwrap.fill(name, 26))
        axes[1, column].set_xlabel("confidence")
    measured = "accuracy" if kind == "top_label" else "share of positives"
    axes[0, 0].set_ylabel(measured)
    axes[1, 0].set_ylabel("elements")
    figure.legend(
        [Patch(**_BAR), Patch(**_ABOVE), Patch(**_BELOW)],
        [measured, "confidence above it", "confidence below it"],
        loc="outside upper center", ncols=min(3, 1 + len(named)), fontsize="small", frameon=False,
    )  # fmt: skip
    return figure


def _draw(
    above: Axes, below: Axes, histogram: CalibrationHistogram, num_bins: int, kind: str
) -> None:
    table = histogram.reliability(num_bins, kind)
    count, edges = table.count.tolist(), table.edges.tolist()
    filled = [m for m in range(num_bins) if count[m] > 0]
    lefts = [edges[m] for m in filled]
    accuracy = [float(table.accuracy[m]) for m in filled]
    gap = [float(table.confidence[m]) - float(table.accuracy[m]) for m in filled]
    bars: dict[str, Any] = {"width": 1 / num_bins, "align": "edge", "linewidth": 0.6}
    above.bar(lefts, accuracy, **_BAR, **bars)
    above.bar(lefts, [max(g, 0) for g in gap], bottom=accuracy, **_ABOVE, **bars)
    above.bar(lefts, [min(g, 0) for g in gap], bottom=accuracy, **_BELOW, **bars)
    above.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=_LINE)
    low = 0.5 if kind == "top_label" else 0.0
    above.set(xlim=(low, 1), ylim=(0, 1))
    above.text(
        0.97, 0.04,
        f"ECE {float(histogram.ece(num_bins, kind)):.3f}\n"
        f"OE {float(histogram.oe(num_bins, kind)):.3f}",
        transform=above.transAxes, ha="right", va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
    )  # fmt: skip
    # In the logarithm: of a dense prediction nearly all elements are in the last bin.
    below.bar(lefts, [count[m] for m in filled], color="#999999", edgecolor="white", **bars)
    below.set_yscale("log")
    below.set_ylim(0.7, max(below.get_ylim()[1], 2 * max(count)))
    for one in (above, below):
        one.spines[["top", "right"]].set_visible(False)
