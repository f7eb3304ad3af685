"""The reliability diagram. Needs matplotlib: `pip install sc-bce[plot]`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from . import _checks
from .measure import scores as measures
from .measure.histogram import CalibrationHistogram
from .measure.scores import Reliability

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
    _check_histograms(named)
    _checks.choice("kind", kind, ("top_label", "positive_class"))
    figure_class, patch = _matplotlib()
    measured = "accuracy" if kind == "top_label" else "share of positives"
    if ax is not None:
        return _into(ax, named, num_bins, kind, measured)
    figure: Figure = figure_class(
        figsize=(0.6 + 2.9 * len(named), 4.2), dpi=150, layout="constrained"
    )
    axes = figure.subplots(
        2, len(named), sharex="all", sharey="row", squeeze=False, height_ratios=[4, 1]
    )
    figure.get_layout_engine().set(wspace=0.08)  # type: ignore[union-attr,call-arg]
    for column, (name, one) in enumerate(named.items()):
        _panel(axes[0, column], one, num_bins, kind)
        _counts(axes[1, column], one, num_bins, kind)
        axes[0, column].set_title(textwrap.fill(name, 26))
        axes[1, column].set_xlabel("confidence")
    axes[0, 0].set_ylabel(measured)
    axes[1, 0].set_ylabel("elements")
    entries = {
        measured: patch(**_BAR),
        "confidence above it": patch(**_SHORT),
        "confidence below it": patch(**_OVER),
    }
    if kind == "positive_class":
        entries["isotonic curve"] = patch(color=_CURVE)
    columns = min(len(entries), 1 + len(named))
    figure.legend(
        list(entries.values()), list(entries), loc="outside upper center", ncols=columns,
        fontsize="small", frameon=False,
    )  # fmt: skip
    return figure


def _check_histograms(named: Mapping[str, object]) -> None:
    if not named:
        raise ValueError("Expected argument `histogram` to hold a histogram, but got none")
    for one in named.values():
        if not isinstance(one, CalibrationHistogram):
            raise TypeError(
                _checks.sentence(
                    "histogram",
                    "be a CalibrationHistogram or a mapping of names to them",
                    _checks.describe(one),
                    "pass {name: histogram} for several",
                )
            )
        if one.num_labels is not None:
            raise ValueError(
                _checks.sentence(
                    "histogram",
                    "be of one label",
                    f"num_labels={one.num_labels}",
                    "pass {name: histogram.label(i)} for some, or `histogram.pooled()`",
                )
            )


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("reliability_diagram needs: pip install sc-bce[plot]") from error
    return Figure, Patch


def _into(
    ax: Axes, named: Mapping[str, CalibrationHistogram], num_bins: int, kind: str, measured: str
) -> Figure:
    if len(named) > 1:
        raise ValueError(
            _checks.sentence(
                "histogram", "be one for one `ax`", f"{len(named)}", "call once for each axes"
            )
        )
    for one in named.values():
        _panel(ax, one, num_bins, kind)
    ax.set(xlabel="confidence", ylabel=measured)
    return cast("Figure", ax.get_figure(root=True))


def _bars(table: Reliability) -> tuple[list[int], list[float]]:
    """The bins that are not empty, and their left edges."""
    filled = [m for m, count in enumerate(table.count.tolist()) if count > 0]
    return filled, [float(table.edges[m]) for m in filled]


def _panel(ax: Axes, histogram: CalibrationHistogram, num_bins: int, kind: str) -> None:
    table = histogram.reliability(num_bins, kind)
    filled, lefts = _bars(table)
    accuracy = [float(table.accuracy[m]) for m in filled]
    gap = [float(table.confidence[m]) - float(table.accuracy[m]) for m in filled]
    bars: dict[str, Any] = {"width": 1 / num_bins, "align": "edge", "linewidth": 0.6}
    ax.bar(lefts, accuracy, **_BAR, **bars)
    ax.bar(lefts, [max(g, 0) for g in gap], bottom=accuracy, **_SHORT, **bars)
    ax.bar(lefts, [min(g, 0) for g in gap], bottom=accuracy, **_OVER, **bars)
    ax.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=_LINE)
    if kind == "positive_class" and filled:
        ax.plot(*_isotonic_curve(histogram), linewidth=1.4, color=_CURVE)
    ax.set(xlim=(0.5 if kind == "top_label" else 0.0, 1), ylim=(0, 1))
    ax.text(
        0.97, 0.04,
        f"ECE {float(histogram.ece(num_bins, kind)):.3f}\n"
        f"OE {float(histogram.oe(num_bins, kind)):.3f}",
        transform=ax.transAxes, ha="right", va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)


def _isotonic_curve(histogram: CalibrationHistogram) -> tuple[list[float], list[float]]:
    """Predicted probability and isotonic share of positives, for each cell with elements."""
    (cells,) = histogram.cells_by_label()
    blocks = measures.isotonic(cells.count, cells.positive)
    filled = torch.nonzero(cells.count > 0).flatten()
    owner = torch.searchsorted(torch.tensor(blocks.first, device="cpu"), filled, right=True) - 1
    shares = [k / n for k, n in zip(blocks.positive, blocks.count, strict=True)]
    share = torch.tensor(shares, device="cpu")
    return torch.sigmoid(cells.logit[filled]).tolist(), share[owner].tolist()


def _counts(ax: Axes, histogram: CalibrationHistogram, num_bins: int, kind: str) -> None:
    table = histogram.reliability(num_bins, kind)
    filled, lefts = _bars(table)
    counts = table.count.tolist()
    ax.bar(
        lefts, [counts[m] for m in filled], width=1 / num_bins, align="edge", linewidth=0.6,
        color="#999999", edgecolor="white",
    )  # fmt: skip
    # Logarithmic: in dense prediction nearly all elements are in the last bin. From below one
    # element, so that a single one is visible, to twice the largest count.
    ax.set_yscale("log")
    ax.set_ylim(0.7, max(ax.get_ylim()[1], 2 * max(counts)))
    ax.spines[["top", "right"]].set_visible(False)
