"""One record of everything that a `Coverage` chose: rows from here, samples from there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from qdist.stats.merger import Merger
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import Tensors

SourceT = TypeVar("SourceT")
"""What holds a record of some samples: a receipt, or whatever stands for several."""


def gather(
    parts: Iterable[tuple[SourceT, Tensors]],
    tensors: Sequence[str],
    read: Callable[[SourceT, Tensors], CalibrationRecord | None],
) -> CalibrationRecord | None:
    """Read every part once and merge: samples under each other, tensors beside each other.

    ``parts`` answer for all ``tensors`` of the same samples, which `cover` with nothing missing
    makes sure of; no parts give the empty record. ``read`` gives some rows of a source, as
    `CalibrationStore.read` does of a receipt, and None where it is lost. None where ``read`` gave
    None, once all others are read too, so that all that is lost is known. Holds one record, and the
    merge so far. Raises what ``read`` raises, and `KeyError` or `ValueError` where the parts do not
    fit.
    """
    chosen = tuple(parts)
    wanted = tuple(dict.fromkeys(tensors))
    block_of = {t: i for i, (own, _) in enumerate(blocks(chosen)) for t in own}
    mergers: dict[int, Merger] = {}
    is_whole = True
    for source, own in chosen:
        record = read(source, own)
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


def blocks(parts: Sequence[tuple[SourceT, Tensors]]) -> list[tuple[Tensors, tuple[int, ...]]]:
    """Tensors that come from the very same parts, and the indices of these parts."""
    sources: dict[str, list[int]] = defaultdict(list)
    for index, (_, own) in enumerate(parts):
        for tensor in own:
            sources[tensor].append(index)
    found: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for tensor, indices in sources.items():
        found[tuple(indices)].append(tensor)
    return [(tuple(tensors), indices) for indices, tensors in found.items()]
