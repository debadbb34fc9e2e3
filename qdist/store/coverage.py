"""Which micro-batches finished shards already answer for.

A shard counts if every one of its micro-batches lies on the present grid and none is counted
twice. So a store made with another shard size, or stopped half-way, is used as far as it goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qdist.store.receipt import ShardReceipt

Batch = tuple[str, ...]
"""The sample ids of one micro-batch, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """``receipts``: shards that count, none overlapping. ``missing``: micro-batches still to run,
    in the order of the grid."""

    receipts: tuple[ShardReceipt, ...]
    missing: tuple[Batch, ...]


def cover(grid: Sequence[Batch], receipts: Iterable[ShardReceipt]) -> Coverage:
    """Choose shards that cover as much of ``grid`` as they can, deterministically.

    Larger shards first, then by id: the choice depends on the set of receipts alone.
    """
    left = dict.fromkeys(grid)
    chosen = []
    for receipt in sorted(receipts, key=lambda r: (-r.n_samples, r.shard_id)):
        batches = set(receipt.batches)
        if len(receipt.batches) == len(batches) > 0 and batches <= left.keys():
            chosen.append(receipt)
            for batch in receipt.batches:
                del left[batch]
    return Coverage(receipts=tuple(sorted(chosen, key=lambda r: r.shard_id)), missing=tuple(left))
