"""Repairing a trained network's confidence: maps of its answers, fitted to validation data."""

from .isotonic import IsotonicCalibration
from .temperature import TemperatureScaling

__all__ = ["IsotonicCalibration", "TemperatureScaling"]
