"""From one shard to its record: the function that runs inside every worker.

It knows neither Ray nor Zarr, so a whole calibration can run in one process with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.errors import DataError
from qdist.model.session import Execution, as_float32, measuring_session, run
from qdist.model.taps import TapTable
from qdist.stats import grid
from qdist.stats.kernels import count_bits
from qdist.stats.record import CalibrationRecord

NAN_POLICIES = ("error", "report")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverSpec:
    """What a worker needs to measure shards. Picklable; large only when the weights are inline.

    ``tapped_bytes``: serialized graph whose outputs are the taps. ``on_nan``: ``error`` stops at
    the first NaN in an activation, ``report`` counts it.
    """

    tapped_bytes: bytes
    data_folder: Path
    taps: TapTable
    execution: Execution
    on_nan: str = "error"

    def __post_init__(self) -> None:
        if self.on_nan not in NAN_POLICIES:
            raise ValueError(f"on_nan must be one of {NAN_POLICIES}, got {self.on_nan!r}")


class Observer:
    """Runs the tapped model and counts. One thread at a time; keeps its session between shards."""

    def __init__(self, spec: ObserverSpec) -> None:
        self._spec = spec
        self._session = measuring_session(spec.tapped_bytes, spec.data_folder, spec.execution)
        self._fetched = [point for point in spec.taps.points if not point.is_input]

    def observe(
        self,
        batches: list[tuple[tuple[str, ...], Callable[[], Feeds]]],
    ) -> CalibrationRecord:
        """The record of one shard.

        ``batches``: for each micro-batch, in order, the names of its samples and a function that
        loads it (float and integer arrays with a leading batch axis). Raises `DataError` QD309
        for a NaN, `ModelError` QD205 when the model fails.
        """
        points = self._spec.taps.points
        tables = [np.zeros(grid.N_BINS, np.uint64) for _ in points]
        extrema = np.tile(np.array([np.inf, -np.inf], np.float32), (len(points), 1))
        n_samples = 0
        for names, load in batches:
            values = self._values(load())
            for i, point in enumerate(points):
                flat = np.ascontiguousarray(as_float32(values.pop(point.tensor))).reshape(-1)
                count_bits(flat.view(np.uint32), tables[i], extrema[i])
            if self._spec.on_nan == "error":
                _refuse_nan(self._spec.taps, tables, names)
            n_samples += len(names)
        return CalibrationRecord.from_dense(self._spec.taps.tensors, tables, extrema, n_samples)

    def _values(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        values: dict[str, NDArray[np.float32]] = {}
        if self._fetched:
            outputs = run(self._session, [p.output for p in self._fetched], dict(feeds))
            values.update(zip((p.tensor for p in self._fetched), outputs, strict=True))
        values.update((p.tensor, feeds[p.tensor]) for p in self._spec.taps.points if p.is_input)
        return values


_QUIET_NAN_BINS = (0x7FC0, 0xFFC0)


def _refuse_nan(taps: TapTable, tables: list[NDArray[np.uint64]], names: tuple[str, ...]) -> None:
    for point, table in zip(taps.points, tables, strict=True):
        n_nan = sum(int(table[b]) for b in _QUIET_NAN_BINS)
        if n_nan:
            raise DataError(
                "QD309",
                where=f"tensor {point.tensor}, sample {' or '.join(names)}",
                got=f"{n_nan} NaN",
                expected="finite activations from the float model",
                mend="leave the sample out, mend the model, or set calibration.on_nan=report",
            )
