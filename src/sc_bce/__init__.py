"""Self-calibrating binary cross entropy for PyTorch."""

from importlib import import_module as _import_module
from typing import Any as _Any

from .data import IndexedDataset
from .functional import perturb_target, sc_bce_with_logits
from .losses import AdaptivePerturbation, SCBCEWithLogitsLoss
from .measure import CalibrationHistogram, Decomposition, ImageHistograms, Interval, Reliability
from .repair import IsotonicCalibration, TemperatureScaling

__version__ = "0.3.0"

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


def __getattr__(name: str) -> _Any:
    """Import `sc_bce.plot` and `sc_bce.integrations` at first use; they need other packages."""
    if name in ("plot", "integrations"):
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
