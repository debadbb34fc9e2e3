"""The worker of one stage of a pipeline."""

from __future__ import annotations

from typing import Any

from qdist.calibration.stage import Stage, StageAnswer, StageObserver, StageTask, run_stage
from qdist.data.checks import InputSpec
from qdist.data.decoder import Decoder
from qdist.data.source import DataSource
from qdist.model.session import fingerprint
from qdist.store.protocol import CalibrationStore
from qdist.store.zarr_store import open_store


class StageWorker:
    """Runs shards through one stage. A plain class: one process, one thread.

    It has the graphs of its own segments alone, and loads them with the first task.
    """

    def __init__(
        self,
        stage: Stage,
        inputs: tuple[InputSpec, ...],
        source: DataSource,
        store: str,
        decoder: Decoder | None = None,
    ) -> None:
        self._stage = stage
        self._inputs = inputs
        self._source = source
        self._location = store
        self._decoder = decoder
        self._observer: StageObserver | None = None
        self._store: CalibrationStore | None = None

    def setup(self) -> dict[str, Any]:
        """Open the store; says which segments it is for, and under which fingerprint it runs."""
        self._store = open_store(self._location)
        return {
            "fingerprint": fingerprint(self._stage.observer.execution),
            "segments": [self._stage.first, self._stage.stop],
            "weight_bytes": self._stage.weight_bytes,
        }

    def run(self, task: StageTask) -> StageAnswer:
        """One shard through the stage. Safe to run twice."""
        if self._store is None:
            raise RuntimeError("run() before setup()")
        if self._observer is None:
            self._observer = StageObserver(self._stage)
        return run_stage(
            task,
            self._stage,
            self._observer,
            self._source,
            self._inputs,
            self._store,
            self._decoder,
        )
