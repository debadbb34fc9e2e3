"""Which records are merged with which first: the plan of a merge of many records as a tree.

Merging is associative and commutative, so any plan gives the same bits. This one is made so that
inner nodes last: samples have their places in the manifest for good, an interval of places is
halved until few records begin in it, and these make a node. What is added or left out changes the
nodes of its own intervals; all others are found where an earlier merge has left them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qdist.digest import digest_json
from qdist.store.coverage import Tensors
from qdist.store.gathering import blocks
from qdist.store.receipt import ShardReceipt, tap_set_digest

FAN_IN = 16
"""Sources of one node, at most: what one worker merges at a time."""
FEW = 32
"""Records that are merged at once, without a tree."""
_MIN_SHARE = 4
"""A node has at least 1 / 4 of ``FAN_IN`` sources; fewer are left to the level above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeNode:
    """The merge of some records: of all ``tensors``, in that order, from all ``sources``.

    ``name``: hex digest of the tensors and of the records, whatever lies between.
    """

    name: str
    tensors: Tensors
    sources: tuple[ShardReceipt | MergeNode, ...]

    @classmethod
    def of(cls, tensors: Tensors, sources: Sequence[Source]) -> MergeNode:
        """The node of these sources. Raises `ValueError` where there is none."""
        if not sources:
            raise ValueError("a node without sources")
        records = sorted(
            (receipt.id, receipt.record_digest)
            for source in sources
            for receipt in receipts_of(source)
        )
        name = digest_json([tap_set_digest(tensors), records])
        return cls(name=name, tensors=tensors, sources=tuple(sources))


Source: TypeAlias = ShardReceipt | MergeNode
Part: TypeAlias = tuple[Source, Tensors]
"""What a merge reads, with the tensors that it takes from there."""


def plan(
    parts: Sequence[tuple[ShardReceipt, Tensors]],
    places: Mapping[str, int],
    *,
    fan_in: int = FAN_IN,
    few: int = FEW,
) -> tuple[Part, ...]:
    """The parts of a merge, with nodes in the place of records wherever there are many.

    ``parts`` as in `qdist.store.coverage.Coverage`; ``places``: of samples in the manifest, by id.
    Tensors that come from more than ``few`` records get a tree of their own, whose nodes have
    ``fan_in`` sources at most. Raises `ValueError` for a ``fan_in`` below 2.
    """
    if fan_in < 2:
        raise ValueError(f"fan_in: got {fan_in}, expected 2 or more")
    left: dict[int, list[str]] = {}
    nodes: list[Part] = []
    for tensors, indices in blocks(parts):
        if len(indices) <= few:
            for index in indices:
                left.setdefault(index, []).extend(tensors)
            continue
        found = {parts[index][0]: index for index in indices}
        for source in _top(tensors, list(found), places, fan_in):
            if isinstance(source, MergeNode):
                nodes.append((source, tensors))
            else:
                left.setdefault(found[source], []).extend(tensors)
    # In the order in which the records have them.
    order = {index: {t: i for i, t in enumerate(parts[index][1])} for index in left}
    kept = [
        (parts[index][0], tuple(sorted(own, key=order[index].__getitem__)))
        for index, own in sorted(left.items())
    ]
    return (*nodes, *kept)


def missing(parts: Sequence[Part], kept: Collection[str]) -> list[tuple[MergeNode, ...]]:
    """Nodes that are to be made, lowest level first: each level needs the ones before it.

    ``kept``: names of those that are there, below which nothing is needed.
    """
    levels: list[dict[str, MergeNode]] = []

    def height(source: Source) -> int:
        if not isinstance(source, MergeNode) or source.name in kept:
            return 0
        own = max(map(height, source.sources))
        if own == len(levels):
            levels.append({})
        levels[own][source.name] = source
        return own + 1

    for source, _ in parts:
        height(source)
    return [tuple(level.values()) for level in levels]


def nodes_of(parts: Sequence[Part]) -> list[str]:
    """Names of all nodes, sorted."""
    found: set[str] = set()
    waiting: list[Source] = [source for source, _ in parts]
    while waiting:
        source = waiting.pop()
        if isinstance(source, MergeNode):
            found.add(source.name)
            waiting.extend(source.sources)
    return sorted(found)


def receipts_of(source: Source) -> Iterator[ShardReceipt]:
    """All records that a source stands for."""
    if isinstance(source, ShardReceipt):
        yield source
    else:
        for below in source.sources:
            yield from receipts_of(below)


def clusters(places: Sequence[int], limit: int) -> Iterator[range]:
    """Indices of ascending ``places`` (at least 0) in ranges of ``limit`` at most, unless more
    share one place: the powers of two above all places are halved as often as it takes.

    >>> list(clusters([0, 1, 2, 3, 4, 7], 2))
    [range(0, 2), range(2, 4), range(4, 6)]
    """
    if not places:
        return
    waiting = [(0, len(places), 0, max(places).bit_length())]
    while waiting:
        first, stop, begin, bits = waiting.pop()
        if stop - first <= limit or not bits:
            if first < stop:
                yield range(first, stop)
            continue
        middle = begin + (1 << (bits - 1))
        cut = bisect_left(places, middle, first, stop)
        waiting.append((cut, stop, middle, bits - 1))
        waiting.append((first, cut, begin, bits - 1))


def _top(
    tensors: Tensors, receipts: Sequence[ShardReceipt], places: Mapping[str, int], fan_in: int
) -> list[Source]:
    """The highest level of the tree: ``fan_in`` sources at most."""
    level: list[tuple[int, str, Source]] = sorted(
        ((places.get(receipt.batches[0][0], 0), receipt.id, receipt) for receipt in receipts),
        key=lambda each: each[:2],
    )
    while len(level) > fan_in:
        above: list[tuple[int, str, Source]] = []
        for group in clusters([place for place, _, _ in level], fan_in):
            members = level[group.start : group.stop]
            if len(members) < max(2, fan_in // _MIN_SHARE):
                above.extend(members)
                continue
            node = MergeNode.of(tensors, [source for _, _, source in members])
            above.append((members[0][0], node.name, node))
        level = above
    return [source for _, _, source in level]
