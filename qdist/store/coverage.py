"""Which parts of stored records answer for micro-batches and tensors, and what is missing.

A shard counts if every one of its micro-batches lies on the present grid and no (micro-batch,
tensor) is counted twice. So a store made with another shard size or other taps, or stopped
half-way, is used as far as it goes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qdist.store.receipt import Batch, ShardReceipt

Tensors = tuple[str, ...]
"""Names of tensors, in the order in which they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """``parts``: receipts that count, by id, each with the tensors that it answers for.
    ``missing``: tensors, each with the micro-batches that are still to run for it: pairs that
    differ in their micro-batches, in the order of the tensors and of the grid."""

    parts: tuple[tuple[ShardReceipt, Tensors], ...]
    missing: tuple[tuple[Tensors, tuple[Batch, ...]], ...]

    @property
    def n_missing_batches(self) -> int:
        """Micro-batches that must run again for at least one tensor."""
        return len({batch for _, batches in self.missing for batch in batches})


def cover(
    grid: Sequence[Batch], tensors: Sequence[str], receipts: Iterable[ShardReceipt]
) -> Coverage:
    """Choose receipts that cover as much of ``grid`` x ``tensors`` as they can, deterministically.

    Tensors that the same tap sets hold make a block; each block is covered for itself: larger
    shards first, then those that answer for more tensors, then by id. So the choice depends on the
    sets of tensors and receipts alone, and where shards nest or lie apart nothing that could be
    answered is missing.
    """
    order = {tensor: i for i, tensor in enumerate(dict.fromkeys(tensors))}
    on_grid = set(grid)
    n_wanted: dict[str, int] = {}
    holders: dict[str, set[str]] = {tensor: set() for tensor in order}
    candidates: list[tuple[tuple[int, int, str, str], str, ShardReceipt]] = []
    for receipt in receipts:
        batches, tap_set = set(receipt.batches), receipt.tap_set
        if not len(receipt.batches) == len(batches) > 0 or not batches <= on_grid:
            continue
        if tap_set not in n_wanted:
            own = [tensor for tensor in dict.fromkeys(receipt.tensors) if tensor in order]
            n_wanted[tap_set] = len(own)
            for tensor in own:
                holders[tensor].add(tap_set)
        if n_wanted[tap_set]:
            rank = (-receipt.n_samples, -n_wanted[tap_set], receipt.id, receipt.record_digest)
            candidates.append((rank, tap_set, receipt))
    candidates.sort(key=lambda candidate: candidate[0])
    blocks: dict[frozenset[str], list[str]] = defaultdict(list)
    for tensor, tap_sets in holders.items():
        blocks[frozenset(tap_sets)].append(tensor)
    taken: dict[int, list[str]] = defaultdict(list)
    missing: dict[tuple[Batch, ...], list[str]] = defaultdict(list)
    for block_sets, block in blocks.items():
        left = dict.fromkeys(grid)
        for index, (_, tap_set, receipt) in enumerate(candidates):
            if tap_set in block_sets and all(batch in left for batch in receipt.batches):
                taken[index].extend(block)
                for batch in receipt.batches:
                    del left[batch]
        if left:
            missing[tuple(left)].extend(block)
    return Coverage(
        parts=tuple(
            sorted(
                (
                    (candidates[i][2], tuple(sorted(t, key=order.__getitem__)))
                    for i, t in taken.items()
                ),
                key=lambda part: (part[0].id, part[0].record_digest),
            )
        ),
        missing=tuple(
            sorted(
                ((tuple(sorted(t, key=order.__getitem__)), b) for b, t in missing.items()),
                key=lambda part: order[part[0][0]],
            )
        ),
    )
