"""One record of everything that a `Coverage` chose: rows from here, samples from there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from qdist.stats.merger import Merger
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import Tensors
from qdist.store.receipt import ShardReceipt

Read = Callable[[ShardReceipt, Tensors], CalibrationRecord | None]
"""Gives some rows of a committed record, as `CalibrationStore.read` does; None for a lost one."""


def gather(
    parts: Iterable[tuple[ShardReceipt, Tensors]], tensors: Sequence[str], read: Read
) -> CalibrationRecord | None:
    """Read every part once and merge: samples under each other, tensors beside each other.

    ``parts`` answer for all ``tensors`` of the same samples, which `cover` with nothing missing
    makes sure of; no parts give the empty record. None where ``read`` gave None, once all others
    are read too, so that all that is lost is known. Holds one record, and the merge so far.
    Raises what ``read`` raises, and `KeyError` or `ValueError` where the parts do not fit.
    """
    chosen = tuple(parts)
    wanted = tuple(dict.fromkeys(tensors))
    block_of = _blocks(chosen)
    mergers: dict[int, Merger] = {}
    is_whole = True
    for receipt, own in chosen:
        record = read(receipt, own)
        if record is None:
            is_whole = False
        if record is None or not is_whole:
            continue
        rows: dict[int, list[str]] = defaultdict(list)
        for tensor in own:
            rows[block_of[tensor]].append(tensor)
        for block, names in rows.items():
            part = record if tuple(names) == record.tensors else record.select(names)
            mergers.setdefault(block, Merger(names)).add(part)
    if not is_whole:
        return None
    if not mergers:
        return CalibrationRecord.empty(wanted)
    found = [merger.record() for merger in mergers.values()]
    if len(found) == 1 and found[0].tensors == wanted:
        return found[0]
    return CalibrationRecord.join(found, wanted)


def _blocks(parts: Sequence[tuple[ShardReceipt, Tensors]]) -> dict[str, int]:
    """Tensors that come from the very same receipts share a number."""
    sources: dict[str, list[int]] = defaultdict(list)
    for index, (_, own) in enumerate(parts):
        for tensor in own:
            sources[tensor].append(index)
    numbers: dict[tuple[int, ...], int] = {}
    return {tensor: numbers.setdefault(tuple(s), len(numbers)) for tensor, s in sources.items()}
