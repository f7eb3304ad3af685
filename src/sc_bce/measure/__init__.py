"""Measuring calibration: one histogram for any number of elements, and what is read off it."""

from .histogram import CalibrationHistogram
from .images import ImageHistograms, Interval
from .scores import Decomposition, Reliability

__all__ = ["CalibrationHistogram", "Decomposition", "ImageHistograms", "Interval", "Reliability"]
