"""What a step asks of an accelerator, counted: no change raises it unseen."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks.speed import counted

# Of torch's BCE, then fixed and drawn, adaptive with one level, adaptive, published. Lower one
# here when a change lowers it; raise one only if what the launch buys is worth it.
MOST = {
    "launches, float mask": [11, 11, 16, 23, 30],
    "launches, bool mask": [12, 12, 17, 23, 32],
    "launches, uint8 mask": [12, 14, 19, 26, 36],
    "launches, uint8 mask, `ignore_index`": [12, 21, 29, 41, 50],
    "launches, bfloat16, bool mask": [12, 16, 21, 27, 36],
    "bytes an element, float mask": [88, 64, 68.1, 82.4, 88.5],
    "kept for backward, bytes an element, bfloat16, bool mask": [2, 2, 2, 2, 2],
}
NAMES = (counted.BASELINE, *counted.LOSSES)


@pytest.fixture(scope="module")
def found():
    return dict(counted.rows())


@pytest.mark.parametrize("title", MOST)
def test_no_step_costs_more_than_it_did(found, title):
    more = {
        name: f"{now:g} for {most:g}"
        for name, now, most in zip(NAMES, found[title], MOST[title], strict=True)
        if now > most
    }
    assert not more, f"{title}: {more}"


def test_every_row_has_its_bound(found):
    assert list(found) == list(MOST)


@pytest.mark.parametrize("title", counted.CASES)
def test_a_small_batch_takes_as_many_launches_as_a_large_one(title, found):
    for shape in counted.SHAPES:
        now = [counted.step(name, counted.CASES[title], shape).launches for name in NAMES]
        assert now == found[title], shape


def test_the_committed_counts_are_these(found):
    kept = json.loads(counted.OUT.read_text("utf-8"))
    if kept["versions"]["torch"] != torch.__version__:
        pytest.skip("they are another torch's")
    assert kept["rows"] == found, "run: python -m benchmarks.speed.counted"


# --- the counter ------------------------------------------------------------------------------


def count(call):
    with counted.Counter() as counter:
        call()
    return counter.launches, counter.bytes


def test_what_computes_is_a_launch_and_moves_its_tensors():
    x = torch.empty(10, 3, device="meta")
    assert count(lambda: x + x[:, :1]) == (1, 4 * (30 + 10 + 30))
    assert count(lambda: x + x[:1].expand(10, 3)) == (1, 4 * (30 + 3 + 30))
    assert count(lambda: x.mul_(2)) == (1, 4 * 60)
    assert count(lambda: torch.zeros_like(x)) == (1, 4 * 30)
    assert count(lambda: x.sum()) == (1, 4 * 31)
    assert count(lambda: (x > 0).to(torch.float32)) == (2, 5 * 30 + 5 * 30)


def test_views_memory_and_tensors_of_a_cpu_are_free():
    x = torch.empty(10, 3, device="meta")
    assert count(lambda: (x.view(30)[2:], x.t(), x.detach(), torch.empty_like(x))) == (0, 0)
    assert count(lambda: torch.ones(3) + 1) == (0, 0)


def test_torchs_bce_is_counted_as_the_calls_inside_it():
    x, y = torch.empty(2, 1000, device="meta")
    bce = F.binary_cross_entropy_with_logits
    assert count(lambda: bce(x, y, reduction="none"))[0] == 5
    assert count(lambda: bce(x, y)) == (6, 4 * (13_000 + 1))
    assert count(lambda: bce(x, y, weight=y, reduction="sum"))[0] == 7


def test_the_calls_inside_are_torchs_bce():
    x, y, weight = 3 * torch.randn(3, 20)
    y = y.sigmoid()
    bce = F.binary_cross_entropy_with_logits
    for reduction, name in enumerate(("none", "mean", "sum")):
        for given in (None, weight):
            want = bce(x, y, given, reduction=name)
            torch.testing.assert_close(counted.bce(x, y, given, None, reduction), want)


def test_the_table_and_its_json_are_written(tmp_path, capsys):
    out = tmp_path / "counted.json"
    counted.main([f"--out={out}"])
    assert json.loads(out.read_text())["rows"] == json.loads(counted.OUT.read_text())["rows"]
    assert "| launches, float mask | 11 | " in capsys.readouterr().out
