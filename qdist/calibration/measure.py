"""One shard measured and committed: the function that runs inside every worker."""

from __future__ import annotations

import os
import platform
import time
from functools import partial

from qdist.calibration.feeds import load_phases
from qdist.data.checks import InputSpec
from qdist.data.decoder import Decoder
from qdist.data.shards import Shard
from qdist.data.source import DataSource
from qdist.stats.observer import Observer
from qdist.stats.record import CalibrationRecord
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt


def run_shard(
    shard: Shard,
    observer: Observer,
    source: DataSource,
    inputs: tuple[InputSpec, ...],
    store: CalibrationStore,
    decoder: Decoder | None = None,
) -> ShardReceipt:
    """Measure one shard and commit its record; the receipt says what was measured.

    Raises `DataError`, `ModelError` and `StoreError`.
    """
    begin = time.perf_counter()
    record = observer.observe(
        [
            (batch.keys, partial(load_phases, batch, source, inputs, decoder))
            for batch in shard.batches
        ]
    )
    return commit(shard, record, store, begin)


def commit(
    shard: Shard, record: CalibrationRecord, store: CalibrationStore, begin: float
) -> ShardReceipt:
    """Keep the record of a shard that was begun at ``begin`` (`time.perf_counter`).

    Raises `StoreError`.
    """
    receipt = ShardReceipt(
        shard_id=shard.id,
        batches=tuple(batch.ids for batch in shard.batches),
        tensors=record.tensors,
        record_digest=record.digest,
        made_by={
            "node": platform.node(),
            "pid": os.getpid(),
            "seconds": round(time.perf_counter() - begin, 4),
        },
    )
    store.commit(receipt, record)
    return receipt
