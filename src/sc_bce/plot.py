"""The reliability diagram. Needs matplotlib: `pip install sc-bce[plot]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import _checks
from .calibration import CalibrationHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["reliability_diagram"]

# Okabe and Ito's palette, told apart by colour-blind readers too; hatching tells it in grey.
_ACCURACY, _GAP, _LINE = "#0072B2", "#E69F00", "#444444"


def reliability_diagram(
    histogram: CalibrationHistogram | Mapping[str, CalibrationHistogram],
    *,
    num_bins: int = 10,
    kind: str = "top_label",
) -> Figure:
    """Draw accuracy against confidence, the gap shaded, with the share of elements below.

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
    except ImportError as error:
        raise ImportError("reliability_diagram needs: pip install sc-bce[plot]") from error
    figure = Figure(figsize=(0.6 + 2.9 * len(named), 3.9), dpi=150, layout="constrained")
    axes = figure.subplots(
        2, len(named), sharex="all", sharey="row", squeeze=False, height_ratios=[4, 1]
    )
    for column, (name, one) in enumerate(named.items()):
        _draw(axes[0, column], axes[1, column], one, num_bins, kind)
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("confidence")
    axes[0, 0].set_ylabel("accuracy" if kind == "top_label" else "share of positives")
    axes[1, 0].set_ylabel("share of\nelements")
    axes[0, 0].legend(loc="upper left", fontsize="small", frameon=False)
    return figure


def _draw(
    above: Axes, below: Axes, histogram: CalibrationHistogram, num_bins: int, kind: str
) -> None:
    table = histogram.reliability(num_bins, kind)
    edges, count = table.edges.tolist(), table.count.tolist()
    total = max(sum(count), 1)
    width = 1 / num_bins
    filled = [m for m in range(num_bins) if count[m] > 0]
    lefts = [edges[m] for m in filled]
    accuracy = [float(table.accuracy[m]) for m in filled]
    gap = [float(table.confidence[m]) - float(table.accuracy[m]) for m in filled]
    bars: dict[str, Any] = {"width": width, "align": "edge", "linewidth": 0.6}
    above.bar(lefts, accuracy, color=_ACCURACY, edgecolor="white", label="accuracy", **bars)
    above.bar(
        lefts, gap, bottom=accuracy, color=_GAP, alpha=0.55, edgecolor=_GAP, hatch="//",
        label="gap to confidence", **bars,
    )  # fmt: skip
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
    shares = [count[m] / total for m in filled]
    below.bar(lefts, shares, color="#999999", edgecolor="white", **bars)
    below.set_ylim(0, 1)
    for one in (above, below):
        one.spines[["top", "right"]].set_visible(False)
