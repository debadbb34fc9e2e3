"""NumPy files: the arrays of an .npz or .npy file, memory-mapped where they can be."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdist.data.stored import not_found, unreadable
from qdist.errors import DataError

_SUFFIXES = (".npz", ".npy")

# RuntimeError: zipfile's word for an encrypted member or an unknown compression.
_READ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path, members: list[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of one .npz file, or the one array of an .npy file under ``""``.

    Memory-mapped and read-only, except what is compressed or empty. Raises QD301, QD306
    (unreadable), QD307 (no such array).
    """
    if not path.exists():
        raise not_found(path, "an .npz or .npy file, or a folder of .npz files")
    if path.suffix not in _SUFFIXES:
        raise _unreadable(path, f"a file with the ending {path.suffix!r}")
    try:
        if path.suffix == ".npy":
            return _read_npy(path, members)
        with zipfile.ZipFile(path) as archive:
            _check_members(path, members, [_stem(name) for name in archive.namelist()])
            return {member: _read_member(path, archive, member) for member in members}
    except _READ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, str(error) or type(error).__name__) from error


def _read_npy(path: Path, members: list[str]) -> dict[str, NDArray[Any]]:
    if members != [""]:
        raise DataError(
            "QD307",
            where=str(path),
            got=f"the keys {', '.join(repr(member) for member in members)} for an .npy file",
            expected="one model input mapped to the empty key: an .npy file holds one array",
            mend="set inputs={NAME: ''} without labels, or save an .npz file",
        )
    return {"": _load_npy(path)}


def _load_npy(path: Path) -> NDArray[Any]:
    """Memory-mapped where it holds anything, since an empty map is refused by the system."""
    with path.open("rb") as stream:
        array = np.lib.format.open_memmap(path, mode="r") if _has_items(stream) else None
    return np.load(path, allow_pickle=False) if array is None else array


def _has_items(stream: Any) -> bool:
    shape, _, _ = _header(stream)
    return 0 not in shape


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of the .npy data that starts here. Raises `ValueError`."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _stem(member: str) -> str:
    return member.removesuffix(".npy")


def _check_members(path: Path, wanted: list[str], there: list[str]) -> None:
    missing = [key for key in wanted if key not in there]
    if missing:
        raise DataError(
            "QD307",
            where=str(path),
            got=f"no array named {', '.join(repr(key) for key in missing)}",
            expected=f"one of the arrays there: {', '.join(sorted(there)) or 'none'}",
            mend="name the array with inputs={NAME: KEY} or labels=KEY",
        )


def _read_member(path: Path, archive: zipfile.ZipFile, member: str) -> NDArray[Any]:
    """One array of an .npz: mapped where the archive stores it uncompressed."""
    name = f"{member}.npy" if f"{member}.npy" in archive.namelist() else member
    info = archive.getinfo(name)
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(stream)
        n_header_bytes = stream.tell()
    if info.compress_type != zipfile.ZIP_STORED or 0 in shape or dtype.hasobject:
        with archive.open(info) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    with path.open("rb") as raw:
        # The local header repeats name and extra field, with an extra length of its own.
        raw.seek(info.header_offset + 26)
        lengths = raw.read(4)
    n_name, n_extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return np.memmap(
        path,
        mode="r",
        dtype=dtype,
        shape=shape,
        order="F" if fortran else "C",
        offset=info.header_offset + 30 + n_name + n_extra + n_header_bytes,
    )


def _unreadable(path: Path, got: str) -> DataError:
    return unreadable(
        path,
        got,
        "an .npz or .npy file of plain numbers, whole and without pickled objects",
        "save the arrays again with numpy.savez or numpy.save",
    )
