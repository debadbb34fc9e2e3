"""Tensors on their way from one stage of a pipeline to the next: objects in the store's place.

Every worker can reach the store, so nothing else has to be set up; what lies there outlives the
worker, the node and the driver that made it, and takes nobody's memory. One object holds one
micro-batch, so that neither side ever holds a shard. It is not part of the statistics: where one is
lost or damaged, it is made again.

A name says what is in it: the way the model is cut, the cut, and the samples. Whoever makes it
makes the same bits, so that a run that goes on after another one takes what it finds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.source import Feeds
from qdist.digest import digest_bytes, digest_json
from qdist.errors import StoreError
from qdist.store.layout import SPOOL
from qdist.store.location import open_place
from qdist.store.place import PARTIAL

STALE_S = 86_400.0
_LENGTH_BYTES = 8
_DIGEST_BYTES = 32
_PLAN_DIGITS = 16


class LostBoundaryError(Exception):
    """A micro-batch that should wait here does not, or is damaged."""


class Boundaries:
    """The boundary tensors of one model, cut in one way, in the store at ``location``.

    ``plan``: hex digest of the way it is cut. A cut is the number of the segment behind it. All
    methods raise `StoreError` QD404 and QD408. For use in one thread.
    """

    def __init__(self, location: str, plan: str) -> None:
        self._place = open_place(location)
        self._plan = plan[:_PLAN_DIGITS]

    def put(self, shard_id: str, cut: int, batch: int, phases: Sequence[Feeds]) -> None:
        """Leave micro-batch number ``batch`` of a shard before a cut, in place of any other."""
        self._place.put(self._key(shard_id, cut, batch), packed(phases))

    def get(self, shard_id: str, cut: int, batch: int) -> list[Feeds]:
        """What was left there, which stays. Raises `LostBoundaryError`."""
        key = self._key(shard_id, cut, batch)
        try:
            data = self._place.get(key)
        except StoreError as error:
            if error.code != "QD403":
                raise
            data = None
        if data is None:
            raise LostBoundaryError(key)
        return unpacked(data)

    def drop(self, shard_id: str, cut: int, n_batches: int) -> None:
        """Remove a shard before a cut, as far as the place allows; `sweep` removes the rest."""
        with suppress(StoreError):
            for batch in range(n_batches):
                self._place.delete(self._key(shard_id, cut, batch))

    def counts(self) -> Counter[str]:
        """Name of a shard before a cut -> how many of its micro-batches are there."""
        return Counter(
            entry.name.rpartition("-")[0]
            for entry in self._place.entries(SPOOL)
            if entry.name.startswith(self._plan) and not entry.name.endswith(PARTIAL)
        )

    def name(self, shard_id: str, cut: int) -> str:
        """What a shard before a cut is called in `counts`."""
        return f"{self._plan}-{digest_json([shard_id, cut])[:40]}"

    def sweep(self) -> None:
        """Remove all that is here, and what others have left for a day; as far as possible."""
        with suppress(StoreError):
            before_s = self._place.now_s() - STALE_S
            for entry in self._place.entries(SPOOL):
                if entry.name.startswith(self._plan) or entry.modified_s < before_s:
                    self._place.delete(f"{SPOOL}/{entry.name}")

    def _key(self, shard_id: str, cut: int, batch: int) -> str:
        return f"{SPOOL}/{self.name(shard_id, cut)}-{batch}"


def packed(phases: Sequence[Mapping[str, NDArray[Any]]]) -> bytes:
    """Arrays by name, one mapping a phase, as bytes that begin with their digest."""
    buffers = [_buffer(array) for phase in phases for array in phase.values()]
    told = [
        [[name, array.dtype.str, list(array.shape)] for name, array in phase.items()]
        for phase in phases
    ]
    header = json.dumps({"phases": told, "lengths": list(map(len, buffers))}).encode()
    body = [len(header).to_bytes(_LENGTH_BYTES, "little"), header, *buffers]
    return b"".join([_digest(body), *body])


def unpacked(data: bytes) -> list[Feeds]:
    """What was `packed`, in arrays of their own. Raises `LostBoundaryError` for anything else."""
    view = memoryview(data)
    parts = _parts(view[_DIGEST_BYTES:])
    if parts is None or _digest(parts) != data[:_DIGEST_BYTES]:
        raise LostBoundaryError("other bytes than were written")
    buffers = iter(parts[2:])
    return [
        {name: _array(next(buffers), dtype, shape) for name, dtype, shape in phase}
        for phase in json.loads(bytes(parts[1]))["phases"]
    ]


def _parts(view: memoryview) -> list[memoryview] | None:
    """The body of `packed`, in the parts that it was joined from; None where it does not add up."""
    start = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    try:
        lengths = json.loads(bytes(view[_LENGTH_BYTES:start]))["lengths"]
        ends = [0, _LENGTH_BYTES, *accumulate(lengths, initial=start)]
    except (ValueError, KeyError, TypeError):
        return None
    return [view[a:b] for a, b in pairwise(ends)] if ends[-1] == len(view) else None


def _digest(parts: Sequence[bytes | memoryview]) -> bytes:
    return bytes.fromhex(digest_bytes(*parts))


def _buffer(array: NDArray[Any]) -> bytes | memoryview:
    if array.dtype.hasobject:  # strings, which have no raw bytes
        return json.dumps(array.reshape(-1).tolist()).encode()
    if not array.size:
        return b""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _array(buffer: memoryview, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    if np.dtype(dtype).hasobject:
        made = np.empty(tuple(shape), object)
        made.reshape(-1)[:] = json.loads(bytes(buffer))
        return made
    # A copy, since kernels may want aligned memory.
    return np.frombuffer(buffer, np.dtype(dtype)).reshape(tuple(shape)).copy()
