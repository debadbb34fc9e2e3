"""Content digests: SHA-256 over canonical forms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest_bytes(*parts: bytes | memoryview) -> str:
    """Hex SHA-256 over length-prefixed parts, so that ``(ab, c)`` and ``(a, bc)`` differ."""
    h = hashlib.sha256()
    for part in parts:
        view = memoryview(part).cast("B") if len(part) else memoryview(b"")
        h.update(view.nbytes.to_bytes(8, "little"))
        h.update(view)
    return h.hexdigest()


def digest_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no white space)."""
    return digest_bytes(canonical_json(value).encode())


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space. Raises `TypeError` on anything else."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_arrays(arrays: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """Hex SHA-256 over named arrays: name, dtype, shape and bytes of each, sorted by name."""
    parts: list[bytes | memoryview] = []
    for name, array in sorted(arrays, key=lambda item: item[0]):
        parts.append(f"{name}|{array.dtype.str}|{array.shape}".encode())
        parts.append(_bytes_of(np.ascontiguousarray(array)))
    return digest_bytes(*parts)


def _bytes_of(array: NDArray[Any]) -> bytes | memoryview:
    """The bytes of a contiguous array, without a copy where that is possible."""
    if not array.size or array.dtype.hasobject:
        return array.tobytes()
    return array.reshape(-1).view(np.uint8).data
