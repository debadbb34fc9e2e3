"""What any calibration store must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from qdist.model.taps import TapTable
from qdist.stats.record import CalibrationRecord
from qdist.store.identity import Identity
from qdist.store.receipt import Batch, ShardReceipt


@dataclass(frozen=True, kw_only=True)
class FinishedMerge:
    """A finished calibration.

    ``taps``: the table that it was made with; its tensors are the rows of ``record``. ``batches``:
    sample ids of the micro-batches that it was merged from, in the order of the grid. ``about``:
    JSON, what its maker said about it.
    """

    name: str
    record: CalibrationRecord
    taps: TapTable
    batches: tuple[Batch, ...]
    about: dict[str, Any]

    def __post_init__(self) -> None:
        if self.taps.tensors != self.record.tensors:
            raise ValueError("the record has other rows than its taps have points")
        if sum(len(batch) for batch in self.batches) != self.record.n_samples:
            raise ValueError("the record has other samples than its micro-batches")


@runtime_checkable
class CalibrationStore(Protocol):
    """The records of one calibration identity, of any tap sets.

    Safe for any number of processes at once: a record is written under a name of its own, then the
    receipt of its samples and tap set is created only if absent, so the first complete result wins
    and half of one never counts. Instances are used by one thread at a time and are cheap to reopen
    elsewhere.

    All methods raise `StoreError` QD408 where the store cannot be reached, or was taken away since
    it was opened, in bounded time: nothing is lost by waiting and calling again. Those that write
    raise QD404 where waiting does not help.
    """

    @property
    def location(self) -> str:
        """Absolute path or URL: what `open_store` takes, in any process."""
        ...

    @property
    def identity(self) -> Identity:
        """What the store was made for."""
        ...

    def commit(self, receipt: ShardReceipt, record: CalibrationRecord) -> bool:
        """Keep a shard's record; False when another process was first.

        Raises `ValueError` for a receipt of another record.
        """
        ...

    def receipts(self) -> list[ShardReceipt]:
        """All committed shards, sorted by id. Damaged receipts count as absent."""
        ...

    def read(
        self, receipt: ShardReceipt, tensors: Sequence[str] | None = None
    ) -> CalibrationRecord:
        """The record of a committed shard, or those rows of it, in that order.

        Raises QD403 when it is damaged or missing, `KeyError` for a tensor that it does not have.
        """
        ...

    def discard(self, receipt: ShardReceipt) -> None:
        """Forget a shard whose record turned out to be damaged, so that it can be redone.

        Does nothing where another process has redone it meanwhile.
        """
        ...

    def nodes(self) -> frozenset[str]:
        """Names of the inner nodes of merges that are kept, sound or not."""
        ...

    def keep_node(self, name: str, record: CalibrationRecord) -> bool:
        """Keep the merge of some records under a name that says of which; False when another
        process was first.

        Raises `ValueError` for a name that is not made of letters, digits, ``-`` and ``_``.
        """
        ...

    def node(self, name: str, tensors: Sequence[str]) -> CalibrationRecord | None:
        """An inner node, whose rows are these; None where absent, or damaged and so removed."""
        ...

    def finish(
        self,
        name: str,
        record: CalibrationRecord,
        about: dict[str, Any],
        taps: TapTable,
        batches: Sequence[Batch],
        *,
        make_latest: bool = True,
    ) -> None:
        """Keep a merged record under ``name`` and make it the one that `latest` gives: without
        ``make_latest`` only where there is none yet.

        What others read at the moment stays readable. Raises `ValueError` for a name that is not
        made of letters, digits, ``-`` and ``_``, and where the parts do not fit each other.
        """
        ...

    def finished(self) -> list[str]:
        """Names of all finished merges, sorted."""
        ...

    def find(self, name: str) -> FinishedMerge | None:
        """A finished merge; None where absent or damaged."""
        ...

    def make_latest(self, name: str) -> None:
        """Let `latest` give the merge ``name``."""
        ...

    def latest(self) -> FinishedMerge:
        """The last finished merge. Raises QD402, QD403."""
        ...

    def document(self, name: str) -> dict[str, Any] | None:
        """A small JSON object that was put here; None where absent or damaged."""
        ...

    def put_document(self, name: str, value: dict[str, Any]) -> None:
        """Keep a small JSON object, in place of any other of that name."""
        ...
