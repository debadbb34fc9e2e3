"""What a finished shard leaves behind: the proof that its record is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from qdist.digest import digest_json

Batch = tuple[str, ...]
"""The sample ids of one micro-batch, in order."""


@lru_cache(maxsize=256)
def tap_set_digest(tensors: tuple[str, ...]) -> str:
    """Hex digest of the names of the tensors that one run measured, in order."""
    return digest_json(list(tensors))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReceipt:
    """A committed shard.

    ``shard_id``: hex digest of its samples and micro-batches. ``batches``: sample ids of each
    micro-batch, in order. ``tensors``: the record's rows, in order. ``record_digest``: of the
    record's content. ``made_by``: node, process and seconds, for the report alone. ``kept_in``:
    where the store that gave the receipt has the record, its own business; empty in a receipt that
    comes from no store.
    """

    shard_id: str
    batches: tuple[Batch, ...]
    tensors: tuple[str, ...]
    record_digest: str
    made_by: dict[str, Any] = field(default_factory=dict, hash=False)
    kept_in: str = field(default="", compare=False)

    @property
    def n_samples(self) -> int:
        """How many samples the shard measured."""
        return sum(len(batch) for batch in self.batches)

    @property
    def tap_set(self) -> str:
        """Hex digest of the record's rows."""
        return tap_set_digest(self.tensors)

    @property
    def id(self) -> str:
        """Hex digest of what was measured of what: a store keeps one receipt of each id."""
        return digest_json([self.shard_id, self.tap_set])

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without ``kept_in``, and with a digest in place of ``tensors``."""
        return {
            "shard_id": self.shard_id,
            "batches": [list(batch) for batch in self.batches],
            "tap_set": self.tap_set,
            "record_digest": self.record_digest,
            "made_by": self.made_by,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], tensors: Sequence[str]) -> ShardReceipt:
        """From `to_json` and the tensors that its digest stands for.

        Raises `KeyError`, `TypeError` or `ValueError` on anything else.
        """
        receipt = cls(
            shard_id=str(value["shard_id"]),
            batches=tuple(tuple(str(i) for i in batch) for batch in value["batches"]),
            tensors=tuple(tensors),
            record_digest=str(value["record_digest"]),
            made_by=dict(value["made_by"]),
        )
        if receipt.tap_set != value["tap_set"]:
            raise ValueError("a receipt of other tensors")
        return receipt
