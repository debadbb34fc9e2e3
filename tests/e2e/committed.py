"""What the store ``s.zarr`` of a folder holds, looked at from outside of the run."""

from __future__ import annotations

from pathlib import Path

from qdist.errors import StoreError
from qdist.store.receipt import ShardReceipt
from qdist.store.zarr_store import open_store


def receipts(folder: Path) -> list[ShardReceipt]:
    """What is committed in the folder's store; nothing while there is no store."""
    try:
        return list(open_store(folder / "s.zarr").receipts())
    except StoreError as error:
        if error.code != "QD402":
            raise
        return []


def n_committed(folder: Path) -> int:
    """How many receipts there are. Reads none of them, for the run needs the processor."""
    return sum(1 for _ in (folder / "s.zarr/receipts").glob("*.json"))
