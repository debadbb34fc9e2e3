"""Compiling what counts before there is anything to count.

Numba compiles a loop when it is first called, some ten seconds for all of them, and keeps the
result on disk for the next process. ``python -m qdist.stats.warm`` does so ahead of the first run.
"""

from __future__ import annotations

import numpy as np

from qdist.stats.accumulator import Accumulator
from qdist.stats.merger import merge_all
from qdist.stats.record import CalibrationRecord

_NAMES = ("lanes", "runs", "few")


def warm() -> None:
    """Compile, or load from Numba's cache, the loops that a calibration runs, and that read it."""
    values = np.linspace(-3.0, 3.0, 4 * 64 * 64, dtype=np.float32).reshape(4, 64, 64)
    records: list[CalibrationRecord] = []
    for scale in (1.0, 2.0):
        accumulator = Accumulator(_NAMES, None, {"lanes": 2, "runs": 1})
        accumulator.add(0, values * np.float32(scale))
        accumulator.add(1, values * np.float32(scale))
        accumulator.add(2, np.sign(values))
        accumulator.add_all([0, 1], [values, values])
        accumulator.add_samples(1)
        records.append(accumulator.record())
    again = CalibrationRecord.from_arrays(_NAMES, 1, records[0].arrays())
    merged = merge_all([*records, again], _NAMES)
    density = merged.histogram("lanes").finite
    density.share_outside(0.0, density.magnitudes().second_moment)


if __name__ == "__main__":
    warm()
