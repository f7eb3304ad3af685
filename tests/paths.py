"""Which path a batch takes on a CPU: the sweep or torch's own calls."""

import contextlib
from unittest import mock

from sc_bce.kernels import cpu


def fusing(block=8):
    """Every batch that the sweep can take takes it, in blocks of a few elements."""
    least = dict.fromkeys(("MIN_ELEMENTS", "MIN_FIXED", "MIN_WEIGHTED", "MIN_PER_ROW"), 1)
    return mock.patch.multiple(cpu, BLOCK=block, MOST_THREADS=1, **least)


def plain():
    """No batch takes the sweep."""
    return mock.patch.object(cpu, "MIN_PER_ROW", 1 << 60)


@contextlib.contextmanager
def watching():
    """A list that tells of each batch whether the sweep took it."""
    taken, sweep = [], cpu.sweep

    def watched(*arguments):
        swept = sweep(*arguments)
        taken.append(swept is not None)
        return swept

    with mock.patch.object(cpu, "sweep", watched):
        yield taken
