"""What earlier releases saved loads, and gives the answers that it gave there."""

from pathlib import Path

import torch

from sc_bce import CalibrationHistogram, TemperatureScaling

DATA = Path(__file__).parent / "data"


# Made by version 0.1.0: a histogram of 200 cells, its measures, a repair with a flip rate of 0.05
# and its answers. The adaptive loss has its own file, in test_state.py.
def test_what_0_1_0_measured_and_repaired():
    saved = torch.load(DATA / "v0.1.0-measures.pt", weights_only=True)
    histogram = CalibrationHistogram(num_cells=200)
    histogram.load_state_dict(saved["histogram"])
    for name in ("ece", "adaptive_ece", "nll", "brier", "accuracy"):
        torch.testing.assert_close(getattr(histogram, name)(), saved[name], msg=name)
    scaling = TemperatureScaling()
    scaling.load_state_dict(saved["repair"])
    torch.testing.assert_close(scaling(saved["logits"]), saved["answers"])
    assert float(scaling.flip_rate) == torch.tensor(0.05).item()
