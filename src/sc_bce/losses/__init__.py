"""The losses: a fixed perturbation, and one level per training sample that follows measurement."""

from .adaptive import AdaptivePerturbation
from .fixed import SCBCEWithLogitsLoss

__all__ = ["AdaptivePerturbation", "SCBCEWithLogitsLoss"]
