"""The pages and pictures are those of the committed results."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pictures, report
from benchmarks.speed.page import main as speed_page
from benchmarks.study.page import main as study_page

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("page", "make"), [("performance", speed_page), ("study", study_page)])
def test_the_committed_page_is_the_one_made_from_the_committed_results(page, make, tmp_path):
    make(["--out", str(tmp_path)])
    committed = ROOT / "docs"
    assert (tmp_path / f"{page}.md").read_text("utf-8") == (committed / f"{page}.md").read_text(
        "utf-8"
    )
    pictures = sorted(path.name for path in (tmp_path / page).iterdir())
    assert pictures == sorted(path.name for path in (committed / page).iterdir())


def test_the_gallery_is_drawn(tmp_path, monkeypatch):
    page, out = tmp_path / "start.md", tmp_path / "out"
    page.write_text("""```python
from PIL import Image

Image.new("L", (300, 300)).save("reliability.png")
```
""")
    monkeypatch.setattr(pictures, "TUTORIAL", page)
    pictures.main(["--epochs", "1", "--out", str(out)])
    committed = ROOT / "docs" / "gallery"
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in committed.iterdir())
    for path in out.iterdir():
        with Image.open(path) as image:
            assert min(image.size) >= 300


def test_a_page_is_its_words_with_each_part_filled_in():
    parts = {"outer": lambda: "one\n@inner\nthree", "inner": lambda: "two"}
    assert report.fill("0\n@outer\n4 @inner", parts) == "0\none\ntwo\nthree\n4 @inner"
    with pytest.raises(ValueError, match="Expected one of @outer, @inner, but the words have @so"):
        report.fill("@so", parts)


def test_numbers_are_rounded_wherever_they_are():
    found = report.rounded({"a": [1.23456, 2], "b": ("c", 12345.6)}, 3)
    assert found == {"a": [1.23, 2], "b": ["c", 12300.0]}
