"""Repairing a trained network's confidence: maps of its answers, fitted to validation data."""

from .posthoc import IsotonicCalibration, TemperatureScaling

__all__ = ["IsotonicCalibration", "TemperatureScaling"]
