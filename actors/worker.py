"""What the workers of a calibration do: measure shards, and merge groups of what was measured."""

from __future__ import annotations

from typing import Any, TypeAlias

from qdist.calibration import MergeNode, NodeAnswer, ShardTask, merge_node, run_shard
from qdist.data.checks import InputSpec
from qdist.data.decoder import Decoder
from qdist.data.source import DataSource
from qdist.model.session import fingerprint
from qdist.stats.observer import Observer, ObserverSpec
from qdist.stats.warm import warm
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import open_store

Task: TypeAlias = ShardTask | MergeNode
Result: TypeAlias = ShardReceipt | NodeAnswer


class CalibrationWorker:
    """Measures shards, and merges groups of what was measured.

    A plain class: one process, one thread, one session kept between shards.
    """

    def __init__(
        self,
        observers: tuple[ObserverSpec, ...],
        inputs: tuple[InputSpec, ...],
        source: DataSource,
        store: str,
        decoder: Decoder | None = None,
    ) -> None:
        self._specs = observers
        self._inputs = inputs
        self._source = source
        self._location = store
        self._decoder = decoder
        self._observer: tuple[int, Observer] | None = None
        self._store: CalibrationStore | None = None

    def setup(self) -> dict[str, Any]:
        """Open the store; says under which fingerprint it runs. A model in one piece is loaded with
        the first shard, whose shapes tell how it is best run."""
        warm()
        self._observe_with(0)
        self._store = open_store(self._location)
        return {"fingerprint": fingerprint(self._specs[0].execution)}

    def run(self, task: Task) -> Result:
        """Measure one shard and commit its record, or merge a group. Safe to run twice."""
        if self._store is None:
            raise RuntimeError("run() before setup()")
        if isinstance(task, MergeNode):
            # Merging needs no model, and its memory goes to the records.
            self._observer = None
            return merge_node(task, self._store)
        observer = self._observe_with(task.tap_set)
        return run_shard(
            task.shard, observer, self._source, self._inputs, self._store, self._decoder
        )

    def _observe_with(self, tap_set: int) -> Observer:
        """The observer of a tap set; one is held at a time, since each holds the weights."""
        if self._observer is None or self._observer[0] != tap_set:
            self._observer = None
            self._observer = (tap_set, Observer(self._specs[tap_set]))
        return self._observer[1]


class MergeWorker:
    """Merges groups of records. A plain class: one process, one thread; it needs no model.

    Counts add in any process alike, so its execution fingerprint does not matter.
    """

    def __init__(self, store: str) -> None:
        self._location = store
        self._store: CalibrationStore | None = None

    def setup(self) -> dict[str, Any]:
        """Open the store."""
        warm()
        self._store = open_store(self._location)
        return {}

    def run(self, node: MergeNode) -> NodeAnswer:
        """Merge one group and keep it. Safe to run twice."""
        if self._store is None:
            raise RuntimeError("run() before setup()")
        return merge_node(node, self._store)
