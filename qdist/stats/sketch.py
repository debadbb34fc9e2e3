"""Sketches: what one sample does to every measured tensor, in half a kilobyte a tensor.

A coarse histogram (sign, exponent and one bit of mantissa over a fixed range) and the largest
magnitude. Counts are integers of fixed bins, so the sketch of two samples together is the sum of
theirs, and the selection of samples (`qdist.data.selection`) can foresee what a calibration of any
of them would see without running the model again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.digest import digest_arrays
from qdist.errors import DataError
from qdist.model.session import Execution, as_float32, measuring_session, run
from qdist.model.taps import TapTable
from qdist.stats.compiled import compiled

VERSION = 1
"""Version of the meaning of a sketch; part of the identity of stored ones."""

_FIRST_EXPONENT = -20
_N_EXPONENTS = 36
_MANTISSA_BITS = 1
_SHIFT = 23 - _MANTISSA_BITS
_FIRST_KEY = (127 + _FIRST_EXPONENT) << _MANTISSA_BITS

N_MAGNITUDES = 1 + (_N_EXPONENTS << _MANTISSA_BITS)
"""Bins of one sign. The first holds zero and everything below 2^-20, the last one what is beyond
2^16 too."""


def lower_edges() -> NDArray[np.float64]:
    """The least magnitude of each bin, float64[N_MAGNITUDES], ascending from 0.

    >>> lower_edges()[[0, 1, 2, 3]] * 2**20
    array([0. , 1. , 1.5, 2. ])
    """
    keys = np.arange(_FIRST_KEY, _FIRST_KEY + N_MAGNITUDES - 1, dtype=np.uint32)
    return np.append(0.0, (keys << np.uint32(_SHIFT)).view(np.float32).astype(np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchTable:
    """Sketches of some samples: row i is of the sample ``ids[i]``.

    ``counts`` uint32[n, tensors, 2, N_MAGNITUDES]: how many values each bin holds, of positive
    values and zeros first, then of negative ones. ``maxima`` float32[n, tensors]: the largest
    finite \\|x|. Infinities and NaN count nowhere.
    """

    ids: tuple[str, ...]
    counts: NDArray[np.uint32]
    maxima: NDArray[np.float32]

    def __post_init__(self) -> None:
        n_tensors = self.maxima.shape[1] if self.maxima.ndim == 2 else -1
        if (
            self.counts.shape != (len(self.ids), n_tensors, 2, N_MAGNITUDES)
            or len(self.maxima) != len(self.ids)
            or self.counts.dtype != np.uint32
            or self.maxima.dtype != np.float32
        ):
            raise ValueError(
                f"{len(self.ids)} ids, counts {self.counts.dtype}{list(self.counts.shape)}, "
                f"maxima {self.maxima.dtype}{list(self.maxima.shape)}"
            )

    @classmethod
    def concatenate(cls, tables: Sequence[SketchTable]) -> SketchTable:
        """The rows of all tables in order; of the same tensors, at least one table."""
        return cls(
            ids=tuple(id for table in tables for id in table.ids),
            counts=np.concatenate([table.counts for table in tables]),
            maxima=np.concatenate([table.maxima for table in tables]),
        )

    @property
    def digest(self) -> str:
        """Hex SHA-256 of ids and numbers."""
        ids = np.array(self.ids, dtype=np.str_)
        return digest_arrays([("ids", ids), ("counts", self.counts), ("maxima", self.maxima)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchSpec:
    """What a worker needs to sketch samples. Picklable; large only when the weights are inline.

    ``tapped_bytes``: serialized graph whose outputs are the taps, and what is carried.
    ``carry``: (model input, model output of the phase before) pairs for samples of several phases.
    ``on_nan``: ``error`` stops at a NaN in an activation, ``report`` leaves it out.
    """

    tapped_bytes: bytes
    data_folder: Path
    taps: TapTable
    execution: Execution
    carry: tuple[tuple[str, str], ...] = ()
    on_nan: str = "error"

    def __post_init__(self) -> None:
        if self.on_nan not in ("error", "report"):
            raise ValueError(f"on_nan must be error or report, got {self.on_nan!r}")


class Sketcher:
    """Runs the tapped model over one sample at a time. One thread; keeps its session."""

    def __init__(self, spec: SketchSpec) -> None:
        """Raises `ModelError` QD205."""
        self._spec = spec
        self._session = measuring_session(spec.tapped_bytes, spec.data_folder, spec.execution)
        fetched = [point.output for point in spec.taps.points if not point.is_input]
        self._outputs = list(dict.fromkeys([*fetched, *(output for _, output in spec.carry)]))

    def sketch(self, id: str, key: str, phases: Sequence[Feeds]) -> SketchTable:
        """The sketch of one sample, as a table of one row.

        ``phases``: its feeds with a leading batch axis; in those after the first, the inputs named
        in ``carry`` are filled from the outputs before. All samples of a batch count, so a model
        of fixed batch may be fed the same sample several times. Raises `DataError` QD309 for a
        NaN, `ModelError` QD205 when the model fails.
        """
        points = self._spec.taps.points
        counts = np.zeros((len(points), 2, N_MAGNITUDES), np.uint32)
        maxima = np.zeros(len(points), np.float32)
        found: Feeds = {}
        for phase in phases:
            feeds = dict(phase)
            for name, output in self._spec.carry:
                if name not in feeds:
                    feeds[name] = found[output]
            found = {}
            if self._outputs:
                answers = run(self._session, self._outputs, feeds)
                found = dict(zip(self._outputs, answers, strict=True))
            for i, point in enumerate(points):
                values = feeds[point.tensor] if point.is_input else found[point.output]
                n_nan, top = sketch_values(as_float32(values), counts[i])
                if n_nan and self._spec.on_nan == "error":
                    raise _nan(point.tensor, key, n_nan)
                maxima[i] = max(maxima[i], top)
        return SketchTable(ids=(id,), counts=counts[np.newaxis], maxima=maxima[np.newaxis])


def sketch_values(
    values: NDArray[np.float32], counts: NDArray[np.uint32]
) -> tuple[int, np.float32]:
    """Add a tensor of any shape to ``counts[2, N_MAGNITUDES]``.

    Returns how many NaN it held, and its largest finite magnitude (0 without any).
    """
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    n_nan, top = _count_bits(bits, counts.reshape(-1))
    return int(n_nan), np.uint32(top).view(np.float32)


@compiled
def _count_bits(bits: NDArray[np.uint32], counts: NDArray[np.uint32]) -> tuple[Any, Any]:
    """Count float32 given as bits; the number of NaN, and the bits of the largest magnitude."""
    top: Any = np.int64(0)
    n_nan = 0
    for i in range(bits.size):
        magnitude: Any = np.int64(bits[i] & np.uint32(0x7FFFFFFF))
        if magnitude >= 0x7F800000:
            n_nan += int(magnitude > 0x7F800000)
            continue
        # Magnitudes order as their bits do.
        top = max(top, magnitude)
        place = min(max((magnitude >> _SHIFT) - _FIRST_KEY + 1, 0), N_MAGNITUDES - 1)
        if bits[i] >> np.uint32(31) and magnitude:
            place += N_MAGNITUDES
        counts[place] += np.uint32(1)
    return n_nan, top


def _nan(tensor: str, key: str, n_nan: int) -> DataError:
    return DataError(
        "QD309",
        where=f"tensor {tensor}, sample {key}",
        got=f"{n_nan} NaN",
        expected="finite activations from the float model",
        mend="leave the sample out, mend the model, or set calibration.on_nan=report",
    )
