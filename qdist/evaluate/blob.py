"""SlimAI's blob: one tensor as text; and the names of such files.

Our reading of the vendor's documentation. Line 1 is ``1.00000000e+00 W H C N F32``: the number by
which the values are divided to dequantize them, then the extents. Line 2 holds the values in NCHW
order with six decimals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.digest import digest_bytes
from qdist.errors import DataError
from qdist.files import write_text

_LONGEST_NAME_BYTES = 96
"""Of a sample or a tensor in a file name: two of them and a suffix stay below 255."""
_EXTENSION = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}$")


def as_nchw(values: NDArray[Any], *, is_output: bool) -> NDArray[Any]:
    """A tensor of any rank as ``[N, C, H, W]``.

    The vendor takes every output of a model as NHWC, whatever the model means by it, and writes
    it transposed: ``[1, 1, 5618, 15]`` becomes C = 15, H = 1, W = 5618. Our reading for the rest:
    lower ranks get their missing extents as 1 after the batch (``[N, D]`` is C = D, ``[N, T, D]``
    is C = D and W = T), higher ranks fold the extents after the batch into H. Layers inside the
    model (``is_output=False``) of rank 4 and above are NCHW as ONNX has them, with the extra
    extents folded into H.
    """
    shape = values.shape
    if not is_output and values.ndim >= 4:
        return values.reshape(shape[0], shape[1], prod(shape[2:-1]), shape[-1])
    n, rest = (shape[0], shape[1:]) if values.ndim >= 2 else (1, shape)
    width, channels = (1, 1, *rest)[-2:]
    return values.reshape(n, prod(rest[:-2]), width, channels).transpose(0, 3, 1, 2)


def write_blob(path: Path, values: NDArray[Any]) -> Path:
    """Write ``values[N, C, H, W]``, whole or not at all, with coefficient 1. Raises QD603.

    Values of other types are written as the float32 numbers nearest to them: ``F32`` is the only
    type that is documented.
    """
    n, c, h, w = values.shape
    numbers = values.astype(np.float32).ravel().tolist()
    text = " ".join(map("%.6f".__mod__, numbers))
    return write_text(path, f"{1.0:.8e} {w} {h} {c} {n} F32\n{text}\n")


def read_blob(path: Path) -> tuple[float, NDArray[np.float32]]:
    """The coefficient and the values as stored, ``float32[N, C, H, W]``; divide to dequantize.

    Raises `DataError` QD306.
    """
    try:
        header, _, body = path.read_text(encoding="utf-8").partition("\n")
        coefficient, *extents, kind = header.split()
        w, h, c, n = map(int, extents)
        values = np.array(body.split(), np.float32).reshape(n, c, h, w)
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    if kind != "F32":
        raise _unreadable(path, f"values of type {kind}")
    return float(coefficient), values


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> the same in letters, digits, ``.``, ``-`` and ``_``; different names stay different,
    on file systems without case too. Letters of any script are letters."""
    parts: dict[str, str] = {}
    taken: set[str] = set()
    for name in dict.fromkeys(names):
        part = next(part for part in _numbered(_safe(name)) if part.casefold() not in taken)
        taken.add(part.casefold())
        parts[name] = part
    return parts


def sample_names(keys: Iterable[str], groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """Sample key -> its part of file names, without the extension of an image.

    No two files ``<sample>_<name>`` have one name, for the names of each of ``groups`` (which lie
    in folders of their own), even where ``a_b`` and ``c`` meet ``a`` and ``b_c``.
    """
    parts: dict[str, str] = {}
    taken: list[set[str]] = [set() for _ in groups]
    for key in dict.fromkeys(keys):
        for part in _numbered(_safe(_EXTENSION.sub("", key) or key)):
            files = [{f"{part}_{name}".casefold() for name in group} for group in groups]
            if all(map(set.isdisjoint, taken, files)):
                break
        for held, new in zip(taken, files, strict=True):
            held |= new
        parts[key] = part
    return parts


def _safe(name: str) -> str:
    safe = re.sub(r"[^\w.-]+", "_", name).strip("_").lstrip(".-") or "unnamed"
    if len(safe.encode()) <= _LONGEST_NAME_BYTES:
        return safe
    # Long names differ at their ends; the digest tells apart those that do not.
    end = safe.encode()[-(_LONGEST_NAME_BYTES - 9) :].decode(errors="ignore")
    return f"{digest_bytes(name.encode())[:8]}_{end}"


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    for i in count(2):
        yield f"{stem}.{i}"


def _unreadable(path: Path, got: str) -> DataError:
    return DataError(
        "QD306",
        where=str(path),
        got=got,
        expected="a blob: a line '1.00000000e+00 W H C N F32', then W*H*C*N numbers",
        mend="dump the comparison again",
    )
