"""Records, receipts and identities that the tests of the store are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.digest import digest_json
from qdist.model.taps import TapPoint, TapTable
from qdist.stats.accumulator import Accumulator
from qdist.stats.record import CalibrationRecord
from qdist.stats.spec import GroupRequest, StatisticsSpec
from qdist.store.identity import Identity
from qdist.store.receipt import Batch, ShardReceipt

SPEC = StatisticsSpec(
    n_largest=8, n_values=4, groups=(GroupRequest(match="y", axis=-1, group_size=1),)
)
TAPS = TapTable(
    points=(
        TapPoint(tensor="x", dtype="float32", is_input=True),
        TapPoint(tensor="y", dtype="float16", is_input=False),
    ),
    aliases={"y2": "y"},
    untapped={"z": "inside the body of If a"},
)
IDENTITY = Identity(
    model_digest="0" * 64,
    preprocessing={"scale": 0.5, "mean": [0.1]},
    fingerprint={"onnxruntime": "1", "cpu_flags": ["avx2"]},
    micro_batch=2,
    statistics=SPEC.to_json(),
)
BATCHES: tuple[Batch, ...] = tuple((f"s{2 * i}", f"s{2 * i + 1}") for i in range(6))


def measured(
    arrays: Mapping[str, NDArray[Any]], n_samples: int, spec: StatisticsSpec = SPEC
) -> CalibrationRecord:
    """Statistics of one array per tensor."""
    accumulator = Accumulator(arrays, spec, dict.fromkeys(arrays, -1))
    for index, array in enumerate(arrays.values()):
        accumulator.add(index, np.asarray(array, np.float32))
    accumulator.add_samples(n_samples)
    return accumulator.record()


def record_of(
    seed: int, n_samples: int = 2, tensors: tuple[str, ...] = TAPS.tensors
) -> CalibrationRecord:
    """Statistics of random values, other ones for each seed."""
    rng = np.random.default_rng(seed)
    return measured({tensor: rng.normal(size=(75, 4)) for tensor in tensors}, n_samples)


def with_samples(record: CalibrationRecord, n_samples: int) -> CalibrationRecord:
    """The same statistics, said to be of that many samples."""
    return replace(record, n_samples=n_samples)


def receipt_of(record: CalibrationRecord, *batches: Batch) -> ShardReceipt:
    """What the shard of these micro-batches leaves."""
    return ShardReceipt(
        shard_id=digest_json(batches),
        batches=batches,
        tensors=record.tensors,
        record_digest=record.digest,
        made_by={"node": "here", "seconds": 0.5},
    )
