"""Self-calibrating binary cross entropy for PyTorch."""

from .adaptive import AdaptivePerturbation
from .bootstrap import ImageHistograms, Interval
from .data import IndexedDataset
from .functional import perturb_target, sc_bce_with_logits
from .histogram import CalibrationHistogram
from .loss import SCBCEWithLogitsLoss
from .measures import Decomposition, Reliability
from .posthoc import IsotonicCalibration, TemperatureScaling

__version__ = "0.1.0"

__all__ = [
    "AdaptivePerturbation",
    "CalibrationHistogram",
    "Decomposition",
    "ImageHistograms",
    "IndexedDataset",
    "Interval",
    "IsotonicCalibration",
    "Reliability",
    "SCBCEWithLogitsLoss",
    "TemperatureScaling",
    "perturb_target",
    "sc_bce_with_logits",
]
