"""What a finished shard leaves behind: the proof that its record is complete."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReceipt:
    """A committed shard.

    ``shard_id``: hex digest of its samples and micro-batches. ``batches``: sample ids of each
    micro-batch, in order. ``record_digest``: of the record's content. ``made_by``: node, process
    and seconds, for the report alone. ``kept_in``: where the store that gave the receipt has the
    record, its own business; empty in a receipt that comes from no store.
    """

    shard_id: str
    batches: tuple[tuple[str, ...], ...]
    record_digest: str
    made_by: dict[str, Any] = field(default_factory=dict)
    kept_in: str = field(default="", compare=False)

    @property
    def n_samples(self) -> int:
        """How many samples the shard measured."""
        return sum(len(batch) for batch in self.batches)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without ``kept_in``."""
        return {
            "shard_id": self.shard_id,
            "batches": [list(batch) for batch in self.batches],
            "record_digest": self.record_digest,
            "made_by": self.made_by,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardReceipt:
        """From `to_json`. Raises `KeyError` or `TypeError` on anything else."""
        return cls(
            shard_id=str(value["shard_id"]),
            batches=tuple(tuple(str(i) for i in batch) for batch in value["batches"]),
            record_digest=str(value["record_digest"]),
            made_by=dict(value["made_by"]),
        )
