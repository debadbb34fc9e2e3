"""How long it takes to read and merge the records of many shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import StoredRecords
from bench_models import SEED
from numpy.typing import NDArray

N_TENSORS = 300
N_DISTINCT = 16
"""Records that are really written; they are read again and again."""
N_ELEMENTS = 1 << 18
"""Elements of a tensor in one shard: enough to hit the thousands of bins that real ones hit."""


N_CHANNELS = 512


def tensor_like(index: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Values as activations have them: of a linear layer, after GELU, ReLU or a softmax."""
    scale = float(np.exp(rng.normal(0, 1.5)))
    values = rng.standard_normal(N_ELEMENTS, dtype=np.float32) * np.float32(scale)
    match index % 4:
        case 0:
            made: NDArray[np.float32] = values
        case 1:
            made = np.maximum(values, 0)
        case 2:
            made = values / (1 + np.exp(np.minimum(-1.702 * values, 80)))
        case _:
            rows = np.exp(values.reshape(-1, 128) / scale)
            made = rows / rows.sum(1, keepdims=True)
    # Channels along the last axis, as a layer's output has them.
    return made.astype(np.float32, copy=False).reshape(-1, N_CHANNELS)


def merging(folder: Path, n_records: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds to read and merge ``n_records`` records of 300 tensors, and after 1/4 and 1/2."""
    rng = np.random.default_rng(SEED + 3)
    columns = [tensor_like(index, rng) for index in range(N_TENSORS)]
    names = [f"tensor{index:03d}" for index in range(N_TENSORS)]
    stored = StoredRecords(folder / "merge.zarr", names)
    for index in range(N_DISTINCT):
        # Other values in every record, at the price of one multiplication.
        factor = np.float32(1 + index / 997)
        stored.add([column * factor for column in columns], 16)
    marks: dict[int, float] = {}
    begin = time.perf_counter()

    def records() -> Iterator[Any]:
        for index in range(n_records):
            if index in (n_records // 4, n_records // 2):
                marks[index] = time.perf_counter() - begin
            yield stored.read(index % N_DISTINCT)

    merged = stored.merge(records())
    marks[n_records] = time.perf_counter() - begin
    say(", ".join(f"{n} records {seconds:.1f} s" for n, seconds in marks.items()))
    return {
        "merge_s_per_1000_shards": marks[n_records] / n_records * 1000,
        "merge_s_at": {str(n): seconds for n, seconds in marks.items()},
        "merge_record_bytes": stored.bytes_per_record(),
        "merge_n_samples": merged.n_samples,
    }
