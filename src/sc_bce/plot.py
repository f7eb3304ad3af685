"""The reliability diagram. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from . import _errors
from ._errors import refuse
from .measure import CalibrationHistogram
from .measure.scores import isotonic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["reliability_diagram"]

# Okabe and Ito's palette, which colour-blind readers can distinguish; hatching for print in grey.
_LINE = "#444444"
_CURVE = "#D55E00"
_BAR: dict[str, Any] = {"facecolor": "#0072B2", "edgecolor": "white"}
_SHORT: dict[str, Any] = {"facecolor": "#F3CF80", "edgecolor": "#E69F00", "hatch": "//"}
_OVER: dict[str, Any] = {"facecolor": "#A9D9F5", "edgecolor": "#0072B2", "hatch": "\\\\"}


def reliability_diagram(
    histogram: CalibrationHistogram | Mapping[str, CalibrationHistogram],
    *,
    num_bins: int = 10,
    kind: str = "top_label",
    ax: Axes | None = None,
) -> Figure:
    """Draw a reliability diagram: accuracy against confidence, with the counts of elements below.

    The gap between confidence and accuracy is shaded. With ``kind="positive_class"`` a line shows
    the isotonic curve, the share of positives that :class:`IsotonicCalibration` would predict,
    which needs no bins.

    Args:
        histogram: one histogram, or a mapping of several by the title of each panel.
        num_bins: number of equal-width bins over [0, 1]. Default: 10.
        kind: ``"top_label"`` (shown from 0.5 on) or ``"positive_class"``. Default:
            ``"top_label"``.
        ax: matplotlib axes for one histogram, drawn without the counts and the legend; limits and
            labels are set, the title is not. Default: None, a new figure.

    Returns:
        A matplotlib ``Figure``: the figure of ``ax``, or a new one that pyplot does not manage.
        Save it with ``figure.savefig(path)``.

    Raises:
        TypeError: not a histogram, or a mapping of them.
        ValueError: there is no histogram, or several for one ``ax``; a histogram has several
            labels; ``kind`` is unknown.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from sc_bce import CalibrationHistogram
        >>> from sc_bce.plot import reliability_diagram
        >>> histogram = CalibrationHistogram()
        >>> histogram.update(torch.randn(1000), torch.rand(1000) > 0.5)
        >>> figure = reliability_diagram({"untrained": histogram})
        >>> figure.axes[0].get_title()
        'untrained'
    """
    named = histogram if isinstance(histogram, Mapping) else {"": histogram}
    _check_histograms(named, ax)
    measured = "accuracy" if kind == "top_label" else "share of positives"
    if ax is not None:
        _panel(ax, next(iter(named.values())), num_bins, kind)
        ax.set(xlabel="confidence", ylabel=measured)
        return cast("Figure", ax.get_figure(root=True))
    return _figure(named, num_bins, kind, measured)


def _figure(
    named: Mapping[str, CalibrationHistogram], num_bins: int, kind: str, measured: str
) -> Figure:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("reliability_diagram needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(0.6 + 2.9 * len(named), 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(
        2, len(named), sharex="all", sharey="row", squeeze=False, height_ratios=[4, 1]
    )
    figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr,call-arg]
    for column, (name, one) in enumerate(named.items()):
        _counts(axes[1, column], num_bins, *_panel(axes[0, column], one, num_bins, kind))
        axes[0, column].set_title(textwrap.fill(name, 26))
        axes[1, column].set_xlabel("confidence")
    axes[0, 0].set_ylabel(measured)
    axes[1, 0].set_ylabel("elements")
    styles = {measured: _BAR, "confidence above it": _SHORT, "confidence below it": _OVER}
    if kind == "positive_class":
        styles["isotonic curve"] = {"color": _CURVE}
    figure.legend(
        handles=[Patch(label=name, **style) for name, style in styles.items()],
        loc="outside upper center", ncols=min(len(styles), 1 + len(named)), fontsize="small",
        frameon=False,
    )  # fmt: skip
    return figure


def _check_histograms(named: Mapping[str, object], ax: Axes | None) -> None:
    if not named or (ax is not None and len(named) > 1):
        wanted = "hold one histogram" + (" for one `ax`" if named else " or more")
        refuse("histogram", wanted, len(named) or "none", "call once for each axes" * bool(named))
    for one in named.values():
        if not isinstance(one, CalibrationHistogram):
            wanted = "be a CalibrationHistogram or a mapping of names to them"
            remedy = "pass {name: histogram} for several"
            refuse("histogram", wanted, _errors.describe(one), remedy, TypeError)
        if one.num_labels is not None:
            remedy = "pass {name: histogram.label(i)} for some, or `histogram.pooled()`"
            refuse("histogram", "be of one label", f"num_labels={one.num_labels}", remedy)


def _panel(ax: Axes, histogram: CalibrationHistogram, num_bins: int, kind: str) -> tuple[Any, Any]:
    """Draw the bars; return left edge and count of the bins with elements."""
    table = histogram.reliability(num_bins, kind)
    filled = table.count.cpu() > 0
    parts = (table.edges[:-1], table.count, table.confidence, table.accuracy)
    left, count, confidence, accuracy = (part.cpu()[filled].numpy() for part in parts)
    gap = confidence - accuracy
    bars: dict[str, Any] = {"width": 1 / num_bins, "align": "edge", "linewidth": 0.6}
    ax.bar(left, accuracy, **_BAR, **bars)
    ax.bar(left, gap.clip(min=0), bottom=accuracy, **_SHORT, **bars)
    ax.bar(left, gap.clip(max=0), bottom=accuracy, **_OVER, **bars)
    ax.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=_LINE)
    if kind == "positive_class" and len(left):
        ax.plot(*_isotonic_curve(histogram), linewidth=1.4, color=_CURVE)
    ax.set(xlim=(0.5 if kind == "top_label" else 0.0, 1), ylim=(0, 1))
    ece, oe = float(histogram.ece(num_bins, kind)), float(histogram.oe(num_bins, kind))
    ax.text(
        0.97, 0.04, f"ECE {ece:.3f}\nOE {oe:.3f}", transform=ax.transAxes, ha="right", va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    return left, count


def _isotonic_curve(histogram: CalibrationHistogram) -> tuple[list[float], list[float]]:
    """Predicted probability and isotonic share of positives, for each cell with elements."""
    (cells,) = histogram.cells()
    first, count, positive = isotonic(cells.count, cells.positive)
    filled = torch.nonzero(cells.count > 0).flatten()
    owner = torch.searchsorted(torch.tensor(first, device="cpu"), filled, right=True) - 1
    shares = [k / n for k, n in zip(positive, count, strict=True)]
    return torch.sigmoid(cells.logit[filled]).tolist(), [shares[block] for block in owner.tolist()]


def _counts(ax: Axes, num_bins: int, left: Any, count: Any) -> None:
    shown: dict[str, Any] = {"linewidth": 0.6, "color": "#999999", "edgecolor": "white"}
    ax.bar(left, count, width=1 / num_bins, align="edge", **shown)
    # Logarithmic: in dense prediction nearly all elements are in the last bin. From below one
    # element, so that a single one is visible, to twice the largest count.
    ax.set_yscale("log")
    ax.set_ylim(0.7, max(ax.get_ylim()[1], 2 * count.max(initial=0.4)))
    ax.spines[["top", "right"]].set_visible(False)
