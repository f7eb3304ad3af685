"""The task of README: what is shown there for one seed holds for others too."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("seed", range(5))
def test_the_readme_task_gains_on_every_seed(seed):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S))
    names = {}
    exec(code.replace("manual_seed(0)", f"manual_seed({seed})"), names)
    plain, repaired, adaptive = names["seen"].values()
    for better in (repaired, adaptive):
        assert better.nll() < plain.nll()
        assert better.ece() < plain.ece()
