"""What any calibration store must do."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from qdist.model.taps import TapTable
from qdist.stats.record import CalibrationRecord
from qdist.store.identity import Identity
from qdist.store.receipt import ShardReceipt


@runtime_checkable
class CalibrationStore(Protocol):
    """The records of one calibration identity.

    Safe for any number of processes at once: a record is written under its shard's id, then its
    receipt is created only if absent, so the first complete result wins and half of one never
    counts. Instances are used by one thread at a time and are cheap to reopen elsewhere.
    """

    @property
    def identity(self) -> Identity:
        """What the store was made for."""
        ...

    @property
    def taps(self) -> TapTable:
        """The measured tensors: rows of every record, with their aliases."""
        ...

    def commit(self, receipt: ShardReceipt, record: CalibrationRecord) -> bool:
        """Keep a shard's record; False when another process was first. Raises QD404."""
        ...

    def receipts(self) -> list[ShardReceipt]:
        """All committed shards, sorted by id. Damaged receipts count as absent."""
        ...

    def read(self, receipt: ShardReceipt) -> CalibrationRecord:
        """The record of a committed shard. Raises QD403 when it is damaged or missing."""
        ...

    def discard(self, receipt: ShardReceipt) -> None:
        """Forget a shard whose record turned out to be damaged, so that it can be redone.

        Does nothing where another process has redone it meanwhile. Raises QD404.
        """
        ...

    def finish(self, name: str, record: CalibrationRecord, about: dict[str, Any]) -> None:
        """Keep a merged record under ``name`` and make it the one that `latest` gives.

        What others read at the moment stays readable. Raises QD404.
        """
        ...

    def finished(self) -> list[str]:
        """Names of all finished merges, sorted."""
        ...

    def find(self, name: str) -> tuple[CalibrationRecord, dict[str, Any]] | None:
        """A finished merge and what was said about it; None where absent or damaged."""
        ...

    def make_latest(self, name: str) -> None:
        """Let `latest` give the merge ``name``. Raises QD404."""
        ...

    def latest(self) -> tuple[CalibrationRecord, dict[str, Any]]:
        """The last finished merge and what was said about it. Raises QD402, QD403."""
        ...
