"""Reading what a merge is made of: one record, or one group of them as an inner node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qdist.calibration.tree import MergeNode, Source
from qdist.errors import StoreError
from qdist.stats.merger import Merger
from qdist.stats.record import CalibrationRecord
from qdist.store.coverage import Tensors
from qdist.store.protocol import CalibrationStore
from qdist.store.receipt import ShardReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAnswer:
    """A node was made of ``n_records``, besides other nodes; or it was not, for records of it are
    ``damaged``: these errors say which."""

    n_records: int
    damaged: tuple[StoreError, ...] = ()


Spread = Callable[[Sequence[MergeNode]], Iterable[NodeAnswer]]
"""Makes nodes, none of which needs another, wherever it likes; answers in any order."""


def merge_node(node: MergeNode, store: CalibrationStore) -> NodeAnswer:
    """Merge one group and keep it: the function that runs inside every worker.

    Safe to run twice, and at the same time. Records that are damaged are discarded, all of them,
    and then there is no node. Raises `StoreError` QD404, QD408.
    """
    damaged: list[StoreError] = []
    made_of(node, store, damaged)
    return NodeAnswer(n_records=n_read(node), damaged=tuple(damaged))


def made_of(
    node: MergeNode, store: CalibrationStore, damaged: list[StoreError]
) -> CalibrationRecord | None:
    """The merge of a node's sources, which is kept; None where some are lost.

    Appends to ``damaged`` what was discarded.
    """
    merger = Merger(node.tensors)
    is_whole = True
    for source in node.sources:
        found = read_source(source, node.tensors, store, damaged)
        if found is None:
            is_whole = False
        elif is_whole:
            merger.add(found)
    if not is_whole:
        return None
    record = merger.record()
    store.keep_node(node.name, record)
    return record


def read_source(
    source: Source, tensors: Tensors, store: CalibrationStore, damaged: list[StoreError]
) -> CalibrationRecord | None:
    """Some rows of a record or a node. A node that is not there is made again.

    None for a record that is damaged: it is discarded, and its error appended to ``damaged``.
    """
    if isinstance(source, MergeNode):
        found = store.node(source.name, source.tensors)
        if found is None:
            found = made_of(source, store, damaged)
        return found if found is None or tensors == source.tensors else found.select(tensors)
    try:
        return store.read(source, tensors)
    except StoreError as error:
        if error.code != "QD403":
            raise
        store.discard(source)
        damaged.append(error)
        return None


def n_read(node: MergeNode) -> int:
    """Records that merging the node reads, besides other nodes."""
    return sum(isinstance(source, ShardReceipt) for source in node.sources)
