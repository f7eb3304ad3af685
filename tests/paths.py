"""Which path a batch takes on a CPU: the fused sweep or torch's own calls."""

from unittest import mock

from sc_bce.kernels import cpu as _fused


def fusing(block=8):
    """Every batch that the sweep can take takes it, in blocks of a few elements."""
    least = dict.fromkeys(("_MIN_ELEMENTS", "_MIN_FIXED", "_MIN_WEIGHTED", "_MIN_PER_ROW"), 1)
    return mock.patch.multiple(_fused, _BLOCK=block, _MOST_THREADS=1, **least)


def plain():
    """No batch takes the sweep."""
    return mock.patch.object(_fused, "_MIN_PER_ROW", 1 << 60)
