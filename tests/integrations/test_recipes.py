"""The page of recipes for skorch, ignite and fastai, each run where its package is installed."""

import re

import pytest
import torch
from test_docs import ROOT, blocks
from torch import nn

PAGE = ROOT / "docs" / "guide" / "skorch.md"
pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks: their own use of torch


def run(section, folder, monkeypatch):
    """What the first block of the page and those of a section leave behind."""
    pytest.importorskip(section)
    monkeypatch.chdir(folder)
    parts = re.split(r"^## (\w+)$", PAGE.read_text("utf-8"), flags=re.M)
    text = parts[0] + parts[parts.index(section) + 1]
    codes = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.M)
    assert 2 <= len(codes) < len(blocks(PAGE, "python"))
    names = {"__name__": "page"}
    for code in codes:
        exec(compile(code, f"{PAGE.name}, {section}", "exec"), names)
    return names


def told(criterion, steps, rows):
    """It was stepped after each epoch, and these rows were trained."""
    state = criterion.state_dict()
    assert state["steps"] == steps
    assert state["visited"].count_nonzero() == rows


def test_skorch(tmp_path, monkeypatch):
    page = run("skorch", tmp_path, monkeypatch)
    net, x = page["net"], page["x"].numpy()
    for one in (net, page["per_sample"]):
        with torch.no_grad():
            p = one.module_.eval()(page["x"]).sigmoid()
        said = torch.as_tensor(one.predict_proba(x))
        torch.testing.assert_close(said, torch.stack([1 - p, p], 1))
        assert one.predict(x).tolist() == (p > 0.5).int().tolist()
    assert net.criterion_.state_dict()["steps"] == 4
    told(page["per_sample"].criterion_, 4, 96 - 20)  # a fifth of each class validates
    from sklearn.model_selection import cross_val_score

    scores = cross_val_score(net, x, page["y"].numpy(), cv=2, scoring="neg_log_loss")
    assert (scores > -2).all()


def test_without_the_map_skorch_returns_logits():
    skorch = pytest.importorskip("skorch")

    class Other(nn.Module):
        forward = staticmethod(nn.functional.binary_cross_entropy_with_logits)

    net = skorch.NeuralNetBinaryClassifier(lambda: nn.Linear(8, 1), criterion=Other).initialize()
    x = torch.randn(5, 8)
    assert torch.equal(torch.as_tensor(net.predict_proba(x)), net.module_(x).detach()[:, 0])


def test_ignite(tmp_path, monkeypatch):
    page = run("ignite", tmp_path, monkeypatch)
    told(page["criterion"], 4, 64)
    (saved,) = (tmp_path / "ignite").iterdir()
    state = torch.load(saved, weights_only=True)["criterion"]
    assert torch.equal(state["alpha"], page["criterion"].alpha)


def test_fastai(tmp_path, monkeypatch):
    page = run("fastai", tmp_path, monkeypatch)
    told(page["learn"].loss_func, 4, 64)
    p, _ = page["learn"].get_preds(act=torch.sigmoid)
    assert ((p > 0) & (p < 1)).all()
    told(page["learn"].loss_func, 4, 64)
