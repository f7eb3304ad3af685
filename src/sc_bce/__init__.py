"""Self-calibrating binary cross entropy for PyTorch."""

from .adaptive import AdaptivePerturbation
from .calibration import CalibrationHistogram
from .data import IndexedDataset
from .functional import perturb_target, sc_bce_with_logits
from .loss import SCBCEWithLogitsLoss
from .temperature import TemperatureScaling

__version__ = "0.1.0"

__all__ = [
    "AdaptivePerturbation",
    "CalibrationHistogram",
    "IndexedDataset",
    "SCBCEWithLogitsLoss",
    "TemperatureScaling",
    "perturb_target",
    "sc_bce_with_logits",
]
