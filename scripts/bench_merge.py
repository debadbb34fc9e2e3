"""How long it takes to read and merge the records of many shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_engine import StoredRecords
from bench_models import SEED
from numpy.typing import NDArray

from actors.events import Completed, Failed
from actors.pool import WorkerPool
from actors.session import ClusterSpec, ray_session
from actors.worker import MergeWorker
from qdist.calibration import MergeNode, NodeAnswer

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


def as_tree(stored: StoredRecords, n_records: int) -> tuple[float, int]:
    """Seconds for the merge of ``n_records`` by two workers that are ready, and its samples."""
    cluster = ClusterSpec(address=None, n_workers=2, cpus_per_worker=1, ready_timeout_s=300)
    make_worker = partial(MergeWorker, stored.location)
    with (
        ray_session(cluster),
        WorkerPool[MergeNode, NodeAnswer](cluster, make_worker, name="merge") as pool,
    ):

        def spread(nodes: Sequence[MergeNode]) -> Iterator[NodeAnswer]:
            for node in nodes:
                pool.submit(node)
            while pool.n_pending:
                event = pool.next_event(1.0)
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Completed):
                    yield event.result

        begin = time.perf_counter()
        merged = stored.merge_as_tree(n_records, spread)
        return time.perf_counter() - begin, merged.n_samples


def merging(folder: Path, n_records: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds to read and merge ``n_records`` records of 300 tensors, and after 1/4 and 1/2; and as
    a tree, whose nodes two workers make and keep."""
    rng = np.random.default_rng(SEED + 3)
    columns = [tensor_like(index, rng) for index in range(N_TENSORS)]
    names = [f"tensor{index:03d}" for index in range(N_TENSORS)]
    stored = StoredRecords(folder / "merge.zarr", names)
    for index in range(N_DISTINCT):
        # Other values in every record, at the price of one multiplication.
        factor = np.float32(1 + index / 997)
        stored.add([column * factor for column in columns], 16)
    marks: dict[int, float] = {}
    begin, begin_cpu = time.perf_counter(), time.process_time()

    def records() -> Iterator[Any]:
        for index in range(n_records):
            if index in (n_records // 4, n_records // 2):
                marks[index] = time.perf_counter() - begin
            yield stored.read(index % N_DISTINCT)

    merged = stored.merge(records())
    marks[n_records] = time.perf_counter() - begin
    cpu_s = time.process_time() - begin_cpu
    n_bytes = stored.bytes_per_record()
    say(", ".join(f"{n} records {seconds:.1f} s" for n, seconds in marks.items()))
    tree_s, n_samples = as_tree(stored, n_records)
    say(f"{n_records} records as a tree, two workers {tree_s:.1f} s")
    if n_samples != merged.n_samples:
        raise RuntimeError(f"a tree of {n_samples} samples, one merge of {merged.n_samples}")
    return {
        "merge_tree_s_per_1000_shards": tree_s / n_records * 1000,
        "merge_s_per_1000_shards": marks[n_records] / n_records * 1000,
        "merge_s_at": {str(n): seconds for n, seconds in marks.items()},
        "merge_cpu_s_per_1000_shards": cpu_s / n_records * 1000,
        "merge_record_bytes": n_bytes,
        "merge_n_samples": merged.n_samples,
    }
