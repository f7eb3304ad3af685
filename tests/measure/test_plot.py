import sys

import pytest
import torch

from sc_bce import CalibrationHistogram
from sc_bce.plot import reliability_diagram


def histogram(scale=2.0, n=2000):
    x = torch.randn(n)
    made = CalibrationHistogram()
    made.update(scale * x, torch.rand(n) < torch.sigmoid(x))
    return made


def bars(axes, container):
    return [(round(bar.get_x(), 6), bar.get_height()) for bar in axes.containers[container]]


def test_bars_are_the_reliability_table():
    one = histogram()
    one.update(torch.full((9,), 0.55), torch.ones(9), from_logits=False)
    figure = reliability_diagram(one, num_bins=10)
    table = one.reliability(10)
    above, below = figure.axes
    accuracy, over, under = (bars(above, i) for i in range(3))
    assert [left for left, _ in accuracy] == [0.5, 0.6, 0.7, 0.8, 0.9]
    for m, (have, more, less, count) in enumerate(
        zip(accuracy, over, under, bars(below, 0), strict=True), start=5
    ):
        gap = float(table.confidence[m] - table.accuracy[m])
        assert have[1] == pytest.approx(float(table.accuracy[m]))
        assert (more[1], less[1]) == pytest.approx((max(gap, 0), min(gap, 0)))
        assert count[1] == int(table.count[m])
    assert above.get_xlim() == (0.5, 1)
    written = above.texts[0].get_text()
    assert written == f"ECE {float(one.ece()):.3f}\nOE {float(one.oe()):.3f}"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["accuracy", "confidence above it", "confidence below it"]


def test_several_models_side_by_side_and_positive_class(tmp_path):
    models = {"plain": histogram(3.0), "smoothed": histogram(1.0), "empty": CalibrationHistogram()}
    figure = reliability_diagram(models, kind="positive_class", num_bins=5)
    assert [axes.get_title() for axes in figure.axes[:3]] == list(models)
    assert figure.axes[0].get_xlim() == (0, 1)
    assert figure.axes[0].get_ylabel() == "share of positives"
    assert len(figure.axes[0].containers[0]) == 5
    assert len(figure.axes[2].containers[0]) == 0
    figure.savefig(tmp_path / "diagram.png")
    assert (tmp_path / "diagram.png").stat().st_size > 10_000


def test_the_isotonic_curve_of_the_positive_class():
    one = histogram(3.0, n=20_000)
    figure = reliability_diagram(one, kind="positive_class")
    assert figure.legends[0].get_texts()[-1].get_text() == "isotonic curve"
    _diagonal, curve = figure.axes[0].lines
    x, y = (torch.from_numpy(part) for part in curve.get_data())
    assert (x.diff() > 0).all()
    assert (y.diff() >= 0).all()
    assert float(y[0]) < 0.2 < 0.8 < float(y[-1])
    # Over-confident: above the diagonal on the left, below it on the right.
    assert float((y - x)[(x > 0.05) & (x < 0.2)].mean()) > 0.05
    assert float((y - x)[(x > 0.8) & (x < 0.95)].mean()) < -0.05
    assert len(reliability_diagram(one).axes[0].lines) == 1


def test_into_axes_of_the_users_figure():
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    left.set_title("mine")
    assert reliability_diagram(histogram(), ax=left) is figure
    assert reliability_diagram({"a": histogram()}, ax=right, kind="positive_class") is figure
    assert len(figure.axes) == 2
    assert left.get_title() == "mine"
    assert (left.get_xlabel(), left.get_ylabel()) == ("confidence", "accuracy")
    assert left.get_xlim() == (0.5, 1)
    assert right.get_ylabel() == "share of positives"
    assert len(left.containers) == 3
    with pytest.raises(ValueError, match="one histogram for one `ax`, but got 2; call once"):
        reliability_diagram({"a": histogram(), "b": histogram()}, ax=left)


def test_no_figure_is_left_in_pyplot():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    reliability_diagram(histogram())
    assert pyplot.get_fignums() == before


def test_errors(monkeypatch):
    with pytest.raises(TypeError, match=r"CalibrationHistogram or a mapping .* got 3"):
        reliability_diagram({"plain": 3})
    with pytest.raises(TypeError, match="but got list"):
        reliability_diagram([histogram()])
    with pytest.raises(ValueError, match=r"be of one label, but got num_labels=2; .*label\(i\)"):
        reliability_diagram(CalibrationHistogram(2))
    with pytest.raises(ValueError, match="to hold one histogram or more, but got none"):
        reliability_diagram({})
    with pytest.raises(ValueError, match="`kind` to be one of"):
        reliability_diagram(histogram(), kind="both")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib$"):
        reliability_diagram(histogram())
